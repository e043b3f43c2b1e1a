"""Which gradients does each part of an optimizer's update depend on? Read from its program.

An optimizer can update one parameter while the gradients of the others do not exist yet, if its
update works *leaf by leaf*: the new value and the state of a parameter depend on its own gradient,
value and state, and on nothing else but numbers that depend on no gradient, such as a count of
steps. In a stack, where one array holds the parameter of all layers, it can update one layer at a
time if it also works *entry by entry*, so that a norm over all layers is no part of it.

Whether it does is not a matter of names. The update is traced with the shapes of all parameters,
and each value of the program knows which of the inputs it depends on.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxbp.signals.stacked import stack_axes
from jaxbp.types import PyTree, show_path

# Operations that compute each entry of the result from the same entry of their operands.
ENTRY_BY_ENTRY = frozenset(
    "abs add and atan2 broadcast_in_dim cbrt ceil clamp convert_element_type copy copy_p cos "
    "div eq erf erf_inv exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic "
    "lt max min mul ne neg nextafter not optimization_barrier or pow reduce_precision rem round "
    "rsqrt select_n sign sin sqrt square stop_gradient sub tan tanh xor".split()
)
# Operations that call a program of their own on their operands.
CALLS = frozenset(["closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit", "remat2"])


class Trail(NamedTuple):
    """What a value of the program was made of.

    Attributes:
      inputs: the inputs that it depends on, by their numbers.
      mixed: those of them of which it mixes entries.
    """

    inputs: frozenset[int]
    mixed: frozenset[int]


NOTHING = Trail(frozenset(), frozenset())


def owners_of_state(
    name: str, update: optax.TransformUpdateFn, state: PyTree, params: PyTree
) -> list[int | None]:
    """Which parameter each leaf of an optimizer's state belongs to.

    Args:
      name: the call, for messages.
      update: `update(grads, state, params) -> (updates, state)`.
      state: the state, or its shapes.
      params: the parameters, or their shapes. Those of stacks have to be updated entry by entry.

    Returns:
      For each leaf of the state the number of the parameter's leaf, or None for a number that
      belongs to all.

    Raises:
      ValueError: the update of a parameter depends on the gradient of another one, or mixes the
        layers of a stack. The message names them.
    """
    paths = [show_path(path) for path, _ in jax.tree.leaves_with_path(params)]
    stacked = [axes > 0 for axes in jax.tree.leaves(stack_axes(params))]
    n, arrays = len(paths), jax.tree.leaves(state)
    trails = _trails_of(update, (params, state, params))
    updates, states = trails[:n], trails[n:]
    if len(states) != len(arrays):
        raise ValueError(f"{name}: the optimizer returns a state of another structure.")

    def leaf_of(i):
        """The number of the parameter that an input is the gradient or the value of, or None."""
        return i if i < n else i - n - len(arrays) if i >= n + len(arrays) else None

    def leaves_of(trail):
        return {leaf for i in trail.inputs if (leaf := leaf_of(i)) is not None}

    def owner_of(j):
        """The parameter that the j-th array of the state depends on, or is used for."""
        owners = leaves_of(states[j])
        if not owners and getattr(arrays[j], "ndim", 0) > 0:
            owners = {k for k, trail in enumerate(updates) if n + j in trail.inputs}
        if len(owners) > 1:
            raise _mixes(name, [paths[k] for k in sorted(owners)])
        return next(iter(owners), None)

    owners = [owner_of(j) for j in range(len(arrays))]
    for k, trail in [*enumerate(updates), *zip(owners, states, strict=True)]:
        of_state = {owners[i - n] for i in trail.inputs if n <= i < n + len(arrays)}
        involved = leaves_of(trail) | (of_state - {None})
        if involved - {k}:
            raise _mixes(name, [paths[other] for other in sorted({*involved, k} - {None})])
        if k is not None and stacked[k] and trail.mixed:
            raise ValueError(
                f"{name}: the optimizer's update of {paths[k]} mixes the layers of its stack, as a "
                "norm of all of them does. fused=True takes optimizers that update each entry by "
                "itself. Leave fused out, or use a chain of layers instead of the stack?"
            )
    return owners


def require_same_program(
    name: str, update: optax.TransformUpdateFn, whole: PyTree, one: PyTree
) -> None:
    """Raises unless an update does the same with one layer of each stack as with all of them.

    It does not if it decides by the size of an array which parameters to decay, for one.

    Args:
      name: the call, for messages.
      update: the update of an optimizer.
      whole: its arguments, (grads, state, params).
      one: the same with the arrays of stacks cut to [1, ...].
    """
    if _operations(jax.make_jaxpr(update)(*whole)) != _operations(jax.make_jaxpr(update)(*one)):
        raise ValueError(
            f"{name}: the optimizer does something else with one layer of a stack than with all of "
            "them, so it decides by the size of an array. fused=True cannot do that; decide by the "
            "path or the rank instead, or leave fused out?"
        )


def _mixes(name, paths):
    return ValueError(
        f"{name}: the optimizer's update of {paths[0]} depends on the gradients of others too"
        f"{', such as ' + paths[1] if len(paths) > 1 else ''}. fused=True takes optimizers that "
        "work leaf by leaf. For a clip by the global norm use max_norm; otherwise leave fused out?"
    )


def _trails_of(function, arguments) -> list[Trail]:
    """The trail of each output; inputs are numbered in the order of the arguments' leaves."""
    closed = jax.make_jaxpr(function)(*arguments)
    inputs = [Trail(frozenset([i]), frozenset()) for i in range(len(closed.jaxpr.invars))]
    return _follow(closed.jaxpr, inputs)


def _follow(jaxpr: Jaxpr, inputs: list[Trail]) -> list[Trail]:
    """The trails of a program's outputs."""
    trails: dict[Any, Trail] = dict(zip(jaxpr.invars, inputs, strict=True))

    def trail(atom):
        return NOTHING if isinstance(atom, Literal) else trails.get(atom, NOTHING)

    for equation in jaxpr.eqns:
        own = [trail(atom) for atom in equation.invars]
        inner = _program_of(equation)
        if inner is not None and len(inner.invars) == len(own):
            outputs = _follow(inner, own)
        else:
            joined = _join(own)
            if not _is_entry_by_entry(equation):
                joined = Trail(joined.inputs, joined.inputs)
            outputs = [joined] * len(equation.outvars)
        trails.update(zip(equation.outvars, outputs, strict=True))
    return [trail(atom) for atom in jaxpr.outvars]


def _join(trails: Iterable[Trail]) -> Trail:
    return functools.reduce(
        lambda a, b: Trail(a.inputs | b.inputs, a.mixed | b.mixed), trails, NOTHING
    )


def _program_of(equation) -> Jaxpr | None:
    """The program that an equation calls, or None."""
    if equation.primitive.name not in CALLS:
        return None
    found = (equation.params.get(key) for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"))
    program = next((p for p in found if p is not None), None)
    return program.jaxpr if isinstance(program, ClosedJaxpr) else program


def _is_entry_by_entry(equation) -> bool:
    """Whether each entry of the outputs is computed from the same entry of the operands."""
    if all(atom.aval.shape == () for atom in (*equation.invars, *equation.outvars)):
        return True  # numbers, such as a count of steps
    shapes = {atom.aval.shape for atom in equation.invars}
    return equation.primitive.name in ENTRY_BY_ENTRY and (
        shapes <= {(), equation.outvars[0].aval.shape}  # a number goes to all entries
    )


def _operations(closed: ClosedJaxpr) -> list[str]:
    """The names of all operations of a program, in order."""
    return [name for equation in closed.jaxpr.eqns for name in _names(equation)]


def _names(equation):
    inner = _program_of(equation)
    if inner is None:
        return [equation.primitive.name]
    return [name for inside in inner.eqns for name in _names(inside)]
