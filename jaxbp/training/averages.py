"""Averages of the records of batches, weighed by their numbers of examples.

The mean over an epoch is a sum that is divided at the end, so that it can be computed in parts. Of
numbers it is the arithmetic mean. A `Summary` says itself what it is over several batches: a
largest magnitude, for one, is the largest of all.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.readings.summaries import Summary
from jaxbp.types import PyTree


@jax.jit
def times(record: PyTree, n: Any) -> PyTree:
    """The term of a batch of n examples in the sum."""
    return _map(lambda s: s.times(n), lambda a: n * a, record)


def summed(terms: PyTree) -> PyTree:
    """The sum of the terms of several batches, along the first axis of the arrays."""
    return _map(lambda s: s.summed(), lambda a: jnp.sum(a, axis=0), terms)


@jax.jit
def plus(sums: PyTree, others: PyTree) -> PyTree:
    """The sum of two sums."""
    return _map(lambda s, other: s.plus(other), jnp.add, sums, others)


def over(sums: PyTree, n: Any) -> PyTree:
    """The mean over the n examples of a sum."""
    return _map(lambda s: s.over(n), lambda a: a / n, sums)


def _map(of_summary, of_array, *trees):
    def of_node(node, *others):
        return (of_summary if _is_summary(node) else of_array)(node, *others)

    return jax.tree.map(of_node, *trees, is_leaf=_is_summary)


def _is_summary(node):
    return isinstance(node, Summary)
