"""What the figures share: colours that a colour-blind reader can tell apart, and how they are saved.

Source of the colours: "Color Universal Design", Okabe, Ito, 2008.
"""

import os
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # figures go to files: no screen is needed

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
RED, SKY, PURPLE, BLACK = "#D55E00", "#56B4E9", "#CC79A7", "#000000"
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


def save(figure, path):
    """Saves the figure as a PNG, whole or not at all, and says where."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        figure.savefig(unfinished, format="png")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"figure saved as {path}")
