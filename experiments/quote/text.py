"""The text of a quote: from its record, between its markers, into the README.

Each quote is a paragraph or a table between two comments, and a function that writes it from the
recorded numbers of an experiment. The records are in gallery/quoted.json. A test compares the text
with them.
"""

import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.files import whole

FOLDER = Path(__file__).parent.parent
README, GALLERY = FOLDER / "README.md", FOLDER / "gallery"
RECORDS = GALLERY / "quoted.json"
WIDTH = 120  # of the README's lines

SEEDS = range(5)  # of the quoted means
OTHERS = "others"  # a folder for runs whose pictures are not in the gallery


class Quote(NamedTuple):
    """What the README says of an experiment.

    Attributes:
      measure: `measure(out) -> numbers` runs the experiment; the numbers are for JSON.
      parts: by the name in the part's markers, `write(numbers) -> text`. In the text, DATE and LOAD
        stand for when the numbers were recorded and how busy the machine was.
    """

    measure: Callable[[Path], dict[str, Any]]
    parts: dict[str, Callable[[dict[str, Any]], str]]


def records() -> dict[str, Any]:
    """What was recorded, by the names of the quotes."""
    return json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}


def record(found: dict[str, Any]) -> None:
    """Adds records to those that are there, or replaces them."""
    text = json.dumps(dict(sorted({**records(), **found}.items())), indent=1)
    with whole(RECORDS) as unfinished:
        unfinished.write_text(f"{text}\n", encoding="utf-8")


def markers(name: str) -> tuple[str, str]:
    """The comments before and after a quote."""
    return f"<!-- quote: {name} -->", f"<!-- end quote: {name} -->"


def written(text: str, quotes: Mapping[str, Quote]) -> str:
    """The README with every quote as its record says."""
    found = records()
    for name, quote in quotes.items():
        for part, write in quote.parts.items():
            begin, end = markers(part)
            if not text.count(begin) == text.count(end) == 1:
                raise ValueError(f"README.md needs `{begin}` and `{end}` once each")
            if name not in found:
                raise ValueError(
                    f"nothing is recorded of {name}; run `python -m experiments.quote {name}`"
                )
            before, rest = text.split(begin)
            _, after = rest.split(end)
            own = write(found[name]["numbers"])
            own = own.replace("DATE", found[name]["date"]).replace("LOAD", load_of(found[name]))
            text = f"{before}{begin}\n{wrapped(own)}\n{end}{after}"
    return text


def load_of(found: dict[str, Any]) -> str:
    """How busy the machine was before the experiment, in words."""
    if "load" not in found:
        return "a load that was not recorded"
    return f"a load of {found['load']} on {found['cores']} cores"


def wrapped(text: str) -> str:
    """The text with its paragraphs, but not its tables, in lines of the README's width."""
    parts = text.split("\n\n")
    return "\n\n".join(part if part.startswith("|") else folded(part) for part in parts)


def folded(paragraph: str) -> str:
    return textwrap.fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)


def table(*rows: tuple[Any, ...]) -> str:
    """A table of Markdown; the first row is its heading."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
