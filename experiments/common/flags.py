"""Checks of the flags that most experiments share, made before any work is done."""

from pathlib import Path
from typing import Any


def wrong_flags(
    *, seed: int, out: Path, learning_rate: float | None = None, steps: int | None = None
) -> list[str]:
    """Returns a clause for each flag that is wrong, and one if `out` cannot be a directory."""
    wrong = []
    if not 0 <= seed < 2**32:
        wrong.append(f"seed is {seed}; it takes an integer in [0, 2^32)")
    if learning_rate is not None and not 0 < learning_rate <= 1000:
        wrong.append(f"learning-rate is {learning_rate}; it takes a number in (0, 1000]")
    if steps is not None and steps < 1:
        wrong.append(f"steps is {steps}; it takes at least 1")
    nearest = next(path for path in (out, *out.parents) if path.exists())
    if not nearest.is_dir():
        wrong.append(f"out takes a directory: {nearest} is a file")
    return wrong


def too_small(config: Any, **least: int) -> list[str]:
    """Returns a clause for each of these flags of `config` that is below its least value."""
    return [
        f"{name.replace('_', '-')} is {getattr(config, name)}; it takes at least {value}"
        for name, value in least.items()
        if getattr(config, name) < value
    ]


def raise_wrong(wrong: list[str]) -> None:
    """Raises a `ValueError` with all clauses, if there are any."""
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}.")


def require_flags(
    name: str, *, seed: int, learning_rate: float, out: Path, steps: int | None = None
) -> None:
    """Ends the program `name` with a message if any flag is wrong."""
    wrong = wrong_flags(seed=seed, out=out, learning_rate=learning_rate, steps=steps)
    if wrong:
        raise SystemExit(f"{name}: {'; '.join(wrong)}.")
