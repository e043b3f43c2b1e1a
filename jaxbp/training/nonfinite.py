"""Finds where training stopped being finite: in which step, and in which layer.

A check of every value in every step would slow all steps down. So an epoch runs unchecked. Only if
its result is not finite, it runs again from its start, step by step up to the first bad step. That
step then runs operation by operation.

This is how `fit` does it. In a loop of your own, or where a step cannot run again, record
`read={"health": health}` and search it by `first_bad`: it costs a little in each step.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.readings.sums import mean
from jaxbp.training.averages import times
from jaxbp.training.processes import local
from jaxbp.training.state import TrainState, forward_key, rule_keys
from jaxbp.types import Layer, LayerError, LossFunction, PyTree, Rule, show_path

__all__ = ["NonFiniteError"]


class NonFiniteError(FloatingPointError):
    """Training met a value that is infinite or not a number.

    Attributes:
      epoch: the epoch, counted from 1.
      step: the step of the epoch, counted from 1; None if the value appeared after the last step.
      place: where the first such value appeared, in words.
      state: the last good state, before that step.
      records: the records of the epochs before.
    """

    def __init__(
        self,
        epoch: int,
        step: int | None,
        place: str,
        state: TrainState,
        records: list[dict[str, Any]],
    ):
        """Takes the attributes, in their order."""
        when = f"epoch {epoch}" if step is None else f"epoch {epoch}, step {step}"
        super().__init__(
            f"fit: {when}: the first value that is not finite came from {place}. "
            "The last good state is in this error's `state`. A smaller learning rate?"
        )
        self.epoch, self.step, self.place = epoch, step, place
        self.state, self.records = state, records


class BadStepError(Exception):
    """A step after which the loss, a parameter or the state of the rule is not finite.

    Attributes:
      step: the step of the epoch, counted from 1.
      state: the state before the step.
      after: the state after the step.
      batch: the inputs and targets of the step.
    """

    def __init__(self, step: int, state: TrainState, after: TrainState, batch: tuple[Any, Any]):
        """Takes the attributes, in their order."""
        super().__init__(f"step {step} is not finite")
        self.step, self.state, self.after, self.batch = step, state, after, batch


def watched(
    step: Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, Any]]],
    state: TrainState,
    batches: Iterable[tuple[Any, Any]],
    first: int = 1,
) -> Iterator[tuple[TrainState, dict[str, Any], int]]:
    """Makes one step for each batch and checks each.

    Yields the state after the step, its record times the number of examples, and that number.

    Args:
      step: as `make_step` returns it, without donation.
      state: the state before the first step.
      batches: pairs of inputs and targets.
      first: the number of the first step in the epoch.

    Raises:
      BadStepError: the state after a step, or its loss, is not finite.
    """
    for i, batch in enumerate(batches, first):
        after, record = step(state, *batch)
        if not is_finite((record["loss"], after.params, after.rule_state)):
            raise BadStepError(i, state, after, batch)
        size = jax.tree.leaves(batch)[0].shape[0]
        yield after, times(record, size), size
        state = after


def locate(net: Layer, loss: LossFunction, rule: Rule, bad: BadStepError) -> str:
    """Where in a bad step the first non-finite value appears, in words.

    A pass is blamed only if its results are not finite: some layers use infinity by design, such as
    a causal mask.
    """
    # Whole in each process: a process that stops at its part would leave the others waiting.
    before, after, (inputs, targets) = local((bad.state, bad.after, bad.batch))
    key, params = forward_key(before), before.params
    for path, leaf in jax.tree.leaves_with_path(params):
        if not is_finite(leaf):
            return f"the parameters before the step, {show_path(path)}"

    def forward(params, inputs):
        return net.forward(params, inputs, key=key)

    outputs, cache = forward(params, inputs)
    if not is_finite(outputs):
        return f"the forward pass, {_layer_in(net, forward, params, inputs)}"
    values, delta = loss(outputs, targets)
    if not is_finite((values, delta)):
        return "the loss"
    choose_key, _ = rule_keys(before)
    tree = rule.choose(before.rule_state, params, key=choose_key)

    def backward(tree, cache, delta):
        return net.backward(tree, cache, delta, read=mean)[1]

    if not is_finite(backward(tree, cache, delta)):
        return f"the backward pass, {_layer_in(net, backward, tree, cache, delta)}"
    in_rule = is_finite(after.params) and not is_finite(after.rule_state)
    return f"the update of {rule.name if in_rule else 'the parameters'}"


def _layer_in(net, function, *arguments):
    """The layer in which a pass that is not finite first computes such a value."""
    first = _blamed(net, function, arguments, infs=True)
    # An infinity by design is computed from zeros too. Then only what is not a number tells.
    zeros = jax.tree.map(_zeros_for_floats, arguments)
    if first != _blamed(net, function, zeros, infs=True):
        return first
    return _blamed(net, function, arguments, infs=False) or net.name


def _blamed(net, function, arguments, *, infs):
    """The layer in which JAX finds the first nan, or with `infs` the first infinity; or None."""
    try:
        with jax.debug_nans(True), jax.debug_infs(infs):
            function(*arguments)
    except LayerError as error:
        return error.where
    except FloatingPointError:
        return net.name
    return None


def _zeros_for_floats(leaf):
    is_float = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.zeros_like(leaf) if is_float else leaf


@jax.jit
def is_finite(tree: PyTree) -> jax.Array:
    """Whether every number in a tree is finite."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))
