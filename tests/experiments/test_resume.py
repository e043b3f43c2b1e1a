"""`--resume`, and the trial that kills training processes."""

from pathlib import Path

import numpy as np
import pytest

from experiments import kill, perceptron
from experiments.common.resume import Resumed


def flags(tmp_path, **others):
    return {"out": tmp_path, "resume": True, "seed": 0, **others}


def test_a_part_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"a": np.arange(3.0), "b": "text"}

    for _ in range(2):
        got = Resumed("experiment", flags(tmp_path)).part("first, one", make)
        np.testing.assert_array_equal(got["a"], np.arange(3.0))
        assert got["b"] == "text"
    assert len(made) == 1


def test_without_the_flag_nothing_is_stored(tmp_path):
    stored = Resumed("experiment", flags(tmp_path, resume=False))
    assert stored.part("a", lambda: 3) == 3
    assert stored.checkpoints("training") is None
    assert not list(tmp_path.iterdir())


def test_other_flags_are_refused(tmp_path):
    Resumed("experiment", flags(tmp_path))
    Resumed("experiment", flags(tmp_path))
    with pytest.raises(ValueError, match="written with seed = 0, and now seed is 1"):
        Resumed("experiment", flags(tmp_path, seed=1))


def test_an_experiment_does_not_train_again(tmp_path, monkeypatch, capsys):
    perceptron.main(steps=4, points=6, out=tmp_path, resume=True)
    first = capsys.readouterr().out
    descend = perceptron.descend

    def refuse(start, inputs, *args, **how):
        assert len(inputs) == 1  # the single step is not stored
        return descend(start, inputs, *args, **how)

    monkeypatch.setattr(perceptron, "descend", refuse)
    monkeypatch.setattr(perceptron, "hold_bias", lambda path, *args: path)
    monkeypatch.setattr(perceptron, "draw_training", lambda path, *args: perceptron.Figure())
    perceptron.main(steps=4, points=6, out=tmp_path, resume=True)
    assert capsys.readouterr().out == first


def test_the_trial_sees_a_difference():
    expected = {"a": np.zeros(2), "b": np.ones(3)}
    assert kill.differences(dict(expected), expected) == []
    assert kill.differences({**expected, "a": np.array([0.0, -0.0])}, expected) == ["a"]
    assert kill.differences({"a": expected["a"]}, expected) == ["b"]
    assert kill.differences({**expected, "b": np.ones(3, np.float32)}, expected) == ["b"]


def test_the_trial_truncates_the_newest_checkpoint(tmp_path):
    for number in ("9", "10", "11.orbax-checkpoint-tmp"):
        folder = tmp_path / kill.CHECKPOINTS / number / "arrays"
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"12345678")
    kill.truncate(tmp_path)
    sizes = {p.parent.parent.name: p.stat().st_size for p in Path(tmp_path).rglob("file")}
    assert sizes == {"9": 8, "10": 4, "11.orbax-checkpoint-tmp": 8}
    assert kill.is_writing(tmp_path)


@pytest.mark.thorough
def test_killed_runs_end_as_undisturbed_ones():
    assert kill.main(kill.Config(times=2))
