"""A table of all calls by modes, for several networks, on simulated devices.

Each call runs on one device, and on several in the automatic mode, in the explicit mode and in
`shard_map`. The table shows the largest difference between the two, relative to the largest entry
of an array, in float64 and in float32, and the collectives of the compiled program.
"""

import itertools
import sys
from dataclasses import dataclass
from typing import Annotated

import jax
import tyro
from tqdm import tqdm

from experiments.modes.calls import CALLS
from experiments.modes.networks import NETWORKS, make_subject
from experiments.modes.run import MODES, Trial

BOUNDS = {"float64": 1e-12, "float32": 1e-6}  # on the largest difference


@dataclass(frozen=True)
class Config:
    """Compares the calls on several devices with one device."""

    networks: tuple[str, ...] = tuple(NETWORKS)
    """The networks."""
    calls: Annotated[str, tyro.conf.arg(metavar="TEXT")] = ""
    """Only calls whose name contains this text."""
    dtypes: tuple[str, ...] = tuple(BOUNDS)
    """The dtypes."""
    devices: int = 8
    """The number of simulated devices."""


# The calls between examples need the operands of all; no other gathers anything.
BETWEEN_EXAMPLES = ("gram", "neural_tangent_kernel")


def main(config: Config) -> bool:
    """Prints the table; returns whether all is right."""
    jax.config.update("jax_num_cpu_devices", config.devices)
    calls = {name: make for name, make in CALLS.items() if config.calls in name}
    wrong = []
    total = len(config.networks) * len(calls) * len(config.dtypes)
    print(f"{'network':14}{'call':30}{'dtype':9}" + "".join(f"{mode:24}" for mode in MODES))
    with tqdm(total=total, unit="call", disable=None) as bar:
        for network, (call, make), dtype in itertools.product(
            config.networks, calls.items(), config.dtypes
        ):
            with jax.enable_x64(dtype == "float64"):
                subject = make_subject(network)
                trial = Trial(make(subject), subject, config.devices)
                cells = [_cell(run, trial, call, BOUNDS[dtype]) for run in MODES.values()]
            row = "".join(f"{text:24}" for text, _ in cells)
            bar.write(f"{network:14}{call:30}{dtype:9}{row}")
            wrong += [f"{network}, {call}, {dtype}: {fault}" for _, fault in cells if fault]
            bar.update()
    print(f"{total * len(MODES)} programs, {len(wrong)} are not right", *wrong, sep="\n")
    return not wrong


def _cell(run, trial, call, bound):
    """What the table shows of a call in one mode, and what is wrong with it, if anything."""
    try:
        difference, collectives = run(trial)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return "error", f"{run.__name__}: {type(error).__name__}: {lines[0]}"
    text = f"{difference:.0e} {' '.join(f'{n} {kind}' for kind, n in collectives.items())}"
    if not difference <= bound:
        return text, f"{run.__name__}: differs by {difference:.1e}"
    if collectives.keys() - {"all-reduce"} and call not in BETWEEN_EXAMPLES:
        return text, f"{run.__name__}: has {', '.join(collectives)}"
    return text, None


if __name__ == "__main__":
    sys.exit(not main(tyro.cli(Config)))
