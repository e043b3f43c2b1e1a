"""Convolutions: every geometry against loops and autodiff, PyTorch, and matrices that are alike."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import RULES, SIGNALS, late, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from oracles import assert_close, layer_vjp, seen_by, signal_gradients

import jaxbp as bp
from jaxbp.readings import costs, norms, sums
from jaxbp.readings import inner_products as inner
from jaxbp.signals import conv_products as products
from jaxbp.signals.conv_products import exchanged
from jaxbp.signals.conv_windows import make_windows

N = 2


def convolved(x, weight, geometry):
    """y_t = sum_k x_u W_k by its definition, one product at a time."""
    *_, i, o = weight.shape
    counts = geometry.count(x.shape[1:-1])
    y = np.zeros((len(x), *counts, o))
    for t, k, u in seen_by(geometry, counts, x.shape[1:-1]):
        for out in range(o):
            first = out // (o // geometry.groups) * i
            seen = x[(slice(None), *u, slice(first, first + i))]
            y[(slice(None), *t, out)] += seen @ weight[(*k, slice(None), out)]
    return y


def convolved_transpose(x, weight, geometry, sizes):
    """y_u = sum x_t W_k over the t, k with that u, by its definition."""
    *_, i, o = weight.shape
    y = np.zeros((len(x), *sizes, o))
    for t, k, u in seen_by(geometry, x.shape[1:-1], sizes):
        for out in range(o):
            first = out // (o // geometry.groups) * i
            seen = x[(slice(None), *t, slice(first, first + i))]
            y[(slice(None), *u, out)] += seen @ weight[(*k, slice(None), out)]
    return y


@st.composite
def layers(draw):
    """(make, arguments, sizes, I) of a convolution, some of which do not fit their inputs."""
    rank = draw(st.integers(1, 3))

    def each(most, least=1):
        return tuple(draw(st.integers(least, most)) for _ in range(rank))

    groups = draw(st.integers(1, 3))
    arguments = {
        "features": groups * draw(st.integers(1, 2)),
        "kernel": each(3),
        "strides": draw(st.sampled_from([1, 2, each(3)])),
        "dilation": draw(st.sampled_from([1, each(3)])),
        "padding": draw(
            st.sampled_from(["SAME", "VALID", tuple(zip(each(2, 0), each(3, 0), strict=True))])
        ),
        "groups": groups,
        "use_bias": draw(st.booleans()),
    }
    make = draw(st.sampled_from([bp.conv, bp.conv_transpose]))
    if make is bp.conv_transpose and arguments["padding"] != "SAME":
        arguments["output_padding"] = draw(st.sampled_from([0, 1, each(3, 0)]))
    inputs = groups * draw(st.sampled_from([1, 2, 5]))
    return make, arguments, each(5 if rank < 3 else 4), inputs


@pytest.mark.thorough
@given(layers(), st.integers(0, 99))
@settings(max_examples=24, deadline=None)
def test_every_geometry_agrees_with_loops_and_autodiff(drawn, seed):
    make, arguments, sizes, i = drawn
    layer = make(**arguments)
    keys = jax.random.split(jax.random.key(seed), 4)
    try:
        params, out_shape = layer.init(keys[0], (*sizes, i))
    except bp.LayerError as error:
        assert "spans" in str(error) or "taken off" in str(error)  # noqa: PT017
        with pytest.raises(bp.LayerError, match=r"spans|taken off"):
            layer.forward(dummy_params(arguments, i), jnp.ones((N, *sizes, i)))
        return
    params = jax.tree.map(lambda p: normal(keys[1], p.shape), params)
    x = normal(keys[2], (N, *sizes, i))
    dy = normal(keys[3], (N, *out_shape))

    @jax.jit
    def sweep(params, x, dy):
        y, cache = layer.forward(params, x)
        dx, signals = layer.backward(params, cache, dy)
        grads, along = bp.map_signals(bp.total, signals), along_the_kernel(signals, params)
        return y, dx, signals, grads, along, every_way(signals["weight"])

    y, dx, signals, grads, along, answers = sweep(params, x, dy)
    signal = signals["weight"]
    operands = np.asarray(x), np.asarray(params["weight"]), signal.geometry
    if make is bp.conv:
        want = convolved(*operands)
    else:
        want = convolved_transpose(*operands, out_shape[:-1])
    assert_close(y, jnp.asarray(want) + params.get("bias", 0.0))
    assert_close((dx, grads), layer_vjp(layer, params, x, dy))
    each = signal_gradients(signal)
    rows = each.reshape(N, -1)
    assert_close(along, rows @ params["weight"].ravel())
    for got_each, sq_norms, gram, other_gram in answers:
        assert_close(got_each, each)
        assert_close(sq_norms, jnp.sum(rows**2, axis=1))
        assert_close((gram, other_gram), (rows @ rows.T, rows @ rows[::-1].T))


def along_the_kernel(signals, params):
    return bp.directional_derivatives(signals["weight"], params["weight"])


def every_way(signal):
    """What is read of a signal in more than one way, in each of them."""
    answers = []
    ways = [(True, False, False), (False, False, False), (False, True, False)]
    if signal.geometry.groups == 1:
        ways.append((False, False, True))
    for by_place, by_gram, one_by_one in ways:
        with pytest.MonkeyPatch.context() as patch:
            for module in (sums, norms):
                patch.setattr(module, "one_by_one_is_less_work", lambda _, yes=one_by_one: yes)
            for module in (sums, norms, inner):
                patch.setattr(module, "by_place_is_less_work", lambda *_, yes=by_place: yes)
            for module in (norms, inner):
                patch.setattr(module, "gram_is_less_work", lambda *_, yes=by_gram, **__: yes)
            other = jax.tree.map(lambda a: a[::-1], signal)
            grams = bp.gram(signal), bp.gram(signal, other)
            answers.append((bp.per_example(signal), bp.sq_norms(signal), *grams))
    return answers


def test_every_way_to_convolve_is_the_same(key, monkeypatch):
    """Equal, but not all to the bit: few products, a small image by places, and a convolution."""
    geometry = make_windows("conv", "conv", (3, 3), (1, 2), "SAME").on((2, 5))
    x, weight = normal(key, (N, 2, 5, 2)), normal(key, (3, 3, 2, 4))
    answers = []
    for few, small in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(products, "_has_few_products", lambda *_, yes=few: yes)
        monkeypatch.setattr(products, "_is_small", lambda *_, yes=small: yes)

        @jax.jit
        def there_and_back(x, weight):
            y = products.convolve(x, weight, geometry)
            return y, products.convolve_transpose(y, weight, geometry, (2, 5))

        answers.append(there_and_back(x, weight))
    for answer in answers[1:]:
        assert_close(answer, answers[0])
    assert any(not np.array_equal(answer[0], answers[0][0]) for answer in answers)


@pytest.mark.parametrize(("size", "k", "s", "d"), [(6, 3, 2, 1), (7, 3, 2, 2), (5, 2, 1, 1)])
def test_same_is_that_of_jax(size, k, s, d):
    """Where what is missing is odd, there is more of it behind."""
    geometry = make_windows("conv", "conv", (k,), s, "SAME", d).on((size,))
    (axis,) = geometry.axes
    assert list(geometry.padding) == lax.padtype_to_pads((size,), (axis.span,), (s,), "SAME")


def dummy_params(arguments, i):
    o = arguments["features"]
    params = {"weight": jnp.ones((*arguments["kernel"], i // arguments["groups"], o))}
    return params | ({"bias": jnp.ones(o)} if arguments["use_bias"] else {})


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({"kernel": (3, 2), "strides": 2}, (5, 6)),
        ({"kernel": (3,), "strides": 3, "padding": ((2, 1),), "dilation": 2}, (9,)),
        ({"kernel": (2, 2), "padding": "VALID", "groups": 2}, (4, 3)),
    ],
)
def test_a_transposed_convolution_is_the_transpose_of_the_convolution(arguments, sizes, key):
    """<y, conv(x)> = <conv_transpose(y), x>, of the same arguments, if inputs and outputs are
    exchanged in the kernel."""
    there = bp.conv(6, use_bias=False, **arguments)
    back = bp.conv_transpose(4, use_bias=False, **arguments)
    params, out_shape = there.init(key, (*sizes, 4))
    weight = exchanged(params["weight"], arguments.get("groups", 1))
    _, back_shape = back.init(key, out_shape)
    x, y = normal(key, (2, *back_shape)), normal(key, (2, *out_shape))
    assert there.init(key, back_shape)[1] == out_shape
    products = (
        jnp.vdot(y, there.forward(params, x)[0]),
        jnp.vdot(back.forward({"weight": weight}, y)[0], x),
    )
    assert_close(*products)


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({"kernel": (2,), "strides": 3, "padding": "VALID"}, (11,)),
        ({"kernel": (2,), "strides": 3, "output_padding": 2, "padding": ((1, 0),)}, (12,)),
        ({"kernel": (3,), "strides": 1, "output_padding": 2, "padding": ((1, 1),)}, (6,)),
        ({"kernel": (2,), "strides": 3}, (12,)),
    ],
    ids=["strides above the kernel", "longer", "longer than the strides", "same"],
)
def test_transposed_outputs_are_those_of_the_definition(arguments, sizes, key):
    """Positions that no window sees are the bias, and its gradient has their deltas."""
    layer = bp.conv_transpose(2, bias_init=jax.nn.initializers.ones, **arguments)
    params, out_shape = layer.init(key, (4, 3))
    assert out_shape == (*sizes, 2)
    x, dy = normal(key, (N, 4, 3)), normal(key, (N, *out_shape))
    y, cache = layer.forward(params, x)
    dx, signals = layer.backward(params, cache, dy)
    operands = np.asarray(x), np.asarray(params["weight"]), signals["weight"].geometry, sizes
    assert_close(y, jnp.asarray(convolved_transpose(*operands)) + 1)
    grads = bp.map_signals(bp.total, signals)
    assert_close((dx, grads), layer_vjp(layer, params, x, dy))


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("arguments", "theirs"),
    [
        ({"kernel": (3, 3)}, {"padding": 1}),
        ({"kernel": (5,), "strides": 2, "padding": ((2, 2),)}, {"stride": 2, "padding": 2}),
        (
            {"kernel": (2, 3), "padding": ((0, 0), (4, 4)), "dilation": (1, 2), "groups": 2},
            {"padding": (0, 4), "dilation": (1, 2), "groups": 2},
        ),
        ({"kernel": (2, 2, 3), "padding": "VALID", "strides": (1, 2, 1)}, {"stride": (1, 2, 1)}),
        (
            {"kernel": (3,), "strides": 3, "padding": ((1, 1),), "output_padding": 2},
            {"stride": 3, "padding": 1, "output_padding": 2},
        ),
    ],
    ids=["same", "strided", "grouped", "three axes", "longer"],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_outputs_and_gradients_are_those_of_pytorch(arguments, theirs, transposed, key):
    torch = pytest.importorskip("torch")
    if "output_padding" in arguments and not transposed:
        pytest.skip("of transposed convolutions alone")
    rank = len(arguments["kernel"])
    if transposed and arguments.get("padding", "SAME") == "SAME":
        arguments = arguments | {"padding": ((1, 1),) * rank}
    layer = (bp.conv_transpose if transposed else bp.conv)(6, **arguments)
    module = getattr(torch.nn, f"Conv{'Transpose' * transposed}{rank}d")
    peer = module(4, 6, arguments["kernel"], **theirs)
    params, out_shape = layer.init(key, (*(7, 6, 5)[:rank], 4))
    groups = arguments.get("groups", 1)
    # Outputs, inputs, kernel; transposed: inputs, outputs of a group, kernel.
    own = exchanged(params["weight"], groups) if transposed else params["weight"]
    places = (rank + 1, rank, *range(rank))
    peer.weight = torch.nn.Parameter(torch.tensor(np.array(own).transpose(places)))
    peer.bias = torch.nn.Parameter(torch.tensor(np.array(params["bias"])))
    x = normal(key, (3, *(7, 6, 5)[:rank], 4))
    dy = normal(key, (3, *out_shape))
    y, cache = layer.forward(params, x)
    dx, grads = layer.backward(params, cache, dy, read=bp.total)
    grad = exchanged(grads["weight"], groups) if transposed else grads["weight"]

    first, last = (0, rank + 1, *range(1, rank + 1)), (0, *range(2, rank + 2), 1)
    their_x = torch.tensor(np.array(x).transpose(first), requires_grad=True)
    their_y = peer(their_x)
    their_y.backward(torch.tensor(np.array(dy).transpose(first)))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(y, their_y.detach().numpy().transpose(last))
    close(dx, their_x.grad.numpy().transpose(last))
    close(np.array(grad).transpose(places), peer.weight.grad)
    close(grads["bias"], peer.bias.grad)


READ = (
    bp.total, bp.mean, bp.per_example, bp.sq_norms, bp.second_moment, bp.variance, bp.diagonal,
    bp.per_example_diagonal, bp.gram, bp.kronecker,
    functools.partial(bp.kronecker, bias="apart", shared="reduce"),
)  # fmt: skip


@pytest.mark.parametrize("make", [bp.conv, bp.conv_transpose])
def test_a_kernel_of_one_place_is_a_matrix_at_every_position(make, key):
    is_a_matrix(make(3, (1, 1), use_bias=False), (4, 2, 5), (4, 2, 5), key)


def test_a_kernel_as_large_as_the_image_is_a_matrix_of_all_of_it(key):
    is_a_matrix(bp.conv(3, (4, 2), padding="VALID", use_bias=False), (4, 2, 5), (40,), key)


def is_a_matrix(layer, shape, matrix_shape, key):
    """Outputs, dx and all that is read are those of a matrix that is applied to the same."""
    matrix = bp.dense(3, use_bias=False)
    params, out_shape = layer.init(key, shape)
    weights = {"weight": params["weight"].reshape(-1, 3)}
    x, dy = normal(key, (3, *shape)), normal(key, (3, *out_shape))

    @functools.partial(jax.jit, static_argnums=0)
    def everything(layer, params, x, dy):
        y, cache = layer.forward(params, x)
        dx, signals = layer.backward(params, cache, dy.reshape(y.shape))
        return y, dx, [read(signals["weight"]) for read in READ]

    got = everything(layer, params, x, dy)
    want = everything(matrix, weights, x.reshape(3, *matrix_shape), dy)
    assert_close(jax.tree.map(lambda g, w: g.reshape(w.shape), got, want), want)


KINDS = [name for name in SIGNALS if name.startswith("Conv")]


@pytest.mark.parametrize("name", KINDS)
def test_every_way_is_taken_where_it_is_asked_for(name):
    """Equal, but not to the bit."""
    ways = jax.jit(every_way)(SIGNALS[name](np.random.default_rng(3), 7))
    norms = [np.asarray(sq_norms) for _, sq_norms, *_ in ways]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(norms, 2))


@pytest.mark.parametrize(
    ("kernel", "size", "i", "o", "groups", "by_place"),
    [
        ((3, 3), 32, 16, 32, 1, True),
        ((3, 3), 4, 64, 64, 1, False),  # few positions: Gram matrices
        ((3, 3), 28, 1, 16, 1, False),  # one input: patches
        ((3, 3), 16, 8, 8, 8, True),
        ((1, 1), 2, 2, 2, 1, True),
        ((5,), 128, 32, 32, 1, True),
    ],
)
def test_the_way_is_chosen_by_the_shapes(kernel, size, i, o, groups, by_place):
    sizes = (size,) * len(kernel)
    layer = bp.conv(o, kernel, groups=groups, use_bias=False)
    signal = signal_shapes(layer, (N, *sizes, i))
    assert costs.by_place_is_less_work(signal) == by_place


@pytest.mark.parametrize("make", [bp.conv, bp.conv_transpose])
@pytest.mark.parametrize("padding", [late("SAME"), late("VALID"), ((0, 2), (3, 1))])
def test_tiles_and_blocks_compute_what_convolutions_do(make, padding):
    """Images of even and odd sizes, in blocks of two; the plain products are tested above."""
    layer = make(4, (3, 3), padding=padding)
    rng = np.random.default_rng(5)
    params, _ = layer.init(jax.random.key(0), (5, 5, 5))
    x = [jnp.asarray(rng.normal(size=(4, *sizes, 5))) for sizes in ((6, 7), (3, 4))]

    def sweep(params, x):
        y, cache = layer.forward(params, x)
        return y, *layer.backward(params, cache, jnp.sin(y), read=bp.total)

    def suits(_, weight, geometry):
        return geometry.kernel == (3, 3) and weight.ndim == 4

    def both_ways(params, xs):
        plain = [sweep(params, x) for x in xs]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products, "_is_small", lambda *_: False)
            patch.setattr(products, "_suits_tiles", suits)
            patch.setattr(products, "TILES", 1500)
            patch.setattr(products, "POSITIONS", 50)
            patch.setattr(products, "LARGE", 0)
            return plain, [sweep(params, x) for x in xs]

    plain, in_blocks = jax.jit(both_ways)(params, x)
    assert_close(in_blocks, plain)
    assert not np.array_equal(plain[0][0], in_blocks[0][0])


GEOMETRIES = [
    bp.Geometry((3,), (1,), ((1, 1),), (2,)),
    bp.Geometry((2, 3), (1, 1), ((0, 2), (1, 0)), (1, 1)),
    bp.Geometry((2, 3), (1, 2), ((-1, 3), (2, 1)), (3, 2)),
    bp.Geometry((3, 2), (2, 1), ((1, 0), (2, -1)), (2, 3)),
    bp.Geometry((2, 2, 2), (1, 1, 2), ((1, 1), (0, 1), (0, 0)), (2, 1, 1)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_gradient_of_a_block_is_that_of_a_convolution(geometry):
    """With the windows of some axes further apart than those of others, and with positions cut."""
    rng, rank = np.random.default_rng(6), len(geometry.kernel)
    x = rng.normal(size=(3, *(7, 9, 5)[:rank], 4))
    y = rng.normal(size=(3, *geometry.count(x.shape[1:-1]), 2))

    @jax.jit
    def both(x, y):
        def sum_of_products(weight):
            positions = "HWD"[:rank]
            images = f"N{positions}C"
            outputs = lax.conv_general_dilated(
                *(x, weight, geometry.strides, geometry.padding),
                rhs_dilation=geometry.dilation,
                dimension_numbers=(images, f"{positions}IO", images),
            )
            return jnp.sum(outputs * y)

        want = jax.grad(sum_of_products)(jnp.zeros((*geometry.kernel, 4, 2)))
        return products.block_gradient(x, y, geometry), want

    assert_close(*both(x, y))


def test_a_cpu_computes_convolutions_of_many_channels_in_tiles():
    def kind(features, i, **options):
        layer = bp.conv(features, (3, 3), **options)
        shapes = jax.eval_shape(lambda key: layer.init(key, (16, 16, i))[0], jax.random.key(0))
        x = jax.ShapeDtypeStruct((N, 16, 16, i), float)
        return str(jax.make_jaxpr(lambda p, x: layer.forward(p, x)[0])(shapes, x)).count("scan[")

    assert [kind(64, 32), kind(16, 64), kind(64, 32, strides=2), kind(64, 64, groups=2)] == [
        *(1, 0, 0, 2)
    ]


def test_the_windows_of_a_transposed_convolution_are_those_on_its_outputs():
    """There are as many as inputs, and so few that Gram matrices are less work."""
    layer = bp.conv_transpose(64, (3, 3), strides=4, use_bias=False)
    assert not costs.by_place_is_less_work(signal_shapes(layer, (N, 4, 4, 64)))


def signal_shapes(layer, shape):
    """The signal of a convolution's kernel, without computing it."""

    def signal(key, x):
        params, _ = layer.init(key, shape[1:])
        y, cache = layer.forward(params, x)
        return layer.backward(params, cache, y)[1]["weight"]

    return jax.eval_shape(signal, jax.random.key(0), jax.ShapeDtypeStruct(shape, float))


@pytest.mark.parametrize("name", KINDS)
def test_several_images_of_an_example_are_summed(name):
    rng = np.random.default_rng(3)
    one, other = (SIGNALS[name](rng, 2, 3) for _ in range(2))
    both = bp.Conv(
        *(jnp.stack([a, b], axis=1) for a, b in zip(one[:2], other[:2], strict=True)), one.geometry
    )
    read = jax.jit(bp.per_example)
    assert_close(read(both), read(one) + read(other))


def test_the_norm_of_a_kernel_that_is_used_twice_is_that_of_the_sum(key):
    layer = bp.conv(2, (3, 3), use_bias=False)
    net = bp.repeat(layer, 2)
    params, _ = net.init(key, (4, 3, 2))
    x, dy = normal(key, (2, 3, 4, 3, 2))
    middle, first = layer.forward(params, x)
    _, second = layer.forward(params, middle)
    d_middle, later = layer.backward(params, second, dy, read=bp.per_example)
    _, sooner = layer.backward(params, first, d_middle, read=bp.per_example)
    want = jnp.sum((later["weight"] + sooner["weight"]) ** 2, axis=range(1, 5))
    apart = sum(jnp.sum(g["weight"] ** 2, axis=range(1, 5)) for g in (later, sooner))
    _, norms = net.backward(params, net.forward(params, x)[1], dy, read=bp.sq_norms)
    assert_close(norms["weight"], want)
    assert float(jnp.max(jnp.abs(apart / want - 1))) > 0.1


def test_a_signal_holds_the_images_and_no_patches(key):
    layer = bp.conv(4, (3, 3))
    params, _ = layer.init(key, (8, 8, 5))
    x = normal(key, (3, 8, 8, 5))
    y, cache = layer.forward(params, x)
    _, signals = layer.backward(params, cache, y)
    assert signals["weight"].inputs is x
    assert signals["weight"].deltas is y
    assert len(jax.tree.leaves(signals["weight"])) == 2  # a geometry is no array


def test_norms_form_neither_patches_nor_gradients_of_all_places():
    """One example at a time on a CPU: its patches, in two layouts, and its gradient."""
    n, size, i, o = 8, 16, 32, 32
    signal = signal_shapes(bp.conv(o, (5, 5), use_bias=False), (n, size, size, i))
    memory = jax.jit(bp.sq_norms).lower(signal).compile().memory_analysis()
    patches, gradients = 8 * 25 * n * size**2 * i, 8 * 25 * n * i * o
    assert memory.temp_size_in_bytes < 2.1 / n * (patches + gradients)


def test_depthwise_sees_one_input_for_each_output(key):
    layer = bp.conv(3, (3,), groups=3)
    params, _ = layer.init(key, (5, 3))
    assert params["weight"].shape == (3, 1, 3)
    x = normal(key, (1, 5, 3))
    moved = layer.forward(params, x.at[..., 1].add(1))[0] != layer.forward(params, x)[0]
    assert np.asarray(moved).any(axis=(0, 1)).tolist() == [False, True, False]


def test_feedback_carries_the_error_in_place_of_the_kernel(key):
    """dx is linear in what carries it: that of a convolution by B is that of a kernel B."""
    for make in (bp.conv, bp.conv_transpose):
        layer = make(4, (3, 2), strides=(2, 1), groups=2)
        params, out_shape = layer.init(key, (5, 4, 2))
        feedback, _ = layer.init(jax.random.fold_in(key, 1), (5, 4, 2))
        x, dy = normal(key, (N, 5, 4, 2)), normal(key, (N, *out_shape))
        _, cache = layer.forward(params, x)
        dx, grads = layer.backward(feedback, cache, dy, read=bp.total)
        assert_close(dx, layer_vjp(layer, feedback, x, dy)[0])
        assert_close(grads, layer_vjp(layer, params, x, dy)[1])


@pytest.fixture
def convnet():
    """The blocks of a network for images."""
    return [
        bp.chain(bp.conv(4, (3, 3)), bp.tanh()),
        bp.chain(bp.conv(4, (2, 2), groups=2), bp.tanh(), bp.flatten()),
        bp.dense(3),
    ]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "name",
    [
        late("random_feedback"),
        "sign_symmetric, batchwise",
        late("kolen_pollack"),
        late("weight_mirror"),
        late("direct_feedback"),
    ],
)
def test_a_step_under_every_rule(name, convnet, key):
    """The last layer learns exactly, the first does not, and the state is one of kernels."""
    net, rule, optimizer = bp.chain(*convnet), RULES[name](*convnet), optax.sgd(1.0)
    state = bp.init_state(net, optimizer, key, (4, 3, 2), rule=rule)
    x, labels = normal(key, (N, 4, 3, 2)), jnp.arange(N)
    _, grads = jax.jit(bp.value_and_grad(net, bp.softmax_cross_entropy))(state.params, x, labels)
    exact = jax.tree.map(jnp.subtract, state.params, grads)
    step = bp.make_step(net, bp.softmax_cross_entropy, optimizer, rule=rule)
    after, _ = step(state, x, labels)  # in the memory of the state
    assert_close(after.params[-1], exact[-1])
    first, exact_first = after.params[0][0]["weight"], exact[0][0]["weight"]
    assert not np.allclose(first, exact_first)
    assert bool(jnp.all(jnp.isfinite(first)))
    if name == "direct_feedback":
        assert [matrix.shape for matrix in after.rule_state.matrices] == [(3, 48), (3, 48)]


def test_the_angles_of_kernels_are_measured(convnet, key):
    net, rule = bp.chain(*convnet), bp.sign_symmetric()
    params, _ = net.init(key, (4, 3, 2))
    state = rule.make(jax.random.fold_in(key, 1), net, (4, 3, 2))
    measure = jax.jit(bp.alignment(net, bp.softmax_cross_entropy, rule=rule))
    x, labels = normal(key, (N, 4, 3, 2)), jnp.arange(N)
    (first, _), (second, *_), last = measure(params, x, labels, rule_state=state)
    assert float(last["weight"].gradient) == 0
    assert all(0 < float(layer["weight"].weight) < 90 for layer in (first, second))
    assert 0 < float(first["weight"].gradient) < 90


def test_feedback_is_of_the_scale_of_the_kernel(key):
    """Its draw is the initialiser's: of variance 1 / (K I / G), what an output is summed of."""
    for make in (bp.conv, bp.conv_transpose):
        layer = make(256, (3, 3), groups=4)
        state = bp.random_feedback().make(key, layer, (8, 8, 64))
        assert state["weight"].shape == (3, 3, 16, 256)
        assert math.isclose(float(jnp.std(state["weight"])), 1 / 12, rel_tol=0.02)


def test_mirrors_come_to_kernels(key):
    rule, layer = bp.weight_mirror(1.0, examples=4000), bp.conv(6, (2, 2), groups=2)
    params, _ = layer.init(key, (4, 4, 4))
    state = rule.make(key, layer, (4, 4, 4))
    state = jax.jit(functools.partial(rule.update, move=None))(state, params, key=key)
    assert float(jnp.max(jnp.abs(state.feedback["weight"] - params["weight"]))) < 0.1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_layers_keep_their_dtype(dtype, key):
    for make in (bp.conv, bp.conv_transpose):
        layer = make(4, (3, 3), strides=2, dtype=dtype)
        params, out_shape = layer.init(key, (5, 6, 2))

        def both(params, x, layer=layer):
            y, cache = layer.forward(params, x)
            return y, layer.backward(params, cache, y, read=bp.total)

        y, (dx, grads) = jax.eval_shape(both, params, jax.ShapeDtypeStruct((2, 5, 6, 2), dtype))
        assert y.shape == (2, *out_shape)
        assert {a.dtype for a in jax.tree.leaves((y, dx, grads, params))} == {jnp.dtype(dtype)}


def test_16_bits_are_cast_and_accumulated_in_32(key):
    layer = bp.cast(bp.conv(4, (3, 3), dtype=jnp.float32))
    params, _ = layer.init(key, (5, 4, 2))

    def both(params, x):
        y, cache = layer.forward(params, x)
        return y, *layer.backward(params, cache, y, read=bp.total)

    got = jax.eval_shape(both, params, jax.ShapeDtypeStruct((2, 5, 4, 2), jnp.float32))
    assert {a.dtype for a in jax.tree.leaves(got)} == {jnp.dtype("float32")}


def test_a_mask_may_come_with_the_images(key):
    """Pixels that are not there, by a layer of one's own around a convolution."""

    def make(mask):
        layer = bp.conv(2, (3,), use_bias=False)

        def forward(params, x, *, key=None):
            return layer.forward(params, x if mask is None else x * mask[..., None], key=key)

        return layer._replace(forward=forward)

    net = bp.masked(make)
    params, _ = net.init(key, ((5, 2), (5,)))
    x, mask = normal(key, (N, 5, 2)), jnp.arange(5) < jnp.array([[3], [5]])
    mask = mask.astype(x.dtype)
    y, cache = net.forward(params, (x, mask))
    _, norms = net.backward(params, cache, y, read=bp.sq_norms)
    plain = bp.conv(2, (3,), use_bias=False)
    want_y, cache = plain.forward(params, x * mask[..., None])
    _, want = plain.backward(params, cache, want_y, read=bp.sq_norms)
    assert_close((y, norms), (want_y, want))


def test_initial_weights_keep_the_size_of_what_they_see(key):
    layer = bp.conv(64, (3, 3), padding="VALID")
    params, _ = layer.init(key, (12, 12, 32))
    y, _ = layer.forward(params, normal(key, (2, 12, 12, 32)))
    assert math.isclose(float(jnp.std(y)), 1, rel_tol=0.1)


@pytest.mark.parametrize(
    ("transposed", "padding", "size", "want"),
    [
        (False, "SAME", 7, 4), (False, "VALID", 7, 2), (False, ((1, 1),), 7, 3),
        (True, "SAME", 4, 8), (True, "VALID", 2, 7), (True, ((1, 1),), 3, 7),
    ],
)  # fmt: skip
def test_the_documented_sizes(transposed, padding, size, want, key):
    """K = 3 with d = 2 spans 5, and s = 2."""
    make = bp.conv_transpose if transposed else bp.conv
    layer = make(1, (3,), strides=2, dilation=2, padding=padding)
    assert layer.init(key, (size, 1))[1] == (want, 1)


def test_gradients_of_examples_by_loops_have_the_groups_in_order():
    """The oracle itself, on a case that is plain to see: each output sees its own input."""
    x, d = np.array([[[2.0, 3.0]]]), np.array([[[5.0, 7.0]]])
    geometry = bp.Geometry((1,), (1,), ((0, 0),), (1,), groups=2)
    signal = bp.Conv(jnp.asarray(x), jnp.asarray(d), geometry)
    assert signal_gradients(signal).tolist() == [[[[10.0, 21.0]]]]


IMAGE = (5, 4, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key: bp.conv(0, (3, 3)), "conv: features is 0; it takes a positive integer"),
        (lambda key: bp.conv(4, 3), r"conv: kernel is 3; it takes a tuple of one to three"),
        (lambda key: bp.conv(4, ()), r"conv: kernel is \(\); it takes a tuple"),
        (lambda key: bp.conv(4, (3, 0)), r"conv: kernel is \(3, 0\); it takes a tuple"),
        (lambda key: bp.conv(4, (1,) * 4), "conv: kernel is .*; it takes a tuple of one to three"),
        (lambda key: bp.conv(4, (3, 3), strides=(2,)), r"conv: strides is \(2,\); .* tuple of 2"),
        (lambda key: bp.conv(4, (3, 3), strides=0), "conv: strides is 0; it takes a positive"),
        (lambda key: bp.conv(4, (3, 3), dilation=1.5), r"conv: dilation is 1\.5; it takes a"),
        (
            lambda key: bp.conv_transpose(4, (3,), padding="same"),
            r"conv_transpose: padding is 'same'; it takes 'SAME', 'VALID', or a pair",
        ),
        (lambda key: bp.conv(4, (3, 3), padding=((1, 1),)), "a pair .* for each of 2 axes"),
        (lambda key: bp.conv(4, (3,), padding=((1, -1),)), r"padding is \(\(1, -1\),\)"),
        (lambda key: bp.conv(4, (3,), padding=1), "padding is 1; it takes"),
        (
            lambda key: bp.conv_transpose(4, (3,), padding="VALID", output_padding=-1),
            "conv_transpose: output_padding is -1; it takes an integer, at least 0, or a tuple of",
        ),
        (
            lambda key: bp.conv_transpose(4, (3,), padding="VALID", output_padding=(1, 1)),
            r"output_padding is \(1, 1\); it takes an integer, at least 0, or a tuple of 1",
        ),
        (
            lambda key: bp.conv_transpose(4, (3,), strides=2, output_padding=1),
            "output_padding is 1; with padding='SAME' each axis has its stride times as many",
        ),
        (lambda key: bp.conv(4, (3,), groups=0), "conv: groups is 0; it takes a positive integer"),
        (lambda key: bp.conv(4, (3,), groups=3), "conv: features is 4, not a multiple of 3 groups"),
        (
            lambda key: bp.conv(4, (3, 3)).init(key, (5, 2)),
            r"conv\(4, \(3, 3\)\) got inputs of shape \[N, 5, 2\]; its kernel of 2 axes takes "
            r"\[N, H, W, I\]",
        ),
        (
            lambda key: bp.conv(4, (3, 3), groups=4).init(key, IMAGE),
            "got inputs of 2 channels, not a multiple of 4 groups",
        ),
        (
            lambda key: bp.conv(4, (3, 5), padding="VALID").init(key, IMAGE),
            r"got inputs of \[5, 4\] positions; its kernel spans \[3, 5\], more than the 4 of axis "
            r"2\. Pad by 'SAME'\?",
        ),
        (
            lambda key: bp.conv(4, (3, 3), dilation=4, padding=((1, 1), (1, 1))).init(key, IMAGE),
            r"spans \[9, 9\], more than the 7 of axis 1 with their padding",
        ),
        (
            lambda key: bp.conv_transpose(4, (3,), padding=((2, 2),)).init(key, (2, 1)),
            r"got inputs of \[2\] positions; .* would be outputs of \[0\]",
        ),
        (
            lambda key: bp.conv(4, (3, 3)).forward(
                bp.conv(4, (3, 2)).init(key, IMAGE)[0], jnp.ones((1, *IMAGE))
            ),
            r"got a weight of shape \[3, 2, 2, 4\]; it takes \[3, 3, I, 4\]",
        ),
        (
            lambda key: bp.conv(4, (3, 3)).forward(
                bp.conv(4, (3, 3)).init(key, (5, 4, 3))[0], jnp.ones((1, *IMAGE))
            ),
            r"got inputs of shape \[1, 5, 4, 2\]; its weight takes 3 channels",
        ),
        (
            lambda key: bp.conv(4, (3, 3)).forward(
                bp.conv(4, (3, 3)).init(key, IMAGE)[0], jnp.ones((1, 1, *IMAGE))
            ),
            r"got inputs of shape \[N, 1, 5, 4, 2\]; its kernel of 2 axes",
        ),
        (
            lambda key: bp.conv(4, (3, 3)).backward(
                bp.conv(4, (3, 3)).init(key, IMAGE)[0], jnp.ones((1, *IMAGE)), jnp.ones((1, 5, 4))
            ),
            r"got a dy of shape \[1, 5, 4\]; its outputs are \[1, 5, 4, 4\]",
        ),
        (
            lambda key: bp.conv(4, (3, 3)).forward({"weight": 1}, jnp.ones((1, *IMAGE))),
            "it takes a dict of weight and bias",
        ),
    ],
)
def test_what_is_wrong_is_said(call, message, key):
    with pytest.raises(ValueError, match=message):
        call(key)
