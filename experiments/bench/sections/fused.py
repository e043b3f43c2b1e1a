"""Training steps that update inside the sweep, against the ordinary step with the same optimizer.

memory   arguments, outputs and temporaries of the compiled step; what it donates counts once
steps    the time of a step, with and without a clip by the global norm
"""

import optax

from experiments.bench.loops import compile_step
from experiments.bench.networks.gpts import Gpt, make_net, make_tokens
from experiments.bench.sections.transformers import DEEP
from experiments.bench.tables import Row, Table, fill
from experiments.common.measuring import measure

MAX_NORM = 1.0
OPTIMIZERS = {"SGD, momentum": optax.sgd(1e-2, momentum=0.9), "Adam": optax.adam(1e-3)}
MEMORY = {"SGD, momentum": "<= 0.60", "Adam": "<= 0.75"}


def memory(gpt, repeats, seed):
    """A row for each optimizer, without and with a clip."""
    del repeats
    for row, fused, ordinary in _pairs(gpt, seed):
        ratio = fused.whole_bytes / ordinary.whole_bytes
        yield row._replace(
            ratio=ratio,
            quartiles=(ratio, ratio),  # the same in every round
            whole_bytes=(fused.whole_bytes, ordinary.whole_bytes),
        )


def steps(gpt, repeats, seed):
    """A row for each optimizer, without and with a clip."""
    for row, fused, ordinary in _pairs(gpt, seed):
        ours, theirs = measure([fused.run, ordinary.run], repeats)
        wanted = "<= 1.35" if "clip" in row.what else "<= 1.05"
        yield fill(row._replace(wanted=wanted), ours / theirs, ours, theirs, fused, ordinary)


def _pairs(gpt, seed):
    """For each optimizer, without and with a clip: a row, the fused step and the ordinary one."""
    for name, optimizer in OPTIMIZERS.items():
        for max_norm in (None, MAX_NORM):
            clipped = optax.chain(optax.clip_by_global_norm(MAX_NORM), optimizer)
            fused = _compiled(gpt, seed, optimizer, fused=True, max_norm=max_norm)
            ordinary = _compiled(gpt, seed, clipped if max_norm else optimizer)
            what = f"{name}, clip" if max_norm else name
            yield Row(str(gpt), "fused=False", MEMORY[name], what), fused, ordinary


def _compiled(gpt, seed, optimizer, **options):
    return compile_step(make_net(gpt), optimizer, *make_tokens(gpt, seed), seed, **options)


CASES = tuple(Gpt(blocks, 128, 4, 64, 8, **DEEP) for blocks in (8, 32))
ON_GPU = (Gpt(32, 1024, 16, 512, 4, **DEEP),)

TABLES = {
    "memory": Table(
        "Memory of a step that updates inside the sweep",
        "fused / ordinary",
        memory,
        CASES,
        ON_GPU,
        what="optimizer",
    ),
    "steps": Table(
        "Time of a step that updates inside the sweep",
        "fused / ordinary",
        steps,
        CASES,
        ON_GPU,
        what="optimizer",
    ),
}
