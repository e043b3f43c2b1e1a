"""The entries of a tuple or dict of inputs: reads one, or puts another one in its place.

The same functions serve trees of arrays and trees of their shapes. An entry may be a tree itself.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxbp.require import entries_of, require_array, require_deltas
from jaxbp.types import LayerError, PyTree, is_shape, shape_alone, show_shape


def require_place(name: str, at: Any) -> None:
    """Raises unless `at` is a place in a tuple or a dict: an integer or a string."""
    if isinstance(at, bool) or not isinstance(at, int | str):
        raise TypeError(f"{name}: at is {at!r}; it takes the index or the key of an input.")


def entry(name: str, tree: PyTree, at: int | str, what: str = "inputs") -> PyTree:
    """The entry of a tuple or dict at an index or key; raises if there is none."""
    _require_several(name, tree, what)
    if isinstance(tree, dict):
        found, got = at in tree, f"a dict of {', '.join(map(str, tree))}"
    else:
        found = isinstance(at, int) and -len(tree) <= at < len(tree)
        got = f"a {type(tree).__name__} of {len(tree)}"
    if not found:
        raise LayerError(name, f"got {what} that are {got}; it takes an entry at {at!r}.")
    return tree[at]


def with_entry(tree: Any, at: Any, new: PyTree) -> PyTree:
    """A tuple or dict like this one, with another entry at an index or key."""
    changed: Any = list(tree) if isinstance(tree, tuple) else copy.copy(tree)
    changed[at] = new
    make = getattr(tree, "_make", tuple)  # a named tuple stays one
    return make(changed) if isinstance(tree, tuple) else changed


def kept_others(name: str, tree: PyTree, at: int | str) -> PyTree:
    """What a cache keeps of the entries that are passed on, to check their dy: the shapes alone."""
    others = with_entry(tree, at, ())
    for leaf in jax.tree.leaves(others):
        require_array(name, leaf)
    return jax.tree.map(shape_alone, others)


def require_others(name: str, dy: PyTree, at: int | str, kept: PyTree) -> None:
    """Raises unless dy is like the entries that were passed on, of which `kept` has the shapes."""
    require_deltas(name, with_entry(dy, at, ()), kept_arrays(kept))


def kept_arrays(kept: PyTree) -> PyTree:
    """The shapes and dtypes of a tree of arrays of which a cache keeps nothing else."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), kept)


def split(
    name: str, tree: PyTree, what: str = "inputs"
) -> tuple[list[PyTree], Callable[[Sequence[PyTree]], PyTree]]:
    """The entries of a tuple or dict, and the function that puts others into their places."""
    _require_several(name, tree, what)
    entries, structure = entries_of(tree)
    return entries, structure.unflatten


def _require_several(name: str, tree: Any, what: str) -> None:
    """Raises unless a tree of arrays or of shapes is a tuple or a dict."""
    if isinstance(tree, tuple | list | dict) and not is_shape(tree):
        return
    shape = ("N", *tree) if is_shape(tree) else getattr(tree, "shape", None)
    got = f"of type {type(tree).__name__}" if shape is None else f"one array {show_shape(shape)}"
    raise LayerError(name, f"got {what} that are {got}; it takes a tuple or a dict of them.")
