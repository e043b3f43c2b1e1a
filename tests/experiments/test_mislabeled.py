"""Mislabeled: scores agree with their formulas, flips are found, a table of one's own is ranked."""

import csv
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

import jaxbp as bp
from experiments import mislabeled

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("as_shipped")]
SMALL = {"hidden": (32,), "epochs": 6, "every": 3, "networks": 2, "early": 4}
LINEAR = bp.chain(bp.dense(3))


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def read_table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)
    return rng.normal(size=(20, 4)).astype(np.float32), rng.integers(0, 3, 20).astype(np.int32)


def linear_gradients(params, inputs, labels):
    """Each example's gradient (x_n, 1) (p_n - t_n)^T, [N, I + 1, C]; p_n - t_n; and p_n."""
    weight, bias = (np.asarray(params[0][name], np.float64) for name in ("weight", "bias"))
    exponentials = np.exp(inputs @ weight + bias)
    p = exponentials / exponentials.sum(axis=1, keepdims=True)
    delta = p - np.eye(3)[labels]
    extended = np.column_stack([inputs, np.ones(len(inputs))])
    return extended[:, :, None] * delta[:, None, :], delta, p


@pytest.mark.parametrize("batch", [7, 1024])
def test_traced_scores_of_a_linear_network_are_their_formulas(batch, examples, monkeypatch):
    monkeypatch.setattr(mislabeled, "BATCH", batch)
    kept = [LINEAR.init(jax.random.key(seed), (4,))[0] for seed in (1, 2)]
    train, held_out = [array[:15] for array in examples], [array[15:] for array in examples]
    config = mislabeled.Config(learning_rate=0.3)
    own, against = mislabeled.trace(LINEAR, kept, train, held_out, config)

    wanted_own, wanted_against = np.zeros(15), np.zeros(15)
    for params in kept:
        g, _, _ = linear_gradients(params, *train)
        direction = linear_gradients(params, *held_out)[0].mean(axis=0)
        wanted_own += 0.3 * (g**2).sum(axis=(1, 2))
        wanted_against -= 0.3 * (g * direction).sum(axis=(1, 2))
    np.testing.assert_allclose(own, wanted_own, rtol=1e-5)
    np.testing.assert_allclose(against, wanted_against, atol=1e-5 * abs(wanted_against).max())


@pytest.mark.parametrize("batch", [7, 1024])
def test_early_scores_of_a_linear_network_are_their_formulas(batch, examples, monkeypatch):
    monkeypatch.setattr(mislabeled, "BATCH", batch)
    drawn, original = [], bp.init_state

    def init_state(*args):
        drawn.append(original(*args))
        return drawn[-1]

    monkeypatch.setattr(mislabeled.bp, "init_state", init_state)
    # The steps are too small to change float32 numbers: the networks keep their initial weights.
    config = mislabeled.Config(networks=3, early=2, learning_rate=1e-30)
    norms, errors, probabilities = mislabeled.look_early(LINEAR, examples, config)

    seen = [linear_gradients(state.params, *examples) for state in drawn]
    wanted_norms = np.mean([np.sqrt((g**2).sum(axis=(1, 2))) for g, _, _ in seen], axis=0)
    wanted_errors = np.mean([np.sqrt((delta**2).sum(axis=1)) for _, delta, _ in seen], axis=0)
    np.testing.assert_allclose(norms, wanted_norms, rtol=1e-5)
    np.testing.assert_allclose(errors, wanted_errors, rtol=1e-5)
    np.testing.assert_allclose(probabilities, np.mean([p for _, _, p in seen], axis=0), rtol=1e-5)
    assert not np.array_equal(drawn[0].params[0]["weight"], drawn[1].params[0]["weight"])


def test_the_early_networks_are_trained(examples):
    inputs, _ = examples
    labels = np.argmax(inputs[:, :3], axis=1).astype(np.int32)
    config = mislabeled.Config(networks=1, learning_rate=0.5, batch_size=4)
    errors = [
        mislabeled.look_early(LINEAR, (inputs, labels), replace(config, early=early))[1]
        for early in (1, 20)
    ]
    assert errors[1].mean() < 0.7 * errors[0].mean()


def test_checkpoints_are_the_parameters_on_the_way(examples):
    config = mislabeled.Config(epochs=5, every=2, learning_rate=0.3, batch_size=8)
    kept = mislabeled.checkpoints(LINEAR, examples, examples, config)

    optimizer = optax.sgd(0.3)
    epoch = bp.make_epoch(LINEAR, mislabeled.LOSS, optimizer, batch_size=8)
    state = bp.init_state(LINEAR, optimizer, jax.random.key(0), (4,))
    for passed in range(1, 5):
        state, _ = epoch(state, *map(jnp.asarray, examples))
        if passed in (2, 4):
            params = kept[passed // 2 - 1]
            np.testing.assert_array_equal(params[0]["weight"], state.params[0]["weight"])
    assert len(kept) == 2


def test_flips_are_to_every_other_class_alike():
    labels = np.arange(3000, dtype=np.int32) % 3
    given = mislabeled.flip_labels(labels, 3, 0.2, seed=5)
    flipped = given != labels
    assert flipped.sum() == 600
    assert given.dtype == labels.dtype
    counts = np.bincount((given - labels)[flipped] % 3, minlength=3)
    assert counts[0] == 0
    assert abs(counts[1] - 300) < 60  # five standard deviations
    np.testing.assert_array_equal(given, mislabeled.flip_labels(labels, 3, 0.2, seed=5))
    assert (given != mislabeled.flip_labels(labels, 3, 0.2, seed=6)).any()
    np.testing.assert_array_equal(mislabeled.flip_labels(labels, 3, 0, seed=5), labels)


def test_precisions_count_the_flipped_from_the_highest_score():
    flipped = np.array([False, True, False, True])
    np.testing.assert_allclose(
        mislabeled.precisions(np.array([0.1, 0.9, 0.5, 0.4]), flipped), [1, 1 / 2, 2 / 3, 1 / 2]
    )


def test_flipped_digits_are_found(tmp_path, capsys):
    ranking = mislabeled.main(mislabeled.Config(**SMALL, suspects=20, out=tmp_path / "out"))
    printed = capsys.readouterr().out
    flipped = ranking.given != ranking.original
    assert flipped.sum() == 63
    assert "1257 training examples, 63 of their labels flipped; 270 validation examples" in printed

    rows = {row[0]: row[1:] for row in map(str.split, printed.splitlines()) if len(row) == 4}
    assert rows["chance"] == ["5.0%", "5.0%", "0.050"]
    for name in mislabeled.METHODS:
        scores = ranking.scores[name]
        first = sorted(range(1257), key=lambda n, scores=scores: -scores[n])[:63]
        average = average_precision_score(flipped, scores)
        shares = [sum(flipped[n] for n in first[:k]) / k for k in (32, 63)]
        assert rows[name] == [*(f"{share:.1%}" for share in shares), f"{average:.3f}"]
        assert average > 0.2
    assert average_precision_score(flipped, ranking.scores["el2n"]) > 0.85

    top = np.argsort(-ranking.scores["el2n"])[:20]
    found = [n for n in top if flipped[n]]
    right = sum(ranking.suggested[n] == ranking.original[n] for n in found)
    assert right > 14
    assert (
        f"Of the first 20 by el2n, {len(found)} are flipped; "
        f"for {right} of these, the suggested class is the original one."
    ) in printed
    table = read_table(tmp_path / "out" / "mislabeled_digits.csv")
    indices = [int(row.pop("index")) for row in table]
    np.testing.assert_array_equal(load_digits().target[indices], ranking.original[top])
    assert table == [
        {
            "score": f"{ranking.scores['el2n'][n]:.6g}",
            "given": str(ranking.given[n]),
            "suggested": str(ranking.suggested[n]),
            "flipped": str(int(flipped[n])),
        }
        for n in top
    ]
    assert files_in(tmp_path) == [
        "mislabeled_digits.csv",
        "mislabeled_digits.npz",
        "mislabeled_digits.png",
    ]
    assert (tmp_path / "out" / "mislabeled_digits.png").read_bytes().startswith(b"\x89PNG")


def write_csv(path, wrong=()):
    """Two kinds far apart; the rows in `wrong`, counted from 0, have the name of the other kind."""
    rng = np.random.default_rng(0)
    lines = ["length,width,species"]
    for i in range(120):
        kind = i % 2
        name = ("setosa", "virginica")[kind ^ (i in wrong)]
        lines.append(f"{rng.normal() + 6 * kind:.3f},{rng.normal() - 6 * kind:.3f},{name}")
    path.write_text("\n".join(lines))
    return path


def test_wrong_labels_in_a_table_of_ones_own_come_first(tmp_path, capsys):
    path = write_csv(tmp_path / "flowers.csv", wrong=range(0, 120, 17))
    config = mislabeled.Config(
        **SMALL, flip=0, suspects=4, data=path, target="species", out=tmp_path / "out"
    )
    ranking = mislabeled.main(config)
    printed = capsys.readouterr().out
    assert ranking.original is None
    assert "flowers: 84 training examples, 0 of their labels flipped" in printed
    assert "it is not known how many suspects are wrong" in printed
    assert "Another class is suggested for 4 of the first 4 by el2n." in printed
    assert "precision" not in printed

    table = read_table(tmp_path / "out" / "mislabeled_flowers.csv")
    assert list(table[0]) == ["index", "score", "given", "suggested"]
    # The header is row 1, and example 0 stands in row 2.
    assert {int(row["index"]) - 2 for row in table} <= set(range(0, 120, 17))
    kinds = ("setosa", "virginica")
    for row in table:
        kind = int(row["index"]) % 2
        assert (row["suggested"], row["given"]) == (kinds[kind], kinds[1 - kind])
    assert files_in(tmp_path / "out") == [
        "mislabeled_flowers.csv",
        "mislabeled_flowers.npz",
        "mislabeled_flowers.png",
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"flip": -0.1}, r"flip is -0.1; it takes a share in \[0, 0.5\]"),
        ({"flip": 0.6}, "flip is 0.6"),
        ({"flip": 1e-4}, "flip is 0.0001: this flips none of the 1257 labels"),
        ({"suspects": 0}, "suspects is 0; it takes at least 1"),
        ({"networks": 0, "seed": -1}, "networks is 0; it takes at least 1; seed is -1"),
        ({"epochs": 0}, "epochs is 0; it takes at least 1"),
        ({"every": 0}, "every is 0; it takes at least 1"),
        ({"every": 31}, "every is 31; it takes at most the number of epochs, 30"),
        ({"networks": 0}, "networks is 0; it takes at least 1"),
        ({"early": 0}, "early is 0; it takes at least 1"),
        ({"seed": -1}, "seed is -1; it takes an integer"),
        ({"learning_rate": 0}, "learning-rate is 0; it takes a number"),
        ({"batch_size": 0}, "batch-size is 0; it takes at least 1"),
        ({"hidden": (0,)}, "dense: features is 0"),
        ({"dropout": 1.5}, "dropout: drop_prob is 1.5"),
        ({"target": "species"}, "only a .csv file has columns"),
    ],
)
def test_wrong_flags_are_refused_and_nothing_is_written(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        mislabeled.main(mislabeled.Config(**wrong, out=tmp_path / "out"))
    assert files_in(tmp_path) == []


def test_a_file_is_no_folder_to_write_to(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="taken is a file"):
        mislabeled.main(mislabeled.Config(out=tmp_path / "taken" / "out"))


def test_scores_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    look_early = mislabeled.look_early

    def overflown(*args):
        norms, *others = look_early(*args)
        return norms * np.inf, *others

    monkeypatch.setattr(mislabeled, "look_early", overflown)
    config = mislabeled.Config(**SMALL, learning_rate=0.2, out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"learning-rate is 0.2: the scores are not finite"):
        mislabeled.main(config)
    assert files_in(tmp_path) == []
