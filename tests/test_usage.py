# pyright: strict
# JAX's and optax's own types are not complete; the rest of the strict mode is for ours.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""The public API as a user calls it. CI checks this file's types in pyright's strict mode."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxbp as bp


def make_net() -> bp.Layer:
    block = bp.residual(bp.layer_norm(), bp.dense(8), bp.gelu(), bp.dense(6))
    return bp.chain(bp.dense(6), bp.stack(bp.remat(block), 2), bp.dropout(0.1), bp.dense(3))


def make_data(n: int = 12) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(0), (n, 4), jnp.float32)
    return x, jnp.arange(n) % 3


def error_rms(signal: bp.Signal) -> jax.Array:
    """A reading of a user's own."""
    return jnp.sqrt(jnp.mean(jnp.square(signal.deltas)))


def cube() -> bp.Layer:
    """A layer of a user's own."""

    def init(key: jax.Array, shape: tuple[int, ...]) -> tuple[tuple[()], tuple[int, ...]]:
        del key
        return (), shape

    def forward(
        params: tuple[()], x: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        del params, key
        return x * x * x, 3 * x * x

    def backward(
        params: tuple[()], slope: jax.Array, dy: jax.Array, *, read: bp.Reading = bp.keep
    ) -> tuple[jax.Array, tuple[()]]:
        del params, read
        return slope * dy, ()

    return bp.Layer("cube", init, forward, backward)


@pytest.mark.usefixtures("as_shipped")
def test_a_loop_of_ones_own():
    net, (x, labels) = make_net(), make_data()
    params, out_shape = net.init(jax.random.key(1), (4,))
    optimizer = optax.adam(1e-2)
    read = {"grads": bp.mean, "sq_norms": bp.sq_norms, "rms": error_rms}
    sweep = bp.backprop(net, bp.softmax_cross_entropy, read=read)
    values, answers = sweep(params, x, labels, key=jax.random.key(2))
    updates, _ = optimizer.update(answers["grads"], optimizer.init(params))
    params = optax.apply_updates(params, updates)
    value, _ = bp.value_and_grad(net, bp.softmax_cross_entropy)(params, x, labels)
    norms = bp.example_norms(answers["sq_norms"])
    assert out_shape == (3,)
    assert values.shape == norms.shape == (12,)
    assert float(value) < float(jnp.mean(values))


@pytest.mark.usefixtures("as_shipped")
def test_sums_with_weights_and_rules():
    net, (x, labels) = make_net(), make_data()
    params, _ = net.init(jax.random.key(1), (4,))
    rule = bp.random_feedback()
    state = rule.make(jax.random.key(2), net, (4,))
    weigh = bp.clip_weights(1.0)
    clipped = bp.reweighted(net, bp.softmax_cross_entropy, weigh, rule=rule)
    answer = clipped(params, x, labels, rule_state=state)
    assert answer.norms.shape == answer.weights.shape == (12,)


@pytest.mark.usefixtures("as_shipped")
def test_training_and_checking():
    net, data = bp.chain(bp.dense(5), cube(), bp.dense(3)), make_data()
    run = bp.fit(
        net, bp.softmax_cross_entropy, optax.sgd(0.1), data, key=jax.random.key(3), epochs=2
    )
    assert run.stopped_by == "epochs"
    assert bp.check(net, jax.random.key(4), (4,)).ok
