"""Tables: rows of figures, and tables of rows in GitHub's markdown."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.bench.machine import on_gpu, peak_shares


class Row(NamedTuple):
    """One line of a table. Pairs are (ours, theirs); None means that there is no such figure."""

    case: str
    against: str
    wanted: str
    what: str | None = None
    ratio: float | None = None
    quartiles: tuple | None = None
    ms: tuple | None = None
    gemm_share: float | None = None
    peak_share: tuple | None = None
    temporary_bytes: tuple | None = None
    whole_bytes: tuple | None = None
    flop: tuple | None = None
    compile_s: tuple | None = None
    loss: tuple | None = None
    problem: str | None = None


class Table(NamedTuple):
    """What a table measures.

    Attributes:
      title: its heading.
      ratio: what is divided by what.
      rows: `rows(case, repeats, seed)` measures a case and yields its rows.
      cases: the cases on a CPU.
      gpu_cases: the cases on a GPU, which are large enough to fill it.
      note: a remark above the table.
      what: what tells the rows of a case apart.
    """

    title: str
    ratio: str
    rows: Callable
    cases: tuple
    gpu_cases: tuple
    note: str = ""
    what: str = "quantity"

    def choose_cases(self, *, quick):
        """The cases for this machine; a quick run has the first one alone."""
        cases = self.gpu_cases if on_gpu() else self.cases
        return cases[:1] if quick else cases


def fill(row, ratios, ours, theirs, *programs, products=None):
    """The row with its figures.

    Args:
      row: what was measured.
      ratios: the ratio of every round.
      ours: our seconds of every round.
      theirs: the peer's.
      *programs: ours and the peer's, where they have a memory, FLOP and time to compile.
      products: FLOP of the matrix products in each run.
    """
    low, middle, high = map(float, np.quantile(ratios, [0.25, 0.5, 0.75]))
    return row._replace(
        ratio=middle,
        quartiles=(low, high),
        ms=tuple(1e3 * float(np.median(seconds)) for seconds in (ours, theirs)),
        peak_share=peak_shares(products, ours, theirs) if products else None,
        temporary_bytes=tuple(program.temporary_bytes for program in programs),
        flop=tuple(program.flop for program in programs),
        compile_s=tuple(program.compile_s for program in programs),
    )


def describe_problem(error):
    """Why there is no figure, for the table."""
    if isinstance(error, ModuleNotFoundError):
        package, *_ = (error.name or str(error)).split(".")
        return f"{package} is not installed"
    return f"failed: {type(error).__name__}: {error}".splitlines()[0].replace("|", "/")


def to_markdown(table, rows, *, quick=False):
    """The table with its heading and notes; a column without any figure is left out."""
    columns = {
        "network": [row.case for row in rows],
        table.what: [row.what or "" for row in rows],
        "against": [row.against for row in rows],
        f"{table.ratio} (quartiles)": [show_ratio(row) for row in rows],
        "wanted": [row.wanted for row in rows],
        "ms": [show_pair(row.ms) for row in rows],
        "of a GEMM's rate": [f"{row.gemm_share:.0%}" if row.gemm_share else "" for row in rows],
        "of the TF32 peak": [show_shares(row.peak_share) for row in rows],
        "temporary MB": [show_pair(row.temporary_bytes, 1e-6) for row in rows],
        "arguments, outputs and temporaries, MB": [
            show_pair(row.whole_bytes, 1e-6) for row in rows
        ],
        "MFLOP": [show_pair(row.flop, 1e-6) for row in rows],
        "to compile, s": [show_pair(row.compile_s) for row in rows],
        "final loss": [show_pair(row.loss) for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [shown, ["---"] * len(shown), *zip(*shown.values(), strict=True)]
    parts = [
        f"#### {table.title}",
        table.note,
        "**A quick run: only the first case of the table.**" if quick else "",
        "\n".join(f"| {' | '.join(cells)} |" for cells in lines),
    ]
    return "\n\n".join(part for part in parts if part)


def show_ratio(row):
    if row.problem:
        return row.problem
    low, high = row.quartiles
    return f"**{row.ratio:.2f}** ({low:.2f}-{high:.2f})"


def show_shares(pair):
    return " / ".join(f"{share:.0%}" for share in pair or ())


def show_pair(pair, scale=1):
    """`ours / theirs` in three digits; `ours` alone if there is no other."""
    values = [f"{float(f'{scale * value:.3g}'):,g}" for value in pair or () if value is not None]
    return " / ".join(values)
