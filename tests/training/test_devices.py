"""Training on several devices, and in several processes: the numbers of one device, divided.

The processes of pytest have one device. Others run what `on_devices.py` has: JAX takes the number
of simulated devices when it starts.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

SCRIPT = Path(__file__).with_name("on_devices.py")


def started(devices, *arguments):
    """A process of so many simulated devices that runs the script."""
    flags = os.environ.get("XLA_FLAGS", "")
    settings = {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_succeed(*processes):
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output


@pytest.mark.parametrize(
    "checks",
    [
        (
            "each_device_computes_its_share",
            "bad_values_are_found",
            "runs_are_those_of_one_device",
        ),
        pytest.param(
            (
                "epochs_are_those_of_one_device",
                "epochs_inside_shard_map",
                "so_they_are_under_a_set_mesh",
                "runs_go_on_from_checkpoints",
                "parameters_stay_divided",
            ),
            marks=pytest.mark.thorough,
        ),
    ],
    ids=["runs", "all the rest"],
)
def test_eight_devices_agree_with_one(checks):
    assert_succeed(started(8, "devices", *checks))


@pytest.mark.thorough
def test_two_processes_agree_with_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    assert_succeed(*(started(2, "processes", port, process, tmp_path) for process in (0, 1)))
