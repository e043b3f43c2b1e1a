"""The command of the benchmark: its flags, and the tables that it records."""

import pytest
import tyro

from experiments.bench import recorded, runner
from experiments.bench.tables import Row, Table

pytestmark = pytest.mark.usefixtures("as_shipped")
SECTIONS = (
    "gradient",
    "training",
    "quantities",
    "rules",
    "transformers",
    "convolutions",
    "recurrence",
    "lift",
    "fused",
    "health",
)
README = """# Experiments

Prose above.

<!-- bench: gradient on cpu -->

old gradient

<!-- end bench: gradient on cpu -->

Prose between.

<!-- bench: training on cpu -->

old training

<!-- end bench: training on cpu -->

<!-- bench: gradient on gpu -->

old gradient of a GPU

<!-- end bench: gradient on gpu -->

Prose below, with | a pipe.
"""


@pytest.fixture
def measured(monkeypatch):
    """Sections with two cases each, which are not timed: the cases that were measured."""
    cases = []

    def rows(case, repeats, seed):
        cases.append(case)
        yield Row(case, "peer", "<= 1.00", ratio=0.5, quartiles=(0.4, 0.6))

    for name in SECTIONS:
        table = Table(f"Title of {name}", "ours / theirs", rows, ("first", "second"), ("on a GPU",))
        monkeypatch.setitem(runner.SECTIONS, name, {name: table})
    return cases


@pytest.fixture
def readme(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text(README, encoding="utf-8")
    monkeypatch.setattr(recorded, "README", path)
    return path


def part(text, section, backend="cpu"):
    begin, end = recorded.make_markers(section, backend)
    return text.partition(begin)[2].partition(end)[0]


def test_the_sections_are_these():
    assert tuple(runner.SECTIONS) == SECTIONS


def test_the_command_lists_all_sections_and_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(runner.main, args=["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(section in shown for section in SECTIONS)
    flags = ("--sections", "--repeats", "--quick", "--seed", "--json", "--update")
    assert all(flag in shown for flag in flags)


def test_every_section_is_measured_unless_some_are_named(measured, capsys):
    tyro.cli(runner.main, args=["--repeats", "1"])
    assert len(measured) == 2 * len(SECTIONS)
    printed = capsys.readouterr().out
    titles = [printed.index(f"#### Title of {section}") for section in SECTIONS]
    assert titles == sorted(titles)
    measured.clear()
    tyro.cli(runner.main, args=["--sections", "rules", "--quick"])
    assert measured == ["first"]


def test_update_rewrites_its_own_part_and_nothing_else(measured, readme, capsys):
    runner.main(sections=("training",), repeats=9, seed=3, update=True)
    text = readme.read_text(encoding="utf-8")
    new = part(text, "training")
    assert text == README.replace("\n\nold training\n\n", new)
    assert "| first | peer | **0.50** (0.40-0.60) | <= 1.00 |" in new
    assert "| second | peer |" in new
    assert "`python -m experiments.bench --sections training --repeats 9 --seed 3`" in new
    assert "quick" not in new
    printed = capsys.readouterr().out
    for name in ("machine", "load before", "versions"):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{name}: ")]
        assert f"* {line.strip()}" in new
    assert "* rounds: 9; 3 for what takes seconds" in new
    assert [file.name for file in readme.parent.iterdir()] == ["README.md"]


def test_an_update_replaces_the_last_one(measured, readme):
    for _ in range(2):
        runner.main(sections=("gradient", "training"), repeats=1, update=True)
        text = readme.read_text(encoding="utf-8")
        assert text.count("#### Title of gradient") == text.count("#### Title of training") == 1
    assert "old gradient of a GPU" in part(text, "gradient", "gpu")


def test_a_quick_update_says_so_above_its_table(measured, readme):
    runner.main(sections=("gradient",), repeats=1, quick=True, update=True)
    new = part(readme.read_text(encoding="utf-8"), "gradient")
    above, table = new.split("| network")
    assert above.rstrip().splitlines()[-1] == "**A quick run: only the first case of the table.**"
    assert "second" not in table
    assert "--sections gradient --quick --repeats 1`" in above


def test_without_update_nothing_is_recorded(measured, readme):
    runner.main(sections=("gradient",), repeats=1)
    assert readme.read_text(encoding="utf-8") == README


BEGIN, END = recorded.make_markers("training", "cpu")


@pytest.mark.parametrize(
    "text",
    [
        README.replace(BEGIN, ""),
        README.replace(END, ""),
        README.replace(BEGIN, "<swap>").replace(END, BEGIN).replace("<swap>", END),
        README + README,
        None,
    ],
    ids=["no begin", "no end", "in the wrong order", "twice", "no file"],
)
def test_markers_that_are_missing_are_reported_before_anything_is_measured(text, measured, readme):
    if text is None:
        readme.unlink()
    else:
        readme.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="update needs") as stop:
        runner.main(sections=("training",), repeats=1, update=True)
    assert text is None or BEGIN in str(stop.value)
    assert measured == []
    assert text is None or readme.read_text(encoding="utf-8") == text


def test_the_real_readme_has_a_part_for_every_section_and_backend():
    for backend in ("cpu", "gpu"):
        assert recorded.find_faults(SECTIONS, backend) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"repeats": 0}, "bench: repeats is 0; it takes at least 1"),
        ({"seed": -1}, r"seed is -1; it takes an integer in \[0, 2\^32\)"),
        ({"json": "missing/figures.json"}, "there is no directory missing"),
        ({"json": "."}, "which is a directory"),
        ({"sections": ("norms",)}, "sections is norms; it takes some of gradient, training"),
        ({"sections": ()}, "sections is empty; it takes some of gradient, training"),
        ({"repeats": 0, "seed": -1}, "repeats is 0.*seed is -1"),
    ],
)
def test_wrong_flags_are_refused(flags, message, tmp_path, monkeypatch, measured):
    monkeypatch.chdir(tmp_path)
    if "json" in flags:
        flags = {"json": runner.Path(flags["json"])}
    with pytest.raises(SystemExit, match=message):
        runner.main(**flags)
    assert measured == []


def test_an_unknown_section_is_refused_on_the_command_line(measured, capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(runner.main, args=["--sections", "norms"])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert "norms" in shown.out + shown.err
    assert measured == []
