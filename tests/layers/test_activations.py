"""Activations over the whole range of a dtype, against closed forms in float64."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import every

import jaxbp as bp
from jaxbp.layers import activations, piecewise


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


def softplus(x, beta=1):
    return max(x, 0) + math.log1p(math.exp(-abs(beta * x))) / beta


def exponential(x, alpha=1, rate=1, scale=1):
    """elu, celu and selu: a line on the right, alpha (e^(rate x) - 1) on the left."""
    if x > 0:
        return scale * x, scale
    return scale * alpha * math.expm1(rate * x), scale * alpha * rate * math.exp(rate * x)


def mish(x):
    t, e = math.tanh(softplus(x)), math.exp(-abs(x))
    # 1 - t = 2 / ((1 + e^x)^2 + 1), without cancellation.
    rest = 2 * e * e / ((1 + e) ** 2 + e * e) if x > 0 else 2 / ((1 + e) ** 2 + 1)
    return x * t, t + x * rest * (1 + t) * logistic(x)


def tanh_shrink(x):
    t = math.tanh(x)
    if abs(x) > 0.5:
        return x - t, t * t
    # The coefficients of tanh, by tanh' = 1 - tanh^2, in exact arithmetic.
    c = [Fraction(0), Fraction(1)]
    for n in range(1, 40):
        c.append(-sum((c[i] * c[n - i] for i in range(n + 1)), Fraction(0)) / (n + 1))
    return -sum(float(a) * x**n for n, a in enumerate(c) if n > 1), t * t


def clipped(x, low, high):
    return min(max(x, low), high), float(low < x < high)


def hard_sigmoid(x):
    return clipped(x + 3, 0, 6)[0] / 6, (-3 < x < 3) / 6


def hardswish(x):
    return x * hard_sigmoid(x)[0], (x >= 3) if abs(x) >= 3 else (2 * x + 3) / 6


SELU = {"alpha": 1.6732632423543772, "scale": 1.0507009873554805}

# The value and the derivative, without cancellation.
FUNCTIONS = {
    "sigmoid": lambda x: (logistic(x), logistic(x) * logistic(-x)),
    "tanh": lambda x: (math.tanh(x), 4 * logistic(2 * x) * logistic(-2 * x)),
    "log_sigmoid": lambda x: (-softplus(-x), logistic(-x)),
    "softplus": lambda x: (softplus(x), logistic(x)),
    "softplus(3.0)": lambda x: (softplus(x, 3), logistic(3 * x)),
    "elu(1.0)": exponential,
    "elu(-0.5)": lambda x: exponential(x, alpha=-0.5),
    "celu(0.5)": lambda x: exponential(x, alpha=0.5, rate=2),
    "selu": lambda x: exponential(x, **SELU),
    "silu": lambda x: (x * logistic(x), logistic(x) * (1 + x * logistic(-x))),
    "mish": mish,
    "gelu": gelu_by_tanh,
    "gelu(approximate=False)": gelu_by_erf,
    "softsign": lambda x: (x / (1 + abs(x)), (1 / (1 + abs(x))) ** 2),
    "tanh_shrink": tanh_shrink,
    "relu": lambda x: (max(x, 0), float(x > 0)),
    "leaky_relu(0.01)": lambda x: (max(x, 0.01 * x), 1 if math.copysign(1, x) > 0 else 0.01),
    "leaky_relu(-1.0)": lambda x: (abs(x), math.copysign(1, x)),
    "relu6": lambda x: clipped(x, 0, 6),
    "hard_tanh(-1.0, 1.0)": lambda x: clipped(x, -1, 1),
    "hard_sigmoid": hard_sigmoid,
    "hardswish": hardswish,
    "hard_shrink(0.5)": lambda x: (x, 1) if abs(x) > 0.5 else (0, 0),
    "soft_shrink(0.25)": lambda x: (x - math.copysign(0.25, x), 1) if abs(x) > 0.25 else (0, 0),
    "threshold(0.25, 2.0)": lambda x: (x, 1) if x > 0.25 else (2, 0),
}
LAYERS_OF = {
    layer.name: layer
    for layer in (
        bp.sigmoid(), bp.tanh(), bp.log_sigmoid(), bp.softplus(), bp.softplus(3.0), bp.elu(),
        bp.elu(-0.5), bp.celu(0.5), bp.selu(), bp.silu(), bp.mish(), bp.gelu(),
        bp.gelu(approximate=False), bp.softsign(), bp.tanh_shrink(), bp.relu(), bp.leaky_relu(),
        bp.leaky_relu(-1), bp.relu6(), bp.hard_tanh(), bp.hard_sigmoid(), bp.hardswish(),
        bp.hard_shrink(), bp.soft_shrink(0.25), bp.threshold(0.25, 2.0),
    )
}  # fmt: skip
# Their derivative is computed from an output near 1 (or -1), and has its rounding error.
SATURATE = {"sigmoid", "tanh", "elu(1.0)", "celu(0.5)", "selu"}

every_activation = pytest.mark.parametrize("name", FUNCTIONS)
DTYPES = {d.__name__: d for d in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)}


@jax.jit
def sweep_of_all(x):
    """The outputs and derivatives of all activations, in one program."""

    def sweep(layer):
        y, cache = layer.forward((), x)
        return y, layer.backward((), cache, jnp.ones_like(x))[0]

    return jax.tree.map(sweep, LAYERS_OF, is_leaf=lambda node: isinstance(node, bp.Layer))


@functools.cache
def swept(points, dtype):
    return jax.tree.map(
        lambda a: np.asarray(a, np.float64)[0], sweep_of_all(jnp.asarray([points], dtype))
    )


def values_of(name, points, dtype):
    """The outputs of an activation and its derivatives, at some points."""
    return swept(tuple(points), dtype)[name]


def test_every_activation_is_here():
    listed = {*activations.__all__, *piecewise.__all__}
    assert {name.split("(")[0] for name in FUNCTIONS} == listed
    assert LAYERS_OF.keys() == FUNCTIONS.keys()


def test_defaults_are_those_of_the_field():
    makes = (
        bp.elu,
        bp.celu,
        bp.leaky_relu,
        bp.hard_tanh,
        bp.hard_shrink,
        bp.soft_shrink,
        bp.softplus,
    )
    assert [make().name for make in makes] == [
        "elu(1.0)", "celu(1.0)", "leaky_relu(0.01)", "hard_tanh(-1.0, 1.0)", "hard_shrink(0.5)",
        "soft_shrink(0.5)", "softplus",
    ]  # fmt: skip


@every_activation
@every("dtype", DTYPES, soon={"float16", "float32"})
def test_values_and_derivatives_have_the_digits_of_their_dtype(name, dtype):
    """In the tails too: 1 + tanh and 1 + erf would have none there."""
    between = (0.125, 0.375, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5)  # a wrong threshold shows there
    sizes = (0.0, 1e-6, 1e-3, 0.25, 0.5, *range(1, 11), 12, 20, 80, 800, 6e4, 1e20, *between)
    limit = float(jnp.finfo(dtype).max)
    points = [s * size for size in (*sizes, limit) if size <= limit for s in (1, -1)]
    points = [float(p) for p in np.asarray(jnp.asarray(points, dtype), np.float64)]
    eps, tiny = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).tiny)
    # 16-bit numbers are computed in 32 bits. In exponentials of x^2 the rounding of x^2 is an error
    # in proportion to it.
    wide = dtype in (jnp.float32, jnp.float64)
    digits = np.array([8 * eps + wide * 2 * eps * min(p * p, 1e4) for p in points])
    want = np.array([with_limits(name, p) for p in points]).T
    for what, got, wanted in zip(("y", "dx"), values_of(name, points, dtype), want, strict=True):
        allowed = digits * np.abs(wanted) + 4 * tiny
        if what == "dx" and name in SATURATE:
            allowed = allowed + 8 * eps
        wanted = np.where(np.abs(wanted) > limit, np.copysign(np.inf, wanted), wanted)
        with np.errstate(invalid="ignore"):
            right = (got == wanted) | (np.abs(got - wanted) <= allowed)
        wrong = np.flatnonzero(~right)
        assert not wrong.size, (what, [(points[i], got[i], wanted[i]) for i in wrong])


def with_limits(name, x):
    """A straight line far out, where a closed form could overflow."""
    if abs(x) <= 1e4 or name == "softsign":  # its slope falls too slowly
        return FUNCTIONS[name](x)
    y, slope = FUNCTIONS[name](math.copysign(1e4, x))
    return (y + slope * (x - math.copysign(1e4, x)) if slope else y), slope


@every_activation
@every("dtype", DTYPES, soon={"float32"})
def test_what_is_infinite_has_the_limit(name, dtype):
    y, dx = values_of(name, (math.inf, -math.inf, math.nan), dtype)
    for side, at in enumerate((1e300, -1e300)):
        limit, slope = with_limits(name, at)
        limit = limit if abs(limit) < 1e100 else math.copysign(math.inf, limit)
        np.testing.assert_allclose([y[side], dx[side]], [limit, slope], rtol=0.02, atol=1e-30)
    assert np.isnan(y[2])


# The input, and the derivative there.
KINKS = {
    "relu": [(0, 0)],
    "leaky_relu(0.01)": [(0, 1), (-0.0, 0.01)],
    "leaky_relu(-1.0)": [(0, 1), (-0.0, -1)],
    "elu(1.0)": [(0, 1)],
    "elu(-0.5)": [(0, -0.5)],
    "celu(0.5)": [(0, 1)],
    "selu": [(0, SELU["alpha"] * SELU["scale"])],
    "relu6": [(0, 0), (6, 0)],
    "hard_tanh(-1.0, 1.0)": [(-1, 0), (1, 0)],
    "hard_sigmoid": [(-3, 0), (3, 0)],
    "hardswish": [(-3, 0), (3, 1)],
    "hard_shrink(0.5)": [(-0.5, 0), (0.5, 0)],
    "soft_shrink(0.25)": [(-0.25, 0), (0.25, 0)],
    "threshold(0.25, 2.0)": [(0.25, 0)],
}


def test_the_derivative_at_a_kink_is_that_of_the_documented_side():
    points = [x for kinks in KINKS.values() for x, _ in kinks]
    slopes = iter(range(len(points)))
    for name, kinks in KINKS.items():
        dx = values_of(name, points, jnp.float64)[1]
        for x, slope in kinks:
            np.testing.assert_allclose(dx[next(slopes)], slope, rtol=1e-15, err_msg=f"{name} {x}")


def test_a_value_next_to_a_kink_has_the_slope_of_its_side():
    """(x + 3) / 6 is rounded to 1 there."""
    x = float(np.nextafter(np.float32(3), np.float32(0)))
    y, dx = values_of("hard_sigmoid", (x,), jnp.float32)
    assert (y[0], dx[0]) == (1, np.float32(1 / 6))


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


def test_numbers_of_numpy_and_jax_do_not_change_the_dtype():
    x = jnp.ones((1, 2), jnp.float16)
    for number in (np.float32(0.5), np.float64(0.5), jnp.float32(0.5), np.array(0.5)):
        for make in (
            bp.softplus, bp.elu, bp.celu, bp.leaky_relu, bp.hard_tanh, bp.hard_shrink,
            bp.soft_shrink, bp.threshold,
        ):  # fmt: skip
            y, cache = make(number).forward((), x)
            dx, _ = make(number).backward((), cache, x)
            assert y.dtype == dx.dtype == jnp.float16
            assert make(number).name == make(0.5).name


def test_outputs_of_a_scaled_softplus_do_not_overflow():
    y, dx = values_of("softplus(3.0)", (2e38, -2e38), jnp.float32)
    np.testing.assert_allclose(y, [2e38, 0], rtol=1e-6)
    assert dx.tolist() == [1, 0]


WRONG = {
    "another derivative": (jnp.sin, jnp.sin),
    "another sign": (jnp.cos, jnp.sin),
    "a function of several values": (lambda x: jnp.cumsum(x, axis=-1), jnp.ones_like),
}


@every("functions", WRONG, soon={"another sign"})
def test_a_wrong_formula_of_ones_own_is_found(functions, key):
    assert not bp.check(bp.elementwise(*functions), key, (3,)).ok


def test_a_formula_that_changes_shape_or_dtype_is_refused():
    x = jnp.ones((2, 3), jnp.float32)
    for function, derivative, message in (
        (
            jnp.sum,
            jnp.cos,
            r"cube has a function that returns float32 \[\] for inputs float32 \[2, 3",
        ),
        (jnp.sin, lambda x: 1.0, r"cube has a derivative that returns float \[\] for inputs"),
        (lambda x: x.astype(jnp.float16), jnp.cos, r"returns float16 \[2, 3\] for inputs float32"),
    ):
        with pytest.raises(bp.LayerError, match=message):
            bp.elementwise(function, derivative, name="cube").forward((), x)
    with pytest.raises(TypeError, match="elementwise: derivative is 1; it takes a function"):
        bp.elementwise(jnp.sin, 1)


@pytest.mark.parametrize(
    ("make", "wrong", "message"),
    [
        (bp.softplus, (0, -1.0, math.nan, math.inf, "1", None), "softplus: beta is .* number"),
        (bp.celu, (0, math.nan, math.inf, "1", None, True), "celu: alpha is .* finite number"),
        (bp.elu, (0, math.inf, math.nan, "1", None, [0.5]), "elu: alpha is .* finite number"),
        (
            bp.leaky_relu,
            (0, math.inf, "1", None, [0.5]),
            "leaky_relu: negative_slope is .* finite number",
        ),
        (bp.hard_tanh, (math.nan, "1", 1.0, 2), "hard_tanh: low is .*(number|low has to be small)"),
        (bp.hard_shrink, (-1, math.nan, "1"), "hard_shrink: bound is .* of at least 0"),
        (bp.soft_shrink, (-1, math.nan, "1"), "soft_shrink: bound is .* of at least 0"),
        (bp.threshold, (math.nan, "1", None), "threshold: bound is .* finite number"),
        (lambda v: bp.threshold(0, v), (math.nan, "1"), "threshold: value is .* finite number"),
    ],
)
def test_arguments(make, wrong, message):
    for value in wrong:
        with pytest.raises(ValueError, match=message):
            make(value)
