"""Published architectures: loss, every gradient and per-example norms, as PyTorch computes them."""

from pathlib import Path

import numpy as np
import pytest
from architecture import fingerprint, problem_of, recorded, torch_values_of, values_of
from families import DEFAULT, FAMILIES
from jax.flatten_util import ravel_pytree
from oracles import assert_close

PLACES = [(family, name) for family in FAMILIES for name in FAMILIES[family]]
MARKED = [
    pytest.param(*place, marks=() if place[1] in DEFAULT else pytest.mark.thorough)
    for place in PLACES
]


@pytest.mark.parametrize(("family", "name"), MARKED)
def test_values_are_those_recorded_of_pytorch(family, name):
    got = fingerprint(values_of(problem_of(FAMILIES[family][name])))
    want = recorded(family)[name]
    assert min(want["norms"]) > 0
    for what in want:
        assert_close(np.array(got[what]), np.array(want[what]))


@pytest.mark.thorough
@pytest.mark.parametrize(("family", "name"), PLACES)
def test_values_are_those_of_pytorch(family, name):
    pytest.importorskip("torch", reason="needs the extra bench")
    problem = problem_of(FAMILIES[family][name])
    got, want = values_of(problem), torch_values_of(FAMILIES[family][name], problem)
    assert_close((got.losses, got.norms), (want.losses, want.norms))
    # One vector, whose largest entry is the measure: some gradients are zero but for rounding, such
    # as those of a bias before a norm.
    assert_close(*(ravel_pytree(values.gradients)[0] for values in (got, want)))
    assert list(map(np.shape, got.gradients)) == list(map(np.shape, want.gradients))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_is_recorded(family):
    assert set(recorded(family)) == set(FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_is_in_the_table(family):
    table = (Path(__file__).parents[2] / "experiments" / "README.md").read_text()
    for name, architecture in FAMILIES[family].items():
        assert f"| {name} | {architecture.source} |" in table
