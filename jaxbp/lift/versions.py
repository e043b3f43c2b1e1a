"""Versions: what JAX spells differently from one release to another.

Everything else in this chapter uses `jax.make_jaxpr`, `jax.vjp`, `jax.vmap`, names of primitives,
and four names of `jax.extend.core`. JAX promises none of these between releases, so the tests of
this chapter run on the oldest and the newest release that is supported.
"""

from collections.abc import Sequence
from typing import Any

from jax.extend import source_info_util
from jax.sharding import get_abstract_mesh, use_abstract_mesh

CALLS = {"jit", "pjit", "closed_call", "core_call"}
CHECKPOINTS = {"checkpoint", "remat", "remat2"}


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """The number of constants of a scan, and the number of its carried values."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()  # JAX 0.11 and later
    return len(constants), len(carry)


def is_dropped(variable: Any) -> bool:
    """Whether a variable stands for a result that nobody reads."""
    return type(variable).__name__ == "DropVar"  # not in jax.extend.core before JAX 0.9


def apply(equation: Any, operands: Sequence[Any], params: Any = None) -> list[Any]:
    """The results of an equation, possibly with other parameters than its own.

    What is traced keeps its place in the user's code. It runs on the mesh on which this is called,
    not on that on which the equation was traced.
    """
    bound = equation.primitive.get_bind_params(equation.params if params is None else params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # until JAX 0.9
    place = source_info_util.user_context(equation.source_info.traceback)
    mesh = get_abstract_mesh()
    with equation.ctx.manager, use_abstract_mesh(mesh), place:
        results = equation.primitive.bind(*functions, *operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def source_of(equation: Any) -> str:
    """File, line and function of an operation in the user's code."""
    return source_info_util.summarize(equation.source_info)
