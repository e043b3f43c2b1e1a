"""A GPT, against Flax, PyTorch and autodiff, from the same weights and tokens.

  gradient    the mean loss and its gradient
  starting    how long its program takes to be traced and compiled
  deep        the same for many blocks in one loop, each recomputed in the backward pass
  quantities  the norm of every example's gradient, and clipped sums, against the gradient alone
  training    epochs of AdamW on random tokens, against the loops of Flax and PyTorch

PyTorch's memory is the largest number of bytes that it had allocated at a time, beyond what it held
before. The compiler's figure for the other programs excludes their outputs, the gradients.

PyTorch's threads wait for each other in a busy loop. When other work runs on the machine, it slows
down by multiples. Its figures, and ours beside them, need an otherwise idle machine.
"""

import functools

from experiments.bench.comparing import (
    compare_compilation,
    compare_starting,
    gradient_rows,
    norms_rows,
    training_rows,
)
from experiments.bench.loops import Training, train_jaxbp
from experiments.bench.machine import long_rounds
from experiments.bench.networks.gpts import (
    Gpt,
    explicit,
    make_case,
    make_net,
    make_tokens,
    plain,
    plain_mean_loss,
    same_layers,
    step_products,
)
from experiments.bench.peers import flax_networks, torch_networks
from experiments.bench.peers.torch_runs import train_torch
from experiments.bench.tables import Row, Table, describe_problem, fill
from experiments.common.measuring import compile_program, measure

FEW_BLOCKS = 8


def gradient(gpt, repeats, seed):
    """A row for each peer."""
    peers = {
        "Flax": (flax_networks.gpt_side, "<= 0.85, memory <= 0.85"),
        "PyTorch": (torch_networks.gpt_side, "<= 1.00"),
        "jax.grad, the same layers": (same_layers, "<= 0.75"),
        "jax.grad, plain jnp": (plain, ""),
    }
    data, products = make_case(gpt, seed), step_products(gpt)
    return gradient_rows(gpt, data, explicit, peers, repeats, products=products)


def deep(gpt, repeats, seed):
    """Rows for each peer's memory, time and compilation, and for ours with fewer blocks."""
    data = make_case(gpt, seed)
    keeping = gpt._replace(recomputed=False)
    ours = compile_program(*explicit(gpt, *data))
    peers = {
        "Flax, nnx.scan": (flax_networks.gpt_side, keeping, 0.15),
        "Flax, nnx.scan of nnx.remat": (flax_networks.gpt_side, gpt, 0.70),
        "jax.grad, the same layers": (same_layers, keeping, None),
    }
    for peer, (side, their_gpt, memory) in peers.items():
        row = Row(str(gpt), peer, "")
        try:
            theirs = compile_program(*side(their_gpt, *data))
            seconds = measure([ours.run, theirs.run], repeats)
        except Exception as error:  # the other peers are still measured
            yield row._replace(problem=describe_problem(error))
            continue
        yield compare_memory(row, f"<= {memory:.2f}" if memory else "", ours, theirs)
        yield fill(
            row._replace(what="time"), seconds[0] / seconds[1], *seconds, ours, theirs,
            products=step_products(gpt),
        )  # fmt: skip
        makers = [functools.partial(explicit, gpt), functools.partial(side, their_gpt)]
        sides = [(make, data) for make in makers]
        yield compare_compilation(row, "<= 0.50", sides, long_rounds(repeats))
    if gpt.blocks > FEW_BLOCKS:
        few = gpt._replace(blocks=FEW_BLOCKS)
        row = Row(str(gpt), f"the same with {FEW_BLOCKS} blocks", "")
        sides = [(functools.partial(explicit, gpt), data)]
        sides.append((functools.partial(explicit, few), make_case(few, seed)))
        yield compare_compilation(row, "1", sides, long_rounds(repeats))


def starting(gpt, repeats, seed):
    """Rows for tracing and for compiling the gradient, against autodiff."""
    data = make_case(gpt, seed)
    for peer, side in (
        ("jax.grad, the same layers", same_layers),
        ("jax.grad, plain jnp", plain),
    ):
        sides = [(functools.partial(make, gpt), data) for make in (explicit, side)]
        row = Row(str(gpt), peer, "")
        yield from compare_starting(row, ("<= 1.00", "<= 0.60"), sides, long_rounds(repeats))


def compare_memory(row, wanted, ours, theirs):
    ratio = ours.temporary_bytes / theirs.temporary_bytes
    return row._replace(
        what="temporary memory",
        wanted=wanted,
        ratio=ratio,
        quartiles=(ratio, ratio),  # the same in every round
        temporary_bytes=(ours.temporary_bytes, theirs.temporary_bytes),
    )


def quantities(gpt, repeats, seed):
    """A row for the norms and each clipped sum."""
    net, data, mean_loss = make_net(gpt), make_case(gpt, seed), plain_mean_loss(gpt)
    return norms_rows(gpt, net, data, mean_loss, repeats, wanted="<= 1.30", wanted_of_vmap="< 1")


def training(case, repeats, seed):
    """A row for each peer that trains the same network."""
    gpt = case.network
    params, *_ = make_case(gpt, seed)
    data = make_tokens(gpt, seed, n=case.examples)
    run, program = train_jaxbp(case, make_net(gpt), params, *data, seed)
    peers = {
        "Flax": (functools.partial(flax_networks.train_gpt, case, params, *data, seed), ""),
        "PyTorch": (functools.partial(make_torch_run, case, params, *data, seed), ""),
    }
    tokens, _ = data
    products = step_products(gpt) * case.examples / gpt.n
    yield from training_rows(
        case, run, program, peers, repeats, items=tokens.size, products=products
    )


def make_torch_run(case, params, tokens, labels, seed):
    start = torch_networks.gpt(case.network, params)
    return train_torch(case, start, torch_networks.sequence_mean_loss, tokens, labels, seed)


SMALL, MEDIUM, LARGE = Gpt(4, 128, 4, 64, 8), Gpt(4, 256, 8, 128, 16), Gpt(4, 512, 8, 256, 8)
ON_GPU, WIDE_ON_GPU = Gpt(4, 1024, 16, 512, 16), Gpt(4, 2048, 16, 1024, 8)
DEEP = {"scanned": True, "recomputed": True}

TABLES = {
    "gradient": Table(
        "Gradient of a GPT",
        "explicit / peer",
        gradient,
        (SMALL, MEDIUM, LARGE, Gpt(8, 256, 4, 256, 8)),
        (ON_GPU, WIDE_ON_GPU),
        "PyTorch's memory is the largest number of bytes allocated at a time.",
    ),
    "starting": Table(
        "Tracing and compiling the gradient of a GPT",
        "explicit / peer",
        starting,
        (SMALL, MEDIUM),
        (ON_GPU,),
        "Each time starts with empty caches. All blocks are unrolled.",
        "to",
    ),
    "deep": Table(
        "Many blocks in one loop, recomputed in the backward pass",
        "explicit / peer",
        deep,
        tuple(SMALL._replace(blocks=blocks, **DEEP) for blocks in (FEW_BLOCKS, 32)),
        (Gpt(32, 1024, 16, 512, 4, **DEEP),),
        "Every compilation starts with empty caches.",
        "of",
    ),
    "quantities": Table(
        "Norms and clipped sums of a GPT in one sweep",
        "ours / against",
        quantities,
        (SMALL, MEDIUM, LARGE),
        (ON_GPU,),
    ),
    "training": Table(
        "Training a GPT",
        "theirs / ours",
        training,
        (Training(SMALL, 256, "AdamW"), Training(MEDIUM, 64, "AdamW")),
        (Training(ON_GPU, 256, "AdamW"),),
        "Times are of one epoch.",
        "tokens / s, ours / theirs",
    ),
}
