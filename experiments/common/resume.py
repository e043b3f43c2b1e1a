"""What `--resume` does: an experiment stores what it has trained, and goes on from what is stored.

Everything is in the folder `resume` of `--out`, and belongs to one set of flags.
"""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from experiments.common.files import whole

T = TypeVar("T")
FREE = {"out", "resume"}  # flags that change no number


class Resumed:
    """The stored parts of an experiment; without `--resume` nothing is stored."""

    def __init__(self, name: str, flags: Mapping[str, Any]):
        """Opens the folder of the experiment; refuses one that other flags have written.

        Args:
          name: the experiment.
          flags: all flags of the experiment, `out` and `resume` among them.
        """
        self._folder = flags["out"] / "resume" / name if flags["resume"] else None
        if self._folder is None:
            return
        flags = {flag: repr(value) for flag, value in flags.items() if flag not in FREE}
        stored = self.load("flags")
        for flag, value in flags.items():
            if stored is not None and stored.get(flag) != value:
                raise ValueError(
                    f"resume: {self._folder} was written with {flag} = {stored.get(flag)}, and now "
                    f"{flag} is {value}. Use the same flags, another --out, or remove the folder?"
                )
        self.save("flags", flags)

    def checkpoints(self, name: str) -> Path | None:
        """The folder for the checkpoints of a run of `bp.fit`."""
        return None if self._folder is None else self._folder / name

    def part(self, name: str, make: Callable[[], T]) -> T:
        """What `make()` returns, or what it returned when it was stored."""
        stored = self.load(name)
        if stored is None:
            stored = make()
            self.save(name, stored)
        return stored

    def load(self, name: str) -> Any:
        """What was stored by this name, or None."""
        path = self._path(name)
        if path is None or not path.exists():
            return None
        return pickle.loads(path.read_bytes())

    def save(self, name: str, value: Any) -> None:
        """Stores something that pickle knows; the file is complete or not there."""
        path = self._path(name)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as unfinished:
            unfinished.write_bytes(pickle.dumps(value))

    def _path(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{name}.pickle"


NOT_RESUMED = Resumed("", {"resume": False})
