"""Activations over the whole range of a dtype, against closed forms in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from cases import every

import jaxbp as bp
from jaxbp.layers import activations


def logistic(x):
    e = math.exp(-abs(x))
    return (1 if x >= 0 else e) / (1 + e)


def gelu_by_tanh(x):
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    u = scale * (x + cubic * x**3)
    p, q = logistic(2 * u), logistic(-2 * u)
    return x * p, p + 2 * x * p * q * scale * (1 + 3 * cubic * x**2)


def gelu_by_erf(x):
    p = math.erfc(-x / math.sqrt(2)) / 2
    return x * p, p + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


# The value and the derivative, without cancellation.
FUNCTIONS = {
    "sigmoid": lambda x: (logistic(x), logistic(x) * logistic(-x)),
    "tanh": lambda x: (math.tanh(x), 4 * logistic(2 * x) * logistic(-2 * x)),
    "relu": lambda x: (max(x, 0), float(x > 0)),
    "leaky_relu(0.01)": lambda x: (max(x, 0.01 * x), 1 if math.copysign(1, x) > 0 else 0.01),
    "elu(1.0)": lambda x: (x, 1) if x > 0 else (math.expm1(x), math.exp(x)),
    "softplus": lambda x: (max(x, 0) + math.log1p(math.exp(-abs(x))), logistic(x)),
    "silu": lambda x: (x * logistic(x), logistic(x) * (1 + x * logistic(-x))),
    "gelu": gelu_by_tanh,
    "gelu(approximate=False)": gelu_by_erf,
}
LAYERS_OF = {
    layer.name: layer
    for layer in (
        bp.sigmoid(), bp.tanh(), bp.relu(), bp.leaky_relu(), bp.elu(), bp.softplus(), bp.silu(),
        bp.gelu(), bp.gelu(approximate=False),
    )
}  # fmt: skip
# Their derivative is computed from an output near 1 (or -1), and has its rounding error.
SATURATE = {"sigmoid", "tanh", "elu(1.0)"}

every_activation = pytest.mark.parametrize("name", FUNCTIONS)
DTYPES = {d.__name__: d for d in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)}


def values_of(layer, x):
    y, cache = layer.forward((), x)
    dx, _ = layer.backward((), cache, jnp.ones_like(x))
    return [np.asarray(a, np.float64)[0] for a in (y, dx)]


def test_every_activation_is_here():
    assert {name.split("(")[0] for name in FUNCTIONS} == set(activations.__all__)
    assert LAYERS_OF.keys() == FUNCTIONS.keys()


@every_activation
@every("dtype", DTYPES, soon={"float16", "float32"})
def test_values_and_derivatives_have_the_digits_of_their_dtype(name, dtype):
    """In the tails too: 1 + tanh and 1 + erf would have none there."""
    sizes = (0.0, 1e-6, 1e-3, 0.25, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 20, 80, 800, 6e4, 1e20)
    limit = float(jnp.finfo(dtype).max)
    points = [s * size for size in (*sizes, limit) if size <= limit for s in (1, -1)]
    x = jnp.asarray([points], dtype)
    points = [float(p) for p in np.asarray(x, np.float64)[0]]
    eps, tiny = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).tiny)
    # 16-bit numbers are computed in 32 bits. In exponentials of x^2 the rounding of x^2 is an error
    # in proportion to it.
    wide = dtype in (jnp.float32, jnp.float64)
    digits = np.array([8 * eps + wide * 2 * eps * min(p * p, 1e4) for p in points])
    want = np.array([with_limits(FUNCTIONS[name], p) for p in points]).T
    for what, got, wanted in zip(("y", "dx"), values_of(LAYERS_OF[name], x), want, strict=True):
        allowed = digits * np.abs(wanted) + 4 * tiny
        if what == "dx" and name in SATURATE:
            allowed = allowed + 8 * eps
        wrong = np.flatnonzero(~(np.abs(got - wanted) <= allowed))
        assert not wrong.size, (what, [(points[i], got[i], wanted[i]) for i in wrong])


def with_limits(function, x):
    """The limits far out, where a closed form could overflow: a constant, or a line through 0."""
    if abs(x) <= 1e4:
        return function(x)
    y, slope = function(math.copysign(1e4, x))
    return (y if abs(y) <= 1 else slope * x), slope


@every_activation
@every("dtype", DTYPES, soon={"float32"})
def test_what_is_infinite_has_the_limit(name, dtype):
    x = jnp.asarray([[jnp.inf, -jnp.inf, jnp.nan]], dtype)
    y, dx = values_of(LAYERS_OF[name], x)
    far = float(np.sqrt(float(jnp.finfo(dtype).max)))
    (high, low), (up, down) = values_of(LAYERS_OF[name], jnp.asarray([[far, -far]], dtype))
    assert y[0] == (high if high <= 1 else np.inf)
    assert dx[0] == up
    assert y[1] == (low if low >= -1 else -np.inf)
    assert dx[1] == down
    assert np.isnan(y[2])


def test_a_tiny_negative_input_has_the_negative_slope():
    """Its output is rounded to zero, which keeps the sign."""
    x = jnp.asarray([[-1e-7, 1e-7, 0.0, -0.0]], jnp.float16)
    y, cache = bp.leaky_relu().forward((), x)
    dx, _ = bp.leaky_relu().backward((), cache, jnp.ones_like(x))
    assert y[0, 0] == 0
    np.testing.assert_allclose(np.asarray(dx, float)[0], [0.01, 1, 1, 0.01], rtol=1e-3)


def test_an_infinite_error_stays_away_from_a_unit_that_is_off():
    _, cache = bp.relu().forward((), jnp.array([[-1.0, 2.0]]))
    dx, _ = bp.relu().backward((), cache, jnp.array([[jnp.inf, jnp.inf]]))
    assert dx[0].tolist() == [0, np.inf]
