"""A training step under each feedback rule, against the exact step, and the same in BioTorch.

Under a rule, other weights carry the error back and the rest of the step is the same. Its extra
cost should therefore be that of making or updating those weights. All steps train the same network
of blocks from the same parameters by SGD with momentum and weight decay, which Kolen-Pollack needs.
"""

import functools

import jax.numpy as jnp

import jaxbp as bp
from experiments.bench import loops
from experiments.bench.comparing import peer_rows
from experiments.bench.loops import OPTIMIZERS
from experiments.bench.networks.perceptrons import Perceptron, make_data, perceptrons
from experiments.bench.peers.biotorch_runs import biotorch_runs
from experiments.bench.tables import Row, Table, fill
from experiments.common.measuring import measure


def rules(case, repeats, seed):
    """A row for a training step under each rule, and the peer's rows."""
    data = tuple(map(jnp.asarray, make_data(case.sizes, case.n, seed)))
    blocks = make_blocks(case.sizes)
    exact = compile_step(blocks, bp.exact(), *data, seed)
    for rule, wanted in make_rules(blocks):
        program = compile_step(blocks, rule, *data, seed)
        ours, theirs = measure([program.run, exact.run], repeats)
        row = Row(str(case), "exact", f"<= {wanted:.2f}" if wanted else "", rule.name)
        yield fill(row, ours / theirs, ours, theirs, program, exact)
    start, *_ = exact.args
    make_runs = functools.partial(biotorch_runs, start.params, *data)
    yield from peer_rows(case, "BioTorch", make_runs, repeats, plain="PyTorch's exact step")


def make_rules(blocks):
    """Every rule but the exact one, with the wanted multiple of the exact step's time."""
    return [
        (bp.random_feedback(), 1.02),
        (bp.sign_symmetric("uniform"), 1.02),
        (bp.sign_symmetric("fixed"), 1.02),
        (bp.sign_symmetric("batchwise"), 1.02),
        (bp.kolen_pollack(), 1.10),
        (bp.weight_mirror(), None),
        (bp.direct_feedback(*blocks), 1.00),
    ]


def make_blocks(sizes):
    """The layers of a relu network as blocks, each hidden one with its relu.

    Direct feedback takes blocks; the other rules take the chain of them.
    """
    hidden = [bp.chain(bp.dense(units, dtype=jnp.float32), bp.relu()) for units in sizes[1:-1]]
    return [*hidden, bp.dense(sizes[-1], dtype=jnp.float32)]


def compile_step(blocks, rule, inputs, labels, seed):
    """The program of a training step, whose first parameters are the same for all rules."""
    optimizer, _ = OPTIMIZERS["SGD with weight decay"]
    return loops.compile_step(bp.chain(*blocks), optimizer, inputs, labels, seed, rule=rule)


TABLES = {
    "rules": Table(
        "A training step under each rule",
        "under the rule / exact",
        rules,
        (*perceptrons((512, 128), (1024, 128)), Perceptron((784, *[512] * 16, 10), 128)),
        (*perceptrons((4096, 4096)), Perceptron((784, *[2048] * 16, 10), 4096)),
        "Each library is compared with the exact step of its own framework. Each step continues "
        "from the last one and reuses its memory.",
        "rule",
    ),
}
