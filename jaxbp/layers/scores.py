"""Scores of attention: which keys a query sees, and what is added to the score of each pair.

Letters are those of `types` and `dot_product`, with T queries and S keys. In self-attention S = T.
In general the queries stand at the last T of the S positions: query t is at position S - T + t.

An array for pairs of a query and a key is [T, S], or [N, H, T, S] with 1 for N if the examples
share it, and 1 for H if the heads share it.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.require import (
    require_count,
    require_drop_prob,
    require_fit,
    require_mask,
    require_positive,
)
from jaxbp.types import LayerError, Shape, show_shape, wide_dtype


class Rows(NamedTuple):
    """Some rows of queries, and the keys that they may see.

    Attributes:
      numbers: the numbers of the rows, [rows].
      group: H / G, the number of rows that belong to one position.
      groups: G.
      offset: S - T, the position of the first query.
      keys: the keys, as a slice with a start and a stop.
    """

    numbers: jax.Array
    group: int
    groups: int
    offset: int
    keys: slice

    def positions(self) -> tuple[jax.Array, jax.Array]:
        """The positions of the queries, [rows, 1], and of the keys, [keys]."""
        queries = self.numbers[:, None] // self.group + self.offset
        return queries, jnp.arange(self.keys.start, self.keys.stop)

    def of_pairs(self, pairs: jax.Array | np.ndarray) -> jax.Array:
        """The part of an array for pairs that belongs to these rows, [1 or N, 1 or G, rows, keys].

        Rows beyond the last query get what belongs to that.
        """
        n, h, *sizes = _with_four_axes(pairs).shape
        group = 1 if h == 1 else self.group
        pairs = jnp.asarray(pairs).reshape(n, h // group, group, *sizes)
        part = pairs.at[:, :, self.numbers % group, self.numbers // self.group, self.keys]
        return part.get(mode="clip")


class Scores(NamedTuple):
    """How the scores of queries and keys are computed, and which pairs count.

    Attributes:
      causal: whether a query sees no key at a later position.
      window: a query sees only keys at a distance below this number, or None.
      mask: booleans [S] or [N, S], false at keys that no query sees, or None.
      pair_mask: booleans for pairs, false where the query does not see the key, or None.
      bias: floating-point numbers for pairs, which are added to the scores, or None.
      soft_cap: c, the bound of scores c tanh(score / c), or None.
      drop_prob: the probability with which dropout sets a probability to zero.
    """

    causal: bool = False
    window: int | None = None
    mask: jax.Array | np.ndarray | None = None
    pair_mask: jax.Array | np.ndarray | None = None
    bias: jax.Array | np.ndarray | None = None
    soft_cap: float | None = None
    drop_prob: float = 0.0

    def reach(self, first: int, last: int, s: int) -> slice:
        """The keys, of s, that the queries at positions `first` to `last` may see."""
        start, stop = 0, s
        if self.window is not None:
            start, stop = first - self.window + 1, last + self.window
        if self.causal:
            stop = last + 1
        return slice(min(max(start, 0), s), min(max(stop, 0), s))

    def seen(self) -> jax.Array | None:
        """Which keys any query may see by the masks, [1 or N, S]; None without masks."""
        seen = []
        if self.mask is not None:
            seen.append(jnp.atleast_2d(self.mask))
        if self.pair_mask is not None:
            seen.append(jnp.any(_with_four_axes(self.pair_mask), axis=(1, 2)))
        return _all_of(seen)

    def hide(self, x: jax.Array) -> jax.Array:
        """Keys or values [N, S, ...] with zeros at keys that no query sees.

        Their probability is zero, but a product with them may overflow: zero times infinity is nan.
        """
        seen = self.seen()
        return x if seen is None else jnp.where(seen[:, :, None, None], x, 0)

    def broken(self, x: jax.Array, start: int) -> jax.Array | None:
        """Where x [N, T, I] is not finite and no query sees it, [N, T, 1]; None without masks.

        The positions of x are those from `start` on. Zeros replace them (`without`): a delta of
        zero there would not be enough, because zero times nan is nan.
        """
        seen = self.seen()
        if seen is None:
            return None
        return ~seen[:, start:, None] & ~jnp.isfinite(x).all(axis=-1, keepdims=True)

    def of(self, q: jax.Array, k: jax.Array, rows: Rows) -> jax.Array:
        """The scores e, [N, G, rows, keys]: minus infinity where the query does not see the key."""
        scores = product("ngtd,ngsd->ngts", q, k)
        if self.soft_cap is not None:
            scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
        if self.bias is not None:
            scores = scores + rows.of_pairs(self.bias).astype(scores.dtype)
        see = self._sees(rows)
        return scores if see is None else jnp.where(see, scores, -jnp.inf)

    def to_products(self, de: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
        """The derivative with respect to the products q . k, from the derivative de."""
        if self.soft_cap is None:
            return de
        return de * (1 - jnp.tanh(product("ngtd,ngsd->ngts", q, k) / self.soft_cap) ** 2)

    def draw(self, key: jax.Array | None, rows: Rows, n: int) -> jax.Array | None:
        """Which probabilities dropout keeps, booleans [N, G, rows, keys]; None for all.

        Each row has a key of its own, so blocks of rows can be drawn one after another.
        """
        if key is None or self.drop_prob == 0:
            return None
        shape = n, rows.groups, rows.keys.stop - rows.keys.start

        def draw_row(number):
            return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - self.drop_prob, shape)

        return jax.vmap(draw_row, out_axes=2)(rows.numbers)

    def drop(self, p: jax.Array, kept: jax.Array | None) -> jax.Array:
        """Applies dropout to probabilities, or to the derivative with respect to its results."""
        return p if kept is None else jnp.where(kept, p / (1 - self.drop_prob), 0)

    def require_fit(self, name: str, n: int | str, heads: int, t: int, keys: Shape) -> None:
        """Raises unless masks and bias fit t queries and keys of shape [S, ...].

        In init, where the number of examples is not known, n is the letter N.
        """
        require_fit(name, self.mask, n, keys, " For pairs of a query and a key, use pair_mask.")
        pair = t, keys[0]
        for argument, array in (("pair_mask", self.pair_mask), ("bias", self.bias)):
            if array is None:
                continue
            examples = array.shape[0] if n == "N" else n
            shapes = [(i, j, *pair) for i in (1, examples) for j in (1, heads)]
            if array.shape not in (pair, *shapes):
                raise LayerError(
                    name,
                    f"has a {argument} of shape {show_shape(array.shape)}; {t} queries and "
                    f"{keys[0]} keys take {show_shape(pair)} or {show_shape((n, heads, *pair))}, "
                    "where either of the first two axes may be 1.",
                )

    def _sees(self, rows: Rows) -> jax.Array | None:
        """Whether rows see keys, of a shape that broadcasts to [N, G, rows, keys]; None for all."""
        sees = []
        if self.mask is not None:
            sees.append(jnp.atleast_2d(self.mask)[:, None, None, rows.keys])
        if self.pair_mask is not None:
            sees.append(rows.of_pairs(self.pair_mask))
        if self.causal or self.window is not None:
            t, s = rows.positions()
            if self.causal:
                sees.append(s <= t)
            if self.window is not None:
                sees.append((t - s < self.window) & (s - t < self.window))
        return _all_of(sees)


def make_scores(name: str, **arguments: Any) -> Scores:
    """`Scores` of the arguments of an attention layer; raises unless they are of their kinds."""
    scores = Scores(**arguments)
    if scores.window is not None:
        scores = scores._replace(window=require_count(name, "window", scores.window))
    require_mask(name, scores.mask)
    _require_pairs(name, "pair_mask", scores.pair_mask, np.bool_, "booleans")
    _require_pairs(name, "bias", scores.bias, jnp.floating, "floating-point numbers")
    if scores.soft_cap is not None:
        require_positive(name, "soft_cap", scores.soft_cap)
    require_drop_prob(name, scores.drop_prob)
    return scores


def without(broken: jax.Array | None, x: jax.Array) -> jax.Array:
    """The array [N, T, ...] with zeros at broken positions."""
    return x if broken is None else jnp.where(broken, 0, x)


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The einsum of a and b; sums of 16-bit numbers are computed in 32 bits."""
    return jnp.einsum(spec, a, b, preferred_element_type=wide_dtype(a.dtype))


def _with_four_axes(pairs: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """An array for pairs, [T, S] or [N, H, T, S], with all four axes."""
    return pairs[None, None] if pairs.ndim == 2 else pairs


def _all_of(conditions: Sequence[jax.Array]) -> jax.Array | None:
    """Where all conditions hold; None if there are none."""
    return functools.reduce(operator.and_, conditions) if conditions else None


def _require_pairs(name: str, argument: str, pairs: Any, kind: Any, numbers: str) -> None:
    """Raises unless something is None or an array for pairs, of this kind of numbers."""
    if pairs is None:
        return
    dtype, shape = getattr(pairs, "dtype", None), np.shape(pairs)
    if dtype is None or not jnp.issubdtype(dtype, kind) or len(shape) not in (2, 4):
        hint = ""
        if len(shape) == 3:
            hint = f" With one for each example use {argument}[:, None], for each head [None]."
        raise ValueError(
            f"{name}: {argument} is of type {dtype or type(pairs).__name__} and shape "
            f"{show_shape(shape)}; it takes an array of {numbers}, [T, S] or [N, H, T, S].{hint}"
        )
