"""A network learns to read handwritten digits by explicit backpropagation.

Each training step runs the forward pass, compares the predictions with the labels, runs the
backward pass by the chain rule, and updates the weights. Training stops early when the validation
accuracy reaches a target or no longer improves. `--model conv` adds convolutions before the dense
layers.

The same code trains on your own data: `--data table.csv` reads a table with a column of classes,
and `--data folder` reads files in MNIST's format. If the column holds a quantity, such as a price,
the network predicts that number instead, by the squared error of the standardised quantity. Its
measure is then R2 = 1 - (mean squared error) / (variance of the quantity in that set).

The figure shows the loss and the measure over training, the size of the error signal at each layer
(the root mean square of delta, which the sweep of each step reads off), and the test examples with
the highest losses; for a table, the confusion matrix, or the predictions against the quantity.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib import pyplot as plt

import jaxbp as bp
from experiments.common import data, figures, files
from experiments.common.flags import raise_wrong, wrong_flags
from experiments.common.progress import Bar
from experiments.common.resume import Resumed
from experiments.common.tables import aligned

LOSS = bp.softmax_cross_entropy
CLASSES_COUNTED = 30  # in a confusion matrix with numbers; with more they are too small to read
ACTIVATIONS = {
    "sigmoid": bp.sigmoid,
    "tanh": bp.tanh,
    "relu": bp.relu,
    "leaky_relu": bp.leaky_relu,
    "elu": bp.elu,
    "gelu": bp.gelu,
    "silu": bp.silu,
    "softplus": bp.softplus,
}
OPTIMIZERS = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "sgd": optax.sgd,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "rmsprop": optax.rmsprop,
}


@dataclass(frozen=True)
class Config:
    """Trains a network by explicit backpropagation, by default on real handwritten digits."""

    model: Literal["mlp", "conv"] = "mlp"
    """Dense layers only, or convolutions of 3 x 3 with pooling before the dense layers."""
    channels: tuple[int, ...] = (32, 64)
    """The output channels of each convolution. Pooling halves width and height after each one."""
    hidden: tuple[int, ...] = (512, 256)
    """The number of units of each dense hidden layer."""
    activation: Literal[*ACTIVATIONS] = "relu"
    """The activation of the hidden layers."""
    dropout: float = 0.4
    """The probability that a step drops a hidden unit."""
    optimizer: Literal[*OPTIMIZERS] = "adam"
    """The optax optimizer."""
    learning_rate: float = 1e-3
    """The learning rate."""
    batch_size: int = 64
    """The number of examples per step."""
    good: float = 0.995
    """The validation accuracy, or R2 of a quantity, at which training stops."""
    patience: int = 30
    """Training stops after this many epochs without a better validation accuracy or R2."""
    epochs: int = 200
    """The largest number of epochs."""
    seed: int = 0
    """The seed of the split, the initial weights, the shuffling and the dropout."""
    data: Path | None = None
    """A .csv file, or a folder of IDX files in MNIST's format, instead of the digits."""
    target: str | None = None
    """The column of the .csv file to predict."""
    one_hot: tuple[str, ...] = ()
    """Columns of text in the .csv file: each of their values becomes a column of 0 and 1."""
    drop_missing: bool = False
    """Whether to leave out the rows of the .csv file that have missing cells."""
    predict: Literal["auto", "class", "number"] = "auto"
    """What the target is. A number by default if it has decimals and more than 20 values."""
    out: Path = Path("out")
    """The folder for the figure, and for the parameters and the test set's outputs (.npz)."""
    resume: bool = False
    """Whether to store what is trained in `out`, and to go on from what is stored there."""


def main(config: Config) -> float:
    """Trains the network, draws the figure, and returns the test accuracy, or R2."""
    started = perf_counter()
    raise_wrong(wrong_flags(seed=config.seed, out=config.out, learning_rate=config.learning_rate))
    dataset = data.load_by_flags(config, predict=config.predict)
    if config.model == "conv":
        dataset = with_images(dataset)
    outputs_size = len(dataset.class_names) or 1
    parts, net = make_network(config, outputs_size)
    loss = bp.squared_error if dataset.quantity else LOSS

    shape = dataset.train[0].shape[1:]
    sizes = ", ".join(
        f"{len(part[1])} {use}"
        for part, use in zip(dataset[1:4], ("training", "validation", "test"), strict=True)
    )
    data.print_notes(dataset)
    quantity = dataset.quantity
    what = f"predicts {quantity.name!r}" if quantity else f"{len(dataset.class_names)} classes"
    print(f"{dataset.name}: {sizes} examples; {what}\n")
    print_network(parts, shape)
    errors = [
        bp.check(subject, jax.random.key(config.seed), of).raise_if_wrong().largest_error
        for subject, of in ((net, shape), (loss, (outputs_size,)))
    ]
    print(
        "\ngradient check against jax's autodiff in float64: "
        f"largest relative error {max(errors):.1e}\n"
    )

    stored = Resumed("digits", asdict(config))
    run = train(net, loss, dataset, config, stored.checkpoints("training"))
    print(f"\n{run.reason}")
    outputs, _ = jax.jit(net.forward)(run.params, dataset.test[0])
    measure = float(jnp.mean(measure_of(dataset, dataset.test)(outputs, dataset.test[1])))
    if quantity:
        error = quantity.deviation * float(jnp.sqrt(jnp.mean((outputs - dataset.test[1]) ** 2)))
        print(f"test R2 {measure:.4f} (root mean square error {error:.4g} of {quantity.name!r})")
    else:
        wrong = round((1 - measure) * len(outputs))
        print(f"test accuracy {measure:.2%} ({wrong} of {len(outputs)} wrong)")

    figure = draw(run.records, np.asarray(outputs), dataset, parts)
    figures.save(figure, config.out / f"{dataset.name}.png")
    plt.close(figure)
    files.save_trained(
        config.out / f"{dataset.name}.npz",
        run.params,
        {"inputs": dataset.test[0], "targets": dataset.test[1], "outputs": outputs},
    )
    print(f"done in {perf_counter() - started:.0f} s, compilation included")
    return measure


def with_images(dataset):
    """Returns the dataset with inputs as images, [N, H, W, 1], instead of vectors."""
    if dataset.image_shape is None:
        raise ValueError(f"model is 'conv', which takes images; {dataset.name} has none.")

    def reshape(part):
        inputs, labels = part
        return inputs.reshape(-1, *dataset.image_shape, 1), labels

    train, validation, test = map(reshape, dataset[1:4])
    return dataset._replace(train=train, validation=validation, test=test)


def measure_of(dataset, part):
    """Makes the metric `(outputs, labels) -> [N]`: its mean over the part is accuracy, or R2."""
    if dataset.quantity is None:
        return bp.accuracy
    variance = max(float(np.var(part[1])), np.finfo(np.float32).tiny)

    def r2(outputs, labels):
        return 1 - jnp.square(outputs - labels)[:, 0] / variance

    return r2


def make_network(config, outputs):
    """Returns the parts of the network, and the network, which is their chain."""
    activation, parts = ACTIVATIONS[config.activation], []
    if config.model == "conv":
        for channels in config.channels:
            parts += [bp.conv(channels, (3, 3)), activation(), bp.max_pool((2, 2))]
        parts.append(bp.flatten())
    for units in config.hidden:
        parts += [bp.dense(units), activation()]
        if config.dropout:
            parts.append(bp.dropout(config.dropout))
    parts.append(bp.dense(outputs))
    return parts, bp.chain(*parts)


def print_network(parts, shape):
    """Prints the name, the output shape and the number of parameters of each part."""
    total = 0
    rows = [("part", "output", "parameters")]
    for part in parts:
        params, shape = part.init(jax.random.key(0), shape)
        count = sum(p.size for p in jax.tree.leaves(params))
        total += count
        rows.append((part.name, "x".join(map(str, shape)), f"{count:,}"))
    print(aligned([*rows, ("all", "", f"{total:,}")]))


def error_size(signal):
    """A reading: the root mean square of the error signal delta."""
    return jnp.sqrt(jnp.mean(jnp.square(signal.deltas)))


def train(net, loss, dataset, config, checkpoints=None):
    """Trains the network with early stopping, and shows a progress bar."""
    measured = "validation_R2" if dataset.quantity else "validation_accuracy"
    with Bar("training", config.epochs, "epoch") as bar:

        def show(state, record):
            del state
            bar.update()
            bar.set_postfix({"loss": f"{record['loss']:.4f}", measured: f"{record['metric']:.2%}"})

        return bp.fit(
            net,
            loss,
            OPTIMIZERS[config.optimizer](config.learning_rate),
            dataset.train,
            key=jax.random.key(config.seed),
            held_out=dataset.validation,
            metric=measure_of(dataset, dataset.validation),
            target=config.good,
            patience=config.patience,
            epochs=config.epochs,
            batch_size=config.batch_size,
            read={"error_size": error_size},
            callback=show,
            checkpoints=checkpoints,
        )


def draw(records, outputs, dataset, parts):
    """Draws the learning curves, the error signals, and the predictions of the test set."""
    figure = plt.figure(figsize=(11, 6.2))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1))
    curves, signals = left.subplots(2, 1, sharex=True)
    draw_curves(curves, records, "1 - R2" if dataset.quantity else "error rate")
    draw_signals(signals, records, parts)
    if dataset.quantity:
        draw_predictions(right.subplots(), outputs, dataset)
    elif dataset.image_shape:
        draw_most_wrong(right, outputs, dataset)
    else:
        draw_confusions(right, outputs, dataset)
    return figure


def draw_curves(axes, records, rate):
    epochs = [record["epoch"] for record in records]
    axes.plot(epochs, [r["loss"] for r in records], label="training loss")
    axes.plot(
        epochs, [r["held_out_loss"] for r in records], label="validation loss", linestyle="--"
    )
    # An error rate, not an accuracy: on a logarithmic axis the last differences stay visible.
    wrong = [max(1 - float(r["metric"]), 1e-4) for r in records]
    axes.plot(epochs, wrong, label=f"validation {rate}", linestyle=":", linewidth=2)
    figures.log_where_wide(axes)
    best = int(np.argmin(wrong))
    first, last = records[0]["loss"], records[-1]["loss"]
    axes.set_title(
        f"The training loss went from {first:.2g} to {last:.2g};\n"
        f"the best validation {rate} was {wrong[best]:.2g}, in epoch {epochs[best]}",
        fontsize=10,
    )
    axes.set_ylabel(f"loss, {rate}")
    axes.legend(fontsize=8)


def draw_signals(axes, records, parts):
    epochs = [record["epoch"] for record in records]
    layers = [i for i, part in enumerate(parts) if part.name.startswith(("conv", "dense"))]
    shrank = 0
    for depth, i in enumerate(layers, 1):
        sizes = [float(record["error_size"][i]["bias"]) for record in records]
        shrank += sizes[-1] < sizes[0]
        change = f"{sizes[0]:.2g} to {sizes[-1]:.2g}"
        axes.plot(epochs, sizes, label=f"layer {depth}, {parts[i].name}: {change}")
    figures.log_where_wide(axes)
    axes.set_title(told(shrank, len(layers)), fontsize=10)
    axes.set(xlabel="epoch", ylabel="rms of delta")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)


def told(shrank, layers):
    """Says what the error signals did between the first epoch and the last."""
    if layers == 1:
        return f"The error signal {'shrank' if shrank else 'did not shrink'} during training"
    if shrank in (0, layers):
        did = "shrank" if shrank else "did not shrink"
        return f"Error signals {did} in {'all' if shrank else 'any of the'} {layers} layers"
    return f"Error signals shrank in {shrank} of {layers} layers, and not in the others"


def draw_most_wrong(figure, outputs, dataset, rows=4):
    inputs, labels = dataset.test
    values = np.asarray(LOSS(jnp.asarray(outputs), labels)[0])
    probabilities = np.asarray(jax.nn.softmax(outputs))
    worst = np.argsort(-values)[: rows**2]
    figure.suptitle(
        "Test examples with the highest loss:\nlabel, prediction (probability); red if wrong",
        fontsize=10,
    )
    for axes, n in zip(figure.subplots(rows, rows).flat, worst, strict=False):
        guess = int(outputs[n].argmax())
        axes.imshow(inputs[n].reshape(dataset.image_shape), cmap="gray_r")
        axes.set_title(
            f"{dataset.class_names[labels[n]]}, {dataset.class_names[guess]}"
            f" ({probabilities[n, guess]:.0%})",
            color=figures.BLACK if guess == labels[n] else figures.RED,
            fontsize=9,
        )
    for axes in figure.axes:
        axes.set_axis_off()


def draw_confusions(figure, outputs, dataset):
    labels, names = dataset.test[1], dataset.class_names
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (labels, outputs.argmax(-1)), 1)
    axes = figure.subplots()
    axes.imshow(counts, cmap="Blues")
    axes.set(title="Confusion matrix of the test set", xlabel="prediction", ylabel="label")
    if len(names) > CLASSES_COUNTED:
        return
    for (given, guess), count in np.ndenumerate(counts):
        shade = "white" if count > counts.max() / 2 else "black"
        axes.text(guess, given, count, ha="center", va="center", color=shade)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=45, ha="right")
    axes.set_yticks(ticks, names)


def draw_predictions(axes, outputs, dataset):
    """Draws the prediction of each test example against its quantity, in the quantity's units."""
    name, mean, deviation = dataset.quantity
    given, guess = (mean + deviation * values[:, 0] for values in (dataset.test[1], outputs))
    ends = [min(given.min(), guess.min()), max(given.max(), guess.max())]
    axes.plot(ends, ends, color=figures.BLACK, linestyle="--", linewidth=1, label="exact")
    axes.scatter(given, guess, s=14, color=figures.BLUE, alpha=0.7, label="test examples")
    axes.set(title="Predictions of the test set", xlabel=name, ylabel=f"{name}, predicted")
    axes.legend()


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError, bp.NonFiniteError) as error:
        raise SystemExit(f"digits: {error}") from None
