"""Readings that also change arrays of a stack, layer by layer, as its loop goes through them.

The loop of a stack returns what is read of its L layers, [L, ...]. If that is only needed to change
other arrays [L, ...], as an optimizer's update changes parameters, the loop can carry those: it
changes the entries of a layer as soon as the layer has been read, and drops the reading.

    for i = L, ..., 1:   readings = those of layer i,   arrays[i] = change(arrays[i], readings)

Arrays that a loop carries change in place, without a copy.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbp.sharding import varying_with
from jaxbp.signals.stacked import Stacked
from jaxbp.types import PyTree, Reading


class Changed(NamedTuple):
    """What a stack returns in place of its `Stacked` readings.

    Attributes:
      arrays: the tree that was carried, after all layers have changed it.
      answers: what is left of the readings, [L, ...].
    """

    arrays: PyTree
    answers: PyTree


class Change(NamedTuple):
    """What the loop of one stack carries, and how a layer changes it.

    Attributes:
      stack: the parameters of the stack, as its backward pass gets them.
      arrays: a tree of arrays [L, ...].
      change: `change(arrays, readings) -> (arrays, answers)` for one layer, with the layer's
        entries of the arrays, [1, ...].
    """

    stack: Stacked
    arrays: PyTree
    change: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]

    def run(
        self, step: Callable[..., tuple[Any, PyTree]], start: Any, inputs: Sequence[jax.Array]
    ) -> tuple[Any, Changed]:
        """The loop over the layers, from the last to the first.

        Args:
          step: `step(carry, inputs) -> (carry, readings)`, for one layer.
          start: the carry of the last layer.
          inputs: arrays [L, ...]. One that is carried already is read where it is carried, before
            its layer changes.

        Returns:
          The carry, and a `Changed`.
        """
        arrays, structure = jax.tree.flatten(self.arrays)
        n, places = len(arrays[0]), {id(array): place for place, array in enumerate(arrays)}
        others = [array for array in inputs if id(array) not in places]
        # In `jax.shard_map` the readings of a layer differ between devices, and so does the change.
        arrays = varying_with((start, others), arrays)

        def one(carry, own):
            carry, arrays, changed = carry
            i, rest = own[0], iter(own[1])
            # A layer's new entries are written one round later. Then nothing else is read of an
            # array when it changes, and the compiler needs no copy of it.
            arrays = _written(arrays, changed, jnp.minimum(i + 1, n - 1))
            here = [jax.lax.dynamic_index_in_dim(array, i) for array in arrays]
            own_inputs = [here[places[id(a)]][0] if id(a) in places else next(rest) for a in inputs]
            carry, readings = step(carry, tuple(own_inputs))
            changed, answers = self.change(structure.unflatten(here), readings)
            return (carry, arrays, varying_with(arrays, jax.tree.leaves(changed))), answers

        last = [array[-1:] for array in arrays]  # which the first round writes where they are
        (carry, arrays, changed), answers = jax.lax.scan(
            one, (start, arrays, last), (jnp.arange(n), others), reverse=True
        )
        return carry, Changed(structure.unflatten(_written(arrays, changed, 0)), answers)


def _written(arrays, entries, i):
    """Arrays [L, ...] with these entries, [1, ...], at index i."""
    pairs = zip(arrays, entries, strict=True)
    return [jax.lax.dynamic_update_index_in_dim(array, own, i, axis=0) for array, own in pairs]


@dataclasses.dataclass(frozen=True)
class ChangingReading:
    """A reading that a stack asks for a change.

    Combinators that read something else than this object itself, such as `repeat`, get readings as
    from any reading, and nothing is changed.

    Attributes:
      read: the reading of each signal.
      changes: one for each stack that is to be changed.
    """

    read: Reading
    changes: tuple[Change, ...]

    def __call__(self, signal: Any) -> Any:
        """What is read of a signal."""
        return self.read(signal)


def change_of(read: Reading, stack: Stacked) -> Change | None:
    """The change of a stack with these very arrays as parameters, or None."""
    if not isinstance(read, ChangingReading):
        return None
    return next((change for change in read.changes if _same_arrays(change.stack, stack)), None)


def without_changes(read: Reading) -> Reading:
    """The reading alone, for a combinator that has to see the readings of all layers."""
    return read.read if isinstance(read, ChangingReading) else read


def _same_arrays(tree, other):
    pairs = jax.tree.leaves(tree), jax.tree.leaves(other)
    return len(pairs[0]) == len(pairs[1]) and all(a is b for a, b in zip(*pairs, strict=True))
