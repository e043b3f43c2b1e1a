"""Comparisons: programs that take turns, and the rows that they give.

A peer that is missing or fails gives a row that says so, and the other peers are still measured.
"""

import operator
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxbp as bp
from experiments.bench.machine import gemm_side, long_rounds, per_example_limit
from experiments.bench.networks.sides import LOSS
from experiments.bench.peers.per_example import (
    FORM_ALL_GRADIENTS,
    from_all_gradients,
    mean_and_norms,
)
from experiments.bench.quantities import NORMS_AND_CLIPPED_SUMS, gradient_and_norms
from experiments.bench.tables import Row, describe_problem, fill
from experiments.common.measuring import compile_program, make_program, measure


def gradient_rows(case, data, explicit, peers, repeats, *, products):
    """A row for each peer: the explicit gradient against the peer's.

    Args:
      case: the network.
      data: its parameters, inputs and labels.
      explicit: our side.
      peers: for each peer's name, its side and the wanted figure.
      repeats: rounds.
      products: FLOP of the matrix products of one gradient.
    """
    ours = make_program(explicit, case, *data)
    multiply, multiply_flop = make_products()
    for peer, (side, wanted) in peers.items():
        row = Row(str(case), peer, wanted)
        try:
            theirs = make_program(side, case, *data)
            *seconds, gemm = measure([ours.run, theirs.run, multiply], repeats)
        except Exception as error:
            yield row._replace(problem=describe_problem(error))
            continue
        row = row._replace(gemm_share=gemm_share(products / seconds[0], multiply_flop / gemm))
        yield fill(row, seconds[0] / seconds[1], *seconds, ours, theirs, products=products)


def make_products(n=30):
    """A run of n products of large matrices, and their FLOP.

    One alone takes up to three times as long directly after another program.
    """
    side = gemm_side()
    square = jnp.ones((side, side), jnp.float32)
    product = compile_program(jnp.matmul, square, square)

    def run():
        for _ in range(n):
            product.run()

    return run, 2 * n * side**3


def gemm_share(rates, gemm_rates):
    """The median over the rounds of a rate as a share of the machine's GEMM rate."""
    return float(np.median(rates / gemm_rates))


def norms_rows(case, net, data, plain_mean_loss, repeats, *, wanted="", wanted_of_vmap=""):
    """A row for the norms and each clipped sum beside the gradient, and for the norms by vmap.

    Args:
      case: the network.
      net: the same in the library.
      data: its parameters, inputs and labels.
      plain_mean_loss: its mean loss in plain JAX.
      repeats: rounds.
      wanted: for what is measured against the gradient.
      wanted_of_vmap: for what is measured against `jax.vmap(jax.grad)`.
    """
    gradient = compile_program(bp.value_and_grad(net, LOSS), *data)
    for what, make in NORMS_AND_CLIPPED_SUMS.items():
        program = compile_program(make(net), *data)
        ours, theirs = measure([program.run, gradient.run], repeats)
        row = Row(str(case), "bp.value_and_grad", wanted, what)
        yield fill(row, ours / theirs, ours, theirs, program, gradient)
    row = Row(str(case), "jax.vmap(jax.grad)", wanted_of_vmap, "norms")
    yield compare_with_vmap(row, net, data, plain_mean_loss, repeats, operator.truediv)


def compare_with_vmap(row, net, data, plain_mean_loss, repeats, ratio):
    """The row for the gradient and norms in one sweep, against those from all gradients.

    Args:
      row: what is measured.
      net: the network in the library.
      data: its parameters, inputs and labels.
      plain_mean_loss: its mean loss in plain JAX.
      repeats: rounds, of which this has fewer.
      ratio: `ratio(ours, theirs)` of the seconds.
    """
    params, inputs, _ = data
    size = gradients_bytes(params, len(inputs))
    if size > per_example_limit():
        return row._replace(problem=too_large(size))
    programs = [
        compile_program(gradient_and_norms(net), *data),
        compile_program(from_all_gradients(mean_and_norms, plain_mean_loss), *data),
    ]
    ours, theirs = measure([program.run for program in programs], long_rounds(repeats))
    return fill(row, ratio(ours, theirs), ours, theirs, *programs)


def gradients_bytes(params, n):
    """Bytes that the gradients of n examples take."""
    return n * sum(array.nbytes for array in jax.tree.leaves(params))


def too_large(size):
    return f"not run: the gradients alone take {size / 1e9:.1f} GB"


def compare_compilation(row, wanted, sides, rounds):
    """The row for the times that two programs take to be traced and compiled.

    A side is a maker of a program and its data. JAX's caches are cleared before every compilation.
    """
    seconds = np.empty((2, rounds))
    for r in range(rounds):
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


def compare_starting(row, wanted, sides, rounds):
    """The rows for the times that two programs take to be traced, and to be lowered and compiled.

    Args:
      row: what the two programs are.
      wanted: the wanted figure for each of the two rows.
      sides: makers of a program, and their data. JAX's caches are cleared before each.
      rounds: the number of rounds.
    """
    seconds = np.empty((2, 2, rounds))
    for r in range(rounds):
        for i in (0, 1) if r % 2 == 0 else (1, 0):
            make, data = sides[i]
            function, *args = make(*data)
            jax.clear_caches()
            start = time.perf_counter()
            traced = jax.jit(function).trace(*args)
            between = time.perf_counter()
            traced.lower().compile()
            seconds[:, i, r] = between - start, time.perf_counter() - between
    for what, figure, (ours, theirs) in zip(("trace", "compile"), wanted, seconds, strict=True):
        yield fill(row._replace(what=what, wanted=figure), ours / theirs, ours, theirs)


def training_rows(training, ours, program, peers, repeats, *, items, products):
    """A row for each peer that trains the same network: its time as a multiple of ours.

    Args:
      training: the case.
      ours: our run of all epochs.
      program: its program.
      peers: for each peer's name, a maker of its run and the wanted figure.
      repeats: rounds, of which training, whose samples are long, has fewer.
      items: examples or tokens in an epoch.
      products: FLOP of the matrix products in an epoch.
    """
    for peer, (make, wanted) in peers.items():
        row = Row(str(training), peer, wanted)
        try:
            theirs = make()
            losses = ours(), theirs()
            seconds = measure([ours, theirs], long_rounds(repeats)) / training.epochs
        except Exception as error:
            yield row._replace(problem=describe_problem(error))
            continue
        rates = " / ".join(f"{items / float(np.median(s)):,.0f}" for s in seconds)
        row = row._replace(what=rates, loss=losses)
        yield fill(row, seconds[1] / seconds[0], *seconds, program, products=products)


def peer_rows(case, peer, make_runs, repeats, *, size=0, plain="its plain gradient"):
    """A row for each quantity of a peer, against the gradient or step of its own framework.

    Args:
      case: the network.
      peer: its name.
      make_runs: returns for each quantity a maker of two runs, with it and without.
      repeats: rounds; fewer for what forms the gradients of all examples.
      size: bytes that the gradients of all examples take.
      plain: what the second run is.
    """
    row = Row(str(case), f"{peer}: {plain}", "")
    try:
        runs = make_runs()
    except Exception as error:
        yield row._replace(problem=describe_problem(error))
        return
    for what, make_pair in runs.items():
        row = row._replace(what=what)
        forms_all = (peer, what) in FORM_ALL_GRADIENTS
        if forms_all and size > per_example_limit():
            yield row._replace(problem=too_large(size))
            continue
        try:
            rounds = long_rounds(repeats) if forms_all else repeats
            ours, theirs = measure(make_pair(), rounds)
        except Exception as error:
            yield row._replace(problem=describe_problem(error))
        else:
            yield fill(row, ours / theirs, ours, theirs)
