"""The benchmark of perceptrons: it compares equal work, and its tables are complete.

No time is asserted. What a sweep costs by the compiler's count is in `test_costs`.
"""

import json
import math
import sys

import jax
import numpy as np
import pytest

import jaxbp as bp
from experiments.bench import comparing, quantities, runner, tables
from experiments.bench.loops import Training
from experiments.bench.networks import perceptrons
from experiments.bench.networks.perceptrons import Perceptron
from experiments.bench.networks.sides import LOSS
from experiments.bench.peers import per_example, scikit
from experiments.bench.sections import quantities as quantities_section
from experiments.bench.sections import training
from experiments.common import measuring

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("as_shipped")]
CASE = Perceptron((784, 512, 512, 10), 256)


@pytest.fixture
def short_samples(monkeypatch):
    monkeypatch.setattr(measuring, "SAMPLE_SECONDS", 1e-6)


def test_the_gemm_rate_is_of_the_matrix_products_of_the_program():
    function, *arguments = perceptrons.explicit(CASE, *perceptrons.make_case(CASE, 0))
    program = measuring.compile_program(function, *arguments)
    products = perceptrons.step_products(CASE)
    assert products <= program.flop <= 1.01 * products


def gradient_and_norms_both_ways(case):
    """In one sweep, and from the gradients of all examples."""
    mean_loss = perceptrons.plain_mean_loss(case.activation)
    return (
        quantities.gradient_and_norms(perceptrons.make_net(case)),
        per_example.from_all_gradients(per_example.mean_and_norms, mean_loss),
    )


def assert_alike(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), got, want)


def test_gradient_and_norms_take_a_small_part_of_the_memory_of_vmap():
    case = Perceptron((784, 128, 128, 10), 64)
    data, functions = perceptrons.make_case(case, 0), gradient_and_norms_both_ways(case)
    ours, theirs = (measuring.compile_program(f, *data).temporary_bytes for f in functions)
    # Theirs holds a gradient for every example, [N, I, O], ours what is kept anyway, [N, O].
    assert 50 * ours < theirs


def test_gradient_and_norms_agree_with_vmap():
    case = Perceptron((20, 7, 7, 3), 5, "gelu")
    data = perceptrons.make_case(case, 0)
    got, want = (jax.jit(function)(*data) for function in gradient_and_norms_both_ways(case))
    assert_alike(got, want)


@pytest.mark.usefixtures("short_samples")
@pytest.mark.parametrize(
    ("section", "name"),
    [("gradient", "gradient"), ("quantities", "norms"), ("quantities", "vmap")],
)
def test_a_table_is_printed_and_its_figures_are_saved(section, name, tmp_path, capsys, monkeypatch):
    path, table = tmp_path / "figures.json", runner.SECTIONS[section][name]
    monkeypatch.setitem(runner.SECTIONS, section, {name: table})
    runner.main(sections=(section,), repeats=1, quick=True, json=path)
    printed = capsys.readouterr().out
    saved = json.loads(path.read_text())
    (row,) = saved[section][name]
    assert row["case"] == "784-64-64-10 relu, N = 32"
    assert row["ratio"] > 0
    assert all(figure > 0 for pair in ("ms", "flop", "temporary_bytes") for figure in row[pair])
    assert f"### {table.title}" in printed
    header, rule, line = [x for x in printed.splitlines() if x.startswith("|")]
    assert header.count("|") == rule.count("|") == line.count("|")
    assert f"**{row['ratio']:.2f}**" in line
    assert row["wanted"] in line
    assert ("of a GEMM's rate" in header) == (name == "gradient")
    assert saved["environment"]["machine"] in printed
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.usefixtures("short_samples")
@pytest.mark.parametrize(
    "optimizer", sorted({case.optimizer for case in training.TABLES["training"].cases})
)
def test_training_is_compared_with_the_same_training_elsewhere(optimizer):
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    case = Training(Perceptron((8, 16, 3), 16), 50, optimizer, 20)
    rows = list(training.training(case, 1, 0))
    assert [row.against.split(",")[0] for row in rows] == ["PyTorch", "scikit-learn"]
    for row in rows:
        assert row.problem is None
        assert row.ratio > 0
        ours, theirs = row.loss
        assert 0.5 < ours / theirs < 2


QUICK = Perceptron((20, 7, 7, 3), 5)


@pytest.mark.usefixtures("short_samples")
def test_every_quantity_is_measured_and_every_peer_named(monkeypatch):
    def broken(*args):
        raise RuntimeError("no luck")

    makers = {"vmap(grad)": per_example.vmap_runs, "peer": broken}
    monkeypatch.setattr(quantities_section, "PEERS", makers)
    rows = list(quantities_section.quantities(QUICK, 1, 0))
    ours = [row for row in rows if row.against == "bp.value_and_grad"]
    assert [row.what for row in ours] == list(quantities.QUANTITIES)
    assert all(row.ratio > 0 and row.temporary_bytes for row in ours)
    *theirs, last = rows[len(ours) :]
    assert [row.what for row in theirs] == ["norms", "clipped sum", "second moment"]
    assert all(row.against == "vmap(grad): its plain gradient" for row in theirs)
    assert last.problem == "failed: RuntimeError: no luck"


@pytest.mark.usefixtures("short_samples")
def test_where_one_quantity_of_a_peer_fails_the_others_are_measured():
    def broken():
        raise RuntimeError("no luck")

    runs = {"a": lambda: [int, int], "b": broken, "c": lambda: [int, int]}
    a, b, c = comparing.peer_rows(QUICK, "peer", lambda: runs, 1)
    assert (a.what, b.what, c.what) == ("a", "b", "c")
    assert b.problem == "failed: RuntimeError: no luck"
    assert a.ratio > 0
    assert c.ratio > 0


def test_a_sequence_has_every_quantity_too(monkeypatch):
    case = Perceptron((20, 7, 7, 3), 5, t=4)
    assert str(case) == "20-7-7-3 relu, N = 5, T = 4"
    rows = {row.what: row for row in quantities_section.quantities(case, 1, 0)}
    assert list(rows) == list(quantities.QUANTITIES)
    exact = rows.pop("GGN diagonal (exact)")
    assert exact.problem == "not run: it takes 12 columns, T for each class"
    assert all(row.ratio > 0 for row in rows.values())


def test_peers_that_form_all_gradients_are_not_run_out_of_memory():
    case = Perceptron((784, 1024, 1024, 10), 512)
    made = []
    runs = {"clipped sum, hooks": made.append, "clipped sum, ghost": lambda: [made.clear] * 2}
    params, *_ = perceptrons.make_case(case, 0)
    size = comparing.gradients_bytes(params, case.n)
    large, ghost = comparing.peer_rows(case, "Opacus", lambda: runs, 1, size=size)
    assert (large.what, large.problem) == (
        "clipped sum, hooks", "not run: the gradients alone take 3.8 GB"
    )  # fmt: skip
    assert ghost.ratio > 0


def test_each_quantity_is_the_one_it_is_called():
    net, (params, inputs, labels) = perceptrons.make_net(QUICK), perceptrons.make_case(QUICK, 0)

    def read(reading, **error):
        return bp.backprop(net, LOSS, read=reading, **error)(params, inputs, labels)[1]

    got = {name: make(net)(params, inputs, labels) for name, make in quantities.QUANTITIES.items()}
    grads = read(bp.mean)
    assert_alike(got["norms"][1:], (grads, bp.example_norms(read(bp.sq_norms))))
    beside = {"second moment": bp.second_moment, "variance": bp.variance}
    for name, reading in beside.items():
        assert_alike(got[name][1], {"grads": grads, "quantity": read(reading)})
    one, two = (got[f"clipped sum, {sweeps}"].grads for sweeps in ("one sweep", "two sweeps"))
    assert_alike(one, two)
    assert_alike(one, bp.reweighted(net, LOSS, bp.clip_weights(1.0))(
        params, inputs, labels
    ).grads)  # fmt: skip
    for name in ("KFAC (MC 1)", "GGN diagonal (MC 1)", "GGN diagonal (exact)", "gram"):
        assert_alike(got[name][1], grads)
    exact = read(bp.diagonal, error=bp.ggn_columns)
    assert_alike(got["GGN diagonal (exact)"][2], exact)
    squares = sum(jax.tree.leaves(read(bp.sq_norms)))
    assert_alike(np.diagonal(got["gram"][2]), squares)


def test_a_peer_that_is_missing_or_fails_is_reported_and_the_rest_goes_on(
    monkeypatch, short_samples, capsys
):
    def broken(*args):
        raise RuntimeError("no | luck\nat all")

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(scikit, "train_sklearn", broken)
    norms = {"norms": runner.SECTIONS["quantities"]["norms"]}
    monkeypatch.setitem(runner.SECTIONS, "quantities", norms)
    runner.main(sections=("training", "quantities"), repeats=1, quick=True)
    printed = capsys.readouterr().out
    assert "| PyTorch | torch is not installed | >= 1.3 |" in printed
    assert "| scikit-learn | failed: RuntimeError: no / luck | >= 5 |" in printed
    assert "| bp.value_and_grad | **" in printed


def test_gradients_too_large_for_vmap_are_not_tried():
    (row,) = quantities_section.vmap(Perceptron((784, 1024, 1024, 10), 256), 1, 0)
    assert row.problem == "not run: the gradients alone take 1.9 GB"


@pytest.mark.parametrize(
    ("pair", "shown"),
    [
        (None, ""),
        ((None, None), ""),
        ((1234.5, 0.012345), "1,230 / 0.0123"),
        ((12.0, None), "12"),
        ((0.0, 1.0), "0 / 1"),
        ((math.nan, 1.0), "nan / 1"),
    ],
)
def test_pairs_are_shown_in_three_digits(pair, shown):
    assert tables.show_pair(pair) == shown


def test_every_wanted_figure_is_of_a_quantity():
    assert set(quantities_section.WANTED) <= set(quantities.QUANTITIES)
