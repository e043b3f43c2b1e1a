"""The gradient check: compares an explicit backward pass with independent witnesses.

Use it to test a layer, a network or a loss of your own. It runs in float64, with random inputs and
a random cotangent u. With f the forward pass, p the parameters and the input, and J the Jacobian:

    autodiff             J^T u from `jax.vjp`, for each parameter and for the input
    finite differences   u . (f(p + h v) - f(p - h v)) / 2h against (J^T u) . v, for a random v
    adjoint identity     <J v, u> = <v, J^T u>, with J v from `jax.jvp`, for everything at once
    readings             `per_example`, `sq_norms` and `keep` of each parameter, against the
                         gradient of each example from `jax.vjp`

For a layer it also checks the rest of the contract in `types.Layer`:

    same key             `init` draws the same parameters from the same key
    out_shape            the outputs have the shape that `init` promised
    jit                  `forward` computes the same under `jax.jit`, and a second time
    other examples       the outputs of an example do not depend on other examples
    without a key        the same for the pass without a key, if it is another one
    another tree         `backward` carries the error by the tree that it gets
    linear in dy         `backward` is linear in dy, whatever the tree

The layers, losses and readings of the package never use automatic differentiation. It appears here,
in `lift` for what lies between the parameters of a foreign model, and in `sweeps.curvature` as the
forward derivative of the explicit backward pass.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.readings.norms import sq_norms
from jaxbp.readings.sums import per_example, total
from jaxbp.require import require_examples
from jaxbp.signals.kinds import Conv, Outer, Scale, Through, is_signal, map_signals, uses_of
from jaxbp.signals.stacked import stack_axes
from jaxbp.types import Layer, Loss, PyTree, show_path, show_shape

__all__ = ["Finding", "Report", "check"]

AUTODIFF_TOLERANCE = 1e-10
# A central difference in float64 has an error of about h^2 + 1e-16 / h. STEP is the length of the
# whole move, for parameters of any size: a longer move would cross the kinks of a wide relu.
FINITE_DIFFERENCE_TOLERANCE = 1e-6
STEP = 1e-5
FAR = -1000.0  # a multiple of dy that shows what is not linear, such as clipped deltas


class Finding(NamedTuple):
    """One comparison of a check.

    Attributes:
      what: the parameter, by its path, the inputs or the outputs.
      witness: what it was compared with, such as `autodiff`; the module has the list.
      error: the largest difference, relative to the size of the expected values; inf where there is
        nothing to compare, because the contract is broken.
      tolerance: the largest error that is accepted.
      problem: if something is wrong, a sentence that says what to do, where one is known.
    """

    what: str
    witness: str
    error: float
    tolerance: float
    problem: str = ""

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
        """The largest error against autodiff; inf if a broken contract left nothing to compare."""
        errors = [f.error for f in self.findings if f.witness == "autodiff"]
        return max(errors, default=0.0 if self.ok else math.inf)

    def raise_if_wrong(self) -> "Report":
        """Returns the report, or raises an `AssertionError` with every finding that is not ok."""
        wrong = [finding for finding in self.findings if not finding.ok]
        if wrong:
            raise AssertionError(f"check failed\n{Report(self.name, tuple(wrong))}")
        return self

    def __str__(self) -> str:
        width = max(len(finding.what) for finding in self.findings)
        lines = [f"{self.name}: {'right' if self.ok else 'WRONG'}"]
        for f in self.findings:
            row = f"  {'ok   ' if f.ok else 'WRONG'}  {f.what:{width}}  {f.witness:18}"
            if f.error != math.inf:
                row += f"  {f.error:8.1e} (at most {f.tolerance:.0e})"
            lines += [row.rstrip(), *([f"         {f.problem}"] if f.problem else [])]
        return "\n".join(lines)


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
    params = _moved(params, _normal_like(params, move_key), 0.1)
    x = _normals(input_key, shape, batch) if inputs is None else jax.tree.map(jnp.asarray, inputs)
    x = jax.tree.map(lambda a: a.astype(jnp.float64) if _is_float(a) else a, x)
    n = require_examples("check", inputs=x)
    # A lifted layer knows the function that it was made of, which is the better witness.
    reference = getattr(layer.forward, "reference", None)
    draw_key = None if reference is not None else draw_key

    run = jax.jit(reference or (lambda params, x: layer.forward(params, x, key=draw_key)[0]))
    outputs, eager = run(params, x), layer.forward(params, x, key=draw_key)[0]
    same_key = Finding("params", "same key", _difference(again, drawn), 0.0)
    promised = _compare_shapes(outputs, out_shape, n)
    if any(jnp.shape(y)[:1] != (n,) for y in jax.tree.leaves(outputs)):
        return Report(layer.name, (same_key, promised))
    jitted = Finding("outputs", "jit", _difference(eager, outputs), AUTODIFF_TOLERANCE)
    findings = [same_key, promised, jitted, _replace_others(run, params, x, outputs, n)]

    cotangent = _normal_like(outputs, cotangent_key)
    primals = {"params": params, "inputs": _floats(x)}
    function = _of_primals(run, x)
    transpose = _transpose_by_example(function, n)
    by_example = transpose(primals, cotangent)
    swept, faults = _sweep(layer, draw_key, params, x, cotangent)
    findings += faults
    findings += _compare(function, primals, cotangent, swept.gradients, by_example, direction_key)
    findings += _compare_readings(swept, params, by_example)
    if not faults:
        tree = _normal_like(params, tree_key)
        moves = transpose({**primals, "params": tree}, cotangent)["inputs"]
        needs_tree = any(a.carries for a in swept.answers.values()) and (
            _difference(moves, by_example["inputs"]) > AUTODIFF_TOLERANCE
        )
        findings += _carry_by(tree, layer, draw_key, params, x, cotangent, swept, needs_tree)
        if _difference(layer.forward(params, x)[0], eager) > 0:  # the layer draws
            findings.append(_without_key(layer, primals, x, cotangent))
    return Report(layer.name, tuple(findings))


def _check_loss(loss: Loss, key: jax.Array, shape: Any, batch: int, targets: PyTree) -> Report:
    output_key, sample_key, key = jax.random.split(key, 3)
    cotangent_key, direction_key = jax.random.split(key)
    outputs = _normals(output_key, shape, batch)
    if targets is None:
        targets = loss.sample(sample_key, outputs)
    values, delta = jax.jit(lambda y, t: loss(y, t))(outputs, targets)
    if values.shape != (batch,):
        got = show_shape(values.shape)
        problem = f"the loss has values of shape {got}; it takes [{batch}], one for each example."
        return Report(loss.name, (_broken("values", "shape", problem),))

    @jax.jit
    def function(primals):
        return loss(primals["outputs"], targets)[0]

    primals, cotangent = {"outputs": outputs}, _normal_like(values, cotangent_key)
    by_example = _transpose_by_example(function, batch)(primals, cotangent)
    found, findings = _matched({"outputs": delta}, primals)
    deltas, misfits = _fitting(found, _leaves(primals))
    gradients = {what: _times(d, cotangent) for what, d in deltas.items()}
    findings += misfits
    findings += _compare(function, primals, cotangent, gradients, by_example, direction_key)
    for what, rows in _leaves(by_example).items():  # [N, N, ...]: value n by the outputs of m
        error = float(np.max(np.abs(rows[~np.eye(batch, dtype=bool)]), initial=0.0))
        findings.append(Finding(what, "other examples", error, AUTODIFF_TOLERANCE))
    return Report(loss.name, tuple(findings))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Answers:
    """What the check reads of one parameter, in one sweep.

    Attributes:
      total: the gradient, summed over examples.
      by_example: the gradient of each example.
      sq_norms: their squared norms.
      carries: whether the error goes back through the parameter, by the kind of its signal.
    """

    total: jax.Array
    by_example: jax.Array
    sq_norms: jax.Array
    carries: bool = dataclasses.field(metadata={"static": True})

    def __add__(self, other):
        """Readings of several uses do not add up, for instance norms: the layer made a mistake."""
        del other
        return _Unread(
            "backward added two readings. The norm of a sum is not the sum of the norms: put the "
            "signals of all uses into one Sum, and read that once?"
        )

    __radd__ = __add__


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Unread:
    """In the place of a reading: why there is none, a sentence."""

    problem: str


class _Swept(NamedTuple):
    """The result of an explicit backward pass, by path.

    Attributes:
      gradients: of each parameter and input that has one of the right shape.
      answers: the readings of each parameter that has them.
      kept: the total of each signal that the pass returned without a reading.
    """

    gradients: dict[str, jax.Array]
    answers: dict[str, _Answers]
    kept: dict[str, jax.Array]


def _read_all(signal: Any) -> _Answers | _Unread:
    """The reading of the check."""
    try:
        return _Answers(
            total(signal),
            per_example(signal),
            sq_norms(signal),
            any(map(_carries, uses_of(signal))),
        )
    except (TypeError, ValueError, LookupError) as error:
        return _Unread(f"backward called read with {_outline(signal)}, which has none: {error}")


def _carries(signal: Any) -> bool:
    signal = signal.signal if isinstance(signal, Through) else signal
    return isinstance(signal, Outer | Conv | Scale)


def _is_answer(node: Any) -> bool:
    return isinstance(node, _Answers | _Unread) or is_signal(node)


def _sweep(
    layer: Layer, key: jax.Array | None, params: PyTree, x: PyTree, cotangent: PyTree
) -> tuple[_Swept, list[Finding]]:
    """Runs backward with every reading, and says which parts of its answer break the contract."""
    faults: list[Finding] = []

    @jax.jit
    def sweep(params, x, dy):
        _, cache = layer.forward(params, x, key=key)
        failed = None
        try:
            dx, readings = layer.backward(params, cache, dy, read=_read_all)
        except Exception as error:
            # If `total` fails as well, the mistake is not in how backward reads: let it be seen.
            dx, readings = layer.backward(params, cache, dy, read=total)
            failed = f"backward failed with a reading that returns a tree: {error}"
            faults.append(_broken("params", "readings", failed))

        found, misplaced = _matched({"params": readings}, {"params": params}, _is_answer)
        faults.extend(misplaced)
        answers = {what: a for what, a in found.items() if isinstance(a, _Answers)}
        gradients = {what: a.total for what, a in answers.items()}
        for what, other in found.items():
            if what not in answers:
                if not failed:
                    faults.append(_broken(what, "readings", _why_unread(other)))
                if isinstance(other, jax.Array):
                    gradients[what] = other
        derivatives, misplaced = _matched_dx(dx, _floats(x))
        faults.extend(misplaced)
        wanted = _leaves({"params": params, "inputs": _floats(x)})
        fitting, misfits = _fitting(gradients | derivatives, wanted)
        faults.extend(misfits)

        kept = {}
        if not faults:
            _, signals = layer.backward(params, cache, dy)
            faults.extend(_unkept(signals, answers))
            kept = {} if faults else _leaves({"params": map_signals(total, signals)})
        return _Swept(fitting, answers, kept)

    return sweep(params, x, cotangent), faults


def _matched(
    tree: PyTree, like: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[dict[str, Any], list[Finding]]:
    """What backward returned for each leaf of `like`, by path, and what is missing or too much."""
    found, wanted = _leaves(tree, is_leaf), _leaves(like)
    faults = [
        _broken(what, "structure", "backward returned nothing for it.")
        for what in wanted
        if what not in found
    ]
    faults += [
        _broken(
            what, "structure", f"backward returned {_outline(node)} for it; there is no such leaf."
        )
        for what, node in found.items()
        if what not in wanted
    ]
    structures = [jax.tree.structure(t, is_leaf=is_leaf) for t in (tree, like)]
    if not faults and structures[0] != structures[1]:
        (what,) = like
        got, want = (jax.tree.unflatten(s, ["*"] * s.num_leaves)[what] for s in structures)
        problem = f"backward returned a tree {got}; it takes {want}."
        faults.append(_broken(what, "structure", problem))
    return {what: node for what, node in found.items() if what in wanted}, faults


def _matched_dx(dx: PyTree, floats: PyTree) -> tuple[dict[str, Any], list[Finding]]:
    """The same for dx. If one input alone is floating-point, dx may stand alone, as in `masked`."""
    wanted = _leaves({"inputs": floats})
    if len(wanted) == 1 and jax.tree.structure(dx) == jax.tree.structure(0):
        return {what: dx for what in wanted}, []
    return _matched({"inputs": dx}, {"inputs": floats})


def _why_unread(node: Any) -> str:
    """Why a node in the place of a parameter's reading is none."""
    if isinstance(node, _Unread):
        return node.problem
    return (
        f"backward returned {_outline(node)} and did not call read. Return read(signal), with the "
        "signal of this parameter?"
    )


def _unkept(signals: PyTree, answers: dict[str, _Answers]) -> list[Finding]:
    """A finding for each parameter whose signal is not returned if no reading is passed."""
    found = _leaves({"params": signals}, is_signal)
    return [
        _broken(
            what,
            "readings",
            f"without read, backward returned {_outline(found.get(what))}; the default of read is "
            "keep, which returns the signal.",
        )
        for what in answers
        if not is_signal(found.get(what))
    ]


def _fitting(
    found: dict[str, Any], wanted: dict[str, Any]
) -> tuple[dict[str, jax.Array], list[Finding]]:
    """The arrays that have the shape and dtype wanted at their path, and a finding for the rest."""
    fitting, faults = {}, []
    for what, array in found.items():
        got, want = _outline(array), _outline(wanted[what])
        if got == want:
            fitting[what] = array
        else:
            problem = f"its derivative is {got}; it takes {want}."
            if jnp.shape(wanted[what])[1:][-jnp.ndim(array) :] == jnp.shape(array) != ():
                problem += " Has it an entry for each position? Then pass its signal to unshared."
            faults.append(_broken(what, "shape", problem))
    return fitting, faults


def _compare_shapes(outputs: PyTree, out_shape: Any, n: int) -> Finding:
    """Compares the shapes of the outputs with what `init` promised."""
    shapes = jax.tree.map(jnp.shape, outputs)
    promised = jax.tree.map(lambda shape: (n, *shape), out_shape, is_leaf=_is_shape)
    if shapes != promised:
        problem = f"the outputs have shape {shapes}; the out_shape of init promised {promised}."
        return _broken("outputs", "out_shape", problem)
    return Finding("outputs", "out_shape", 0.0, 0.0)


def _replace_others(
    run: Callable[..., PyTree], params: PyTree, x: PyTree, outputs: PyTree, n: int
) -> Finding:
    """Whether the outputs of an example stay the same if all other examples become copies of it."""

    def row(tree, i):
        return jax.tree.map(lambda a: a[i], tree)

    errors, problem = [], ""
    for i in range(n):
        copies = jax.tree.map(lambda a, i=i: jnp.broadcast_to(a[i], a.shape), x)
        errors.append(_difference(row(run(params, copies), i), row(outputs, i)))
    error = float(np.max(errors))
    if not error <= AUTODIFF_TOLERANCE:
        problem = (
            "the outputs of an example change with other examples, as in batch normalisation in "
            "training, so no example has a gradient of its own. Use group, layer or RMS "
            "normalisation?"
        )
    return Finding("outputs", "other examples", error, AUTODIFF_TOLERANCE, problem)


def _of_primals(run: Callable[..., PyTree], x: PyTree) -> Callable[[PyTree], PyTree]:
    """The outputs as a function of what has a derivative."""
    return lambda primals: run(primals["params"], _filled(x, primals["inputs"]))


def _transpose_by_example(
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
            lambda own: vjp(jax.tree.map(lambda u: _times(u, own.astype(u.dtype)), cotangent))[0],
            jnp.eye(n),
        )

    return transpose


def _summed(by_example: PyTree) -> PyTree:
    """The sums over the examples."""
    return jax.tree.map(lambda g: jnp.sum(g, axis=0), by_example)


def _compare(
    function: Callable[[PyTree], PyTree],
    primals: PyTree,
    cotangent: PyTree,
    gradients: dict[str, jax.Array],
    by_example: PyTree,
    key: jax.Array,
) -> list[Finding]:
    """Compares the explicit J^T u, by path, with autodiff, finite differences and J v."""

    def project(primals):
        return _dot(function(primals), cotangent)

    directions, wanted = _normal_like(primals, key), _leaves(_summed(by_example))
    findings, products = [], []
    for path, v in jax.tree.leaves_with_path(directions):
        what = show_path(path)
        if what not in gradients:
            continue
        got, want = gradients[what], wanted[what]
        error = _ratio(jnp.max(jnp.abs(got - want)), jnp.max(jnp.abs(want)))
        findings.append(Finding(what, "autodiff", error, AUTODIFF_TOLERANCE))

        along = jax.tree.map_with_path(lambda p, v, at=path: v if p == at else 0 * v, directions)
        h = STEP / v.size**0.5
        slope = (project(_moved(primals, along, h)) - project(_moved(primals, along, -h))) / (2 * h)
        products.append(jnp.vdot(got, v))
        error = _ratio(abs(slope - products[-1]), jnp.linalg.norm(want.ravel()))
        findings.append(Finding(what, "finite differences", error, FINITE_DIFFERENCE_TOLERANCE))

    if products and len(products) == len(wanted):
        _, tangent = jax.jvp(function, (primals,), (directions,))
        scale = jnp.sqrt(_dot(tangent, tangent) * _dot(cotangent, cotangent))
        error = _ratio(abs(_dot(tangent, cotangent) - sum(products)), scale)
        findings.append(Finding("all together", "adjoint identity", error, AUTODIFF_TOLERANCE))
    return findings


def _compare_readings(swept: _Swept, params: PyTree, by_example: PyTree) -> list[Finding]:
    """Compares the readings of each parameter with the gradients of each example by autodiff."""
    axes, wanted = _leaves({"params": stack_axes(params)}), _leaves(by_example)
    findings = []
    for what, answers in swept.answers.items():
        layers = axes[what]  # the readings of a stack are [L, N, ...]
        want = jnp.moveaxis(wanted[what], 0, layers)
        squares = jnp.sum(want * want, axis=range(layers + 1, want.ndim))
        errors = {
            "per_example": _difference(answers.by_example, want),
            "sq_norms": _difference(answers.sq_norms, squares),
        }
        if what in swept.kept:
            errors["keep"] = _difference(swept.kept[what], answers.total)
        wrong = {name: e for name, e in errors.items() if not e <= AUTODIFF_TOLERANCE}
        error, problem = float(np.max([*errors.values()])), ""
        if wrong:
            listed = ", ".join(f"{name} ({e:.1e})" for name, e in wrong.items())
            problem = f"not those of each example: {listed}."
        findings.append(Finding(what, "readings", error, AUTODIFF_TOLERANCE, problem))
    return findings


def _carry_by(
    tree: PyTree,
    layer: Layer,
    key: jax.Array | None,
    params: PyTree,
    x: PyTree,
    cotangent: PyTree,
    swept: _Swept,
    needs_tree: bool,
) -> list[Finding]:
    """Whether backward carries the error by the tree that it gets, and is linear in dy."""

    @jax.jit
    def sweep(tree, params, x, dy):
        _, cache = layer.forward(params, x, key=key)
        dx, gradients = layer.backward(tree, cache, dy, read=total)
        return _matched_dx(dx, _floats(x))[0], gradients

    own, other = (sweep(t, params, x, cotangent) for t in (params, tree))
    far = sweep(tree, params, x, jax.tree.map(lambda u: FAR * u, cotangent))
    error = _difference(jax.tree.map(lambda a: a / FAR, far), other)
    linear = Finding("all together", "linear in dy", error, AUTODIFF_TOLERANCE)
    if needs_tree and _difference(other[0], own[0]) == 0:
        problem = (
            "dx is the same whatever tree backward gets. Carry the error by the weights of the "
            "first argument, not by weights from the cache?"
        )
        return [linear, _broken("inputs", "another tree", problem)]
    error = _difference(own[0] | _leaves({"params": own[1]}), swept.gradients)
    return [linear, Finding("inputs", "another tree", error, AUTODIFF_TOLERANCE)]


def _without_key(layer: Layer, primals: PyTree, x: PyTree, cotangent: PyTree) -> Finding:
    """Compares the pass without a key with autodiff."""

    @jax.jit
    def both(primals, x, dy):
        run = _of_primals(lambda params, x: layer.forward(params, x)[0], x)
        (want,) = jax.vjp(run, primals)[1](dy)
        _, cache = layer.forward(primals["params"], x)
        dx, gradients = layer.backward(primals["params"], cache, dy, read=total)
        return _leaves({"params": gradients}) | _matched_dx(dx, _floats(x))[0], _leaves(want)

    error = _difference(*both(primals, x, cotangent))
    return Finding("all together", "without a key", error, AUTODIFF_TOLERANCE)


def _broken(what: str, witness: str, problem: str) -> Finding:
    """The finding that a contract is broken, so that there is nothing to compare."""
    return Finding(what, witness, math.inf, 0.0, problem)


def _leaves(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    paths = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    return {show_path(path): leaf for path, leaf in paths}


def _outline(node: Any) -> str:
    """Describes a leaf in a few words, for messages."""
    if is_signal(node):
        operands = ", ".join(show_shape(jnp.shape(a)) for a in jax.tree.leaves(node))
        return f"the signal {type(node).__name__}({operands})"
    if hasattr(node, "shape") and hasattr(node, "dtype"):
        return f"an array of shape {show_shape(node.shape)} and dtype {node.dtype}"
    return f"an object of type {type(node).__name__}"


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _floats(tree: PyTree) -> PyTree:
    """The arrays that have a derivative, and None for integers and booleans."""
    return jax.tree.map(lambda a: a if _is_float(a) else None, tree)


def _filled(tree: PyTree, floats: PyTree) -> PyTree:
    """The tree with other floating-point arrays."""
    leaves, structure = jax.tree.flatten(tree)
    own = zip(structure.flatten_up_to(floats), leaves, strict=True)
    return structure.unflatten([leaf if new is None else new for new, leaf in own])


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple | list) and all(isinstance(size, int) for size in node)


def _normals(key: jax.Array, shape: Any, n: int) -> PyTree:
    """Normal random numbers [N, *shape], for each shape of a tree."""
    like = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((n, *s), jnp.float64), shape, is_leaf=_is_shape
    )
    return _normal_like(like, key)


def _times(array: jax.Array, weights: jax.Array) -> jax.Array:
    """Multiplies each example of an array [N, ...] by its weight, [N]."""
    return array * weights.reshape(-1, *[1] * (array.ndim - 1))


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


def _difference(tree: PyTree, other: PyTree) -> float:
    """The largest difference of two trees, relative to the size of a leaf; inf if shapes differ."""
    (got, structure), (want, same) = jax.tree.flatten(tree), jax.tree.flatten(other)
    if structure != same or list(map(jnp.shape, got)) != list(map(jnp.shape, want)):
        return math.inf
    errors = []
    for a, b in zip(map(np.asarray, got), map(np.asarray, want), strict=True):
        differs = a != b  # equal infinities, such as those of masked logits, do not
        error = np.max(np.abs(a[differs] - b[differs]), initial=0)
        errors.append(_ratio(error, np.max(np.abs(b), initial=0)))
    return float(np.max(errors, initial=0.0))


def _ratio(error: Any, scale: Any) -> float:
    """The error divided by the scale; the error itself if the scale is zero."""
    return float(error / (scale if scale else 1))
