"""Do runs survive a kill? Kills training processes at random moments, and compares the ends.

Two trainings store checkpoints: a network on the digits after each epoch, and a small GPT inside
its epochs. Each is killed by SIGKILL and started again, over and over: a third of the kills strike
while a checkpoint is being written, the others at any moment. Now and then the newest checkpoint is
truncated as well. When a run has ended, its parameters, state and records have to be those of a run
that was never killed, bit for bit.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax
import tyro
from tqdm import tqdm

import jaxbp as bp
from experiments import gpt
from experiments.common import data
from experiments.common.files import whole
from experiments.common.flags import raise_wrong, too_small

RESULT, CHECKPOINTS = "result.npz", "checkpoints"
DAMAGED = 0.1  # the share of kills after which the newest checkpoint is truncated too
WRITING = 1 / 3  # the share of kills that wait for a write in progress
LONGEST = 6.0  # seconds from the first new checkpoint to the kill
PATIENCE = 300.0  # seconds until a training process that stores nothing is given up


@dataclass(frozen=True)
class Config:
    """Kills training processes, starts them again, and compares how they end."""

    times: int = 100
    """The number of kills, half of them of each training."""
    seed: int = 0
    """The seed of the moments."""


def train_digits(folder: Path) -> bp.Fit:
    """Trains on the digits, with checkpoints after each epoch."""
    dataset = data.load(None, seed=0)
    net = bp.chain(bp.dense(64), bp.relu(), bp.dropout(0.2), bp.dense(len(dataset.class_names)))
    return bp.fit(
        net,
        bp.softmax_cross_entropy,
        optax.adam(1e-3),
        dataset.train,
        key=jax.random.key(0),
        held_out=dataset.validation,
        metric=bp.accuracy,
        patience=100,
        epochs=120,
        checkpoints=folder / CHECKPOINTS,
    )


def train_gpt(folder: Path) -> bp.Fit:
    """Trains a small GPT, with checkpoints after every five steps."""
    config = gpt.Config(blocks=2, features=32, heads=2, positions=32)
    characters, tokens = gpt.tokenize(gpt.reference_text())
    examples = gpt.draw_sequences(np.random.default_rng(0), tokens, 400, config.positions)
    return bp.fit(
        gpt.make_network(config, len(characters)),
        gpt.LOSS,
        optax.adamw(1e-3),
        examples,
        key=jax.random.key(0),
        epochs=3,
        batch_size=8,
        checkpoints=folder / CHECKPOINTS,
        checkpoint_every=(5, "steps"),
    )


TRAININGS: dict[str, Callable[[Path], bp.Fit]] = {"digits": train_digits, "gpt": train_gpt}


def child(name: str, folder: Path) -> None:
    """Trains, or goes on training, and writes how it ended."""
    run = TRAININGS[name](folder)
    arrays = bp.to_arrays({"params": run.params, "state": run.state, "records": run.records})
    with whole(folder / RESULT) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays)


def start(name: str, folder: Path) -> subprocess.Popen:
    """Starts a training process."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled")}
    command = [sys.executable, "-m", "experiments.kill", "--child", name, str(folder)]
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def undisturbed(name: str, folder: Path) -> dict[str, np.ndarray]:
    """How a training ends that nobody kills."""
    folder.mkdir()
    require_success(start(name, folder).wait(), folder)
    return dict(np.load(folder / RESULT))


def strike(name: str, folder: Path, rng: np.random.Generator) -> bool:
    """Starts a training and kills it at a random moment; returns whether it ended before that."""
    before, process = newest(folder), start(name, folder)
    writing = rng.random() < WRITING
    given_up = time.monotonic() + PATIENCE
    while newest(folder) == before and process.poll() is None:  # it has to get on
        if time.monotonic() > given_up:
            process.kill()
            raise RuntimeError(f"{name} stores nothing; see {folder.name}.log")
        time.sleep(0.005)
    moment = time.monotonic() + rng.uniform(0, LONGEST)
    while process.poll() is None and time.monotonic() < moment:
        time.sleep(0.002)
    while writing and process.poll() is None and not is_writing(folder):
        pass
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return False
    require_success(process.returncode, folder)
    return True


def newest(folder: Path) -> int:
    """The number of the newest checkpoint, or 0."""
    stored = folder / CHECKPOINTS
    names = [path.name for path in stored.iterdir()] if stored.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def is_writing(folder: Path) -> bool:
    """Whether a checkpoint is being written: its folder has a temporary name."""
    stored = folder / CHECKPOINTS
    return any("tmp" in path.name for path in stored.iterdir())


def truncate(folder: Path) -> None:
    """Truncates every file of the newest checkpoint, if there is one before it."""
    number = newest(folder)
    if number < 2:
        return
    for path in (folder / CHECKPOINTS / str(number)).rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


def require_success(status: int, folder: Path) -> None:
    """Raises if a training process ended by itself, but not well."""
    if status:
        log = folder.parent / f"{folder.name}.log"
        lines = log.read_text(errors="replace").splitlines()[-5:]
        raise RuntimeError(f"a training ended with status {status}:\n" + "\n".join(lines))


def differences(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[str]:
    """The names of the arrays that are not equal, bit for bit."""
    return [
        name
        for name in sorted({*got, *expected})
        if name not in got
        or name not in expected
        or got[name].dtype != expected[name].dtype
        or got[name].tobytes() != expected[name].tobytes()
    ]


def trial(name: str, times: int, rng: np.random.Generator, bar: tqdm) -> tuple[int, int, int]:
    """Kills one training so many times; returns the kills, the runs that ended, the equal ones."""
    kills = ended = equal = 0
    with tempfile.TemporaryDirectory() as place:
        expected = undisturbed(name, Path(place) / "undisturbed")
        while kills < times or ended == 0:
            folder = Path(place) / f"run{ended}"
            folder.mkdir(exist_ok=True)
            if kills >= times:  # the last run ends undisturbed
                require_success(start(name, folder).wait(), folder)
            elif not strike(name, folder, rng):
                kills += 1
                bar.update()
                if rng.random() < DAMAGED:
                    truncate(folder)
                continue
            wrong = differences(dict(np.load(folder / RESULT)), expected)
            ended, equal = ended + 1, equal + (not wrong)
            if wrong:
                bar.write(f"{name}, run {ended}: differs in {', '.join(wrong[:5])}")
    return kills, ended, equal


def main(config: Config) -> bool:
    """Runs the trial of each training, prints a table, and returns whether all ends were equal."""
    raise_wrong(too_small(config, times=2, seed=0))
    rng = np.random.default_rng(config.seed)
    with tqdm(total=len(TRAININGS) * (config.times // 2), unit="kill") as bar:
        rows = {name: trial(name, config.times // 2, rng, bar) for name in TRAININGS}
    print(f"{'training':10}{'kills':>8}{'runs that ended':>18}{'equal bit for bit':>20}")
    for name, (kills, ended, equal) in rows.items():
        print(f"{name:10}{kills:>8}{ended:>18}{equal:>20}")
    return all(ended == equal for _, ended, equal in rows.values())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]))
    else:
        try:
            well = main(tyro.cli(Config))
        except ValueError as error:
            raise SystemExit(f"kill: {error}") from None
        raise SystemExit(not well)
