"""Models of Flax, Equinox and Haiku, as their users write them. Each library is imported late."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from functions import ONE
from opened import Model, N, normal, tokens
from oracles import TOLERANCE

F = jnp.float64


class LibraryCase(NamedTuple):
    """A model, made when it is needed, and whether it stands for its library in every run."""

    make: Callable[[], Model]
    always: bool = False
    tolerance: float = TOLERANCE["float64"]


def linen(module, x, **options):
    return Model(module.apply, module.init(jax.random.key(1), x), x, options)


def linen_mlp():
    nn = pytest.importorskip("flax.linen")

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm(param_dtype=F)(nn.relu(nn.Dense(6, param_dtype=F)(x)))
            return nn.Dense(3, param_dtype=F)(nn.gelu(nn.Dense(5, param_dtype=F)(x)))

    return linen(Mlp(), normal(0, N, 4))


def linen_gpt(*, tied=False, scan=False, remat=False):
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, nothing=None):
            h = nn.LayerNorm(param_dtype=F)(x)
            mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
            attention = nn.MultiHeadDotProductAttention(num_heads=2, param_dtype=F)
            x = x + attention(h, h, mask=mask)
            h = nn.Dense(8, param_dtype=F)(nn.LayerNorm(param_dtype=F)(x))
            x = x + nn.Dense(4, param_dtype=F)(nn.gelu(h))
            return (x, None) if scan else x

    class Gpt(nn.Module):
        @nn.compact
        def __call__(self, t):
            embed = nn.Embed(11, 4, param_dtype=F)
            x = embed(t) + self.param("pos", nn.initializers.normal(0.1), (t.shape[1], 4), F)
            if scan:
                body = nn.remat(Block, prevent_cse=False) if remat else Block
                own = {"params": True}
                x, _ = nn.scan(body, variable_axes={"params": 0}, split_rngs=own, length=2)()(
                    x, None
                )
            else:
                for _ in range(2):
                    x = Block()(x)
            x = nn.LayerNorm(param_dtype=F)(x)
            return embed.attend(x) if tied else nn.Dense(11, param_dtype=F, use_bias=False)(x)

    return linen(Gpt(), tokens(0, N, 5))


def linen_lstm():
    nn = pytest.importorskip("flax.linen")

    class Lstm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, param_dtype=F)(nn.RNN(nn.OptimizedLSTMCell(3, param_dtype=F))(x))

    return linen(Lstm(), normal(0, N, 4, 2))


def linen_cnn():
    nn = pytest.importorskip("flax.linen")

    class Cnn(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Conv(4, (3, 2), param_dtype=F)(x))
            x = nn.Conv(4, (3, 3), strides=2, feature_group_count=2, param_dtype=F)(x)
            x = nn.Conv(4, (2, 2), feature_group_count=4, padding="VALID", param_dtype=F)(x)
            x = nn.ConvTranspose(3, (2, 2), strides=(2, 2), param_dtype=F)(nn.max_pool(x, (2, 1)))
            return nn.Dense(2, param_dtype=F)(x.reshape(len(x), -1))

    return linen(Cnn(), normal(0, N, 7, 6, 2))


def linen_resnet():
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        features: int
        strides: int = 1

        @nn.compact
        def __call__(self, x):
            conv = functools.partial(nn.Conv, use_bias=False, param_dtype=F)
            norm = functools.partial(nn.GroupNorm, 2, param_dtype=F)
            y = nn.relu(norm()(conv(self.features, (3, 3), self.strides)(x)))
            y = norm()(conv(self.features, (3, 3))(y))
            if x.shape != y.shape:
                x = conv(self.features, (1, 1), self.strides)(x)
            return nn.relu(x + y)

    class Resnet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Block(4, 2)(Block(2)(nn.Conv(2, (3, 3), use_bias=False, param_dtype=F)(x)))
            return nn.Dense(3, param_dtype=F)(x.mean((1, 2)))

    return linen(Resnet(), normal(0, N, 5, 5, 2))


def linen_weight_norm():
    nn = pytest.importorskip("flax.linen")

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = functools.partial(nn.WeightNorm, param_dtype=F)
            x = nn.tanh(norm(nn.Dense(4, param_dtype=F))(x))
            return nn.SpectralNorm(nn.Dense(3, param_dtype=F))(x, update_stats=False)

    x = normal(0, N, 5)
    model = Normed()
    variables = jax.tree.map(lambda a: a.astype(F), model.init(jax.random.key(1), x))
    rest = {k: v for k, v in variables.items() if k != "params"}
    return Model(lambda p, x: model.apply({"params": p, **rest}, x), variables["params"], x)


def linen_batch_norm():
    """In inference: the running averages are closed over."""
    nn = pytest.importorskip("flax.linen")

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True, param_dtype=F)(nn.Dense(4, param_dtype=F)(x))
            return nn.Dense(3, param_dtype=F)(nn.relu(x))

    x, model = normal(0, N, 5), Normed()
    variables = model.init(jax.random.key(1), x)
    stats = jax.tree.map(lambda a: a + 0.3, variables["batch_stats"])
    return Model(
        lambda p, x: model.apply({"params": p, "batch_stats": stats}, x), variables["params"], x
    )


def linen_dropout():
    nn = pytest.importorskip("flax.linen")

    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Dense(8, param_dtype=F)(x))
            return nn.Dense(3, param_dtype=F)(nn.Dropout(0.5, deterministic=not train)(x))

    x, model = normal(0, N, 5), Dropped()

    def f(p, x, key=None):
        return model.apply(p, x, key is not None, rngs=None if key is None else {"dropout": key})

    return Model(f, model.init(jax.random.key(1), x, False), x, {"draws": True})


def nnx_attention():
    nnx = pytest.importorskip("flax.nnx")

    class Attended(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(3, 4, rngs=rngs, param_dtype=F)
            self.norm = nnx.LayerNorm(4, rngs=rngs, param_dtype=F)
            self.attention = nnx.MultiHeadAttention(
                num_heads=2, in_features=4, decode=False, rngs=rngs, param_dtype=F
            )
            self.b = nnx.Linear(4, 2, rngs=rngs, param_dtype=F)

        def __call__(self, x):
            h = self.norm(nnx.gelu(self.a(x)))
            return self.b(h + self.attention(h))

    graph, params, rest = nnx.split(Attended(nnx.Rngs(0)), nnx.Param, ...)
    return Model(lambda p, x: nnx.merge(graph, p, rest)(x), params, normal(0, N, 4, 3))


def nnx_scan():
    nnx = pytest.importorskip("flax.nnx")

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def create(rngs):
        return nnx.Linear(4, 4, rngs=rngs, param_dtype=F)

    graph, params, rest = nnx.split(create(nnx.Rngs(0)), nnx.Param, ...)

    def f(p, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return x + jnp.tanh(layer(x))

        return run(x, nnx.merge(graph, p, rest))

    return Model(f, params, normal(0, N, 4))


def equinox(module, x):
    eqx = pytest.importorskip("equinox")
    params, static = eqx.partition(module, eqx.is_inexact_array)
    return Model(lambda p, x: eqx.combine(p, static)(x), params, x, ONE)


def equinox_mlp():
    eqx = pytest.importorskip("equinox")
    return equinox(eqx.nn.MLP(4, 3, 5, 2, key=jax.random.key(0)), normal(0, N, 4))


def equinox_attention():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)

    class Attended(eqx.Module):
        embed: eqx.nn.Embedding
        norm: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        out: eqx.nn.Linear

        def __call__(self, t):
            x = jax.vmap(self.embed)(t)
            h = jax.vmap(self.norm)(x)
            return jax.vmap(self.out)(x + self.attention(h, h, h))

    attention = eqx.nn.MultiheadAttention(2, 4, use_query_bias=True, key=keys[0])
    embed, out = eqx.nn.Embedding(11, 4, key=keys[1]), eqx.nn.Linear(4, 3, key=keys[2])
    return equinox(Attended(embed, eqx.nn.LayerNorm(4), attention, out), tokens(0, N, 5))


def equinox_convolution():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)
    first = eqx.nn.Conv2d(2, 4, 3, key=keys[0])
    second = eqx.nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1, key=keys[1])
    out = eqx.nn.Linear(6, 3, key=keys[2])

    class Cnn(eqx.Module):
        layers: list

        def __call__(self, x):
            first, *rest, out = self.layers
            x = first(x)
            for layer in rest:
                x = layer(x)
            return out(x.mean((1, 2)))

    layers = [first, eqx.nn.GroupNorm(2, 4), eqx.nn.PReLU(0.2), second, out]
    return equinox(Cnn(layers), normal(0, N, 2, 6, 5))


def equinox_gru():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 2)

    class Gru(eqx.Module):
        cell: eqx.nn.GRUCell
        out: eqx.nn.Linear

        def __call__(self, x):
            step = lambda h, now: (self.cell(now, h), None)  # noqa: E731
            return self.out(jax.lax.scan(step, jnp.zeros(3), x)[0])

    module = Gru(eqx.nn.GRUCell(2, 3, key=keys[0]), eqx.nn.Linear(3, 2, key=keys[1]))
    return equinox(module, normal(0, N, 4, 2))


def haiku(f, x):
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(hk.transform(f))
    params = jax.tree.map(lambda a: a.astype(F), model.init(jax.random.key(1), x))
    return Model(model.apply, params, x)


def haiku_mlp():
    hk = pytest.importorskip("haiku")
    return haiku(lambda x: hk.nets.MLP([5, 3])(x), normal(0, N, 4))


def haiku_transformer():
    hk = pytest.importorskip("haiku")

    def f(t):
        positions = hk.get_parameter("positions", (5, 4), init=hk.initializers.RandomNormal(0.1))
        x = hk.Embed(11, 4)(t) + positions
        h = hk.LayerNorm(-1, True, True)(x)
        init = hk.initializers.VarianceScaling(1.0)
        x = x + hk.MultiHeadAttention(2, 2, w_init=init, model_size=4)(h, h, h)
        h = jax.nn.gelu(hk.Linear(8)(hk.LayerNorm(-1, True, True)(x)))
        return hk.Linear(11)(x + hk.Linear(4)(h))

    return haiku(f, tokens(0, N, 5))


LIBRARIES = {
    "linen MLP": LibraryCase(linen_mlp, always=True),
    "linen GPT": LibraryCase(linen_gpt),
    "linen GPT, tied": LibraryCase(functools.partial(linen_gpt, tied=True)),
    "linen GPT, nn.scan": LibraryCase(functools.partial(linen_gpt, scan=True)),
    "linen GPT, nn.scan of nn.remat": LibraryCase(
        functools.partial(linen_gpt, scan=True, remat=True, tied=True)
    ),
    "linen LSTM": LibraryCase(linen_lstm),
    "linen CNN": LibraryCase(linen_cnn),
    "linen ResNet": LibraryCase(linen_resnet),
    "linen WeightNorm, SpectralNorm": LibraryCase(linen_weight_norm),
    "linen BatchNorm, inference": LibraryCase(linen_batch_norm),
    "linen Dropout": LibraryCase(linen_dropout),
    # Its softmax is computed in 32 bits.
    "nnx attention": LibraryCase(nnx_attention, tolerance=1e-6),
    "nnx.scan": LibraryCase(nnx_scan, always=True),
    "Equinox MLP": LibraryCase(equinox_mlp, always=True),
    "Equinox attention": LibraryCase(equinox_attention),
    "Equinox convolution": LibraryCase(equinox_convolution),
    "Equinox GRU": LibraryCase(equinox_gru),
    "Haiku MLP": LibraryCase(haiku_mlp, always=True),
    "Haiku transformer": LibraryCase(haiku_transformer),
}
