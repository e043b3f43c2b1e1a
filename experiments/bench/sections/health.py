"""Training steps that record `bp.health`, against the same step without a record."""

import optax

import jaxbp as bp
from experiments.bench.loops import compile_step
from experiments.bench.networks import gpts, perceptrons
from experiments.bench.networks.gpts import Gpt
from experiments.bench.networks.perceptrons import Perceptron
from experiments.bench.tables import Row, Table, fill
from experiments.common.measuring import measure


def watched(case, repeats, seed):
    """The row of a network that Adam trains."""
    network = perceptrons if isinstance(case, Perceptron) else gpts
    net, (_, *batch) = network.make_net(case), network.make_case(case, seed)
    steps = [
        compile_step(net, optax.adam(1e-3), *batch, seed, **options)
        for options in ({"read": {"health": bp.health}}, {})
    ]
    ours, theirs = measure([step.run for step in steps], repeats)
    row = Row(str(case), "the step alone", "<= 1.02")
    yield fill(row, ours / theirs, ours, theirs, *(step.program for step in steps))


TABLES = {
    "watched": Table(
        "A training step that is watched",
        "watched / alone",
        watched,
        (
            Perceptron((784, 512, 512, 10), 128),
            Perceptron((784, 512, 512, 10), 1024),
            Gpt(4, 128, 4, 64, 8),
        ),
        (Perceptron((784, 4096, 4096, 10), 4096), Gpt(4, 1024, 16, 512, 16)),
        "The record describes the inputs, the deltas and the gradient of each parameter. The "
        "optimizer is Adam.",
    ),
}
