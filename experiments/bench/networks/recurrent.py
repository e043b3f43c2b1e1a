"""A recurrent layer and a dense one behind it, in the library and in plain JAX, and random data.

The loss is softmax cross-entropy at every step. The plain version computes the products of all
inputs before its `lax.scan` over the steps.
"""

from typing import Literal, NamedTuple

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

CELLS = {"LSTM": bp.lstm, "GRU": bp.gru}
GATES = {"LSTM": 4, "GRU": 3}
CLASSES = 32


class Sequence(NamedTuple):
    """A recurrent layer on inputs as wide as itself; T steps, in batches of N."""

    cell: Literal[*CELLS]
    width: int
    length: int = 128
    n: int = 32

    def __str__(self):
        return f"{self.cell} {self.width}, T = {self.length}, N = {self.n}"


def make_net(case):
    """The network in the library."""
    layer = bp.recurrent(CELLS[case.cell](case.width), dtype=jnp.float32)
    return bp.chain(layer, bp.dense(CLASSES, dtype=jnp.float32))


def plain_mean_loss(case):
    """The mean loss of the library's parameters, as one writes it in JAX without the library."""

    def lstm(params, state, drive):
        h, c = state
        i, f, g, o = jnp.split(drive + h @ params["recurrent"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def gru(params, state, drive):
        (h,) = state
        echoes = jnp.split(h @ params["recurrent"] + params["recurrent_bias"], 3, axis=-1)
        r, z, n = jnp.split(drive, 3, axis=-1)
        r, z = jax.nn.sigmoid(r + echoes[0]), jax.nn.sigmoid(z + echoes[1])
        h = (1 - z) * jnp.tanh(n + r * echoes[2]) + z * h
        return (h,), h

    def mean_loss(params, inputs, labels):
        cell, head = params
        step, parts = {"LSTM": (lstm, 2), "GRU": (gru, 1)}[case.cell]
        drives = jnp.swapaxes(inputs, 0, 1) @ cell["weight"] + cell["bias"]
        start = (jnp.zeros((len(inputs), case.width)),) * parts
        _, outputs = jax.lax.scan(lambda state, drive: step(cell, state, drive), start, drives)
        logits = jnp.swapaxes(outputs, 0, 1) @ head["weight"] + head["bias"]
        return mean_cross_entropy(logits, labels)

    return mean_loss


explicit = explicit_side(make_net)
same_layers = same_layers_side(make_net)
plain = autodiff_side(plain_mean_loss)


def make_case(case, seed):
    """The library's parameters, and one batch of inputs [N, T, I] and labels [N, T]."""
    rng = np.random.default_rng(seed)
    params, _ = make_net(case).init(jax.random.key(seed), (case.length, case.width))
    inputs = rng.normal(size=(case.n, case.length, case.width)).astype(np.float32)
    labels = rng.integers(CLASSES, size=(case.n, case.length), dtype=np.int32)
    return params, jnp.asarray(inputs), jnp.asarray(labels)


def step_products(case):
    """FLOP of a gradient's products: three for each matrix, but no dx of the inputs."""
    square = GATES[case.cell] * case.width**2
    matrices = 3 * (2 * square + case.width * CLASSES) - square
    return 2 * case.n * case.length * matrices
