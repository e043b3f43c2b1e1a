"""The command: checks the flags, measures the sections, and prints and records their tables."""

import json as json_format
from pathlib import Path
from typing import Literal

import jax
from tqdm import tqdm

from experiments.bench import recorded
from experiments.bench.machine import describe_machine, long_rounds
from experiments.bench.sections import (
    convolutions,
    fused,
    gradient,
    health,
    lift,
    quantities,
    recurrence,
    rules,
    training,
    transformers,
)
from experiments.bench.tables import to_markdown
from experiments.common.files import whole

SECTIONS = {
    "gradient": gradient.TABLES,
    "training": training.TABLES,
    "quantities": quantities.TABLES,
    "rules": rules.TABLES,
    "transformers": transformers.TABLES,
    "convolutions": convolutions.TABLES,
    "recurrence": recurrence.TABLES,
    "lift": lift.TABLES,
    "fused": fused.TABLES,
    "health": health.TABLES,
}


def main(
    *,
    sections: tuple[Literal[*SECTIONS], ...] = tuple(SECTIONS),
    repeats: int = 15,
    quick: bool = False,
    seed: int = 0,
    json: Path | None = None,
    update: bool = False,
) -> None:
    """Measures the library against its peers and prints the tables of each section.

    Args:
      sections: which to measure.
      repeats: rounds for each figure. What takes seconds has a third as many, on a GPU a fifth.
      quick: only the first case of each table.
      seed: of weights and data.
      json: a file for the same figures, unrounded.
      update: replace the tables of these sections in experiments/README.md.
    """
    require_flags(sections, repeats, seed, json, update)
    environment = describe_machine()
    print(*(f"{name}: {what}  " for name, what in environment.items()), sep="\n")
    figures = {"environment": environment}
    for section in dict.fromkeys(sections):
        figures[section], shown = measure_section(section, repeats, quick, seed)
        if update:
            origin = describe_origin(section, environment, repeats, quick, seed)
            tables = "\n\n".join([origin, *shown])
            recorded.rewrite(section, jax.default_backend(), tables)
    if json is not None:
        with whole(json) as unfinished:
            unfinished.write_text(json_format.dumps(figures, indent=1))


def require_flags(sections, repeats, seed, json, update):
    """Ends the program, before any work, with a message that says everything that is wrong."""
    wrong = []
    unknown = [section for section in sections if section not in SECTIONS]
    if unknown or not sections:
        given = ", ".join(unknown) or "empty"
        wrong.append(f"sections is {given}; it takes some of {', '.join(SECTIONS)}")
    if repeats < 1:
        wrong.append(f"repeats is {repeats}; it takes at least 1")
    if not 0 <= seed < 2**32:
        wrong.append(f"seed is {seed}; it takes an integer in [0, 2^32)")
    if json is not None and not json.parent.is_dir():
        wrong.append(f"json is {json}; there is no directory {json.parent}")
    if json is not None and json.is_dir():
        wrong.append(f"json is {json}, which is a directory; it takes a file")
    if update and not unknown:
        wrong += recorded.find_faults(sections, jax.default_backend())
    if wrong:
        raise SystemExit(f"bench: {'; '.join(wrong)}.")


def measure_section(section, repeats, quick, seed):
    """The rows of each table by its name, and the tables in markdown, which are printed too."""
    rows, shown = {}, []
    for name, table in SECTIONS[section].items():
        cases = table.choose_cases(quick=quick)
        progress = tqdm(cases, desc=f"{section}, {name}", leave=False, disable=None)
        measured = [row for case in progress for row in table.rows(case, repeats, seed)]
        shown.append(to_markdown(table, measured, quick=quick))
        print(f"\n{shown[-1]}")
        rows[name] = [row._asdict() for row in measured]
    return rows, shown


def describe_origin(section, environment, repeats, quick, seed):
    """When, by which command and on what the figures of a section were measured, in markdown."""
    flags = [f"--sections {section}", *(["--quick"] if quick else []), f"--repeats {repeats}"]
    flags += [f"--seed {seed}"] if seed else []
    date = environment["date"].partition("T")[0]
    lines = [f"Measured on {date} by `python -m experiments.bench {' '.join(flags)}`:", ""]
    lines += [f"* {name}: {what}" for name, what in environment.items() if name != "date"]
    return "\n".join(
        [*lines, f"* rounds: {repeats}; {long_rounds(repeats)} for what takes seconds"]
    )
