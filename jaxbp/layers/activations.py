"""Layers: each a forward map, and beside it its derivative.

A forward map keeps in its cache what its derivative needs, in the form that is cheapest to use.
Where the derivative is a function of the output (sigmoid, tanh, relu and their kin), the cache is
the output, which the next layer keeps as its input anyway, so it costs nothing. Where it is not
(gelu, silu), the cache is the derivative itself: the same size as the input, formed while the
exponentials are at hand, and one product is left for the way back.
"""

import math

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxbp.require import (
    require_count,
    require_delta,
    require_floats,
    require_last_axis,
    require_leaves,
    require_positive,
    require_shape,
)
from jaxbp.signals.kinds import Bias, Outer, keep
from jaxbp.types import Layer, LayerError, show_shape


def dense(
    features,
    *,
    use_bias=True,
    weight_init=initializers.lecun_normal(),  # noqa: B008 -- a pure function
    bias_init=initializers.zeros,
    dtype=float,
):
    """An affine map of the last axis, y = x W + b.

      dE/dW = sum_nt x_nt dy_nt^T     dE/db = sum_nt dy_nt     dx = dy W^T

    Inputs are [N, ..., I] and outputs [N, ..., O]; the axes between share the weight. Parameters
    are `{"weight": [I, O], "bias": [O]}`, without the bias if `use_bias` is false.

    Args:
      features: O, the number of outputs.
      use_bias: whether there is a b.
      weight_init: an initialiser in the form of `jax.nn.initializers`.
      bias_init: the same, for b.
      dtype: of the parameters; inputs have to have it too. `float` is jax's default.

    Raises:
      ValueError: `features` is not a positive integer.
      LayerError: the inputs, or the parameters, do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> layer = bp.dense(3)
      >>> params, out_shape = layer.init(jax.random.key(0), (5,))
      >>> y, cache = layer.forward(params, jnp.ones((2, 5)))
      >>> dx, signals = layer.backward(params, cache, jnp.ones((2, 3)))
      >>> y.shape, dx.shape, signals["weight"].inputs.shape
      ((2, 3), (2, 5), (2, 5))
    """
    require_count("dense", "features", features)
    name = f"dense({features})"
    leaves = ("weight", "bias") if use_bias else ("weight",)

    def require_params(params):
        require_leaves(name, params, leaves)
        if jnp.ndim(params["weight"]) != 2 or jnp.shape(params["weight"])[1] != features:
            raise LayerError(
                name,
                f"got a weight of shape {show_shape(jnp.shape(params['weight']))}; "
                f"it takes [I, {features}]. Is it that of another network?",
            )

    def init(key, shape):
        shape = require_last_axis(name, shape, "I")
        weight_key, bias_key = jax.random.split(key)
        params = {"weight": weight_init(weight_key, (shape[-1], features), dtype)}
        if use_bias:
            params["bias"] = bias_init(bias_key, (features,), dtype)
        return params, (*shape[:-1], features)

    def forward(params, x, *, key=None):
        del key
        require_params(params)
        weight = params["weight"]
        require_floats(name, x, weight.dtype)
        if x.ndim < 2 or x.shape[-1] != weight.shape[0]:
            raise LayerError(
                name,
                f"got inputs of shape {show_shape(x.shape)}; "
                f"its weight takes [N, ..., {weight.shape[0]}].",
            )
        y = x @ weight
        return (y + params["bias"] if use_bias else y), x

    def backward(params, x, dy, *, read=keep):
        require_params(params)
        require_delta(name, dy, (*x.shape[:-1], features))
        readings = {"weight": read(Outer(x, dy))}
        if use_bias:
            readings["bias"] = read(Bias(dy))
        return dy @ params["weight"].T, readings

    return Layer(name, init, forward, backward)


def sigmoid():
    """The logistic function, y = 1 / (1 + e^-x), elementwise. dx = y (1 - y) dy."""

    def forward(x):
        y = jax.nn.sigmoid(x)
        return y, y

    return _elementwise("sigmoid", forward, lambda y: y * (1 - y))


def tanh():
    """The hyperbolic tangent, elementwise. dx = (1 - y^2) dy."""

    def forward(x):
        y = jnp.tanh(x)
        return y, y

    return _elementwise("tanh", forward, lambda y: 1 - y * y)


def relu():
    """The rectifier, y = max(x, 0), elementwise. dx = dy where y > 0, else 0 (at x = 0 too)."""

    def forward(x):
        # As a maximum, XLA would compute it again on the way back, and keep x for that beside y.
        y = jnp.where(x <= 0, 0, x)
        return y, y

    return _elementwise("relu", forward, lambda y: (y > 0).astype(y.dtype))


def leaky_relu(negative_slope=0.01):
    """The leaky rectifier, elementwise: y = x where x >= 0, else `negative_slope` x.

    dx = dy where y >= 0, else `negative_slope` dy.

    Args:
      negative_slope: positive, so that the sign of y tells that of x.

    Raises:
      ValueError: `negative_slope` is not positive.
    """
    require_positive("leaky_relu", "negative_slope", negative_slope)

    def forward(x):
        y = jax.nn.leaky_relu(x, negative_slope)
        return y, y

    def slope(y):
        return jnp.where(y >= 0, jnp.ones_like(y), negative_slope)

    return _elementwise(f"leaky_relu({negative_slope})", forward, slope)


def elu(alpha=1.0):
    """The exponential linear unit, elementwise: y = x where x > 0, else alpha (e^x - 1).

    dx = dy where y > 0, else (y + alpha) dy.

    Args:
      alpha: positive; y never falls below -alpha.

    Raises:
      ValueError: `alpha` is not positive.

    References:
      "Fast and Accurate Deep Network Learning by Exponential Linear Units (ELUs)", Clevert,
      Unterthiner, Hochreiter, 2016.
    """
    require_positive("elu", "alpha", alpha)

    def forward(x):
        y = jax.nn.elu(x, alpha)
        return y, y

    def slope(y):
        return jnp.where(y > 0, jnp.ones_like(y), y + alpha)

    return _elementwise(f"elu({alpha})", forward, slope)


def softplus():
    """The smooth rectifier, y = log(1 + e^x), elementwise. dx = (1 - e^-y) dy."""

    def forward(x):
        y = jax.nn.softplus(x)
        return y, y

    return _elementwise("softplus", forward, lambda y: -jnp.expm1(-y))


def silu():
    """The sigmoid linear unit or swish, y = x s with s = 1 / (1 + e^-x), elementwise.

    dx = (s + y (1 - s)) dy.

    References:
      "Sigmoid-Weighted Linear Units for Neural Network Function Approximation in Reinforcement
      Learning", Elfwing, Uchibe, Doya, 2018.
    """

    def forward(x):
        s = jax.nn.sigmoid(x)
        y = x * s
        return y, s + y * (1 - s)

    return _elementwise("silu", forward, lambda slope: slope)


def gelu(*, approximate=True):
    """The Gaussian error linear unit, y = x P(x), elementwise. dx = (P(x) + x P'(x)) dy.

      exact          P(x) = (1 + erf(x / sqrt 2)) / 2    P'(x) = e^(-x^2 / 2) / sqrt(2 pi)
      approximate    P(x) = (1 + t) / 2                  P'(x) = (1 - t^2) u'(x) / 2
                     with t = tanh(u), u(x) = sqrt(2 / pi) (x + 0.044715 x^3)

    Args:
      approximate: whether to take the form with tanh, which GPT-2 has, or the exact one.

    References:
      "Gaussian Error Linear Units (GELUs)", Hendrycks, Gimpel, 2016.
    """

    def forward_exact(x):
        p = jax.scipy.special.erfc(-x * math.sqrt(0.5)) / 2
        return x * p, p + x * jnp.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def forward_tanh(x):
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        t = jnp.tanh(scale * (x + cubic * x * x * x))
        p = (1 + t) / 2
        return x * p, p + x * (1 - t * t) * (scale * (1 + 3 * cubic * x * x)) / 2

    if approximate:
        return _elementwise("gelu", forward_tanh, lambda slope: slope)
    return _elementwise("gelu(approximate=False)", forward_exact, lambda slope: slope)


def flatten():
    """Each example as one vector, [N, ...] to [N, O]. dx is dy in the shape of x."""

    def init(key, shape):
        del key
        return (), (math.prod(require_shape("flatten", shape)),)

    def forward(params, x, *, key=None):
        del params, key
        if jnp.ndim(x) < 1:
            raise LayerError("flatten", "got inputs of shape []; it takes [N, ...].")
        # What backward needs is a shape alone, kept as an array of that shape without examples.
        return x.reshape(len(x), math.prod(x.shape[1:])), x[:0]

    def backward(params, no_examples, dy, *, read=keep):
        del params, read
        return dy.reshape(len(dy), *no_examples.shape[1:]), ()

    return Layer("flatten", init, forward, backward)


def dropout(drop_prob):
    """Sets each value to zero with probability `drop_prob` and divides the others by 1 - drop_prob.

      y = m x / (1 - drop_prob),   dx = m dy / (1 - drop_prob),   m ~ Bernoulli(1 - drop_prob)

    The mean of y is x. It draws from the `key` of forward; without one, y = x.

    Args:
      drop_prob: the probability of dropping, at least 0 and below 1.

    Raises:
      ValueError: `drop_prob` is out of range.

    References:
      "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", Srivastava, Hinton,
      Krizhevsky, Sutskever, Salakhutdinov, 2014.
    """
    if not 0 <= drop_prob < 1:
        raise ValueError(f"dropout: drop_prob is {drop_prob}; it takes a number in [0, 1).")
    keep_prob = 1 - drop_prob

    def init(key, shape):
        del key
        return (), require_shape(name, shape)

    def forward(params, x, *, key=None):
        del params
        if key is None:
            return x, None
        require_floats(name, x)
        # The mask is a byte a value, where drawing it again would cost more than reading it.
        mask = jax.random.bernoulli(key, keep_prob, x.shape)
        return apply(mask, x), mask

    def backward(params, mask, dy, *, read=keep):
        del params, read
        return (dy if mask is None else apply(mask, dy)), ()

    def apply(mask, x):
        return jnp.where(mask, x / keep_prob, 0)

    name = f"dropout({drop_prob})"
    return Layer(name, init, forward, backward)


def _elementwise(name, function, slope):
    """A layer without parameters: y, cache = function(x) and dx = slope(cache) dy."""

    def init(key, shape):
        del key
        return (), require_shape(name, shape)

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        return function(x)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        require_delta(name, dy, cache.shape)
        return slope(cache) * dy, ()

    return Layer(name, init, forward, backward)
