"""Helpers for figures: colours that colour-blind readers can tell apart, saving, and the plane.

Source of the colours: "Color Universal Design", Okabe, Ito, 2008; but red is a red, and darker than
their green, from which it differs for every reader.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common.files import whole

mpl.use("Agg")  # figures are written to files, so no screen is needed

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
RED, SKY, PURPLE, BLACK = "#C4122F", "#56B4E9", "#CC79A7", "#000000"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK)

mpl.rcParams.update(
    {
        "axes.prop_cycle": mpl.cycler(color=CYCLE),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "legend.frameon": False,
        "savefig.dpi": 110,
    }
)


def save(figure: Figure, path: Path) -> None:
    """Saves the figure as a PNG and prints its path. An error leaves no half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as unfinished:
        figure.savefig(unfinished, format="png")
    print(f"figure saved as {path}")


def draw_plane(
    axes: Axes, inputs: ArrayLike, targets: ArrayLike, predict: Callable[[np.ndarray], ArrayLike]
) -> None:
    """Draws points of two classes, the regions that a model predicts, and the boundary.

    Args:
      axes: where to draw.
      inputs: the points, [N, 2].
      targets: the classes, [N, 1]: 1 for blue and 0 for red.
      predict: maps points [M, 2] to the probabilities that they are blue, [M, 1].
    """
    inputs, blue = np.asarray(inputs), np.asarray(targets)[:, 0] == 1
    low, high = inputs.min(axis=0) - 0.4, inputs.max(axis=0) + 0.4
    u, v = np.meshgrid(*np.linspace(low, high, 200).T)
    y_hat = np.asarray(predict(np.stack([u.ravel(), v.ravel()], axis=-1))).reshape(u.shape)
    axes.contourf(u, v, y_hat, levels=[-1, 0.5, 2], colors=[RED, BLUE], alpha=0.18)
    if y_hat.min() < 0.5 < y_hat.max():
        axes.contour(u, v, y_hat, levels=[0.5], colors=BLACK, linewidths=2)
    shared = {"s": 22, "edgecolors": "white", "linewidths": 0.6, "zorder": 3}
    axes.scatter(*inputs[blue].T, color=BLUE, marker="o", label="blue, $y = 1$", **shared)
    axes.scatter(*inputs[~blue].T, color=RED, marker="^", label="red, $y = 0$", **shared)
    axes.plot([], [], color=BLACK, linewidth=2, label=r"boundary, $\hat y = 1/2$")
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="$x_1$", ylabel="$x_2$")


def log_where_wide(*panels: Axes) -> bool:
    """Makes the y axes logarithmic if their lines span a decade or more, and linear otherwise.

    Returns whether they are logarithmic.
    """
    lines = [line for axes in panels for line in axes.get_lines()]
    values = np.concatenate([np.ravel(np.asarray(line.get_ydata(), float)) for line in lines])
    values = values[np.isfinite(values) & (values > 0)]
    wide = values.size > 0 and bool(values.max() >= 10 * values.min())
    for axes in panels:
        axes.set_yscale("log" if wide else "linear")
        if not wide:
            axes.set_ylim(bottom=0)
    return wide


def draw_line(axes: Axes, weight: np.ndarray, bias: ArrayLike, **style: Any) -> None:
    """Draws the line x . w + b = 0."""
    nearest = -bias * weight / (weight @ weight)
    axes.axline(nearest, nearest + np.array([-weight[1], weight[0]]), **style)
