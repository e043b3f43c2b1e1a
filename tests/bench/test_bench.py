"""The benchmark: that it compares like with like, and that its tables come out.

No time is asserted. What a sweep costs by the compiler's count is in `test_costs`.
"""

import json
import math
import sys
import types

import jax
import numpy as np
import pytest

import jaxbp as bp
from experiments.bench import runner as bench
from experiments.bench import trainers
from experiments.common import measuring

pytestmark = pytest.mark.usefixtures("as_shipped")
CASE = bench.Case((784, 512, 512, 10), 256)


@pytest.fixture
def short_samples(monkeypatch):
    monkeypatch.setattr(measuring, "SAMPLE_SECONDS", 1e-6)


class Clock:
    """A clock that only runs while `run` is called, which takes as long as its name says."""

    def __init__(self, seconds):
        self.seconds, self.now, self.calls = seconds, 0.0, []

    def perf_counter(self):
        return self.now

    def run(self, name):
        self.calls.append(name)
        self.now += self.seconds[name]


@pytest.fixture
def make_clock(monkeypatch):
    def make(**seconds):
        clock = Clock(seconds)
        monkeypatch.setattr(
            measuring, "time", types.SimpleNamespace(perf_counter=clock.perf_counter)
        )
        return clock

    return make


def test_the_gemm_rate_is_of_the_matrix_products_that_are_there():
    net, *data = bench.make_case(CASE, 0)
    program = measuring.compile_program(bp.value_and_grad(net, trainers.LOSS), *data)
    products = bench.step_products(CASE)
    assert products <= program.flop <= 1.01 * products


def test_gradient_and_norms_take_a_small_part_of_the_memory_of_vmap():
    case = bench.Case((784, 128, 128, 10), 64)
    net, *data = bench.make_case(case, 0)
    functions = bench.gradient_and_norms(net), bench.gradient_and_norms_by_vmap(case)
    ours, theirs = (measuring.compile_program(f, *data).temporary_bytes for f in functions)
    # Theirs holds a gradient for every example, [N, I, O], ours what is kept anyway, [N, O].
    assert 50 * ours < theirs


def test_gradient_and_norms_agree_with_vmap():
    case = bench.Case((20, 7, 7, 3), 5, "gelu")
    net, *data = bench.make_case(case, 0)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6),
        jax.jit(bench.gradient_and_norms(net))(*data),
        jax.jit(bench.gradient_and_norms_by_vmap(case))(*data),
    )


@pytest.mark.usefixtures("short_samples")
@pytest.mark.parametrize("name", ["gradient", "norms", "vmap"])
def test_a_section_prints_a_table_and_saves_its_figures(name, tmp_path, capsys):
    path = tmp_path / "figures.json"
    bench.main(sections=(name,), repeats=1, quick=True, json=path)
    printed = capsys.readouterr().out
    saved = json.loads(path.read_text())
    (row,) = saved[name]
    assert row["case"] == "784-64-64-10 relu, N = 32"
    assert row["ratio"] > 0
    assert all(figure > 0 for pair in ("ms", "flop", "temporary_bytes") for figure in row[pair])
    assert f"### {bench.SECTIONS[name].title}" in printed
    header, rule, line = [x for x in printed.splitlines() if x.startswith("|")]
    assert header.count("|") == rule.count("|") == line.count("|")
    assert f"**{row['ratio']:.2f}**" in line
    assert row["wanted"] in line
    assert ("of a GEMM's rate" in header) == (name == "gradient")
    assert saved["environment"]["machine"] in printed
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.usefixtures("short_samples")
@pytest.mark.parametrize("optimizer", trainers.OPTIMIZERS)
def test_training_is_compared_with_the_same_training_elsewhere(optimizer):
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    rows = list(bench.training(trainers.Training((8, 16, 3), 50, 16, optimizer, 20), 1, 0))
    assert [row.against.split(",")[0] for row in rows] == ["PyTorch", "scikit-learn"]
    for row in rows:
        assert row.problem is None
        assert row.ratio > 0
        ours, theirs = row.loss
        assert 0.5 < ours / theirs < 2


QUICK = bench.Case((20, 7, 7, 3), 5)


@pytest.mark.usefixtures("short_samples")
def test_every_quantity_is_measured_and_every_peer_named(monkeypatch):
    def broken(*args):
        raise RuntimeError("no luck")

    monkeypatch.setattr(bench, "PEERS", {"vmap(grad)": bench.PEERS["vmap(grad)"], "peer": broken})
    rows = list(bench.quantities(QUICK, 1, 0))
    ours = [row for row in rows if row.against == "bp.value_and_grad"]
    assert [row.what for row in ours] == list(bench.QUANTITIES)
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
    a, b, c = bench.peer_rows(QUICK, "peer", lambda: runs, 1)
    assert (a.what, b.what, c.what) == ("a", "b", "c")
    assert b.problem == "failed: RuntimeError: no luck"
    assert a.ratio > 0
    assert c.ratio > 0


def test_a_sequence_has_every_quantity_too(monkeypatch):
    case = bench.Case((20, 7, 7, 3), 5, t=4)
    assert str(case) == "20-7-7-3 relu, N = 5, T = 4"
    rows = {row.what: row for row in bench.quantities(case, 1, 0)}
    assert list(rows) == list(bench.QUANTITIES)
    exact = rows.pop("GGN diagonal (exact)")
    assert exact.problem == "not run: it takes 12 columns, T for each class"
    assert all(row.ratio > 0 for row in rows.values())


def test_peers_that_form_all_gradients_are_not_run_out_of_memory():
    case = bench.Case((784, 1024, 1024, 10), 512)
    made = []
    runs = {"clipped sum, hooks": made.append, "clipped sum, ghost": lambda: [made.clear] * 2}
    large, ghost = bench.peer_rows(case, "Opacus", lambda: runs, 1)
    assert (large.what, large.problem) == (
        "clipped sum, hooks", "not run: the gradients alone take 3.8 GB"
    )  # fmt: skip
    assert ghost.ratio > 0


def assert_alike(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), got, want)


def test_each_quantity_is_the_one_it_is_called():
    net, params, inputs, labels = bench.make_case(QUICK, 0)

    def read(reading, **error):
        return bp.backprop(net, trainers.LOSS, read=reading, **error)(params, inputs, labels)[1]

    got = {name: make(net)(params, inputs, labels) for name, (_, make) in bench.QUANTITIES.items()}
    grads = read(bp.mean)
    assert_alike(got["norms"][1:], (grads, bp.example_norms(read(bp.sq_norms))))
    beside = {"second moment": bp.second_moment, "variance": bp.variance}
    for name, reading in beside.items():
        assert_alike(got[name][1], {"grads": grads, "quantity": read(reading)})
    one, two = (got[f"clipped sum, {sweeps}"].grads for sweeps in ("one sweep", "two sweeps"))
    assert_alike(one, two)
    assert_alike(one, bp.reweighted(net, trainers.LOSS, bp.clip_weights(1.0))(
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
    monkeypatch.setattr(bench, "train_sklearn", broken)
    bench.main(sections=("training", "norms"), repeats=1, quick=True)
    printed = capsys.readouterr().out
    assert "| PyTorch | torch is not installed | >= 1.3 |" in printed
    assert "| scikit-learn | failed: RuntimeError: no / luck | >= 5 |" in printed
    assert "| bp.value_and_grad | **" in printed


def test_gradients_too_large_for_vmap_are_not_tried():
    (row,) = bench.vmap(bench.Case((784, 1024, 1024, 10), 256), 1, 0)
    assert row.problem == "not run: the gradients alone take 1.9 GB"


def test_runs_take_turns_in_reversed_order_every_other_round(make_clock):
    clock = make_clock(a=0.5, b=0.25)
    seconds = measuring.measure([lambda: clock.run("a"), lambda: clock.run("b")], 3)
    assert "".join(clock.calls) == "aabb" + "ab" + "ba" + "ab"
    np.testing.assert_allclose(seconds, [[0.5] * 3, [0.25] * 3])


def test_a_sample_of_a_short_run_is_many_calls_after_one_that_is_not_timed(make_clock):
    clock = make_clock(a=measuring.SAMPLE_SECONDS / 4)
    seconds = measuring.measure([lambda: clock.run("a")], 2)
    assert len(clock.calls) == 2 + 2 * (1 + 4)
    np.testing.assert_allclose(seconds, measuring.SAMPLE_SECONDS / 4)


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
    assert bench.show_pair(pair) == shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"repeats": 0}, "repeats is 0; it takes at least 1"),
        ({"seed": -1}, r"seed is -1; it takes an integer in \[0, 2\^32\)"),
        ({"json": "missing/figures.json"}, "there is no directory missing"),
    ],
)
def test_wrong_flags_are_refused(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "json" in flags:
        flags = {"json": bench.Path(flags["json"])}
    with pytest.raises(SystemExit, match=message):
        bench.main(**flags)
