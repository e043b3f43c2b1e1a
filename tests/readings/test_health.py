"""Summaries of inputs, deltas and gradients, and the search for the first bad value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import SIGNALS
from oracles import assert_close, operands_of, with_operands

import jaxbp as bp


def numbers(x, *, of_examples=True):
    """The summary of an array, by NumPy."""
    x = np.asarray(x, float)
    bad = ~np.isfinite(x)
    rows = np.flatnonzero(bad.reshape(len(x), -1).any(axis=1)) if of_examples else ()
    with np.errstate(invalid="ignore"):
        rms = np.sqrt(np.mean(x**2))
    example = (int(rows[0]) if len(rows) else -1) if of_examples else None
    return bp.Summary(np.array([rms, np.max(np.abs(x)), np.mean(x == 0), np.mean(bad)]), example)


def expected(signal):
    """What `health` says of the operands of a signal, by NumPy."""
    if isinstance(signal, bp.Through):
        return expected(signal.signal)
    if isinstance(signal, bp.Sum):
        return tuple(zip(*map(expected, signal.signals), strict=True))
    operands = (getattr(signal, name, None) for name in ("inputs", "deltas"))
    return tuple(None if x is None else numbers(x) for x in operands)


def with_bad_values(signal):
    """Example 0 has zeros; in the deltas example 1 has a nan, in the inputs example 2 an inf."""
    deltas, inputs = operands_of(signal)

    def put(array, example, value):
        return array.at[0].set(0).at[(example, *[0] * (array.ndim - 1))].set(value)

    return with_operands(
        signal,
        (
            jax.tree.map(lambda d: put(d, 1, jnp.nan), deltas),
            jax.tree.map(lambda x: put(x, 2, -jnp.inf), inputs),
        ),
    )


def assert_says(got, want):
    """Equal records, where what is not a number is equal to itself."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), got, want)


@pytest.mark.parametrize("kind", SIGNALS)
def test_every_kind_is_described_as_numpy_describes_its_arrays(kind):
    fine = SIGNALS[kind](np.random.default_rng(3), 2, 3)
    both = fine, with_bad_values(fine)
    got = jax.jit(lambda *signals: [(bp.health(s), bp.mean(s)) for s in signals])(*both)
    for (found, mean), signal in zip(got, both, strict=True):
        assert_says((found.inputs, found.deltas), expected(signal))
        assert_says(found.gradient, numbers(mean, of_examples=False))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(jnp.float16, 300), (jnp.bfloat16, 3e30), (jnp.float32, 3e30), (jnp.float32, 3e-30)],
)
def test_squares_neither_overflow_nor_vanish(dtype, size):
    deltas = jnp.full((5, 40), size, dtype).at[:, 20:].set(0)
    found = bp.health(bp.Bias(deltas)).deltas
    assert found.rms.dtype == found.largest.dtype == jnp.float32
    largest = float(deltas[0, 0])
    np.testing.assert_allclose(float(found.largest), largest, rtol=1e-6)
    np.testing.assert_allclose(float(found.rms), largest / np.sqrt(2), rtol=1e-6)
    assert found.zeros == 0.5


def test_entries_too_small_for_full_precision_are_no_zeros():
    smallest = np.finfo(np.float32).smallest_subnormal
    found = bp.health(bp.Bias(jnp.array([[-smallest, 0.0, -0.0, 1.0]], jnp.float32))).deltas
    assert found.zeros == 0.5


def test_the_derivative_of_the_largest_magnitude_is_that_of_the_entries_that_have_it():
    """Entries of an example share it equally, and so do examples."""
    deltas = np.array([[1.0, -4.0, 2.0, 4.0], [3.0, 4.0, -1.0, 0.5]])

    def by_jax(x):
        return jnp.max(jnp.max(jnp.abs(x), axis=1)) + 2 * jnp.sqrt(jnp.mean(x**2))

    def by_health(x):
        found = bp.health(bp.Bias(x)).deltas
        return found.largest + 2 * found.rms + found.zeros + found.non_finite

    for x in (deltas, np.where(deltas == -4, -5, deltas)):
        assert_close(jax.grad(by_health)(x), jax.grad(by_jax)(x))
    assert_close(
        jax.jvp(by_health, (deltas,), (np.ones_like(deltas),)),
        jax.jvp(by_jax, (deltas,), (np.ones_like(deltas),)),
    )


def test_the_mean_of_gradients_near_the_end_of_the_range():
    """The compiler joins 1 / N with the unit of the squares."""
    deltas = jnp.full((3, 4), 1.1e38, jnp.float32)
    np.testing.assert_allclose(float(jax.jit(bp.health)(bp.Bias(deltas)).gradient.rms), 1.1e38)


def root():
    """Its derivative is infinite at 0, and it is not a number below."""
    return bp.elementwise(jnp.sqrt, lambda x: 0.5 / jnp.sqrt(x), name="root")


def test_the_first_bad_value_is_found_under_jit(key):
    """One compiled program for all of these; N is 4."""
    block = bp.chain(bp.dense(2), bp.tanh())
    net = bp.chain(bp.dense(2), root(), bp.stack(block, 3), bp.dense(2))
    params, _ = net.init(key, (2,))
    params[0].update(weight=jnp.eye(2), bias=jnp.zeros(2))
    fine = jnp.ones((4, 2))
    traces = []

    def loss(outputs, targets):  # whose delta alone may be bad
        return jnp.sum(outputs, axis=1), outputs * targets

    @jax.jit
    def search(params, x, targets):
        traces.append(x)
        _, readings = bp.backprop(net, loss, read=bp.health)(params, x, targets)
        return bp.first_bad(readings), readings

    def place(params, x, targets):
        found, readings = search(params, x, targets)
        assert_close(found, bp.first_bad(readings))
        return tuple(map(int, found)), found.place(readings)

    with_nan = jax.tree.map(jnp.asarray, params)
    with_nan[2].layers[0]["bias"] = with_nan[2].layers[0]["bias"].at[1, 0].set(jnp.nan)
    # 0.bias, 0.weight; bias and weight of three layers; 3.bias, 3.weight
    assert place(params, fine, fine) == ((-1, -1, -1), "nowhere: all values are finite")
    assert place(params, fine.at[1, 0].set(jnp.inf), fine) == (
        (1, 0, 1),
        "the forward pass, the inputs of 0.weight, example 1",
    )
    assert place(params, fine.at[2, 1].set(-1), fine) == (
        (3, 0, 2),
        "the forward pass, the inputs of 2.layers.0.weight[0], example 2",
    )
    assert place(with_nan, fine, fine) == (
        (7, 0, 0),
        "the forward pass, the inputs of 2.layers.0.weight[2], example 0",
    )
    assert place(params, fine, fine.at[3, 0].set(jnp.nan)) == (
        (9, 1, 3),
        "the backward pass, the deltas of 3.weight, example 3",
    )
    assert place(params, fine.at[1, 1].set(0), fine) == (
        (1, 1, 1),
        "the backward pass, the deltas of 0.weight, example 1",
    )
    assert len(traces) == 1


def test_a_gradient_that_overflows_is_found_after_both_passes():
    huge = bp.Outer(jnp.full((2, 1), 1e200), jnp.full((2, 1), 1e200))
    readings = {"a": bp.health(bp.Bias(jnp.ones((2, 1)))), "b": bp.health(huge)}
    found = bp.first_bad(readings)
    assert tuple(map(int, found)) == (1, 2, -1)
    assert found.place(readings) == "the mean over the examples of the gradient of b"


def test_the_use_of_a_tied_table_at_the_outputs_stands_last(key):
    net = bp.tied_embedding(5, 2, bp.dense(2), root())
    params, _ = net.init(key, (3,))
    params[0]["weight"] = jnp.ones((5, 2))
    params[1].update(weight=jnp.eye(2), bias=jnp.zeros(2))
    tokens = jnp.zeros((4, 3), int)

    @jax.jit
    def search(params, targets):
        readings = bp.backprop(net, bp.squared_error, read=bp.health)(params, tokens, targets)[1]
        return bp.first_bad(readings), readings

    targets = jnp.zeros((4, 3, 5))
    params[1]["bias"] = jnp.array([-2.0, 0.0])
    found, readings = search(params, targets)  # the root makes a nan
    assert found.place(readings) == "the forward pass, the inputs of 0.weight, example 0"
    params[1]["bias"] = jnp.zeros(2)
    found, readings = search(params, targets.at[2].set(jnp.nan))
    assert found.place(readings) == "the backward pass, the deltas of 0.weight, example 2"
    params[0]["weight"] = jnp.ones((5, 2)).at[0].set(jnp.nan)
    found, readings = search(params, targets)
    assert found.place(readings) == "the forward pass, the inputs of 1.weight, example 0"


@pytest.mark.parametrize(
    ("readings", "message"),
    [
        ((), "first_bad: takes a tree of records as read=health gives; it got no leaves"),
        ([jnp.ones(3)], "first_bad: takes a tree of records .* a leaf of type"),
        (
            jax.tree.map(lambda a: jnp.stack([a, a]), bp.health(bp.Bias(jnp.ones((2, 1))))),
            r"first_bad: got a record with numbers of shape \[2\], expected \[\]",
        ),
    ],
)
def test_other_trees_are_refused(readings, message):
    with pytest.raises(ValueError, match=message):
        bp.first_bad(readings)


@pytest.mark.parametrize("in_batches", [False, True], ids=["arrays", "batches"])
def test_the_record_of_an_epoch_describes_all_of_its_batches(in_batches, key):
    """With a last batch that is smaller; the inputs of the first layer are the data."""
    x = np.random.default_rng(0).normal(size=(10, 3))
    x[:, 1], targets = 0, x[:, :2]
    net = bp.chain(bp.dense(4), bp.relu(), bp.dense(2))
    data = [(x[i : i + 4], targets[i : i + 4]) for i in (0, 4, 8)] if in_batches else (x, targets)
    run = bp.fit(
        *(net, bp.squared_error, optax.sgd(0.0), data),
        key=key,
        epochs=1,
        batch_size=4,
        read={"health": bp.health},
        measures={"mean": lambda *_, **__: jnp.ones(())},
    )
    assert run.records[0]["mean"] == 1
    first = run.records[0]["health"][0]
    assert_says(first["weight"].inputs, numbers(x))
    _, signals = bp.backprop(net, bp.squared_error, read=bp.keep)(run.params, x, targets)
    assert_says(first["bias"].deltas, numbers(signals[0]["bias"].deltas))
    assert bp.first_bad(run.records[0]["health"]).parameter == -1


def test_the_sum_of_summaries_keeps_what_is_bad_and_does_not_overflow():
    def of(x):
        return bp.health(bp.Bias(jnp.asarray(x, jnp.float32))).deltas

    parts = [3e30 * np.ones((3, 2)), np.zeros((1, 2)), np.array([[1.0, 2], [np.inf, 0]])]
    for some in (parts[:2], parts):
        terms = [of(part).times(len(part)) for part in some]
        n = sum(map(len, some))
        got = [
            functools.reduce(bp.Summary.plus, terms).over(n),
            jax.tree.map(lambda *a: jnp.stack(a), *terms).summed().over(n),
        ]
        want = of(np.concatenate(some))._replace(example=got[0].example)
        assert got[0].example == (-1 if len(some) == 2 else 1)
        for summary in got:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), summary, want)
