"""Cross-attention: dense layers around attention, and what the memory holds at masked positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from oracles import assert_close, layer_per_example_grads

import jaxbp as bp

N, T, S = 2, 3, 4
KEY = jax.random.key(0)


def make(key, *shapes, **options):
    """A layer with biases away from zero, its parameters, inputs and dy."""
    layer = bp.cross_attention(4, 2, **options)
    params, out_shape = layer.init(key, shapes)
    keys = jax.random.split(key, len(shapes) + 2)
    params = jax.tree.map(lambda p: p + 0.1 * normal(keys[0], p.shape), params)
    x = (normal(k, (N, *s)) for k, s in zip(keys[2:], shapes, strict=True))
    return layer, params, tuple(x), normal(keys[1], (N, *out_shape))


@functools.partial(jax.jit, static_argnums=(0, 4))
def sweep(layer, params, x, dy, read=bp.total):
    y, cache = layer.forward(params, x)
    return y, layer.backward(params, cache, dy, read=read)


def by_torchs_definition(params, x, keys, values, see):
    """Multi-head attention of several heads, one example and head after another."""
    q, k, v = (
        a @ params[part]["weight"] + params[part]["bias"]
        for part, a in (("query", x), ("key", keys), ("value", values))
    )
    heads = []
    for h in range(2):
        d, u = q.shape[-1] // 2, v.shape[-1] // 2
        e = q[..., h * d : (h + 1) * d] @ k[..., h * d : (h + 1) * d].mT / np.sqrt(d)
        p = jax.nn.softmax(jnp.where(see, e, -1e30), axis=-1)
        heads.append(p @ v[..., h * u : (h + 1) * u])
    return jnp.concatenate(heads, axis=-1) @ params["out"]["weight"] + params["out"]["bias"]


@pytest.mark.parametrize("of_memory", [True, False], ids=["memory", "keys and values"])
def test_outputs_and_derivatives_by_definition(of_memory, key):
    shapes = ((T, 3), (S, 5)) if of_memory else ((T, 3), (S, 5), (S, 2))
    mask = np.array([[True, True, True, False], [True, False, True, True]])
    layer, params, x, dy = make(key, *shapes, mask=mask, value_size=3)

    def forward(params, x, *, key=None):
        keys, values = (x[1], x[1]) if of_memory else x[1:]
        return by_torchs_definition(params, x[0], keys, values, mask[:, None]), None

    y, (dx, grads) = sweep(layer, params, x, dy)
    want_y, pullback = jax.vjp(lambda params, x: forward(params, x)[0], params, x)
    want, want_dx = pullback(dy)
    _, (_, of_examples) = sweep(layer, params, x, dy, bp.per_example)
    wants = layer_per_example_grads(layer._replace(forward=forward), params, x, dy)
    # A bias of all keys adds the same to all scores of a query, which changes no probability.
    for tree in (grads, want, of_examples, wants):
        assert np.allclose(tree["key"].pop("bias"), 0, atol=1e-12)
    assert_close((y, dx, grads, of_examples), (want_y, want_dx, want, wants))


@pytest.mark.parametrize("holds", [1e200, np.inf, np.nan])
def test_what_a_masked_memory_holds_reaches_nothing(holds, key):
    mask = np.array([[True, True, False, True], [True, True, True, True]])
    for options in ({"mask": mask}, {"pair_mask": np.broadcast_to(mask[0], (T, S))}):
        layer, params, (x, memory), dy = make(key, (T, 3), (S, 5), **options)
        hole = slice(0, 1) if "mask" in options else slice(None)
        broken = x, memory.at[hole, 2].set(holds)
        for read in (bp.total, bp.sq_norms):
            want = sweep(layer, params, (x, memory), dy, read)
            assert_close(sweep(layer, params, broken, dy, read), want)


def test_a_mask_comes_with_each_batch(key):
    net = bp.masked(lambda mask: bp.cross_attention(4, 2, mask=mask))
    params, out_shape = net.init(key, (((T, 3), (S, 5)), (S,)))
    assert out_shape == (T, 4)
    inputs = normal(key, (N, T, 3)), normal(key, (N, S, 5))
    mask = jnp.arange(S) < jnp.array([[2], [4]])
    y, cache = net.forward(params, (inputs, mask))
    short = inputs[0][:1], inputs[1][:1, :2]
    assert_close(y[:1], bp.cross_attention(4, 2).forward(params, short)[0])
    (_, dmemory), _ = net.backward(params, cache, y)
    assert not np.any(dmemory[0, 2:])
    assert np.all(dmemory[0, :2])


def test_several_masks_come_with_each_batch(key):
    def make_net(masks):
        return bp.cross_attention(4, 2, mask=masks and masks[0], pair_mask=masks and masks[1])

    net, x = bp.masked(make_net), (jnp.ones((N, T, 3)), normal(key, (N, S, 5)))
    params, _ = net.init(key, (((T, 3), (S, 5)), None))
    masks = np.arange(S) < np.array([[2], [4]]), np.ones((N, 1, T, S), bool)
    y, _ = net.forward(params, (x, masks))
    assert_close(y, bp.cross_attention(4, 2, mask=masks[0]).forward(params, x)[0])


def test_its_dense_layers_are_made_alike(key):
    layer = bp.cross_attention(
        4, 2, use_bias=False, dtype=jnp.float32, weight_init=jax.nn.initializers.ones
    )
    params, _ = layer.init(key, ((T, 3), (S, 5)))
    ones = {"query": (3, 4), "key": (5, 4), "value": (5, 4), "out": (4, 4)}
    assert_close(params, {part: {"weight": jnp.ones(s, jnp.float32)} for part, s in ones.items()})


LAYER = bp.cross_attention(4, 2, mask=np.ones(S, bool))
PARAMS, _ = LAYER.init(KEY, ((T, 3), (S, 5)))
X, MEMORY = np.ones((N, T, 3), np.float32), np.ones((N, S, 5), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bp.cross_attention(5, 2), "features is 5, not a multiple of 2 heads. Give a head"),
        (lambda: bp.cross_attention(4, 2, head_size=0), "head_size is 0; it takes a positive int"),
        (lambda: LAYER.init(KEY, (T, 3, 5, 7)), "got inputs of type tuple; it takes a pair"),
        (
            lambda: LAYER.init(KEY, ((T, 3), (S,))),
            r"got inputs of shapes \[N, 3, 3\], \[N, 4\], \[N, 4\]; it takes \[N, T, I\], \[N, S",
        ),
        (
            lambda: LAYER.forward(PARAMS, (X, MEMORY, MEMORY[:, 1:])),
            r"got inputs of shapes \[2, 3, 3\], \[2, 4, 5\], \[2, 3, 5\]; it takes \[N, T, I\]",
        ),
        (
            lambda: LAYER.forward(PARAMS, (X, MEMORY[:, 1:])),
            r"cross_attention\(4, 2\) has a mask of shape \[4\]; inputs of shape \[2, 3, 5\] take",
        ),
        (lambda: LAYER.forward(PARAMS, X), r"\(4, 2\) got inputs of type ndarray; it takes a pair"),
        (lambda: LAYER.forward(PARAMS, (X, MEMORY[:1])), "cross_attention.* has 1"),
        (
            lambda: LAYER.forward(PARAMS["query"], (X, MEMORY)),
            "not its own: a dict of weight, bias; it takes a dict of query, key, value, out",
        ),
        (
            lambda: LAYER.forward(PARAMS | {"key": PARAMS["query"]}, (X, MEMORY)),
            r"cross_attention\(4, 2\): key \(dense\(4\)\) got inputs of shape \[2, 4, 5\]; its",
        ),
        (
            lambda: LAYER.backward(PARAMS, LAYER.forward(PARAMS, (X, MEMORY))[1], X),
            r"\(4, 2\): out \(dense\(4\)\) got a dy of shape \[2, 3, 3\]; its outputs are",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
