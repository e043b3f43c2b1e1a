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


def test_second_moment_is_the_mean_of_squares(signal):
    assert_close(jax.jit(bp.second_moment)(signal), jnp.mean(signal_gradients(signal) ** 2, axis=0))


def test_variance_is_that_over_the_examples(signal):
    assert_close(jax.jit(bp.variance)(signal), jnp.var(signal_gradients(signal), axis=0))


def test_diagonal_sums_the_squares(signal):
    assert_close(jax.jit(bp.diagonal)(signal), jnp.sum(signal_gradients(signal) ** 2, axis=0))


def test_per_example_diagonal_is_of_the_squares(signal):
    assert_close(jax.jit(bp.per_example_diagonal)(signal), signal_gradients(signal) ** 2)


def columns_of(signal):
    """K columns of deltas, of which one is zero."""
    rng = np.random.default_rng(5)
    return jax.tree.map(
        lambda d: jnp.asarray(rng.normal(size=(K, *d.shape))).at[1].set(0), deltas_of(signal)
    )


def each_column(read, signal, columns):
    """What is read for each column by itself."""
    return [
        read(with_deltas(signal, jax.tree.map(lambda column, k=k: column[k], columns)))
        for k in range(K)
    ]


@functools.partial(jax.jit, static_argnums=0)
def read_columns(reading, signal, columns):
    return jax.vmap(
        lambda deltas: reading(with_deltas(signal, deltas), columns="k"),
        axis_name="k",
        out_axes=None,
    )(columns)


@pytest.mark.parametrize("name", ["diagonal", "per_example_diagonal"])
def test_columns_are_summed(name, signal):
    columns, read = columns_of(signal), jax.jit(SUMMED[name])
    each = each_column(read, signal, columns)
    assert_close(read_columns(SUMMED[name], signal, columns), sum(each))


@pytest.mark.parametrize("name", [name for name in SUMMED if "kronecker" in name])
def test_columns_are_summed_in_the_factor_of_the_deltas_alone(name, signal):
    columns, read = columns_of(signal), jax.jit(SUMMED[name])
    each = each_column(read, signal, columns)
    got = read_columns(SUMMED[name], signal, columns)
    if each[0] == ():
        assert got == ()
        return
    if isinstance(signal, bp.Through):
        assert got.back == signal.back
        got, each = got.signal, [factors.signal for factors in each]
    assert_close(got, bp.Kronecker(each[0].inputs, sum(factors.deltas for factors in each)))


def factors_by_loops(inputs, deltas, shared):
    """A and G by their definitions: inputs [N, T, I] and deltas [N, T, O]."""
    n, t, _ = inputs.shape
    if shared == "reduce":
        inputs, deltas, t = inputs.mean(1, keepdims=True), deltas.sum(1, keepdims=True), 1
    a = sum(np.outer(x, x) for x in inputs.reshape(n * t, -1)) / (n * t)
    g = sum(np.outer(d, d) for d in deltas.reshape(n * t, -1)) / n
    return bp.Kronecker(jnp.asarray(a), jnp.asarray(g))


@pytest.mark.parametrize("shared", ["expand", "reduce"])
@pytest.mark.parametrize("bias", ["folded", "apart"])
def test_kronecker_factors_are_second_moments_of_inputs_and_deltas(signal, bias, shared):
    got = jax.jit(functools.partial(bp.kronecker, bias=bias, shared=shared))(signal)
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
        want = jax.tree.map(lambda *a: jnp.stack(a), *each) if len(each) > 1 else each[0]
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
        got = {
            "diagonal": bp.diagonal(signal),
            "variance": bp.variance(signal),
            "diagonal of columns": read_columns(bp.diagonal, signal, columns),
            "of each example": read_columns(bp.per_example_diagonal, signal, columns),
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
