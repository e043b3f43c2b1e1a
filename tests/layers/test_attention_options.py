"""Attention's options: who sees whom by masks and windows, and what changes the scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import every, normal
from oracles import assert_close

import jaxbp as bp
from jaxbp.layers import dot_product

N, T, S, H, G, D, U = 2, 3, 5, 4, 2, 2, 3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that the lean form has several blocks of rows, and the last one is not full."""
    monkeypatch.setattr(dot_product, "LEAN_ROWS", 3)


def booleans(*shape):
    return np.random.default_rng(1).random(shape) < 0.7


def normals(*shape):
    return np.random.default_rng(2).normal(size=shape)


OPTIONS = {
    "nothing": {},
    "mask": {"mask": booleans(N, S)},
    "pair_mask": {"pair_mask": booleans(T, S)},
    "pair_mask of each example": {"pair_mask": booleans(N, 1, T, S)},
    "pair_mask of each head": {"pair_mask": booleans(1, H, T, S), "mask": booleans(S)},
    "bias": {"bias": 900 * normals(T, S)},
    "bias of each head": {"bias": normals(1, H, T, S), "causal": True},
    "bias of each head and example": {"bias": normals(N, H, T, S)},
    "bias of minus infinity": {"bias": np.where(booleans(T, S), 0.0, -np.inf)},
    "window": {"window": 2},
    "causal window": {"window": 2, "causal": True},
    "scale": {"scale": 3.0},
    "soft_cap": {"soft_cap": 0.5, "bias": normals(T, S), "pair_mask": booleans(T, S)},
}


def slowly(inputs, *, mask=True, pair_mask=True, bias=0.0, causal=False, window=None, **scoring):
    """Attention with all pairs in one array, [N, H, T, S]."""
    q, k, v = (x.reshape(*x.shape[:2], h, -1) for x, h in zip(inputs, (H, G, G), strict=True))
    k, v = (jnp.repeat(x, H // G, axis=2) for x in (k, v))
    t, s = np.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], np.arange(k.shape[1])
    see = np.ones((N, H, len(t), len(s)), bool) & pair_mask & np.isfinite(bias)
    see &= np.broadcast_to(mask, (N, len(s)))[:, None, None]
    see &= s <= t if causal else True
    see &= abs(t - s) < (window or np.inf)
    e = jnp.einsum("nthd,nshd->nhts", q, k) * scoring.get("scale", q.shape[-1] ** -0.5)
    if "soft_cap" in scoring:
        e = scoring["soft_cap"] * jnp.tanh(e / scoring["soft_cap"])
    e = jnp.where(see, e + np.where(np.isfinite(bias), bias, 0), -1e30)
    top = jax.lax.stop_gradient(jnp.max(e, axis=-1, keepdims=True))
    weights = jnp.where(see, jnp.exp(e - top), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    return jnp.einsum("nhts,nshu->nthu", weights, v).reshape(N, q.shape[1], -1)


def apart(key, t=T, s=S, dtype=float):
    keys = jax.random.split(key, 4)
    shapes = (N, t, H * D), (N, s, G * D), (N, s, G * U), (N, t, H * U)
    *inputs, dy = (
        jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True)
    )
    return tuple(inputs), dy


@functools.partial(jax.jit, static_argnums=0)
def sweep(layer, x, dy, key=None):
    y, cache = layer.forward((), x, key=key)
    return y, layer.backward((), cache, dy)[0]


def pull_back(layer, x, dy, key=None):
    """dx by autodiff."""
    return jax.vjp(lambda x: layer.forward((), x, key=key)[0], x)[1](dy)[0]


def make(lean=False, **options):
    return bp.dot_product_attention(H, kv_heads=G, lean=lean, **options)


SOON = "pair_mask of each head", "bias", "causal window", "soft_cap"


@every("options", OPTIONS, soon=SOON)
def test_every_option_by_its_formula(options, key):
    inputs, dy = apart(key)
    want, pullback = jax.vjp(lambda *inputs: slowly(inputs, **options), *inputs)
    for lean in (False, True):
        assert_close(sweep(make(lean, **options), inputs, dy), (want, pullback(dy)))


@pytest.mark.thorough
@pytest.mark.usefixtures("standard_promotion")  # what jax.nn relies on
def test_options_are_those_of_jax_nn(key):
    """In 32 bits, in which jax.nn takes the softmax."""
    mask, bias = booleans(N, H, 8, 8) | np.eye(8, dtype=bool), normals(1, H, 8, 8)
    inputs, dy = apart(key, 8, 8, jnp.float32)
    inputs = *inputs[:2], inputs[2][..., : G * D]
    dy = dy[..., : H * D]

    def forward(q, k, v):
        q, k, v = (x.reshape(N, 8, -1, D) for x in (q, k, v))
        y = jax.nn.dot_product_attention(
            q, k, v, mask=mask, bias=bias.astype(np.float32), scale=0.9, local_window_size=2
        )
        return y.reshape(N, 8, -1)

    want, pullback = jax.vjp(forward, *inputs)
    for lean in (False, True):
        layer = make(lean, pair_mask=mask, bias=bias, scale=0.9, window=3)
        assert_close(sweep(layer, inputs, dy), (want, pullback(dy)))


def test_a_square_mask_is_of_positions_and_a_square_pair_mask_of_pairs(key):
    """With N = T both are [T, T]: the name of the argument says which is meant."""
    inputs, _ = apart(key, N, N)
    square = np.array([[True, False], [True, True]])
    of_positions = make(mask=square).forward((), inputs)[0]
    of_pairs = make(pair_mask=square).forward((), inputs)[0]
    assert_close(of_positions, slowly(inputs, mask=square))
    assert_close(of_pairs, slowly(inputs, pair_mask=square))
    assert_close(of_pairs, make(causal=True).forward((), inputs)[0])
    assert not np.allclose(of_positions, of_pairs)


@pytest.mark.parametrize("holds", [1e200, np.inf, np.nan])
@pytest.mark.parametrize("lean", [False, True], ids=["plain", "lean"])
def test_what_no_query_sees_reaches_nothing(lean, holds, key):
    """By the masks of pairs, and of each example; queries, keys and values all come from there."""
    pair_mask = np.ones((N, H, T, T), bool)
    pair_mask[1, :, :, 2] = False
    layer = bp.dot_product_attention(H, kv_heads=G, pair_mask=pair_mask, lean=lean)
    x = normal(key, (N, T, (H + 2 * G) * D)).at[1, 2].set(0)
    dy = jnp.ones((N, T, H * D)).at[1, 2].set(0)
    y, dx = sweep(layer, x, dy)
    other_y, other_dx = sweep(layer, x.at[1, 2].set(holds), dy)
    assert_close(other_y.at[1, 2].set(0), y.at[1, 2].set(0))
    assert_close(other_dx, dx)
    inputs, dy = apart(key)
    seen = np.array([True, True, False, True, True])
    layer = make(lean, pair_mask=np.broadcast_to(seen, (T, S)))
    broken = inputs[0], *(x.at[:, 2].set(holds) for x in inputs[1:])
    assert_close(sweep(layer, broken, dy), sweep(layer, inputs, dy))


def test_a_query_that_sees_nothing_answers_zero(key):
    """By each of the ways not to see, whose results are finite."""
    inputs, dy = apart(key)
    nothing = np.zeros((T, S))
    for lean in (False, True):
        for options in (
            {"pair_mask": nothing != 0},
            {"bias": nothing - np.inf},
            {"mask": np.arange(S) > 2, "window": 1, "pair_mask": nothing != 0},
        ):
            answers = sweep(make(lean, **options), inputs, dy)
            assert not any(np.any(answer) for answer in jax.tree.leaves(answers)), options
    # The last query is at the last position, so with more queries than keys the first see nothing.
    inputs, dy = apart(key, S, T)
    y, _ = sweep(make(causal=True), inputs, dy)
    assert [bool(np.any(y[:, t])) for t in range(S)] == [False] * 2 + [True] * 3


def test_16_bits_with_options_are_close_to_32(key):
    options = {"soft_cap": 2.0, "bias": normals(T, S), "window": 3, "scale": 0.5}
    inputs, dy = (jax.tree.map(lambda a: a.astype(jnp.bfloat16), a) for a in apart(key))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (inputs, dy))
    for lean in (False, True):
        got, want = (sweep(make(lean, **options), *data) for data in ((inputs, dy), wide))
        assert_close(got, jax.tree.map(lambda a: a.astype(jnp.bfloat16), want))


def test_a_sweep_with_options_is_differentiated_once_more(key):
    """With queries that see nothing, bounded scores and a bias of minus infinity."""
    pair_mask = booleans(N, 1, T, S)
    pair_mask[0, 0, 1] = False
    bias = np.where(booleans(T, S), 1.0, -np.inf)
    options = {"pair_mask": pair_mask, "bias": bias, "soft_cap": 0.7}
    inputs, dy = apart(key)

    def objective(swept, inputs, dy):
        return sum(jnp.sum(jnp.cos(a) * jnp.sin(a + 1)) for a in jax.tree.leaves(swept(inputs, dy)))

    def by_autodiff(inputs, dy):
        y, pullback = jax.vjp(lambda *inputs: slowly(inputs, **options), *inputs)
        return y, pullback(dy)

    want = jax.jit(jax.grad(functools.partial(objective, by_autodiff), argnums=(0, 1)))(inputs, dy)
    for lean in (False, True):
        swept = functools.partial(sweep, make(lean, **options))
        got = jax.jit(jax.grad(functools.partial(objective, swept), argnums=(0, 1)))(inputs, dy)
        assert_close(got, want)


def test_dropout_drops_probabilities_as_often_as_it_says(key):
    """Without scores, the probabilities of 200 keys are equal, and values of ones count them."""
    k = jnp.zeros((N, 200, G * D))
    inputs = jnp.zeros((N, 50, H * D)), k, jnp.ones((N, 200, G * U))
    layer = make(drop_prob=0.3)
    y, _ = layer.forward((), inputs, key=key)
    counts = np.asarray(y[..., ::U] * 0.7 * 200)
    # 80 000 draws of a probability: a deviation of 0.0016.
    np.testing.assert_allclose(counts.mean() / 200, 0.7, atol=0.01)
    np.testing.assert_allclose(counts, counts.round(), atol=1e-9)
    assert len({tuple(row) for row in counts.reshape(-1, H)}) > 90  # drawn for each row of its own
    assert_close(layer.forward((), inputs)[0], make().forward((), inputs)[0])


def test_dropout_agrees_with_autodiff_and_in_the_lean_form(key):
    inputs, dy = apart(key)
    options = {"drop_prob": 0.4, "causal": True, "bias": normals(1, H, T, S)}
    plain, lean = (make(lean, **options) for lean in (False, True))
    y, dx = sweep(plain, inputs, dy, key)
    assert_close(dx, jax.jit(pull_back, static_argnums=0)(plain, inputs, dy, key))
    assert_close(sweep(lean, inputs, dy, key), (y, dx))
    assert not np.allclose(y, sweep(plain, inputs, dy)[0])
    assert not np.allclose(y, sweep(plain, inputs, dy, jax.random.fold_in(key, 1))[0])


def products(**options):
    """The FLOP of a sweep over 64 positions."""
    x, dy = (jax.ShapeDtypeStruct((1, 64, f), jnp.float32) for f in (12, 4))
    layer = bp.dot_product_attention(1, **options)
    cost = sweep.lower(layer, x, dy).compile().cost_analysis()
    return cost["flops"]


def test_a_window_skips_what_it_does_not_see():
    assert products(window=8) < products() / 2
    assert products(window=8, causal=True) < products(causal=True) / 2


def split(x, p):
    """The past of the first p positions of packed inputs, and the remaining positions."""
    k, v = x[:, :p, H * D : (H + G) * D], x[:, :p, (H + G) * D :]
    return x[:, p:], (k, v)


@pytest.mark.parametrize("lean", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_a_past_continues_a_sequence(lean, key):
    """Its outputs are those of the whole sequence, and dx is that of autodiff."""
    options = {"causal": True, "window": 4, "value_size": U, "mask": booleans(N, S), "lean": lean}
    layer = bp.dot_product_attention(H, kv_heads=G, **options)
    x = normal(key, (N, S, (H + G) * D + G * U))
    whole, _ = layer.forward((), x)
    inputs = split(x, 2)
    dy = jax.tree.map(jnp.cos, (whole[:, 2:], split(x, S)[1]))
    (y, present), dx = sweep(layer, inputs, dy)
    assert_close(y, whole[:, 2:])
    assert_close(present, split(x, S)[1])
    assert_close(dx, jax.jit(pull_back, static_argnums=0)(layer, inputs, dy))


@pytest.mark.thorough
def test_generation_step_by_step_is_the_whole_sequence(key):
    """With the parameters of training, rotated queries and keys, and a head size of its own."""
    layer = bp.attention(
        5, 4, kv_heads=2, head_size=4, value_size=3, causal=True, rotary=bp.Rotary(size=2)
    )
    params, out_shape = layer.init(key, (S, 6))
    assert (out_shape, params[0]["weight"].shape) == ((S, 5), (6, 4 * 4 + 2 * 4 + 2 * 3))
    x = normal(key, (N, S, 6))
    whole, _ = layer.forward(params, x)
    past = jnp.zeros((N, 0, 8)), jnp.zeros((N, 0, 6))
    for t in (slice(0, 2), slice(2, 4), slice(4, S)):
        (y, past), cache = layer.forward(params, (x[:, t], past))
        assert_close(y, whole[:, t])
    # The last step depends on the past by its keys and values, and on the parameters.
    dy = y, past
    of_x = lambda params, x: layer.forward(params, x)[0]  # noqa: E731
    earlier = tuple(a[:, : S - 1] for a in past)
    inputs = x[:, S - 1 :], earlier
    (dx, dpast), grads = layer.backward(params, cache, dy, read=bp.total)
    assert_close((grads, (dx, dpast)), jax.vjp(of_x, params, inputs)[1](dy))


def test_a_masked_position_of_a_continued_sequence_reaches_nothing(key):
    mask = np.array([[True, False, True, True, False], [True] * 5])
    layer = bp.attention(4, 2, mask=mask)
    params, _ = layer.init(key, (S, 3))
    x = normal(key, (N, 3, 3)).at[0, 2].set(0)
    past = tuple(normal(k, (N, 2, 4)) for k in jax.random.split(key))
    broken = x.at[0, 2].set(jnp.nan), tuple(a.at[0, 1].set(jnp.nan) for a in past)

    @jax.jit
    def answers(inputs):
        (y, _), cache = layer.forward(params, inputs)
        dy = (
            y.at[0, 2].set(0),
            jax.tree.map(jnp.zeros_like, tuple(jnp.zeros((N, S, 4)) for _ in past)),
        )
        return y.at[0, 2].set(0), layer.backward(params, cache, dy, read=bp.per_example)

    assert_close(answers(broken), answers((x, past)))


def turned(x, base, size, interleaved):
    """Heads [N, T, H, d] turned by complex arithmetic."""
    first, rest = np.asarray(x[..., :size]), np.asarray(x[..., size:])
    a, b = (first[..., 0::2], first[..., 1::2]) if interleaved else np.split(first, 2, axis=-1)
    angles = np.arange(x.shape[1])[:, None] * base ** (-np.arange(0, size, 2) / size)
    pairs = (a + 1j * b) * np.exp(1j * angles)[:, None]
    parts = pairs.real, pairs.imag
    y = np.stack(parts, -1).reshape(first.shape) if interleaved else np.concatenate(parts, -1)
    return jnp.asarray(np.concatenate([y, rest], axis=-1))


@pytest.mark.thorough
@pytest.mark.parametrize(("size", "interleaved"), [(4, True), (6, True), (4, False)])
def test_rotary_by_complex_numbers_and_in_attention(size, interleaved, key):
    how = bp.Rotary(100.0, size, interleaved)
    x, dy = normal(key, (2, N, T, 4, 6)).reshape(2, N, T, 24)
    layer = bp.rotary(4, **how._asdict())
    y, dx = sweep(layer, x, dy)
    assert_close(y, turned(x.reshape(N, T, 4, 6), *how).reshape(x.shape))
    assert_close(dx, pull_back(layer, x, dy))
    attend = bp.dot_product_attention(2, kv_heads=1, rotary=how)
    of_y = bp.dot_product_attention(2, kv_heads=1)
    y = jnp.concatenate([y[..., :18], x[..., 18:]], axis=-1)
    assert_close(attend.forward((), x)[0], of_y.forward((), y)[0])
    assert_close(sweep(attend, x, dy[..., :12])[1], pull_back(attend, x, dy[..., :12]))


KEY = jax.random.key(0)
PACKED = np.ones((N, T, 8))
PAST = np.ones((N, 2, 2)), np.ones((N, 2, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: bp.dot_product_attention(2, pair_mask=np.ones((2, 3, 3), bool)),
            r"pair_mask is of type bool and shape \[2, 3, 3\]; it takes an array of booleans, "
            r"\[T, S\] or \[N, H, T, S\]\. With one for each example use pair_mask\[:, None\]",
        ),
        (
            lambda: bp.attention(4, 2, bias=np.ones((3, 3), bool)),
            r"bias is of type bool and shape \[3, 3\]; it takes an array of floating-point numbers",
        ),
        (lambda: bp.attention(4, 2, pair_mask=[[True]]), r"pair_mask is of type list and shape \["),
        (lambda: bp.attention(4, 2, window=0), "window is 0; it takes a positive integer"),
        (lambda: bp.attention(4, 2, scale=-1.0), "scale is -1.0; it takes a positive number"),
        (lambda: bp.attention(4, 2, soft_cap=0), "soft_cap is 0; it takes a positive number"),
        (lambda: bp.attention(4, 2, drop_prob=1.0), r"drop_prob is 1.0; it takes a number in \[0"),
        (lambda: bp.attention(4, 2, value_size=0), "value_size is 0; it takes a positive integer"),
        (lambda: bp.attention(5, 2), "not a multiple of 2 heads. Give a head_size"),
        (lambda: bp.attention(4, 2, rotary=1e4), "rotary is 10000.0; it takes True, False, or a R"),
        (lambda: bp.attention(4, 2, rotary=bp.Rotary(0.0)), "base is 0.0; it takes a positive"),
        (lambda: bp.rotary(2, size=3), "rotary: size is 3; pairs take an even number"),
        (
            lambda: bp.rotary(2, size=4).init(KEY, (3, 4)),
            r"got inputs of shape \[N, 3, 4\], so that d = 2; it rotates the first 4 values",
        ),
        (
            lambda: make(mask=np.ones((3, 3), bool)).forward((), np.ones((N, T, 16))),
            r"has a mask of shape \[3, 3\].* take \[3\] or \[2, 3\]. For pairs of a query",
        ),
        (
            lambda: make(bias=np.ones((3, 4, 3, 3))).forward((), np.ones((N, T, 16))),
            r"has a bias of shape \[3, 4, 3, 3\]; 3 queries and 3 keys take \[3, 3\] or \[2, 4, 3, "
            r"3\], where either of the first two axes may be 1",
        ),
        (
            lambda: bp.dot_product_attention(2, value_size=3).init(KEY, (3, 8)),
            r"got inputs of shape \[N, 3, 8\]; it takes .*, a last axis of 4 d \+ 6",
        ),
        (
            lambda: make().init(KEY, ((3, 8), (5, 4), (4, 4))),
            r"got \(q, k, v\) of shapes \[N, 3, 8\], \[N, 5, 4\], \[N, 4, 4\]; it takes \[N, T, 4",
        ),
        (
            lambda: make(rotary=True).init(KEY, ((3, 8), (3, 4), (3, 4))),
            r"got \(q, k, v\), which it does not rotate. Apply rotary\(\) to q and k",
        ),
        (
            lambda: bp.dot_product_attention(1, kv_heads=1).forward((), (PACKED[..., :3], PAST)),
            r"got a past of shapes \[N, 2, 2\], \[N, 2, 2\]; it takes a pair, keys \[N, P, 1\]",
        ),
        (
            lambda: bp.dot_product_attention(1).forward((), (PACKED[..., :6], np.ones((N, T)))),
            "it takes an array, three",
        ),
        (
            lambda: bp.dot_product_attention(1).forward((), (PACKED[..., :6], (PAST[0], 3.0))),
            "got inputs of type float; it takes an array",
        ),
        (
            lambda: bp.dot_product_attention(1).forward(
                (), (PACKED[..., :6], tuple(a.astype(np.float32) for a in PAST))
            ),
            "got inputs of dtypes float64 and float32; it takes one dtype for all",
        ),
        (
            lambda: bp.dot_product_attention(1).backward(
                (),
                bp.dot_product_attention(1).forward((), (PACKED[..., :6], PAST))[1],
                PACKED[..., :2],
            ),
            "got a dy of",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
