"""Starts scripts of the tests in processes of their own, which have several (simulated) devices.

The processes of pytest have one device: JAX takes the number of devices when it starts.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

TESTS = Path(__file__).parent


def started(
    script: Path, *arguments: Any, devices: int = 8, optimised: bool = True
) -> subprocess.Popen:
    """A process with so many devices that runs a script, which can import what the tests can.

    Args:
      script: the script.
      *arguments: those of its command line.
      devices: the number of devices.
      optimised: whether the compiler does what it does for users, and not the little that the
        tests ask of it.
    """
    flags = "" if optimised else os.environ.get("XLA_FLAGS", "")
    own = {
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS))),
        "JAX_PLATFORMS": "cpu",  # which alone has simulated devices
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_succeed(*processes: subprocess.Popen) -> None:
    """Waits for processes, and fails with the output of the first that failed."""
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
