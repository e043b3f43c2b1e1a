"""Pairs: layers that compare or combine two inputs, x_1 and x_2, along their last axis.

    inner_product       y = <x_1, x_2>
    cosine_similarity   y = <x_1, x_2> / (|x_1| |x_2|)
    distance            y = |x_1 - x_2|
    bilinear            y_o = x_1^T W_o x_2 + b_o

Inputs are a pair of arrays [N, ..., I], the two branches of a network. The axes between, if any,
are positions, the same in both. The first three have one output, [N, ..., 1], and no parameters.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxbp.require import (
    require_count,
    require_delta,
    require_float_pair,
    require_floats,
    require_key,
    require_last_axis,
    require_pair,
    require_params,
    require_same_shapes,
)
from jaxbp.sharding import gathered
from jaxbp.signals.kinds import Bias, Outer, Through, keep
from jaxbp.signals.views import View
from jaxbp.types import Layer, LayerError, length_and_direction, show_shape, widened

__all__ = ["bilinear", "cosine_similarity", "distance", "inner_product"]


def inner_product() -> Layer:
    """The inner product of two vectors, y = <x_1, x_2>. dx_1 = x_2 dy, dx_2 = x_1 dy.

    Inputs are a pair of arrays [N, ..., I], outputs [N, ..., 1]. There are no parameters.

    Raises:
      LayerError: the inputs are not a pair of arrays of equal shape and dtype.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.inner_product().forward((), (jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])))
      >>> y.tolist()
      [[11.0]]
    """

    def forward(a, b):
        return _inner(a, b)

    def backward(a, b, dy):
        return b * dy, a * dy

    return _comparison("inner_product", forward, backward)


def cosine_similarity() -> Layer:
    """The cosine of the angle between two vectors, y = <u_1, u_2> with u = x / |x|.

        dx_1 = (u_2 - y u_1) dy / |x_1|     dx_2 = (u_1 - y u_2) dy / |x_2|

    Inputs are a pair of arrays [N, ..., I], outputs [N, ..., 1]. There are no parameters.

      x_1 = 0 or x_2 = 0   y = 0 and both derivatives are 0: no angle is defined

    Raises:
      LayerError: the inputs are not a pair of arrays of equal shape and dtype.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> pair = jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.array([[0.0, 2.0], [1.0, 1.0]])
      >>> [round(float(y), 6) for y in bp.cosine_similarity().forward((), pair)[0][:, 0]]
      [0.8, 0.0]
    """

    def forward(a, b):
        return _inner(length_and_direction(a)[1], length_and_direction(b)[1])

    def backward(a, b, dy):
        (length_a, u), (length_b, v) = length_and_direction(a), length_and_direction(b)
        y = _inner(u, v)
        defined = (length_a > 0) & (length_b > 0)
        dy, length_a, length_b = (
            jnp.where(defined, value, rest)
            for value, rest in ((dy, 0), (length_a, 1), (length_b, 1))
        )
        return (v - y * u) * (dy / length_a), (u - y * v) * (dy / length_b)

    return _comparison("cosine_similarity", forward, backward)


def distance(kind: Literal["euclidean", "squared", "manhattan"] = "euclidean") -> Layer:
    """The distance of two vectors, a function of their difference d = x_1 - x_2. dx_2 = -dx_1.

        euclidean   y = |d| = sqrt(sum_i d_i^2)   dx_1 = d / |d| dy
        squared     y = sum_i d_i^2               dx_1 = 2 d dy
        manhattan   y = sum_i |d_i|               dx_1 = sign(d) dy

    Inputs are a pair of arrays [N, ..., I], outputs [N, ..., 1]. There are no parameters.

      d = 0     euclidean: y = 0 and dx = 0, the mean of its slopes
      d_i = 0   manhattan: dx_i = 0

    Args:
      kind: `euclidean`, `squared` or `manhattan`.

    Raises:
      ValueError: `kind` is none of the three.
      LayerError: the inputs are not a pair of arrays of equal shape and dtype.

    References:
      "Dimensionality Reduction by Learning an Invariant Mapping", Hadsell, Chopra, LeCun, 2006.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> pair = jnp.array([[3.0, 4.0]]), jnp.zeros((1, 2))
      >>> [float(bp.distance(kind).forward((), pair)[0][0, 0])
      ...  for kind in ("euclidean", "squared", "manhattan")]
      [5.0, 25.0, 7.0]
    """
    if kind not in _DISTANCES:
        raise ValueError(
            f"distance: kind is {kind!r}; it takes {', '.join(map(repr, _DISTANCES))}."
        )
    value, slope = _DISTANCES[kind]

    def forward(a, b):
        return value(a - b)

    def backward(a, b, dy):
        da = slope(a - b) * dy
        return da, -da

    return _comparison(f"distance({kind!r})", forward, backward)


# The value of each distance and its derivative, of the difference of two vectors.
_DISTANCES = {
    "euclidean": (lambda d: length_and_direction(d)[0], lambda d: length_and_direction(d)[1]),
    "squared": (lambda d: _inner(d, d), lambda d: 2 * d),
    "manhattan": (lambda d: jnp.sum(jnp.abs(d), axis=-1, keepdims=True), jnp.sign),
}


def _inner(a, b):
    return jnp.sum(a * b, axis=-1, keepdims=True)


def _comparison(name, function, derivative):
    """A layer of a pair of arrays of equal shape, with one output; sums are in 32 bits.

    Args:
      name: of the layer.
      function: `function(x_1, x_2) -> y`.
      derivative: `derivative(x_1, x_2, dy) -> (dx_1, dx_2)`.
    """

    def init(key, shape):
        del key
        pair = require_pair(name, shape)
        a, b = (require_last_axis(name, own, "I") for own in pair)
        require_same_shapes(name, ("N", *a), ("N", *b))
        return (), (*a[:-1], 1)

    def require_arrays(x, what):
        a, b = require_float_pair(name, x, what)
        require_same_shapes(name, a.shape, b.shape, what)
        require_last_axis(name, a.shape[1:], "I")
        return a, b

    def forward(params, x, *, key=None):
        del params, key
        a, b = require_arrays(x, "inputs")
        return function(widened(a), widened(b)).astype(a.dtype), x

    def backward(params, x, dy, *, read=keep):
        del params, read
        a, b = require_arrays(x, "a cache")
        require_delta(name, dy, (*a.shape[:-1], 1))
        dxs = derivative(widened(a), widened(b), widened(dy))
        return jax.tree.structure(x).unflatten([dx.astype(a.dtype) for dx in dxs]), ()

    return Layer(name, init, forward, backward)


def bilinear(
    features: int,
    *,
    use_bias: bool = True,
    weight_init: Initializer = initializers.lecun_normal(),  # noqa: B008 -- a pure function
    bias_init: Initializer = initializers.zeros,
    dtype: DTypeLike = float,
) -> Layer:
    """A bilinear map of two vectors, y_o = x_1^T W_o x_2 + b_o.

        dE/dW_ijo = sum_nt x_1nti x_2ntj dy_nto     dE/db = sum_nt dy_nt
        dx_1i = sum_jo W_ijo x_2j dy_o              dx_2j = sum_io W_ijo x_1i dy_o

    It is a dense layer of the products x_1i x_2j, and its weight has the signal of a matrix
    [I J, O]. Inputs are a pair of arrays [N, ..., I] and [N, ..., J], outputs [N, ..., O].
    Parameters are `{"weight": [I, J, O], "bias": [O]}`, without the bias if `use_bias` is false.

    Args:
      features: O, the number of outputs.
      use_bias: whether to add a bias b.
      weight_init: the initialiser of W, as in `jax.nn.initializers`. The default has the variance
        1 / (I J).
      bias_init: the initialiser of b.
      dtype: the dtype of the parameters, which inputs must share. `float` is JAX's default.

    Raises:
      ValueError: `features` is not a positive integer.
      LayerError: the inputs or the parameters do not fit.

    References:
      "Separating Style and Content with Bilinear Models", Tenenbaum, Freeman, 2000.

    Example:
      >>> import jax, jaxbp as bp
      >>> params, out_shape = bp.bilinear(2).init(jax.random.key(0), ((3,), (4,)))
      >>> params["weight"].shape, out_shape
      ((3, 4, 2), (2,))
    """
    features = require_count("bilinear", "features", features)
    name = f"bilinear({features})"
    shapes = {"weight": ("I", "J", features), "bias": (features,)}
    if not use_bias:
        del shapes["bias"]

    def require_positions(shape_a, shape_b):
        if shape_a[:-1] != shape_b[:-1]:
            raise LayerError(
                name,
                f"got inputs of shapes {show_shape(shape_a)} and {show_shape(shape_b)}; it takes "
                "equal shapes but for the last axis.",
            )

    def require_arrays(params, x, what):
        require_params(name, params, shapes)
        weight = params["weight"]
        a, b = require_float_pair(name, x, what)
        for own, size in zip((a, b), weight.shape, strict=False):
            require_floats(name, own, weight.dtype, what=what)
            if own.ndim < 2 or own.shape[-1] != size:
                i, j, _ = weight.shape
                raise LayerError(
                    name,
                    f"got {what} of shapes {show_shape(a.shape)} and {show_shape(b.shape)}; its "
                    f"weight takes [N, ..., {i}] and [N, ..., {j}].",
                )
        require_positions(a.shape, b.shape)
        return a, b, gathered(weight, a).reshape(-1, features)

    def products(a, b):
        return (a[..., :, None] * b[..., None, :]).reshape(*a.shape[:-1], -1)

    def init(key, shape):
        require_key(name, "key", key)
        pair = require_pair(name, shape)
        a, b = (require_last_axis(name, own, "I") for own in pair)
        require_positions(("N", *a), ("N", *b))
        weight_key, bias_key = jax.random.split(key)
        params = {"weight": weight_init(weight_key, (a[-1], b[-1], features), dtype)}
        if use_bias:
            params["bias"] = bias_init(bias_key, (features,), dtype)
        return params, (*a[:-1], features)

    def forward(params, x, *, key=None):
        del key
        a, b, matrix = require_arrays(params, x, "inputs")
        y = products(a, b) @ matrix
        return (y + gathered(params["bias"], y) if use_bias else y), x

    def backward(params, x, dy, *, read=keep):
        a, b, matrix = require_arrays(params, x, "a cache")
        require_delta(name, dy, (*a.shape[:-1], features))
        view = View(matrix.shape).reshape(params["weight"].shape)
        readings = {"weight": read(Through(Outer(products(a, b), dy), view))}
        if use_bias:
            readings["bias"] = read(Bias(dy))
        d_products = (dy @ matrix.T).reshape(*a.shape, b.shape[-1])
        dxs = (
            jnp.einsum("...ij,...j->...i", d_products, b),
            jnp.einsum("...ij,...i->...j", d_products, a),
        )
        return jax.tree.structure(x).unflatten(dxs), readings

    return Layer(name, init, forward, backward)
