"""Lifted layers under jit, vmap, scan and grad, with the backward pass apart from the forward pass,
and in 16 bits.
"""

import chex
import jax
import jax.numpy as jnp
import pytest
from cases import late
from functions import ONE, in_time, stack_of_layers
from jax import lax
from opened import Model, N, assert_agree, by_autodiff, normal
from oracles import assert_close, in_dtype

import jaxbp as bp


@pytest.fixture(scope="module", params=["", "checkpoint of turns"])
def model(request):
    """A stack of layers in a loop."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield stack_of_layers(request.param)


@pytest.fixture(scope="module")
def lifted(model):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        net, params = model.lift()
        targets = normal(5, N, 2)
        grads = by_autodiff(model, model.function(model.params, model.inputs) - targets)[2]
        yield net, params, model.inputs, targets, jax.tree.map(lambda g: g.mean(0), grads)


def gradient(net, params, x, targets):
    return bp.unstacked(bp.value_and_grad(net, bp.squared_error)(params, x, targets)[1])


def test_forward_and_backward_are_compiled_apart(lifted):
    net, params, x, targets, want = lifted
    chex.clear_trace_counter()
    forward = jax.jit(chex.assert_max_traces(lambda *a: net.forward(*a), n=1))
    backward = jax.jit(chex.assert_max_traces(lambda *a: net.backward(*a, read=bp.total)[1], n=1))
    for shift in (1.0, 0.0):
        y, cache = forward(params, x + shift)
        grads = backward(params, cache, (y - targets) / N)
    assert_agree(bp.unstacked(grads), want)


def test_the_second_call_does_not_trace_again(lifted):
    net, params, x, targets, want = lifted
    chex.clear_trace_counter()
    traced = []

    def read(signal):
        traced.append(signal)
        return bp.mean(signal)

    sweep = bp.backprop(net, bp.squared_error, read=read)
    function = jax.jit(chex.assert_max_traces(sweep, n=1))
    function(jax.tree.map(lambda p: p + 1, params), x + 1, targets)
    before = len(traced)
    _, grads = function(params, x, targets)
    assert len(traced) == before > 0
    assert_agree(bp.unstacked(grads), want)


def test_the_function_is_traced_once_for_each_shape():
    calls = []

    def f(p, x):
        calls.append(x.shape)
        return jnp.tanh(x @ p)

    net, params = bp.lift(f, normal(1, 3, 2), normal(0, N, 5, 3))
    before = len(calls)
    for n in (2, 3, 2):
        net.forward(params, normal(2, n, 5, 3))
    assert len(calls) == before
    for t in (4, 6, 4):
        y, cache = net.forward(params, normal(2, N, t, 3))
        assert net.backward(params, cache, y, read=bp.total)[1].shape == (3, 2)
    assert len(calls) == before + 2


def test_under_vmap_over_networks(lifted):
    net, params, x, targets, want = lifted
    several = jax.tree.map(lambda p: jnp.stack([p, p + 0.1]), params)
    function = jax.jit(jax.vmap(lambda p, x: gradient(net, p, x, targets), (0, None)))
    got = function(several, x)
    assert_agree(jax.tree.map(lambda g: g[0], got), want)
    second = jax.tree.map(lambda p: p[1], several)
    assert_agree(jax.tree.map(lambda g: g[1], got), gradient(net, second, x, targets))


def test_inside_a_scan_over_steps(lifted):
    net, params, x, targets, _ = lifted

    def step(params, _):
        value, grads = bp.value_and_grad(net, bp.squared_error)(params, x, targets)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    got, values = jax.jit(lambda p: lax.scan(step, p, None, length=3))(params)
    want = params
    for i in range(3):
        want, value = step(want, None)
        assert_close(values[i], value)
    assert_close(got, want)


def test_inside_grad(lifted, model):
    """The derivative of a gradient's squared norm, as of the function itself."""
    net, params, x, targets, _ = lifted

    def penalty(params):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient(net, params, x, targets)))

    def by_hand(params):
        mean = lambda p: jnp.sum((model.function(p, x) - targets) ** 2) / (2 * N)  # noqa: E731
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(mean)(params)))

    got = jax.jit(jax.grad(penalty))(params)
    assert_agree(bp.unstacked(got), jax.jit(jax.grad(by_hand))(model.params))


def test_a_lifted_function_is_lifted_again(lifted, model):
    """The forward pass of a lifted layer is a function like any other."""
    net, params, x, targets, want = lifted
    again, own = bp.lift(lambda p, x: net.forward(p, x)[0], params, x)
    assert_agree(bp.unstacked(gradient(again, own, x, targets)), want)


def test_lifting_under_jit_leaves_out_the_comparison():
    @jax.jit
    def coupled(params, x):
        net, own = bp.lift(lambda p, x: x * p - x.mean(0), params, x)
        return net.forward(own, x)[0]

    x = normal(0, N, 3)
    assert_close(coupled(jnp.ones(3), x), jnp.zeros((N, 3)))


def test_permuted_examples_have_permuted_answers(lifted):
    net, params, x, targets, _ = lifted
    order = jnp.array([2, 0, 3, 1])
    sweep = jax.jit(bp.backprop(net, bp.squared_error, read=bp.per_example_diagonal))
    _, got = sweep(params, x[order], targets[order])
    _, want = sweep(params, x, targets)
    take = lambda a, axis: jnp.take(a, order, axis=axis)  # noqa: E731
    want = {
        "w": bp.Stacked(take(want["w"].layers, 1)),
        "b": bp.Stacked(take(want["b"].layers, 1)),
        "out": take(want["out"], 0),
    }
    assert_close(got, want)


# 16 bits.


def mixed(compute, out=jnp.float32):
    """A model that computes in another dtype than that of its parameters."""

    def f(p, x):
        p, x = in_dtype((p, x), compute)
        h = jnp.tanh(p["table"][jnp.arange(x.shape[1])] + x @ p["w"] * p["gain"] + p["b"])
        h, _ = lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), h, p["stack"])
        scale = jnp.sqrt(jnp.sum(p["v"] ** 2))
        return (h @ (p["v"] / scale)).sum(1).astype(out)

    p = {
        "table": normal(1, 3, 8),
        "w": normal(2, 5, 8),
        "gain": normal(3, 8),
        "b": normal(4, 8),
        "stack": normal(5, 2, 8, 8) / 3,
        "v": normal(6, 8, 4),
    }
    return f, p, normal(0, N, 3, 5)


@pytest.mark.parametrize("params_dtype", [late(jnp.float32), jnp.bfloat16])
def test_16_bits(params_dtype):
    f, p, x = mixed(jnp.bfloat16)
    p, x = in_dtype((p, x), params_dtype)
    net, params = bp.lift(f, p, x)
    labels = jnp.array([0, 2, 1, 3])
    read = {
        "mean": bp.mean,
        "per_example": bp.per_example,
        "sq_norms": bp.sq_norms,
        "variance": bp.variance,
        "diagonal": bp.diagonal,
        "signals": bp.keep,
    }
    sweep = bp.backprop(net, bp.softmax_cross_entropy, read=read)

    @jax.jit
    def both(params, x):
        _, got = sweep(params, x, labels)
        return got, bp.gram(got["signals"]), bp.directional_derivatives(got["signals"], got["mean"])

    got, gram, along = both(params, x)
    exact = mixed(jnp.float32)[0]
    p32, x32 = in_dtype((p, x), jnp.float32)

    def one(p, x, label):
        return -jax.nn.log_softmax(exact(p, x[None])[0])[label]

    want = jax.jit(jax.vmap(jax.grad(one), (None, 0, 0)))(p32, x32, labels)
    own = jax.jit(jax.grad(lambda p: jnp.mean(bp.softmax_cross_entropy(f(p, x), labels)[0])))(p)
    rows = jnp.concatenate([g.reshape(N, -1) for g in jax.tree.leaves(want)], 1)
    norms = bp.example_norms(got["sq_norms"])
    assert norms.dtype == gram.dtype == along.dtype == jnp.float32
    for name in ("mean", "per_example", "variance"):
        assert {a.dtype for a in jax.tree.leaves(got[name])} <= {
            jnp.dtype(params_dtype), jnp.dtype(jnp.float32),
        }  # fmt: skip
    chex.assert_trees_all_equal_shapes_and_dtypes(bp.unstacked(got["mean"]), p)

    def far(a, b):
        a, b = in_dtype((a, b), jnp.float32)
        return max(
            float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)))
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )

    mean = jax.tree.map(lambda g: g.mean(0), want)
    by_grad = far(own, mean)
    # As far from the gradient in 32 bits as that of autodiff in 16 is, and near that one.
    assert far(bp.unstacked(got["mean"]), mean) < 2 * by_grad + 0.01
    assert far(bp.unstacked(got["mean"]), own) < 2 * by_grad + 0.01
    assert far(norms, jnp.linalg.norm(rows, axis=1)) < 0.05
    assert far(gram, rows @ rows.T) < 0.05
    assert far(along, rows @ rows.mean(0)) < 0.05
    assert far(bp.unstacked(got["variance"]), jax.tree.map(lambda g: g.var(0), want)) < 0.1


def test_outputs_of_16_bits_and_parameters_of_a_loop_in_32():
    model = in_time()._replace(inputs=normal(10, N, 4, 2))  # in which less cancels

    def f(p, x):
        last, ys = model.function(*in_dtype((p, x), jnp.bfloat16))
        return jnp.concatenate([last[None], ys])

    p, x = in_dtype((model.params, model.inputs), jnp.float32)
    net, params = bp.lift(f, p, x, per_example=True)
    y, cache = net.forward(params, x)
    assert y.dtype == jnp.bfloat16
    dx, grads = net.backward(params, cache, y, read=bp.total)
    assert dx.dtype == jnp.float32
    p64, x64 = in_dtype((p, x), jnp.float64)
    exact = Model(
        lambda p, x: jnp.concatenate([a.reshape(-1, 3) for a in model.function(p, x)]),
        p64,
        x64,
        ONE,
    )
    want = by_autodiff(exact, in_dtype(y, jnp.float64))[2]
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.float32
        a = a.astype(jnp.float64)
        assert float(jnp.max(jnp.abs(a - b.sum(0))) / jnp.max(jnp.abs(b))) < 0.05


def test_a_network_of_stacked_layers_is_lifted(key):
    """Its parameters have a `Stacked` before lift puts one in its place."""
    net = bp.chain(bp.stack(bp.chain(bp.dense(3), bp.tanh()), 2), bp.dense(2))
    params, _ = net.init(key, (3,))
    x, targets = jax.random.normal(key, (4, 3)), jnp.zeros((4, 2))
    lifted, own = bp.lift(lambda params, x: net.forward(params, x)[0], params, x)
    answers = [
        jax.tree.leaves(
            bp.reweighted(layer, bp.squared_error, bp.clip_weights(0.1))(tree, x, targets)
        )
        for layer, tree in ((lifted, own), (net, params))
    ]
    chex.assert_trees_all_close(*answers, rtol=1e-10)
