"""Lifted models on several devices: the numbers of one device, in three modes.

The process of pytest has one device. Another, with 8 simulated ones, runs `lifted_on_devices.py`.
"""

from pathlib import Path

import pytest
from processes import assert_succeed, started

SCRIPT = Path(__file__).with_name("lifted_on_devices.py")
# A loop over layers, and a table whose rows are looked up.
SOON = ["stack, checkpoint of turns", "rows, filled"]
# Of products, convolutions, experts, loops and libraries, one each; `lifted_on_devices.py NAME ...`
# compares any others.
LATE = [
    *("three operands", "standardised convolution", "routed experts", "loop in a loop"),
    *("blocks almost alike", "in time", "branches", "linen Dropout", "Equinox GRU"),
]


def assert_equal_on_devices(*names):
    assert_succeed(started(SCRIPT, *names, optimised=False))


@pytest.mark.thorough
@pytest.mark.parametrize("names", [SOON, LATE[:4], LATE[4:]], ids=", ".join)
def test_lifted_models_on_devices(names):
    assert_equal_on_devices(*names)
