"""Mixtures: branches weighted by a softmax that another branch, the gate, computes."""

import functools

import jax
import jax.numpy as jnp

from jaxbp.combinators.broadcasting import expand, fits, reduce_like
from jaxbp.combinators.compose import side_by_side, sum_trees
from jaxbp.require import (
    require_cache,
    require_count,
    require_delta,
    require_floats,
    require_layers,
    require_same_outputs,
)
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, LayerError, is_shape, show_shape, show_shapes, widened

__all__ = ["mixture"]


def mixture(gate: Layer, *experts: Layer, top_k: int | None = None) -> Layer:
    """A mixture of experts: branches weighted by the softmax of a gate's outputs.

        y = sum_k p_k f_k(x),   p = softmax(g(x)) over the k

    The gradients, with s_k the inner product of f_k(x) and dy:

        expert k   gets p_k dy
        gate       gets p_k (s_k - sum_j p_j s_j)

    With `top_k`, the softmax is over the `top_k` largest outputs of the gate alone. The other
    experts have p = 0 and get no gradient, and no gradient goes through the choice. With `top_k=1`,
    p is 1 and so the gate gets no gradient. Among equal outputs, the first ones are chosen.

    The gate has K outputs, one for each expert. If it has the positions of the experts' outputs,
    each position has its own mixture (tokens are routed on their own). If it has none, [N, K], an
    example has one mixture for all of its positions. Parameters, caches and readings are tuples: of
    the gate, then of each expert.

    Every expert is computed for every position, with `top_k` too. Time and memory are those of all
    experts.

    Args:
      gate: g, with outputs [N, ..., K].
      *experts: f_1, ..., f_K, all with outputs of the same shape, [N, ..., O].
      top_k: how many experts count at a position; all of them if it is None.

    Raises:
      TypeError: one of them is not a Layer, or there is no expert.
      ValueError: `top_k` is not a positive integer, or larger than K.
      LayerError: the outputs do not fit together, or a part refuses its inputs or parameters.

    References:
      "Adaptive Mixtures of Local Experts", Jacobs, Jordan, Nowlan, Hinton, 1991.
      "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", Shazeer et
      al., 2017: `top_k`.

    Example:
      A feed-forward block of a transformer, with two of four experts for each token:

      >>> import jax, jaxbp as bp
      >>> experts = [bp.chain(bp.dense(16), bp.gelu(), bp.dense(8)) for _ in range(4)]
      >>> gate = bp.dense(4, use_bias=False)
      >>> block = bp.residual(bp.layer_norm(), bp.mixture(gate, *experts, top_k=2))
      >>> block.init(jax.random.key(0), (10, 8))[1]
      (10, 8)
    """
    require_layers("mixture: gate", (gate,))
    require_layers("mixture: expert", experts)
    n = len(experts)
    if not experts:
        raise TypeError("mixture: takes a gate and a Layer for each expert; got no expert.")
    if top_k is not None:
        top_k = require_count("mixture", "top_k", top_k)
        if top_k > n:
            raise ValueError(f"mixture: top_k is {top_k}; there are {n} experts.")
    layers = (gate, *experts)
    routed = "" if top_k is None else f", top_k={top_k}"
    name = f"mixture({', '.join(layer.name for layer in layers)}{routed})"
    places = ["mixture: gate", *(f"mixture: expert {k}" for k in range(1, n + 1))]
    init_each, forward_each, backward_each = side_by_side(name, layers, places)

    def require_fit(gate_shape, out_shape):
        """Raises unless a gate weighs outputs of this shape; both are shapes of one example."""
        if gate_shape[-1:] != (n,) or not fits((*gate_shape[:-1], 1), out_shape):
            raise LayerError(
                name,
                f"has a gate with outputs {show_shape(('N', *gate_shape))}, and experts with "
                f"{show_shape(('N', *out_shape))}; the gate takes [N, {n}], or the positions of "
                f"the experts and {n} outputs at each.",
            )

    def weigh(logits):
        """The weights p of the experts, [N, ..., K], in at least 32 bits."""
        logits = widened(logits)
        if top_k is None:
            return jax.nn.softmax(logits)
        _, best = jax.lax.top_k(logits, top_k)
        chosen = jnp.any(best[..., None] == jnp.arange(n, dtype=best.dtype), axis=-2)
        return jax.nn.softmax(logits, where=chosen)

    def init(key, shape):
        params, (gate_shape, *out_shapes) = init_each(key, (shape,) * (n + 1))
        first = out_shapes[0]
        if not all(is_shape(own) for own in (gate_shape, *out_shapes)) or any(
            tuple(own) != tuple(first) for own in out_shapes
        ):
            raise LayerError(
                name,
                f"has a gate with outputs {show_shapes(gate_shape)}, and experts with "
                f"{', '.join(map(show_shapes, out_shapes))}; it takes one array of each, of equal "
                "shapes from all experts.",
            )
        require_fit(tuple(gate_shape), tuple(first))
        return params, first

    def forward(params, x, *, key=None):
        (logits, *outputs), caches = forward_each(params, (x,) * (n + 1), key)
        for own in (logits, *outputs):
            require_floats(name, own, what="outputs of a part")
        require_same_outputs(name, "a mixture", *outputs)
        require_fit(logits.shape[1:], outputs[0].shape[1:])
        weights = weigh(logits)
        products = [
            expand(weights[..., k : k + 1], f.shape) * widened(f) for k, f in enumerate(outputs)
        ]
        y = functools.reduce(jnp.add, products).astype(outputs[0].dtype)
        return y, (weights.astype(logits.dtype), tuple(outputs), caches)

    def backward(params, cache, dy, *, read=keep):
        require_cache(name, cache, 3)
        weights, outputs, caches = cache
        require_fit(weights.shape[1:], outputs[0].shape[1:])
        require_delta(name, dy, outputs[0].shape)
        own = [weights[..., k : k + 1] for k in range(n)]
        products = [
            reduce_like(widened(f) * widened(dy), p.shape)
            for p, f in zip(own, outputs, strict=True)
        ]
        ps, s = widened(weights), jnp.concatenate(products, axis=-1)
        d_logits = ps * (s - jnp.sum(ps * s, axis=-1, keepdims=True))
        errors = [(expand(p, dy.shape) * dy).astype(dy.dtype) for p in own]
        dxs, readings = backward_each(
            params, caches, (d_logits.astype(weights.dtype), *errors), read
        )
        return sum_trees(dxs), readings

    return Layer(name, init, forward, backward)
