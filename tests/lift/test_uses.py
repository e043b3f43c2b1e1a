"""The table of uses: what was made of each use of each parameter, and what its norm has to form."""

import jax
import jax.numpy as jnp
import pytest
from functions import FUNCTIONS
from gpt import gpt, gpt_params
from jax import lax
from opened import Model, N, normal, tokens

import jaxbp as bp


def table(model):
    return bp.uses(model.lift()[0])


def short(uses):
    return [(use.path, use.operation, use.signal) for use in uses]


@pytest.mark.parametrize("how", ["unrolled", "scan", "scan and checkpoint"])
def test_a_transformer(how):
    params = gpt_params(blocks=2, width=8, vocabulary=11, length=5, stacked=how != "unrolled")
    model = Model(gpt(2, how), params, tokens(0, N, 5))
    uses = table(model)
    assert {use.path.split(".")[-1] for use in uses} == {
        "bias", "down", "gain", "head", "key", "out", "positions", "query", "table", "up", "value",
    }  # fmt: skip
    kinds = {
        "bias": {("add", "Bias")},
        "gain": {("mul", "Scale")},
        "positions": {("add", "Bias")},
        "table": {("gather", "Lookup"), ("dot_general", "Outer")},
    }
    for use in uses:
        name = use.path.split(".")[-1]
        assert (use.operation, use.signal) in kinds.get(name, {("dot_general", "Outer")}), use
        assert use.bytes_per_example == 0, use
        assert "gpt.py:" in use.source
    blocks = 1 if how != "unrolled" else 2
    assert len(uses) == 11 * blocks + 4
    lines = str(uses).splitlines()
    assert len(lines) == len(uses) + 1
    assert lines[0].split() == ["parameter", "operation", "signal", "norms", "source"]
    assert all("structured" in line and ".py:" in line for line in lines[1:])


def test_what_is_formed_is_counted():
    def f(p, x):
        h = x @ (p["normed"] / jnp.linalg.norm(p["normed"])) ** p["power"]
        return {"h": jnp.linalg.solve(jnp.eye(4) + p["solved"], h), "out": p["out"]}

    p = {
        "normed": normal(1, 3, 4),
        "power": jnp.array(2.0),
        "solved": normal(2, 4, 4) / 9,
        "out": normal(3, 5),
    }
    rows = table(Model(f, p, normal(0, N, 3), {"per_example": True}))
    bytes_of = {use.path: use.bytes_per_example for use in rows}
    assert bytes_of["out"] == 5 * 8
    assert {use.operation for use in rows if use.path == "out"} == {"output"}
    assert bytes_of["normed"] > 0
    assert bytes_of["power"] > 0
    assert bytes_of["solved"] >= 4 * 4 * 8
    assert "by example, 40 B" in str(rows)


def test_parameters_that_are_not_used_are_not_in_the_table():
    rows = table(FUNCTIONS["shared and transposed"]())
    assert {use.path for use in rows} == {"w", "b"}
    assert [use.operation for use in rows if use.path == "w"] == ["dot_general"] * 4
    assert {use.path for use in table(FUNCTIONS["stopped"]())} == {"w"}  # b and v are stopped
    assert short(table(FUNCTIONS["low rank"]()))[-1] == ("w", "dot_general", "Outer")


def test_parameters_in_branches_have_their_own_names():
    assert short(table(FUNCTIONS["branches"]())) == [
        ("a", "dot_general", "Outer"),
        ("b", "dot_general", "Outer"),
        ("c", "mul", "Scale"),
    ]


@pytest.mark.parametrize(
    ("name", "kind", "path"),
    [
        ("convolutions", "Conv", "groups"),
        ("convolutions", "Conv", "up"),
        ("experts", "Conv", "down"),
        ("rows, clipped", "Lookup", "table"),
        ("positions of a table", "Lookup", "bias"),
        ("side by side", "Outer", "v"),
        ("low rank", "Outer", "a"),
        ("axes of a product", "Outer", "k"),
        ("elementwise", "Scale", "features"),
        ("elementwise", "Bias", "positions"),
        ("in time", "Outer", "in"),
        ("stack of layers", "Outer", "w"),
    ],
)
def test_kinds(name, kind, path):
    rows = [use for use in table(FUNCTIONS[name]()) if use.path == path]
    assert kind in {use.signal for use in rows}
    if kind != "Bias" and path != "features":
        assert all(use.bytes_per_example == 0 for use in rows)


def test_names_of_parameters_that_are_used_together():
    def f(p, x):
        return x @ jnp.linalg.qr(p["a"] + p["b"])[0]

    rows = table(Model(f, {"a": normal(1, 3, 3), "b": normal(2, 3, 3)}, normal(0, N, 3)))
    assert [use.path for use in rows] == ["a", "b"]


def test_under_jit_and_checkpoint_the_place_is_that_of_the_user():
    @jax.jit
    def inner(x, w):
        return x @ w

    def f(p, x):
        return lax.scan(jax.checkpoint(lambda h, w: (inner(h, w), None)), x, p)[0]

    (row,) = table(Model(f, normal(1, 2, 3, 3), normal(0, N, 3)))
    assert "test_uses.py" in row.source
    assert "inner" in row.source
