"""Must the backward pass use the forward weights? Trains by rules that use other weights.

Backpropagation carries the error back by a layer's own weights, dx = dy W^T. Feedback alignment
uses fixed random weights, dx = dy B^T, and the network learns all the same: W aligns with B during
training, and so the error that B carries turns towards the exact error. `bp.alignment` measures the
angle between the two.

The first task is the one on which this was found. A linear network without biases, 30-20-10, learns
a linear map T from examples x ~ Normal(0, I), t = x T:

  h = x W1,   e = h W2 - t,   dE/dW2 = h^T e,   dE/dW1 = x^T (e B^T)

From the paper come these sizes, the squared error, T uniform in [-1, 1], W in [-0.01, 0.01] and B
in [-0.5, 0.5], learning rates found by hand, and the control that trains only the last layer. (The
20 random units of the control see 20 of the 30 directions of x, so about a third of the error must
remain.) This script chooses the values of the learning rates and the number of examples, and uses
one example per step. It plots the error as |W1 W2 - T|^2 / |T|^2, the expected squared error
relative to that of predicting zero, and the mean angle over separate inputs.

The second task is the digits, with a deep network with tanh. Every rule has the same optimizer,
initial weights and order of examples. The expected order of the test accuracies is

  backpropagation >= Kolen-Pollack ~ weight mirror ~ signs of uniform magnitude
                  > feedback alignment, direct feedback > last layer only

The script checks each relation. In 20 runs of five seeds, over five splits of the data, all of them
held every time. The order says how fast the rules learn: after 100 epochs all but the control are
within one point of each other. So the network and the small number of epochs were chosen to
separate the rules. The learning rate and the weight decay were chosen for backpropagation, for
which learning rates of 0.03 to 0.12 and decays up to 0.03 agree within one point. All of this was
chosen by validation accuracy, with other initial weights.

The weight decay is decoupled from the momentum, as in `optax.adamw`. If the momentum included the
decay, the B of Kolen-Pollack would approach W more slowly than W decays.

Sources:
  "Random synaptic feedback weights support error backpropagation for deep learning", Lillicrap,
  Cownden, Tweed, Akerman, 2016: the linear task.
  "Deep Learning without Weight Transport", Akrout, Wilson, Humphreys, Lillicrap, Tweed, 2019;
  "Feedback alignment in deep convolutional networks", Moskovitz, Litwin-Kumar, Abbott, 2018: rules
  that come close to backpropagation where feedback alignment does not.
"""

import functools
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter
from tqdm import tqdm

import jaxbp as bp
from experiments.common import data, figures, files
from experiments.common.flags import raise_wrong, too_small, wrong_flags
from experiments.common.resume import NOT_RESUMED, Resumed
from experiments.common.tables import spread

EXACT, LAST = "backpropagation", "last layer only"
KOLEN_POLLACK, MIRROR, SIGNS = "Kolen-Pollack", "weight mirror", "signs, uniform"
RANDOM, DIRECT = "feedback alignment", "direct feedback"

# The best of learning rates a factor of 10^(1/4) apart, by the median error after 1000 examples of
# 20 draws with seed 1. With the next higher rate, all runs of the first two rules diverge.
LINEAR_RATES = {EXACT: 0.01, RANDOM: 0.01, LAST: 10.0}
PROBES = 100  # inputs over which angles are averaged

BATCH = 128
MOMENTUM = 0.9
BETTER, ALIKE = 0.01, 0.02  # margins of mean test accuracies: > is more than BETTER, ~ up to ALIKE
ORDER = (
    (EXACT, ">=", KOLEN_POLLACK),
    (KOLEN_POLLACK, "~", MIRROR),
    (MIRROR, "~", SIGNS),
    (SIGNS, ">", RANDOM),
    (SIGNS, ">", DIRECT),
    (RANDOM, ">", LAST),
    (DIRECT, ">", LAST),
)
# The matrices of direct feedback correspond to no weight; the control does not train hidden layers.
NO_ANGLES = {DIRECT: ("weight",), LAST: ("gradient", "delta", "weight")}
STYLES = {
    EXACT: (figures.BLACK, "-"),
    KOLEN_POLLACK: (figures.BLUE, "-"),
    MIRROR: (figures.SKY, "-"),
    SIGNS: (figures.GREEN, "-"),
    "signs, fixed": (figures.GREEN, "--"),
    "signs, batchwise": (figures.GREEN, ":"),
    RANDOM: (figures.ORANGE, "-"),
    DIRECT: (figures.RED, "-"),
    LAST: (figures.PURPLE, "-"),
}


@dataclass(frozen=True)
class Config:
    """Trains by rules whose backward pass uses other weights than the forward pass."""

    seeds: int = 5
    """The number of random draws in each task, at least 2."""
    examples: int = 1000
    """The number of examples of the linear task, one per step."""
    width: int = 64
    """The number of units of each hidden layer of the network for the digits."""
    depth: int = 4
    """The number of its hidden layers."""
    epochs: int = 10
    """The number of epochs to train it."""
    rate: float = 0.05
    """Its learning rate, the same for every rule."""
    decay: float = 0.01
    """Its weight decay, the same for every rule."""
    seed: int = 0
    """The seed of the split of the digits and of all random draws."""
    out: Path = Path("out")
    """The folder for the figures."""
    resume: bool = False
    """Whether to store what is trained in `out`, and to go on from what is stored there."""


class Way(NamedTuple):
    """A way to train a network.

    Attributes:
      rule: which weights carry the error back.
      last_only: whether only the last layer is trained.
    """

    rule: bp.Rule
    last_only: bool = False


class Task(NamedTuple):
    """A linear map to learn.

    Attributes:
      wanted: the map T, [30, 10].
      inputs: the input x of each example, [examples, 30].
      probes: the inputs over which angles are averaged, [PROBES, 30].
    """

    wanted: jax.Array
    inputs: jax.Array
    probes: jax.Array


class Line(NamedTuple):
    """The training on the linear task, before each example.

    Attributes:
      errors: |W1 W2 - T|^2 / |T|^2, [seeds, examples].
      angles: the angle between delta at the hidden layer and the exact delta, [seeds, examples].
    """

    errors: np.ndarray
    angles: np.ndarray


class Angles(NamedTuple):
    """The angles of `bp.Alignment`, each a mean over layers.

    Attributes:
      gradient: the angle of the gradients, over the hidden layers.
      delta: the angle of the error signals, over the hidden layers.
      weight: the angle of the weights, over all layers but the first: no error passes through its
        weights.
    """

    gradient: Any
    delta: Any
    weight: Any


class Reader(NamedTuple):
    """The training on the digits.

    Attributes:
      held_out: the validation accuracy after each epoch, [seeds, epochs].
      test: the test accuracy at the end, [seeds].
      angles: the mean angles in each epoch, [seeds, epochs].
      params: the parameters at the end, with the seeds as first axis.
      outputs: the outputs for the test set, [seeds, N, C].
    """

    held_out: np.ndarray
    test: np.ndarray
    angles: Angles
    params: Any = ()
    outputs: Any = ()


class Results(NamedTuple):
    """The results of both tasks, by the name of the rule.

    Attributes:
      linear: a `Line` for each rule.
      digits: a `Reader` for each rule.
    """

    linear: dict[str, Line]
    digits: dict[str, Reader]


def main(config: Config) -> Results:
    """Trains on both tasks, prints the tables, draws the figures, and returns the `Results`."""
    started = perf_counter()
    require(config)
    stored = Resumed("alignment", asdict(config))
    linear = learn_linear_map(config, stored)
    print_linear(linear, config)
    figures.save(draw_linear(linear, config), config.out / "alignment_linear.png")
    digits = learn_digits(config, stored)
    print_digits(digits)
    print_order(digits)
    figures.save(draw_digits(digits, config), config.out / "alignment_digits.png")
    files.save_trained(
        config.out / "alignment_digits.npz",
        {name: reader.params for name, reader in digits.items()},
        {f"outputs/{name}": reader.outputs for name, reader in digits.items()},
    )
    print(f"done in {perf_counter() - started:.0f} s, compilation included")
    return Results(linear, digits)


def require(config):
    """Raises if a flag is wrong."""
    wrong = too_small(config, seeds=2, examples=1, width=1, depth=1, epochs=1)
    if not 0 < config.rate < math.inf:
        wrong.append(f"rate is {config.rate}; it takes a positive number")
    if not 0 <= config.decay < math.inf:
        wrong.append(f"decay is {config.decay}; it takes 0 or a positive number")
    wrong += wrong_flags(seed=config.seed, out=config.out)
    raise_wrong(wrong)


def train_only_last(optimizer, layers):
    """Returns an optimizer that updates only the last layer of a chain of `layers` layers."""
    fixed = *[True] * (layers - 1), False
    return optax.chain(optimizer, optax.masked(optax.set_to_zero(), fixed))


# The linear task.


def learn_linear_map(config, stored=NOT_RESUMED):
    """Trains on the linear task by each rule; returns a `Line` for each."""
    ways = {
        EXACT: Way(bp.exact()),
        # B is drawn like W, in [-0.01, 0.01], and multiplied by the scale.
        RANDOM: Way(bp.random_feedback(scale=50.0)),
        LAST: Way(bp.exact(), last_only=True),
    }
    task_keys, keys = jax.random.split(jax.random.key(config.seed), (2, config.seeds))
    tasks = jax.vmap(lambda key: draw_task(key, config.examples))(task_keys)
    return {
        name: stored.part(
            f"linear, {name}",
            functools.partial(learn_task, way, LINEAR_RATES[name], tasks, keys),
        )
        for name, way in tqdm(ways.items(), desc="linear map", unit="rule")
    }


def draw_task(key, examples):
    """Draws a `Task`."""
    wanted_key, input_key, probe_key = jax.random.split(key, 3)
    return Task(
        jax.random.uniform(wanted_key, (30, 10), minval=-1, maxval=1),
        jax.random.normal(input_key, (examples, 30)),
        jax.random.normal(probe_key, (PROBES, 30)),
    )


def make_linear_network():
    def draw_small(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -0.01, 0.01)

    sizes = 20, 10
    return bp.chain(*[bp.dense(o, use_bias=False, weight_init=draw_small) for o in sizes])


def learn_task(way, rate, tasks, keys):
    """Trains in one way, one example per step, on all tasks in parallel; returns the `Line`."""
    net, optimizer = make_linear_network(), optax.sgd(rate)
    if way.last_only:
        optimizer = train_only_last(optimizer, 2)
    align = bp.alignment(net, bp.squared_error, rule=way.rule)

    def learn(state, task):
        def error(params, *_, **__):
            first, second = params
            apart = first["weight"] @ second["weight"] - task.wanted
            return jnp.sum(jnp.square(apart)) / jnp.sum(jnp.square(task.wanted))

        def angle(params, *_, **how):
            first, _ = align(params, task.probes, task.probes @ task.wanted, **how)
            return first["weight"].delta

        measures = {"error": error, "angle": angle}
        step = bp.make_step(net, bp.squared_error, optimizer, rule=way.rule, measures=measures)

        def go(state, x):
            return step(state, x[None], (x @ task.wanted)[None])

        _, record = jax.lax.scan(go, state, task.inputs)
        return Line(record["error"], record["angle"])

    states = start(net, optimizer, way.rule, (30,), keys)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(learn))(states, tasks))


def start(net, optimizer, rule, shape, keys):
    """Returns the states before the first step, one per key.

    It is called outside the jit of the training, so that the random draws are compiled only once
    for all rules.
    """
    return jax.vmap(lambda key: bp.init_state(net, optimizer, key, shape, rule=rule))(keys)


def print_linear(lines, config):
    print(
        f"\nlinear map, {config.examples} examples, one per step: median (lowest-highest) of "
        f"{config.seeds} draws; angles in degrees\n\n"
        f"{'':20}{'rate':>6}{'final error':>30}{'first angle':>18}{'final angle':>18}"
    )
    for name, line in lines.items():
        error = spread(line.errors[:, -1], ".1e")
        first, final = (spread(line.angles[:, i], ".0f") for i in (0, -1))
        print(f"{name:20}{LINEAR_RATES[name]:>6g}{error:>30}{first:>18}{final:>18}")
    print()


def draw_linear(lines, config):
    """Draws the error of each rule, and the angle of feedback alignment, over the examples."""
    figure = Figure(figsize=(10, 4.2))
    errors, angles = figure.subplots(1, 2)
    seen = np.arange(config.examples)
    for name, line in lines.items():
        draw_runs(errors.plot, seen, line.errors, name)
    figures.log_where_wide(errors)
    draw_runs(angles.plot, seen, lines[RANDOM].angles, RANDOM)
    errors.set(title="Error of a linear network", xlabel="examples")
    errors.set_ylabel("squared error / that of predicting zero")
    errors.legend(title="thick: median; thin: each draw")
    draw_right_angle(angles)
    angles.set(
        title="Angle of feedback alignment's error\nto the exact error",
        xlabel="examples",
        ylabel="angle at the hidden layer, degrees",
        ylim=(0, None),
        yticks=range(0, 91, 15),
    )
    return figure


def draw_right_angle(axes):
    """Draws a line at 90 degrees, where an error says nothing about the exact one."""
    axes.axhline(90, color=figures.BLACK, linestyle="--", linewidth=1)
    place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    axes.text(1, 91, "orthogonal to the exact error", **place, fontsize=9)


def draw_runs(plot, x, runs, name):
    """Draws every run as a thin line, and their median."""
    color, style = STYLES[name]
    plot(x, runs.T, color=color, linestyle=style, linewidth=0.6, alpha=0.5)
    plot(x, np.median(runs, axis=0), color=color, linestyle=style, linewidth=1.8, label=name)


# The digits.


def learn_digits(config, stored=NOT_RESUMED):
    """Trains on the digits by each rule; returns a `Reader` for each."""
    dataset = data.load(None, seed=config.seed)
    hidden = [bp.chain(bp.dense(config.width), bp.tanh()) for _ in range(config.depth)]
    blocks = *hidden, bp.dense(len(dataset.class_names))
    ways = {
        EXACT: Way(bp.exact()),
        KOLEN_POLLACK: Way(bp.kolen_pollack()),
        MIRROR: Way(bp.weight_mirror()),
        SIGNS: Way(bp.sign_symmetric("uniform")),
        "signs, fixed": Way(bp.sign_symmetric("fixed")),
        "signs, batchwise": Way(bp.sign_symmetric("batchwise")),
        RANDOM: Way(bp.random_feedback()),
        DIRECT: Way(bp.direct_feedback(*blocks)),
        LAST: Way(bp.exact(), last_only=True),
    }
    print(
        f"\ndigits, {config.depth} hidden layers of {config.width} tanh units: "
        f"{len(dataset.train[1])} training, {len(dataset.validation[1])} validation and "
        f"{len(dataset.test[1])} test examples; {config.epochs} epochs in batches of {BATCH}\n"
        f"the same for every rule: learning rate {config.rate:g}, momentum {MOMENTUM}, "
        f"weight decay {config.decay:g}, and {config.seeds} seeds\n"
    )
    readers = {}
    for name, way in tqdm(ways.items(), desc="digits", unit="rule"):
        train = functools.partial(learn_to_read, blocks, way, dataset, config)
        readers[name] = stored.part(f"digits, {name}", train)
    return readers


def learn_to_read(blocks, way, dataset, config):
    """Trains in one way from all seeds in parallel; returns the `Reader`."""
    net, loss = bp.chain(*blocks), bp.softmax_cross_entropy
    optimizer = make_optimizer(config)
    if way.last_only:
        optimizer = train_only_last(optimizer, len(blocks))
    epoch = bp.make_epoch(
        net,
        loss,
        optimizer,
        batch_size=BATCH,
        rule=way.rule,
        measures={"alignment": bp.alignment(net, loss, rule=way.rule)},
    )
    measure = bp.evaluate(net, loss, metric=bp.accuracy)

    def go(state, _):
        state, record = epoch(state, *dataset.train)
        accuracy = measure(state.params, *dataset.validation)["metric"]
        return state, (accuracy, average_angles(record["alignment"]))

    def learn(state):
        state, (held_out, angles) = jax.lax.scan(go, state, length=config.epochs)
        test = measure(state.params, *dataset.test)["metric"]
        outputs, _ = net.forward(state.params, dataset.test[0])
        return Reader(held_out, test, angles, state.params, outputs)

    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    states = start(net, optimizer, way.rule, dataset.train[0].shape[1:], keys)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(learn))(states))


def make_optimizer(config):
    return optax.chain(
        optax.trace(MOMENTUM),
        optax.add_decayed_weights(config.decay),
        optax.scale_by_learning_rate(config.rate),
    )


def average_angles(alignment):
    *hidden, last = alignment
    hidden = [block[0]["weight"] for block in hidden]
    return Angles(
        jnp.mean(jnp.array([layer.gradient for layer in hidden])),
        jnp.mean(jnp.array([layer.delta for layer in hidden])),
        jnp.mean(jnp.array([layer.weight for layer in (*hidden[1:], last["weight"])])),
    )


def print_digits(readers):
    print(
        f"\n{'':20}{'test accuracy':>18}{'validation':>11}{'angle of gradient':>20}{'of delta':>10}"
        f"{'of weight':>11}"
    )
    for name, reader in readers.items():
        deviation = np.std(reader.test, ddof=1)
        test = f"{np.mean(reader.test):.1%} +- {100 * deviation:.1f}"
        gradient, delta, weight = (
            "-" if field in NO_ANGLES.get(name, ()) else f"{np.mean(angles[:, -1]):.1f}"
            for field, angles in reader.angles._asdict().items()
        )
        print(
            f"{name:20}{test:>18}{np.mean(reader.held_out[:, -1]):>11.1%}{gradient:>20}"
            f"{delta:>10}{weight:>11}"
        )


def print_order(readers):
    print(
        f"\nexpected order of the mean test accuracies (> higher by more than {100 * BETTER:g} "
        f"point, >= not lower by more than that, ~ equal within {100 * ALIKE:g} points)"
    )
    for better, relation, worse in ORDER:
        a, b = (float(np.mean(readers[name].test)) for name in (better, worse))
        claim = f"{better} {relation} {worse}"
        print(f"{claim:42}{a:>8.1%}{b:>8.1%}   {'yes' if holds(a, relation, b) else 'no'}")
    print()


def holds(a, relation, b):
    if relation == "~":
        return abs(a - b) <= ALIKE
    return a - b > BETTER if relation == ">" else a - b >= -BETTER


def draw_digits(readers, config):
    """Draws the error rate and the angle of each rule over training, and the test error rate."""
    figure = Figure(figsize=(11, 4.2))
    held_out, angles, test = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
    epochs = np.arange(1, config.epochs + 1)
    for i, (name, reader) in enumerate(readers.items()):
        color, style = STYLES[name]
        look = {"color": color, "linestyle": style, "linewidth": 1.8}
        held_out.plot(epochs, 1 - np.mean(reader.held_out, axis=0), **look)
        if "delta" not in NO_ANGLES.get(name, ()):
            angles.plot(epochs, np.mean(reader.angles.delta, axis=0), **look)
        test.plot([0, 1 - np.mean(reader.test)], [i, i], marker="|", markevery=[1], ms=14, **look)
        test.plot(1 - reader.test, np.full(config.seeds, i), "o", color=color, alpha=0.5)
    if figures.log_where_wide(held_out):
        held_out.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    held_out.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    held_out.yaxis.set_minor_formatter(NullFormatter())
    held_out.set(title="Validation error rate", xlabel="epoch")
    draw_right_angle(angles)
    angles.set(title="Angle to the exact error", xlabel="epoch", yticks=range(0, 91, 15))
    angles.set_ylabel("degrees, mean of the hidden layers")
    test.set_yticks(range(len(readers)), readers)
    test.invert_yaxis()
    test.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    test.set(title="Test error rate at the end", xlim=(0, None))
    test.set_xlabel(f"line and tick: mean of {config.seeds} seeds; dots: each seed")
    for label, name in zip(test.get_yticklabels(), readers, strict=True):
        label.set_color(STYLES[name][0])
    figure.suptitle("In all panels, a rule has the colour and line that the right panel names")
    return figure


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"alignment: {error}") from None
