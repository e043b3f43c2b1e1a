"""Quotes: what the README says is what was recorded, and records are what the experiments found."""

import json
import time

import pytest

from experiments import quote


def test_the_readme_quotes_what_is_recorded():
    text = quote.README.read_text(encoding="utf-8")
    assert quote.written(text) == text


def test_every_quote_has_a_record_with_its_date():
    assert quote.records().keys() == quote.QUOTES.keys()
    for found in quote.records().values():
        assert len(found["date"].split("-")) == 3


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A README and records of their own, and an experiment that takes no time."""
    for name in ("README", "RECORDS"):
        path = tmp_path / getattr(quote, name).name
        path.write_bytes(getattr(quote, name).read_bytes())
        monkeypatch.setattr(quote, name, path)
    monkeypatch.setattr(quote, "GALLERY", tmp_path / "gallery")
    found = {"accuracies": [0.25, 0.75]}
    fake = quote.QUOTES["multilayer"]._replace(measure=lambda out: found)
    monkeypatch.setitem(quote.QUOTES, "multilayer", fake)
    return tmp_path


def test_a_measured_quote_is_recorded_and_written(copied):
    before = quote.README.read_text(encoding="utf-8")
    quote.main(quote.Config(("multilayer",), out=copied / "out"))
    after = quote.README.read_text(encoding="utf-8")
    assert "accuracy on the half-moons from 25% to 75%" in after
    stored = json.loads(quote.RECORDS.read_text(encoding="utf-8"))
    assert stored["multilayer"]["numbers"] == {"accuracies": [0.25, 0.75]}
    changed = set(after.splitlines()) ^ set(before.splitlines())
    assert len(changed) == 2


def test_pictures_of_the_same_run_replace_those_of_the_gallery(copied):
    (copied / "gallery").mkdir()
    (copied / "out").mkdir()
    for folder, text in (("gallery", "old"), ("out", "new")):
        (copied / folder / "curve.png").write_text(text)
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
    with pytest.raises(ValueError, match="names has gpt2; it takes some of perceptron, multi"):
        quote.main(quote.Config(("gpt2",)))
    quote.README.write_text("nothing")
    with pytest.raises(ValueError, match="needs `<!-- quote: perceptron -->`"):
        quote.main(quote.Config())
