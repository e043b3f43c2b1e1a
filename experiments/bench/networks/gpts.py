"""The same transformer four times: in the library, in plain jax.numpy, in Flax and in PyTorch.

Each is written as its own users write it: a causal language model of blocks that normalise first,
of attention and a feed-forward network of four times the features with gelu, whose loss is the mean
over examples of the sum over positions. All four start from the same weights. Those of the library
are carried over by name:

  library                    Flax                                   PyTorch
  qkv weight [D, 3 D]        query, key, value kernels [D, H, d]    qkv weight [3 D, D]
  output weight [D, D]       out kernel [H, d, D]                   out weight [D, D], transposed
  weight [I, O]              kernel [I, O]                          weight [O, I]
  gain, bias                 scale, bias                            weight, bias

so that gradients can be carried over in the same way, and compared.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbp as bp
from experiments.bench.peers import flax_mean_loss_of, flax_state_of
from experiments.bench.trainers import mean_cross_entropy

EPS = 1e-5  # of all normalisations


class Gpt(NamedTuple):
    """A causal language model of L blocks, D features and H heads; T positions, in batches of N.

    Attributes:
      scanned: whether the blocks are one loop, in place of code for each.
      recomputed: whether the way back computes anew what is inside a block.
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


def make_gpt(gpt, *, dtype=jnp.float32):
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
    """The mean loss on the library's parameters, without it: as one writes it for autodiff."""
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


def flax_mean_loss(gpt):
    """Of the network in Flax: its mean loss as a function of a state, tokens and labels."""
    return flax_mean_loss_of(functools.partial(make_flax_gpt, gpt))


def make_flax_gpt(gpt):
    from flax import nnx

    features, heads, length = gpt.features, gpt.heads, gpt.length

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm_1 = nnx.LayerNorm(features, epsilon=EPS, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(heads, features, decode=False, rngs=rngs)
            self.norm_2 = nnx.LayerNorm(features, epsilon=EPS, rngs=rngs)
            self.wide = nnx.Linear(features, 4 * features, rngs=rngs)
            self.narrow = nnx.Linear(4 * features, features, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norm_1(x), is_causal=True)
            return x + self.narrow(nnx.gelu(self.wide(self.norm_2(x))))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.tokens = nnx.Embed(gpt.vocabulary, features, rngs=rngs)
            self.positions = nnx.Embed(length, features, rngs=rngs)
            if gpt.scanned:
                split = nnx.split_rngs(splits=gpt.blocks)
                self.blocks = split(nnx.vmap(Block, in_axes=0, out_axes=0))(rngs)
            else:
                self.blocks = nnx.List([Block(rngs) for _ in range(gpt.blocks)])
            self.norm = nnx.LayerNorm(features, epsilon=EPS, rngs=rngs)
            self.head = nnx.Linear(features, gpt.vocabulary, rngs=rngs)

        def __call__(self, tokens):
            def apply(x, block):
                return block(x)

            if gpt.recomputed:
                apply = nnx.remat(apply)
            x = self.tokens(tokens) + self.positions(jnp.arange(length))
            if gpt.scanned:
                x = nnx.scan(apply, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
            else:
                for block in self.blocks:
                    x = apply(x, block)
            return self.head(self.norm(x))

    return Model(nnx.Rngs(0))


def flax_state(gpt, params):
    """The parameters of the library, or their gradients, as a state of the network in Flax."""
    return flax_state_of(functools.partial(make_flax_gpt, gpt), flax_weights(gpt, params))


def flax_weights(gpt, params):
    """By name, as Flax has them."""
    embedding, positions, *blocks, last, head = params

    def norm(params):
        return {"scale": params["gain"], "bias": params["bias"]}

    def linear(params):
        return {"kernel": params["weight"], "bias": params["bias"]}

    def block(params):
        (norm_1, (qkv, _, out)), (norm_2, wide, _, narrow) = params
        kernels = jnp.split(qkv["weight"].reshape(gpt.features, 3 * gpt.heads, -1), 3, axis=1)
        biases = jnp.split(qkv["bias"].reshape(3 * gpt.heads, -1), 3)
        attention = {
            name: {"kernel": kernel, "bias": bias}
            for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
        }
        kernel = out["weight"].reshape(gpt.heads, -1, gpt.features)
        return {
            "norm_1": norm(norm_1),
            "attention": {**attention, "out": {"kernel": kernel, "bias": out["bias"]}},
            "norm_2": norm(norm_2),
            "wide": linear(wide),
            "narrow": linear(narrow),
        }

    return {
        "tokens": {"embedding": embedding["weight"]},
        "positions": {"embedding": positions["weight"]},
        "blocks": (
            jax.vmap(block)(blocks[0].layers)
            if gpt.scanned
            else dict(enumerate(map(block, blocks)))
        ),
        "norm": norm(last),
        "head": linear(head),
    }


def make_torch_gpt(gpt, params):
    """The network in PyTorch, with the library's weights."""
    import torch
    from torch import nn
    from torch.nn import functional

    features, heads = gpt.features, gpt.heads

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_1 = nn.LayerNorm(features, eps=EPS)
            self.qkv = nn.Linear(features, 3 * features)
            self.out = nn.Linear(features, features)
            self.norm_2 = nn.LayerNorm(features, eps=EPS)
            self.wide = nn.Linear(features, 4 * features)
            self.narrow = nn.Linear(4 * features, features)

        def attend(self, x):
            n, t, _ = x.shape
            q, k, v = self.qkv(x).view(n, t, 3 * heads, -1).transpose(1, 2).chunk(3, dim=1)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).reshape(n, t, features))

        def forward(self, x):
            x = x + self.attend(self.norm_1(x))
            hidden = functional.gelu(self.wide(self.norm_2(x)), approximate="tanh")
            return x + self.narrow(hidden)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(gpt.vocabulary, features)
            self.positions = nn.Embedding(gpt.length, features)
            self.blocks = nn.Sequential(*(Block() for _ in range(gpt.blocks)))
            self.norm = nn.LayerNorm(features, eps=EPS)
            self.head = nn.Linear(features, gpt.vocabulary)

        def forward(self, tokens):
            x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
            return self.head(self.norm(self.blocks(x)))

    model = Model()
    weights = torch_weights(params)
    model.load_state_dict({name: torch.tensor(np.asarray(w)) for name, w in weights.items()})
    return model


def torch_weights(params):
    """By name, as PyTorch has them."""
    embedding, positions, *blocks, last, head = params
    weights = {"tokens.weight": embedding["weight"], "positions.weight": positions["weight"]}

    def norm(name, params):
        weights.update({f"{name}.weight": params["gain"], f"{name}.bias": params["bias"]})

    def linear(name, params):
        weights.update({f"{name}.weight": params["weight"].T, f"{name}.bias": params["bias"]})

    for i, ((norm_1, (qkv, _, out)), (norm_2, wide, _, narrow)) in enumerate(blocks):
        norm(f"blocks.{i}.norm_1", norm_1)
        linear(f"blocks.{i}.qkv", qkv)
        linear(f"blocks.{i}.out", out)
        norm(f"blocks.{i}.norm_2", norm_2)
        linear(f"blocks.{i}.wide", wide)
        linear(f"blocks.{i}.narrow", narrow)
    norm("norm", last)
    linear("head", head)
    return weights


def torch_mean_loss(logits, labels):
    """The mean over examples of the sum over positions."""
    from torch.nn import functional

    total = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / len(labels)


def make_tokens(gpt, seed, *, n=None):
    """Random tokens [N, T], and as labels what follows each of them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(gpt.vocabulary, size=(n or gpt.n, gpt.length + 1), dtype=np.int32)
    return tokens[:, :-1], tokens[:, 1:]
