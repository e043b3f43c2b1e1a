"""A two-layer sigmoid network: how hidden units bend the boundary, and one weight's chain rule.

  z1 = W1 x + b1,   h = sigmoid(z1),   z2 = W2 h + b2,   y_hat = sigmoid(z2)
  E = -y log y_hat - (1 - y) log(1 - y_hat)

Each hidden unit j is a perceptron with its own line, z1_j = 0, and h_j says on which side of the
line a point lies. The output combines all h_j, and its boundary z2 = 0 bends where the lines meet.

The error at the output reaches a weight of the first layer along one path. The derivative of E with
respect to the weight is the product of the derivatives along this path:

  dE/dw1_ij = dE/dy_hat  dy_hat/dz2  dz2/dh_j  dh_j/dz1_j  dz1_j/dw1_ij

  dE/dy_hat    = (y_hat - y) / (y_hat (1 - y_hat))
  dy_hat/dz2   = y_hat (1 - y_hat)
  dz2/dh_j     = w2_j
  dh_j/dz1_j   = h_j (1 - h_j)
  dz1_j/dw1_ij = x_i

Backpropagation computes this product for all weights. It computes each factor that several paths
share only once.
"""

import functools
import math
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from sklearn.datasets import make_moons

import jaxbp as bp
from experiments.common import descent, figures, files
from experiments.common.flags import require_flags
from experiments.common.resume import Resumed

COLUMNS = 5  # pictures of hidden units in a row
LOSS = bp.sigmoid_cross_entropy  # takes z2: the output's sigmoid is part of the loss


def main(
    *,
    data: Literal["moons", "xor"] = "moons",
    seed: int = 0,
    points: int = 120,
    hidden: int = 4,
    learning_rate: float = 1.0,
    steps: int = 1000,
    out: Path = Path("out"),
    resume: bool = False,
) -> None:
    """Trains a two-layer network on points in the plane and draws what its hidden units do.

    Args:
      data: two half-moons, or four clouds where opposite clouds have the same class.
      seed: the seed of the points and of the initial weights.
      points: the number of points, about half of them blue.
      hidden: the number of units of the hidden layer, at most 9, because each one is drawn.
      learning_rate: the learning rate of gradient descent with momentum 0.9.
      steps: the number of steps, each on all points.
      out: the folder for the figures, multilayer_path.png, multilayer_regions.png and
        multilayer_weights.png, and for the parameters and predictions, multilayer.npz.
      resume: whether to store what is trained in `out`, and to go on from what is stored there.
    """
    flags = locals()
    require_flags("multilayer", seed=seed, learning_rate=learning_rate, steps=steps, out=out)
    if points < 4:
        raise SystemExit(f"multilayer: points is {points}; it takes at least 4, one per cloud.")
    if not 1 <= hidden <= 9:
        raise SystemExit(f"multilayer: hidden is {hidden}; it takes 1 to 9 units, to draw them.")
    with jax.enable_x64(True):  # so that gradients agree to the last digits
        inputs, targets = {"moons": moons, "xor": xor}[data](seed, points)
        net = bp.chain(bp.dense(hidden), bp.sigmoid(), bp.dense(1))
        before, _ = net.init(jax.random.key(seed), inputs.shape[1:])
        print_chain_rule(net, before, inputs, targets)

        stored = Resumed("multilayer", flags)
        optimizer = optax.sgd(learning_rate, momentum=0.9)
        after, errors = stored.part(
            "training", lambda: train(net, before, inputs, targets, optimizer, steps)
        )
        print_training(net, before, after, errors, inputs, targets)

        n = worst(net, before, inputs, targets)
        path = draw_path(before, inputs[n], targets[n])
        regions = draw_regions(net, before, after, inputs, targets)
        weights = draw_weights(before, after, errors)
        figures.save(path, out / "multilayer_path.png")
        figures.save(regions, out / "multilayer_regions.png")
        figures.save(weights, out / "multilayer_weights.png")
        files.save_trained(
            out / "multilayer.npz",
            after,
            {"inputs": inputs, "targets": targets, "predictions": predict(net, after, inputs)},
        )


def moons(seed, n):
    """Draws two interleaved half-moons: inputs [N, 2], targets [N, 1]."""
    inputs, targets = make_moons(n, noise=0.1, random_state=seed)
    inputs = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    return jnp.asarray(inputs), jnp.asarray(targets, float)[:, None]


def xor(seed, n):
    """Draws four clouds: inputs [N, 2], targets [N, 1].

    A cloud is blue if exactly one coordinate of its centre is positive.
    """
    corners = jnp.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])[jnp.arange(n) % 4]
    noise = jax.random.normal(jax.random.key(seed), (n, 2))
    return corners + 0.3 * noise, (corners.prod(axis=1, keepdims=True) < 0).astype(float)


def predict(net, params, inputs):
    """Computes y_hat, [N, 1]."""
    z, _ = net.forward(params, inputs)
    return jax.nn.sigmoid(z)


def accuracy(net, params, inputs, targets):
    """Computes the fraction of points that lie in the region of their class."""
    return jnp.mean((predict(net, params, inputs) > 0.5) == (targets == 1)).item()


def train(net, params, inputs, targets, optimizer, steps):
    """Returns the trained parameters, and E before each step and after the last, [steps + 1]."""
    path, errors = descent.descend(net, LOSS, params, inputs, targets, optimizer, steps)
    return jax.tree.map(lambda of_steps: of_steps[-1], path), errors


def factors(params, x, y):
    """Computes the factors of dE/dw1_11, from the output down, for x [2] with target y [1]."""
    first, _, second = params
    h = jax.nn.sigmoid(x @ first["weight"] + first["bias"])
    y_hat = jax.nn.sigmoid(h @ second["weight"] + second["bias"])
    return {
        "dE/dy_hat": ((y_hat - y) / (y_hat * (1 - y_hat))).item(),
        "dy_hat/dz2": (y_hat * (1 - y_hat)).item(),
        "dz2/dh_1": second["weight"][0, 0].item(),
        "dh_1/dz1_1": (h[0] * (1 - h[0])).item(),
        "dz1_1/dw1_11": x[0].item(),
    }


def worst(net, params, inputs, targets):
    """Returns the index of the example with the highest loss."""
    values, _ = LOSS(net.forward(params, inputs)[0], targets)
    return jnp.argmax(values)


def print_chain_rule(net, params, inputs, targets):
    """Prints the factors for one weight and one example, and checks their product in two ways."""
    _, grads = bp.backprop(net, LOSS, read=bp.per_example)(params, inputs, targets)
    n = worst(net, params, inputs, targets)

    def error(params):
        z, _ = net.forward(params, inputs[n][None])
        value, _ = LOSS(z, targets[n][None])
        return value[0]

    numbers = factors(params, inputs[n], targets[n])
    answers = {
        "their product": math.prod(numbers.values()),
        "bp.per_example": grads[0]["weight"][n, 0, 0].item(),
        "jax.grad": jax.grad(error)(params)[0]["weight"][0, 0].item(),
    }
    x1, x2 = inputs[n].tolist()
    print("dE/dw1_11 before training. The weight w1_11 leads from x1 to the first hidden unit;")
    print(f"the worst predicted point is x = ({x1:.4f}, {x2:.4f}), y = {targets[n].item():g}\n")
    for name, number in {**numbers, **answers}.items():
        print(f"  {name:14} {number:22.17f}")
    spread = max(answers.values()) - min(answers.values())
    print(f"  {'difference':14} {spread:22.0e}\n")
    if not spread <= 1e-12:
        raise ArithmeticError(f"multilayer: the gradients of w1_11 differ by {spread}.")


def print_training(net, before, after, errors, inputs, targets):
    print(f"All {len(inputs)} points, {len(errors) - 1} steps\n")
    print("               E   accuracy")
    for name, params, value in (("before", before, errors[0]), ("after", after, errors[-1])):
        print(f"  {name:8} {value:8.4f}   {accuracy(net, params, inputs, targets):8.1%}")


def draw_path(params, x, y):
    """Draws the chain rule of one weight: its path to the error, with a factor at each step."""
    numbers = factors(params, x, y)
    names = (
        r"\partial E / \partial\hat y = \frac{\hat y - y}{\hat y (1 - \hat y)}",
        r"\partial\hat y / \partial z_2 = \hat y (1 - \hat y)",
        r"\partial z_2 / \partial h_1 = w_{2,1}",
        r"\partial h_1 / \partial z_{1,1} = h_1 (1 - h_1)",
        r"\partial z_{1,1} / \partial w_{1,11} = x_1",
    )
    figure = Figure(figsize=(10, 5.4))
    axes = figure.subplots()
    hidden = len(params[2]["weight"])
    units = {  # the name of each unit, by its place
        **{(0, i): name for i, name in enumerate(("$x_1$", "$x_2$", "$1$"))},
        **{(1, j): f"$h_{{{j + 1}}}$" for j in range(hidden)},
        (1, hidden): "$1$",
        (2, 0): r"$\hat y$",
        (3, 0): "$E$",
    }
    counts = [3, hidden + 1, 1, 1]
    places = {(k, i): (3.0 * k, _height(i, counts[k])) for k, i in units}
    edges = [((0, i), (1, j)) for i in range(3) for j in range(hidden)]
    edges += [((1, j), (2, 0)) for j in range(hidden + 1)] + [((2, 0), (3, 0))]
    path = [((0, 0), (1, 0)), ((1, 0), (2, 0)), ((2, 0), (3, 0))]
    for edge in edges:
        ends = np.array([places[unit] for unit in edge]).T
        on_path = edge in path
        color, width = (figures.RED, 4) if on_path else ("#BBBBBB", 1)
        axes.plot(*ends, color=color, linewidth=width, zorder=2 if on_path else 1)
    for unit, name in units.items():
        on_path = any(unit in edge for edge in path)
        look = {"boxstyle": "circle", "facecolor": "white"}
        look |= {"edgecolor": figures.RED, "linewidth": 2.5} if on_path else {"edgecolor": "gray"}
        axes.text(*places[unit], name, ha="center", va="center", bbox=look, zorder=3)

    def middle(start, end):
        return (np.array(places[start]) + places[end]) / 2

    anchors = (  # where each factor belongs, and where its text stands
        (middle((2, 0), (3, 0)), (7.5, 0.55)),
        (np.array(places[(2, 0)]), (6.0, 1.15)),
        (middle((1, 0), (2, 0)), (5.1, 1.72)),
        (np.array(places[(1, 0)]), (2.6, 2.05)),
        (middle((0, 0), (1, 0)), (0.55, 1.72)),
    )
    for name, value, (at, text) in zip(names, numbers.values(), anchors, strict=True):
        axes.annotate(
            f"${name}$\n$= {value:.3g}$",
            xy=at,
            xytext=text,
            ha="center",
            va="center",
            bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": figures.RED},
            arrowprops={"arrowstyle": "-", "color": figures.RED, "linestyle": ":"},
            zorder=4,
        )
    product = r" \cdot ".join(
        f"({value:.3g})" if value < 0 else f"{value:.3g}" for value in numbers.values()
    )
    axes.set_title(
        "One weight reaches the error along one path; its derivative is the product of the "
        f"factors:\n$\\partial E / \\partial w_{{1,11}} = {product}"
        f" = {math.prod(numbers.values()):.3g}$"
    )
    y_hat = jax.nn.sigmoid(x @ params[0]["weight"] + params[0]["bias"]) @ params[2]["weight"]
    y_hat = jax.nn.sigmoid(y_hat + params[2]["bias"]).item()
    axes.text(
        9.6,
        -1.3,
        f"the worst predicted point, before training:\n$x$ = ({x[0]:.2f}, {x[1]:.2f}), "
        f"$y$ = {y.item():g}, $\\hat y$ = {y_hat:.2f}\n\n"
        "backward, the error follows the red path to the weight\n"
        "from $x_1$ to $h_1$; each grey weight has a path of its own",
        ha="right",
        va="bottom",
    )
    axes.set(xlim=(-0.6, 9.6), ylim=(-1.45, 2.4))
    axes.set_axis_off()
    return figure


def _height(i, count):
    """Heights from 1.2 down to -1.2, the middle for a single unit."""
    return 0.0 if count == 1 else 1.2 - 2.4 * i / (count - 1)


def draw_regions(net, before, after, inputs, targets):
    """Draws the lines and regions before and after training, and how the units combine."""
    rows = math.ceil((len(after[2]["weight"]) + 1) / COLUMNS)
    heights = 5.4, 2 * rows + 0.6
    figure = Figure(figsize=(9, sum(heights)))
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    panels = top.subplots(1, 2, subplot_kw={"aspect": "equal"})
    for axes, params in zip(panels, (before, after), strict=True):
        figures.draw_plane(axes, inputs, targets, functools.partial(predict, net, params))
        draw_hidden_lines(axes, *map(np.asarray, (params[0]["weight"], params[0]["bias"])))
    right = [accuracy(net, params, inputs, targets) for params in (before, after)]
    steps = ("Before training", "After training")
    for axes, step, share in zip(panels, steps, right, strict=True):
        axes.set_title(f"{step}\naccuracy {share:.1%}", fontsize=10)
    top.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    draw_combination(bottom, after, inputs)
    return figure


def draw_hidden_lines(axes, weights, biases):
    """Draws each hidden unit's line z1_j = 0, with an arrow to the side where h_j is near 1."""
    style = {"color": figures.PURPLE, "linestyle": "--", "linewidth": 1.5, "zorder": 2.5}
    for j, (weight, bias) in enumerate(zip(weights.T, biases, strict=True), 1):
        figures.draw_line(axes, weight, bias, **style)
        nearest = -bias * weight / (weight @ weight)
        axes.annotate(
            f"$h_{{{j}}}$",
            xy=nearest,
            xytext=nearest + 0.5 * weight / np.linalg.norm(weight),
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "<-"},
            bbox={"boxstyle": "circle,pad=0.05", "color": "white", "alpha": 0.7},
            zorder=4,
        )
    axes.plot([], [], label=r"hidden unit's line, arrow to $h_j \to 1$", **style)


def draw_combination(figure, params, inputs):
    """Draws what each hidden unit adds to z2 over the plane, and their sum with its boundary."""
    first, _, second = jax.tree.map(np.asarray, params)
    low, high = np.min(inputs, axis=0) - 0.4, np.max(inputs, axis=0) + 0.4
    u, v = np.meshgrid(*np.linspace(low, high, 120).T)
    h = jax.nn.sigmoid(np.stack([u, v], axis=-1) @ first["weight"] + first["bias"])
    parts = np.moveaxis(np.asarray(h * second["weight"][:, 0]), -1, 0)
    total = parts.sum(axis=0) + second["bias"].item()
    largest = np.abs(second["weight"]).max()
    colours = LinearSegmentedColormap.from_list("sides", [figures.RED, "white", figures.BLUE])
    terms = [f"${w:+.1f}\\,h_{{{j}}}$" for j, w in enumerate(second["weight"][:, 0], 1)]
    bias = f"${second['bias'].item():+.1f}$"
    rows = math.ceil((len(parts) + 1) / COLUMNS)
    panels = figure.subplots(rows, COLUMNS, squeeze=False, subplot_kw={"aspect": "equal"}).ravel()
    for axes in panels[len(parts) + 1 :]:
        axes.remove()
    panels = panels[: len(parts) + 1]
    titles = [*terms, f"sum {bias} $= z_2$"]
    for axes, values, title in zip(panels, (*parts, total), titles, strict=True):
        image = axes.pcolormesh(
            u, v, values, cmap=colours, vmin=-largest, vmax=largest, rasterized=True
        )
        axes.set_title(title, fontsize=10)
        axes.set(xticks=[], yticks=[], xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    for axes, weight, b in zip(panels, first["weight"].T, first["bias"], strict=False):
        figures.draw_line(axes, weight, b, color=figures.PURPLE, linestyle="--", linewidth=1.5)
    if total.min() < 0 < total.max():
        panels[-1].contour(u, v, total, levels=[0], colors=figures.BLACK, linewidths=2)
    figure.colorbar(image, ax=list(panels), shrink=0.8, label="toward red | toward blue")
    figure.suptitle(
        "Each hidden unit is a half-plane, times its weight; the sum is 0 on the boundary (black)",
        fontsize=11,
    )


def draw_weights(before, after, errors):
    """Draws the network as a graph, before and after training, and the error of every step."""
    figure = Figure(figsize=(8, 6))
    panels = figure.subplot_mosaic("AB;CC", height_ratios=(2, 1))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves((before, after)))
    draw_graph(panels["A"], before, largest)
    draw_graph(panels["B"], after, largest)
    panels["A"].set_title("Before training")
    panels["B"].set_title("After training")
    figure.suptitle(
        "Weights: blue is positive, red is negative; the thicker a line, the larger the weight;\n"
        f"the thickest is {largest:.1f}. Lines from 1 are biases"
    )

    panels["C"].plot(errors)
    figures.log_where_wide(panels["C"])
    title = f"The mean error was {errors[0]:.3g} before training and {errors[-1]:.3g} after it"
    panels["C"].set(xlabel="step", ylabel="$E$", title=title)
    return figure


def draw_graph(axes, params, largest):
    """Draws units as circles and weights as lines, coloured by sign and as wide as their size."""
    first, _, second = params
    hidden = [f"$h_{{{j}}}$" for j in range(1, len(second["weight"]) + 1)]
    columns = [["$x_1$", "$x_2$", "$1$"], [*hidden, "$1$"], [r"$\hat y$"]]
    heights = [np.linspace(1, 0, len(names) + 2)[1:-1] for names in columns]
    for k, layer in enumerate((first, second)):
        # A bias is the weight of a unit whose value is always 1.
        for (i, o), weight in np.ndenumerate(np.vstack([layer["weight"], layer["bias"]])):
            color = figures.BLUE if weight > 0 else figures.RED
            width = 7 * abs(weight) / largest
            axes.plot([k, k + 1], [heights[k][i], heights[k + 1][o]], color=color, linewidth=width)
    circle = {"boxstyle": "circle", "facecolor": "white"}
    for k, names in enumerate(columns):
        for height, name in zip(heights[k], names, strict=True):
            axes.text(k, height, name, ha="center", va="center", bbox=circle)
    axes.set_axis_off()


if __name__ == "__main__":
    tyro.cli(main)
