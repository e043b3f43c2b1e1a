"""Layers that rearrange, select or pad values, against NumPy and against where each value went."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close

import jaxbp as bp

KEY = jax.random.key(0)
N = 2
S = slice

# Layers by the shape of one example, each with the same for an array [N, ...] in NumPy.
LAYERS = {
    (6,): [
        (bp.reshape(2, 3), lambda x: x.reshape(N, 2, 3)),
        (bp.take(0), lambda x: x[:, 0]),
        (bp.take(-6), lambda x: x[:, -6]),
        (bp.take(S(1, -1)), lambda x: x[:, 1:-1]),
        (bp.take(S(-100, 100, 4)), lambda x: x[:, ::4]),
        (bp.take(S(None, None, -1)), lambda x: x[:, ::-1]),
        (bp.take(S(4, 0, -3)), lambda x: x[:, 4:0:-3]),
    ],
    (2, 3, 4): [
        (bp.flatten(), lambda x: x.reshape(N, 24)),
        (bp.reshape(-1), lambda x: x.reshape(N, 24)),
        (bp.reshape(6, -1, 2), lambda x: x.reshape(N, 6, 2, 2)),
        (bp.permute(2, 0, 1), lambda x: np.moveaxis(x, 3, 1)),
        (bp.permute(1, 0, 2), lambda x: np.swapaxes(x, 1, 2)),
        (bp.take(2, axis=1), lambda x: x[:, :, 2]),
        (bp.take(-1, axis=-1), lambda x: x[..., -1]),
        (bp.take(S(1, None), axis=-2), lambda x: x[:, :, 1:]),
        (bp.take(S(None, None, 3), axis=2), lambda x: x[..., ::3]),
        (bp.chain(bp.reshape(2, 3, 2, 1, 2), bp.permute(0, 3, 1, 4, 2), bp.reshape(2, 6, 2)),
         lambda x: np.stack([x[..., 0::2], x[..., 1::2]], 3).reshape(N, 2, 6, 2)),
    ],
    (): [(bp.reshape(1), lambda x: x[:, None]), (bp.flatten(), lambda x: x[:, None])],
    (1,): [(bp.reshape(), lambda x: x[:, 0]), (bp.permute(0), lambda x: x)],
}  # fmt: skip
WIDTHS = (
    (), ((1, 2),), ((0, 3), (2, 1)), ((2, 0), (0, 0)), ((-1, 0), (1, -2)), ((1, -2),),
    ((0, -2), (-1, -1)), ((0, 0), (0, 0), (1, 1)),
)  # fmt: skip


def padded(widths, mode):
    """The same in NumPy: cropping at negative widths, then padding at positive ones."""

    def pad(x):
        pairs = [(0, 0), *widths, *[(0, 0)] * (x.ndim - 1 - len(widths))]
        x = x[
            tuple(S(max(-b, 0), n - max(-a, 0)) for (b, a), n in zip(pairs, x.shape, strict=True))
        ]
        return np.pad(x, np.maximum(pairs, 0), mode)

    return pad


LAYERS[4, 5, 2] = [
    (bp.pad(widths, mode=mode), padded(widths, mode))
    for widths, mode in itertools.product(WIDTHS, ("constant", "reflect", "edge", "wrap"))
]


@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_values_and_errors_land_where_numpy_puts_them(shape):
    rng = np.random.default_rng(1)
    layers, same = zip(*LAYERS[shape], strict=True)
    x = rng.normal(size=(N, *shape))
    wanted = [f(x) for f in same]
    errors = [rng.normal(size=y.shape) for y in wanted]

    @jax.jit
    def of_all(x, errors):
        found = []
        for layer, dy in zip(layers, errors, strict=True):
            params, out_shape = layer.init(KEY, shape)
            y, cache = layer.forward(params, x)
            assert y.shape[1:] == out_shape
            found.append((y, layer.backward(params, cache, dy)[0]))
        return found

    sources = 1 + np.arange(x.size).reshape(x.shape)  # 0 is the padding
    for f, want, dy, (y, dx) in zip(same, wanted, errors, of_all(x, errors), strict=True):
        back = np.zeros(1 + x.size)
        np.add.at(back, f(sources), dy)
        assert_close((y, dx), (jnp.asarray(want), jnp.asarray(back[1:].reshape(x.shape))))


def test_padding_has_the_value_and_tokens_keep_their_dtype():
    x = jnp.ones((1, 2), jnp.int8)
    layer = bp.pad(((1, -1),), value=7)
    y, cache = layer.forward((), x)
    assert (y.tolist(), y.dtype) == ([[7, 1]], jnp.int8)
    assert layer.backward((), cache, None) == (None, ())
    y, _ = bp.pad(((0, 1),), value=-2.5).forward((), x.astype(jnp.float16))
    assert (y.tolist(), y.dtype) == ([[1, 1, -2.5]], jnp.float16)
    with pytest.raises(
        bp.LayerError, match=r"got inputs of dtype int8; it pads them by a fraction"
    ):
        bp.pad(((0, 1),), value=0.5).forward((), x)


def test_sums_of_16_bits_are_computed_in_32():
    """1 + 1 / 2048 is no number of float16, and a sum there would stop growing at 2048."""
    layer = bp.pad(((3000, 0),), mode="edge")
    _, cache = layer.forward((), jnp.ones((1, 2), jnp.float16))
    dx, _ = layer.backward((), cache, jnp.ones((1, 3002), jnp.float16))
    assert dx.tolist() == [[3000, 1]]  # 3001, rounded once


def test_tokens_pass_through_without_a_derivative():
    tokens = jnp.arange(6).reshape(1, 2, 3)
    for layer in (bp.reshape(6), bp.permute(1, 0), bp.take(-1), bp.take(slice(1), axis=1)):
        y, cache = layer.forward((), tokens)
        assert y.dtype == tokens.dtype
        assert layer.backward((), cache, None) == (None, ())


def test_an_infinite_error_stays_where_it_is():
    _, cache = bp.take(1).forward((), jnp.ones((1, 3)))
    assert bp.take(1).backward((), cache, jnp.full(1, jnp.inf))[0].tolist() == [[0, np.inf, 0]]
    layer = bp.pad(((-1, 0),))
    _, cache = layer.forward((), jnp.ones((1, 2)))
    assert layer.backward((), cache, jnp.full((1, 1), jnp.nan))[0][0, 0] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: bp.reshape(2, 0),
            r"reshape: got \(2, 0\); it takes one positive integer for each",
        ),
        (lambda: bp.reshape(-1, -1), r"reshape: got \(-1, -1\); .* -1 for at most one"),
        (lambda: bp.reshape((2, 3)), r"reshape: got \(\(2, 3\),\); .* such as reshape\(28, 28\)"),
        (lambda: bp.reshape(True), r"reshape: got \(True,\)"),
        (lambda: bp.reshape(2.0), r"reshape: got \(2\.0,\)"),
        (lambda: bp.reshape(2, -2), r"reshape: got \(2, -2\)"),
        (
            lambda: bp.permute(1, 2),
            r"permute: got \(1, 2\); it takes every axis of an example once",
        ),
        (lambda: bp.permute(0, 0), r"permute: got \(0, 0\)"),
        (lambda: bp.permute(0, -1), r"permute: got \(0, -1\)"),
        (lambda: bp.permute((1, 0)), r"permute: axis 0 is \(1, 0\); it takes an integer"),
        (lambda: bp.permute(1.0, 0), r"permute: axis 0 is 1\.0; it takes an integer"),
        (lambda: bp.take(1.0), r"take: index is 1\.0; it takes an integer or a slice"),
        (lambda: bp.take(True), r"take: index is True; it takes an integer or a slice"),
        (lambda: bp.take([0, 1]), r"take: index is \[0, 1\]; it takes an integer or a slice"),
        (lambda: bp.take(slice(1.0)), r"take: index is slice\(.*; it takes a slice of integers"),
        (lambda: bp.take(slice(0, 2, 0)), r"take: index is slice\(.* a step other than 0"),
        (lambda: bp.take(0, axis="T"), r"take: axis is 'T'; it takes an integer"),
        (lambda: bp.pad(1), r"pad: widths is 1; it takes a pair of integers"),
        (lambda: bp.pad((1, 1)), r"pad: widths is \(1, 1\); it takes a pair of integers"),
        (lambda: bp.pad(((1, 1, 1),)), r"pad: widths is \(\(1, 1, 1\),\)"),
        (lambda: bp.pad(((1, 0.5),)), r"pad: widths is \(\(1, 0\.5\),\)"),
        (lambda: bp.pad(((1, True),)), r"pad: widths is \(\(1, True\),\)"),
        (
            lambda: bp.pad(((1, 1),), mode="zeros"),
            r"pad: mode is 'zeros'; it takes one of constant, ",
        ),
        (
            lambda: bp.pad(((1, 1),), mode="edge", value=1),
            r"value is 1\.0, which the mode 'edge' does",
        ),
        (lambda: bp.pad(((1, 1),), value=np.nan), r"pad: value is nan; it takes a finite number"),
        (lambda: bp.prepend(0), r"prepend: count is 0; it takes a positive integer"),
    ],
)
def test_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            bp.reshape(4, 2),
            r"reshape\(4, 2\) got inputs of shape \[N, 2, 3\]; the 6 values of an exam",
        ),
        (
            bp.reshape(4, -1),
            r"reshape\(4, -1\) got inputs of shape \[N, 2, 3\]; the 6 values .* \[4, -",
        ),
        (
            bp.permute(0),
            r"permute\(0\) got inputs of shape \[N, 2, 3\]; it permutes 1 axes, and an e",
        ),
        (bp.take(2), r"take\(2, axis=0\) got inputs of shape \[N, 2, 3\]; index 2 selects nothing"),
        (bp.take(-4, axis=1), r"take\(-4, axis=1\) .*; index -4 selects nothing on axis 1"),
        (
            bp.take(slice(3, None), axis=-1),
            r"take\(3:, axis=-1\) .*; index 3: selects nothing on ax",
        ),
        (
            bp.take(0, axis=2),
            r"got inputs of shape \[N, 2, 3\], without an axis 2: axes are counted f",
        ),
        (bp.take(0, axis=-3), r"got inputs of shape \[N, 2, 3\], without an axis -3"),
        (
            bp.pad(((0, 0),) * 3),
            r"got inputs of shape \[N, 2, 3\]; it pads 3 axes, and an example has 2",
        ),
        (
            bp.pad(((-1, -1),)),
            r"got inputs of shape \[N, 2, 3\]; widths \(-1, -1\) leave nothing of a",
        ),
        (bp.pad(((-2, 5),)), r"widths \(-2, 5\) leave nothing of axis 0"),
        (bp.pad(((0, 0), (0, 3)), mode="reflect"), r"'reflect' can copy 2 values of axis 1, not 3"),
        (bp.pad(((3, 0),), mode="wrap"), r"'wrap' can copy 2 values of axis 0, not 3"),
    ],
)
def test_shapes_that_do_not_fit(layer, message):
    for call in (
        lambda: layer.init(KEY, (2, 3)),
        lambda: layer.forward((), jnp.ones((4, 2, 3))),
        lambda: layer.forward((), jnp.ones((4, 2, 3), int)),
    ):
        with pytest.raises(bp.LayerError, match=message):
            call()


def test_vectors_are_prepended_to_sequences_alone():
    message = r"prepend\(1\) got inputs of shape \[N, 2\]; it takes \[N, T, O\]"
    with pytest.raises(bp.LayerError, match=message):
        bp.prepend().init(KEY, (2,))
    with pytest.raises(bp.LayerError, match=message):
        bp.prepend().forward({"weight": jnp.ones((1, 2))}, jnp.ones((4, 2)).reshape(4, 2))


def test_prepended_vectors_come_first_and_are_learned_each_by_itself():
    layer = bp.prepend(2)
    params, out_shape = layer.init(KEY, (3, 4))
    assert params["weight"].shape == (2, 4)
    assert out_shape == (5, 4)
    x, dy = jnp.ones((2, 3, 4)), jnp.arange(40.0).reshape(2, 5, 4)
    y, cache = layer.forward(params, x)
    dx, grads = layer.backward(params, cache, dy, read=bp.per_example)
    assert_close(y[:, :2], jnp.broadcast_to(params["weight"], (2, 2, 4)))
    assert_close(y[:, 2:], x)
    assert_close(dx, dy[:, 2:])
    assert_close(grads["weight"], dy[:, :2])
