"""Looks for wrong numbers: random networks, compared with autodiff and with the loop over examples.

Each network nests layers and combinators of the library at random. One batch goes through it, in
64, 32 or 16 bits, under `jit`, `vmap`, `scan`, `jax.checkpoint`, lifted by `bp.lift`, or
differentiated once more by `jax.grad`. Losses, gradients, per-example gradients, norms, second
moments, clipped sums, inner products and the derivative of the inputs have to agree with autodiff
of each example's loss.

Whatever is wrong is printed with the expression that makes the network and the command that runs it
again. The exit status is 1 if anything was wrong.
"""

from dataclasses import dataclass
from time import monotonic

import jax
import numpy as np
import tyro
from tqdm import tqdm

from experiments.common.flags import raise_wrong, too_small
from experiments.fuzz.checks import check, draw_trial
from experiments.fuzz.networks import draw


@dataclass(frozen=True)
class Config:
    """Compares random networks with autodiff until the time is over."""

    seconds: float = 60.0
    """The time to spend."""
    networks: int = 1_000_000
    """The largest number of networks."""
    seed: int = 0
    """The seed of the first network; the others count up from it."""


def main(config: Config) -> list[str]:
    """Runs the trials, prints what is wrong, and returns it."""
    raise_wrong(too_small(config, networks=1, seed=0))
    found, started, tried = [], monotonic(), 0
    with tqdm(unit="network", total=config.networks if config.networks < 1e6 else None) as bar:
        while tried < config.networks and monotonic() - started < config.seconds:
            seed = config.seed + tried
            found += run(seed, bar.write)
            tried += 1
            bar.update()
            if tried % 20 == 0:
                jax.clear_caches()  # every program maps memory, of which a process has a limit
    print(f"{tried} networks in {monotonic() - started:.0f} s: {len(found)} wrong")
    return found


def run(seed: int, write=print) -> list[str]:
    """Runs the trial of a seed; returns a report if anything is wrong, after writing it."""
    rng = np.random.default_rng(seed)
    trial = draw_trial(draw(rng), rng, seed)
    try:
        wrong = check(trial)
    except Exception as error:
        wrong = [f"raised {type(error).__name__}: {error}"]
    if not wrong:
        return []
    report = "\n".join(
        [
            f"seed {seed}: {trial}",
            *(f"    {line}" for line in wrong),
            f"    again: python -m experiments.fuzz --networks 1 --seed {seed}",
        ]
    )
    write(report)
    return [report]


if __name__ == "__main__":
    try:
        found = main(tyro.cli(Config))
    except ValueError as error:
        raise SystemExit(f"fuzz: {error}") from None
    raise SystemExit(bool(found))
