"""Attention: each position takes from the others what they hold, by how well its query fits them.

Each position has queries q, keys k and values v. Letters beside those of `types`:

  H   heads, each with a query of its own        t   a position that asks
  G   groups of H / G heads, which share a       s   a position that is seen
      key and a value                            d   numbers in a query, a key, a value

With s over the positions that t may see:

  e_ts = q_t . k_s / sqrt(d)     p_ts = exp(e_ts) / sum_s exp(e_ts)     y_t = sum_s p_ts v_s

and back, with dp the derivative with respect to the probabilities and de to the scores:

  dp_ts = dy_t . v_s                         de_ts = p_ts (dp_ts - sum_s p_ts dp_ts)
  dq_t = sum_s de_ts k_s / sqrt(d)           dk_s = sum_t de_ts q_t / sqrt(d)
                                             dv_s = sum_t p_ts dy_t
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from jaxbp.combinators.compose import chain
from jaxbp.layers.activations import dense
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
# Queries are taken in so many bands of neighbouring positions. Causal ones see no further than to
# the end of their band: two leave out a quarter of the work and of what is kept. More would leave
# out more, in smaller products and with more sums. A CPU runs bands side by side, where XLA has one
# core for all the products of a batch; so they pay without causality too.
BANDS = 2
# Of how many queries the lean form holds the probabilities at one time.
LEAN_ROWS = 64


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
    group = heads // groups
    at_once = LEAN_ROWS if lean else None
    name = f"dot_product_attention({heads})"

    def require(shape, n: int | str = "N"):
        """The d of inputs [n, *shape]."""
        size = _require_size(name, shape, heads + 2 * groups, "(H + 2 G) d", even=rotary)
        require_fit(name, mask, n, shape)
        return size

    def to_rows(x, group):
        """Heads [N, T, G group, d] as rows [N, G, T group, d]: in turn those of each position."""
        n, t, _, size = x.shape
        x = jnp.moveaxis(x.reshape(n, t, groups, group, size), 1, 2)
        return x.reshape(n, groups, t * group, size)

    def to_heads(rows, group):
        """What `to_rows` took."""
        n, _, n_rows, size = rows.shape
        x = jnp.moveaxis(rows.reshape(n, groups, n_rows // group, group, size), 1, 2)
        return x.reshape(n, n_rows // group, groups * group, size)

    def split(x):
        """The queries over sqrt(d), [N, G, T H / G, d], the keys and the values, [N, G, T, d]."""
        n, t, features = x.shape
        n_heads = heads + 2 * groups
        q, k, v = jnp.split(
            x.reshape(n, t, n_heads, features // n_heads), [heads, heads + groups], axis=2
        )
        if rotary:
            q, k = _turned(q, 1), _turned(k, 1)
        if mask is not None:
            # A probability of zero would let infinity through, as 0 inf is not a number.
            k, v = (jnp.where(mask[..., None, None], array, 0) for array in (k, v))
        # Here, and not at the scores, of which there are many more.
        return to_rows(q * q.shape[-1] ** -0.5, group), to_rows(k, 1), to_rows(v, 1)

    def join(dq, dk, dv):
        """The derivative with respect to the inputs, from those with respect to what is split."""
        dq = to_heads(dq * dq.shape[-1] ** -0.5, group)
        dk, dv = to_heads(dk, 1), to_heads(dv, 1)
        if rotary:
            dq, dk = _turned(dq, -1), _turned(dk, -1)
        dx = jnp.concatenate([dq, dk, dv], axis=2)
        return dx.reshape(*dx.shape[:2], dx.shape[2] * dx.shape[3])

    def bands(t):
        """The rows of each band of queries, and the keys that they may see, as slices."""
        size = math.ceil(t / BANDS)
        for start in range(0, t, size):
            end = min(start + size, t)
            yield slice(start * group, end * group), slice(end if causal else t)

    def sees(rows, keys):
        """Whether rows see the first so many keys: [..., rows, keys], or None if all see all."""
        see = None if mask is None else jnp.atleast_2d(mask)[:, None, None, :keys]
        if not causal:
            return see
        past = jnp.arange(keys) <= rows[:, None] // group
        return past if see is None else see & past

    def forward_band(rows, keys, q, k, v):
        """The outputs for these rows of queries, and what is kept of them."""
        k, v = k[..., keys, :], v[..., keys, :]

        def step(_, rows, q):
            y, p, log_sums = _attend(q, k, v, sees(rows, keys.stop))
            return None, (y, log_sums if lean else p)

        _, outputs = _by_rows(step, None, rows.start, (q[..., rows, :],), at_once)
        return outputs

    def backward_band(rows, keys, q, k, v, kept, dy):
        """The part of these rows in the derivatives: dq, and what they add to dk and dv."""
        k, v = k[..., keys, :], v[..., keys, :]

        def step(sums, rows, q, kept, dy):
            p = jnp.exp(_scores(q, k, sees(rows, keys.stop)) - kept) if lean else kept
            dq, dk, dv = _attend_backward(q, k, v, p, dy)
            return (sums[0] + dk, sums[1] + dv), (dq,)

        zeros = jnp.zeros(k.shape, _wide_dtype(k))
        of_rows = q[..., rows, :], kept, dy[..., rows, :]
        (dk, dv), (dq,) = _by_rows(step, (zeros, zeros), rows.start, of_rows, at_once)
        return dq, dk, dv

    def init(key, shape):
        del key
        shape = require_shape(name, shape)
        return (), (shape[0], heads * require(shape))

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        require(x.shape[1:], len(x))
        q, k, v = split(x)
        parts = [forward_band(*band, q, k, v) for band in bands(x.shape[1])]
        outputs, kept = zip(*parts, strict=True)
        y = to_heads(jnp.concatenate(outputs, axis=2), group)
        return y.reshape(*y.shape[:2], heads * y.shape[3]), (q, k, v, kept)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        q, k, v, kept = cache
        n, _, t, size = k.shape
        require_delta(name, dy, (n, t, heads * size))
        dy_rows = to_rows(dy.reshape(n, t, heads, size), group)
        dqs, dk, dv = [], 0, 0
        for (rows, keys), kept_of_band in zip(bands(t), kept, strict=True):
            dq, *added = backward_band(rows, keys, q, k, v, kept_of_band, dy_rows)
            to_all = [(0, 0), (0, 0), (0, t - keys.stop), (0, 0)]
            dk, dv = (sums + jnp.pad(d, to_all) for sums, d in zip((dk, dv), added, strict=True))
            dqs.append(dq)
        return join(jnp.concatenate(dqs, axis=2), dk, dv).astype(dy.dtype), ()

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


def _scores(q, k, see):
    """E, [N, G, rows, keys]: minus infinity where t does not see s."""
    scores = _product("ngtd,ngsd->ngts", q, k)
    return scores if see is None else jnp.where(see, scores, -jnp.inf)


def _attend(q, k, v, see):
    """The outputs y, the probabilities p, and the logarithms of the sums of exponentials."""
    scores = _scores(q, k, see)
    # Finite where a row sees nobody, whose exponentials then are 0; any other has a 1 among them.
    top = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(scores.dtype).min)
    exponentials = jnp.exp(scores - top)
    sums = jnp.maximum(jnp.sum(exponentials, axis=-1, keepdims=True), 1)
    p = (exponentials / sums).astype(v.dtype)
    y = _product("ngts,ngsd->ngtd", p, v).astype(v.dtype)
    return y, p, top + jnp.log(sums)


def _attend_backward(q, k, v, p, dy):
    """The derivatives dq, dk and dv, with respect to operands of `_attend`."""
    wide = widened(p)
    dp = _product("ngtd,ngsd->ngts", dy, v)
    de = (wide * (dp - jnp.sum(wide * dp, axis=-1, keepdims=True))).astype(q.dtype)
    dq = _product("ngts,ngsd->ngtd", de, k)
    dk = _product("ngts,ngtd->ngsd", de, q)
    dv = _product("ngts,ngtd->ngsd", p.astype(dy.dtype), dy)
    return dq, dk, dv


def _by_rows(step, sums, start, arrays, size) -> tuple[Any, tuple]:
    """What `step(sums, rows, *arrays) -> (sums, outputs)` makes of so many rows at a time.

    Rows are the last axis of arrays and outputs but one; the first has the position `start`. They
    are taken all at once if size is None, else in a loop, the last ones filled up with zeros.
    """
    t = arrays[0].shape[-2]
    if size is None:
        return step(sums, start + jnp.arange(t), *arrays)
    n = math.ceil(t / size)
    size = math.ceil(t / n)

    def blocks(x):
        x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, n * size - t), (0, 0)])
        return jnp.moveaxis(x.reshape(*x.shape[:-2], n, size, x.shape[-1]), -3, 0)

    def rows_of(blocks):
        x = jnp.moveaxis(blocks, 0, -3)
        return x.reshape(*x.shape[:-3], n * size, x.shape[-1])[..., :t, :]

    positions = start + jnp.arange(n * size).reshape(n, size)
    sums, outputs = jax.lax.scan(
        lambda sums, block: step(sums, *block), sums, (positions, *map(blocks, arrays))
    )
    return sums, tuple(map(rows_of, outputs))


def _turned(x, way, base=BASE):
    """Heads [N, T, H, d] whose pairs are turned by the angles of their positions, or back."""
    t, size = x.shape[1], x.shape[3]
    angles = np.arange(t)[:, None, None] * base ** (-np.arange(0, size, 2) / size)
    wide = widened(x)
    cos, sin = (jnp.asarray(f(way * angles), wide.dtype) for f in (np.cos, np.sin))
    a, b = jnp.split(wide, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _product(spec, a, b):
    """The einsum, summed in 32 bits if theirs are 16."""
    return jnp.einsum(spec, a, b, preferred_element_type=_wide_dtype(a))


def _wide_dtype(x):
    return jnp.float32 if jnp.finfo(x.dtype).bits < 32 else x.dtype


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
