"""Readings: for every kind of signal, each quantity against gradients formed by loops."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import READINGS, SIGNALS, SIGNALS_AT_POSITIONS, N, every
from oracles import (
    assert_close,
    in_dtype,
    is_float,
    map_operands,
    operands_of,
    signal_gradients,
    with_operands,
)

import jaxbp as bp
from jaxbp.readings import costs, norms
from jaxbp.readings.formed import read_together
from jaxbp.signals.views import View

WEIGHTS = np.array([0.5, 0.0, 2.0])


@jax.jit
def read_alone(signal):
    """What is compared with the gradients of the examples, in one program."""
    return {
        "per_example": bp.per_example(signal),
        "total": bp.total(signal),
        "weighted total": bp.total(signal, weights=WEIGHTS),
        "mean": bp.mean(signal),
        "weighted mean": bp.mean(signal, weights=WEIGHTS),
        "mean of nothing": bp.mean(signal, weights=np.zeros(N)),
        "sq_norms": bp.sq_norms(signal),
    }


def test_readings_are_those_of_the_gradients_of_the_examples(signal):
    grads = np.asarray(signal_gradients(signal))
    want = {
        "per_example": grads,
        "total": grads.sum(0),
        "weighted total": np.einsum("n,n...->...", WEIGHTS, grads),
        "mean": grads.mean(0),
        "weighted mean": np.einsum("n,n...->...", WEIGHTS / 2.5, grads),
        "mean of nothing": np.zeros(grads.shape[1:]),
        "sq_norms": np.sum(grads.reshape(N, -1) ** 2, axis=1),
    }
    got = read_alone(signal)
    for name, answer in want.items():
        assert_close(got[name], answer)


def test_readings_together_are_those_alone(signal, monkeypatch):
    alone = {"total": bp.total, "mean": bp.mean, "sq_norms": bp.sq_norms, "keep": bp.keep}
    want = jax.jit(lambda signal: {name: read(signal) for name, read in alone.items()})(signal)
    monkeypatch.setattr(norms, "forming_is_less_work", lambda *_, **__: True)
    monkeypatch.setattr(norms, "one_by_one_is_less_work", lambda s: s.geometry.groups == 1)
    assert_close(jax.jit(lambda signal: read_together(alone, signal))(signal), want)
    if isinstance(signal, bp.Outer) or (isinstance(signal, bp.Conv) and signal.geometry.groups < 2):
        assert jax.eval_shape(norms.summed_and_measured, signal) is not None


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


def scaled(signal, inputs, deltas):
    """A signal in float32 with its operands multiplied."""
    if isinstance(signal, bp.Through):
        return signal._replace(signal=scaled(signal.signal, inputs, deltas))
    if isinstance(signal, bp.Sum):
        return bp.Sum(tuple(scaled(use, inputs, deltas) for use in signal.signals))
    factors = {"inputs": inputs, "deltas": deltas}
    return signal._replace(
        **{
            name: (getattr(signal, name) * factor).astype(jnp.float32)
            for name, factor in factors.items()
            if hasattr(signal, name)
        }
    )


FAR = [(1e20, 1.0), (1.0, 1e30), (1.0, 1e-23), (1.0, 1e-33), (1e25, 1e-30), (1e-25, 1e35)]


@pytest.mark.parametrize(
    ("kind", "positions"),
    [("Outer", ()), ("Outer", (2,)), ("Outer", (7,)), ("Lookup", (7,))]
    + [(kind, (2, 3)) for kind in SIGNALS if kind not in ("Outer", "Lookup")],
)
def test_norms_whose_squares_are_out_of_range(kind, positions):
    exact = SIGNALS[kind](np.random.default_rng(3), *positions)
    parameter_norms = jax.jit(norms.parameter_norms)
    for inputs, deltas in [(1.0, 1.0), *FAR]:
        signal = scaled(exact, inputs, deltas)
        rows = np.asarray(signal_gradients(in_dtype(signal, float))).reshape(N, -1)
        got = parameter_norms(signal)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, np.linalg.norm(rows, axis=1), rtol=1e-5)


@pytest.mark.parametrize("way", ["gram_is_less_work", "by_place_is_less_work"])
@pytest.mark.parametrize("choice", [True, False])
def test_norms_out_of_range_by_either_way(way, choice, monkeypatch):
    kind = "Outer" if way == "gram_is_less_work" else "Conv"
    monkeypatch.setattr(norms, way, lambda *_, **__: choice)
    exact = SIGNALS[kind](np.random.default_rng(3), 2, 3)
    parameter_norms = jax.jit(lambda signal: norms.parameter_norms(signal))
    for inputs, deltas in FAR:
        signal = scaled(exact, inputs, deltas)
        rows = np.asarray(signal_gradients(in_dtype(signal, float))).reshape(N, -1)
        np.testing.assert_allclose(parameter_norms(signal), np.linalg.norm(rows, axis=1), rtol=1e-5)


def test_norms_of_a_gradient_that_vanishes_in_time():
    """A delta that is large where the input is zero, and tiny where it is not."""
    signal = bp.Outer(
        jnp.zeros((1, 2, 40), jnp.float32).at[0, 0].set(1),
        jnp.ones((1, 2, 40), jnp.float32).at[0, 0].set(1e-30),
    )
    assert costs.gram_is_less_work(40, 40, pairs=4, rows=2, products=1)
    np.testing.assert_allclose(norms.parameter_norms(signal), [40e-30], rtol=1e-5)


def test_norms_join_over_the_range_and_over_stacks():
    tree = (
        {"weight": jnp.array([3e30, 0.0, 3e-30], jnp.float32)},
        bp.Stacked({"weight": jnp.array([[4e30, 0, 0], [0, 0, 4e-30]], jnp.float32)}),
    )
    want = np.array([5e30, 0, 5e-30])
    np.testing.assert_allclose(norms.joint_norms(tree), want, rtol=1e-6)
    by_layer = norms.by_layer(norms.joint_norms, tree)
    np.testing.assert_allclose(by_layer[0], [3e30, 0, 3e-30], rtol=1e-6)
    np.testing.assert_allclose(by_layer[1].layers, [[4e30, 0, 0], [0, 0, 4e-30]], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("positions", [(), (2,), (7,)])
def test_norms_of_what_is_no_number_are_no_number(bad, positions):
    signal = SIGNALS["Outer"](np.random.default_rng(3), *positions)
    got = norms.parameter_norms(signal._replace(deltas=signal.deltas.at[1].set(bad)))
    assert list(np.isfinite(got)) == [True, False, True]


def test_the_bound_of_a_norm_that_cancels_is_the_size_of_the_rounding():
    rng = np.random.default_rng(0)
    x, d = (jnp.asarray(rng.normal(size=(4, 1, size)), jnp.float32) for size in (60, 50))
    signal = bp.Outer(jnp.repeat(x, 2, axis=1), jnp.concatenate([d, -d], axis=1))
    assert costs.gram_is_less_work(60, 50, pairs=4, rows=2, products=1)
    lengths = 2 * np.linalg.norm(x, axis=(1, 2)) * np.linalg.norm(d, axis=(1, 2))
    np.testing.assert_allclose(bp.sq_norms(signal), 2**-23 * lengths**2, rtol=1e-4)


@pytest.mark.parametrize("joined", [False, True], ids=["positions", "uses"])
def test_a_norm_that_cancels_is_not_underestimated(joined):
    """The rounding error is then as large as the norm, for which the bound has to make up."""
    rng, n = np.random.default_rng(0), 500
    x, d = rng.normal(size=(n, 1, 40)), rng.normal(size=(n, 1, 30))
    rest = rng.normal(size=d.shape) * np.geomspace(1e-5, 1e-2, n)[:, None, None]
    if joined:  # a row that is looked up, and a matrix that takes most of it away again
        x = np.zeros_like(x)
        x[:, 0, 3] = rng.normal(size=n)
        signal = bp.Sum(
            (
                bp.Lookup(jnp.full((n, 1), 3), f32(x[:, :, 3:4] * d + rest), jnp.zeros((40, 0))),
                bp.Outer(f32(x), f32(-d)),
            )
        )
    else:
        signal = bp.Outer(
            f32(np.repeat(x, 3, axis=1)), f32(np.concatenate([d, d, rest - 2 * d], 1))
        )
    true = np.sum(np.asarray(bp.per_example(in_dtype(signal, float))) ** 2, axis=(1, 2))
    got = np.asarray(jax.jit(bp.sq_norms)(signal), float)
    assert np.min(got / true) > 0.5


def f32(a):
    return jnp.asarray(a, jnp.float32)


# Each reading as a function of the per-example gradients [N, ...].
BY_DEFINITION = {
    "total": lambda g: jnp.sum(g, axis=0),
    "mean": lambda g: jnp.mean(g, axis=0),
    "sq_norms": lambda g: jnp.sum(g.reshape(len(g), -1) ** 2, axis=1),
    "second_moment": lambda g: jnp.mean(g**2, axis=0),
    "variance": lambda g: jnp.var(g, axis=0),
    "diagonal": lambda g: jnp.sum(g**2, axis=0),
    "per_example_diagonal": lambda g: g**2,
    "gram": lambda g: g.reshape(len(g), -1) @ g.reshape(len(g), -1).T,
}


def with_zeros(signal):
    """An example without an error, and one whose inputs are zero at the first of its positions."""
    deltas, inputs = operands_of(signal)
    deltas = jax.tree.map(lambda d: d.at[0].set(0), deltas)
    inputs = jax.tree.map(lambda x: x.at[(1, *[0] * (x.ndim - 2))].set(0), inputs)
    return with_operands(signal, (deltas, inputs))


SIGNALS_TO_DIFFERENTIATE = {
    f"{kind} at {list(t)}": (kind, t)
    for kind, t in [*SIGNALS_AT_POSITIONS, *[(kind, (2,)) for kind in SIGNALS if "Sum" in kind]]
}


@every("case", SIGNALS_TO_DIFFERENTIATE, soon=["Outer at []", "Outer at [2]", "Sum at [2]"])
def test_the_derivative_of_a_reading_is_that_of_its_definition_also_at_zeros(case):
    kind, positions = case
    signal = with_zeros(SIGNALS[kind](np.random.default_rng(3), *positions))

    def slopes(function):
        def derivative(name, operands):
            def project(operands):
                out = function(name, with_operands(signal, operands))
                return jnp.vdot(out, jnp.cos(jnp.arange(out.size, dtype=float)).reshape(out.shape))

            return jax.grad(project)(operands)

        names = BY_DEFINITION
        return jax.jit(lambda operands: {name: derivative(name, operands) for name in names})(
            operands_of(signal)
        )

    got = slopes(lambda name, signal: READINGS[name](signal))
    assert_close(got, slopes(lambda name, signal: BY_DEFINITION[name](bp.per_example(signal))))


@pytest.mark.parametrize("positions", [(), (2,), (7,)])
def test_the_derivative_of_a_norm_is_zero_where_the_gradient_is(positions):
    signal = with_zeros(SIGNALS["Outer"](np.random.default_rng(3), *positions))

    def gradient(norm):
        return jax.jit(jax.grad(lambda d: jnp.sum(norm(signal._replace(deltas=d)))))(signal.deltas)

    got = [
        gradient(norms.parameter_norms),
        gradient(lambda s: bp.example_norms([bp.sq_norms(s)])),
        gradient(lambda s: norms.joint_norms([norms.parameter_norms(s)])),
    ]
    for dy in got:
        assert not np.any(dy[0])
        assert bool(jnp.all(jnp.isfinite(dy)))
        np.testing.assert_allclose(dy, got[0], rtol=1e-8, atol=1e-10)


def with_ones(kind, n, *positions):
    """A signal of equal terms: all of its operands are ones, and all of its indices 3."""
    rng = np.random.default_rng(3)
    one = SIGNALS[kind](rng, *positions)

    def ones(a):
        if isinstance(a, View):
            return a
        a = a if a.shape[:1] != (N,) else jnp.zeros((n, *a.shape[1:]), a.dtype)
        return jnp.ones_like(a) if is_float(a) else jnp.full_like(a, 3)

    return map_operands(ones, one)


def answers(signal):
    """Every reading of a signal, in at least 32 bits."""
    got = {name: reading(signal) for name, reading in READINGS.items() if name != "keep"}
    got["along"] = bp.directional_derivatives(signal, jnp.ones_like(got["total"]))
    return jax.tree.map(lambda a: a if isinstance(a, View) else a.astype(float), got)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("n", "positions"), [(5000, ()), (3, (5000,))])
@pytest.mark.parametrize("kind", [kind for kind in SIGNALS if "pull-back" not in kind])
def test_thousands_of_terms_in_16_bits(kind, n, positions, dtype):
    if "Sum" in kind and positions:
        positions = (1500,)  # products of all pairs of positions
    signal = in_dtype(with_ones(kind, n, *positions), dtype)
    got, want = answers(signal), answers(in_dtype(signal, jnp.float32))
    for name in got:
        rtol = 2**-8 if dtype == jnp.bfloat16 else 2**-10
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", ["Bias", "Scale", "Lookup", "Outer"])
def test_sums_of_16_bits_are_accumulated_in_32(kind, dtype):
    many, long = with_ones(kind, 5000), with_ones(kind, 2, 5000)
    many, long = in_dtype(many, dtype), in_dtype(long, dtype)

    @jax.jit
    def sums(many, long):
        return {
            "total": bp.total(many),
            "of positions": bp.total(long, weights=np.array([0.5, 0.0])),
            "per_example": bp.per_example(long)[1],
            "mean": 5000 * bp.mean(many).astype(jnp.float32),
        }

    got = sums(many, long)
    for name, factor in {"total": 1, "of positions": 0.5, "per_example": 1, "mean": 1}.items():
        assert got[name].dtype == (jnp.float32 if name == "mean" else dtype)
        largest = float(np.max(got[name]))
        np.testing.assert_allclose(largest, 5000 * factor, rtol=2**-8)


def test_a_mean_of_more_examples_than_float16_can_count():
    deltas = jnp.full((70_000, 2), 2, jnp.float16)
    assert bp.mean(bp.Bias(deltas)).tolist() == [2, 2]
    assert bp.mean(bp.Bias(deltas), weights=np.full(70_000, 3.0)).tolist() == [2, 2]


def test_small_weights_are_not_rounded_to_16_bits():
    bias = bp.Bias(jnp.full((2, 1), 60_000, jnp.float16))
    got = bp.total(bias, weights=jnp.array([1e-9, 3e-8]))
    np.testing.assert_allclose(got.astype(float), 60_000 * 3.1e-8, rtol=2**-10)


V = 200


@pytest.mark.parametrize(
    "indices",
    [
        jnp.array([[0, -1, 3], [V, 5, 5], [-V, V + 7, 2]]),
        pytest.param(
            jnp.array([[0, -1, 3], [-128, 5, 5], [-7, -127, 2]], jnp.int8),
            marks=pytest.mark.thorough,
        ),
        jnp.array([[0, 255, 3], [200, 5, 5], [201, 202, 2]], jnp.uint8),
    ],
    ids=["int64", "int8", "uint8"],
)
def test_an_index_outside_the_table_adds_nothing_to_any_reading(indices):
    rng = np.random.default_rng(3)
    deltas, rows = jnp.asarray(rng.normal(size=(N, 3, 4))), indices.astype(int)
    inside = (rows >= 0) & (rows < V)
    direction = jnp.asarray(rng.normal(size=(V, 4)))
    matrix = bp.Outer(*(jnp.asarray(rng.normal(size=(N, 3, size))) for size in (V, 4)))
    got = bp.Lookup(indices, deltas, jnp.zeros((V, 0)))
    want = bp.Lookup(
        jnp.where(inside, rows, 0), jnp.where(inside[..., None], deltas, 0), jnp.zeros((V, 0))
    )

    @jax.jit
    def all_of(signal):
        few = jnp.zeros((7, 0))  # fewer rows than pairs of positions
        return {
            # "keep" and "health" have the deltas too, and not only the gradient.
            **{n: read(signal) for n, read in READINGS.items() if n not in ("keep", "health")},
            "along": bp.directional_derivatives(signal, direction),
            "with a matrix": bp.sq_norms(bp.Sum((signal, matrix))),
            "of few rows": bp.gram(signal._replace(table=few)),
        }

    assert_close(all_of(got), all_of(want))


def test_a_kind_of_ones_own_takes_no_more_than_its_gradients():
    class Norm(NamedTuple):  # of a number that multiplies what has no axis
        x: jax.Array
        dy: jax.Array

        def per_example(self):
            return self.x * self.dy

    signal = Norm(jnp.arange(3.0), jnp.ones(3))
    signal = jax.tree.map(lambda a: a.astype(jnp.bfloat16), signal)
    got = {name: reading(signal) for name, reading in READINGS.items() if name != "keep"}
    assert got.pop("kronecker") == ()
    assert got.pop("health")[:2] == (None, None)
    want = {name: function(jnp.arange(3.0)) for name, function in BY_DEFINITION.items()}
    want["per_example"] = jnp.arange(3.0)
    for name, answer in got.items():
        narrow = name in ("total", "mean", "per_example")
        assert answer.dtype == (jnp.bfloat16 if narrow else jnp.float32)
        np.testing.assert_allclose(answer.astype(float), want[name], rtol=1e-6)


def elementwise_map():
    """y = x * gain + bias with an entry of both for each position and channel."""

    def init(key, shape):
        del key
        return {"gain": jnp.ones(shape), "bias": jnp.zeros(shape)}, shape

    def forward(params, x, *, key=None):
        del key
        return x * params["gain"] + params["bias"], x

    def backward(params, x, dy, *, read=bp.keep):
        gain, bias = bp.unshared(bp.Scale(x, dy)), bp.unshared(bp.Bias(dy))
        return dy * params["gain"], {"gain": read(gain), "bias": read(bias)}

    return bp.Layer("elementwise_map", init, forward, backward)


def test_a_parameter_that_positions_do_not_share():
    bp.check(elementwise_map(), jax.random.key(0), (2, 3, 4)).raise_if_wrong()
    rng = np.random.default_rng(3)
    scale = SIGNALS["Scale"](rng, 2, 3)
    signal, products = bp.unshared(scale), scale.inputs * scale.deltas
    assert_close(bp.per_example(signal), products)
    for name, function in BY_DEFINITION.items():
        assert_close(READINGS[name](signal), function(products))


def test_example_norms_join_all_parameters():
    tree = {"weight": jnp.array([9.0, 0.0, 0.0]), "rest": (jnp.array([16.0, 4.0, 0.0]), ())}
    assert_close(bp.example_norms(tree), jnp.array([5.0, 2.0, 0.0]))


SIGNAL = bp.Outer(jnp.ones((3, 2)), jnp.ones((3, 4)))
KINDS = "Outer, Bias, Scale, Lookup, Conv, Through, Sum, or a record with a method per_example"


ONE_BY_ONE = bp.Geometry((1,), (1,), ((0, 0),), (1,))
DO_NOT_FIT = {
    "fewer positions": (
        bp.Outer(jnp.ones((3, 1, 5)), jnp.ones((3, 3, 4))),
        r"a signal Outer with inputs \[3, 1, 5\], deltas \[3, 3, 4\]; it takes inputs \[N",
    ),
    "other examples": (
        bp.Outer(jnp.ones((3, 5)), jnp.ones((1, 4))),
        r"a signal Outer with inputs \[3, 5\], deltas \[1, 4\]; it takes",
    ),
    "no positions": (
        bp.Outer(jnp.ones((3, 5)), jnp.ones((3, 2, 4))),
        r"a signal Outer with inputs \[3, 5\], deltas \[3, 2, 4\]; it takes",
    ),
    "a bias without outputs": (
        bp.Bias(jnp.ones(3)),
        r"a signal Bias with deltas \[3\]; it takes deltas \[N, ..., O\]",
    ),
    "a gain of other features": (
        bp.Scale(jnp.ones((3, 1)), jnp.ones((3, 4))),
        r"a signal Scale with inputs \[3, 1\], deltas \[3, 4\]; it takes .* of equal shapes",
    ),
    "other indices": (
        bp.Lookup(jnp.zeros((3, 1), int), jnp.ones((3, 2, 4)), jnp.zeros((5, 0))),
        r"a signal Lookup with indices \[3, 1\] of dtype int32, deltas \[3, 2, 4\], table \[5, 0\]",
    ),
    "indices that are floats": (
        bp.Lookup(jnp.zeros((3, 2)), jnp.ones((3, 2, 4)), jnp.zeros((5, 0))),
        r"a signal Lookup with indices \[3, 2\] of dtype float32.* takes integers as indices",
    ),
    "windows": (
        bp.Conv(jnp.ones((3, 6, 2)), jnp.ones((3, 1, 4)), ONE_BY_ONE),
        r"a signal Conv with inputs \[3, 6, 2\], deltas \[3, 1, 4\]; it takes .* as many windows",
    ),
    "images": (
        bp.Conv(jnp.ones((3, 1, 6, 2)), jnp.ones((3, 2, 6, 4)), ONE_BY_ONE),
        r"a signal Conv with inputs \[3, 1, 6, 2\], deltas \[3, 2, 6, 4\]; it takes",
    ),
    "a view": (
        bp.Through(SIGNAL, View((4, 2)).transpose(1, 0)),
        r"a signal Through with a gradient of shape \[2, 4\], and a view of \[4, 2\]",
    ),
    "inside a view": (
        bp.Through(bp.Outer(jnp.ones((3, 2)), jnp.ones((1, 4))), View((2, 4)).transpose(1, 0)),
        r"a signal Outer with inputs \[3, 2\], deltas \[1, 4\]; it takes",
    ),
    "uses of two parameters": (
        bp.Sum((SIGNAL, bp.Outer(jnp.ones((3, 4)), jnp.ones((3, 2))))),
        r"a signal Sum \(Outer, Outer\) .* of parameters of shape \[2, 4\] and \[4, 2\]",
    ),
    "uses of other examples": (
        bp.Sum((SIGNAL, jax.tree.map(lambda a: a[:1], SIGNAL))),
        r"a signal Sum \(Outer, Outer\) of 1 and 3 examples",
    ),
}


@pytest.mark.parametrize("name", [name for name in READINGS if name != "keep"])
@pytest.mark.parametrize(("signal", "message"), DO_NOT_FIT.values(), ids=DO_NOT_FIT)
def test_operands_that_do_not_fit_are_refused_by_every_reading(name, signal, message):
    with pytest.raises(ValueError, match=rf"^{name}: got {message}"):
        jax.jit(READINGS[name])(signal)


@pytest.mark.parametrize("name", [name for name in READINGS if name != "keep"])
def test_operands_that_are_not_floats_are_refused_by_every_reading(name):
    signal = SIGNAL._replace(deltas=jnp.ones((3, 4), int))
    with pytest.raises(TypeError, match=f"^{name}: got a signal Outer with deltas of dtype int64"):
        READINGS[name](signal)
    with pytest.raises(TypeError, match=f"^{name}: got a signal Outer with inputs of type list"):
        READINGS[name](SIGNAL._replace(inputs=[[1.0, 2.0]]))


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
