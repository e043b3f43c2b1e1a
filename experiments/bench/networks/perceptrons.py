"""Multilayer perceptrons in the library and in plain JAX, and random data for them."""

import itertools
import math
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

ACTIVATIONS = {"relu": (bp.relu, jax.nn.relu), "gelu": (bp.gelu, jax.nn.gelu)}


class Perceptron(NamedTuple):
    """A multilayer perceptron of these sizes, inputs first, on a batch of N, at T positions."""

    sizes: tuple[int, ...]
    n: int
    activation: str = "relu"
    t: int | None = None

    def __str__(self):
        positions = f", T = {self.t}" if self.t else ""
        return f"{show_sizes(self.sizes)} {self.activation}, N = {self.n}{positions}"


def show_sizes(sizes):
    """`784-512x16-10`: a size that comes more than twice in a row is written once."""
    runs = [(size, len(list(same))) for size, same in itertools.groupby(sizes)]
    return "-".join(f"{size}x{n}" if n > 2 else "-".join([f"{size}"] * n) for size, n in runs)


def perceptrons(*widths_and_ns, activation="relu"):
    """Cases with two hidden layers of the same width."""
    return tuple(Perceptron((784, w, w, 10), n, activation) for w, n in widths_and_ns)


def make_net(case):
    make, _ = ACTIVATIONS[case.activation]
    layers = []
    for units in case.sizes[1:-1]:
        layers += [bp.dense(units, dtype=jnp.float32), make()]
    return bp.chain(*layers, bp.dense(case.sizes[-1], dtype=jnp.float32))


def plain_mean_loss(activation="relu"):
    """The mean loss of the library's parameters, as one writes it in JAX without the library."""
    _, function = ACTIVATIONS[activation]

    def mean_loss(params, x, labels):
        *hidden, last = params[::2]
        for layer in hidden:
            x = function(x @ layer["weight"] + layer["bias"])
        logits = x @ last["weight"] + last["bias"]
        return mean_cross_entropy(logits, labels)

    return mean_loss


explicit = explicit_side(make_net)
same_layers = same_layers_side(make_net)
plain = autodiff_side(lambda case: plain_mean_loss(case.activation))


def make_case(case, seed):
    """The library's parameters, and one batch of inputs [N, (T,) I] and labels [N, (T)]."""
    params, _ = make_net(case).init(jax.random.key(seed), case.sizes[:1])
    inputs, labels = map(jnp.asarray, make_data(case.sizes, case.n * (case.t or 1), seed))
    if case.t:
        inputs, labels = inputs.reshape(case.n, case.t, -1), labels.reshape(case.n, case.t)
    return params, inputs, labels


def make_data(sizes, n, seed):
    """Normal inputs, and labels that depend on them by a random map and some noise."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(n, sizes[0])).astype(np.float32)
    scores = inputs @ rng.normal(size=(sizes[0], sizes[-1])) / math.sqrt(sizes[0])
    labels = np.argmax(scores + rng.normal(scale=0.3, size=scores.shape), axis=1)
    return inputs, labels.astype(np.int32)


def step_products(case):
    """FLOP of a gradient's matrix products: three for each layer, but no dx of the first."""
    weights = [i * o for i, o in itertools.pairwise(case.sizes)]
    return 2 * case.n * (case.t or 1) * (3 * sum(weights) - weights[0])
