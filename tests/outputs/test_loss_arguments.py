"""Every loss with wrong outputs or targets: an error that names the loss and the argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LOSSES, SOON_LOSSES, every
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbp as bp

every_loss = every("case", LOSSES, SOON_LOSSES)

LONGER = "the last axis longer"  # of logits, which may be of any number of classes

# What makes an array of the right shape wrong.
WRONG = {
    "None": lambda a: None,
    "a string": lambda a: "abc",
    "strings": lambda a: np.full(a.shape, "a"),
    "objects": lambda a: np.full(a.shape, None),
    "a dict": lambda a: {"a": a},
    "a tuple of one": lambda a: (a,),
    "complex": lambda a: a.astype(complex),
    "keys": lambda a: jax.random.split(jax.random.key(0), a.shape),
    "a scalar": lambda a: a.ravel()[0],
    "no examples": lambda a: a[:0],
    "fewer examples": lambda a: a[:1],
    "more examples": lambda a: jnp.concatenate([a, a]),
    "an axis in front": lambda a: a[None],
    "an axis at the end": lambda a: a[..., None],
    LONGER: lambda a: jnp.concatenate([a, a], axis=-1),
}
OF_N = ("fewer examples", "more examples", "an axis in front")


def places_of(tree):
    """The arrays of targets or outputs, and functions that put another in their place."""
    leaves, structure = jax.tree.flatten(tree)
    for i, leaf in enumerate(leaves):
        yield leaf, lambda wrong, i=i: structure.unflatten([*leaves[:i], wrong, *leaves[i + 1 :]])


@every_loss
def test_wrong_targets_and_outputs_are_named(case):
    targets = case.targets(np.random.default_rng(7))
    outputs = jax.tree.map(jnp.ones_like, case.outputs(jax.random.key(0)))
    inner = case.loss.name.split("(")[-1].split(")")[0].split(",")[0]
    for wrong, spoil in WRONG.items():
        for leaf, put in places_of(targets):
            with pytest.raises(ValueError, match=rf"{inner}.*: (targets|labels|weights) (has|is)"):
                case.loss(outputs, put(spoil(leaf)))
        # An array alone, without targets, may have any N and any positions.
        alone = len(jax.tree.leaves((outputs, targets))) == 1
        if wrong != LONGER and not (alone and wrong in OF_N):
            what = "(outputs|targets|labels|weights) (has|is)"
            for leaf, put in places_of(outputs):
                with pytest.raises(ValueError, match=rf"{inner}.*: {what}"):
                    case.loss(put(spoil(leaf)), targets)
    with pytest.raises(ValueError, match=rf"{inner}.*: outputs has dtype int"):
        case.loss(jax.tree.map(lambda y: y.astype(int), outputs), targets)


def is_right(loss, shape, targets, labels):
    """What a loss takes, said again."""
    if len(shape) < 2 or 0 in shape or targets.shape != (shape[:-1] if labels else shape):
        return False
    if loss is bp.squared_error:
        return True
    if loss is bp.sigmoid_cross_entropy:
        return bool(((targets >= 0) & (targets <= 1)).all())
    if labels:
        return bool(((targets >= 0) & (targets < shape[-1])).all())
    return targets.dtype != bool and bool((targets >= 0).all() and (targets.sum(-1) == 1).all())


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
dtypes = st.sampled_from(["bool", "int8", "uint8", "int32", "float16", "float32", "float64"])


@pytest.mark.parametrize(
    "loss",
    [bp.softmax_cross_entropy, bp.sigmoid_cross_entropy, bp.squared_error],
    ids=lambda loss: loss.name,
)
@given(shapes, shapes, dtypes, st.integers(-3, 3))
@settings(max_examples=25, deadline=None)
def test_any_shapes_and_dtypes(loss, shape, target_shape, dtype, number):
    """A value of each example and a delta of the outputs' shape, or an error that says why not."""
    outputs = jnp.zeros(shape, jnp.float32)
    targets = np.full(target_shape, number).astype(dtype)
    labels = loss is bp.softmax_cross_entropy and np.issubdtype(targets.dtype, np.integer)
    if not is_right(loss, shape, targets, labels):
        with pytest.raises(ValueError, match=loss.name):
            loss(outputs, targets)
        return
    value, delta = loss(outputs, targets)
    assert value.shape == shape[:1]
    assert delta.shape == shape
    t = jax.nn.one_hot(targets, shape[-1]) if labels else targets.astype(np.float32)
    p = {bp.softmax_cross_entropy: 1 / shape[-1], bp.sigmoid_cross_entropy: 0.5}.get(loss, 0)
    np.testing.assert_allclose(delta, p - t, atol=1e-6)
    assert np.isfinite(value).all()
