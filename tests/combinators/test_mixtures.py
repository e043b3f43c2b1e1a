"""Mixtures: weighted sums of experts, of which only the chosen ones learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal, swept
from oracles import assert_close

import jaxbp as bp


def constant(outputs):
    """A layer whose outputs are given, whatever the inputs."""

    def forward(params, x, *, key=None):
        del params, key
        return outputs, x

    def backward(params, x, dy, *, read=bp.keep):
        del params, dy, read
        return jnp.zeros_like(x), ()

    return bp.Layer("constant", lambda key, shape: ((), outputs.shape[1:]), forward, backward)


@pytest.mark.parametrize("top_k", [None, 1, 2, 3])
def test_outputs_are_weighted_by_the_softmax_of_the_best(top_k, key):
    """Against NumPy, one position at a time."""
    logits, *outputs = (
        normal(k, (2, 4, size))
        for k, size in zip(jax.random.split(key, 4), (3, 2, 2, 2), strict=True)
    )
    logits = logits.at[0, 0].set(1.0)  # of equal ones, the first
    net = bp.mixture(constant(logits), *map(constant, outputs), top_k=top_k)
    y, _ = jax.jit(net.forward)(((),) * 4, logits)
    want = np.zeros((2, 4, 2))
    for n, t in np.ndindex(2, 4):
        order = sorted(range(3), key=lambda k: (-float(logits[n, t, k]), k))[: top_k or 3]
        weights = np.exp([float(logits[n, t, k]) for k in order])
        for k, w in zip(order, weights / weights.sum(), strict=True):
            want[n, t] += w * np.asarray(outputs[k][n, t])
    assert_close(y, jnp.asarray(want))


def test_an_expert_that_is_not_chosen_gets_no_gradient(key):
    net = bp.mixture(bp.dense(3), *[bp.dense(2) for _ in range(3)], top_k=2)
    params, _ = net.init(key, (4,))
    x, dy = normal(key, (5, 4)), normal(key, (5, 2))
    *_, (gate, *experts) = jax.tree.map(np.asarray, swept(net, params, x, dy, read=bp.per_example))
    logits = np.asarray(x) @ params[0]["weight"] + params[0]["bias"]
    for n, left_out in enumerate(np.argmin(logits, axis=1)):
        learns = [bool(np.any(expert["weight"][n])) for expert in experts]
        assert learns == [k != left_out for k in range(3)]
        assert not np.any(gate["bias"][n, left_out])
        np.testing.assert_allclose(np.sum(gate["bias"][n]), 0, atol=1e-14)


def test_the_gate_of_a_single_best_expert_gets_no_gradient(key):
    net = bp.mixture(bp.dense(2), bp.dense(2), bp.tanh(), top_k=1)
    params, _ = net.init(key, (2,))
    x = normal(key, (5, 2))
    *_, (gate, *_) = swept(net, params, x, x, read=bp.per_example)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gate))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: bp.mixture(bp.dense(2)),
            TypeError,
            r"^mixture: takes a gate and a Layer for",
        ),
        (lambda: bp.mixture(bp.relu, bp.relu()), TypeError, r"^mixture: gate 1 is .*relu\(\)\?"),
        (lambda: bp.mixture(bp.relu(), bp.relu), TypeError, r"^mixture: expert 1 is .*relu\(\)\?"),
        (
            lambda: bp.mixture(bp.dense(2), bp.relu(), bp.relu(), top_k=0),
            ValueError,
            r"^mixture: top_k is 0; it takes a positive integer",
        ),
        (
            lambda: bp.mixture(bp.dense(2), bp.relu(), bp.relu(), top_k=3),
            ValueError,
            r"^mixture: top_k is 3; there are 2 experts",
        ),
        (
            lambda: bp.mixture(bp.dense(3), bp.relu(), bp.relu()).init(jax.random.key(0), (5, 4)),
            bp.LayerError,
            r"a gate with outputs \[N, 5, 3\], and experts with \[N, 5, 4\]; the gate takes",
        ),
        (
            lambda: bp.mixture(bp.dense(2), bp.relu(), bp.dense(3)).init(jax.random.key(0), (4,)),
            bp.LayerError,
            r"experts with \[4\], \[3\]; it takes one array of each, of equal shapes",
        ),
        (
            lambda: bp.mixture(bp.relu(), bp.dense(2), bp.relu()).forward(
                ((), (), ()), jnp.ones((3, 2))
            ),
            bp.LayerError,
            r"^mixture: expert 1 \(dense\(2\)\) got parameters that are not its own",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
