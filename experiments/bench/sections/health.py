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
    """The row of a network."""
    programs = compile_steps(case, seed)
    ours, theirs = measure([program.run for program in programs], repeats)
    yield fill(Row(str(case), "the step alone", "<= 1.02"), ours / theirs, ours, theirs, *programs)


def compile_steps(case, seed):
    """The programs of a step that is watched and of the step alone."""
    network = perceptrons if isinstance(case, Perceptron) else gpts
    net, (_, *batch) = network.make_net(case), network.make_case(case, seed)
    readings = {"read": {"health": bp.health}}, {}
    return [compile_step(net, optax.adam(1e-3), *batch, seed, **read) for read in readings]


def _table(network, cases, gpu_cases):
    note = "The record describes the inputs, the deltas and the gradient of each parameter."
    title = f"A training step of {network} that is watched, with Adam"
    return Table(title, "watched / alone", watched, cases, gpu_cases, note)


PERCEPTRON = Perceptron((784, 512, 512, 10), 128)
TABLES = {
    "perceptron": _table(
        "a perceptron",
        (PERCEPTRON, PERCEPTRON._replace(n=1024)),
        (Perceptron((784, 4096, 4096, 10), 4096),),
    ),
    "gpt": _table("a GPT", (Gpt(4, 128, 4, 64, 8),), (Gpt(4, 1024, 16, 512, 16),)),
}
