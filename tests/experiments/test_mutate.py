"""Mistakes are planted where something is computed, and the tests are asked about each."""

import ast

import pytest

from experiments.mutate import __main__ as mutate
from experiments.mutate.operators import mutations


def changes(source):
    return [(mutation.operator, mutation.after) for mutation in mutations(source)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a + b", [("sign", "a - b")]),
        ("-a", [("sign", "a")]),
        ("a * b", [("factor", "a")]),
        ("0.5", [("factor", "1.0")]),
        ("x[n]", []),
        ("3", [("off by one", "4")]),
        ("sum(x, axis=0)", [("off by one", "1")]),
        ("a < b", [("off by one", "a <= b")]),
        ("x.T", [("transpose", "x")]),
        ("jnp.moveaxis(x, i, j)", [("transpose", "x")]),
        ("jnp.einsum('ni,no->io', x, d)", [("transpose", "jnp.einsum('ni,no->oi', x, d)")]),
        ("jnp.where(m, a, b)", [("mask", "a"), ("mask", "b")]),
        ("widened(x)", [("accumulation", "x")]),
        ("x.astype(d)", [("accumulation", "x")]),
        ("dot(x, preferred_element_type=d)", [("accumulation", "dot(x)")]),
        ("split_keys(key, n)", [("key", "(key,) * n")]),
        ("jax.random.split(key)", [("key", "(key, key)")]),
    ],
)
def test_a_mistake_of_each_kind(source, expected):
    assert changes(source) == expected


def test_text_messages_and_annotations_stay_as_they_are():
    source = '''
def f(x: "a + b" = None) -> dict[1, 2]:
    """Adds 1 + 2."""
    if x:
        raise ValueError(f"{1 + 2}", 1 + 2)
    "a + b"
'''
    assert mutations(source) == []


def test_the_rest_of_the_module_stays_as_it_is():
    source = "# Kept.\ndef f(a, b):\n    é = a  # kept too\n    return é + b\n"
    (mutation,) = mutations(source)
    assert mutation.line == 4
    assert mutation.source == source.replace("é + b", "(é - b)")
    ast.parse(mutation.source)


@pytest.mark.thorough
def test_a_mistake_is_seen_by_the_tests_and_no_file_is_changed(monkeypatch):
    path = mutate.path_of("layers.shapes")
    before = path.read_bytes()
    (mutation,) = (
        m
        for m in mutations(path.read_text(encoding="utf-8"))
        if m.operator == "off by one" and "reshaped(x, math.prod(x.shape[(2):]))" in m.source
    )
    monkeypatch.setattr(mutate, "tests_of", lambda name: ["tests/layers/test_layers.py"])
    outcome = mutate.try_tests("layers.shapes", mutation, float("inf"), thorough=False)
    assert outcome.seen
    assert "tests/layers/test_layers.py" in outcome.by
    assert path.read_bytes() == before


def test_tests_of_a_chapter_begin_with_those_of_a_similar_name():
    found = mutate.tests_of("layers.embeddings")
    assert found[0] == "tests/layers/test_embedding.py"
    assert "tests/layers/test_layers.py" in found
    assert mutate.tests_of("check") == ["tests/test_check.py"]
    assert all(map(mutate.tests_of, mutate.find_modules()))  # none would mean all that there are


def test_an_unknown_module_is_refused():
    with pytest.raises(ValueError, match=r"modules has layers\.dense; expected names such as"):
        mutate.main(mutate.Config(modules=("layers.dense",)))


def test_survivors_are_listed(capsys):
    (mutation,) = mutations("a + b")
    outcomes = [
        mutate.Outcome("layers.linear", mutation, True, "FAILED"),
        mutate.Outcome("layers.linear", mutation, False),
        mutate.Outcome("rules.direct", mutation, None),
    ]
    mutate.print_outcomes(outcomes)
    printed = capsys.readouterr().out
    assert "1 of 2 seen" in printed
    assert "1 of 2 mistakes were seen; 1 were not tried" in printed
    assert printed.endswith("  layers.linear, line 1, sign: a + b  ->  a - b\n")


@pytest.mark.thorough
def test_the_tests_start_without_a_mistake(monkeypatch):
    mutate.require_sound_tests("layers.shapes")
    monkeypatch.setattr(mutate, "path_of", lambda name: mutate.PACKAGE / "types.py")
    with pytest.raises(RuntimeError, match="the tests do not start, without any mistake"):
        mutate.require_sound_tests("layers.shapes")


def test_a_change_that_changes_nothing_survives(monkeypatch):
    source = mutate.path_of("layers.shapes").read_text(encoding="utf-8") + "# nothing"
    monkeypatch.setattr(mutate, "tests_of", lambda name: ["tests/experiments/test_programs.py"])
    same = mutations("1 + 2")[0]._replace(source=source)
    assert mutate.try_tests("layers.shapes", same, float("inf"), thorough=False).seen is False
