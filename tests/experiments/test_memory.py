"""Memory: the problems, the ways with equal gradients, and the error signals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbp as bp
from experiments import memory

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("as_shipped")]
TINY = {"width": 2, "delays": (4,), "symbols": 1, "steps": 2, "batch_size": 2, "seeds": 1}


def test_copy_shows_symbols_and_wants_them_back_after_the_delay(key):
    x, (wanted, weights) = memory.draw_copy(key, 3, 5, symbols=2)
    assert x.shape == (3, 9, memory.ALPHABET + 1)
    assert not np.any(x[:, 2:, :-1])
    assert x[0, :, -1].tolist() == weights[0].tolist() == [0] * 7 + [1] * 2
    np.testing.assert_array_equal(np.argmax(x[:, :2, :-1], axis=-1), wanted[:, -2:])


def test_adding_wants_the_sum_of_two_marked_numbers_at_the_last_step(key):
    x, (wanted, weights) = memory.draw_adding(key, 200, 12)
    numbers, marks = x[..., 0], x[..., 1]
    np.testing.assert_array_equal(marks.sum(axis=1), 2)
    assert not np.any(marks[:, 6:])
    np.testing.assert_allclose(wanted[:, -1, 0], (numbers * marks).sum(axis=1), rtol=1e-6)
    assert weights[0, :, 0].tolist() == [0] * 11 + [1]
    assert np.all(marks[:, :3].sum(axis=1) == 1)


def test_a_constant_prediction_has_the_loss_of_the_baseline(key):
    problems = memory.problems(memory.Config(symbols=3))
    for name, guess in (("copy", 0.0), ("adding", 1.0)):
        problem = problems[name]
        x, targets = problem.draw(key, 4000, 8)
        values, _ = problem.loss(jnp.full((*x.shape[:2], problem.outputs), guess), targets)
        # The standard error of the sum's variance is 2 %.
        assert float(np.mean(values)) == pytest.approx(problem.baseline, rel=0.1)
    assert problems["copy"].baseline == pytest.approx(3 * math.log(4))


def test_the_signal_of_a_linear_cell_has_its_gain_at_every_step(key):
    """Near zero, tanh is linear, and U is a rotation times the gain."""
    layer = bp.recurrent(
        bp.simple_rnn(8),
        recurrent_init=jax.nn.initializers.orthogonal(0.5),
        weight_init=jax.nn.initializers.zeros,
    )
    sizes = memory.signal_sizes(layer, key)
    np.testing.assert_allclose(sizes[1:10] / sizes[:9], 0.5, rtol=1e-4)


def known(problem, way):
    config = memory.Config(**TINY)
    problem, way = memory.problems(config)[problem], memory.ways(config)[way]
    return memory.learn(problem, way, 4, config).scores


def test_the_same_gradient_forwards_comes_to_the_same():
    want = known("adding", memory.BPTT)
    np.testing.assert_allclose(known("adding", memory.RTRL), want, rtol=1e-4)
    assert want.shape == (1,)
    assert np.isfinite(known("copy", memory.EPROP)).all()


def test_main_asks_for_every_way_and_saves_its_figure_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "STEPS_BACK", 5)
    monkeypatch.setattr(memory, "SIGNAL_WIDTH", 3)
    asked = []

    def learn(problem, way, delay, config):
        asked.append((problem.outputs, way.rule.name, way.horizon, delay))
        return memory.Learned(np.array([0.25]), {"w": np.zeros((1, 3))}, *[np.zeros((1, 8))] * 2)

    monkeypatch.setattr(memory, "learn", learn)
    known, signals = memory.main(memory.Config(**TINY, out=tmp_path / "new"))
    rules = [("exact", None), ("rtrl", None), ("exact", 8), ("snap1", None), ("eprop", None)]
    assert asked == [(outputs, *rule, 4) for outputs in (4, 1) for rule in rules]
    for by_way in known.values():
        assert set(by_way) == set(memory.STYLES)
        assert all(rows.shape == (1, 1) for rows in by_way.values())
    assert [len(sizes) for sizes in signals.values()] == [5] * 5
    saved = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert saved == ["memory.npz", "memory.png"]
    printed = capsys.readouterr().out
    assert "0.25 (0.25-0.25)" in printed
    assert "4 steps back" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"width": 0}, "width is 0; it takes at least 1"),
        ({"batch_size": 0, "seeds": 0}, "batch-size is 0; it takes at least 1; seeds is 0"),
        ({"delays": (8, 3)}, r"delays is \(8, 3\); it takes numbers of at least 4"),
        ({"learning_rate": 0.0}, "learning-rate is 0.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_flags_are_refused_before_any_work(flags, message, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        memory.main(memory.Config(**{**TINY, **flags}, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""
