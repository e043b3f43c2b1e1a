"""The explicit backward pass with every reading at once, and what is missing from its answer."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbp.check.report import Finding, broken
from jaxbp.check.trees import floats, leaves, outline
from jaxbp.readings.inner_products import gram
from jaxbp.readings.norms import sq_norms
from jaxbp.readings.sums import per_example, total
from jaxbp.signals.kinds import (
    Conv,
    Outer,
    Scale,
    Through,
    formula_of,
    is_signal,
    map_signals,
    uses_of,
)
from jaxbp.types import Layer, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
    """What the check reads of one parameter, in one sweep.

    Attributes:
      total: the gradient, summed over examples.
      by_example: the gradient of each example.
      sq_norms: their squared norms.
      gram: their inner products, if the signal has a formula of its own for them, or None.
      carries: whether the error goes back through the parameter, by the kind of its signal.
    """

    total: jax.Array
    by_example: jax.Array
    sq_norms: jax.Array
    gram: jax.Array | None
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


class Swept(NamedTuple):
    """The result of an explicit backward pass, by path.

    Attributes:
      gradients: of each parameter and input that has one of the right shape.
      answers: the readings of each parameter that has them.
      kept: the total of each signal that the pass returned without a reading.
    """

    gradients: dict[str, jax.Array]
    answers: dict[str, Answers]
    kept: dict[str, jax.Array]


def sweep_with_readings(
    layer: Layer, key: jax.Array | None, params: PyTree, x: PyTree, cotangent: PyTree
) -> tuple[Swept, list[Finding]]:
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
            faults.append(broken("params", "readings", failed))

        found, misplaced = matched({"params": readings}, {"params": params}, _is_answer)
        faults.extend(misplaced)
        answers = {what: a for what, a in found.items() if isinstance(a, Answers)}
        gradients = {what: a.total for what, a in answers.items()}
        for what, other in found.items():
            if what not in answers:
                if not failed:
                    faults.append(broken(what, "readings", _why_unread(other)))
                if isinstance(other, jax.Array):
                    gradients[what] = other
        derivatives, misplaced = matched_dx(dx, floats(x))
        faults.extend(misplaced)
        wanted = leaves({"params": params, "inputs": floats(x)})
        fitting, misfits = keep_fitting(gradients | derivatives, wanted)
        faults.extend(misfits)

        kept = {}
        if not faults:
            _, signals = layer.backward(params, cache, dy)
            faults.extend(_unkept(signals, answers))
            kept = {} if faults else leaves({"params": map_signals(total, signals)})
        return Swept(fitting, answers, kept)

    return sweep(params, x, cotangent), faults


def _read_all(signal: Any) -> Answers | _Unread:
    """The reading of the check."""
    try:
        return Answers(
            total(signal),
            per_example(signal),
            sq_norms(signal),
            gram(signal) if formula_of(signal, "gram") else None,
            any(map(_carries, uses_of(signal))),
        )
    except (TypeError, ValueError, LookupError) as error:
        return _Unread(f"backward called read with {outline(signal)}, which has none: {error}")


def _carries(signal: Any) -> bool:
    signal = signal.signal if isinstance(signal, Through) else signal
    return isinstance(signal, Outer | Conv | Scale)


def _is_answer(node: Any) -> bool:
    return isinstance(node, Answers | _Unread) or is_signal(node)


def matched(
    tree: PyTree, like: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[dict[str, Any], list[Finding]]:
    """What backward returned for each leaf of `like`, by path, and what is missing or too much."""
    found, wanted = leaves(tree, is_leaf), leaves(like)
    faults = [
        broken(what, "structure", "backward returned nothing for it.")
        for what in wanted
        if what not in found
    ]
    faults += [
        broken(
            what, "structure", f"backward returned {outline(node)} for it; there is no such leaf."
        )
        for what, node in found.items()
        if what not in wanted
    ]
    structures = [jax.tree.structure(t, is_leaf=is_leaf) for t in (tree, like)]
    if not faults and structures[0] != structures[1]:
        (what,) = like
        got, want = (jax.tree.unflatten(s, ["*"] * s.num_leaves)[what] for s in structures)
        problem = f"backward returned a tree {got}; it takes {want}."
        faults.append(broken(what, "structure", problem))
    return {what: node for what, node in found.items() if what in wanted}, faults


def matched_dx(dx: PyTree, floats: PyTree) -> tuple[dict[str, Any], list[Finding]]:
    """The same for dx. If one input alone is floating-point, dx may stand alone, as in `masked`."""
    wanted = leaves({"inputs": floats})
    if len(wanted) == 1 and jax.tree.structure(dx) == jax.tree.structure(0):
        return {what: dx for what in wanted}, []
    return matched({"inputs": dx}, {"inputs": floats})


def _why_unread(node: Any) -> str:
    """Why a node in the place of a parameter's reading is none."""
    if isinstance(node, _Unread):
        return node.problem
    return (
        f"backward returned {outline(node)} and did not call read. Return read(signal), with the "
        "signal of this parameter?"
    )


def _unkept(signals: PyTree, answers: dict[str, Answers]) -> list[Finding]:
    """A finding for each parameter whose signal is not returned if no reading is passed."""
    found = leaves({"params": signals}, is_signal)
    return [
        broken(
            what,
            "readings",
            f"without read, backward returned {outline(found.get(what))}; the default of read is "
            "keep, which returns the signal.",
        )
        for what in answers
        if not is_signal(found.get(what))
    ]


def keep_fitting(
    found: dict[str, Any], wanted: dict[str, Any]
) -> tuple[dict[str, jax.Array], list[Finding]]:
    """The arrays that have the shape and dtype wanted at their path, and a finding for the rest."""
    fitting, faults = {}, []
    for what, array in found.items():
        got, want = outline(array), outline(wanted[what])
        if got == want:
            fitting[what] = array
        else:
            problem = f"its derivative is {got}; it takes {want}."
            if jnp.shape(wanted[what])[1:][-jnp.ndim(array) :] == jnp.shape(array) != ():
                problem += " Has it an entry for each position? Then pass its signal to unshared."
            faults.append(broken(what, "shape", problem))
    return fitting, faults
