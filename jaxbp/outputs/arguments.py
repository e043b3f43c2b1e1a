"""Checks of outputs and targets, with the messages of their errors.

`name` is the name of the loss, with which the message begins. Shapes and dtypes are checked in any
case. Values are checked outside jit. Under jit they are not known, and those out of range become
NaN, so that the loss and the gradient are NaN too.
"""

import math
import numbers
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


def require_several(name: str, outputs: Any, parts: str) -> list[jax.Array]:
    """Returns the arrays of a tuple in at least 32 bits; raises unless all are [N, ..., O].

    Args:
      name: the name of the loss.
      outputs: a tuple or a list of arrays of the same shape.
      parts: what each array is, separated by commas.
    """
    count = len(parts.split(", "))
    if not isinstance(outputs, tuple | list) or len(outputs) != count:
        got = f" of {len(outputs)}" if isinstance(outputs, tuple | list) else ""
        raise ValueError(
            f"{name}: outputs is a {type(outputs).__name__}{got}, expected a tuple of {count} "
            f"arrays [N, ..., O]: {parts}."
        )
    arrays = [require_outputs(name, y) for y in outputs]
    if any(y.shape != arrays[0].shape or y.dtype != arrays[0].dtype for y in arrays):
        got = ", ".join(f"{y.dtype} {show_shape(y.shape)}" for y in arrays)
        raise ValueError(
            f"{name}: outputs has arrays {got}; they have to be of one shape and dtype."
        )
    return arrays


def halves(name: str, outputs: Any) -> tuple[jax.Array, jax.Array]:
    """Returns means and log-variances; raises unless they stand side by side, [N, ..., 2 O]."""
    outputs = require_outputs(name, outputs)
    if outputs.shape[-1] % 2:
        raise ValueError(
            f"{name}: outputs has shape {show_shape(outputs.shape)}, expected [N, ..., 2 O]: "
            "means and log-variances side by side."
        )
    means, log_variances = jnp.split(outputs, 2, axis=-1)
    return means, log_variances


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


def require_between(
    name: str, targets: jax.Array, low: float, high: float, what: str = "targets"
) -> jax.Array:
    """Returns targets; outside jit raises unless they are in [low, high], or makes those NaN."""
    if isinstance(targets, Tracer):
        return jnp.where((targets >= low) & (targets <= high), targets, jnp.nan)
    _refuse_outside(name, np.asarray(targets), low, high, what)
    return targets


def require_one_of(name: str, targets: jax.Array, low: float, high: float) -> jax.Array:
    """Returns targets; outside jit raises unless each is `low` or `high`, or makes it NaN."""
    if isinstance(targets, Tracer):
        return jnp.where((targets == low) | (targets == high), targets, jnp.nan)
    values = np.asarray(targets)
    _refuse(name, values, (values == low) | (values == high), f"{low} or {high}", "targets")
    return targets


def require_distributions(name: str, targets: jax.Array) -> jax.Array:
    """Returns probabilities [N, ..., C]; they have to sum to 1 over the classes, within 0.01."""
    targets = require_between(name, targets, 0, 1, "probabilities")
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


def require_fraction(name: str, argument: str, value: Any) -> float:
    """Returns an argument as a float; raises unless it is a number from 0 to 1."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 <= float(value) <= 1:
        raise ValueError(f"{name}: {argument} is {value!r}; it takes a number from 0 to 1.")
    return float(value)


def require_number(name: str, argument: str, value: Any, *, low: float = -math.inf) -> float:
    """Returns an argument as a float; raises unless it is a finite number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name}: {argument} is {value!r}; it takes a finite number.")
    if value < low:
        raise ValueError(f"{name}: {argument} is {value!r}; it takes a number of at least {low}.")
    return float(value)


def require_class_weights(name: str, weights: Any, argument: str = "class_weights") -> np.ndarray:
    """Returns weights [C] of classes; raises unless they are finite."""
    try:
        array = np.asarray(weights, np.float64)
    except (TypeError, ValueError):
        array = np.array(math.nan)
    if array.ndim != 1 or not np.all(np.isfinite(array)):
        raise ValueError(f"{name}: {argument} is {weights!r}; it takes a list of finite numbers.")
    return array


def require_fitting(name: str, argument: str, weights: np.ndarray, outputs: jax.Array) -> jax.Array:
    """Returns weights in the dtype of the outputs [N, ..., C]; raises unless there are C."""
    if weights.shape != outputs.shape[-1:]:
        raise ValueError(
            f"{name}: outputs has shape {show_shape(outputs.shape)}, expected [N, ..., "
            f"{len(weights)}]: as many outputs as {argument}."
        )
    return jnp.asarray(weights, outputs.dtype)


TOLERANCE = 0.01  # of sums of probabilities, which 16 bits round


def _refuse_outside(name, values, low, high, what):
    _refuse(name, values, (values >= low) & (values <= high), f"{low} to {high}", what)


def _refuse(name, values, right, expected, what):
    """Raises unless all values are right; names the first that is not."""
    if not right.all():
        where = tuple(int(i) for i in np.argwhere(~right)[0])
        first = values[where]
        padding = what == "labels" and first < 0
        hint = f" To leave it out, use ignoring(loss, {first})?" if padding else ""
        raise ValueError(
            f"{name}: {what} go from {values.min()} to {values.max()}, expected {expected}; "
            f"the first that does not is {first}, at {show_shape(where)}.{hint}"
        )
