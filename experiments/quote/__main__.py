"""The figures that experiments/README.md quotes: recorded, and written from the record.

  python -m experiments.quote                    writes all quotes from the records
  python -m experiments.quote curvature memory   runs these experiments, records what they found,
                                                 and replaces their pictures

Numbers differ between machines, and times also between runs: a record says when it was made.
"""

import datetime
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments.common.files import whole
from experiments.common.measuring import cores
from experiments.quote import deciding, learning, text, times

QUOTES = times.QUOTES | learning.QUOTES | deciding.QUOTES


@dataclass(frozen=True)
class Config:
    """Writes the figures that experiments/README.md quotes from their records."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The experiments to run first."""
    out: Path = Path("out")
    """The folder for their figures."""


def main(config: Config) -> None:
    """Measures what is asked for, and writes every quote."""
    wrong = [name for name in config.names if name not in QUOTES]
    if wrong:
        raise ValueError(f"names has {', '.join(wrong)}; it takes some of {', '.join(QUOTES)}")
    for name in config.names:
        measured(name, config.out)
    before = text.README.read_text(encoding="utf-8")
    with whole(text.README) as unfinished:
        unfinished.write_text(text.written(before, QUOTES), encoding="utf-8")
    print(f"{sum(len(quote.parts) for quote in QUOTES.values())} quotes written to {text.README}")


def measured(name: str, out: Path) -> None:
    """Runs an experiment, records what it found, and replaces its pictures in the gallery."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    started = time.time()
    numbers = QUOTES[name].measure(out)
    about = {"date": datetime.date.today().isoformat(), "load": round(load), "cores": cores()}
    text.record({name: {**about, "numbers": numbers}})
    replace_pictures(out, since=started)


def replace_pictures(out: Path, since: float) -> None:
    """Copies the figures that were written since then over those of the gallery."""
    for picture in out.glob("*.png"):
        names = picture.name, picture.name.replace("_digits", "")
        places = [text.GALLERY / name for name in names if (text.GALLERY / name).exists()]
        if places and picture.stat().st_mtime >= since:
            shutil.copy(picture, places[0])


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"quote: {error}") from None
