"""Training on several devices: batches stay divided among them, and the state stays where it is.

In the explicit mode the types of the arrays say how they are divided. In the automatic mode the
arrays know it and a program that is traced does not. So each call here looks at its arrays first
and passes on what it found, the *layout*, as a static argument of the compiled program.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxbp.sharding import is_manual, names_in, placement, varying_with
from jaxbp.types import PyTree

State = TypeVar("State")
Shardings: TypeAlias = tuple[NamedSharding | None, ...]  # of the leaves of a tree, in their order


class Layout(NamedTuple):
    """How the arrays of a call are divided in the automatic mode.

    Attributes:
      start: of each array of the state or the parameters; None where it is being traced.
      data: of each array of the inputs and targets; None where all devices have the whole array.
    """

    start: Shardings
    data: Shardings


def layout_of(start: PyTree, data: PyTree) -> Layout | None:
    """The layout of a call; None if its arrays are on one device, or if they are being traced."""
    if jax.device_count() == 1:
        return None
    leaves = jax.tree.leaves(start)
    owned, given = ([*map(_sharding, some)] for some in (leaves, jax.tree.leaves(data)))
    mesh = next((sharding.mesh for sharding in (*given, *owned) if sharding), None)
    if mesh is None:
        return None
    # An array on one device goes to all of them, and from the next call on it is there.
    everywhere = NamedSharding(mesh, PartitionSpec())
    pairs = zip(leaves, owned, strict=True)
    return Layout(
        tuple(None if isinstance(leaf, Tracer) else s or everywhere for leaf, s in pairs),
        tuple(None if s is None or s.is_fully_replicated else s for s in given),
    )


def _sharding(leaf: Any) -> NamedSharding | None:
    """The sharding of an array on an automatic mesh of several devices, in its shortest form."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or isinstance(leaf, Tracer):
        return None
    if sharding.mesh.size == 1 or AxisType.Explicit in sharding.mesh.axis_types:
        return None
    names = list(sharding.spec)
    while names and names[-1] is None:
        names.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*names))


def jit(function: Callable[..., Any], *, donate: bool = False) -> Callable[..., Any]:
    """`jax.jit` of `function(start, inputs, targets, *rest, layout=None)`, which finds the layout.

    What is returned has `lower`, `trace`, `eval_shape` and `clear_cache`, as from `jax.jit`.
    """
    jitted: Any = jax.jit(function, static_argnames="layout", donate_argnums=0 if donate else ())

    def with_layout(call):
        def with_own_layout(start, inputs, targets, *rest):
            layout = layout_of(start, (inputs, targets))
            if layout is None:  # a call without a static argument takes less time
                return call(start, inputs, targets, *rest)
            return call(start, inputs, targets, *rest, layout=layout)

        with_own_layout.__name__ = function.__name__
        return with_own_layout

    compiled: Any = with_layout(jitted)
    for method in ("eval_shape", "lower", "trace"):
        setattr(compiled, method, with_layout(getattr(jitted, method)))
    compiled.clear_cache = jitted.clear_cache
    return compiled


def kept(start: PyTree, layout: Layout | None) -> PyTree:
    """A state that is divided as the one that the call began with."""
    if layout is None:
        return start
    leaves, structure = jax.tree.flatten(start)
    pairs = zip(leaves, layout.start, strict=True)
    return structure.unflatten(
        [x if s is None else jax.lax.with_sharding_constraint(x, s) for x, s in pairs]
    )


def batch_at(data: PyTree, indices: jax.Array, layout: Layout | None = None) -> PyTree:
    """The examples at `indices` of every array in a tree, divided among the devices as the array.

    The rows of a batch may be on any device, so they move. A batch that cannot be divided into
    equal parts goes to all devices.
    """
    leaves, structure = jax.tree.flatten(data)
    shardings = [None] * len(leaves) if layout is None else layout.data
    pairs = zip(leaves, shardings, strict=True)
    return structure.unflatten([_rows(array, indices, sharding) for array, sharding in pairs])


def _rows(array, indices, sharding):
    if sharding is not None:
        whole, divided = _steps(sharding, indices.shape[0])
        rows = jax.lax.with_sharding_constraint(array[indices], whole)
        return rows if divided is None else jax.lax.with_sharding_constraint(rows, divided)
    sharding = placement(array, *((array, axis) for axis in range(array.ndim)))
    if sharding is None:
        return array[indices]
    whole, divided = _steps(sharding, indices.shape[0])
    rows = array.at[indices].get(out_sharding=whole)
    return rows if divided is None else jax.sharding.reshard(rows, divided)


def _steps(sharding: NamedSharding, n: int) -> tuple[NamedSharding, NamedSharding | None]:
    """How n rows are divided when they have been gathered, and then; None if they stay like that.

    Without the first step, the compiler also divides the indices, only to gather them again.
    """
    names, *others = sharding.spec
    whole = NamedSharding(sharding.mesh, PartitionSpec(None, *others))
    pieces = math.prod(sharding.mesh.shape[axis] for axis in names_in(names))
    return whole, sharding if pieces > 1 and n % pieces == 0 else None


def varying(function: Callable[..., tuple[PyTree, Any]], carry: PyTree, *inputs: Any) -> PyTree:
    """A carry to begin a loop with: in `jax.shard_map`, it varies over the devices as at the end.

    Args:
      function: `function(carry, *inputs) -> (carry, record)`, what the loop repeats.
      carry: the carry as it is.
      *inputs: those of one round.
    """
    if not is_manual():
        return carry

    def as_after(leaf, after):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf  # keys never change
        return varying_with(jnp.zeros_like(after), leaf)

    while True:  # where a part of the carry varies, more of it may vary after the next round
        after, _ = jax.eval_shape(function, carry, *inputs)
        varied = jax.tree.map(as_after, carry, after)
        if jax.tree.map(jax.typeof, varied) == jax.tree.map(jax.typeof, carry):
            return carry
        carry = varied


def beside(state: State, data: PyTree) -> State:
    """A state that is on all devices of the data, where it was on one."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(data))
    meshes = (s.mesh for s in shardings if isinstance(s, NamedSharding) and s.mesh.size > 1)
    mesh = next(meshes, None)
    if mesh is None:
        return state
    spread = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return jax.tree.map(lambda x: spread(x) if len(x.sharding.device_set) == 1 else x, state)
