"""The recorded tables: parts of experiments/README.md that `--update` rewrites.

A part stands between two markers, HTML comments that name the section and the backend, so that the
tables of a CPU and those of a GPU stand side by side.
"""

from pathlib import Path

from experiments.common.files import whole

README = Path(__file__).parents[1] / "README.md"


def make_markers(section, backend):
    """The comments before and after the tables of a section."""
    name = f"{section} on {backend}"
    return f"<!-- bench: {name} -->", f"<!-- end bench: {name} -->"


def find_faults(sections, backend):
    """What prevents `rewrite` from finding the parts of these sections: a list of clauses."""
    if not README.exists():
        return [f"update needs {README}, which does not exist"]
    text = README.read_text(encoding="utf-8")
    return [
        f"update needs `{begin}` and, after it, `{end}` once each in {README}"
        for begin, end in (make_markers(section, backend) for section in sections)
        if not text.count(begin) == text.count(end) == 1 or text.index(begin) > text.index(end)
    ]


def rewrite(section, backend, tables):
    """Replaces what stands between a section's markers, and nothing else."""
    begin, end = make_markers(section, backend)
    before, rest = README.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    with whole(README) as unfinished:
        unfinished.write_text(f"{before}{begin}\n\n{tables}\n\n{end}{after}", encoding="utf-8")
