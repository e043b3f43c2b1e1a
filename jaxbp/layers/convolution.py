"""Convolutions: the same kernel applied at every position of a sequence, an image or a volume.

Let s be the stride, d the dilation and p the padding in front. At place k of the kernel, the output
at t sees the input at u = s t + d k - p (`signals.conv_windows`). Forward and backward are three
products (`signals.conv_products`):

    y_t = sum_k x_u W_k + b     dE/dW_k = sum_nt x_nu dy_nt^T     dx_u = sum_k dy_t W_k^T

A transposed convolution has the last product, without b, as its forward pass, and the first as its
backward pass. Channels are the last axis.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxbp.require import (
    require_count,
    require_delta,
    require_floats,
    require_key,
    require_params,
    require_shape,
)
from jaxbp.sharding import gathered
from jaxbp.signals.conv_products import convolve, convolve_transpose, exchanged
from jaxbp.signals.conv_windows import Windows, make_output_padding, make_windows
from jaxbp.signals.kinds import Bias, Conv, keep
from jaxbp.types import Layer, LayerError, Shape, show_shape

__all__ = ["conv", "conv_transpose"]


def conv(
    features: int,
    kernel: tuple[int, ...],
    *,
    strides: int | tuple[int, ...] = 1,
    padding: Literal["SAME", "VALID"] | Sequence[tuple[int, int]] = "SAME",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    use_bias: bool = True,
    weight_init: Initializer = initializers.lecun_normal(),  # noqa: B008 -- a pure function
    bias_init: Initializer = initializers.zeros,
    dtype: DTypeLike = float,
) -> Layer:
    """A convolution over one, two or three axes of positions: sequences, images or volumes.

        y_t = sum_k x_u W_k + b,   u = s t + d k - p
        dE/dW_k = sum_nt x_nu dy_nt^T     dE/db = sum_nt dy_nt
        dx_u = sum of dy_t W_k^T over the t and k with s t + d k - p = u

    Inputs are [N, *S, I] and outputs [N, *S', O]. Parameters are
    `{"weight": [*K, I / groups, O], "bias": [O]}`, without the bias if `use_bias` is false. As in
    other libraries the kernel is not flipped, so this is a cross-correlation.

    The kernel spans d (K - 1) + 1 positions of an axis. Outside of the inputs it sees zeros:

        padding       p zeros in front, q behind, on each axis    S', the outputs on each axis
        SAME          p = floor(m / 2), q = ceil(m / 2)           ceil(S / s)
        VALID         p = q = 0                                   floor((S - span) / s) + 1
        (p, q), ...   as given                                    floor((S + p + q - span) / s) + 1

    with m = max(s (S' - 1) + span - S, 0), the positions that are missing for S' = ceil(S / s).

    Args:
      features: O, the number of output channels.
      kernel: K, one size for each axis of positions, such as (3, 3) for images.
      strides: s, one for all axes or one for each.
      padding: `SAME`, `VALID`, or a pair (p, q) for each axis.
      dilation: d, one for all axes or one for each.
      groups: splits the I input channels and the O output channels into this many groups of
        neighbours. Each group of outputs sees only its group of inputs. With I groups the
        convolution is depthwise: each output sees one input channel.
      use_bias: whether to add a bias b.
      weight_init: the initialiser of W, as in `jax.nn.initializers`.
      bias_init: the initialiser of b.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      ValueError: an argument is out of range.
      LayerError: the inputs or the parameters do not fit, or the kernel is larger than the inputs.

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
    features, groups = _require_outputs("conv", features, groups)
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
    features: int,
    kernel: tuple[int, ...],
    *,
    strides: int | tuple[int, ...] = 1,
    padding: Literal["SAME", "VALID"] | Sequence[tuple[int, int]] = "SAME",
    output_padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    use_bias: bool = True,
    weight_init: Initializer = initializers.lecun_normal(),  # noqa: B008 -- a pure function
    bias_init: Initializer = initializers.zeros,
    dtype: DTypeLike = float,
) -> Layer:
    """A transposed convolution, which makes images larger: the backward pass of a `conv`.

        y_u = b + sum of x_t W_k over the t and k with s t + d k - p = u
        dE/dW_k = sum_nt x_nt dy_nu^T     dE/db = sum_nu dy_nu     dx_t = sum_k dy_u W_k^T

    Consider the `conv` from [N, *S, O] to [N, *S', I] with the same arguments and the kernel W_k^T.
    The forward pass of this layer is the backward pass of that convolution, plus b, and its dx is
    the forward pass of that convolution. Inputs are [N, *S', I] and outputs [N, *S, O]. Parameters
    are `{"weight": [*K, I / groups, O], "bias": [O]}`, without the bias if `use_bias` is false.

        padding       S, the outputs on each axis
        SAME          s S'
        VALID         s (S' - 1) + span + o
        (p, q), ...   s (S' - 1) + span - p - q + o

    with span = d (K - 1) + 1, p, q the padding of that convolution and o the output padding.
    Convolutions of several S have the same S' if s > 1, and o says which S is meant. What no window
    sees of these o positions is b.

    Args:
      features: O, the number of output channels.
      kernel: K, one size for each axis of positions, such as (3, 3) for images.
      strides: s, one for all axes or one for each.
      padding: `SAME`, `VALID`, or a pair (p, q) for each axis, by which the outputs are cropped.
      output_padding: o, the number of positions by which the outputs are longer, behind the last;
        one for all axes or one for each. As in PyTorch, but with no upper limit.
      dilation: d, one for all axes or one for each.
      groups: splits the I input channels and the O output channels into this many groups of
        neighbours. Each group of outputs sees only its group of inputs.
      use_bias: whether to add a bias b.
      weight_init: the initialiser of W, as in `jax.nn.initializers`.
      bias_init: the initialiser of b.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      ValueError: an argument is out of range, or there is an output padding with SAME.
      LayerError: the inputs or the parameters do not fit, or the padding leaves no outputs.

    References:
      "A guide to convolution arithmetic for deep learning", Dumoulin, Visin, 2016.

    Example:
      >>> import jax, jaxbp as bp
      >>> layer = bp.conv_transpose(8, (3, 3), strides=2)
      >>> layer.init(jax.random.key(0), (7, 7, 4))[1]
      (14, 14, 8)
    """
    factory = "conv_transpose"
    features, groups = _require_outputs(factory, features, groups)
    name = f"{factory}({features}, {kernel})"
    windows = make_windows(factory, name, kernel, strides, padding, dilation, groups=groups)
    more = make_output_padding(factory, windows, output_padding)

    def forward(x, weight):
        geometry, sizes = windows.onto(x.shape[1:-1], more)
        return convolve_transpose(x, exchanged(weight, groups), geometry, sizes)

    def backward(x, weight, dy):
        geometry, _ = windows.onto(x.shape[1:-1], more)
        return convolve(dy, exchanged(weight, groups), geometry), Conv(x, dy, geometry)

    def out_sizes(sizes):
        return windows.onto(sizes, more)[1]

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


def _require_outputs(factory: str, features: int, groups: int) -> tuple[int, int]:
    """Returns the numbers of outputs and groups; raises if the one is no multiple of the other."""
    features = require_count(factory, "features", features)
    groups = require_count(factory, "groups", groups)
    if features % groups:
        raise ValueError(f"{factory}: features is {features}, not a multiple of {groups} groups.")
    return features, groups


def _convolution(
    windows: Windows,
    features: int,
    apply: Callable[[jax.Array, jax.Array], jax.Array],
    transpose: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Conv]],
    out_sizes: Callable[[Shape], Shape],
    *,
    use_bias: bool,
    weight_init: Initializer,
    bias_init: Initializer,
    dtype: DTypeLike,
) -> Layer:
    """A layer with kernel W: y = apply(x, W) + b, and dx, signal = transpose(x, W, dy)."""
    name, kernel, groups = windows.name, windows.kernel, windows.groups
    i_of_group = "I" if groups == 1 else f"I / {groups}"
    shapes = {"weight": (*kernel, i_of_group, features), "bias": (features,)}
    if not use_bias:
        del shapes["bias"]

    def require_fit(weight, x, what):
        *_, i = windows.require_axes(x.shape[1:], "I")
        if i != weight.shape[-2] * groups:
            raise LayerError(
                name,
                f"got {what} of shape {show_shape(x.shape)}; "
                f"its weight takes {weight.shape[-2] * groups} channels.",
            )

    def init(key, shape):
        require_key(name, "key", key)
        *sizes, i = windows.require_axes(require_shape(name, shape), "I")
        if i % groups:
            raise LayerError(
                name, f"got inputs of {i} channels, not a multiple of {groups} groups."
            )
        weight_key, bias_key = jax.random.split(key)
        params = {"weight": weight_init(weight_key, (*kernel, i // groups, features), dtype)}
        if use_bias:
            params["bias"] = bias_init(bias_key, (features,), dtype)
        return params, (*out_sizes(tuple(sizes)), features)

    def forward(params, x, *, key=None):
        del key
        require_params(name, params, shapes)
        require_floats(name, x, params["weight"].dtype)
        require_fit(params["weight"], x, "inputs")
        params = gathered(params, x)
        y = apply(x, params["weight"])
        return (y + params["bias"] if use_bias else y), x

    def backward(params, x, dy, *, read=keep):
        require_params(name, params, shapes)
        require_floats(name, x, what="a cache")
        require_fit(params["weight"], x, "a cache")
        require_delta(name, dy, (x.shape[0], *out_sizes(x.shape[1:-1]), features))
        dx, signal = transpose(x, gathered(params["weight"], x), dy)
        readings = {"weight": read(signal)}
        if use_bias:
            readings["bias"] = read(Bias(dy))
        return dx, readings

    return Layer(name, init, forward, backward)
