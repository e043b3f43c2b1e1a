"""Program: a traced function of one example, cut wherever parameters meet the example.

Every value in the program is of one kind:

    CONSTANT    made of constants alone; also what is not floating-point, such as a mask
    PARAMETER   made of parameters and constants
    EXAMPLE     depends on the example; [N, ...] when the program runs

Constants and parameters are computed once for all examples, anew in each pass: from the parameters
in the forward pass and for the operands of gradients, and from the tree that `backward` is given
for the error. What is done to values of the example stands in steps, in the order of the program:

    Piece   operations without parameters; `jax.vjp` carries the error through them
    Cut     an operation, loop, checkpoint or branch in which parameters meet the example; the error
            is carried explicitly, and each parameter gets a signal

A parameter can reach the outputs through cuts only: a piece is a closed function of the example's
values and of constants, and it cannot be built if a parameter is missing. So no use of a parameter
is overlooked.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from jaxbp.lift.examples import Examples
from jaxbp.lift.routes import pull
from jaxbp.lift.trace import CONSTANT, EXAMPLE, PARAMETER, ForAll, is_float, run
from jaxbp.lift.versions import is_dropped
from jaxbp.sharding import reshaped
from jaxbp.signals.kinds import Bias, Through, joined, uses_of
from jaxbp.signals.views import View
from jaxbp.types import Reading


class Answer(NamedTuple):
    """What a reading gave for a parameter inside a loop or a checkpoint, in place of its signal."""

    value: Any


class Use(NamedTuple):
    """A row of the table of uses.

    Attributes:
      path: the path of the parameter.
      equation: the operation, or None where the parameter itself becomes an output.
      signal: the signal of the parameter in this use.
      formed: whether the gradient of each example had to be formed.
    """

    path: str
    equation: Any
    signal: Any
    formed: bool


@dataclasses.dataclass(eq=False)
class Piece:
    """Operations without parameters.

    Attributes:
      equations: in order.
      live_in: the inputs through which the error goes back.
      rest_in: the other inputs that depend on the example.
      fixed_in: constants.
      live_out: the outputs at which an error comes in.
      rest_out: the other outputs.
      for_all: what it computes for all examples.
    """

    equations: list[Any]
    live_in: list[Any]
    rest_in: list[Any]
    fixed_in: list[Any]
    live_out: list[Any]
    rest_out: list[Any]
    for_all: ForAll = dataclasses.field(init=False)

    def __post_init__(self):
        """Makes the function of all examples."""
        of_example = [*self.live_in, *self.rest_in]
        self.for_all = ForAll(
            self.equations,
            [*of_example, *self.fixed_in],
            [*self.live_out, *self.rest_out],
            [0] * len(of_example) + [None] * len(self.fixed_in),
        )

    def forward(self, env, examples):
        """Adds the outputs to the values, and returns the function that carries the error back."""

        def function(live, rest, fixed):
            outs = self.for_all(*live, *rest, *fixed)
            return tuple(outs[: len(self.live_out)]), tuple(outs[len(self.live_out) :])

        live, rest = [env[v] for v in self.live_in], [env[v] for v in self.rest_in]
        fixed = [env[v] for v in self.fixed_in]
        if self.live_out:
            outs, vjp, others = examples.vjp(function, live, rest, fixed)
        else:
            (outs, others), vjp = examples.run(function, live, rest, fixed), None
        env.update(zip(self.live_out, outs, strict=True))
        env.update(zip(self.rest_out, others, strict=True))
        return vjp

    def backward(self, sweep, vjp):
        """Carries the errors at the outputs to the inputs."""
        if vjp is not None and sweep.reached(self.live_out):
            errors = tuple(sweep.error_at(v) for v in self.live_out)
            for v, dx in zip(self.live_in, vjp(errors)[0], strict=True):
                sweep.add(v, dx)


@dataclasses.dataclass(eq=False)
class Cut:
    """An operation in which parameters meet the example.

    Attributes:
      equation: the operation in the user's program, or None: a parameter becomes a value of each
        example as it stands.
      body: what runs it (`Operation`, `Scan`, `Checkpoint`, `Branches`).
      invars: its operands.
      kinds: their kinds.
      outvars: its results.
    """

    equation: Any
    body: Any
    invars: list[Any]
    kinds: tuple[str, ...]
    outvars: list[Any]

    def operands_with(self, *kinds):
        """The operands of some kinds."""
        return [v for v, kind in zip(self.invars, self.kinds, strict=True) if kind in kinds]

    @property
    def remembered(self):
        """The operands of the example that backward needs."""
        return [self.invars[i] for i in self.body.remembers if self.kinds[i] == EXAMPLE]

    def forward(self, env, examples):
        """Adds the results to the values, and returns what the body keeps."""
        outs, cache = self.body.forward([value_of(v, env) for v in self.invars], examples)
        env.update(zip(self.outvars, outs, strict=True))
        return cache

    def backward(self, sweep, cache):
        """Carries the error to the operands of the example, and hands out the signals."""
        if not sweep.reached(self.outvars):
            return
        errors = [sweep.error_at(v) for v in self.outvars]
        dxs, found = self.body.backward(
            sweep.operands(self.invars, sweep.values),
            sweep.operands(self.invars, sweep.carriers),
            cache,
            errors,
            [not isinstance(v, core.Literal) and v in sweep.program.live for v in self.invars],
            [sweep.reader_of(v) for v in self.invars],
            sweep,
        )
        for v, dx in zip(self.invars, dxs, strict=True):
            sweep.add(v, dx)
        for at, what in found:
            v = self.invars[at] if isinstance(at, int) else at
            if isinstance(what, Answer):
                sweep.answers[v] = what.value
            else:
                sweep.signals.setdefault(v, []).append(what)
                if sweep.log is not None and not self.body.programs:
                    for leaf, own in pull(sweep.program, v, what, sweep.fixed):
                        path = sweep.program.name_of(leaf)
                        sweep.log.append(Use(path, self.equation, own, self.body.is_formed))


class Sweep:
    """One backward pass through a program: errors on their way, and what is found at parameters."""

    def __init__(self, program, examples, fixed, carrier, saved, readers, log):
        """Takes what the forward pass left, and for each parameter a reading or None."""
        self.program, self.examples, self.log = program, examples, log
        self.fixed, self.values, self.carriers = fixed, fixed | saved, carrier | saved
        self.readers = dict(zip(program.leaves, readers, strict=True))
        self.errors, self.signals, self.answers, self._zeros = {}, {}, {}, {}

    def add(self, v, error):
        """Adds an error at a value of the example."""
        if error is not None and v in self.program.live:
            self.errors[v] = self.errors[v] + error if v in self.errors else error

    def reached(self, variables):
        """Whether an error came to any of these values."""
        return any(v in self.errors for v in variables)

    def error_at(self, v):
        """The error at a value, whose uses have all been swept."""
        if v in self.errors:
            return self.errors.pop(v)
        return self.examples.zeros(v.aval.shape, v.aval.dtype if is_float(v.aval) else float)

    def operands(self, variables, values):
        """Values as the forward pass had them, zeros for those of the example that nobody needs."""
        return [
            self._zeros_like(v)
            if self.program.kind_of(v) == EXAMPLE and v not in values
            else value_of(v, values)
            for v in variables
        ]

    def _zeros_like(self, v):
        """Zeros for a value of the example, one array for all values of a shape."""
        kind = v.aval.shape, v.aval.dtype
        if kind not in self._zeros:
            self._zeros[kind] = self.examples.zeros(*kind)
        return self._zeros[kind]

    def reader_of(self, v):
        """The reading of a parameter that is used here and nowhere else, or None."""
        is_leaf = not isinstance(v, core.Literal) and v in self.program.leaves
        return self.readers[v] if is_leaf and self.program.uses[v] == 1 else None


class Program:
    """A function of one example, cut at its parameters (`cutting.cut` makes it).

    Attributes:
      invars: the inputs.
      outs: the outputs.
      kinds: the kind of every variable.
      names: of the inputs, for messages and tables.
      leaves: the inputs that are parameters.
      made_by: the equation that makes each constant and each value made of parameters.
      live: the values of the example through which an error goes.
      steps: pieces and cuts.
      uses: at how many operands each parameter is used.
    """

    def __init__(self, closed, kinds, names, outs, unbatched, steps, live):
        """Takes the parts that `cutting` found."""
        jaxpr = closed.jaxpr
        self.constants = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        self.invars, self.outs, self.kinds, self.names = jaxpr.invars, outs, kinds, names
        self.leaves = [v for v in self.invars if kinds[v] == PARAMETER]
        self.unbatched, self.steps, self.live = unbatched, steps, live
        self.made_by = {v: equation for equation in unbatched for v in equation.outvars}
        self.cuts = [step for step in steps if isinstance(step, Cut)]
        self.saved = list(dict.fromkeys(v for cut in self.cuts for v in cut.remembered))
        used = [
            leaf
            for cut in self.cuts
            for v in cut.operands_with(PARAMETER)
            for leaf in self.leaves_of(v)
        ]
        self.uses = {leaf: used.count(leaf) for leaf in self.leaves}

    def kind_of(self, atom):
        """The kind of a variable or a literal."""
        return CONSTANT if isinstance(atom, core.Literal) else self.kinds[atom]

    def leaves_of(self, v):
        """The parameters that a value is made of."""
        found, todo = {}, [v]
        while todo:
            u = todo.pop()
            if self.kind_of(u) == PARAMETER:
                if u in self.made_by:
                    todo += self.made_by[u].invars
                else:
                    found[u] = None
        return [leaf for leaf in self.leaves if leaf in found]

    def route_to(self, v):
        """The equations that make a value of parameters and constants, in order."""
        route, todo = set(), [v]
        while todo:
            u = todo.pop()
            if self.kind_of(u) == PARAMETER and u in self.made_by:
                if id(self.made_by[u]) not in route:
                    route.add(id(self.made_by[u]))
                    todo += self.made_by[u].invars
        return [equation for equation in self.unbatched if id(equation) in route]

    def name_of(self, v):
        """The paths of the parameters that a value is made of."""
        return " and ".join(self.names[self.invars.index(leaf)] for leaf in self.leaves_of(v))

    def fixed(self, values: Sequence[Any], examples: Examples) -> dict[Any, Any]:
        """Every constant and every value made of parameters, from these inputs."""
        inputs = zip(self.invars, values, strict=True)
        env = self.constants | {v: x for v, x in inputs if self.kinds[v] != EXAMPLE}
        made = [v for v in self.made_by if not is_dropped(v)]
        results = examples.run_shared(run(self.unbatched, list(env), made), *env.values())
        return env | dict(zip(made, results, strict=True))

    def forward(self, values: Sequence[Any], examples: Examples) -> tuple[list[Any], Any]:
        """The outputs, [N, ...], and a cache. Inputs of the example are [N, ...]."""
        outs, cache = self.run(values, examples)
        kinds = map(self.kind_of, self.outs)
        outs = [for_each_example(*own, examples) for own in zip(kinds, outs, strict=True)]
        return outs, cache

    def run(self, values: Sequence[Any], examples: Examples) -> tuple[list[Any], Any]:
        """As `forward`, but outputs that do not depend on the example have no axis of examples."""
        env = self.fixed(values, examples)
        inputs = zip(self.invars, values, strict=True)
        env |= {v: x for v, x in inputs if self.kinds[v] == EXAMPLE}
        caches = [step.forward(env, examples) for step in self.steps]
        return [value_of(v, env) for v in self.outs], (caches, [env[v] for v in self.saved])

    def backward(
        self,
        values: Sequence[Any],
        tree: Sequence[Any],
        cache: Any,
        errors: Sequence[Any],
        readers: Sequence[Reading | None],
        examples: Examples,
        log: list[Use] | None = None,
    ) -> tuple[list[Any], list[Any]]:
        """Sweeps back through all steps.

        Args:
          values: the inputs of forward. Those of the example are not looked at.
          tree: the same with other parameters: those that carry the error.
          cache: of forward.
          errors: at each output.
          readers: for each parameter a reading, or None if its signal is wanted.
          examples: those of forward.
          log: a list to which every use is added, or None.

        Returns:
          The derivative at each input (None if there is none), and what was read at each parameter,
          or its signal (None if it has no use).
        """
        fixed = self.fixed(values, examples)
        same = all(a is b for a, b in zip(values, tree, strict=True))
        caches, saved = cache
        remembered = dict(zip(self.saved, saved, strict=True))
        carrier = fixed if same else self.fixed(tree, examples)
        sweep = Sweep(self, examples, fixed, carrier, remembered, readers, log)
        for v, error in zip(self.outs, errors, strict=True):
            if not isinstance(v, core.Literal):
                sweep.add(v, error)
        for step, kept in reversed(list(zip(self.steps, caches, strict=True))):
            step.backward(sweep, kept)
        dxs = [sweep.errors.get(v) for v in self.invars]
        return dxs, self._answers(sweep)

    def _answers(self, sweep):
        """What was read at each parameter, or its signal (None if it has no use)."""
        signals = {leaf: [] for leaf in self.leaves}
        for v, found in sweep.signals.items():
            for signal in uses_of(joined(found)):
                for leaf, own in pull(self, v, signal, sweep.fixed):
                    signals[leaf].append(own)
        answers = []
        for leaf, reader in sweep.readers.items():
            if leaf in sweep.answers:
                answers.append(sweep.answers[leaf])
            elif reader is None:
                answers.append(joined(signals[leaf]) if signals[leaf] else None)
            else:
                found = signals[leaf]
                if not found:  # it has no use, and no gradient
                    found = [formed(sweep.examples.zeros(leaf.aval.shape, leaf.aval.dtype))]
                answers.append(reader(joined(found)))
        return answers


def value_of(atom, env):
    """The value of a variable or a literal."""
    return atom.val if isinstance(atom, core.Literal) else env[atom]


def for_each_example(kind, x, examples):
    """A value [N, ...], the same for all examples if it does not depend on them."""
    return x if kind == EXAMPLE else examples.repeated(x)


def formed(gradients: jax.Array) -> Any:
    """The signal of a parameter of which the gradients of all examples are formed, [N, ...]."""
    shape = gradients.shape[1:]
    signal = Bias(reshaped(gradients, -1))
    return (
        signal if len(shape) == 1 else Through(signal, View(signal.deltas.shape[1:]).reshape(shape))
    )
