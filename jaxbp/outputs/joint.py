"""Joint losses: networks with several outputs, a loss for each of them.

The outputs of such a network are a tree of arrays, such as a dict or a tuple, and so are its
targets and its delta. Each output is a head of the network.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbp.outputs.weighting import weighted
from jaxbp.require import require_examples
from jaxbp.types import Loss, PyTree, exportable, widened

__all__ = ["JointLoss", "joint_loss"]


@dataclasses.dataclass(frozen=True, eq=False)
class JointLoss(Loss):
    """A loss for each output: E_n = sum_h w_h E_nh. `joint_loss` makes it.

    Attributes:
      losses: a tree with a Loss for each output.
      weights: w_h, one number for each loss, in the order of the tree's leaves.
    """

    losses: PyTree = ()
    weights: tuple[float, ...] = ()

    def columns(self, make: Callable[[Loss, Any, Any], Any], outputs: PyTree, targets: PyTree):
        """The columns of each output's error, [K_h, ...], times sqrt(w_h) and zero in the others.

        Args:
          make: `make(loss, outputs, targets) -> columns [K_h, ...]`, of one output.
          outputs: of all.
          targets: of all.

        Returns:
          A tree like the outputs, of arrays [sum of K_h, ...].
        """
        own = []
        for w, (loss, y, t) in zip(self.weights, _counted(self, outputs, targets), strict=True):
            own.append((math.sqrt(w) * make(loss, widened(y), t)).astype(y.dtype))
        total, at, spread = sum(map(len, own)), 0, []
        for columns in own:
            rows = [(at, total - at - len(columns))] + [(0, 0)] * (columns.ndim - 1)
            spread.append(jnp.pad(columns, rows))
            at += len(columns)
        return jax.tree.structure(self.losses, is_leaf=_is_loss).unflatten(spread)


@exportable
class _Drawn(NamedTuple):
    """Targets that were drawn, for which each delta is multiplied by sqrt(w_h), not by w_h."""

    targets: PyTree


def joint_loss(losses: PyTree, weights: PyTree | None = None) -> JointLoss:
    """The weighted sum of a loss for each output of a network, E_n = sum_h w_h E_nh.

    Use it for a network whose outputs are a tree, such as a lifted model with several heads.
    Targets are a tree like the outputs, with the targets of each loss in their places, and so is
    delta. The Hessian has no terms between different outputs.

    Args:
      losses: a tree like the outputs, with a Loss for each.
      weights: a tree like `losses` of numbers that are not negative; all 1 if it is None. A loss of
        weight 0 counts nothing, whatever its outputs and targets are.

    Raises:
      TypeError: a leaf is not a Loss.
      ValueError: the trees differ, or a weight is negative or not finite.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> losses = {"label": bp.softmax_cross_entropy, "size": bp.squared_error}
      >>> loss = bp.joint_loss(losses, {"label": 1.0, "size": 0.5})
      >>> outputs = {"label": jnp.zeros((3, 2)), "size": jnp.ones((3, 1))}
      >>> value, delta = loss(outputs, {"label": jnp.array([0, 1, 1]), "size": jnp.zeros((3, 1))})
      >>> [round(float(v), 3) for v in value], delta["size"][0].tolist()
      ([0.943, 0.943, 0.943], [0.5])
    """
    heads, structure = jax.tree.flatten(losses, is_leaf=_is_loss)
    wrong = [type(head).__name__ for head in heads if not _is_loss(head)]
    if wrong or not heads:
        got = ", ".join(wrong) or "nothing"
        raise TypeError(f"joint_loss: takes a tree with a Loss for each output; got {got}.")
    if weights is None:
        own = (1.0,) * len(heads)
    else:
        own, given = jax.tree.flatten(weights)
        if given != structure:
            raise ValueError(
                f"joint_loss: weights are {given}, expected {structure} as the losses."
            )
        if not all(isinstance(w, numbers.Real) and 0 <= float(w) < math.inf for w in own):
            raise ValueError(
                f"joint_loss: weights are {own}; none may be negative, and all have to be finite "
                "numbers."
            )
    name = f"joint_loss({', '.join(head.name for head in heads)})"

    def terms(outputs, targets):
        """The weighted sum of a loss for each output (see `joint_loss`)."""
        factors = loss.weights
        if isinstance(targets, _Drawn):
            targets, factors = targets.targets, tuple(map(math.sqrt, factors))
        values, deltas = [], []
        for factor, (head, y, t) in zip(factors, _counted(loss, outputs, targets), strict=True):
            value, delta = head(jax.tree.map(widened, y), t)
            values.append(factor * value)
            deltas.append(_scaled(factor, delta, y))
        return functools.reduce(jnp.add, values), structure.unflatten(deltas)

    def sample(key, outputs, targets=None):
        keys = jax.random.split(key, len(heads))
        if targets is None:
            targets = structure.unflatten([None] * len(heads))
        own = zip(keys, _heads(loss, outputs, targets), strict=True)
        return _Drawn(structure.unflatten([head.sample(k, y, t) for k, (head, y, t) in own]))

    def hessian_factor(outputs, targets):
        return loss.columns(lambda head, y, t: head.hessian_factor(y, t), outputs, targets)

    loss = JointLoss(
        name, terms, sample, hessian_factor, losses=losses, weights=tuple(map(float, own))
    )
    return loss


def _scaled(factor: float, delta: PyTree, outputs: PyTree) -> PyTree:
    """A delta times a factor, in the dtypes of the outputs."""
    return jax.tree.map(lambda d, y: (factor * d).astype(y.dtype), delta, outputs)


def _is_loss(node: Any) -> bool:
    return isinstance(node, Loss)


def _heads(loss, outputs, targets):
    """Triples of a loss, its outputs and its targets."""
    heads, structure = jax.tree.flatten(loss.losses, is_leaf=_is_loss)
    try:
        outputs, targets = structure.flatten_up_to(outputs), structure.flatten_up_to(targets)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{loss.name}: takes outputs and targets as trees like the losses, {structure}: {error}"
        ) from error
    return list(zip(heads, outputs, targets, strict=True))


def _counted(loss, outputs, targets):
    """The same, with weights of 0 in the targets of a loss of weight 0, which then is exactly 0."""
    n = require_examples(loss.name, outputs=outputs)
    return [
        (weighted(head), y, (t, jnp.zeros(n))) if w == 0 else (head, y, t)
        for w, (head, y, t) in zip(loss.weights, _heads(loss, outputs, targets), strict=True)
    ]
