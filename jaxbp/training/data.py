"""Training data: a data set or batches, and the checks of both before the first step."""

import itertools
from collections.abc import Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.forward import require_answer
from jaxbp.require import require_examples
from jaxbp.training.nonfinite import is_finite
from jaxbp.training.placing import batch_at
from jaxbp.training.processes import fetched
from jaxbp.types import LayerError, PyTree

Data: TypeAlias = tuple[PyTree, PyTree]  # inputs and targets, trees of arrays [N, ...]


def is_data_set(train: Any) -> bool:
    """Whether `train` is a pair (inputs, targets), and not batches; `fit` says how to tell."""
    if isinstance(train, list):
        return len(train) == 2 and hasattr(train[0], "shape")
    return _is_pair(train)


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2


def as_arrays(name: str, data: Any) -> tuple[PyTree, PyTree]:
    """A data set or a batch as arrays; raises unless it is a pair with N examples."""
    _require_pair(name, data)
    inputs, targets = data
    require_examples(f"fit: {name}", inputs=inputs, targets=targets)
    return jax.tree.map(jnp.asarray, (inputs, targets))


def _require_pair(name, data):
    if not _is_pair(data):
        raise ValueError(
            f"fit: {name} is {type(data).__name__}, expected a pair of arrays (inputs, targets)."
        )


def peek(batches: Any, epochs: int) -> tuple[Iterable[Data], Data]:
    """The iterable, with its first batch still in it, and the first batch."""
    if not hasattr(batches, "__iter__") or isinstance(batches, str | bytes):
        raise ValueError(
            f"fit: train is {type(batches).__name__}, expected a pair of arrays (inputs, targets) "
            "or an iterable of such pairs."
        )
    if isinstance(batches, list | tuple):
        _require_pairs(batches)
    iterator: Any = iter(batches)
    once_only = iterator is batches
    if once_only and epochs > 1:
        raise ValueError(
            f"fit: train is {type(batches).__name__}, which gives its batches only once, "
            f"for {epochs} epochs. Pass a list, or an object with __iter__; or epochs=1?"
        )
    start = iterator.get_state() if once_only and has_state(iterator) else None
    first = next(iterator, None)
    if first is None:
        raise ValueError("fit: train has no batches.")
    if start is not None:
        iterator.set_state(start)
    elif once_only:
        batches = itertools.chain([first], iterator)
    return batches, as_arrays("batch 1", first)


def has_state(iterator: Any) -> bool:
    """Whether an iterator can say where it is and go on from there, as those of grain can."""
    return hasattr(iterator, "get_state") and hasattr(iterator, "set_state")


def _require_pairs(batches):
    """Refuses a list that is meant as a data set of several inputs, before its first step."""
    for i, batch in enumerate(batches, 1):
        if not _is_pair(batch):
            raise ValueError(
                f"fit: train is a {type(batches).__name__}, so its entries are batches, and batch "
                f"{i} is {type(batch).__name__}, expected a pair of arrays (inputs, targets). A "
                "data set with several inputs is a tuple, ((x, mask), targets)."
            )


def make_require_data(net, loss, params):
    """`require_data(name, data)` refuses data that cannot be trained on.

    The network and the loss look at the data too, and their messages become part of its own.
    """

    def require_data(name, data):
        inputs, targets = data
        if not is_finite(inputs):
            raise _not_finite_error(name, "inputs", _not_finite(inputs))
        n = jax.tree.leaves(inputs)[0].shape[0]
        for i in range(0, n, 1024):  # in pieces, which bounds the memory for the outputs
            stop = min(i + 1024, n)
            x, t = _shape_of(inputs, stop - i), _rows_here(targets, i, stop)
            try:
                outputs, _ = jax.eval_shape(net.forward, params, x)
                zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), outputs)
                answer = loss(zeros, t)
            except LayerError as error:
                raise error.inside(f"fit: {name}") from None
            except ValueError as error:
                raise ValueError(f"fit: {name}: {error}") from None
            size = require_examples(f"fit: {name}", inputs=x, outputs=outputs)
            values, _ = require_answer(f"fit: {name}", answer, zeros, size)
            # Where the loss gives a target no weight, its value is finite whatever the target is.
            if not is_finite(t) and not is_finite(values):
                wrong = _not_finite(t) & _not_finite(values)
                if wrong.any():
                    raise _not_finite_error(name, "targets", wrong, i)

    return require_data


def _shape_of(data: PyTree, n: int) -> PyTree:
    """The shapes and dtypes of n of the examples."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype), data)


def _rows_here(data: PyTree, start: int, stop: int) -> PyTree:
    """Some examples on one device, so that every process has them and finds the same in them."""

    def of(array):
        if len(array.sharding.device_set) == 1:
            return array[start:stop]
        return jnp.asarray(fetched(batch_at(array, jnp.arange(start, stop))))

    return jax.tree.map(of, data)


def _not_finite(tree: PyTree) -> np.ndarray:
    """Which examples have a number that is infinite or nan, [N]."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    bad = [jnp.any(~jnp.isfinite(leaf), axis=range(1, leaf.ndim)) for leaf in leaves]
    return np.logical_or.reduce(fetched(bad))


def _not_finite_error(name, what, wrong, start=0):
    return ValueError(
        f"fit: {name} has {what} that are infinite or not a number, the first in example "
        f"{start + int(np.argmax(wrong))}."
    )
