"""The benchmark of convolutional networks: all sides are equal, and the tables are complete.

No time is asserted. Networks are compared in float32, which is what the peers compute in.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import every

from experiments.bench import quantities, runner
from experiments.bench.networks import convnets
from experiments.bench.networks.convnets import Convnet
from experiments.bench.peers import flax_networks, per_example, torch_networks, torch_runs
from experiments.bench.sections import convolutions
from experiments.common import measuring

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("as_shipped")]
TINY = Convnet(6, 2, (3, 4), 5)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(measuring, "SAMPLE_SECONDS", 1e-6)
    monkeypatch.setattr(torch_runs, "cores", lambda: 1)  # the tests have the others


@pytest.fixture(scope="module")
def expected():
    """Parameters of which none is zero, a batch, and the gradient by autodiff of plain jax."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        params, *data = convnets.make_case(TINY, 0)
        params = jax.tree.map(lambda w: w + 0.1, params)
        function, *arguments = convnets.plain(TINY, params, *data)
        return (params, *data), *jax.jit(function)(*arguments)


def assert_alike(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        largest = float(np.max(np.abs(b)))
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("side", [convnets.explicit, convnets.same_layers])
def test_both_ways_through_the_library_have_the_same_gradient(side, expected):
    case, *want = expected
    function, *arguments = side(TINY, *case)
    assert_alike(list(jax.jit(function)(*arguments)), want)


def test_flax_has_the_same_gradient(expected):
    pytest.importorskip("flax")
    case, value, grads = expected
    function, *arguments = flax_networks.convnet_side(TINY, *case)
    got_value, got = jax.jit(function)(*arguments)
    assert_alike(got_value, value)
    assert_alike(got, flax_networks.convnet_state(TINY, grads))


def test_pytorch_has_the_same_gradient(expected):
    pytest.importorskip("torch")
    case, value, grads = expected
    got_value, got = torch_networks.convnet_side(TINY, *case).run()
    assert_alike(np.asarray(got_value), value)
    got = {name: grad.numpy() for name, grad in got.items()}
    assert_alike(got, torch_networks.convnet_weights(TINY, grads))


def peer_answer(make_runs, what, case):
    run, _ = convolutions.torch_runs(make_runs, what, TINY, *case)[what]()
    return run()


def test_the_norms_are_those_of_backpack(expected):
    pytest.importorskip("backpack")
    case, *_ = expected
    squares = [
        square.numpy() for _, square in peer_answer(per_example.backpack_runs, "norms", case)
    ]
    *_, norms = jax.jit(quantities.gradient_and_norms(convnets.make_net(TINY)))(*case)
    assert_alike(TINY.n * np.sqrt(sum(squares)), norms)  # of the terms of the mean loss


def test_the_clipped_sum_is_that_of_opacus(expected):
    pytest.importorskip("opacus")
    case, *_ = expected
    got = peer_answer(per_example.opacus_runs, "clipped sum, ghost", case)
    answer = jax.jit(quantities.make_clipped(1)(convnets.make_net(TINY)))(*case)
    assert float(jnp.max(answer.norms)) > per_example.MAX_NORM
    want = torch_networks.convnet_weights(TINY, answer.grads)
    assert_alike([grad.numpy() for grad in got], list(want.values()))


ROWS = {
    "gradient": ["jax.grad, the same layers", "jax.grad, plain lax"],
    "quantities": [*["bp.value_and_grad"] * 3, "jax.vmap(jax.grad)"],
}


@every("name", {name: name for name in ROWS}, soon=("gradient",))
def test_a_table_is_printed_and_its_figures_are_saved_without_the_peers(
    name, tmp_path, capsys, monkeypatch
):
    for peer in ("torch", "flax"):
        monkeypatch.setitem(sys.modules, peer, None)
    table = convolutions.TABLES[name]._replace(cases=(TINY,))
    monkeypatch.setitem(runner.SECTIONS, "convolutions", {name: table})
    path = tmp_path / "figures.json"
    runner.main(sections=("convolutions",), repeats=1, json=path)
    printed, saved = capsys.readouterr().out, json.loads(path.read_text())
    rows = saved["convolutions"][name]
    measured = [row for row in rows if row["problem"] is None]
    missing = {row["problem"] for row in rows} - {None}
    assert [row["against"] for row in measured] == ROWS[name]
    assert all(row["ratio"] > 0 for row in measured)
    assert missing <= {"torch is not installed", "flax is not installed"}
    assert f"### {table.title}" in printed
    assert str(TINY) in printed


def test_flax_and_pytorch_are_measured():
    pytest.importorskip("torch")
    pytest.importorskip("flax")
    rows = {row.against: row for row in convolutions.gradient(TINY, 1, 0)}
    for peer in ("Flax", "PyTorch"):
        assert rows[peer].problem is None
        assert rows[peer].ratio > 0


def test_every_table_is_here():
    assert list(ROWS) == list(convolutions.TABLES) == list(runner.SECTIONS["convolutions"])


def test_the_gemm_rate_is_of_the_products_of_plain_jax():
    case = Convnet(32, 3, (16, 32), 4)
    program = measuring.compile_program(*convnets.plain(case, *convnets.make_case(case, 0)))
    # The compiler does not count products with the zeros around an image.
    assert program.flop == pytest.approx(convnets.step_products(case), rel=0.05)


def test_the_cases_are_of_the_sizes_that_are_documented():
    assert str(convolutions.CASES[0]) == "28x28x1, 16-32, N = 64"
    assert {case.n for case in convolutions.CASES} == {64, 256}
    images, labels = convnets.make_images(TINY, 0)
    assert images.shape == (5, 6, 6, 2)
    assert images.dtype == jnp.float32
    assert labels.shape == (5,)
