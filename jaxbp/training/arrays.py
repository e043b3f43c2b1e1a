"""Any tree as plain arrays by name, to store it, and back.

NumPy, pickle and checkpoint libraries store arrays. They do not know typed random keys, and not
every one knows the records that trees are made of.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.types import PyTree, show_path, show_shape

__all__ = ["from_arrays", "to_arrays"]


def to_arrays(tree: PyTree) -> dict[str, Any]:
    """The arrays of a tree by their paths, such as `params.0.weight`; `from_arrays` is the inverse.

    Random keys become the integers that they consist of.

    Args:
      tree: any tree of arrays, such as a `TrainState`.

    Raises:
      ValueError: two arrays have the same path, because a key of a dict has a dot in it.

    Example:
      >>> import jax, optax, jaxbp as bp
      >>> state = bp.init_state(bp.dense(2), optax.sgd(0.1), jax.random.key(0), (3,))
      >>> sorted(bp.to_arrays(state))
      ['key', 'params.bias', 'params.weight', 'step']
    """
    arrays = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = show_path(path)
        if name in arrays:
            raise ValueError(f"to_arrays: two arrays of the tree have the path {name}.")
        arrays[name] = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    return arrays


def from_arrays(like: PyTree, arrays: Mapping[str, Any]) -> PyTree:
    """The tree whose arrays were stored, bit for bit.

    Args:
      like: a tree with the structure, shapes and dtypes of the one that was stored, such as a new
        state from `init_state`. If its arrays are on devices, those returned are on the same.
      arrays: what `to_arrays` returned, or what was stored of it. A file of NumPy works too.

    Raises:
      ValueError: an array is missing, is left over, or has another shape or dtype; the message
        names the first.

    Example:
      >>> import io, jax, numpy as np, optax, jaxbp as bp
      >>> state = bp.init_state(bp.dense(2), optax.sgd(0.1), jax.random.key(0), (3,))
      >>> file = io.BytesIO()
      >>> np.savez(file, **bp.to_arrays(state))
      >>> _ = file.seek(0)
      >>> restored = bp.from_arrays(state, np.load(file))
      >>> bool((restored.params["weight"] == state.params["weight"]).all())
      True
    """
    leaves, structure = jax.tree.flatten_with_path(like)
    names = [show_path(path) for path, _ in leaves]
    if left_over := sorted(set(arrays) - set(names)):
        raise ValueError(f"from_arrays: got an array {left_over[0]}, which the tree has not.")
    restored = []
    for name, (_, leaf) in zip(names, leaves, strict=True):
        if name not in arrays:
            raise ValueError(f"from_arrays: got no array {name}.")
        restored.append(_restored(name, leaf, arrays[name]))
    return structure.unflatten(restored)


def _restored(name: str, like: Any, array: Any) -> Any:
    """One array, as the leaf of the tree that it was."""
    if _is_key(like):
        data = jax.eval_shape(jax.random.key_data, like)
        where = None if _is_anywhere(like) else like.sharding
        data = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=where)
        data = _restored(name, data, array)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
    dtype = like.dtype if hasattr(like, "dtype") else jnp.result_type(like)
    if getattr(array, "dtype", None) == np.dtype(f"V{dtype.itemsize}"):
        array = array.view(dtype)  # NumPy's files know no bfloat16
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    got, expected = (f"{a.dtype} {show_shape(a.shape)}" for a in (array, jax.typeof(like)))
    if got != expected:
        raise ValueError(f"from_arrays: {name} is {got}, expected {expected}.")
    return jnp.asarray(array) if _is_anywhere(like) else jax.device_put(array, like.sharding)


def _is_anywhere(leaf: Any) -> bool:
    """Whether a leaf is on no device, or on one only because JAX had to choose one."""
    return getattr(leaf, "sharding", None) is None or not getattr(leaf, "committed", True)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
