"""Do the tests see a mistake? Plants one at a time and runs the tests of the chapter.

A mistake is a small change of one expression (see `operators`), drawn at random from all that are
possible in a module. If no test fails, the mistake has survived: either a test is missing, or the
change makes no difference, such as a larger batch in a loop. Survivors are printed with their line.

No file is changed: the tests import the changed module from memory. The tests of a chapter are run
until the first fails, by default the thorough ones included.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

import jaxbp
from experiments.common.flags import raise_wrong, too_small
from experiments.mutate.operators import Mutation, mutations

PACKAGE = Path(jaxbp.__file__).parent
ROOT = PACKAGE.parent
# Where the tests of a chapter stand, besides the folder or the file of its name.
OTHER_TESTS = {
    "forward": ["tests/sweeps"],
    "require": ["tests/layers", "tests/combinators", "tests/sweeps"],
    "sharding": ["tests/readings", "tests/sweeps", "tests/test_export.py"],
    "signals": ["tests/readings", "tests/layers", "tests/training/test_fused.py"],
    "sweeps": ["tests/outputs/test_errors.py"],  # curvature and kernels
    "types": ["tests/layers", "tests/sweeps"],
}
PATIENCE = 1200  # seconds for the tests of one mistake; a loop that does not end is a mistake seen


@dataclass(frozen=True)
class Config:
    """Plants mistakes in modules of the library, and lists those that the tests do not see."""

    modules: tuple[str, ...] = ()
    """The modules, such as layers.linear; by default all."""
    mutants: int = 5
    """The largest number of mistakes in each module."""
    seconds: float = 3600.0
    """No more mistakes are planted after this time."""
    jobs: int = 1
    """The number of test runs at a time."""
    seed: int = 0
    """The seed of the choice."""
    thorough: bool = True
    """Whether the thorough tests run too. Without them a survivor takes a minute instead of ten."""


class Outcome(NamedTuple):
    """What the tests said about a mistake.

    Attributes:
      module: the module, such as `layers.linear`.
      mutation: the mistake.
      seen: whether a test failed, or None if the mistake was not tried.
      by: the first test that failed.
    """

    module: str
    mutation: Mutation
    seen: bool | None
    by: str = ""


def main(config: Config) -> list[Outcome]:
    """Tries the mistakes, prints the survivors, and returns all outcomes."""
    raise_wrong(too_small(config, mutants=1, jobs=1, seed=0))
    names = config.modules or tuple(find_modules())
    if unknown := [name for name in names if not path_of(name).is_file()]:
        raise ValueError(f"modules has {', '.join(unknown)}; expected names such as layers.linear.")
    require_sound_tests(names[0])
    rng, planted = np.random.default_rng(config.seed), []
    for name in names:
        possible = mutations(path_of(name).read_text(encoding="utf-8"))
        few = rng.permutation(len(possible))[: config.mutants]
        planted += [(name, possible[i]) for i in sorted(few)]
    end = monotonic() + config.seconds
    with ThreadPoolExecutor(config.jobs) as pool, tqdm(total=len(planted), unit="mistake") as bar:
        tried = [pool.submit(try_tests, *one, end, thorough=config.thorough) for one in planted]
        for future in as_completed(tried):
            outcome = future.result()
            if outcome.seen is False:
                bar.write(f"survived: {outcome.module}, {outcome.mutation}")
            bar.update()
    outcomes = [future.result() for future in tried]
    print_outcomes(outcomes)
    return outcomes


def find_modules() -> list[str]:
    """The names of all modules with more than imports."""
    paths = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    return [".".join(path.with_suffix("").parts) for path in paths if path.stem != "__init__"]


def path_of(name: str) -> Path:
    """The file of a module."""
    return PACKAGE.joinpath(*name.split(".")).with_suffix(".py")


def tests_of(name: str) -> list[str]:
    """The test files of a module's chapter; those with a similar name come first."""
    chapter, stem = name.split(".")[0], name.split(".")[-1]
    places = [f"tests/{chapter}", f"tests/test_{chapter}.py", *OTHER_TESTS.get(chapter, [])]
    found = [path for place in places for path in files_in(ROOT / place)]
    near = [path for path in found if path.stem.removeprefix("test_")[:4] == stem[:4]]
    return list(dict.fromkeys(str(path.relative_to(ROOT)) for path in [*near, *found]))


def files_in(path: Path) -> list[Path]:
    """The test files of a folder, or the file itself; none if there is neither."""
    return [path] if path.is_file() else sorted(path.glob("test_*.py"))


def require_sound_tests(name: str) -> None:
    """Raises if the tests do not even start on a module without a mistake."""
    source = path_of(name).read_text(encoding="utf-8")
    run = run_tests(name, source, "--collect-only", str(ROOT / "tests"))
    if run.returncode != 0:
        last = "\n".join(run.stdout.splitlines()[-5:])
        raise RuntimeError(f"the tests do not start, without any mistake:\n{last}")


def try_tests(name: str, mutation: Mutation, end: float, *, thorough: bool) -> Outcome:
    """Runs the tests of a module's chapter on a mistake, until one fails."""
    if monotonic() > end:
        return Outcome(name, mutation, None)
    try:
        marks = "thorough or not thorough" if thorough else "not thorough"
        run = run_tests(name, mutation.source, "-m", marks, *tests_of(name))
    except subprocess.TimeoutExpired:
        return Outcome(name, mutation, True, "time")
    lines = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return Outcome(name, mutation, run.returncode != 0, lines[0] if lines else "import")


def run_tests(name: str, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest, with another source in the place of a module."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "--no-header", "--tb=no"]
    command += ["-p", "experiments.mutate.plugin"]
    with tempfile.TemporaryDirectory() as folder:
        mutant = Path(folder) / "mutant.json"
        content = {"module": f"jaxbp.{name}", "source": source, "path": str(path_of(name))}
        mutant.write_text(json.dumps(content), encoding="utf-8")
        return subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            env={**os.environ, "JAXBP_MUTANT": str(mutant)},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )


def print_outcomes(outcomes: list[Outcome]) -> None:
    """Prints how many mistakes of each module were seen, and all survivors."""
    tried = [outcome for outcome in outcomes if outcome.seen is not None]
    for name in dict.fromkeys(outcome.module for outcome in tried):
        of_module = [outcome for outcome in tried if outcome.module == name]
        print(f"{name:30} {sum(o.seen for o in of_module):3} of {len(of_module)} seen")
    survivors = [outcome for outcome in tried if not outcome.seen]
    print(
        f"\n{len(tried) - len(survivors)} of {len(tried)} mistakes were seen; "
        f"{len(outcomes) - len(tried)} were not tried. Survivors:"
    )
    for outcome in survivors:
        print(f"  {outcome.module}, {outcome.mutation}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except ValueError as error:
        raise SystemExit(f"mutate: {error}") from None
