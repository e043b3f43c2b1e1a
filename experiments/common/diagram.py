"""The diagram of one sweep: forward pass, cache, delta, signals and readings.

`python -m experiments.common.diagram` draws it anew for the README.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from experiments.common import figures
from experiments.common.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED

LAYERS = (3.1, 6.5, 9.9)  # the x of each layer's centre
FORWARD, CACHE, BACKWARD, SIGNAL, READING = 5.2, 4.05, 2.9, 1.55, 0.4  # the y of each row
LOSS = 13.1


def main(out: Path = Path("experiments/gallery")) -> None:
    """Draws the diagram of one sweep.

    Args:
      out: the folder of the picture.
    """
    figure, axes = plt.subplots(figsize=(10, 4.7))
    axes.set(xlim=(-0.1, 14.1), ylim=(-0.05, 5.95))
    axes.set_axis_off()
    rows = {"forward": FORWARD, "backward": BACKWARD, "signals": SIGNAL, "readings": READING}
    for name, y in rows.items():
        axes.text(0, y, name, va="center", weight="bold")
    for i, x in enumerate(LAYERS, 1):
        column(axes, x, i)
    starts, ends = (1.35, *[x + 0.9 for x in LAYERS]), (*[x - 0.9 for x in LAYERS], LOSS - 0.9)
    inputs = ("$x_0 = x$", "$x_1$", "$x_2$", "$y = x_3$")
    errors = ("$dx$", r"$\delta_1$", r"$\delta_2$", r"$\delta_3 = \partial E / \partial y$")
    for start, end, x, delta in zip(starts, ends, inputs, errors, strict=True):
        arrow(axes, (start, FORWARD), (end, FORWARD), BLUE)
        arrow(axes, (end, BACKWARD), (start, BACKWARD), RED)
        axes.text((start + end) / 2, FORWARD + 0.14, x, ha="center", color=BLUE)
        axes.text((start + end) / 2, BACKWARD + 0.14, delta, ha="center", color=RED)
    box(axes, LOSS, (FORWARD + BACKWARD) / 2, "loss\n$E(y, t)$", BLACK, height=3.1)
    choices = "mean gradient,\nper-example norms,\nKronecker factors, ..."
    axes.text(LOSS - 1.9, READING, choices, va="center", color=GREEN, linespacing=1.3)
    figures.save(figure, out / "sweep.png")


def column(axes: Axes, x: float, i: int) -> None:
    """The boxes of layer i, from its forward pass down to its readings."""
    box(axes, x, FORWARD, f"layer {i}\nby $W_{i}$", BLUE)
    box(axes, x, CACHE, "cache", ORANGE, width=1.2, height=0.45)
    box(axes, x, BACKWARD, f"layer {i}\nby $W_{i}$ or $B_{i}$", RED)
    box(axes, x, SIGNAL, rf"operands $x_{i - 1},\ \delta_{i}$", PURPLE, width=2.1, height=0.55)
    box(axes, x, READING, "read(signal)", GREEN, height=0.55)
    arrow(axes, (x, FORWARD - 0.42), (x, CACHE + 0.25), ORANGE)
    arrow(axes, (x, CACHE - 0.25), (x, BACKWARD + 0.42), ORANGE)
    arrow(axes, (x, BACKWARD - 0.42), (x, SIGNAL + 0.3), PURPLE)
    arrow(axes, (x, SIGNAL - 0.3), (x, READING + 0.3), GREEN)


def box(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    color: str,
    *,
    width: float = 1.7,
    height: float = 0.78,
) -> None:
    """A rounded box with its centre at (x, y)."""
    corner = x - width / 2, y - height / 2
    style = {"boxstyle": "round,pad=0.02,rounding_size=0.1", "linewidth": 1.4}
    axes.add_patch(
        FancyBboxPatch(corner, width, height, edgecolor=color, facecolor="none", **style)
    )
    axes.text(x, y, text, ha="center", va="center", color=color)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """An arrow between two points."""
    style = {
        "arrowstyle": "-|>",
        "mutation_scale": 12,
        "linewidth": 1.4,
        "shrinkA": 0,
        "shrinkB": 0,
    }
    axes.add_patch(FancyArrowPatch(start, end, color=color, **style))


if __name__ == "__main__":
    tyro.cli(main)
