"""The benchmark of rules: each step follows its rule, and is timed against the exact one."""

import functools
import itertools
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import RULES
from oracles import assert_close

import jaxbp as bp
from experiments.bench import loops, runner
from experiments.bench.networks import perceptrons
from experiments.bench.networks.perceptrons import Perceptron
from experiments.bench.networks.sides import LOSS
from experiments.bench.peers import biotorch_runs
from experiments.bench.sections import rules
from experiments.common import measuring
from jaxbp.training.state import rule_keys

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("as_shipped")]
CASE = Perceptron((20, 7, 6, 3), 5)
BLOCKS = rules.make_blocks(CASE.sizes)
NET = bp.chain(*BLOCKS)
EXACT = bp.exact()
MEASURED = rules.make_rules(BLOCKS)
STRONG_DECAY = 0.1  # for BioTorch, since float32 hardly shows 1e-4 in a step
OPTIMIZER = "SGD with weight decay"
NAMES = [rule.name for rule, _ in MEASURED]
BIOTORCH = [
    "random_feedback",
    "sign_symmetric('uniform')",
    "sign_symmetric('fixed')",
    "sign_symmetric('batchwise')",
]


@pytest.fixture
def biotorch(monkeypatch):
    """The makers of BioTorch's runs, which are not run before they are asked for."""
    pytest.importorskip("torch")
    pytest.importorskip("biotorch")
    monkeypatch.setattr(biotorch_runs, "at_their_fastest", lambda *runs: runs)
    optimizer, options = loops.OPTIMIZERS[OPTIMIZER]
    options = {**options, "weight_decay": STRONG_DECAY}
    monkeypatch.setitem(loops.OPTIMIZERS, OPTIMIZER, (optimizer, options))
    return biotorch_runs.biotorch_runs(first_params(), *make_data())


@functools.cache
def compiled(rule):
    return rules.compile_step(BLOCKS, rule, *make_data(), 0)


def first_params():
    return compiled(EXACT).args[0].params


def make_data(sizes=CASE.sizes, n=CASE.n):
    return tuple(map(jnp.asarray, perceptrons.make_data(sizes, n, 0)))


def train(tree=None, *, steps=1, decay=1e-4):
    """The parameters after steps of SGD by its formulas; the tree, or they, carry the error."""
    params, (inputs, labels) = first_params(), make_data()
    trace = optax.tree.zeros_like(params)
    for _ in range(steps):
        outputs, cache = NET.forward(params, inputs)
        _, delta = LOSS(outputs, labels)
        _, grads = NET.backward(params if tree is None else tree, cache, delta, read=bp.mean)
        decayed = optax.tree.add_scale(grads, decay, params)
        trace = optax.tree.add_scale(decayed, 0.9, trace)
        params = optax.tree.add_scale(params, -0.02, trace)
    return params


def denses(params):
    return [params[0][0], params[1][0], params[2]]


def linears(model):
    return [layer for layer in model if hasattr(layer, "weight")]


def in_jax(tensor):
    return jnp.asarray(tensor.detach().numpy().T)


def assert_same_model(model, params):
    got = [{"weight": in_jax(x.weight), "bias": in_jax(x.bias)} for x in linears(model)]
    assert_close(got, denses(params))


def test_every_rule_of_the_library_is_measured():
    kinds = {name.split("(")[0] for name in [*NAMES, "exact"]}
    of_recurrent_layers = {"rtrl", "snap1", "eprop"}
    there = {make(*BLOCKS).name.split("(")[0] for make in RULES.values()}
    assert kinds == there - of_recurrent_layers


@pytest.mark.parametrize("rule", [EXACT, *[rule for rule, _ in MEASURED]], ids=["exact", *NAMES])
def test_every_step_is_by_its_rule_from_the_same_parameters(rule):
    program = compiled(rule)
    start, inputs, labels = program.args
    assert_close((start.params, (inputs, labels)), (first_params(), make_data()))
    after, _ = program.run()
    choose_key, _ = rule_keys(start)
    assert_close(after.params, train(rule.choose(start.rule_state, start.params, key=choose_key)))


def test_the_optimizer_has_momentum_and_weight_decay():
    weight, grad = jnp.float32(1e4), jnp.float32(1)
    optimizer, _ = loops.OPTIMIZERS[OPTIMIZER]
    first, state = optimizer.update(grad, optimizer.init(weight), weight)
    second, _ = optimizer.update(grad, state, weight)
    decayed = 1 + 1e-4 * 1e4
    np.testing.assert_allclose([first, second], [-0.02 * decayed, -0.02 * 1.9 * decayed], rtol=1e-6)


@pytest.mark.parametrize("sizes", [(784, 64, 64, 10), (784, *[16] * 16, 10)], ids=["two", "deep"])
def test_direct_feedback_alone_is_without_the_products_between_blocks(sizes):
    n, blocks = 32, rules.make_blocks(sizes)
    exact, random, direct = (
        rules.compile_step(blocks, rule, *make_data(sizes, n), 0).flop
        for rule in (EXACT, bp.random_feedback(), bp.direct_feedback(*blocks))
    )
    between = sum(i * o for i, o in itertools.pairwise(sizes[1:]))
    leaps = sizes[-1] * sum(sizes[1:-1])
    assert random == exact
    assert exact - direct == pytest.approx(2 * n * (between - leaps), rel=1e-3)


def test_a_row_is_the_rules_step_as_a_multiple_of_the_exact_one(monkeypatch):
    start = bp.TrainState(None, None, None, None)

    def compile_step(blocks, rule, *data):
        return measuring.Program(rule.name, (start,), 0.0, 0, 0.0)

    def measure(runs, repeats):
        names = [run.__self__.compiled for run in runs]
        return np.array([[1.0 if name == "exact" else 3.0] * repeats for name in names])

    monkeypatch.setattr(rules, "compile_step", compile_step)
    monkeypatch.setattr(rules, "measure", measure)
    monkeypatch.setattr(rules, "biotorch_runs", lambda params, inputs, labels: {})
    rows = list(rules.rules(CASE, 2, 0))
    assert [row.what for row in rows] == NAMES
    assert all(row.ratio == 3.0 and row.ms == (3000.0, 1000.0) for row in rows)


def test_the_table_has_every_rule_and_says_that_a_peer_is_missing(monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "biotorch", None)
    monkeypatch.setattr(measuring, "SAMPLE_SECONDS", 1e-6)
    table = rules.TABLES["rules"]._replace(cases=(CASE,))
    monkeypatch.setitem(runner.SECTIONS, "rules", {"rules": table})
    runner.main(sections=("rules",), repeats=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    header, _, *ours, theirs = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    ratio = "under the rule / exact (quartiles)"
    assert header[:5] == ["network", "rule", "against", ratio, "wanted"]
    assert [row[:3] for row in ours] == [["20-7-6-3 relu, N = 5", name, "exact"] for name in NAMES]
    assert [row[4] for row in ours] == ["<= 1.02"] * 4 + ["<= 1.10", "", "<= 1.00"]
    assert all(row[3].startswith("**") and row[header.index("MFLOP")] for row in ours)
    assert theirs[2] == "BioTorch: PyTorch's exact step"
    assert theirs[3].startswith("biotorch")
    assert theirs[3].endswith("is not installed")


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [
        ((784, 512, 512, 10), "784-512-512-10"),
        ((784, *[512] * 16, 10), "784-512x16-10"),
        ((5, 5, 5, 3, 5), "5x3-3-5"),
    ],
)
def test_a_size_that_repeats_is_written_once(sizes, shown):
    assert str(Perceptron(sizes, 128)) == f"{shown} relu, N = 128"


def test_biotorch_has_the_rules_that_are_called_so_here(biotorch):
    assert list(biotorch) == BIOTORCH
    assert set(BIOTORCH) <= set(NAMES)


@pytest.mark.parametrize("name", BIOTORCH)
def test_pytorchs_step_is_the_exact_one_by_the_same_optimizer(name, biotorch):
    _, exact = biotorch[name]()
    exact()
    assert_same_model(exact(), train(steps=2, decay=STRONG_DECAY))


@pytest.mark.parametrize("name", BIOTORCH)
def test_biotorchs_step_is_by_its_rule(name, biotorch):
    run, _ = biotorch[name]()
    model = run()
    feedback = [in_jax(layer.weight_backward) for layer in linears(model)]
    if name != "random_feedback":
        signs = [np.sign(dense["weight"]) for dense in denses(first_params())]
        if name == "sign_symmetric('fixed')":  # it keeps magnitudes, the others what has the signs
            feedback = [b * sign for b, sign in zip(feedback, signs, strict=True)]
        assert_close([np.sign(b) for b in feedback], signs)
    one, two, three = [{"weight": b, "bias": None} for b in feedback]
    assert_same_model(model, train(((one, ()), (two, ()), three), decay=STRONG_DECAY))
