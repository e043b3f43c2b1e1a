"""What the files must keep to: where autodiff may stand, which way imports run, who is tested."""

import ast
import graphlib
import importlib
import importlib.metadata
import inspect
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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
BASE = {"types", "sharding", "require"}
CHAPTERS = {
    "types": set(),
    "sharding": {"types"},
    "require": {"types"},
    "signals": {"types", "sharding"},
    "combinators": BASE | {"signals"},
    "layers": BASE | {"signals", "combinators"},
    "outputs": BASE,
    "readings": {"types", "sharding", "signals"},
    "forward": {"types", "require", "readings"},
    "explain": BASE | {"signals", "combinators", "outputs", "readings", "forward"},
    "lift": BASE | {"signals", "readings"},
    "rules": BASE | {"signals", "combinators", "layers", "readings", "forward"},
    "sweeps": BASE | {"signals", "outputs", "readings", "forward", "rules"},
    "training": BASE | {"signals", "outputs", "readings", "forward", "rules", "sweeps"},
    "check": {"types", "require", "signals", "readings"},
}


# What `import jaxbp` loads beyond its own modules, JAX, optax and chex.
ALSO_LOADED = {"jax.extend", "numpy.typing"}
IMPORT = """
import json, sys
import jax, optax, chex
before = set(sys.modules)
import jaxbp
print(json.dumps([jax._src.xla_bridge.backends_are_initialized(), *set(sys.modules) - before]))
"""


def chapter_of(module):
    return module.split(".")[0]


def test_the_import_loads_little_and_computes_nothing():
    command = [sys.executable, "-c", IMPORT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    has_device, *loaded = json.loads(done.stdout)
    assert not has_device  # an array at the top of a module would start the device
    public = (m for m in loaded if "._" not in m and m.partition(".")[0] != "jaxbp")
    others = {m for m in public if m.partition(".")[0] not in sys.stdlib_module_names}
    assert {m for m in others if not m.startswith("jax.extend.")} <= ALSO_LOADED


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
    # A layer inside a foreign program gets its derivative by custom_vjp, and lifted functions have
    # autodiff between their parameters. A convolution that vmap batches behind the examples has to
    # say that it is linear, an inverse that vmap computes one by one needs a rule, and so does the
    # largest magnitude, which `health` reads from bits.
    allowed = {
        "check.contract": {"vjp"},
        "check.derivatives": {"vjp", "jvp"},
        "sweeps.curvature": {"jvp"},
        "sweeps.differentiable": {"custom_vjp"},
        "lift.examples": {"vjp"},
        "lift.operation": {"vjp", "linear_transpose"},
        "readings.summaries": {"custom_jvp"},
        "signals.conv_products": {"custom_jvp"},
        "training.kfac.inverses": {"custom_jvp"},
    }
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


def module(name):
    return importlib.import_module(f"jaxbp.{name}")


OF_USERS = {  # what each module lists in `__all__`
    name: getattr(module(name), "__all__", ()) for name in MODULES if not name.endswith("__init__")
}


def public(*names):
    """The functions that modules list, those of all of its modules for a chapter."""
    return {
        function
        for name, listed in OF_USERS.items()
        if name in names or chapter_of(name) in names
        for function in listed
        if inspect.isfunction(getattr(module(name), function))
    }


def made_by(layer):
    """The factories whose names stand in a layer's name."""
    return {
        part for part in layer.name.replace("(", " ").replace(")", " ").replace(",", " ").split()
    }


def test_the_version_is_that_of_the_installed_package():
    assert bp.__version__ == importlib.metadata.version("jaxbp")


@pytest.mark.parametrize(
    ("name", "other"), [("layer_norm", "layer_norms"), ("weighted", "reweighted")]
)
def test_names_that_are_easily_confused_point_to_each_other(name, other):
    assert f"`{other}`" in inspect.getdoc(getattr(bp, name))
    assert f"`{name}`" in inspect.getdoc(getattr(bp, other))


def test_every_layer_is_in_the_registry():
    named = set().union(*(made_by(case.make()) for case in cases.LAYERS.values()))
    # With tests of their own: `masked`, whose inputs are a pair, and `freeze`, which is no factory.
    assert public("layers", "combinators") - {"masked", "freeze"} <= named


def test_every_loss_is_in_the_registry():
    listed = {case.loss.name for case in cases.LOSSES.values()}
    there = {value.name for value in vars(bp.outputs).values() if isinstance(value, bp.Loss)}
    made = {name.removeprefix("make_") for name in public("outputs") if "make_" in name}
    made -= {"accuracy"}
    assert there | made <= listed
    assert any(name.startswith("weighted(") for name in listed)


def test_every_reading_is_in_the_registry():
    of_answers = {"example_norms", "layer_norms", "directional_derivatives", "first_bad"}
    assert (public("readings") - of_answers) | {"keep"} == set(cases.READINGS)


def test_every_error_is_in_the_registry():
    assert public("outputs.errors") == set(cases.ERRORS)


def test_every_rule_is_in_the_registry():
    named = {part.split(",")[0] for name in cases.RULES for part in name.split(" of ")}
    assert public("rules") - {"alignment"} <= named


def test_every_kind_of_signal_is_in_the_registry():
    kinds = {
        name
        for name, value in vars(module("signals.kinds")).items()
        if inspect.isclass(value) and hasattr(value, "_fields")
    }
    # Beside them is one that the library does not know.
    assert kinds | {"Own"} == {name.replace(",", "").split()[0] for name in cases.SIGNALS}


@pytest.mark.parametrize("name", OF_USERS)
def test_a_module_lists_its_own_names_and_documents_them(name):
    for listed in OF_USERS[name]:
        value = getattr(module(name), listed)
        assert getattr(bp, listed) is value
        if value is not Any and (inspect.isfunction(value) or inspect.isclass(value)):
            assert value.__module__ == f"jaxbp.{name}"
            assert inspect.getdoc(value), listed


def test_the_package_hands_on_what_modules_list_and_nothing_else():
    there = {n for n, value in vars(bp).items() if n[0] != "_" and not inspect.ismodule(value)}
    assert there == {name for listed in OF_USERS.values() for name in listed}


@pytest.mark.parametrize("chapter", [c for c in CHAPTERS if f"{c}.__init__" in MODULES])
def test_a_chapter_hands_on_what_its_modules_list(chapter):
    listed = [n for name, own in OF_USERS.items() if chapter_of(name) == chapter for n in own]
    assert sorted(module(chapter).__all__) == sorted(listed)
