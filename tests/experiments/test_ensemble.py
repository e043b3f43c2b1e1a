"""The ensemble, in small: it is traced once, and each network is the one that trains alone."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbp as bp
from experiments import ensemble
from experiments.common import data, figures

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("as_shipped")]
SMALL = {"seeds": 2, "rates": (0.1, 0.2), "epochs": 3, "width": 16}
PLAIN = {
    "exact": bp.exact(),
    "random_feedback": bp.random_feedback(),
    "sign_symmetric": bp.sign_symmetric(),
    "kolen_pollack": bp.kolen_pollack(),
}
NET = bp.chain(bp.dense(3), bp.tanh(), bp.dense(2))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One run for all tests that look at what it returns: config and ways."""
    config = ensemble.Config(**SMALL, out=tmp_path_factory.mktemp("small") / "out")
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        return config, ensemble.main(config)


def test_each_way_is_traced_once_and_trains_every_network(small):
    config, ways = small
    assert list(ways) == ["at once", "one by one"]
    for way in ways.values():
        assert way.traces == 1
        assert way.outcome.losses.shape == (4, 2, 2, config.epochs)
        assert way.outcome.test.shape == (4, 2, 2)
        assert way.seconds.shape == (ensemble.ROUNDS,)


def test_both_ways_train_the_same_networks(small):
    _, ways = small
    together, apart = ways["at once"].outcome, ways["one by one"].outcome
    # Two programs round differently: 2e-6 was measured. Large learning rates amplify it.
    np.testing.assert_allclose(together.losses, apart.losses, rtol=1e-4)
    np.testing.assert_allclose(together.test, apart.test, atol=0.01)


@pytest.mark.parametrize("name", PLAIN)
def test_a_member_is_the_network_that_fit_trains_by_the_plain_rule(small, name):
    config, ways = small
    dataset, key = data.load(None, seed=0), jax.random.split(jax.random.key(0), 2)[1]
    net = bp.chain(bp.dense(16), bp.tanh(), bp.dense(8), bp.tanh(), bp.dense(10))
    decayed = optax.add_decayed_weights(3e-3)
    run = bp.fit(
        net,
        bp.softmax_cross_entropy,
        optax.chain(optax.trace(0.9), decayed, optax.scale(-0.2)),
        dataset.train,
        key=key,
        held_out=dataset.validation,
        epochs=config.epochs,
        batch_size=64,
        rule=PLAIN[name],
    )
    outputs, _ = net.forward(run.state.params, dataset.test[0])
    accuracy = float(np.mean(bp.accuracy(outputs, dataset.test[1])))

    rule, rate, seed = list(PLAIN).index(name), 1, 1
    losses, test = (each[rule, rate, seed] for each in ways["at once"].outcome[:2])
    np.testing.assert_allclose(losses, [r["held_out_loss"] for r in run.records], rtol=1e-4)
    assert test == pytest.approx(accuracy, abs=0.01)


def test_every_network_learns_and_no_two_are_the_same(small):
    _, ways = small
    losses = ways["at once"].outcome.losses
    # With 20 pairs of keys, the worst of the 320 networks had a ratio of 0.69.
    assert np.max(losses[..., -1] / losses[..., 0]) < 0.85
    assert len(np.unique(losses[..., -1])) == losses[..., -1].size


def test_only_the_figure_is_written(small):
    config, _ = small
    assert sorted(path.name for path in config.out.iterdir()) == ["ensemble.npz", "ensemble.png"]
    assert (config.out / "ensemble.png").read_bytes().startswith(b"\x89PNG")


def stepped(rule):
    """The tree that a rule chooses, its state after a step that moves, and the tree after it."""
    key = jax.random.key(3)
    params, _ = NET.init(key, (4,))
    state = rule.make(jax.random.key(4), NET, (4,))
    after = rule.update(state, params, move=lambda tree: jax.tree.map(lambda b: 0.5 * b, tree))
    return rule.choose(state, params), after, rule.choose(after, params)


def test_the_rule_at_a_traced_index_is_the_rule_itself():
    at_index = jax.jit(jax.vmap(lambda index: stepped(ensemble.one_of(PLAIN.values(), index))))
    trees, after, later = at_index(jnp.arange(4))
    assert list(ensemble.RULES) == list(PLAIN)
    for index, rule in enumerate(PLAIN.values()):
        got = jax.tree.map(lambda a, i=index: a[i], (trees, after.states[index], later))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, stepped(rule))
    weights = np.asarray(trees[2]["weight"])
    pairs = itertools.combinations(range(4), 2)
    # Feedback alignment and Kolen-Pollack start from the same B.
    assert [pair for pair in pairs if np.array_equal(*weights[list(pair)])] == [(1, 3)]


@pytest.fixture
def outcome():
    """Of 4 rules, 2 rates and 2 seeds; the last rule at the second rate is the best."""
    first, last = np.full((4, 2, 2), 2.0), np.full((4, 2, 2), 1.0)
    last[3, 1] = 0.3, 0.5
    last[2, 0] = 0.1, 0.8  # the lowest of all, but not on average
    last[1, 0] = math.nan, 0.1
    test = np.full((4, 2, 2), 0.9)
    test[3, 1] = 0.91, 0.95
    return ensemble.Outcome(np.stack([first, last], axis=-1), test)


def test_the_best_has_the_lowest_mean_loss_of_those_that_are_finite(outcome):
    assert ensemble.best_of(outcome) == (3, 1)


def test_the_tables_say_what_was_measured(outcome, capsys):
    ensemble.print_table(outcome, (0.1, 0.5))
    at_once = ensemble.Way(outcome, 1, 5.0, np.array([2.0, 1.0, 3.0]))
    one_by_one = ensemble.Way(outcome, 7, 3.0, np.array([4.0, 9.0, 1.0]))
    ensemble.print_times({"at once": at_once, "one by one": one_by_one})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "exact 90.0 ± 0.0 90.0 ± 0.0" in lines
    # The deviation of 91 and 95 is the root of (2^2 + 2^2) / (2 - 1).
    assert "kolen_pollack 90.0 ± 0.0 93.0 ± 2.8" in lines
    assert (
        "lowest mean validation loss: kolen_pollack at rate 0.5, test accuracy 93.0 ± 2.8 %"
        in lines
    )
    assert "at once 1 5.0 2.00 (1.00-3.00)" in lines
    assert "one by one 7 3.0 4.00 (1.00-9.00)" in lines
    assert "time one by one / at once: 2.00 without compilation, 1.00 with compilation" in lines
    assert "A compilation for each network would take 16 x 3.0 s." in lines


def test_the_figure_has_every_curve_in_its_rate_s_colour_and_a_star_at_the_best(outcome):
    figure = ensemble.draw(outcome, (0.1, 0.5))
    titles = ["exact", "random feedback", "sign symmetric", "kolen pollack"]
    assert [axes.get_title() for axes in figure.axes] == titles
    for rule, axes in enumerate(figure.axes):
        curves, stars = axes.get_lines()[:4], axes.get_lines()[4:]
        colors = [curve.get_color() for curve in curves]
        assert colors == [figures.BLUE, figures.BLUE, figures.ORANGE, figures.ORANGE]
        drawn = np.reshape([curve.get_ydata() for curve in curves], (2, 2, 2))
        np.testing.assert_array_equal(drawn, outcome.losses[rule])
        assert [star.get_xydata().tolist() for star in stars] == [[[2, 0.4]]] * (rule == 3)
    assert figure.axes[3].get_lines()[4].get_color() == figures.ORANGE
    texts = [text.get_text() for text in figure.axes[3].get_legend().get_texts()]
    assert texts == ["0.1: 90.0 ± 0.0", "0.5: 93.0 ± 2.8", "lowest mean loss: 0.400"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seeds": 1}, "seeds is 1; it takes at least 2"),
        ({"epochs": 0, "width": 1}, "epochs is 0; it takes at least 1; width is 1; it takes at"),
        ({"batch_size": 0}, "batch-size is 0; it takes at least 1"),
        ({"rates": ()}, "rates has 0 numbers; it takes 1 to 7"),
        ({"rates": (0.1,) * 8}, "rates has 8 numbers; it takes 1 to 7"),
        ({"rates": (0.1, -0.2)}, r"^rates has -0.2; it takes numbers in \(0, 1000\]"),
        ({"rates": (math.nan,)}, "rates has nan; it takes numbers"),
        ({"seed": -1}, "seed is -1; it takes an integer"),
    ],
)
def test_wrong_flags_are_refused_and_nothing_is_written(wrong, message, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        ensemble.main(ensemble.Config(**wrong, out=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match=r"out takes a directory: .*out is a file"):
        ensemble.main(ensemble.Config(out=tmp_path / "out" / "below"))
    assert (tmp_path / "out").read_text() == "mine"
