"""Many networks at once: seeds x learning rates x rules, all trained by one compiled program.

A training from its first draw to its last test is a pure function, and what is a number in it can
be an argument:

  train(key, rate, index) -> outcome

`jax.vmap` makes of it the training of every key with every rate and every index. The index says
which weights carry the error back. A rule is a record of functions and no number, but `one_of`
makes a rule of several that has their states and an index for its own state, and the tree that it
chooses is that of the rule at the index.

Under vmap a choice is no jump: each network makes the trees of all the rules and keeps one of
them, and every rule's state is updated. The rules here choose trees of one structure, which is what
lets one of them be picked, and make them by elementwise operations; still, that took about a fifth
of the time on two cores of a CPU. Alone, a network jumps to its own tree.

The same function, compiled once and called for one network after another, is timed beside it. What
is gained by training all at once depends on how much of the machine one network leaves idle: on two
cores of a CPU next to nothing.

All rules share the draws of a seed: initial weights, the order of the batches, and B, which is the
same for feedback alignment and, at the start, for Kolen-Pollack. Weight decay, by which B - W
shrinks in the latter, acts apart from the momentum, as in AdamW.

Source of weight decay apart from the momentum:
  "Decoupled Weight Decay Regularization", Loshchilov, Hutter, 2019.
"""

import collections
import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from tqdm import tqdm

import jaxbp as bp
from experiments.common import data, figures
from experiments.common.flags import wrong_flags
from experiments.common.measuring import compile_program, describe_environment

LOSS = bp.softmax_cross_entropy
MOMENTUM = 0.9
WEIGHT_DECAY = 3e-3
RULES = {
    "exact": bp.exact(),
    "random_feedback": bp.random_feedback(),
    "sign_symmetric": bp.sign_symmetric(),
    "kolen_pollack": bp.kolen_pollack(),
}
ROUNDS = 3  # of timing, in each of which both ways train all networks


@dataclass(frozen=True)
class Config:
    """Trains a network for each seed, learning rate and rule: all at once, and one by one."""

    seeds: int = 4
    """How many draws of initial weights, batches and feedback, at least 2."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """The learning rates, up to 7 of them."""
    epochs: int = 30
    """For how many epochs each network is trained."""
    width: int = 64
    """Units of the first hidden layer, at least 2; the second has half as many."""
    batch_size: int = 64
    """Examples per step."""
    seed: int = 0
    """Of the split of the data and of the keys of all draws."""
    out: Path = Path("out")
    """The folder for the figure."""


class Outcome(NamedTuple):
    """What the training of a network has come to; of many, with their axes first.

    Attributes:
      losses: on the held-out data, after each epoch, [epochs].
      test: the accuracy on the test data at the end.
    """

    losses: jax.Array
    test: jax.Array


class Way(NamedTuple):
    """One way to train all networks.

    Attributes:
      outcome: of all, with axes [rules, rates, seeds].
      traces: how often the training was traced, and so compiled.
      compile_s: the seconds that this took.
      seconds: of the training of all networks, compilation aside, [ROUNDS].
    """

    outcome: Outcome
    traces: int
    compile_s: float
    seconds: np.ndarray


class OneOfState(NamedTuple):
    """What `one_of` remembers.

    Attributes:
      index: which of the rules it is.
      states: of all the rules.
    """

    index: jax.Array
    states: tuple[Any, ...]


def main(config):
    """Returns a `Way` for each way to train the networks, `at once` and `one by one`."""
    started = perf_counter()
    require(config)
    dataset = data.load(None, seed=config.seed)
    print_problem(dataset, config)
    train = make_training(dataset, config)
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    ways = measure(train, keys, jnp.asarray(config.rates), jnp.arange(len(RULES)))
    outcome = ways["at once"].outcome
    print_table(outcome, config.rates)
    print_times(ways)
    figures.save(draw(outcome, config.rates), config.out / "ensemble.png")
    print(f"done in {perf_counter() - started:.0f} s, compilation included")
    return ways


def require(config):
    wrong = []
    for name, least in (("seeds", 2), ("epochs", 1), ("width", 2), ("batch_size", 1)):
        if getattr(config, name) < least:
            wrong.append(f"{name} is {getattr(config, name)}; it takes at least {least}")
    most = len(figures.CYCLE)
    if not 1 <= len(config.rates) <= most:
        wrong.append(f"rates has {len(config.rates)} numbers; it takes 1 to {most}")
    wrong += [
        f"rates has {rate}; it takes numbers in (0, 1000]"
        for rate in config.rates
        if not 0 < rate <= 1000
    ]
    wrong += wrong_flags(seed=config.seed, out=config.out)
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}.")


def one_of(rules, index):
    """The rule at `index`, which may be traced: all are made and updated, and one is followed.

    Their trees for backward must be of one structure.
    """

    def make(key, net, shape):
        return OneOfState(index, tuple(rule.make(key, net, shape) for rule in rules))

    def choose(state, params, *, key=None):
        trees = [
            functools.partial(rule.choose, own, params, key=key)
            for rule, own in zip(rules, state.states, strict=True)
        ]
        return jax.lax.switch(state.index, trees)

    def update(state, params, *, move, key=None):
        states = tuple(
            rule.update(own, params, move=move, key=key)
            for rule, own in zip(rules, state.states, strict=True)
        )
        return state._replace(states=states)

    return bp.Rule("one_of", make, choose, update)


def make_network(width, classes):
    return bp.chain(bp.dense(width), bp.tanh(), bp.dense(width // 2), bp.tanh(), bp.dense(classes))


def make_optimizer(rate):
    return optax.chain(
        optax.trace(MOMENTUM),
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.scale_by_learning_rate(rate),
    )


def make_training(dataset, config):
    """The training of one network as a pure function, `train(key, rate, index) -> Outcome`."""
    net = make_network(config.width, len(dataset.class_names))
    train_data, held_out, test = (tuple(map(jnp.asarray, part)) for part in dataset[1:4])
    evaluate = bp.evaluate(net, LOSS, metric=bp.accuracy)

    def train(key, rate, index):
        rule, optimizer = one_of(RULES.values(), index), make_optimizer(rate)
        epoch = bp.make_epoch(net, LOSS, optimizer, batch_size=config.batch_size, rule=rule)

        def go(state, _):
            state, _ = epoch(state, *train_data)
            return state, evaluate(state.params, *held_out)["loss"]

        state = bp.init_state(net, optimizer, key, train_data[0].shape[1:], rule=rule)
        state, losses = jax.lax.scan(go, state, length=config.epochs)
        return Outcome(losses, evaluate(state.params, *test)["metric"])

    return train


def over_all(train):
    """`train` of every index, with every rate, from every key: [rules, rates, seeds, ...]."""
    # One axis for each argument, and not one for all networks: what depends on the key alone, as
    # the order of the batches does, is then computed once for each key.
    over_seeds = jax.vmap(train, (0, None, None))
    over_rates = jax.vmap(over_seeds, (None, 0, None))
    return jax.vmap(over_rates, (None, None, 0))


def measure(train, keys, rates, indices):
    """A `Way` for each way to train the networks. They take turns, so that both are as busy."""
    members = [(key, rate, index) for index, rate, key in itertools.product(indices, rates, keys)]
    traces, seconds = collections.Counter(), np.empty((2, ROUNDS))

    def counted(name):
        def function(*args):
            traces[name] += 1  # under jit the function itself is called only to be traced
            return train(*args)

        return function

    with tqdm(total=2 + 2 * ROUNDS, leave=False) as bar:
        bar.set_description("compiling")
        at_once = compile_program(over_all(counted("at once")), keys, rates, indices)
        bar.update()
        alone = compile_program(counted("one by one"), *members[0])
        bar.update()
        bar.set_description("training")
        for r in range(ROUNDS):
            seconds[0, r], together = timed(at_once.run)
            bar.update()
            # Nothing waits between the calls: should jax run some of them side by side, it may.
            seconds[1, r], apart = timed(lambda: [alone.compiled(*member) for member in members])
            bar.update()
    together = jax.tree.map(np.asarray, together)
    apart = jax.tree.map(lambda like, *each: np.reshape(each, like.shape), together, *apart)
    return {
        name: Way(outcome, traces[name], program.compile_s, each)
        for name, outcome, program, each in (
            ("at once", together, at_once, seconds[0]),
            ("one by one", apart, alone, seconds[1]),
        )
    }


def timed(run):
    """Seconds until all that a run makes is there, and what that is."""
    started = perf_counter()
    made = jax.block_until_ready(run())
    return perf_counter() - started, made


def best_of(outcome):
    """The rule and the rate, as indices, of the lowest mean held-out loss after the last epoch."""
    means = np.mean(outcome.losses[..., -1], axis=-1)
    worst_if_not_finite = np.where(np.isfinite(means), means, np.inf)
    return np.unravel_index(np.argmin(worst_if_not_finite), means.shape)


def show_test(test):
    """The mean and the standard deviation over seeds of accuracies on the test, in per cent."""
    return f"{100 * np.mean(test):.1f} ± {100 * np.std(test, ddof=1):.1f}"


def print_problem(dataset, config):
    width, (inputs, labels) = config.width, dataset.train
    print(
        f"{len(RULES) * len(config.rates) * config.seeds} networks: {len(RULES)} rules x "
        f"{len(config.rates)} learning rates x {config.seeds} seeds\n"
        f"each {inputs.shape[-1]}-{width}-{width // 2}-{len(dataset.class_names)} with tanh, on "
        f"{len(labels)} digits for {config.epochs} epochs in batches of {config.batch_size}; "
        f"momentum {MOMENTUM}, weight decay {WEIGHT_DECAY:g}\n"
    )


def print_table(outcome, rates):
    rule, rate = best_of(outcome)
    title = "test accuracy, %"
    print(f"{title:18}" + "".join(f"{f'rate {each:g}':>14}" for each in rates))
    for name, tests in zip(RULES, outcome.test, strict=True):
        print(f"{name:18}" + "".join(f"{show_test(test):>14}" for test in tests))
    print(
        f"means ± standard deviations over {outcome.test.shape[-1]} seeds\n"
        f"lowest mean held-out loss: {list(RULES)[rule]} at rate {rates[rate]:g}, test accuracy "
        f"{show_test(outcome.test[rule, rate])} %\n"
    )


def print_times(ways):
    at_once, one_by_one = ways["at once"], ways["one by one"]
    count = at_once.outcome.test.size
    print(f"{'':12}{'traced':>8}{'compiling, s':>14}{f'training all {count}, s':>24}")
    for name, way in ways.items():
        low, median, high = (f(way.seconds) for f in (np.min, np.median, np.max))
        shown = f"{median:.2f} ({low:.2f}-{high:.2f})"
        print(f"{name:12}{way.traces:>8}{way.compile_s:>14.1f}{shown:>24}")
    medians = np.median(at_once.seconds), np.median(one_by_one.seconds)
    totals = at_once.compile_s + medians[0], one_by_one.compile_s + medians[1]
    apart = abs(at_once.outcome.losses[..., 0] - one_by_one.outcome.losses[..., 0]).max()
    print(
        f"medians of {ROUNDS} rounds in turns, the lowest and the highest in parentheses; "
        f"{describe_environment()['machine']}\n"
        f"one by one / at once: {medians[1] / medians[0]:.2f} in training, "
        f"{totals[1] / totals[0]:.2f} with compiling\n"
        f"Either program takes any rule as a number. At once, each network makes the trees of all "
        f"{len(RULES)} rules and keeps one; one by one, it makes its own alone.\n"
        f"To compile anew for each network would take {count} x {one_by_one.compile_s:.1f} s.\n"
        f"After the first epoch the losses of the two ways differ by at most {apart:.1e}.\n"
    )


def draw(outcome, rates):
    """The held-out loss of every network, a panel for each rule; the best combination is marked."""
    figure = Figure(figsize=(10, 6.6))
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    best_rule, best_rate = best_of(outcome)
    for rule, (axes, name) in enumerate(zip(panels, RULES, strict=True)):
        draw_curves(axes, outcome.losses[rule], outcome.test[rule], rates)
        if rule == best_rule:
            draw_star(axes, outcome.losses[rule, best_rate], figures.CYCLE[best_rate])
        axes.legend(title="rate: test accuracy, %", fontsize=9, title_fontsize=9)
        axes.set_title(name.replace("_", " "))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(
        f"{outcome.test.size} networks trained at once, by one compiled program; "
        f"a line is a network, with {outcome.test.shape[-1]} seeds at each rate"
    )
    figure.supxlabel("epochs")
    figure.supylabel("held-out loss")
    return figure


def draw_curves(axes, losses, tests, rates):
    epochs = np.arange(1, losses.shape[-1] + 1)
    for color, rate, curves, test in zip(figures.CYCLE, rates, losses, tests, strict=False):
        lines = axes.semilogy(epochs, curves.T, color=color, linewidth=1, alpha=0.8)
        lines[0].set_label(f"{rate:g}: {show_test(test)}")


def draw_star(axes, curves, color):
    """A star where the mean of the best curves ends."""
    epochs, loss = curves.shape[-1], np.mean(curves[:, -1])
    style = {"markersize": 15, "markeredgecolor": figures.BLACK, "zorder": 3, "clip_on": False}
    label = f"lowest mean loss: {loss:.3f}"
    axes.plot(epochs, loss, "*", color=color, label=label, **style)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"ensemble: {error}") from None
