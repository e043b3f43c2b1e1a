"""The benchmark of steps that are watched: both sides of its table are the same training."""

import numpy as np
import pytest

from experiments.bench.networks.gpts import Gpt
from experiments.bench.networks.perceptrons import Perceptron
from experiments.bench.sections import health
from experiments.common import measuring

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("as_shipped")]
CASES = {"perceptron": Perceptron((4, 5, 3), 6), "gpt": Gpt(2, 16, 2, 6, 3, vocabulary=11)}


@pytest.mark.parametrize("name", health.TABLES)
def test_the_watched_step_is_the_same_step_and_has_a_record(name, monkeypatch):
    monkeypatch.setattr(measuring, "SAMPLE_SECONDS", 1e-6)
    (row,) = health.TABLES[name].rows(CASES[name], 1, 0)
    assert row.ratio > 0
    assert row.problem is None
    programs = health.compile_steps(CASES[name], 0)
    for _ in range(2):
        (_, ours), (_, theirs) = (program.run() for program in programs)
        assert "health" in ours
        assert "health" not in theirs
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)
