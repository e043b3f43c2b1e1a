"""Transformers: encoder and decoder blocks, and the two joined."""

from torch import nn

import jaxbp as bp
from experiments.peers_suite.translate.attention import (
    cross_params,
    self_params,
    visible,
)
from experiments.peers_suite.translate.linear import dense_params
from experiments.peers_suite.translate.normalisation import gain_and_bias
from experiments.peers_suite.written import Part, Written, sequences, under


def encoder_layer(module, src, src_mask=None, src_key_padding_mask=None):
    part = _encoder_block(module, src_mask, src_key_padding_mask)
    layout = sequences(src, batch_first=_batch_first(module))
    return Written(part.layer, layout.into, layout.back, part.params)


def encoder(module, src, mask=None, src_key_padding_mask=None):
    part = _encoder(module, mask, src_key_padding_mask)
    layout = sequences(src, batch_first=_batch_first(module.layers[0]))
    return Written(part.layer, layout.into, layout.back, part.params)


def decoder_layer(module, tgt, memory, **masks):
    part = _decoder_block(module, **masks)
    layout = sequences(tgt, batch_first=_batch_first(module))
    return Written(
        bp.chain(part.layer, bp.select(0)),
        lambda *streams: tuple(map(layout.into, streams)),
        layout.back,
        lambda params: (part.params(params), ()),
    )


def transformer(module, src, tgt, *, src_mask, src_key_padding_mask, **masks):
    """An encoder at entry 1, whose outputs the decoder at entry 0 sees."""
    encode = _encoder(module.encoder, src_mask, src_key_padding_mask)
    decode = [_decoder_block(block, **masks) for block in module.decoder.layers]
    norm = _norm(module.decoder.norm)
    layout = sequences(tgt, batch_first=module.batch_first)

    def inputs(src, tgt):
        return layout.into(tgt), layout.into(src)

    def params(params):
        decoder = under(params, "decoder")
        return (
            encode.params(under(params, "encoder")),
            *(part.params(under(decoder, f"layers.{i}")) for i, part in enumerate(decode)),
            (),
            gain_and_bias(under(decoder, "norm")),
        )

    layer = bp.chain(bp.on(1, encode.layer), *(part.layer for part in decode), bp.select(0), norm)
    return Written(layer, inputs, layout.back, params)


def _encoder(module, mask, key_padding_mask):
    """The blocks, and a norm if there is one."""
    blocks = [_encoder_block(block, mask, key_padding_mask) for block in module.layers]
    norms = [] if module.norm is None else [_norm(module.norm)]

    def params(params):
        of_blocks = [block.params(under(params, f"layers.{i}")) for i, block in enumerate(blocks)]
        return (*of_blocks, *(gain_and_bias(under(params, "norm")) for _ in norms))

    return Part(bp.chain(*(block.layer for block in blocks), *norms), params)


def _encoder_block(module, mask, key_padding_mask):
    attention = bp.attention(
        module.self_attn.embed_dim,
        module.self_attn.num_heads,
        use_bias=module.self_attn.in_proj_bias is not None,
        **visible(mask, key_padding_mask),
    )
    feed_forward, norms = _feed_forward(module), [_norm(module.norm1), _norm(module.norm2)]
    if module.norm_first:
        layer = bp.chain(bp.residual(norms[0], attention), bp.residual(norms[1], feed_forward))
    else:
        layer = bp.chain(bp.residual(attention), norms[0], bp.residual(feed_forward), norms[1])

    def params(params):
        attend = self_params(under(params, "self_attn"))
        feed = _feed_forward_params(params)
        gains = [gain_and_bias(under(params, name)) for name in ("norm1", "norm2")]
        if module.norm_first:
            return (gains[0], attend), (gains[1], feed)
        return attend, gains[0], feed, gains[1]

    return Part(layer, params)


def _decoder_block(
    module,
    *,
    tgt_mask=None,
    memory_mask=None,
    tgt_key_padding_mask=None,
    memory_key_padding_mask=None,
):
    """A block that sees the pair (x, memory) and passes the memory on."""
    size, heads = module.self_attn.embed_dim, module.self_attn.num_heads
    use_bias = module.self_attn.in_proj_bias is not None
    attention = bp.attention(
        size, heads, use_bias=use_bias, **visible(tgt_mask, tgt_key_padding_mask)
    )
    cross_attention = bp.cross_attention(
        size, heads, use_bias=use_bias, **visible(memory_mask, memory_key_padding_mask)
    )
    feed_forward = _feed_forward(module)
    norms = [_norm(norm) for norm in (module.norm1, module.norm2, module.norm3)]
    if module.norm_first:
        layer = bp.chain(
            bp.on(0, bp.residual(norms[0], attention)),
            bp.residual(bp.on(0, norms[1]), cross_attention, at=0),
            bp.on(0, bp.residual(norms[2], feed_forward)),
        )
    else:
        layer = bp.chain(
            bp.on(0, bp.residual(attention), norms[0]),
            bp.residual(cross_attention, at=0),
            bp.on(0, norms[1], bp.residual(feed_forward), norms[2]),
        )

    def params(params):
        attend = self_params(under(params, "self_attn"))
        cross = cross_params(under(params, "multihead_attn"))
        feed = _feed_forward_params(params)
        gains = [gain_and_bias(under(params, name)) for name in ("norm1", "norm2", "norm3")]
        if module.norm_first:
            return (gains[0], attend), (gains[1], cross), (gains[2], feed)
        return (attend, gains[0]), cross, (gains[1], feed, gains[2])

    return Part(layer, params)


def _feed_forward(module):
    activation = (
        bp.relu() if module.activation is nn.functional.relu else bp.gelu(approximate=False)
    )
    return bp.chain(
        bp.dense(module.linear1.out_features, use_bias=module.linear1.bias is not None),
        activation,
        bp.dense(module.linear2.out_features, use_bias=module.linear2.bias is not None),
    )


def _feed_forward_params(params):
    return dense_params(under(params, "linear1")), (), dense_params(under(params, "linear2"))


def _norm(module):
    return bp.layer_norm(eps=module.eps, use_bias=module.bias is not None)


def _batch_first(module):
    return module.self_attn.batch_first


TRANSLATIONS = {
    nn.TransformerEncoderLayer: encoder_layer,
    nn.TransformerEncoder: encoder,
    nn.TransformerDecoderLayer: decoder_layer,
    nn.Transformer: transformer,
}
