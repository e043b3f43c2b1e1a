"""Writes PyTorch's own module cases with the library, and compares all numbers in float64.

For each case the outputs, and for a random cotangent the gradient of every input and of every
parameter, have to agree to 1e-10 of the largest value. Whatever differs is printed. Then a table
says how many cases of each module agree, differ, and cannot be written, and why. The exit status is
1 if any case differs. The dependencies are those of the extra `bench`.
"""

import os
from dataclasses import dataclass

# Thousands of small programs that run once: most of the time is compilation.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import tyro
from tqdm import tqdm

from experiments.common.flags import raise_wrong
from experiments.peers_suite import report


@dataclass(frozen=True)
class Config:
    """Compares the library with PyTorch, by PyTorch's own module cases."""

    only: tuple[str, ...] = ()
    """The names of the modules to run, such as Conv2d; all if there are none."""
    seed: int = 0
    """The seed of inputs and parameters."""
    write_readme: bool = False
    """Writes the counts into the README. Takes all modules."""


def main(config: Config) -> report.Counts:
    """Runs the cases, prints what differs and the table, and returns the counts."""
    cases, run = _import_suite()
    jax.config.update("jax_enable_x64", True)
    wrong = [
        f"only is {name}, which has no cases" for name in config.only if name not in cases.names()
    ]
    if config.write_readme:
        wrong += ["write-readme takes all modules: leave out only"] * bool(config.only)
        wrong += filter(None, [report.find_fault()])
    raise_wrong(wrong)
    outcomes = []
    with tqdm(config.only or cases.names(), unit="module") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            for case in cases.load(name, config.seed):
                outcomes.append(run(case))
                for line in outcomes[-1].wrong:
                    bar.write(f"{case}: {line}")
                if len(outcomes) % 200 == 0:
                    jax.clear_caches()  # every program maps memory, of which a process has a limit
    print(report.make_table(outcomes))
    counts = report.count(outcomes)
    if config.write_readme:
        report.write_line(report.make_line(counts))
    return counts


def _import_suite():
    """The parts of the suite that need PyTorch; raises an ImportError that says what to install."""
    try:
        from experiments.peers_suite import cases, running
    except ImportError as error:
        raise ImportError(
            f"{error}; it needs the extra `bench`: pip install -e '.[bench]'"
        ) from None
    return cases, running.run


if __name__ == "__main__":
    try:
        counts = main(tyro.cli(Config))
    except (ValueError, ImportError) as error:
        raise SystemExit(f"peers_suite: {error}") from None
    raise SystemExit(bool(counts.differ))
