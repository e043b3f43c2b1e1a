"""Attention layers: split the heads, attend within each head, and join the heads again.

`dot_product` computes attention and its derivatives. This module has the layers, and the layout of
the heads: in inputs and outputs they stand side by side in the last axis.

Letters are those of `types` and `dot_product`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxbp.combinators.compose import chain
from jaxbp.layers.dot_product import Sight, attend, attend_backward
from jaxbp.layers.linear import dense
from jaxbp.require import (
    require_cache,
    require_count,
    require_delta,
    require_fit,
    require_floats,
    require_mask,
    require_positive,
    require_shape,
    require_shape_alone,
)
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, LayerError, Shape, shape_alone, show_shape, widened

__all__ = ["attention", "dot_product_attention", "rotary"]

BASE = 10000.0


def rotary(heads: int, *, base: float = BASE) -> Layer:
    """Rotary position embedding: rotates pairs of values in each head by angles that grow with t.

    Each head has size d and d / 2 pairs. With a = t base^(-2 j / d) the angle of pair j at t:

        y_j = x_j cos a - x_(j + d/2) sin a     y_(j + d/2) = x_(j + d/2) cos a + x_j sin a

    dx is dy rotated by -a. The product of a rotated query and a rotated key depends on the distance
    between their positions, not on the positions themselves.

    The two values of a pair stand half a head apart, as in GPT-NeoX and Llama, not side by side.
    Inputs and outputs are [N, T, H d]. 16-bit inputs are rotated in 32 bits.

    Args:
      heads: H, a divisor of the size of the last axis.
      base: a positive number. The larger it is, the more slowly the last pairs rotate.

    Raises:
      ValueError: `heads` is not a positive integer, or `base` is not positive.
      LayerError: the inputs do not fit, or d is odd.

    References:
      "RoFormer: Enhanced Transformer with Rotary Position Embedding", Su et al., 2021.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> x = jnp.array([[[1.0, 0.0], [1.0, 0.0]]])
      >>> y, _ = bp.rotary(1).forward((), x)                   # rotated by angles 0 and 1
      >>> [[round(float(number), 2) for number in position] for position in y[0]]
      [[1.0, 0.0], [0.54, 0.84]]
    """
    heads = require_count("rotary", "heads", heads)
    require_positive("rotary", "base", base)
    name = f"rotary({heads})"

    def rotate(x, sign):
        size = _require_size(name, x.shape[1:], heads, "H d", even=True)
        return _rotate(x.reshape(*x.shape[:2], heads, size), sign, base).reshape(x.shape)

    def init(key, shape):
        del key
        shape = require_shape(name, shape)
        _require_size(name, shape, heads, "H d", even=True)
        return (), shape

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        return rotate(x, 1), shape_alone(x)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        require_delta(name, dy, require_shape_alone(name, cache))
        return rotate(dy, -1), ()

    return Layer(name, init, forward, backward)


def dot_product_attention(
    heads: int,
    *,
    kv_heads: int | None = None,
    causal: bool = False,
    mask: jax.Array | np.ndarray | None = None,
    rotary: bool = False,
    lean: bool = False,
) -> Layer:
    """Scaled dot-product attention, without parameters. `attention` adds the dense layers.

    In each head, position t has a query q_t, a key k_t and a value v_t of size d. Forward, with the
    sums over the positions s that t sees:

        e_ts = q_t . k_s / sqrt(d)     p_ts = exp(e_ts) / sum_s exp(e_ts)     y_t = sum_s p_ts v_s

    Backward:

        dp_ts = dy_t . v_s                   de_ts = p_ts (dp_ts - sum_s p_ts dp_ts)
        dq_t = sum_s de_ts k_s / sqrt(d)     dk_s = sum_t de_ts q_t / sqrt(d)
                                             dv_s = sum_t p_ts dy_t

    The H heads have queries of their own. Each of the G groups of H / G neighbouring heads shares
    one key and one value: G = H is multi-head attention, G = 1 multi-query attention. Inputs are
    [N, T, (H + 2 G) d]: side by side the H queries, the G keys and the G values of each position.
    Outputs are [N, T, H d].

        by default             each position sees all positions
        causal                 t sees the positions s <= t
        mask false at s        no position sees s: x_s changes no other output, and dk_s = dv_s = 0.
                               If x_s is not finite there, zeros stand for it, and dx_s = 0
        t sees no position     y_t = 0 and dq_t = 0

    The forward pass keeps the probabilities, H T^2 numbers per example without `causal`. The lean
    form keeps only the logarithm of each sum of exponentials, [N, H, T]. Its backward pass computes
    the probabilities again, a few rows at a time. Scores and sums of 16-bit inputs are in 32 bits.

    Args:
      heads: H.
      kv_heads: G, a divisor of H; None means H.
      causal: whether no position sees a later one.
      mask: booleans, false at positions that no query sees: [T], or [N, T] with one row for each
        example. Use `masked` to pass a mask with each batch.
      rotary: whether to rotate queries and keys first, as `rotary` does.
      lean: whether to keep O(T) instead of O(T^2) numbers for the backward pass.

    Raises:
      ValueError: `heads` or `kv_heads` is not a positive integer, `kv_heads` does not divide
        `heads`, or `mask` is not an array of booleans with one or two axes.
      LayerError: the inputs do not fit the heads or the mask.

    References:
      "Attention Is All You Need", Vaswani et al., 2017.
      "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
      Ainslie et al., 2023.
      "Self-attention Does Not Need O(n^2) Memory", Rabe, Staats, 2021, and "FlashAttention: Fast
      and Memory-Efficient Exact Attention with IO-Awareness", Dao et al., 2022: the lean form.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> layer = bp.dot_product_attention(1, causal=True)
      >>> q, k, v = jnp.zeros((1, 2, 1)), jnp.zeros((1, 2, 1)), jnp.array([[[2.0], [4.0]]])
      >>> y, _ = layer.forward((), jnp.concatenate([q, k, v], axis=-1))
      >>> y.ravel().tolist()                    # v_1, and the mean of v_1 and v_2
      [2.0, 3.0]
    """
    heads, groups = _require_groups("dot_product_attention", heads, kv_heads)
    require_mask("dot_product_attention", mask)
    layout, sight = _Layout(heads, groups, rotary), Sight(heads // groups, causal, mask)
    name = f"dot_product_attention({heads})"

    def require(shape, n: int | str = "N"):
        """Returns the d of inputs [n, *shape], or raises if they do not fit."""
        of_heads = heads + 2 * groups, "(H + 2 G) d"
        return _require_size(name, shape, *of_heads, even=rotary, mask=mask, n=n)

    def init(key, shape):
        del key
        shape = require_shape(name, shape)
        return (), (shape[0], heads * require(shape))

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        require(x.shape[1:], len(x))
        broken = _broken(x, mask)
        q, k, v = layout.split(_without(broken, x))
        k, v = sight.hide(k), sight.hide(v)
        rows, kept = attend(q, k, v, sight, lean=lean)
        return layout.from_rows(rows), (q, k, v, kept, broken)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        require_cache(name, cache, 5)
        q, k, v, kept, broken = cache
        n, _, t, size = k.shape
        require_delta(name, dy, (n, t, heads * size))
        dq, dk, dv = attend_backward(q, k, v, kept, layout.to_rows(dy), sight, lean=lean)
        return _without(broken, layout.join(dq, dk, dv).astype(dy.dtype)), ()

    return Layer(name, init, forward, backward)


def attention(
    features: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    causal: bool = False,
    mask: jax.Array | np.ndarray | None = None,
    rotary: bool = False,
    lean: bool = False,
    use_bias: bool = True,
    weight_init: Initializer = initializers.lecun_normal(),  # noqa: B008 -- a pure function
    dtype: DTypeLike = float,
) -> Layer:
    """Self-attention: a dense layer computes queries, keys and values, another mixes the heads.

    It is the same layer, under a name of its own, as

        chain(dense((H + 2 G) d), dot_product_attention(H, ...), dense(features)),  d = features / H

    The formulas of attention are in `dot_product_attention`. Inputs are [N, T, I], outputs
    [N, T, features]. One dense layer computes the queries, keys and values of all heads, as one
    product instead of three. Parameters are a tuple of the parameters of the three parts.

    Args:
      features: the number of outputs, a multiple of H.
      heads: H.
      kv_heads: G, a divisor of H; None means H.
      causal: whether no position sees a later one.
      mask: booleans, false at positions that no query sees: [T], or [N, T] with one row for each
        example. Use `masked` to pass a mask with each batch.
      rotary: whether to rotate queries and keys by their positions, as `rotary` does.
      lean: whether to keep O(T) instead of O(T^2) numbers for the backward pass.
      use_bias: whether both dense layers add a bias.
      weight_init: the initialiser of both weights, as in `jax.nn.initializers`.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      ValueError: a number is not a positive integer, `heads` does not divide `features`,
        `kv_heads` does not divide `heads`, or `mask` is not an array of booleans with one or two
        axes.
      LayerError: the inputs, the parameters or the mask do not fit.

    References:
      "Attention Is All You Need", Vaswani et al., 2017.

    Example:
      >>> import jax, jaxbp as bp
      >>> block = bp.residual(bp.layer_norm(), bp.attention(8, heads=2, causal=True))
      >>> params, out_shape = block.init(jax.random.key(0), (5, 8))
      >>> out_shape, [part["weight"].shape for part in params[1] if part]
      ((5, 8), [(8, 24), (8, 8)])
    """
    features = require_count("attention", "features", features)
    heads, groups = _require_groups("attention", heads, kv_heads)
    if features % heads:
        raise ValueError(f"attention: features is {features}, not a multiple of {heads} heads.")
    linear = functools.partial(dense, use_bias=use_bias, weight_init=weight_init, dtype=dtype)
    core = dot_product_attention(
        heads, kv_heads=kv_heads, causal=causal, mask=mask, rotary=rotary, lean=lean
    )
    layer = chain(linear((heads + 2 * groups) * (features // heads)), core, linear(features))
    layer = layer._replace(name=f"attention({features}, {heads})")
    return layer if mask is None else _without_broken(layer, mask)


def _without_broken(layer: Layer, mask: jax.Array | np.ndarray) -> Layer:
    """The layer, for inputs in which zeros replace masked positions that are not finite.

    A delta of zero at such a position is not enough for the dense layers: zero times nan is nan.
    """
    name = layer.name

    def forward(params, x, *, key=None):
        require_floats(name, x)
        if x.ndim != 3:
            got = show_shape(x.shape)
            raise LayerError(name, f"got inputs of shape {got}; it takes [N, T, I].")
        require_fit(name, mask, len(x), x.shape[1:])
        broken = _broken(x, mask)
        y, cache = layer.forward(params, _without(broken, x), key=key)
        return y, (cache, broken)

    def backward(params, cache, dy, *, read=keep):
        require_cache(name, cache, 2)
        cache, broken = cache
        dx, readings = layer.backward(params, cache, dy, read=read)
        return _without(broken, dx), readings

    return Layer(name, layer.init, forward, backward)


def _broken(x: jax.Array, mask: jax.Array | np.ndarray | None) -> jax.Array | None:
    """Which positions are masked and hold a number that is not finite, [N, T, 1], or None."""
    if mask is None:
        return None
    return ~jnp.atleast_2d(mask)[..., None] & ~jnp.isfinite(x).all(axis=-1, keepdims=True)


def _without(broken: jax.Array | None, x: jax.Array) -> jax.Array:
    """The array [N, T, ...] with zeros at broken positions."""
    return x if broken is None else jnp.where(broken, 0, x)


class _Layout(NamedTuple):
    """Converts between heads side by side in the last axis and the rows that `attend` takes.

    Attributes:
      heads: H.
      groups: G.
      rotary: whether queries and keys are rotated by their positions.
    """

    heads: int
    groups: int
    rotary: bool

    def split(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Splits x [N, T, (H + 2 G) d] into rows of queries / sqrt(d), keys and values."""
        n_heads = self.heads + 2 * self.groups
        x = x.reshape(*x.shape[:2], n_heads, x.shape[2] // n_heads)
        q, k, v = jnp.split(x, [self.heads, self.heads + self.groups], axis=2)
        if self.rotary:
            q, k = _rotate(q, 1), _rotate(k, 1)
        # The queries are divided by sqrt(d), because there are fewer of them than scores.
        return self._rows(q * q.shape[-1] ** -0.5), self._rows(k), self._rows(v)

    def join(self, dq: jax.Array, dk: jax.Array, dv: jax.Array) -> jax.Array:
        """The derivative of `split`: dx from the derivatives with respect to its results."""
        dq = self._heads(dq * dq.shape[-1] ** -0.5, self.heads)
        dk, dv = self._heads(dk, self.groups), self._heads(dv, self.groups)
        if self.rotary:
            dq, dk = _rotate(dq, -1), _rotate(dk, -1)
        dx = jnp.concatenate([dq, dk, dv], axis=2)
        return dx.reshape(*dx.shape[:2], dx.shape[2] * dx.shape[3])

    def to_rows(self, y: jax.Array) -> jax.Array:
        """Rearranges outputs [N, T, H d] to rows [N, G, T H / G, d]."""
        return self._rows(y.reshape(*y.shape[:2], self.heads, y.shape[2] // self.heads))

    def from_rows(self, rows: jax.Array) -> jax.Array:
        """The inverse of `to_rows`."""
        y = self._heads(rows, self.heads)
        return y.reshape(*y.shape[:2], self.heads * y.shape[3])

    def _rows(self, x: jax.Array) -> jax.Array:
        """Rearranges h heads [N, T, h, d], queries or keys, to rows [N, G, T h / G, d]."""
        n, t, heads, size = x.shape
        x = jnp.moveaxis(x.reshape(n, t, self.groups, heads // self.groups, size), 1, 2)
        return x.reshape(n, self.groups, t * heads // self.groups, size)

    def _heads(self, rows: jax.Array, heads: int) -> jax.Array:
        """The inverse of `_rows`, for so many heads."""
        n, _, n_rows, size = rows.shape
        t, group = n_rows * self.groups // heads, heads // self.groups
        x = jnp.moveaxis(rows.reshape(n, self.groups, t, group, size), 2, 1)
        return x.reshape(n, t, heads, size)


def _rotate(x: jax.Array, sign: int, base: float = BASE) -> jax.Array:
    """Rotates the pairs of heads [N, T, H, d] by `sign` times the angles of their positions."""
    t, size = x.shape[1], x.shape[3]
    angles = np.arange(t)[:, None, None] * base ** (-np.arange(0, size, 2) / size)
    wide = widened(x)
    cos, sin = (jnp.asarray(f(sign * angles), wide.dtype) for f in (np.cos, np.sin))
    a, b = jnp.split(wide, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _require_groups(name: str, heads: int, kv_heads: int | None) -> tuple[int, int]:
    """Returns H and G; raises unless they are positive integers, and G divides H."""
    heads = require_count(name, "heads", heads)
    groups = heads if kv_heads is None else require_count(name, "kv_heads", kv_heads)
    if heads % groups:
        raise ValueError(f"{name}: kv_heads is {groups}, which does not divide {heads} heads.")
    return heads, groups


def _require_size(
    name: str,
    shape: Shape,
    heads: int,
    letters: str,
    *,
    even: bool,
    mask: Any = None,
    n: int | str = "N",
) -> int:
    """Returns the size d of each of `heads` heads in inputs [n, *shape], or raises."""
    got = f"got inputs of shape {show_shape(('N', *shape))}"
    if len(shape) != 2:
        raise LayerError(name, f"{got}; it takes [N, T, {letters}], with one axis of positions.")
    if shape[1] % heads:
        raise LayerError(
            name, f"{got}; it takes [N, T, {letters}], a last axis that is a multiple of {heads}."
        )
    size = shape[1] // heads
    if even and size % 2:
        raise LayerError(name, f"{got}, so that d = {size}; pairs take an even d.")
    require_fit(name, mask, n, shape)
    return size
