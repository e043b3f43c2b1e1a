"""Data: the classification problems that experiments train on, from three sources by one interface.

  nothing              scikit-learn's 1797 handwritten digits of 8 x 8 pixels
  a .csv file          a header, a target column, and a number in every other cell
  a directory          MNIST's four IDX files, or others in their format, gzipped or not

Each gives inputs [N, I] and labels [N], in 0 ... K-1, for training, validation and test. What is
wrong with a file is said in its own terms: its row as an editor counts it, its column, its bytes.
"""

import codecs
import csv
import gzip
import math
import re
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

HELD_OUT = 0.15  # of the examples, for validation, and as much again for the test
FEWEST = 7  # examples of a class: the first number of which 15 % is a whole one
TARGET_NAMES = ("target", "label", "class")
FAULTS_SHOWN = 5
FLOAT32_MAX = float(np.finfo(np.float32).max)
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
Part = tuple[np.ndarray, np.ndarray]


class DataError(ValueError):
    """A file that cannot be trained on; the message says which, where in it, and why."""


class Dataset(NamedTuple):
    """A classification problem: inputs [N, I] in float32 and labels [N] in int32, in three parts.

    Attributes:
      name: the source's.
      train: to fit.
      validation: to choose by.
      test: to report.
      class_names: what each label stands for.
      image_shape: (height, width) if an input is a grey image, to draw it; else None.
      train_rows: where each training example stands in the source: its row in a .csv file, as an
        editor counts it; elsewhere its number, from 0.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    class_names: tuple[str, ...]
    image_shape: tuple[int, int] | None
    train_rows: np.ndarray


def load(path: Path | None, *, target: str | None = None, seed: int = 0) -> Dataset:
    """The data at `path`, split into training, validation and test.

      path          inputs                            split, stratified by class
      None          pixels / 16                       70 / 15 / 15 %
      a .csv file   standardised                      70 / 15 / 15 %
      a directory   pixels / 255, a row per image     85 / 15 % of train-*; the test is t10k-*

    Standardised: (x - mean) / deviation, by the mean and deviation of the training part alone. A
    column that is constant in the training part is 0 in every part.

    Args:
      path: where the data are, or None for the digits.
      target: the column to predict, of a .csv file. Without it, the one that is called `target`,
        `label` or `class`. Integers are classes in numeric order, anything else in that of text.
      seed: of the shuffle.

    Raises:
      DataError: the data cannot be read, or are too few to split.
    """
    if path is None or path.is_dir():
        if target is not None:
            raise DataError(f"target {target!r}: only a .csv file has columns to choose from.")
        return _load_digits(seed) if path is None else _load_idx(path, seed)
    if not path.exists():
        raise DataError(f"{path}: no such file or directory.")
    if path.suffix.lower() != ".csv":
        raise DataError(f"{path}: neither a .csv file nor a directory.")
    return _load_csv(path, target, seed)


def _load_digits(seed):
    digits = load_digits()
    inputs, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    names = tuple(map(str, digits.target_names))
    parts = _split(np.arange(len(labels)), labels, seed)
    return Dataset("digits", *_examples(inputs, parts), names, (8, 8), parts[0][0])


def _load_csv(path, target, seed):
    inputs, cells, rows = _read_csv(path, target)
    labels, names = _classes(cells)
    _check_classes(path, labels, names)
    parts = _split(np.arange(len(labels)), labels, seed)
    examples = _standardise(*_examples(inputs, parts))
    return Dataset(path.stem, *examples, names, None, rows[parts[0][0]])


def _load_idx(folder, seed):
    """MNIST's files; labels are counted from 0 in the order of those that the training part has."""
    found = {name: _find(folder, name) for name in IDX_FILES}
    if missing := [name for name, path in found.items() if path is None]:
        raise DataError(f"{folder}: no {', no '.join(missing)}, nor with .gz.")
    train_images, train_labels, test_images, test_labels = found.values()
    inputs, labels, image_shape = _read_images(train_images, train_labels)
    held_inputs, held_labels, held_shape = _read_images(test_images, test_labels)
    if held_shape != image_shape:
        here, there = _by(held_shape), _by(image_shape)
        raise DataError(f"{test_images}: images are {here}, but {there} in {train_images}.")
    classes, labels = np.unique(labels, return_inverse=True)
    if unknown := sorted(set(held_labels.tolist()) - set(classes.tolist())):
        raise DataError(f"{test_labels}: labels that never occur in {train_labels}: {unknown}.")
    names = tuple(map(str, classes))
    _check_classes(train_labels, labels, names)
    parts = _hold_out(np.arange(len(labels)), labels.astype(np.int32), HELD_OUT, seed)
    train, validation = _examples(inputs, parts)
    test = held_inputs, np.searchsorted(classes, held_labels).astype(np.int32)
    return Dataset(folder.resolve().name, train, validation, test, names, image_shape, parts[0][0])


def _read_csv(path, target):
    """The features [N, I], in float64 as in the file, the N cells of the target, and their rows."""
    rows = _rows(path)
    line, header = next(rows, (1, None))
    if header is None:
        raise DataError(f"{path}: the file is empty.")
    column = _target_column(f"{path}: row {line}", header, target)
    inputs, targets, places, faults = [], [], [], []
    for line, cells in rows:
        row = f"{path}: row {line}"
        if len(cells) != len(header):
            faults.append(f"{row}: the header has {len(header)} cells, this row {len(cells)}.")
            continue
        for i, cell in enumerate(cells):
            if fault := _fault(cell, is_number=i != column):
                faults.append(f"{row}, column {header[i]!r}: {fault}.")
        if not faults:
            targets.append(cells.pop(column))
            inputs.append(np.array([float(cell) for cell in cells]))
            places.append(line)
    _raise(faults)
    if not inputs:
        raise DataError(f"{path}: a header, but no rows of data.")
    return np.array(inputs), targets, np.array(places)


def _rows(path):
    """The rows that are not blank, stripped, each with the line on which it starts."""
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(keepends=True)
    reader = csv.reader((line.decode() for line in lines), skipinitialspace=True, strict=True)
    start = 1
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if cells not in ([], [""]):
                yield start, cells
            start = reader.line_num + 1  # not the number of rows: a quoted cell can span lines
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise DataError(f"{path}: row {reader.line_num + 1}: {byte} is not UTF-8.") from error
    except csv.Error as error:
        raise DataError(f"{path}: row {start}: {error}.") from error


def _target_column(where, header, target):
    """The index of the target's column."""
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
        raise DataError(f"{where}: no column but the target, {target!r}.")
    return header.index(target)


def _fault(cell, *, is_number):
    """What is wrong with a cell, or None."""
    if not cell:
        return "the cell is empty"
    if not is_number:
        return None
    try:
        value = float(cell.replace("_", "?"))  # Python alone would read 1_000 as 1000
    except ValueError:
        return f"{cell!r} is not a number"
    if not abs(value) <= FLOAT32_MAX:  # written so that NaN is caught too
        return f"{cell!r} is not finite in float32"
    return None


def _classes(cells):
    """Labels [N] and what each stands for. Integers sort as numbers: 10 comes after 9."""
    if all(re.fullmatch("[+-]?[0-9]+", cell) for cell in cells):
        cells = [int(cell) for cell in cells]
    classes = sorted(set(cells))
    label = {value: i for i, value in enumerate(classes)}
    return np.array([label[cell] for cell in cells], np.int32), tuple(map(str, classes))


def _standardise(*parts):
    """The parts, of which the first is to train, with inputs of mean 0 and deviation 1 in it."""
    inputs = parts[0][0]
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0)
    # Rounding gives a constant column, say of 0.1, a deviation of about 1e-17 instead of 0.
    deviation[(inputs == inputs[0]).all(axis=0) | (deviation == 0)] = np.inf
    return [(((x - mean) / deviation).astype(np.float32), labels) for x, labels in parts]


def _find(folder, name):
    """The path of the file in the first spelling that exists, or None."""
    spellings = [name, f"{name}.gz"]
    spellings += [spelling.replace("-idx", ".idx") for spelling in spellings]
    return next((folder / each for each in spellings if (folder / each).is_file()), None)


def _read_images(images_path, labels_path):
    """Inputs [N, height * width] in float32, labels [N] in uint8, and (height, width)."""
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if len(images) != len(labels):
        counts = f"{len(images)} images, but {labels_path} has {len(labels)} labels"
        raise DataError(f"{images_path}: {counts}.")
    return images.reshape(len(images), -1).astype(np.float32) / 255, labels, images.shape[1:]


def _read_idx(path, ndim):
    """The array of uint8 in an IDX file.

    Bytes 0 0 8, where 8 stands for uint8; the number of dimensions; the size of each, as a
    big-endian uint32; the array, its last index fastest.
    """
    data, magic, start = _read_bytes(path), bytes([0, 0, 8, ndim]), 4 + 4 * ndim
    if data[:4] != magic:
        starts = f"starts with bytes {data[:4].hex(' ')}, expected {magic.hex(' ')}"
        raise DataError(f"{path}: {starts}: IDX of uint8 in {ndim} dimensions.")
    if len(data) < start:
        raise DataError(f"{path}: expected a header of {start} bytes, found {len(data)}.")
    shape = struct.unpack(f">{ndim}I", data[4:start])
    if 0 in shape:
        raise DataError(f"{path}: no examples: its sizes are {_by(shape)}.")
    expected, found = math.prod(shape), len(data) - start
    if found != expected:
        what = "truncated" if found < expected else "too long"
        sizes = f"sizes {_by(shape)} take {expected} bytes of data, found {found}"
        raise DataError(f"{path}: {what}: {sizes}.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _read_bytes(path):
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}: not a whole gzip file: {error}.") from error
    if not data:
        raise DataError(f"{path}: the file is empty.")
    return data


def _check_classes(path, labels, names):
    """Raises if there is one class only, or one of too few examples to be in every part."""
    if len(names) == 1:
        raise DataError(f"{path}: only one class, {names[0]!r}; it takes two to tell apart.")
    counts = zip(names, np.bincount(labels), strict=True)
    needs = f"every split needs some of it, which takes {FEWEST} examples"
    _raise([f"{path}: class {name!r}: {needs}, found {n}." for name, n in counts if n < FEWEST])


def _split(inputs, labels, seed):
    """Training, validation and test, the last two of equal size."""
    rest, test = _hold_out(inputs, labels, HELD_OUT, seed)
    train, validation = _hold_out(*rest, len(test[1]), seed)
    return train, validation, test


def _examples(inputs, parts):
    """Parts of places, with the inputs that stand there instead."""
    return [(inputs[places], labels) for places, labels in parts]


def _hold_out(inputs, labels, size, seed):
    """Two parts, shuffled, the second of `size`, a share or a number; classes alike in both."""
    inputs, held_inputs, labels, held_labels = train_test_split(
        inputs, labels, test_size=size, stratify=labels, random_state=seed
    )
    return (inputs, labels), (held_inputs, held_labels)


def _raise(faults):
    """Raises the faults, if any, in one error: the first few, and how many more there are."""
    if faults:
        more = len(faults) - FAULTS_SHOWN
        last = [f"... and {more} more."] if more > 0 else []
        raise DataError("\n".join(faults[:FAULTS_SHOWN] + last))


def _quoted(names, separator=", "):
    return separator.join(repr(name) for name in names)


def _by(sizes):
    return " x ".join(str(size) for size in sizes)
