"""Progress bars that say what takes time, also where the output is no terminal."""

import sys
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """A bar that is labelled `compiling` until its first update, and then with its own label.

    Outside of a terminal, every redrawing stays on the page: it is redrawn every five seconds.
    """

    def __init__(self, label: str, total: int, unit: str):
        """Shows the bar.

        Args:
          label: what is done after compiling.
          total: the number of updates.
          unit: what an update is, such as `epoch`.
        """
        self.label = label
        interval = 0.1 if sys.stderr.isatty() else 5.0
        super().__init__(desc="compiling", total=total, unit=unit, mininterval=interval)

    def update(self, n: float | None = 1) -> Any:
        """Counts, and shows the label."""
        self.set_description(self.label, refresh=False)
        return super().update(n)
