"""Norms, clipped sums, moments and curvature beside a perceptron's gradient.

norms       the gradient and the norm of every example's gradient, against the gradient alone
vmap        the same, against `jax.vmap(jax.grad)`
quantities  every quantity against the gradient alone, and the peers' against their own gradient
"""

import functools

import jaxbp as bp
from experiments.bench.comparing import compare_with_vmap, gradients_bytes, peer_rows
from experiments.bench.networks.perceptrons import (
    Perceptron,
    make_case,
    make_net,
    perceptrons,
    plain_mean_loss,
)
from experiments.bench.networks.sides import LOSS
from experiments.bench.peers.per_example import PEERS
from experiments.bench.quantities import QUANTITIES, gradient_and_norms
from experiments.bench.tables import Row, Table, fill
from experiments.common.measuring import compile_program, measure

# As multiples of the gradient's time.
WANTED = {
    "norms": 1.05,
    "clipped sum, one sweep": 1.10,
    "second moment": 1.4,
    "KFAC (MC 1)": 1.8,
    "GGN diagonal (MC 1)": 1.6,
    "GGN diagonal (exact)": 4.5,  # the gradient, and 0.35 for each of ten classes
    "gram": 1.3,
}


def norms(case, repeats, seed):
    """A row for what the norms cost in addition to the gradient."""
    net, data = make_net(case), make_case(case, seed)
    programs = [
        compile_program(gradient_and_norms(net), *data),
        compile_program(bp.value_and_grad(net, LOSS), *data),
    ]
    ours, theirs = measure([program.run for program in programs], repeats)
    row = Row(str(case), "bp.value_and_grad", "<= 1.10")
    yield fill(row, ours / theirs, ours, theirs, *programs)


def vmap(case, repeats, seed):
    """A row for the gradient and norms that are computed from the gradients of all examples."""
    row, data = Row(str(case), "jax.vmap(jax.grad)", "> 1"), make_case(case, seed)
    mean_loss = plain_mean_loss(case.activation)
    yield compare_with_vmap(row, make_net(case), data, mean_loss, repeats, how_many_times_slower)


def how_many_times_slower(ours, theirs):
    return theirs / ours


def quantities(case, repeats, seed):
    """A row for each of the library's quantities beside the gradient, and the peers' rows."""
    net, data = make_net(case), make_case(case, seed)
    gradient = compile_program(bp.value_and_grad(net, LOSS), *data)
    for what, make in QUANTITIES.items():
        wanted = f"<= {WANTED[what]:.2f}" if what in WANTED else ""
        row = Row(str(case), "bp.value_and_grad", wanted, what)
        if case.t and what == "GGN diagonal (exact)":
            columns = case.t * case.sizes[-1]
            problem = f"not run: it takes {columns} columns, T for each class"
            yield row._replace(wanted="", problem=problem)
            continue
        program = compile_program(make(net), *data)
        ours, theirs = measure([program.run, gradient.run], repeats)
        yield fill(row, ours / theirs, ours, theirs, program, gradient)
    if case.t is None:  # not every peer supports positions
        params, inputs, _ = data
        size = gradients_bytes(params, len(inputs))
        for peer, make_runs in PEERS.items():
            make = functools.partial(make_runs, *data)
            yield from peer_rows(case, peer, make, repeats, size=size)


TABLES = {
    "norms": Table(
        "Gradient and per-example norms in one sweep",
        "with norms / without",
        norms,
        perceptrons((64, 32), (128, 256), (512, 128), (512, 256), (1024, 256), (2048, 64)),
        perceptrons((1024, 1024), (4096, 4096)),
    ),
    "vmap": Table(
        "Gradient and per-example norms against vmap(grad)",
        "theirs / ours",
        vmap,
        perceptrons((64, 32), (128, 256), (512, 128), (1024, 256)),
        perceptrons((512, 512), (1024, 1024)),
        "On a CPU, vmap(grad) is slow partly because batched products of rank one are slow there.",
    ),
    "quantities": Table(
        "Every quantity against a plain gradient",
        "gradient and quantity / gradient",
        quantities,
        (
            *perceptrons((512, 32), (512, 128), (512, 512)),
            *perceptrons((1024, 32), (1024, 128), (1024, 512)),
            Perceptron((128, 256, 256, 10), 32, t=64),
        ),
        (
            *perceptrons((1024, 512), (4096, 1024)),
            Perceptron((512, 1024, 1024, 10), 64, t=256),
        ),
        "Each library is compared with the plain gradient of its own framework. On a CPU, batched "
        "products of rank one are slow, which vmap(grad) and jax_privacy's default consist of.",
    ),
}
