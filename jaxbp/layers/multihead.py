"""Attention without parameters: split the heads, attend within each head, and join the heads.

`dot_product` computes attention and its derivatives, `scores` says which keys a query sees, and
`heads` has the layout of the heads. `self_attention` and `cross_attention` add dense layers.

Letters are those of `types` and `dot_product`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.layers.dot_product import attend, attend_backward
from jaxbp.layers.heads import apart, make_heads, together
from jaxbp.layers.rotations import Rotary
from jaxbp.layers.scores import make_scores, without
from jaxbp.require import (
    require_cache,
    require_deltas,
    require_examples,
    require_floats,
    require_key,
    require_shape,
)
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, LayerError, exportable, is_shape, show_shapes, widened

__all__ = ["dot_product_attention"]


@exportable
class Packed(NamedTuple):
    """In a cache: the inputs were an array x, broken at some positions, [N, T, 1] (or None)."""

    broken: jax.Array | None


@exportable
class Continued(NamedTuple):
    """In a cache: the inputs were (x, past), with x broken at some positions (or None)."""

    broken: jax.Array | None


@exportable
class Apart(NamedTuple):
    """In a cache: the inputs were (q, k, v)."""


def dot_product_attention(
    heads: int,
    *,
    kv_heads: int | None = None,
    value_size: int | None = None,
    causal: bool = False,
    window: int | None = None,
    mask: jax.Array | np.ndarray | None = None,
    pair_mask: jax.Array | np.ndarray | None = None,
    bias: jax.Array | np.ndarray | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    drop_prob: float = 0.0,
    rotary: bool | Rotary = False,
    lean: bool = False,
) -> Layer:
    """Scaled dot-product attention, without parameters. `attention` adds the dense layers.

    In each head, position t has a query q_t, a key k_t and a value v_t. Queries and keys have size
    d. Forward, with the sums over the positions s that t sees:

        e_ts = q_t . k_s / sqrt(d)     p_ts = exp(e_ts) / sum_s exp(e_ts)     y_t = sum_s p_ts v_s

    Backward:

        dp_ts = dy_t . v_s                   de_ts = p_ts (dp_ts - sum_s p_ts dp_ts)
        dq_t = sum_s de_ts k_s / sqrt(d)     dk_s = sum_t de_ts q_t / sqrt(d)
                                             dv_s = sum_t p_ts dy_t

    The H heads have queries of their own. Each of the G groups of H / G neighbouring heads shares
    one key and one value: G = H is multi-head attention, G = 1 multi-query attention. Values have
    size u, which is d if it is not given.

        inputs                                       outputs
        x [N, T, H d + G d + G u]                    y [N, T, H u]
        (q, k, v), arrays [N, T, H d],               y [N, T, H u]
            [N, S, G d] and [N, S, G u]
        (x, past) with past = (k, v), arrays         (y, present) with present = (k, v), the past
            [N, P, G d] and [N, P, G u]              and the T new keys and values, S = P + T

    x has the H queries, the G keys and the G values of each position side by side. (q, k, v) is for
    queries that come from other positions than the keys. A past is for generation: each call takes
    the next positions, and the present of the call before. The first past has P = 0.

    The queries stand at the last T of the S positions: query t is at position S - T + t. What t
    sees, and how scores are changed:

        by default             each position sees all positions
        causal                 t sees no later position
        window=w               t sees the positions at a distance below w, itself included
        mask false at s        no position sees s: x_s changes no other output, and dk_s = dv_s = 0.
                               If x_s is not finite there, zeros stand for it, and dx_s = 0. The
                               same holds for an s that pair_mask shows to no t in any head
        pair_mask false at ts  t does not see s
        t sees no position     y_t = 0 and dq_t = 0
        soft_cap=c             e = c tanh(q . k / (c sqrt(d)))
        bias=b                 b_ts is added to e_ts, after the cap. Where it is minus infinity, t
                               does not see s
        drop_prob=r            with a key, each p_ts is set to zero with probability r and otherwise
                               divided by 1 - r. Without a key nothing is dropped

    pair_mask and bias are arrays [T, S], or [N, H, T, S] where either of N and H may be 1. They are
    constants, without a derivative.

    The forward pass keeps the probabilities, H T S numbers per example without `causal` and
    `window`, and which of them are dropped. The lean form keeps only the logarithm of each sum of
    exponentials, [N, H, T]. Its backward pass computes the probabilities again, a few rows at a
    time, and draws the dropped ones again. Scores and sums of 16-bit inputs are in 32 bits.

    Args:
      heads: H.
      kv_heads: G, a divisor of H; None means H.
      value_size: u, the size of a value; None means d.
      causal: whether no position sees a later one.
      window: the first distance at which positions do not see each other; None means no limit.
      mask: booleans, false at positions that no query sees: [S], or [N, S] with one row for each
        example. Use `masked` to pass a mask with each batch.
      pair_mask: booleans, false at pairs of a query and a key that it does not see.
      bias: floating-point numbers that are added to the scores.
      scale: the factor of q . k; None means 1 / sqrt(d).
      soft_cap: c, the bound of the scores; None means no bound.
      drop_prob: the probability that a probability is set to zero, in [0, 1).
      rotary: whether to rotate queries and keys first, as `rotary` does. A `Rotary` says how. For
        (q, k, v), apply `rotary` to the arrays instead.
      lean: whether to keep O(T) instead of O(T S) numbers for the backward pass.

    Raises:
      ValueError: a number is out of its range, `kv_heads` does not divide `heads`, or an array is
        not of the kind or the number of axes above.
      LayerError: the inputs do not fit the heads, the masks or the bias.

    References:
      "Attention Is All You Need", Vaswani et al., 2017.
      "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
      Ainslie et al., 2023.
      "Self-attention Does Not Need O(n^2) Memory", Rabe, Staats, 2021, and "FlashAttention: Fast
      and Memory-Efficient Exact Attention with IO-Awareness", Dao et al., 2022: the lean form.
      "Longformer: The Long-Document Transformer", Beltagy, Peters, Cohan, 2020: the window.
      "Gemma 2: Improving Open Language Models at a Practical Size", Gemma Team, 2024: the soft cap.
      "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
      Press, Smith, Lewis, 2022: the bias of the second example.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> layer = bp.dot_product_attention(1, causal=True)
      >>> q, k, v = jnp.zeros((1, 2, 1)), jnp.zeros((1, 2, 1)), jnp.array([[[2.0], [4.0]]])
      >>> y, _ = layer.forward((), (q, k, v))
      >>> y.ravel().tolist()                    # v_1, and the mean of v_1 and v_2
      [2.0, 3.0]

      ALiBi, scores that fall with the distance at a rate of each head:

      >>> heads, t = 4, jnp.arange(6.0)
      >>> rates = 2.0 ** (-8 * jnp.arange(1, heads + 1) / heads)
      >>> bias = -rates[None, :, None, None] * jnp.abs(t[:, None] - t)     # [1, H, T, T]
      >>> layer = bp.dot_product_attention(heads, causal=True, bias=bias)
      >>> layer.init(None, (6, 24))[1]
      (6, 8)
    """
    layout = make_heads("dot_product_attention", heads, kv_heads, value_size, scale, rotary)
    heads, groups = layout.heads, layout.groups
    scores = make_scores(
        "dot_product_attention",
        causal=causal,
        window=window,
        mask=mask,
        pair_mask=pair_mask,
        bias=bias,
        soft_cap=soft_cap,
        drop_prob=drop_prob,
    )
    name = f"dot_product_attention({heads})"

    def require(shape, n: int | str = "N"):
        """Returns the shape of one example's outputs; raises if inputs [n, *shape] do not fit."""
        if _is_apart(shape):
            _, u = layout.require_apart(name, shape)
            scores.require_fit(name, n, heads, shape[0][0], shape[1])
            return shape[0][0], heads * u
        x, past = shape if is_continued(shape) else (shape, None)
        if not is_shape(x) or not (past is None or len(past) == 2):
            raise LayerError(
                name,
                f"got inputs of shapes {show_shapes(shape)}, without N; it takes an array, three "
                "arrays (q, k, v), or a pair (x, past) with past = (k, v).",
            )
        d, u = layout.require_packed(name, x)
        p = 0 if past is None else layout.require_past(name, past, d, u)
        scores.require_fit(name, n, heads, x[0], (p + x[0], x[1]))
        y = x[0], heads * u
        return y if past is None else (y, ((p + x[0], groups * d), (p + x[0], groups * u)))

    def init(key, shape):
        del key
        return (), require(_require_shapes(name, shape))

    def forward(params, x, *, key=None):
        del params
        require_key(name, "key", key)
        n = _require_arrays(name, x)
        require(jax.tree.map(lambda array: array.shape[1:], x), n)
        if _is_apart(x):
            q, k, v = x
            y, cache = attend_heads(apart(q, heads), apart(k, groups), apart(v, groups), key)
            return y, (cache, Apart())
        x, past = x if is_continued(x) else (x, None)
        p = 0 if past is None else past[0].shape[1]
        broken = scores.broken(x, p)
        q, k, v = layout.split(without(broken, x), p)
        if past is None:
            y, cache = attend_heads(q, k, v, key)
            return y, (cache, Packed(broken))
        k, v = (
            jnp.concatenate([apart(a, groups), b], 1) for a, b in zip(past, (k, v), strict=True)
        )
        y, cache = attend_heads(q, k, v, key)
        return (y, (together(k), together(v))), (cache, Continued(broken))

    def backward(params, cache, dy, *, read=keep):
        del params, read
        require_cache(name, cache, 2)
        cache, inputs = cache
        require_cache(name, cache, 4)
        require_deltas(name, dy, outputs_of(cache, inputs))
        dy, dpresent = dy if isinstance(inputs, Continued) else (dy, None)
        dq, dk, dv = attend_heads_backward(cache, dy)
        if isinstance(inputs, Apart):
            return tuple(together(d).astype(dy.dtype) for d in (dq, dk, dv)), ()
        p = dk.shape[1] - dq.shape[1]
        if dpresent is not None:
            dk, dv = (
                d + widened(apart(more, groups)) for d, more in zip((dk, dv), dpresent, strict=True)
            )
        dx = layout.join(dq, dk[:, p:], dv[:, p:], p).astype(dy.dtype)
        dx = without(inputs.broken, dx)
        if dpresent is None:
            return dx, ()
        return (dx, tuple(together(d[:, :p]).astype(dy.dtype) for d in (dk, dv))), ()

    def attend_heads(q, k, v, key):
        """The outputs [N, T, H u] of heads [N, T, H, d], [N, S, G, d] and [N, S, G, u]."""
        q, k, v = (layout.rows(x) for x in (layout.scaled(q), scores.hide(k), scores.hide(v)))
        draws = key if drop_prob else None
        y, kept = attend(q, k, v, scores, layout.group, lean=lean, key=draws)
        return together(layout.from_rows(y, heads)), (q, k, v, kept)

    def attend_heads_backward(cache, dy):
        """The derivatives with respect to the heads, in at least 32 bits."""
        q, k, v, kept = cache
        dy = layout.rows(apart(dy, heads))
        dq, dk, dv = attend_backward(q, k, v, kept, dy, scores, layout.group, lean=lean)
        dq, dk, dv = (
            layout.from_rows(rows, h) for rows, h in ((dq, heads), (dk, groups), (dv, groups))
        )
        return layout.scaled(dq), dk, dv

    def outputs_of(cache, inputs):
        """The shapes and dtypes of the outputs that belong to a cache."""
        q, k, v, _ = cache
        n, _, s, d = k.shape
        u = v.shape[-1]
        shapes = (q.shape[2] // layout.group, heads * u), (s, groups * d), (s, groups * u)
        y, *present = (jax.ShapeDtypeStruct((n, *shape), k.dtype) for shape in shapes)
        return (y, tuple(present)) if isinstance(inputs, Continued) else y

    return Layer(name, init, forward, backward)


def _require_shapes(name: str, shape: Any) -> Any:
    """Returns the shape of an example's inputs, or a tuple of shapes; raises if one is no shape."""
    if isinstance(shape, tuple | list) and any(isinstance(part, tuple | list) for part in shape):
        return tuple(_require_shapes(name, part) for part in shape)
    return require_shape(name, shape)


def _require_arrays(name: str, x: Any) -> int:
    """Returns N of an array or of tuples of arrays; raises unless they are floats of one dtype."""
    arrays = jax.tree.leaves(x, is_leaf=lambda leaf: not isinstance(leaf, tuple))
    for array in arrays:
        require_floats(name, array)
        if array.dtype != arrays[0].dtype:
            raise LayerError(
                name,
                f"got inputs of dtypes {arrays[0].dtype} and {array.dtype}; it takes one dtype for "
                "all. Convert them?",
            )
    return require_examples(name, inputs=x) if isinstance(x, tuple) else x.shape[0]


def is_continued(inputs: Any) -> bool:
    """Whether inputs, or their shape, are a pair (x, past)."""
    return isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[1], tuple)


def _is_apart(inputs: Any) -> bool:
    """Whether inputs, or their shape, are three, (q, k, v)."""
    return isinstance(inputs, tuple) and len(inputs) == 3 and not isinstance(inputs[0], int)
