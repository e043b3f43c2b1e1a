"""Data: each source gives what the file holds, and errors name the place of what is wrong."""

import csv
import gzip
import io
import re
import struct

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from experiments import mislabeled, private
from experiments.common import csv_table, data

DROP = "--drop-missing leaves out the rows with missing cells."
FLOAT32_MAX = float(np.finfo(np.float32).max)


def parts_of(dataset):
    return dataset.train, dataset.validation, dataset.test


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(*rows, header="x,y,target"):
    """A CSV of good rows, eight of each class, and then `rows`, of which the first is row 18."""
    good = [f"{i},{i % 3},{'ab'[i % 2]}" for i in range(16)]
    return "\n".join([header, *good, *rows]) + "\n"


def message_of(call, *args, **kwargs):
    with pytest.raises(data.DataError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# The splits.


def assert_stratified(dataset, shares):
    labels = np.concatenate([labels for _, labels in parts_of(dataset)])
    whole = np.bincount(labels)
    for (_, part), share in zip(parts_of(dataset), shares, strict=True):
        counts = np.bincount(part, minlength=len(whole))
        assert np.all(np.abs(counts - share * whole) < 2)


def assert_types(dataset):
    for inputs, labels in parts_of(dataset):
        assert (inputs.dtype, labels.dtype) == (np.float32, np.int32)
        assert (inputs.ndim, labels.shape) == (2, inputs.shape[:1])


def sorted_rows(inputs, labels):
    rows = np.column_stack([inputs, labels])
    return rows[np.lexsort(rows.T)]


def test_digits_are_split_without_loss():
    dataset = data.load(None)
    assert_types(dataset)
    assert_stratified(dataset, (0.7, 0.15, 0.15))
    assert [len(labels) for _, labels in parts_of(dataset)] == [1257, 270, 270]
    assert dataset.name == "digits"
    assert dataset.class_names == tuple("0123456789")
    assert dataset.image_shape == (8, 8)
    digits = load_digits()
    together = [np.concatenate(pieces) for pieces in zip(*parts_of(dataset), strict=True)]
    np.testing.assert_array_equal(
        sorted_rows(*together), sorted_rows(digits.data / 16, digits.target)
    )


def test_training_examples_are_found_in_their_source(tmp_path):
    dataset = data.load(None, seed=3)
    np.testing.assert_array_equal(
        dataset.train[0], (load_digits().data[dataset.train_rows] / 16).astype(np.float32)
    )
    lines = ["x,target", "", *(f"{i},{'ab'[i % 2]}" for i in range(40))]  # example i in row i + 3
    dataset = data.load(write(tmp_path / "table.csv", "\n".join(lines)), seed=3)
    x = dataset.train_rows - 3.0
    np.testing.assert_allclose(dataset.train[0][:, 0], (x - x.mean()) / x.std(), rtol=1e-5)


def test_the_seed_decides_the_split():
    first, again, other = data.load(None), data.load(None, seed=0), data.load(None, seed=1)
    for part, same, different in zip(*map(parts_of, (first, again, other)), strict=True):
        np.testing.assert_array_equal(part[0], same[0])
        np.testing.assert_array_equal(part[1], same[1])
        assert not np.array_equal(part[0], different[0])


def test_splits_are_disjoint_cover_all_and_keep_labels():
    labels = np.repeat([0, 1, 2], [20, 40, 60]).astype(np.int32)
    inputs = np.arange(120.0).reshape(-1, 1)
    parts = data._split(inputs, labels, 3)
    numbers = np.concatenate([x[:, 0] for x, _ in parts]).astype(int)
    np.testing.assert_array_equal(np.sort(numbers), np.arange(120))
    np.testing.assert_array_equal(np.concatenate([y for _, y in parts]), labels[numbers])
    assert [len(y) for _, y in parts] == [84, 18, 18]
    assert not np.array_equal(parts[0][1], np.sort(parts[0][1]))  # shuffled


@settings(deadline=None)
@given(st.lists(st.integers(7, 60), min_size=1, max_size=12), st.integers(0, 99))
def test_seven_examples_of_a_class_are_enough(others, seed):
    sizes = [data.FEWEST, *others]
    labels = np.repeat(np.arange(len(sizes)), sizes)
    for _, part in data._split(labels.reshape(-1, 1), labels, seed):
        assert set(part) == set(labels)


# CSV: what the file holds.

NAMES = st.text(st.characters(codec="utf-8"), max_size=6).map(str.strip)
NUMBERS = st.floats(-FLOAT32_MAX, FLOAT32_MAX)


@st.composite
def tables(draw):
    """Column names, numbers [N, I], and N targets, which are never empty."""
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    rows = draw(st.lists(st.lists(NUMBERS, min_size=len(names), max_size=len(names)), min_size=1))
    targets = draw(st.lists(NAMES.filter(bool), min_size=len(rows), max_size=len(rows)))
    return names, rows, targets


def as_csv(rows, ending):
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator=ending).writerows(rows)
    return text.getvalue()


@settings(deadline=None)  # the disk may be slow
@given(tables(), st.integers(0, 4), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_a_table_comes_back_as_it_was_written(tmp_path_factory, written, at, ending, bom):
    names, numbers, targets = written
    assume("the target" not in names)
    rows = [
        [*row[:at], target, *row[at:]]
        for row, target in zip([names, *numbers], ["the target", *targets], strict=True)
    ]
    text = "\ufeff" * bom + as_csv(rows, ending)
    path = write(tmp_path_factory.getbasetemp() / "table.csv", text)
    inputs, cells, *_ = csv_table.read(path, "the target")
    np.testing.assert_array_equal(inputs, numbers, strict=True)
    assert cells == targets


@settings(deadline=None)  # the disk may be slow
@given(tables(), st.sampled_from(["\n", "\r\n", "\r"]), st.data())
def test_a_bad_cell_is_found_where_an_editor_shows_it(tmp_path_factory, written, ending, draw):
    names, numbers, targets = written
    assume("the target" not in names)
    rows = [[*row, target] for row, target in zip(numbers, targets, strict=True)]
    bad, column = draw.draw(st.integers(0, len(rows) - 1)), draw.draw(st.integers(0, len(names)))
    before = as_csv([[*names, "the target"], *rows[:bad]], ending)
    rows[bad][column] = ""
    path = write(tmp_path_factory.getbasetemp() / "table.csv", before + as_csv(rows[bad:], ending))
    line = len(re.findall("\r\n|\r|\n", before)) + 1
    name = [*names, "the target"][column]
    message = message_of(csv_table.read, path, "the target")
    assert message == f"{path}: row {line}, column {name!r}: the cell is empty.\n{DROP}"


WAYS_TO_WRITE = {
    "plain": table(),
    "byte order mark": "\ufeff" + table(),
    "CRLF": table().replace("\n", "\r\n"),
    "CR": table().replace("\n", "\r"),
    "no end of line": table().rstrip("\n"),
    "blank lines at the end": table("", "  ", "", ""),
    "blank line at the start": "\n" + table(),
    "blank lines between": table().replace("\n", "\n\n"),
    "spaces around commas": table().replace(",", " , "),
    "spaces at line ends": table().replace("\n", " \n"),
    "all quoted": re.sub("[^,\n]+", r'"\g<0>"', table()),
    "quoted after spaces": re.sub("[^,\n]+", r'"\g<0>"', table()).replace(",", ", "),
    "some quoted": table(header='"x",y,"target"'),
}


@pytest.mark.parametrize("content", WAYS_TO_WRITE.values(), ids=WAYS_TO_WRITE)
def test_ways_to_write_the_same_table(tmp_path, content):
    inputs, cells, *_ = csv_table.read(write(tmp_path / "table.csv", content), None)
    np.testing.assert_array_equal(inputs, [[i, i % 3] for i in range(16)])
    assert cells == ["a", "b"] * 8


@pytest.mark.parametrize(
    ("cells", "labels", "names"),
    [
        (["b", "a", "b"], [1, 0, 1], ("a", "b")),
        (["10", "9", "10", "-1"], [2, 1, 2, 0], ("-1", "9", "10")),
        (["10", "9", "x"], [0, 1, 2], ("10", "9", "x")),
        (["2.0", "10.0"], [1, 0], ("10.0", "2.0")),
        (["01", "1", "+1", "2"], [0, 0, 0, 1], ("1", "2")),
        (["1_0", "10"], [1, 0], ("10", "1_0")),
    ],
)
def test_classes_are_sorted_as_what_they_are(cells, labels, names):
    got, got_names = data._classes(cells)
    assert (got.tolist(), got_names) == (labels, names)


@pytest.mark.parametrize("name", ["target", "label", "class"])
def test_a_target_with_a_usual_name_is_found(tmp_path, name):
    path = write(tmp_path / "table.csv", table(header=f"x,y,{name}"))
    assert data.load(path).class_names == ("a", "b")


def test_a_named_target_goes_before_a_usual_name(tmp_path):
    content = "label,kind,class\n" + "".join(f"{i},{i % 2},{i}\n" for i in range(20))
    path = write(tmp_path / "table.csv", content)
    inputs, cells, *_ = csv_table.read(path, "kind")
    np.testing.assert_array_equal(inputs, [[i, i] for i in range(20)])
    assert cells == ["0", "1"] * 10


def test_a_csv_file_is_split_and_standardised_by_its_training_part(tmp_path):
    rng = np.random.default_rng(0)
    numbers = rng.normal([5, -300], [0.1, 70], (200, 2))
    numbers[:, 1] += np.arange(200)
    rows = [[*row.tolist(), "ab"[i % 2]] for i, row in enumerate(numbers)]
    path = write(tmp_path / "flowers.CSV", as_csv([["x", "y", "kind"], *rows], "\n"))
    dataset = data.load(path, target="kind", seed=4)
    assert_types(dataset)
    assert_stratified(dataset, (0.7, 0.15, 0.15))
    assert (dataset.name, dataset.class_names, dataset.image_shape) == ("flowers", ("a", "b"), None)
    raw = data._split(numbers, np.arange(200, dtype=np.int32) % 2, 4)
    mean, deviation = raw[0][0].mean(axis=0), raw[0][0].std(axis=0)
    for (inputs, labels), (x, want) in zip(parts_of(dataset), raw, strict=True):
        np.testing.assert_allclose(inputs, (x - mean) / deviation, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(labels, want)
    assert np.abs(dataset.train[0].mean(axis=0, dtype=np.float64)).max() < 1e-7
    assert np.abs(dataset.test[0].mean(axis=0)).max() > 1e-3


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30, 1e-300])
def test_a_constant_column_is_zero(tmp_path, value):
    content = "x,y,target\n" + "".join(f"{value!r},{i},{i % 2}\n" for i in range(2000))
    for inputs, _ in parts_of(data.load(write(tmp_path / "table.csv", content))):
        np.testing.assert_array_equal(inputs[:, 0], 0)
        assert inputs[:, 1].std() > 0.5


def test_a_column_constant_in_training_alone_is_zero_everywhere():
    train = np.array([[0.1, 1.0], [0.1, 3.0]])
    held = np.array([[7.0, 5.0]])
    got, got_held = data._standardise((train, "labels"), (held, "held labels"))
    np.testing.assert_array_equal(got[0], [[0, -1], [0, 1]])
    np.testing.assert_array_equal(got_held[0], [[0, 3]])
    assert (got[1], got_held[1]) == ("labels", "held labels")


def test_a_deviation_that_underflows_is_zero():
    (inputs, _), *_ = data._standardise((np.array([[0.0], [1e-300]]), None))
    np.testing.assert_array_equal(inputs, [[0], [0]])


# CSV: what can be wrong with it.

QUOTED = '16,1,"one\nlabel, three\nlines"'

CSV_ERRORS = {
    "not a number": (table("abc,1,a"), "row 18, column 'x': 'abc' is not a number."),
    "a number to Python": (table("1_0,1,a"), "row 18, column 'x': '1_0' is not a number."),
    "empty cell": (table("1,,a"), "row 18, column 'y': the cell is empty.\n" + DROP),
    "blank cell": (table("1,  ,a"), "row 18, column 'y': the cell is empty.\n" + DROP),
    "empty target": (table("1,2,"), "row 18, column 'target': the cell is empty.\n" + DROP),
    "nan": (table("nan,1,a"), "row 18, column 'x': the cell is missing: 'nan'.\n" + DROP),
    "inf": (table("1,-inf,a"), "row 18, column 'y': '-inf' is not finite in float32."),
    "too large": (table("1,1e39,a"), "row 18, column 'y': '1e39' is not finite in float32."),
    "too few cells": (table("1,a"), "row 18: the header has 3 cells, this row 2."),
    "too many cells": (table("1,2,a,"), "row 18: the header has 3 cells, this row 4."),
    "after blank lines": (table("", "", "z,1,a"), "row 20, column 'x': 'z' is not a number."),
    "after lines in quotes": (table(QUOTED, "z,1,a"), "row 21, column 'x': 'z' is not a number."),
    "in lines in quotes": (
        table("1,2,a", QUOTED.replace("16", "z")),
        "row 19, column 'x': 'z' is not a number.",
    ),
    "lines in a header's quotes": (
        table("1,z,a", header='x,"y\n(cm)",target'),
        r"row 19, column 'y\n(cm)': 'z' is not a number.",
    ),
    "CRLF": (
        table("1,z,a").replace("\n", "\r\n"),
        "row 18, column 'y': 'z' is not a number.",
    ),
    "a quote without an end": (table('1,"2,a', "1,2,a"), "row 18: unexpected end of data."),
    "text after a quote": (table('1,"2"3,a'), "row 18: ',' expected after '\"'."),
    "no such usual name": (
        table(header="x,y,kind"),
        "row 1: which column is the target? Name one of 'x', 'y', 'kind'.",
    ),
    "two usual names": (
        table(header="x,class,label"),
        "row 1: which column is the target? Name one of 'x', 'class', 'label'.",
    ),
    "repeated names": (table(header="x,x,target"), "row 1: more than one column is called 'x'."),
    "two repeated names": (
        "y,x,x,y,target\n",
        "row 1: more than one column is called 'x' or 'y'.",
    ),
    "only the target": (
        "target\na\nb\n",
        "row 1: there is no column besides the target, 'target'.",
    ),
    "no rows": ("x,target\n", "there is a header, but no row of data."),
    "only blank rows": ("x,target\n\n  \n", "there is a header, but no row of data."),
    "empty file": ("", "the file is empty."),
    "blank file": ("\n \n", "the file is empty."),
    "a mark and nothing": ("\ufeff", "the file is empty."),
    "one class": (
        "x,target\n" + "1,a\n" * 20,
        "only one class, 'a'; at least two are needed.",
    ),
    "a small class": (
        table("1,2,c", "1,2,c"),
        "class 'c': expected at least 7 examples, so that every set has some; found 2.",
    ),
    "Latin-1": (
        table("1,2,a").encode() + b"1,2,caf\xe9\n",
        "row 19: byte 0xe9 is not UTF-8.",
    ),
    "Latin-1 in lines in quotes": (
        table('1,2,"a').encode() + b'caf\xe9"\n',
        "row 19: byte 0xe9 is not UTF-8.",
    ),
    "Latin-1 after CRLF and a mark": (
        b"\xef\xbb\xbfx,target\r\n1,\xe9\r\n",
        "row 2: byte 0xe9 is not UTF-8.",
    ),
    "UTF-16": (table().encode("utf-16"), "row 1: byte 0xff is not UTF-8."),
}


@pytest.mark.parametrize(("content", "message"), CSV_ERRORS.values(), ids=CSV_ERRORS)
def test_what_is_wrong_with_a_csv_file(tmp_path, content, message):
    path = write(tmp_path / "table.csv", content)
    assert message_of(data.load, path) == f"{path}: {message}"


def test_a_target_that_is_not_there(tmp_path):
    path = write(tmp_path / "table.csv", table())
    want = f"{path}: row 1: no column is called 'kind'; there are 'x', 'y', 'target'."
    assert message_of(data.load, path, target="kind") == want


def test_all_that_is_wrong_is_said_at_once_by_column(tmp_path):
    path = write(tmp_path / "table.csv", table("p,q,a", "1,2", "r,1,", "1,,", "s,t,a"))
    faults = [
        "row 18, column 'x': 'p' is not a number (3 rows in all).",
        "row 18, column 'y': 'q' is not a number (2 rows in all).",
        "row 19: the header has 3 cells, this row 2.",
        "row 20, column 'target': the cell is empty (2 rows in all).",
        "row 21, column 'y': the cell is empty.",
    ]
    want = [*(f"{path}: {fault}" for fault in faults), DROP]
    assert message_of(data.load, path).split("\n") == want
    write(path, table(*["1"] * (csv_table.FAULTS_SHOWN + 2)))
    assert message_of(data.load, path).split("\n")[-1] == "... and 2 more."


def test_columns_of_text_are_named_with_the_flag_that_takes_them(tmp_path):
    rows = [f"{i},{'red green'.split()[i % 2]},b c,{i % 2}" for i in range(20)]
    path = write(tmp_path / "table.csv", "\n".join(["x,colour,the kind,target", *rows]))
    assert message_of(data.load, path).split("\n") == [
        f"{path}: row 2, column 'colour': 'red' is not a number (20 rows in all).",
        f"{path}: row 2, column 'the kind': 'b c' is not a number (20 rows in all).",
        "--one-hot colour 'the kind' gives each value of a column of text its own column.",
    ]
    inputs, *_ = csv_table.read(path, None, one_hot=("the kind", "colour"))
    even = np.arange(20) % 2 == 0
    np.testing.assert_array_equal(inputs, np.stack([np.arange(20), ~even, even, np.ones(20)], 1))


@pytest.mark.parametrize(
    ("one_hot", "message"),
    [
        (("shape",), "row 1: one-hot takes names of columns, and none is called 'shape'; there"),
        (("target",), "row 1: one-hot takes features; 'target' is the target."),
        (("x",), "column 'x': 101 different values, such as '0'; one-hot takes at most 100."),
    ],
)
def test_columns_that_are_no_text_to_encode(one_hot, message, tmp_path):
    rows = [f"{i},{i % 3},{i % 2}" for i in range(101)]
    path = write(tmp_path / "table.csv", "\n".join(["x,y,target", *rows]))
    assert f"{path}: {message}" in message_of(data.load, path, one_hot=one_hot)


def test_rows_with_missing_cells_are_left_out_and_counted(tmp_path):
    rows = [",1,a", "NA,1,a", "1,?,b", "1,2,", "None,NaN,a", "3,4,none"]
    path = write(tmp_path / "table.csv", table(*rows))
    read = csv_table.read(path, None, drop_missing=True)
    np.testing.assert_array_equal(read.inputs[-2:], [[15, 0], [3, 4]])
    assert (len(read.cells), read.cells[-1], read.rows[-1]) == (17, "none", 23)
    assert read.notes == ("5 of 22 rows have missing cells and are left out",)
    with pytest.raises(data.DataError, match="no row of data: 2 have missing cells"):
        csv_table.read(write(path, "x,target\n,a\n1,\n"), None, drop_missing=True)


def test_semicolons_tabs_and_decimal_commas(tmp_path):
    rows = ["x;y;target", "1,5;-2;0,5", "2e-1;,25;1"]
    for delimiter, name in ((";", "semicolons"), ("\t", "tabs")):
        content = "\n".join(rows).replace(";", delimiter)
        read = csv_table.read(write(tmp_path / "table.csv", content), None)
        np.testing.assert_array_equal(read.inputs, [[1.5, -2], [0.2, 0.25]])
        assert read.cells == ["0.5", "1"]
        assert read.notes[0] == f"cells are separated by {name}"
        assert read.notes[1] == "numbers have decimal commas, such as 1,5"
    words = "a;b;target\n1;2;x,1\n3;4;y,2\n"
    assert csv_table.read(write(tmp_path / "table.csv", words), None).cells == ["x,1", "y,2"]
    names = 'a,"b;c;d;e",target\n1,2,u\n'
    assert csv_table.read(write(tmp_path / "table.csv", names), None).inputs.tolist() == [[1, 2]]


@pytest.mark.parametrize("cell", ["1.234,5", "1,234,5", "1,5,", ","])
def test_thousands_are_no_decimals(cell, tmp_path):
    path = write(tmp_path / "table.csv", f"x;target\n1;a\n{cell};b\n")
    assert f"row 3, column 'x': {cell!r} is not a number." in message_of(data.load, path)


def test_commas_and_points_in_one_file_are_refused(tmp_path):
    path = write(tmp_path / "table.csv", "x;y;target\n1,5;2.5;a\n")
    want = "decimal commas, such as 1,5, and some have decimal points, such as 2.5"
    assert want in message_of(data.load, path)


def test_a_file_without_a_header(tmp_path):
    path = write(tmp_path / "table.csv", "5.1,3.5,0\n4.9,3.0,1\n")
    want = f"{path}: row 1: all cells are numbers, so this is no header."
    assert message_of(data.load, path, target="x").startswith(want)
    years = "2019,2020\n" + "".join(f"{i},{i % 2}\n" for i in range(20))
    assert data.load(write(path, years), target="2020").class_names == ("0", "1")


# CSV: a quantity to predict.


def quantities(n=40):
    rng = np.random.default_rng(0)
    return rng.normal(50, 7, n)


def test_a_quantity_is_recognised_and_standardised_by_the_training_set(tmp_path):
    y = quantities()
    lines = ["x,price", *(f"{i},{value!r}" for i, value in enumerate(y.tolist()))]
    dataset = data.load(write(tmp_path / "table.csv", "\n".join(lines)), target="price", seed=3)
    assert (dataset.class_names, dataset.quantity.name) == ((), "price")
    assert [len(labels) for _, labels in parts_of(dataset)] == [28, 6, 6]
    train = y[dataset.train_rows - 2]
    mean, deviation = dataset.quantity[1:]
    np.testing.assert_allclose([mean, deviation], [train.mean(), train.std()])
    for inputs, labels in parts_of(dataset):
        assert (labels.dtype, labels.shape) == (np.float32, (len(inputs), 1))
    np.testing.assert_allclose(dataset.train[1][:, 0] * deviation + mean, train, rtol=1e-6)
    together = np.concatenate([labels for _, labels in parts_of(dataset)])[:, 0]
    np.testing.assert_allclose(np.sort(together * deviation + mean), np.sort(y), rtol=1e-6)


@pytest.mark.parametrize(
    ("cells", "predict", "is_number"),
    [
        ([f"{i / 2}" for i in range(21)] * 7, "auto", True),
        ([f"{i / 2}" for i in range(20)] * 7, "auto", False),
        ([f"{i}.0" for i in range(30)] * 7, "auto", False),
        ([f"{i}" for i in range(30)] * 7, "number", True),
        ([f"{i / 2}" for i in range(30)] * 7, "class", False),
        (["a", *[f"{i / 2}" for i in range(30)]] * 7, "auto", False),
    ],
)
def test_classes_and_numbers(cells, predict, is_number, tmp_path):
    lines = ["x,target", *(f"{i},{cell}" for i, cell in enumerate(cells))]
    path = write(tmp_path / "table.csv", "\n".join(lines))
    dataset = data.load(path, predict=predict)
    assert (dataset.quantity is not None) == is_number
    assert len(dataset.class_names) == (0 if is_number else len(set(cells)))


@pytest.mark.parametrize(
    ("cells", "predict", "message"),
    [
        (range(40), "auto", "40 of the 40 classes are too small, .*`digits --predict number"),
        ([f"u{i}" for i in range(40)], "auto", r"40 of the 40 classes .* found 1. Is it an id\?$"),
        (["a", "b"] * 8, "number", "column 'target', row 2: 'a' is not a finite number"),
        (["inf", "1"] * 8, "number", "column 'target', row 2: 'inf' is not a finite number"),
        (["1"] * 16, "number", "column 'target' is 1 in every row of the training set"),
        (["1", "2"], "number", "2 rows; expected at least 7"),
    ],
)
def test_targets_that_cannot_be_predicted(cells, predict, message, tmp_path):
    lines = ["x,target", *(f"{i},{cell}" for i, cell in enumerate(cells))]
    path = write(tmp_path / "table.csv", "\n".join(lines))
    assert re.search(message, message_of(data.load, path, predict=predict))


def test_every_small_class_is_named(tmp_path):
    path = write(tmp_path / "table.csv", table("1,2,c", "1,2,d", "1,2,d"))
    message = message_of(data.load, path)
    assert re.findall(r"class '(\w)'.*found (\d)\.", message) == [("c", "1"), ("d", "2")]


def test_paths_that_are_no_data(tmp_path):
    missing = tmp_path / "missing.csv"
    assert message_of(data.load, missing) == f"{missing}: no such file or directory."
    text = write(tmp_path / "table.txt", table())
    assert message_of(data.load, text) == f"{text}: neither a .csv file nor a directory."


def test_a_target_is_for_csv_files_only(tmp_path):
    want = "target 'x': only a .csv file has columns to choose from."
    assert message_of(data.load, None, target="x") == want
    assert message_of(data.load, tmp_path, target="x") == want
    want = "one-hot, drop-missing and predict number are for a .csv file only."
    assert message_of(data.load, None, drop_missing=True) == want


# IDX.

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = data.IDX_FILES


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + bytes(array)
    )


def idx_arrays():
    """The array of each file: 60 and 9 images of 4 x 3 pixels, of the classes 2, 5 and 7."""
    rng = np.random.default_rng(0)
    labels = np.array([2, 5, 7], np.uint8)
    return {
        TRAIN_IMAGES: rng.integers(0, 256, (60, 4, 3), dtype=np.uint8),
        TRAIN_LABELS: np.repeat(labels, 20),
        TEST_IMAGES: rng.integers(0, 256, (9, 4, 3), dtype=np.uint8),
        TEST_LABELS: np.array([7, 2, 2, 5, 7, 7, 5, 2, 7], np.uint8),
    }


def write_idx(folder, **changes):
    """Writes the four files; `changes` replaces their bytes, and None leaves a file out."""
    contents = {name: idx(array) for name, array in idx_arrays().items()} | changes
    for name, content in contents.items():
        if content is not None:
            write(folder / name, content)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("mark", ["-idx", ".idx"])
def test_idx_files_come_back_as_they_were_written(tmp_path, zipped, mark):
    arrays = idx_arrays()
    for name, array in arrays.items():
        content = gzip.compress(idx(array)) if zipped else idx(array)
        write(tmp_path / (name.replace("-idx", mark) + ".gz" * zipped), content)
    dataset = data.load(tmp_path)
    assert_types(dataset)
    assert dataset.name == tmp_path.name
    assert dataset.class_names == ("2", "5", "7")
    assert dataset.image_shape == (4, 3)
    pixels = [np.rint(inputs * 255).reshape(-1, 4, 3) for inputs, _ in parts_of(dataset)]
    values = [np.array([2, 5, 7])[labels] for _, labels in parts_of(dataset)]
    np.testing.assert_array_equal(values[2], arrays[TEST_LABELS])
    want = arrays[TEST_IMAGES].reshape(9, 12).astype(np.float32) / 255
    np.testing.assert_array_equal(dataset.test[0], want)
    np.testing.assert_array_equal(
        sorted_rows(np.concatenate(pixels[:2]).reshape(60, 12), np.concatenate(values[:2])),
        sorted_rows(arrays[TRAIN_IMAGES].reshape(60, 12), arrays[TRAIN_LABELS]),
    )
    np.testing.assert_array_equal(pixels[0], arrays[TRAIN_IMAGES][dataset.train_rows])
    counts = [np.bincount(labels).tolist() for _, labels in parts_of(dataset)]
    assert counts == [[17, 17, 17], [3, 3, 3], [3, 2, 4]]


def test_idx_files_of_mixed_spellings_are_found(tmp_path):
    write_idx(tmp_path, **{TEST_IMAGES: None})
    images = gzip.compress(idx(idx_arrays()[TEST_IMAGES]))
    write(tmp_path / (TEST_IMAGES.replace("-idx", ".idx") + ".gz"), images)
    assert len(data.load(tmp_path).test[0]) == 9


IMAGES, LABELS = idx_arrays()[TRAIN_IMAGES], idx_arrays()[TRAIN_LABELS]
MAGIC = "expected 00 00 08 03: IDX of uint8 in 3 dimensions."

IDX_ERRORS = {
    "not IDX": (TRAIN_IMAGES, b"P5 28 28", f"starts with bytes 50 35 20 32, {MAGIC}"),
    "gzip without .gz": (
        TRAIN_IMAGES,
        gzip.compress(idx(IMAGES)),
        f"starts with bytes 1f 8b 08 00, {MAGIC}",
    ),
    "not uint8": (
        TRAIN_IMAGES,
        b"\0\0\x0d" + idx(IMAGES)[3:],
        f"starts with bytes 00 00 0d 03, {MAGIC}",
    ),
    "labels for images": (
        TRAIN_IMAGES,
        idx(LABELS),
        f"starts with bytes 00 00 08 01, {MAGIC}",
    ),
    "images for labels": (
        TEST_LABELS,
        idx(IMAGES),
        "starts with bytes 00 00 08 03, expected 00 00 08 01: IDX of uint8 in 1 dimensions.",
    ),
    "three bytes": (TRAIN_IMAGES, b"\0\0\x08", f"starts with bytes 00 00 08, {MAGIC}"),
    "half a header": (
        TRAIN_IMAGES,
        idx(IMAGES)[:10],
        "expected a header of 16 bytes, found 10.",
    ),
    "truncated": (
        TRAIN_IMAGES,
        idx(IMAGES)[:-20],
        "truncated: sizes 60 x 4 x 3 need 720 bytes of data, found 700.",
    ),
    "too long": (
        TRAIN_LABELS,
        idx(LABELS) + b"\n",
        "too long: sizes 60 need 60 bytes of data, found 61.",
    ),
    "sizes beyond memory": (
        TEST_IMAGES,
        b"\0\0\x08\3" + b"\xff" * 12,
        "truncated: sizes 4294967295 x 4294967295 x 4294967295 need "
        f"{(2**32 - 1) ** 3} bytes of data, found 0.",
    ),
    "no images": (TEST_IMAGES, idx(IMAGES[:0]), "no examples: its sizes are 0 x 4 x 3."),
    "no labels": (TEST_LABELS, idx(LABELS[:0]), "no examples: its sizes are 0."),
    "empty file": (TEST_IMAGES, b"", "the file is empty."),
    "fewer labels": (
        TRAIN_LABELS,
        idx(LABELS[1:]),
        "{TRAIN_IMAGES}: 60 images, but {TRAIN_LABELS} has 59 labels.",
    ),
    "fewer test labels": (
        TEST_LABELS,
        idx(LABELS[:8]),
        "{TEST_IMAGES}: 9 images, but {TEST_LABELS} has 8 labels.",
    ),
    "other image size": (
        TEST_IMAGES,
        idx(np.zeros((9, 3, 4), np.uint8)),
        "images are 3 x 4, but 4 x 3 in {TRAIN_IMAGES}.",
    ),
    "labels of the test alone": (
        TEST_LABELS,
        idx(np.array([2, 5, 7, 2, 5, 7, 9, 9, 0], np.uint8)),
        "labels that do not occur in {TRAIN_LABELS}: [0, 9].",
    ),
    "a small class": (
        TRAIN_LABELS,
        idx(np.repeat(np.array([2, 5, 7], np.uint8), [6, 24, 30])),
        "class '2': expected at least 7 examples, so that every set has some; found 6.",
    ),
}


def in_folder(folder, message):
    """The message, with each file name in braces replaced by the file's path."""
    names = ("TRAIN_IMAGES", "TRAIN_LABELS", "TEST_IMAGES", "TEST_LABELS")
    return message.format(**{key: folder / globals()[key] for key in names})


@pytest.mark.parametrize(("name", "content", "message"), IDX_ERRORS.values(), ids=IDX_ERRORS)
def test_what_is_wrong_with_an_idx_file(tmp_path, name, content, message):
    write_idx(tmp_path, **{name: content})
    message = in_folder(tmp_path, message)
    subject = "" if message.startswith(str(tmp_path)) else f"{tmp_path / name}: "
    assert message_of(data.load, tmp_path) == subject + message


def test_idx_files_of_one_class(tmp_path):
    ones = {TRAIN_LABELS: idx(np.ones(60, np.uint8)), TEST_LABELS: idx(np.ones(9, np.uint8))}
    want = f"{tmp_path / TRAIN_LABELS}: only one class, '1'; at least two are needed."
    assert message_of(data.load, write_idx(tmp_path, **ones)) == want


def spoiled(content, at):
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


ZIPPED = gzip.compress(idx(IMAGES))


@pytest.mark.parametrize(
    "content",
    [ZIPPED[:-30], ZIPPED[:5], spoiled(ZIPPED, 12), spoiled(ZIPPED, -5), idx(IMAGES)],
    ids=["truncated", "half a header", "data", "checksum", "not gzip"],
)
def test_a_corrupt_gzip_file(tmp_path, content):
    write_idx(tmp_path, **{TRAIN_IMAGES: None, f"{TRAIN_IMAGES}.gz": content})
    message = message_of(data.load, tmp_path)
    assert message.startswith(f"{tmp_path / TRAIN_IMAGES}.gz: not a complete gzip file: ")


@pytest.mark.parametrize("content", [b"", gzip.compress(b"")], ids=["no bytes", "of nothing"])
def test_an_empty_gzip_file(tmp_path, content):
    write_idx(tmp_path, **{TRAIN_IMAGES: None, f"{TRAIN_IMAGES}.gz": content})
    want = f"{tmp_path / TRAIN_IMAGES}.gz: the file is empty."
    assert message_of(data.load, tmp_path) == want


def test_missing_idx_files_are_all_listed(tmp_path):
    write_idx(tmp_path, **{TRAIN_LABELS: None, TEST_IMAGES: None})
    want = f"{tmp_path}: no {TRAIN_LABELS}, no {TEST_IMAGES}, with or without .gz."
    assert message_of(data.load, tmp_path) == want


@pytest.mark.parametrize("experiment", [mislabeled, private], ids=["mislabeled", "private"])
def test_a_quantity_has_no_classes_and_is_refused(experiment, tmp_path):
    path = tmp_path / "houses.csv"
    path.write_text("area,price\n" + "".join(f"{i},{1.5 * i}\n" for i in range(40)))
    config = experiment.Config(data=path, target="price", out=tmp_path / "out")
    want = "40 of the 40 classes are too small.*Is it an id, or a quantity.*digits"
    with pytest.raises(ValueError, match=want):
        experiment.main(config)
