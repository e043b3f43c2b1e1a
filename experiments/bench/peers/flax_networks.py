"""The networks in Flax, as its own users write them, with the library's weights.

The weights are carried over by name:

  library                          Flax
  qkv weight [D, 3 D]              query, key and value kernels [D, H, d]
  output weight [D, D]             out kernel [H, d, D]
  weight [I, O]                    kernel [I, O]
  kernel [3, 3, I, O]              kernel [3, 3, I, O]
  gain, bias of a normalisation    scale, bias

Gradients are carried over in the same way, so that they can be compared.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.loops import OPTIMIZERS
from experiments.bench.networks import convnets, gpts, recurrent
from experiments.bench.networks.sides import mean_cross_entropy


def make_apply(make_model):
    """A network as a function of its state and inputs."""
    from flax import nnx

    graph = nnx.graphdef(nnx.eval_shape(make_model))

    def apply(state, inputs):
        return nnx.merge(graph, state)(inputs)

    return apply


def make_mean_loss(make_model):
    """The mean loss of a network, as a function of its state, inputs and labels."""
    apply = make_apply(make_model)

    def mean_loss(state, inputs, labels):
        return mean_cross_entropy(apply(state, inputs), labels)

    return mean_loss


def make_state(make_model, weights):
    """The state of a network with these weights by name."""
    from flax import nnx

    state = nnx.state(nnx.eval_shape(make_model), nnx.Param)
    nnx.replace_by_pure_dict(state, weights)
    return state


def gpt(case):
    from flax import nnx

    features, heads, length = case.features, case.heads, case.length

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm_1 = nnx.LayerNorm(features, epsilon=gpts.EPS, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(heads, features, decode=False, rngs=rngs)
            self.norm_2 = nnx.LayerNorm(features, epsilon=gpts.EPS, rngs=rngs)
            self.wide = nnx.Linear(features, 4 * features, rngs=rngs)
            self.narrow = nnx.Linear(4 * features, features, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norm_1(x), is_causal=True)
            return x + self.narrow(nnx.gelu(self.wide(self.norm_2(x))))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.tokens = nnx.Embed(case.vocabulary, features, rngs=rngs)
            self.positions = nnx.Embed(length, features, rngs=rngs)
            if case.scanned:
                split = nnx.split_rngs(splits=case.blocks)
                self.blocks = split(nnx.vmap(Block, in_axes=0, out_axes=0))(rngs)
            else:
                self.blocks = nnx.List([Block(rngs) for _ in range(case.blocks)])
            self.norm = nnx.LayerNorm(features, epsilon=gpts.EPS, rngs=rngs)
            self.head = nnx.Linear(features, case.vocabulary, rngs=rngs)

        def __call__(self, tokens):
            def apply(x, block):
                return block(x)

            if case.recomputed:
                apply = nnx.remat(apply)
            x = self.tokens(tokens) + self.positions(jnp.arange(length))
            if case.scanned:
                x = nnx.scan(apply, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
            else:
                for block in self.blocks:
                    x = apply(x, block)
            return self.head(self.norm(x))

    return Model(nnx.Rngs(0))


def gpt_weights(case, params):
    """The library's parameters, or their gradients, by their names in Flax."""
    embedding, positions, *blocks, last, head = params

    def norm(params):
        return {"scale": params["gain"], "bias": params["bias"]}

    def linear(params):
        return {"kernel": params["weight"], "bias": params["bias"]}

    def block(params):
        (norm_1, (qkv, _, out)), (norm_2, wide, _, narrow) = params
        kernels = jnp.split(qkv["weight"].reshape(case.features, 3 * case.heads, -1), 3, axis=1)
        biases = jnp.split(qkv["bias"].reshape(3 * case.heads, -1), 3)
        attention = {
            name: {"kernel": kernel, "bias": bias}
            for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
        }
        kernel = out["weight"].reshape(case.heads, -1, case.features)
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
            if case.scanned
            else dict(enumerate(map(block, blocks)))
        ),
        "norm": norm(last),
        "head": linear(head),
    }


def gpt_state(case, params):
    return make_state(functools.partial(gpt, case), gpt_weights(case, params))


def gpt_side(case, params, tokens, labels):
    mean_loss = make_mean_loss(functools.partial(gpt, case))
    return jax.value_and_grad(mean_loss), gpt_state(case, params), tokens, labels


def convnet(case):
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            ends = itertools.pairwise((case.inputs, *case.channels))
            self.convs = nnx.List([nnx.Conv(i, o, (3, 3), rngs=rngs) for i, o in ends])
            features = case.last_size**2 * case.channels[-1]
            self.head = nnx.Linear(features, convnets.CLASSES, rngs=rngs)

        def __call__(self, x):
            for conv in self.convs:
                x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), strides=(2, 2))
            return self.head(x.reshape(len(x), -1))

    return Model(nnx.Rngs(0))


def convnet_state(case, params):
    """The library's parameters, or their gradients, as a state in Flax."""

    def renamed(layer):
        return {"kernel": layer["weight"], "bias": layer["bias"]}

    convolutions, last = convnets.kernels_and_last(params)
    weights = {"convs": dict(enumerate(map(renamed, convolutions))), "head": renamed(last)}
    return make_state(functools.partial(convnet, case), weights)


def convnet_side(case, params, images, labels):
    mean_loss = make_mean_loss(functools.partial(convnet, case))
    return jax.value_and_grad(mean_loss), convnet_state(case, params), images, labels


def recurrent_net(case):
    from flax import nnx

    cell = {"LSTM": nnx.OptimizedLSTMCell, "GRU": nnx.GRUCell}[case.cell]

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(cell(case.width, case.width, rngs=rngs), rngs=False)
            self.head = nnx.Linear(case.width, recurrent.CLASSES, rngs=rngs)

        def __call__(self, inputs):
            # nnx.RNN asks for a key, although the first states are zero.
            return self.head(self.rnn(inputs, rngs=nnx.Rngs(0)))

    return Model(nnx.Rngs(0))


def recurrent_state(case, params):
    """The library's parameters, or their gradients, as a state in Flax."""
    cell, head = params
    drive, echo = {"kernel": cell["weight"]}, {"kernel": cell["recurrent"]}
    (echo if case.cell == "LSTM" else drive)["bias"] = cell["bias"]
    weights = {
        "rnn": {"cell": {"dense_i": drive, "dense_h": echo}},
        "head": {"kernel": head["weight"], "bias": head["bias"]},
    }
    return make_state(functools.partial(recurrent_net, case), weights)


def recurrent_side(case, params, inputs, labels):
    mean_loss = make_mean_loss(functools.partial(recurrent_net, case))
    return jax.value_and_grad(mean_loss), recurrent_state(case, params), inputs, labels


def perceptron(case):
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            ends = itertools.pairwise(case.sizes)
            self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in ends])

        def __call__(self, x):
            *hidden, last = self.layers
            for layer in hidden:
                x = getattr(nnx, case.activation)(layer(x))
            return last(x)

    return Model(nnx.Rngs(0))


def perceptron_state(case, params):
    """The library's parameters, or their gradients, as a state in Flax."""
    layers = [{"kernel": p["weight"], "bias": p["bias"]} for p in params if p]
    return make_state(functools.partial(perceptron, case), {"layers": dict(enumerate(layers))})


def resnet(case, seed=0):
    """A residual network, whose weights are drawn here: the library has no twin of it."""
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, inputs, outputs, stride, rngs):
            conv, norm = (
                functools.partial(nnx.Conv, rngs=rngs),
                functools.partial(nnx.GroupNorm, num_groups=case.groups, rngs=rngs),
            )
            self.conv_1 = conv(inputs, outputs, (3, 3), strides=stride, use_bias=False)
            self.norm_1 = norm(outputs)
            self.conv_2 = conv(outputs, outputs, (3, 3), use_bias=False)
            self.norm_2 = norm(outputs)
            same = inputs == outputs and stride == 1
            self.shortcut = None if same else conv(inputs, outputs, (1, 1), strides=stride)

        def __call__(self, x):
            y = nnx.relu(self.norm_1(self.conv_1(x)))
            y = self.norm_2(self.conv_2(y))
            return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))

    class Model(nnx.Module):
        def __init__(self, rngs):
            first, *_, last = case.channels
            self.stem = nnx.Conv(case.inputs, first, (3, 3), use_bias=False, rngs=rngs)
            self.norm = nnx.GroupNorm(first, num_groups=case.groups, rngs=rngs)
            blocks, inputs = [], first
            for stage, outputs in enumerate(case.channels):
                for i in range(case.blocks):
                    blocks.append(Block(inputs, outputs, 2 if stage and not i else 1, rngs))
                    inputs = outputs
            self.blocks = nnx.List(blocks)
            self.head = nnx.Linear(last, convnets.CLASSES, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.norm(self.stem(x)))
            for block in self.blocks:
                x = block(x)
            return self.head(jnp.mean(x, axis=(1, 2)))

    return Model(nnx.Rngs(seed))


def resnet_state(case, seed):
    """The state of a residual network, with weights drawn from the seed."""
    from flax import nnx

    return nnx.state(resnet(case, seed), nnx.Param)


def train_gpt(training, params, tokens, labels, seed):
    """A run of all epochs from the library's parameters that returns the mean loss of the last."""
    from flax import nnx

    optimizer, _ = OPTIMIZERS[training.optimizer]
    graph, start = nnx.split(gpt(training.network))
    nnx.replace_by_pure_dict(start, gpt_weights(training.network, params))

    @nnx.jit
    def step(model, optimizer, tokens, labels):
        def mean_loss(model):
            return mean_cross_entropy(model(tokens), labels)

        loss, grads = nnx.value_and_grad(mean_loss)(model)
        optimizer.update(model, grads)
        return loss

    def run():
        rng = np.random.default_rng(seed)
        model = nnx.merge(graph, jax.tree.map(jnp.copy, start))
        state = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
        cached_step = nnx.cached_partial(step, model, state)
        for _ in range(training.epochs):
            batches = rng.permutation(training.examples).reshape(-1, training.network.n)
            losses = [cached_step(tokens[indices], labels[indices]) for indices in batches]
        jax.block_until_ready(nnx.state(model))
        return float(np.mean(losses))

    return run
