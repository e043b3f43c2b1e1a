"""Pooling: by its definition and JAX's own, ties, padding, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from oracles import assert_close, layer_vjp

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
    x = jax.random.normal(jax.random.key(seed), (2, *sizes, 3))
    _, out_shape = layer.init(None, x.shape[1:])
    dy = jax.random.normal(jax.random.key(seed + 1), (2, *out_shape))

    @jax.jit
    def both(x, dy):
        y, cache = layer.forward((), x)
        return y, peer.forward((), x)[0], layer.backward((), cache, dy)[0]

    y, want, dx = both(x, dy)
    assert_close(y, want)
    assert_close(dx, layer_vjp(peer, (), x, dy)[0])


@pytest.mark.parametrize("make", [bp.max_pool, bp.avg_pool])
def test_windows_side_by_side_are_pooled_at_once_as_axis_by_axis(make, key, monkeypatch):
    x = jax.random.normal(key, (2, 5, 7, 3))  # of which the windows leave a row and a column
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
    x = jax.nn.relu(jax.random.normal(key, (4, 6, 6, 3)) - 1)
    y, cache = layer.forward((), x)
    dy = jax.random.normal(key, y.shape)
    dx, _ = layer.backward((), cache, dy)
    assert_close(dx.reshape(4, 3, 2, 3, 2, 3).sum((2, 4)), dy)
    assert int(jnp.sum(dx != 0)) == dy.size


def test_padding_never_wins():
    padded = bp.max_pool((3,), strides=1, padding="SAME")
    assert winners(padded, [-5, -7, -6]) == [2, 0, 1]
    # Nor where all inputs are as small as what one pads with.
    assert winners(padded, [-np.inf] * 3) == [2, 1, 0]
    corner = bp.max_pool((2, 2), strides=2, padding=((1, 0), (1, 0)))
    assert winners(corner, [[-np.inf, -np.inf], [-np.inf, -np.inf]]) == [[1, 0], [0, 0]]


def test_what_is_not_a_number_comes_through():
    for layer in (bp.max_pool((3,)), bp.global_pool("max")):
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
    for layer in (bp.avg_pool((size,)), bp.global_pool()):
        y, dx = jax.jit(there_and_back, static_argnums=0)(layer, x)
        assert y.dtype == dx.dtype == dtype
        np.testing.assert_allclose(np.float32(y.ravel()), np.float32(x[0, 0]))
        np.testing.assert_allclose(np.float32(dx[0, 0]), np.float32(x[0, 0]) / size, rtol=1e-2)
    copies = bp.upsample(size)
    _, cache = copies.forward((), x[:, :1])
    dx, _ = copies.backward((), cache, x)
    np.testing.assert_allclose(np.float32(dx).item(), 200.5 * size, rtol=1e-2)


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
    x = jax.random.normal(key, (2, 7, 6, 3))
    y, cache = layer.forward((), x)
    dy = jax.random.normal(key, y.shape)
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
