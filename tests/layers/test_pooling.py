"""Pooling: by its definition, JAX's and PyTorch's, ties, padding, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from oracles import assert_close, layer_jvp, layer_vjp

import jaxbp as bp
from jaxbp.layers import pooling


def reference(how, window, strides, padding):
    """JAX's own windows, as a layer that autodiff can be asked about."""
    dims, steps = (1, *window, 1), (1, *strides, 1)

    def pad(x):
        if isinstance(padding, str):
            return padding
        return ((0, 0), *padding, (0, 0))

    def forward(params, x, *, key=None):
        if how == "max":
            return lax.reduce_window(x, -jnp.inf, lax.max, dims, steps, pad(x)), None
        sums = lax.reduce_window(x, 0.0, lax.add, dims, steps, pad(x))
        counts = lax.reduce_window(jnp.ones_like(x), 0.0, lax.add, dims, steps, pad(x))
        return sums / counts, None

    return bp.Layer(how, lambda key, shape: ((), None), forward, lambda *_, **__: (None, ()))


@st.composite
def pools(draw):
    rank = draw(st.integers(1, 3))
    window = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    apart = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    strides = draw(st.sampled_from([window, apart]))
    pairs = tuple(
        (draw(st.integers(0, size - 1)), draw(st.integers(0, size - 1))) for size in window
    )
    padding = draw(st.sampled_from(["SAME", "VALID", pairs]))
    sizes = tuple(draw(st.integers(size, 6)) for size in window)
    return window, strides, padding, sizes


@given(st.sampled_from(["max", "avg"]), pools(), st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_every_geometry_agrees_with_that_of_jax(how, drawn, seed):
    window, strides, padding, sizes = drawn
    make = {"max": bp.max_pool, "avg": bp.avg_pool}[how]
    layer = make(window, strides=strides, padding=padding)
    peer = reference(how, window, strides, padding)
    x = normal(jax.random.key(seed), (2, *sizes, 3))
    _, out_shape = layer.init(None, x.shape[1:])
    dy = normal(jax.random.key(seed + 1), (2, *out_shape))

    @jax.jit
    def both(x, dy):
        y, cache = layer.forward((), x)
        return y, peer.forward((), x)[0], layer.backward((), cache, dy)[0]

    y, want, dx = both(x, dy)
    assert_close(y, want)
    assert_close(dx, layer_vjp(peer, (), x, dy)[0])


GEOMETRY = {"strides": (1, 2), "padding": ((1, 1), (2, 0)), "dilation": (2, 1)}
OPTIONS = {  # windows of 2 x 3, with what each makes of the inputs that it sees
    "max": (bp.max_pool((2, 3), **GEOMETRY), np.max),
    "mean": (bp.avg_pool((2, 3), **GEOMETRY), np.mean),
    "by window": (bp.avg_pool((2, 3), divisor="window", **GEOMETRY), lambda x: np.sum(x) / 6),
    "by number": (bp.avg_pool((2, 3), divisor=2.5, **GEOMETRY), lambda x: np.sum(x) / 2.5),
    "p = 1": (bp.lp_pool((2, 3), 1, **GEOMETRY), lambda x: np.sum(np.abs(x))),
    "p = 2": (bp.lp_pool((2, 3), 2.0, **GEOMETRY), lambda x: np.sqrt(np.sum(x**2))),
    "p = 3.5": (bp.lp_pool((2, 3), 3.5, **GEOMETRY), lambda x: np.sum(np.abs(x) ** 3.5) ** (2 / 7)),
}


def test_options_are_those_of_a_loop_over_windows(key):
    x = normal(key, (2, 4, 5, 2))
    want = {name: np.zeros((2, 4, 3, 2)) for name in OPTIONS}
    for n, i, j, o in np.ndindex(2, 4, 3, 2):
        places = [(i + 2 * a - 1, 2 * j + b - 2) for a in range(2) for b in range(3)]
        seen = np.array([x[n, a, b, o] for a, b in places if 0 <= a < 4 and 0 <= b < 5])
        for name, (_, of) in OPTIONS.items():
            want[name][n, i, j, o] = of(seen)
    dy = normal(key, (2, 4, 3, 2))

    @jax.jit
    def sweeps(x):
        return {
            name: (y, layer.backward((), cache, dy), layer_vjp(layer, (), x, dy))
            for name, (layer, _) in OPTIONS.items()
            for y, cache in [layer.forward((), x)]
        }

    for name, (y, got, by_autodiff) in sweeps(x).items():
        assert_close(y, jnp.asarray(want[name]))
        assert_close(got, by_autodiff)


X = [1.0, 4.0, 2.0, -3.0, 0.0, 5.0]
OF_PYTORCH = [  # each with its y of X, and its dx by dy = 1, 2, ..., rounded
    # max_pool1d(3, 2, ceil_mode=True), avg_pool1d likewise
    (bp.max_pool((3,), strides=2, padding=((0, 1),)), [4, 2, 5], [0, 1, 2, 0, 0, 3]),
    (
        bp.avg_pool((3,), strides=2, padding=((0, 1),)),
        [2.333333, -0.333333, 2.5], [0.333333, 0.333333, 1, 0.666667, 2.166667, 1.5],
    ),
    # avg_pool1d(3, 2, 1), max_pool1d(2, 1, 1, dilation=3), lp_pool1d(2, 3, 1)
    (
        bp.avg_pool((3,), strides=2, padding=((1, 1),), divisor="window"),
        [1.666667, 1, 0.666667], [0.333333, 1, 0.666667, 1.666667, 1, 1],
    ),
    (
        bp.max_pool((2,), strides=1, padding=((1, 1),), dilation=3),
        [2, 1, 4, 5, -3], [2, 3, 1, 5, 0, 4],
    ),
    (
        bp.lp_pool((3,), 2, strides=1),
        [4.582576, 5.385165, 3.605551, 5.830952],
        [0.218218, 2.358434, 2.843318, -5.668306, 0, 3.429972],
    ),
    # max_pool1d(2, 2, dilation=2), and the means of the same windows
    (bp.max_pool((2,), dilation=2), [2, 2], [0, 0, 3, 0, 0, 0]),
    (bp.avg_pool((2,), dilation=2), [1.5, 1], [0.5, 0, 1.5, 0, 1, 0]),
    # adaptive_avg_pool1d(4), adaptive_max_pool1d(4)
    (bp.adaptive_pool((4,)), [2.5, 3, -1.5, 2.5], [0.5, 1.5, 1, 1.5, 3.5, 2]),
    (bp.adaptive_pool((4,), "max"), [4, 4, 0, 5], [0, 3, 0, 0, 3, 4]),
    # interpolate to 4 by bicubic (of images [6, 1]) and linear, without and with align_corners, and
    # by nearest-exact
    (
        bp.resize((4,), method="cubic"),
        [1.75, 3.0859375, -3.0234375, 3.97265625],
        [0.703125, 0.78515625, 1.40625, 2.28515625, 1.83203125, 2.98828125],
    ),
    (
        bp.resize((4,), method="cubic", align_corners=True),
        [1, 3.351852, -2.888889, 5], [0.888889, 0.740741, 1.259259, 2.166667, 1.111111, 3.833333],
    ),
    (bp.resize((4,)), [1.75, 2.5, -2.25, 3.75], [0.75, 0.75, 1.5, 2.25, 1.75, 3]),
    (
        bp.resize((4,), align_corners=True),
        [1, 2.666667, -2, 5], [1, 0.666667, 1.333333, 2, 1, 4],
    ),
    (bp.resize((4,), method="nearest"), [1, 2, -3, 5], [1, 0, 2, 3, 0, 4]),
]  # fmt: skip


def test_outputs_and_gradients_are_those_that_pytorch_gave():
    @jax.jit
    def sweeps(x):
        pairs = [(layer, layer.forward((), x)) for layer, *_ in OF_PYTORCH]
        dys = [jnp.arange(1.0, y.size + 1).reshape(y.shape) for _, (y, _) in pairs]
        return [
            (y, layer.backward((), cache, dy)[0])
            for (layer, (y, cache)), dy in zip(pairs, dys, strict=True)
        ]

    answers = sweeps(jnp.array(X).reshape(1, 6, 1))
    for (y, dx), (_, want, wanted) in zip(answers, OF_PYTORCH, strict=True):
        np.testing.assert_allclose(y.ravel(), want, atol=1e-6)
        np.testing.assert_allclose(dx.ravel(), wanted, atol=1e-6)


@pytest.mark.parametrize("p", [1, 2, 3, 10])
def test_powers_neither_overflow_nor_vanish(p):
    """Raised to the power of 10, each of these numbers leaves the range of 32 bits."""
    layer = bp.lp_pool((2,), p)
    for size in (1e-30, 1e30):
        x = jnp.float32(size) * jnp.array([1, -1, 0, 1, 0, 0], jnp.float32).reshape(1, 6, 1)
        y, dx = there_and_back(layer, x)
        slope = 2 ** (1 / p - 1)
        np.testing.assert_allclose(y.ravel() / size, [2 ** (1 / p), 1, 0], rtol=1e-5)
        want = [slope * 2 ** (1 / p), -slope * 2 ** (1 / p), 0, 1, 0, 0]
        np.testing.assert_allclose(dx.ravel() / size, want, rtol=1e-5)
    y, _ = layer.forward((), jnp.array([jnp.inf, 1, jnp.nan, 1]).reshape(1, 4, 1))
    np.testing.assert_array_equal(y.ravel(), [jnp.inf, jnp.nan])


def test_a_norm_is_differentiated_once_more_at_a_zero():
    """Of the length y of a vector x, the second derivative is (1 - x x^T / y^2) / y."""
    pool = bp.lp_pool((2,), 2)

    def slope(params, x, *, key=None):
        y, cache = pool.forward((), x)
        return pool.backward((), cache, jnp.ones_like(y))[0], None

    def slope_by_autodiff(params, x, *, key=None):
        return layer_vjp(pool, (), x, jnp.ones((1, 1, 1)))[0], None

    x, v = jnp.array([[3.0, 0.0], [5.0, 7.0]]).reshape(2, 1, 2, 1)
    for function in (slope, slope_by_autodiff):
        layer = bp.Layer("slope", pool.init, function, pool.backward)
        assert_close(layer_jvp(layer, (), x, (), v), jnp.array([0.0, 7 / 3]).reshape(1, 2, 1))


@pytest.mark.parametrize("make", [bp.max_pool, bp.avg_pool, lambda window: bp.lp_pool(window, 3)])
def test_windows_side_by_side_are_pooled_at_once_as_axis_by_axis(make, key, monkeypatch):
    x = normal(key, (2, 5, 7, 3))  # of which the windows leave a row and a column
    layer, answers = make((2, 3)), []
    for alike in (True, False):
        if not alike:
            monkeypatch.setattr(pooling, "_are_side_by_side", lambda geometry: False)
        answers.append(jax.jit(lambda x: there_and_back(layer, x))(x))
        _, (_, kept) = layer.forward((), x)
        assert len(kept) == (1 if alike else 2)
    assert_close(*answers)


def there_and_back(layer, x):
    y, cache = layer.forward((), x)
    return y, layer.backward((), cache, y)[0]


def winners(layer, image):
    """How much of an error of one at each output comes back to each position of an image."""
    x = jnp.asarray(image, float)[None, ..., None]
    y, cache = layer.forward((), x)
    dx, _ = layer.backward((), cache, jnp.ones_like(y))
    return dx[0, ..., 0].tolist()


def test_of_equal_inputs_the_first_wins():
    layer = bp.max_pool((2, 2))
    assert winners(layer, [[1, 1], [1, 1]]) == [[1, 0], [0, 0]]
    assert winners(layer, [[0, 1], [1, 1]]) == [[0, 1], [0, 0]]
    assert winners(layer, [[0, 0], [2, 2]]) == [[0, 0], [1, 0]]
    # Where windows overlap, each has a winner of its own.
    assert winners(bp.max_pool((2,), strides=1), [3, 3, 3, 1]) == [1, 1, 1, 0]
    assert winners(bp.max_pool((3,), strides=1), [1, 1, 2, 2, 1]) == [0, 0, 3, 0, 0]
    assert winners(bp.global_pool("max"), [[0, 5], [5, 5]]) == [[0, 1], [0, 0]]


def test_ties_by_relu_send_back_all_of_the_error_once(key):
    """Zeros that relu makes are many: half of all windows of two."""
    layer = bp.max_pool((2, 2))
    x = jax.nn.relu(normal(key, (4, 6, 6, 3)) - 1)
    y, cache = layer.forward((), x)
    dy = normal(key, y.shape)
    dx, _ = layer.backward((), cache, dy)
    assert_close(dx.reshape(4, 3, 2, 3, 2, 3).sum((2, 4)), dy)
    assert int(jnp.sum(dx != 0)) == dy.size


def test_padding_never_wins():
    padded = bp.max_pool((3,), strides=1, padding="SAME")
    assert winners(padded, [-5, -7, -6]) == [2, 0, 1]
    # Nor where all inputs are as small as what one pads with.
    assert winners(padded, [-np.inf] * 3) == [2, 1, 0]
    apart = bp.max_pool((2,), strides=1, padding=((2, 2),), dilation=2)
    assert winners(apart, [-5, -7, -6]) == [2, 2, 1]
    assert winners(apart, [-np.inf] * 3) == [2, 2, 1]
    corner = bp.max_pool((2, 2), strides=2, padding=((1, 0), (1, 0)))
    assert winners(corner, [[-np.inf, -np.inf], [-np.inf, -np.inf]]) == [[1, 0], [0, 0]]


def test_what_is_not_a_number_comes_through():
    for layer in (bp.max_pool((3,)), bp.global_pool("max"), bp.adaptive_pool((1,), "max")):
        for place in range(3):
            x = jnp.arange(3.0).at[place].set(jnp.nan).reshape(1, 3, 1)
            y, cache = layer.forward((), x)
            dx, _ = layer.backward((), cache, jnp.ones_like(y))
            assert jnp.isnan(y).all()
            assert dx.ravel().tolist() == [float(place == k) for k in range(3)]


def test_means_do_not_count_the_padding():
    y, _ = bp.avg_pool((2, 2), strides=1, padding="SAME").forward((), jnp.ones((1, 3, 4, 2)))
    assert_close(y, jnp.ones((1, 3, 4, 2)))


def test_windows_of_many_places_know_their_winner(key):
    """More than a byte can number."""
    layer = bp.max_pool((300,))
    x = jnp.zeros((1, 300, 1)).at[0, 270, 0].set(1)
    _, dx = jax.jit(there_and_back, static_argnums=0)(layer, x)
    assert_close(dx, x)
    small = bp.max_pool((2,)).forward((), x)[1]
    assert {a.dtype for a in jax.tree.leaves(small)} == {jnp.dtype("uint8"), x.dtype}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_of_16_bits_are_taken_in_32(dtype):
    """300 times 200 in 16 bits would stop growing."""
    size = 300
    x = jnp.full((1, size, 1), 200.5, dtype)
    for layer in (
        bp.avg_pool((size,)), bp.avg_pool((size,), divisor=300), bp.global_pool(),
        bp.adaptive_pool((1,)),
    ):  # fmt: skip
        y, dx = jax.jit(there_and_back, static_argnums=0)(layer, x)
        assert y.dtype == dx.dtype == dtype
        np.testing.assert_allclose(np.float32(y.ravel()), np.float32(x[0, 0]))
        np.testing.assert_allclose(np.float32(dx[0, 0]), np.float32(x[0, 0]) / size, rtol=1e-2)
    for copies in (bp.upsample(size), bp.resize((size,), method="cubic")):
        _, cache = copies.forward((), x[:, :1])
        dx, _ = copies.backward((), cache, x)
        assert dx.dtype == dtype
        np.testing.assert_allclose(np.float32(dx).item(), 200.5 * size, rtol=1e-2)
    y, dx = jax.jit(there_and_back, static_argnums=0)(bp.lp_pool((20,), 2), x[:, :20])
    np.testing.assert_allclose(np.float32(y).item(), 200.5 * 20**0.5, rtol=1e-2)
    np.testing.assert_allclose(np.float32(dx), 200.5, rtol=1e-2)


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("layer", "peer"),
    [
        (bp.max_pool((2, 2)), lambda torch: torch.nn.MaxPool2d(2)),
        (
            bp.max_pool((3, 3), strides=2, padding=((1, 1), (1, 1))),
            lambda torch: torch.nn.MaxPool2d(3, 2, 1),
        ),
        (
            bp.avg_pool((3, 3), strides=2, padding=((1, 1), (1, 1))),
            lambda torch: torch.nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        ),
        (bp.upsample(2), lambda torch: torch.nn.Upsample(scale_factor=2)),
    ],
    ids=["max", "max of overlapping", "mean", "upsample"],
)
def test_outputs_and_gradients_are_those_of_pytorch(layer, peer, key):
    torch = pytest.importorskip("torch")
    x = normal(key, (2, 7, 6, 3))
    y, cache = layer.forward((), x)
    dy = normal(key, y.shape)
    dx, _ = layer.backward((), cache, dy)
    their_x = torch.tensor(np.array(x).transpose(0, 3, 1, 2), requires_grad=True)
    their_y = peer(torch)(their_x)
    their_y.backward(torch.tensor(np.array(dy).transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(y, their_y.detach().numpy().transpose(0, 2, 3, 1), atol=1e-6)
    np.testing.assert_allclose(dx, their_x.grad.numpy().transpose(0, 2, 3, 1), atol=1e-6)


def test_upsample_repeats_each_position():
    y, _ = bp.upsample((2, 3)).forward((), jnp.arange(4.0).reshape(1, 2, 2, 1))
    want = np.kron(np.arange(4.0).reshape(2, 2), np.ones((2, 3)))
    assert_close(y[0, ..., 0], jnp.asarray(want))


def test_windows_stand_side_by_side_unless_strides_are_given(key):
    assert bp.max_pool((2, 3)).init(key, (5, 6, 1))[1] == (2, 2, 1)
    assert bp.avg_pool((2, 3), strides=1).init(key, (5, 6, 1))[1] == (4, 4, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key: bp.max_pool(2), r"max_pool: window is 2; it takes a tuple of one to three"),
        (lambda key: bp.avg_pool((2, 2), strides=0), "avg_pool: strides is 0"),
        (lambda key: bp.avg_pool((2,), padding="FULL"), "avg_pool: padding is 'FULL'"),
        (
            lambda key: bp.max_pool((2, 3), padding=((0, 0), (3, 0))),
            r"max_pool: padding is \(\(0, 0\), \(3, 0\)\), and the window is \(2, 3\); it takes",
        ),
        (
            lambda key: bp.max_pool((2, 2)).init(key, (4, 3)),
            r"max_pool\(\(2, 2\)\) got inputs of shape \[N, 4, 3\]; its window of 2 axes takes "
            r"\[N, H, W, O\]",
        ),
        (
            lambda key: bp.max_pool((5,)).init(key, (4, 3)),
            r"got inputs of \[4\] positions; its window spans \[5\], more than the 4 of axis 1",
        ),
        (lambda key: bp.max_pool((2,)).forward((), jnp.ones((1, 4, 2), int)), "dtype int64"),
        (
            lambda key: bp.max_pool((2,)).backward(
                (), bp.max_pool((2,)).forward((), jnp.ones((1, 4, 2)))[1], jnp.ones((1, 4, 2))
            ),
            r"got a dy of shape \[1, 4, 2\]; its outputs are \[1, 2, 2\]",
        ),
        (lambda key: bp.max_pool((2,), dilation=0), "max_pool: dilation is 0; it takes a positive"),
        (
            lambda key: bp.max_pool((2,), dilation=3, padding=((4, 0),)),
            r"the window is \(2,\), which spans \[4\]; it takes less padding than the window spans",
        ),
        (
            lambda key: bp.avg_pool((2,), dilation=3, padding=((3, 3),)).init(key, (2, 1)),
            r"got inputs of \[2\] positions; dilated and padded so, a window along axis 1",
        ),
        *(
            (lambda key, value=value: bp.avg_pool((2,), divisor=value), "avg_pool: divisor is")
            for value in (0, -1.0, np.nan, True, None, "places", [2.0])
        ),
        *(
            (
                lambda key, p=p: bp.lp_pool((2,), p),
                "lp_pool: p is .*; it takes a finite number of at",
            )
            for p in (0.5, np.inf, np.nan, True, "2", None)
        ),
        (lambda key: bp.global_pool("sum"), "global_pool: how is 'sum'; it takes 'mean' or 'max'"),
        (lambda key: bp.global_pool().init(key, (4,)), r"shape \[N, 4\]; it takes \[N, \.\.\., O"),
        (lambda key: bp.upsample(0), "upsample: factor is 0; it takes a positive integer"),
        (lambda key: bp.upsample((2, 0)), "upsample: factor is 0"),
        (lambda key: bp.upsample(()), r"upsample: factor is \(\)"),
        (
            lambda key: bp.upsample((2, 2)).init(key, (4, 3)),
            r"upsample\(\(2, 2\)\) got inputs of shape \[N, 4, 3\]; it takes 2 axes of positions",
        ),
        (lambda key: bp.upsample(2).init(key, (3,)), r"got inputs of shape \[N, 3\]"),
    ],
)
def test_what_is_wrong_is_said(call, message, key):
    with pytest.raises(ValueError, match=message):
        call(key)
