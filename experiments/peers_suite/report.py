"""The table of the cases, and the line in the README that has the sums."""

import datetime
import importlib.metadata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from experiments.common.files import whole

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- peers_suite -->", "<!-- end peers_suite -->"


class Outcome(NamedTuple):
    """What came of one case.

    Attributes:
      module: the name of the module.
      wrong: what differs from PyTorch, or what was raised; empty if nothing is.
      reason: why the case cannot be written, or None.
    """

    module: str
    wrong: tuple[str, ...] = ()
    reason: str | None = None


class Counts(NamedTuple):
    """How many cases there are, and what came of them."""

    cases: int
    agree: int
    differ: int
    cannot: int


def count(outcomes: Iterable[Outcome]) -> Counts:
    """Counts outcomes."""
    outcomes = list(outcomes)
    differ = sum(bool(outcome.wrong) for outcome in outcomes)
    cannot = sum(outcome.reason is not None for outcome in outcomes)
    return Counts(len(outcomes), len(outcomes) - differ - cannot, differ, cannot)


def make_table(outcomes: list[Outcome]) -> str:
    """A line for each module and one for all, and then the reasons with the modules they are of."""
    names = list(dict.fromkeys(outcome.module for outcome in outcomes))
    rows = [(name, *count(o for o in outcomes if o.module == name)) for name in names]
    rows.append(("all", *count(outcomes)))
    width = max(len(name) for name, *_ in rows)
    head = f"{'module':<{width}} {'cases':>6} {'agree':>6} {'differ':>6} {'cannot be written':>18}"
    lines = [f"{name:<{width}} {a:>6} {b:>6} {c:>6} {d:>18}" for name, a, b, c, d in rows]
    return "\n".join([head, *lines, *_reasons(outcomes)])


def make_line(counts: Counts) -> str:
    """The README's sentence."""
    versions = " and ".join(
        f"{name} {importlib.metadata.version(package).partition('+')[0]}"  # without `+cpu`
        for name, package in (("PyTorch", "torch"), ("JAX", "jax"))
    )
    return (
        f"Of the {counts.cases:,} cases in PyTorch's own tests of its modules, {counts.agree:,} "
        f"agree to 1e-10, {counts.differ:,} differ, and {counts.cannot:,} cannot be written "
        f"({versions}, {datetime.date.today():%B %Y}; `python -m experiments.peers_suite`)."
    )


def find_fault(readme: Path = README) -> str | None:
    """What prevents `write_line` from finding its place, or None."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END):
        return None
    return f"write-readme needs `{BEGIN}` and, after it, `{END}` once each in {readme}"


def write_line(line: str, readme: Path = README) -> None:
    """Replaces what stands between the markers, and nothing else."""
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    with whole(readme) as unfinished:
        unfinished.write_text(f"{before}{BEGIN}{line}{END}{after}", encoding="utf-8")


def _reasons(outcomes):
    """Why cases cannot be written: the reason, how many cases, and of which modules."""
    counted = Counter(outcome.reason for outcome in outcomes if outcome.reason is not None)
    if not counted:
        return
    yield "\nCannot be written, because"
    for reason, n in counted.most_common():
        names = dict.fromkeys(o.module for o in outcomes if o.reason == reason)
        yield f"{n:>5}  {reason}: {', '.join(names)}"
