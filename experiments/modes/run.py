"""A call in each of the modes, and how far its numbers are from those of one device."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.common.programs import collectives
from experiments.modes.networks import Subject
from jaxbp.types import PyTree

AXIS = "data"


class Outcome(NamedTuple):
    """How a call went in one mode.

    Attributes:
      difference: the largest difference of an array from that of one device, divided by the largest
        entry of the array.
      collectives: how many of each the compiled program has.
    """

    difference: float
    collectives: Counter


class Trial:
    """A call on a batch, and its numbers on one device."""

    def __init__(self, call: Callable, subject: Subject, devices: int):
        """The batch is divided over so many devices."""
        self.call = lambda *batch: _as_numbers(call(*batch))
        self.subject, self.devices = subject, devices
        self._on_one_device = jax.jit(self.call)

    @functools.cached_property
    def whole(self) -> PyTree:
        """The numbers of the whole batch on one device."""
        subject = self.subject
        return self._on_one_device(subject.params, subject.inputs, subject.targets)

    @functools.cached_property
    def shares(self) -> PyTree:
        """The numbers of each device's share of the batch, on one device, side by side."""
        subject = self.subject
        size = subject.inputs.shape[0] // self.devices
        places = [slice(i, i + size) for i in range(0, self.devices * size, size)]
        answers = [
            self._on_one_device(subject.params, subject.inputs[i], subject.targets[i])
            for i in places
        ]
        return jax.tree.map(lambda *a: np.stack(a), *answers)


def automatic(trial: Trial) -> Outcome:
    """The whole batch, divided by examples; the compiler divides the program."""
    return _divided(trial, AxisType.Auto)


def explicit(trial: Trial) -> Outcome:
    """The whole batch, with shardings in the types of all arrays."""
    return _divided(trial, AxisType.Explicit)


def manual(trial: Trial) -> Outcome:
    """The call in a `shard_map`, on each device's share of the batch."""
    examples, whole = PartitionSpec(AXIS), PartitionSpec()
    mapped = jax.shard_map(
        lambda *batch: jax.tree.map(lambda a: a[None], trial.call(*batch)),
        mesh=_mesh(trial.devices, AxisType.Auto),
        in_specs=(whole, examples, examples),
        out_specs=examples,
    )
    subject = trial.subject
    got, found = _run(mapped, subject.params, subject.inputs, subject.targets)
    return Outcome(largest_difference(got, trial.shares), found)


MODES: dict[str, Callable[[Trial], Outcome]] = {
    "automatic": automatic,
    "explicit": explicit,
    "shard_map": manual,
}


def _divided(trial, kind):
    mesh, subject = _mesh(trial.devices, kind), trial.subject
    params = jax.device_put(subject.params, NamedSharding(mesh, PartitionSpec()))
    batch = subject.inputs, subject.targets
    inputs, targets = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(AXIS)))
    with jax.set_mesh(mesh):
        got, found = _run(trial.call, params, inputs, targets)
    return Outcome(largest_difference(got, trial.whole), found)


def _run(function, *arguments) -> tuple[PyTree, Counter]:
    """The result of a function, and the collectives of its compiled program."""
    compiled = jax.jit(function).lower(*arguments).compile()
    names = (one.name for one in collectives(compiled.as_text() or ""))
    return jax.device_get(compiled(*arguments)), Counter(names)


def _mesh(devices: int, kind: AxisType) -> Mesh:
    return jax.make_mesh((devices,), (AXIS,), axis_types=(kind,), devices=jax.devices()[:devices])


def _as_numbers(tree: Any) -> PyTree:
    """A tree with random keys as the integers that they hold."""

    def convert(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(convert, tree)


def largest_difference(got: PyTree, expected: PyTree) -> float:
    """The largest difference of two arrays, relative to the largest entry, or inf for a nan."""
    differences = [0.0]
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    for one, other in pairs:
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        if one.shape != other.shape or not np.isfinite(one).all():
            return np.inf
        if one.size:
            size = np.max(np.abs(other)) or 1.0
            differences.append(float(np.max(np.abs(one - other)) / size))
    return max(differences)
