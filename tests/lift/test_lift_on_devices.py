"""Lifted models on several devices: the numbers of one device, in three modes.

The process of pytest has one device. Another, with 8 simulated ones, runs `lifted_on_devices.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

SCRIPT = Path(__file__).with_name("lifted_on_devices.py")
ROOT = SCRIPT.parents[2]
# A loop over layers, and a table whose rows are looked up.
SOON = ["stack, checkpoint of turns", "rows, filled"]
# One of each kind; `lifted_on_devices.py NAME ...` compares any others.
LATE = [
    *("numbers", "three operands", "standardised convolution", "routed experts", "heads"),
    *("rows, clipped", "matrix functions", "own jvp", "stack of layers", "loop in a loop"),
    *("in time", "branches", "while without parameters"),
    *("linen LSTM", "linen Dropout", "nnx attention", "Equinox GRU"),
]


def assert_equal_on_devices(*names):
    own = {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_ENABLE_X64": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
    }
    process = subprocess.run(
        [sys.executable, SCRIPT, *names], env={**os.environ, **own}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr


def test_some_lifted_functions_on_devices():
    assert_equal_on_devices(*SOON)


@pytest.mark.thorough
@pytest.mark.parametrize("name", LATE)
def test_every_lifted_model_on_devices(name):
    assert_equal_on_devices(name)
