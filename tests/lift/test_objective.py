"""Losses of functions: value, delta, weights, several outputs, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from oracles import assert_close

import jaxbp as bp

N = 3
OPTAX = {
    "softmax_cross_entropy_with_integer_labels": (bp.softmax_cross_entropy, (4,)),
    "sigmoid_binary_cross_entropy": (bp.sigmoid_cross_entropy, (2, 4)),
    "l2_loss": (bp.squared_error, (4,)),
    "huber_loss": (bp.huber, (2, 4)),
}


@pytest.mark.parametrize("name", OPTAX)
def test_a_loss_of_optax_is_that_of_the_library(name, key, standard_promotion):
    own, shape = OPTAX[name]
    y = 2 * normal(key, (N, *shape))
    targets = own.sample(key, y)
    loss = bp.loss_of(getattr(optax, name))
    assert loss.name == f"loss_of({name})"
    assert_close(jax.jit(loss)(y, targets), own(y, targets))
    bp.check(loss, key, shape, targets=targets).raise_if_wrong()
    weights = jnp.array([0.0, 1.0, 2.0])
    bad = y.at[0].set(jnp.nan)
    assert_close(
        bp.weighted(loss)(bad, (targets, weights)), bp.weighted(own)(y, (targets, weights))
    )


def test_in_a_sweep_and_for_several_outputs(key):
    def function(outputs, targets):
        return jnp.sum((outputs["a"] - targets) ** 2, axis=1) + jnp.cos(outputs["b"])

    loss = bp.loss_of(function, name="mine")
    assert loss.name == "mine"
    outputs = {"a": normal(key, (N, 2)), "b": jnp.arange(3.0)}
    value, delta = loss(outputs, jnp.ones((N, 2)))
    assert_close(value, function(outputs, 1))
    assert_close(delta, {"a": 2 * (outputs["a"] - 1), "b": -jnp.sin(outputs["b"])})

    net = bp.dense(2)
    params, _ = net.init(key, (4,))
    x, t = normal(key, (N, 4)), jnp.zeros((N, 2))
    one = bp.loss_of(lambda y, t: optax.l2_loss(y, t))
    read = {"norms": bp.sq_norms, "grads": bp.mean}
    got = bp.backprop(net, one, read=read)(params, x, t)
    assert_close(got, bp.backprop(net, bp.squared_error, read=read)(params, x, t))
    joint = bp.joint_loss([one, bp.huber])
    assert_close(
        joint([t, t], [t + 1, t]), bp.joint_loss([bp.squared_error] * 2)([t, t], [t + 1, t])
    )


def test_16_bits_are_computed_in_32(key):
    y = jnp.full((1, 2), 3000, jnp.float16)
    value, delta = bp.loss_of(lambda y, t: (y - t) ** 2)(y, jnp.zeros((1, 2), jnp.float32))
    assert (value.dtype, delta.dtype) == (jnp.float32, jnp.float16)
    np.testing.assert_array_equal(value, [1.8e7])
    np.testing.assert_array_equal(delta, [[6000, 6000]])


Y = jnp.ones((N, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: bp.loss_of(lambda y, t: jnp.mean(y - t))(Y, Y),
            ValueError,
            r"loss_of\(<lambda>\): the function returned shape \[\], expected one value per "
            r"example, \[3\]\. Is it a mean\? Return the value of each example\.",
        ),
        (
            lambda: bp.loss_of(lambda y, t: (y - t).sum(0))(Y, Y),
            ValueError,
            r"returned shape \[2\], expected one value per example, \[3\]",
        ),
        (
            lambda: bp.loss_of(bp.squared_error.terms)(Y, Y),
            ValueError,
            r"loss_of\(terms\): the function returned tuple; it has to return the value alone",
        ),
        (
            lambda: bp.loss_of(lambda y, t: y > t)(Y, Y),
            ValueError,
            "the function returned an array of bool",
        ),
        (
            lambda: bp.loss_of(optax.l2_loss)([1.0, 2.0], Y),
            ValueError,
            r"loss_of\(l2_loss\): outputs",
        ),
        (lambda: bp.loss_of(bp.huber), TypeError, "already a Loss"),
        (lambda: bp.loss_of("huber"), TypeError, "loss_of: function is 'huber', not callable"),
        (
            lambda: bp.sampled(bp.loss_of(optax.l2_loss), Y, Y, jax.random.key(0)),
            TypeError,
            r"loss_of\(l2_loss\): has no distribution to draw targets from",
        ),
        (
            lambda: bp.ggn_columns(bp.loss_of(optax.l2_loss), Y, Y),
            TypeError,
            r"loss_of\(l2_loss\): has no factor of its Hessian",
        ),
        (
            lambda: bp.weighted(optax.l2_loss),
            TypeError,
            r"weighted: loss is <.*l2_loss.*>; it takes a Loss\. Make one of a function by loss_of",
        ),
    ],
)
def test_what_is_wrong_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()
