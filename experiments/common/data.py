"""Data: `load` reads a classification problem, or a regression, from one of three sources.

  None                 scikit-learn's 1797 handwritten digits of 8 x 8 pixels
  a .csv file          a header, a target column, and features (see `csv_table`)
  a directory          MNIST's four IDX files, or others in their format, gzipped or not

It returns inputs [N, I] and labels, split into a training, a validation and a test set. Labels are
integers [N] in 0 ... C-1, or standardised numbers [N, 1] if the target is a quantity. An error
names the place in the file: the row as an editor counts it, the column, the bytes.
"""

import gzip
import math
import re
import struct
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.common import csv_table
from experiments.common.csv_table import DataError as DataError
from experiments.common.csv_table import is_number, raise_faults

HELD_OUT = 0.15  # share of the examples in the validation set, and in the test set
FEWEST = 7  # examples of a class: of fewer, 15 % is less than one example
MOST_CLASSES = 20  # of a column of decimal numbers: with more different ones it is a quantity
SMALL_CLASSES_SHOWN = 5
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
Part = tuple[np.ndarray, np.ndarray]


class Quantity(NamedTuple):
    """A target that is a number. The labels are (number - mean) / deviation.

    Attributes:
      name: the name of its column.
      mean: its mean in the training set.
      deviation: its standard deviation in the training set.
    """

    name: str
    mean: float
    deviation: float


class Dataset(NamedTuple):
    """A problem: inputs [N, I] in float32 and labels in three sets.

    The labels of a classification are [N] in int32, those of a regression [N, 1] in float32.

    Attributes:
      name: the name of the source.
      train: the training set.
      validation: the validation set.
      test: the test set.
      class_names: the name of each class, by label; none for a regression.
      image_shape: (height, width) if an input is a grey image, else None.
      train_rows: the place of each training example in the source: its row in a .csv file, as an
        editor counts it; for other sources its index, from 0.
      quantity: the target of a regression, None for a classification.
      notes: how a .csv file was read, where there is something to say.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    class_names: tuple[str, ...]
    image_shape: tuple[int, int] | None
    train_rows: np.ndarray
    quantity: Quantity | None = None
    notes: tuple[str, ...] = ()


def load(
    path: Path | None,
    *,
    target: str | None = None,
    one_hot: tuple[str, ...] = (),
    drop_missing: bool = False,
    predict: Literal["auto", "class", "number"] = "auto",
    seed: int = 0,
) -> Dataset:
    """Reads the data at `path` and splits them into training, validation and test sets.

      path          inputs                            split, stratified by class
      None          pixels / 16                       70 / 15 / 15 %
      a .csv file   standardised                      70 / 15 / 15 %
      a directory   pixels / 255, a row per image     85 / 15 % of train-*; the test is t10k-*

    Standardised: (x - mean) / deviation, with the mean and deviation of the training set. A column
    that is constant in the training set is 0 in all sets. The split of a regression is random.

    Args:
      path: a .csv file or a directory, or None for the digits.
      target: the name of the column to predict, for a .csv file. By default the column that is
        called `target`, `label` or `class`. Classes that are all integers are sorted as numbers,
        other classes as text.
      one_hot: the columns of text of a .csv file, each of whose values becomes a column.
      drop_missing: whether to leave out the rows of a .csv file that have missing cells.
      predict: whether the target of a .csv file is a class or a number. `auto` takes it for a
        number if it has more than 20 different values and not all are integers.
      seed: the seed of the shuffle.

    Raises:
      DataError: the data cannot be read, or there are too few to split.
    """
    if path is None or path.is_dir():
        if target is not None:
            raise DataError(f"target {target!r}: only a .csv file has columns to choose from.")
        if one_hot or drop_missing or predict == "number":
            raise DataError("one-hot, drop-missing and predict number are for a .csv file only.")
        return _load_digits(seed) if path is None else _load_idx(path, seed)
    if not path.exists():
        raise DataError(f"{path}: no such file or directory.")
    if path.suffix.lower() not in (".csv", ".tsv"):
        raise DataError(f"{path}: neither a .csv file nor a directory.")
    table = csv_table.read(path, target, one_hot=one_hot, drop_missing=drop_missing)
    if predict == "number" or (predict == "auto" and _looks_continuous(table.cells)):
        return _load_regression(path, table, seed)
    return _load_classification(path, table, seed)


def load_by_flags(config: Any, *, predict: Literal["auto", "class", "number"]) -> Dataset:
    """Reads the data that the flags of an experiment name, by `load`."""
    return load(
        config.data,
        target=config.target,
        one_hot=config.one_hot,
        drop_missing=config.drop_missing,
        predict=predict,
        seed=config.seed,
    )


def print_notes(dataset: Dataset) -> None:
    """Prints how a .csv file was read, where there is something to say."""
    if dataset.notes:
        print(f"{dataset.name}: {'; '.join(dataset.notes)}")


def _load_digits(seed):
    digits = load_digits()
    inputs, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    names = tuple(map(str, digits.target_names))
    parts = _split(np.arange(len(labels)), labels, seed)
    return Dataset("digits", *_examples(inputs, parts), names, (8, 8), parts[0][0])


def _load_classification(path, table, seed):
    labels, names = _classes(table.cells)
    hint = " Is it an id, or a quantity? `digits --predict number` predicts quantities."
    _check_classes(path, labels, names, hint if all(map(is_number, names)) else " Is it an id?")
    parts = _split(np.arange(len(labels)), labels, seed)
    examples = _standardise(*_examples(table.inputs, parts))
    rows = table.rows[parts[0][0]]
    return Dataset(path.stem, *examples, names, None, rows, notes=table.notes)


def _load_regression(path, table, seed):
    where = f"{path}: column {table.target!r}"
    faults = [
        f"{where}, row {row}: {cell!r} is not a finite number."
        for cell, row in zip(table.cells, table.rows, strict=True)
        if not is_number(cell) or not math.isfinite(float(cell))
    ]
    raise_faults(faults)
    numbers = np.array(table.cells, float)[:, None]
    if len(numbers) < FEWEST:
        raise DataError(f"{path}: {len(numbers)} rows; expected at least {FEWEST}.")
    parts = _split(np.arange(len(numbers)), numbers, seed, stratified=False)
    mean, deviation = parts[0][1].mean(), parts[0][1].std()
    if np.ptp(parts[0][1]) == 0:
        raise DataError(f"{where} is {mean:g} in every row of the training set.")
    scaled = [(x, ((y - mean) / deviation).astype(np.float32)) for x, y in parts]
    examples = _standardise(*_examples(table.inputs, scaled))
    quantity = Quantity(table.target, float(mean), float(deviation))
    rows = table.rows[parts[0][0]]
    return Dataset(path.stem, *examples, (), None, rows, quantity, table.notes)


def _looks_continuous(cells):
    """Whether a target has many different values, all of them numbers and not all integers."""
    values = set(cells)
    return (
        len(values) > MOST_CLASSES
        and all(map(is_number, values))
        and not all(float(value).is_integer() for value in values)
    )


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


def _check_classes(path, labels, names, hint=""):
    """Raises if there is only one class, or a class has too few examples to be in every set."""
    if len(names) == 1:
        raise DataError(f"{path}: only one class, {names[0]!r}; at least two are needed.")
    counts = zip(names, np.bincount(labels), strict=True)
    needs = f"expected at least {FEWEST} examples, so that every set has some"
    small = [f"class {name!r}: {needs}; found {n}." for name, n in counts if n < FEWEST]
    if len(small) > SMALL_CLASSES_SHOWN:
        more = f"{len(small)} of the {len(names)} classes are too small"
        raise DataError(f"{path}: {more}, such as {small[0]}{hint}")
    raise_faults([f"{path}: {fault}" for fault in small])


def _split(inputs, labels, seed, *, stratified=True):
    """Returns the training, validation and test sets, the last two of equal size."""
    rest, test = _hold_out(inputs, labels, HELD_OUT, seed, stratified=stratified)
    train, validation = _hold_out(*rest, len(test[1]), seed, stratified=stratified)
    return train, validation, test


def _examples(inputs, parts):
    """Replaces the places in each set by the inputs at these places."""
    return [(inputs[places], labels) for places, labels in parts]


def _hold_out(inputs, labels, size, seed, *, stratified=True):
    """Splits into two shuffled sets; `size` is the second's size or its share."""
    inputs, held_inputs, labels, held_labels = train_test_split(
        inputs, labels, test_size=size, stratify=labels if stratified else None, random_state=seed
    )
    return (inputs, labels), (held_inputs, held_labels)


def _by(sizes):
    return " x ".join(str(size) for size in sizes)
