"""The benchmark of recurrent layers: that all sides are the same network, and a table comes out."""

import json
import sys

import jax
import numpy as np
import pytest

from experiments.bench import peers
from experiments.bench import recurrence as bench_time
from experiments.bench.recurrence import Sequence
from experiments.common import measuring

pytestmark = pytest.mark.usefixtures("as_shipped")
TINY = {cell: Sequence(cell, 4, 5, 3) for cell in bench_time.CELLS}
every_cell = pytest.mark.parametrize("cell", TINY)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(measuring, "SAMPLE_SECONDS", 1e-6)
    monkeypatch.setattr(peers, "cores", lambda: 1)  # the tests have the others


def answer(side, case, *data):
    function, *arguments = side(case, *data)
    return jax.jit(function)(*arguments)


def assert_alike(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        atol = 1e-5 * float(np.max(np.abs(b)))
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=atol, err_msg=where)


@every_cell
def test_all_sides_have_the_same_gradient(cell):
    case = TINY[cell]
    data = bench_time.make_case(case, 0)
    want = answer(bench_time.explicit, case, *data)
    for side in (bench_time.autodiff, bench_time.scan):
        assert_alike(answer(side, case, *data), want)


@every_cell
def test_flax_has_the_same_gradient(cell):
    pytest.importorskip("flax")
    case = TINY[cell]
    data = bench_time.make_case(case, 0)
    value, grads = answer(bench_time.explicit, case, *data)
    got = answer(bench_time.flax, case, *data)
    assert_alike(got, (value, bench_time.flax_state(case, grads)))


@every_cell
def test_pytorch_has_the_same_gradient(cell):
    pytest.importorskip("torch")
    case = TINY[cell]
    data = bench_time.make_case(case, 0)
    value, grads = answer(bench_time.explicit, case, *data)
    got_value, got = bench_time.torch_program(case, *data).run()
    want = bench_time.torch_weights(grads)
    if cell == "LSTM":
        want["rnn.bias_hh_l0"] = want["rnn.bias_ih_l0"]
    assert_alike((got_value.numpy(), {n: g.numpy() for n, g in got.items()}), (value, want))


def test_a_table_comes_out_without_the_peers(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "flax", None)
    section = bench_time.SECTIONS["gradient"]._replace(cases=(TINY["GRU"],))
    monkeypatch.setattr(bench_time, "SECTIONS", {"gradient": section})
    path = tmp_path / "figures.json"
    bench_time.main(repeats=1, json=path)
    rows = json.loads(path.read_text())["gradient"]
    measured = [row for row in rows if row["problem"] is None]
    assert [row["against"] for row in measured] == ["jax.grad, the same layers", "jax.grad, a scan"]
    assert all(row["ratio"] > 0 for row in measured)
    missing = {row["problem"] for row in rows} - {None}
    assert missing == {"torch is not installed", "flax is not installed"}
    assert "### Gradient of a recurrent layer" in capsys.readouterr().out


def test_the_cases_are_those_that_are_asked_for():
    cases = bench_time.SECTIONS["gradient"].cases
    assert {(case.cell, case.width) for case in cases} == {
        (cell, width) for cell in ("LSTM", "GRU") for width in (128, 256, 512)
    }
    assert {(case.length, case.n) for case in cases} == {(128, 32)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"repeats": 0}, "bench_time: repeats is 0; it takes at least 1"),
        ({"seed": -1}, r"seed is -1; it takes an integer in \[0, 2\^32\)"),
        ({"json": bench_time.Path("missing/figures.json")}, "there is no directory missing"),
    ],
)
def test_wrong_flags_are_refused(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        bench_time.main(**flags)
