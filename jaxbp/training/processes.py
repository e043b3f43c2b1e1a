"""Runs that span processes: what a process cannot see alone, and decisions that all take together.

Each process of `jax.distributed` runs the same program, and the arrays of a run may lie on the
devices of several processes. A process that reads such an array, or decides something, by itself
leaves the others waiting.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxbp.types import PyTree


def spans_processes(array: Any) -> bool:
    """Whether other processes have parts of an array that this one has not."""
    return not getattr(array, "is_fully_addressable", True) and not array.is_fully_replicated


def fetched(tree: PyTree) -> PyTree:
    """The arrays of a tree as NumPy arrays, whole, on every process."""

    def fetch(array):
        if spans_processes(array):
            array = jax.device_put(array, NamedSharding(array.sharding.mesh, PartitionSpec()))
        return np.asarray(array)

    return jax.tree.map(fetch, tree)


def local(tree: PyTree) -> PyTree:
    """A tree whose arrays this process has alone, whole, where they spanned processes."""

    def bring(leaf):
        if getattr(leaf, "is_fully_addressable", True):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = bring(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jnp.asarray(fetched(leaf))

    return jax.tree.map(bring, tree)


def of_all_processes(value: Any, beside: PyTree) -> np.ndarray:
    """A number, or an array of one shape, of each process that has a part of a tree.

    Returns:
      An array [processes, ...], in the order of their indices.
    """
    arrays = (a for a in jax.tree.leaves(beside) if not getattr(a, "is_fully_addressable", True))
    array = next(arrays, None)
    if array is None:
        return np.asarray(value)[None]
    devices = sorted(array.sharding.device_set, key=lambda device: device.id)
    mesh = Mesh(np.array(devices), "devices")
    each = jax.make_array_from_callback(
        (len(devices), *np.shape(value)),
        NamedSharding(mesh, PartitionSpec("devices")),
        lambda _: np.asarray(value)[None],
    )
    first = {device.process_index: i for i, device in reversed([*enumerate(devices)])}
    return fetched(each)[[first[process] for process in sorted(first)]]


def texts_of_all_processes(text: str, beside: PyTree) -> list[str]:
    """A text of each process that has a part of a tree."""
    letters = np.frombuffer(text.encode(), np.uint8)
    sizes = of_all_processes(np.int32(letters.size), beside)
    rows = of_all_processes(np.pad(letters, (0, sizes.max() - letters.size)), beside)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def happened_anywhere(what: bool, beside: PyTree) -> bool:
    """Whether something happened on one of the processes that have parts of a tree."""
    return bool(of_all_processes(what, beside).any())
