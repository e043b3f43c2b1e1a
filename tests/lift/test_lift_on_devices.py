"""Lifted models on several devices: the numbers of one device, in three modes.

The process of pytest has one device. Another, with 8 simulated ones, runs `lifted_on_devices.py`.
"""

from pathlib import Path

import pytest
from processes import assert_succeed, started

SCRIPT = Path(__file__).with_name("lifted_on_devices.py")
# A loop over layers, and a table whose rows are looked up.
SOON = ["stack, checkpoint of turns", "rows, filled"]
# One of each kind; `lifted_on_devices.py NAME ...` compares any others.
LATE = [
    *("numbers", "three operands", "standardised convolution", "routed experts", "heads"),
    *("rows, clipped", "matrix functions", "own jvp", "stack of layers", "loop in a loop"),
    *("in time", "branches", "while without parameters"),
    *("linen LSTM", "linen Dropout", "Equinox attention", "Equinox GRU"),
]


def assert_equal_on_devices(*names):
    assert_succeed(started(SCRIPT, *names))


@pytest.mark.thorough
def test_some_lifted_functions_on_devices():
    assert_equal_on_devices(*SOON)


@pytest.mark.thorough
@pytest.mark.parametrize("name", LATE)
def test_every_lifted_model_on_devices(name):
    assert_equal_on_devices(name)
