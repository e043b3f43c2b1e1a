"""Loops, checkpoints and branches with parameters inside: programs of their own.

A scan is swept by a scan that runs backwards, one turn after another. A parameter that it scans
over is read inside that loop, if it is used nowhere else. Of a parameter that all turns share, the
operands of all turns stand side by side as positions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.lift.program import Answer, Program, for_each_example, formed
from jaxbp.lift.trace import EXAMPLE, PARAMETER, is_float
from jaxbp.readings.sums import per_example
from jaxbp.sharding import reshaped
from jaxbp.signals.kinds import Conv, Lookup, Outer, Sum, Through, uses_of
from jaxbp.signals.stacked import Stacked


@dataclasses.dataclass(eq=False)
class Checkpoint:
    """A program that keeps its inputs only, and runs again in the backward pass.

    Attributes:
      program: what runs.
      kinds: of its inputs.
      barrier: whether the compiler must not merge both runs.
    """

    program: Program
    kinds: tuple[str, ...]
    barrier: bool

    @property
    def programs(self):
        """What runs, in a list."""
        return [self.program]

    @property
    def remembers(self):
        """All inputs."""
        return range(len(self.kinds))

    def forward(self, operands, examples):
        """The results, and nothing to keep."""
        return self.program.forward(operands, examples)[0], ()

    def backward(self, operands, carriers, cache, errors, live, readers, sweep):
        """Runs the program again, and sweeps back through it."""
        del cache, live
        mine = [x for x, kind in zip(operands, self.kinds, strict=True) if kind == EXAMPLE]
        if self.barrier:
            mine, errors = jax.lax.optimization_barrier((mine, errors))
        again = iter(mine)
        pairs = zip(operands, self.kinds, strict=True)
        operands = [next(again) if kind == EXAMPLE else x for x, kind in pairs]
        _, cache = self.program.forward(operands, sweep.examples)
        carriers = operands if _same(operands, carriers, self.kinds) else carriers
        return _swept(self.program, operands, carriers, cache, errors, readers, sweep)


@dataclasses.dataclass(eq=False)
class Branches:
    """Branches, of which each example takes one. All of them run for all examples.

    Attributes:
      programs: one for each branch.
      kinds: of the index and of the operands.
    """

    programs: list[Program]
    kinds: tuple[str, ...]

    remembers = (0,)

    def forward(self, operands, examples):
        """The results of the branch that each example takes."""
        index, *operands = operands
        outs, caches = zip(*(p.forward(operands, examples) for p in self.programs), strict=True)
        taken = self._taken(index, examples)
        chosen = []
        for results in zip(*outs, strict=True):
            y = results[0]
            for here, other in zip(taken[1:], results[1:], strict=True):
                y = _where(here, other, y)
            chosen.append(y)
        return chosen, caches

    def backward(self, operands, carriers, caches, errors, live, readers, sweep):
        """Sweeps through every branch, and keeps of each what the examples that take it have."""
        del live, readers
        (index, *operands), (_, *carriers) = operands, carriers
        dxs: list[Any] = [None] * len(operands)
        found = []
        nothing = [None] * len(operands)
        taken = self._taken(index, sweep.examples)
        for here, program, cache in zip(taken, self.programs, caches, strict=True):
            # Where a branch is not taken, its values may be infinite or nan, and zero times those
            # is nan: so what comes out is chosen, and not only what goes in.
            own = [_where(here, error, 0) if is_float(error) else error for error in errors]
            own_dxs, own_found = _swept(program, operands, carriers, cache, own, nothing, sweep)
            for i, dx in enumerate(own_dxs):
                if dx is not None:
                    dx = _where(here, dx, 0)
                    dxs[i] = dx if dxs[i] is None else dxs[i] + dx
            found += [(i + 1, _where_taken(here, signal)) for i, signal in own_found]
        return [None, *dxs], found

    def _taken(self, index, examples):
        """For each branch, which examples take it, [N]."""
        index = jnp.clip(jnp.asarray(index, int), 0, len(self.programs) - 1)
        index = for_each_example(self.kinds[0], index, examples)
        return [index == i for i in range(len(self.programs))]


def _where(here, x, other):
    return jnp.where(reshaped(here, *[1] * (x.ndim - 1)), x, jnp.asarray(other, x.dtype))


def _where_taken(here, signal):
    """A signal whose operands are zero for the examples that do not take the branch."""
    if isinstance(signal, Through):
        back = signal.back
        back = back if back.moves else dataclasses.replace(back, guarded=True)
        return Through(_where_taken(here, signal.signal), back)
    if isinstance(signal, Sum):
        return Sum(tuple(_where_taken(here, use) for use in signal.signals))
    if isinstance(signal, Lookup):
        return signal._replace(deltas=_where(here, signal.deltas, 0))
    return jax.tree.map(lambda x: _where(here, x, 0), signal)


@dataclasses.dataclass(eq=False)
class Scan:
    """A loop.

    Attributes:
      program: of one turn.
      constants: the number of inputs that all turns share.
      carried: the number of inputs that a turn hands on to the next.
      kinds: of the inputs of a turn.
      given: the kinds of the inputs of the loop. A constant that is carried may come to depend on
        the example.
      reverse: whether the last turn runs first.
      how: `length` and `unroll`.
    """

    program: Program
    constants: int
    carried: int
    kinds: tuple[str, ...]
    given: tuple[str, ...]
    reverse: bool
    how: dict[str, Any]

    @property
    def programs(self):
        """What runs, in a list."""
        return [self.program]

    @property
    def remembers(self):
        """Everything but the values that are carried, which the turns keep."""
        shared, _, scanned = self._split(range(len(self.kinds)))
        return [*shared, *scanned]

    def scans_over(self, i):
        """Whether each turn has its own part of an input."""
        return i >= self.constants + self.carried

    def _split(self, values):
        """What all turns share, what is carried, and what is scanned over."""
        first, second = self.constants, self.constants + self.carried
        return values[:first], values[first:second], values[second:]

    def forward(self, operands, examples):
        """The results, and what every turn keeps."""
        shared, init, scanned = self._split(operands)
        _, kinds, kinds_scanned = self._split(self.kinds)
        _, given, _ = self._split(self.given)
        init = [
            for_each_example(old, x, examples) if kind == EXAMPLE else examples.shared(x)
            for x, kind, old in zip(init, kinds, given, strict=True)
        ]
        scanned = _turns_first(scanned, kinds_scanned)
        layouts = []

        def turn(carry, scanned):
            outs, cache = self.program.run([*shared, *carry, *scanned], examples)
            constant = [x for x, kind in zip(carry, kinds, strict=True) if kind != EXAMPLE]
            kept, layout = _without(cache, {"shared": shared, "scanned": scanned})
            layouts.append(layout)
            made = list(map(self.program.kind_of, self.program.outs))
            after = [
                (for_each_example(old, out, examples) if kind == EXAMPLE else out).astype(x.dtype)
                for out, old, kind, x in zip(outs, made, kinds, carry, strict=False)
            ]
            pairs = zip(made[self.carried :], outs[self.carried :], strict=True)
            ys = [for_each_example(kind, y, examples) for kind, y in pairs]
            return after, (ys, kept, constant)

        last, (ys, kept, constants) = jax.lax.scan(
            turn, init, scanned, reverse=self.reverse, **self.how
        )
        last = [for_each_example(kind, x, examples) for x, kind in zip(last, kinds, strict=True)]
        results = [*last, *(jnp.moveaxis(y, 0, 1) for y in ys)]
        return results, Kept((kept, constants), layouts[-1])

    def backward(self, operands, carriers, cache, errors, live, readers, sweep):
        """Sweeps back through the turns, from the last one to the first."""
        del live
        program, examples = self.program, sweep.examples
        (kept, constants), layout = cache.arrays, cache.layout
        (shared, _, scanned), (by, _, by_scanned) = self._split(operands), self._split(carriers)
        kinds_shared, kinds, kinds_scanned = self._split(self.kinds)
        vars_shared, vars_carried, _ = self._split(program.invars)
        _, _, readers = self._split(readers)
        # Of what is scanned over, another tree is scanned over too.
        others = [
            tree if kind == PARAMETER and tree is not x else None
            for tree, x, kind in zip(by_scanned, scanned, kinds_scanned, strict=True)
        ]
        scanned = _turns_first(scanned, kinds_scanned)
        is_read = [reader is not None for reader in readers]
        inner = [None] * (self.constants + self.carried) + list(readers)

        summed = set()

        def turn(carry, own):
            d_carry, d_shared, sums = carry
            scanned, others, kept, constants, d_ys = own
            cache = _put_back(layout, kept, {"shared": shared, "scanned": scanned})
            constant = iter(constants)
            state = [None if kind == EXAMPLE else next(constant) for kind in kinds]
            values = [*shared, *state, *scanned]
            carriers = [
                *by,
                *state,
                *(x if other is None else other for x, other in zip(scanned, others, strict=True)),
            ]
            d_outs = [*d_carry, *d_ys]
            dxs, found = _swept(program, values, carriers, cache, d_outs, inner, sweep)
            d_own, d_state, d_scanned = self._split(dxs)
            d_shared = [
                total if d is None else total + d for total, d in zip(d_shared, d_own, strict=True)
            ]
            d_state = [
                old if old is None else jnp.zeros_like(old) if d is None else d
                for old, d in zip(d_carry, d_state, strict=True)
            ]
            sums, operands, answers = list(sums), {}, {}
            for i, what in found:
                if isinstance(what, Answer):
                    answers[i] = what.value
                elif i >= self.constants:
                    answers[i] = per_example(what)
                else:
                    uses = uses_of(what)
                    operands[i] = [use for use in uses if _stands_side_by_side(use)]
                    for use in uses:
                        if not _stands_side_by_side(use):
                            summed.add(i)
                            sums[i] = sums[i] + per_example(use)
            return (d_state, d_shared, sums), (d_scanned, operands, answers)

        def zeros(v):
            return examples.zeros(v.aval.shape, v.aval.dtype)

        start = (
            [
                error if kind == EXAMPLE and is_float(v.aval) else None
                for error, v, kind in zip(errors, vars_carried, kinds, strict=False)
            ],
            [zeros(v) if v in program.live else None for v in vars_shared],
            [
                zeros(v) if kind == PARAMETER else None
                for v, kind in zip(vars_shared, kinds_shared, strict=True)
            ],
        )
        d_ys = [jnp.moveaxis(d, 1, 0) for d in errors[self.carried :]]
        (d_init, d_shared, sums), (d_scanned, operands_of, answers) = jax.lax.scan(
            turn,
            start,
            (scanned, others, kept, constants, d_ys),
            reverse=not self.reverse,
            **self.how,
        )
        d_scanned = [None if d is None else jnp.moveaxis(d, 0, 1) for d in d_scanned]
        found = [(i, _merged(signal)) for i, uses in operands_of.items() for signal in uses]
        found += [(i, formed(sums[i])) for i in sorted(summed)]
        for i, answer in answers.items():
            if is_read[i - self.constants - self.carried]:
                found.append((i, Answer(Stacked(answer))))
            else:
                found.append((i, formed(jnp.moveaxis(answer, 0, 1))))
        return [*d_shared, *d_init, *d_scanned], found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """What a loop keeps of every turn, and how it makes up the cache of one turn."""

    arrays: Any
    layout: Any = dataclasses.field(metadata={"static": True})


def _without(cache, known):
    """The arrays of a cache, each once and without those that the loop has anyway."""
    leaves, structure = jax.tree.flatten(cache)
    places = {id(x): (name, i) for name, xs in known.items() for i, x in enumerate(xs)}
    kept = {id(leaf): leaf for leaf in leaves if id(leaf) not in places}
    places |= {identity: ("kept", i) for i, identity in enumerate(kept)}

    return list(kept.values()), (structure, tuple(places[id(leaf)] for leaf in leaves))


def _put_back(layout, kept, known):
    """The cache that `_without` took the arrays of."""
    structure, order = layout
    arrays = {**known, "kept": kept}
    return structure.unflatten([arrays[name][i] for name, i in order])


def _turns_first(arrays, kinds):
    """What is scanned over, [N, T, ...] for values of the example, with the turns as first axis."""
    pairs = zip(arrays, kinds, strict=True)
    return [jnp.moveaxis(x, 1, 0) if kind == EXAMPLE else x for x, kind in pairs]


def _same(operands, carriers, kinds):
    """Whether the parameters themselves carry the error."""
    triples = zip(operands, carriers, kinds, strict=True)
    return all(a is b for a, b, kind in triples if kind == PARAMETER)


def _swept(program, values, carriers, cache, errors, readers, sweep):
    """The sweep of a program inside: dx of its inputs, and what was found, by number of input."""
    kinds = [program.kinds[v] for v in program.invars]
    readers = [r for r, kind in zip(readers, kinds, strict=True) if kind == PARAMETER]
    dxs, answers = program.backward(
        values, carriers, cache, errors, readers, sweep.examples, sweep.log
    )
    found = []
    for leaf, reader, answer in zip(program.leaves, readers, answers, strict=True):
        if answer is not None:
            what = answer if reader is None else Answer(answer)
            found.append((program.invars.index(leaf), what))
    return dxs, found


def _stands_side_by_side(signal):
    """Whether the operands of all turns are kept as positions. Others are summed over the turns."""
    if isinstance(signal, Through):
        return signal.back.moves and _stands_side_by_side(signal.signal)
    return isinstance(signal, Outer | Lookup | Conv)


def _merged(signal):
    """The signals of all turns, with a first axis more, as one with as many more positions."""
    if isinstance(signal, Through):
        return signal._replace(signal=_merged(signal.signal))

    def side_by_side(x, rank):
        x = jnp.moveaxis(x, 0, 1)
        return reshaped(x, -1, *x.shape[x.ndim - rank :])

    if isinstance(signal, Lookup):
        indices, deltas = side_by_side(signal.indices, 0), side_by_side(signal.deltas, 1)
        return Lookup(indices, deltas, signal.table[0])
    rank = len(signal.geometry.kernel) + 1 if isinstance(signal, Conv) else 1
    inputs, deltas = side_by_side(signal.inputs, rank), side_by_side(signal.deltas, rank)
    return signal._replace(inputs=inputs, deltas=deltas)
