"""Tables in .csv files: numbers, columns of text, missing cells, and a column to predict.

Cells are separated by commas, semicolons or tabs, whichever gives the most rows as many cells as
the header. Where it is not the comma, numbers may have decimal commas. Every error names the place:
the row as an editor counts it, and the column.
"""

import codecs
import csv
import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}  # of the delimiters
TARGET_NAMES = ("target", "label", "class")
MISSING = ("", "na", "n/a", "nan", "null", "none", "?")
ROWS_TRIED = 100  # to find the delimiter
MOST_VALUES = 100  # of a column of text: with more it is rather a name or an id
FAULTS_SHOWN = 20
FLOAT32_MAX = float(np.finfo(np.float32).max)


class DataError(ValueError):
    """The data cannot be used; the message names the file, the place in it, and the reason."""


class Table(NamedTuple):
    """The rows of a file that are used.

    Attributes:
      inputs: the features, [N, I] in float64. A column of text is one feature per value, 0 or 1.
      cells: the N cells of the target, with decimal points where it is a number.
      rows: the row of each in the file, as an editor counts it, [N].
      target: the name of the target's column.
      notes: what was done to the file, clauses for the user; none for a plain table.
    """

    inputs: np.ndarray
    cells: list[str]
    rows: np.ndarray
    target: str
    notes: tuple[str, ...]


def read(
    path: Path, target: str | None, *, one_hot: tuple[str, ...] = (), drop_missing: bool = False
) -> Table:
    """Reads a table with a header.

    Args:
      path: the file, in UTF-8, with or without a byte order mark.
      target: the name of the column to predict. By default it is the column that is called
        `target`, `label` or `class`.
      one_hot: the names of columns of text. Each becomes one column for each of its values, sorted.
      drop_missing: whether to leave out rows with missing cells: empty ones, and in a column of
        numbers also NA, N/A, NaN, null, none and ?.

    Raises:
      DataError: the file is no such table. The error lists every column with cells that are missing
        or not numbers, and how many there are.
    """
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(keepends=True)
    delimiter = _delimiter(path, lines)
    table = _rows(path, lines, delimiter)
    line, header = next(table, (1, None))
    if header is None:
        raise DataError(f"{path}: the file is empty.")
    where = f"{path}: row {line}"
    column = _target_column(where, header, target)
    texts = _text_columns(where, header, column, one_hot)
    numbers = [i for i in range(len(header)) if i not in (column, *texts)]
    convert, faults, dropped = _Converter(delimiter != ","), _Faults(path), 0
    inputs, cells, places, words = [], [], [], {i: [] for i in texts}
    for line, row in table:
        faults.rows += 1
        if len(row) != len(header):
            fault = f"the header has {len(header)} cells, this row {len(row)}"
            faults.add(line, fault)
            continue
        if drop_missing and any(_is_missing(cell, i in numbers) for i, cell in enumerate(row)):
            dropped += 1
            continue
        values = []
        for i, cell in enumerate(row):
            if _is_missing(cell, i in numbers):
                fault = f"the cell is missing: {cell!r}" if cell else "the cell is empty"
                faults.add(line, fault, header[i], kind="missing")
            elif i in numbers:
                values.append(convert(cell))
                if values[-1] is None:
                    faults.add(line, f"{cell!r} is not a number", header[i], kind="text")
                elif not abs(values[-1]) <= FLOAT32_MAX:
                    faults.add(line, f"{cell!r} is not finite in float32", header[i], kind="size")
        if not faults:
            inputs.append(np.array(values, float))
            cells.append(row[column])
            places.append(line)
            for i in texts:
                words[i].append(row[i])
    faults.raise_if_any()
    if not inputs:
        why = f": {dropped} have missing cells" if dropped else ""
        raise DataError(f"{path}: there is a header, but no row of data{why}.")
    cells = convert.targets(cells)
    if convert.comma and convert.point:
        raise DataError(
            f"{path}: some numbers have decimal commas, such as {convert.comma}, and some have "
            f"decimal points, such as {convert.point}. Which of them are thousands?"
        )
    columns = [_one_hot(f"{path}: column {header[i]!r}", words[i]) for i in texts]
    notes = {
        f"cells are separated by {NAMES[delimiter]}": delimiter != ",",
        f"numbers have decimal commas, such as {convert.comma}": convert.comma,
        f"{dropped} of {dropped + len(inputs)} rows have missing cells and are left out": dropped,
    }
    return Table(
        np.concatenate([np.array(inputs), *columns], axis=1),
        cells,
        np.array(places),
        header[column],
        tuple(note for note, applies in notes.items() if applies),
    )


def _delimiter(path, lines):
    """Returns the delimiter by which most rows have as many cells as the header, at least two."""

    def fit(delimiter):
        sizes = []
        try:
            for _, row in itertools.islice(_rows(path, lines, delimiter), ROWS_TRIED):
                sizes.append(len(row))
        except DataError:  # such as text after a quote; reading with the delimiter will say it
            pass
        width = max(sizes[:1], default=0)
        return (sizes.count(width), width) if width > 1 else (0, 0)

    return max(NAMES, key=fit)


def _rows(path, lines, delimiter):
    """Yields each row that is not blank: the line on which it starts, and its stripped cells."""
    reader = csv.reader(
        (line.decode() for line in lines), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    start = 1
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                yield start, cells
            start = reader.line_num + 1  # rows are not lines: a quoted cell can span several
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise DataError(f"{path}: row {reader.line_num + 1}: {byte} is not UTF-8.") from error
    except csv.Error as error:
        raise DataError(f"{path}: row {start}: {error}.") from error


def _target_column(where, header, target):
    """Returns the index of the target's column."""
    if target not in header and all(map(is_number, header)):
        raise DataError(
            f"{where}: all cells are numbers, so this is no header. Write a row with the names of "
            "the columns above it."
        )
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{where}: more than one column is called {_quoted(repeated, ' or ')}.")
    known = [name for name in header if name in TARGET_NAMES]
    if target is None and len(known) != 1:
        raise DataError(f"{where}: which column is the target? Name one of {_quoted(header)}.")
    target = known[0] if target is None else target
    if target not in header:
        raise DataError(f"{where}: no column is called {target!r}; there are {_quoted(header)}.")
    if len(header) == 1:
        raise DataError(f"{where}: there is no column besides the target, {target!r}.")
    return header.index(target)


def _text_columns(where, header, target, names):
    """Returns the indices of the columns of text."""
    unknown = [name for name in names if name not in header]
    if unknown:
        raise DataError(
            f"{where}: one-hot takes names of columns, and none is called "
            f"{_quoted(unknown, ' or ')}; there are {_quoted(header)}."
        )
    if header[target] in names:
        raise DataError(f"{where}: one-hot takes features; {header[target]!r} is the target.")
    return sorted(header.index(name) for name in set(names))


def _one_hot(where, words):
    """Returns a column of 0 and 1 for each different word, [N, number of words]."""
    values, places = np.unique(words, return_inverse=True)
    if len(values) > MOST_VALUES:
        raise DataError(
            f"{where}: {len(values)} different values, such as {words[0]!r}; one-hot takes at most "
            f"{MOST_VALUES}. If it is a name or an id, remove the column?"
        )
    return np.eye(len(values))[places]


def _is_missing(cell, is_number):
    """A class or a word may well be called `none`, so there only an empty cell is missing."""
    return not cell or (is_number and cell.lower() in MISSING)


def is_number(cell: str) -> bool:
    """Whether a cell is a number with a decimal point."""
    try:
        float(cell.replace("_", "?"))  # Python's float reads 1_000 as 1000
    except ValueError:
        return False
    return True


class _Converter:
    """Converts cells to numbers, and remembers one with a decimal comma and one with a point.

    Attributes:
      comma: the first number that has a decimal comma.
      point: the first number that has a decimal point.
    """

    def __init__(self, may_have_commas):
        self.may_have_commas, self.comma, self.point = may_have_commas, None, None

    def __call__(self, cell):
        """Returns the number, or None if the cell is none."""
        plain = self._with_point(cell)
        if not is_number(plain):
            return None
        if plain != cell:
            self.comma = self.comma or cell
        elif "." in cell:
            self.point = self.point or cell
        return float(plain)

    def targets(self, cells):
        """Writes the cells of a target with decimal points, if they are numbers."""
        plain = [self._with_point(cell) for cell in cells]
        if plain == cells or not all(map(is_number, plain)):
            return cells
        for cell in cells:
            self(cell)
        return plain

    def _with_point(self, cell):
        return cell.replace(",", ".") if self.may_have_commas and "." not in cell else cell


class _Faults:
    """What is wrong with a file; false as long as there is nothing.

    Faults of one kind in one column are one fault, with the first row and their number.

    Attributes:
      rows: the number of rows that were looked at.
    """

    def __init__(self, path):
        self.path, self.found, self.rows = path, {}, 0

    def __bool__(self):
        return bool(self.found)

    def add(self, line, fault, column=None, kind=""):
        """Adds a fault of a row, or of a cell in a column."""
        place = f"row {line}" if column is None else f"row {line}, column {column!r}"
        key = (line, kind) if column is None else (column, kind)
        text, count = self.found.get(key, (f"{self.path}: {place}: {fault}", 0))
        self.found[key] = text, count + 1

    def raise_if_any(self):
        """Raises one error for all faults, with the flags that can help."""
        hints = []
        if any(kind == "missing" for _, kind in self.found):
            hints.append("--drop-missing leaves out the rows with missing cells.")
        # If most cells of a column are numbers, the others are rather mistakes.
        texts = [
            column
            for (column, kind), (_, count) in self.found.items()
            if kind == "text" and count > self.rows / 2
        ]
        if texts:
            names = shlex.join(texts)
            hints.append(f"--one-hot {names} gives each value of a column of text its own column.")
        raise_faults(
            [
                f"{text} ({count} rows in all)." if count > 1 else f"{text}."
                for text, count in self.found.values()
            ],
            hints,
        )


def raise_faults(faults: list[str], hints: Sequence[str] = ()) -> None:
    """Raises one error for all faults, if any: it shows the first and counts the others."""
    if faults:
        more = len(faults) - FAULTS_SHOWN
        last = [f"... and {more} more."] if more > 0 else []
        raise DataError("\n".join([*faults[:FAULTS_SHOWN], *last, *hints]))


def _quoted(names, separator=", "):
    return separator.join(repr(name) for name in names)
