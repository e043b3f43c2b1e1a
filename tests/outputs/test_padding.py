"""Labels out of range, of narrow dtypes and of padding; terms of weight 0, whatever they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LOSSES, SOON_LOSSES, N, every, normal
from oracles import assert_close

import jaxbp as bp

EAGER = pytest.param(lambda f: f, id="eager", marks=pytest.mark.thorough)
JITTED = pytest.mark.parametrize("call", [EAGER, pytest.param(jax.jit, id="jit")])
NARROW_OR_WIDE = ["int8", "uint8", "int16", "uint16", "uint32", "int64", "uint64"]
UNWEIGHTED = {
    name: case for name, case in LOSSES.items() if "weighted" not in name and "ignoring" not in name
}


@pytest.mark.parametrize("label", [-1, -100, 4, 5, 2**32 + 1])
@pytest.mark.parametrize("positions", [(), (3,)])
def test_labels_out_of_range_make_value_and_delta_nan_under_jit(label, positions, key):
    z = normal(key, (2, *positions, 4))
    good = jnp.zeros((2, *positions), int)
    at = (1,) * good.ndim
    want_value, want_delta = bp.softmax_cross_entropy(z, good)
    value, delta = jax.jit(bp.softmax_cross_entropy)(z, good.at[at].set(label))
    np.testing.assert_allclose(value, want_value.at[1].set(jnp.nan))
    np.testing.assert_allclose(delta, want_delta.at[at].set(jnp.nan))
    with pytest.raises(ValueError, match=f"the first that does not is {label}"):
        bp.softmax_cross_entropy(z, good.at[at].set(label))


@pytest.mark.parametrize(
    ("loss", "bad"),
    [
        (bp.sigmoid_cross_entropy, [-1.0, 0.5]),
        (bp.sigmoid_cross_entropy, [2.0, 0.5]),
        (bp.softmax_cross_entropy, [-0.5, 1.5]),
        (bp.softmax_cross_entropy, [0.2, 0.2]),
        (bp.softmax_cross_entropy, [jnp.nan, 1.0]),
    ],
)
def test_what_is_refused_outside_jit_is_nan_inside(loss, bad):
    targets = jnp.array([[0.5, 0.5], bad])
    with pytest.raises(ValueError, match=loss.name):
        loss(jnp.ones((2, 2)), targets)
    value, delta = jax.jit(loss)(jnp.ones((2, 2)), targets)
    np.testing.assert_array_equal(np.isnan(value), [False, True])
    assert np.isnan(delta[1]).any()
    assert not np.isnan(delta[0]).any()


@JITTED
@every("dtype", {d: d for d in NARROW_OR_WIDE}, soon={"int8", "uint8"})
def test_labels_of_any_dtype(dtype, call, key):
    """With more classes than 8 bits hold."""
    z = normal(key, (2, 300)).at[[0, 1], [100, 270]].set(9.0)  # 270 is 14 in 8 bits
    labels = jnp.array([3, 127])
    want = bp.softmax_cross_entropy(z, labels)
    for loss in (bp.softmax_cross_entropy, bp.ignoring(bp.softmax_cross_entropy)):
        assert_close(call(loss)(z, labels.astype(dtype)), want)
    best = jnp.argmax(z, axis=1)
    for metric in (bp.accuracy, bp.top_k_accuracy(1)):
        got = call(metric)(z, best.astype(dtype))
        np.testing.assert_array_equal(got, best == best.astype(dtype).astype(int))


def spoiled(targets):
    """Targets with an example that no loss takes."""

    def spoil(t):
        return t.at[0].set(-100 if jnp.issubdtype(t.dtype, jnp.integer) else jnp.nan)

    return jax.tree.map(spoil, targets)


@pytest.mark.parametrize(
    ("case", "call"),
    [
        pytest.param(
            case, call, id=f"{name}-{'jit' if call is jax.jit else 'eager'}",
            marks=() if name in SOON_LOSSES and call is jax.jit else pytest.mark.thorough,
        )
        for name, case in UNWEIGHTED.items()
        for call in (jax.jit, lambda f: f)
    ],
)  # fmt: skip
def test_examples_of_weight_0_may_be_anything(case, call, key):
    outputs = case.outputs(key)
    targets = case.targets(np.random.default_rng(7))
    weights = jnp.array([0.0, 1.0, 2.0])
    loss = bp.weighted(case.loss)
    value, delta = case.loss(outputs, targets)
    bad = jax.tree.map(lambda y: y.at[0].set(jnp.inf).at[0, ..., 0].set(jnp.nan), outputs)

    def everything(bad, pair):
        def value_of(y):
            return jnp.sum(loss(y, pair)[0])

        def delta_of(y):
            products = jax.tree.map(lambda d, y: jnp.sum(d * jnp.cos(y)), loss(y, pair)[1], outputs)
            return sum(jax.tree.leaves(products))

        return loss(bad, pair), jax.grad(value_of)(bad), jax.grad(delta_of)(bad)

    if call is jax.jit:
        got, slope, second = jax.jit(everything)(bad, (spoiled(targets), weights))
        for part in jax.tree.leaves(second):
            assert not part[0].any()
            assert np.isfinite(part).all()
        assert_close(slope, got[1])
    else:
        got = loss(bad, (spoiled(targets), weights))
        if targets is not None:
            fewer = jax.tree.map(lambda t: jnp.roll(t[:2], 1), targets)
            with pytest.raises(ValueError, match=case.loss.name):
                loss(bad, (fewer, weights))
    assert_close(got[0], weights * value)
    weighed = jax.tree.map(lambda d: jnp.einsum("n,n...->n...", weights, d), delta)
    assert_close(got[1], weighed)
    if case.has_factor:
        columns = loss.hessian_factor(bad, (spoiled(targets), weights))
        want = loss.hessian_factor(outputs, (targets, weights))
        assert_close(columns, want)
        assert not columns[:, 0].any()


def test_labels_of_a_weight_that_is_not_0_are_refused():
    loss, y = bp.weighted(bp.softmax_cross_entropy), jnp.zeros((2, 3, 4))
    labels = jnp.array([[0, 1, -1], [0, -1, -1]])
    loss(y, (labels, labels >= 0))
    with pytest.raises(ValueError, match=r"labels go from -1 to 1, .* is -1, at \[1, 1\]"):
        loss(y, (labels, jnp.array([[1, 1, 0], [1, 1, 0]])))


@JITTED
@pytest.mark.parametrize("label", [-100, -1, 0, 7])
def test_ignoring_is_a_weight_of_0_at_the_label(label, call, key):
    z = normal(key, (2, 3, 4)).at[0, 1].set(jnp.nan)
    labels = jnp.array([[3, label, 2], [1, 3, 2]])
    loss = bp.ignoring(bp.softmax_cross_entropy, label)
    want = bp.weighted(bp.softmax_cross_entropy)(z, (labels, labels != label))
    got = call(loss)(z, labels)
    assert_close(got, want)
    assert not np.asarray(got[1])[0, 1].any()
    assert np.isfinite(got[0]).all()


def test_a_drawn_label_that_is_ignored_counts(key):
    """Where class 0 is also that of padding, the model may still draw it elsewhere."""
    z = jnp.tile(jnp.array([1.0, 0.0]), (20_000, 2, 1))
    labels = jnp.tile(jnp.array([0, 1]), (20_000, 1))
    loss = bp.ignoring(bp.softmax_cross_entropy, 0)
    deltas = bp.sampled(loss, z, labels, key)[0]
    p = jax.nn.softmax(z[0, 1])
    want = jnp.stack([jnp.zeros((2, 2)), jnp.diag(p) - jnp.outer(p, p)])
    got = jnp.einsum("ntc,ntd->tcd", deltas, deltas) / len(deltas)
    np.testing.assert_allclose(got, want, atol=0.01)


def test_several_labels_of_which_some_are_missing():
    loss = bp.ignoring(bp.sigmoid_cross_entropy, -1)
    value, delta = loss(jnp.zeros((1, 3)), jnp.array([[1, -1, 0]]))
    np.testing.assert_allclose(value, [2 * np.log(2)])
    np.testing.assert_array_equal(delta, [[-0.5, 0, 0.5]])


@JITTED
def test_heads_of_a_joint_loss_have_weights_and_padding(call, key):
    a, b = normal(key, (2, N, 4))
    labels = jnp.array([1, 2, 3])
    loss = bp.joint_loss(
        {"a": bp.ignoring(bp.softmax_cross_entropy), "b": bp.softmax_cross_entropy},
        {"a": 2.0, "b": 0.0},
    )
    outputs = {"a": a.at[0].set(jnp.nan), "b": b.at[1].set(jnp.nan)}
    value, delta = call(loss)(outputs, {"a": labels.at[0].set(-100), "b": labels - 100})
    want_value, want_delta = bp.softmax_cross_entropy(a, labels)
    assert_close(value, 2 * want_value.at[0].set(0))
    assert_close(delta, {"a": 2 * want_delta.at[0].set(0), "b": jnp.zeros((N, 4))})
    columns = bp.ggn_columns(loss, outputs, {"a": labels, "b": labels})
    assert not columns["b"].any()
    with pytest.raises(ValueError, match="outputs"):
        loss({"a": a, "b": b[:1]}, {"a": labels, "b": labels[:1]})


def test_a_loss_can_be_compared_and_hashed():
    one, other = (bp.joint_loss({"a": bp.huber}) for _ in range(2))
    assert {one: 1}[one] == 1
    assert one != other
