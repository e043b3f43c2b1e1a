"""Convolutions: one small matrix at every position, for what lies around it.

With u = s t + d k - p the input that an output at t sees at the place k of the kernel (see
`windows`), everything here consists of three products (see `products`):

  y_t = sum_k x_u W_k + b     dE/dW_k = sum_nt x_nu dy_nt^T     dx_u = sum_k dy_t W_k^T

A transposed convolution exchanges the first and the last of them. Channels are the last axis.
"""

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxbp.require import (
    require_count,
    require_delta,
    require_floats,
    require_leaves,
    require_shape,
)
from jaxbp.signals.conv_products import convolve, convolve_transpose, exchanged
from jaxbp.signals.conv_windows import make_windows
from jaxbp.signals.kinds import Bias, Conv, keep
from jaxbp.types import Layer, LayerError, show_shape


def conv(
    features,
    kernel,
    *,
    strides=1,
    padding="SAME",
    dilation=1,
    groups=1,
    use_bias=True,
    weight_init=initializers.lecun_normal(),  # noqa: B008 -- a pure function
    bias_init=initializers.zeros,
    dtype=float,
):
    """A convolution over the positions of an image, or of one axis of them, or of three.

      y_t = sum_k x_u W_k + b,   u = s t + d k - p
      dE/dW_k = sum_nt x_nu dy_nt^T     dE/db = sum_nt dy_nt     dx_u = sum_k dy_t W_k^T

    The kernel is not flipped, as is the custom. Inputs are [N, *S, I] and outputs [N, *S', O],
    parameters `{"weight": [*K, I / groups, O], "bias": [O]}`.

      padding       p, the places of zeros before                S', the outputs on each axis
      SAME          half of what is missing, rounded down        ceil(S / s)
      VALID         0                                            floor((S - span) / s) + 1
      (p, q), ...   p, with q behind                             floor((S + p + q - span) / s) + 1

    with span = d (K - 1) + 1 positions that the kernel reaches over.

    Args:
      features: O, the number of outputs.
      kernel: K, a tuple of as many sizes as there are axes of positions: (3, 3) for images.
      strides: s, for all axes or for each.
      padding: `SAME`, `VALID`, or a pair for each axis.
      dilation: d, for all axes or for each.
      groups: into how many groups of neighbours the inputs, and the outputs, are split; the first
        outputs see the first inputs. With as many groups as inputs, each sees one: depthwise.
      use_bias: whether there is a b.
      weight_init: an initialiser in the form of `jax.nn.initializers`.
      bias_init: the same, for b.
      dtype: of the parameters; inputs have to have it too. `float` is jax's default.

    Raises:
      ValueError: an argument is out of range.
      LayerError: the inputs, or the parameters, do not fit; the kernel is larger than the inputs.

    References:
      "Gradient-Based Learning Applied to Document Recognition", LeCun, Bottou, Bengio, Haffner,
      1998.
      "A guide to convolution arithmetic for deep learning", Dumoulin, Visin, 2016.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> layer = bp.conv(8, (3, 3), strides=2)
      >>> params, out_shape = layer.init(jax.random.key(0), (28, 28, 1))
      >>> y, cache = layer.forward(params, jnp.ones((5, 28, 28, 1)))
      >>> _, norms = layer.backward(params, cache, y, read=bp.sq_norms)
      >>> params["weight"].shape, out_shape, norms["weight"].shape
      ((3, 3, 1, 8), (14, 14, 8), (5,))
    """
    _require_outputs("conv", features, groups)
    name = f"conv({features}, {kernel})"
    windows = make_windows("conv", name, kernel, strides, padding, dilation, groups=groups)

    def forward(x, weight):
        return convolve(x, weight, windows.on(x.shape[1:-1]))

    def backward(x, weight, dy):
        sizes = x.shape[1:-1]
        geometry = windows.on(sizes)
        return convolve_transpose(dy, weight, geometry, sizes), Conv(x, dy, geometry)

    def out_sizes(sizes):
        return windows.on(sizes).count(sizes)

    return _convolution(
        windows,
        features,
        forward,
        backward,
        out_sizes,
        use_bias=use_bias,
        weight_init=weight_init,
        bias_init=bias_init,
        dtype=dtype,
    )


def conv_transpose(
    features,
    kernel,
    *,
    strides=1,
    padding="SAME",
    dilation=1,
    groups=1,
    use_bias=True,
    weight_init=initializers.lecun_normal(),  # noqa: B008 -- a pure function
    bias_init=initializers.zeros,
    dtype=float,
):
    """The transpose of a convolution, which makes images larger: what a `conv` does to its error.

      y_u = sum of x_t W_k over the t, k with s t + d k - p = u, + b
      dE/dW_k = sum_nt x_nt dy_nu^T     dE/db = sum_nu dy_nu     dx_t = sum_k dy_u W_k^T

    So its forward pass is the dx of the convolution from [N, *S, O] to [N, *S', I] with the same
    arguments and kernel W_k^T, and its dx that convolution. Inputs are [N, *S', I] and outputs
    [N, *S, O], parameters `{"weight": [*K, I / groups, O], "bias": [O]}`.

      padding       S, the outputs on each axis
      SAME          s S'
      VALID         s (S' - 1) + span
      (p, q), ...   s (S' - 1) + span - p - q

    with span = d (K - 1) + 1; p is what that convolution has before.

    Args:
      features: O, the number of outputs.
      kernel: K, a tuple of as many sizes as there are axes of positions: (3, 3) for images.
      strides: s, for all axes or for each.
      padding: `SAME`, `VALID`, or a pair for each axis, which is taken off the outputs.
      dilation: d, for all axes or for each.
      groups: as of `conv`.
      use_bias: whether there is a b.
      weight_init: an initialiser in the form of `jax.nn.initializers`.
      bias_init: the same, for b.
      dtype: of the parameters; inputs have to have it too. `float` is jax's default.

    Raises:
      ValueError: an argument is out of range.
      LayerError: the inputs, or the parameters, do not fit.

    References:
      "A guide to convolution arithmetic for deep learning", Dumoulin, Visin, 2016.

    Example:
      >>> import jax, jaxbp as bp
      >>> layer = bp.conv_transpose(8, (3, 3), strides=2)
      >>> layer.init(jax.random.key(0), (7, 7, 4))[1]
      (14, 14, 8)
    """
    factory = "conv_transpose"
    _require_outputs(factory, features, groups)
    name = f"{factory}({features}, {kernel})"
    windows = make_windows(factory, name, kernel, strides, padding, dilation, groups=groups)

    def forward(x, weight):
        geometry, sizes = windows.onto(x.shape[1:-1])
        return convolve_transpose(x, exchanged(weight, groups), geometry, sizes)

    def backward(x, weight, dy):
        geometry, _ = windows.onto(x.shape[1:-1])
        return convolve(dy, exchanged(weight, groups), geometry), Conv(x, dy, geometry)

    def out_sizes(sizes):
        return windows.onto(sizes)[1]

    return _convolution(
        windows,
        features,
        forward,
        backward,
        out_sizes,
        use_bias=use_bias,
        weight_init=weight_init,
        bias_init=bias_init,
        dtype=dtype,
    )


def _require_outputs(factory, features, groups):
    require_count(factory, "features", features)
    require_count(factory, "groups", groups)
    if features % groups:
        raise ValueError(f"{factory}: features is {features}, which {groups} groups do not divide.")


def _convolution(
    windows, features, apply, transpose, out_sizes, *, use_bias, weight_init, bias_init, dtype
):
    """A layer of a kernel and a bias: y = apply(x, W) + b and dx, signal = transpose(x, W, dy)."""
    name, kernel, groups = windows.name, windows.kernel, windows.groups
    leaves = ("weight", "bias") if use_bias else ("weight",)

    def require_params(params):
        require_leaves(name, params, leaves)
        shape = jnp.shape(params["weight"])
        if len(shape) != len(kernel) + 2 or (*shape[:-2], shape[-1]) != (*kernel, features):
            i = "I" if groups == 1 else f"I / {groups}"
            raise LayerError(
                name,
                f"got a weight of shape {show_shape(shape)}; it takes "
                f"{show_shape((*kernel, i, features))}. Is it that of another network?",
            )

    def init(key, shape):
        *sizes, i = windows.require_axes(require_shape(name, shape), "I")
        if i % groups:
            raise LayerError(name, f"got {i} inputs, which {groups} groups do not divide.")
        weight_key, bias_key = jax.random.split(key)
        params = {"weight": weight_init(weight_key, (*kernel, i // groups, features), dtype)}
        if use_bias:
            params["bias"] = bias_init(bias_key, (features,), dtype)
        return params, (*out_sizes(tuple(sizes)), features)

    def forward(params, x, *, key=None):
        del key
        require_params(params)
        weight = params["weight"]
        require_floats(name, x, weight.dtype)
        *_, i = windows.require_axes(x.shape[1:], "I")
        if i != weight.shape[-2] * groups:
            raise LayerError(
                name,
                f"got inputs of shape {show_shape(x.shape)}; "
                f"its weight takes {weight.shape[-2] * groups} of them at each position.",
            )
        y = apply(x, weight)
        return (y + params["bias"] if use_bias else y), x

    def backward(params, x, dy, *, read=keep):
        require_params(params)
        require_delta(name, dy, (len(x), *out_sizes(x.shape[1:-1]), features))
        dx, signal = transpose(x, params["weight"], dy)
        readings = {"weight": read(signal)}
        if use_bias:
            readings["bias"] = read(Bias(dy))
        return dx, readings

    return Layer(name, init, forward, backward)
