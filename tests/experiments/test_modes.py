"""The calls on several devices give the numbers of one device, in each mode of sharding."""

import subprocess
import sys

import pytest

from experiments.modes.run import largest_difference

# One process for many calls: a test process has one device, and cannot get more.
SOON = ["--networks", "MLP", "--calls", "reweighted, per layer", "--devices", "4"]
THOROUGH = [
    ["--networks", "convolutions", "--calls", "diagonal"],
    ["--networks", "GPT", "--calls", "fused"],
    ["--networks", "GPT", "--calls", "directional_derivatives"],
]


def run(*flags):
    command = [sys.executable, "-m", "experiments.modes", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_calls_are_right_on_several_devices():
    ended = run(*SOON, "--dtypes", "float64")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 programs, 0 are not right" in ended.stdout


@pytest.mark.thorough
@pytest.mark.parametrize("flags", THOROUGH, ids=" ".join)
def test_many_calls_are_right_on_several_devices(flags):
    ended = run(*flags, "--dtypes", "float64")
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_a_wrong_number_would_be_seen():
    assert largest_difference([1.0, 2.0], [1.0, 2.0]) == 0
    assert largest_difference([1.0, 2.0], [1.0, 2.1]) > 1e-2
    assert largest_difference([float("nan")], [1.0]) == float("inf")
