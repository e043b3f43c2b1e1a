"""Sharding: what a program has to say of arrays that lie on several devices.

JAX divides arrays over the devices of a mesh in three modes, and everything here works in each:

    automatic    the compiler decides where each array lies; the library says nothing
    explicit     the type of an array says how it is sharded, and where two operands leave it open
                 how the result is sharded, such as a sum over a sharded axis, the program says it
    manual       the body of `jax.shard_map` sees the part of one device; a loop has to begin with
                 arrays that vary over the same devices as those that it ends with

Examples are divided, so a sum over the examples is a sum over devices (an all-reduce). What belongs
to one example stays where the example is.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, reshard
from jax.typing import DTypeLike

from jaxbp.types import PyTree


def placement(like: jax.Array, *axes: tuple[jax.Array, int] | None) -> NamedSharding | None:
    """The sharding of an array, told axis by axis; None in the other modes than explicit.

    Args:
      like: an array on the same mesh.
      *axes: for each axis of the array, another array and the axis of it that is sharded in the
        same way, or None for an axis that is not divided.
    """
    if not _is_explicit(like):
        return None
    names = (at and jax.typeof(at[0]).sharding.spec[at[1]] for at in axes)
    return NamedSharding(jax.typeof(like).sharding.mesh, PartitionSpec(*names))


def _is_explicit(x):
    """Whether the type of an array says how it is sharded."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def pieces_of(x: jax.Array) -> int:
    """In how many pieces the first axis of an array is divided, as far as its program knows.

    In the explicit mode the type says it. In the automatic mode, if a mesh was set by
    `jax.set_mesh`, the axis is taken to be divided over all its devices.
    """
    sharding = jax.typeof(x).sharding
    names = sharding.spec[0]
    if names is not None:
        sizes = dict(sharding.mesh.shape)
        return math.prod(sizes[name] for name in names_in(names))
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    devices = math.prod(size for size, kind in kinds if kind == AxisType.Auto)
    return devices if x.shape[0] % devices == 0 else 1


def reshaped(x: jax.Array, *shape: int) -> jax.Array:
    """Reshapes each example of an array, [N, ...] to [N, *shape]; it stays divided by examples."""
    after = placement(x, (x, 0), *[None] * len(shape))
    return jnp.reshape(x, (x.shape[0], *shape), out_sharding=after)


def repeated(array: jax.Array, x: jax.Array) -> jax.Array:
    """The same array for each example of x [N, ...]: [N, ...], divided as x is."""
    after = placement(x, (x, 0), *[None] * array.ndim)
    return broadcast(varying_with(x, array), (x.shape[0], *array.shape), after)


def broadcast(array: jax.Array, shape: tuple[int, ...], after: NamedSharding | None) -> jax.Array:
    """Broadcasts an array to a shape and divides it, unless the sharding is None."""
    # In JAX 0.12, `jnp.broadcast_to` itself leaves an array whole that lies on no mesh yet.
    array = jnp.broadcast_to(array, shape)
    return array if after is None else reshard(array, after)


def everywhere(tree: PyTree) -> PyTree:
    """A tree whose arrays [N, ...] are whole on each device: an all-gather of the examples."""

    def whole(x):
        return jax.sharding.reshard(x, placement(x, None, *[(x, i) for i in range(1, x.ndim)]))

    explicit = any(_is_explicit(leaf) for leaf in jax.tree.leaves(tree))
    return jax.tree.map(whole, tree) if explicit else tree


def of_each_example(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`jax.vmap(function)(x)` of an array [N, ...], divided as it is; the function is a tree."""
    if not _is_explicit(x):
        return jax.vmap(function)(x)

    def mapped(function, x):  # the arrays of a function are arguments too
        return jax.vmap(function)(x)

    by_compiler: Any = jax.sharding.auto_axes(mapped, out_sharding=placement(x, (x, 0)))
    return by_compiler(function, x)


def divided_by_compiler(function: Callable[..., jax.Array], *arrays: Any) -> jax.Array:
    """`function(*arrays)`, of the shape of the last array and divided as it is.

    For functions of JAX that refuse arrays whose type says how they are sharded.
    """
    like = arrays[-1]
    if not _is_explicit(like):
        return function(*arrays)
    by_compiler: Any = jax.sharding.auto_axes(function, out_sharding=jax.typeof(like).sharding)
    return by_compiler(*arrays)


def is_manual() -> bool:
    """Whether the program is traced inside `shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def varying_with(x: PyTree, tree: PyTree) -> PyTree:
    """A tree whose arrays vary over the devices of a `shard_map` as those of x do.

    `jax.grad` then adds up their derivatives over the devices. Outside of `shard_map` it is the
    tree itself.
    """
    return vary(tree, varies_over(jax.tree.leaves(x)))


def varies_over(arrays: Iterable[Any]) -> frozenset[str]:
    """The axes of a mesh over which some of these arrays vary inside `jax.shard_map`."""
    if not is_manual():
        return frozenset()
    kinds = map(jax.typeof, arrays)
    axes = (kind.vma if hasattr(kind, "vma") else kind.mat.varying for kind in kinds)
    return frozenset().union(*axes)


def vary(tree: PyTree, axes: frozenset[str]) -> PyTree:
    """Arrays that vary over these axes of a mesh, whatever they vary over already."""

    def varying(x):
        missing = tuple(sorted(axes - varies_over([x])))
        if not missing:
            return x
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(x, missing, to="varying")
        return getattr(jax.lax, "pvary")(x, missing)  # noqa: B009 -- until JAX 0.8

    return jax.tree.map(varying, tree) if axes else tree


def zeros_beside(x: jax.Array, size: int) -> jax.Array:
    """Zeros [..., size] for an array [..., I], with its dtype, and divided as it is."""
    return jnp.broadcast_to(jnp.zeros_like(x[..., :1]), (*x.shape[:-1], size))


def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """The product x M of arrays [..., I] and [I, O], divided as the rows of x and the columns of M.

    If both are divided along I, the devices sum what each of them has of the product.
    """
    rows = ((x, i) for i in range(x.ndim - 1))
    return jnp.matmul(x, matrix, out_sharding=placement(x, *rows, (matrix, 1)))


def summed_products(x: jax.Array, d: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """The sum of the products of rows, X^T D with X [..., I] and D [..., O] as matrices of rows.

    Args:
      x: X.
      d: D.
      dtype: the dtype of the sum; that of the arrays if it is None.
    """
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(
        *(x, d, ((rows, rows), ((), ()))),
        preferred_element_type=dtype,
        out_sharding=placement(x, (x, -1), (d, -1)),
    )


def gathered(params: PyTree, x: jax.Array) -> PyTree:
    """Parameters as a layer uses them beside examples x [N, ...], each of them whole on a device.

    A layer has to see all of a parameter for each example. In the explicit mode this gathers what
    is divided over the axes of the mesh that divide the examples; parameters stay divided over
    other axes. The compiler does this on its own in the automatic mode.
    """
    if not _is_explicit(x):
        return params
    mesh = jax.typeof(x).sharding.mesh
    of_examples = set(names_in(jax.typeof(x).sharding.spec[0]))

    def gather(param):
        spec = [names_in(part) for part in jax.typeof(param).sharding.spec]
        if of_examples.isdisjoint(itertools.chain(*spec)):
            return param
        kept = (tuple(n for n in part if n not in of_examples) or None for part in spec)
        return reshard(param, NamedSharding(mesh, PartitionSpec(*kept)))

    return jax.tree.map(gather, params)


def whole_rows(x: jax.Array) -> jax.Array:
    """An array [..., I] with whole rows on each device, for products of all pairs of entries."""
    if not _is_explicit(x) or jax.typeof(x).sharding.spec[-1] is None:
        return x
    return reshard(x, placement(x, *((x, i) for i in range(x.ndim - 1)), None))


def alike(param: jax.Array, array: jax.Array) -> jax.Array:
    """An array of a parameter's shape, divided over the devices as the parameter is."""
    sharding = jax.typeof(param).sharding
    kinds = set(sharding.mesh.axis_types)
    if AxisType.Explicit in kinds:
        return reshard(array, sharding)
    if kinds != {AxisType.Auto}:
        return array
    # The compiler knows how the parameter is divided, this program does not. The operands of a
    # choice are divided alike. Without the barrier the compiler would drop the choice too early.
    never = jax.lax.optimization_barrier(jnp.zeros((), bool))
    return jnp.where(never, param.astype(array.dtype), array)


def replicated(tree: PyTree) -> PyTree:
    """A tree whose arrays are whole on each device; the compiler's choice in the automatic mode."""

    def whole(x):
        if not _is_explicit(x):
            return x
        return reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec()))

    return jax.tree.map(whole, tree)


def devices_of(tree: PyTree) -> AbstractMesh | None:
    """The mesh of several devices on which the arrays of a tree lie; None if there is none.

    Without arrays on several devices it is the mesh that was set by `jax.set_mesh`. Inside
    `jax.shard_map`, where each device runs a program of its own, there is none.
    """
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree)]
    meshes.append(jax.sharding.get_abstract_mesh())
    mesh = next((mesh for mesh in meshes if mesh.size > 1), None)
    return None if mesh is None or AxisType.Manual in mesh.axis_types else mesh


def names_in(part: Any) -> tuple[str, ...]:
    """The axes of the mesh that divide an axis of an array, from its entry in a `PartitionSpec`."""
    if part is None:
        return ()
    return (part,) if isinstance(part, str) else tuple(part)
