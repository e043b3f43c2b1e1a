"""What the files must keep to: where autodiff may stand, which way imports run, who is tested."""

import ast
import graphlib
import importlib
import inspect
import itertools
from pathlib import Path

import cases
import pytest

import jaxbp as bp

PACKAGE = Path(bp.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
AUTODIFF = {
    "grad", "value_and_grad", "vjp", "jvp", "linearize", "linear_transpose", "linear_call",
    "jacfwd", "jacrev", "jacobian", "hessian", "custom_vjp", "custom_jvp", "custom_gradient",
    "closure_convert", "checkpoint", "remat", "ad", "autodiff",
}  # fmt: skip

# What each chapter may import of the package: itself, and chapters that stand above it here.
CHAPTERS = {
    "types": set(),
    "require": {"types"},
    "signals": {"types"},
    "combinators": {"types", "require", "signals"},
    "layers": {"types", "require", "signals", "combinators"},
    "outputs": {"types"},
    "readings": {"types", "signals"},
    "rules": {"types", "signals", "combinators", "layers", "readings"},
    "sweeps": {"types", "signals", "outputs", "readings", "rules"},
    "training": {"types", "signals", "outputs", "readings", "rules", "sweeps"},
    "check": {"types", "readings"},
}


def chapter_of(module):
    return module.split(".")[0]


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


@pytest.mark.parametrize("module", MODULES)
def test_autodiff_stays_in_the_check(module):
    # Pearlmutter's product is the forward derivative of the explicit sweep, which stays explicit.
    allowed = {"check": {"vjp", "jvp"}, "sweeps.curvature": {"jvp"}}
    assert autodiff_in(MODULES[module].read_text()) == allowed.get(module, set())


@pytest.mark.parametrize(
    "source",
    ["import jax\njax.grad", "from jax import vjp", "import jax\njax.lax.linear_transpose",
     "from jax.ad_checkpoint import checkpoint", "import jax.interpreters.ad"],
)  # fmt: skip
def test_autodiff_would_be_seen(source):
    assert autodiff_in(source)


def imports_of(source, module):
    """The modules of the package that a module imports, `a.b` for `jaxbp.a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["jaxbp", *module.split(".")][: -node.level or None] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *parts = name.split(".")
            if top == "jaxbp":
                # `from jaxbp.a.b import c` is of the module a.b, whatever c is.
                paths = itertools.accumulate(parts, lambda a, b: f"{a}.{b}")
                yield max((p for p in paths if p in MODULES), key=len, default=parts[0])


def runs_back(module, source):
    """The imports of a module that its chapter may not make."""
    if module.endswith("__init__"):
        # A chapter's __init__ hands on its own names, that of the package those of all.
        allowed = {chapter_of(module)} if "." in module else set(CHAPTERS)
    else:
        allowed = CHAPTERS[chapter_of(module)] | {chapter_of(module)}
    return {i for i in imports_of(source, module) if chapter_of(i) not in allowed}


def test_chapters_are_in_order():
    above = set()
    for chapter, may_import in CHAPTERS.items():
        assert may_import <= above, chapter
        above.add(chapter)
    assert above == {chapter_of(module) for module in MODULES} - {"__init__"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    assert not runs_back(module, MODULES[module].read_text())


@pytest.mark.parametrize(
    ("module", "source"),
    [("signals.kinds", "from jaxbp.layers.linear import dense"),
     ("readings.sums", "import jaxbp.rules.feedback"),
     ("layers.linear", "from jaxbp import sweeps"),
     ("combinators.wrap", "def f():\n    from ..training import fit"),
     ("signals.__init__", "from jaxbp.types import Layer"),
     ("types", "from . import check")],
)  # fmt: skip
def test_an_import_that_runs_back_would_be_seen(module, source):
    assert runs_back(module, source)


def test_no_module_imports_in_a_circle():
    graph = {
        module: set(imports_of(path.read_text(), module))
        for module, path in MODULES.items()
        if not module.endswith("__init__")
    }
    tuple(graphlib.TopologicalSorter(graph).static_order())


def defined_in(*names):
    """The public functions that modules define, those of all of its modules for a chapter."""
    found = {}
    for module in MODULES:
        if not module.endswith("__init__") and (module in names or chapter_of(module) in names):
            members = vars(importlib.import_module(f"jaxbp.{module}"))
            found |= {
                name: value
                for name, value in members.items()
                if inspect.isfunction(value)
                and value.__module__ == f"jaxbp.{module}"
                and name[0] != "_"
            }
    return found


# What modules share with each other and not with users.
INTERNAL = {
    *defined_in("signals.stacked", "signals.conv_windows", "signals.conv_products"),
    *defined_in("signals.conv_patches", "layers.dot_product"),
    *defined_in("layers.through_time", "layers.segments", "readings.costs"),
    "is_signal", "as_positions", "as_rows", "as_images", "joined", "each_row_once",
    "not_a_signal", "matrices", "require_rule", "wrong_state",
}  # fmt: skip


def public(*names):
    """The functions that modules or chapters define for users."""
    return defined_in(*names).keys() - INTERNAL


def made_by(layer):
    """The factories whose names stand in a layer's name."""
    return {
        part for part in layer.name.replace("(", " ").replace(")", " ").replace(",", " ").split()
    }


def test_every_layer_is_in_the_registry():
    named = set().union(*(made_by(case.make()) for case in cases.LAYERS.values()))
    # `masked` has tests of its own: its inputs are a pair.
    assert public("layers", "combinators") - {"masked"} <= named


def test_every_loss_is_in_the_registry():
    listed = {case.loss.name for case in cases.LOSSES.values()}
    there = {value.name for value in vars(bp.outputs).values() if isinstance(value, bp.Loss)}
    assert there | {f"weighted({name})" for name in there} <= listed


def test_every_reading_is_in_the_registry():
    of_answers = {"example_norms", "layer_norms", "directional_derivatives"}
    assert (public("readings") - of_answers) | {"keep"} == set(cases.READINGS)


def test_every_error_is_in_the_registry():
    assert public("outputs.errors") == set(cases.ERRORS)


def test_every_rule_is_in_the_registry():
    named = {part.split(",")[0] for name in cases.RULES for part in name.split(" of ")}
    assert public("rules") - {"alignment"} <= named


def test_every_kind_of_signal_is_in_the_registry():
    kinds = {
        name
        for name, value in vars(importlib.import_module("jaxbp.signals.kinds")).items()
        if inspect.isclass(value) and hasattr(value, "_fields")
    }
    assert kinds == {name.replace(",", "").split()[0] for name in cases.SIGNALS}


CHAPTERS_OF_USERS = ("signals", "combinators", "layers", "outputs", "readings", "rules")


def test_what_is_public_is_exported_and_documented():
    functions = defined_in(*CHAPTERS_OF_USERS)
    for name in public(*CHAPTERS_OF_USERS):
        assert getattr(bp, name) is functions[name]
    for name, value in vars(bp).items():
        if name[0] != "_":
            assert inspect.getdoc(value), name


def test_a_chapter_hands_on_what_the_package_does():
    for chapter in CHAPTERS:
        for name, value in vars(importlib.import_module(f"jaxbp.{chapter}")).items():
            if f"{chapter}.__init__" in MODULES and name[0] != "_" and not inspect.ismodule(value):
                assert getattr(bp, name) is value
