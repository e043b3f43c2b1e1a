"""Self-attention: dense layers around the attention of a sequence to itself.

Letters are those of `types` and `dot_product`.
"""

import functools

import jax
import numpy as np
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxbp.combinators.compose import chain
from jaxbp.layers.heads import make_heads, require_head_size
from jaxbp.layers.linear import dense
from jaxbp.layers.multihead import dot_product_attention, is_continued
from jaxbp.layers.rotations import Rotary
from jaxbp.layers.scores import Scores, without
from jaxbp.require import require_cache, require_count, require_floats
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, LayerError, show_shape

__all__ = ["attention"]


def attention(
    features: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    head_size: int | None = None,
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
    use_bias: bool = True,
    weight_init: Initializer = initializers.lecun_normal(),  # noqa: B008 -- a pure function
    dtype: DTypeLike = float,
) -> Layer:
    """Self-attention: a dense layer computes queries, keys and values, another mixes the heads.

    It is the same layer, under a name of its own, as

        chain(dense(H d + G d + G u), dot_product_attention(H, ...), dense(features))

    The formulas of attention are in `dot_product_attention`, and what its arguments change. Inputs
    are [N, T, I], outputs [N, T, features]. One dense layer computes the queries, keys and values
    of all heads, as one product instead of three. Parameters are a tuple of the parameters of the
    three parts.

    For generation, inputs (x, past) give outputs (y, present), with the same parameters: past and
    present are pairs (k, v) of keys [N, P, G d] and values [N, P, G u], rotated if `rotary` is
    true. Start with P = 0.

    Args:
      features: the number of outputs.
      heads: H.
      kv_heads: G, a divisor of H; None means H.
      head_size: d, the size of a query and of a key; None means features / H.
      value_size: u, the size of a value; None means d.
      causal: whether no position sees a later one.
      window: the first distance at which positions do not see each other; None means no limit.
      mask: booleans, false at positions that no query sees: [S], or [N, S] with one row for each
        example. Use `masked` to pass a mask with each batch.
      pair_mask: booleans, false at pairs of a query and a key that it does not see: [T, S], or
        [N, H, T, S] where either of N and H may be 1.
      bias: floating-point numbers that are added to the scores, in the same shapes. A constant.
      scale: the factor of q . k; None means 1 / sqrt(d).
      soft_cap: the bound of the scores; None means no bound.
      drop_prob: the probability that a probability is set to zero, in [0, 1).
      rotary: whether to rotate queries and keys by their positions, as `rotary` does. A `Rotary`
        says how.
      lean: whether to keep O(T) instead of O(T S) numbers for the backward pass.
      use_bias: whether both dense layers add a bias.
      weight_init: the initialiser of both weights, as in `jax.nn.initializers`.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      ValueError: a number is out of its range, `heads` does not divide `features` without a
        `head_size`, `kv_heads` does not divide `heads`, or an array is not of the kind or the
        number of axes above.
      LayerError: the inputs, the parameters, the masks or the bias do not fit.

    References:
      "Attention Is All You Need", Vaswani et al., 2017.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> block = bp.residual(bp.layer_norm(), bp.attention(8, heads=2, causal=True))
      >>> params, out_shape = block.init(jax.random.key(0), (5, 8))
      >>> out_shape, [part["weight"].shape for part in params[1] if part]
      ((5, 8), [(8, 24), (8, 8)])

      One position after another, which gives the same outputs:

      >>> layer, x = bp.attention(8, heads=2, causal=True), jnp.ones((1, 3, 8))
      >>> params, _ = layer.init(jax.random.key(0), (3, 8))
      >>> past = jnp.zeros((1, 0, 8)), jnp.zeros((1, 0, 8))
      >>> for t in range(3):
      ...     (y, past), _ = layer.forward(params, (x[:, t : t + 1], past))
      >>> bool(jnp.allclose(y[:, 0], layer.forward(params, x)[0][:, 2], atol=1e-5))
      True
    """
    features = require_count("attention", "features", features)
    layout = make_heads("attention", heads, kv_heads, value_size, scale, rotary)
    d = require_head_size("attention", features, layout.heads, head_size)
    u = d if layout.value_size is None else layout.value_size
    core = dot_product_attention(
        layout.heads,
        kv_heads=layout.groups,
        value_size=layout.value_size,
        causal=causal,
        window=window,
        mask=mask,
        pair_mask=pair_mask,
        bias=bias,
        scale=scale,
        soft_cap=soft_cap,
        drop_prob=drop_prob,
        rotary=rotary,
        lean=lean,
    )
    linear = functools.partial(dense, use_bias=use_bias, weight_init=weight_init, dtype=dtype)
    width = (layout.heads + layout.groups) * d + layout.groups * u
    layer = chain(_on_x(linear(width)), core, _on_x(linear(features)))
    layer = layer._replace(name=f"attention({features}, {layout.heads})")
    scores = Scores(mask=mask, pair_mask=pair_mask)
    return layer if scores.seen() is None else _without_broken(layer, scores, layout.heads)


def _on_x(layer: Layer) -> Layer:
    """The layer for inputs x or (x, past), of which the past is passed on."""

    def init(key, shape):
        if not is_continued(shape):
            return layer.init(key, shape)
        params, out_shape = layer.init(key, shape[0])
        return params, (out_shape, shape[1])

    def forward(params, x, *, key=None):
        if not is_continued(x):
            return layer.forward(params, x, key=key)
        y, cache = layer.forward(params, x[0], key=key)
        return (y, x[1]), cache

    def backward(params, cache, dy, *, read=keep):
        if not is_continued(dy):
            return layer.backward(params, cache, dy, read=read)
        dx, readings = layer.backward(params, cache, dy[0], read=read)
        return (dx, dy[1]), readings

    return Layer(layer.name, init, forward, backward)


def _without_broken(layer: Layer, scores: Scores, heads: int) -> Layer:
    """The layer, for inputs in which zeros replace positions that no query sees and are not finite.

    A delta of zero at such a position is not enough for the dense layers: zero times nan is nan.
    """
    name = layer.name

    def forward(params, x, *, key=None):
        x, *past = x if is_continued(x) else (x,)
        require_floats(name, x)
        if x.ndim != 3:
            got = show_shape(x.shape)
            raise LayerError(name, f"got inputs of shape {got}; it takes [N, T, I].")
        n, t, features = x.shape
        p = past[0][0].shape[1] if past else 0
        scores.require_fit(name, n, heads, t, (p + t, features))
        broken = scores.broken(x, p)
        x = without(broken, x)
        y, cache = layer.forward(params, (x, *past) if past else x, key=key)
        return y, (cache, broken)

    def backward(params, cache, dy, *, read=keep):
        require_cache(name, cache, 2)
        cache, broken = cache
        dx, readings = layer.backward(params, cache, dy, read=read)
        if isinstance(dx, tuple):
            return (without(broken, dx[0]), dx[1]), readings
        return without(broken, dx), readings

    return Layer(name, layer.init, forward, backward)
