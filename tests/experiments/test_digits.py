"""The digits experiment, in small: it trains, reports and draws, and it rejects wrong flags."""

import gzip
import re
import struct

import jax
import numpy as np
import pytest
from matplotlib import pyplot as plt
from sklearn.metrics import r2_score

import jaxbp as bp
from experiments import digits
from experiments.common import data

pytestmark = pytest.mark.usefixtures("as_shipped")
SMALL = {"hidden": (16,), "epochs": 6, "patience": 6, "dropout": 0.0, "learning_rate": 0.03}


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_it_learns_reports_and_draws(tmp_path, capsys):
    accuracy = digits.main(digits.Config(**SMALL, out=tmp_path / "out"))
    printed = capsys.readouterr().out
    assert accuracy > 0.8
    assert f"test accuracy {accuracy:.2%}" in printed
    # 64 x 16 + 16 and 16 x 10 + 10.
    assert "dense(16)      16       1,040" in printed
    assert "all                     1,210" in printed
    assert "largest relative error" in printed
    assert files_in(tmp_path) == ["digits.npz", "digits.png"]
    assert (tmp_path / "out" / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("activation", digits.ACTIVATIONS)
def test_every_activation_and_dropout_make_a_network(activation):
    config = digits.Config(hidden=(7, 5), activation=activation, dropout=0.5)
    parts, net = digits.make_network(config, 3)
    assert [part.name.split("(")[0] for part in parts] == [
        "dense", activation, "dropout", "dense", activation, "dropout", "dense",
    ]  # fmt: skip
    params, out_shape = net.init(jax.random.key(0), (4,))
    assert out_shape == (3,)
    assert params[0]["weight"].shape == (4, 7)


def test_convolutions_stand_before_the_dense_layers():
    config = digits.Config(model="conv", channels=(4, 6), hidden=(7,))
    parts, net = digits.make_network(config, 3)
    assert [part.name.split("(")[0] for part in parts] == [
        *["conv", "relu", "max_pool"] * 2, "flatten", "dense", "relu", "dropout", "dense",
    ]  # fmt: skip
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), (8, 8, 1))[0])
    assert shapes[3]["weight"].shape == (3, 3, 4, 6)
    assert shapes[7]["weight"].shape == (2 * 2 * 6, 7)


@pytest.mark.thorough
def test_convolutions_take_images(tmp_path):
    path = write_csv(tmp_path / "flowers.csv")
    config = digits.Config(model="conv", data=path, target="species", out=tmp_path / "out")
    with pytest.raises(ValueError, match="model is 'conv', which takes images; flowers has none"):
        digits.main(config)


@pytest.mark.thorough
@pytest.mark.parametrize("optimizer", digits.OPTIMIZERS)
def test_every_optimizer_makes_a_step(optimizer):
    net = bp.chain(bp.dense(3))
    made = digits.OPTIMIZERS[optimizer](0.1)
    state = bp.init_state(net, made, jax.random.key(0), (4,))
    step = bp.make_step(net, bp.softmax_cross_entropy, made)
    x, labels = np.ones((5, 4), np.float32), np.zeros(5, np.int32)
    state, first = step(state, x, labels)
    _, second = step(state, x, labels)
    assert second["loss"] < first["loss"]


def test_error_size_is_the_root_mean_square():
    assert float(digits.error_size(bp.Bias(np.array([[3.0, -4.0]])))) == pytest.approx(12.5**0.5)


def write_csv(path, bad=None):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(90):
        kind = ("setosa", "virginica")[i % 2]
        rows.append([f"{rng.normal() + 3 * (i % 2):.3f}", f"{rng.normal():.3f}", kind])
    if bad is not None:
        rows[bad][1] = "abc"
    lines = [["length", "width", "species"], *rows]
    path.write_text("\n".join(",".join(line) for line in lines))
    return path


@pytest.mark.thorough
def test_a_table_of_ones_own(tmp_path, capsys):
    path = write_csv(tmp_path / "flowers.csv")
    config = digits.Config(**SMALL, data=path, target="species", out=tmp_path / "out")
    assert digits.main(config) > 0.7
    assert "flowers: " in capsys.readouterr().out
    assert files_in(tmp_path / "out") == ["flowers.npz", "flowers.png"]


def test_a_quantity_in_a_table_with_semicolons_text_and_missing_cells(tmp_path, capsys):
    rng = np.random.default_rng(0)
    lines = ["area;town;price"]
    for i in range(150):
        area, town = rng.uniform(40, 200), i % 2
        lines.append(f"{area:.2f};{'Kiel Ulm'.split()[town]};{3 * area + 90 * town:.3f}")
    lines[7] = ";Ulm;5.0"
    path = tmp_path / "houses.csv"
    path.write_text("\n".join(lines).replace(".", ","))
    options = {"target": "price", "one_hot": ("town",), "drop_missing": True}
    config = digits.Config(
        **{**SMALL, "epochs": 40, "patience": 40}, data=path, **options, out=tmp_path / "out"
    )
    r2 = digits.main(config)
    printed = capsys.readouterr().out
    assert 0.95 < r2 <= 1
    assert "1 of 150 rows have missing cells and are left out" in printed
    assert "decimal commas" in printed
    assert "predicts 'price'" in printed
    found = re.search(r"test R2 (\S+) \(root mean square error (\S+) of 'price'\)", printed)
    assert float(found[1]) == pytest.approx(r2, abs=1e-4)
    # The standard deviation of the price is about 150, so the error in its units is this.
    assert float(found[2]) == pytest.approx(150 * (1 - r2) ** 0.5, rel=0.3)
    assert files_in(tmp_path / "out") == ["houses.npz", "houses.png"]


def test_r2_is_that_of_the_set():
    labels = np.array([[1.0], [2.0], [4.0]], np.float32)
    outputs = labels + np.array([[0.5], [-0.5], [0.0]], np.float32)
    quantity = data.Quantity("price", 0.0, 1.0)
    dataset = data.Dataset("table", *[(labels, labels)] * 3, (), None, np.arange(3), quantity)
    got = np.mean(digits.measure_of(dataset, dataset.test)(outputs, labels))
    assert got == pytest.approx(r2_score(labels, outputs), rel=1e-6)


def test_a_confusion_matrix_of_many_classes_is_drawn_without_numbers():
    names = tuple(map(str, range(digits.CLASSES_COUNTED + 1)))
    labels = np.arange(len(names))
    dataset = data.Dataset("table", *[(None, labels)] * 3, names, None, labels)
    figure = plt.figure()
    digits.draw_confusions(figure, np.eye(len(names)), dataset)
    assert not figure.axes[0].texts
    plt.close(figure)


def test_a_bad_cell_is_named_and_nothing_is_written(tmp_path):
    path = write_csv(tmp_path / "flowers.csv", bad=40)
    config = digits.Config(data=path, target="species", out=tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"flowers\.csv: row 42, column 'width': 'abc' is not a num"
    ):
        digits.main(config)
    assert files_in(tmp_path) == ["flowers.csv"]


@pytest.mark.thorough
@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_a_folder_of_images(model, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for part, n in (("train", 60), ("t10k", 20)):
        labels = np.arange(n, dtype=np.uint8) % 2
        images = rng.integers(0, 99, (n, 4, 3)).astype(np.uint8)
        images[:, 0] += 150 * labels[:, None]
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            with gzip.open(tmp_path / f"{part}-{name}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())
    options = {"model": model, "channels": (5,), "data": tmp_path, "out": tmp_path / "out"}
    assert digits.main(digits.Config(**SMALL, **options)) > 0.9
    assert files_in(tmp_path / "out") == [f"{tmp_path.name}.{kind}" for kind in ("npz", "png")]
    # 3 x 3 x 5 + 5 parameters on images of 4 x 3, which pooling reduces to 2 x 1.
    shown = re.search(r"conv\(5, \(3, 3\)\) +4x3x5 +50\n", capsys.readouterr().out)
    assert bool(shown) == (model == "conv")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": (16, 0)}, "dense: features is 0"),
        ({"learning_rate": -0.1}, r"learning-rate is -0.1; it takes a number in \(0, 1000\]"),
        ({"seed": -1}, "seed is -1; it takes an integer"),
        ({"dropout": 1.5}, "dropout: drop_prob is 1.5"),
        ({"epochs": 0}, "epochs is 0, expected a positive integer"),
        ({"batch_size": -3}, "batch_size is -3, expected a positive integer"),
    ],
)
def test_wrong_flags_are_refused_and_nothing_is_written(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        digits.main(digits.Config(**wrong, out=tmp_path / "out"))
    assert files_in(tmp_path) == []


def test_a_file_in_the_place_of_the_folder_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match=r"out takes a directory: .*out is a file"):
        digits.main(digits.Config(out=tmp_path / "out" / "below"))
    assert (tmp_path / "out").read_text() == "mine"
    assert capsys.readouterr().out == ""
