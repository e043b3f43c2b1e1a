"""Everything in the registry runs with arrays that are divided over devices.

`experiments.modes` compares the numbers, for a few networks.
"""

from pathlib import Path

import pytest
from cases import N, late
from processes import assert_succeed, started

SCRIPT = Path(__file__).with_name("traces_on_devices.py")
SOON = ["conv", "embedding", "attention", "recurrent", "layer_norm", "group_norm at positions"]


def assert_traces(*arguments):
    assert_succeed(started(SCRIPT, *arguments, devices=N))


@pytest.mark.parametrize("mode", ["explicit", late("shard_map")])
def test_some_layers_trace_on_several_devices(mode):
    assert_traces(mode, "layers", *SOON)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("explicit", "layers"), ("explicit", "losses"), ("explicit", "rules"),
        ("shard_map", "layers"), ("shard_map", "losses"),
    ],
)  # fmt: skip
def test_all_trace_on_several_devices(mode, kind):
    assert_traces(mode, kind)
