"""How the benchmark takes times, by a clock that stands still except in a run."""

import types

import numpy as np
import pytest

from experiments.common import measuring


class Clock:
    """A clock that only runs while `run` is called, which takes as long as its name says."""

    def __init__(self, seconds):
        self.seconds, self.now, self.calls = seconds, 0.0, []

    def perf_counter(self):
        return self.now

    def run(self, name):
        self.calls.append(name)
        self.now += self.seconds[name]


@pytest.fixture
def make_clock(monkeypatch):
    def make(**seconds):
        clock = Clock(seconds)
        monkeypatch.setattr(
            measuring, "time", types.SimpleNamespace(perf_counter=clock.perf_counter)
        )
        return clock

    return make


def test_runs_take_turns_in_reversed_order_every_other_round(make_clock):
    clock = make_clock(a=0.5, b=0.25)
    seconds = measuring.measure([lambda: clock.run("a"), lambda: clock.run("b")], 3)
    assert "".join(clock.calls) == "aabb" + "ab" + "ba" + "ab"
    np.testing.assert_allclose(seconds, [[0.5] * 3, [0.25] * 3])


def test_a_sample_of_a_short_run_is_many_calls_after_one_that_is_not_timed(make_clock):
    clock = make_clock(a=measuring.SAMPLE_SECONDS / 4)
    seconds = measuring.measure([lambda: clock.run("a")], 2)
    assert len(clock.calls) == 2 + 2 * (1 + 4)
    np.testing.assert_allclose(seconds, measuring.SAMPLE_SECONDS / 4)
