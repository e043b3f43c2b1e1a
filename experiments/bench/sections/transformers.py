"""How fast transformers are: against Flax, PyTorch and autodiff, on the same weights and tokens.

  gradient    the mean loss of a GPT and its gradient, against the same network elsewhere
  deep        the same through many blocks in one loop, each of them recomputed on the way back
  quantities  the norm of every example's gradient, and clipped sums, against the gradient alone
  training    epochs of AdamW on random tokens, against the loops of Flax and PyTorch

Networks are those of `transformers`. How times are taken, and what stands beside them, is said in
`bench`. What PyTorch takes of memory is the most that it had allocated at a time, beyond what it
held before; the compiler's figure for the others is without their outputs, the gradients.

PyTorch waits for its threads in a loop: where other work is on the machine, it falls behind by
multiples. Its figures, and ours beside them, are for a machine with nothing else to do.
"""

import copy
import functools
import math
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxbp as bp
from experiments.bench.gpts import (
    Gpt,
    flax_mean_loss,
    flax_state,
    flax_weights,
    make_flax_gpt,
    make_gpt,
    make_tokens,
    make_torch_gpt,
    plain_mean_loss,
    torch_mean_loss,
)
from experiments.bench.peers import (
    at_their_fastest,
    from_all_gradients,
    make_torch_data,
    mean_and_norms,
    torch_gradient,
)
from experiments.bench.quantities import gradient_and_norms, make_clipped
from experiments.bench.runner import (
    PER_EXAMPLE_BYTES,
    Row,
    Section,
    describe_problem,
    fill,
    mean_loss_of,
    run_sections,
    too_large,
)
from experiments.bench.trainers import LOSS, mean_cross_entropy
from experiments.common.measuring import compile_program, make_program, measure

NAMES = ("gradient", "deep", "quantities", "training")
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01
ADAMW = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
FEW_BLOCKS = 8
COMPILATIONS = 5  # rounds


class Training(NamedTuple):
    """Epochs of a GPT on so many examples, in its batches."""

    gpt: Gpt
    examples: int
    epochs: int = 1

    def __str__(self):
        return f"{self.gpt}, {self.examples} examples"


def main(
    *,
    sections: tuple[Literal[*NAMES], ...] = NAMES,
    repeats: int = 15,
    quick: bool = False,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Measures transformers against their peers and prints a table for each section.

    Args:
      sections: which to measure.
      repeats: rounds for each figure. Training, whose samples are long, has a third as many.
      quick: only the smallest case of each section.
      seed: of weights and data.
      json: a file for the same figures, unrounded.
    """
    chosen = {name: SECTIONS[name] for name in sections}
    run_sections("bench_gpt", chosen, repeats, quick, seed, json)


def gradient(gpt, repeats, seed):
    """A row for each peer: one step's gradient against theirs."""
    data = make_case(gpt, seed)
    ours = compile_program(*explicit(gpt, *data))
    products, products_flop = make_products()
    peers = {
        "Flax": (flax, "<= 0.85, memory <= 0.85"),
        "PyTorch": (torch_program, "<= 1.00"),
        "jax.grad, the same layers": (autodiff, "<= 0.75"),
        "jax.grad, plain jnp": (plain, ""),
    }
    for peer, (make, wanted) in peers.items():
        row = Row(str(gpt), peer, wanted)
        try:
            theirs = make_program(make, gpt, *data)
            seconds = measure([ours.run, theirs.run, products], repeats)
        except Exception as error:  # whatever goes wrong with a peer, the others are measured
            yield row._replace(problem=describe_problem(error))
            continue
        rate, gemm_rate = step_products(gpt) / seconds[0], products_flop / seconds[2]
        row = row._replace(gemm_share=float(np.median(rate / gemm_rate)))
        yield fill(row, seconds[0] / seconds[1], *seconds[:2], ours, theirs)


def deep(gpt, repeats, seed):
    """Rows for a peer's memory, time and compilation, and for how ours grow with the blocks."""
    data = make_case(gpt, seed)
    keeping = gpt._replace(recomputed=False)
    ours = compile_program(*explicit(gpt, *data))
    peers = {
        "Flax, nnx.scan": (flax, keeping, 0.15),
        "Flax, nnx.scan of nnx.remat": (flax, gpt, 0.70),
        "jax.grad, the same layers": (autodiff, keeping, None),
    }
    for peer, (make, their_gpt, memory) in peers.items():
        row = Row(str(gpt), peer, "")
        try:
            theirs = compile_program(*make(their_gpt, *data))
            seconds = measure([ours.run, theirs.run], repeats)
        except Exception as error:  # whatever goes wrong with a peer, the others are measured
            yield row._replace(problem=describe_problem(error))
            continue
        yield compare_memory(row, f"<= {memory:.2f}" if memory else "", ours, theirs)
        yield fill(row._replace(what="time"), seconds[0] / seconds[1], *seconds, ours, theirs)
        makers = [functools.partial(explicit, gpt), functools.partial(make, their_gpt)]
        yield compare_compilation(row, "<= 0.50", [(make, data) for make in makers])
    if gpt.blocks > FEW_BLOCKS:
        few = gpt._replace(blocks=FEW_BLOCKS)
        row = Row(str(gpt), f"the same with {FEW_BLOCKS} blocks", "")
        sides = [(functools.partial(explicit, gpt), data)]
        sides.append((functools.partial(explicit, few), make_case(few, seed)))
        yield compare_compilation(row, "1", sides)


def compare_memory(row, wanted, ours, theirs):
    ratio = ours.temporary_bytes / theirs.temporary_bytes
    return row._replace(
        what="temporary memory",
        wanted=wanted,
        ratio=ratio,
        quartiles=(ratio, ratio),  # it is the same in every round
        temporary_bytes=(ours.temporary_bytes, theirs.temporary_bytes),
    )


def compare_compilation(row, wanted, sides):
    """The row of two programs' times to trace and compile, each of them anew in every round.

    A side is a maker and its data. What is cached of a compilation is forgotten before each.
    """
    seconds = np.empty((2, COMPILATIONS))
    for r in range(COMPILATIONS):
        for i in (0, 1) if r % 2 == 0 else (1, 0):
            make, data = sides[i]
            jax.clear_caches()
            seconds[i, r] = compile_program(*make(*data)).compile_s
    low, middle, high = map(float, np.quantile(seconds[0] / seconds[1], [0.25, 0.5, 0.75]))
    return row._replace(
        what="compilation",
        wanted=wanted,
        ratio=middle,
        quartiles=(low, high),
        compile_s=tuple(float(np.median(s)) for s in seconds),
    )


def quantities(gpt, repeats, seed):
    """A row for each quantity beside the gradient, and for the norms by the gradient of each."""
    net, data = make_gpt(gpt), make_case(gpt, seed)
    gradient = compile_program(*explicit(gpt, *data))
    makers = {
        "norms": gradient_and_norms,
        "clipped sum, one sweep": make_clipped(1),
        "clipped sum, two sweeps": make_clipped(2),
    }
    for what, make in makers.items():
        program = compile_program(make(net), *data)
        ours, theirs = measure([program.run, gradient.run], repeats)
        row = Row(str(gpt), "bp.value_and_grad", "<= 1.30", what)
        yield fill(row, ours / theirs, ours, theirs, program, gradient)
    row = Row(str(gpt), "jax.vmap(jax.grad)", "< 1", "norms")
    params, tokens, _ = data
    size = len(tokens) * sum(array.nbytes for array in jax.tree.leaves(params))
    if size > PER_EXAMPLE_BYTES:
        yield row._replace(problem=too_large(size))
        return
    programs = [
        compile_program(gradient_and_norms(net), *data),
        compile_program(gradient_and_norms_by_vmap(gpt), *data),
    ]
    ours, theirs = measure([program.run for program in programs], math.ceil(repeats / 3))
    yield fill(row, ours / theirs, ours, theirs, *programs)


def training(case, repeats, seed):
    """A row for each peer that trains the same network: our time against theirs."""
    params, *_ = make_case(case.gpt, seed)
    data = make_tokens(case.gpt, seed, n=case.examples)
    run, program = train_jaxbp(case, params, *data, seed)
    for peer, make in {"Flax": train_flax, "PyTorch": train_torch}.items():
        row = Row(str(case), peer, "")
        try:
            their_run = make(case, params, *data, seed)
            losses = run(), their_run()
            ours, theirs = measure([run, their_run], math.ceil(repeats / 3))
        except Exception as error:  # whatever goes wrong with a peer, the others are measured
            yield row._replace(problem=describe_problem(error))
            continue
        tokens = case.epochs * data[0].size
        rates = [f"{tokens / float(np.median(s)):,.0f}" for s in (ours, theirs)]
        row = row._replace(what=" / ".join(rates), loss=losses)
        yield fill(row, ours / theirs, ours / case.epochs, theirs / case.epochs, program)


# The sides of a comparison: a function to compile, and its arguments.


def explicit(gpt, params, tokens, labels):
    return bp.value_and_grad(make_gpt(gpt), LOSS), params, tokens, labels


def autodiff(gpt, params, tokens, labels):
    """Of the library's forward pass."""
    return jax.value_and_grad(mean_loss_of(make_gpt(gpt))), params, tokens, labels


def plain(gpt, params, tokens, labels):
    return jax.value_and_grad(plain_mean_loss(gpt)), params, tokens, labels


def flax(gpt, params, tokens, labels):
    return jax.value_and_grad(flax_mean_loss(gpt)), flax_state(gpt, params), tokens, labels


def torch_program(gpt, params, tokens, labels):
    """PyTorch's step, with one thread or as many as there are cores, whichever is faster."""
    data = make_torch_data(tokens, labels)
    return torch_gradient(make_torch_gpt(gpt, params), torch_mean_loss, *data)


def gradient_and_norms_by_vmap(gpt):
    """The mean loss, its gradient and the norms, from the gradients of all examples."""
    return from_all_gradients(mean_and_norms, plain_mean_loss(gpt))


# Loops: a run of all epochs from the same start, which returns the last one's mean loss.


def train_jaxbp(case, params, tokens, labels, seed):
    """The run, and its program."""
    net, data = make_gpt(case.gpt), (jnp.asarray(tokens), jnp.asarray(labels))
    start = bp.init_state(net, ADAMW, jax.random.key(seed), (case.gpt.length,))
    start = start._replace(params=params)  # what AdamW remembers does not depend on them
    program = compile_program(bp.make_epoch(net, LOSS, ADAMW, batch_size=case.gpt.n), start, *data)

    def run():
        state = start
        for _ in range(case.epochs):
            state, record = program.compiled(state, *data)
        return float(jax.block_until_ready((state, record))[1]["loss"])

    return run, program


def train_flax(case, params, tokens, labels, seed):
    from flax import nnx

    graph, start = nnx.split(make_flax_gpt(case.gpt))
    nnx.replace_by_pure_dict(start, flax_weights(case.gpt, params))

    @nnx.jit
    def step(model, optimizer, tokens, labels):
        def mean_loss(model):
            return mean_cross_entropy(model(tokens), labels)

        loss, grads = nnx.value_and_grad(mean_loss)(model)
        optimizer.update(model, grads)
        return loss

    def run():
        rng = np.random.default_rng(seed)
        model = nnx.merge(graph, jax.tree.map(jnp.copy, start))
        optimizer = nnx.Optimizer(model, ADAMW, wrt=nnx.Param)
        cached_step = nnx.cached_partial(step, model, optimizer)
        for _ in range(case.epochs):
            losses = [
                cached_step(tokens[indices], labels[indices]) for indices in make_batches(case, rng)
            ]
        jax.block_until_ready(nnx.state(model))
        return float(np.mean(losses))

    return run


def train_torch(case, params, tokens, labels, seed):
    import torch

    start = make_torch_gpt(case.gpt, params)
    tokens, labels = make_torch_data(tokens, labels)

    def run():
        rng = np.random.default_rng(seed)
        model = copy.deepcopy(start)
        options = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "fused": True}
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        for _ in range(case.epochs):
            losses = []
            for indices in map(torch.from_numpy, make_batches(case, rng)):
                optimizer.zero_grad(set_to_none=True)
                loss = torch_mean_loss(model(tokens[indices]), labels[indices])
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    (run,) = at_their_fastest(run)
    return run


def make_batches(case, rng):
    return rng.permutation(case.examples).reshape(-1, case.gpt.n)


def make_case(gpt, seed):
    """The library's parameters, and one batch of tokens and labels."""
    params, _ = make_gpt(gpt).init(jax.random.key(seed), (gpt.length,))
    return params, *map(jnp.asarray, make_tokens(gpt, seed))


def make_products(side=1024, n=30):
    """A run of n matrix products, and their FLOP.

    One alone takes up to three times as long where something else has run before it.
    """
    square = jnp.ones((side, side), jnp.float32)
    product = compile_program(jnp.matmul, square, square)

    def run():
        for _ in range(n):
            product.run()

    return run, 2 * n * side**3


def step_products(gpt):
    """FLOP of the matrix products that one gradient takes: three for each matrix.

    Attention has two products forward and four on the way back, of which each position needs those
    with the positions that it sees, half of them.
    """
    matrices = 12 * gpt.blocks * gpt.features**2 + gpt.features * gpt.vocabulary
    seen = gpt.length * (gpt.length + 1) / 2
    attention = 6 * 2 * gpt.n * gpt.blocks * gpt.features * seen
    return 3 * 2 * gpt.n * gpt.length * matrices + attention


SMALL = Gpt(4, 128, 4, 64, 8)

SECTIONS = {
    "gradient": Section(
        "Gradient of a GPT",
        "explicit / peer",
        gradient,
        (SMALL, Gpt(4, 256, 8, 128, 16), Gpt(4, 512, 8, 256, 8), Gpt(8, 256, 4, 256, 8)),
        "Of PyTorch's memory, the most that was allocated at a time.",
    ),
    "deep": Section(
        "Many blocks in one loop, recomputed on the way back",
        "explicit / peer",
        deep,
        tuple(
            SMALL._replace(blocks=blocks, scanned=True, recomputed=True)
            for blocks in (FEW_BLOCKS, 32)
        ),
        "Compilations are from nothing, with no cache of any kind.",
        "of",
    ),
    "quantities": Section(
        "Norms and clipped sums of a GPT in one sweep",
        "ours / against",
        quantities,
        (SMALL, Gpt(4, 256, 8, 128, 16), Gpt(4, 512, 8, 256, 8)),
    ),
    "training": Section(
        "Training a GPT",
        "ours / theirs",
        training,
        (Training(SMALL, 256), Training(Gpt(4, 256, 8, 128, 16), 64)),
        "Times are of one epoch, by AdamW.",
        "tokens / s, ours / theirs",
    ),
}


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # compilations are timed
    tyro.cli(main)
