"""A table of all calls by modes, for several networks, on simulated devices.

Each call runs on one device, and on several in the automatic mode, in the explicit mode and in
`shard_map`. The table shows the largest difference between the two, relative to the largest entry
of an array, in float64 and in float32, and the collectives of the compiled program.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import jax
import tyro
from tqdm import tqdm

from experiments.modes.calls import CALLS
from experiments.modes.networks import NETWORKS, make_subject
from experiments.modes.run import MODES

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


def main(config: Config) -> bool:
    """Prints the table; returns whether all differences are within their bounds."""
    jax.config.update("jax_num_cpu_devices", config.devices)
    calls = {name: make for name, make in CALLS.items() if config.calls in name}
    rows, well = [], True
    total = len(config.networks) * len(calls) * len(config.dtypes) * len(MODES)
    with tqdm(total=total, unit="program") as bar:
        for network in config.networks:
            for name, make in calls.items():
                cells = {}
                for dtype in config.dtypes:
                    with jax.enable_x64(dtype == "float64"):
                        for mode, run in MODES.items():
                            cells[dtype, mode] = _cell(run, make, network, config.devices)
                            bar.update()
                rows.append((network, name, cells))
    for network, name, cells in rows:
        parts = []
        for (dtype, mode), (difference, note) in cells.items():
            fits = difference <= BOUNDS[dtype]
            well &= fits
            parts.append(f"{mode} {dtype[-2:]}: {difference:.0e}{'' if fits else ' !'} {note}")
        print(f"{network:13}{name:30}", " | ".join(parts))
    print(f"{len(rows)} rows, {'all within the bounds' if well else 'some are not right'}")
    return well


def _cell(run, make, network, devices):
    """The difference of a call in one mode, and its collectives or its error."""
    try:
        subject = make_subject(network)
        difference, collectives = run(make(subject), subject, devices)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return float("inf"), f"{type(error).__name__}: {lines[0][:200]}"
    short = {"all-reduce": "r", "all-gather": "g", "reduce-scatter": "s", "all-to-all": "a"}
    return difference, " ".join(f"{n}{short.get(kind, 'p')}" for kind, n in collectives.items())


if __name__ == "__main__":
    sys.exit(not main(tyro.cli(Config)))
