"""The library's training step and loop, and the settings that it shares with the peers' loops."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxbp as bp
from experiments.bench.networks.sides import LOSS
from experiments.common.measuring import compile_program

EXACT = bp.exact()

# Each as optax has it, and as the arguments of the same in PyTorch.
OPTIMIZERS = {
    "SGD": (optax.sgd(0.02, momentum=0.9), {"lr": 0.02, "momentum": 0.9}),
    "Adam": (optax.adam(1e-3), {"lr": 1e-3}),
    "SGD with weight decay": (
        optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.02, momentum=0.9)),
        {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4},
    ),
    "AdamW": (
        optax.adamw(1e-3, weight_decay=0.01),
        {"lr": 1e-3, "weight_decay": 0.01, "fused": True},
    ),
}


def compile_step(net, optimizer, inputs, labels, seed, *, rule=EXACT, **options):
    """The program of `bp.make_step(net, LOSS, optimizer, **options)` on one batch.

    As in training, each run continues from the state of the last one and reuses its memory.
    """
    start = bp.init_state(net, optimizer, jax.random.key(seed), inputs.shape[1:], rule=rule)
    step = bp.make_step(net, LOSS, optimizer, rule=rule, **options)
    program = compile_program(step, start, inputs, labels, donate_argnums=0)
    state = jax.tree.map(jnp.copy, start)

    def go_on(start, *data):
        nonlocal state
        state, record = program.compiled(state, *data)
        return state, record

    return program._replace(compiled=go_on)


class Training(NamedTuple):
    """Epochs of training a network on so many examples, in batches of its N."""

    network: Any
    examples: int
    optimizer: str
    epochs: int = 1

    def __str__(self):
        return f"{self.network}, {self.optimizer}, {self.examples:,} examples"


def train_jaxbp(training, net, params, inputs, labels, seed):
    """A run of all epochs from `params` that returns the mean loss of the last, and its program."""
    optimizer, _ = OPTIMIZERS[training.optimizer]
    data = jnp.asarray(inputs), jnp.asarray(labels)
    start = bp.init_state(net, optimizer, jax.random.key(seed), inputs.shape[1:])
    start = start._replace(params=params)  # the first state of an optimizer does not depend on them
    epoch = bp.make_epoch(net, LOSS, optimizer, batch_size=training.network.n)
    program = compile_program(epoch, start, *data)

    def run():
        state = start
        for _ in range(training.epochs):
            state, record = program.compiled(state, *data)
        return float(jax.block_until_ready((state, record))[1]["loss"])

    return run, program
