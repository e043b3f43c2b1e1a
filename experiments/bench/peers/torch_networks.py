"""The networks in PyTorch, as its own users write them, with the library's weights.

The weights are carried over by name:

  library                             PyTorch
  weight [I, O]                       weight [O, I]
  kernel [3, 3, I, O]                 weight [O, I, 3, 3]
  weight after flatten [H W I, O]     weight [O, I H W]
  images [N, H, W, C]                 images [N, C, H, W]
  gain, bias of a normalisation       weight, bias

Gradients are carried over in the same way, so that they can be compared.
"""

import itertools

import jax.numpy as jnp
import numpy as np

from experiments.bench.networks import convnets, gpts, recurrent
from experiments.bench.peers.torch_runs import (
    make_torch_data,
    to_device,
    to_tensor,
    torch_gradient,
)


def load(model, weights):
    """The model on the device, with these weights by name."""
    model.load_state_dict({name: to_tensor(array) for name, array in weights.items()})
    return to_device(model)


def perceptron(params):
    """A relu network."""
    import torch

    denses = params[::2]
    layers = []
    for dense in denses:
        layers += [torch.nn.Linear(*dense["weight"].shape), torch.nn.ReLU()]
    weights = {}
    for i, dense in enumerate(denses):
        weights |= {f"{2 * i}.weight": dense["weight"].T, f"{2 * i}.bias": dense["bias"]}
    return load(torch.nn.Sequential(*layers[:-1]), weights)


def gpt(case, params):
    import torch
    from torch import nn
    from torch.nn import functional

    features, heads = case.features, case.heads

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_1 = nn.LayerNorm(features, eps=gpts.EPS)
            self.qkv = nn.Linear(features, 3 * features)
            self.out = nn.Linear(features, features)
            self.norm_2 = nn.LayerNorm(features, eps=gpts.EPS)
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
            self.tokens = nn.Embedding(case.vocabulary, features)
            self.positions = nn.Embedding(case.length, features)
            self.blocks = nn.Sequential(*(Block() for _ in range(case.blocks)))
            self.norm = nn.LayerNorm(features, eps=gpts.EPS)
            self.head = nn.Linear(features, case.vocabulary)

        def forward(self, tokens):
            x = self.tokens(tokens) + self.positions(
                torch.arange(tokens.shape[1], device=tokens.device)
            )
            return self.head(self.norm(self.blocks(x)))

    return load(Model(), gpt_weights(params))


def gpt_weights(params):
    """The library's parameters, or their gradients, by their names in PyTorch."""
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


def sequence_mean_loss(logits, labels):
    """The mean over examples of the sum over positions."""
    from torch.nn import functional

    total = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / len(labels)


def convnet(case, params):
    from torch import nn

    layers = []
    for i, o in itertools.pairwise((case.inputs, *case.channels)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    features = case.last_size**2 * case.channels[-1]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, convnets.CLASSES))
    return load(model, convnet_weights(case, params))


def convnet_weights(case, params):
    """The library's parameters, or their gradients, by their names in PyTorch."""
    convolutions, last = convnets.kernels_and_last(params)
    weights = {}
    for i, layer in enumerate(convolutions):
        weights[f"{3 * i}.weight"] = np.transpose(layer["weight"], (3, 2, 0, 1))
        weights[f"{3 * i}.bias"] = np.asarray(layer["bias"])
    images = np.reshape(last["weight"], (case.last_size, case.last_size, -1, convnets.CLASSES))
    head = 3 * len(convolutions) + 1
    weights[f"{head}.weight"] = np.transpose(images, (3, 2, 0, 1)).reshape(convnets.CLASSES, -1)
    weights[f"{head}.bias"] = np.asarray(last["bias"])
    return weights


def channels_first(images):
    """Images as PyTorch has them, [N, C, H, W], and in this order in memory too.

    Opacus assumes that order: from images stored with channels last it computes wrong per-example
    gradients without an error.
    """
    return np.ascontiguousarray(np.moveaxis(np.asarray(images), -1, 1))


def recurrent_net(case, params):
    from torch import nn

    layer = {"LSTM": nn.LSTM, "GRU": nn.GRU}[case.cell]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer(case.width, case.width, batch_first=True)
            self.head = nn.Linear(case.width, recurrent.CLASSES)

        def forward(self, inputs):
            outputs, _ = self.rnn(inputs)
            return self.head(outputs)

    return load(Model(), recurrent_weights(params))


def recurrent_weights(params):
    """The library's parameters, or their gradients, by their names in PyTorch.

    PyTorch's LSTM has a second bias, which the library does not have.
    """
    cell, head = params
    return {
        "rnn.weight_ih_l0": cell["weight"].T,
        "rnn.weight_hh_l0": cell["recurrent"].T,
        "rnn.bias_ih_l0": cell["bias"],
        "rnn.bias_hh_l0": cell.get("recurrent_bias", jnp.zeros_like(cell["bias"])),
        "head.weight": head["weight"].T,
        "head.bias": head["bias"],
    }


# PyTorch's side of each gradient.


def gpt_side(case, params, tokens, labels):
    data = make_torch_data(tokens, labels)
    return torch_gradient(gpt(case, params), sequence_mean_loss, *data)


def convnet_side(case, params, images, labels):
    from torch.nn import functional

    data = make_torch_data(channels_first(images), labels)
    return torch_gradient(convnet(case, params), functional.cross_entropy, *data)


def recurrent_side(case, params, inputs, labels):
    data = make_torch_data(inputs, labels)
    return torch_gradient(recurrent_net(case, params), sequence_mean_loss, *data)
