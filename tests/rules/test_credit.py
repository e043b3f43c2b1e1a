"""Credit forward in time: rtrl is the exact gradient, and the others are their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import late, swept
from oracles import assert_close, credit_by_definition
from sequences import CELLS, PADDED, every_cell, problem

import jaxbp as bp

N, T, INPUTS, H = 3, 5, 2, 3
RULES = {"rtrl": bp.rtrl, "snap1": bp.snap1, "eprop": bp.eprop}
every_rule = pytest.mark.parametrize("rule", RULES)


def read_by(layer, rule, params, x, dy, read=bp.per_example):
    """(dx, readings) of a layer by a rule, in one program."""

    @jax.jit
    def function(params, x, dy):
        _, cache = layer.forward(params, x)
        return layer.backward(rule.choose((), params), cache, dy, read=read)

    return function(params, x, dy)


@pytest.mark.parametrize("rule", [name if name == "rtrl" else late(name) for name in RULES])
@every_cell
def test_every_example_s_gradient_is_that_of_the_definition(kind, rule, key):
    layer = bp.recurrent(CELLS[kind](H), learn_initial=True)
    params, x, dy = problem(layer, key, (T, INPUTS))
    _, got = read_by(layer, RULES[rule](), params, x, dy)
    assert_close(got, credit_by_definition(kind, rule, params, x, dy))


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("simple_rnn", {}),
        ("lstm", {"mask": PADDED, "reverse": True, "learn_initial": True}),
        ("gru", {"segment": 2, "horizon": 4, "learn_initial": True}),
        ("gru", {"mask": PADDED, "horizon": 2, "reverse": True}),
    ],
    ids=["whole", "masked and backwards", "in segments and cut", "cut, masked and backwards"],
)
def test_rtrl_is_backpropagation_through_time(kind, how, key):
    layer = bp.recurrent(CELLS[kind](H), **how)
    params, x, dy = problem(layer, key)

    def read(signal):
        return {f.__name__: f(signal) for f in (bp.mean, bp.per_example, bp.sq_norms)}

    want = read_by(layer, bp.exact(), params, x, dy, read)
    assert_close(read_by(layer, bp.rtrl(), params, x, dy, read), want)


@pytest.mark.parametrize("rule", ["snap1", "eprop"])
def test_the_approximations_are_not_exact_but_at_the_last_step(rule, key):
    layer = bp.recurrent(bp.lstm(H))
    params, x, dy = problem(layer, key)
    _, exact = read_by(layer, bp.exact(), params, x, dy, bp.keep)
    dx, signals = read_by(layer, RULES[rule](), params, x, dy, bp.keep)
    same = jnp.isclose(signals["bias"].deltas, exact["bias"].deltas).all(axis=(0, 2))
    assert same.tolist() == [False] * (len(same) - 1) + [True]
    assert_close(dx, signals["bias"].deltas @ params["weight"].T)


def test_one_unit_by_itself_has_the_exact_gradient_from_snap1(key):
    layer = bp.recurrent(bp.lstm(1))
    params, x, dy = problem(layer, key)
    want = read_by(layer, bp.exact(), params, x, dy)
    assert_close(read_by(layer, bp.snap1(), params, x, dy), want)


def test_eprop_of_a_simple_cell_lasts_one_step(key):
    layer = bp.recurrent(bp.simple_rnn(H))
    params, x, dy = problem(layer, key)
    want = read_by(bp.recurrent(bp.simple_rnn(H), horizon=1), bp.exact(), params, x, dy)
    assert_close(read_by(layer, bp.eprop(), params, x, dy), want)


@pytest.mark.thorough
@every_rule
def test_other_layers_stay_exact_and_stacked_ones_are_of_the_rule(rule, key):
    rule = RULES[rule]()
    stacked = bp.stack(bp.recurrent(bp.gru(H)), 2)
    net = bp.chain(bp.dense(H), stacked, bp.dense(2))
    params, x, dy = problem(net, key)
    assert rule.make(key, net, (T, INPUTS)) == ()
    tree = rule.choose((), params)
    for part in (0, 2):
        assert all(tree[part][leaf] is params[part][leaf] for leaf in params[part])
    first, second = (jax.tree.map(lambda a, i=i: a[i], params[1].layers) for i in (0, 1))
    written_out = bp.chain(bp.dense(H), *[bp.recurrent(bp.gru(H))] * 2, bp.dense(2))
    own = params[0], first, second, params[2]
    dx, got = read_by(net, rule, params, x, dy, bp.sq_norms)
    want_dx, want = read_by(written_out, rule, own, x, dy, bp.sq_norms)
    layers = jax.tree.map(lambda a, b: jnp.stack([a, b]), want[1], want[2])
    assert_close((dx, got), (want_dx, (want[0], bp.Stacked(layers), want[3])))


def test_random_broadcasts_teach_by_traces(key):
    """What is called random e-prop: two rules, one inside the other."""
    blocks = bp.recurrent(bp.lstm(H)), bp.dense(2)
    net, rule = bp.chain(*blocks), bp.direct_feedback(*blocks, rules=[bp.eprop(), bp.exact()])
    params, x, delta = problem(net, key, (T, INPUTS))
    state = rule.make(key, net, (T, INPUTS))
    tree = rule.choose(state, params)
    *_, got = swept(net, params, x, delta, tree=tree, read=bp.per_example)
    learning_signal = delta @ state.matrices[0]
    want = credit_by_definition("lstm", "eprop", params[0], x, learning_signal)
    assert_close(got[0], want)


@pytest.mark.thorough
@pytest.mark.parametrize("rule", ["rtrl", "snap1"])
def test_clipped_sums_are_of_the_rule_s_gradients(rule, key):
    net = bp.chain(bp.recurrent(bp.gru(2)), bp.dense(1))
    params, x, targets = problem(net, key, (4, INPUTS))
    how = {"rule": RULES[rule]()}
    sweep = jax.jit(bp.backprop(net, bp.squared_error, read=bp.per_example, **how))
    _, grads = sweep(params, x, targets)
    norms = jnp.sqrt(sum((g**2).reshape(len(x), -1).sum(1) for g in jax.tree.leaves(grads)))
    clipped = bp.reweighted(net, bp.squared_error, bp.clip_weights(float(norms[0])), **how)
    got = jax.jit(clipped)(params, x, targets)
    assert_close(got.norms, norms)
    weights = jnp.minimum(1, norms[0] / norms)
    want = jax.tree.map(lambda g: jnp.einsum("n,n...->...", weights, g), grads)
    assert_close(got.grads, want)


@every_rule
def test_a_state_that_is_not_its_own_is_refused(rule, key):
    params, _ = bp.recurrent(bp.gru(H)).init(key, (T, INPUTS))
    with pytest.raises(
        ValueError, match=f"^{rule}: got a state that is not its own: this rule has"
    ):
        RULES[rule]().choose(params, params)


def test_alignment_refuses_a_rule_that_has_no_error_of_its_own(key):
    net = bp.chain(bp.recurrent(bp.gru(H)), bp.dense(1))
    params, x, targets = problem(net, key, (T, INPUTS))
    measure = bp.alignment(net, bp.squared_error, rule=bp.rtrl())
    with pytest.raises(ValueError, match="alignment: rtrl carries no error back"):
        measure(params, x, targets)
    measure = bp.alignment(net, bp.squared_error, rule=bp.snap1())
    angles = jax.jit(measure)(params, x, targets)
    assert 0 < float(angles[0]["recurrent"].weight) < 90
    assert np.isclose(float(angles[0]["weight"].weight), 0)
