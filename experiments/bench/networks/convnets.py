"""The same convolutional network four times: in the library, in jax, in Flax and in PyTorch.

Each is written as its own users write it: convolutions of 3 x 3 places that keep the size of an
image, a rectifier and the maximum of 2 x 2 after each, and a dense layer for ten classes. All four
start from the same weights. Those of the library are carried over:

  library                    Flax                   PyTorch, where channels stand first
  kernel [3, 3, I, O]        kernel [3, 3, I, O]    weight [O, I, 3, 3]
  weight [H W I, O]          kernel [H W I, O]      weight [O, I H W]
  images [N, H, W, C]        images [N, H, W, C]    images [N, C, H, W]

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

CLASSES = 10


class Convnet(NamedTuple):
    """A network for images of `size` x `size` with so many channels, in batches of N.

    Attributes:
      size: the height and the width of an image.
      inputs: its channels.
      channels: the outputs of each convolution.
      n: N.
    """

    size: int
    inputs: int
    channels: tuple[int, ...]
    n: int

    def __str__(self):
        channels = "-".join(map(str, self.channels))
        return f"{self.size}x{self.size}x{self.inputs}, {channels}, N = {self.n}"

    @property
    def shape(self):
        """Of one image."""
        return self.size, self.size, self.inputs

    @property
    def last_size(self):
        """The height and the width of what the dense layer sees."""
        return self.size // 2 ** len(self.channels)


def make_convnet(case):
    """The network in the library."""
    layers = []
    for channels in case.channels:
        layers += [bp.conv(channels, (3, 3), dtype=jnp.float32), bp.relu(), bp.max_pool((2, 2))]
    return bp.chain(*layers, bp.flatten(), bp.dense(CLASSES, dtype=jnp.float32))


def make_images(case, seed):
    """Random images [N, H, W, C] and labels [N]."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(case.n, *case.shape)).astype(np.float32)
    return images, rng.integers(CLASSES, size=case.n, dtype=np.int32)


def kernels_and_last(params):
    """The parameters of the convolutions, and of the dense layer."""
    *convolutions, last = [layer for layer in params if layer]
    return convolutions, last


def plain_mean_loss(params, images, labels):
    """The mean loss on the library's parameters, without it: as one writes it for autodiff."""
    convolutions, last = kernels_and_last(params)
    x = images
    for layer in convolutions:
        x = jax.lax.conv_general_dilated(
            x, layer["weight"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + layer["bias"])
        window = (1, 2, 2, 1)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
    return mean_cross_entropy(x.reshape(len(x), -1) @ last["weight"] + last["bias"], labels)


def make_flax_convnet(case):
    """The network in Flax, with weights of its own."""
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            ends = zip((case.inputs, *case.channels), case.channels, strict=False)
            self.convs = nnx.List([nnx.Conv(i, o, (3, 3), rngs=rngs) for i, o in ends])
            features = case.last_size**2 * case.channels[-1]
            self.head = nnx.Linear(features, CLASSES, rngs=rngs)

        def __call__(self, x):
            for conv in self.convs:
                x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), strides=(2, 2))
            return self.head(x.reshape(len(x), -1))

    return Model(nnx.Rngs(0))


def flax_state(case, params):
    """The parameters of the library, or their gradients, as a state of the network in Flax."""

    def renamed(layer):
        return {"kernel": layer["weight"], "bias": layer["bias"]}

    convolutions, last = kernels_and_last(params)
    weights = {"convs": dict(enumerate(map(renamed, convolutions))), "head": renamed(last)}
    return flax_state_of(functools.partial(make_flax_convnet, case), weights)


def flax_mean_loss(case):
    """A function of the state, the images and the labels."""
    return flax_mean_loss_of(functools.partial(make_flax_convnet, case))


def make_torch_convnet(case, params):
    """The network in PyTorch, with the library's weights."""
    import torch
    from torch import nn

    layers = []
    for i, o in zip((case.inputs, *case.channels), case.channels, strict=False):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    features = case.last_size**2 * case.channels[-1]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, CLASSES))
    weights = torch_weights(case, params)
    with torch.no_grad():
        for own, weight in zip(model.parameters(), weights, strict=True):
            own.copy_(torch.tensor(weight))
    return model


def torch_weights(case, params):
    """The parameters of the library, or their gradients, in PyTorch's order."""
    convolutions, last = kernels_and_last(params)
    weights = []
    for layer in convolutions:
        weights += [np.transpose(layer["weight"], (3, 2, 0, 1)), np.asarray(layer["bias"])]
    images = np.reshape(last["weight"], (case.last_size, case.last_size, -1, CLASSES))
    rows = np.transpose(images, (3, 2, 0, 1)).reshape(CLASSES, -1)
    return [*weights, rows, np.asarray(last["bias"])]


def channels_first(images):
    """As PyTorch has them, [N, C, H, W], in this order in memory too.

    Opacus takes what it is given for that: of images that are stored channels last it forms others
    than the gradients of their examples, without a word.
    """
    return np.ascontiguousarray(np.moveaxis(np.asarray(images), -1, 1))
