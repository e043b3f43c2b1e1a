"""Linear layers: an affine map of the last axis."""

import jax
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxbp.require import (
    require_count,
    require_delta,
    require_floats,
    require_key,
    require_last_axis,
    require_params,
)
from jaxbp.sharding import gathered, product
from jaxbp.signals.kinds import Bias, Outer, keep
from jaxbp.types import Layer, LayerError, show_shape

__all__ = ["dense"]


def dense(
    features: int,
    *,
    use_bias: bool = True,
    weight_init: Initializer = initializers.lecun_normal(),  # noqa: B008 -- a pure function
    bias_init: Initializer = initializers.zeros,
    dtype: DTypeLike = float,
) -> Layer:
    """An affine map of the last axis, y = x W + b.

        dE/dW = sum_nt x_nt dy_nt^T     dE/db = sum_nt dy_nt     dx = dy W^T

    Inputs are [N, ..., I] and outputs [N, ..., O]. The axes between, if any, are positions that
    share the weight. Parameters are `{"weight": [I, O], "bias": [O]}`, without the bias if
    `use_bias` is false.

    Args:
      features: O, the number of outputs.
      use_bias: whether to add a bias b.
      weight_init: the initialiser of W, as in `jax.nn.initializers`.
      bias_init: the initialiser of b.
      dtype: the dtype of the parameters, which inputs must share. `float` is JAX's default.

    Raises:
      ValueError: `features` is not a positive integer.
      LayerError: the inputs or the parameters do not fit.

    References:
      "Learning representations by back-propagating errors", Rumelhart, Hinton, Williams, 1986.
      "Efficient BackProp", LeCun, Bottou, Orr, Mueller, 1998: the default of `weight_init`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> layer = bp.dense(3)
      >>> params, out_shape = layer.init(jax.random.key(0), (5,))
      >>> y, cache = layer.forward(params, jnp.ones((2, 5)))
      >>> dx, signals = layer.backward(params, cache, jnp.ones((2, 3)))
      >>> y.shape, dx.shape, signals["weight"].inputs.shape
      ((2, 3), (2, 5), (2, 5))
    """
    features = require_count("dense", "features", features)
    name = f"dense({features})"
    shapes = {"weight": ("I", features), "bias": (features,)}
    if not use_bias:
        del shapes["bias"]

    def require_fit(weight, x, what):
        if x.ndim < 2 or x.shape[-1] != len(weight):
            raise LayerError(
                name,
                f"got {what} of shape {show_shape(x.shape)}; "
                f"its weight takes [N, ..., {len(weight)}].",
            )

    def init(key, shape):
        require_key(name, "key", key)
        shape = require_last_axis(name, shape, "I")
        weight_key, bias_key = jax.random.split(key)
        params = {"weight": weight_init(weight_key, (shape[-1], features), dtype)}
        if use_bias:
            params["bias"] = bias_init(bias_key, (features,), dtype)
        return params, (*shape[:-1], features)

    def forward(params, x, *, key=None):
        del key
        require_params(name, params, shapes)
        require_floats(name, x, params["weight"].dtype)
        require_fit(params["weight"], x, "inputs")
        params = gathered(params, x)
        y = product(x, params["weight"])
        return (y + params["bias"] if use_bias else y), x

    def backward(params, x, dy, *, read=keep):
        require_params(name, params, shapes)
        require_floats(name, x, what="a cache")
        require_fit(params["weight"], x, "a cache")
        require_delta(name, dy, (*x.shape[:-1], features))
        readings = {"weight": read(Outer(x, dy))}
        if use_bias:
            readings["bias"] = read(Bias(dy))
        return product(dy, gathered(params["weight"], dy).T), readings

    return Layer(name, init, forward, backward)
