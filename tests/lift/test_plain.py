"""Layers without parameters of a function: outputs, dx, trees, keys, and integers."""

import jax
import jax.numpy as jnp
import pytest
from jax.nn import softmax
from opened import N, normal, tokens
from oracles import assert_close

import jaxbp as bp


def test_it_is_the_function_of_every_example(key):
    def f(x):
        return jnp.cumsum(softmax(x, axis=-1), axis=0) @ x.T

    layer = bp.function(f)
    assert layer.name == "function(f)"
    assert bp.function(f, name="mine").name == "mine"
    assert layer.init(key, (3, 5)) == ((), (3, 3))
    x, dy = normal(0, N, 3, 5), normal(1, N, 3, 3)
    y, cache = layer.forward((), x)
    dx, readings = layer.backward((), cache, dy, read=bp.total)
    want, vjp = jax.vjp(jax.vmap(f), x)
    assert_close((y, dx, readings), (want, *vjp(dy), ()))
    bp.check(layer, key, (3, 5)).raise_if_wrong()


def test_trees_with_integers():
    def f(x):
        return {"picked": x["rows"][x["at"]], "sum": (x["rows"].sum(), x["scale"] * 2)}

    layer = bp.function(f)
    x = {"rows": normal(0, N, 3, 2), "at": tokens(1, N, vocabulary=3), "scale": normal(2, N)}
    y, cache = jax.jit(layer.forward)((), x)
    dx, _ = jax.jit(layer.backward)((), cache, y)
    assert dx["at"] is None
    _, vjp = jax.vjp(lambda rows: jax.vmap(f)({**x, "rows": rows}), x["rows"])
    assert_close(dx["rows"], vjp(y)[0])
    assert_close(dx["scale"], 4 * x["scale"])


def test_shapes_of_trees(key):
    layer = bp.function(lambda x: {"a": x[0] @ x[1]["b"], "c": (x[0],)})
    _, shape = layer.init(key, ((2, 3), {"b": (3, 4)}))
    assert shape == {"a": (2, 4), "c": ((2, 3),)}


def test_it_draws_with_a_key_of_its_own_for_each_example(key):
    def f(x, key=None):
        return x if key is None else x * jax.random.normal(key, x.shape)

    layer = bp.function(f, draws=True)
    x = jnp.ones((N, 3))
    y, cache = layer.forward((), x, key=key)
    assert len({tuple(row) for row in y.tolist()}) == N
    assert_close(layer.backward((), cache, jnp.ones((N, 3)))[0], y)
    assert_close(layer.forward((), x)[0], x)
    assert_close(bp.function(f).forward((), x, key=key)[0], x)


@pytest.mark.parametrize("read", [bp.sq_norms, bp.per_example])
def test_in_a_chain_with_what_is_lifted(read, key):
    def model(p, x):
        return x @ p["weight"] + p["bias"]

    twin = bp.chain(bp.dense(4), bp.tanh(), bp.dense(4))
    params, _ = twin.init(key, (4,))
    x = normal(0, N, 4)
    lifted, own = bp.lift(model, params[0], x)
    net = bp.chain(lifted, bp.function(jnp.tanh), lifted)
    got = bp.backprop(net, bp.squared_error, read=read)((own, (), params[2]), x, x)
    assert_close(got, bp.backprop(twin, bp.squared_error, read=read)(params, x, x))
