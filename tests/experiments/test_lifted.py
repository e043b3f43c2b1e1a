"""The network in Flax, lifted: the same function, and the same experiment around it."""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

import jaxbp as bp
from experiments import digits, mislabeled, private
from experiments.common import lifted
from experiments.common.data import load

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("as_shipped")]
FAST = {
    private: private.Config(model="flax", epsilon=0.5, hidden=(16,), epochs=1, batch_size=200),
    mislabeled: mislabeled.Config(
        model="flax", hidden=(32,), epochs=6, every=3, networks=2, early=4
    ),
}
every_experiment = pytest.mark.parametrize("experiment", FAST, ids=["private", "mislabeled"])


@pytest.fixture(scope="module")
def dataset():
    return load(None, target=None, seed=0)


def as_flax(params):
    """The library's parameters, or their gradients, by their names in Flax."""
    layers = [layer for layer in params if layer]
    return {
        f"Dense_{i}": {"kernel": layer["weight"], "bias": layer["bias"]}
        for i, layer in enumerate(layers)
    }


def assert_alike(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("activation", digits.ACTIVATIONS)
def test_both_networks_are_the_same_function(activation, dataset):
    pytest.importorskip("flax")
    config = digits.Config(hidden=(7, 5), activation=activation)
    own, flax = (lifted.make_network(model, config, dataset) for model in ("jaxbp", "flax"))
    params, _ = own.init(jax.random.key(0), (64,))
    batch = [array[:6] for array in dataset.train]
    value, grads = jax.jit(bp.value_and_grad(own, digits.LOSS))(params, *batch)
    got_value, got = jax.jit(bp.value_and_grad(flax, digits.LOSS))(as_flax(params), *batch)
    assert_alike((got_value, got), (value, as_flax(grads)))


def test_weights_are_drawn_from_the_same_distribution(dataset):
    pytest.importorskip("flax")
    config = digits.Config(hidden=(300,))
    own, flax = (
        lifted.make_network(model, config, dataset).init(jax.random.key(0), (64,))[0]
        for model in ("jaxbp", "flax")
    )
    for a, b in zip(jax.tree.leaves(as_flax(own)), jax.tree.leaves(flax), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.std(a), np.std(b), rtol=0.1)
        np.testing.assert_allclose(np.max(a), np.max(b), rtol=0.1)


def test_a_step_drops_units_and_the_network_itself_does_not(dataset):
    pytest.importorskip("flax")
    net = lifted.make_network("flax", digits.Config(hidden=(50,), dropout=0.5), dataset)
    params, _ = net.init(jax.random.key(0), (64,))
    x = jnp.tile(dataset.train[0][:1], (4, 1))
    drawn, _ = net.forward(params, x, key=jax.random.key(1))
    y, _ = net.forward(params, x)
    np.testing.assert_array_equal(y, y[:1].repeat(4, axis=0))
    assert len(np.unique(np.asarray(drawn), axis=0)) == 4  # each example has a mask of its own
    again, _ = net.forward(params, x, key=jax.random.key(1))
    np.testing.assert_array_equal(drawn, again)


def test_private_training_of_the_network_in_flax(tmp_path, capsys):
    pytest.importorskip("flax")
    accuracies = private.main(replace(FAST[private], out=tmp_path))
    assert accuracies[1] > 0.5
    assert "clipped, of the whole run" in capsys.readouterr().out


def test_flipped_digits_are_found_by_the_network_in_flax(tmp_path, capsys):
    pytest.importorskip("flax")
    ranking = mislabeled.main(replace(FAST[mislabeled], out=tmp_path))
    flipped = ranking.given != ranking.original
    assert average_precision_score(flipped, ranking.scores["el2n"]) > 0.85
    assert all(average_precision_score(flipped, s) > 0.2 for s in ranking.scores.values())


@every_experiment
def test_flax_that_is_missing_is_named(experiment, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ValueError, match="the package flax is not installed: pip install flax"):
        experiment.main(replace(FAST[experiment], out=tmp_path))
    assert list(tmp_path.iterdir()) == []


@every_experiment
def test_wrong_settings_are_refused_as_with_the_librarys_layers(experiment):
    with pytest.raises(ValueError, match="dense: features is 0"):
        experiment.main(replace(FAST[experiment], hidden=(0,)))
