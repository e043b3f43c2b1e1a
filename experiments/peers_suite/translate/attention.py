"""Attention with queries, keys and values of three inputs, and what transformers need of it.

A mask of PyTorch is true where something is hidden, one of the library where it counts.
"""

import jax.numpy as jnp
from torch import nn

import jaxbp as bp
from experiments.peers_suite.translate.linear import dense_params
from experiments.peers_suite.written import Written, sequences, to_array, under


def multihead_attention(module, query, key, value, *, key_padding_mask, attn_mask):
    """PyTorch also returns the mean of the probabilities over the heads, for looking at."""
    size, heads, use_bias = module.embed_dim, module.num_heads, module.in_proj_bias is not None
    layout = sequences(query, batch_first=module.batch_first)
    seen = visible(attn_mask, key_padding_mask, heads)
    if module.bias_k is None and not module.add_zero_attn:
        layer, params = bp.cross_attention(size, heads, use_bias=use_bias, **seen), cross_params
    else:
        layer, params = _with_more_keys(module, size, heads, use_bias, seen)
    return Written(
        layer, lambda *streams: tuple(map(layout.into, streams)), layout.back, params, n_outputs=1
    )


def _with_more_keys(module, size, heads, use_bias, seen):
    """With a learned key and value before the others, or with zeros behind, which all queries see.

    PyTorch has the learned ones behind the others, too; attention has no order.
    """
    learned, zeros = module.bias_k is not None, module.add_zero_attn
    dense = [bp.on(at, bp.dense(size, use_bias=use_bias)) for at in (0, 1, 2)]
    more = [bp.on(at, bp.prepend()) for at in (1, 2) if learned]
    more += [bp.on(at, bp.pad(((0, 1),))) for at in (1, 2) if zeros]

    def extended(mask):
        widths = [(0, 0)] * (mask.ndim - 1) + [(int(learned), int(zeros))]
        return jnp.pad(mask, widths, constant_values=True)

    core = bp.dot_product_attention(heads, **{name: extended(m) for name, m in seen.items()})

    def params(params):
        parts = cross_params(params)
        first = [{"weight": params[name][0]} for name in ("bias_k", "bias_v") if learned]
        of_more = (*first, *[()] * (2 * zeros))
        return parts["query"], parts["key"], parts["value"], *of_more, (), parts["out"]

    return bp.chain(*dense, *more, core, bp.dense(size, use_bias=use_bias)), params


def visible(mask, key_padding_mask, heads=None):
    """The masks of an attention layer.

    PyTorch's mask of pairs is [T, S] or [N H, T, S], and that of keys [S] or [N, S].
    """
    seen = {}
    if mask is not None:
        pairs = ~to_array(mask)
        seen["pair_mask"] = pairs.reshape(-1, heads, *pairs.shape[1:]) if pairs.ndim == 3 else pairs
    if key_padding_mask is not None:
        seen["mask"] = ~to_array(key_padding_mask)
    return seen


def self_params(params):
    """Those of `bp.attention`: queries, keys and values are one product there too."""
    return _of_inputs(params, lambda joint: joint), (), dense_params(under(params, "out_proj"))


def cross_params(params):
    """Those of `bp.cross_attention`."""
    parts = {
        name: _of_inputs(params, lambda joint, i=i: jnp.split(joint, 3)[i])
        for i, name in enumerate(("query", "key", "value"))
    }
    return parts | {"out": dense_params(under(params, "out_proj"))}


def _of_inputs(params, part):
    """The dense layer of a part of the queries, keys and values."""
    joint = {"weight": part(params["in_proj_weight"])}
    if "in_proj_bias" in params:
        joint["bias"] = part(params["in_proj_bias"])
    return dense_params(joint)


TRANSLATIONS = {nn.MultiheadAttention: multihead_attention}
