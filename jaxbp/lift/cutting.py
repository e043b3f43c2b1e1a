"""Cutting: sorts the values of a traced function by kind, its operations into pieces and cuts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.extend import core

from jaxbp.lift.loops import Branches, Checkpoint, Scan
from jaxbp.lift.operation import AsExample, Operation
from jaxbp.lift.program import Cut, Piece, Program
from jaxbp.lift.trace import (
    CONSTANT,
    EXAMPLE,
    PARAMETER,
    as_closed,
    flat_program,
    is_float,
    trace_once,
    variables,
)
from jaxbp.lift.versions import CHECKPOINTS, scan_counts, source_of
from jaxbp.types import LayerError


@dataclasses.dataclass(eq=False)
class Copy:
    """A variable of our own: a parameter as a value of each example."""

    aval: Any


def cut(closed: core.ClosedJaxpr, kinds: Sequence[str], names: Sequence[str]) -> Program:
    """Cuts a function of one example at its parameters.

    Args:
      closed: the traced function.
      kinds: of its inputs. A parameter that is not floating-point counts as a constant.
      names: of its inputs.

    Raises:
      LayerError: the error cannot be carried back through a while loop.
    """
    program = _program(closed, kinds, names)
    trace_once(_parts(program))
    return program


def _program(closed, kinds, names):
    return _Cutter(flat_program(closed), kinds, names).program()


def _parts(program):
    """What a program runs on all examples, also in the programs inside."""
    for step in program.steps:
        if isinstance(step, Piece):
            yield step.for_all
        elif isinstance(step.body, Operation):
            yield step.body.for_all
        else:
            for inside in step.body.programs:
                yield from _parts(inside)


class _Cutter:
    def __init__(self, closed, kinds, names):
        self.closed, self.jaxpr, self.names = closed, closed.jaxpr, names
        self.kinds = dict.fromkeys(self.jaxpr.constvars, CONSTANT)
        for v, kind in zip(self.jaxpr.invars, kinds, strict=True):
            self.kinds[v] = CONSTANT if kind == PARAMETER and not is_float(v.aval) else kind
        self.unbatched, self.made_by, self.steps = [], {}, []

    def program(self):
        for equation in self.jaxpr.eqns:
            self._sort(equation)
        outs = [
            self._as_example(v) if self._kind(v) == PARAMETER else v for v in self.jaxpr.outvars
        ]
        steps, live = self._schedule(outs)
        parts = self.kinds, list(self.names), outs, self.unbatched, steps, live
        return Program(self.closed, *parts)

    def _kind(self, atom):
        return CONSTANT if isinstance(atom, core.Literal) else self.kinds[atom]

    def _sort(self, equation):
        """Gives the results of an equation their kind, and the equation its place."""
        met = {self._kind(v) for v in equation.invars}
        if EXAMPLE not in met:
            self.unbatched.append(equation)
            for v in equation.outvars:
                made = PARAMETER in met and is_float(v.aval) and not _stops(equation)
                self.kinds[v] = PARAMETER if made else CONSTANT
                self.made_by[v] = equation
            return
        self.steps.append(self._cut(equation) if PARAMETER in met else equation)
        self.kinds |= dict.fromkeys(equation.outvars, EXAMPLE)

    def _cut(self, equation):
        name, invars = equation.primitive.name, list(equation.invars)
        if name == "while":
            raise LayerError(
                "lift",
                f"meets {self._paths(invars)} in a while_loop, through which no error can be "
                f"carried back ({source_of(equation)}). Use lax.scan, or fori_loop with a number "
                "of steps that is known when it is traced?",
            )
        if name == "scan":
            constants, carried = scan_counts(equation.params)
            for i in range(constants, constants + carried):
                if self._kind(invars[i]) == PARAMETER:
                    invars[i] = self._as_example(invars[i])
        kinds = tuple(map(self._kind, invars))
        names = [self._paths([v]) for v in invars]
        if name == "scan":
            body = self._scan(equation.params, kinds, names)
        elif name in CHECKPOINTS:
            program = _program(as_closed(equation.params["jaxpr"]), kinds, names)
            body = Checkpoint(program, kinds, equation.params.get("prevent_cse", True))
        elif name == "cond":
            branches = map(as_closed, equation.params["branches"])
            body = Branches([_program(branch, kinds[1:], names[1:]) for branch in branches], kinds)
        else:
            body = Operation.of(equation, kinds, self.made_by)
        return Cut(equation, body, invars, kinds, list(equation.outvars))

    def _scan(self, params, kinds, names):
        """A loop, in which a value that is carried may come to depend on the example."""
        constants, carried = scan_counts(params)
        given = kinds
        while True:
            program = _program(params["jaxpr"], kinds, names)
            grown = list(kinds)
            for i, v in enumerate(program.outs[:carried], constants):
                if program.kind_of(v) == EXAMPLE:
                    grown[i] = EXAMPLE
            if tuple(grown) == kinds:
                break
            kinds = tuple(grown)
        how = {"length": params["length"], "unroll": params["unroll"]}
        return Scan(program, constants, carried, kinds, given, params["reverse"], how)

    def _as_example(self, v):
        copy = Copy(v.aval)
        self.kinds[copy] = EXAMPLE
        self.steps.append(Cut(None, AsExample(v), [v], (PARAMETER,), [copy]))
        return copy

    def _paths(self, atoms):
        """The paths of the parameters that some values are made of."""
        todo, found = variables(atoms), {}
        while todo:
            v = todo.pop()
            if self.kinds[v] != PARAMETER:
                continue
            if v in self.made_by:
                todo += variables(self.made_by[v].invars)
            else:
                found[v] = self.names[self.jaxpr.invars.index(v)]
        return " and ".join(name for v, name in found.items())

    def _schedule(self, outs):
        """The steps that the outputs need, in order, and the values through which an error goes.

        A value's level is the number of cuts on the longest way to it. The operations of a level
        that have no parameters are one piece, and its cuts follow.
        """
        active = {v for v in self.jaxpr.invars if self._kind(v) == EXAMPLE and is_float(v.aval)}
        for step in self.steps:
            goes_on = active & set(self._of_example(step)) and not _stops(step)
            if isinstance(step, Cut) or goes_on:
                active |= {v for v in step.outvars if is_float(v.aval)}
        needed = set(variables(outs))
        live, kept = needed & active, []
        for step in reversed(self.steps):
            if live & set(step.outvars):
                live |= set(self._of_example(step)) & active
            if needed & set(step.outvars):
                needed |= set(self._of_example(step))
                kept.append(step)
        level, levels = dict.fromkeys(self.jaxpr.invars, 0), {}
        for step in reversed(kept):
            at = max((level[v] for v in self._of_example(step)), default=0)
            equations, cuts = levels.setdefault(at, ([], []))
            (cuts if isinstance(step, Cut) else equations).append(step)
            level |= dict.fromkeys(step.outvars, at + isinstance(step, Cut))
        readers = {}  # the levels at which a value is read, None for a cut
        for at, (equations, cuts) in levels.items():
            for step in (*equations, *cuts):
                for v in variables(step.invars):
                    readers.setdefault(v, set()).add(None if isinstance(step, Cut) else at)
        steps = []
        for at in sorted(levels):
            equations, cuts = levels[at]
            if equations:
                steps.append(self._piece(equations, live, set(variables(outs)), readers, at))
            steps += cuts
        return steps, live

    def _piece(self, equations, live, outs, readers, at):
        """One piece of operations without parameters."""
        made = {v for equation in equations for v in equation.outvars}
        read = dict.fromkeys(
            v for equation in equations for v in variables(equation.invars) if v not in made
        )
        if any(self.kinds[v] == PARAMETER for v in read):
            raise AssertionError("lift: a piece has a parameter in it")
        for equation in equations:
            if equation.primitive.name == "while" and live & set(equation.outvars):
                raise LayerError(
                    "lift",
                    "has a while_loop on the way to its outputs, through which no error can be "
                    f"carried back ({source_of(equation)}). Use lax.scan, or fori_loop with a "
                    "number of steps that is known when it is traced?",
                )
        given = [
            v
            for equation in equations
            for v in equation.outvars
            if v in outs or readers.get(v, {at}) - {at}
        ]
        of_example = [v for v in read if self.kinds[v] == EXAMPLE]
        return Piece(
            equations,
            [v for v in of_example if v in live],
            [v for v in of_example if v not in live],
            [v for v in read if self.kinds[v] != EXAMPLE],
            [v for v in given if v in live],
            [v for v in given if v not in live],
        )

    def _of_example(self, step):
        return [v for v in variables(step.invars) if self.kinds[v] == EXAMPLE]


def _stops(equation):
    """Whether no error goes back through an operation of the user's program."""
    return not isinstance(equation, Cut) and equation.primitive.name == "stop_gradient"
