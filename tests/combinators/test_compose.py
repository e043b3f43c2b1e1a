"""Composition: a chain is its parts, in both directions, and says which part is wrong."""

import jax
import jax.numpy as jnp
import pytest
from cases import NETWORKS, normal, prepare, swept
from oracles import assert_close, layer_vjp

import jaxbp as bp
from jaxbp.combinators.broadcasting import expand, reduce_like


def test_a_chain_is_its_parts_one_by_one(key):
    parts = (bp.dense(4), bp.tanh(), bp.dense(2))
    net = bp.chain(*parts)
    params, _ = net.init(key, (3,))
    x, dy = normal(key, (5, 3)), normal(key, (5, 2))
    y, caches = x, []
    for part, p in zip(parts, params, strict=True):
        y, cache = part.forward(p, y)
        caches.append(cache)
    assert_close(net.forward(params, x), (y, tuple(caches)))
    dx, signals = net.backward(params, tuple(caches), dy)
    for i in (2, 1, 0):
        dy, want = parts[i].backward(params[i], caches[i], dy)
        assert_close(signals[i], want)
    assert_close(dx, dy)


def test_nesting_changes_nothing(key):
    nested, params, x, _ = prepare(NETWORKS["nested"], key)
    ((dense, (_, _)), (_, last)) = params
    flat = bp.chain(bp.dense(4), bp.softplus(), bp.leaky_relu(), bp.dense(2))
    y, cache = nested.forward(params, x)
    flat_params = (dense, (), (), last)
    flat_y, flat_cache = flat.forward(flat_params, x)
    assert_close(y, flat_y)
    dx, grads = nested.backward(params, cache, y, read=bp.mean)
    flat_dx, flat_grads = flat.backward(flat_params, flat_cache, y, read=bp.mean)
    assert_close((dx, grads[0][0], grads[1][1]), (flat_dx, flat_grads[0], flat_grads[3]))


def test_a_chain_is_named_for_its_parts():
    net = bp.chain(bp.dense(4), bp.chain(bp.relu(), bp.dropout(0.5)))
    assert net.name == "chain(dense(4), chain(relu, dropout(0.5)))"


NET = bp.chain(bp.dense(4), bp.chain(bp.relu(), bp.dense(2)))


def params_of(net, shape=(3,)):
    return net.init(jax.random.key(0), shape)[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: bp.chain(bp.dense(3), bp.relu),
            TypeError,
            r"chain: part 2 is the function relu; it takes a Layer\. Call it: relu\(\)\?",
        ),
        (lambda: bp.chain(3), TypeError, r"chain: part 1 is 3; it takes a Layer\.$"),
        (
            lambda: NET.init(jax.random.key(0), ()),
            bp.LayerError,
            r"^chain: part 1 \(dense\(4\)\) got inputs of shape \[N\]",
        ),
        (
            lambda: NET.forward(params_of(NET), jnp.ones((5, 2))),
            bp.LayerError,
            r"^chain: part 1 \(dense\(4\)\) got inputs of shape \[5, 2\]",
        ),
        (
            lambda: NET.forward((params_of(NET)[0], ((), ())), jnp.ones((5, 3))),
            bp.LayerError,
            r"^chain: part 2: chain: part 2 \(dense\(2\)\) got parameters that are not its own",
        ),
        (
            lambda: NET.forward(params_of(NET)[:1], jnp.ones((5, 3))),
            bp.LayerError,
            r"got parameters with 1 entries; it takes a tuple of 2",
        ),
        (
            lambda: NET.forward({"weight": 1}, jnp.ones((5, 3))),
            bp.LayerError,
            r"got parameters with dict",
        ),
        (
            lambda: NET.backward(
                params_of(bp.chain(bp.dense(4))),
                NET.forward(params_of(NET), jnp.ones((5, 3)))[1],
                jnp.ones((5, 2)),
            ),
            bp.LayerError,
            r"got parameters with 1 entries",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_residual_adds_what_goes_in(key):
    inner = bp.chain(bp.dense(4), bp.tanh())
    layer = bp.residual(bp.dense(4), bp.tanh())
    params, _ = layer.init(key, (4,))
    x, dy = normal(key, (2, 5, 4))
    y, cache = layer.forward(params, x)
    inner_y, inner_cache = inner.forward(params, x)
    assert_close(y, x + inner_y)
    dx, signals = layer.backward(params, cache, dy)
    inner_dx, want = inner.backward(params, inner_cache, dy)
    assert_close((dx, signals), (dy + inner_dx, want))


def test_what_is_repeated_is_a_chain_of_the_same_parameters(key):
    layer = bp.chain(bp.dense(3), bp.tanh(), bp.dropout(0.3))
    net, unrolled = bp.repeat(layer, 3), bp.chain(layer, layer, layer)
    params, _ = net.init(key, (3,))
    x, dy = normal(key, (2, 5, 3))
    y, cache = net.forward(params, x, key=key)
    want, unrolled_cache = unrolled.forward((params,) * 3, x, key=key)
    assert_close(y, want)
    dx, examples = net.backward(params, cache, dy, read=bp.per_example)
    want, uses = unrolled.backward((params,) * 3, unrolled_cache, dy, read=bp.per_example)
    assert_close((dx, examples), (want, jax.tree.map(lambda *g: sum(g), *uses)))


def test_the_norm_of_a_weight_used_twice_is_not_the_sum_of_norms(key):
    net = bp.repeat(bp.dense(3), 2)
    params, _ = net.init(key, (3,))
    x, dy = normal(key, (2, 5, 3))
    _, cache = net.forward(params, x)
    _, signals = net.backward(params, cache, dy)
    _, squares = net.backward(params, cache, dy, read=bp.sq_norms)
    assert_close(squares["weight"], jnp.sum(bp.per_example(signals["weight"]) ** 2, axis=(1, 2)))
    uses = [
        bp.Outer(signals["weight"].inputs[:, k], signals["weight"].deltas[:, k]) for k in (0, 1)
    ]
    apart = sum(map(bp.sq_norms, uses))
    assert float(jnp.max(jnp.abs(squares["weight"] / apart - 1))) > 0.1
    # The uses stand in their order: what goes into the first is x.
    assert_close(uses[0].inputs, x)


def test_a_gate_multiplies(key):
    layer, gate = bp.dense(4), bp.chain(bp.dense(4), bp.silu())
    net = bp.gated(layer, gate)
    params, _ = net.init(key, (3,))
    x = normal(key, (5, 3))
    y, _ = net.forward(params, x)
    assert_close(y, layer.forward(params[0], x)[0] * gate.forward(params[1], x)[0])


def test_a_gate_of_channels_is_summed_over_positions_even_where_all_sizes_are_equal():
    dy = normal(jax.random.key(0), (3, 3, 3, 3))
    assert_close(reduce_like(dy, (3, 3)), jnp.sum(dy, axis=(1, 2)))
    assert_close(reduce_like(dy, (3, 1, 3, 3)), jnp.sum(dy, axis=1, keepdims=True))
    gate = jnp.arange(9.0).reshape(3, 3)
    assert_close(jnp.broadcast_to(expand(gate, dy.shape), dy.shape)[:, 1, 2], gate)


@pytest.mark.parametrize("combine", ["sum", "concatenate"])
def test_branches_with_inputs_of_their_own(combine, key):
    """Against each branch by itself."""
    parts = bp.dense(4), bp.chain(bp.dense(4), bp.tanh())
    layer = bp.parallel(*parts, combine=combine)
    params, out_shape = layer.init(key, ((3,), (2,)))
    assert out_shape == ((4,) if combine == "sum" else (8,))
    x = normal(key, (5, 3)), normal(key, (5, 2))
    dy = normal(key, (5, *out_shape))
    y, cache = layer.forward(params, x)
    dxs, signals = layer.backward(params, cache, dy)
    outputs = []
    for i, part in enumerate(parts):
        own, part_cache = part.forward(params[i], x[i])
        error = dy if combine == "sum" else dy[:, 4 * i : 4 * i + 4]
        assert_close((dxs[i], signals[i]), part.backward(params[i], part_cache, error))
        outputs.append(own)
    assert_close(y, sum(outputs) if combine == "sum" else jnp.concatenate(outputs, axis=1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: bp.residual(bp.dense(5)).init(jax.random.key(0), (6,)),
            bp.LayerError,
            r"residual\(dense\(5\)\) has an inner layer that maps \[6\] to \[5\]; a residual needs",
        ),
        (
            lambda: bp.repeat(bp.dense(5), 2).init(jax.random.key(0), (6,)),
            bp.LayerError,
            r"repeat\(dense\(5\), 2\) has an inner layer that maps \[6\] to \[5\]; a repeated",
        ),
        (lambda: bp.repeat(bp.relu(), 0), ValueError, "n is 0; it takes a positive integer"),
        (lambda: bp.repeat(bp.relu(), True), ValueError, "n is True; it takes a positive integer"),
        (lambda: bp.repeat(bp.relu, 2), TypeError, r"repeat: part 1 is .*Call it: relu\(\)\?"),
        (
            lambda: bp.gated(bp.dense(2), bp.dense(3)).init(jax.random.key(0), (4,)),
            bp.LayerError,
            r"a layer with outputs \[2\] and a gate with \[3\]; it takes equal shapes",
        ),
        (lambda: bp.gated(bp.dense(2), bp.silu), TypeError, r"gated: part 2 is .*silu\(\)\?"),
        (
            lambda: bp.gated(bp.relu(), bp.dense(2)).forward(((), ()), jnp.ones((1, 2))),
            bp.LayerError,
            r"gated: gate \(dense\(2\)\) got parameters that are not its own",
        ),
        (bp.residual, TypeError, "residual: takes a Layer, or several that form a chain; got none"),
        (lambda: bp.residual(bp.relu), TypeError, r"residual: part 1 is .*Call it: relu\(\)\?"),
        (bp.parallel, TypeError, "parallel: takes a Layer for each branch; got none"),
        (
            lambda: bp.parallel(bp.relu(), combine="stack"),
            ValueError,
            "combine is 'stack'; it takes 'sum' or 'concatenate'",
        ),
        (
            lambda: bp.parallel(bp.dense(2), bp.dense(3)).init(jax.random.key(0), (4,)),
            bp.LayerError,
            r"has branches with outputs \[2\], \[3\]; to sum them takes equal shapes\.",
        ),
        (
            lambda: bp.parallel(bp.flatten(), bp.dense(3), combine="concatenate").init(
                jax.random.key(0), (2, 4)
            ),
            bp.LayerError,
            r"outputs \[8\], \[2, 3\]; to concatenate them takes equal shapes but for the last",
        ),
        (
            lambda: bp.parallel(bp.relu(), bp.relu()).forward(((), ()), (jnp.ones((1, 2)),)),
            bp.LayerError,
            "got 1 inputs; it takes 2, or one for all",
        ),
        (
            lambda: bp.parallel(bp.relu(), bp.dense(2)).forward(((), ()), jnp.ones((1, 2))),
            bp.LayerError,
            r"parallel: branch 2 \(dense\(2\)\) got parameters that are not its own",
        ),
        (
            lambda: bp.residual(bp.chain(bp.dense(3))).forward((((),),), jnp.ones((1, 3))),
            bp.LayerError,
            r"residual: chain: part 1 \(dense\(3\)\) got parameters",
        ),
    ],
)
def test_what_does_not_compose_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def tables():
    return bp.embedding(5, 4), bp.embedding(5, 4)


SAME_TOKENS = {
    "parallel": lambda: bp.parallel(*tables()),
    "parallel, concatenated": lambda: bp.parallel(*tables(), combine="concatenate"),
    "parallel, one behind another": lambda: bp.parallel(
        bp.chain(bp.remat(bp.embedding(5, 2)), bp.dense(4)), bp.cast(bp.embedding(5, 4), float)
    ),
    "gated": lambda: bp.gated(*tables()),
    "flatten first": lambda: bp.chain(bp.flatten(), bp.embedding(5, 4)),
    "dressed": lambda: bp.chain(
        bp.remat(bp.flatten()), bp.cast(bp.flatten(), float), bp.repeat(bp.flatten(), 2),
        bp.residual(bp.flatten()), bp.stack(bp.flatten(), 2),
        bp.parallel(bp.flatten(), bp.flatten(), combine="concatenate"), bp.embedding(30, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", SAME_TOKENS.values(), ids=SAME_TOKENS)
def test_branches_whose_inputs_have_no_derivative(make, key):
    net = make()
    params, out_shape = net.init(key, (3,))
    x = jax.random.randint(key, (2, 3), 0, 5)
    dy = normal(key, (2, *out_shape))
    y, dx, grads = swept(net, params, x, dy)
    assert y.shape == dy.shape
    assert dx is None
    assert_close((dx, grads), layer_vjp(net, params, x, dy))


def tagged(scale):
    """A layer from trees (tokens, features) to such trees, whose tokens have no derivative."""

    def init(key, shape):
        del key
        return (), shape

    def forward(params, x, *, key=None):
        del params, key
        tokens, features = x
        return (tokens, scale * features), ()

    def backward(params, cache, dy, *, read=bp.keep):
        del params, cache, read
        return (None, scale * dy[1]), ()

    return bp.Layer("tagged", init, forward, backward)


TREES = {
    "residual": (lambda: bp.residual(tagged(3.0)), 4.0),
    "repeat": (lambda: bp.repeat(tagged(3.0), 2), 9.0),
    "stack": (lambda: bp.stack(tagged(3.0), 2), 9.0),
    "remat": (lambda: bp.remat(tagged(3.0)), 3.0),
    "cast": (lambda: bp.cast(tagged(3.0), jnp.float32), 3.0),
    "masked": (lambda: bp.masked(lambda mask: tagged(3.0)), 3.0),
    "parallel": (lambda: bp.parallel(tagged(3.0), tagged(2.0)), 5.0),
}


@pytest.mark.parametrize(("make", "factor"), TREES.values(), ids=TREES)
def test_trees_of_which_a_part_has_no_derivative(make, factor, key):
    net = make()
    x = jnp.arange(2), jax.random.normal(key, (2, 3), jnp.float32)
    shape = ((), (3,))
    inputs, shapes = (x, None) if net.name.startswith("masked") else x, shape
    if net.name.startswith("masked"):
        shapes = (shape, None)
    if net.name.startswith("parallel"):  # a tuple is one input for each branch
        inputs, shapes = (x, x), (shape, shape)
    params, out_shape = net.init(key, shapes)
    y, cache = net.forward(params, inputs)
    assert out_shape == shape
    assert_close(y[1], factor * x[1])
    dx, _ = net.backward(params, cache, (None, x[1]))
    if net.name.startswith("parallel"):
        assert_close(dx, ((None, 3 * x[1]), (None, 2 * x[1])))
    else:
        assert_close(dx, (None, factor * x[1]))
