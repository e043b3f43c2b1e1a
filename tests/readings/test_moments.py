"""Second moments: for every kind of signal, each quantity against gradients formed by loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SIGNALS, N
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    assert_close,
    convolution_operands,
    deltas_of,
    in_dtype,
    is_float,
    map_operands,
    signal_gradients,
    with_deltas,
)

import jaxbp as bp

K = 4
SUMMED = {
    "diagonal": bp.diagonal,
    "per_example_diagonal": bp.per_example_diagonal,
    "kronecker": bp.kronecker,
    "kronecker, reduced and apart": functools.partial(bp.kronecker, bias="apart", shared="reduce"),
}


@jax.jit
def moments(signal):
    """Every second moment, in one program."""
    return {
        "second_moment": bp.second_moment(signal),
        "variance": bp.variance(signal),
        "diagonal": bp.diagonal(signal),
        "per_example_diagonal": bp.per_example_diagonal(signal),
    }


def test_moments_are_those_of_the_gradients_of_the_examples(signal):
    grads = np.asarray(signal_gradients(signal))
    want = {
        "second_moment": np.mean(grads**2, axis=0),
        "variance": np.var(grads, axis=0),
        "diagonal": np.sum(grads**2, axis=0),
        "per_example_diagonal": grads**2,
    }
    got = moments(signal)
    for name, moment in want.items():
        assert_close(got[name], moment)


def columns_of(signal):
    """K columns of deltas, of which one is zero."""
    rng, factor = np.random.default_rng(5), np.array([1, 0, 1, 1])
    return jax.tree.map(
        lambda d: np.einsum("k,k...->k...", factor, rng.normal(size=(K, *d.shape))),
        deltas_of(signal),
    )


def each_column(signal, columns):
    """What is read for each column by itself."""
    return [
        read_one(signal, jax.tree.map(lambda column, k=k: column[k], columns)) for k in range(K)
    ]


@jax.jit
def read_one(signal, deltas):
    return {name: read(with_deltas(signal, deltas)) for name, read in SUMMED.items()}


@jax.jit
def read_columns(signal, columns):
    def read_summed(deltas):
        own = with_deltas(signal, deltas)
        return {name: read(own, columns="k") for name, read in SUMMED.items()}

    return jax.vmap(read_summed, axis_name="k", out_axes=None)(columns)


def test_columns_are_summed(signal):
    columns = columns_of(signal)
    got, each = read_columns(signal, columns), each_column(signal, columns)
    for name in ("diagonal", "per_example_diagonal"):
        assert_close(got[name], sum(np.asarray(own[name]) for own in each))


@pytest.mark.parametrize("name", [name for name in SUMMED if "kronecker" in name])
def test_columns_are_summed_in_the_factor_of_the_deltas_alone(name, signal):
    columns = columns_of(signal)
    each = [own[name] for own in each_column(signal, columns)]
    got = read_columns(signal, columns)[name]
    if each[0] == ():
        assert got == ()
        return
    if isinstance(signal, bp.Through):
        assert got.back == signal.back
        got, each = got.signal, [factors.signal for factors in each]
    deltas = sum(np.asarray(factors.deltas) for factors in each)
    assert_close(got, bp.Kronecker(each[0].inputs, deltas))


def factors_by_loops(inputs, deltas, shared):
    """A and G by their definitions: inputs [N, T, I] and deltas [N, T, O]."""
    n, t, _ = inputs.shape
    if shared == "reduce":
        inputs, deltas, t = inputs.mean(1, keepdims=True), deltas.sum(1, keepdims=True), 1
    a = sum(np.outer(x, x) for x in inputs.reshape(n * t, -1)) / (n * t)
    g = sum(np.outer(d, d) for d in deltas.reshape(n * t, -1)) / n
    return bp.Kronecker(jnp.asarray(a), jnp.asarray(g))


WAYS = [(bias, shared) for bias in ("folded", "apart") for shared in ("expand", "reduce")]


@jax.jit
def factors_in_every_way(signal):
    return {way: bp.kronecker(signal, bias=way[0], shared=way[1]) for way in WAYS}


@pytest.mark.parametrize(("bias", "shared"), WAYS)
def test_kronecker_factors_are_second_moments_of_inputs_and_deltas(signal, bias, shared):
    got = factors_in_every_way(signal)[bias, shared]
    if isinstance(signal, bp.Through) and signal.back.moves:
        back, signal = signal.back, signal.signal
        if got != ():
            assert got.back == back
            got = got.signal
    if not isinstance(signal, bp.Outer | bp.Conv | bp.Bias) or (
        isinstance(signal, bp.Bias) and bias == "folded"
    ):
        assert got == ()
        return
    if isinstance(signal, bp.Conv):
        each = [
            factors_by_loops(with_ones(x) if bias == "folded" else x, d, shared)
            for x, d in convolution_operands(signal)
        ]
        # One pair for each group.
        want = jax.tree.map(lambda *a: np.stack(a), *each) if len(each) > 1 else each[0]
        assert_close(got, want)
        return
    deltas = np.asarray(signal.deltas).reshape(N, -1, signal.deltas.shape[-1])
    if isinstance(signal, bp.Bias):
        inputs = np.ones((*deltas.shape[:2], 1))
    else:
        inputs = np.asarray(signal.inputs).reshape(N, -1, signal.inputs.shape[-1])
        inputs = with_ones(inputs) if bias == "folded" else inputs
    assert_close(got, factors_by_loops(inputs, deltas, shared))


def with_ones(inputs):
    return np.concatenate([inputs, np.ones((*inputs.shape[:2], 1))], axis=-1)


def test_the_two_ways_to_share_are_not_the_same_with_positions_and_are_without():
    rng = np.random.default_rng(3)
    for positions, same in (((), True), ((3,), False)):
        signal = SIGNALS["Outer"](rng, *positions)
        expand, reduce = (bp.kronecker(signal, shared=s) for s in ("expand", "reduce"))
        assert np.allclose(expand.deltas, reduce.deltas) == same


def test_a_variance_of_nothing_is_not_negative():
    """Examples that are all alike: rounding would leave some entries below zero."""
    rng = np.random.default_rng(0)
    x, d = (np.tile(rng.normal(size=(1, size)), (50, 1)) for size in (30, 20))
    signal = bp.Outer(jnp.asarray(x, jnp.float32), jnp.asarray(d, jnp.float32))
    rest = bp.second_moment(signal) - bp.mean(signal) ** 2
    assert float(rest.min()) < 0
    assert float(bp.variance(signal).min()) >= 0


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "reading", [bp.second_moment, bp.variance, bp.diagonal, bp.per_example_diagonal, bp.kronecker]
)
def test_16_bits_are_accumulated_in_32(signal, reading, dtype):
    reading, short = jax.jit(reading), in_dtype(signal, dtype)
    wide = in_dtype(short, jnp.float32)
    assert_close(reading(short), reading(wide))
    # Squares of 300 overflow float16.
    big = map_operands(lambda a: jnp.full_like(a, 300) if is_float(a) else a, short)
    assert all(bool(jnp.all(jnp.isfinite(a))) for a in jax.tree.leaves(reading(big)))


OUTER = bp.Outer(jnp.ones((3, 2)), jnp.ones((3, 4)))


@pytest.mark.parametrize("signal", [OUTER, bp.Bias(jnp.ones((3, 4)))], ids=["Outer", "Bias"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "fold"}, r"kronecker: bias is 'fold'; it takes 'folded' or 'apart'"),
        ({"shared": "sum"}, r"kronecker: shared is 'sum'; it takes 'expand' or 'reduce'"),
    ],
)
def test_what_is_wrong_is_said(signal, options, message):
    with pytest.raises(ValueError, match=message):
        bp.kronecker(signal, **options)


size = st.integers(1, 4)


@pytest.mark.thorough
@given(n=size, t=st.one_of(st.none(), size), i=size, o=size, k=size, data=st.integers(0, 9))
@settings(max_examples=4, deadline=None)
def test_sizes_of_one_are_no_exception(n, t, i, o, k, data):
    """Where an axis could be dropped, taken for another, or broadcast in silence."""
    rng = np.random.default_rng(data)
    lead = (n,) if t is None else (n, t)
    columns = jnp.asarray(rng.normal(size=(k, *lead, o)))
    for signal in (
        bp.Outer(jnp.asarray(rng.normal(size=(*lead, i))), columns[0]),
        bp.Bias(columns[0]),
    ):
        g = jnp.stack([signal_gradients(signal._replace(deltas=column)) for column in columns])
        rows, direction = g[0].reshape(n, -1), jnp.asarray(rng.normal(size=g.shape[2:]))
        of_columns = read_columns(signal, columns)
        got = {
            "diagonal": bp.diagonal(signal),
            "variance": bp.variance(signal),
            "diagonal of columns": of_columns["diagonal"],
            "of each example": of_columns["per_example_diagonal"],
            "gram": bp.gram(signal),
            "along": bp.directional_derivatives(signal, direction),
        }
        want = {
            "diagonal": jnp.sum(g[0] ** 2, axis=0),
            "variance": jnp.var(g[0], axis=0),
            "diagonal of columns": jnp.sum(g**2, axis=(0, 1)),
            "of each example": jnp.sum(g**2, axis=0),
            "gram": rows @ rows.T,
            "along": rows @ direction.ravel(),
        }
        assert_close(got, want)
