"""Attention's options: who sees whom by masks and windows, and what changes the scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close

import jaxbp as bp
from jaxbp.layers import dot_product

N, T, S, H, G, D, U = 2, 3, 5, 4, 2, 2, 3
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that the lean form has several blocks of rows, and the last one is not full."""
    monkeypatch.setattr(dot_product, "LEAN_ROWS", 3)


def booleans(*shape):
    return RNG.random(shape) < 0.7


OPTIONS = {
    "nothing": {},
    "mask": {"mask": booleans(N, S)},
    "pair_mask": {"pair_mask": booleans(T, S)},
    "pair_mask of each example": {"pair_mask": booleans(N, 1, T, S)},
    "pair_mask of each head": {"pair_mask": booleans(1, H, T, S), "mask": booleans(S)},
    "bias": {"bias": 900 * RNG.normal(size=(T, S))},
    "bias of each head": {"bias": RNG.normal(size=(1, H, T, S)), "causal": True},
    "bias of each head and example": {"bias": RNG.normal(size=(N, H, T, S))},
    "bias of minus infinity": {"bias": np.where(booleans(T, S), 0.0, -np.inf)},
    "window": {"window": 2},
    "causal window": {"window": 2, "causal": True},
    "scale": {"scale": 3.0},
    "soft_cap": {"soft_cap": 0.5, "bias": RNG.normal(size=(T, S)), "pair_mask": booleans(T, S)},
}


def slowly(inputs, *, mask=True, pair_mask=True, bias=0.0, causal=False, window=None, **scoring):
    """Attention with all pairs in one array, [N, H, T, S]."""
    q, k, v = (x.reshape(*x.shape[:2], h, -1) for x, h in zip(inputs, (H, G, G), strict=True))
    k, v = (jnp.repeat(x, H // G, axis=2) for x in (k, v))
    t, s = np.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], np.arange(k.shape[1])
    see = np.ones((N, H, len(t), len(s)), bool) & pair_mask
    see &= np.broadcast_to(mask, (N, len(s)))[:, None, None]
    see &= s <= t if causal else True
    see &= abs(t - s) < (window or np.inf)
    e = jnp.einsum("nthd,nshd->nhts", q, k) * scoring.get("scale", q.shape[-1] ** -0.5)
    if "soft_cap" in scoring:
        e = scoring["soft_cap"] * jnp.tanh(e / scoring["soft_cap"])
    e = jnp.where(see, e + bias, -1e30)
    top = jnp.max(e, axis=-1, keepdims=True)
    weights = jnp.where(see & np.isfinite(bias), jnp.exp(e - jax.lax.stop_gradient(top)), 0)
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


def make(lean=False, **options):
    return bp.dot_product_attention(H, kv_heads=G, lean=lean, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_by_its_formula(options, key):
    inputs, dy = apart(key)
    want, pullback = jax.vjp(lambda *inputs: slowly(inputs, **options), *inputs)
    for lean in (False, True):
        assert_close(sweep(make(lean, **options), inputs, dy), (want, pullback(dy)))
