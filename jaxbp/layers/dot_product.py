"""Dot-product attention on rows: the formulas, their derivatives, and the order of the work.

Each position has queries q, keys k and values v. Letters beside those of `types`:

    H   heads, each with its own query             t   a position that asks
    G   groups of H / G heads that share a key     s   a position that is seen
        and a value                                d   size of a query, a key and a value

Forward, with s over the positions that t may see:

    e_ts = q_t . k_s / sqrt(d)     p_ts = exp(e_ts) / sum_s exp(e_ts)     y_t = sum_s p_ts v_s

Backward, with dp the derivative with respect to the probabilities and de to the scores:

    dp_ts = dy_t . v_s                         de_ts = p_ts (dp_ts - sum_s p_ts dp_ts)
    dq_t = sum_s de_ts k_s / sqrt(d)           dk_s = sum_t de_ts q_t / sqrt(d)
                                               dv_s = sum_t p_ts dy_t

Queries are rows [N, G, T H / G, d]: the H / G heads of the first position, then those of the
second, and so on. They are already divided by sqrt(d). Keys and values are [N, G, T, d].

Queries are processed in bands of neighbouring positions. In the lean form each band is processed
a few rows at a time.

Sources:
  "Attention Is All You Need", Vaswani et al., 2017.
  "Self-attention Does Not Need O(n^2) Memory", Rabe, Staats, 2021, and "FlashAttention: Fast and
  Memory-Efficient Exact Attention with IO-Awareness", Dao et al., 2022: the lean form.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxbp.types import widened

# The number of bands. With causal attention a band sees no key after its last position: two bands
# save a quarter of the products and of the kept probabilities. More bands would save more, but
# their products are smaller and there are more sums. XLA's CPU compiler uses one core for all
# products of a batch and runs bands in parallel, so bands are faster without causal attention too.
BANDS = 2
# The number of query rows whose probabilities the lean form holds at a time.
LEAN_ROWS = 64


class Sight(NamedTuple):
    """Which keys each row of queries may see.

    Attributes:
      group: H / G, the number of rows that belong to one position.
      causal: whether a position sees no later position.
      mask: booleans [T] or [N, T], false at positions that no query sees, or None.
    """

    group: int
    causal: bool
    mask: jax.Array | np.ndarray | None

    def bands(self, t: int) -> Iterator[tuple[slice, slice]]:
        """For each band of queries, its rows and the keys that it may see, as slices."""
        size = math.ceil(t / BANDS)
        for start in range(0, t, size):
            end = min(start + size, t)
            yield slice(start * self.group, end * self.group), slice(end if self.causal else t)

    def sees(self, rows: jax.Array, keys: int) -> jax.Array | None:
        """Whether rows see the first `keys` keys, [..., rows, keys]; None if all see all."""
        see = None if self.mask is None else jnp.atleast_2d(self.mask)[:, None, None, :keys]
        if not self.causal:
            return see
        past = jnp.arange(keys) <= rows[:, None] // self.group
        return past if see is None else see & past

    def hide(self, x: jax.Array) -> jax.Array:
        """Keys or values [N, G, T, d] with zeros where the mask is false.

        Their probability is zero, but a product with them may overflow: zero times infinity is nan.
        """
        if self.mask is None:
            return x
        return jnp.where(jnp.atleast_2d(self.mask)[:, None, :, None], x, 0)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight, *, lean: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The forward pass.

    Args:
      q: the queries over sqrt(d), rows [N, G, T H / G, d].
      k: the keys, [N, G, T, d].
      v: the values, [N, G, T, d].
      sight: which keys each row sees.
      lean: whether to keep less for `attend_backward`.

    Returns:
      The outputs y, rows [N, G, T H / G, d], and for each band the probabilities [N, G, rows, keys]
      or, if lean, the logarithms of the sums of exponentials [N, G, rows, 1].
    """
    parts = [
        _attend_band(q[..., rows, :], k[..., keys, :], v[..., keys, :], rows.start, sight, lean)
        for rows, keys in sight.bands(k.shape[2])
    ]
    outputs, kept = zip(*parts, strict=True)
    return jnp.concatenate(outputs, axis=2), kept


def attend_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kept: tuple[jax.Array, ...],
    dy: jax.Array,
    sight: Sight,
    *,
    lean: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The backward pass: dq, dk and dv from what `attend` kept and from dy, rows like y."""
    t, dqs = k.shape[2], []
    dk = dv = jnp.zeros((), _wide_dtype(k))
    for (rows, keys), kept_of_band in zip(sight.bands(t), kept, strict=True):
        of_rows = q[..., rows, :], kept_of_band, dy[..., rows, :]
        dq, *added = _attend_band_backward(
            *of_rows, k[..., keys, :], v[..., keys, :], rows.start, sight, lean
        )
        unseen = [(0, 0), (0, 0), (0, t - keys.stop), (0, 0)]
        dk, dv = (sums + jnp.pad(d, unseen) for sums, d in zip((dk, dv), added, strict=True))
        dqs.append(dq)
    return jnp.concatenate(dqs, axis=2), dk, dv


def _attend_band(q, k, v, start, sight, lean):
    """The outputs of the rows q, and what is kept for the backward pass.

    `start` is the number of the first row. The keys are those that the band sees.
    """

    def step(_, rows, q):
        y, p, log_sums = _attend_rows(q, k, v, sight.sees(rows, k.shape[2]))
        return None, (y, log_sums if lean else p)

    _, outputs = _by_rows(step, None, start, (q,), lean)
    return outputs


def _attend_band_backward(q, kept, dy, k, v, start, sight, lean):
    """The dq of the rows q, and what these rows add to dk and dv."""

    def step(sums, rows, q, kept, dy):
        p = jnp.exp(_scores(q, k, sight.sees(rows, k.shape[2])) - kept) if lean else kept
        dq, dk, dv = _attend_rows_backward(q, k, v, p, dy)
        return (sums[0] + dk, sums[1] + dv), (dq,)

    zeros = jnp.zeros(k.shape, _wide_dtype(k))
    (dk, dv), (dq,) = _by_rows(step, (zeros, zeros), start, (q, kept, dy), lean)
    return dq, dk, dv


def _scores(q, k, see):
    """The scores e, [N, G, rows, keys]: minus infinity where t does not see s."""
    scores = _product("ngtd,ngsd->ngts", q, k)
    return scores if see is None else jnp.where(see, scores, -jnp.inf)


def _attend_rows(q, k, v, see):
    """The outputs y, the probabilities p, and the logarithms of the sums of exponentials."""
    scores = _scores(q, k, see)
    # Finite even where a row sees no key: its exponentials are 0. Any other row has a 1 among them.
    top = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(scores.dtype).min)
    exponentials = jnp.exp(scores - top)
    sums = jnp.sum(exponentials, axis=-1, keepdims=True)
    sums = jnp.where(sums == 0, 1, sums)
    p = (exponentials / sums).astype(v.dtype)
    y = _product("ngts,ngsd->ngtd", p, v).astype(v.dtype)
    return y, p, top + jnp.log(sums)


def _attend_rows_backward(q, k, v, p, dy):
    """The derivatives dq, dk and dv with respect to the arguments of `_attend_rows`."""
    wide = widened(p)
    dp = _product("ngtd,ngsd->ngts", dy, v)
    de = (wide * (dp - jnp.sum(wide * dp, axis=-1, keepdims=True))).astype(q.dtype)
    dq = _product("ngts,ngsd->ngtd", de, k)
    dk = _product("ngts,ngtd->ngsd", de, q)
    dv = _product("ngts,ngtd->ngsd", p.astype(dy.dtype), dy)
    return dq, dk, dv


def _by_rows(step: Callable, sums, start, arrays, lean) -> tuple[Any, tuple]:
    """Calls `step(sums, rows, *arrays) -> (sums, outputs)` for all rows.

    If lean, it calls it for blocks of at most `LEAN_ROWS` rows, one after another. Rows are the
    second-last axis of arrays and outputs. `start` is the number of the first row. The last block
    is padded with rows of zeros, which add nothing to the sums and are cut off the outputs.
    """
    t = arrays[0].shape[-2]
    if not lean:
        return step(sums, start + jnp.arange(t), *arrays)
    n = math.ceil(t / LEAN_ROWS)
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


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The einsum of a and b; sums of 16-bit numbers are computed in 32 bits."""
    return jnp.einsum(spec, a, b, preferred_element_type=_wide_dtype(a))


def _wide_dtype(x: jax.Array) -> DTypeLike:
    """The dtype in which sums over x are computed."""
    return jnp.float32 if jnp.finfo(x.dtype).bits < 32 else x.dtype
