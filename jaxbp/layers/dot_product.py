"""Dot-product attention on rows: the formulas, their derivatives, and the order of the work.

A query q of each position asks, and keys k with values v are seen. Letters beside those of `types`:

    H   heads, each with its own query             t   a position of T that asks
    G   groups of H / G heads that share a key     s   a position of S that is seen
        and a value                                d   size of a query and of a key
                                                   u   size of a value

Forward, with s over the positions that t may see:

    e_ts = q_t . k_s / sqrt(d)     p_ts = exp(e_ts) / sum_s exp(e_ts)     y_t = sum_s p_ts v_s

Backward, with dp the derivative with respect to the probabilities and de to the scores:

    dp_ts = dy_t . v_s                         de_ts = p_ts (dp_ts - sum_s p_ts dp_ts)
    dq_t = sum_s de_ts k_s / sqrt(d)           dk_s = sum_t de_ts q_t / sqrt(d)
                                               dv_s = sum_t p_ts dy_t

`scores` computes e, with what a bias and a soft cap change. Dropout multiplies p, where it weighs
values, and dp by m / (1 - drop_prob), with a mask m of zeros and ones.

Queries are rows [N, G, T H / G, d]: the H / G heads of the first position, then those of the
second, and so on. They are already divided by sqrt(d). Keys are [N, G, S, d], values [N, G, S, u].

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

from jaxbp.layers.scores import Rows, Scores, product
from jaxbp.types import exportable, wide_dtype, widened

# The number of bands. With causal attention a band sees no key after its last position: two bands
# save a quarter of the products and of the kept probabilities. More bands would save more, but
# their products are smaller and there are more sums. XLA's CPU compiler uses one core for all
# products of a batch and runs bands in parallel, so bands are faster without causal attention too.
BANDS = 2
# Without a window, a band has at least so many positions: a program for smaller ones runs no faster
# and takes longer to compile.
BAND_ROWS = 64
# The largest number of bands with a window, which more bands save more of.
WINDOW_BANDS = 8
# The number of query rows whose probabilities the lean form holds at a time.
LEAN_ROWS = 64


@exportable
class Kept(NamedTuple):
    """What the forward pass keeps for the backward pass.

    Attributes:
      of_bands: for each band the probabilities [N, G, rows, keys] or, in the lean form, the
        logarithms of the sums of exponentials [N, G, rows, 1].
      drawn: for each band the probabilities that dropout keeps, booleans or None; in the lean form
        the key that they are drawn from.
    """

    of_bands: tuple[jax.Array, ...]
    drawn: Any


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scores: Scores,
    group: int,
    *,
    lean: bool,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Kept]:
    """The forward pass.

    Args:
      q: the queries over sqrt(d), rows [N, G, T H / G, d].
      k: the keys, [N, G, S, d].
      v: the values, [N, G, S, u].
      scores: how scores are computed, and which keys each query sees.
      group: H / G.
      lean: whether to keep less for `attend_backward`.
      key: the key of dropout, or None for no dropout.

    Returns:
      The outputs y, rows [N, G, T H / G, u], and what is kept.
    """
    parts = [
        _attend_band(q[..., rows, :], k[..., band.keys, :], v[..., band.keys, :], band, *how)
        for how in [(scores, lean, key)]
        for rows, band in _bands(q, k, scores, group)
    ]
    outputs, kept, drawn = zip(*parts, strict=True)
    return jnp.concatenate(outputs, axis=2), Kept(kept, key if lean else drawn)


def attend_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kept: Kept,
    dy: jax.Array,
    scores: Scores,
    group: int,
    *,
    lean: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The backward pass: dq, dk and dv."""
    s, dqs = k.shape[2], []
    dk = dv = jnp.zeros((), wide_dtype(k.dtype))
    drawn = (kept.drawn,) * len(kept.of_bands) if lean else kept.drawn
    bands = zip(_bands(q, k, scores, group), kept.of_bands, drawn, strict=True)
    for (rows, band), kept_of_band, drawn_of_band in bands:
        dq, added = _attend_band_backward(
            *(q[..., rows, :], k[..., band.keys, :], v[..., band.keys, :], dy[..., rows, :]),
            *(kept_of_band, drawn_of_band, band, scores, lean),
        )
        unseen = [(0, 0), (0, 0), (band.keys.start, s - band.keys.stop), (0, 0)]
        dk, dv = (sums + jnp.pad(d, unseen) for sums, d in zip((dk, dv), added, strict=True))
        dqs.append(dq)
    return jnp.concatenate(dqs, axis=2), dk, dv


def _bands(q, k, scores, group) -> Iterator[tuple[slice, Rows]]:
    """Each band of queries: its rows as a slice, and as `Rows` with the keys that they may see."""
    t, groups, s = q.shape[2] // group, k.shape[1], k.shape[2]
    size = max(math.ceil(t / BANDS), BAND_ROWS)
    if scores.window is not None:
        size = min(size, max(scores.window, math.ceil(t / WINDOW_BANDS)))
    for start in range(0, t, size):
        end = min(start + size, t)
        keys = scores.reach(s - t + start, s - t + end - 1, s)
        rows = slice(start * group, end * group)
        yield rows, Rows(jnp.arange(rows.start, rows.stop), group, groups, s - t, keys)


def _attend_band(q, k, v, band, scores, lean, key):
    """The outputs of the rows q, what is kept for the backward pass, and what dropout keeps.

    The keys are those that the band sees.
    """

    def step(_, numbers, q):
        rows = band._replace(numbers=numbers)
        drawn = scores.draw(key, rows, q.shape[0])
        y, p, log_sums = _attend_rows(q, k, v, rows, scores, drawn)
        return None, (y, log_sums) if lean else (y, p, drawn)

    _, (y, kept, *drawn) = _by_rows(step, None, band.numbers, (q,), (0,), lean)
    return y, kept, *(drawn or [None])


def _attend_band_backward(q, k, v, dy, kept, drawn, band, scores, lean):
    """The dq of the rows q, and what these rows add to dk and dv."""

    def step(sums, numbers, q, dy, kept):
        p, drawn_of_rows = kept, drawn
        if lean:
            rows = band._replace(numbers=numbers)
            p = jnp.exp(scores.of(q, k, rows) - kept)
            drawn_of_rows = scores.draw(drawn, rows, q.shape[0])
        dq, dk, dv = _attend_rows_backward(q, k, v, p, dy, scores, drawn_of_rows)
        return (sums[0] + dk, sums[1] + dv), (dq,)

    zeros = tuple(jnp.zeros_like(x, wide_dtype(x.dtype)) for x in (k, v))
    # exp(e - inf) = 0: rows that fill a block have no probabilities, whatever is added to e.
    arrays, fills = (q, dy, kept), (0, 0, jnp.inf)
    sums, (dq,) = _by_rows(step, zeros, band.numbers, arrays, fills, lean)
    return dq, sums


def _attend_rows(q, k, v, rows, scores, drawn):
    """The outputs y, the probabilities p, and the logarithms of the sums of exponentials."""
    e = scores.of(q, k, rows)
    # Finite even where a row sees no key: its exponentials are 0. Any other row has a 1 among them.
    top = jnp.max(e, axis=-1, keepdims=True, initial=jnp.finfo(e.dtype).min)
    # The results do not depend on it. Autodiff of a maximum would look for the entries equal to it,
    # and find none if the compiler rounds differently where it computes e again.
    top = jax.lax.stop_gradient(top)
    exponentials = jnp.exp(e - top)
    sums = jnp.sum(exponentials, axis=-1, keepdims=True)
    sums = jnp.where(sums == 0, 1, sums)
    p = (exponentials / sums).astype(v.dtype)
    y = product("ngts,ngsu->ngtu", scores.drop(p, drawn), v).astype(v.dtype)
    return y, p, top + jnp.log(sums)


def _attend_rows_backward(q, k, v, p, dy, scores, drawn):
    """The derivatives dq, dk and dv with respect to arguments of `_attend_rows`."""
    wide = widened(p)
    dp = scores.drop(product("ngtu,ngsu->ngts", dy, v), drawn)
    de = wide * (dp - jnp.sum(wide * dp, axis=-1, keepdims=True))
    of_products = scores.to_products(de, q, k).astype(q.dtype)
    dq = product("ngts,ngsd->ngtd", of_products, k)
    dk = product("ngts,ngtd->ngsd", of_products, q)
    dv = product("ngts,ngtu->ngsu", scores.drop(p, drawn).astype(dy.dtype), dy)
    return dq, dk, dv


def _by_rows(step: Callable, sums, numbers, arrays, fills, lean) -> tuple[Any, tuple]:
    """Calls `step(sums, numbers, *arrays) -> (sums, outputs)` for all rows, with their numbers.

    If lean, it calls it for blocks of at most `LEAN_ROWS` rows, one after another. Rows are the
    second-last axis of arrays and outputs. The last block is filled up with rows of the number that
    `fills` has for each array. They must add nothing to the sums, and are cut off the outputs.
    """
    t = arrays[0].shape[-2]
    if not lean:
        return step(sums, numbers, *arrays)
    n = math.ceil(t / LEAN_ROWS)
    size = math.ceil(t / n)

    def blocks(x, fill):
        more = [*[(0, 0)] * (x.ndim - 2), (0, n * size - t), (0, 0)]
        x = jnp.pad(x, more, constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:-2], n, size, x.shape[-1]), -3, 0)

    def rows_of(blocks):
        x = jnp.moveaxis(blocks, 0, -3)
        return x.reshape(*x.shape[:-3], n * size, x.shape[-1])[..., :t, :]

    numbers = (numbers[0] + jnp.arange(n * size)).reshape(n, size)
    sums, outputs = jax.lax.scan(
        lambda sums, block: step(sums, *block), sums, (numbers, *map(blocks, arrays, fills))
    )
    return sums, tuple(map(rows_of, outputs))
