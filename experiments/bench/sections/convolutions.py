"""How fast convolutional networks are: against Flax, PyTorch and autodiff, on the same weights.

  gradient    the mean loss and its gradient, against the same network elsewhere
  quantities  the norm of every example's gradient, and clipped sums, against the gradient alone,
              and what peers have of them against their own

Networks are those of `convnets`, on random images. How times are taken, and what stands beside
them, is said in `bench`, and what PyTorch takes of memory in `bench_gpt`.
"""

import functools
import math
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import tyro

import jaxbp as bp
from experiments.bench.convnets import (
    Convnet,
    channels_first,
    flax_mean_loss,
    flax_state,
    make_convnet,
    make_images,
    make_torch_convnet,
    plain_mean_loss,
)
from experiments.bench.peers import (
    backpack_runs,
    from_all_gradients,
    make_torch_data,
    mean_and_norms,
    opacus_runs,
    torch_gradient,
)
from experiments.bench.quantities import gradient_and_norms, make_clipped
from experiments.bench.runner import (
    Row,
    Section,
    fill,
    gradient_rows,
    mean_loss_of,
    peer_rows,
    run_sections,
)
from experiments.bench.trainers import LOSS
from experiments.common.measuring import compile_program, measure

NAMES = ("gradient", "quantities")


def main(
    *,
    sections: tuple[Literal[*NAMES], ...] = NAMES,
    repeats: int = 15,
    quick: bool = False,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Measures convolutional networks against their peers and prints a table for each section.

    Args:
      sections: which to measure.
      repeats: rounds for each figure. What forms all gradients has a third as many.
      quick: only the smallest case of each section.
      seed: of weights and data.
      json: a file for the same figures, unrounded.
    """
    chosen = {name: SECTIONS[name] for name in sections}
    run_sections("bench_conv", chosen, repeats, quick, seed, json)


def gradient(case, repeats, seed):
    """A row for each peer: one step's gradient against theirs."""
    peers = {
        "Flax": (flax, "<= 1.00"),
        "jax.grad, the same layers": (autodiff, "<= 1.00"),
        "jax.grad, plain lax": (plain, "<= 1.00"),
        "PyTorch": (torch_program, ""),
    }
    return gradient_rows(case, make_case(case, seed), explicit, peers, repeats)


def quantities(case, repeats, seed):
    """A row for each quantity beside the gradient, for the norms from all gradients, and peers'."""
    net, (params, images, labels) = make_convnet(case), make_case(case, seed)
    data = params, images, labels
    gradient = compile_program(*explicit(case, *data))
    makers = {
        "norms": gradient_and_norms,
        "clipped sum, one sweep": make_clipped(1),
        "clipped sum, two sweeps": make_clipped(2),
    }
    for what, make in makers.items():
        program = compile_program(make(net), *data)
        ours, theirs = measure([program.run, gradient.run], repeats)
        row = Row(str(case), "bp.value_and_grad", "", what)
        yield fill(row, ours / theirs, ours, theirs, program, gradient)
    programs = [
        compile_program(gradient_and_norms(net), *data),
        compile_program(from_all_gradients(mean_and_norms, plain_mean_loss), *data),
    ]
    ours, theirs = measure([program.run for program in programs], math.ceil(repeats / 3))
    row = Row(str(case), "jax.vmap(jax.grad)", "", "norms")
    yield fill(row, ours / theirs, ours, theirs, *programs)
    peers = {
        "BackPACK": (backpack_runs, "norms"),
        "Opacus": (opacus_runs, "clipped sum, ghost"),
    }
    for peer, (make_runs, what) in peers.items():
        runs = functools.partial(torch_runs, make_runs, what, case, *data)
        yield from peer_rows(case, peer, runs, repeats)


# The sides of a comparison: a function to compile, and its arguments.


def explicit(case, params, images, labels):
    return bp.value_and_grad(make_convnet(case), LOSS), params, images, labels


def autodiff(case, params, images, labels):
    """Of the library's forward pass."""
    return jax.value_and_grad(mean_loss_of(make_convnet(case))), params, images, labels


def plain(case, params, images, labels):
    del case
    return jax.value_and_grad(plain_mean_loss), params, images, labels


def flax(case, params, images, labels):
    return jax.value_and_grad(flax_mean_loss(case)), flax_state(case, params), images, labels


def torch_program(case, params, images, labels):
    """PyTorch's step, with one thread or as many as there are cores, whichever is faster."""
    from torch.nn import functional

    data = make_torch_data(channels_first(images), labels)
    return torch_gradient(make_torch_convnet(case, params), functional.cross_entropy, *data)


def torch_runs(make_runs, what, case, params, images, labels):
    """The maker of a peer's pair of runs for one quantity."""
    make_model = functools.partial(make_torch_convnet, case)
    return {what: make_runs(params, channels_first(images), labels, make_model)[what]}


def make_case(case, seed):
    """The library's parameters, and one batch of images and labels."""
    params, _ = make_convnet(case).init(jax.random.key(seed), case.shape)
    return params, *map(jnp.asarray, make_images(case, seed))


CASES = tuple(
    Convnet(*network, n)
    for network in ((28, 1, (16, 32)), (32, 3, (16, 32, 64)), (32, 3, (64, 64)))
    for n in (64, 256)
)

SECTIONS = {
    "gradient": Section(
        "Gradient of a convolutional network",
        "explicit / peer",
        gradient,
        CASES,
        "Of PyTorch's memory, the most that was allocated at a time.",
    ),
    "quantities": Section(
        "Norms and clipped sums of a convolutional network in one sweep",
        "with the quantity / against",
        quantities,
        CASES,
        "BackPACK and Opacus against the plain gradient of PyTorch.",
    ),
}


if __name__ == "__main__":
    tyro.cli(main)
