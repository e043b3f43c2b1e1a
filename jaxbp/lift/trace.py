"""Traces: the user's function as a list of equations, and running a part of such a list."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
