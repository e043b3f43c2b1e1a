"""Training on several devices, and in several processes: the numbers of one device, divided.

Other processes than that of pytest run what `on_devices.py` has.
"""

import socket
from pathlib import Path

import pytest
from processes import assert_succeed, started

SCRIPT = Path(__file__).with_name("on_devices.py")


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
    assert_succeed(started(SCRIPT, "devices", *checks, optimised=False))


@pytest.mark.thorough
def test_two_processes_agree_with_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    assert_succeed(
        *(
            started(SCRIPT, "processes", port, process, tmp_path, devices=2, optimised=False)
            for process in (0, 1)
        )
    )
