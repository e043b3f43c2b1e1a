"""The witnesses of derivatives: autodiff, finite differences and the adjoint identity."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.check.report import AUTODIFF_TOLERANCE, Finding
from jaxbp.check.sweep import Swept
from jaxbp.check.trees import difference, dot, filled, leaves, moved, normal_like, ratio, times
from jaxbp.signals.stacked import stack_axes
from jaxbp.types import PyTree, show_path

# A central difference in float64 has an error of about h^2 + 1e-16 / h. STEP is the length of the
# whole move, for parameters of any size: a longer move would cross the kinks of a wide relu.
FINITE_DIFFERENCE_TOLERANCE = 1e-6
STEP = 1e-5


def of_primals(run: Callable[..., PyTree], x: PyTree) -> Callable[[PyTree], PyTree]:
    """The outputs as a function of what has a derivative."""
    return lambda primals: run(primals["params"], filled(x, primals["inputs"]))


def transpose_by_example(
    function: Callable[[PyTree], PyTree], n: int
) -> Callable[[PyTree, PyTree], PyTree]:
    """Makes the function of primals and u that computes J_n^T u_n of each example by autodiff.

    It returns a tree like primals of arrays [N, ...].
    """

    @jax.jit
    def transpose(primals, cotangent):
        _, vjp = jax.vjp(function, primals)
        # One after another, so that the function needs no rule for `vmap`.
        return jax.lax.map(
            lambda own: vjp(jax.tree.map(lambda u: times(u, own.astype(u.dtype)), cotangent))[0],
            jnp.eye(n),
        )

    return transpose


def _summed(by_example: PyTree) -> PyTree:
    """The sums over the examples."""
    return jax.tree.map(lambda g: jnp.sum(g, axis=0), by_example)


def compare_derivatives(
    function: Callable[[PyTree], PyTree],
    primals: PyTree,
    cotangent: PyTree,
    gradients: dict[str, jax.Array],
    by_example: PyTree,
    key: jax.Array,
) -> list[Finding]:
    """Compares the explicit J^T u, by path, with autodiff, finite differences and J v."""

    def project(primals):
        return dot(function(primals), cotangent)

    directions, wanted = normal_like(primals, key), leaves(_summed(by_example))
    findings, products = [], []
    for path, v in jax.tree.leaves_with_path(directions):
        what = show_path(path)
        if what not in gradients:
            continue
        got, want = gradients[what], wanted[what]
        error = ratio(jnp.max(jnp.abs(got - want)), jnp.max(jnp.abs(want)))
        findings.append(Finding(what, "autodiff", error, AUTODIFF_TOLERANCE))

        along = jax.tree.map_with_path(lambda p, v, at=path: v if p == at else 0 * v, directions)
        h = STEP / v.size**0.5
        slope = (project(moved(primals, along, h)) - project(moved(primals, along, -h))) / (2 * h)
        products.append(jnp.vdot(got, v))
        error = ratio(abs(slope - products[-1]), jnp.linalg.norm(want.ravel()))
        findings.append(Finding(what, "finite differences", error, FINITE_DIFFERENCE_TOLERANCE))

    if products and len(products) == len(wanted):
        _, tangent = jax.jvp(function, (primals,), (directions,))
        scale = jnp.sqrt(dot(tangent, tangent) * dot(cotangent, cotangent))
        error = ratio(abs(dot(tangent, cotangent) - sum(products)), scale)
        findings.append(Finding("all together", "adjoint identity", error, AUTODIFF_TOLERANCE))
    return findings


def compare_readings(swept: Swept, params: PyTree, by_example: PyTree) -> list[Finding]:
    """Compares the readings of each parameter with the gradients of each example by autodiff."""
    axes, wanted = leaves({"params": stack_axes(params)}), leaves(by_example)
    findings = []
    for what, answers in swept.answers.items():
        layers = axes[what]  # the readings of a stack are [L, N, ...]
        want = jnp.moveaxis(wanted[what], 0, layers)
        squares = jnp.sum(want * want, axis=range(layers + 1, want.ndim))
        errors = {
            "per_example": difference(answers.by_example, want),
            "sq_norms": difference(answers.sq_norms, squares),
        }
        if answers.gram is not None:
            rows = want.reshape(*want.shape[: layers + 1], -1)
            errors["gram"] = difference(answers.gram, rows @ jnp.swapaxes(rows, -1, -2))
        if what in swept.kept:
            errors["keep"] = difference(swept.kept[what], answers.total)
        wrong = {name: e for name, e in errors.items() if not e <= AUTODIFF_TOLERANCE}
        error, problem = float(np.max([*errors.values()])), ""
        if wrong:
            listed = ", ".join(f"{name} ({e:.1e})" for name, e in wrong.items())
            problem = f"not those of each example: {listed}."
        findings.append(Finding(what, "readings", error, AUTODIFF_TOLERANCE, problem))
    return findings
