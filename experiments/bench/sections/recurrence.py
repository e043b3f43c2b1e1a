"""How fast recurrent layers are: against autodiff, Flax and PyTorch, on the same weights and data.

  gradient    the mean loss of a recurrent layer and a dense one behind it, and its gradient

The loss is softmax cross-entropy at every step. The peers are

  jax.grad, the same layers    autodiff of the library's own forward pass
  jax.grad, a scan             autodiff of `lax.scan` over the steps, the inputs' products before it
  Flax, nnx.RNN                autodiff of its cells, `OptimizedLSTMCell` or `GRUCell`
  PyTorch                      `nn.LSTM` or `nn.GRU`

The library's forward pass writes into arrays that it carries through its loop, which autodiff does
not know to be one and the same: the second row is the fair one.

How times are taken, and what stands beside them, is said in `bench`; and in `bench_gpt` what
PyTorch's memory is, and where its times hold. Flax's GRU has no bias c, and so no gradient of it.
"""

import functools
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxbp as bp
from experiments.bench.gpts import torch_mean_loss
from experiments.bench.peers import (
    flax_mean_loss_of,
    flax_state_of,
    make_torch_data,
    torch_gradient,
)
from experiments.bench.runner import Section, gradient_rows, mean_loss_of, run_sections
from experiments.bench.trainers import LOSS, mean_cross_entropy

NAMES = ("gradient",)
CELLS = {"LSTM": bp.lstm, "GRU": bp.gru}
CLASSES = 32


class Sequence(NamedTuple):
    """A recurrent layer on inputs as wide as itself; T steps, in batches of N."""

    cell: Literal[*CELLS]
    width: int
    length: int = 128
    n: int = 32

    def __str__(self):
        return f"{self.cell} {self.width}, T = {self.length}, N = {self.n}"


def main(
    *,
    sections: tuple[Literal[*NAMES], ...] = NAMES,
    repeats: int = 15,
    quick: bool = False,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Measures recurrent layers against their peers and prints a table.

    Args:
      sections: which to measure.
      repeats: rounds for each figure.
      quick: only the smallest case.
      seed: of weights and data.
      json: a file for the same figures, unrounded.
    """
    chosen = {name: SECTIONS[name] for name in sections}
    run_sections("bench_time", chosen, repeats, quick, seed, json)


def gradient(case, repeats, seed):
    """A row for each peer: one step's gradient against theirs."""
    wanted = "<= 0.80, memory <= 0.70"
    peers = {
        "jax.grad, the same layers": (autodiff, wanted),
        "jax.grad, a scan": (scan, wanted),
        "Flax, nnx.RNN": (flax, wanted),
        "PyTorch": (torch_program, ""),
    }
    return gradient_rows(case, make_case(case, seed), explicit, peers, repeats)


def make_case(case, seed):
    """The library's parameters, and one batch of inputs [N, T, I] and labels [N, T]."""
    rng = np.random.default_rng(seed)
    params, _ = make_net(case).init(jax.random.key(seed), (case.length, case.width))
    inputs = rng.normal(size=(case.n, case.length, case.width)).astype(np.float32)
    labels = rng.integers(CLASSES, size=(case.n, case.length), dtype=np.int32)
    return params, jnp.asarray(inputs), jnp.asarray(labels)


def make_net(case):
    """The network in the library."""
    layer = bp.recurrent(CELLS[case.cell](case.width), dtype=jnp.float32)
    return bp.chain(layer, bp.dense(CLASSES, dtype=jnp.float32))


# The sides of a comparison: a function to compile, and its arguments.


def explicit(case, params, inputs, labels):
    return bp.value_and_grad(make_net(case), LOSS), params, inputs, labels


def autodiff(case, params, inputs, labels):
    """Of the library's forward pass."""
    return jax.value_and_grad(mean_loss_of(make_net(case))), params, inputs, labels


def scan(case, params, inputs, labels):
    """As one writes it for autodiff, on the library's parameters and without it."""

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

    return jax.value_and_grad(mean_loss), params, inputs, labels


def flax(case, params, inputs, labels):
    mean_loss = flax_mean_loss_of(functools.partial(make_flax, case))
    return jax.value_and_grad(mean_loss), flax_state(case, params), inputs, labels


def make_flax(case):
    from flax import nnx

    cell = {"LSTM": nnx.OptimizedLSTMCell, "GRU": nnx.GRUCell}[case.cell]

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(cell(case.width, case.width, rngs=rngs), rngs=False)
            self.head = nnx.Linear(case.width, CLASSES, rngs=rngs)

        def __call__(self, inputs):
            # It asks for a key, though the states to begin with are zero.
            return self.head(self.rnn(inputs, rngs=nnx.Rngs(0)))

    return Model(nnx.Rngs(0))


def flax_state(case, params):
    """The parameters of the library, or their gradients, as a state of the network in Flax."""
    cell, head = params
    drive, echo = {"kernel": cell["weight"]}, {"kernel": cell["recurrent"]}
    (echo if case.cell == "LSTM" else drive)["bias"] = cell["bias"]
    weights = {
        "rnn": {"cell": {"dense_i": drive, "dense_h": echo}},
        "head": {"kernel": head["weight"], "bias": head["bias"]},
    }
    return flax_state_of(functools.partial(make_flax, case), weights)


def torch_program(case, params, inputs, labels):
    """PyTorch's step, with one thread or as many as there are cores, whichever is faster."""
    data = make_torch_data(inputs, labels)
    return torch_gradient(make_torch(case, params), torch_mean_loss, *data)


def make_torch(case, params):
    import torch
    from torch import nn

    layer = {"LSTM": nn.LSTM, "GRU": nn.GRU}[case.cell]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer(case.width, case.width, batch_first=True)
            self.head = nn.Linear(case.width, CLASSES)

        def forward(self, inputs):
            outputs, _ = self.rnn(inputs)
            return self.head(outputs)

    model = Model()
    weights = torch_weights(params)
    model.load_state_dict({name: torch.tensor(np.asarray(w)) for name, w in weights.items()})
    return model


def torch_weights(params):
    """By name, as PyTorch has them. Its LSTM has a second bias, of which the library has none."""
    cell, head = params
    return {
        "rnn.weight_ih_l0": cell["weight"].T,
        "rnn.weight_hh_l0": cell["recurrent"].T,
        "rnn.bias_ih_l0": cell["bias"],
        "rnn.bias_hh_l0": cell.get("recurrent_bias", jnp.zeros_like(cell["bias"])),
        "head.weight": head["weight"].T,
        "head.bias": head["bias"],
    }


SECTIONS = {
    "gradient": Section(
        "Gradient of a recurrent layer",
        "explicit / peer",
        gradient,
        tuple(Sequence(cell, width) for cell in CELLS for width in (128, 256, 512)),
        "Of PyTorch's memory, the most that was allocated at a time.",
    ),
}


if __name__ == "__main__":
    tyro.cli(main)
