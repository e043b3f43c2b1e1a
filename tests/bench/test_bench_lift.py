"""The benchmark of lifted models: both sides are equal, and the tables are complete."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import every

import jaxbp as bp
from experiments.bench import quantities, runner
from experiments.bench.networks import convnets
from experiments.bench.networks.convnets import Convnet, Resnet
from experiments.bench.networks.gpts import Gpt
from experiments.bench.networks.perceptrons import Perceptron
from experiments.bench.networks.recurrent import Sequence
from experiments.bench.peers import (
    kfac_steps,
    per_example,
    private_steps,
    torch_networks,
    torch_runs,
)
from experiments.bench.peers.models import MAKERS, Foreign, lift, make_model
from experiments.bench.sections import lift as section
from experiments.common import measuring

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.usefixtures("as_shipped"),
    # By jax_privacy.
    pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning"),
]
MLP, CONVNET = Perceptron((6, 5, 5, 3), 4), Convnet(6, 2, (3, 4), 5)
TINY = {
    str(case): case
    for case in (
        Foreign("Flax", Gpt(1, 4, 2, 3, 3, vocabulary=7)),
        Foreign("Flax", Resnet(4, 2, (2, 4), 1, 3, groups=2)),
        Foreign("Flax", CONVNET),
        Foreign("Flax", Sequence("LSTM", 4, 5, 3)),
        Foreign("Flax", MLP),
        Foreign("Equinox", MLP),
    )
}
SMALLEST = "Flax, MLP 6-5-5-3 relu, N = 4"
PACKAGES = {"Flax": "flax", "Equinox": "equinox"}
every_case = every("case", TINY, soon=(SMALLEST, "Equinox, MLP 6-5-5-3 relu, N = 4"))


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(measuring, "SAMPLE_SECONDS", 1e-6)
    monkeypatch.setattr(torch_runs, "cores", lambda: 1)  # the tests have the others


def make(case):
    pytest.importorskip(PACKAGES[case.framework])
    model = make_model(case, 0)
    return model, lift(model)


def assert_alike(got, want, tolerance=1e-4):
    """Relative to the largest entry of all: the gradient of the bias of attention's keys is 0."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    largest = max(float(np.max(np.abs(b))) for b in want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=tolerance * largest)


@every_case
def test_a_lifted_model_has_the_gradient_and_the_norms_of_autodiff(case):
    model, (net, data, mean_loss) = make(case)
    value, grads = jax.jit(jax.value_and_grad(model.mean_loss))(
        model.params, model.inputs, model.labels
    )
    got_value, got = jax.jit(section.make_gradient(net))(*data)
    assert_alike((got_value, bp.unstacked(got)), (value, grads))
    assert_alike(jax.jit(mean_loss)(*data), value)

    from_all = per_example.from_all_gradients(per_example.mean_and_norms, mean_loss)
    assert_alike(jax.jit(quantities.gradient_and_norms(net))(*data), jax.jit(from_all)(*data), 1e-3)


def test_every_model_is_here():
    assert {(case.framework, type(case.network)) for case in TINY.values()} == set(MAKERS)
    cases = {case for table in section.TABLES.values() for case in table.cases + table.gpu_cases}
    assert {(case.framework, type(case.network)) for case in cases} == set(MAKERS)


def test_hidden_layers_that_differ_are_refused_for_equinox():
    pytest.importorskip("equinox")
    with pytest.raises(ValueError, match="the hidden layers of 6-5-4-3 relu, N = 4 differ"):
        make_model(Foreign("Equinox", Perceptron((6, 5, 4, 3), 4)), 0)


@pytest.fixture
def no_noise(monkeypatch):
    monkeypatch.setattr(private_steps, "NOISE_MULTIPLIER", 0.0)


def clipped_mean(lifted):
    """By the gradients of all examples, of which some have to be clipped."""
    params, inputs, labels = lifted.data
    gradient = jax.vmap(jax.grad(lifted.mean_loss), (None, 0, 0))
    grads = jax.jit(gradient)(params, inputs[:, None], labels[:, None])
    norms = per_example.example_norms(grads)
    assert float(jnp.max(norms)) > quantities.MAX_NORM
    weights = jnp.minimum(1, quantities.MAX_NORM / norms) / len(norms)
    return jax.tree.map(lambda g: jnp.einsum("n,n...->...", weights, g), grads)


def test_private_gradients_are_clipped_means(no_noise):
    model, lifted = make(TINY[SMALLEST])
    want = clipped_mean(lifted)
    for sweeps in (1, 2):
        assert_alike(private_steps.ours(lifted.net, lifted.data, sweeps).run(), want)
    pytest.importorskip("jax_privacy")
    peers = private_steps.find_peers(TINY[SMALLEST], model, lifted)
    assert list(peers) == ["jax_privacy", "jax_privacy, one by one"]
    for make_peer in peers.values():
        assert_alike(make_peer().run(), want)


def test_the_private_gradient_of_opacus_is_the_clipped_mean(no_noise):
    pytest.importorskip("opacus")
    case = Foreign("Flax", CONVNET)
    model, lifted = make(case)
    got = private_steps.find_peers(case, model, lifted)["Opacus, ghost"]().run()
    clipped = quantities.make_clipped(2)(convnets.make_net(CONVNET))
    answer = jax.jit(clipped)(model.own_params, model.inputs, model.labels)
    want = torch_networks.convnet_weights(CONVNET, answer.grads)
    assert_alike([CONVNET.n * grad.numpy() for grad in got], list(want.values()))


@pytest.mark.parametrize("peer", ["jaxbp", "jax_privacy", "Opacus, ghost"])
def test_the_noise_has_the_deviation_of_the_others(peer, monkeypatch):
    """There is so much noise that nothing else counts."""
    monkeypatch.setattr(private_steps, "NOISE_MULTIPLIER", 1e3)
    case = Foreign("Flax", Convnet(8, 2, (16, 32), 5))
    model, lifted = make(case)
    if peer == "jaxbp":
        program = private_steps.ours(lifted.net, lifted.data, 1)
    else:
        pytest.importorskip({"jax_privacy": "jax_privacy", "Opacus, ghost": "opacus"}[peer])
        program = private_steps.find_peers(case, model, lifted)[peer]()
    entries = np.concatenate([np.ravel(g) for g in jax.tree.leaves(program.run())])
    want = 1e3 * quantities.MAX_NORM / model.inputs.shape[0]
    assert abs(np.std(entries) / want - 1) < 5 / np.sqrt(2 * entries.size)


def test_steps_of_kfac_lower_the_loss():
    _, (net, data, mean_loss) = make(TINY[SMALLEST])
    start = float(mean_loss(*data))
    for make_run in (kfac_steps.ours, kfac_steps.plain):
        run = make_run(net, data)
        run()
        assert float(run()) < start


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by kfac-jax and what it imports
def test_steps_of_kfac_jax_lower_the_loss():
    pytest.importorskip("kfac_jax")
    model, lifted = make(TINY[SMALLEST])
    run = kfac_steps.kfac_jax(model)
    try:
        run()
    except ValueError as error:
        pytest.skip(f"kfac-jax fails with this version of jax: {error}")
    assert float(run()) < float(lifted.mean_loss(*lifted.data))


ROWS = {
    "gradient": [*["jax.grad"] * 3, "jax.vmap(jax.grad)", "jax.grad"],
    "private": [],
    "kfac": ["bp.make_step, optax.sgd", "bp.make_step, optax.adam"],
}
PEERS = ("jax_privacy", "kfac_jax", "torch", "opacus")


def rows_of(name, case, tmp_path, monkeypatch):
    table = section.TABLES[name]._replace(cases=(case,))
    monkeypatch.setitem(runner.SECTIONS, "lift", {name: table})
    path = tmp_path / "figures.json"
    runner.main(sections=("lift",), repeats=1, json=path)
    return json.loads(path.read_text())["lift"][name]


@every("name", {name: name for name in ROWS}, soon=("kfac",))
def test_a_table_comes_out_without_the_peers(name, tmp_path, capsys, monkeypatch):
    pytest.importorskip("flax")
    for peer in PEERS:
        monkeypatch.setitem(sys.modules, peer, None)
    rows = rows_of(name, Foreign("Flax", CONVNET), tmp_path, monkeypatch)
    measured = [row for row in rows if row["problem"] is None]
    assert [row["against"] for row in measured] == ROWS[name]
    assert all(row["ratio"] > 0 for row in measured)
    missing = {row["problem"] for row in rows} - {None}
    assert missing <= {f"{peer} is not installed" for peer in PEERS}
    assert f"### {section.TABLES[name].title}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ROWS)
def test_a_table_comes_out_without_the_framework(name, tmp_path, capsys, monkeypatch):
    for package in PACKAGES.values():
        monkeypatch.setitem(sys.modules, package, None)
    (row,) = rows_of(name, Foreign("Flax", MLP), tmp_path, monkeypatch)
    assert row["problem"] == "flax is not installed"
    assert "| flax is not installed |" in capsys.readouterr().out


def test_jax_privacy_is_measured(monkeypatch):
    pytest.importorskip("flax")
    pytest.importorskip("jax_privacy")
    rows = list(section.private(TINY[SMALLEST], 1, 0))
    assert [row.what for row in rows] == ["one sweep", "two sweeps"] * 2
    assert all(row.ratio > 0 and row.temporary_bytes for row in rows)


def test_every_table_is_here():
    assert list(ROWS) == list(section.TABLES) == list(runner.SECTIONS["lift"])
