"""Several streams: every reading of networks with several inputs, and the sum over shared uses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import READINGS, N, normal, swept, with_n
from oracles import assert_close, by_example, layer_vjp, per_example_grads, squared

import jaxbp as bp
from jaxbp.signals.stacked import stack_axes


def block():
    """A block of a decoder, which sees the memory twice."""
    memory = bp.chain(bp.select(1), bp.global_pool())
    return bp.chain(
        bp.on(0, bp.residual(bp.dense(3), bp.tanh())),
        bp.residual(bp.fork(bp.select(0), memory), bp.multiply(), bp.dense(3), at=0),
        bp.residual(bp.on(0, bp.tanh()), bp.fork(bp.select(0), memory), bp.add(), at=0),
    )


def experts():
    return bp.dense(2), bp.chain(bp.dense(3), bp.tanh(), bp.dense(2)), bp.dense(2, use_bias=False)


NETWORKS = {
    "encoder-decoder": (
        lambda: bp.chain(
            bp.on(1, bp.dense(3), bp.tanh()), block(), block(), bp.select(0), bp.dense(2)
        ),
        ((2, 3), (4, 2)),
    ),
    "encoder-decoder in a loop": (
        lambda: bp.chain(bp.on(1, bp.dense(3)), bp.stack(bp.remat(block()), 2), bp.select(0)),
        ((2, 3), (4, 2)),
    ),
    "siamese": (
        lambda: bp.chain(bp.shared(bp.dense(3), bp.tanh(), bp.dense(2)), bp.distance()),
        ((4,), (4,)),
    ),
    "siamese of images of two sizes": (
        lambda: bp.chain(
            bp.shared(bp.conv(2, (2,)), bp.tanh(), bp.global_pool()), bp.cosine_similarity()
        ),
        ((3, 2), (4, 2)),
    ),
    "two towers": (
        lambda: bp.chain(
            bp.on("a", bp.dense(3), bp.tanh()), bp.on("b", bp.dense(3)), bp.bilinear(2)
        ),
        {"a": (2,), "b": (4,)},
    ),
    "film": (
        lambda: bp.chain(
            bp.fork(
                bp.gated(bp.select(0), bp.chain(bp.select(1), bp.dense(3))),
                bp.chain(bp.select(1), bp.dense(3)),
            ),
            bp.add(),
            bp.dense(1),
        ),
        ((2, 2, 3), (2,)),
    ),
    "routed": (
        lambda: bp.chain(bp.dense(4), bp.mixture(bp.dense(3), *experts(), top_k=2)),
        (3, 4),
    ),
}
SOON = {"encoder-decoder", "siamese"}


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        pytest.param(*case, id=name, marks=() if name in SOON else pytest.mark.thorough)
        for name, case in NETWORKS.items()
    ],
)
def test_every_reading_of_one_sweep(make, shape, key):
    """Against the gradient of each example's own loss by autodiff."""
    net = make()
    params, out_shape = net.init(key, shape)
    x, targets = normal(key, with_n(shape)), normal(key, (N, *out_shape))
    asked = {name: READINGS[name] for name in ("mean", "per_example", "sq_norms", "variance")}
    _, answers = jax.jit(bp.backprop(net, bp.squared_error, read=asked))(params, x, targets)
    rows, axes = answers["per_example"], stack_axes(params)
    assert_close(by_example(rows), per_example_grads(net, squared, params, x, targets))

    def expect(function):
        """What a function makes of the rows of each parameter, of each layer of a stack."""
        return jax.tree.map(function, rows, axes)

    assert_close(answers["mean"], expect(lambda g, n: jnp.mean(g, axis=n)))
    assert_close(answers["variance"], expect(lambda g, n: jnp.var(g, axis=n)))
    assert_close(
        answers["sq_norms"], expect(lambda g, n: jnp.sum(g * g, axis=range(n + 1, g.ndim)))
    )


def test_a_shared_weight_has_the_norm_of_the_sum_over_its_uses(key):
    layer, inner = bp.shared(bp.dense(3)), bp.dense(3)
    params, _ = layer.init(key, ((4,), (2, 4)))
    x, dy = normal(key, ((5, 4), (5, 2, 4))), normal(key, ((5, 3), (5, 2, 3)))
    y, cache = layer.forward(params, x)
    assert_close(y, tuple(inner.forward(params, own)[0] for own in x))
    _, squares = layer.backward(params, cache, dy, read=bp.sq_norms)
    uses = [
        inner.backward(params, *pair, read=bp.per_example)[1] for pair in zip(x, dy, strict=True)
    ]
    sums = jax.tree.map(lambda a, b: a + b, *uses)
    assert_close(squares, jax.tree.map(lambda g: jnp.sum(g * g, axis=range(1, g.ndim)), sums))
    apart = sum(jnp.sum(use["weight"] ** 2, axis=(1, 2)) for use in uses)
    assert float(jnp.max(jnp.abs(squares["weight"] / apart - 1))) > 0.1
    # N remains the number of examples, and the uses are positions of one signal.
    signal = layer.backward(params, cache, dy)[1]["weight"]
    assert isinstance(signal, bp.Outer)
    assert signal.inputs.shape == (5, 3, 4)


def test_a_shared_table(key):
    net = bp.chain(bp.shared(bp.embedding(4, 3)), bp.inner_product())
    params, _ = net.init(key, ((2,), (2,)))
    x = jnp.array([[0, 1], [2, 2]]), jnp.array([[1, 1], [3, 2]])
    targets = jnp.ones((2, 2, 1))
    sweep = jax.jit(bp.backprop(net, bp.squared_error, read=bp.per_example))
    _, rows = sweep(params, x, targets)
    assert_close(rows, per_example_grads(net, squared, params, x, targets))
    _, cache = net.forward(params, x)
    assert net.backward(params, cache, targets)[0] == (None, None)


def test_tokens_and_features_side_by_side(key):
    """Where an entry has no derivative, neither has its dx; elsewhere autodiff agrees."""
    net = bp.chain(
        bp.fork(bp.chain(bp.on("tokens", bp.embedding(4, 3)), bp.select("tokens")), bp.select("x")),
        bp.concatenate(),
        bp.dense(2),
    )
    params, out_shape = net.init(key, {"tokens": (), "x": (2,)})
    assert out_shape == (2,)
    tokens, x, dy = jnp.array([1, 3, 1]), *normal(key, ((3, 2), (3, 2)))
    _, dx, grads = swept(net, params, {"tokens": tokens, "x": x}, dy)

    def forward(params, x, *, key=None):
        return net.forward(params, {"tokens": tokens, "x": x}, key=key)

    assert dx["tokens"] is None
    assert_close((dx["x"], grads), layer_vjp(net._replace(forward=forward), params, x, dy))


@pytest.mark.parametrize("name", ["siamese", "two towers", "routed"])
def test_random_feedback_carries_the_error(name, key):
    """As if the backward pass had the random weights, through shared and bilinear ones too."""
    make, shape = NETWORKS[name]
    net, rule = make(), bp.random_feedback()
    params, out_shape = net.init(key, shape)
    x, dy = normal(key, with_n(shape)), normal(key, (N, *out_shape))
    state = rule.make(key, net, shape)
    _, dx, grads = swept(net, params, x, dy, tree=rule.choose(state, params))
    _, exact_dx, exact = swept(net, params, x, dy)
    assert jax.tree.structure((dx, grads)) == jax.tree.structure((exact_dx, exact))
    pairs = zip(jax.tree.leaves(dx), jax.tree.leaves(exact_dx), strict=True)
    assert not any(np.allclose(*pair) for pair in pairs)


def test_the_parts_of_a_shared_network_draw_for_each_input(key):
    layer = bp.shared(bp.dropout(0.5))
    a, b = layer.forward((), (jnp.ones((2, 50)), jnp.ones((2, 50))), key=key)[0]
    assert not np.array_equal(a, b)


def test_a_named_tuple_stays_one(key):
    class Pair(NamedTuple):
        query: jax.Array
        key: jax.Array

    layer = bp.chain(bp.on(0, bp.tanh()), bp.residual(bp.inner_product(), at=-1))
    x = Pair(*normal(key, ((3, 1), (3, 1))))
    y, cache = layer.forward(((), ()), x)
    dx, _ = layer.backward(((), ()), cache, y)
    assert isinstance(y, Pair)
    assert isinstance(dx, Pair)


def test_outputs_are_those_of_the_parts_by_hand(key):
    x = normal(key, {"a": (3, 2), "b": (3, 2)})
    a, b = x["a"], x["b"]
    for layer, want in (
        (bp.on("a", bp.tanh()), {"a": jnp.tanh(a), "b": b}),
        (bp.select("b"), b),
        (bp.fork(bp.select("b"), bp.chain()), (b, x)),
        (bp.shared(bp.tanh()), {"a": jnp.tanh(a), "b": jnp.tanh(b)}),
        (bp.residual(bp.subtract(), at="b"), {"a": a, "b": b + a - b}),
        (bp.chain(bp.shared(bp.tanh()), bp.multiply()), jnp.tanh(a) * jnp.tanh(b)),
        (bp.concatenate(axis=0), jnp.concatenate([a, b], axis=1)),
    ):
        params, _ = layer.init(key, {"a": (2,), "b": (2,)})
        assert_close(layer.forward(params, x)[0], want)


KEY = jax.random.key(0)
PAIR = np.ones((3, 2)), np.ones((3, 4))


def backward_of(layer, x, dy):
    """A backward pass of a layer without parameters."""
    return layer.backward((), layer.forward((), x)[1], dy)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: bp.on(0),
            TypeError,
            r"^on: takes a Layer, or several that form a chain",
        ),
        (lambda: bp.on(0, bp.relu), TypeError, r"^on: part 1 is .*Call it: relu\(\)\?"),
        (lambda: bp.on(bp.relu()), TypeError, r"^on: at is Layer.*takes the index or the key"),
        (lambda: bp.select(True), TypeError, r"^select: at is True; it takes the index or the key"),
        (lambda: bp.residual(bp.relu(), at=1.5), TypeError, r"^residual: at is 1\.5; it takes"),
        (bp.fork, TypeError, r"^fork: takes a Layer for each branch; got none"),
        (bp.shared, TypeError, r"^shared: takes a Layer, or several that form a chain; got none"),
        (
            lambda: bp.on(2, bp.relu()).init(KEY, ((3,), (2,))),
            bp.LayerError,
            r"^on\(2, relu\) got inputs that are a tuple of 2; it takes an entry at 2",
        ),
        (
            lambda: bp.select("c").forward((), {"a": PAIR[0], "b": PAIR[1]}),
            bp.LayerError,
            r"^select\('c'\) got inputs that are a dict of a, b; it takes an entry at 'c'",
        ),
        (
            lambda: bp.on(0, bp.relu()).init(KEY, (3, 2)),
            bp.LayerError,
            r"got inputs that are one array \[N, 3, 2\]; it takes a tuple or a dict of them",
        ),
        (
            lambda: bp.on(0, bp.relu()).forward((), PAIR[0]),
            bp.LayerError,
            r"got inputs that are one array \[3, 2\]; it takes a tuple or a dict of them",
        ),
        (
            lambda: bp.on(1, bp.dense(2)).init(KEY, ((3,), ())),
            bp.LayerError,
            r"^on\(1\) \(dense\(2\)\) got inputs of shape \[N\]",
        ),
        (
            lambda: backward_of(bp.on(0, bp.relu()), PAIR, (PAIR[0], PAIR[0])),
            bp.LayerError,
            r"^on\(0, relu\) got a dy of shape \[3, 2\]; its outputs are \[3, 4\]",
        ),
        (
            lambda: backward_of(bp.residual(bp.select(0), at=0), PAIR, (PAIR[0], PAIR[0])),
            bp.LayerError,
            r"got a dy of shape \[3, 2\]; its outputs are \[3, 4\]",
        ),
        (
            lambda: bp.residual(bp.select(1), at=0).init(KEY, ((3,), (2,))),
            bp.LayerError,
            r"maps \[3\] to \[2\]; a residual needs equal shapes",
        ),
        (
            lambda: bp.stack(bp.fork(bp.select(0), bp.select(0)), 2).init(KEY, ((3,), (2,))),
            bp.LayerError,
            r"maps \(\[3\], \[2\]\) to \(\[3\], \[3\]\); a stack needs equal shapes",
        ),
        (
            lambda: bp.fork(bp.relu(), bp.dense(2)).forward(((), ()), PAIR[0]),
            bp.LayerError,
            r"^fork: branch 2 \(dense\(2\)\) got parameters that are not its own",
        ),
        (
            lambda: bp.shared(bp.dense(2)).init(KEY, ((3,), (2,))),
            bp.LayerError,
            r"^shared\(dense\(2\)\) needs other parameters for inputs \[2\] than for \[3\]: weight",
        ),
        (
            lambda: bp.shared(bp.relu()).forward((), (PAIR[0], jnp.ones((3, 2), int))),
            bp.LayerError,
            r"^shared: input 2 \(relu\) got inputs of dtype int64",
        ),
        (
            lambda: bp.add().init(KEY, ((3,), (2,))),
            bp.LayerError,
            r"^add got inputs of shapes \[N, 3\], \[N, 2\]; the others take the shape of the first",
        ),
        (
            lambda: bp.subtract().init(KEY, ((3,),)),
            bp.LayerError,
            r"got 1 arrays; it takes a tup",
        ),
        (
            lambda: bp.multiply().forward((), (PAIR[0], PAIR[0].astype(np.float32))),
            bp.LayerError,
            r"^multiply got inputs of dtypes float64 and float32; it takes one for all",
        ),
        (
            lambda: bp.add().forward((), (PAIR[0], PAIR[0][:1])),
            bp.LayerError,
            r"got inputs of shapes \[3, 2\], \[1, 2\]; their first axis has to be the same",
        ),
        (
            lambda: bp.concatenate("a"),
            ValueError,
            r"^concatenate: axis is 'a'; it takes an int",
        ),
        (
            lambda: bp.concatenate(axis=0).init(KEY, ((3, 2), (3, 1))),
            bp.LayerError,
            r"arrays that differ only in axis 0 of one example",
        ),
        (
            lambda: bp.gated(bp.dense(3), bp.flatten()).init(KEY, (2, 3)),
            bp.LayerError,
            r"a layer with outputs \[2, 3\] and a gate with \[6\]; it takes equal shapes, sizes",
        ),
        (
            lambda: bp.direct_feedback(bp.fork(bp.dense(2), bp.dense(3)), bp.select(0)).make(
                KEY, bp.chain(bp.fork(bp.dense(2), bp.dense(3)), bp.select(0)), (4,)
            ),
            ValueError,
            r"direct_feedback: block 1 has several outputs, \(\[2\], \[3\]\); each block",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
