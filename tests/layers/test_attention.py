"""Attention: its definition head by head, who sees whom, and what the lean form never holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import late, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_close, layer_vjp

import jaxbp as bp
from jaxbp.layers import dot_product

N, T, H, D = 2, 7, 4, 2  # D here is the size of a head
PADDED = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 0, 0]], bool)
MASKS = {"no mask": None, "one mask": PADDED[1], "a mask for each": PADDED}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that the lean form has several blocks of rows, and the last one is not full."""
    monkeypatch.setattr(dot_product, "LEAN_ROWS", 3)


def inputs_for(key, groups=H, heads=H, n=N, t=T, size=D, dtype=float):
    x_key, dy_key = jax.random.split(key)
    return (
        jax.random.normal(x_key, (n, t, (heads + 2 * groups) * size), dtype),
        jax.random.normal(dy_key, (n, t, heads * size), dtype),
    )


def outputs_and_derivative(layer, x, dy):
    y, cache = layer.forward((), x)
    dx, _ = layer.backward((), cache, dy)
    return y, dx


def run(layer, x, dy):
    """Compiled for these inputs: one program, where there would be one for each operation."""
    return jax.jit(lambda x, dy: outputs_and_derivative(layer, x, dy))(x, dy)


def turned(x, base=10000.0):
    """Positions [T, d] turned by complex arithmetic."""
    half = x.shape[-1] // 2
    pairs = x[:, :half] + 1j * x[:, half:]
    waves = np.exp(1j * np.outer(np.arange(len(x)), base ** (-np.arange(half) / half)))
    return np.concatenate([(pairs * waves).real, (pairs * waves).imag], axis=1)


def by_definition(x, heads, groups, *, causal, mask, rotary):
    """The outputs, example by example, head by head, row by row."""
    x = np.asarray(x)
    n, t, features = x.shape
    size = features // (heads + 2 * groups)
    seen = np.broadcast_to(True if mask is None else mask, (n, t))
    y = np.zeros((n, t, heads * size))
    for example in range(n):
        parts = np.split(x[example], heads + 2 * groups, axis=1)
        for h in range(heads):
            g = h * groups // heads
            q, k, v = parts[h], parts[heads + g], parts[heads + groups + g]
            if rotary:
                q, k = turned(q), turned(k)
            for row in range(t):
                see = [s for s in range(t) if seen[example, s] and (s <= row or not causal)]
                if see:
                    weights = np.exp(k[see] @ q[row] / np.sqrt(size))
                    answer = weights @ v[see] / weights.sum()
                    y[example, row, h * size : (h + 1) * size] = answer
    return jnp.asarray(y)


@pytest.mark.thorough
@pytest.mark.parametrize("lean", [False, True], ids=["plain", "lean"])
@pytest.mark.parametrize(("groups", "rotary"), [(4, False), (2, True)])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_outputs_by_definition_and_derivatives_by_autodiff(causal, mask, groups, rotary, lean, key):
    how = {"causal": causal, "mask": mask, "rotary": rotary}
    layer = bp.dot_product_attention(H, kv_heads=groups, lean=lean, **how)
    x, dy = inputs_for(key, groups)
    y, dx = run(layer, x, dy)
    assert_close(y, by_definition(x, H, groups, **how))
    assert_close(dx, layer_vjp(layer, (), x, dy)[0])


@settings(max_examples=6, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 8), st.integers(1, 2), st.integers(1, 3),
    st.integers(1, 3), st.booleans(), st.booleans(), st.data(),
)  # fmt: skip
def test_outputs_by_definition_at_any_size(n, t, groups, group, size, causal, lean, data):
    heads = groups * group
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=t, max_size=t).map(np.array))
    rotary = size % 2 == 0
    how = {"causal": causal, "mask": mask, "rotary": rotary}
    layer = bp.dot_product_attention(heads, kv_heads=groups, lean=lean, **how)
    x, dy = inputs_for(jax.random.key(1), groups, heads, n, t, size)
    y, dx = run(layer, x, dy)
    assert_close(y, by_definition(x, heads, groups, **how))
    assert dx.shape == x.shape
    assert bool(jnp.all(jnp.isfinite(dx)))


@pytest.mark.usefixtures("standard_promotion")  # what jax.nn relies on
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("lean", [False, True], ids=["plain", "lean"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_outputs_and_derivatives_are_those_of_jax_nn(causal, lean, groups, key):
    mask = np.ones((N, T), bool)
    mask[0, -2:] = False

    def forward(params, x, *, key=None):
        q, k, v = jnp.split(x.reshape(N, T, -1, D), [H, H + groups], axis=2)
        y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None], is_causal=causal)
        return y.reshape(N, T, -1), None

    x, dy = inputs_for(key, groups, dtype=jnp.float32)  # what jax.nn takes the softmax in
    layer = bp.dot_product_attention(H, kv_heads=groups, causal=causal, mask=mask, lean=lean)
    y, dx = run(layer, x, dy)
    assert_close(y, forward((), x)[0])
    assert_close(dx, layer_vjp(layer._replace(forward=forward), (), x, dy)[0])


@pytest.mark.parametrize("bands", [1, 4])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_bands_and_blocks_change_nothing(causal, bands, key, monkeypatch):
    how = {"causal": causal, "kv_heads": 2, "mask": PADDED}
    want = run(bp.dot_product_attention(H, **how), *inputs_for(key, 2))
    monkeypatch.setattr(dot_product, "BANDS", bands)
    for lean, rows in ((False, 1), (True, 5)):
        monkeypatch.setattr(dot_product, "LEAN_ROWS", rows)
        assert_close(run(bp.dot_product_attention(H, lean=lean, **how), *inputs_for(key, 2)), want)


@pytest.mark.parametrize(("t", "bands"), [(64, 1), (65, 2), (128, 2)])
def test_few_positions_are_one_band(t, bands, monkeypatch):
    monkeypatch.setattr(dot_product, "BAND_ROWS", 64)
    layer = bp.dot_product_attention(1)
    qkv = jax.ShapeDtypeStruct((2, t, 9), jnp.float32)
    _, ((*_, kept), _) = jax.eval_shape(layer.forward, (), qkv)
    assert len(kept.of_bands) == bands


@pytest.mark.parametrize("holds", [late(7.0), late(1e30), late(np.inf), np.nan])
@pytest.mark.parametrize("lean", [False, True], ids=["plain", "lean"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_what_a_padded_position_holds_changes_nothing(causal, lean, holds, key):
    layer = bp.dot_product_attention(H, causal=causal, mask=PADDED, lean=lean)
    x, dy = inputs_for(key)
    # Nothing is asked of a padded position: there is no error at its own outputs.
    dy = jnp.where(PADDED[..., None], dy, 0)
    padded = jnp.broadcast_to(~PADDED[..., None], x.shape)
    y, dx = run(layer, x, dy)
    other_y, other_dx = run(layer, jnp.where(padded, holds, x), dy)
    assert_close(jnp.where(PADDED[..., None], other_y, 0), jnp.where(PADDED[..., None], y, 0))
    assert_close(other_dx, dx)
    assert not np.any(np.asarray(other_dx)[~PADDED])


def with_hole(net, n_inputs, key):
    """Whether nothing changes when masked positions, at which dy is 0, hold nan instead of 0."""
    net = bp.masked(net)
    params, _ = net.init(key, ((T, n_inputs), (T,)))
    x = jnp.where(PADDED[..., None], normal(key, (N, T, n_inputs)), 0)

    @jax.jit
    def answers(x):
        y, cache = net.forward(params, (x, PADDED))
        dy = jnp.where(PADDED[..., None], jnp.cos(y), 0)
        reads = (bp.total, bp.per_example, bp.sq_norms)
        swept = [net.backward(params, cache, dy, read=read) for read in reads]
        return jnp.where(PADDED[..., None], y, 0), swept

    return answers(x), answers(jnp.where(PADDED[..., None], x, jnp.nan))


@pytest.mark.parametrize("lean", [False, True], ids=["plain", "lean"])
def test_a_masked_nan_reaches_nothing(lean, key):
    """Through the dense layers too, whose gradients are products with their inputs."""

    def net(mask):
        attend = bp.attention(4, 2, causal=True, mask=mask, lean=lean)
        return bp.chain(attend, bp.attention(4, 1, mask=mask, rotary=True))

    zero, hole = with_hole(net, 3, key)
    # A query at a masked position is asked of what it holds: with nan, of zeros.
    assert_close(hole, zero)


@pytest.mark.parametrize("lean", [False, True], ids=["plain", "lean"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_who_sees_nobody_answers_zero(causal, lean, key):
    """All of the first example; of the second, if causal, the first two, which are padded."""
    mask = np.array([[0] * T, [0, 0, 1, 1, 1, 1, 1]], bool)
    layer = bp.dot_product_attention(H, causal=causal, mask=mask, lean=lean)
    y, dx = map(np.asarray, run(layer, *inputs_for(key)))
    assert np.isfinite(y).all()
    assert np.isfinite(dx).all()
    assert not y[0].any()
    assert not dx[0].any()
    assert y[1, :2].any() == (not causal)
    assert dx[1, :2].any() == (not causal)
    assert y[1, 2:].all()


def test_causal_outputs_do_not_see_what_comes_later(key):
    layer = bp.dot_product_attention(H, causal=True)
    x, _ = inputs_for(key)
    y, _ = layer.forward((), x)
    moved, _ = layer.forward((), x.at[:, 4].add(1))
    changed = np.asarray(moved != y).any(axis=(0, 2))
    assert changed.tolist() == [False] * 4 + [True] * 3


@pytest.mark.parametrize("lean", [False, True], ids=["plain", "lean"])
def test_large_scores_do_not_overflow(lean, key):
    layer = bp.dot_product_attention(H, causal=True, lean=lean)
    x, dy = inputs_for(key)
    y, dx = run(layer, x.at[..., : 2 * H * D].mul(1e3), dy)
    assert bool(jnp.all(jnp.isfinite(y)) & jnp.all(jnp.isfinite(dx)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, late(jnp.float16)])
@pytest.mark.parametrize("lean", [False, True], ids=["plain", "lean"])
def test_sums_of_16_bits_are_in_32(lean, dtype, monkeypatch):
    """Of 4096 equal numbers; one by one, a sum in bfloat16 ends at 256 of them."""
    monkeypatch.setattr(dot_product, "LEAN_ROWS", 1024)
    layer = bp.dot_product_attention(1, lean=lean)
    x = jnp.concatenate([jnp.zeros((1, 4096, 2)), jnp.ones((1, 4096, 1))], axis=-1).astype(dtype)
    y, dx = run(layer, x, jnp.ones((1, 4096, 1), dtype))
    np.testing.assert_allclose(np.float32(y), 1, rtol=1e-2)
    np.testing.assert_allclose(np.float32(dx[..., 2]), 1, rtol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, late(jnp.float16)])
@pytest.mark.parametrize("lean", [False, True], ids=["plain", "lean"])
def test_16_bits_are_close_to_32(lean, dtype, key):
    layer = bp.dot_product_attention(
        H, kv_heads=2, causal=True, mask=PADDED, rotary=True, lean=lean
    )
    x, dy = inputs_for(key, 2, dtype=jnp.float32)
    x, dy = x.astype(dtype), dy.astype(dtype)
    want = run(layer, x.astype(jnp.float32), dy.astype(jnp.float32))
    got = run(layer, x, dy)
    assert all(array.dtype == dtype for array in got)
    assert_close(got, jax.tree.map(lambda array: array.astype(dtype), want))


def test_rotary_is_a_product_of_complex_numbers(key):
    layer = bp.rotary(3, base=100.0)
    x = normal(key, (2, 5, 3 * 6))
    y, _ = layer.forward((), x)
    for n in range(2):
        for h in range(3):
            head = np.s_[n, :, 6 * h : 6 * h + 6]
            assert_close(y[head], jnp.asarray(turned(np.asarray(x)[head], 100.0)))


def test_rotary_is_undone_on_the_way_back(key):
    layer = bp.rotary(2)
    _, shape = layer.init(key, (9, 8))
    x = normal(key, (3, *shape))
    y, cache = layer.forward((), x)
    assert_close(layer.backward((), cache, y)[0], x)
    assert_close(jnp.linalg.norm(y), jnp.linalg.norm(x))
    assert float(jnp.max(jnp.abs(y - x)[:, 1:])) > 0.1


def test_turned_products_depend_on_the_distance_alone(key):
    """The same query and the same key at every position."""
    q, k = normal(key, (2, 8))
    layer = bp.rotary(1)
    (turned_q, turned_k), _ = layer.forward(
        (), jnp.broadcast_to(jnp.stack([q, k])[:, None], (2, 9, 8))
    )
    products = np.asarray(turned_q @ turned_k.T)
    for distance in range(-8, 9):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-12)
    assert np.ptp(products[0]) > 0.1


def test_rotary_within_is_rotary_before(key):
    x, dy = inputs_for(key, 2)
    turn, within = bp.rotary(H + 2), bp.dot_product_attention(H, kv_heads=2, rotary=True)
    before = bp.dot_product_attention(H, kv_heads=2)
    queries_and_keys, values = x[..., : (H + 2) * D], x[..., (H + 2) * D :]
    turned_x, cache = turn.forward((), queries_and_keys)
    y, dx = run(before, jnp.concatenate([turned_x, values], axis=-1), dy)
    dx_turned, _ = turn.backward((), cache, dx[..., : (H + 2) * D])
    want = y, jnp.concatenate([dx_turned, dx[..., (H + 2) * D :]], axis=-1)
    assert_close(run(within, x, dy), want)


def test_attention_is_a_chain_of_three(key):
    layer = bp.attention(12, 6, kv_heads=2, causal=True, rotary=True)
    parts = (
        bp.dense(20),
        bp.dot_product_attention(6, kv_heads=2, causal=True, rotary=True),
        bp.dense(12),
    )
    assert layer.name == "attention(12, 6)"
    params, out_shape = layer.init(key, (5, 8))
    want, _ = bp.chain(*parts).init(key, (5, 8))
    assert_close(params, want)
    assert out_shape == (5, 12)
    x, dy = normal(key, (2, 5, 8)), normal(key, (2, 5, 12))
    y, cache = layer.forward(params, x)
    want_y, want_cache = bp.chain(*parts).forward(params, x)
    assert_close(y, want_y)
    assert_close(
        layer.backward(params, cache, dy), bp.chain(*parts).backward(params, want_cache, dy)
    )


def test_attention_makes_both_of_its_dense_layers_alike(key):
    layer = bp.attention(
        4, 2, use_bias=False, dtype=jnp.float32, weight_init=jax.nn.initializers.ones
    )
    params, _ = layer.init(key, (3, 5))
    want = {"weight": jnp.ones((5, 12), jnp.float32)}, (), {"weight": jnp.ones((4, 4), jnp.float32)}
    assert_close(params, want)


def temporary_bytes(function, t):
    x, dy = inputs_for(jax.random.key(0), t=t, dtype=jnp.float32)
    compiled = jax.jit(function).lower(x, dy).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_lean_form_never_holds_all_probabilities(monkeypatch):
    monkeypatch.setattr(dot_product, "LEAN_ROWS", 64)
    t = 2048
    all_of_them = N * H * t * t * 4
    plain, lean = (bp.dot_product_attention(H, causal=True, lean=lean) for lean in (False, True))
    bytes_of_plain, bytes_of_lean = (
        temporary_bytes(functools.partial(outputs_and_derivative, layer), t)
        for layer in (plain, lean)
    )
    assert bytes_of_lean < bytes_of_plain / 5
    assert bytes_of_lean < all_of_them / 5
    outputs_only = temporary_bytes(lambda x, dy: lean.forward((), x)[0], t)
    assert outputs_only < all_of_them / 10
    x, _ = inputs_for(jax.random.key(0), t=t)
    kept = jax.tree.leaves(jax.eval_shape(lean.forward, (), x)[1])
    assert sum(leaf.size for leaf in kept) == N * H * t * (3 * D + 1)


def test_outputs_alone_keep_no_probabilities(monkeypatch):
    """Of the plain form, a band at a time."""
    layer = bp.dot_product_attention(H)
    t = 512
    both = temporary_bytes(functools.partial(outputs_and_derivative, layer), t)
    assert temporary_bytes(lambda x, dy: layer.forward((), x)[0], t) < both


KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bp.rotary(0), ValueError, "rotary: heads is 0; it takes a positive integer"),
        (lambda: bp.rotary(2, base=0.0), ValueError, "rotary: base is 0.0; it takes a positive"),
        (
            lambda: bp.rotary(2).init(KEY, (5, 6)),
            bp.LayerError,
            r"rotary\(2\) got inputs of shape \[N, 5, 6\], so that d = 3; pairs take an even",
        ),
        (
            lambda: bp.rotary(4).init(KEY, (5, 6)),
            bp.LayerError,
            r"rotary\(4\) got inputs of shape \[N, 5, 6\]; it takes \[N, T, H d\], a last axis",
        ),
        (
            lambda: bp.rotary(2).forward((), jnp.ones((5, 8))),
            bp.LayerError,
            r"rotary\(2\) got inputs of shape \[N, 8\]; it takes \[N, T, H d\], with one axis of",
        ),
        (
            lambda: bp.rotary(1).backward((), jnp.ones((0, 2, 3, 2)), jnp.ones((2, 3, 4))),
            bp.LayerError,
            r"rotary\(1\) got a dy of shape \[2, 3, 4\]; its outputs are \[2, 3, 2\]",
        ),
        (
            lambda: bp.dot_product_attention(0),
            ValueError,
            "dot_product_attention: heads is 0; it takes a positive integer",
        ),
        (
            lambda: bp.dot_product_attention(4, kv_heads=3),
            ValueError,
            "dot_product_attention: kv_heads is 3, which does not divide 4 heads",
        ),
        (
            lambda: bp.dot_product_attention(2, kv_heads=True),
            ValueError,
            "kv_heads is True; it takes a positive integer",
        ),
        (
            lambda: bp.dot_product_attention(2, mask=[True]),
            ValueError,
            r"mask is of type list and shape \[1\]; it takes an array of booleans, \[T\] or",
        ),
        (
            lambda: bp.dot_product_attention(2, mask=np.ones((2, 3, 3), bool)),
            ValueError,
            r"mask is of type bool and shape \[2, 3, 3\]; it takes",
        ),
        (
            lambda: bp.dot_product_attention(2, mask=np.ones(3)),
            ValueError,
            r"mask is of type float64 and shape \[3\]; it takes an array of booleans",
        ),
        (
            lambda: bp.dot_product_attention(2).init(KEY, (12,)),
            bp.LayerError,
            r"\(2\) got inputs of shape \[N, 12\]; it takes \[N, T, \(H \+ 2 G\) d\], with one",
        ),
        (
            lambda: bp.dot_product_attention(2).init(KEY, (4, 3, 12)),
            bp.LayerError,
            r"got inputs of shape \[N, 4, 3, 12\]; it takes \[N, T, .*with one axis of positions",
        ),
        (
            lambda: bp.dot_product_attention(2, kv_heads=1).init(KEY, (3, 6)),
            bp.LayerError,
            r"got inputs of shape \[N, 3, 6\]; it takes .*, a last axis that is a multiple of 4",
        ),
        (
            lambda: bp.dot_product_attention(1, rotary=True).init(KEY, (3, 9)),
            bp.LayerError,
            r"got inputs of shape \[N, 3, 9\], so that d = 3; pairs take an even d",
        ),
        (
            lambda: bp.dot_product_attention(1, mask=np.ones(4, bool)).init(KEY, (3, 6)),
            bp.LayerError,
            r"has a mask of shape \[4\]; inputs of shape \[N, 3, 6\] take \[3\] or \[N, 3\]",
        ),
        (
            lambda: bp.dot_product_attention(1, mask=np.ones((2, 3), bool)).forward(
                (), jnp.ones((5, 3, 6))
            ),
            bp.LayerError,
            r"has a mask of shape \[2, 3\]; inputs of shape \[5, 3, 6\] take \[3\] or \[5, 3\]",
        ),
        (
            lambda: bp.dot_product_attention(1).forward((), jnp.ones((5, 3, 6), int)),
            bp.LayerError,
            "got inputs of dtype int64; it takes floating-point numbers",
        ),
        (
            lambda: bp.dot_product_attention(1).backward(
                (),
                bp.dot_product_attention(1).forward((), jnp.ones((5, 3, 6)))[1],
                jnp.ones((5, 3, 1)),
            ),
            bp.LayerError,
            r"got a dy of shape \[5, 3, 1\]; its outputs are \[5, 3, 2\]",
        ),
        (
            lambda: bp.attention(6, 4),
            ValueError,
            "attention: features is 6, not a multiple of 4 heads",
        ),
        (
            lambda: bp.attention(8, 4, kv_heads=3),
            ValueError,
            "attention: kv_heads is 3, which does not divide 4 heads",
        ),
        (
            lambda: bp.attention(8, 4).init(KEY, (8,)),
            bp.LayerError,
            r"^chain: part 2 \(dot_product_attention\(4\)\) got inputs of shape \[N, 24\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
