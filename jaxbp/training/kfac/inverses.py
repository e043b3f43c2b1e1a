"""The inverses of the damped factors, and the natural gradients that they give.

On several devices, each of them computes a share of the inverses, and zeros for the others. The sum
over the devices puts every inverse on all of them: an all-reduce of as many numbers as the factors
have.
"""

import collections
import heapq
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.sharding import AbstractMesh, PartitionSpec

from jaxbp.readings.moments import Kronecker
from jaxbp.sharding import alike, devices_of, replicated
from jaxbp.signals.kinds import Through
from jaxbp.training.kfac.layers import (
    as_rows,
    is_factors,
    is_nothing,
    map_factors,
    matrices_of,
    weight_and_bias,
)
from jaxbp.types import PyTree, widened


def inverted(factors: PyTree, damping: float | jax.Array) -> PyTree:
    """The inverses of the damped factors of all layers, and of damped diagonals.

    The work is shared by the devices on which the factors are, each matrix on one of them.
    """
    mesh = devices_of(factors)
    whole = factors if mesh is None else replicated(factors)
    damped = map_factors(lambda layer: _damped(layer, damping), whole)
    nodes, structure = jax.tree.flatten(damped, is_leaf=_is_pair)
    pairs = [node for node in nodes if _is_pair(node)]
    inverses = iter(_inverses(jax.tree.leaves(pairs), mesh))
    return structure.unflatten(
        [
            Kronecker(next(inverses), next(inverses)) if _is_pair(node) else 1 / node
            for node in nodes
        ]
    )


def _damped(factors: Any, damping: float | jax.Array) -> Any:
    """Both damped factors of a layer, or the damped diagonal."""
    if factors is None or is_nothing(factors):
        return factors
    if not is_factors(factors):
        return factors + jnp.asarray(damping, factors.dtype)
    if isinstance(factors, Through):
        return factors._replace(signal=_damped(factors.signal, damping))
    if factors.inputs.ndim == 3:  # a pair for each group
        return jax.vmap(lambda factors: _damped(factors, damping))(factors)
    a, g = factors
    pi = jnp.sqrt(_mean_eigenvalue(a) / _mean_eigenvalue(g))
    # A layer that no error reaches has a factor of zero, and its pi would be infinite.
    pi = jnp.where(jnp.isfinite(pi) & (pi > 0), pi, 1)
    root = jnp.sqrt(jnp.asarray(damping, a.dtype))
    return Kronecker(_raised(a, pi * root), _raised(g, root / pi))


def _mean_eigenvalue(matrix):
    return jnp.trace(matrix) / len(matrix)


# Of a matrix in which an entry of the diagonal is raised by less than about this many units of its
# last place, the inverse is rounding error in some directions.
FLOOR = 300


def _raised(matrix, shift):
    """A damped factor, with more damping where its inverse would be lost in rounding.

    Each entry of the diagonal has a floor of its own, so features may have any scale.
    """
    diagonal = jnp.diagonal(matrix)
    damping = jnp.maximum(shift, FLOOR * jnp.finfo(matrix.dtype).eps * diagonal)
    return matrix + damping * jnp.eye(len(matrix), dtype=matrix.dtype)


@jax.custom_jvp  # a sequential_vmap has no transpose
@sequential_vmap
def _inverse(matrix):
    """The inverse of a positive definite matrix, symmetric to the last bit.

    Under `jax.vmap`, one matrix is inverted after another. A program with two calls of LAPACK side
    by side that take a batch of matrices each may wait for ever on a CPU (jaxlib 0.10.2).

    LAPACK writes its result column by column, and XLA would keep the inverses so in both branches
    of a `cond`: each step that only passes them on would transpose them, twice. The sum with the
    transpose lies row by row, like the state.
    """
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)
    inverse = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), eye)
    return (inverse + inverse.T) / 2


@_inverse.defjvp
def _(primals, tangents):
    """d(M^-1) = -M^-1 dM M^-1."""
    (matrix,), (change,) = primals, tangents
    inverse = _inverse(matrix)
    return inverse, -inverse @ change @ inverse


def _is_pair(node):
    return isinstance(node, Kronecker)


def _inverses(matrices: list[jax.Array], mesh: AbstractMesh | None) -> list[jax.Array]:
    """The inverses of matrices [..., K, K].

    Those of one size are computed one after another: each of LAPACK's calls runs on all cores of a
    CPU.
    """
    of_size = collections.defaultdict(list)
    for place, matrix in enumerate(matrices):
        of_size[matrix.shape[-1], matrix.dtype].append(place)
    stacks = [
        jnp.concatenate([matrices[place].reshape(-1, size, size) for place in places])
        for (size, _), places in of_size.items()
    ]
    if mesh is None:
        found = [jax.lax.map(_inverse, stack) for stack in stacks]
    else:
        found = _shared_inverses(stacks, mesh)
    inverses = list(matrices)
    for places, stack in zip(of_size.values(), found, strict=True):
        start = 0
        for place in places:
            shape = matrices[place].shape
            end = start + math.prod(shape[:-2])
            inverses[place] = stack[start:end].reshape(shape)
            start = end
    return inverses


def _shared_inverses(stacks: list[jax.Array], mesh: AbstractMesh) -> list[jax.Array]:
    """The inverses of stacks [M, K, K], each of them computed on one device of the mesh."""
    shares = _shares([(stack.shape[0], stack.shape[1]) for stack in stacks], mesh.size)

    def on_device(stacks):
        device = jax.lax.axis_index(mesh.axis_names)

        def own_inverse(share):
            owner, matrix = share
            return jax.lax.cond(owner == device, _inverse, jnp.zeros_like, matrix)

        inverses = [
            jax.lax.map(own_inverse, (jnp.array(owners), stack))
            for owners, stack in zip(shares, stacks, strict=True)
        ]
        return jax.lax.psum(inverses, mesh.axis_names)

    whole = PartitionSpec()
    # Without check_vma: the types do not tell that a branch of one device gives what others lack.
    share_out = jax.shard_map(
        on_device, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False
    )
    return share_out(stacks)


def _shares(stacks: Sequence[tuple[int, int]], devices: int) -> list[list[int]]:
    """The device of each matrix, for stacks of so many matrices of a size K.

    The inverse of a matrix takes K^3 operations. The next largest matrix goes to the device that
    has least to do so far.
    """
    work = [(0, device) for device in range(devices)]
    owners: list[list[int]] = [[] for _ in stacks]
    for place in sorted(range(len(stacks)), key=lambda place: -stacks[place][1]):
        count, size = stacks[place]
        for _ in range(count):
            load, device = work[0]
            heapq.heapreplace(work, (load + size**3, device))
            owners[place].append(device)
    return owners


def natural(inverses: PyTree, grads: PyTree) -> PyTree:
    """A^-1 g G^-1 of each layer, with the bias as the last row of g; or g / (v + lambda)."""
    found = map_factors(_natural, inverses, grads)
    # `map_factors` may put a Stacked around a layer instead of around each of its parameters.
    return jax.tree.structure(grads).unflatten(jax.tree.leaves(found))


def _natural(inverses, grads):
    """The natural gradient of one layer, or of a parameter without factors."""
    if inverses is None or is_nothing(inverses):
        return grads
    if not is_factors(inverses):
        return (widened(grads) * inverses).astype(grads.dtype)
    matrices, view = matrices_of(inverses)
    leaves, structure = jax.tree.flatten(grads)
    at, weight, bias = weight_and_bias(leaves)
    rows = widened(as_rows(weight, bias, matrices, view))
    rows = matrices.inputs @ rows @ matrices.deltas
    rows = jnp.moveaxis(rows, -2, 0)  # [I, O], or [I, G, O / G]
    natural = rows if bias is None else rows[:-1]
    if view is not None:
        natural = view(natural.reshape(view.shape))
    natural = [natural.reshape(weight.shape).astype(weight.dtype)]
    if bias is not None:
        natural_bias = rows[-1].reshape(bias.shape).astype(bias.dtype)
        natural.insert(1 - at, natural_bias)
    return structure.unflatten(map(alike, leaves, natural))
