"""A call in each of the modes, and how far its numbers are from those of one device."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.modes.networks import Subject
from jaxbp.types import PyTree

AXIS = "data"
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Outcome(NamedTuple):
    """How a call went in one mode.

    Attributes:
      difference: the largest difference of an array from that of one device, divided by the largest
        entry of the array.
      collectives: how many of each the compiled program has.
    """

    difference: float
    collectives: Counter


def automatic(call: Callable, subject: Subject, devices: int) -> Outcome:
    """The whole batch, divided by examples; the compiler divides the program."""
    return _divided(call, subject, _mesh(devices, AxisType.Auto))


def explicit(call: Callable, subject: Subject, devices: int) -> Outcome:
    """The whole batch, with shardings in the types of all arrays."""
    return _divided(call, subject, _mesh(devices, AxisType.Explicit))


def manual(call: Callable, subject: Subject, devices: int) -> Outcome:
    """The call in a `shard_map`, on each device's share of the batch."""
    mesh = _mesh(devices, AxisType.Auto)
    examples, whole = PartitionSpec(AXIS), PartitionSpec()

    def on_share(*batch):
        return jax.tree.map(lambda a: a[None], _as_numbers(call(*batch)))

    mapped = jax.shard_map(
        on_share, mesh=mesh, in_specs=(whole, examples, examples), out_specs=examples
    )
    got, collectives = _run(mapped, subject.params, subject.inputs, subject.targets)
    size = subject.inputs.shape[0] // devices
    own = jax.jit(lambda *batch: _as_numbers(call(*batch)))
    shares = [slice(i, i + size) for i in range(0, devices * size, size)]
    expected = [own(subject.params, subject.inputs[i], subject.targets[i]) for i in shares]
    return Outcome(_difference(got, jax.tree.map(lambda *a: np.stack(a), *expected)), collectives)


MODES: dict[str, Callable[[Callable, Subject, int], Outcome]] = {
    "automatic": automatic,
    "explicit": explicit,
    "shard_map": manual,
}


def _divided(call, subject, mesh):
    batch = subject.inputs, subject.targets
    params = jax.device_put(subject.params, NamedSharding(mesh, PartitionSpec()))
    inputs, targets = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(AXIS)))
    with jax.set_mesh(mesh):
        got, collectives = _run(lambda *b: _as_numbers(call(*b)), params, inputs, targets)
    expected = jax.jit(lambda *b: _as_numbers(call(*b)))(subject.params, *batch)
    return Outcome(_difference(got, expected), collectives)


def _run(function, *arguments) -> tuple[PyTree, Counter]:
    """The result of a function, and the collectives of its compiled program."""
    compiled = jax.jit(function).lower(*arguments).compile()
    return jax.device_get(compiled(*arguments)), collectives_of(compiled.as_text() or "")


def collectives_of(text: str) -> Counter:
    """How many collectives of each kind a compiled program has, from its text."""
    kinds = "|".join(COLLECTIVES)
    return Counter(re.findall(rf" ({kinds})(?:-start)?\(", text))


def _mesh(devices: int, kind: AxisType) -> Mesh:
    return jax.make_mesh((devices,), (AXIS,), axis_types=(kind,), devices=jax.devices()[:devices])


def _as_numbers(tree: Any) -> PyTree:
    """A tree with random keys as the integers that they hold."""

    def convert(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(convert, tree)


def _difference(got: PyTree, expected: PyTree) -> float:
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
