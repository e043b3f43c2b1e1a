"""A convolutional network in the library and in plain JAX, and random images for it.

Each convolution has kernels of 3 x 3 that keep the size of an image, and is followed by relu and
the maximum of 2 x 2. A dense layer for ten classes comes last.
"""

import itertools
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

CLASSES = 10


class Convnet(NamedTuple):
    """A network for batches of N images of `size` x `size`.

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


class Resnet(NamedTuple):
    """A residual network with group normalisation, for batches of N images of `size` x `size`.

    It starts with a convolution. Each stage but the first halves height and width. A block has two
    convolutions of 3 x 3. A dense layer reads the mean over all pixels.

    Attributes:
      size: the height and the width of an image.
      inputs: its channels.
      channels: of each stage.
      blocks: the number of blocks in a stage.
      n: N.
      groups: of a normalisation.
    """

    size: int
    inputs: int
    channels: tuple[int, ...]
    blocks: int
    n: int
    groups: int = 8

    def __str__(self):
        channels = "-".join(map(str, self.channels))
        return f"{self.size}x{self.size}x{self.inputs}, {self.blocks} x ({channels}), N = {self.n}"

    @property
    def shape(self):
        """Of one image."""
        return self.size, self.size, self.inputs


def make_net(case):
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


def plain_mean_loss(case):
    """The mean loss of the library's parameters, as one writes it in JAX without the library."""
    del case

    def mean_loss(params, images, labels):
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

    return mean_loss


explicit = explicit_side(make_net)
same_layers = same_layers_side(make_net)
plain = autodiff_side(plain_mean_loss)


def make_case(case, seed):
    """The library's parameters, and one batch of images and labels."""
    params, _ = make_net(case).init(jax.random.key(seed), case.shape)
    return params, *map(jnp.asarray, make_images(case, seed))


def step_products(case):
    """FLOP of a gradient's products: three for each layer, but no dx of the first."""
    sizes = [(case.size // 2**layer) ** 2 for layer in range(len(case.channels))]
    channels = itertools.pairwise((case.inputs, *case.channels))
    layers = [size * 9 * i * o for size, (i, o) in zip(sizes, channels, strict=True)]
    layers.append(case.last_size**2 * case.channels[-1] * CLASSES)
    return 2 * case.n * (3 * sum(layers) - layers[0])
