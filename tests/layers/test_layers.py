"""Layers: every one in the registry against autodiff and the laws of a linear backward pass."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    LAYERS,
    MAPS,
    NETWORKS,
    VARIANTS,
    N,
    every,
    late,
    make_inputs,
    normal,
    output_shape,
    prepare,
    swept,
    with_n,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    assert_close,
    by_example,
    check_layer_by_finite_differences,
    dot,
    in_dtype,
    is_float,
    layer_jvp,
    layer_per_example_grads,
    layer_vjp,
    slope,
)

import jaxbp as bp

CASES = LAYERS | NETWORKS | VARIANTS
PLAIN = {name: case for name, case in LAYERS.items() if hasattr(bp, name)}
# These have tests of their own, or a derivative like that of another layer: of them, only the
# derivative is tested soon.
LATE = {
    "prelu", "layer_scale", "prepend", "fixed_norm", "l2_norm", "local_response_norm", "avg_pool",
    "lp_pool", "adaptive_pool", "resize", "upsample", "sinusoidal_positions", "on", "select",
    "fork", "add", "multiply", "inner_product", "cosine_similarity", "bilinear", "sample_gaussian",
    "rms_norm", "bidirectional", "conv_transpose", "tied_embedding",
}  # fmt: skip
SOON = PLAIN.keys() - MAPS.keys() - LATE
STRUCTURES = {
    "conv in groups", "stack of a conv", "repeat in a repeat", "stack in a stack",
    "stack that is repeated", "remat in a stack", "recurrent in segments",
    "recurrent, masked and backwards", "dot_product_attention, lean and masked",
    "embedding of tokens in two axes",
}  # fmt: skip
every_layer = every("case", CASES, soon=PLAIN.keys() - MAPS.keys() | STRUCTURES)
# A layer of each kind of derivative: by entries, by products, at positions, in time, in a scan.
every_plain_layer = every(
    "case", PLAIN, soon={"gelu", "dense", "layer_norm", "conv", "attention", "recurrent"}
)
every_layer_thoroughly = every("case", CASES, soon=SOON)


def sweep(layer, params, x, dy, key=None, read=bp.total, carrier=None):
    """Forward and backward in one: (dx, readings)."""
    return swept(layer, params, x, dy, key=key, tree=carrier, read=read)[1:]


def cotangent(layer, params, x, key):
    return normal(key, output_shape(layer, params, x))


@every_layer
def test_agrees_with_autodiff(case, key):
    layer, params, x, draw_key = prepare(case, key)
    dy = cotangent(layer, params, x, key)
    for draws in [None] if draw_key is None else [draw_key, None]:
        assert_close(sweep(layer, params, x, dy, draws), layer_vjp(layer, params, x, dy, draws))


@every_plain_layer
def test_autodiff_agrees_with_finite_differences(case, key):
    layer, params, x, draw_key = prepare(case, key)
    check_layer_by_finite_differences(layer, params, x, draw_key)


@every_layer_thoroughly
def test_backward_is_the_adjoint_of_the_tangent(case, key):
    layer, params, x, draw_key = prepare(case, key)
    _, params_dot, x_dot, _ = prepare(case, jax.random.fold_in(key, 1))
    dy = cotangent(layer, params, x, key)
    there = dot(layer_jvp(layer, params, x, params_dot, x_dot, draw_key), dy)
    dx, grads = sweep(layer, params, x, dy, draw_key)
    x_dot = None if dx is None else x_dot
    assert_close(dot((x_dot, params_dot), (dx, grads)), there)


@every_layer_thoroughly
def test_backward_is_linear_in_dy(case, key):
    layer, params, x, draw_key = prepare(case, key)
    a, b = (cotangent(layer, params, x, k) for k in jax.random.split(key))

    def combine(s, t):
        return jax.tree.map(lambda s, t: 2 * s - 3 * t, s, t)

    sweeps = (sweep(layer, params, x, dy, draw_key) for dy in (a, b))
    assert_close(sweep(layer, params, x, combine(a, b), draw_key), combine(*sweeps))


@every_layer_thoroughly
def test_per_example_gradients_agree_with_autodiff(case, key):
    layer, params, x, draw_key = prepare(case, key)
    dy = cotangent(layer, params, x, key)
    _, got = sweep(layer, params, x, dy, draw_key, read=bp.per_example)
    assert_close(by_example(got), layer_per_example_grads(layer, params, x, dy, draw_key))


@every_layer_thoroughly
def test_examples_do_not_see_each_other(case, key):
    layer, params, x, _ = prepare(case, key)
    dy = cotangent(layer, params, x, key)
    others = np.array([n for n in range(N) if n != 1])
    changed_x, changed_dy = jax.tree.map(
        lambda a: np.insert(np.asarray(a)[others], 1, 1, axis=0), (x, dy)
    )

    def rows(x, dy):
        y, dx, grads = swept(layer, params, x, dy, read=bp.per_example)
        return y, dx, by_example(grads)

    before, after = rows(x, dy), rows(changed_x, changed_dy)
    assert_close(*(jax.tree.map(lambda a: np.asarray(a)[others], r) for r in (before, after)))


@every_layer_thoroughly
def test_permuted_examples_permute_what_is_read(case, key):
    layer, params, x, _ = prepare(case, key)
    dy = cotangent(layer, params, x, key)
    order = np.array([2, 0, 1])

    def permute(tree):
        return jax.tree.map(lambda a: np.asarray(a)[order], tree)

    dx, permuted = sweep(layer, params, permute(x), permute(dy), read=bp.per_example)
    straight_dx, straight = sweep(layer, params, x, dy, read=bp.per_example)
    assert_close((dx, by_example(permuted)), permute((straight_dx, by_example(straight))))


def at_zero(params, x):
    return jax.tree.map(jnp.zeros_like, (params, x))


def at_equal_values(params, x):
    return params, jax.tree.map(jnp.ones_like, x)


def with_zero_parameters(params, x):
    return jax.tree.map(jnp.zeros_like, params), x


EDGES = {
    f"{name}, {point.__name__}": (case, point)
    for name, case in CASES.items()
    for point in (at_zero, at_equal_values, with_zero_parameters)
    if point is at_zero or name in PLAIN
}


@every("edge", EDGES, soon={f"{name}, at_zero" for name in ("layer_norm", "gelu", "attention")})
def test_a_sweep_is_differentiated_once_more(edge, key):
    """Where autodiff of autodiff is finite, autodiff of the sweep is, and they agree."""
    case, point = edge
    layer, params, x, draw_key = prepare(case, key)
    params, x = point(params, x)
    dy = cotangent(layer, params, x, key)
    if not is_float(x) and not params:
        return

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(backward, params, x):
        def objective(params, x):
            leaves = jax.tree.leaves(backward(layer, params, x, dy, draw_key))
            return sum(
                jnp.vdot(leaf, jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape))
                for leaf in leaves
            )

        return jax.grad(objective, argnums=(0, 1) if is_float(x) else 0)(params, x)

    got, want = derivatives(sweep, params, x), derivatives(layer_vjp, params, x)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(got))
    # By the largest of all numbers: at such points some parameters have no derivative at all.
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(want)) or 1.0
    assert_close(*(jax.tree.map(lambda leaf: leaf / largest + 1, tree) for tree in (got, want)))


@every_plain_layer
def test_compiled_or_not_is_the_same(case, key):
    layer, params, x, draw_key = prepare(case, key)
    dy = cotangent(layer, params, x, key)
    with jax.disable_jit():
        _, cache = layer.forward(params, x, key=draw_key)
        plain = layer.backward(params, cache, dy, read=bp.total)
    assert_close(sweep(layer, params, x, dy, draw_key), plain)


@every_layer_thoroughly
def test_init_says_what_forward_gives(case, key):
    layer, *_ = prepare(case, key)
    params, out_shape = layer.init(key, case.shape)
    assert output_shape(layer, params, make_inputs(case, key)) == with_n(out_shape)


@pytest.mark.parametrize(
    ("make", "shape", "draws"),
    [
        (lambda init: bp.dense(2, weight_init=init, bias_init=init), (3,), 2),
        (lambda init: bp.conv(2, (3,), weight_init=init, bias_init=init), (4, 2), 2),
        (lambda init: bp.conv_transpose(2, (3,), weight_init=init, bias_init=init), (4, 2), 2),
        (lambda init: bp.bilinear(2, weight_init=init, bias_init=init), ((3,), (2,)), 2),
        (lambda init: bp.attention(4, 2, weight_init=init), (3, 4), 2),
        (lambda init: bp.cross_attention(4, 2, weight_init=init), ((2, 3), (3, 2)), 4),
        (
            lambda init: bp.tied_embedding(5, 2, bp.dense(2, weight_init=init), weight_init=init),
            (3,),
            2,
        ),
        (
            lambda init: bp.recurrent(
                bp.lstm(3, projection=2)._replace(bias_init=init),
                weight_init=init,
                recurrent_init=init,
            ),
            (4, 2),
            7,
        ),
    ],
)
def test_every_parameter_is_initialised_by_a_key_of_its_own(make, shape, draws, key):
    seen = []

    def init(key, shape, dtype=None):
        seen.append(tuple(jax.random.key_data(key).tolist()))
        return jnp.zeros(shape, dtype)

    make(init).init(key, shape)
    assert len(set(seen)) == len(seen) == draws


@every_layer
@pytest.mark.parametrize("dtype", [jnp.bfloat16, late(jnp.float32), late(jnp.float16)])
def test_dtypes_and_structure_are_kept(case, key, dtype):
    layer, params, x, draw_key = prepare(case, key)
    params, x = in_dtype((params, x), dtype)

    def both(params, x):
        y, cache = layer.forward(params, x, key=draw_key)
        return y, layer.backward(params, cache, y, read=bp.total)

    y, (dx, grads) = jax.eval_shape(both, params, x)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(y))

    def outline(tree):
        return jax.tree.map(lambda a: (a.shape, a.dtype), tree)

    assert outline((dx, grads)) == outline((x if is_float(x) else None, params))


@every_layer_thoroughly
def test_another_tree_changes_what_is_carried_and_nothing_above(case, key):
    """The first argument of backward carries the error: the gradients at the top stay exact."""
    layer, params, x, draw_key = prepare(case, key)
    carrier = jax.tree.map(lambda p: p + 1, params)
    dy = cotangent(layer, params, x, key)
    exact_dx, exact = sweep(layer, params, x, dy, draw_key)
    dx, grads = sweep(layer, params, x, dy, draw_key, carrier=carrier)
    carries_nothing = layer.name.startswith(("embedding", "learned_positions", "prepend")) or all(
        "bias" in str(path[-1]) for path, _ in jax.tree.leaves_with_path(params)
    )
    if carries_nothing:
        return assert_close((dx, grads), sweep(layer, params, x, dy, draw_key))
    # The lowest thing that the error comes to: of tokens that is the gradient of their table.
    lowest, exact_lowest = (jax.tree.leaves(tree)[0] for tree in ((dx, grads), (exact_dx, exact)))
    assert not np.allclose(lowest, exact_lowest)
    top = (
        [grads[i] for i in range(len(params)) if params[i]][-1:] if type(grads) is tuple else grads
    )
    want = (
        [exact[i] for i in range(len(params)) if params[i]][-1:] if type(grads) is tuple else exact
    )
    if layer.name.startswith("cross_attention"):
        top, want = grads["out"], exact["out"]
    # What is repeated stands below itself, and a tied table above what it embeds.
    recurrent = "recurrent", "stateful", "bidirectional"
    repeated = "repeat", "stack", "shared", "tied_embedding", *recurrent
    several = NETWORKS["nested"], VARIANTS["decoder"]
    if case not in several and not layer.name.startswith(repeated):
        assert_close(top, want)


@pytest.mark.parametrize(
    ("layer", "function"),
    [
        (bp.sigmoid(), jax.nn.sigmoid),
        (bp.tanh(), jnp.tanh),
        (bp.relu(), jax.nn.relu),
        (bp.leaky_relu(0.2), lambda x: jax.nn.leaky_relu(x, 0.2)),
        (bp.elu(1.3), lambda x: jax.nn.elu(x, 1.3)),
        (bp.softplus(), jax.nn.softplus),
        (bp.silu(), jax.nn.silu),
        (bp.gelu(), lambda x: jax.nn.gelu(x, approximate=True)),
        (bp.gelu(approximate=False), lambda x: jax.nn.gelu(x, approximate=False)),
    ],
    ids=lambda a: getattr(a, "name", None),
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, late(jnp.float64), late(jnp.float32)])
def test_activations_are_those_of_jax(layer, function, dtype):
    # Far out too, where an exponential could overflow into a value that is not finite.
    x = jnp.asarray(
        [[-1e4, -100.0, -20.0, -3.0, -0.5, -1e-3, 0, 1e-3, 0.5, 3, 20, 100, 1e4]], dtype
    )
    y, cache = layer.forward((), x)
    dx, _ = layer.backward((), cache, jnp.ones_like(x))
    assert_close(y, function(x))
    assert_close(dx, slope(function, x))
    assert bool(jnp.all(jnp.isfinite(dx)))


@pytest.mark.parametrize("make", [bp.sigmoid, bp.tanh, bp.relu, bp.leaky_relu, bp.elu, bp.softplus])
def test_the_cache_is_the_output_where_that_suffices(make):
    y, cache = make().forward((), jnp.array([[-1.0, 2.0]]))
    assert cache is y


def test_dense_is_an_affine_map(key):
    layer, params, x, _ = prepare(LAYERS["dense"], key)
    y, cache = layer.forward(params, x)
    w, b = np.asarray(params["weight"]), np.asarray(params["bias"])
    assert_close(y, jnp.asarray(np.array([[xi @ w[:, o] + b[o] for o in range(4)] for xi in x])))
    assert cache is x


def test_dense_initialises_as_it_is_told(key):
    params, _ = bp.dense(400, dtype=jnp.float32).init(key, (100,))
    assert params["weight"].dtype == params["bias"].dtype == jnp.float32
    # lecun_normal: variance 1 / I; of 40 000 draws the deviation is known to half a percent.
    np.testing.assert_allclose(np.std(params["weight"]), 0.1, rtol=0.02)
    assert not np.any(params["bias"])
    ones = bp.dense(2, bias_init=jax.nn.initializers.ones).init(key, (3,))[0]["bias"]
    np.testing.assert_array_equal(ones, 1)


def test_the_parts_of_a_chain_draw_different_parameters(key):
    params, _ = bp.chain(bp.dense(4), bp.dense(4)).init(key, (4,))
    assert not np.allclose(params[0]["weight"], params[1]["weight"])


def test_dropout_keeps_the_mean_and_drops_as_often_as_it_says(key):
    x = jnp.full((500, 400), 3.0)
    y, mask = bp.dropout(0.3).forward((), x, key=key)
    kept = np.asarray(y != 0)
    # 200 000 draws: a deviation of 0.001 in the fraction.
    np.testing.assert_allclose(kept.mean(), 0.7, atol=0.005)
    np.testing.assert_allclose(np.asarray(y)[kept], 3 / 0.7)
    assert mask.dtype == bool


def test_dropout_without_a_key_is_the_identity(key):
    x = normal(key, (3, 4))
    y, cache = bp.dropout(0.5).forward((), x)
    assert y is x
    assert bp.dropout(0.5).backward((), cache, x)[0] is x


def test_dropout_draws_anew_with_another_key_and_at_another_place(key):
    x = jnp.ones((4, 50))
    net = bp.chain(bp.dropout(0.5), bp.dropout(0.5))
    once = bp.dropout(0.5).forward((), x, key=key)[0]
    again = bp.dropout(0.5).forward((), x, key=jax.random.fold_in(key, 1))[0]
    assert not np.array_equal(once, again)
    _, (first, second) = net.forward(((), ()), x, key=key)
    assert not np.array_equal(first, second)


@settings(deadline=None, max_examples=15)
@given(
    n=st.integers(1, 4),
    positions=st.lists(st.integers(1, 3), max_size=2),
    i=st.integers(1, 5),
    o=st.integers(1, 5),
    use_bias=st.booleans(),
)
def test_dense_of_any_shape(n, positions, i, o, use_bias):
    with jax.enable_x64(True):
        layer = bp.dense(o, use_bias=use_bias)
        k = jax.random.key(n)
        params, out_shape = layer.init(k, (*positions, i))
        assert out_shape == (*positions, o)
        x = normal(k, (n, *positions, i))
        dy = normal(k, (n, *out_shape))
        assert_close(sweep(layer, params, x, dy), layer_vjp(layer, params, x, dy))


DENSE_PARAMS = {"weight": np.ones((5, 4)), "bias": np.ones(4)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bp.dense(0), r"dense: features is 0; it takes a positive integer"),
        (lambda: bp.dense(2.0), r"features is 2\.0"),
        (lambda: bp.dense(True), r"features is True"),
        (lambda: bp.dense(4).init(jax.random.key(0), ()), r"dense\(4\) got inputs of shape \[N\]"),
        (
            lambda: bp.dense(4).forward(DENSE_PARAMS, jnp.ones((3, 6))),
            r"dense\(4\) got inputs of shape \[3, 6\]; its weight takes \[N, \.\.\., 5\]",
        ),
        (
            lambda: bp.dense(4).forward(DENSE_PARAMS, jnp.ones(5)),
            r"got inputs of shape \[5\]",
        ),
        (
            lambda: bp.dense(4).forward(DENSE_PARAMS, jnp.ones((3, 5), int)),
            r"dense\(4\) got inputs of dtype int64; it takes floating-point",
        ),
        (
            lambda: bp.dense(4).forward(DENSE_PARAMS, jnp.ones((3, 5), jnp.bfloat16)),
            r"got inputs of dtype bfloat16, but its parameters are float",
        ),
        (
            lambda: bp.dense(3).forward(DENSE_PARAMS, jnp.ones((3, 5))),
            r"got a weight of shape \[5, 4\]; it takes \[I, 3\]",
        ),
        (
            lambda: bp.dense(4, use_bias=False).forward(DENSE_PARAMS, jnp.ones((3, 5))),
            r"a dict of weight, bias; it takes a dict of weight\. Are they those of another",
        ),
        (
            lambda: bp.dense(4).forward(((), ()), jnp.ones((3, 5))),
            r"not its own: a tuple of 2; it takes a dict of weight and bias",
        ),
        (
            lambda: bp.dense(4).backward({"w": 1}, jnp.ones((3, 5)), jnp.ones((3, 4))),
            r"not its own: a dict of w",
        ),
        (lambda: bp.relu().forward((), jnp.ones((3, 5), int)), r"relu got inputs of dtype int"),
        (lambda: bp.flatten().forward((), jnp.float32(1)), r"flatten got inputs of shape \[\]"),
        (lambda: bp.relu().forward((), [[1.0]]), r"relu got inputs of type list; it takes an arr"),
        (
            lambda: bp.dense(4).forward(DENSE_PARAMS, [[1.0]]),
            r"dense\(4\) got inputs of type list; it takes an array",
        ),
        (
            lambda: bp.dense(4).backward(DENSE_PARAMS, jnp.ones((3, 5)), jnp.ones((3, 1))),
            r"dense\(4\) got a dy of shape \[3, 1\]; its outputs are \[3, 4\]",
        ),
        (
            lambda: bp.tanh().backward((), jnp.ones((3, 5)), jnp.ones((3, 1))),
            r"tanh got a dy of shape \[3, 1\]; its outputs are \[3, 5\]",
        ),
        *(
            (
                lambda make=make, shape=shape: make().init(jax.random.key(0), shape),
                rf"got {re.escape(repr(shape))} for the shape of one example; it takes a tuple",
            )
            for make in (lambda: bp.dense(4), bp.relu, bp.flatten, lambda: bp.dropout(0.5))
            for shape in (64, (0,), (3, -1), (2.0,), "64")
        ),
        (lambda: bp.leaky_relu(0), r"leaky_relu: negative_slope is 0; .* zero\. Use relu\(\)\?"),
        (lambda: bp.leaky_relu(float("nan")), r"negative_slope is nan"),
        (lambda: bp.elu(0.0), r"elu: alpha is 0\.0; it takes a finite number other than zero"),
        (lambda: bp.dropout(1.0), r"dropout: drop_prob is 1\.0; it takes a number in \[0, 1\)"),
        (lambda: bp.dropout(-0.1), r"drop_prob is -0\.1"),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
