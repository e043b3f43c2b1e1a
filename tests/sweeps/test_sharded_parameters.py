"""Parameters that are divided over devices: the numbers of one device, and what stays divided.

The process of pytest has one device. Another, with 8 simulated ones, runs what `on_meshes.py` has.
"""

from pathlib import Path

import pytest
from processes import assert_succeed, started

from jaxbp.training.kfac.inverses import _shares

SCRIPT = Path(__file__).with_name("on_meshes.py")


def assert_pass(*checks, optimised=False):
    assert_succeed(started(SCRIPT, *checks, optimised=optimised))


@pytest.mark.thorough
def test_a_gradient_is_divided_as_its_parameters():
    assert_pass("gradients_are_divided_as_their_parameters:explicit")


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["automatic", "explicit"])
def test_divided_parameters_in_each_call(mode):
    assert_pass(
        f"readings_are_divided_as_their_parameters:{mode}",
        f"blocks_of_two_matrices_take_two_sums:{mode}",
        f"kfac_shares_the_inversion:{mode}",
    )


@pytest.mark.thorough
def test_memory_falls_with_the_devices():
    assert_pass("memory_falls_with_the_devices:automatic", optimised=True)


@pytest.mark.thorough
def test_every_layer_takes_divided_parameters():
    assert_pass("every_layer_takes_divided_parameters:explicit")


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_inversions_are_shared_by_their_work(devices):
    stacks = [(3, 10), (1, 40), (12, 30)]  # so many matrices of a size
    owners = _shares(stacks, devices)
    assert [len(own) for own in owners] == [count for count, _ in stacks]
    work = [0] * devices
    for own, (_, size) in zip(owners, stacks, strict=True):
        for device in own:
            work[device] += size**3
    # No better than the largest matrix allows, and never worse than an even share and one more.
    assert max(work) <= sum(work) / devices + 40**3
    assert min(work) > 0
