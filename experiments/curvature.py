"""How many steps does curvature save? Compares KFAC with Adam and with SGD with momentum.

The default task is a deep auto-encoder of digits, a classic hard problem. The others are a
classifier of digits, the same classifier written in Flax and lifted by `bp.lift`, and a small GPT
that learns some sequences of characters by heart. Each step uses all training data, so the loss
before each step is the training loss. KFAC multiplies the gradient by the inverse of
each layer's Kronecker-factored curvature, A^-1 g G^-1. A second sweep with sampled errors computes
the factors A and G. All three optimizers clip and use momentum:

  SGD     clip(g), momentum
  Adam    clip(g), Adam, whose first moment is the momentum
  KFAC    clip(A^-1 g G^-1), momentum

Each optimizer has a grid with the same number of learning rates. The script chooses the rate that
reaches the target in the fewest steps from one draw of the initial weights, and then trains with
this rate from other draws. The number of steps says how good the directions are. The seconds also
include the cost of a step, which is highest for KFAC.

Sources:
  "Reducing the Dimensionality of Data with Neural Networks", Hinton, Salakhutdinov, 2006: the task.
  "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", Martens, Grosse, 2015.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

import jaxbp as bp
from experiments import digits, gpt
from experiments.common import data, figures, files, lifted
from experiments.common.flags import raise_wrong, too_small, wrong_flags
from experiments.common.progress import Bar
from experiments.common.resume import Resumed
from experiments.common.tables import aligned

MOMENTUM = 0.9


@dataclass(frozen=True)
class Config:
    """Counts the steps that KFAC, Adam and SGD with momentum need to reach a training loss."""

    task: Literal["autoencoder", "classifier", "flax", "gpt"] = "autoencoder"
    """Reconstruct digits through a narrow layer; classify them; the same in Flax; a small GPT."""
    target: float | None = None
    """The training loss to reach, in nats per example; default 1.5, 0.001, 0.001 and 3."""
    rates: int = 5
    """The number of learning rates in each optimizer's grid, at least 2."""
    runs: int = 3
    """The number of draws of the initial weights to train from with the best rate."""
    steps: int = 500
    """The number of steps of each run; while the rate is chosen, the largest number of steps."""
    clip: float = 1.0
    """The norm to which gradients, or KFAC's natural gradients, are clipped."""
    damping: float = 1e-2
    """The damping of KFAC's factors."""
    every: int = 5
    """The number of steps for which KFAC keeps its inverses."""
    seed: int = 0
    """The seed of the split of the data and of the initial weights."""
    out: Path = Path("out")
    """The folder for the figure."""
    resume: bool = False
    """Whether to store what is trained in `out`, and to go on from what is stored there."""


class Problem(NamedTuple):
    """The function to minimise: the mean loss of a network on some data, minus a constant.

    Attributes:
      about: the network and the data, for the heading.
      example: what an example is, such as `image`.
      net: the network.
      loss: the loss.
      inputs: the inputs of all training data.
      targets: the targets of all training data.
      floor: the smallest possible loss.
      target: the loss above the floor to reach.
      grids: the lowest and the highest learning rate, by the optimizer's name.
    """

    about: str
    example: str
    net: bp.Layer
    loss: bp.Loss
    inputs: jax.Array
    targets: jax.Array
    floor: float
    target: float
    grids: dict[str, tuple[float, float]]


class Result(NamedTuple):
    """The result of one optimizer.

    Attributes:
      rates: the learning rates of the grid.
      rate: the best of them.
      losses: the losses above the floor, before each step, [runs, steps].
      seconds: the time of a step without compilation, [runs].
      params: the parameters at the end of each run.
    """

    rates: np.ndarray
    rate: float
    losses: np.ndarray
    seconds: np.ndarray
    params: Any = ()


def main(config: Config) -> dict[str, Result]:
    """Compares the optimizers, draws the figure, and returns the `Result` of each, by its name."""
    started = perf_counter()
    require(config)
    stored = Resumed("curvature", asdict(config))
    problem = make_problem(config)
    print_problem(problem, config)
    # The inverses are small, and LAPACK's threads wait for each other longer than they compute: on
    # busy cores up to 50 ms instead of 0.3 ms.
    with threadpool_limits(1, "blas"):
        results = stored.part("results", lambda: measure(problem, config))
    print_table(results, problem.target)
    figures.save(draw(results, problem.target, config), config.out / "curvature.png")
    forward = jax.jit(lambda params: problem.net.forward(params, problem.inputs)[0])
    files.save_trained(
        config.out / "curvature.npz",
        {name: tuple(result.params) for name, result in results.items()},
        {f"outputs/{name}": forward(result.params[0]) for name, result in results.items()},
    )
    print(f"done in {perf_counter() - started:.0f} s, compilation included")
    return results


def require(config):
    """Raises if a flag is wrong."""
    wrong = too_small(config, rates=2, runs=1, steps=1)
    for name in ("target", "clip"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            wrong.append(f"{name} is {value}; it takes a positive number")
    wrong += wrong_flags(seed=config.seed, out=config.out)
    raise_wrong(wrong)
    make_optimizer("KFAC", 1.0, config)  # raises if KFAC's own flags are wrong


def make_problem(config):
    if config.task == "gpt":
        return make_gpt(config)
    dataset = data.load(None, seed=config.seed)
    inputs, labels = map(jnp.asarray, dataset.train)
    about = f"with tanh; each step uses all {len(inputs)} training digits"
    if config.task != "autoencoder":
        sizes = 64, 32, 10
        net, where = make_network(*sizes), ""
        if config.task == "flax":
            settings = digits.Config(hidden=sizes[:-1], activation="tanh", dropout=0.0)
            net, where = lifted.make_network("flax", settings, dataset), "in Flax, lifted, "
        return Problem(
            f"classifier {show_sizes(inputs, sizes)} {where}{about}",
            "image",
            net,
            bp.softmax_cross_entropy,
            inputs,
            labels,
            0.0,
            config.target or 1e-3,
            {"SGD": (0.3, 3.0), "Adam": (1e-2, 1e-1), "KFAC": (0.3, 3.0)},
        )
    sizes = 128, 64, 16, 64, 128, inputs.shape[-1]
    # Grey pixels are targets between 0 and 1. Their entropy is the smallest possible cross-entropy;
    # the rest is the divergence of the reconstruction from the image.
    entropies = jax.scipy.special.entr(inputs) + jax.scipy.special.entr(1 - inputs)
    return Problem(
        f"autoencoder {show_sizes(inputs, sizes)} {about}",
        "image",
        make_network(*sizes),
        bp.sigmoid_cross_entropy,
        inputs,
        inputs,
        float(jnp.mean(jnp.sum(entropies, axis=-1))),
        config.target or 1.5,
        {"SGD": (0.05, 0.5), "Adam": (2e-3, 2e-2), "KFAC": (0.3, 3.0)},
    )


def make_gpt(config):
    """Makes the problem of learning 64 sequences of 32 characters by heart."""
    sizes = gpt.Config(blocks=2, features=32, heads=4, positions=32, batch_size=64)
    characters, tokens = gpt.tokenize(gpt.reference_text())
    rng = np.random.default_rng(config.seed)
    inputs, targets = gpt.draw_sequences(rng, tokens, sizes.batch_size, sizes.positions)
    return Problem(
        f"GPT with {sizes.blocks} blocks of {sizes.features} features; each step uses all "
        f"{sizes.batch_size} sequences of {sizes.positions} characters",
        "sequence",
        gpt.make_network(sizes, len(characters)),
        bp.softmax_cross_entropy,
        jnp.asarray(inputs),
        jnp.asarray(targets),
        0.0,
        config.target or 3.0,
        {"SGD": (0.1, 1.0), "Adam": (2e-3, 2e-2), "KFAC": (0.1, 1.0)},
    )


def show_sizes(inputs, units):
    """Writes the number of inputs and of the units of each layer, such as `64-32-10`."""
    return "-".join(map(str, (inputs.shape[-1], *units)))


def make_network(*units):
    """Returns a network of dense layers with tanh between them."""
    parts = [part for u in units for part in (bp.dense(u), bp.tanh())]
    return bp.chain(*parts[:-1])


def make_optimizer(name, rate, config, like=None):
    """Makes an optimizer; KFAC also needs `like`, as `bp.scale_by_kfac` takes it."""
    clip = optax.clip_by_global_norm(config.clip)
    if name == "Adam":
        return optax.chain(clip, optax.adam(rate, b1=MOMENTUM))
    descent = optax.chain(clip, optax.sgd(rate, momentum=MOMENTUM))
    if name == "SGD":
        return descent
    curvature = bp.scale_by_kfac(like, damping=config.damping, every=config.every)
    return optax.chain(curvature, descent)


def make_descent(name, problem, config):
    """Compiles the training on all data, once for all learning rates.

    Returns:
      `descend(rate, key, target, limit) -> (losses [steps], params)`, the losses above the floor
      before each step, and the last parameters. It stops at the target or after `limit` losses; the
      entries after that are nan.
    """
    net, loss, inputs, targets = problem.net, problem.loss, problem.inputs, problem.targets
    factors = bp.kfac_factors(net, loss)
    extra_args = {"factors": factors} if name == "KFAC" else None

    def like(params):
        return factors(params, inputs, targets, key=jax.random.key(0))

    def descend(rate, key, target, limit):
        optimizer = make_optimizer(name, rate, config, like)
        step = bp.make_step(net, loss, optimizer, extra_args=extra_args, donate=False)

        def go_on(carry):
            state, losses = carry
            return (state.step < limit) & ~(losses[state.step - 1] <= target)

        def go(carry):
            state, losses = carry
            after, record = step(state, inputs, targets)
            return after, losses.at[state.step].set(record["loss"] - problem.floor)

        state = bp.init_state(net, optimizer, key, inputs.shape[1:])
        start = state, jnp.full(config.steps, jnp.nan)
        state, losses = jax.lax.while_loop(go_on, go, start)
        return losses, state.params

    arguments = 1.0, jax.random.key(0), 1.0, 1
    return jax.jit(descend).lower(*arguments).compile()


def measure(problem, config):
    """Chooses the learning rates, then trains with them; returns a `Result` per optimizer."""
    first, *keys = jax.random.split(jax.random.key(config.seed), 1 + config.runs)
    results = {}
    with Bar("tuning", len(problem.grids) * (config.rates + config.runs), "run") as bar:
        descents = {name: make_descent(name, problem, config) for name in problem.grids}
        for name, descend in descents.items():
            bar.label = f"tuning {name}"
            rates = np.geomspace(*problem.grids[name], config.rates)
            rate = choose(descend, rates, first, problem.target, config.steps, bar)
            empty = np.empty((config.runs, config.steps)), np.empty(config.runs)
            results[name] = Result(rates, rate, *empty, [])
        bar.label = "measuring"
        for n, key in enumerate(keys):  # optimizers take turns, so that other load affects all
            for name, descend in descents.items():
                started = perf_counter()
                losses, params = descend(results[name].rate, key, -math.inf, config.steps)
                results[name].losses[n] = losses
                results[name].seconds[n] = (perf_counter() - started) / config.steps
                results[name].params.append(jax.tree.map(np.asarray, params))
                bar.update()
    return results


def choose(descend, rates, key, target, limit, bar):
    """Returns the rate that needs the fewest steps to the target.

    If no rate reaches the target, it returns the rate with the lowest last loss. A rate that needs
    more steps than the best one before it is stopped early.
    """
    best, chosen = (math.inf, math.inf), rates[0]
    for rate in map(float, rates):
        losses = np.asarray(descend(rate, key, target, limit)[0])
        reached = steps_to(losses, target)
        limit = int(min(limit, reached))
        rank = reached, float(np.nan_to_num(losses[-1], nan=math.inf))
        if rank < best:
            best, chosen = rank, rate
        bar.update()
    return float(chosen)


def steps_to(losses, target):
    """Counts the steps until the loss first reaches the target, along the last axis.

    The count is inf if the loss never reaches the target.
    """
    below = losses <= target
    return np.where(below.any(axis=-1), below.argmax(axis=-1), math.inf)


def print_problem(problem, config):
    print(
        f"{problem.about}\n"
        f"loss: nats per {problem.example} above {problem.floor:.3g}, the smallest possible loss; "
        f"target {problem.target:g}\n"
        f"tuned: the learning rate, the best of {config.rates} by the steps to the target from "
        f"one draw of the initial weights\n"
        f"fixed: momentum {MOMENTUM}, clipping at norm {config.clip:g}, KFAC's damping "
        f"{config.damping:g}, its inverses kept for {config.every} steps\n"
        f"results: median (lowest-highest) of {config.runs} other "
        f"draw{'s' * (config.runs > 1)} of the initial weights\n"
    )


def print_table(results, target):
    heads = "best rate", "grid", "steps to target", "ms a step", "s to target", "final loss"
    rows = [("", *heads)]
    for name, result in results.items():
        steps, second = steps_to(result.losses, target), np.median(result.seconds)
        low, median, high = (shown(f(steps), ".0f") for f in (np.min, np.median, np.max))
        reached = median if low == "never" else f"{median} ({low}-{high})"
        of = f"{result.rates[0]:.2g} ... {result.rates[-1]:.2g}"
        seconds = shown(np.median(steps) * second, ".2f")
        last = f"{np.median(result.losses[:, -1]):.3g}"
        rows.append((name, f"{result.rate:.2g}", of, reached, f"{1e3 * second:.1f}", seconds, last))
    print(f"\n{aligned(rows)}")
    for name, result in results.items():
        if result.rate in result.rates[[0, -1]]:
            print(f"{name}'s best rate is at an end of its grid: a better one may lie outside.")
    print()


def shown(number, form, unit=""):
    return f"{number:{form}}{unit}" if math.isfinite(number) else "never"


def draw(results, target, config):
    """Draws the loss of every run, and their median, against steps and against seconds."""
    figure = Figure(figsize=(10, 4.4))
    panels = by_step, by_second = figure.subplots(1, 2, sharey=True)
    steps = np.arange(config.steps)
    for color, (name, result) in zip(figures.CYCLE, results.items(), strict=False):
        reached, second = np.median(steps_to(result.losses, target)), np.median(result.seconds)
        labels = shown(reached, ".0f", " steps"), shown(reached * second, ".2f", " s")
        for axes, scale, label in zip(panels, (1, second), labels, strict=True):
            x, median = scale * steps, np.median(result.losses, axis=0)
            axes.plot(x, result.losses.T, color=color, linewidth=0.6, alpha=0.5)
            axes.plot(x, median, color=color, linewidth=1.8, label=f"{name}: {label}")
    for axes in panels:
        style = {"color": figures.BLACK, "linestyle": "--", "linewidth": 1}
        axes.axhline(target, **style, label=f"the target, {target:g}")
        axes.legend(title="to reach the target\n(thick: median; thin: each draw)")
    figures.log_where_wide(by_step)  # the panels share their y axis
    by_step.set(title="Loss by step", xlabel="step", ylabel="training loss above the floor")
    by_second.set(title="Loss by time", xlabel="seconds, without compilation")
    return figure


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"curvature: {error}") from None
