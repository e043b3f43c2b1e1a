"""The peers of the benchmark: each computes what it is timed for."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close, per_example_grads

from experiments.bench.networks import perceptrons
from experiments.bench.networks.perceptrons import Perceptron
from experiments.bench.networks.sides import LOSS
from experiments.bench.peers import per_example, torch_runs
from experiments.common import measuring

CASE = Perceptron((20, 7, 7, 3), 5)
MAX_NORM = 2.5  # of the case's gradients some are shorter and some longer
DRAWS = 1000
QUANTITIES = {
    "BackPACK": [
        "norms",
        "second moment",
        "variance",
        "KFAC (MC 1)",
        "GGN diagonal (MC 1)",
        "GGN diagonal (exact)",
    ],
    "Opacus": ["clipped sum, hooks", "clipped sum, ghost"],
    "jax_privacy": ["clipped sum", "clipped sum, one by one"],
    "vmap(grad)": ["norms", "clipped sum", "second moment"],
}
PACKAGES = {"BackPACK": "backpack", "Opacus": "opacus", "jax_privacy": "jax_privacy"}
IN_JAX = ("jax_privacy", "vmap(grad)")
RUNS = [(peer, name) for peer, names in QUANTITIES.items() for name in names]

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.usefixtures("as_shipped"),
    # By jax_privacy.
    pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning"),
]


@pytest.fixture
def case():
    """The network, its parameters, and one batch."""
    return perceptrons.make_net(CASE), *perceptrons.make_case(CASE, 0)


@pytest.fixture
def make_pairs(case, monkeypatch):
    monkeypatch.setattr(measuring, "SAMPLE_SECONDS", 1e-6)
    monkeypatch.setattr(per_example, "MAX_NORM", MAX_NORM)
    monkeypatch.setattr(torch_runs, "cores", lambda: 1)  # the tests have the others

    def make(peer):
        if peer in PACKAGES:
            pytest.importorskip(PACKAGES[peer])
        if peer in ("BackPACK", "Opacus"):
            pytest.importorskip("torch").manual_seed(0)
        return per_example.PEERS[peer](*case[1:])

    return make


def example_grads(case, values_of=lambda outputs, labels: LOSS(outputs, labels)[0]):
    """The gradients of all examples as a list like PyTorch's."""
    return as_list(per_example_grads(case[0], values_of, *case[1:]))


def as_list(params):
    """Weights [..., O, I] and biases in PyTorch's order, from those of the library."""
    pairs = [(jnp.swapaxes(layer["weight"], -1, -2), layer["bias"]) for layer in params[::2]]
    return [array for pair in pairs for array in pair]


def as_arrays(tensors):
    return [jnp.asarray(tensor.numpy()) for tensor in tensors]


def exact_ggn_diagonal(case):
    """Mean over examples of diag(J^T (diag(p) - p p^T) J), by the definition."""
    outputs, _ = case[0].forward(*case[1:3])
    p = jax.nn.softmax(outputs)
    rows = [example_grads(case, lambda y, labels, o=o: y[:, o]) for o in range(CASE.sizes[-1])]

    def diagonal(*js):
        squares = sum(jnp.einsum("n,n...->n...", p[:, o], j * j) for o, j in enumerate(js))
        mean = sum(jnp.einsum("n,n...->n...", p[:, o], j) for o, j in enumerate(js))
        return jnp.mean(squares - mean**2, axis=0)

    return jax.tree.map(diagonal, *rows)


def assert_close_for_draws(got, want):
    """Within 5 deviations of the mean: one draw's is at most about the largest value."""
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5 / DRAWS**0.5 * np.max(b))


def test_every_peer_is_here():
    assert list(QUANTITIES) == list(per_example.PEERS)
    assert set(RUNS) >= per_example.FORM_ALL_GRADIENTS


@pytest.mark.parametrize("peer", QUANTITIES)
def test_a_peer_has_its_quantities(peer, make_pairs):
    assert list(make_pairs(peer)) == QUANTITIES[peer]


@pytest.mark.parametrize(("peer", "name"), RUNS)
def test_the_plain_gradient_is_of_the_mean_loss(peer, name, case, make_pairs):
    _, plain = make_pairs(peer)[name]()
    got = as_list(plain()[1]) if peer in IN_JAX else as_arrays(plain())
    assert_close(got, [jnp.mean(g, axis=0) for g in example_grads(case)])


@pytest.mark.parametrize("name", QUANTITIES["BackPACK"])
def test_backpack_has_the_gradient_too(name, case, make_pairs):
    run, _ = make_pairs("BackPACK")[name]()
    want = [jnp.mean(g, axis=0) for g in example_grads(case)]
    assert_close(as_arrays(grad for grad, _ in run()), want)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("norms", lambda g: jnp.sum(g * g, axis=range(1, g.ndim))),
        ("second moment", lambda g: jnp.sum(g * g, axis=0)),
        ("variance", lambda g: jnp.var(g, axis=0)),
    ],
)
def test_backpack_has_quantities_of_the_terms_of_the_mean_loss(name, want, case, make_pairs):
    run, _ = make_pairs("BackPACK")[name]()
    got = as_arrays(quantity for _, quantity in run())
    assert_close(got, [want(g / CASE.n) for g in example_grads(case)])


def test_backpack_has_the_diagonal_of_the_ggn(case, make_pairs):
    run, _ = make_pairs("BackPACK")["GGN diagonal (exact)"]()
    assert_close(as_arrays(quantity for _, quantity in run()), exact_ggn_diagonal(case))


def test_backpack_draws_the_diagonal_of_the_ggn(case, make_pairs):
    run, _ = make_pairs("BackPACK")["GGN diagonal (MC 1)"]()
    draws = [as_arrays(quantity for _, quantity in run()) for _ in range(DRAWS)]
    mean = jax.tree.map(lambda *arrays: np.mean(arrays, axis=0), *draws)
    assert_close_for_draws(mean, exact_ggn_diagonal(case))


def test_backpack_draws_the_factors_of_kfac(case, make_pairs):
    """The first is of the deltas, so its mean has the diagonal of the bias's GGN."""
    run, _ = make_pairs("BackPACK")["KFAC (MC 1)"]()
    draws = [[as_arrays(quantity) for _, quantity in run()] for _ in range(DRAWS)]
    (_, of_inputs), *_ = draws[0]
    inputs = case[2]
    assert_close(of_inputs, inputs.T @ inputs / CASE.n)
    of_deltas = [np.mean([draw[i][0] for draw in draws], axis=0) for i in (0, 2, 4)]
    diagonals = [np.diag(factor) for factor in of_deltas]
    assert_close_for_draws(diagonals, exact_ggn_diagonal(case)[1::2])


@pytest.mark.parametrize(("peer", "name"), [run for run in RUNS if "clipped sum" in run[1]])
def test_clipped_gradients_are_summed(peer, name, case, make_pairs):
    grads = example_grads(case)
    norms = jnp.sqrt(sum(jnp.sum(g * g, axis=range(1, g.ndim)) for g in grads))
    assert jnp.min(norms) < MAX_NORM < jnp.max(norms)
    scales = jnp.minimum(1, MAX_NORM / norms)
    run, _ = make_pairs(peer)[name]()
    answer = run()
    if peer in IN_JAX:
        got = as_list(answer[0 if peer == "jax_privacy" else 1])
    else:
        got = as_arrays(answer)
    assert_close(got, [jnp.einsum("n,n...->...", scales, g) for g in grads])


def test_vmap_has_the_gradient_with_norms_and_second_moment(case, make_pairs):
    grads = example_grads(case)
    mean = [jnp.mean(g, axis=0) for g in grads]
    pairs = make_pairs("vmap(grad)")
    _, got, norms = pairs["norms"]()[0]()
    assert_close(as_list(got), mean)
    assert_close(norms, jnp.sqrt(sum(jnp.sum(g * g, axis=range(1, g.ndim)) for g in grads)))
    _, got, moments = pairs["second moment"]()[0]()
    assert_close(as_list(got), mean)
    assert_close(as_list(moments), [jnp.mean(g * g, axis=0) for g in grads])


@pytest.mark.parametrize("peer", PACKAGES)
def test_a_peer_that_is_missing_is_named(peer, case, monkeypatch):
    if peer != "jax_privacy":
        pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, PACKAGES[peer], None)
    with pytest.raises(ModuleNotFoundError) as error:
        per_example.PEERS[peer](*case[1:])
    assert error.value.name == PACKAGES[peer]


@pytest.mark.parametrize(("seconds", "threads"), [([2, 3, 5, 1], 1), ([3, 2, 1, 3], 3)])
def test_a_pair_of_pytorch_has_the_threads_that_suit_the_two(seconds, threads, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch_runs, "cores", lambda: 3)
    monkeypatch.setattr(torch_runs, "measure", lambda runs, repeats: np.array(seconds)[:, None])
    pair = torch_runs.at_their_fastest(torch.get_num_threads, torch.get_num_threads)
    assert [run() for run in pair] == [threads, threads]
