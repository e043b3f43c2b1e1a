"""The gradient check: compares an explicit backward pass with three independent witnesses.

Use it to test a layer, a network or a loss of your own. It runs in float64, with random inputs and
a random cotangent u. With f the forward pass, p the parameters and the input, and J the Jacobian:

    autodiff             J^T u from `jax.vjp`, for each parameter and for the input
    finite differences   u . (f(p + h v) - f(p - h v)) / 2h against (J^T u) . v, for a random v
    adjoint identity     <J v, u> = <v, J^T u>, with J v from `jax.jvp`, for everything at once

The layers, losses and readings of the package never use automatic differentiation. It appears here,
in `lift` for what lies between the parameters of a foreign model, and in `sweeps.curvature` as the
forward derivative of the explicit backward pass.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxbp.readings.sums import total
from jaxbp.types import Layer, Loss, PyTree, Shape, show_path

__all__ = ["Finding", "Report", "check"]

AUTODIFF_TOLERANCE = 1e-10
# A central difference in float64 has an error of about h^2 + 1e-16 / h. STEP is the length of the
# whole move, for parameters of any size: a longer move would cross the kinks of a wide relu.
FINITE_DIFFERENCE_TOLERANCE = 1e-6
STEP = 1e-5


class Finding(NamedTuple):
    """One comparison of a check.

    Attributes:
      what: the parameter, by its path, or the input.
      witness: what it was compared with, `autodiff`, `finite differences` or `adjoint identity`.
      error: the largest difference, relative to the size of the expected values.
      tolerance: the largest error that is accepted.
    """

    what: str
    witness: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within its tolerance; an error of nan is not."""
        return self.error <= self.tolerance


class Report(NamedTuple):
    """The result of a check. Prints as a table.

    Attributes:
      name: the name of the layer or loss.
      findings: one for each quantity and witness.
    """

    name: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether every finding is ok."""
        return all(finding.ok for finding in self.findings)

    @property
    def largest_error(self) -> float:
        """The largest error against autodiff."""
        return max(f.error for f in self.findings if f.witness == "autodiff")

    def raise_if_wrong(self) -> "Report":
        """Returns the report, or raises an `AssertionError` with every finding that is not ok."""
        wrong = [finding for finding in self.findings if not finding.ok]
        if wrong:
            raise AssertionError(f"check failed\n{Report(self.name, tuple(wrong))}")
        return self

    def __str__(self) -> str:
        width = max(len(finding.what) for finding in self.findings)
        rows = [
            f"  {'ok   ' if f.ok else 'WRONG'}  {f.what:{width}}  {f.witness:18}  "
            f"{f.error:8.1e} (at most {f.tolerance:.0e})"
            for f in self.findings
        ]
        return "\n".join([f"{self.name}: {'right' if self.ok else 'WRONG'}", *rows])


def check(
    subject: Layer | Loss,
    key: jax.Array,
    shape: Shape,
    *,
    batch: int = 3,
    inputs: PyTree | None = None,
    targets: PyTree | None = None,
) -> Report:
    """Checks an explicit derivative against autodiff, finite differences and the adjoint identity.

    Parameters come from `init`, in float64, with small random numbers added so that none is zero.
    Inputs and the cotangent are drawn from a normal distribution. Layers that draw random numbers
    get the same key each time. JAX's configuration is the same afterwards as before.

    Args:
      subject: a Layer, which may be a whole network, or a Loss.
      key: a random key.
      shape: the shape of one example, without N; for a loss, of one example's outputs.
      batch: N, the number of examples.
      inputs: the inputs of a layer, [N, ...]. Pass them for a layer that takes integers, such as
        `embedding`. Without them, they are normal random numbers.
      targets: the targets of a loss. Without them, they are drawn by the loss's `sample`.

    Returns:
      A `Report`. Print it, test `report.ok`, or call `report.raise_if_wrong()`.

    Raises:
      TypeError: `subject` is neither a Layer nor a Loss.
      AssertionError: a derivative has another tree structure, shape or dtype than its parameter.

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
            return _check_layer(subject, key, (batch, *shape), inputs)
        return _check_loss(subject, key, (batch, *shape), targets)


def _check_layer(layer: Layer, key: jax.Array, shape: Any, inputs: PyTree) -> Report:
    init_key, move_key, input_key, draw_key, key = jax.random.split(key, 5)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), layer.init(init_key, shape[1:])[0])
    params = _moved(params, _normal_like(params, move_key), 0.1)
    if inputs is None:
        inputs = jax.random.normal(input_key, shape, jnp.float64)
    inputs = jax.tree.map(jnp.asarray, inputs)
    leaves, structure = jax.tree.flatten(inputs)

    def double(x):  # only floating-point inputs have a derivative
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else None

    def inputs_of(primals):
        own = zip(structure.flatten_up_to(primals["inputs"]), leaves, strict=True)
        return structure.unflatten([x if double is None else double for double, x in own])

    # A lifted layer knows the function that it was made of, which is the better witness.
    reference = getattr(layer.forward, "reference", None)
    draw_key = None if reference is not None else draw_key

    def forward(primals):
        params, x = primals["params"], inputs_of(primals)
        if reference is not None:
            return reference(params, x)
        return layer.forward(params, x, key=draw_key)[0]

    def transpose(primals, cotangent):
        _, cache = layer.forward(primals["params"], inputs_of(primals), key=draw_key)
        dx, grads = layer.backward(primals["params"], cache, cotangent, read=total)
        return {"params": grads, "inputs": dx}

    primals = {"params": params, "inputs": jax.tree.map(double, inputs)}
    return _compare(layer.name, forward, transpose, primals, key)


def _check_loss(loss: Loss, key: jax.Array, shape: Shape, targets: PyTree) -> Report:
    output_key, sample_key, key = jax.random.split(key, 3)
    outputs = jax.random.normal(output_key, shape, jnp.float64)
    if targets is None:
        targets = loss.sample(sample_key, outputs)

    def forward(primals):
        return loss(primals["outputs"], targets)[0]

    def transpose(primals, cotangent):
        _, delta = loss(primals["outputs"], targets)
        return {"outputs": delta * cotangent.reshape(-1, *[1] * (delta.ndim - 1))}

    return _compare(loss.name, forward, transpose, {"outputs": outputs}, key)


def _compare(
    name: str,
    forward: Callable[[Any], PyTree],
    transpose: Callable[[Any, Any], Any],
    primals: dict[str, PyTree],
    key: jax.Array,
) -> Report:
    """Compares `transpose(primals, u)` with J^T u, with J the Jacobian of `forward(primals)`."""
    cotangent_key, direction_key = jax.random.split(key)
    outputs, vjp = jax.vjp(jax.jit(forward), primals)
    cotangent = _normal_like(outputs, cotangent_key)
    explicit, (expected,) = jax.jit(transpose)(primals, cotangent), vjp(cotangent)
    chex.assert_trees_all_equal_shapes_and_dtypes(explicit, expected)

    @jax.jit
    def project(primals):
        return _dot(forward(primals), cotangent)

    directions = _normal_like(primals, direction_key)
    paths, leaves = zip(*jax.tree.leaves_with_path(directions), strict=True)
    structure = jax.tree.structure(directions)
    got, want = jax.tree.leaves(explicit), jax.tree.leaves(expected)
    findings, products = [], []
    for i, path in enumerate(paths):
        what = show_path(path)
        error = _ratio(jnp.max(jnp.abs(got[i] - want[i])), jnp.max(jnp.abs(want[i])))
        findings.append(Finding(what, "autodiff", error, AUTODIFF_TOLERANCE))

        along = structure.unflatten([v if i == j else 0 * v for j, v in enumerate(leaves)])
        h = STEP / leaves[i].size ** 0.5
        slope = (project(_moved(primals, along, h)) - project(_moved(primals, along, -h))) / (2 * h)
        products.append(jnp.vdot(got[i], leaves[i]))
        error = _ratio(abs(slope - products[i]), jnp.linalg.norm(want[i].ravel()))
        findings.append(Finding(what, "finite differences", error, FINITE_DIFFERENCE_TOLERANCE))

    _, tangent = jax.jvp(jax.jit(forward), (primals,), (directions,))
    scale = jnp.sqrt(_dot(tangent, tangent) * _dot(cotangent, cotangent))
    error = _ratio(abs(_dot(tangent, cotangent) - sum(products)), scale)
    findings.append(Finding("all together", "adjoint identity", error, AUTODIFF_TOLERANCE))
    return Report(name, tuple(findings))


def _dot(tree: PyTree, other: PyTree) -> jax.Array:
    """The inner product of two trees of arrays."""
    products = jax.tree.leaves(jax.tree.map(jnp.vdot, tree, other))
    return functools.reduce(jnp.add, products)


def _normal_like(tree: PyTree, key: jax.Array) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=True)]
    )


def _moved(tree: PyTree, directions: PyTree, step: float) -> PyTree:
    return jax.tree.map(lambda p, v: p + step * v, tree, directions)


def _ratio(error: jax.Array, scale: jax.Array) -> float:
    """The error divided by the scale; the error itself if the scale is zero."""
    return float(error / jnp.where(scale == 0, 1, scale))
