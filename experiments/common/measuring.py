"""Measuring: compiled programs and their costs, times of runs in turns, and the machine."""

import importlib.metadata
import math
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

SAMPLE_SECONDS = 0.01
VERSIONS = (
    "jax", "jaxlib", "optax", "flax", "torch", "scikit-learn", "backpack-for-pytorch", "opacus",
    "jax-privacy", "biotorch", "equinox", "kfac-jax",
)  # fmt: skip


class Program(NamedTuple):
    """A compiled jax program, its inputs, and its costs where the compiler knows them."""

    compiled: Callable
    args: tuple
    compile_s: float
    temporary_bytes: int | None
    flop: float | None
    whole_bytes: int | None = None  # of arguments, outputs and temporaries

    def run(self):
        """Calls it and waits until it is done."""
        return jax.block_until_ready(self.compiled(*self.args))


def compile_program(function, *args, donate_argnums=()):
    start = time.perf_counter()
    compiled = jax.jit(function, donate_argnums=donate_argnums).lower(*args).compile()
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    # Not every backend has these analyses.
    temporary_bytes = getattr(memory, "temp_size_in_bytes", None)
    flop = cost.get("flops") if cost else None
    return Program(compiled, args, seconds, temporary_bytes, flop, memory and whole_bytes(memory))


def whole_bytes(memory):
    """The bytes of arguments, outputs and temporaries; what a program donates counts once."""
    in_and_out = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return in_and_out - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def make_program(make, *case):
    """The program that `make(*case)` returns, compiled or as a function and its arguments."""
    made = make(*case)
    return made if isinstance(made, Program) else compile_program(*made)


def measure(runs, repeats):
    """Seconds that a call of each run takes, [runs, repeats], where the runs take turns."""
    calls = []
    for run in runs:
        run()  # once, for what only the first call does
        start = time.perf_counter()
        run()
        calls.append(math.ceil(SAMPLE_SECONDS / (time.perf_counter() - start)))
    seconds = np.empty((len(runs), repeats))
    for r in range(repeats):
        order = range(len(runs)) if r % 2 == 0 else reversed(range(len(runs)))
        for i in order:
            if calls[i] > 1:
                runs[i]()
            start = time.perf_counter()
            for _ in range(calls[i]):
                runs[i]()
            seconds[i, r] = (time.perf_counter() - start) / calls[i]
    return seconds


def describe_environment():
    """What the figures were measured on, by what it is called."""
    return {
        "machine": f"{cpu_model()}, {cores()} cores; jax on {describe_device()}",
        "load before": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "versions": ", ".join(
            [f"python {platform.python_version()}", *(f"{v} {version(v)}" for v in VERSIONS)]
        ),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }


def describe_device():
    device = jax.devices()[0]
    is_cpu = device.platform == "cpu"
    return device.platform if is_cpu else f"{device.platform} ({device.device_kind})"


def cpu_model():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
