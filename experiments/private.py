"""How much accuracy does privacy cost? DP-SGD on the digits, beside its twin without privacy.

A training M is (epsilon, delta)-differentially private if for all training data D and D' of which
one has one example more than the other, and for every set S of networks,

  P(M(D) in S) <= e^epsilon P(M(D') in S) + delta

so that what the network has become says little of whether any one example was there. Each of T
steps draws a Poisson batch, which every example joins with probability q = B / N by itself, and
follows the private gradient (sum_n min(1, C / |g_n|) g_n + sigma C xi) / B of `private_gradient`.
An accountant says what T such steps spend together, and so the smallest sigma that will do.

Batches vary in size, and arrays do not: a batch has room for so many examples, is padded with
weight 0, and what finds no room is left out. That is not harmless by itself, as an example may push
out another. But this training and one with room for all are the same unless a batch overflows,
which has some probability tau; if the one is (epsilon, delta')-private, then the other is

  (epsilon, delta' + (1 + e^epsilon) tau)-private

The room is such that the second term is at most a thousandth of delta; sigma is for the rest.

The guarantee is for the training part. The number N, the classes, the flags, and the validation and
test data are taken to be public; what is shown of the norms of gradients is not private.
Whoever knows the seed knows the noise: to publish a network, it would have to be kept secret.

Sources:
  "Deep Learning with Differential Privacy", Abadi et al., 2016.
  "Tempered Sigmoid Activations for Deep Learning with Differential Privacy", Papernot, Thakurta,
  Song, Chien, Erlingsson, 2021: tanh, which keeps gradients small where relu does not.
  "Scalable DP-SGD: Shuffling vs. Poisson Subsampling", Chua et al., 2024: batches cut to a size.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from dp_accounting.pld import PLDAccountant
from matplotlib import pyplot as plt
from scipy import stats
from tqdm import tqdm

import jaxbp as bp
from experiments import digits
from experiments.common import data, figures
from experiments.common.flags import require_flags

LOSS = digits.LOSS
EPSILONS = 0.01, 10.0  # e^10 promises next to nothing, and the accountant takes longer for more
LEAST_DELTA = 1e-10  # at 1e-14, what the accountant leaves out of its tails was seen in epsilon
OVERFLOW_SHARE = 1e-3  # of delta
DECIMALS = 3  # of the noise multiplier
PRIVATE, PLAIN = "private", "not private"


@dataclass(frozen=True)
class Config:
    """Trains a classifier with differential privacy, and another without, on the same batches."""

    epsilon: float = 3.0
    """The privacy to keep: the less, the more private."""
    delta: float = 1e-4
    """The slack of the guarantee; below 1 / (number of training examples)."""
    max_norm: float = 0.5
    """The norm to which the gradient of each example is clipped."""
    learning_rate: float = 0.01
    """The step size of Adam."""
    batch_size: int = 128
    """Examples per step, on average."""
    epochs: int = 40
    """For how many epochs to train, in each of which an example is seen once on average."""
    hidden: tuple[int, ...] = (128,)
    """Units of each hidden layer."""
    seed: int = 0
    """Of the split, the initial weights, the batches and the noise."""
    data: Path | None = None
    """A .csv file, or a folder of MNIST-style IDX files, in place of the digits."""
    target: str | None = None
    """The column of the .csv file that holds the class."""
    out: Path = Path("out")
    """The folder for the figure."""


class Sampling(NamedTuple):
    """How batches are drawn.

    Attributes:
      probability: with which each example joins a batch, by itself.
      room: for how many examples a batch has room.
      steps: in an epoch.
    """

    probability: float
    room: int
    steps: int


class Trained(NamedTuple):
    """What training has come to.

    Attributes:
      params: the last.
      accuracies: on the validation data, at the start and after each epoch.
      clipped: the share of clipped examples among those seen.
    """

    params: Any
    accuracies: list[float]
    clipped: float


def main(config):
    """Trains with privacy and without, and returns the accuracy of each on the test data."""
    started = perf_counter()
    if config.epochs < 1:
        raise ValueError(f"epochs is {config.epochs}; it takes at least 1.")
    require_flags(
        "private",
        seed=config.seed,
        learning_rate=config.learning_rate,
        out=config.out,
    )
    dataset = data.load(config.data, target=config.target, seed=config.seed)
    n = len(dataset.train[0])
    require(config, n)
    _, net = digits.make_network(
        digits.Config(hidden=config.hidden, activation="tanh", dropout=0), len(dataset.class_names)
    )
    print(f"{dataset.name}: {n} examples to train on, {len(dataset.class_names)} classes")
    if dataset.image_shape is None:
        print(
            "The columns are standardised by the mean and deviation of the training part, which "
            "are not private: the guarantee does not cover them."
        )

    sampling = make_sampling(config, n)
    probability, room, steps = sampling
    delta = (1 - OVERFLOW_SHARE) * config.delta
    noise_multiplier = calibrate(config.epsilon, delta, probability, steps * config.epochs)
    marks = np.unique([0, 1, *np.linspace(0, config.epochs, 11, dtype=int)])
    epsilons = [
        spend(noise_multiplier, delta, probability, steps * int(mark)) if mark else 0.0
        for mark in marks
    ]
    print(
        f"batches: each example joins with probability {probability:.4f}, "
        f"{config.batch_size} on average, and there is room for {room}\n"
        f"a batch that has no room for all leaves some out, for which delta has "
        f"{OVERFLOW_SHARE * config.delta:.2g} to spare\n"
        f"noise multiplier {noise_multiplier:.{DECIMALS}f}: {steps * config.epochs} steps spend "
        f"epsilon {epsilons[-1]:.4f} of {config.epsilon:g} at delta {config.delta:g}"
    )

    loss = bp.weighted(LOSS)
    gradients = {
        PRIVATE: bp.private_gradient(
            net,
            loss,
            max_norm=config.max_norm,
            noise_multiplier=noise_multiplier,
            batch_size=config.batch_size,
        ),
        PLAIN: plain_gradient(net, loss, batch_size=config.batch_size),
    }
    with tqdm(total=len(gradients) * config.epochs, unit="epoch") as bar:
        runs = {
            name: train(gradient, net, dataset, config, sampling, bar)
            for name, gradient in gradients.items()
        }
    measure = bp.evaluate(net, LOSS, metric=bp.accuracy)
    tests = [float(measure(run.params, *dataset.test)["metric"]) for run in runs.values()]
    print_table(
        {
            "": runs,
            "epsilon": [f"{epsilons[-1]:.4f}", "none"],
            "noise multiplier": [f"{noise_multiplier:.{DECIMALS}f}", "none"],
            "examples clipped": [f"{run.clipped:.0%}" for run in runs.values()],
            "steps": [steps * config.epochs] * 2,
            "validation accuracy": [f"{run.accuracies[-1]:.2%}" for run in runs.values()],
            "test accuracy": [f"{accuracy:.2%}" for accuracy in tests],
        }
    )

    sweep = jax.jit(bp.backprop(net, LOSS, read=bp.sq_norms))
    _, squares = sweep(runs[PRIVATE].params, *dataset.train)
    norms = np.asarray(bp.example_norms(squares))
    figure = draw(runs, (marks, epsilons), norms, config)
    figures.save(figure, config.out / f"private_{dataset.name}.png")
    plt.close(figure)
    print(f"done in {perf_counter() - started:.0f} s, compilation included")
    return tests


def require(config, n):
    """Refuses what cannot be private with n training examples, all of it in one message."""
    low, high = EPSILONS
    wrong = []
    if not low <= config.epsilon <= high:
        wrong.append(f"epsilon is {config.epsilon}; it takes a number in [{low}, {high}]")
    if not LEAST_DELTA <= config.delta < 1 / n:
        wrong.append(
            f"delta is {config.delta}; it takes a number in [{LEAST_DELTA}, 1/{n}): to publish one "
            f"of the {n} training examples, drawn at random, is (0, 1/{n})-private"
        )
    if not 0 < config.max_norm < math.inf:
        wrong.append(f"max-norm is {config.max_norm}; it takes a positive number")
    if not 1 <= config.batch_size <= n:
        wrong.append(
            f"batch-size is {config.batch_size}; it takes 1 to {n}, the number of training examples"
        )
    if wrong:
        raise ValueError("; ".join(wrong) + ".")


def make_sampling(config, n):
    """The sampling for n examples, with room such that overflow costs little of delta."""
    steps = round(n / config.batch_size)
    probability = config.batch_size / n
    # The probability tau is at most the steps' together, here of the data with one example more.
    tau = steps * config.epochs * stats.binom.sf(np.arange(n + 2), n + 1, probability)
    room = np.argmax((1 + math.exp(config.epsilon)) * tau <= OVERFLOW_SHARE * config.delta)
    return Sampling(probability, int(room), steps)


def make_event(noise_multiplier, probability, steps):
    """What the accountant is told: steps of Gaussian noise on Poisson batches."""
    step = dp_accounting.GaussianDpEvent(noise_multiplier)
    step = dp_accounting.PoissonSampledDpEvent(probability, step)
    return dp_accounting.SelfComposedDpEvent(step, steps)


def calibrate(epsilon, delta, probability, steps):
    """The smallest noise multiplier, to three decimals, for steps that are (epsilon, delta)-DP."""
    smallest = dp_accounting.calibrate_dp_mechanism(
        PLDAccountant, lambda noise: make_event(noise, probability, steps), epsilon, delta
    )
    return math.ceil(smallest * 10**DECIMALS) / 10**DECIMALS


def spend(noise_multiplier, delta, probability, steps):
    """The epsilon that so many steps have spent."""
    event = make_event(noise_multiplier, probability, steps)
    return PLDAccountant().compose(event).get_epsilon(delta)


def poisson_batch(key, n, sampling):
    """A Poisson batch of n examples: indices [room], and which of them are not padding."""
    joins = jax.random.bernoulli(key, sampling.probability, (n,))
    (indices,) = jnp.nonzero(joins, size=sampling.room, fill_value=0)
    return indices, jnp.arange(sampling.room) < jnp.sum(joins)


def plain_gradient(net, loss, *, batch_size):
    """As `bp.private_gradient`, but neither clipped nor noised: sum_n g_n / B."""
    summed = bp.reweighted(net, loss, bp.clip_weights(math.inf))

    def function(params, inputs, targets, *, key):
        answer = summed(params, inputs, targets, key=key)
        return answer._replace(grads=jax.tree.map(lambda g: g / batch_size, answer.grads))

    return function


def train(gradient, net, dataset, config, sampling, bar):
    """Trains on Poisson batches, the same whatever the gradient, and gives a `Trained`."""
    optimizer = optax.adam(config.learning_rate)
    shape = dataset.train[0].shape[1:]
    state = bp.init_state(net, optimizer, jax.random.key(config.seed), shape)
    epoch = make_epoch(gradient, optimizer, sampling)
    measure = bp.evaluate(net, LOSS, metric=bp.accuracy)
    accuracies = [float(measure(state.params, *dataset.validation)["metric"])]
    seen = clipped = 0
    for _ in range(config.epochs):
        state, counts = epoch(state, *dataset.train)
        seen, clipped = seen + int(counts["seen"]), clipped + int(counts["clipped"])
        accuracies.append(float(measure(state.params, *dataset.validation)["metric"]))
        bar.update()
        bar.set_postfix(validation_accuracy=f"{accuracies[-1]:.2%}")
    return Trained(state.params, accuracies, clipped / max(seen, 1))


def make_epoch(gradient, optimizer, sampling):
    """An epoch: steps on Poisson batches, each followed by an update, as one `lax.scan`.

    Args:
      gradient: `gradient(params, inputs, (labels, weights), *, key) -> bp.Reweighted`.
      optimizer: an optax optimizer.
      sampling: how batches are drawn.

    Returns:
      `epoch(state, inputs, labels) -> (state, counts)`, jit-compiled; the counts are how many
      examples were `seen` in all batches, and how many of them `clipped`.
    """

    def epoch(state, inputs, labels):
        def step(state, _):
            batch_key, key = jax.random.split(jax.random.fold_in(state.key, state.step))
            indices, present = poisson_batch(batch_key, len(inputs), sampling)
            batch = inputs[indices], (labels[indices], present)
            answer = gradient(state.params, *batch, key=key)
            updates, opt_state = optimizer.update(answer.grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            counts = {"seen": jnp.sum(present), "clipped": jnp.sum(answer.weights < 1)}
            return bp.TrainState(params, opt_state, state.step + 1, state.key), counts

        state, counts = jax.lax.scan(step, state, length=sampling.steps)
        return state, jax.tree.map(jnp.sum, counts)

    return jax.jit(epoch)


def print_table(rows):
    for name, (first, second) in rows.items():
        print(f"{name:22}{first:>14}{second:>14}")


def draw(runs, budget, norms, config):
    """The figure: accuracy and epsilon over the epochs, and the norms of the gradients at last."""
    figure = plt.figure(figsize=(11, 5.4))
    left, right = figure.subfigures(1, 2)
    curves, spending = left.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    draw_curves(curves, runs)
    draw_spending(spending, *budget, config)
    draw_norms(right.subplots(), norms, config.max_norm)
    return figure


def draw_curves(axes, runs):
    for (name, run), color in zip(runs.items(), (figures.BLUE, figures.ORANGE), strict=True):
        axes.plot(run.accuracies, color=color, label=f"{name}: {run.accuracies[-1]:.1%} at last")
    axes.set(title="What privacy costs", ylabel="validation accuracy", ylim=(0, 1))
    axes.legend(loc="lower right")


def draw_spending(axes, epochs, epsilons, config):
    axes.plot(epochs, epsilons, color=figures.BLUE, marker="o", markersize=4)
    axes.axhline(
        config.epsilon,
        color=figures.BLACK,
        linestyle="--",
        linewidth=1,
        label=rf"$\epsilon$ = {config.epsilon:g}, at $\delta$ = {config.delta:g}",
    )
    axes.set(
        title="and how its budget is spent", xlabel="epoch", ylabel=r"$\epsilon$ spent", ylim=0
    )
    axes.legend(loc="lower right")


def draw_norms(axes, norms, max_norm):
    """A histogram on a logarithmic axis, of which the threshold is an edge."""
    edges = max_norm * np.geomspace(1e-4, 1e4, 41)
    norms = np.clip(norms, edges[0], edges[-1])
    within = norms <= max_norm
    for part, color, name in (
        (within, figures.SKY, "kept whole"),
        (~within, figures.RED, "clipped"),
    ):
        axes.hist(norms[part], edges, color=color, label=f"{name}: {np.mean(part):.0%}")
    axes.axvline(max_norm, color=figures.BLACK, linestyle="--", label=f"threshold {max_norm:g}")
    axes.set(
        title="Whose gradient is clipped, at the end",
        xlabel="norm of an example's gradient, in the private network",
        ylabel="training examples",
        xscale="log",
        xlim=(min(norms.min(), max_norm) / 2, max(norms.max(), max_norm) * 2),
    )
    axes.margins(y=0.2)  # for the legend
    axes.legend(loc="upper left")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"private: {error}") from None
