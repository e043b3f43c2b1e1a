"""How fast it is: ratios of two programs that do the same work, measured side by side.

  gradient    `bp.value_and_grad` against `jax.value_and_grad`
  training    epochs of `bp.make_epoch` against PyTorch and scikit-learn
  norms       the gradient and the norm of each example's, in one sweep, against the gradient alone
  vmap        the same gradient and norms, against those from `jax.vmap(jax.grad(...))`
  quantities  what else a sweep reads off, and what peers do, each against its own plain gradient
  rules       a training step under each rule, and a peer's, each against its own exact step

The two take turns in one process, in reversed order every other round, so that whatever drifts or
goes first does so for both. A figure is the median over the rounds of the ratio within a round,
with the quartiles in parentheses. Compilation is not part of any time.

After a turn of the other side, threads sleep and caches are cold: the first calls of a small
program are up to a third slower, after PyTorch as after a pause. So a sample of a program that
takes less than a hundredth of a second is many calls, and one before them that is not timed.

Beside the times stand two figures of the compiler's that are the same in every run: the bytes that
a program takes beyond its inputs and outputs, and its FLOP, in which the body of a loop counts
once. A sweep that computed something twice would show there.
"""

import functools
import itertools
import json as json_format
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

import jaxbp as bp
from experiments.bench.feedback_rules import biotorch_runs, compile_step, make_blocks, make_rules
from experiments.bench.peers import FORM_ALL_GRADIENTS, PEERS, from_all_gradients, mean_and_norms
from experiments.bench.quantities import QUANTITIES, gradient_and_norms
from experiments.bench.trainers import (
    LOSS,
    Training,
    make_net,
    mean_cross_entropy,
    plain_mean_loss,
    train_jaxbp,
    train_sklearn,
    train_torch,
)
from experiments.common.files import whole
from experiments.common.measuring import (
    compile_program,
    describe_environment,
    make_program,
    measure,
)

NAMES = ("gradient", "training", "norms", "vmap", "quantities", "rules")
PER_EXAMPLE_BYTES = 512 * 1024**2  # the most that the gradients of all examples may take


class Case(NamedTuple):
    """A multilayer perceptron of these sizes, inputs first, on a batch of N, at T positions."""

    sizes: tuple[int, ...]
    n: int
    activation: str = "relu"
    t: int | None = None

    def __str__(self):
        at = f", T = {self.t}" if self.t else ""
        return f"{show_sizes(self.sizes)} {self.activation}, N = {self.n}{at}"


class Row(NamedTuple):
    """One line of a table. Pairs are (ours, theirs); None is what there is not."""

    case: str
    against: str
    wanted: str
    what: str | None = None
    ratio: float | None = None
    quartiles: tuple | None = None
    ms: tuple | None = None
    gemm_share: float | None = None
    temporary_bytes: tuple | None = None
    flop: tuple | None = None
    compile_s: tuple | None = None
    loss: tuple | None = None
    problem: str | None = None


class Section(NamedTuple):
    """A table: its title, what its ratios are of, who makes a case's rows, the cases, and a note.

    A quick run has the first case alone. `what` is what tells the rows of a case apart.
    """

    title: str
    ratio: str
    rows: Callable
    cases: tuple
    note: str = ""
    what: str = "quantity"


def main(
    *,
    sections: tuple[Literal[*NAMES], ...] = NAMES,
    repeats: int = 15,
    quick: bool = False,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Measures the library against its peers and prints a table for each section.

    Args:
      sections: which to measure.
      repeats: rounds for each figure. Training, whose samples are long, has a third as many.
      quick: only the smallest case of each section.
      seed: of weights and data.
      json: a file for the same figures, unrounded.
    """
    run_sections("bench", {name: SECTIONS[name] for name in sections}, repeats, quick, seed, json)


def run_sections(program, sections, repeats, quick, seed, json):
    """Measures the sections of a program and prints and saves their tables."""
    if repeats < 1:
        raise SystemExit(f"{program}: repeats is {repeats}; it takes at least 1.")
    if not 0 <= seed < 2**32:
        raise SystemExit(f"{program}: seed is {seed}; it takes an integer in [0, 2^32).")
    if json is not None and not json.parent.is_dir():
        raise SystemExit(f"{program}: json is {json}; there is no directory {json.parent}.")
    environment = describe_environment()
    print(*(f"{name}: {what}  " for name, what in environment.items()), sep="\n")
    tables = {}
    for name, section in sections.items():
        cases = section.cases[:1] if quick else section.cases
        progress = tqdm(cases, desc=name, leave=False, disable=None)
        tables[name] = [row for case in progress for row in section.rows(case, repeats, seed)]
        print_table(section, tables[name])
    if json is not None:
        rows = {name: [row._asdict() for row in table] for name, table in tables.items()}
        with whole(json) as unfinished:
            figures = {"environment": environment, **rows}
            unfinished.write_text(json_format.dumps(figures, indent=1))


def gradient(case, repeats, seed):
    """A row for one step's gradient, against the faster of two ways to write it for autodiff."""
    net, *data = make_case(case, seed)
    side = 1024
    square = jnp.ones((side, side), jnp.float32)
    explicit = compile_program(bp.value_and_grad(net, LOSS), *data)
    peers = {
        "the same layers": compile_program(jax.value_and_grad(mean_loss_of(net)), *data),
        "plain jnp": compile_program(jax.value_and_grad(plain_mean_loss(case.activation)), *data),
    }
    product = compile_program(jnp.matmul, square, square)
    programs = [explicit, *peers.values(), product]
    ours, *theirs, gemm = measure([program.run for program in programs], repeats)
    peer, theirs = min(zip(peers, theirs, strict=True), key=lambda pair: np.median(pair[1]))
    rate, gemm_rate = step_products(case) / np.median(ours), 2 * side**3 / np.median(gemm)
    row = Row(str(case), f"jax.value_and_grad, {peer}", "<= 1.00", gemm_share=rate / gemm_rate)
    yield fill(row, ours / theirs, ours, theirs, explicit, peers[peer])


def training(case, repeats, seed):
    """A row for each peer that trains the same network: their time as a multiple of ours."""
    inputs, labels = make_data(case.sizes, case.examples, seed)
    run, program = train_jaxbp(case, inputs, labels, seed)
    peers = {"PyTorch": (train_torch, ">= 1.3"), "scikit-learn": (train_sklearn, ">= 5")}
    for peer, (make, wanted) in peers.items():
        try:
            against, their_run = make(case, inputs, labels, seed)
            losses = run(), their_run()
            ours, theirs = measure([run, their_run], math.ceil(repeats / 3))
        except Exception as error:  # whatever goes wrong with a peer, the others are measured
            yield Row(str(case), peer, wanted, problem=describe_problem(error))
            continue
        row = Row(str(case), against, wanted, loss=losses)
        yield fill(row, theirs / ours, ours / case.epochs, theirs / case.epochs, program)


def norms(case, repeats, seed):
    """A row for what the norms cost on top of the gradient."""
    net, *data = make_case(case, seed)
    programs = [
        compile_program(gradient_and_norms(net), *data),
        compile_program(bp.value_and_grad(net, LOSS), *data),
    ]
    ours, theirs = measure([program.run for program in programs], repeats)
    row = Row(str(case), "bp.value_and_grad", "<= 1.10")
    yield fill(row, ours / theirs, ours, theirs, *programs)


def vmap(case, repeats, seed):
    """A row for the gradient of every example, formed and then summed and measured."""
    net, *data = make_case(case, seed)
    row = Row(str(case), "jax.vmap(jax.grad)", "> 1")
    size = gradients_bytes(case)
    if size > PER_EXAMPLE_BYTES:
        yield row._replace(problem=too_large(size))
        return
    programs = [
        compile_program(gradient_and_norms(net), *data),
        compile_program(gradient_and_norms_by_vmap(case), *data),
    ]
    ours, theirs = measure([program.run for program in programs], repeats)
    yield fill(row, theirs / ours, ours, theirs, *programs)


def quantities(case, repeats, seed):
    """A row for each quantity that a sweep reads off beside the gradient, and the peers' rows."""
    net, *data = make_case(case, seed)
    plain = compile_program(bp.value_and_grad(net, LOSS), *data)
    for what, (wanted, make) in QUANTITIES.items():
        if case.t and what == "GGN diagonal (exact)":
            columns = case.t * case.sizes[-1]
            problem = f"not run: it takes {columns} columns, T for each class"
            yield Row(str(case), "bp.value_and_grad", "", what, problem=problem)
            continue
        program = compile_program(make(net), *data)
        ours, theirs = measure([program.run, plain.run], repeats)
        wanted = f"<= {wanted:.2f}" if wanted else ""
        row = Row(str(case), "bp.value_and_grad", wanted, what)
        yield fill(row, ours / theirs, ours, theirs, program, plain)
    if case.t is None:  # not every peer takes positions
        for peer, make_runs in PEERS.items():
            yield from peer_rows(case, peer, functools.partial(make_runs, *data), repeats)


def rules(case, repeats, seed):
    """A row for a training step under each rule, against the exact step, and the peer's rows."""
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


def peer_rows(case, peer, make_runs, repeats, *, plain="its plain gradient"):
    """What a peer's quantities cost, against the plain gradient or step of its own framework."""
    row = Row(str(case), f"{peer}: {plain}", "")
    try:
        runs = make_runs()
    except Exception as error:  # whatever goes wrong with a peer, the others are measured
        yield row._replace(problem=describe_problem(error))
        return
    for what, make_pair in runs.items():
        row = row._replace(what=what)
        forms_all = (peer, what) in FORM_ALL_GRADIENTS
        size = gradients_bytes(case) if forms_all else 0
        if size > PER_EXAMPLE_BYTES:
            yield row._replace(problem=too_large(size))
            continue
        try:
            # What forms all gradients takes up to seconds.
            ours, theirs = measure(make_pair(), math.ceil(repeats / 3) if forms_all else repeats)
        except Exception as error:
            yield row._replace(problem=describe_problem(error))
        else:
            yield fill(row, ours / theirs, ours, theirs)


def show_sizes(sizes):
    """`784-512x16-10`: a size that comes more than twice in a row is written once."""
    runs = [(size, len(list(same))) for size, same in itertools.groupby(sizes)]
    return "-".join(f"{size}x{n}" if n > 2 else "-".join([f"{size}"] * n) for size, n in runs)


def gradients_bytes(case):
    """What the gradients of all examples take in float32."""
    return 4 * case.n * sum((i + 1) * o for i, o in itertools.pairwise(case.sizes))


def too_large(size):
    return f"not run: the gradients alone take {size / 1e9:.1f} GB"


def fill(row, ratios, ours, theirs, *programs):
    """The row with its figures, from the ratio and the seconds of every round, and the programs."""
    low, middle, high = map(float, np.quantile(ratios, [0.25, 0.5, 0.75]))
    return row._replace(
        ratio=middle,
        quartiles=(low, high),
        ms=tuple(1e3 * float(np.median(seconds)) for seconds in (ours, theirs)),
        temporary_bytes=tuple(program.temporary_bytes for program in programs),
        flop=tuple(program.flop for program in programs),
        compile_s=tuple(program.compile_s for program in programs),
    )


def make_case(case, seed):
    """The network, its parameters, and one batch."""
    net = make_net(case.sizes, case.activation)
    params, _ = net.init(jax.random.key(seed), case.sizes[:1])
    inputs, labels = map(jnp.asarray, make_data(case.sizes, case.n * (case.t or 1), seed))
    if case.t:
        inputs, labels = inputs.reshape(case.n, case.t, -1), labels.reshape(case.n, case.t)
    return net, params, inputs, labels


def make_data(sizes, n, seed):
    """Normal inputs, and labels that depend on them by a random map and some noise."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(n, sizes[0])).astype(np.float32)
    scores = inputs @ rng.normal(size=(sizes[0], sizes[-1])) / math.sqrt(sizes[0])
    labels = np.argmax(scores + rng.normal(scale=0.3, size=scores.shape), axis=1)
    return inputs, labels.astype(np.int32)


def step_products(case):
    """FLOP of the matrix products of one gradient: three a layer, but no dx of the first."""
    weights = [i * o for i, o in zip(case.sizes, case.sizes[1:], strict=False)]
    return 2 * case.n * (3 * sum(weights) - weights[0])


def gradient_rows(case, data, explicit, peers, repeats):
    """A row for each peer: one step's gradient, by the explicit side, against theirs.

    A side is a function of the case and its data (see `make_program`); `peers` has for each name
    the side and what is wanted.
    """
    ours = make_program(explicit, case, *data)
    for peer, (make, wanted) in peers.items():
        row = Row(str(case), peer, wanted)
        try:
            theirs = make_program(make, case, *data)
            seconds = measure([ours.run, theirs.run], repeats)
        except Exception as error:  # whatever goes wrong with a peer, the others are measured
            yield row._replace(problem=describe_problem(error))
            continue
        yield fill(row, seconds[0] / seconds[1], *seconds, ours, theirs)


def mean_loss_of(net):
    """The mean loss of the library's forward pass, for autodiff."""

    def mean_loss(params, inputs, labels):
        return mean_cross_entropy(net.forward(params, inputs)[0], labels)

    return mean_loss


def gradient_and_norms_by_vmap(case):
    """The same from the gradients of all examples."""
    return from_all_gradients(mean_and_norms, plain_mean_loss(case.activation))


def describe_problem(error):
    if isinstance(error, ModuleNotFoundError):
        package, *_ = (error.name or str(error)).split(".")
        return f"{package} is not installed"
    return f"failed: {type(error).__name__}: {error}".splitlines()[0].replace("|", "/")


def print_table(section, rows):
    """The rows in GitHub's markdown; a column without a figure is left out."""
    columns = {
        "network": [row.case for row in rows],
        section.what: [row.what or "" for row in rows],
        "against": [row.against for row in rows],
        f"{section.ratio} (quartiles)": [show_ratio(row) for row in rows],
        "wanted": [row.wanted for row in rows],
        "ms": [show_pair(row.ms) for row in rows],
        "of a GEMM's rate": [f"{row.gemm_share:.0%}" if row.gemm_share else "" for row in rows],
        "temporary MB": [show_pair(row.temporary_bytes, 1e-6) for row in rows],
        "MFLOP": [show_pair(row.flop, 1e-6) for row in rows],
        "to compile, s": [show_pair(row.compile_s) for row in rows],
        "final loss": [show_pair(row.loss) for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    print(f"\n### {section.title}\n")
    if section.note:
        print(f"{section.note}\n")
    for cells in [shown, ["---"] * len(shown), *zip(*shown.values(), strict=True)]:
        print("|", " | ".join(cells), "|")


def show_ratio(row):
    if row.problem:
        return row.problem
    low, high = row.quartiles
    return f"**{row.ratio:.2f}** ({low:.2f}-{high:.2f})"


def show_pair(pair, scale=1):
    """`ours / theirs` in three digits; `ours` alone, where there are none of theirs."""
    values = [f"{float(f'{scale * value:.3g}'):,g}" for value in pair or () if value is not None]
    return " / ".join(values)


def perceptrons(*widths_and_ns, activation="relu"):
    """Cases with two hidden layers of the same width."""
    return tuple(Case((784, w, w, 10), n, activation) for w, n in widths_and_ns)


SECTIONS = {
    "gradient": Section(
        "Gradient of a batch",
        "explicit / autodiff",
        gradient,
        (
            *perceptrons((64, 32), (128, 256), (256, 64), (512, 128), (512, 1024)),
            *perceptrons((512, 256), activation="gelu"),
            *perceptrons((1024, 32), (1024, 256), (2048, 128)),
        ),
    ),
    "training": Section(
        "Training",
        "theirs / ours",
        training,
        (
            Training((64, 128, 10), 1437, 64, "Adam", 10),
            Training((64, 128, 10), 1437, 32, "SGD", 10),
            Training((784, 512, 512, 10), 10_000, 128, "SGD", 2),
            Training((784, 512, 512, 10), 10_000, 128, "Adam", 2),
        ),
        "Times are of one epoch.",
    ),
    "norms": Section(
        "Gradient and per-example norms in one sweep",
        "with norms / without",
        norms,
        perceptrons((64, 32), (128, 256), (512, 128), (512, 256), (1024, 256), (2048, 64)),
    ),
    "vmap": Section(
        "Gradient and per-example norms against vmap(grad)",
        "theirs / ours",
        vmap,
        perceptrons((64, 32), (128, 256), (512, 128), (1024, 256)),
        "On a CPU the time is partly an artefact: batched products of rank one are slow there.",
    ),
    "quantities": Section(
        "What else a sweep reads off, against a plain gradient",
        "gradient and quantity / gradient",
        quantities,
        (
            *perceptrons((512, 32), (512, 128), (512, 512)),
            *perceptrons((1024, 32), (1024, 128), (1024, 512)),
            Case((128, 256, 256, 10), 32, t=64),
        ),
        "Each library against the plain gradient of its own framework. What forms the gradients of "
        "all examples in JAX pays on a CPU for batched products of rank one, which are slow there: "
        "of vmap(grad)'s and jax_privacy's times that part is an artefact.",
    ),
    "rules": Section(
        "A training step under each rule",
        "under the rule / exact",
        rules,
        (*perceptrons((512, 128), (1024, 128)), Case((784, *[512] * 16, 10), 128)),
        "Each library against the exact step of its own framework. Steps follow one another, each "
        "in the memory of the last.",
        "rule",
    ),
}


if __name__ == "__main__":
    tyro.cli(main)
