"""A network learns to read handwritten digits by explicit backpropagation.

Each training step runs the forward pass, compares the predictions with the labels, runs the
backward pass by the chain rule, and updates the weights. Training stops early when the validation
accuracy reaches a target or no longer improves. `--model conv` adds convolutions before the dense
layers.

The same code trains on your own data: `--data table.csv` reads a table with a column of classes,
and `--data folder` reads files in MNIST's format.

The figure shows the loss and the accuracy over training, the size of the error signal at each layer
(the root mean square of delta, which the sweep of each step reads off), and the test examples with
the highest losses.
"""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib import pyplot as plt
from tqdm import tqdm

import jaxbp as bp
from experiments.common import data, figures
from experiments.common.flags import raise_wrong, wrong_flags

LOSS = bp.softmax_cross_entropy
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
    """Trains a classifier by explicit backpropagation, by default on real handwritten digits."""

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
    """The validation accuracy at which training stops."""
    patience: int = 30
    """Training stops after this many epochs without a better validation accuracy."""
    epochs: int = 200
    """The largest number of epochs."""
    seed: int = 0
    """The seed of the split, the initial weights, the shuffling and the dropout."""
    data: Path | None = None
    """A .csv file, or a folder of IDX files in MNIST's format, instead of the digits."""
    target: str | None = None
    """The column of the .csv file that holds the class."""
    out: Path = Path("out")
    """The folder for the figure."""


def main(config: Config) -> float:
    """Trains the network, draws the figure, and returns the test accuracy."""
    started = perf_counter()
    raise_wrong(wrong_flags(seed=config.seed, out=config.out, learning_rate=config.learning_rate))
    dataset = data.load(config.data, target=config.target, seed=config.seed)
    if config.model == "conv":
        dataset = with_images(dataset)
    parts, net = make_network(config, len(dataset.class_names))

    shape = dataset.train[0].shape[1:]
    sizes = ", ".join(
        f"{len(part[1])} {use}"
        for part, use in zip(dataset[1:4], ("training", "validation", "test"), strict=True)
    )
    print(f"{dataset.name}: {sizes} examples; {len(dataset.class_names)} classes\n")
    print_network(parts, shape)
    errors = [
        bp.check(net, jax.random.key(config.seed), shape).raise_if_wrong().largest_error,
        bp.check(LOSS, jax.random.key(config.seed), (len(dataset.class_names),))
        .raise_if_wrong()
        .largest_error,
    ]
    print(
        "\ngradient check against jax's autodiff in float64: "
        f"largest relative error {max(errors):.1e}\n"
    )

    run = train(net, dataset, config)
    print(f"\n{run.reason}")
    outputs, _ = jax.jit(net.forward)(run.params, dataset.test[0])
    accuracy = float(jnp.mean(bp.accuracy(outputs, dataset.test[1])))
    wrong = round((1 - accuracy) * len(outputs))
    print(f"test accuracy {accuracy:.2%} ({wrong} of {len(outputs)} wrong)")

    figure = draw(run.records, np.asarray(outputs), dataset, parts)
    figures.save(figure, config.out / f"{dataset.name}.png")
    plt.close(figure)
    print(f"done in {perf_counter() - started:.0f} s, compilation included")
    return accuracy


def with_images(dataset):
    """Returns the dataset with inputs as images, [N, H, W, 1], instead of vectors."""
    if dataset.image_shape is None:
        raise ValueError(f"model is 'conv', which takes images; {dataset.name} has none.")

    def reshape(part):
        inputs, labels = part
        return inputs.reshape(-1, *dataset.image_shape, 1), labels

    train, validation, test = map(reshape, dataset[1:4])
    return dataset._replace(train=train, validation=validation, test=test)


def make_network(config, classes):
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
    parts.append(bp.dense(classes))
    return parts, bp.chain(*parts)


def print_network(parts, shape):
    """Prints the name, the output shape and the number of parameters of each part."""
    total = 0
    print(f"{'part':18}{'output':>10}{'parameters':>14}")
    for part in parts:
        params, shape = part.init(jax.random.key(0), shape)
        count = sum(p.size for p in jax.tree.leaves(params))
        total += count
        print(f"{part.name:18}{'x'.join(map(str, shape)):>10}{count:>14,}")
    print(f"{'all':18}{'':>10}{total:>14,}")


def error_size(signal):
    """A reading: the root mean square of the error signal delta."""
    return jnp.sqrt(jnp.mean(jnp.square(signal.deltas)))


def train(net, dataset, config):
    """Trains the network with early stopping, and shows a progress bar."""
    with tqdm(total=config.epochs, unit="epoch") as bar:

        def show(state, record):
            del state
            bar.update()
            bar.set_postfix(
                loss=f"{record['loss']:.4f}", validation_accuracy=f"{record['metric']:.2%}"
            )

        return bp.fit(
            net,
            LOSS,
            OPTIMIZERS[config.optimizer](config.learning_rate),
            dataset.train,
            key=jax.random.key(config.seed),
            held_out=dataset.validation,
            metric=bp.accuracy,
            target=config.good,
            patience=config.patience,
            epochs=config.epochs,
            batch_size=config.batch_size,
            read={"error_size": error_size},
            callback=show,
        )


def draw(records, outputs, dataset, parts):
    """Draws the learning curves, the error signals, and the worst predictions."""
    figure = plt.figure(figsize=(11, 6.2))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1))
    curves, signals = left.subplots(2, 1, sharex=True)
    draw_curves(curves, records)
    draw_signals(signals, records, parts)
    if dataset.image_shape:
        draw_most_wrong(right, outputs, dataset)
    else:
        draw_confusions(right, outputs, dataset)
    return figure


def draw_curves(axes, records):
    epochs = [record["epoch"] for record in records]
    axes.semilogy(epochs, [r["loss"] for r in records], label="training loss")
    axes.semilogy(
        epochs, [r["held_out_loss"] for r in records], label="validation loss", linestyle="--"
    )
    # An error rate, not an accuracy: on a logarithmic axis the last differences stay visible.
    wrong = [max(1 - float(r["metric"]), 1e-4) for r in records]
    axes.semilogy(epochs, wrong, label="validation error rate", linestyle=":", linewidth=2)
    axes.set(title="Loss and error rate during training", ylabel="loss, error rate")
    axes.legend(fontsize=8)


def draw_signals(axes, records, parts):
    epochs = [record["epoch"] for record in records]
    layers = [i for i, part in enumerate(parts) if part.name.startswith(("conv", "dense"))]
    for depth, i in enumerate(layers, 1):
        sizes = [record["error_size"][i]["bias"] for record in records]
        axes.semilogy(epochs, sizes, label=f"layer {depth}, {parts[i].name}")
    axes.set(title="Error signals during training", xlabel="epoch", ylabel="rms of delta")
    axes.legend(fontsize=8)


def draw_most_wrong(figure, outputs, dataset, rows=4):
    inputs, labels = dataset.test
    values = np.asarray(LOSS(jnp.asarray(outputs), labels)[0])
    probabilities = np.asarray(jax.nn.softmax(outputs))
    worst = np.argsort(-values)[: rows**2]
    figure.suptitle("Test examples with the highest loss: label, prediction (probability)")
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
    for (given, guess), count in np.ndenumerate(counts):
        shade = "white" if count > counts.max() / 2 else "black"
        axes.text(guess, given, count, ha="center", va="center", color=shade)
    ticks = range(len(names))
    axes.set(title="Confusion matrix of the test set", xlabel="prediction", ylabel="label")
    axes.set_xticks(ticks, names, rotation=45, ha="right")
    axes.set_yticks(ticks, names)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError, bp.NonFiniteError) as error:
        raise SystemExit(f"digits: {error}") from None
