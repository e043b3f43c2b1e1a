"""Who bridges which delay? Five ways to assign credit through time, on two problems of memory.

What a recurrent network has seen may matter many steps later. To learn to keep it, the error has to
find what it was that should have been kept. Backpropagation through time goes back to look for it;
rules that work forward in time carry along, at each step, what every parameter has had a part in.

  copy      some symbols, nothing for the length of the delay, and then the symbols are wanted back
  adding    numbers in [0, 1], as many as the delay; at the last, the sum of two that were marked,
            one in the first quarter and one in the second

The same network, a recurrent layer and a dense one behind it, learns each of them anew for every
delay by

  BPTT             the exact gradient, backwards through all steps
  BPTT, cut        the same, cut at every so many steps
  RTRL             the exact gradient, forwards
  SnAp-1           forwards, with what a parameter does to the state of its own unit
  e-prop           forwards, with what it does to it without the recurrent weights

and is measured by what it has come to know: 1 - loss / the loss of who knows nothing, on sequences
not seen before. Before training, the last panel shows what becomes of an error at the last step on
its way back, sqrt(mean_n |delta_n|^2) at the drive of every step: the reason for cells with gates.

Sources:
  "Long Short-Term Memory", Hochreiter, Schmidhuber, 1997: the adding problem.
  "Unitary Evolution Recurrent Neural Networks", Arjovsky, Shah, Bengio, 2016: the copy problem in
  this form.
  "Learning Long-Term Dependencies with Gradient Descent is Difficult", Bengio, Simard, Frasconi,
  1994: errors that vanish and explode.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxbp as bp
from experiments.common import figures
from experiments.common.flags import wrong_flags

CELLS = {"simple_rnn": bp.simple_rnn, "lstm": bp.lstm, "gru": bp.gru}
ALPHABET = 4
MEASURED = 512  # sequences
CLIP = 1.0  # the norm of the gradient
EPROP, SNAP, RTRL, BPTT, CUT = "e-prop", "SnAp-1", "RTRL", "BPTT", "BPTT, cut"
STYLES = {
    BPTT: (figures.BLACK, "-", "o"),
    RTRL: (figures.ORANGE, "--", "x"),
    CUT: (figures.BLUE, "-", "s"),
    SNAP: (figures.GREEN, "-", "^"),
    EPROP: (figures.RED, "-", "v"),
}
STEPS_BACK = 60  # of the error signals
SIGNAL_WIDTH = 64
GAINS = (0.7, 1.0, 1.4)  # of the recurrent weights of the simple cell


@dataclass(frozen=True)
class Config:
    """Trains recurrent networks to remember, by credit that goes backwards or forwards in time."""

    cell: Literal["simple_rnn", "lstm", "gru"] = "gru"
    """Of the recurrent layer."""
    width: int = 12
    """Its units; the work of RTRL grows with the fourth power of them."""
    delays: tuple[int, ...] = (8, 16, 32)
    """How many steps are to be bridged, each at least 4."""
    horizon: int = 8
    """At how many steps BPTT is cut."""
    symbols: int = 2
    """To be copied, of 4 different ones."""
    steps: int = 500
    """Of training, each on new sequences."""
    batch_size: int = 32
    """Sequences per step."""
    learning_rate: float = 0.03
    """Of Adam, the same for all; the better of 0.01 and 0.03 by BPTT and e-prop, at 16 units."""
    seeds: int = 2
    """Draws of all that is random."""
    seed: int = 0
    """Of the first of them."""
    out: Path = Path("out")
    """The folder for the figure."""


class Way(NamedTuple):
    """A way to assign credit.

    Attributes:
      rule: which weights carry the error back, and which way.
      horizon: at how many steps it is cut.
    """

    rule: bp.Rule
    horizon: int | None = None


class Problem(NamedTuple):
    """Something to remember.

    Attributes:
      draw: `draw(key, n, delay) -> (inputs [n, T, I], targets)`, for the loss.
      outputs: how many the network has.
      loss: of the outputs at all steps, weighted by zero but at those that are wanted.
      baseline: the expectation of the loss of an example for who knows nothing of it.
    """

    draw: Callable[..., Any]
    outputs: int
    loss: bp.Loss
    baseline: float


class Results(NamedTuple):
    """What came out.

    Attributes:
      known: by problem and by way, what is known of each delay, [delays, seeds].
      signals: the size of the error signal at each step back from the last, [STEPS_BACK].
    """

    known: dict[str, dict[str, np.ndarray]]
    signals: dict[str, np.ndarray]


def main(config):
    """Trains all, prints what they know, draws the figure, and returns the `Results`."""
    started = perf_counter()
    require(config)
    print(
        f"a {config.cell} of {config.width} units learns for {config.steps} steps of "
        f"{config.batch_size} sequences; medians of {config.seeds} draws\n"
    )
    todo = [(p, w, d) for p in problems(config) for w in ways(config) for d in config.delays]
    known = {p: {w: [] for w in ways(config)} for p in problems(config)}
    for problem, way, delay in tqdm(todo, desc="memory", unit="training", disable=None):
        known[problem][way].append(
            learn(problems(config)[problem], ways(config)[way], delay, config)
        )
    known = {p: {w: np.array(rows) for w, rows in by.items()} for p, by in known.items()}
    signals = error_signals(jax.random.key(config.seed))
    print_known(known, config)
    print_signals(signals)
    figures.save(draw(known, signals, config), config.out / "memory.png")
    print(f"done in {perf_counter() - started:.0f} s, compilation included")
    return Results(known, signals)


def require(config):
    wrong = []
    for name in ("width", "horizon", "symbols", "steps", "batch_size", "seeds"):
        value = getattr(config, name)
        if value < 1:
            wrong.append(f"{name.replace('_', '-')} is {value}; it takes at least 1")
    if not config.delays or min(config.delays) < 4:
        wrong.append(f"delays is {config.delays}; it takes numbers of at least 4")
    wrong += wrong_flags(seed=config.seed, out=config.out, learning_rate=config.learning_rate)
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}.")


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
        # The sum of two uniform numbers has a variance of 1/6, and the loss has half the square.
        "adding": Problem(draw_adding, 1, bp.weighted(bp.squared_error), 1 / 12),
    }


def draw_copy(key, n, delay, *, symbols):
    """Symbols, blanks, and a signal for as long as they are wanted, each an input of its own."""
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
    """Numbers and marks, and the sum of the marked at the last step."""
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
    """What is known after training, for each seed: [seeds]."""
    net = make_network(config, way, problem.outputs)
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP), optax.adam(optax.linear_schedule(
            config.learning_rate, 0.0, config.steps
        )),
    )  # fmt: skip
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
        values, _ = problem.loss(net.forward(params, x)[0], targets)
        return 1 - jnp.mean(values) / problem.baseline

    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(run, keys))(keys))


# The error on its way back.


def error_signals(key):
    """By cell, sqrt(mean_n |delta_n|^2) at each step, of an error at the last one alone."""

    def scaled(gain):
        return bp.recurrent(
            bp.simple_rnn(SIGNAL_WIDTH), recurrent_init=jax.nn.initializers.orthogonal(gain)
        )

    layers = {f"simple_rnn, gain {gain:g}": scaled(gain) for gain in GAINS}
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


# What is shown.


def print_known(known, config):
    for problem, by_way in known.items():
        delays = "".join(f"{f'delay {delay}':>18}" for delay in config.delays)
        print(f"{problem:12}{delays}    known, median (lowest-highest)")
        for way, rows in by_way.items():
            cells = [f"{np.median(row):.2f} ({row.min():.2f}-{row.max():.2f})" for row in rows]
            print(f"  {way:10}" + "".join(f"{cell:>18}" for cell in cells))
        print()


def print_signals(signals):
    print(f"an error, {STEPS_BACK - 1} steps back, over what it was at the last")
    for name, sizes in signals.items():
        print(f"  {name:26}{sizes[-1] / sizes[0]:>10.1e}")
    print()


def draw(known, signals, config):
    """What is known by each way against the delay, and the error signals against time."""
    figure = Figure(figsize=(12, 4))
    *panels, right = figure.subplots(1, 3)
    for axes, (problem, by_way) in zip(panels, known.items(), strict=True):
        for way, rows in by_way.items():
            color, line, marker = STYLES[way]
            label = f"{way} at {config.horizon}" if way == CUT else way
            style = {"color": color, "marker": marker}
            axes.plot(config.delays, np.median(rows, axis=1), line, label=label, **style)
            axes.plot(config.delays, rows, marker, color=color, alpha=0.3, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(config.delays, map(str, config.delays))
        axes.minorticks_off()
        axes.set(title=f"The {problem} problem", xlabel="delay, in steps", ylim=(-0.1, 1.05))
    panels[0].set_ylabel("what is known, 1 - loss / that of chance")
    panels[1].legend()
    for name, sizes in signals.items():
        right.semilogy(sizes / sizes[0], label=name)
    right.set(title="An error on its way back, before training", xlabel="steps back")
    right.set_ylabel("size of delta / that at the last step")
    right.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"memory: {error}") from None
