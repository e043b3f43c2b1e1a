"""PyTorch's module cases: the table and the README's line, and cases where PyTorch is installed."""

import sys

import jax
import jax.numpy as jnp
import pytest
import tyro

from experiments.peers_suite import __main__ as peers_suite
from experiments.peers_suite import report
from experiments.peers_suite.rearranging import find_arithmetic
from experiments.peers_suite.report import Counts, Outcome

OUTCOMES = [
    Outcome("Linear"),
    Outcome("Linear", wrong=("output 0 differs by 1.0e-03", "gradient of bias differs by 1.0e+00")),
    Outcome("FractionalMaxPool2d", reason="it draws its windows"),
    Outcome("FractionalMaxPool3d", reason="it draws its windows"),
    Outcome("MaxPool2d", reason="no layer hands out places"),
]


def test_outcomes_are_counted():
    assert report.count(OUTCOMES) == Counts(cases=5, agree=1, differ=1, cannot=3)
    assert report.count([]) == Counts(0, 0, 0, 0)


def test_the_table_has_a_line_for_each_module_and_each_reason():
    lines = report.make_table(OUTCOMES).splitlines()
    assert lines[0].split() == ["module", "cases", "agree", "differ", *"cannot be written".split()]
    assert lines[1].split() == ["Linear", "2", "1", "1", "0"]
    assert lines[5].split() == ["all", "5", "1", "1", "3"]
    assert lines[7:] == [
        "Cannot be written, because",
        "    2  it draws its windows: FractionalMaxPool2d, FractionalMaxPool3d",
        "    1  no layer hands out places: MaxPool2d",
    ]


def test_the_line_is_written_between_its_markers_and_nothing_else_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(
        report.importlib.metadata, "version", {"torch": "2.9+cpu", "jax": "0.8"}.get
    )
    readme = tmp_path / "README.md"
    for before in ("", "an old line"):
        readme.write_text(f"# Title\n\n{report.BEGIN}{before}{report.END}\n\nEnd | é", "utf-8")
        assert report.find_fault(readme) is None
        report.write_line(report.make_line(Counts(1805, 1700, 0, 105)), readme)
        head, _, line, *rest = readme.read_text("utf-8").split("\n")
        assert (head, rest) == ("# Title", ["", "End | é"])
        assert line.startswith(f"{report.BEGIN}Of the 1,805 cases in PyTorch's own tests")
        assert "1,700 agree to 1e-10, 0 differ, and 105 cannot be written" in line
        assert "(PyTorch 2.9 and JAX 0.8, " in line
        assert line.endswith(report.END)
    assert list(tmp_path.iterdir()) == [readme]


@pytest.mark.parametrize(
    "text", ["", report.BEGIN, report.END + report.BEGIN, 2 * (report.BEGIN + report.END)]
)
def test_a_readme_without_the_markers_is_refused(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert "write-readme needs `<!-- peers_suite -->`" in report.find_fault(readme)


def test_the_readme_has_the_markers():
    assert report.find_fault() is None


def test_a_layout_that_computes_is_found():
    x = jnp.ones((2, 3, 4))
    assert find_arithmetic(lambda x: jnp.moveaxis(x[None], 1, -1).reshape(-1, 2), x) == []
    assert find_arithmetic(lambda x: {"a": jnp.concatenate([x[:1], 2 * x]), "b": x.T}, x) == ["mul"]
    assert find_arithmetic(jax.jit(lambda x: jnp.sum(jnp.exp(x))), x) == ["exp", "reduce_sum"]


def test_flags_are_read():
    config = tyro.cli(peers_suite.Config, args=["--only", "Linear", "GRU", "--write-readme"])
    assert config == peers_suite.Config(only=("Linear", "GRU"), write_readme=True)


def test_without_pytorch_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("experiments.peers_suite.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"torch.* needs the extra `bench`: pip install"):
        peers_suite.main(peers_suite.Config())


@pytest.fixture
def suite():
    """The parts that need PyTorch, in the mode in which the command runs them."""
    pytest.importorskip("torch")
    pytest.importorskip("expecttest")
    with jax.numpy_dtype_promotion("standard"):
        yield peers_suite._import_suite()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "LSTM", "TransformerDecoderLayer", "NLLLoss"])
def test_cases_agree_with_pytorch(suite, name):
    cases, run = suite
    outcomes = list(map(run, cases.load(name)))
    assert outcomes
    assert [outcome for outcome in outcomes if outcome != Outcome(name)] == []


@pytest.mark.thorough
def test_a_wrong_translation_differs(suite, monkeypatch):
    cases, run = suite
    from experiments.peers_suite import running

    def with_wrong_params(case):
        written = right(case)
        return written._replace(params=lambda p: written.params(p | {"bias": 2 * p["bias"]}))

    right = running.translate
    monkeypatch.setattr(running, "translate", with_wrong_params)
    outcome = run(cases.load("Linear")[0])
    assert [line.split(" differs by ")[0] for line in outcome.wrong] == [
        "output 0",
        "gradient of bias",
        "the layout of parameters has mul",
    ]


@pytest.mark.thorough
def test_wrong_flags_are_refused(suite):
    with pytest.raises(ValueError, match="only is Lineal, which has no cases; write-readme takes"):
        peers_suite.main(peers_suite.Config(only=("Lineal",), write_readme=True))
