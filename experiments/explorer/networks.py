"""The second part: small networks on points in the plane, before, during and after training.

A network has two inputs and hidden layers of tanh units. For each stage of training, `bp.explain`
gives the values and the deltas of every unit for every shown example. The chain rule of the weight
from unit i to unit o, where o leads to the units k, has three factors:

  dE/dw_io = x_i  f'(z_o)  sum_k w_ok delta_k

The derivatives f'(z) come from the backward pass of the activation, for a delta of 1. The page
multiplies the factors, and shows the number of `jax.grad` beside the product.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import make_circles
from tqdm import tqdm

import jaxbp as bp
from experiments import multilayer
from experiments.common import data, descent

POINTS = 160
EXAMPLES = 32  # that can be looked at one by one
STAGES = 11
GRID = 32  # pixels of a region, along each side


class Problem(NamedTuple):
    """Points in the plane, and the network that learns them.

    Attributes:
      title: the name on the page.
      inputs: the points, [N, 2].
      labels: their classes, integers [N].
      class_names: the name of each class.
      hidden: the number of units of each hidden layer.
      steps: the number of steps of Adam, each on all points.
    """

    title: str
    inputs: jax.Array
    labels: np.ndarray
    class_names: tuple[str, ...]
    hidden: tuple[int, ...]
    steps: int

    @property
    def outputs(self) -> int:
        """One output for two classes, which is the sigmoid's; else one for each class."""
        return 1 if len(self.class_names) == 2 else len(self.class_names)

    @property
    def loss(self) -> bp.Loss:
        """The cross-entropy for this number of outputs."""
        return bp.sigmoid_cross_entropy if self.outputs == 1 else bp.softmax_cross_entropy

    @property
    def targets(self) -> jax.Array:
        """The labels as the loss takes them."""
        labels = jnp.asarray(self.labels)
        return labels[:, None].astype(float) if self.outputs == 1 else labels

    def parts(self) -> tuple[bp.Layer, ...]:
        """The layers of the network."""
        hidden = [layer for width in self.hidden for layer in (bp.dense(width), bp.tanh())]
        return *hidden, bp.dense(self.outputs)


def problems(seed: int) -> dict[str, Problem]:
    """Returns the problems of the page, by name."""
    two = "orange", "blue"
    moons, moon_targets = multilayer.moons(seed, POINTS)
    xor, xor_targets = multilayer.xor(seed, POINTS)
    circles, circle_labels = make_circles(POINTS, noise=0.08, factor=0.45, random_state=seed)
    spiral, spiral_labels = make_spiral(seed, POINTS)
    digits, digit_labels, names = digits_in_the_plane(seed)
    return {
        "moons": Problem("moons", moons, as_labels(moon_targets), two, (4, 3), 600),
        "xor": Problem("XOR", xor, as_labels(xor_targets), two, (3,), 600),
        "circles": Problem("circles", 1.6 * jnp.asarray(circles), circle_labels, two, (5,), 600),
        "spiral": Problem("spiral", spiral, spiral_labels, two, (8, 8), 2000),
        "digits": Problem("digits", digits, digit_labels, names, (8, 8), 2000),
    }


def as_labels(targets: jax.Array) -> np.ndarray:
    """The integers [N] of targets [N, 1]."""
    return np.asarray(targets)[:, 0].astype(int)


def make_spiral(seed: int, n: int) -> tuple[jax.Array, np.ndarray]:
    """Draws two arms that turn around each other: points [N, 2] and labels [N]."""
    labels = np.arange(n) % 2
    turn = np.linspace(0.25, 1.0, n)
    angle = 2 * np.pi * (1.7 * turn + labels / 2)
    arms = 2 * turn[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    noise = np.random.default_rng(seed).normal(size=arms.shape)
    order = np.random.default_rng(seed).permutation(n)
    return jnp.asarray((arms + 0.06 * noise)[order]), labels[order]


def digits_in_the_plane(seed: int) -> tuple[jax.Array, np.ndarray, tuple[str, ...]]:
    """Returns the training digits by their two principal axes, their labels and the class names."""
    dataset = data.load(None, seed=seed)
    pixels, labels = dataset.train
    centred = (pixels - pixels.mean(axis=0)).astype(float)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    points = centred @ axes[:2].T
    return jnp.asarray(points / points.std(axis=0)), labels, dataset.class_names


def collect(seed: int) -> list[dict[str, Any]]:
    """Trains a network on each problem, and returns what the page shows of it."""
    progress = tqdm(problems(seed).items(), desc="networks", unit="network")
    return [{"name": name, **record(problem, seed)} for name, problem in progress]


def record(problem: Problem, seed: int) -> dict[str, Any]:
    """Trains on one problem; returns what the page shows, with the stages as first axis."""
    parts = problem.parts()
    net, x, targets = bp.chain(*parts), problem.inputs, problem.targets
    params, _ = net.init(jax.random.key(seed), (2,))
    stages = np.unique(np.geomspace(1, problem.steps, STAGES - 1).round().astype(int))
    stages = [0, *stages.tolist()]
    path = train(net, problem.loss, params, x, targets, problem.steps)
    low, high = corners(x)
    each = [
        stage(problem, parts, jax.tree.map(lambda leaf, k=k: leaf[k], path), plane(low, high))
        for k in stages
    ]
    return {
        "title": problem.title,
        "classNames": problem.class_names,
        "sizes": [2, *problem.hidden, problem.outputs],
        "inputs": x,
        "labels": problem.labels,
        "examples": EXAMPLES,
        "low": low,
        "high": high,
        "grid": GRID,
        "steps": stages,
        **jax.tree.map(lambda *of_stages: np.stack(of_stages), *each),
    }


def train(
    net: bp.Layer, loss: bp.Loss, params: Any, x: jax.Array, targets: jax.Array, steps: int
) -> Any:
    """Runs Adam on all points; returns the parameters before each step and after the last."""
    path, _ = descent.descend(net, loss, params, x, targets, optax.adam(0.02), steps)
    return path


def stage(
    problem: Problem, parts: Sequence[bp.Layer], params: Any, points: jax.Array
) -> dict[str, Any]:
    """What the page shows of a network with these parameters."""
    net, loss = bp.chain(*parts), problem.loss
    everything, _ = net.forward(params, problem.inputs)
    values, _ = loss(everything, problem.targets)
    x, targets = problem.inputs[:EXAMPLES], problem.targets[:EXAMPLES]
    shown = bp.explain(net, params, x, targets, loss=loss)
    slopes = [slope(parts[i], shown.values[str(i - 1)]) for i in range(1, len(parts), 2)]
    grads = per_example_by_autodiff(net, loss, params, x, targets)
    require_equal(shown.gradients, grads)
    of_layers = range(0, len(parts), 2)
    hidden, outputs = on_the_plane(parts, params, points)
    return {
        "error": np.mean(values),
        "accuracy": np.mean(classes(problem, everything) == problem.labels),
        "weights": [params[i]["weight"] for i in of_layers],
        "biases": [params[i]["bias"] for i in of_layers],
        "values": [shown.values[place] for place in shown.values],
        "deltas": [shown.deltas[place] for place in shown.deltas],
        "slopes": slopes,
        "weightGradients": [grads[i]["weight"] for i in of_layers],
        "biasGradients": [grads[i]["bias"] for i in of_layers],
        "norms": shown.example_norms,
        "losses": shown.losses,
        "probabilities": probabilities(problem, shown.values[str(len(parts) - 1)]),
        "hiddenRegions": [as_bytes((values + 1) / 2) for values in hidden],
        "region": region(problem, outputs),
    }


def slope(activation: bp.Layer, z: np.ndarray) -> jax.Array:
    """The derivative f'(z) of an activation: what its backward pass makes of a delta of 1."""
    y, cache = activation.forward((), jnp.asarray(z))
    dx, _ = activation.backward((), cache, jnp.ones_like(y))
    return dx


def per_example_by_autodiff(
    net: bp.Layer, loss: bp.LossFunction, params: Any, x: jax.Array, targets: jax.Array
) -> Any:
    """The gradient of each example by `jax.grad`, to show beside that of the backward pass."""

    def error(params, x, target):
        outputs, _ = net.forward(params, x[None])
        values, _ = loss(outputs, target[None])
        return values[0]

    return jax.vmap(jax.grad(error), (None, 0, 0))(params, x, targets)


def require_equal(gradients: dict[str, np.ndarray], grads: Any) -> None:
    """Raises if the gradients of `explain` and those of `jax.grad` differ."""
    pairs = zip(gradients.values(), jax.tree.leaves(grads), strict=True)
    difference = max(np.max(abs(g - other) / np.maximum(1, abs(other))) for g, other in pairs)
    if not difference <= 1e-12:
        raise ArithmeticError(
            f"explorer: the gradients of explain and jax.grad differ by {difference}."
        )


def probabilities(problem: Problem, outputs: Any) -> np.ndarray:
    """The probability of each class, [N, C]."""
    if problem.outputs > 1:
        return np.asarray(jax.nn.softmax(outputs))
    blue = np.asarray(jax.nn.sigmoid(outputs))
    return np.concatenate([1 - blue, blue], axis=1)


def classes(problem: Problem, outputs: Any) -> np.ndarray:
    """The class with the highest probability, [N]."""
    return probabilities(problem, outputs).argmax(axis=1)


def corners(points: jax.Array) -> tuple[list[float], list[float]]:
    """The lower left and upper right corner of a square with a margin around the points."""
    low, high = np.asarray(points).min(axis=0), np.asarray(points).max(axis=0)
    centre, half = (low + high) / 2, (high - low).max() / 2 * 1.12
    return (centre - half).tolist(), (centre + half).tolist()


def plane(low: list[float], high: list[float]) -> jax.Array:
    """The centres of the pixels of a picture, row by row from the top: [GRID * GRID, 2]."""
    at = (np.arange(GRID) + 0.5) / GRID
    u, v = np.meshgrid(low[0] + at * (high[0] - low[0]), high[1] - at * (high[1] - low[1]))
    return jnp.asarray(np.stack([u.ravel(), v.ravel()], axis=1))


def on_the_plane(
    parts: Sequence[bp.Layer], params: Any, points: jax.Array
) -> tuple[list[np.ndarray], jax.Array]:
    """The values of each hidden unit at the pixels, [H, GRID, GRID], and the outputs there."""
    hidden = []
    for i, (layer, own) in enumerate(zip(parts, params, strict=True)):
        points, _ = layer.forward(own, points)
        if i % 2:
            hidden.append(np.asarray(points).T.reshape(-1, GRID, GRID))
    return hidden, points


def region(problem: Problem, outputs: jax.Array) -> np.ndarray:
    """The picture of the outputs: the probability of blue, or the class for several classes."""
    if problem.outputs == 1:
        picture = as_bytes(probabilities(problem, outputs)[:, 1])
    else:
        picture = classes(problem, outputs).astype(np.uint8)
    return picture.reshape(GRID, GRID)


def as_bytes(fractions: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 as integers from 0 to 255."""
    return np.round(255 * fractions).astype(np.uint8)
