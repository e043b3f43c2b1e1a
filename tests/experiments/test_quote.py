"""Quotes: what the README says is what was recorded, and records are what the experiments found."""

import datetime
import json
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import alignment, curvature, ensemble, gpt, mislabeled, private
from experiments.explorer import __main__ as explorer
from experiments.quote import __main__ as quote
from experiments.quote import text


def test_the_readme_quotes_what_is_recorded():
    readme = text.README.read_text(encoding="utf-8")
    assert text.written(readme, quote.QUOTES) == readme


def test_every_part_is_written_from_its_record_alone():
    readme = text.README.read_text(encoding="utf-8")
    empty, count = re.subn(
        r"(<!-- quote: ([^>]+) -->\n).*?(<!-- end quote: \2 -->)",
        r"\1wrong\n\3",
        readme,
        flags=re.S,
    )
    parts = [part for own in quote.QUOTES.values() for part in own.parts]
    assert count == len(parts) == len(set(parts))
    assert text.written(empty, quote.QUOTES) == readme


def test_every_quote_has_a_record_with_its_date():
    assert text.records().keys() == quote.QUOTES.keys()
    for found in text.records().values():
        days = found["date"].split(" to ")
        assert days == [str(datetime.date.fromisoformat(day)) for day in days]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A README and records of their own, and an experiment that takes no time."""
    for name in ("README", "RECORDS"):
        path = tmp_path / getattr(text, name).name
        path.write_bytes(getattr(text, name).read_bytes())
        monkeypatch.setattr(text, name, path)
    monkeypatch.setattr(text, "GALLERY", tmp_path / "gallery")
    found = {"accuracies": [0.25, 0.75]}
    fake = quote.QUOTES["multilayer"]._replace(measure=lambda out: found)
    monkeypatch.setitem(quote.QUOTES, "multilayer", fake)
    return tmp_path


def test_a_measured_quote_is_recorded_and_written(copied):
    before = text.README.read_text(encoding="utf-8")
    quote.main(quote.Config(("multilayer",), out=copied / "out"))
    after = text.README.read_text(encoding="utf-8")
    assert "accuracy on the half-moons from 25% to 75%" in after
    stored = json.loads(text.RECORDS.read_text(encoding="utf-8"))
    assert stored["multilayer"]["numbers"] == {"accuracies": [0.25, 0.75]}
    changed = set(after.splitlines()) ^ set(before.splitlines())
    assert len(changed) == 2


def test_paragraphs_are_wrapped_and_tables_are_not():
    row, words = f"| {'cell ' * 40}|", "word " * 40
    lines = text.wrapped(f"{words}\n\n{row}\n{row}").split("\n")
    assert lines[2:] == ["", row, row]
    assert " ".join(lines[:2]) == words.strip()
    assert len(lines[0]) == 119


# What is recorded of an experiment, and what the README then says. The experiments are made up.


def said(name, out=Path("out")):
    """What the parts of a quote say of what its experiment finds, by their names."""
    own = quote.QUOTES[name]
    numbers = json.loads(json.dumps(own.measure(out)))
    return {
        part: " ".join(text.wrapped(write(numbers)).split()) for part, write in own.parts.items()
    }


def test_the_size_of_the_explorer_is_that_of_its_file(monkeypatch, tmp_path):
    def main(config):
        path = config.out / "explorer.html"
        path.write_bytes(b" " * 1_240_000)
        return path

    monkeypatch.setattr(explorer, "main", main)
    assert (
        said("explorer", tmp_path)["explorer"] == "The page is one file of 1.2 MB, without links."
    )


def test_mislabeled_counts_the_flipped_labels_of_every_seed(monkeypatch):
    def main(config):
        assert (config.out.name == text.OTHERS) == (config.model == "flax")
        seen.append(config.seed)
        given, original = np.zeros(80, int), np.zeros(80, int)
        original[:4] = 1
        scores = -np.arange(80.0)
        scores[4 - config.seed : 4] -= 80  # as many as the seed are not among the first suspects
        if config.model == "flax":
            scores = -scores
        return mislabeled.Ranking(dict.fromkeys(mislabeled.METHODS, scores), given, given, original)

    seen = []
    monkeypatch.setattr(mislabeled, "main", main)
    parts = said("mislabeled")
    assert seen == [0, 4, 3, 2, 1, 0]
    assert "flips 5% of the training labels of the digits, 4 labels" in parts["mislabeled"]
    assert (
        "4 of the first 60 suspects are flipped labels (0 to 4 over 5 seeds)" in parts["mislabeled"]
    )
    assert "early in training | 100.0% | 100.0% | 1.000 |" in parts["mislabeled"]
    assert "0 of the first 60 suspects by `el2n`" in parts["mislabeled flax"]


def test_private_has_the_means_of_its_seeds_and_a_run_in_flax(monkeypatch):
    def main(config):
        assert (config.out.name == text.OTHERS) == (config.model == "flax")
        return [0.5, 0.6] if config.model == "flax" else [0.9 - 0.1 * config.seed, 0.95]

    monkeypatch.setattr(private, "main", main)
    parts = said("private")
    assert "Gaussian noise | 70.0% |" in parts["private"]
    assert (
        "layers | 90.0% | 95.0% | | `flax`: Flax, lifted | 50.0% | 60.0% |" in parts["private flax"]
    )


def test_curvature_multiplies_the_steps_by_their_seconds(monkeypatch):
    def main(config):
        losses = np.array([[9.0, 0.0], [9.0, 9.0], [9.0, 0.0]])  # 1, never, 1
        slow = {"KFAC": 6.0, "SGD": 1.0, "Adam": 2.0}
        if config.task == "gpt":
            losses = losses + 9.0
        return {n: curvature.Result(None, 1.0, losses, np.array([s])) for n, s in slow.items()}

    monkeypatch.setattr(curvature, "main", main)
    monkeypatch.setattr(
        curvature, "make_problem", lambda config: curvature.Problem(*[None] * 7, 1, None)
    )
    parts = said("curvature") | said("curvature-others")
    assert "| KFAC | 1 | 6.00 | | SGD with momentum | 1 | 1.00 |" in parts["curvature"]
    assert "took 3.0 times as long" in parts["curvature others"]
    assert "| KFAC | 1 | 6000.0 | 6.00 |" in parts["curvature others"]
    assert "| Adam | never | 2000.0 | never |" in parts["curvature others"]


def test_alignment_says_how_far_the_rules_come(monkeypatch):
    def readers(best):
        angles = alignment.Angles(*[np.full((2, 3), 30.0)] * 3)
        names = alignment.EXACT, alignment.RANDOM, alignment.LAST
        accuracies = best, best - 0.1, 0.5
        return {
            name: alignment.Reader(None, np.array([mean - 0.01, mean + 0.01]), angles)
            for name, mean in zip(names, accuracies, strict=True)
        }

    angles = np.array([[80.0, 5.0, 10.0], [90.0, 5.0, 20.0], [95.0, 5.0, 60.0]])
    linear = {alignment.RANDOM: alignment.Line(None, angles)}
    found = alignment.Results(linear, readers(0.8))
    monkeypatch.setattr(alignment, "main", lambda config: found)
    monkeypatch.setattr(
        alignment, "learn_digits", lambda config: readers(0.01 * config.epochs - 0.1)
    )
    parts = said("alignment")
    assert "falls from 90 to 20 degrees" in parts["alignment linear"]
    assert "| feedback alignment | 70.0 ± 1.4 % | 30 |" in parts["alignment"]
    assert "| last layer only | 50.0 ± 1.4 % | - |" in parts["alignment"]
    assert "between 80.0 and 90.0 %, and the last is at 50.0 %" in parts["alignment later"]


def test_ensemble_has_a_row_for_every_width(monkeypatch):
    def main(config):
        assert (config.out.name == text.OTHERS) == (config.width < 64)
        seconds = {
            "at once": np.array([1.0, 2.0, 3.0]),
            "one by one": np.full(3, 128 / config.width),
        }
        return {name: ensemble.Way(None, 1, 0.0, each) for name, each in seconds.items()}

    monkeypatch.setattr(ensemble, "main", main)
    rows = said("ensemble")["ensemble"]
    assert "| 8 | 0.12 | 0.06 to 0.19 | | 64 | 1.00 | 0.50 to 1.50 |" in rows


def test_gpt_has_the_losses_the_noise_and_the_check(monkeypatch):
    def point(of_norms, of_all):
        return gpt.Point(1, 0.0, None, gpt.Noise(of_norms, 1.0), gpt.Noise(of_all, 1.0), 1.0)

    points = [point(2.0, 2.0), point(2.0, 6.0), point(2.0, 4.0)]
    losses = {"unigrams": 3.0, "bigrams": 2.5, "network": 1.25}
    parts = {"head": 1000, "stack": 234}
    result = gpt.Result(points, losses, "", parts, {"head": 1e-15, "stack": 3e-15})
    monkeypatch.setattr(gpt, "main", lambda config: result if config.check else None)
    parts = said("gpt")
    assert "It has 1,234 parameters and trains for 1,000 steps" in parts["gpt"]
    assert "| bigrams | 2.50 | | the GPT | 1.25 |" in parts["gpt"]
    assert "was 2.0 times as large (the median of 3 measurements" in parts["gpt noise"]
    assert "from 1.0 to 3.0). `--check`" in parts["gpt noise"]
    assert "difference was 3e-15" in parts["gpt noise"]


def test_times_are_those_of_the_commands(monkeypatch):
    def run(command, *, check):
        assert check
        clock[0] += len(command[2])

    clock = [0.0]
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    rows = said("times")["times"]
    assert "| [gpt](#gpt) | Does a small GPT learn to write," in rows
    assert "about its training? | 15 s |" in rows
    assert "the devices? | 19 s |" in rows


def test_pictures_of_the_same_run_replace_those_of_the_gallery(copied):
    (copied / "gallery").mkdir()
    (copied / "out").mkdir()
    for folder, content in (("gallery", "old"), ("out", "new")):
        (copied / folder / "curve.png").write_text(content)
    (copied / "out" / "other.png").write_text("new")
    (copied / "gallery" / "private.png").write_text("old")
    (copied / "out" / "private_digits.png").write_text("new")
    quote.replace_pictures(copied / "out", since=time.time() + 60)
    assert (copied / "gallery" / "curve.png").read_text() == "old"
    quote.replace_pictures(copied / "out", since=time.time() - 60)
    pictures = sorted((copied / "gallery").iterdir())
    assert [path.name for path in pictures] == ["curve.png", "private.png"]
    assert {path.read_text() for path in pictures} == {"new"}


def test_what_is_no_quote_is_refused(copied):
    with pytest.raises(
        ValueError, match="names has gpt2; it takes some of times, explorer, perceptron"
    ):
        quote.main(quote.Config(("gpt2",)))
    text.RECORDS.write_text("{}")
    with pytest.raises(ValueError, match=r"of times; run `python -m experiments\.quote times`"):
        quote.main(quote.Config())
    text.README.write_text("nothing")
    with pytest.raises(ValueError, match="needs `<!-- quote: times -->`"):
        quote.main(quote.Config())
