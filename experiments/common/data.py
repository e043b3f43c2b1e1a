"""Data: `load` reads a classification problem from one of three sources.

  None                 scikit-learn's 1797 handwritten digits of 8 x 8 pixels
  a .csv file          a header, a target column, and a number in every other cell
  a directory          MNIST's four IDX files, or others in their format, gzipped or not

It returns inputs [N, I] and labels [N] in 0 ... C-1, split into a training, a validation and a test
set. An error names the place in the file: the row as an editor counts it, the column, the bytes.
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

HELD_OUT = 0.15  # share of the examples in the validation set, and in the test set
FEWEST = 7  # examples of a class: of fewer, 15 % is less than one example
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
    """The data cannot be used; the message names the file, the place in it, and the reason."""


class Dataset(NamedTuple):
    """A classification problem: inputs [N, I] in float32 and labels [N] in int32, in three sets.

    Attributes:
      name: the name of the source.
      train: the training set.
      validation: the validation set.
      test: the test set.
      class_names: the name of each class, by label.
      image_shape: (height, width) if an input is a grey image, else None.
      train_rows: the place of each training example in the source: its row in a .csv file, as an
        editor counts it; for other sources its index, from 0.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    class_names: tuple[str, ...]
    image_shape: tuple[int, int] | None
    train_rows: np.ndarray


def load(path: Path | None, *, target: str | None = None, seed: int = 0) -> Dataset:
    """Reads the data at `path` and splits them into training, validation and test sets.

      path          inputs                            split, stratified by class
      None          pixels / 16                       70 / 15 / 15 %
      a .csv file   standardised                      70 / 15 / 15 %
      a directory   pixels / 255, a row per image     85 / 15 % of train-*; the test is t10k-*

    Standardised: (x - mean) / deviation, with the mean and deviation of the training set. A column
    that is constant in the training set is 0 in all sets.

    Args:
      path: a .csv file or a directory, or None for the digits.
      target: the name of the column to predict, for a .csv file. By default the column that is
        called `target`, `label` or `class`. Classes that are all integers are sorted as numbers,
        other classes as text.
      seed: the seed of the shuffle.

    Raises:
      DataError: the data cannot be read, or there are too few to split.
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
    """Reads MNIST's files. Labels become 0 ... C-1, in the order of the training file's values."""
    found = {name: _find(folder, name) for name in IDX_FILES}
    if missing := [name for name, path in found.items() if path is None]:
        raise DataError(f"{folder}: no {', no '.join(missing)}, with or without .gz.")
    train_images, train_labels, test_images, test_labels = found.values()
    inputs, labels, image_shape = _read_images(train_images, train_labels)
    held_inputs, held_labels, held_shape = _read_images(test_images, test_labels)
    if held_shape != image_shape:
        here, there = _by(held_shape), _by(image_shape)
        raise DataError(f"{test_images}: images are {here}, but {there} in {train_images}.")
    classes, labels = np.unique(labels, return_inverse=True)
    if unknown := sorted(set(held_labels.tolist()) - set(classes.tolist())):
        raise DataError(f"{test_labels}: labels that do not occur in {train_labels}: {unknown}.")
    names = tuple(map(str, classes))
    _check_classes(train_labels, labels, names)
    parts = _hold_out(np.arange(len(labels)), labels.astype(np.int32), HELD_OUT, seed)
    train, validation = _examples(inputs, parts)
    test = held_inputs, np.searchsorted(classes, held_labels).astype(np.int32)
    return Dataset(folder.resolve().name, train, validation, test, names, image_shape, parts[0][0])


def _read_csv(path, target):
    """Returns the features [N, I] in float64, the N cells of the target, and their row numbers."""
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
        raise DataError(f"{path}: there is a header, but no row of data.")
    return np.array(inputs), targets, np.array(places)


def _rows(path):
    """Yields each row that is not blank: the line on which it starts, and its stripped cells."""
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(keepends=True)
    reader = csv.reader((line.decode() for line in lines), skipinitialspace=True, strict=True)
    start = 1
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if cells not in ([], [""]):
                yield start, cells
            start = reader.line_num + 1  # rows are not lines: a quoted cell can span several
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise DataError(f"{path}: row {reader.line_num + 1}: {byte} is not UTF-8.") from error
    except csv.Error as error:
        raise DataError(f"{path}: row {start}: {error}.") from error


def _target_column(where, header, target):
    """Returns the index of the target's column."""
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


def _fault(cell, *, is_number):
    """Returns what is wrong with a cell, or None."""
    if not cell:
        return "the cell is empty"
    if not is_number:
        return None
    try:
        value = float(cell.replace("_", "?"))  # Python's float reads 1_000 as 1000
    except ValueError:
        return f"{cell!r} is not a number"
    if not abs(value) <= FLOAT32_MAX:  # written so that it catches NaN, too
        return f"{cell!r} is not finite in float32"
    return None


def _classes(cells):
    """Returns the labels [N] and the class names. Integers are sorted as numbers, 9 before 10."""
    if all(re.fullmatch("[+-]?[0-9]+", cell) for cell in cells):
        cells = [int(cell) for cell in cells]
    classes = sorted(set(cells))
    label = {value: i for i, value in enumerate(classes)}
    return np.array([label[cell] for cell in cells], np.int32), tuple(map(str, classes))


def _standardise(*parts):
    """Standardises the inputs of all sets by the mean and deviation of the first, for training."""
    inputs = parts[0][0]
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0)
    # Rounding can give a constant column, such as 0.1, a deviation of about 1e-17 instead of 0.
    deviation[(inputs == inputs[0]).all(axis=0) | (deviation == 0)] = np.inf
    return [(((x - mean) / deviation).astype(np.float32), labels) for x, labels in parts]


def _find(folder, name):
    """Returns the path of the file in the first spelling that exists, or None."""
    spellings = [name, f"{name}.gz"]
    spellings += [spelling.replace("-idx", ".idx") for spelling in spellings]
    return next((folder / each for each in spellings if (folder / each).is_file()), None)


def _read_images(images_path, labels_path):
    """Returns inputs [N, height * width] in float32, labels [N] in uint8, and (height, width)."""
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if len(images) != len(labels):
        counts = f"{len(images)} images, but {labels_path} has {len(labels)} labels"
        raise DataError(f"{images_path}: {counts}.")
    return images.reshape(len(images), -1).astype(np.float32) / 255, labels, images.shape[1:]


def _read_idx(path, ndim):
    """Reads the array of uint8 in an IDX file.

    The format: the bytes 0 0 8, where 8 means uint8; a byte with the number of dimensions; the size
    of each dimension as a big-endian uint32; the array, with the last index fastest.
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
        sizes = f"sizes {_by(shape)} need {expected} bytes of data, found {found}"
        raise DataError(f"{path}: {what}: {sizes}.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _read_bytes(path):
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}: not a complete gzip file: {error}.") from error
    if not data:
        raise DataError(f"{path}: the file is empty.")
    return data


def _check_classes(path, labels, names):
    """Raises if there is only one class, or a class has too few examples to be in every set."""
    if len(names) == 1:
        raise DataError(f"{path}: only one class, {names[0]!r}; at least two are needed.")
    counts = zip(names, np.bincount(labels), strict=True)
    needs = f"expected at least {FEWEST} examples, so that every set has some"
    _raise([f"{path}: class {name!r}: {needs}; found {n}." for name, n in counts if n < FEWEST])


def _split(inputs, labels, seed):
    """Returns the training, validation and test sets, the last two of equal size."""
    rest, test = _hold_out(inputs, labels, HELD_OUT, seed)
    train, validation = _hold_out(*rest, len(test[1]), seed)
    return train, validation, test


def _examples(inputs, parts):
    """Replaces the places in each set by the inputs at these places."""
    return [(inputs[places], labels) for places, labels in parts]


def _hold_out(inputs, labels, size, seed):
    """Splits into two shuffled, stratified sets; `size` is the second's size or its share."""
    inputs, held_inputs, labels, held_labels = train_test_split(
        inputs, labels, test_size=size, stratify=labels, random_state=seed
    )
    return (inputs, labels), (held_inputs, held_labels)


def _raise(faults):
    """Raises one error for all faults, if any: it shows the first few and counts the others."""
    if faults:
        more = len(faults) - FAULTS_SHOWN
        last = [f"... and {more} more."] if more > 0 else []
        raise DataError("\n".join(faults[:FAULTS_SHOWN] + last))


def _quoted(names, separator=", "):
    return separator.join(repr(name) for name in names)


def _by(sizes):
    return " x ".join(str(size) for size in sizes)
