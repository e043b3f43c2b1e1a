"""Models of Flax and Equinox, lifted by `bp.lift`, against autodiff of the same model.

  gradient  the gradient, alone and with the norm of every example's, and the sum of clipped
            gradients, against `jax.grad`; the norms also against `jax.vmap(jax.grad)`
  private   private gradients against jax_privacy, and Opacus where PyTorch has the network
  kfac      steps of KFAC against kfac-jax, and against SGD and Adam without curvature

Both sides of a row have the same parameters and batch.
"""

import functools
import operator

import jax
import optax

import jaxbp as bp
from experiments.bench.comparing import (
    compare_compilation,
    compare_with_vmap,
    gradients_bytes,
    too_large,
)
from experiments.bench.machine import long_rounds, per_example_limit
from experiments.bench.networks.convnets import Convnet, Resnet
from experiments.bench.networks.gpts import Gpt
from experiments.bench.networks.perceptrons import Perceptron
from experiments.bench.networks.recurrent import Sequence
from experiments.bench.networks.sides import LOSS
from experiments.bench.peers import kfac_steps, private_steps
from experiments.bench.peers.models import Foreign, lift, make_model
from experiments.bench.quantities import gradient_and_norms, make_clipped
from experiments.bench.tables import Row, Table, describe_problem, fill
from experiments.common.measuring import compile_program, measure


def make_gradient(net):
    return bp.value_and_grad(net, LOSS)


# Each with the wanted ratio to the gradient by autodiff.
QUANTITIES = {
    "gradient": (make_gradient, 1.05),
    "gradient and norms": (gradient_and_norms, 1.25),
    "clipped sum, two sweeps": (make_clipped(2), 1.60),
}


def or_problem(rows):
    """The rows of a case; if its framework is missing or the lift fails, one that says so."""

    @functools.wraps(rows)
    def complete(case, repeats, seed):
        try:
            model = make_model(case, seed)
            lifted = lift(model)
        except Exception as error:
            yield Row(str(case), "", "", problem=describe_problem(error))
            return
        yield from rows(case, model, lifted, repeats)

    return complete


@or_problem
def gradient(case, model, lifted, repeats):
    """A row for each quantity, one for the norms by vmap, and one for compilation."""
    del model
    net, data, mean_loss = lifted
    plain = compile_program(jax.value_and_grad(mean_loss), *data)
    for what, (make, wanted) in QUANTITIES.items():
        row = Row(str(case), "jax.grad", f"<= {wanted:.2f}", what)
        try:
            program = compile_program(make(net), *data)
            ours, theirs = measure([program.run, plain.run], repeats)
        except Exception as error:  # the other quantities are still measured
            yield row._replace(problem=describe_problem(error))
            continue
        yield fill(row, ours / theirs, ours, theirs, program, plain)
    row = Row(str(case), "jax.vmap(jax.grad)", "< 1", "gradient and norms")
    yield compare_with_vmap(row, net, data, mean_loss, repeats, operator.truediv)
    sides = [
        (lambda *data: (make_gradient(net), *data), data),
        (lambda *data: (jax.value_and_grad(mean_loss), *data), data),
    ]
    row = Row(str(case), "jax.grad", "")
    yield compare_compilation(row, "", sides, long_rounds(repeats))


@or_problem
def private(case, model, lifted, repeats):
    """Rows for the private gradient in one sweep and in two, against each peer."""
    net, data, _ = lifted
    size = gradients_bytes(model.params, len(model.inputs))
    programs = {
        what: private_steps.ours(net, data, sweeps)
        for what, sweeps in (("one sweep", 1), ("two sweeps", 2))
    }
    for peer, make in private_steps.find_peers(case, model, lifted).items():
        wanted = "memory <= 0.30" if peer == "jax_privacy" else ""
        row = Row(str(case), peer, wanted)
        if peer == "jax_privacy" and size > per_example_limit():
            yield row._replace(problem=too_large(size))
            continue
        try:
            theirs = make()
            runs = [*(program.run for program in programs.values()), theirs.run]
            *seconds, their_seconds = measure(runs, long_rounds(repeats))
        except Exception as error:
            yield row._replace(problem=describe_problem(error))
            continue
        for (what, program), ours in zip(programs.items(), seconds, strict=True):
            row = row._replace(what=what)
            yield fill(row, ours / their_seconds, ours, their_seconds, program, theirs)


@or_problem
def kfac(case, model, lifted, repeats):
    """Rows against kfac-jax and SGD, and one with fewer batches of factors against Adam."""
    net, data, _ = lifted
    adam = optax.adam(kfac_steps.LEARNING_RATE)
    sides = {
        "kfac-jax": (1, functools.partial(kfac_steps.kfac_jax, model), ""),
        "bp.make_step, optax.sgd": (1, functools.partial(kfac_steps.plain, net, data), ""),
        "bp.make_step, optax.adam": (
            kfac_steps.EVERY,
            functools.partial(kfac_steps.plain, net, data, adam),
            "<= 1.20",
        ),
    }
    for peer, (factors_every, make, wanted) in sides.items():
        row = Row(
            str(case), peer, wanted, "1 step" if factors_every == 1 else f"{factors_every} steps"
        )
        try:
            runs = [kfac_steps.ours(net, data, factors_every=factors_every), make()]
            ours, theirs = measure(runs, repeats) / kfac_steps.EVERY
        except Exception as error:
            yield row._replace(problem=describe_problem(error))
            continue
        yield fill(row, ours / theirs, ours, theirs)


def flax(*networks):
    return tuple(Foreign("Flax", network) for network in networks)


GPT, GPT_ON_GPU = Gpt(4, 128, 4, 64, 8), Gpt(4, 1024, 16, 512, 16)
RESNET, RESNET_ON_GPU = Resnet(32, 3, (16, 32, 64), 1, 32), Resnet(32, 3, (64, 128, 256), 2, 512)
CONVNET, CONVNET_ON_GPU = Convnet(28, 1, (16, 32), 64), Convnet(32, 3, (64, 128, 256), 512)
MLP, MLP_ON_GPU = Perceptron((784, 512, 512, 10), 128), Perceptron((784, 4096, 4096, 10), 1024)

TABLES = {
    "gradient": Table(
        "Gradient, norms and clipped sum of a lifted model",
        "lifted / against",
        gradient,
        (
            *flax(GPT, Gpt(4, 256, 8, 128, 16), RESNET, Sequence("LSTM", 128)),
            Foreign("Equinox", MLP),
        ),
        (
            *flax(GPT_ON_GPU, RESNET_ON_GPU, Sequence("LSTM", 512, n=256)),
            Foreign("Equinox", MLP_ON_GPU),
        ),
        "Every compilation in a row of its own starts with empty caches.",
    ),
    "private": Table(
        "Private gradient of a lifted model",
        "lifted / peer",
        private,
        flax(MLP, GPT._replace(blocks=2, n=32), RESNET, CONVNET),
        flax(MLP_ON_GPU, GPT_ON_GPU, RESNET_ON_GPU, CONVNET_ON_GPU),
        "Opacus's memory is the largest number of bytes allocated at a time.",
        "of ours",
    ),
    "kfac": Table(
        "A step of KFAC on a lifted model",
        "lifted / against",
        kfac,
        flax(MLP, CONVNET, Gpt(2, 128, 4, 128, 16)),
        flax(MLP_ON_GPU, CONVNET_ON_GPU),
        f"The mean over {kfac_steps.EVERY} steps, in one of which the factors are inverted.",
        "factors every",
    ),
}
