"""An optimizer's update in parts: of the layers of a stack one at a time, and of all other leaves.

The optimizer sees trees of the structure that it was made for. The leaves that are not updated are
zeros there. The update of one leaf does not depend on another (`leafwise` makes sure of it), so the
compiler removes everything that is computed from these zeros.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbp.signals.changing import Change, Changed
from jaxbp.signals.stacked import is_stacked
from jaxbp.training.leafwise import owners_of_state, require_same_program
from jaxbp.types import Params, PyTree, Reading

GRADS = "grads"  # the name of the reading that the optimizer takes


class _Node(NamedTuple):
    """A stack, or a leaf that is in no stack.

    Attributes:
      tree: the stack or the leaf.
      leaves: the numbers of its leaves, among those of all parameters.
      states: the numbers of the leaves of the optimizer's state that belong to them.
    """

    tree: Any
    leaves: list[int]
    states: list[int]


class LeafwiseUpdate:
    """An optimizer's update of some of the parameters, at a given state."""

    def __init__(
        self, name: str, update: optax.TransformUpdateFn, params: Params, state: PyTree
    ) -> None:
        """Finds out which leaf of the state belongs to which parameter.

        Args:
          name: the call, for messages.
          update: `update(grads, state, params) -> (updates, state)`.
          params: the parameters.
          state: the state of the optimizer.

        Raises:
          ValueError: the optimizer does not work leaf by leaf.
        """
        self._update = update
        self._params, self._structure = jax.tree.flatten(params)
        self._states, self._state_structure = jax.tree.flatten(state)
        owners = owners_of_state(name, update, state, params)
        trees, self._node_structure = jax.tree.flatten(params, is_leaf=is_stacked)
        ends = itertools.accumulate((len(jax.tree.leaves(tree)) for tree in trees), initial=0)
        self._nodes = []
        for tree, (start, end) in zip(trees, itertools.pairwise(ends), strict=True):
            states = [j for j, owner in enumerate(owners) if owner in range(start, end)]
            self._nodes.append(_Node(tree, list(range(start, end)), states))
        self._shared = [j for j, owner in enumerate(owners) if owner is None]

        one = list(self._params), list(self._states)
        for node in self._stacks:
            _put(one[0], node.leaves, [self._params[k][:1] for k in node.leaves])
            _put(one[1], node.states, [self._states[j][:1] for j in node.states])
        both = (self._params, self._states), one
        arguments = [(self._tree(p), self._state(s), self._tree(p)) for p, s in both]
        require_same_program(name, update, *arguments)

    @property
    def _stacks(self):
        return [node for node in self._nodes if is_stacked(node.tree)]

    def changes(self, tree: PyTree) -> tuple[Change, ...]:
        """How each stack is changed while its layers are read.

        Args:
          tree: what carries the error, or kept signals. If it has not the structure of the
            parameters, as for direct feedback, no stack is changed, and `finish` updates all.
        """
        try:
            trees = self._node_structure.flatten_up_to(tree)
        except ValueError:
            return ()
        pairs = zip(self._nodes, trees, strict=True)
        return tuple(self._change(node, own) for node, own in pairs if is_stacked(own))

    def _change(self, node, tree):
        """The change of one stack: one layer's gradients become its update."""
        arrays = [self._params[k] for k in node.leaves], [self._states[j] for j in node.states]
        structure = jax.tree.structure(node.tree.layers)

        def change(arrays, readings):
            params, states = arrays
            answers = [dict(answer) for answer in structure.flatten_up_to(readings)]
            grads = [jnp.expand_dims(answer.pop(GRADS), 0) for answer in answers]
            params, states, _ = self._apply([node], grads, params, states)
            return (params, states), structure.unflatten(answers)

        return Change(tree, arrays, change)

    def finish(
        self, readings: PyTree, read: Mapping[str, Reading]
    ) -> tuple[Params, PyTree, dict[str, PyTree]]:
        """Updates what the sweep has not updated.

        Args:
          readings: what the sweep returned: a `Changed` for each stack that it has updated, and a
            dict of readings for each other parameter.
          read: the other readings.

        Returns:
          `(params, state, record)`.
        """
        params, states = list(self._params), list(self._states)
        answers: list[Any] = [None] * len(self._params)
        later = []
        found = self._node_structure.flatten_up_to(readings)
        for node, own in zip(self._nodes, found, strict=True):
            if isinstance(own, Changed):
                _put(params, node.leaves, own.arrays[0])
                _put(states, node.states, own.arrays[1])
                own_answers = own.answers
            else:
                later.append(node)
                own_answers = own.layers if is_stacked(own) else own
            inner = node.tree.layers if is_stacked(node.tree) else node.tree
            _put(answers, node.leaves, jax.tree.structure(inner).flatten_up_to(own_answers))
        numbers = [k for node in later for k in node.leaves]
        owned = [j for node in later for j in node.states]
        new, new_states, shared = self._apply(
            later,
            [answers[k][GRADS] for k in numbers],
            [params[k] for k in numbers],
            [states[j] for j in owned],
        )
        _put(params, numbers, new)
        _put(states, owned, new_states)
        _put(states, self._shared, shared)
        record = {name: self._tree([answer[name] for answer in answers]) for name in read}
        return self._tree(params), self._state(states), record

    def _apply(self, nodes: Sequence[_Node], grads, params, states):
        """The new parameters and states of some nodes, and the state that belongs to all."""
        numbers = [k for node in nodes for k in node.leaves]
        owned = [j for node in nodes for j in node.states]
        all_params = self._tree(_filled(self._params, numbers, params))
        all_grads = self._tree(_filled(self._params, numbers, grads))
        own_states = [*states, *(self._states[j] for j in self._shared)]
        all_states = self._state(_filled(self._states, [*owned, *self._shared], own_states))
        updates, after = self._update(all_grads, all_states, all_params)
        new, after = (
            jax.tree.leaves(optax.apply_updates(all_params, updates)),
            jax.tree.leaves(after),
        )
        return (
            [new[k] for k in numbers],
            [after[j] for j in owned],
            [after[j] for j in self._shared],
        )

    def _tree(self, leaves):
        return self._structure.unflatten(leaves)

    def _state(self, leaves):
        return self._state_structure.unflatten(leaves)


def _put(array: list[Any], places: Iterable[int], values: Iterable[Any]) -> None:
    for place, value in zip(places, values, strict=True):
        array[place] = value


def _filled(like, places, values):
    """These values in their places, and zeros like the other arrays everywhere else."""
    own = dict(zip(places, values, strict=True))
    return [own[i] if i in own else jnp.zeros_like(x) for i, x in enumerate(like)]
