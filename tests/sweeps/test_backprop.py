"""The calls that users make, on every network of the registry, against autodiff."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    NETWORKS,
    READINGS,
    SOON_NETWORKS,
    N,
    every,
    make_inputs,
    normal,
    output_shape,
    prepare,
)
from oracles import assert_close, per_example_grads, squared, value_and_grad

import jaxbp as bp

every_network = every("case", NETWORKS, soon=SOON_NETWORKS)


def problem(case, key):
    net, params, x, draw_key = prepare(case, key)
    targets = normal(key, output_shape(net, params, x))
    return net, params, x, targets, draw_key


@every_network
def test_value_and_grad_is_that_of_jax(case, key):
    net, params, x, targets, draw_key = problem(case, key)
    got = jax.jit(bp.value_and_grad(net, bp.squared_error))(params, x, targets, key=draw_key)
    assert_close(got, value_and_grad(net, squared, params, x, targets, draw_key))


@every("case", NETWORKS, soon={"classifier", "branching"})
def test_one_sweep_answers_every_reading(case, key):
    net, params, x, targets, draw_key = problem(case, key)
    sweep = jax.jit(bp.backprop(net, bp.squared_error, read=READINGS))
    values, answers = sweep(params, x, targets, key=draw_key)
    outputs, _ = net.forward(params, x, key=draw_key)
    assert_close(values, squared(outputs, targets))
    assert set(answers) == set(READINGS)

    grads = per_example_grads(net, squared, params, x, targets, draw_key)
    assert_close(answers["per_example"], grads)
    assert_close(answers["total"], jax.tree.map(lambda g: g.sum(0), grads))
    assert_close(answers["mean"], jax.tree.map(lambda g: g.mean(0), grads))
    sq_norms = jax.tree.map(lambda g: (g**2).reshape(N, -1).sum(1), grads)
    assert_close(answers["sq_norms"], sq_norms)
    assert_close(bp.example_norms(answers["sq_norms"]), jnp.sqrt(sum(jax.tree.leaves(sq_norms))))
    kept = jax.jit(lambda signals: bp.map_signals(bp.total, signals))(answers["keep"])
    assert_close(kept, answers["total"])


@every("case", NETWORKS, soon={"transformer"})
def test_a_reading_inside_the_sweep_is_the_same_as_after_it(case, key):
    net, params, x, targets, _ = problem(case, key)

    @jax.jit
    def both_ways(params, x, targets):
        _, inside = bp.backprop(net, bp.squared_error, read=READINGS)(params, x, targets)
        _, signals = bp.backprop(net, bp.squared_error, read=bp.keep)(params, x, targets)
        return inside, {name: bp.map_signals(read, signals) for name, read in READINGS.items()}

    inside, after = both_ways(params, x, targets)
    assert_close(inside, after)


@every("case", NETWORKS, soon={"branching"})
def test_check_passes(case, key):
    tokens = None if case.vocabulary is None else make_inputs(case, key)
    report = bp.check(case.make(), key, case.shape, inputs=tokens).raise_if_wrong()
    assert report.largest_error <= 1e-10


def test_the_default_reading_is_the_mean_gradient(key):
    net, params, x, targets, _ = problem(NETWORKS["classifier"], key)
    _, got = bp.backprop(net, bp.squared_error)(params, x, targets)
    assert_close(got, bp.value_and_grad(net, bp.squared_error)(params, x, targets)[1])


def test_a_plain_function_will_do_for_a_loss(key):
    net, params, x, targets, _ = problem(NETWORKS["classifier"], key)

    def loss(outputs, targets):
        return squared(outputs, targets), outputs - targets

    got = bp.value_and_grad(net, loss)(params, x, targets)
    assert_close(got, bp.value_and_grad(net, bp.squared_error)(params, x, targets))


def test_a_reading_of_ones_own_is_a_function_of_the_signal(key):
    net, params, x, targets, _ = problem(NETWORKS["two layers"], key)

    def error_size(signal):
        return jnp.sqrt(jnp.mean(signal.deltas**2))

    _, sizes = bp.backprop(net, bp.squared_error, read=error_size)(params, x, targets)
    _, signals = bp.backprop(net, bp.squared_error, read=bp.keep)(params, x, targets)
    assert_close(sizes[0]["bias"], jnp.sqrt(jnp.mean(signals[0]["bias"].deltas ** 2)))


@pytest.mark.parametrize(
    "make",
    [
        lambda net: bp.value_and_grad(net, bp.squared_error),
        lambda net: bp.backprop(net, bp.squared_error, read={"a": bp.mean, "b": bp.sq_norms}),
    ],
)
def test_the_second_call_does_not_trace_again(make, key):
    net, params, x, targets, _ = problem(NETWORKS["classifier"], key)
    chex.clear_trace_counter()
    function = jax.jit(chex.assert_max_traces(make(net), n=1))
    function(params, x, targets)
    function(jax.tree.map(lambda p: p + 1, params), x + 1, targets)


def test_masked_examples_leave_the_gradient_alone(key):
    """A weight of 0 leaves an example out, and the mean still divides by N."""
    net, params, x, targets, _ = problem(NETWORKS["classifier"], key)
    mask = jnp.array([1.0, 0.0, 1.0])
    _, masked = bp.value_and_grad(net, bp.weighted(bp.squared_error))(params, x, (targets, mask))
    _, without = bp.value_and_grad(net, bp.squared_error)(params, x[::2], targets[::2])
    assert_close(masked, jax.tree.map(lambda g: g * 2 / 3, without))


def test_an_example_with_no_error_has_norm_zero(key):
    net, params, x, _, _ = problem(NETWORKS["classifier"], key)
    outputs, _ = net.forward(params, x)
    targets = outputs.at[1].add(1)
    _, sq_norms = bp.backprop(net, bp.squared_error, read=bp.sq_norms)(params, x, targets)
    norms = bp.example_norms(sq_norms)
    assert list(np.asarray(norms) == 0) == [True, False, True]


def test_an_empty_batch_is_refused():
    net = bp.chain(bp.dense(2))
    params, _ = net.init(jax.random.key(0), (3,))
    with pytest.raises(ValueError, match=r"inputs has shape \[0, 3\]: no examples"):
        bp.value_and_grad(net, bp.squared_error)(params, jnp.ones((0, 3)), jnp.ones((0, 2)))
