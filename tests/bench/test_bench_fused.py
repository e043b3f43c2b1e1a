"""The benchmark of fused steps: its tables are complete, and it measures the same training."""

import jax
import numpy as np
import pytest

from experiments.bench.networks.gpts import Gpt
from experiments.bench.sections import fused
from experiments.common import measuring

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("as_shipped")]
TINY = Gpt(2, 16, 2, 6, 3, vocabulary=11, scanned=True, recomputed=True)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(measuring, "SAMPLE_SECONDS", 1e-6)


@pytest.mark.parametrize("name", fused.TABLES)
def test_a_table_has_each_optimizer_with_and_without_a_clip(name):
    rows = list(fused.TABLES[name].rows(TINY, 1, 0))
    assert [row.what for row in rows] == [
        "SGD, momentum", "SGD, momentum, clip", "Adam", "Adam, clip"
    ]  # fmt: skip
    assert all(row.ratio > 0 and row.problem is None for row in rows)


def test_both_steps_come_to_the_same():
    ordinary = fused._compiled(TINY, 0, fused.OPTIMIZERS["SGD, momentum"])
    ours = fused._compiled(TINY, 0, fused.OPTIMIZERS["SGD, momentum"], fused=True)
    for _ in range(2):
        states = [step.run()[0].params for step in (ours, ordinary)]
        for one, other in zip(*map(jax.tree.leaves, states), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
