"""Random networks are right, a wrong one is found, and a seed draws the same network again."""

import jax
import numpy as np
import pytest

from experiments.fuzz import __main__ as fuzz
from experiments.fuzz import checks, networks

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("as_shipped")]


def drawn(seed):
    rng = np.random.default_rng(seed)
    return checks.draw_trial(networks.draw(rng), rng, seed)


@pytest.mark.parametrize(
    "seed", [3, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(10, 30))]
)
def test_what_is_read_from_a_random_network_is_right(seed):
    assert fuzz.run(seed) == []


def test_a_seed_draws_the_same_network():
    assert drawn(5) == drawn(5)
    assert len({drawn(seed).drawn.source for seed in range(20)}) > 15


def test_every_combinator_and_input_is_drawn():
    sources = " ".join(drawn(seed).drawn.source for seed in range(450))
    for name in ("residual", "parallel", "gated", "repeat", "stack", "remat", "cast", "masked"):
        assert f"bp.{name}(" in sources
    for name in ("embedding", "tied_embedding", "conv", "max_pool", "attention", "recurrent"):
        assert f"bp.{name}(" in sources
    for name in ("lp_pool", "adaptive_pool", "resize", "fixed_norm", "local_response_norm"):
        assert f"bp.{name}(" in sources
    for name in ("reshape", "permute", "take", "pad", "prepend", "glu", "prelu", "scale"):
        assert f"bp.{name}(" in sources


@pytest.mark.thorough
@pytest.mark.parametrize("question", checks.QUESTIONS)
def test_a_wrong_answer_is_reported_with_the_command_that_repeats_it(monkeypatch, question):
    right = checks.QUESTIONS[question]

    def wrong(*arguments):
        return jax.tree.map(lambda a: 1.001 * a, right.ask(*arguments))

    trial = checks.Trial(
        networks.Drawn("bp.chain(bp.dense(2), bp.tanh())", (3,)),
        *("squared_error", "float64", "jit", (question,), 7),
    )
    assert checks.check(trial) == []
    monkeypatch.setitem(checks.QUESTIONS, question, right._replace(ask=wrong))
    found = checks.check(trial)
    assert found
    assert all("relative error 1.0e-03" in line for line in found)
    monkeypatch.setattr(fuzz, "draw_trial", lambda *_: trial)
    (report,) = fuzz.run(7)
    assert "bp.chain(bp.dense(2), bp.tanh())" in report
    assert "python -m experiments.fuzz --networks 1 --seed 7" in report


def test_the_command_stops_after_its_networks_and_refuses_wrong_flags(capsys, monkeypatch):
    monkeypatch.setattr(fuzz, "check", lambda trial: [])
    assert fuzz.main(fuzz.Config(networks=2)) == []
    assert "2 networks in" in capsys.readouterr().out
    with pytest.raises(ValueError, match="networks is 0; it takes at least 1"):
        fuzz.main(fuzz.Config(networks=0))
