"""The forward pass and the loss: what every call computes before its backward pass.

    y, cache = net.forward(params, x)
    values, delta = loss(y, targets)

What goes in and what comes out is checked here, for all calls. In particular the first axis of
inputs, targets, outputs, values and delta counts the same N examples. Shapes and dtypes are known
while a program is traced, so under `jax.jit` the checks cost nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.readings.sums import mean, total
from jaxbp.require import require_examples, require_key
from jaxbp.types import Layer, LossFunction, Params, PyTree, Reading, show_path, show_shape


def forward_and_loss(
    name: str,
    net: Layer,
    loss: LossFunction,
    params: Params,
    inputs: PyTree,
    targets: PyTree,
    key: jax.Array | None = None,
) -> tuple[PyTree, PyTree, jax.Array, PyTree]:
    """Runs the forward pass and the loss, and checks what goes in and what comes out.

    Args:
      name: the call, for messages.
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      params: the parameters.
      inputs: arrays [N, ...].
      targets: arrays [N, ...].
      key: for layers that draw.

    Returns:
      `(outputs, cache, values, delta)`.

    Raises:
      ValueError: the arrays do not have the same number of examples, or none; `key` is not a random
        key; or the loss does not return a value for each example and a delta like the outputs.
    """
    require_key(name, "key", key)
    n = require_examples(name, inputs=inputs, targets=targets)
    outputs, cache = net.forward(params, inputs, key=key)
    require_examples(name, inputs=inputs, outputs=outputs)
    values, delta = require_answer(name, loss(outputs, targets), outputs, n)
    return outputs, cache, values, delta


def require_answer(name: str, answer: Any, outputs: PyTree, n: int) -> tuple[jax.Array, PyTree]:
    """Returns what a loss returned, `(values [N], delta)`; raises unless it is of this form."""
    _require_pair(name, answer)
    values, delta = answer
    _require_values(name, values, n)
    _require_delta(name, delta, outputs)
    return values, delta


def scaled_for_mean(delta: PyTree, cache: PyTree, n: int) -> tuple[PyTree, Reading]:
    """The delta and the reading with which a backward pass computes the mean gradient.

    The backward pass is linear in delta, so the total of delta / N is the mean gradient: the
    division is done once and not for each parameter. Where float16 carries the error, delta / N
    could be too small to be represented. There the reading divides.
    """
    if has_short_range((delta, cache)):
        return delta, mean
    return jax.tree.map(lambda d: d / n, delta), total


def has_short_range(tree: PyTree) -> bool:
    """Whether the dtype of any array of floats in a tree cannot hold the small ones of float32."""
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(tree)]
    tiny = float(jnp.finfo(jnp.float32).tiny)
    return any(jnp.issubdtype(d, jnp.floating) and jnp.finfo(d).tiny > tiny for d in dtypes)


def _require_pair(name, answer):
    if not isinstance(answer, tuple) or len(answer) != 2:
        shape = getattr(answer, "shape", None)
        got = type(answer).__name__ if shape is None else f"an array of shape {show_shape(shape)}"
        raise ValueError(
            f"{name}: the loss returned {got}, expected a pair (value [N], delta). A function that "
            "returns the value alone becomes a loss by bp.loss_of(function)."
        )


def _require_values(name, values, n):
    if jnp.shape(values) != (n,):
        hint = ", not their mean or sum" if jnp.shape(values) == () else ""
        raise ValueError(
            f"{name}: the loss returned a value of shape {show_shape(jnp.shape(values))}, expected "
            f"[{n}]: one number for each example{hint}."
        )
    _require_floats(name, "value", values)


def _require_delta(name, delta, outputs):
    structures = jax.tree.structure(delta), jax.tree.structure(outputs)
    if structures[0] != structures[1]:
        raise ValueError(
            f"{name}: the loss returned a delta of structure {structures[0]}, expected that of the "
            f"outputs, {structures[1]}."
        )
    leaves = jax.tree.leaves_with_path(delta)
    for (path, d), y in zip(leaves, jax.tree.leaves(outputs), strict=True):
        what = f"delta.{show_path(path)}" if path else "delta"
        if jnp.shape(d) != y.shape:
            raise ValueError(
                f"{name}: the loss returned a {what} of shape {show_shape(jnp.shape(d))}, expected "
                f"{show_shape(y.shape)}, the shape of the outputs."
            )
        if jnp.issubdtype(y.dtype, jnp.floating):
            _require_floats(name, what, d)


def _require_floats(name, what, array):
    dtype = jnp.result_type(array)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name}: the loss returned a {what} of dtype {dtype}, expected floating-point numbers."
        )
