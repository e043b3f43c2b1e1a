"""Transformers of text that are widely known: GPT-2, BERT, T5 and BLOOM."""

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
}
