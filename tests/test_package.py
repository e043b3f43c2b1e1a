"""What the files must keep to: where autodiff may stand, which way imports run, who is tested."""

import ast
import importlib
import inspect
from pathlib import Path

import cases
import pytest

import jaxbp as bp
from jaxbp import (
    cells,
    compose,
    convolution,
    credit,
    direct,
    embedding,
    errors,
    feedback,
    inner,
    layers,
    losses,
    moments,
    norms,
    pooling,
    readings,
    signals,
    wrap,
)

# Where the name in the package is that of the layer.
attention, recurrent = (
    importlib.import_module(f"jaxbp.{name}") for name in ("attention", "recurrent")
)

MODULES = sorted(Path(bp.__file__).parent.glob("*.py"))
AUTODIFF = {
    "grad", "value_and_grad", "vjp", "jvp", "linearize", "linear_transpose", "linear_call",
    "jacfwd", "jacrev", "jacobian", "hessian", "custom_vjp", "custom_jvp", "custom_gradient",
    "closure_convert", "checkpoint", "remat", "ad", "autodiff",
}  # fmt: skip

# What each module may import of the package; `__init__` has everything.
IMPORTS = {
    "types": set(),
    "stacked": set(),
    "windows": {"types"},
    "signals": {"stacked", "windows"},
    "products": {"types", "signals"},
    "patches": {"signals", "products"},
    "require": {"types"},
    "layers": {"types", "signals", "require"},
    "norms": {"types", "signals", "require"},
    "embedding": {"types", "signals", "require"},
    "convolution": {"types", "signals", "require", "windows", "products"},
    "pooling": {"types", "signals", "require", "windows", "products"},
    "attention": {"types", "signals", "require", "layers", "compose"},
    "cells": {"require"},
    "through_time": set(),
    "recurrent": {"types", "signals", "require", "compose", "cells", "through_time"},
    "compose": {"types", "signals", "require"},
    "wrap": {"types", "stacked", "signals", "require"},
    "feedback": {"types", "stacked"},
    "direct": {"types", "compose", "feedback"},
    "credit": {"feedback", "recurrent"},
    "losses": {"types"},
    "readings": {"types", "stacked", "signals", "products", "patches"},
    "moments": {"types", "signals", "readings", "patches"},
    "inner": {"types", "stacked", "signals", "readings", "products", "patches"},
    "errors": {"types"},
    "noise": {"types", "signals", "readings", "inner"},
    "backprop": {"types", "readings", "feedback"},
    "reweight": {"types", "stacked", "signals", "readings", "feedback"},
    "alignment": {"types", "signals", "readings", "compose", "recurrent", "feedback"},
    "curvature": {"readings", "backprop"},
    "kernel": {"stacked", "signals", "inner", "errors", "backprop"},
    "kfac": {"types", "stacked", "moments", "errors", "backprop"},
    "train": {"backprop", "readings", "feedback"},
    "watch": {"readings", "train", "types"},
    "fit": {"train", "types", "watch", "feedback"},
    "check": {"readings", "types"},
}


def names_of_jax(tree):
    """Every name that a module takes from jax: `jax.x`, `jax.y.x`, `from jax import x`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Name) and base.id == "jax":
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jax":
            yield from (node.module or "").split(".")
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (
                part for a in node.names if a.name.startswith("jax.") for part in a.name.split(".")
            )


def autodiff_in(source):
    return AUTODIFF & set(names_of_jax(ast.parse(source)))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_autodiff_stays_in_the_check(path):
    # Pearlmutter's product is the forward derivative of the explicit sweep, which stays explicit.
    allowed = {"check": {"vjp", "jvp"}, "curvature": {"jvp"}}
    assert autodiff_in(path.read_text()) == allowed.get(path.stem, set())


@pytest.mark.parametrize(
    "source",
    ["import jax\njax.grad", "from jax import vjp", "import jax\njax.lax.linear_transpose",
     "from jax.ad_checkpoint import checkpoint", "import jax.interpreters.ad"],
)  # fmt: skip
def test_autodiff_would_be_seen(source):
    assert autodiff_in(source)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_run_one_way(path):
    if path.stem == "__init__":
        return
    imported = {
        node.module.split(".")[1]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxbp.")
    }
    assert imported <= IMPORTS[path.stem]


def public(module):
    """The public functions that a module itself defines."""
    return {
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    }


def made_by(layer):
    """The factories whose names stand in a layer's name."""
    return {
        part for part in layer.name.replace("(", " ").replace(")", " ").replace(",", " ").split()
    }


def test_every_layer_is_in_the_registry():
    named = set().union(*(made_by(case.make()) for case in cases.LAYERS.values()))
    layer_modules = (
        layers, norms, embedding, convolution, pooling, attention, cells, recurrent, compose, wrap,
    )  # fmt: skip
    there = set().union(*map(public, layer_modules))
    assert there - {"masked"} <= named  # whose inputs are a pair


def test_every_loss_is_in_the_registry():
    listed = {case.loss.name for case in cases.LOSSES.values()}
    there = {value.name for value in vars(losses).values() if isinstance(value, bp.Loss)}
    assert there | {f"weighted({name})" for name in there} <= listed


# What stands beside the readings in their modules, and is not one.
NOT_READINGS = {
    "example_norms", "layer_norms", "gram_is_less_work", "by_place_is_less_work",
    "each_row_once", "directional_derivatives",
}  # fmt: skip


def test_every_reading_is_in_the_registry():
    there = public(readings) | public(moments) | public(inner) | {"keep"}
    assert there - NOT_READINGS == set(cases.READINGS)


def test_every_error_is_in_the_registry():
    assert public(errors) == set(cases.ERRORS)


# What stands beside the rules in their modules, and is not one.
NOT_RULES = {"matrices", "require_rule", "wrong_state"}


def test_every_rule_is_in_the_registry():
    named = {part.split(",")[0] for name in cases.RULES for part in name.split(" of ")}
    assert (public(feedback) | public(direct) | public(credit)) - NOT_RULES <= named


def test_every_kind_of_signal_is_in_the_registry():
    kinds = {
        n
        for n, value in vars(signals).items()
        if inspect.isclass(value) and hasattr(value, "_fields")
    }
    assert kinds == {name.replace(",", "").split()[0] for name in cases.SIGNALS}


# What modules share with each other and not with users.
INTERNAL = {
    "gram_is_less_work", "by_place_is_less_work", "each_row_once", "is_signal",
    "as_positions", "as_images", "as_rows", "joined", "not_a_signal", *NOT_RULES,
}  # fmt: skip


def test_what_is_public_is_exported_and_documented():
    modules = (
        layers,
        norms,
        embedding,
        convolution,
        pooling,
        attention,
        cells,
        recurrent,
        compose,
        wrap,
        losses,
        readings,
        moments,
        inner,
        errors,
        signals,
        feedback,
        direct,
        credit,
    )
    for module in modules:
        for name in public(module) - INTERNAL:
            assert getattr(bp, name) is getattr(module, name)
    for name, value in vars(bp).items():
        if name[0] != "_" and not inspect.ismodule(value):
            assert inspect.getdoc(value), name
