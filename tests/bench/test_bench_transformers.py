"""The benchmark of transformers: all sides are equal, and the tables are complete.

No time is asserted. Networks are compared in float32, which is what the peers compute in.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import every
from oracles import assert_close

import jaxbp as bp
from experiments.bench import quantities, runner
from experiments.bench.loops import Training
from experiments.bench.networks import gpts
from experiments.bench.networks.gpts import Gpt
from experiments.bench.peers import flax_networks, per_example, torch_networks, torch_runs
from experiments.bench.sections import transformers
from experiments.bench.tables import Row
from experiments.common import measuring
from jaxbp.signals.stacked import Stacked

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("as_shipped")]
TINY = Gpt(2, 16, 2, 6, 3, vocabulary=11)
LOOPS = {
    "written out": TINY,
    "recomputed": TINY._replace(recomputed=True),
    "scanned": TINY._replace(scanned=True),
    "scanned and recomputed": TINY._replace(scanned=True, recomputed=True),
}
ONE_BLOCK = TINY._replace(blocks=1)
DEEP = ONE_BLOCK._replace(scanned=True, recomputed=True)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(measuring, "SAMPLE_SECONDS", 1e-6)
    monkeypatch.setattr(transformers, "FEW_BLOCKS", 1)  # DEEP has as many
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # for the sake of the other tests
    monkeypatch.setattr(torch_runs, "cores", lambda: 1)  # the tests have the others


def make_case(gpt):
    """Parameters of which none is zero or one, and a batch of tokens and labels."""
    params, *data = gpts.make_case(gpt, 0)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [w + 0.2 * jax.random.normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)]
    return structure.unflatten(moved), *data


def assert_alike(got, want, tolerance=1e-4):
    """Within a part of an array's largest number, or a hundredth of it of the tree's.

    The gradient of a key's bias is zero, and what is computed of it rounding.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    largest = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(want))
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        atol = tolerance * max(float(np.max(np.abs(b))), largest / 100)
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=atol, err_msg=where)


def as_arrays(tensors):
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def in_its_loop(gpt, params):
    """Parameters of blocks that are written out, as the network has them."""
    if not gpt.scanned:
        return params
    tokens, positions, *blocks, norm, head = params
    stacked = Stacked(jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks))
    return tokens, positions, stacked, norm, head


@pytest.fixture(scope="module")
def expected():
    """The mean loss and its gradient, by autodiff of plain jax.numpy."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        case = make_case(TINY)
        function, *arguments = gpts.plain(TINY, *case)
        return case, *jax.jit(function)(*arguments)


@pytest.mark.parametrize(
    ("side", "loop"),
    [
        *[(gpts.explicit, loop) for loop in LOOPS],
        (gpts.same_layers, "written out"),
        (gpts.plain, "scanned and recomputed"),
    ],
)
def test_all_sides_have_the_same_gradient(side, loop, expected):
    (params, *data), value, grads = expected
    gpt = LOOPS[loop]
    function, *arguments = side(gpt, in_its_loop(gpt, params), *data)
    got_value, got = jax.jit(function)(*arguments)
    assert_alike(got_value, value)
    assert_alike(got, in_its_loop(gpt, grads))


@pytest.mark.parametrize("loop", LOOPS)
def test_flax_has_the_same_gradient(loop, expected):
    pytest.importorskip("flax")
    (params, *data), value, grads = expected
    gpt = LOOPS[loop]
    function, *arguments = flax_networks.gpt_side(gpt, in_its_loop(gpt, params), *data)
    got_value, got = jax.jit(function)(*arguments)
    assert_alike(got_value, value)
    assert_alike(got, flax_networks.gpt_state(gpt, in_its_loop(gpt, grads)))


def test_pytorch_has_the_same_gradient(expected):
    pytest.importorskip("torch")
    case, value, grads = expected
    got_value, got = torch_networks.gpt_side(TINY, *case).run()
    assert_alike(np.asarray(got_value), value)
    assert_alike(as_arrays(got), dict(torch_networks.gpt_weights(grads)))


def test_the_library_has_the_gradient_of_pytorch():
    pytest.importorskip("torch")
    case = make_case(TINY)
    function, *arguments = gpts.explicit(TINY, *case)
    value, grads = jax.jit(function)(*arguments)
    want_value, want = torch_networks.gpt_side(TINY, *case).run()
    assert_alike(value, np.asarray(want_value))
    assert_alike(dict(torch_networks.gpt_weights(grads)), as_arrays(want))


def pull_back(layer, params, x, dy):
    """Outputs, dx and the sums of gradients, in the library."""

    def function(params, x, dy):
        y, cache = layer.forward(params, x)
        return y, *layer.backward(params, cache, dy, read=bp.total)

    return jax.jit(function)(params, x, dy)


def pull_back_torch(function, x, dy):
    """Outputs and dx in PyTorch."""
    import torch

    x = torch.tensor(np.asarray(x), requires_grad=True)
    y = function(x)
    y.backward(torch.tensor(np.asarray(dy)))
    return jnp.asarray(y.detach().numpy()), jnp.asarray(x.grad.numpy())


def test_a_block_is_that_of_pytorch():
    pytest.importorskip("torch")
    params, *_ = make_case(TINY)
    block = gpts.make_block(TINY)
    shape = TINY.n, TINY.length, TINY.features
    x, dy = jax.random.normal(jax.random.key(2), (2, *shape))
    y, dx, grads = pull_back(block, params[2], x, dy)
    model = torch_networks.gpt(TINY, params)
    assert_close((y, dx), pull_back_torch(model.blocks[0], x, dy))
    wanted = {f"blocks.0.{name}": p.grad for name, p in model.blocks[0].named_parameters()}
    got = torch_networks.gpt_weights((*params[:2], grads, *params[3:]))
    assert_close({name: got[name] for name in wanted}, as_jax(wanted))


def as_jax(tensors):
    return {name: jnp.asarray(array) for name, array in as_arrays(tensors).items()}


def torch_attention(x):
    from torch.nn import functional

    n, t, _ = x.shape
    q, k, v = x.view(n, t, 3 * TINY.heads, -1).transpose(1, 2).chunk(3, dim=1)
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(n, t, -1)


def torch_gelu(x):
    from torch.nn import functional

    return functional.gelu(x, approximate="tanh")


def torch_norm(x):
    from torch.nn import functional

    return functional.layer_norm(x, x.shape[-1:], eps=gpts.EPS)


@pytest.mark.parametrize(
    ("layer", "features", "reference"),
    [
        (bp.gelu(), 16, torch_gelu),
        (bp.layer_norm(eps=gpts.EPS, dtype=jnp.float32), 16, torch_norm),
        (bp.dot_product_attention(TINY.heads, causal=True), 48, torch_attention),
    ],
    ids=["gelu", "layer_norm", "attention"],
)
def test_a_layer_is_that_of_pytorch(layer, features, reference):
    pytest.importorskip("torch")
    params, (*_, outputs) = layer.init(jax.random.key(0), (TINY.length, features))
    x = jax.random.normal(jax.random.key(2), (3, TINY.length, features))
    dy = jax.random.normal(jax.random.key(3), (3, TINY.length, outputs))
    assert_close(pull_back(layer, params, x, dy)[:2], pull_back_torch(reference, x, dy))


def test_the_gemm_rate_is_of_the_matrix_products_that_are_there():
    gpt = Gpt(1, 128, 4, 32, 4)
    program = measuring.compile_program(*gpts.explicit(gpt, *gpts.make_case(gpt, 0)))
    products = gpts.step_products(gpt)
    assert products <= program.flop <= 1.15 * products


def test_a_deep_network_takes_a_small_part_of_the_memory_of_flax():
    pytest.importorskip("flax")
    deep = Gpt(8, 64, 2, 32, 4, scanned=True, recomputed=True)
    case = gpts.make_case(deep, 0)

    def temporary_bytes(make, gpt):
        return measuring.compile_program(*make(gpt, *case)).temporary_bytes

    ours = temporary_bytes(gpts.explicit, deep)
    assert ours < 0.2 * temporary_bytes(flax_networks.gpt_side, deep._replace(recomputed=False))
    assert ours < temporary_bytes(flax_networks.gpt_side, deep)


def test_gradient_and_norms_agree_with_vmap():
    case = make_case(ONE_BLOCK)
    net = gpts.make_net(ONE_BLOCK)
    by_vmap = per_example.from_all_gradients(
        per_example.mean_and_norms, gpts.plain_mean_loss(ONE_BLOCK)
    )
    functions = quantities.gradient_and_norms(net), by_vmap
    got, want = (jax.jit(function)(*case) for function in functions)
    assert_alike(got, want)


def test_the_memory_of_pytorch_is_the_most_at_a_time():
    torch = pytest.importorskip("torch")
    kept = []

    def run():
        for _ in range(3):  # one after another
            torch.zeros(1000, dtype=torch.float32)
        kept.append(torch.zeros(500, dtype=torch.float32))
        torch.zeros(100, dtype=torch.float32)

    assert torch_runs.torch_device().peak_bytes(run) == 4000


def test_the_same_training_elsewhere_comes_to_the_same():
    pytest.importorskip("torch")
    pytest.importorskip("flax")
    case = Training(ONE_BLOCK, 12, "AdamW", 5)
    rows = list(transformers.training(case, 1, 0))
    assert [row.against for row in rows] == ["Flax", "PyTorch"]
    for row in rows:
        assert row.problem is None
        assert row.ratio > 0
        ours, theirs = row.loss
        assert 0.95 < ours / theirs < 1.05
        assert ours < 0.95 * TINY.length * np.log(TINY.vocabulary)


def cases_of(name):
    cases = {"training": (Training(ONE_BLOCK, 6, "AdamW"),), "deep": (DEEP,)}
    return cases.get(name, (ONE_BLOCK,))


ROWS = {
    "gradient": ["jax.grad, the same layers", "jax.grad, plain jnp"],
    "starting": [*["jax.grad, the same layers"] * 2, *["jax.grad, plain jnp"] * 2],
    "deep": ["jax.grad, the same layers"] * 3,
    "quantities": [*["bp.value_and_grad"] * 3, "jax.vmap(jax.grad)"],
    "training": [],
}


def test_every_table_is_here():
    assert list(ROWS) == list(transformers.TABLES) == list(runner.SECTIONS["transformers"])


@every("name", {name: name for name in ROWS}, soon=("gradient",))
def test_a_table_is_printed_and_its_figures_are_saved_without_the_peers(
    name, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "flax", None)
    table = transformers.TABLES[name]._replace(cases=cases_of(name))
    monkeypatch.setitem(runner.SECTIONS, "transformers", {name: table})
    path = tmp_path / "figures.json"
    runner.main(sections=("transformers",), repeats=1, json=path)
    printed = capsys.readouterr().out
    saved = json.loads(path.read_text())
    rows = saved["transformers"][name]
    measured = [row for row in rows if row["problem"] is None]
    missing = {row["problem"] for row in rows} - {None}
    assert [row["against"] for row in measured] == ROWS[name]
    assert all(row["ratio"] > 0 for row in measured)
    assert missing <= {"torch is not installed", "flax is not installed"}
    assert f"### {table.title}" in printed
    header, *_ = lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {header.count("|")}
    assert len(lines) == 2 + len(rows)
    assert saved["environment"]["machine"] in printed


def test_flax_and_pytorch_are_measured():
    pytest.importorskip("torch")
    pytest.importorskip("flax")
    rows = {row.against: row for row in transformers.gradient(ONE_BLOCK, 1, 0)}
    for peer in ("Flax", "PyTorch"):
        assert rows[peer].problem is None
        assert rows[peer].ratio > 0
        assert all(rows[peer].temporary_bytes)


def test_a_deep_network_is_measured_against_one_that_keeps_all_and_one_that_does_not(monkeypatch):
    pytest.importorskip("flax")
    monkeypatch.setattr(transformers, "FEW_BLOCKS", 3)
    rows = {
        (row.against, row.what): row for row in transformers.deep(DEEP._replace(blocks=3), 1, 0)
    }
    assert all(row.problem is None for row in rows.values())
    peers_memory = {}
    for against, what in rows:
        if what == "temporary memory":
            row = rows[against, what]
            ours, peers_memory[against] = row.temporary_bytes
            assert row.ratio == ours / peers_memory[against]
    keeping, recomputing, ours_keeping = peers_memory.values()
    assert list(peers_memory) == [
        "Flax, nnx.scan",
        "Flax, nnx.scan of nnx.remat",
        "jax.grad, the same layers",
    ]
    assert ours < recomputing < keeping
    assert recomputing < ours_keeping
    assert list(rows) == [
        (against, what)
        for against in peers_memory
        for what in ("temporary memory", "time", "compilation")
    ]


def test_where_peers_fail_compilation_is_still_compared_with_fewer_blocks(monkeypatch):
    def broken(*args):
        raise RuntimeError("no luck")

    monkeypatch.setattr(flax_networks, "gpt_side", broken)
    monkeypatch.setattr(transformers, "same_layers", broken)
    *peers_rows, last = transformers.deep(DEEP._replace(blocks=2), 1, 0)
    assert [row.problem for row in peers_rows] == ["failed: RuntimeError: no luck"] * 3
    assert (last.against, last.what) == ("the same with 1 blocks", "compilation")
    assert last.ratio > 0
    assert all(last.compile_s)


def test_every_compilation_is_from_nothing(monkeypatch):
    traced, forgotten = [], []
    monkeypatch.setattr(jax, "clear_caches", lambda: forgotten.append(len(traced)))

    def make(name, x):
        def function(x):
            traced.append(name)
            return x + 1

        return function, x

    row = Row("case", "peer", "")
    sides = [(make, (name, jnp.ones(2))) for name in "ab"]
    filled = transformers.compare_compilation(row, "<= 1", sides, 3)
    assert "".join(traced) == "ab" + "ba" + "ab"
    assert forgotten == list(range(6))
    assert filled.ratio > 0
