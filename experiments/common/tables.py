"""Numbers as the printed tables show them."""

import numpy as np
from jax.typing import ArrayLike


def spread(values: ArrayLike, form: str) -> str:
    """Formats the median with the lowest and the highest value, such as `2.0 (1.0-3.0)`."""
    low, median, high = (f"{f(values):{form}}" for f in (np.min, np.median, np.max))
    return f"{median} ({low}-{high})"
