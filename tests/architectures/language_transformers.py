"""Transformers of text that are widely known: GPT-2, BERT, T5, BLOOM and GPT-NeoX."""

import numpy as np
import torch_functions as t
from architecture import Among, Architecture, Tokens

import jaxbp as bp


def gpt2():
    """GPT-2: blocks with a norm before each part, and one table for tokens and for logits."""
    block = bp.chain(
        bp.residual(bp.layer_norm(), bp.attention(4, 2, causal=True)),
        bp.residual(bp.layer_norm(), bp.dense(6), bp.gelu(), bp.dense(4)),
    )
    return bp.tied_embedding(7, 4, bp.learned_positions(8), bp.stack(block, 2), bp.layer_norm())


def gpt2_torch(p, tokens, following):
    table, positions, blocks, norm = p
    x = t.embedded(table, tokens) + positions["weight"][: tokens.shape[1]]
    for (norm1, attention), (norm2, widen, _, narrow) in t.layers(blocks):
        sees = t.causal(tokens.shape[1])
        x = x + t.self_attention(attention, t.layer_norm(norm1, x), 2, sees)
        hidden = t.gelu(t.dense(widen, t.layer_norm(norm2, x)), approximate="tanh")
        x = x + t.dense(narrow, hidden)
    return t.cross_entropy(t.layer_norm(norm, x) @ table["weight"].mT, following)


def bert():
    """BERT, which classifies pairs of sentences by the vector of the first token.

    Inputs are ((tokens, segments), mask). Norms stand after each sum.
    """

    def masked_bert(mask):
        block = bp.chain(
            *(bp.residual(bp.attention(4, 2, mask=mask)), bp.layer_norm()),
            *(bp.residual(bp.dense(6), bp.gelu(approximate=False), bp.dense(4)), bp.layer_norm()),
        )
        return bp.chain(
            bp.parallel(bp.embedding(9, 4), bp.embedding(2, 4)),
            *(bp.learned_positions(8), bp.layer_norm(), block, block),
            *(bp.take(0), bp.dense(4), bp.tanh(), bp.dense(3)),
        )

    return bp.masked(masked_bert)


def bert_torch(p, inputs, labels):
    (words, segments), positions, norm, *blocks, _, pooler, _, logits = p
    (tokens, which), mask = inputs
    x = t.embedded(words, tokens) + t.embedded(segments, which)
    x = t.layer_norm(norm, x + positions["weight"][: tokens.shape[1]])
    for attention, norm1, (widen, _, narrow), norm2 in blocks:
        sees = mask[:, None, None, :]
        x = t.layer_norm(norm1, x + t.self_attention(attention, x, 2, sees))
        x = t.layer_norm(norm2, x + t.dense(narrow, t.gelu(t.dense(widen, x))))
    return t.cross_entropy(t.dense(logits, t.dense(pooler, x[:, 0]).tanh()), labels)


def bloom():
    """BLOOM: scores fall with the distance (ALiBi), and no positions are added to the tokens."""
    heads, position = 2, np.arange(5.0)
    rates = 2.0 ** (-8 * np.arange(1, heads + 1) / heads)
    distances = position[:, None] - position
    bias = -rates[None, :, None, None] * distances
    block = bp.chain(
        bp.residual(bp.layer_norm(), bp.attention(4, heads, causal=True, bias=bias)),
        bp.residual(bp.layer_norm(), bp.dense(6), bp.gelu(), bp.dense(4)),
    )
    return bp.tied_embedding(7, 4, bp.layer_norm(), block, block, bp.layer_norm())


def bloom_torch(p, tokens, following):
    """By the form of the paper: a bias for each key alone, which is the same to a softmax."""
    import torch

    table, norm0, *blocks, norm = p
    slopes = torch.tensor([1 / 16, 1 / 256], dtype=torch.float64)[:, None, None]
    bias = slopes * torch.arange(tokens.shape[1])
    sees = t.causal(tokens.shape[1])
    x = t.layer_norm(norm0, t.embedded(table, tokens))
    for (norm1, attention), (norm2, widen, _, narrow) in blocks:
        x = x + t.self_attention(attention, t.layer_norm(norm1, x), 2, sees, bias=bias)
        hidden = t.gelu(t.dense(widen, t.layer_norm(norm2, x)), approximate="tanh")
        x = x + t.dense(narrow, hidden)
    return t.cross_entropy(t.layer_norm(norm, x) @ table["weight"].mT, following)


def gpt_neox():
    """GPT-NeoX: attention and the feed-forward network side by side, and half of a head rotates."""
    rotary = bp.Rotary(size=2)
    attention = bp.attention(4, 2, head_size=4, causal=True, rotary=rotary)
    feed_forward = bp.dense(6), bp.gelu(approximate=False), bp.dense(4)
    branches = bp.chain(bp.layer_norm(), attention), bp.chain(bp.layer_norm(), *feed_forward)
    block = bp.residual(bp.parallel(*branches))
    return bp.chain(bp.embedding(7, 4), block, block, bp.layer_norm(), bp.dense(7, use_bias=False))


def gpt_neox_torch(p, tokens, following):
    import torch

    def rotated(heads):
        """By angles 0, 1, 2, ...: there is one pair of values in each head."""
        angle = torch.arange(tokens.shape[1], dtype=heads.dtype)
        a, b, *rest = heads.unbind(-1)
        a, b = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
        return torch.stack([a, b, *rest], -1)

    def attend(p, x):
        joint, _, out = p
        q, k, v = (t.heads(a, 2) for a in t.dense(joint, x).chunk(3, -1))
        sees = t.causal(tokens.shape[1])
        return t.dense(out, t.joined(t.attend(rotated(q), rotated(k), v, sees)))

    table, *blocks, norm, logits = p
    x = t.embedded(table, tokens)
    for (norm1, attention), (norm2, widen, _, narrow) in blocks:
        y = t.dense(narrow, t.gelu(t.dense(widen, t.layer_norm(norm2, x))))
        x = x + attend(attention, t.layer_norm(norm1, x)) + y
    return t.cross_entropy(t.dense(logits, t.layer_norm(norm, x)), following)


def t5():
    """T5 (version 1.1): scores depend on the distance, and are not divided by a root.

    Inputs are (target, source). In the paper the bias of each distance is learned, and large
    distances share one. Here it is a constant, as attention takes it.
    """

    def relative_bias(length):
        """A number for each head and each distance from a key to a query."""
        distance = np.arange(length)[:, None] - np.arange(length)
        return np.stack([np.cos(distance), np.sin(distance)])[None]

    def attention(length, **options):
        bias = relative_bias(length)
        layer = bp.attention(4, 2, use_bias=False, scale=1.0, bias=bias, **options)
        return bp.residual(bp.rms_norm(), layer)

    def dense(features):
        return bp.dense(features, use_bias=False)

    geglu = bp.gated(dense(5), bp.chain(dense(5), bp.gelu()))
    feed_forward = bp.residual(bp.rms_norm(), geglu, dense(4))
    encoder = attention(4), feed_forward, bp.rms_norm()
    cross_attention = bp.cross_attention(4, 2, use_bias=False, scale=1.0)
    decoder = bp.chain(
        bp.on(0, attention(3, causal=True)),
        bp.residual(bp.on(0, bp.rms_norm()), cross_attention, at=0),
        bp.on(0, feed_forward, bp.rms_norm()),
    )
    return bp.chain(
        *(bp.shared(bp.embedding(7, 4)), bp.on(1, *encoder), decoder),
        *(bp.select(0), dense(7)),
    )


def t5_torch(p, inputs, following):
    import torch

    def attend(p, x, sees=None):
        norm, attention = p
        distance = torch.arange(x.shape[1], dtype=x.dtype)[:, None] - torch.arange(x.shape[1])
        bias = torch.stack([distance.cos(), distance.sin()])
        normed = t.rms_norm(norm, x, 1e-6)
        return x + t.self_attention(attention, normed, 2, sees, bias=bias, scale=1.0)

    def feed_forward(p, x):
        norm, (values, (gate, _)), out = p
        y = t.rms_norm(norm, x, 1e-6)
        return x + t.dense(out, t.dense(values, y) * t.gelu(t.dense(gate, y), approximate="tanh"))

    table, encoder, (attention, (norm1, cross), decoder), _, logits = p
    target, source = (t.embedded(table, tokens) for tokens in inputs)
    memory = t.rms_norm(encoder[2], feed_forward(encoder[1], attend(encoder[0], source)), 1e-6)
    x = attend(attention, target, t.causal(target.shape[1]))
    x = x + t.cross_attention(cross, t.rms_norm(norm1, x, 1e-6), memory, 2, scale=1.0)
    x = t.rms_norm(decoder[1], feed_forward(decoder[0], x), 1e-6)
    return t.cross_entropy(t.dense(logits, x), following)


ARCHITECTURES = {
    "GPT-2": Architecture(
        "Language Models are Unsupervised Multitask Learners, Radford, Wu, Child, Luan, Amodei, "
        "Sutskever, 2019",
        gpt2,
        Tokens(7, (5,)),
        bp.softmax_cross_entropy,
        Tokens(7, (5,)),
        gpt2_torch,
    ),
    "BERT": Architecture(
        "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding, Devlin, "
        "Chang, Lee, Toutanova, 2019",
        bert,
        ((Tokens(9, (5,)), Tokens(2, (5,))), Among((False, True, True), (5,))),
        bp.softmax_cross_entropy,
        Tokens(3),
        bert_torch,
    ),
    "BLOOM": Architecture(
        "BLOOM: A 176B-Parameter Open-Access Multilingual Language Model, BigScience Workshop, "
        "2022; Train Short, Test Long: Attention with Linear Biases Enables Input Length "
        "Extrapolation, Press, Smith, Lewis, 2022",
        bloom,
        Tokens(7, (5,)),
        bp.softmax_cross_entropy,
        Tokens(7, (5,)),
        bloom_torch,
    ),
    "GPT-NeoX": Architecture(
        "GPT-NeoX-20B: An Open-Source Autoregressive Language Model, Black et al., 2022",
        gpt_neox,
        Tokens(7, (5,)),
        bp.softmax_cross_entropy,
        Tokens(7, (5,)),
        gpt_neox_torch,
    ),
    "T5": Architecture(
        "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, "
        "Raffel, Shazeer, Roberts, Lee, Narang, Matena, Zhou, Li, Liu, 2020",
        t5,
        (Tokens(7, (3,)), Tokens(7, (4,))),
        bp.softmax_cross_entropy,
        Tokens(7, (3,)),
        t5_torch,
    ),
}
