"""One sigmoid unit on points in the plane: its whole gradient, one step, and gradient descent.

The unit predicts the probability y_hat that the point x is blue. The target y is 1 for a blue point
and 0 for a red one:

  z = w1 x1 + w2 x2 + b,   y_hat = sigmoid(z),   E = -y log y_hat - (1 - y) log(1 - y_hat)

The two regions meet at the line z = 0. The chain rule from E back to z has two factors, and their
product is the difference between prediction and target:

  dE/dy_hat = (y_hat - y) / (y_hat (1 - y_hat)),   dy_hat/dz = y_hat (1 - y_hat)
  dE/dz     = y_hat - y

z is linear in the weights, with derivatives x1, x2 and 1, so the whole gradient is

  dE/d(w1, w2, b) = (y_hat - y) (x1, x2, 1)

A blue point in the red region has y = 1 and y_hat < 1/2. A step against its gradient adds a
multiple of (x1, x2, 1) to the weights. This raises z at the point, and the line comes closer.
Gradient descent on all points follows the mean of their gradients, down the error surface E(w).
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

import jaxbp as bp
from experiments.common import descent, figures, files
from experiments.common.flags import require_flags
from experiments.common.resume import Resumed

NET = bp.dense(1)  # computes z: the sigmoid is part of the loss, which avoids overflow
LOSS = bp.sigmoid_cross_entropy
NAMES = ("w1", "w2", "b")
BEFORE = {"color": figures.BLACK, "linestyle": "--", "label": "before"}
DURING = {"color": figures.BLACK, "linewidth": 0.7, "alpha": 0.4}


def main(
    *,
    seed: int = 0,
    points: int = 80,
    learning_rate: float = 0.1,
    steps: int = 500,
    out: Path = Path("out"),
    resume: bool = False,
) -> None:
    """Trains one sigmoid unit on points in the plane and draws how its line moves.

    Args:
      seed: the seed of the points.
      points: the number of points, half of them blue.
      learning_rate: the learning rate, for the single step and for training.
      steps: the number of steps of gradient descent on all points.
      out: the folder for the figures, perceptron_step.png and perceptron_training.png, and for the
        parameters and predictions, perceptron.npz.
      resume: whether to store what is trained in `out`, and to go on from what is stored there.
    """
    flags = locals()
    require_flags("perceptron", seed=seed, learning_rate=learning_rate, steps=steps, out=out)
    if points < 2:
        raise SystemExit(f"perceptron: points is {points}; it takes at least 2, one per class.")
    with jax.enable_x64(True):  # so that gradients agree to the last digits
        inputs, targets = make_points(jax.random.key(seed), points)
        start, optimizer = poor_start(), optax.sgd(learning_rate)

        x, y = worst_blue_point(start, inputs, targets)
        after = at(descend(start, x, y, optimizer, steps=1), -1)
        print_step(start, after, x, y, learning_rate)
        step_figure = draw_step(start, after, x, inputs, targets)

        stored = Resumed("perceptron", flags)
        path = stored.part("path", lambda: descend(start, inputs, targets, optimizer, steps))
        print_training(path, inputs, targets)
        training_figure = draw_training(
            path, hold_bias(path, inputs, targets, optimizer), inputs, targets
        )

        figures.save(step_figure, out / "perceptron_step.png")
        figures.save(training_figure, out / "perceptron_training.png")
        trained = at(path, -1)
        files.save_trained(
            out / "perceptron.npz",
            trained,
            {"inputs": inputs, "targets": targets, "predictions": predict(trained, inputs)},
        )


def make_points(key, n):
    """Draws two overlapping clouds: inputs [N, 2] and targets [N, 1], 1 for blue, 0 for red."""
    targets = (jnp.arange(n) % 2).astype(float)[:, None]
    centres = jnp.where(targets == 1, jnp.array([0.8, 1.0]), jnp.array([-0.8, -1.0]))
    return centres + jax.random.normal(key, (n, 2)), targets


def poor_start():
    """Returns weights chosen by hand, with points of both classes on both sides of the line."""
    return {"weight": jnp.array([[-0.6], [0.9]]), "bias": jnp.array([0.3])}


def worst_blue_point(params, inputs, targets):
    """Returns the blue point with the worst prediction, as a batch: x [1, 2] and y [1, 1]."""
    n = jnp.argmin(jnp.where(targets == 1, predict(params, inputs), jnp.inf))
    return inputs[n][None], targets[n][None]


def predict(params, inputs):
    """Computes y_hat, [N, 1]."""
    z, _ = NET.forward(params, inputs)
    return jax.nn.sigmoid(z)


def error(params, inputs, targets):
    """Computes E, the mean cross-entropy of the points."""
    z, _ = NET.forward(params, inputs)
    values, _ = LOSS(z, targets)
    return jnp.mean(values)


def misclassified(params, inputs, targets):
    """Counts the points that lie in the region of the other class."""
    return int(jnp.sum((predict(params, inputs) > 0.5) != (targets == 1)))


def nearest_on_line(params, x):
    """Computes the point on the line that is nearest to x [1, 2]: x - (z / |w|^2) w."""
    z, _ = NET.forward(params, x)
    w = params["weight"][:, 0]
    return x - z / (w @ w) * w


def distance(params, x):
    """Computes the distance from the point to the line."""
    return jnp.linalg.norm(x - nearest_on_line(params, x)).item()


def descend(params, inputs, targets, optimizer, steps):
    """Runs gradient descent; returns the weights before every step and after the last, stacked."""
    path, _ = descent.descend(NET, LOSS, params, inputs, targets, optimizer, steps)
    return path


def hold_bias(path, inputs, targets, optimizer):
    """Repeats the descent with b fixed at its trained value: E is then a surface over w1, w2."""
    start = {"weight": path["weight"][0], "bias": path["bias"][-1]}
    weight_only = optax.partition(
        {"move": optimizer, "hold": optax.set_to_zero()}, {"weight": "move", "bias": "hold"}
    )
    return descend(start, inputs, targets, weight_only, steps=len(path["bias"]) - 1)


def at(path, k):
    """Returns the weights after k steps."""
    return jax.tree.map(lambda leaf: leaf[k], path)


def vector(params):
    """Returns (w1, w2, b) as one array."""
    return np.append(params["weight"], params["bias"])


def print_step(before, after, x, y, learning_rate):
    """Prints one step on one point, with each derivative beside that of `jax.grad`."""
    _, grads = bp.value_and_grad(NET, LOSS)(before, x, y)
    grads, witness = vector(grads), vector(jax.grad(error)(before, x, y))
    slope, terms = (predict(before, x) - y).item(), np.append(x, 1.0)
    differences = np.maximum(abs(grads - witness), abs(grads - slope * terms))
    if not differences.max() <= 1e-12:
        raise ArithmeticError(f"perceptron: the gradients differ by {differences.max()}.")

    y_hats = [predict(params, x).item() for params in (before, after)]
    print(f"The blue point x = ({terms[0]:.4f}, {terms[1]:.4f}): y_hat = {y_hats[0]:.4f}, y = 1\n")
    print("       y_hat - y     times   = gradient           jax.grad             difference")
    for name, *row in zip(NAMES, terms, grads, witness, differences, strict=True):
        numbers = "{:9.4f}   {:<18.15f}   {:<18.15f}   {:.0e}".format(*row)
        print(f"  {name:2} {slope:11.4f} {numbers}")

    print(f"\n          before   - {learning_rate:g} gradient     after")
    changes = vector(after) - vector(before)
    for name, old, change in zip(NAMES, vector(before), changes, strict=True):
        way = "increases" if change > 0 else "decreases"
        print(f"  {name:2} {old:11.4f} {change:14.4f} {old + change:9.4f}   {way}")
    print("\n  y_hat at the point     {:.4f} -> {:.4f}".format(*y_hats))
    print(f"  distance to the line   {distance(before, x):.4f} -> {distance(after, x):.4f}\n")


def print_training(path, inputs, targets):
    print(f"All {len(inputs)} points, {len(path['bias']) - 1} steps")
    print("\n             E   misclassified")
    for name, params in {"before": at(path, 0), "after": at(path, -1)}.items():
        wrong = misclassified(params, inputs, targets)
        print(f"  {name:6} {error(params, inputs, targets):.4f}   {wrong}")


def draw_step(before, after, x, inputs, targets):
    """Draws a misclassified point, and how much closer the line is after one step on it."""
    figure = Figure(figsize=(8, 4.8))
    panels = figure.subplots(1, 2, subplot_kw={"aspect": "equal"})
    for axes, params in zip(panels, (before, after), strict=True):
        figures.draw_plane(axes, inputs, targets, functools.partial(predict, params))
        way = np.concatenate([x, nearest_on_line(params, x)])
        axes.plot(*way.T, ":", color=figures.BLACK)
        axes.plot(*way[0], "o", markersize=13, fillstyle="none", color=figures.BLACK)
    draw_line(panels[1], before, **BEFORE)

    ways = np.where(vector(after) > vector(before), "increase", "decrease")
    panels[0].set_title(
        f"The ringed point: $y = 1$, $\\hat y = {predict(before, x).item():.2f}$\n"
        f"$w_1$ must {ways[0]}, $w_2$ {ways[1]}, $b$ {ways[2]}"
    )
    panels[1].set_title(
        f"After one step on it: $\\hat y = {predict(after, x).item():.2f}$\n"
        f"distance to the line {distance(after, x):.2f}, was {distance(before, x):.2f}"
    )
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_training(path, held, inputs, targets):
    """Draws the line before, during and after training, and the path on the error surface."""
    figure = Figure(figsize=(12, 6.2))
    left, right = figure.subfigures(1, 2, width_ratios=(5, 7))
    plane = left.subplots(subplot_kw={"aspect": "equal"})
    last = len(path["bias"]) - 1
    figures.draw_plane(plane, inputs, targets, functools.partial(predict, at(path, last)))
    draw_line(plane, at(path, 0), **BEFORE)
    for k in np.unique(np.geomspace(1, last, 7).astype(int)):
        draw_line(plane, at(path, k), **DURING)
    plane.plot([], [], label="thin: during training", **DURING)

    wrong = [misclassified(at(path, k), inputs, targets) for k in (0, last)]
    plane.set_title(
        f"{last} steps on all {len(inputs)} points:\n"
        f"{wrong[0]} misclassified before, {wrong[1]} after"
    )
    left.legend(*plane.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    draw_mountain(right.add_subplot(projection="3d"), held, inputs, targets)
    return figure


def draw_line(axes, params, **style):
    figures.draw_line(axes, params["weight"][:, 0], params["bias"], **style)


def draw_mountain(axes, path, inputs, targets):
    """Draws E over w1 and w2, with the b of the path, and the path on this surface."""
    weights, bias = np.asarray(path["weight"])[:, :, 0], path["bias"][-1]
    margin = 0.7 * max(np.ptp(weights, axis=0).max(), 1.0)
    low, high = weights.min(axis=0) - margin, weights.max(axis=0) + margin
    w1, w2 = np.meshgrid(*np.linspace(low, high, 50).T)

    @jax.jit
    @jax.vmap
    def height(weight):
        return error({"weight": weight[:, None], "bias": bias}, inputs, targets)

    surface = np.asarray(height(np.stack([w1, w2], axis=-1).reshape(-1, 2))).reshape(w1.shape)
    heights = np.asarray(height(weights))
    axes.computed_zorder = False  # else the surface would hide parts of the path
    axes.plot_surface(w1, w2, surface, cmap="cividis", shade=False, antialiased=False, zorder=1)
    axes.contour(w1, w2, surface, levels=12, colors="white", linewidths=0.5, zorder=2)
    label = f"path of {len(weights) - 1} steps"
    axes.plot(*weights.T, heights, color="white", linewidth=5, zorder=3)
    axes.plot(*weights.T, heights, color=figures.RED, linewidth=3, label=label, zorder=4)
    for k, name, marker in ((0, "start", "o"), (-1, "end", "*")):
        w, e = weights[k], heights[k]
        style = {"color": figures.RED, "markeredgecolor": "white", "markersize": 15, "zorder": 5}
        where = f"$w$ = ({w[0]:.2f}, {w[1]:.2f})"
        label = f"{name}: {where}, $E$ = {e:.3f}"
        axes.plot(*w, e, marker, linestyle="none", label=label, **style)
        axes.text(*w, e + 0.09 * np.ptp(surface), name, color="white", weight="bold", zorder=6)
    axes.locator_params(nbins=5)
    axes.view_init(elev=32, azim=50)
    axes.set_box_aspect((1, 1, 0.75), zoom=1.0)
    axes.set(xlabel="$w_1$", ylabel="$w_2$", zlabel="$E$")
    axes.legend(loc="upper left", fontsize=9)
    axes.set_title(
        "Gradient descent on the error surface $E(w_1, w_2)$\n"
        f"all heights are at $b$ = {bias.item():.2f}, the bias after training"
    )


if __name__ == "__main__":
    tyro.cli(main)
