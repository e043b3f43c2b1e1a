"""A causal language model in the library and in plain JAX, and random tokens for it.

Each block normalises its inputs first and consists of attention and a feed-forward network of four
times the features with gelu. The loss is the mean over examples of the sum over positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbp as bp
from experiments.bench.networks.sides import (
    autodiff_side,
    explicit_side,
    mean_cross_entropy,
    same_layers_side,
)

EPS = 1e-5  # of all normalisations


class Gpt(NamedTuple):
    """A causal language model of L blocks, D features and H heads; T positions, in batches of N.

    Attributes:
      scanned: whether the blocks are one loop (`lax.scan`) instead of code for each block.
      recomputed: whether the backward pass recomputes what is inside a block.
    """

    blocks: int
    features: int
    heads: int
    length: int
    n: int
    vocabulary: int = 96
    scanned: bool = False
    recomputed: bool = False

    def __str__(self):
        return f"{self.blocks}x{self.features}, H = {self.heads}, T = {self.length}, N = {self.n}"


def make_block(gpt, *, dtype=jnp.float32):
    attention = bp.attention(gpt.features, gpt.heads, causal=True, dtype=dtype)
    widths = 4 * gpt.features, gpt.features
    wide, narrow = (bp.dense(width, dtype=dtype) for width in widths)
    return bp.chain(
        bp.residual(bp.layer_norm(eps=EPS, dtype=dtype), attention),
        bp.residual(bp.layer_norm(eps=EPS, dtype=dtype), wide, bp.gelu(), narrow),
    )


def make_net(gpt, *, dtype=jnp.float32):
    """The network in the library."""
    block = make_block(gpt, dtype=dtype)
    if gpt.recomputed:
        block = bp.remat(block)
    return bp.chain(
        bp.embedding(gpt.vocabulary, gpt.features, dtype=dtype),
        bp.learned_positions(gpt.length, dtype=dtype),
        *([bp.stack(block, gpt.blocks)] if gpt.scanned else [block] * gpt.blocks),
        bp.layer_norm(eps=EPS, dtype=dtype),
        bp.dense(gpt.vocabulary, dtype=dtype),
    )


def plain_mean_loss(gpt):
    """The mean loss of the library's parameters, as one writes it in JAX without the library."""
    heads = gpt.heads

    def norm(params, x):
        mean = jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.var(x, axis=-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + EPS) * params["gain"] + params["bias"]

    def dense(params, x):
        return x @ params["weight"] + params["bias"]

    def attend(x):
        n, t, _ = x.shape
        q, k, v = jnp.split(x.reshape(n, t, 3 * heads, -1), 3, axis=2)
        scores = jnp.einsum("nthd,nshd->nhts", q, k) / q.shape[-1] ** 0.5
        seen = jnp.tril(jnp.ones((t, t), bool))
        probabilities = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        return jnp.einsum("nhts,nshd->nthd", probabilities, v).reshape(n, t, -1)

    def block(x, params):
        (norm_1, (qkv, _, out)), (norm_2, wide, _, narrow) = params
        x = x + dense(out, attend(dense(qkv, norm(norm_1, x))))
        return x + dense(narrow, jax.nn.gelu(dense(wide, norm(norm_2, x))))

    if gpt.recomputed:
        block = jax.checkpoint(block)

    def mean_loss(params, tokens, labels):
        embedding, positions, *blocks, last, head = params
        x = embedding["weight"][tokens] + positions["weight"]
        if gpt.scanned:
            x, _ = jax.lax.scan(lambda x, params: (block(x, params), None), x, blocks[0].layers)
        else:
            for params in blocks:
                x = block(x, params)
        return mean_cross_entropy(dense(head, norm(last, x)), labels)

    return mean_loss


explicit = explicit_side(make_net)
same_layers = same_layers_side(make_net)
plain = autodiff_side(plain_mean_loss)


def make_case(gpt, seed):
    """The library's parameters, and one batch of tokens and labels."""
    params, _ = make_net(gpt).init(jax.random.key(seed), (gpt.length,))
    return params, *map(jnp.asarray, make_tokens(gpt, seed))


def make_tokens(gpt, seed, *, n=None):
    """Random tokens [N, T], and as labels the next token at each position."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(gpt.vocabulary, size=(n or gpt.n, gpt.length + 1), dtype=np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def step_products(gpt):
    """FLOP of the matrix products that one gradient takes: three for each matrix.

    Attention has two products in the forward pass and four in the backward pass. Each position
    needs those with the positions that it attends to, half of all.
    """
    matrices = 12 * gpt.blocks * gpt.features**2 + gpt.features * gpt.vocabulary
    seen = gpt.length * (gpt.length + 1) / 2
    attention = 6 * 2 * gpt.n * gpt.blocks * gpt.features * seen
    return 3 * 2 * gpt.n * gpt.length * matrices + attention
