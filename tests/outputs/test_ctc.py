"""Connectionist temporal classification: against a sum over all paths, edges, and its sampler."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from oracles import assert_close

import jaxbp as bp

T, C = 4, 3


def spell(path, blank):
    """The labels of a path: repeated classes merged, then blanks removed."""
    return tuple(c for c, _ in itertools.groupby(path) if c != blank)


def values_by_paths(z, labels, lengths, blank):
    """The loss of each example by the sum over all of its paths."""
    values = []
    for logits, wanted, length in zip(z, labels.tolist(), lengths.tolist(), strict=True):
        log_p = jax.nn.log_softmax(logits[:length])
        wanted = tuple(c for c in wanted if c != blank)
        paths = [
            path for path in itertools.product(range(C), repeat=length)
            if spell(path, blank) == wanted
        ]  # fmt: skip
        rows = jnp.arange(length)
        values.append(-jnp.log(sum(jnp.exp(log_p[rows, jnp.array(p)].sum()) for p in paths)))
    return jnp.stack(values)


@pytest.mark.parametrize("blank", [0, pytest.param(2, marks=pytest.mark.thorough)])
def test_it_is_the_sum_over_all_paths(blank, key):
    a, b = (c for c in range(C) if c != blank)
    labels = jnp.array([[a, a, blank], [a, b, a], [b, blank, blank], [blank] * 3])
    lengths = jnp.array([4, 4, 2, 3])
    z = 2 * normal(key, (4, T, C))
    got = jax.jit(bp.make_ctc(blank=blank))(z, (labels, lengths))

    def total(z):
        values = values_by_paths(z, labels, lengths, blank)
        return jnp.sum(values), values

    delta, values = jax.jit(jax.grad(total, has_aux=True))(z)
    assert_close(got, (values, delta))


def test_edges():
    loss = bp.make_ctc()
    z = jnp.zeros((5, 3, C)).at[3, :, 1].set(-jnp.inf).at[4, 2].set(jnp.nan)
    labels = jnp.array([[1, 1, 0], [1, 1, 2], [0, 0, 0], [1, 0, 0], [1, 0, 0]])
    lengths = jnp.array([3, 3, 0, 3, 2])
    value, delta = jax.jit(loss)(z, (labels, lengths))
    # One path for 1 1; none for 1 1 2 and where the class has no probability; nothing of nothing.
    np.testing.assert_allclose(value, [3 * np.log(3), np.inf, 0, np.inf, np.log(3)], atol=1e-12)
    np.testing.assert_array_equal(delta[1:4], 0)
    np.testing.assert_allclose(delta[0, 1], [-2 / 3, 1 / 3, 1 / 3])
    np.testing.assert_array_equal(delta[4, 2], 0)
    assert np.isfinite(delta).all()
    finite = jax.tree.map(lambda a: a[:3], (z, (labels, lengths)))
    second = jax.jit(jax.jacobian(lambda z: loss(z, finite[1])[1]))(finite[0])
    assert np.isfinite(second).all()


def test_long_sequences_in_32_bits_do_not_vanish(key):
    z = 3 * normal(key, (2, 300, 5))
    targets = jnp.tile(jnp.array([1, 2, 3, 4, 4]), (2, 10)), jnp.array([300, 200])
    loss = jax.jit(bp.make_ctc())
    want = loss(z, targets)
    value, delta = loss(z.astype(jnp.float32), targets)
    np.testing.assert_allclose(value, want[0], rtol=1e-5)
    np.testing.assert_allclose(delta, want[1], atol=1e-3)


def test_it_samples_labels_with_the_probability_that_it_gives_them(key):
    loss, draws = bp.make_ctc(), 40_000
    z = normal(key, (1, 3, C))
    lengths = jnp.array([2])
    given = jnp.zeros((draws, 1), int), jnp.tile(lengths, draws)
    labels, again = loss.sample(key, jnp.tile(z, (draws, 1, 1)), given)
    np.testing.assert_array_equal(again, 2)
    kinds, counts = np.unique(np.asarray(labels), axis=0, return_counts=True)
    many = jnp.tile(z, (len(kinds), 1, 1)), (jnp.asarray(kinds), jnp.tile(lengths, len(kinds)))
    p = np.exp(-jax.jit(loss)(*many)[0])
    np.testing.assert_allclose(counts / draws, p, atol=0.01)
    np.testing.assert_allclose(p.sum(), 1)  # all that can be spelled in 2 frames


Z = jnp.zeros((2, T, C))
LABELS, LENGTHS = jnp.array([[1, 0], [1, 2]]), jnp.array([4, 4])


@pytest.mark.parametrize(
    ("labels", "lengths", "message"),
    [
        ([[1, 0], [1, 3]], [4, 4], "ctc: labels go from 0 to 3, expected 0 to 2"),
        ([[1, 0], [0, 1]], [4, 4], "ctc: labels has the blank, 0, before another label"),
        ([[1, 0], [1, 0]], [4, 5], "ctc: lengths go from 4 to 5, expected 0 to 4"),
        ([[1, 0], [1, 0]], [4, -1], "ctc: lengths go from -1 to 4"),
    ],
)
def test_targets_out_of_range_are_refused_outside_jit_and_nan_inside(labels, lengths, message):
    targets = jnp.array(labels), jnp.array(lengths)
    with pytest.raises(ValueError, match=message):
        bp.make_ctc()(Z, targets)
    value, delta = jax.jit(bp.make_ctc())(Z, targets)
    np.testing.assert_array_equal(np.isnan(value), [False, True])
    np.testing.assert_array_equal(np.isnan(delta).any((1, 2)), [False, True])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bp.make_ctc(blank=-1), "ctc: blank is -1; it takes a class"),
        (lambda: bp.make_ctc(blank=3)(Z, (LABELS, LENGTHS)), "of 3 classes, expected more than 3"),
        (lambda: bp.make_ctc()(Z[0], (LABELS, LENGTHS)), r"shape \[4, 3\], expected \[N, T, C\]"),
        (lambda: bp.make_ctc()(Z, LABELS), r"targets is a .*, expected a pair \(labels, lengths\)"),
        (lambda: bp.make_ctc()(Z, (LABELS[0], LENGTHS)), r"integers: labels \[N, S\]"),
        (lambda: bp.make_ctc()(Z, (LABELS, LENGTHS.astype(float))), r"integers: lengths \[N\]"),
        (lambda: bp.make_ctc()(Z, (LABELS[:1], LENGTHS)), "1 sequences of labels and 2 lengths, e"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
