"""Cross-attention: the positions of one sequence attend to those of another.

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

from jaxbp.layers.heads import make_heads, require_head_size
from jaxbp.layers.linear import dense
from jaxbp.layers.multihead import dot_product_attention
from jaxbp.layers.scores import Scores
from jaxbp.require import (
    placed,
    require_cache,
    require_count,
    require_examples,
    require_floats,
    require_key,
    require_shape,
)
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, LayerError, exportable, show_shape

__all__ = ["cross_attention"]

PARTS = "query", "key", "value", "out"


@exportable
class OfMemory(NamedTuple):
    """The cache of inputs (x, memory): that of (x, memory, memory)."""

    cache: Any


def cross_attention(
    features: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    head_size: int | None = None,
    value_size: int | None = None,
    mask: jax.Array | np.ndarray | None = None,
    pair_mask: jax.Array | np.ndarray | None = None,
    bias: jax.Array | np.ndarray | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    drop_prob: float = 0.0,
    lean: bool = False,
    use_bias: bool = True,
    weight_init: Initializer = initializers.lecun_normal(),  # noqa: B008 -- a pure function
    dtype: DTypeLike = float,
) -> Layer:
    """Attention to a second sequence: queries are from x, keys and values from a memory.

    Dense layers compute the queries q, the keys k and the values v, and a last one mixes the heads:

        q = x W_q + b_q     k = m W_k + b_k     v = m W_v + b_v     y = attend(q, k, v) W_o + b_o

        dm = dk W_k^T + dv W_v^T     dx = dq W_q^T

    The formulas of attention are in `dot_product_attention`, and what its arguments change.

        inputs                                        outputs
        (x, memory), [N, T, I] and [N, S, J]          [N, T, features]
        (x, keys, values), the last two [N, S, J]     [N, T, features]
            and [N, S, K], in place of a memory

    dx is a tuple like the inputs. Parameters are a dict of those of the dense layers, `"query"`,
    `"key"`, `"value"` and `"out"`.

    Args:
      features: the number of outputs.
      heads: H.
      kv_heads: G, the number of keys and of values at a position, a divisor of H; None means H.
      head_size: d, the size of a query and of a key; None means features / H.
      value_size: u, the size of a value; None means d.
      mask: booleans, false at positions of the memory that no query sees: [S], or [N, S] with one
        row for each example. What the memory holds there has no influence. Use `masked` to pass a
        mask with each batch.
      pair_mask: booleans, false at pairs of a query and a key that it does not see: [T, S], or
        [N, H, T, S] where either of N and H may be 1.
      bias: floating-point numbers that are added to the scores, in the same shapes. A constant.
      scale: the factor of q . k; None means 1 / sqrt(d).
      soft_cap: the bound of the scores; None means no bound.
      drop_prob: the probability that a probability is set to zero, in [0, 1).
      lean: whether to keep O(T) instead of O(T S) numbers for the backward pass.
      use_bias: whether the dense layers add a bias.
      weight_init: the initialiser of all weights, as in `jax.nn.initializers`.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      ValueError: a number is out of its range, `heads` does not divide `features` without a
        `head_size`, `kv_heads` does not divide `heads`, or an array is not of the kind or the
        number of axes above.
      LayerError: the inputs, the parameters, the masks or the bias do not fit.

    References:
      "Attention Is All You Need", Vaswani et al., 2017: the decoder's attention to the encoder.

    Example:
      >>> import jax, jaxbp as bp
      >>> layer = bp.cross_attention(8, heads=2)
      >>> params, out_shape = layer.init(jax.random.key(0), ((5, 8), (7, 3)))
      >>> out_shape, params["query"]["weight"].shape, params["key"]["weight"].shape
      ((5, 8), (8, 8), (3, 8))
    """
    features = require_count("cross_attention", "features", features)
    layout = make_heads("cross_attention", heads, kv_heads, value_size, scale, False)
    heads, groups = layout.heads, layout.groups
    d = require_head_size("cross_attention", features, heads, head_size)
    u = d if layout.value_size is None else layout.value_size
    core = dot_product_attention(
        heads,
        kv_heads=groups,
        value_size=u,
        mask=mask,
        pair_mask=pair_mask,
        bias=bias,
        scale=scale,
        soft_cap=soft_cap,
        drop_prob=drop_prob,
        lean=lean,
    )
    linear = functools.partial(dense, use_bias=use_bias, weight_init=weight_init, dtype=dtype)
    layers = [linear(size) for size in (heads * d, groups * d, groups * u, features)]
    parts = dict(zip(PARTS, layers, strict=True))
    scores = Scores(mask=mask, pair_mask=pair_mask, bias=bias)
    name = f"cross_attention({features}, {heads})"

    def at(part):
        """The place of a part in messages."""
        return placed(f"{name}: {part}", core if part == "core" else parts[part])

    def require(shapes, n: int | str = "N"):
        """Raises unless inputs [n, *shape] are sequences that fit each other and the masks."""
        x, keys, values = shapes
        if {len(x), len(keys), len(values)} != {2} or keys[0] != values[0]:
            got = ", ".join(show_shape((n, *shape)) for shape in shapes)
            raise LayerError(
                name, f"got inputs of shapes {got}; it takes [N, T, I], [N, S, J] and [N, S, K]."
            )
        scores.require_fit(name, n, heads, x[0], keys)

    def init(key, shape):
        require_key(name, "key", key)
        shapes = tuple(require_shape(name, part) for part in _as_three(name, shape))
        require(shapes)
        t, params = shapes[0][0], {}
        keys, shapes = jax.random.split(key, len(PARTS)), (*shapes, (t, heads * u))
        for part, part_key, part_shape in zip(PARTS, keys, shapes, strict=True):
            with at(part):
                params[part], _ = parts[part].init(part_key, part_shape)
        return params, (t, features)

    def forward(params, x, *, key=None):
        require_parts(params)
        sequences = _as_three(name, x)
        for array in sequences:
            require_floats(name, array)
        require(tuple(a.shape[1:] for a in sequences), require_examples(name, inputs=sequences))
        of_heads, caches = [], []
        for part, array in zip(PARTS[:3], sequences, strict=True):
            with at(part):
                y, cache = parts[part].forward(params[part], shown(part, array))
            of_heads.append(y)
            caches.append(cache)
        with at("core"):
            y, of_core = core.forward((), tuple(of_heads), key=key)
        with at("out"):
            y, of_out = parts["out"].forward(params["out"], y)
        cache = *caches, of_core, of_out
        return y, OfMemory(cache) if len(x) == 2 else cache

    def backward(params, cache, dy, *, read=keep):
        require_parts(params)
        caches = cache.cache if isinstance(cache, OfMemory) else cache
        require_cache(name, caches, 5)
        *of_sequences, of_core, of_out = caches
        with at("out"):
            dy, reading = parts["out"].backward(params["out"], of_out, dy, read=read)
        with at("core"):
            of_heads, _ = core.backward((), of_core, dy)
        dxs, readings = [], {"out": reading}
        for part, part_cache, dy in zip(PARTS[:3], of_sequences, of_heads, strict=True):
            with at(part):
                dx, readings[part] = parts[part].backward(params[part], part_cache, dy, read=read)
            dxs.append(dx)
        dx, dkeys, dvalues = dxs
        dx = (dx, dkeys + dvalues) if isinstance(cache, OfMemory) else (dx, dkeys, dvalues)
        return dx, readings

    def shown(part, x):
        """The inputs of a part, with zeros at positions of the memory that no query sees.

        A delta of zero at such a position is not enough: zero times nan is nan.
        """
        seen = scores.seen()
        return x if part == "query" or seen is None else jnp.where(seen[..., None], x, 0)

    def require_parts(params):
        """Raises unless parameters are a dict with those of each dense layer."""
        if not isinstance(params, dict) or set(params) != set(PARTS):
            of = f" of {', '.join(params)}" if isinstance(params, dict) else ""
            raise LayerError(
                name,
                f"got parameters that are not its own: a {type(params).__name__}{of}; it takes a "
                f"dict of {', '.join(PARTS)}. Are they those of another network?",
            )

    return Layer(name, init, forward, backward)


def _as_three(name: str, inputs: Any) -> Any:
    """(x, keys, values) of inputs (x, memory) or of three; raises if they are neither."""
    if not isinstance(inputs, tuple | list) or len(inputs) not in (2, 3):
        raise LayerError(
            name,
            f"got inputs of type {type(inputs).__name__}; it takes a pair (x, memory), or three, "
            "(x, keys, values).",
        )
    return tuple(inputs) if len(inputs) == 3 else (*inputs, inputs[1])
