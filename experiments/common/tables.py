"""Numbers and columns as the printed tables show them."""

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Formats the rows of a table: the first column to the left, the others to the right.

    Each column is as wide as its widest cell, and two spaces stand between columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))


def spread(values: ArrayLike, form: str) -> str:
    """Formats the median with the lowest and the highest value, such as `2.0 (1.0-3.0)`.

    Where a number is negative, `to` stands between the two. What rounds to zero has no sign.
    """
    low, median, high = (f"{f(values):z{form}}" for f in (np.min, np.median, np.max))
    return f"{median} ({low}{' to ' if '-' in (low[0], high[0]) else '-'}{high})"
