"""Factors: the constants that a layer takes, and the gradients of gains and slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close

import jaxbp as bp

KEY = jax.random.key(0)


def test_a_constant_has_no_dtype_of_its_own():
    for constant in (2, 2.0, np.float32(2), np.float64(2), np.ones(3), jnp.full(3, 2, jnp.float32)):
        for dtype in (jnp.float16, jnp.float32, jnp.float64):
            layer, x = bp.scale(constant), jnp.ones((2, 3), dtype)
            y, cache = layer.forward((), x)
            dx, _ = layer.backward((), cache, x)
            assert y.dtype == dx.dtype == dtype
            np.testing.assert_array_equal(y, np.broadcast_to(constant, (2, 3)))


def test_a_constant_may_be_an_input_of_a_compiled_function():
    @jax.jit
    def scaled(c, x):
        return bp.scale(c).forward((), x)[0]

    assert scaled(jnp.array([1.0, 2.0]), jnp.ones((1, 2))).tolist() == [[1, 2]]


def test_slopes_and_gains_have_the_gradient_of_each_example():
    x = jnp.array([[[-1.0, 2.0], [-3.0, -5.0]], [[1.0, -1.0], [0.0, -0.0]]])
    dy = jnp.array([[[1.0, 1.0], [2.0, 3.0]], [[5.0, 7.0], [1.0, 1.0]]])
    own, shared = [0.5, -2.0], [0.5]
    slopes = jnp.where(x < 0, jnp.array(own), 1), jnp.where(x < 0, 0.5, 1)
    for layer, name, values, factors, want in (
        (bp.prelu(), "slope", own, slopes[0], [[-7, -15], [0, -7]]),
        (bp.prelu(shared=True), "slope", shared, slopes[1], [[-22], [-7]]),
        (bp.layer_scale(), "gain", own, jnp.array(own), [[-7, -13], [5, -7]]),
    ):
        params = {name: jnp.array(values)}
        drawn, _ = layer.init(KEY, (2, 2))
        assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, params)
        y, cache = layer.forward(params, x)
        dx, signals = layer.backward(params, cache, dy)
        assert_close((y, dx), (factors * x, factors * dy))
        per_example = bp.per_example(signals[name])
        assert_close(per_example, jnp.array(want, float))
        assert_close(bp.sq_norms(signals[name]), jnp.sum(per_example**2, axis=1))


def test_initial_values():
    for layer, want in (
        (bp.layer_scale(), [1e-5, 1e-5]),
        (bp.prelu(), [0.25, 0.25]),
        (bp.prelu(shared=True, initial=-2), [-2]),
    ):
        assert [leaf.tolist() for leaf in layer.init(KEY, (3, 2))[0].values()] == [want]


def test_a_feedback_slope_carries_the_error_and_leaves_its_gradient():
    layer, params, other = bp.prelu(), {"slope": jnp.array([0.5])}, {"slope": jnp.array([-3.0])}
    x = jnp.array([[-2.0]])
    _, cache = layer.forward(params, x)
    dx, grads = layer.backward(other, cache, jnp.ones((1, 1)), read=bp.total)
    assert (dx.item(), grads["slope"].item()) == (-3, -2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bp.scale("2"), r"scale: constant is '2'; it takes a finite number"),
        (lambda: bp.scale([1.0]), r"scale: constant is \[1\.0\]; it takes a finite number"),
        (lambda: bp.scale(np.nan), r"scale: constant is nan; it takes a finite number"),
        (lambda: bp.scale(True), r"scale: constant is True; it takes a finite number"),
        (
            lambda: bp.scale(jnp.ones(2, int)),
            r"constant is an array of dtype int64; it takes float",
        ),
        (
            lambda: bp.scale(jnp.ones(2)).init(KEY, (3,)),
            r"scale\(\[2\]\) got inputs of shape \[N, 3\]; its constant \[2\] does not broadcast",
        ),
        (
            lambda: bp.scale(jnp.ones((4, 3))).forward((), jnp.ones((4, 3))),
            r"scale\(\[4, 3\]\) got inputs of shape \[N, 3\]; its constant \[4, 3\] does not",
        ),
        (
            lambda: bp.scale(jnp.ones((2, 1))).forward((), jnp.ones((4, 1, 3))),
            r"got inputs of shape \[N, 1, 3\]; its constant \[2, 1\] does not broadcast",
        ),
        (lambda: bp.layer_scale("1"), r"layer_scale: initial is '1'; it takes a finite number"),
        (
            lambda: bp.layer_scale(1.0).init(KEY, ()),
            r"layer_scale\(1\.0\) got inputs of shape \[N\]",
        ),
        (lambda: bp.prelu(initial=np.inf), r"prelu: initial is inf; it takes a finite number"),
        (
            lambda: bp.prelu().forward({"slope": jnp.ones(1)}, jnp.ones((2, 3))),
            r"prelu got a slope of shape \[1\]; it takes \[3\]",
        ),
        (
            lambda: bp.prelu(shared=True).forward({"slope": jnp.ones(3)}, jnp.ones((2, 3))),
            r"prelu\(shared=True\) got a slope of shape \[3\]; it takes \[1\]",
        ),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
