"""Readings: for every kind of signal, each quantity against gradients formed by loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import READINGS, SIGNALS, N
from oracles import assert_close, in_dtype, is_float, map_operands, signal_gradients

import jaxbp as bp
from jaxbp.readings import costs, norms

WEIGHTS = np.array([0.5, 0.0, 2.0])


def test_per_example_is_the_gradient_of_each_example(signal):
    assert_close(jax.jit(bp.per_example)(signal), signal_gradients(signal))


def test_total_sums_over_the_examples(signal):
    assert_close(jax.jit(bp.total)(signal), signal_gradients(signal).sum(0))


def test_total_sums_with_weights(signal):
    want = np.einsum("n,n...->...", WEIGHTS, signal_gradients(signal))
    assert_close(bp.total(signal, weights=WEIGHTS), jnp.asarray(want))


def test_mean_is_the_mean_of_per_example(signal):
    assert_close(jax.jit(bp.mean)(signal), signal_gradients(signal).mean(0))


def test_mean_with_weights_divides_by_their_sum(signal):
    want = np.einsum("n,n...->...", WEIGHTS / 2.5, signal_gradients(signal))
    assert_close(bp.mean(signal, weights=WEIGHTS), jnp.asarray(want))


def test_mean_with_no_weight_at_all_is_zero(signal):
    assert_close(
        bp.mean(signal, weights=np.zeros(N)), jnp.zeros(signal_gradients(signal).shape[1:])
    )


def test_sq_norms_are_those_of_per_example(signal):
    got = jax.jit(bp.sq_norms)(signal)
    want = jnp.asarray([np.sum(np.square(g)) for g in signal_gradients(signal)])
    assert_close(got, want)


def test_keep_keeps(signal):
    assert bp.keep(signal) is signal


@pytest.mark.parametrize("t", [2, 3, 40])
def test_gram_and_gradient_give_the_same_norms_each_by_its_own_way(t, monkeypatch):
    rng = np.random.default_rng(3)
    signal = SIGNALS["Outer"](rng, t)
    answers = {}
    for gram in (True, False):
        monkeypatch.setattr(norms, "gram_is_less_work", lambda *_, gram=gram, **__: gram)
        answers[gram] = jax.jit(lambda s: bp.sq_norms(s))(signal)
    assert_close(answers[True], answers[False])
    # Equal, but not to the bit: the other way was really taken.
    assert not np.array_equal(answers[True], answers[False])


def test_the_cheaper_way_has_fewer_flop(monkeypatch):
    """At the crossover of the documented rule the compiled cost crosses too."""

    def flop(gram, t):
        monkeypatch.setattr(norms, "gram_is_less_work", lambda *_, **__: gram)
        shapes = bp.Outer(jnp.zeros((8, t, 64)), jnp.zeros((8, t, 32)))
        return jax.jit(lambda s: bp.sq_norms(s)).lower(shapes).compile().cost_analysis()["flops"]

    rule = costs.gram_is_less_work
    for t in (4, 12, 40, 100):
        cheaper = flop(True, t) < flop(False, t)
        monkeypatch.undo()
        assert rule(64, 32, pairs=t * t, rows=t, products=1) == cheaper


def test_norms_that_cancel_are_not_negative():
    """Gram matrices can round a zero to below zero, of which the root would not be a number."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(200, 1, 100)), 3, axis=1)
    d = rng.normal(size=(200, 3, 90))
    d[:, 2] = -d[:, 0] - d[:, 1]
    signal = bp.Outer(*(jnp.asarray(a, jnp.float32) for a in (x, d)))
    assert costs.gram_is_less_work(100, 90, pairs=9, rows=3, products=1)
    grams = jnp.einsum("nsi,nti,nso,nto->n", signal.inputs, signal.inputs, *[signal.deltas] * 2)
    assert float(jnp.min(grams)) < 0
    assert float(jnp.min(bp.sq_norms(signal))) >= 0


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("positions", [(), (3,), (300,)])
@pytest.mark.parametrize("kind", SIGNALS)
def test_norms_of_16_bits_are_accumulated_in_32(dtype, positions, kind):
    exact = SIGNALS[kind](np.random.default_rng(3), *positions)
    signal = in_dtype(exact, dtype)
    sq_norms = jax.jit(bp.sq_norms)
    got = sq_norms(signal)
    widened = in_dtype(signal, jnp.float32)
    assert got.dtype == jnp.float32
    assert_close(got, sq_norms(widened))
    # 300 squares of 300 would overflow float16.
    big = map_operands(lambda a: jnp.full_like(a, 300) if is_float(a) else a, signal)
    assert bool(jnp.all(jnp.isfinite(sq_norms(big))))


def test_example_norms_join_all_parameters():
    tree = {"weight": jnp.array([9.0, 0.0, 0.0]), "rest": (jnp.array([16.0, 4.0, 0.0]), ())}
    assert_close(bp.example_norms(tree), jnp.array([5.0, 2.0, 0.0]))


SIGNAL = bp.Outer(jnp.ones((3, 2)), jnp.ones((3, 4)))
KINDS = "Outer, Bias, Scale, Lookup, Conv, Through, Sum, or a record with a method per_example"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        *(
            (
                lambda reading=reading: reading((SIGNAL, SIGNAL)),
                TypeError,
                rf"{name}: takes the signal of .* \({KINDS}\); got tuple",
            )
            for name, reading in READINGS.items()
            if name not in ("keep", "gram")
        ),
        (
            lambda: bp.total(SIGNAL, weights=jnp.ones(4)),
            ValueError,
            r"weights has shape \[4\], expected \[3\]: one for each example",
        ),
        (
            lambda: bp.mean(SIGNAL, weights=jnp.ones((3, 1))),
            ValueError,
            r"shape \[3, 1\], expected",
        ),
        (lambda: bp.example_norms(()), ValueError, r"example_norms: .*; it got no leaves"),
        (
            lambda: bp.example_norms([jnp.ones(3), jnp.ones(4)]),
            ValueError,
            r"all of shape \[N\].*it got \[3\], \[4\]",
        ),
        (lambda: bp.example_norms([jnp.ones((3, 4))]), ValueError, r"it got \[3, 4\]"),
    ],
)
def test_what_is_wrong_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()
