"""Checks of outputs and targets, with the messages of their errors.

`name` is the name of the loss, with which the message begins. Shapes and dtypes are checked in any
case. Values are checked outside jit. Under jit they are not known, and those out of range become
NaN, so that the loss and the gradient are NaN too.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxbp.types import Shape, show_shape, widened


def require_outputs(name: str, outputs: Any) -> jax.Array:
    """Returns outputs in at least 32 bits; raises unless they are one array [N, ..., O]."""
    if not jax.tree_util.treedef_is_leaf(jax.tree.structure(outputs)):
        raise ValueError(
            f"{name}: outputs is a {type(outputs).__name__}, expected one array [N, ..., O]. For "
            "a network with several outputs, make a loss of a loss for each by joint_loss?"
        )
    outputs = require_array(name, "outputs", outputs)
    if outputs.ndim < 2:
        raise ValueError(
            f"{name}: outputs has shape {show_shape(outputs.shape)}, expected [N, ..., O]."
        )
    if outputs.size == 0:
        raise ValueError(f"{name}: outputs has shape {show_shape(outputs.shape)}: it is empty.")
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(
            f"{name}: outputs has dtype {outputs.dtype}, expected floating-point numbers."
        )
    return widened(outputs)


def require_array(name: str, what: str, x: Any) -> jax.Array:
    """Returns an array of numbers; raises unless x is one, or a list of numbers."""
    if x is None or isinstance(x, tuple | dict):
        hint = " For a pair with weights, use weighted(loss)?" if isinstance(x, tuple) else ""
        raise ValueError(f"{name}: {what} is a {type(x).__name__}, expected one array.{hint}")
    try:
        array = jnp.asarray(x)
    except (TypeError, ValueError):
        of = f" of dtype {x.dtype}" if hasattr(x, "dtype") else ""
        raise ValueError(
            f"{name}: {what} is a {type(x).__name__}{of}, expected an array of numbers."
        ) from None
    kinds = (jnp.floating, jnp.integer, jnp.bool)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise ValueError(f"{name}: {what} has dtype {array.dtype}, expected real numbers.")
    return array


def require_like(name: str, targets: Any, outputs: jax.Array, what: str) -> jax.Array:
    """Returns targets in the dtype of the outputs; raises unless they have the outputs' shape."""
    targets = require_array(name, "targets", targets)
    if targets.shape != outputs.shape:
        hint = " Add an axis, targets[:, None]?" if (*targets.shape, 1) == outputs.shape else ""
        raise ValueError(
            f"{name}: targets has shape {show_shape(targets.shape)}, "
            f"expected {show_shape(outputs.shape)}: {what}.{hint}"
        )
    return targets.astype(outputs.dtype)


def require_labels(name: str, labels: jax.Array, shape: Shape) -> jax.Array:
    """Returns labels in at least 32 bits, which hold every class; shape is that of the outputs."""
    if labels.shape != shape[:-1]:
        one = "example" if len(shape) == 2 else "position"
        hint = " Put flatten() into the network?" if labels.shape == shape[:1] else ""
        if labels.shape == shape:
            hint = " For one-hot targets, convert them by .astype(float)?"
        raise ValueError(
            f"{name}: labels has shape {show_shape(labels.shape)}, "
            f"expected {show_shape(shape[:-1])}: one integer per {one}.{hint}"
        )
    wide = labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels
    if not isinstance(wide, Tracer):
        _refuse_outside(name, np.asarray(wide), 0, shape[-1] - 1, "labels")
    return wide


def require_probabilities(name: str, targets: jax.Array, what: str) -> jax.Array:
    """Returns targets; outside jit raises unless they are in [0, 1], under jit makes those NaN."""
    if isinstance(targets, Tracer):
        return jnp.where((targets >= 0) & (targets <= 1), targets, jnp.nan)
    _refuse_outside(name, np.asarray(targets), 0, 1, what)
    return targets


def require_distributions(name: str, targets: jax.Array) -> jax.Array:
    """Returns probabilities [N, ..., C]; they have to sum to 1 over the classes, within 0.01."""
    targets = require_probabilities(name, targets, "probabilities")
    if isinstance(targets, Tracer):
        off = jnp.abs(jnp.sum(targets, axis=-1, keepdims=True) - 1)
        return jnp.where(off <= TOLERANCE, targets, jnp.nan)
    sums = np.asarray(targets, np.float64).sum(-1)
    if not np.all(np.abs(sums - 1) <= TOLERANCE):
        raise ValueError(
            f"{name}: probabilities sum to between {sums.min():.4g} and {sums.max():.4g} over the "
            "classes, expected 1."
        )
    return targets


TOLERANCE = 0.01  # of sums of probabilities, which 16 bits round


def _refuse_outside(name, values, low, high, what):
    wrong = ~((values >= low) & (values <= high))
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        first = values[where]
        padding = what == "labels" and first < 0
        hint = f" To leave it out, use ignoring(loss, {first})?" if padding else ""
        raise ValueError(
            f"{name}: {what} go from {values.min()} to {values.max()}, expected {low} to {high}; "
            f"the first that does not is {first}, at {show_shape(where)}.{hint}"
        )
