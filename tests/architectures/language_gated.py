"""Transformers of text with gated feed-forward networks, and with mixtures of experts."""

import torch_functions as t
from architecture import Architecture, Tokens

import jaxbp as bp

EPS = 1e-6  # of `rms_norm`


def feed_forward(activation):
    """A gated feed-forward network: SwiGLU with silu, GeGLU with gelu."""
    gate = bp.chain(bp.dense(5, use_bias=False), activation)
    return bp.chain(bp.gated(bp.dense(5, use_bias=False), gate), bp.dense(4, use_bias=False))


def feed_forward_torch(p, x, activation):
    (values, (gate, _)), out = p
    return t.dense(out, t.dense(values, x) * activation(t.dense(gate, x)))


def llama_attention(**options):
    """Two heads of size 4 that share one key and one value."""
    rotary_heads = {"kv_heads": 1, "head_size": 4, "causal": True, "rotary": True}
    return bp.attention(4, 2, use_bias=False, **rotary_heads, **options)


def rotated(x):
    """Rotary embedding of heads [N, H, T, 4]: pairs of values as complex numbers."""
    import torch

    frequencies = 10000.0 ** -torch.tensor([0.0, 0.5], dtype=x.dtype)
    angles = torch.arange(x.shape[2])[:, None] * frequencies
    pairs = torch.complex(x[..., :2], x[..., 2:]) * torch.exp(1j * angles)
    return torch.cat([pairs.real, pairs.imag], -1)


def llama_attention_torch(p, x, sees=None, attend=t.attend):
    joint, _, out = p
    q, k, v = t.dense(joint, x).split([8, 4, 4], -1)
    q, k, v = rotated(t.heads(q, 2)), rotated(t.heads(k, 1)), t.heads(v, 1)
    sees = t.causal(x.shape[1]) if sees is None else sees
    return t.dense(out, t.joined(attend(q, k, v, sees)))


def llama():
    """Llama: RMS norm, rotary positions, heads that share keys and values, and SwiGLU."""
    block = bp.chain(
        bp.residual(bp.rms_norm(), llama_attention()),
        bp.residual(bp.rms_norm(), feed_forward(bp.silu())),
    )
    return bp.chain(
        bp.embedding(7, 4), bp.stack(block, 2), bp.rms_norm(), bp.dense(7, use_bias=False)
    )


def llama_torch(p, tokens, following):
    from torch.nn.functional import silu

    table, blocks, norm, logits = p
    x = t.embedded(table, tokens)
    for (norm1, attention), (norm2, *gated) in t.layers(blocks):
        x = x + llama_attention_torch(attention, t.rms_norm(norm1, x, EPS))
        x = x + feed_forward_torch(gated[0], t.rms_norm(norm2, x, EPS), silu)
    return t.cross_entropy(t.dense(logits, t.rms_norm(norm, x, EPS)), following)


def gemma2():
    """Gemma 2: norms before and after each part, soft caps, and windows in every second block.

    Its gains are written as 1 + g there.
    """

    def block(**options):
        return bp.chain(
            bp.residual(bp.rms_norm(), llama_attention(soft_cap=2.0, **options), bp.rms_norm()),
            bp.residual(bp.rms_norm(), feed_forward(bp.gelu()), bp.rms_norm()),
        )

    transformer = bp.tied_embedding(
        *(7, 4, bp.scale(2.0), block(window=2), block(), bp.rms_norm()),
    )
    return bp.chain(transformer, bp.scale(1 / 3), bp.tanh(), bp.scale(3.0))


def gemma2_torch(p, tokens, following):
    import torch

    def capped_attention(q, k, v, sees):
        scores = 2 * torch.tanh(q @ k.mT / 2 / 2)
        return torch.softmax(scores.masked_fill(~sees, -torch.inf), -1) @ v

    (table, _, *blocks, norm), *_ = p
    x = 2 * t.embedded(table, tokens)
    position = torch.arange(tokens.shape[1])
    for window, block in zip((2, 99), blocks, strict=True):
        (norm1, attention, norm2), (norm3, *gated, norm4) = block
        sees = t.causal(len(position)) & (position[:, None] - position < window)
        y = t.rms_norm(norm1, x, EPS)
        x = x + t.rms_norm(norm2, llama_attention_torch(attention, y, sees, capped_attention), EPS)
        y = t.rms_norm(norm3, x, EPS)
        y = feed_forward_torch(gated[0], y, lambda x: t.gelu(x, approximate="tanh"))
        x = x + t.rms_norm(norm4, y, EPS)
    logits = t.rms_norm(norm, x, EPS) @ table["weight"].mT
    return t.cross_entropy(3 * torch.tanh(logits / 3), following)


def mixtral():
    """Mixtral: Llama's blocks, with two of three experts for each token."""
    experts = [feed_forward(bp.silu()) for _ in range(3)]
    router = bp.dense(3, use_bias=False)
    block = bp.chain(
        bp.residual(bp.rms_norm(), llama_attention()),
        bp.residual(bp.rms_norm(), bp.mixture(router, *experts, top_k=2)),
    )
    return bp.chain(bp.embedding(7, 4), block, bp.rms_norm(), bp.dense(7, use_bias=False))


def mixtral_torch(p, tokens, following):
    """Each token is sent to its own experts alone."""
    import torch
    from torch.nn.functional import silu

    def mixture(router, experts, x):
        largest = t.dense(router, x).topk(2)
        weights = torch.softmax(largest.values, -1)
        routes = zip(largest.indices, weights, strict=True)
        return sum(w * feed_forward_torch(experts[k], x, silu) for k, w in routes)

    table, ((norm1, attention), (norm2, (router, *experts))), norm, logits = p
    x = t.embedded(table, tokens)
    x = x + llama_attention_torch(attention, t.rms_norm(norm1, x, EPS))
    positions = t.rms_norm(norm2, x, EPS).flatten(0, 1)
    x = x + torch.stack([mixture(router, experts, y) for y in positions]).view_as(x)
    return t.cross_entropy(t.dense(logits, t.rms_norm(norm, x, EPS)), following)


def switch_transformer():
    """Switch Transformer: one of three experts for each token, times its probability.

    The router learns from this factor alone, which is the largest of its probabilities. The loss
    that balances the experts over a batch is left out.
    """
    experts = [bp.chain(bp.select(0), bp.dense(5), bp.relu(), bp.dense(4)) for _ in range(3)]
    largest = bp.reshape(5, 3, 1), bp.max_pool((1, 3)), bp.reshape(5, 1)
    probability = bp.chain(bp.select(1), bp.softmax(), *largest)
    switch = bp.chain(
        bp.fork(bp.chain(), bp.dense(3, use_bias=False)),  # tokens, and the router's outputs
        bp.gated(bp.mixture(bp.select(1), *experts, top_k=1), probability),
    )
    return bp.chain(
        *(bp.embedding(7, 4), bp.residual(bp.rms_norm(), bp.attention(4, 2, causal=True))),
        *(bp.residual(bp.rms_norm(), switch), bp.rms_norm(), bp.dense(7)),
    )


def switch_transformer_torch(p, tokens, following):
    import torch

    table, (norm1, attention), (norm2, ((_, router), ((_, *experts), _))), norm3, logits = p
    x = t.embedded(table, tokens)
    x = x + t.self_attention(attention, t.rms_norm(norm1, x, EPS), 2, t.causal(tokens.shape[1]))
    y = t.rms_norm(norm2, x, EPS)
    probabilities = torch.softmax(t.dense(router, y), -1)
    chosen = probabilities.argmax(-1, keepdim=True)
    outputs = [t.dense(narrow, t.dense(widen, y).relu()) for _, widen, _, narrow in experts]
    switched = sum((chosen == k) * output for k, output in enumerate(outputs))
    x = x + probabilities.gather(-1, chosen) * switched
    return t.cross_entropy(t.dense(logits, t.rms_norm(norm3, x, EPS)), following)


ARCHITECTURES = {
    "Llama": Architecture(
        "Llama 2: Open Foundation and Fine-Tuned Chat Models, Touvron et al., 2023",
        llama,
        Tokens(7, (5,)),
        bp.softmax_cross_entropy,
        Tokens(7, (5,)),
        llama_torch,
    ),
    "Gemma 2": Architecture(
        "Gemma 2: Improving Open Language Models at a Practical Size, Gemma Team, 2024",
        gemma2,
        Tokens(7, (5,)),
        bp.softmax_cross_entropy,
        Tokens(7, (5,)),
        gemma2_torch,
    ),
    "Mixtral": Architecture(
        "Mixtral of Experts, Jiang et al., 2024",
        mixtral,
        Tokens(7, (5,)),
        bp.softmax_cross_entropy,
        Tokens(7, (5,)),
        mixtral_torch,
    ),
    "Switch Transformer": Architecture(
        "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient "
        "Sparsity, Fedus, Zoph, Shazeer, 2022",
        switch_transformer,
        Tokens(7, (5,)),
        bp.softmax_cross_entropy,
        Tokens(7, (5,)),
        switch_transformer_torch,
    ),
}
