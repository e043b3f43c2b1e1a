"""An operation in which parameters meet the example: its error, and the signals it makes.

The error goes on to the example's operands by the parameters that carry it. The operation is linear
in dy, whatever it is, so its own derivative with respect to those operands is all that is needed.
"""

import dataclasses
from typing import Any

import jax
from jax.extend import core

from jaxbp.lift.program import formed
from jaxbp.lift.routes import in_dtype
from jaxbp.lift.trace import EXAMPLE, PARAMETER, ForAll, is_float, run, variables
from jaxbp.lift.uses import Recipe, recipe_of

# Their derivatives, and the signals they make, do not depend on the operands of the example.
_NEED_NO_OPERANDS = ("add", "sub", "add_any")
# Linear in each of their operands.
_LINEAR = ("dot_general", "conv_general_dilated", "mul")


@dataclasses.dataclass(eq=False)
class Operation:
    """One equation.

    Attributes:
      equation: the operation.
      kinds: of its operands.
      recipe: how it uses its only parameter, or None: the gradient of each example is formed.
      for_all: what it computes for all examples, of the operands that are variables.
    """

    equation: Any
    kinds: tuple[str, ...]
    recipe: Recipe | None
    for_all: ForAll = dataclasses.field(init=False)

    programs = ()  # that run inside

    def __post_init__(self):
        """Makes the function of all examples."""
        axes = [0 if kind == EXAMPLE else None for kind in self._given(self.kinds)]
        names, outs = variables(self.equation.invars), self.equation.outvars
        self.for_all = ForAll([self.equation], names, outs, axes)

    @property
    def is_formed(self):
        """Whether the gradient of each example is formed."""
        return self.recipe is None

    @classmethod
    def of(cls, equation, kinds, made_by):
        """The operation with its recipe, if it has one."""
        recipe = None
        if kinds.count(PARAMETER) == 1:
            recipe = recipe_of(equation, kinds.index(PARAMETER), made_by)
        return cls(equation, kinds, recipe)

    @property
    def remembers(self):
        """The operands that backward needs, by their numbers."""
        if self.equation.primitive.name in _NEED_NO_OPERANDS:
            return ()
        return range(len(self.kinds))

    def forward(self, operands, examples):
        """The results for all examples, and nothing to keep."""
        return examples.run(self._mapped, *operands), ()

    def backward(self, operands, carriers, cache, errors, live, readers, sweep):
        """The derivative at each operand of the example, and pairs of a value and its signal."""
        del cache, readers
        wanted = [
            i
            for i, kind in enumerate(self.kinds)
            if kind == EXAMPLE and live[i] and is_float(operands[i])
        ]
        outs = [j for j, v in enumerate(self.equation.outvars) if is_float(v.aval)]
        errors = [errors[j] for j in outs]
        dxs = [None] * len(operands)
        derivatives = self._carried(wanted, operands, carriers, errors, outs, sweep.examples)
        for i, dx in zip(wanted, derivatives, strict=True):
            dxs[i] = dx
        if self.recipe is not None:
            v, make = self.recipe
            found = [(v, in_dtype(make(operands, errors[0]), v.aval.dtype))]
        else:
            found = self._formed(operands, errors, outs, sweep.examples)
        return dxs, found

    def _carried(self, wanted, operands, carriers, errors, outs, examples):
        """The derivatives at the wanted operands of the example."""
        name = self.equation.primitive.name
        if name in _NEED_NO_OPERANDS:
            return [-errors[0] if name == "sub" and i == 1 else errors[0] for i in wanted]

        def results(xs, carriers):
            inputs = list(carriers)
            for i, x in zip(wanted, xs, strict=True):
                inputs[i] = x
            results = self._mapped(*inputs)
            return [results[j] for j in outs]

        xs = [operands[i] for i in wanted]
        if name in _LINEAR and len(wanted) == 1:  # a transpose is traced sooner than a derivative

            def transposed(errors, carriers):
                like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs]
                return jax.linear_transpose(lambda xs: results(xs, carriers), like)(errors)[0]

            return examples.run(transposed, errors, carriers)
        if not wanted:
            return []
        _, vjp, _ = examples.vjp(lambda xs, carriers: (results(xs, carriers), ()), xs, carriers)
        return vjp(errors)[0]

    def _mapped(self, *operands):
        """The operation on all examples."""
        return self.for_all(*self._given(operands))

    def _call(self, *operands):
        """The operation on one example."""
        names = variables(self.equation.invars)
        return run([self.equation], names, self.equation.outvars)(*self._given(operands))

    def _given(self, operands):
        """Those of the operands that are variables."""
        pairs = zip(operands, self.equation.invars, strict=True)
        return [x for x, v in pairs if not isinstance(v, core.Literal)]

    def _formed(self, operands, errors, outs, examples):
        """The gradient of each example at every operand that is made of parameters."""
        pairs = zip(self.equation.invars, self.kinds, strict=True)
        # One operand may stand in several places; its gradient is that of all of them.
        first = {}
        for i, (v, kind) in enumerate(pairs):
            if kind == PARAMETER:
                first.setdefault(v, i)

        def gradient(operands, errors):
            def results(values):
                own = dict(zip(first, values, strict=True))
                atoms = zip(self.equation.invars, operands, strict=True)
                results = self._call(
                    *(x if isinstance(v, core.Literal) else own.get(v, x) for v, x in atoms)
                )
                return [results[j] for j in outs]

            _, vjp = jax.vjp(results, [operands[i] for i in first.values()])
            return vjp(errors)[0]

        axes = [0 if kind == EXAMPLE else None for kind in self.kinds]
        gradients = examples.run(
            jax.vmap(gradient, (axes, 0), axis_size=examples.n), list(operands), errors
        )
        return [(v, formed(g)) for v, g in zip(first, gradients, strict=True)]


class AsExample:
    """A parameter that becomes a value of each example, such as an output or a first state."""

    remembers = programs = ()
    is_formed = True

    def __init__(self, operand):
        """Takes the value made of parameters."""
        self.operand = operand

    def forward(self, operands, examples):
        """The same value for all examples."""
        (x,) = operands
        return [examples.repeated(x)], ()

    def backward(self, operands, carriers, cache, errors, live, readers, sweep):
        """The error of each example is its gradient."""
        del operands, carriers, cache, live, readers, sweep
        return [None], [(self.operand, formed(errors[0]))]
