"""Which training labels are wrong? Ranks the training examples by their gradients.

Four scores are high for suspicious labels. Here g_n is the gradient of the loss of example n, p_n
the probabilities that the network predicts for it, and t_n its one-hot label:

  self-influence   sum over checkpoints of eta |g_n|^2: how much a step on n lowers its own loss
  held-out         sum over checkpoints of -eta g_n . g: how much a step on n raises the validation
                   loss, whose gradient is g
  grand            the mean of |g_n| over several networks, early in training
  el2n             the mean over the same networks of |p_n - t_n|, the norm of the loss's delta

The checkpoints come from one network, trained on all labels, including wrong ones, with learning
rate eta. No label of the validation set is flipped.

For each suspect the script suggests a class: the one with the highest mean probability over the
early networks. These networks have learned what most examples of a class have in common, but little
about single examples. If they suggest the given class, they find nothing wrong with the label. In
the table of suspects, `index` is the row of a .csv file, as an editor counts it; for other sources
it is the index of the example in the source, from 0.

By default the script flips some labels of the handwritten digits to random other classes, and
counts how many of these each score finds. `--data table.csv --target column --flip 0` ranks the
labels of your own data as they are. Only the training set is ranked; another seed chooses another
training set.

Sources:
  "Estimating Training Data Influence by Tracing Gradient Descent", Pruthi, Liu, Kale,
  Sundararajan, 2020: the first two scores, there called TracIn.
  "Deep Learning on a Data Diet: Finding Important Examples Early in Training", Paul, Ganguli,
  Dziugaite, 2021: the other two scores.
"""

import csv
import functools
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib import pyplot as plt
from matplotlib.patches import Patch
from sklearn.metrics import average_precision_score
from tqdm import tqdm

import jaxbp as bp
from experiments import digits
from experiments.common import data, figures, files, lifted
from experiments.common.files import whole
from experiments.common.flags import raise_wrong, too_small, wrong_flags
from experiments.common.progress import Bar
from experiments.common.resume import NOT_RESUMED, Resumed

LOSS = bp.softmax_cross_entropy
METHODS = ("self-influence", "held-out", "grand", "el2n")
BATCH = 1024  # examples per sweep that computes scores: it keeps the operands of their gradients
IMAGES, COLUMNS = 60, 10  # the largest number of images in the figure, and in each of its rows


@dataclass(frozen=True)
class Config:
    """Ranks training examples by how suspicious their labels are, by default on flipped digits."""

    flip: float = 0.05
    """The share of the training labels to replace by other classes; 0 ranks them as they are."""
    rank_by: Literal[*METHODS] = "el2n"
    """The score that ranks the suspects in the table and the figure."""
    suspects: int = 60
    """The number of suspects in the table."""
    hidden: tuple[int, ...] = (128,)
    """The number of units of each hidden layer."""
    model: Literal["jaxbp", "flax"] = "jaxbp"
    """The network: the library's layers, or the same architecture in Flax, by `bp.lift`."""
    activation: Literal[*digits.ACTIVATIONS] = "relu"
    """The activation of the hidden layers."""
    dropout: float = 0.4
    """The probability that a step drops a hidden unit."""
    learning_rate: float = 0.1
    """The learning rate of stochastic gradient descent, eta."""
    batch_size: int = 32
    """The number of examples per step."""
    epochs: int = 30
    """The number of epochs to train the network that gives the checkpoints."""
    every: int = 3
    """The number of epochs from one checkpoint to the next."""
    networks: int = 10
    """The number of networks over which grand and el2n are averaged."""
    early: int = 10
    """The number of epochs to train these networks."""
    seed: int = 0
    """The seed of the split, the flips, the initial weights and the shuffling."""
    data: Path | None = None
    """A .csv file, or a folder of IDX files in MNIST's format, instead of the digits."""
    target: str | None = None
    """The column of the .csv file that holds the class."""
    one_hot: tuple[str, ...] = ()
    """Columns of text in the .csv file: each of their values becomes a column of 0 and 1."""
    drop_missing: bool = False
    """Whether to leave out the rows of the .csv file that have missing cells."""
    out: Path = Path("out")
    """The folder for the table and the figure."""
    resume: bool = False
    """Whether to store what is trained in `out`, and to go on from what is stored there."""


class Ranking(NamedTuple):
    """The scores and labels of N training examples.

    Attributes:
      scores: the scores [N] by each method, by its name.
      given: the labels used for training, [N].
      suggested: the classes that the early networks find most probable, [N].
      original: the labels before the flips, [N], or None if no label was flipped.
    """

    scores: dict[str, np.ndarray]
    given: np.ndarray
    suggested: np.ndarray
    original: np.ndarray | None


def main(config: Config) -> Ranking:
    """Ranks the training examples, writes the table and the figure, and returns the `Ranking`."""
    require(config)
    dataset = data.load_by_flags(config, predict="class")
    data.print_notes(dataset)
    classes = len(dataset.class_names)
    inputs, original = dataset.train
    given = flip_labels(original, classes, config.flip, config.seed)
    settings = digits.Config(
        hidden=config.hidden, activation=config.activation, dropout=config.dropout
    )
    net = lifted.make_network(config.model, settings, dataset)

    flips = int(np.sum(given != original))
    print(
        f"{dataset.name}: {len(given)} training examples, {flips} of their labels flipped; "
        f"{len(dataset.validation[1])} validation examples\n"
    )
    train, held_out = (inputs, given), dataset.validation
    stored = Resumed("mislabeled", asdict(config))
    kept = stored.part("checkpoints", lambda: checkpoints(net, train, held_out, config))
    traced = trace(net, kept, train, held_out, config)
    *early, probabilities = look_early(net, train, config, stored)
    ranking = Ranking(
        dict(zip(METHODS, (*traced, *early), strict=True)),
        given,
        probabilities.argmax(axis=-1),
        original if config.flip else None,
    )

    if not np.isfinite(list(ranking.scores.values())).all():
        raise ValueError(
            f"learning-rate is {config.learning_rate}: the scores are not finite. "
            "Try a smaller learning rate."
        )

    top = order(ranking.scores[config.rank_by])[: config.suspects]
    report(ranking, top, config.rank_by)
    figure = draw(ranking, top, dataset, config.rank_by)
    path = config.out / f"mislabeled_{dataset.name}.csv"
    write_table(path, ranking, top, config.rank_by, dataset)
    figures.save(figure, path.with_suffix(".png"))
    plt.close(figure)
    files.save_trained(
        path.with_suffix(".npz"),
        kept[-1],
        {"labels": given, "suggested": ranking.suggested, "probabilities": probabilities}
        | {f"scores/{name}": scores for name, scores in ranking.scores.items()},
    )
    return ranking


def require(config):
    """Raises if a flag is wrong."""
    wrong = []
    if not 0 <= config.flip <= 0.5:
        wrong.append(f"flip is {config.flip}; it takes a share in [0, 0.5]")
    wrong += too_small(config, suspects=1, batch_size=1, epochs=1, every=1, networks=1, early=1)
    if config.every > config.epochs:
        wrong.append(
            f"every is {config.every}; it takes at most the number of epochs, {config.epochs}"
        )
    wrong += wrong_flags(seed=config.seed, out=config.out, learning_rate=config.learning_rate)
    raise_wrong(wrong)


def flip_labels(labels, classes, share, seed):
    """Replaces a share of the labels, each by a random other class."""
    count = round(share * len(labels))
    if share and not count:
        raise ValueError(f"flip is {share}: this flips none of the {len(labels)} labels.")
    rng = np.random.default_rng(seed)
    flipped = rng.choice(len(labels), count, replace=False)
    given = labels.copy()
    given[flipped] = (labels[flipped] + rng.integers(1, classes, count)) % classes
    return given


def checkpoints(net, train, held_out, config):
    """Trains one network and returns its parameters after every few epochs, as a list."""
    kept = []
    with Bar("training", config.epochs, "epoch") as bar:

        def keep(state, record):
            bar.update()
            bar.set_postfix(
                loss=f"{record['loss']:.4f}", validation_accuracy=f"{record['metric']:.2%}"
            )
            if record["epoch"] % config.every == 0:
                kept.append(state.params)

        bp.fit(
            net,
            LOSS,
            optax.sgd(config.learning_rate),
            train,
            key=jax.random.key(config.seed),
            held_out=held_out,
            metric=bp.accuracy,
            epochs=config.epochs,
            batch_size=config.batch_size,
            callback=keep,
        )
    return kept


def trace(net, kept, train, held_out, config):
    """Computes the scores `self-influence` and `held-out`, [N] each."""
    mean_gradient = jax.jit(bp.value_and_grad(net, LOSS))
    sweep = bp.backprop(net, LOSS, read={"sq_norms": bp.sq_norms, "signals": bp.keep})

    @jax.jit
    def influences(params, direction, inputs, labels):
        _, answers = sweep(params, inputs, labels)
        own = jnp.square(bp.example_norms(answers["sq_norms"]))
        return own, -bp.directional_derivatives(answers["signals"], direction)

    def at(params):
        _, direction = mean_gradient(params, *held_out)
        return in_batches(functools.partial(influences, params, direction), train)

    return jax.tree.map(lambda *terms: config.learning_rate * sum(terms), *map(at, kept))


def look_early(net, train, config, stored=NOT_RESUMED):
    """Computes the scores `grand` and `el2n`, [N] each, and the mean probabilities, [N, C]."""
    optimizer = optax.sgd(config.learning_rate)
    epoch = bp.make_epoch(net, LOSS, optimizer, batch_size=config.batch_size)

    @jax.jit
    def look(params, inputs, labels):
        outputs, cache = net.forward(params, inputs)
        _, delta = LOSS(outputs, labels)
        _, squares = net.backward(params, cache, delta, read=bp.sq_norms)
        return bp.example_norms(squares), jnp.linalg.norm(delta, axis=-1), jax.nn.softmax(outputs)

    def seen_by(number, key):
        return stored.part(f"network_{number}", lambda: seen_by_new(key))

    def seen_by_new(key):
        state = bp.init_state(net, optimizer, key, train[0].shape[1:])
        for _ in range(config.early):
            state, _ = epoch(state, *train)
        return in_batches(functools.partial(look, state.params), train)

    # The key of the seed itself is used for the checkpoints. Here other networks are drawn.
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1), config.networks)
    seen = [seen_by(number, key) for number, key in enumerate(tqdm(keys, unit="network"), 1)]
    return jax.tree.map(lambda *terms: sum(terms) / len(terms), *seen)


def in_batches(function, examples):
    """Applies `function`, which returns arrays [N, ...], to all examples batch by batch."""
    starts = range(0, len(examples[1]), BATCH)
    parts = [function(*(array[i : i + BATCH] for array in examples)) for i in starts]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def order(scores):
    """Returns the indices of the examples, the most suspicious first."""
    return np.argsort(-scores, kind="stable")


def precisions(scores, flipped):
    """Computes the share of flipped labels among the first k suspects, for k = 1, ..., N."""
    return np.cumsum(flipped[order(scores)]) / np.arange(1, len(scores) + 1)


class Quality(NamedTuple):
    """How well a score ranks the K flipped labels.

    Attributes:
      half: the precision among the first K / 2 suspects, rounded up.
      whole: the precision among the first K.
      average: the average precision.
    """

    half: float
    whole: float
    average: float


def quality(scores, flipped):
    """Computes the `Quality` of a score."""
    precision, k = precisions(scores, flipped), int(np.sum(flipped))
    average = average_precision_score(flipped, scores)
    return Quality(*(float(precision[i - 1]) for i in ((k + 1) // 2, k)), float(average))


def report(ranking, top, method):
    """Prints how many of the flipped labels each score finds, and how good the suggestions are."""
    given, suggested, original = ranking.given, ranking.suggested, ranking.original
    if original is None:
        others = np.sum(suggested[top] != given[top])
        print("\nNo label was flipped, so it is not known how many suspects are wrong.")
        print(f"Another class is suggested for {others} of the first {len(top)} by {method}.")
        return
    flipped = given != original
    chance, k = np.mean(flipped), int(np.sum(flipped))
    half = (k + 1) // 2
    print(f"\n{'score':16}{f'precision at {half}':>18}{f'at {k}':>10}{'average precision':>20}")
    for name, scores in ranking.scores.items():
        first, whole, average = quality(scores, flipped)
        print(f"{name:16}{first:>18.1%}{whole:>10.1%}{average:>20.3f}")
    print(f"{'chance':16}{chance:>18.1%}{chance:>10.1%}{chance:>20.3f}")
    found = top[flipped[top]]
    right = np.sum(suggested[found] == original[found])
    print(
        f"\nOf the first {len(top)} by {method}, {len(found)} are flipped; "
        f"for {right} of these, the suggested class is the original one."
    )


def write_table(path, ranking, top, method, dataset):
    """Writes the suspects to a .csv file: example, score, given label, suggested class."""
    names = dataset.class_names
    columns = {
        "index": dataset.train_rows[top],
        "score": [f"{score:.6g}" for score in ranking.scores[method][top]],
        "given": [names[label] for label in ranking.given[top]],
        "suggested": [names[label] for label in ranking.suggested[top]],
    }
    if ranking.original is not None:
        columns["flipped"] = (ranking.given != ranking.original)[top].astype(int)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    print(f"table of {len(top)} suspects saved as {path}")


def draw(ranking, top, dataset, method):
    """Draws the first suspects, if they are images, and how precise the rankings are."""
    if dataset.image_shape:
        figure = plt.figure(figsize=(13.5, 6))
        left, right = figure.subfigures(1, 2, width_ratios=(1.7, 1))
        draw_suspects(left, ranking, top, dataset, method)
    else:
        right = figure = plt.figure(figsize=(6, 4.5))
    if ranking.original is None:
        draw_scores(right.subplots(), ranking.scores[method], len(top), method)
    else:
        draw_precisions(right.subplots(), ranking)
    return figure


def draw_suspects(figure, ranking, top, dataset, method):
    inputs, names = dataset.train[0], dataset.class_names
    shown = top[:IMAGES]
    title = f"The first {len(shown)} suspects by {method}"
    if ranking.original is not None:
        flipped = np.sum((ranking.given != ranking.original)[shown])
        title += f": {flipped} of these labels were flipped"
    figure.suptitle(f"{title}\nabove each: given label \N{RIGHTWARDS ARROW} suggested label")
    panels = figure.subplots(math.ceil(len(shown) / COLUMNS), COLUMNS).ravel()
    for axes in panels:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, n in zip(panels, shown, strict=False):
        given, suggested = names[ranking.given[n]], names[ranking.suggested[n]]
        axes.set_title(f"{given} \N{RIGHTWARDS ARROW} {suggested}")
        axes.imshow(inputs[n].reshape(dataset.image_shape), cmap="gray_r")
        if ranking.original is not None:
            flipped = ranking.given[n] != ranking.original[n]
            color = figures.BLUE if flipped else figures.RED
            axes.spines[:].set(visible=True, color=color, linewidth=3)
    if ranking.original is not None:
        frames = [
            Patch(fill=False, edgecolor=figures.BLUE, linewidth=3, label="the label was flipped"),
            Patch(
                fill=False, edgecolor=figures.RED, linewidth=3, label="the label was not flipped"
            ),
        ]
        figure.legend(handles=frames, loc="outside lower center", ncols=2)


def draw_precisions(axes, ranking):
    flipped = ranking.given != ranking.original
    k = int(np.sum(flipped))
    for name, scores in ranking.scores.items():
        precision = precisions(scores, flipped)[: 2 * k]
        axes.plot(range(1, len(precision) + 1), precision, label=name)
    axes.axhline(np.mean(flipped), color=figures.BLACK, linestyle=":", label="chance")
    axes.axvline(k, color="gray", linewidth=0.8)
    axes.text(k, 1.02, f" {k} labels were flipped", color="gray", fontsize=9)
    axes.set(
        title="Precision: share of flipped labels\namong the first k suspects",
        xlabel="k, the number of suspects",
        ylim=(0, 1.08),
    )
    axes.legend(title="ranked by")


def draw_scores(axes, scores, count, method):
    axes.hist(scores, bins=60, log=True)
    axes.axvline(np.sort(scores)[-count], color=figures.RED)
    axes.set(
        title=f"Scores of all training examples:\nthe {count} suspects are right of the line",
        xlabel=method,
        ylabel="examples",
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError, bp.NonFiniteError) as error:
        raise SystemExit(f"mislabeled: {error}") from None
