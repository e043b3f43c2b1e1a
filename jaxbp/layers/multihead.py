"""Attention layers: heads split from one array, attention between positions, heads joined again.

`dot_product` has the formulas and their derivatives. Here are the layers, and where the heads stand
in their inputs: side by side in the last axis.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from jaxbp.combinators.compose import chain
from jaxbp.layers.dot_product import Sight, attend, attend_backward
from jaxbp.layers.linear import dense
from jaxbp.require import (
    require_count,
    require_delta,
    require_fit,
    require_floats,
    require_mask,
    require_positive,
    require_shape,
)
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, LayerError, show_shape, widened

BASE = 10000.0


def rotary(heads, *, base=BASE):
    """Rotary position embedding: turns pairs of numbers, in each head, by the position.

    With a = t base^(-2 j / d) the angle of pair j, of d / 2, at position t:

      y_j = x_j cos a - x_(j + d/2) sin a     y_(j + d/2) = x_(j + d/2) cos a + x_j sin a

    dx is dy turned by -a. The numbers of a pair stand half a head apart, as in GPT-NeoX and Llama,
    not side by side. The product of a query and a key that are turned depends on how far apart
    they stand, and not on where. Inputs are [N, T, H d]. Numbers of 16 bits are turned in 32.

    Args:
      heads: H, which have to divide the last axis.
      base: positive; the larger, the slower the last pairs turn.

    Raises:
      ValueError: `heads` is not a positive integer, or `base` not positive.
      LayerError: the inputs do not fit, or d is odd.

    References:
      "RoFormer: Enhanced Transformer with Rotary Position Embedding", Su et al., 2021.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> x = jnp.array([[[1.0, 0.0], [1.0, 0.0]]])
      >>> y, _ = bp.rotary(1).forward((), x)                   # by an angle of 0, and of 1
      >>> [[round(float(number), 2) for number in position] for position in y[0]]
      [[1.0, 0.0], [0.54, 0.84]]
    """
    require_count("rotary", "heads", heads)
    require_positive("rotary", "base", base)
    name = f"rotary({heads})"

    def turned(x, way):
        size = _require_size(name, x.shape[1:], heads, "H d", even=True)
        return _turned(x.reshape(*x.shape[:2], heads, size), way, base).reshape(x.shape)

    def init(key, shape):
        del key
        shape = require_shape(name, shape)
        _require_size(name, shape, heads, "H d", even=True)
        return (), shape

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        return turned(x, 1), x[:0]

    def backward(params, no_examples, dy, *, read=keep):
        del params, read
        require_delta(name, dy, (len(dy), *no_examples.shape[1:]))
        return turned(dy, -1), ()

    return Layer(name, init, forward, backward)


def dot_product_attention(
    heads, *, kv_heads=None, causal=False, mask=None, rotary=False, lean=False
):
    """Scaled dot-product attention, without parameters; the formulas stand above.

    Inputs are [N, T, (H + 2 G) d]: side by side the queries of all heads, their keys and their
    values. Outputs are [N, T, H d]. Who may see whom:

      by default             each position sees all
      causal                 t sees s <= t
      mask false at s        nobody sees s: what it holds changes no other output, dk_s = dv_s = 0
      a t that sees none     y_t = 0 and dq_t = 0

    The probabilities are kept for the way back, or in the lean form the logarithm of each row's sum
    of exponentials, [N, H, T], from which a few rows of them at a time are formed anew; there are
    never more. Of numbers of 16 bits, scores and sums are in 32.

    Args:
      heads: H.
      kv_heads: G, which has to divide H; H if it is None.
      causal: whether a position sees none that come after it.
      mask: booleans, false at positions that nobody may see: [T], or [N, T] for each example.
      rotary: whether queries and keys are turned first, as `rotary` does.
      lean: whether to keep O(T) and not O(T^2) numbers.

    Raises:
      ValueError: `heads` or `kv_heads` is not a positive integer, they do not divide, or `mask` is
        not of one or two axes of booleans.
      LayerError: the inputs do not fit the heads, or the mask.

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
      >>> y.ravel().tolist()                         # its own, and the mean of both
      [2.0, 3.0]
    """
    groups = heads if kv_heads is None else kv_heads
    _require_groups("dot_product_attention", heads, groups)
    require_mask("dot_product_attention", mask)
    places, sight = _Heads(heads, groups, rotary), Sight(heads // groups, causal, mask)
    name = f"dot_product_attention({heads})"

    def require(shape, n: int | str = "N"):
        """The d of inputs [n, *shape]."""
        size = _require_size(name, shape, heads + 2 * groups, "(H + 2 G) d", even=rotary)
        require_fit(name, mask, n, shape)
        return size

    def init(key, shape):
        del key
        shape = require_shape(name, shape)
        return (), (shape[0], heads * require(shape))

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        require(x.shape[1:], len(x))
        q, k, v = places.split(x)
        k, v = sight.hide(k), sight.hide(v)
        rows, kept = attend(q, k, v, sight, lean=lean)
        return places.from_rows(rows), (q, k, v, kept)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        q, k, v, kept = cache
        n, _, t, size = k.shape
        require_delta(name, dy, (n, t, heads * size))
        dq, dk, dv = attend_backward(q, k, v, kept, places.to_rows(dy), sight, lean=lean)
        return places.join(dq, dk, dv).astype(dy.dtype), ()

    return Layer(name, init, forward, backward)


def attention(
    features,
    heads,
    *,
    kv_heads=None,
    causal=False,
    mask=None,
    rotary=False,
    lean=False,
    use_bias=True,
    weight_init=initializers.lecun_normal(),  # noqa: B008 -- a pure function
    dtype=float,
):
    """Self-attention: a dense layer makes queries, keys and values, and another mixes the heads.

      chain(dense((H + 2 G) d), dot_product_attention(H, ...), dense(features)),  d = features / H

    under another name. Inputs are [N, T, I], outputs [N, T, features]. One dense
    layer makes queries, keys and values of all heads: one product in the place of three.

    Args:
      features: the number of outputs, which H has to divide.
      heads: H.
      kv_heads: as the next four, of `dot_product_attention`.
      causal: whether a position sees none that come after it.
      mask: booleans, false at positions that nobody may see: [T], or [N, T] for each example.
      rotary: whether queries and keys are turned by their positions.
      lean: whether to keep O(T) and not O(T^2) numbers.
      use_bias: as the others, of both dense layers.
      weight_init: an initialiser in the form of `jax.nn.initializers`.
      dtype: of the parameters; inputs have to have it too. `float` is jax's default.

    Raises:
      ValueError: a number is not a positive integer, or does not divide what it has to.
      LayerError: the inputs, or the parameters, do not fit.

    Example:
      >>> import jax, jaxbp as bp
      >>> block = bp.residual(bp.layer_norm(), bp.attention(8, heads=2, causal=True))
      >>> params, out_shape = block.init(jax.random.key(0), (5, 8))
      >>> out_shape, [part["weight"].shape for part in params[1] if part]
      ((5, 8), [(8, 24), (8, 8)])
    """
    require_count("attention", "features", features)
    groups = heads if kv_heads is None else kv_heads
    _require_groups("attention", heads, groups)
    if features % heads:
        raise ValueError(f"attention: features is {features}, which {heads} heads do not divide.")
    linear = functools.partial(dense, use_bias=use_bias, weight_init=weight_init, dtype=dtype)
    core = dot_product_attention(
        heads, kv_heads=kv_heads, causal=causal, mask=mask, rotary=rotary, lean=lean
    )
    layer = chain(linear((heads + 2 * groups) * (features // heads)), core, linear(features))
    return layer._replace(name=f"attention({features}, {heads})")


class _Heads(NamedTuple):
    """Where heads stand: side by side in a position, or as rows for `attend`.

    Attributes:
      heads: H.
      groups: G.
      rotary: whether queries and keys are turned by their positions.
    """

    heads: int
    groups: int
    rotary: bool

    def split(self, x):
        """Queries over sqrt(d), keys and values as rows, from [N, T, (H + 2 G) d]."""
        n_heads = self.heads + 2 * self.groups
        x = x.reshape(*x.shape[:2], n_heads, x.shape[2] // n_heads)
        q, k, v = jnp.split(x, [self.heads, self.heads + self.groups], axis=2)
        if self.rotary:
            q, k = _turned(q, 1), _turned(k, 1)
        # Scaled here and not at the scores, which are many more.
        return self._rows(q * q.shape[-1] ** -0.5), self._rows(k), self._rows(v)

    def join(self, dq, dk, dv):
        """The derivative with respect to the argument of `split`, from those of its results."""
        dq = self._heads(dq * dq.shape[-1] ** -0.5, self.heads)
        dk, dv = self._heads(dk, self.groups), self._heads(dv, self.groups)
        if self.rotary:
            dq, dk = _turned(dq, -1), _turned(dk, -1)
        dx = jnp.concatenate([dq, dk, dv], axis=2)
        return dx.reshape(*dx.shape[:2], dx.shape[2] * dx.shape[3])

    def to_rows(self, y):
        """Outputs [N, T, H d] as rows [N, G, T H / G, d]."""
        return self._rows(y.reshape(*y.shape[:2], self.heads, y.shape[2] // self.heads))

    def from_rows(self, rows):
        """What `to_rows` takes."""
        y = self._heads(rows, self.heads)
        return y.reshape(*y.shape[:2], self.heads * y.shape[3])

    def _rows(self, x):
        """Heads [N, T, h, d] as rows [N, G, T h / G, d]."""
        n, t, heads, size = x.shape
        x = jnp.moveaxis(x.reshape(n, t, self.groups, heads // self.groups, size), 1, 2)
        return x.reshape(n, self.groups, t * heads // self.groups, size)

    def _heads(self, rows, heads):
        """Rows as heads: the inverse of `_rows`."""
        n, _, n_rows, size = rows.shape
        t, group = n_rows * self.groups // heads, heads // self.groups
        x = jnp.moveaxis(rows.reshape(n, self.groups, t, group, size), 2, 1)
        return x.reshape(n, t, heads, size)


def _turned(x, way, base=BASE):
    """Heads [N, T, H, d] whose pairs are turned by the angles of their positions, or back."""
    t, size = x.shape[1], x.shape[3]
    angles = np.arange(t)[:, None, None] * base ** (-np.arange(0, size, 2) / size)
    wide = widened(x)
    cos, sin = (jnp.asarray(f(way * angles), wide.dtype) for f in (np.cos, np.sin))
    a, b = jnp.split(wide, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _require_groups(name, heads, groups):
    require_count(name, "heads", heads)
    require_count(name, "kv_heads", groups)
    if heads % groups:
        raise ValueError(f"{name}: kv_heads is {groups}, which does not divide {heads} heads.")


def _require_size(name, shape, heads, letters, *, even):
    """The size d of each of so many heads side by side, in an example of this shape."""
    got = f"got inputs of shape {show_shape(('N', *shape))}"
    if len(shape) != 2:
        raise LayerError(name, f"{got}; it takes [N, T, {letters}], with one axis of positions.")
    if shape[1] % heads:
        raise LayerError(name, f"{got}; it takes [N, T, {letters}], which {heads} has to divide.")
    size = shape[1] // heads
    if even and size % 2:
        raise LayerError(name, f"{got}, which makes d = {size}; pairs take an even one.")
    return size
