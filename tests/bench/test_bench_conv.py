"""The benchmark of convolutional networks: that all are the same one, and that tables come out.

No time is asserted. Networks are compared in float32, which is what the peers compute in.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import convnets, peers
from experiments.bench import convolutions as bench_conv
from experiments.bench.convnets import Convnet
from experiments.common import measuring

pytestmark = pytest.mark.usefixtures("as_shipped")
TINY = Convnet(6, 2, (3, 4), 5)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(measuring, "SAMPLE_SECONDS", 1e-6)
    monkeypatch.setattr(peers, "cores", lambda: 1)  # the tests have the others


@pytest.fixture(scope="module")
def expected():
    """Parameters of which none is zero, a batch, and the gradient by autodiff of plain jax."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        params, *data = bench_conv.make_case(TINY, 0)
        params = jax.tree.map(lambda w: w + 0.1, params)
        function, *arguments = bench_conv.plain(TINY, params, *data)
        return (params, *data), *jax.jit(function)(*arguments)


def assert_alike(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        largest = float(np.max(np.abs(b)))
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("side", [bench_conv.explicit, bench_conv.autodiff])
def test_both_ways_through_the_library_have_the_same_gradient(side, expected):
    case, *want = expected
    function, *arguments = side(TINY, *case)
    assert_alike(list(jax.jit(function)(*arguments)), want)


def test_flax_has_the_same_gradient(expected):
    pytest.importorskip("flax")
    case, value, grads = expected
    function, *arguments = bench_conv.flax(TINY, *case)
    got_value, got = jax.jit(function)(*arguments)
    assert_alike(got_value, value)
    assert_alike(got, convnets.flax_state(TINY, grads))


def test_pytorch_has_the_same_gradient(expected):
    pytest.importorskip("torch")
    case, value, grads = expected
    got_value, got = bench_conv.torch_program(TINY, *case).run()
    assert_alike(np.asarray(got_value), value)
    assert_alike([g.numpy() for g in got.values()], convnets.torch_weights(TINY, grads))


def peer_answer(make_runs, what, case):
    run, _ = bench_conv.torch_runs(make_runs, what, TINY, *case)[what]()
    return run()


def test_the_norms_are_those_of_backpack(expected):
    pytest.importorskip("backpack")
    case, *_ = expected
    squares = [square.numpy() for _, square in peer_answer(peers.backpack_runs, "norms", case)]
    *_, norms = jax.jit(bench_conv.gradient_and_norms(convnets.make_convnet(TINY)))(*case)
    assert_alike(TINY.n * np.sqrt(sum(squares)), norms)  # of the terms of the mean loss


def test_the_clipped_sum_is_that_of_opacus(expected):
    pytest.importorskip("opacus")
    case, *_ = expected
    got = peer_answer(peers.opacus_runs, "clipped sum, ghost", case)
    answer = jax.jit(bench_conv.make_clipped(1)(convnets.make_convnet(TINY)))(*case)
    assert float(jnp.max(answer.norms)) > peers.MAX_NORM
    assert_alike([grad.numpy() for grad in got], convnets.torch_weights(TINY, answer.grads))


ROWS = {
    "gradient": ["jax.grad, the same layers", "jax.grad, plain lax"],
    "quantities": [*["bp.value_and_grad"] * 3, "jax.vmap(jax.grad)"],
}


@pytest.mark.parametrize("name", ROWS)
def test_a_section_prints_a_table_and_saves_its_figures_without_the_peers(
    name, tmp_path, capsys, monkeypatch
):
    for peer in ("torch", "flax"):
        monkeypatch.setitem(sys.modules, peer, None)
    section = bench_conv.SECTIONS[name]._replace(cases=(TINY,))
    monkeypatch.setitem(bench_conv.SECTIONS, name, section)
    path = tmp_path / "figures.json"
    bench_conv.main(sections=(name,), repeats=1, json=path)
    printed, saved = capsys.readouterr().out, json.loads(path.read_text())
    measured = [row for row in saved[name] if row["problem"] is None]
    missing = {row["problem"] for row in saved[name]} - {None}
    assert [row["against"] for row in measured] == ROWS[name]
    assert all(row["ratio"] > 0 for row in measured)
    assert missing <= {"torch is not installed", "flax is not installed"}
    assert f"### {section.title}" in printed
    assert str(TINY) in printed


def test_flax_and_pytorch_are_measured():
    pytest.importorskip("torch")
    pytest.importorskip("flax")
    rows = {row.against: row for row in bench_conv.gradient(TINY, 1, 0)}
    for peer in ("Flax", "PyTorch"):
        assert rows[peer].problem is None
        assert rows[peer].ratio > 0


def test_every_section_is_here():
    assert list(ROWS) == list(bench_conv.SECTIONS) == list(bench_conv.NAMES)


def test_the_cases_are_of_the_sizes_that_are_documented():
    assert str(bench_conv.CASES[0]) == "28x28x1, 16-32, N = 64"
    assert {case.n for case in bench_conv.CASES} == {64, 256}
    images, labels = convnets.make_images(TINY, 0)
    assert images.shape == (5, 6, 6, 2)
    assert images.dtype == jnp.float32
    assert labels.shape == (5,)
