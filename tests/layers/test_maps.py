"""Layers without parameters, all in one program: their derivatives, and those once more."""

import jax
import jax.numpy as jnp
import pytest
from cases import MAPS, make_inputs, prepare
from oracles import assert_close, layer_vjp

import jaxbp as bp


def sweep(layer, x, dy):
    _, cache = layer.forward((), x)
    return layer.backward((), cache, dy)[0]


def by_autodiff(layer, x, dy):
    return layer_vjp(layer, (), x, dy)[0]


@pytest.fixture(scope="module", params=["at zero", "at values of their own"])
def maps(request):
    """Each layer, its inputs and an error at its outputs."""
    with jax.enable_x64(True):
        found = {}
        for name, case in MAPS.items():
            layer, _, x, _ = prepare(case, jax.random.key(20))
            y = jax.eval_shape(lambda x, layer=layer: layer.forward((), x)[0], x)
            dy = jnp.cos(jnp.arange(y.size, dtype=x.dtype)).reshape(y.shape)
            found[name] = layer, jnp.zeros_like(x) if request.param == "at zero" else x, dy
        return found


def test_backward_is_the_derivative(maps):
    @jax.jit
    def of_all(inputs):
        pairs = [(maps[name][0], *inputs[name]) for name in maps]
        return [sweep(*pair) for pair in pairs], [by_autodiff(*pair) for pair in pairs]

    assert_close(*of_all({name: (x, dy) for name, (_, x, dy) in maps.items()}))


def test_backward_is_differentiated_once_more(maps):
    def once_more(derivative, layer, x, dy):
        def objective(x):
            dx = derivative(layer, x, dy)
            return jnp.vdot(dx, jnp.sin(jnp.arange(dx.size, dtype=x.dtype)).reshape(dx.shape))

        return jax.grad(objective)(x)

    @jax.jit
    def of_all(inputs):
        pairs = [(maps[name][0], *inputs[name]) for name in maps]
        return [[once_more(f, *pair) for pair in pairs] for f in (sweep, by_autodiff)]

    got, want = of_all({name: (x, dy) for name, (_, x, dy) in maps.items()})
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in got)
    assert_close(got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_shapes_and_dtypes(dtype, key):
    for name, case in MAPS.items():
        layer = case.make()
        params, out_shape = layer.init(key, case.shape)
        x = make_inputs(case, key).astype(dtype)
        y, dx = jax.eval_shape(lambda x, f=layer: (f.forward((), x)[0], f.forward((), x)[1]), x)
        dx = jax.eval_shape(lambda y, cache, f=layer: f.backward((), cache, y)[0], y, dx)
        assert params == ()
        assert (y.shape, y.dtype) == ((len(x), *out_shape), dtype), name
        assert (dx.shape, dx.dtype) == (x.shape, dtype), name


def test_the_names_say_which_layer_it_is():
    names = [case.make().name for case in MAPS.values()]
    assert len(set(names)) == len(names)
    for name in names:
        assert hasattr(bp, name.split("(")[0])
