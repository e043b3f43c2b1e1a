"""Joint losses: values, delta and curvature of several outputs, and what is passed wrongly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from jax.flatten_util import ravel_pytree
from oracles import assert_close

import jaxbp as bp

N = 4
LOSSES = {
    "label": bp.softmax_cross_entropy,
    "sizes": (bp.squared_error, bp.weighted(bp.sigmoid_cross_entropy)),
}
WEIGHTS = {"label": 2.0, "sizes": (0.0, 0.5)}


def model(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"])
    return {"label": h @ p["u"], "sizes": (h @ p["v"], h[:, :2] * p["g"])}


def problem(key):
    keys = jax.random.split(key, 6)
    shapes = {"w": (3, 4), "b": (4,), "u": (4, 3), "v": (4, 1), "g": (2,)}
    p = {name: normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=False)}
    x = normal(keys[5], (N, 3))
    bits = jnp.asarray(np.arange(2 * N).reshape(N, 2) % 3 == 0, float)
    targets = {
        "label": jnp.array([0, 2, 1, 2]),
        "sizes": (jnp.ones((N, 1)), (bits, jnp.array([1.0, 0.0, 2.0, 0.5]))),
    }
    return *bp.lift(model, p, x), x, targets


def by_hand(outputs, targets, weights=WEIGHTS):
    """The joint value of each example, [N]."""
    terms = [
        weights["label"] * bp.softmax_cross_entropy(outputs["label"], targets["label"])[0],
        weights["sizes"][0] * bp.squared_error(outputs["sizes"][0], targets["sizes"][0])[0],
        weights["sizes"][1] * LOSSES["sizes"][1](outputs["sizes"][1], targets["sizes"][1])[0],
    ]
    return sum(terms)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["", "weighted"])
def test_value_and_delta(weights, key):
    net, params, x, targets = problem(key)
    ones = jax.tree.map(lambda _: 1.0, WEIGHTS)
    loss = bp.joint_loss(LOSSES, weights)
    outputs, _ = net.forward(params, x)
    values, delta = loss(outputs, targets)
    assert_close(values, by_hand(outputs, targets, weights or ones))

    def objective(y):
        return jnp.sum(by_hand(y, targets, weights or ones))

    assert_close(delta, jax.jit(jax.grad(objective))(outputs))
    assert loss.name == (
        "joint_loss(softmax_cross_entropy, squared_error, weighted(sigmoid_cross_entropy))"
    )


def test_readings_of_a_network_with_several_outputs(key):
    net, params, x, targets = problem(key)
    read = {"grads": bp.per_example, "mean": bp.mean, "sq_norms": bp.sq_norms}
    sweep = jax.jit(bp.backprop(net, bp.joint_loss(LOSSES, WEIGHTS), read=read))
    values, got = sweep(params, x, targets)
    want = jax.jit(jax.jacrev(lambda p: by_hand(model(p, x), targets)))(params)
    assert_close(values, by_hand(model(params, x), targets))
    assert_close(got["grads"], want)
    assert_close(got["mean"], jax.tree.map(lambda g: g.mean(0), want))
    norms = jax.tree.map(lambda g: np.sum(g**2, tuple(range(1, g.ndim))), want)
    assert_close(got["sq_norms"], norms)
    call = jax.jit(bp.value_and_grad(net, bp.joint_loss(LOSSES, WEIGHTS)))
    value, grads = call(params, x, targets)
    assert_close((value, grads), (jnp.mean(values), got["mean"]))


def gauss_newton(params, x, targets):
    """J^T H J of each example, with the Hessian of all outputs at once."""
    flat, unravel = ravel_pytree(params)

    def one(x, targets):
        def outputs(flat):
            y = model(unravel(flat), x[None])
            return ravel_pytree(jax.tree.map(lambda a: a[0], y))[0]

        y, back = ravel_pytree(jax.tree.map(lambda a: a[0], model(params, x[None])))

        def value(y):
            batch = jax.tree.map(lambda a: a[None], (back(y), targets))
            return by_hand(*batch)[0]

        rows = jax.jacrev(outputs)(flat)
        return rows.T @ jax.hessian(value)(y) @ rows

    return jax.vmap(one)(x, targets)


@pytest.mark.thorough
def test_curvature(key):
    net, params, x, targets = problem(key)
    loss = bp.joint_loss(LOSSES, WEIGHTS)
    matrices = gauss_newton(params, x, targets)
    read = {"diagonal": bp.diagonal, "grads": bp.per_example}
    sweep = jax.jit(bp.backprop(net, loss, read=read, error=bp.ggn_columns))
    _, got = sweep(params, x, targets)
    assert_close(ravel_pytree(got["diagonal"])[0], jnp.diagonal(matrices.sum(0)))
    rows = jax.vmap(jax.vmap(lambda tree: ravel_pytree(tree)[0]))(got["grads"])
    assert_close(jnp.einsum("knp,knq->npq", rows, rows), matrices)
    direction = jax.tree.map(jnp.cos, params)
    product = bp.gauss_newton_vector_product(net, loss)(params, x, targets, direction)
    want = matrices.mean(0) @ ravel_pytree(direction)[0]
    assert_close(ravel_pytree(product)[0], want)


def test_sampled_errors_have_the_curvature_for_their_second_moment(key):
    net, params, x, targets = problem(key)
    loss = bp.joint_loss(LOSSES, WEIGHTS)
    outputs, _ = net.forward(params, x)

    def second_moment(errors):
        rows = jax.vmap(jax.vmap(lambda tree: ravel_pytree(tree)[0]))(errors)
        return jnp.einsum("kni,knj->nij", rows, rows)

    draws = bp.sampled(loss, outputs, targets, key, draws=20_000)
    exact = bp.ggn_columns(loss, outputs, targets)
    assert jax.tree.structure(draws) == jax.tree.structure(outputs)
    far = jnp.abs(second_moment(draws) - second_moment(exact))
    assert float(jnp.max(far)) < 0.1
    assert float(jnp.max(jnp.abs(second_moment(exact)))) > 0.3


def test_rows_of_the_jacobian_go_through_every_output(key):
    net, params, x, targets = problem(key)
    loss = bp.joint_loss(LOSSES)
    sweep = bp.backprop(net, loss, read=bp.per_example, error=bp.jacobian_rows)
    _, got = jax.jit(sweep)(params, x, targets)
    jacobians = jax.jit(jax.vmap(jax.jacrev(lambda p, x: model(p, x[None])), (None, 0)))(params, x)
    want = [jax.tree.leaves(j) for j in (jacobians["label"], *jacobians["sizes"])]
    for i, leaf in enumerate(jax.tree.leaves(got)):
        rows = [np.asarray(j[i])[:, 0] for j in want]  # [N, C, ...] of each output
        assert_close(leaf, np.moveaxis(np.concatenate(rows, 1), 1, 0))


def test_the_check_passes(key):
    outputs = {"a": jnp.zeros((N, 3)), "b": jnp.zeros((N, 2))}
    loss = bp.joint_loss({"a": bp.squared_error, "b": bp.huber}, {"a": 0.5, "b": 3.0})
    targets = jax.tree.map(lambda y: y + 0.3, outputs)
    net, _ = bp.lift(lambda p, x: {"a": x * p, "b": x[:, :2]}, jnp.ones(3), jnp.ones((N, 3)),
                     init=lambda key: jax.random.normal(key, (3,)))  # fmt: skip
    bp.check(net, key, (3,)).raise_if_wrong()
    assert bp.value_and_grad(net, loss)(jnp.ones(3), jnp.ones((N, 3)), targets)[1].shape == (3,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bp.joint_loss({}), TypeError, "joint_loss: takes a tree with a Loss for each"),
        (
            lambda: bp.joint_loss([bp.squared_error, 3.0]),
            TypeError,
            "joint_loss: takes a tree with a Loss for each output; got float",
        ),
        (
            lambda: bp.joint_loss({"a": bp.squared_error}, {"b": 1.0}),
            ValueError,
            "joint_loss: weights are .*, expected .* as the losses",
        ),
        (
            lambda: bp.joint_loss([bp.squared_error], [-1.0]),
            ValueError,
            r"weights are \[-1\.0\]; none may be negative",
        ),
        (
            lambda: bp.joint_loss([bp.squared_error])((jnp.ones((2, 1)),) * 2, [jnp.ones((2, 1))]),
            ValueError,
            r"joint_loss\(squared_error\): takes outputs and targets as trees like the losses",
        ),
        (
            lambda: bp.joint_loss({"a": bp.huber})({"a": jnp.ones((2, 1))}, jnp.ones((2, 1))),
            ValueError,
            r"joint_loss\(huber\): takes outputs and targets as trees like the losses",
        ),
    ],
)
def test_what_is_wrong_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()
