"""Accuracy: every form of targets that the losses take, weights, ties, NaN, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import LOSSES, SOON_LOSSES, N, every, normal

import jaxbp as bp

NAN = float("nan")
SOFTMAX, SIGMOID = bp.softmax_cross_entropy, bp.sigmoid_cross_entropy


def test_accuracy_counts_the_right_ones():
    outputs = jnp.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    got = jax.jit(bp.accuracy)(outputs, jnp.array([1, 1, 1], jnp.int32))
    np.testing.assert_array_equal(got, [1, 0, 1])
    np.testing.assert_allclose(bp.accuracy(outputs[None], jnp.array([[1, 1, 1]])), [2 / 3], 1e-6)


@pytest.mark.parametrize("dtype", [bool, int, jnp.int8, jnp.float32])
def test_one_output_is_a_logit_of_two_classes(dtype):
    z = jnp.array([[-2.0], [0.3], [2.0], [-0.1], [NAN], [NAN]])
    targets = jnp.array([[0], [1], [0], [1], [0], [1]], dtype)
    np.testing.assert_array_equal(bp.accuracy(z, targets), [1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(bp.make_accuracy(SIGMOID)(z, targets), [1, 1, 0, 0, 0, 0])


OUTPUTS = [[3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [NAN, 1.0, 5.0], [-1.0, 4.0, -2.0]]


@pytest.mark.parametrize(
    ("loss", "targets", "want"),
    [
        (SOFTMAX, [0, 0, 0, 0], [1, 1, 0, 0]),
        (SOFTMAX, [2, 1, 2, 1], [0, 0, 0, 1]),
        (SOFTMAX, [[0.6, 0.3, 0.1], [0, 0, 1], [0, 0, 1], [0.3, 0.4, 0.3]], [1, 0, 0, 1]),
        (SOFTMAX, [[0.5, 0.5, 0], [0.0, 0.5, 0.5], [1, 0, 0], [0.5, 0.5, 0]], [1, 0, 0, 1]),
        (SIGMOID, [[1, 0, 1], [0, 0, 0], [0, 1, 1], [0, 1, 1]], [2 / 3, 1, 2 / 3, 2 / 3]),
        (SIGMOID, [[0.9, 0.6, 0.7]] * 4, [1, 0, 2 / 3, 1 / 3]),
        (bp.weighted(SOFTMAX), ([0, -1, 0, 1], [2.0, 0.0, 1.0, 0.5]), [1, 0, 0, 1]),
        (bp.weighted(SIGMOID), ([[1, 0, 1.0]] * 4, [[1.0, 3, 0]] * 4), [0.25, 0.75, 0, 0]),
        (bp.ignoring(SOFTMAX, 0), [0, 1, 2, 1], [0, 0, 0, 1]),
        (
            bp.ignoring(SIGMOID, -1),
            [[-1, 1, 0], [-1, -1, -1], [-1, 1, 1], [0, -1, 1]],
            [0.5, 0, 1, 0.5],
        ),
        (bp.weighted(bp.ignoring(SOFTMAX)), ([0, 1, -100, 7], [1.0, 2.0, 1.0, 0.0]), [1, 0, 0, 0]),
    ],
)  # fmt: skip
def test_the_accuracy_of_a_loss(loss, targets, want):
    targets = jax.tree.map(jnp.asarray, targets, is_leaf=lambda t: isinstance(t, list))
    y = jnp.asarray(OUTPUTS)
    metric = bp.make_accuracy(loss)
    np.testing.assert_allclose(metric(y, targets), want, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(metric)(y, targets), want, rtol=1e-6)


def test_positions_of_weight_0_do_not_count():
    y = jnp.array([[[2.0, 1.0], [0.0, 3.0], [0.0, NAN], [1.0, 0.0]]])
    labels = jnp.array([[0, 0, -1, 0]])
    for got in (
        bp.accuracy(y, (labels, labels >= 0)),
        bp.top_k_accuracy(1)(y, (labels, labels >= 0)),
        bp.make_accuracy(bp.ignoring(SOFTMAX, -1))(y, labels),
    ):
        np.testing.assert_allclose(got, [2 / 3], rtol=1e-6)
    got = bp.accuracy(y[..., :1] - 0.5, (labels[..., None] * 0, jnp.array([[1, 1, 0, 2]])))
    np.testing.assert_allclose(got, [0.25])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_top_k_agrees_with_sorting(k, key):
    y = normal(key, (6, 5, 4)).at[0, 0, 1].set(NAN)
    labels = jax.random.randint(key, (6, 5), 0, 4)
    order = np.argsort(-np.asarray(y), axis=-1)[..., :k]
    right = (order == np.asarray(labels)[..., None]).any(-1)
    right[0, 0] = False
    for targets in (labels, jax.nn.one_hot(labels, 4)):
        got = jax.jit(bp.top_k_accuracy(k))(y, targets)
        np.testing.assert_allclose(got, right.mean(1), rtol=1e-6)


def test_equal_outputs_are_right_for_the_first_k_only():
    y, labels = jnp.zeros((4, 4)), jnp.arange(4)
    for k in range(1, 5):
        got = bp.top_k_accuracy(k)(y, labels)
        np.testing.assert_array_equal(got, np.arange(4) < k)


@every(
    "case",
    {
        name: case
        for name, case in LOSSES.items()
        if case.loss.right is not None
        and not case.link
        and "probabilities of classes with weights" not in name  # delta prefers heavy classes
    },
    SOON_LOSSES,
)
def test_the_accuracy_of_every_loss_is_1_where_targets_are_its_predictions(case, key):
    """And it is less where a prediction is changed."""
    targets = case.targets(np.random.default_rng(7))
    y = -case.loss(jnp.zeros((N, *case.shape)), targets)[1]  # t - 1/C, or t - 1/2
    counted = np.asarray(jnp.any(y.reshape(N, -1) != 0, axis=1))
    metric = bp.make_accuracy(case.loss)
    np.testing.assert_allclose(metric(y, targets), counted, rtol=1e-6)
    assert (metric(-y, targets)[counted] < 1).all()


def test_evaluate_takes_the_accuracy_of_a_loss(key):
    loss = bp.ignoring(SOFTMAX, -1)
    x = normal(key, (5, 3, 4))
    labels = jnp.argmax(x, axis=-1).at[0, 0].set(-1)
    net = bp.function(lambda x: x)
    record = bp.evaluate(net, loss, metric=bp.make_accuracy(loss), batch_size=2)((), x, labels)
    np.testing.assert_allclose(record["metric"], 1)


Y = jnp.ones((3, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: bp.accuracy(Y, Y / 4),
            ValueError,
            r"accuracy: targets have the outputs' shape, \[3, 4\].*make_accuracy\(softmax_cross_en",
        ),
        (
            lambda: bp.accuracy(jnp.ones((3, 1)), jnp.ones(3, int)),
            ValueError,
            r"accuracy of sigmoid_cross_entropy: targets has shape \[3\], expected \[3, 1\]",
        ),
        (
            lambda: bp.accuracy(Y, jnp.ones(4, int)),
            ValueError,
            r"accuracy of softmax_cross_entropy: labels has shape \[4\], expected \[3\]",
        ),
        (
            lambda: bp.accuracy(Y, jnp.array([0, -1, 4])),
            ValueError,
            r"labels go from -1 to 4, expected 0 to 3.*use ignoring\(loss, -1\)",
        ),
        (lambda: bp.accuracy({"a": Y}, Y), ValueError, "accuracy: outputs is a dict"),
        (
            lambda: bp.top_k_accuracy(5)(Y, jnp.ones(3, int)),
            ValueError,
            "softmax_cross_entropy: has 4 classes, fewer than the 5 to look at",
        ),
        (
            lambda: bp.make_accuracy(SIGMOID, top=2)(Y, Y),
            ValueError,
            "sigmoid_cross_entropy: each output has two answers, so top has to be 1, not 2",
        ),
        (lambda: bp.top_k_accuracy(0), ValueError, "top_k_accuracy: k is 0; it takes a positive"),
        (lambda: bp.make_accuracy(SOFTMAX, top=True), ValueError, "make_accuracy: top is True"),
        (
            lambda: bp.make_accuracy(bp.weighted(bp.huber)),
            TypeError,
            r"make_accuracy: loss is weighted\(huber\), which does not say which outputs are right",
        ),
        (
            lambda: bp.make_accuracy(bp.joint_loss({"a": SOFTMAX})),
            TypeError,
            r"make_accuracy: loss is joint_loss\(softmax_cross_entropy\), which does not say",
        ),
        (
            lambda: bp.make_accuracy(optax.huber_loss),
            TypeError,
            "make_accuracy: loss is <.*huber_loss.*>, which does not say",
        ),
    ],
)
def test_what_is_wrong_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()
