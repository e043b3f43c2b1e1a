"""How much accuracy does privacy cost? Trains on the digits by DP-SGD, and without privacy.

Let the training sets D and D' differ in one example, which only one of them has. A training
procedure M is (epsilon, delta)-differentially private if for all such D and D' and for every set S
of networks

  P(M(D) in S) <= e^epsilon P(M(D') in S) + delta

The trained network then says little about whether any single example was in the training set. Each
of T steps draws a Poisson batch, which each example joins independently with probability q = B / N.
The step follows the private gradient (sum_n min(1, C / |g_n|) g_n + sigma C xi) / B of
`private_gradient`. An accountant computes the epsilon that T such steps spend, and from this the
smallest sigma for the given epsilon.

Poisson batches vary in size, but arrays have a fixed shape. So a batch has room for a fixed number
of examples, is padded with examples of weight 0, and leaves out what exceeds the room. Leaving out
examples changes the guarantee, because one example can push out another. But this training differs
from one with room for all examples only if a batch overflows, with some probability tau. If one of
the two is (epsilon, delta')-private, then the other is

  (epsilon, delta' + (1 + e^epsilon) tau)-private

The room is so large that the second term is at most a thousandth of delta. Sigma is computed for
the remaining delta.

The guarantee covers the training set. The number N, the classes, the flags, the validation set and
the test set count as public. The figure shows norms of gradients, which are not private. Whoever
knows the seed knows the noise: to publish a network, keep the seed secret.

Sources:
  "Deep Learning with Differential Privacy", Abadi et al., 2016.
  "Tempered Sigmoid Activations for Deep Learning with Differential Privacy", Papernot, Thakurta,
  Song, Chien, Erlingsson, 2021: tanh, because its gradients stay smaller than those of relu.
  "Scalable DP-SGD: Shuffling vs. Poisson Subsampling", Chua et al., 2024: batches of a fixed size.
"""

import functools
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from dp_accounting.pld import PLDAccountant
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter
from scipy import stats

import jaxbp as bp
from experiments import digits
from experiments.common import data, figures, files, lifted
from experiments.common.flags import raise_wrong, too_small, wrong_flags
from experiments.common.progress import Bar
from experiments.common.resume import Resumed
from experiments.common.tables import aligned

LOSS = digits.LOSS
EPSILONS = 0.01, 10.0  # e^10 guarantees almost nothing; for more the accountant takes longer
LEAST_DELTA = 1e-10  # at 1e-14, the tails that the accountant truncates changed epsilon
OVERFLOW_SHARE = 1e-3  # the share of delta that covers batches that overflow
DECIMALS = 3  # decimals of the noise multiplier
PRIVATE, PLAIN = "private", "not private"


@dataclass(frozen=True)
class Config:
    """Trains a classifier with differential privacy and one without, on the same batches."""

    epsilon: float = 3.0
    """The privacy budget: a smaller epsilon is more private."""
    delta: float = 1e-4
    """The delta of the guarantee; less than 1 / (number of training examples)."""
    max_norm: float = 0.5
    """The norm to which the gradient of each example is clipped."""
    learning_rate: float = 0.01
    """The learning rate of Adam."""
    batch_size: int = 128
    """The average number of examples per step."""
    epochs: int = 40
    """The number of epochs. Each example is used once per epoch on average."""
    hidden: tuple[int, ...] = (128,)
    """The number of units of each hidden layer."""
    model: Literal["jaxbp", "flax"] = "jaxbp"
    """The network: the library's layers, or the same architecture in Flax, by `bp.lift`."""
    seed: int = 0
    """The seed of the split, the initial weights, the batches and the noise."""
    data: Path | None = None
    """A .csv file, or a folder of IDX files in MNIST's format, instead of the digits."""
    target: str | None = None
    """The column of the .csv file that holds the class."""
    one_hot: tuple[str, ...] = ()
    """Columns of text in the .csv file: each of their values becomes a column of 0 and 1."""
    drop_missing: bool = False
    """Whether to leave out the rows of the .csv file that have missing cells."""
    out: Path = Path("out")
    """The folder for the figure, and for the parameters and the test set's outputs (.npz)."""
    resume: bool = False
    """Whether to store what is trained in `out`, and to go on from what is stored there."""


class Sampling(NamedTuple):
    """How batches are drawn.

    Attributes:
      probability: the probability that an example joins a batch.
      room: the largest number of examples in a batch.
      steps: the number of steps per epoch.
    """

    probability: float
    room: int
    steps: int


class Trained(NamedTuple):
    """The result of one training.

    Attributes:
      params: the parameters after the last step.
      accuracies: the validation accuracy at the start and after each epoch.
      clipped: the share of the examples in all batches whose gradient was clipped.
    """

    params: Any
    accuracies: list[float]
    clipped: float


def main(config: Config) -> list[float]:
    """Trains with privacy and without, and returns the two test accuracies."""
    started = perf_counter()
    raise_wrong(
        too_small(config, epochs=1)
        + wrong_flags(seed=config.seed, out=config.out, learning_rate=config.learning_rate)
    )
    dataset = data.load_by_flags(config, predict="class")
    data.print_notes(dataset)
    n = len(dataset.train[0])
    require(config, n)
    settings = digits.Config(hidden=config.hidden, activation="tanh", dropout=0)
    net = lifted.make_network(config.model, settings, dataset)
    print(f"{dataset.name}: {n} training examples, {len(dataset.class_names)} classes")
    if dataset.image_shape is None:
        print(
            "The columns are standardised by the mean and deviation of the training set. These "
            "numbers are not private: the guarantee does not cover them."
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
        f"batches: each example joins with probability {probability:.4f}; "
        f"{config.batch_size} examples on average, {room} at most\n"
        f"batches that overflow leave out examples: {OVERFLOW_SHARE * config.delta:.2g} of delta "
        f"covers them\n"
        f"noise multiplier {noise_multiplier:.{DECIMALS}f}: {steps * config.epochs} steps spend "
        f"epsilon {epsilons[-1]:.4f} of {config.epsilon:g} at delta {config.delta:g}"
    )

    stored = Resumed("private", asdict(config))
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
    with Bar("training", len(gradients) * config.epochs, "epoch") as bar:
        runs = {
            name: stored.part(
                name.replace(" ", "_"),
                functools.partial(train, gradient, net, dataset, config, sampling, bar),
            )
            for name, gradient in gradients.items()
        }
    measure = bp.evaluate(net, LOSS, metric=bp.accuracy)
    tests = [float(measure(run.params, *dataset.test)["metric"]) for run in runs.values()]
    print_table(
        {
            "": runs,
            "epsilon": [f"{epsilons[-1]:.4f}", "none"],
            "noise multiplier": [f"{noise_multiplier:.{DECIMALS}f}", "none"],
            "clipped, of the whole run": [f"{run.clipped:.0%}" for run in runs.values()],
            "steps": [steps * config.epochs] * 2,
            "validation accuracy": [f"{run.accuracies[-1]:.2%}" for run in runs.values()],
            "test accuracy": [f"{accuracy:.2%}" for accuracy in tests],
        }
    )

    sweep = jax.jit(bp.backprop(net, LOSS, read=bp.sq_norms))
    _, squares = sweep(runs[PRIVATE].params, *dataset.train)
    norms = np.asarray(bp.example_norms(squares))
    print(
        f"The table counts clipped examples in the batches of the whole run. At its end, which the "
        f"figure shows, {np.mean(norms > config.max_norm):.0%} of the training set would be "
        "clipped.\n"
    )
    figure = draw(runs, (marks, epsilons), norms, config)
    figures.save(figure, config.out / f"private_{dataset.name}.png")
    plt.close(figure)
    forward = jax.jit(net.forward)
    files.save_trained(
        config.out / f"private_{dataset.name}.npz",
        {name.replace(" ", "_"): run.params for name, run in runs.items()},
        {"inputs": dataset.test[0], "targets": dataset.test[1]}
        | {
            f"outputs/{name.replace(' ', '_')}": forward(run.params, dataset.test[0])[0]
            for name, run in runs.items()
        },
    )
    print(f"done in {perf_counter() - started:.0f} s, compilation included")
    return tests


def require(config, n):
    """Raises if a flag does not allow privacy with n training examples; names all such flags."""
    low, high = EPSILONS
    wrong = []
    if not low <= config.epsilon <= high:
        wrong.append(f"epsilon is {config.epsilon}; it takes a number in [{low}, {high}]")
    if not LEAST_DELTA <= config.delta < 1 / n:
        wrong.append(
            f"delta is {config.delta}; it takes a number in [{LEAST_DELTA}, 1/{n}): with a larger "
            "delta, it would count as private to publish one training example, drawn at random"
        )
    if not 0 < config.max_norm < math.inf:
        wrong.append(f"max-norm is {config.max_norm}; it takes a positive number")
    if not 1 <= config.batch_size <= n:
        wrong.append(
            f"batch-size is {config.batch_size}; it takes 1 to {n}, the number of training examples"
        )
    raise_wrong(wrong)


def make_sampling(config, n):
    """Returns the sampling of n examples, with enough room that overflow costs little delta."""
    steps = round(n / config.batch_size)
    probability = config.batch_size / n
    # Union bound: tau is at most the sum over all steps, for the larger set, of n + 1 examples.
    tau = steps * config.epochs * stats.binom.sf(np.arange(n + 2), n + 1, probability)
    room = np.argmax((1 + math.exp(config.epsilon)) * tau <= OVERFLOW_SHARE * config.delta)
    return Sampling(probability, int(room), steps)


def make_event(noise_multiplier, probability, steps):
    """Describes the training to the accountant: steps of Gaussian noise on Poisson batches."""
    step = dp_accounting.GaussianDpEvent(noise_multiplier)
    step = dp_accounting.PoissonSampledDpEvent(probability, step)
    return dp_accounting.SelfComposedDpEvent(step, steps)


def calibrate(epsilon, delta, probability, steps):
    """Computes the smallest noise multiplier, to three decimals, for (epsilon, delta)-DP."""
    smallest = dp_accounting.calibrate_dp_mechanism(
        PLDAccountant, lambda noise: make_event(noise, probability, steps), epsilon, delta
    )
    return math.ceil(smallest * 10**DECIMALS) / 10**DECIMALS


def spend(noise_multiplier, delta, probability, steps):
    """Computes the epsilon that this number of steps spends."""
    event = make_event(noise_multiplier, probability, steps)
    return PLDAccountant().compose(event).get_epsilon(delta)


def poisson_batch(key, n, sampling):
    """Draws a Poisson batch: indices [room], and booleans [room], false for padding."""
    joins = jax.random.bernoulli(key, sampling.probability, (n,))
    (indices,) = jnp.nonzero(joins, size=sampling.room, fill_value=0)
    return indices, jnp.arange(sampling.room) < jnp.sum(joins)


def plain_gradient(net, loss, *, batch_size):
    """Like `bp.private_gradient`, without clipping and without noise: sum_n g_n / B."""
    summed = bp.reweighted(net, loss, bp.clip_weights(math.inf))

    def function(params, inputs, targets, *, key):
        answer = summed(params, inputs, targets, key=key)
        return answer._replace(grads=jax.tree.map(lambda g: g / batch_size, answer.grads))

    return function


def train(gradient, net, dataset, config, sampling, bar):
    """Trains on Poisson batches, which do not depend on `gradient`; returns a `Trained`."""
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
    """Makes a function that trains for one epoch on Poisson batches, as one `lax.scan`.

    Args:
      gradient: `gradient(params, inputs, (labels, weights), *, key) -> bp.Reweighted`.
      optimizer: an optax optimizer.
      sampling: how batches are drawn.

    Returns:
      `epoch(state, inputs, labels) -> (state, counts)`, jit-compiled. The counts are the number of
      examples `seen` in all batches, and the number of them that were `clipped`.
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
    print(aligned([(name, *map(str, cells)) for name, cells in rows.items()]))


def draw(runs, budget, norms, config):
    """Draws accuracy and epsilon over the epochs, and the norms of the gradients at the end."""
    figure = plt.figure(figsize=(11, 5.4))
    left, right = figure.subfigures(1, 2)
    curves, spending = left.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    draw_curves(curves, runs)
    draw_spending(spending, *budget, config)
    draw_norms(right.subplots(), norms, config.max_norm)
    return figure


def draw_curves(axes, runs):
    for (name, run), color in zip(runs.items(), (figures.BLUE, figures.ORANGE), strict=True):
        axes.plot(run.accuracies, color=color, label=f"{name}: {run.accuracies[-1]:.1%} at the end")
    axes.set(title="Accuracy with and without privacy", ylabel="validation accuracy", ylim=(0, 1))
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
    axes.set(title="Privacy budget spent", xlabel="epoch", ylabel=r"$\epsilon$ spent", ylim=0)
    axes.legend(loc="lower right")


def draw_norms(axes, norms, max_norm):
    """Draws a histogram on a logarithmic axis. The threshold is the edge of two bins."""
    edges = max_norm * np.geomspace(1e-4, 1e4, 41)
    norms = np.clip(norms, edges[0], edges[-1])
    within = norms <= max_norm
    for part, color, name in (
        (within, figures.SKY, "not clipped"),
        (~within, figures.RED, "clipped"),
    ):
        axes.hist(norms[part], edges, color=color, label=f"{name} now: {np.mean(part):.0%}")
    axes.axvline(max_norm, color=figures.BLACK, linestyle="--", label=f"threshold {max_norm:g}")
    axes.set(
        title="Gradients of the training set, at the end of private training",
        xlabel="norm of an example's gradient",
        ylabel="training examples",
        xscale="log",
        xlim=(min(norms.min(), max_norm) / 2, max(norms.max(), max_norm) * 2),
    )
    axes.title.set_fontsize(10)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.2)  # room for the legend
    axes.legend(loc="upper left")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"private: {error}") from None
