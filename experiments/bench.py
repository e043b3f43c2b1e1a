"""How fast it is: ratios of two programs that do the same work, measured side by side.

  gradient    `bp.value_and_grad` against `jax.value_and_grad`
  training    epochs of `bp.make_epoch` against PyTorch and scikit-learn
  norms       the gradient and every example's gradient norm in one sweep, against the gradient alone
  vmap        the same gradient and norms, against those from `jax.vmap(jax.grad(...))`

The two take turns in one process, in reversed order every other round, so that whatever drifts or
goes first does so for both. A figure is the median over the rounds of the ratio within a round,
with the quartiles in parentheses. Compilation is not part of any time.

After a turn of the other side, threads sleep and caches are cold: the first calls of a small
program are up to a third slower, after PyTorch as after a pause. So a sample of a program that
takes less than `SAMPLE_SECONDS` is many calls, and one before them that is not timed.

Beside the times stand two figures of the compiler's that are the same in every run: the bytes that
a program takes beyond its inputs and outputs, and its FLOP, in which the body of a loop counts
once. A sweep that computed something twice would show there.
"""

import copy
import importlib.metadata
import json as json_format
import math
import os
import platform
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm

import jaxbp as bp

LOSS = bp.softmax_cross_entropy
SAMPLE_SECONDS = 0.01
PER_EXAMPLE_BYTES = 512 * 1024**2  # the most that the gradients of all examples may take
VERSIONS = ("jax", "jaxlib", "optax", "torch", "scikit-learn")
ACTIVATIONS = {"relu": (bp.relu, jax.nn.relu), "gelu": (bp.gelu, jax.nn.gelu)}
OPTIMIZERS = {
    "SGD": (optax.sgd(0.02, momentum=0.9), {"lr": 0.02, "momentum": 0.9}),
    "Adam": (optax.adam(1e-3), {"lr": 1e-3}),
}


class Case(NamedTuple):
    """A multilayer perceptron of these sizes, inputs first, on a batch of N."""

    sizes: tuple[int, ...]
    n: int
    activation: str = "relu"

    def __str__(self):
        return f"{'-'.join(map(str, self.sizes))} {self.activation}, N = {self.n}"


class Training(NamedTuple):
    """Epochs of a relu network on this many examples."""

    sizes: tuple[int, ...]
    examples: int
    batch: int
    optimizer: str
    epochs: int

    def __str__(self):
        sizes = "-".join(map(str, self.sizes))
        return f"{sizes}, {self.optimizer}, {self.examples} in batches of {self.batch}"


class Program(NamedTuple):
    """A compiled jax program with its inputs; `run` waits until it is done."""

    run: Callable
    compile_s: float
    temporary_bytes: int | None
    flop: float | None


class Row(NamedTuple):
    """One line of a table. Pairs are (ours, theirs); None is what there is not."""

    case: str
    against: str
    wanted: str
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
    """A table: what it is called, what its ratios are of, who makes a case's rows, and the cases.

    `quick` are the cases of a run with --quick.
    """

    title: str
    ratio: str
    rows: Callable
    cases: tuple
    quick: tuple


def main(
    *,
    sections: tuple[Literal["gradient", "training", "norms", "vmap"], ...] = (
        "gradient",
        "training",
        "norms",
        "vmap",
    ),
    repeats: int = 15,
    quick: bool = False,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Measures the library against its peers and prints a table for each section.

    Args:
      sections: which to measure.
      repeats: rounds for each figure. Training, whose samples are long, has a third as many.
      quick: only the smallest cases.
      seed: of weights and data.
      json: a file for the same figures, unrounded.
    """
    if repeats < 1:
        raise SystemExit(f"bench: repeats is {repeats}; it takes at least 1.")
    if not 0 <= seed < 2**32:
        raise SystemExit(f"bench: seed is {seed}; it takes an integer in [0, 2^32).")
    if json is not None and not json.parent.is_dir():
        raise SystemExit(f"bench: json is {json}; there is no directory {json.parent}.")
    environment = describe_environment()
    print(*(f"{name}: {what}  " for name, what in environment.items()), sep="\n")
    tables = {}
    for name in sections:
        section = SECTIONS[name]
        cases = section.quick if quick else section.cases
        progress = tqdm(cases, desc=name, leave=False, disable=None)
        tables[name] = [row for case in progress for row in section.rows(case, repeats, seed)]
        print_table(section, tables[name])
    if json is not None:
        rows = {name: [row._asdict() for row in table] for name, table in tables.items()}
        write_whole(json, json_format.dumps({"environment": environment, **rows}, indent=1))


def gradient(case, repeats, seed):
    """A row for one step's gradient, against the faster of two ways to write it for autodiff."""
    net, *data = make_case(case, seed)
    side = 1024
    square = jnp.ones((side, side), jnp.float32)
    explicit = compile_program(bp.value_and_grad(net, LOSS), *data)
    peers = {
        "the same layers": compile_program(jax.value_and_grad(mean_loss_of(net)), *data),
        "plain jnp": compile_program(jax.value_and_grad(plain_mean_loss(case)), *data),
    }
    product = compile_program(jnp.matmul, square, square)
    programs = [explicit, *peers.values(), product]
    ours, *theirs, gemm = measure([program.run for program in programs], repeats)
    best = int(np.argmin([np.median(times) for times in theirs]))
    rate = step_products(case) / np.median(ours)
    row = compare(ours / theirs[best], ours, theirs[best], explicit, [*peers.values()][best])
    yield row._replace(
        case=str(case),
        against=f"jax.value_and_grad, {[*peers][best]}",
        wanted="<= 1.00",
        gemm_share=rate * float(np.median(gemm)) / (2 * side**3),
    )


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
        row = compare(theirs / ours, ours / case.epochs, theirs / case.epochs, program)
        yield row._replace(case=str(case), against=against, wanted=wanted, loss=losses)


def norms(case, repeats, seed):
    """A row for what the norms cost on top of the gradient."""
    net, *data = make_case(case, seed)
    programs = [
        compile_program(gradient_and_norms(net), *data),
        compile_program(bp.value_and_grad(net, LOSS), *data),
    ]
    ours, theirs = measure([program.run for program in programs], repeats)
    row = compare(ours / theirs, ours, theirs, *programs)
    yield row._replace(case=str(case), against="bp.value_and_grad", wanted="<= 1.10")


def vmap(case, repeats, seed):
    """A row for the gradient of every example, formed and then summed and measured."""
    net, *data = make_case(case, seed)
    row = Row(str(case), "jax.vmap(jax.grad)", "> 1")
    size = 4 * case.n * sum(p.size for p in jax.tree.leaves(data[0]))
    if size > PER_EXAMPLE_BYTES:
        yield row._replace(problem=f"not run: the gradients alone take {size / 1e9:.1f} GB")
        return
    explicit, theirs = (
        compile_program(function, *data)
        for function in (gradient_and_norms(net), gradient_and_norms_by_vmap(case))
    )
    times = measure([explicit.run, theirs.run], repeats)
    measured = compare(times[1] / times[0], *times, explicit, theirs)
    yield measured._replace(case=row.case, against=row.against, wanted=row.wanted)


def measure(runs, repeats):
    """Seconds that a call of each run takes, [runs, repeats]; the runs take turns."""
    calls = []
    for run in runs:
        run()  # what happens only once is over after this
        start = time.perf_counter()
        run()
        calls.append(math.ceil(SAMPLE_SECONDS / (time.perf_counter() - start)))
    seconds = np.empty((len(runs), repeats))
    for r in range(repeats):
        order = range(len(runs)) if r % 2 == 0 else reversed(range(len(runs)))
        for i in order:
            if calls[i] > 1:
                runs[i]()
            start = time.perf_counter()
            for _ in range(calls[i]):
                runs[i]()
            seconds[i, r] = (time.perf_counter() - start) / calls[i]
    return seconds


def compare(ratios, ours, theirs, our_program, their_program=None):
    """A row of figures, its words left empty, from the ratio and the seconds of every round."""
    low, middle, high = map(float, np.quantile(ratios, [0.25, 0.5, 0.75]))
    programs = [our_program, their_program]
    costs = {
        name: tuple(getattr(program, name, None) for program in programs)
        for name in ("temporary_bytes", "flop", "compile_s")
    }
    ms = tuple(1e3 * float(np.median(seconds)) for seconds in (ours, theirs))
    return Row("", "", "", middle, (low, high), ms, **costs)


def compile_program(function, *args):
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Program(  # not every backend has both analyses
        lambda: jax.block_until_ready(compiled(*args)),
        seconds,
        getattr(memory, "temp_size_in_bytes", None),
        cost.get("flops") if cost else None,
    )


def make_net(sizes, activation="relu"):
    make, _ = ACTIVATIONS[activation]
    layers = []
    for units in sizes[1:-1]:
        layers += [bp.dense(units, dtype=jnp.float32), make()]
    return bp.chain(*layers, bp.dense(sizes[-1], dtype=jnp.float32))


def make_case(case, seed):
    """The network, its parameters, and one batch."""
    net = make_net(case.sizes, case.activation)
    params, _ = net.init(jax.random.key(seed), case.sizes[:1])
    return net, params, *map(jnp.asarray, make_data(case.sizes, case.n, seed))


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


def mean_loss_of(net):
    """The mean loss of the library's forward pass, for autodiff."""

    def mean_loss(params, inputs, labels):
        logits, _ = net.forward(params, inputs)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    return mean_loss


def plain_mean_loss(case):
    """The same without the library, as one would write it for autodiff."""
    _, function = ACTIVATIONS[case.activation]

    def mean_loss(params, x, labels):
        *hidden, last = params[::2]
        for layer in hidden:
            x = function(x @ layer["weight"] + layer["bias"])
        logits = x @ last["weight"] + last["bias"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    return mean_loss


def gradient_and_norms(net):
    """The mean gradient and the norm of every example's, in one sweep."""
    sweep = bp.backprop(net, LOSS, read={"grads": bp.mean, "sq_norms": bp.sq_norms})

    def function(params, inputs, labels):
        values, answers = sweep(params, inputs, labels)
        return jnp.mean(values), answers["grads"], bp.example_norms(answers["sq_norms"])

    return function


def gradient_and_norms_by_vmap(case):
    """The same from the gradients of all examples."""
    of_one = jax.value_and_grad(plain_mean_loss(case))

    def function(params, inputs, labels):
        batches_of_one = inputs[:, None], labels[:, None]
        values, grads = jax.vmap(of_one, in_axes=(None, 0, 0))(params, *batches_of_one)
        mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
        return jnp.mean(values), mean, jax.vmap(optax.tree.norm)(grads)

    return function


def train_jaxbp(case, inputs, labels, seed):
    """A run of all epochs from the same start, which returns the last one's loss; its program."""
    net, (optimizer, _) = make_net(case.sizes), OPTIMIZERS[case.optimizer]
    start = bp.init_state(net, optimizer, jax.random.key(seed), case.sizes[:1])
    data = jnp.asarray(inputs), jnp.asarray(labels)
    epoch = jax.jit(bp.make_epoch(net, LOSS, optimizer, batch_size=case.batch))
    program = compile_program(epoch, start, *data)
    compiled = epoch.lower(start, *data).compile()

    def run():
        state = start
        for _ in range(case.epochs):
            state, record = compiled(state, *data)
        return float(jax.block_until_ready((state, record))[1]["loss"])

    return run, program


def train_torch(case, inputs, labels, seed):
    """The same in PyTorch, with one thread or as many as there are cores: whichever is faster."""
    import torch

    torch.manual_seed(seed)
    layers = []
    for i, o in zip(case.sizes[:-2], case.sizes[1:-1], strict=True):
        layers += [torch.nn.Linear(i, o), torch.nn.ReLU()]
    start = torch.nn.Sequential(*layers, torch.nn.Linear(*case.sizes[-2:]))
    loss_function = torch.nn.CrossEntropyLoss()
    make_optimizer = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[case.optimizer]
    x, t = torch.from_numpy(inputs), torch.from_numpy(labels).long()

    def run():
        model = copy.deepcopy(start)
        optimizer = make_optimizer(model.parameters(), **OPTIMIZERS[case.optimizer][1])
        for _ in range(case.epochs):
            total = torch.zeros(())
            for indices in torch.randperm(len(x)).split(case.batch):
                optimizer.zero_grad(set_to_none=True)
                loss = loss_function(model(x[indices]), t[indices])
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(indices)
        return float(total) / len(x)

    seconds = {}
    for threads in sorted({1, cores()}):
        torch.set_num_threads(threads)
        seconds[threads] = float(measure([run], 1)[0, 0])
    best = min(seconds, key=seconds.get)
    torch.set_num_threads(best)
    return f"PyTorch, {best} thread{'s' * (best > 1)}", run


def train_sklearn(case, inputs, labels, seed):
    """The same in scikit-learn."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    classifier = MLPClassifier(
        case.sizes[1:-1],
        solver=case.optimizer.lower(),
        alpha=0,
        batch_size=case.batch,
        learning_rate_init=OPTIMIZERS[case.optimizer][1]["lr"],
        momentum=0.9,
        nesterovs_momentum=False,
        max_iter=case.epochs,
        tol=0,
        n_iter_no_change=case.epochs + 1,
        random_state=seed,
    )

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it is to stop when told to
            return float(classifier.fit(inputs, labels).loss_)

    return "scikit-learn", run


def describe_environment():
    """On what the figures were measured."""
    device = jax.devices()[0]
    return {
        "machine": f"{cpu_model()}, {cores()} cores; jax on {device.platform}",
        "load before": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "versions": ", ".join(
            [f"python {platform.python_version()}", *(f"{v} {version(v)}" for v in VERSIONS)]
        ),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }


def cpu_model():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe_problem(error):
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"failed: {type(error).__name__}: {error}".splitlines()[0].replace("|", "/")


def print_table(section, rows):
    """The rows in GitHub's markdown; a column without a figure is left out."""
    columns = {
        "network": [row.case for row in rows],
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


def write_whole(path, text):
    """Writes the file as a whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(text)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def square_cases(*widths_and_ns):
    return tuple(Case((784, width, width, 10), n) for width, n in widths_and_ns)


SECTIONS = {
    "gradient": Section(
        "Gradient of a batch",
        "explicit / autodiff",
        gradient,
        (
            *square_cases((64, 32), (128, 256), (256, 64), (512, 128), (512, 1024)),
            Case((784, 512, 512, 10), 256, "gelu"),
            *square_cases((1024, 32), (1024, 256), (2048, 128)),
        ),
        square_cases((64, 32)),
    ),
    "training": Section(
        "An epoch of training",
        "theirs / ours",
        training,
        (
            Training((64, 128, 10), 1437, 32, "SGD", 10),
            Training((64, 128, 10), 1437, 64, "Adam", 10),
            Training((784, 512, 512, 10), 10_000, 128, "SGD", 2),
            Training((784, 512, 512, 10), 10_000, 128, "Adam", 2),
        ),
        (Training((64, 128, 10), 1437, 64, "Adam", 2),),
    ),
    "norms": Section(
        "Gradient and per-example norms in one sweep",
        "with norms / without",
        norms,
        square_cases((64, 32), (128, 256), (512, 128), (512, 256), (1024, 256), (2048, 64)),
        square_cases((64, 32)),
    ),
    "vmap": Section(
        "Gradient and per-example norms against vmap(grad); on a CPU, where batched products of "
        "rank one are slow, the time is partly an artefact",
        "theirs / ours",
        vmap,
        square_cases((64, 32), (128, 256), (512, 128), (1024, 256)),
        square_cases((64, 32)),
    ),
}


if __name__ == "__main__":
    tyro.cli(main)
