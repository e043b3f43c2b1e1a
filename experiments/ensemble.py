"""Many networks at once: seeds x learning rates x rules, all trained by one compiled program.

A whole training, from the initial weights to the test accuracy, is a pure function of its numbers:

  train(key, rate, index) -> outcome

`jax.vmap` turns it into the training of every key with every rate and every index. The index
selects the rule, that is, the weights that carry the error back. A rule is a record of functions
and not a number. So `one_of` combines several rules to one: its state holds their states and the
index, and it chooses the tree of the rule at the index.

Under vmap, `jax.lax.switch` computes all branches: each network computes the trees of all rules and
selects one, and updates the state of every rule. This works because these rules choose trees of the
same structure. Their operations are elementwise, but still took about a fifth of the time on two
CPU cores. Without vmap, a network computes only its own tree.

The script also times the same function compiled once and called for one network after another. The
gain of vmap depends on how much of the machine one network leaves idle, so also on what else runs
there: on two busy CPU cores, it differed more between runs than between 8 and 64 units.

Two effects oppose each other. All networks share the overhead of each operation, which is most of
the time of a small network. But from the second layer on, the networks differ in both operands of
their products, which become batches of small products. On two CPU cores, XLA computed these at
about 0.4 of the rate of one large product. One product of block-diagonal matrices would have 64
times the FLOP. The rest is limited by memory: the parameters of one network stay in the cache from
step to step, those of 64 do not.

All rules share the random draws of a seed: the initial weights, the order of the batches, and B,
which is the same for feedback alignment and, at the start, for Kolen-Pollack. In Kolen-Pollack,
weight decay makes B - W shrink. The decay is decoupled from the momentum, as in AdamW.

Source of decoupled weight decay:
  "Decoupled Weight Decay Regularization", Loshchilov, Hutter, 2019.
"""

import collections
import functools
import itertools
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
from matplotlib.ticker import LogLocator, NullFormatter
from tqdm import tqdm

import jaxbp as bp
from experiments.common import data, figures, files
from experiments.common.flags import raise_wrong, too_small, wrong_flags
from experiments.common.measuring import compile_program, describe_environment
from experiments.common.resume import Resumed
from experiments.common.tables import spread

LOSS = bp.softmax_cross_entropy
MOMENTUM = 0.9
WEIGHT_DECAY = 3e-3
RULES = {
    "exact": bp.exact(),
    "random_feedback": bp.random_feedback(),
    "sign_symmetric": bp.sign_symmetric(),
    "kolen_pollack": bp.kolen_pollack(),
}
ROUNDS = 3  # rounds of timing; in each round both ways train all networks


@dataclass(frozen=True)
class Config:
    """Trains a network for each seed, learning rate and rule: all at once, and one by one."""

    seeds: int = 4
    """The number of draws of initial weights, batches and feedback, at least 2."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """The learning rates, at most 7."""
    epochs: int = 30
    """The number of epochs to train each network."""
    width: int = 64
    """The number of units of the first hidden layer, at least 2; the second has half as many."""
    batch_size: int = 64
    """The number of examples per step."""
    seed: int = 0
    """The seed of the split of the data and of all random draws."""
    out: Path = Path("out")
    """The folder for the figure."""
    resume: bool = False
    """Whether to store what is trained in `out`, and to go on from what is stored there."""


class Outcome(NamedTuple):
    """The result of training one network, or of many, with their axes first.

    Attributes:
      losses: the validation loss after each epoch, [epochs].
      test: the test accuracy at the end.
      params: the parameters at the end.
      outputs: the outputs for the test set, [N, C].
    """

    losses: jax.Array
    test: jax.Array
    params: Any = ()
    outputs: Any = ()


class Way(NamedTuple):
    """One way to train all networks.

    Attributes:
      outcome: the results of all networks, with axes [rules, rates, seeds].
      traces: how often the training was traced and compiled.
      compile_s: the seconds to trace and compile.
      seconds: the seconds to train all networks, without compilation, [ROUNDS].
    """

    outcome: Outcome
    traces: int
    compile_s: float
    seconds: np.ndarray


class OneOfState(NamedTuple):
    """The state of the rule `one_of`.

    Attributes:
      index: the index of the selected rule.
      states: the states of all rules.
    """

    index: jax.Array
    states: tuple[Any, ...]


def main(config: Config) -> dict[str, Way]:
    """Trains the networks `at once` and `one by one`, and returns a `Way` for each."""
    started = perf_counter()
    require(config)
    dataset = data.load(None, seed=config.seed)
    print_problem(dataset, config)
    train = make_training(dataset, config)
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    stored = Resumed("ensemble", asdict(config))
    rates, rules = jnp.asarray(config.rates), jnp.arange(len(RULES))
    ways = stored.part("ways", lambda: measure(train, keys, rates, rules))
    outcome = ways["at once"].outcome
    print_table(outcome, config.rates)
    print_times(ways)
    figures.save(draw(outcome, config.rates), config.out / "ensemble.png")
    files.save_trained(
        config.out / "ensemble.npz", outcome.params, {"test_outputs": outcome.outputs}
    )
    print(f"done in {perf_counter() - started:.0f} s, compilation included")
    return ways


def require(config):
    """Raises if a flag is wrong."""
    wrong = too_small(config, seeds=2, epochs=1, width=2, batch_size=1)
    most = len(figures.CYCLE)
    if not 1 <= len(config.rates) <= most:
        wrong.append(f"rates has {len(config.rates)} numbers; it takes 1 to {most}")
    wrong += [
        f"rates has {rate}; it takes numbers in (0, 1000]"
        for rate in config.rates
        if not 0 < rate <= 1000
    ]
    wrong += wrong_flags(seed=config.seed, out=config.out)
    raise_wrong(wrong)


def one_of(rules, index):
    """Returns a rule that makes and updates all rules and chooses the tree of the one at `index`.

    The index may be traced. All rules must choose trees of the same structure.
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
    """Returns the training of one network, a pure function `train(key, rate, index) -> Outcome`."""
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
        outputs, _ = net.forward(state.params, test[0])
        return Outcome(losses, evaluate(state.params, *test)["metric"], state.params, outputs)

    return train


def over_all(train):
    """Maps `train` over every index, rate and key: [rules, rates, seeds, ...]."""
    # One vmap per argument, instead of one for all networks: what depends only on the key, such as
    # the order of the batches, is then computed once per key.
    over_seeds = jax.vmap(train, (0, None, None))
    over_rates = jax.vmap(over_seeds, (None, 0, None))
    return jax.vmap(over_rates, (None, None, 0))


def measure(train, keys, rates, indices):
    """Times both ways to train the networks, in turns; returns a `Way` for each."""
    members = [(key, rate, index) for index, rate, key in itertools.product(indices, rates, keys)]
    traces, seconds = collections.Counter(), np.empty((2, ROUNDS))

    def counted(name):
        def function(*args):
            traces[name] += 1  # jit calls the Python function only to trace it
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
            # There is no wait between the calls, so jax may run several of them in parallel.
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
    """Runs a function; returns the seconds until its results are ready, and the results."""
    started = perf_counter()
    made = jax.block_until_ready(run())
    return perf_counter() - started, made


def best_of(outcome):
    """Returns the indices of the rule and the rate with the lowest mean final validation loss."""
    means = np.mean(outcome.losses[..., -1], axis=-1)
    worst_if_not_finite = np.where(np.isfinite(means), means, np.inf)
    return np.unravel_index(np.argmin(worst_if_not_finite), means.shape)


def show_test(test):
    """Formats the mean and standard deviation over seeds of test accuracies, in per cent."""
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
        f"lowest mean validation loss: {list(RULES)[rule]} at rate {rates[rate]:g}, test accuracy "
        f"{show_test(outcome.test[rule, rate])} %\n"
    )


def print_times(ways):
    at_once, one_by_one = ways["at once"], ways["one by one"]
    count = at_once.outcome.test.size
    print(f"{'':12}{'traced':>8}{'compiling, s':>14}{f'training all {count}, s':>24}")
    for name, way in ways.items():
        seconds = spread(way.seconds, ".2f")
        print(f"{name:12}{way.traces:>8}{way.compile_s:>14.1f}{seconds:>24}")
    medians = np.median(at_once.seconds), np.median(one_by_one.seconds)
    totals = at_once.compile_s + medians[0], one_by_one.compile_s + medians[1]
    apart = abs(at_once.outcome.losses[..., 0] - one_by_one.outcome.losses[..., 0]).max()
    print(
        f"median (lowest-highest) of {ROUNDS} rounds in turns; "
        f"{describe_environment()['machine']}\n"
        f"time one by one / at once: {medians[1] / medians[0]:.2f} without compilation, "
        f"{totals[1] / totals[0]:.2f} with compilation\n"
        f"Both programs take the rule as a number. At once, each network computes the trees of all "
        f"{len(RULES)} rules and selects one; one by one, it computes only its own.\n"
        f"A compilation for each network would take {count} x {one_by_one.compile_s:.1f} s.\n"
        f"After the first epoch the losses of the two ways differ by at most {apart:.1e}.\n"
    )


def draw(outcome, rates):
    """Draws the validation loss of every network, one panel per rule, and marks the best."""
    figure = Figure(figsize=(10, 6.6))
    panels = figure.subplots(2, 2, sharex=True, sharey=True).ravel()
    best_rule, best_rate = best_of(outcome)
    for rule, (axes, name) in enumerate(zip(panels, RULES, strict=True)):
        draw_curves(axes, outcome.losses[rule], outcome.test[rule], rates)
        if rule == best_rule:
            draw_star(axes, outcome.losses[rule, best_rate], figures.CYCLE[best_rate])
        axes.legend(title="learning rate: test accuracy, %", fontsize=9, title_fontsize=9)
        axes.set_title(name.replace("_", " "))
    if figures.log_where_wide(*panels):
        for axes in panels:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(
        f"{outcome.test.size} networks trained at once by one compiled program; "
        f"each line is a network, with {outcome.test.shape[-1]} seeds per rate"
    )
    figure.supxlabel("epoch")
    figure.supylabel("validation loss")
    return figure


def draw_curves(axes, losses, tests, rates):
    epochs = np.arange(1, losses.shape[-1] + 1)
    for color, rate, curves, test in zip(figures.CYCLE, rates, losses, tests, strict=False):
        lines = axes.plot(epochs, curves.T, color=color, linewidth=1, alpha=0.8)
        lines[0].set_label(f"{rate:g}: {show_test(test)}")


def draw_star(axes, curves, color):
    """Draws a star at the end of the mean of the best curves."""
    epochs, loss = curves.shape[-1], np.mean(curves[:, -1])
    style = {"markersize": 15, "markeredgecolor": figures.BLACK, "zorder": 3, "clip_on": False}
    label = f"lowest mean loss: {loss:.3f}"
    axes.plot(epochs, loss, "*", color=color, label=label, **style)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"ensemble: {error}") from None
