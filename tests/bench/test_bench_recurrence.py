"""The benchmark of recurrent layers: all sides are equal, and the table is complete."""

import json
import sys

import jax
import numpy as np
import pytest

from experiments.bench import runner
from experiments.bench.networks import recurrent
from experiments.bench.networks.recurrent import Sequence
from experiments.bench.peers import flax_networks, torch_networks, torch_runs
from experiments.bench.sections import recurrence
from experiments.common import measuring

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("as_shipped")]
TINY = {cell: Sequence(cell, 4, 5, 3) for cell in recurrent.CELLS}
every_cell = pytest.mark.parametrize("cell", TINY)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(measuring, "SAMPLE_SECONDS", 1e-6)
    monkeypatch.setattr(torch_runs, "cores", lambda: 1)  # the tests have the others


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
    data = recurrent.make_case(case, 0)
    want = answer(recurrent.explicit, case, *data)
    for side in (recurrent.same_layers, recurrent.plain):
        assert_alike(answer(side, case, *data), want)


@every_cell
def test_flax_has_the_same_gradient(cell):
    pytest.importorskip("flax")
    case = TINY[cell]
    data = recurrent.make_case(case, 0)
    value, grads = answer(recurrent.explicit, case, *data)
    got = answer(flax_networks.recurrent_side, case, *data)
    assert_alike(got, (value, flax_networks.recurrent_state(case, grads)))


@every_cell
def test_pytorch_has_the_same_gradient(cell):
    pytest.importorskip("torch")
    case = TINY[cell]
    data = recurrent.make_case(case, 0)
    value, grads = answer(recurrent.explicit, case, *data)
    got_value, got = torch_networks.recurrent_side(case, *data).run()
    want = torch_networks.recurrent_weights(grads)
    if cell == "LSTM":
        want["rnn.bias_hh_l0"] = want["rnn.bias_ih_l0"]
    assert_alike((got_value.numpy(), {n: g.numpy() for n, g in got.items()}), (value, want))


def test_a_table_comes_out_without_the_peers(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "flax", None)
    table = recurrence.TABLES["gradient"]._replace(cases=(TINY["GRU"],))
    monkeypatch.setitem(runner.SECTIONS, "recurrence", {"gradient": table})
    path = tmp_path / "figures.json"
    runner.main(sections=("recurrence",), repeats=1, json=path)
    rows = json.loads(path.read_text())["recurrence"]["gradient"]
    measured = [row for row in rows if row["problem"] is None]
    assert [row["against"] for row in measured] == ["jax.grad, the same layers", "jax.grad, a scan"]
    assert all(row["ratio"] > 0 for row in measured)
    missing = {row["problem"] for row in rows} - {None}
    assert missing == {"torch is not installed", "flax is not installed"}
    assert "### Gradient of a recurrent layer" in capsys.readouterr().out


def test_the_cases_are_those_that_are_asked_for():
    cases = recurrence.TABLES["gradient"].cases
    assert {(case.cell, case.width) for case in cases} == {
        (cell, width) for cell in ("LSTM", "GRU") for width in (128, 256, 512)
    }
    assert {(case.length, case.n) for case in cases} == {(128, 32)}


@every_cell
def test_the_gemm_rate_is_of_the_matrix_products_of_the_program(cell):
    case = Sequence(cell, 64, 1, 4)  # one step, because the body of a loop counts once
    program = measuring.compile_program(*recurrent.plain(case, *recurrent.make_case(case, 0)))
    products = recurrent.step_products(case)
    first = 2 * case.n * recurrent.GATES[cell] * case.width**2
    # The first state is a constant: its derivative is not computed.
    assert products - first <= program.flop <= products
