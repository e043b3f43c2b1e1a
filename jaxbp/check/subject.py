"""The check of a layer, and of a loss."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.check.contract import carry_by, compare_shapes, replace_others, without_key
from jaxbp.check.derivatives import (
    compare_derivatives,
    compare_readings,
    of_primals,
    transpose_by_example,
)
from jaxbp.check.report import AUTODIFF_TOLERANCE, Finding, Report, broken
from jaxbp.check.sweep import keep_fitting, matched, sweep_with_readings
from jaxbp.check.trees import (
    difference,
    floats,
    is_float,
    leaves,
    moved,
    normal_like,
    normals,
    times,
)
from jaxbp.require import require_examples
from jaxbp.types import Layer, Loss, PyTree, show_shape

__all__ = ["check"]


def check(
    subject: Layer | Loss,
    key: jax.Array,
    shape: Any,
    *,
    batch: int = 3,
    inputs: PyTree | None = None,
    targets: PyTree | None = None,
) -> Report:
    """Checks an explicit derivative against autodiff, and a layer against its whole contract.

    Parameters come from `init`, in float64, with small random numbers added so that none is zero.
    Inputs and the cotangent are drawn from a normal distribution. Layers that draw random numbers
    get the same key each time. JAX's configuration is the same afterwards as before.

    What is wrong is a row of the report, with a sentence where there is something to say. Only what
    a layer cannot compute at all raises its own error.

    Args:
      subject: a Layer, which may be a whole network, or a Loss.
      key: a random key.
      shape: the shape of one example, without N, or a tree of shapes for a layer with several
        inputs, as `init` takes it; for a loss, of one example's outputs.
      batch: N, the number of examples. With one, nothing can be said of other examples.
      inputs: the inputs of a layer, [N, ...], or a tree of them. Pass them for a layer that takes
        integers, such as `embedding`, or a mask. Without them, they are normal random numbers.
        Only floating-point inputs have a derivative.
      targets: the targets of a loss. Without them, they are drawn by the loss's `sample`.

    Returns:
      A `Report`. Print it, test `report.ok`, or call `report.raise_if_wrong()`.

    Raises:
      TypeError: `subject` is neither a Layer nor a Loss.
      ValueError: the inputs are not all of the same N.

    Example:
      >>> import jax, jaxbp as bp
      >>> report = bp.check(bp.dense(3), jax.random.key(0), (4,))
      >>> report.ok
      True
      >>> report.largest_error < 1e-14
      True
    """
    if not isinstance(subject, Layer | Loss):
        raise TypeError(f"check: takes a Layer or a Loss; got {type(subject).__name__}.")
    with jax.enable_x64(True):
        if isinstance(subject, Layer):
            return _check_layer(subject, key, shape, batch, inputs)
        return _check_loss(subject, key, shape, batch, targets)


def _check_layer(layer: Layer, key: jax.Array, shape: Any, batch: int, inputs: PyTree) -> Report:
    init_key, move_key, input_key, draw_key, key = jax.random.split(key, 5)
    cotangent_key, direction_key, tree_key = jax.random.split(key, 3)
    (drawn, out_shape), (again, _) = (layer.init(init_key, shape) for _ in range(2))
    params = jax.tree.map(lambda p: p.astype(jnp.float64), drawn)
    params = moved(params, normal_like(params, move_key), 0.1)
    x = normals(input_key, shape, batch) if inputs is None else jax.tree.map(jnp.asarray, inputs)
    x = jax.tree.map(lambda a: a.astype(jnp.float64) if is_float(a) else a, x)
    n = require_examples("check", inputs=x)
    # A lifted layer knows the function that it was made of, which is the better witness.
    reference = getattr(layer.forward, "reference", None)
    draw_key = None if reference is not None else draw_key

    run = jax.jit(reference or (lambda params, x: layer.forward(params, x, key=draw_key)[0]))
    outputs, eager = run(params, x), layer.forward(params, x, key=draw_key)[0]
    same_key = Finding("params", "same key", difference(again, drawn), 0.0)
    promised = compare_shapes(outputs, out_shape, n)
    if any(jnp.shape(y)[:1] != (n,) for y in jax.tree.leaves(outputs)):
        return Report(layer.name, (same_key, promised))
    jitted = Finding("outputs", "jit", difference(eager, outputs), AUTODIFF_TOLERANCE)
    findings = [same_key, promised, jitted, replace_others(run, params, x, outputs, n)]

    cotangent = normal_like(outputs, cotangent_key)
    primals = {"params": params, "inputs": floats(x)}
    function = of_primals(run, x)
    transpose = transpose_by_example(function, n)
    by_example = transpose(primals, cotangent)
    swept, faults = sweep_with_readings(layer, draw_key, params, x, cotangent)
    findings += faults
    findings += compare_derivatives(
        function, primals, cotangent, swept.gradients, by_example, direction_key
    )
    findings += compare_readings(swept, params, by_example)
    if not faults:
        tree = normal_like(params, tree_key)
        moves = transpose({**primals, "params": tree}, cotangent)["inputs"]
        needs_tree = any(a.carries for a in swept.answers.values()) and (
            difference(moves, by_example["inputs"]) > AUTODIFF_TOLERANCE
        )
        findings += carry_by(tree, layer, draw_key, params, x, cotangent, swept, needs_tree)
        if difference(layer.forward(params, x)[0], eager) > 0:  # the layer draws
            findings.append(without_key(layer, primals, x, cotangent))
    return Report(layer.name, tuple(findings))


def _check_loss(loss: Loss, key: jax.Array, shape: Any, batch: int, targets: PyTree) -> Report:
    output_key, sample_key, key = jax.random.split(key, 3)
    cotangent_key, direction_key = jax.random.split(key)
    outputs = normals(output_key, shape, batch)
    if targets is None:
        targets = loss.sample(sample_key, outputs)
    values, delta = jax.jit(lambda y, t: loss(y, t))(outputs, targets)
    if values.shape != (batch,):
        got = show_shape(values.shape)
        problem = f"the loss has values of shape {got}; it takes [{batch}], one for each example."
        return Report(loss.name, (broken("values", "shape", problem),))

    @jax.jit
    def function(primals):
        return loss(primals["outputs"], targets)[0]

    primals, cotangent = {"outputs": outputs}, normal_like(values, cotangent_key)
    by_example = transpose_by_example(function, batch)(primals, cotangent)
    found, findings = matched({"outputs": delta}, primals)
    deltas, misfits = keep_fitting(found, leaves(primals))
    gradients = {what: times(d, cotangent) for what, d in deltas.items()}
    findings += misfits
    findings += compare_derivatives(
        function, primals, cotangent, gradients, by_example, direction_key
    )
    for what, rows in leaves(by_example).items():  # [N, N, ...]: value n by the outputs of m
        error = float(np.max(np.abs(rows[~np.eye(batch, dtype=bool)]), initial=0.0))
        findings.append(Finding(what, "other examples", error, AUTODIFF_TOLERANCE))
    return Report(loss.name, tuple(findings))
