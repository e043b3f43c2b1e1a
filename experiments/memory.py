"""Which ways of assigning credit bridge which delay? Five ways, on two problems of memory.

What a recurrent network reads may matter many steps later. To learn to remember it, the error has
to reach the step where it was read. Backpropagation through time carries the error back to this
step. Rules that work forward in time keep, at each step, the influence of every parameter on the
current state.

  copy      The network reads some symbols, then nothing during the delay, and then has to output
            the symbols.
  adding    The network reads as many numbers in [0, 1] as the delay. Two of them are marked, one in
            the first quarter and one in the second. At the last step it has to output their sum.

The network is a recurrent layer and a dense layer. It is trained from scratch for every problem and
every delay by

  BPTT              the exact gradient, backward through all steps
  truncated BPTT    the same, cut at every `horizon` steps
  RTRL              the exact gradient, computed forward in time
  SnAp-1            forward, with the influence of a parameter on the state of its own unit only
  e-prop            forward, with this influence, but without the recurrent weights

The score is 1 - loss / loss of chance, on new sequences: 1 is perfect, 0 is no better than chance.

The last panel of the figure shows an error at the last step on its way back, before training: the
size sqrt(mean_n |delta_n|^2) at each step, where delta is the derivative with respect to the drive
of the step, x W + b. It shows why cells have gates.

Sources:
  "Long Short-Term Memory", Hochreiter, Schmidhuber, 1997: the adding problem.
  "Unitary Evolution Recurrent Neural Networks", Arjovsky, Shah, Bengio, 2016: the copy problem in
  this form.
  "Learning Long-Term Dependencies with Gradient Descent is Difficult", Bengio, Simard, Frasconi,
  1994: errors that vanish or explode.
"""

import functools
import itertools
import math
from collections.abc import Callable
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

import jaxbp as bp
from experiments.common import figures, files
from experiments.common.flags import raise_wrong, too_small, wrong_flags
from experiments.common.progress import Bar
from experiments.common.resume import Resumed
from experiments.common.tables import aligned, spread

CELLS = {"simple_rnn": bp.simple_rnn, "lstm": bp.lstm, "gru": bp.gru}
ALPHABET = 4  # different symbols
MEASURED = 512  # sequences to measure the score
SHOWN = 8  # of these, the sequences whose outputs are saved
CLIP = 1.0  # the norm to which the gradient is clipped
EPROP, SNAP, RTRL, BPTT, CUT = "e-prop", "SnAp-1", "RTRL", "BPTT", "truncated BPTT"
STYLES = {
    BPTT: (figures.BLACK, "-", "o"),
    RTRL: (figures.ORANGE, "--", "x"),
    CUT: (figures.BLUE, "-", "s"),
    SNAP: (figures.GREEN, "-", "^"),
    EPROP: (figures.RED, "-", "v"),
}
STEPS_BACK = 60  # steps that the error signals travel back
SIGNAL_WIDTH = 64  # units of the layers whose error signals are shown
GAINS = (0.7, 1.0, 1.4)  # gains of the recurrent weights U of the simple cell
SIGNAL_STYLES = (
    *(("gray", line) for line in (":", "--", "-")),
    (figures.PURPLE, "-"),
    (figures.SKY, "-"),
)


@dataclass(frozen=True)
class Config:
    """Trains recurrent networks to remember, by credit that goes backward or forward in time."""

    cell: Literal["simple_rnn", "lstm", "gru"] = "gru"
    """The cell of the recurrent layer."""
    width: int = 12
    """The number of its units; the work of RTRL grows with the fourth power of this number."""
    delays: tuple[int, ...] = (8, 16, 32)
    """The delays in steps, each at least 4."""
    horizon: int = 8
    """The number of steps at which truncated BPTT cuts."""
    symbols: int = 2
    """The number of symbols to copy; there are 4 different ones."""
    steps: int = 500
    """The number of training steps, each on new sequences."""
    batch_size: int = 32
    """The number of sequences per step."""
    learning_rate: float = 0.03
    """The learning rate of Adam: the better of 0.01 and 0.03 for BPTT and e-prop, at 16 units."""
    seeds: int = 2
    """The number of random draws."""
    seed: int = 0
    """The seed of all random draws."""
    out: Path = Path("out")
    """The folder for the figure."""
    resume: bool = False
    """Whether to store what is trained in `out`, and to go on from what is stored there."""


class Way(NamedTuple):
    """A way to assign credit.

    Attributes:
      rule: which weights carry the error, and in which direction of time.
      horizon: the number of steps at which it is cut, or None.
    """

    rule: bp.Rule
    horizon: int | None = None


class Problem(NamedTuple):
    """A problem of memory.

    Attributes:
      draw: `draw(key, n, delay) -> (inputs [n, T, I], targets)`; the loss takes the targets.
      outputs: the number of outputs of the network.
      loss: the loss of the outputs at all steps, with weight zero at steps without a target.
      baseline: the expected loss of an example for the best constant prediction, chance.
    """

    draw: Callable[..., Any]
    outputs: int
    loss: bp.Loss
    baseline: float


class Learned(NamedTuple):
    """The result of training a network per seed.

    Attributes:
      scores: the scores, [seeds].
      params: the parameters, with the seeds as first axis.
      outputs: the outputs for the first sequences of the measurement, [seeds, SHOWN, T, outputs].
      inputs: these sequences, [seeds, SHOWN, T, I].
    """

    scores: np.ndarray
    params: Any
    outputs: np.ndarray
    inputs: np.ndarray


class Results(NamedTuple):
    """The results.

    Attributes:
      known: the scores by problem and by way, [delays, seeds].
      signals: the size of the error signal at each step back from the last, by cell, [STEPS_BACK].
    """

    known: dict[str, dict[str, np.ndarray]]
    signals: dict[str, np.ndarray]


def main(config: Config) -> Results:
    """Trains all networks, prints the scores, draws the figure, and returns the `Results`."""
    started = perf_counter()
    require(config)
    print(
        f"{config.cell} of {config.width} units, {config.steps} training steps of "
        f"{config.batch_size} sequences; medians of {config.seeds} draws\n"
    )
    stored = Resumed("memory", asdict(config))
    all_problems, all_ways = problems(config), ways(config)
    todo = list(itertools.product(all_problems, all_ways, config.delays))
    known = {problem: {way: [] for way in all_ways} for problem in all_problems}
    learned = {}
    with Bar("training", len(todo), "training") as bar:
        for problem, way, delay in todo:
            name = f"{problem}, {way}, {delay}"
            bar.set_postfix_str(f"compiling and training: {name}")
            train = functools.partial(learn, all_problems[problem], all_ways[way], delay, config)
            learned[name] = stored.part(name, train)
            known[problem][way].append(learned[name].scores)
            bar.update()
    known = {p: {w: np.array(rows) for w, rows in by.items()} for p, by in known.items()}
    signals = error_signals(jax.random.key(config.seed))
    print_known(known, config)
    print_signals(signals)
    figures.save(draw(known, signals, config), config.out / "memory.png")
    files.save_trained(
        config.out / "memory.npz",
        {name: one.params for name, one in learned.items()},
        {f"outputs/{name}": one.outputs for name, one in learned.items()}
        | {f"inputs/{name}": one.inputs for name, one in learned.items()},
    )
    print(f"done in {perf_counter() - started:.0f} s, compilation included")
    return Results(known, signals)


def require(config):
    """Raises if a flag is wrong."""
    wrong = too_small(config, width=1, horizon=1, symbols=1, steps=1, batch_size=1, seeds=1)
    if not config.delays or min(config.delays) < 4:
        wrong.append(f"delays is {config.delays}; it takes numbers of at least 4")
    wrong += wrong_flags(seed=config.seed, out=config.out, learning_rate=config.learning_rate)
    raise_wrong(wrong)


def ways(config):
    return {
        BPTT: Way(bp.exact()),
        RTRL: Way(bp.rtrl()),
        CUT: Way(bp.exact(), config.horizon),
        SNAP: Way(bp.snap1()),
        EPROP: Way(bp.eprop()),
    }


# The problems.


def problems(config):
    return {
        "copy": Problem(
            functools.partial(draw_copy, symbols=config.symbols),
            ALPHABET,
            bp.weighted(bp.softmax_cross_entropy),
            config.symbols * math.log(ALPHABET),
        ),
        # The sum of two uniform numbers has the variance 1/6. The loss is half the squared error.
        "adding": Problem(draw_adding, 1, bp.weighted(bp.squared_error), 1 / 12),
    }


def draw_copy(key, n, delay, *, symbols):
    """Draws symbols and blanks; one more input is 1 at the steps that ask for the symbols."""
    drawn = jax.random.randint(key, (n, symbols), 0, ALPHABET)
    t = 2 * symbols + delay
    asked = jnp.arange(t) >= symbols + delay
    shown = jax.nn.one_hot(drawn, ALPHABET)
    shown = jnp.pad(shown, [(0, 0), (0, t - symbols), (0, 0)])
    cue = jnp.broadcast_to(asked[:, None].astype(shown.dtype), (n, t, 1))
    wanted = jnp.pad(drawn, [(0, 0), (t - symbols, 0)])
    weights = jnp.broadcast_to(asked.astype(shown.dtype), (n, t))
    return jnp.concatenate([shown, cue], axis=-1), (wanted, weights)


def draw_adding(key, n, delay):
    """Draws numbers and marks; the target is the sum of the marked numbers, at the last step."""
    number_key, first_key, second_key = jax.random.split(key, 3)
    numbers = jax.random.uniform(number_key, (n, delay))
    first = jax.random.randint(first_key, (n, 1), 0, delay // 4)
    second = jax.random.randint(second_key, (n, 1), delay // 4, delay // 2)
    steps = jnp.arange(delay)
    marks = ((steps == first) | (steps == second)).astype(numbers.dtype)
    wanted = jnp.sum(numbers * marks, axis=1)[:, None, None]
    weights = (steps == delay - 1).astype(numbers.dtype)
    return (
        jnp.stack([numbers, marks], axis=-1),
        (
            jnp.broadcast_to(wanted, (n, delay, 1)),
            jnp.broadcast_to(weights[:, None], (n, delay, 1)),
        ),
    )


# Learning.


def make_network(config, way, outputs):
    cell = CELLS[config.cell](config.width)
    return bp.chain(bp.recurrent(cell, horizon=way.horizon), bp.dense(outputs))


def learn(problem, way, delay, config):
    """Trains a network per seed; returns the `Learned`."""
    net = make_network(config, way, problem.outputs)
    rates = optax.linear_schedule(config.learning_rate, 0.0, config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(rates))
    gradient = bp.value_and_grad(net, problem.loss, rule=way.rule)

    def run(key):
        init_key, train_key, measure_key = jax.random.split(key, 3)
        x, _ = problem.draw(measure_key, 1, delay)
        params, _ = net.init(init_key, x.shape[1:])

        def step(carry, step_key):
            params, state = carry
            x, targets = problem.draw(step_key, config.batch_size, delay)
            _, grads = gradient(params, x, targets)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        start = params, optimizer.init(params)
        (params, _), _ = jax.lax.scan(step, start, jax.random.split(train_key, config.steps))
        x, targets = problem.draw(measure_key, MEASURED, delay)
        outputs, _ = net.forward(params, x)
        values, _ = problem.loss(outputs, targets)
        score = 1 - jnp.mean(values) / problem.baseline
        return Learned(score, params, outputs[:SHOWN], x[:SHOWN])

    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    return jax.tree.map(np.asarray, jax.jit(lambda keys: jax.lax.map(run, keys))(keys))


# The error on its way back.


def error_signals(key):
    """Computes sqrt(mean_n |delta_n|^2) at each step for an error at the last step, by cell."""

    def scaled(gain):
        return bp.recurrent(
            bp.simple_rnn(SIGNAL_WIDTH), recurrent_init=jax.nn.initializers.orthogonal(gain)
        )

    layers = {f"simple_rnn, U of gain {gain:g}": scaled(gain) for gain in GAINS}
    layers |= {name: bp.recurrent(CELLS[name](SIGNAL_WIDTH)) for name in ("gru", "lstm")}
    return {name: signal_sizes(layer, key) for name, layer in layers.items()}


def signal_sizes(layer, key):
    init_key, x_key, dy_key = jax.random.split(key, 3)
    params, out_shape = layer.init(init_key, (STEPS_BACK, 8))
    x = 0.1 * jax.random.normal(x_key, (32, STEPS_BACK, 8))
    dy = jax.random.normal(dy_key, (32, *out_shape)).at[:, :-1].set(0)

    @jax.jit
    def sizes(params, x, dy):
        _, cache = layer.forward(params, x)
        _, signals = layer.backward(params, cache, dy)
        return jnp.sqrt(jnp.mean(jnp.sum(signals["bias"].deltas ** 2, axis=-1), axis=0))

    return np.asarray(sizes(params, x, dy))[::-1]


# Tables and figure.


def print_known(known, config):
    for problem, by_way in known.items():
        table = [(problem, *(f"delay {delay}" for delay in config.delays))]
        table += [(way, *(spread(row, ".2f") for row in rows)) for way, rows in by_way.items()]
        print(f"score, median (lowest-highest)\n{aligned(table)}\n")


def print_signals(signals):
    print(f"size of an error {STEPS_BACK - 1} steps back / its size at the last step")
    for name, sizes in signals.items():
        print(f"  {name:26}{sizes[-1] / sizes[0]:>10.1e}")
    print()


def draw(known, signals, config):
    """Draws the scores of each way against the delay, and the error signals against time."""
    figure = Figure(figsize=(12, 4.6))
    *panels, right = figure.subplots(1, 3)
    for axes, (problem, by_way) in zip(panels, known.items(), strict=True):
        for way, rows in by_way.items():
            color, line, marker = STYLES[way]
            label = f"{way}, {config.horizon} steps" if way == CUT else way
            style = {"color": color, "marker": marker}
            axes.plot(config.delays, np.median(rows, axis=1), line, label=label, **style)
            axes.plot(config.delays, rows, marker, color=color, alpha=0.3, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(config.delays, map(str, config.delays))
        axes.minorticks_off()
        axes.set(title=f"The {problem} problem", xlabel="delay, in steps", ylim=(-0.1, 1.05))
    panels[0].set_ylabel("score, 1 - loss / loss of chance")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        title=f"lines and large marks: median of {config.seeds} draws; small, faint: each draw",
        loc="outside lower left",
        ncols=len(STYLES),
    )
    for (name, sizes), (color, line) in zip(signals.items(), SIGNAL_STYLES, strict=True):
        right.plot(sizes / sizes[0], line, color=color, label=name)
    figures.log_where_wide(right)
    right.set(title="Error signal before training, by cell", xlabel="steps back in time")
    right.set_ylabel("size of delta / size at the last step")
    right.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"memory: {error}") from None
