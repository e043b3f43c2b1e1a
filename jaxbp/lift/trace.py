"""Traces: the user's function as a list of equations, and running a part of such a list."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxbp.lift.versions import CALLS, apply

# The kinds of values in a program (see `program`).
CONSTANT, PARAMETER, EXAMPLE = "constant", "parameter", "example"


def is_float(x: Any) -> bool:
    """Whether an array or an abstract value is floating-point, so that it has a derivative."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def variables(atoms: Iterable[Any]) -> list[Any]:
    """The atoms that are variables. The others are literals."""
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def as_closed(jaxpr: Any) -> core.ClosedJaxpr:
    """A program with its constants, from one that may have none."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, [])


def run(equations: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> Callable:
    """What a list of equations computes, `function(*inputs) -> [outputs]`."""

    def function(*values):
        environment = dict(zip(inputs, values, strict=True))
        for equation in equations:
            operands = [
                atom.val if isinstance(atom, core.Literal) else environment[atom]
                for atom in equation.invars
            ]
            environment.update(zip(equation.outvars, apply(equation, operands), strict=True))
        return [environment.get(v) for v in outputs]

    return function


class ForAll:
    """What a list of equations of one example computes for all examples.

    Attributes:
      structure: equal for two lists that differ in their variables alone; None if it is not known.
      function: `function(*inputs) -> [outputs]`.
    """

    def __init__(
        self,
        equations: Sequence[Any],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        axes: Sequence[int | None],
    ):
        """Takes for each input the axis 0 if it is [N, ...], or None if all examples share it."""
        self.structure = _structure(equations, inputs, outputs, axes)
        self.function = jax.vmap(run(equations, inputs, outputs), tuple(axes))

    def __call__(self, *inputs: Any) -> list[Any]:
        """The outputs, [N, ...]."""
        return self.function(*inputs)


def trace_once(parts: Iterable[ForAll]) -> None:
    """Gives equal parts, as of the blocks of a transformer, one function that JAX traces once."""
    equal = {}
    for part in parts:
        if part.structure is not None:
            equal.setdefault(part.structure, []).append(part)
    for several in equal.values():
        if len(several) > 1:  # what runs once is traced sooner without jit
            function = jax.jit(several[0].function)
            for part in several:
                part.function = function


def _structure(equations, inputs, outputs, axes):
    """The equations with numbers in place of their variables; None if they cannot be hashed."""
    numbers = {}

    def named(atom):
        if isinstance(atom, core.Literal):
            return np.asarray(atom.val).tobytes(), atom.aval
        return numbers.setdefault(atom, len(numbers)), atom.aval

    def names(atoms):
        return tuple(map(named, atoms))

    try:
        steps = tuple(
            (names(e.invars), e.primitive, tuple(e.params.items()), e.ctx, names(e.outvars))
            for e in equations
        )
        structure = names(inputs), tuple(axes), steps, names(outputs)
        hash(structure)
    except TypeError:
        return None
    return structure


def flat_program(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The same program with every call of another one written out.

    It is traced anew, since equal calls share one program object: written out twice, its variables
    would stand for two values.
    """
    like = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
    return jax.make_jaxpr(lambda *values: _written_out(closed, *values))(*like)


def _written_out(closed, *values):
    jaxpr = closed.jaxpr
    environment = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    environment.update(zip(jaxpr.invars, values, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else environment[atom]

    for equation in jaxpr.eqns:
        called = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        operands = list(map(read, equation.invars))
        if equation.primitive.name in CALLS and called is not None:
            results = _written_out(as_closed(called), *operands)
        else:
            results = apply(equation, operands)
        environment.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
