"""Routes: from the value at a cut back to the parameters that it is made of.

Models seldom use a parameter as it stands. They reshape it, cast it to 16 bits, take a row of a
stack, put several matrices side by side, normalise it. A route is the list of equations in between.
A signal goes back along it, equation by equation:

    moves       reshape, transpose, slice, ...        the signal in a `View`
    cast                                              the same signal, in the parameter's dtype
    sums        add, sub, neg                         the same signal for every term
    products    with a number; with a matrix          other operands, the same kind of signal
    parts       concatenate                           a part of the operands for each term
    rows        gather of rows at constants           a Lookup, if the rows are only added

For anything else, such as a norm or a softmax, the whole rest of the route is pulled back by
`jax.vjp` (`Pullback`). The sum over examples then costs what it costs in `jax.grad`; readings of
single examples have to form their gradients.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxbp.lift.examples import carried_back, shared_vjp
from jaxbp.lift.trace import PARAMETER, run
from jaxbp.lift.uses import recipe_of
from jaxbp.readings.sums import per_example
from jaxbp.sharding import repeated
from jaxbp.signals.kinds import Bias, Outer, Scale, Through
from jaxbp.signals.views import View


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pullback:
    """The linear map from gradients at the end of a route to gradients of one of its parameters.

    Attributes:
      vjp: of the route, `vjp(gradient) -> a gradient for each parameter`.
      index: which parameter.
      dtype: of the value at the end of the route.
      moves: false: norms are not kept.
      guarded: whether zero goes back to zero even where the derivative is infinite. It is in a
        branch, which other examples may not have taken.
    """

    vjp: Any
    index: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    moves: bool = dataclasses.field(default=False, metadata={"static": True})
    guarded: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(self, gradient):
        """The gradient of the parameter."""
        out = carried_back(self.vjp, gradient.astype(self.dtype))[self.index]
        out = out.astype(gradient.dtype)
        return jnp.where(jnp.any(gradient != 0), out, 0) if self.guarded else out


def pull(program: Any, v: Any, signal: Any, fixed: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Pairs of a parameter and its signal, from the signal of a value made of parameters."""
    equation = program.made_by.get(v)
    if equation is None:
        yield v, signal
        return
    rule = _RULES.get(equation.primitive.name)
    terms = rule(program, equation, v, signal, fixed) if rule else None
    if terms is None:
        yield from _by_vjp(program, v, signal, fixed)
        return
    for u, own in terms:
        if program.kind_of(u) == PARAMETER:
            yield from pull(program, u, own, fixed)


def _by_vjp(program, v, signal, fixed):
    """Pairs of a parameter and its signal through the whole route."""
    leaves, equations = program.leaves_of(v), program.route_to(v)
    made = {u for equation in equations for u in equation.outvars}
    needed = dict.fromkeys(
        u
        for equation in equations
        for u in equation.invars
        if not isinstance(u, core.Literal) and u not in made and u not in leaves
    )
    constants = list(needed)
    route = run(equations, [*leaves, *constants], [v])

    def value(leaves, constants):
        return route(*leaves, *constants)[0]

    vjp = shared_vjp(value, [fixed[leaf] for leaf in leaves], [fixed[u] for u in constants])
    for i, leaf in enumerate(leaves):
        # In the parameter's dtype, as what is read has to be.
        yield leaf, Through(in_dtype(signal, leaf.aval.dtype), Pullback(vjp, i, v.aval.dtype))


def _moved(signal, shape, move):
    """The signal in a view with one more move, `move(view) -> view`; `shape` is its gradient's."""
    if not isinstance(signal, Through):
        return Through(signal, move(View(shape)))
    if isinstance(signal.back, View):
        view = move(signal.back)
        return Through(signal.signal, view) if view.moves else signal.signal
    return None


def _move(build):
    """The rule of an equation with one operand that only moves entries."""

    def rule(program, equation, v, signal, fixed):
        del program, fixed
        u = equation.invars[0]
        moved = _moved(signal, v.aval.shape, lambda view: build(view, equation, u.aval.shape))
        return None if moved is None else [(u, moved)]

    return rule


def _transposed_back(view, equation, shape):
    del shape
    order = equation.params["permutation"]
    return view.transpose(*sorted(range(len(order)), key=order.__getitem__))


def _unsliced(view, equation, shape):
    p = equation.params
    return view.embed(p["start_indices"], shape, p["strides"])


def _narrowed(program, equation, v, signal, fixed):
    """A broadcast that only adds axes of size 1; any other is a sum."""
    del program, fixed
    u = equation.invars[0]
    if isinstance(u, core.Literal) or math.prod(u.aval.shape) != math.prod(v.aval.shape):
        return None
    moved = _moved(signal, v.aval.shape, lambda view: view.reshape(u.aval.shape))
    return None if moved is None else [(u, moved)]


def _unsliced_dynamically(program, equation, v, signal, fixed):
    """A slice from indices that are numbers in the program, as from `W[0]`."""
    del program, fixed
    u, *start = equation.invars
    if not all(isinstance(index, core.Literal) for index in start):
        return None
    sizes = zip(start, u.aval.shape, v.aval.shape, strict=True)
    start = tuple(min(max(int(i.val), 0), n - size) for i, n, size in sizes)
    moved = _moved(signal, v.aval.shape, lambda view: view.embed(start, u.aval.shape))
    return None if moved is None else [(u, moved)]


def _cast(program, equation, v, signal, fixed):
    """Operands in the parameter's dtype, so that sums are accumulated in it."""
    del program, v, fixed
    u = equation.invars[0]
    return [(u, in_dtype(signal, u.aval.dtype))]


def in_dtype(signal: Any, dtype: Any) -> Any:
    """A signal with its floating-point operands in another dtype."""
    if isinstance(signal, Through):
        return signal._replace(signal=in_dtype(signal.signal, dtype))
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, signal
    )


def _times(signal, number):
    """The signal whose gradients are multiplied by a number."""
    if isinstance(signal, Through):
        return signal._replace(signal=_times(signal.signal, number))
    deltas = signal.deltas * jnp.asarray(number, signal.deltas.dtype)
    return signal._replace(deltas=deltas)


def _rows(program, equation, v, signal, fixed):
    """Rows of a table at constants, such as positions, if their gradient is formed anyway."""
    del v
    table, *index = equation.invars
    recipe = recipe_of(equation, 0, {})
    base = signal.signal if isinstance(signal, Through) else signal
    if recipe is None or not isinstance(base, Bias):
        return None
    gradients = per_example(signal)
    rows = jnp.asarray(_value(index[0], fixed))
    rows = repeated(rows, gradients)
    # The recipe does not look at the first operand, the table itself.
    return [(table, recipe.make([gradients, rows], gradients))]


def _terms(program, equation, v, signal, fixed):
    del program, fixed
    if any(u.aval.shape != v.aval.shape for u in equation.invars):
        return None
    first, *second = equation.invars
    sign = -1 if equation.primitive.name == "sub" else 1
    return [(first, signal), *((u, _times(signal, sign) if sign < 0 else signal) for u in second)]


def _negated(program, equation, v, signal, fixed):
    del program, v, fixed
    return [(equation.invars[0], _times(signal, -1))]


def _by_number(program, equation, v, signal, fixed):
    """A parameter times a number that is no parameter."""
    kinds = [program.kind_of(u) for u in equation.invars]
    if kinds.count(PARAMETER) != 1:
        return None
    i = kinds.index(PARAMETER)
    number, u = equation.invars[1 - i], equation.invars[i]
    if number.aval.shape or u.aval.shape != v.aval.shape:
        return None
    value = number.val if isinstance(number, core.Literal) else fixed[number]
    return [(u, _times(signal, value))]


def _by_matrix(program, equation, v, signal, fixed):
    """A product of two matrices, V = A B: of A it is Outer(x, d B^T), of B Outer(x A, d)."""
    if equation.params["dimension_numbers"] != (((1,), (0,)), ((), ())):
        return None
    if not isinstance(signal, Outer) or any(len(u.aval.shape) != 2 for u in equation.invars):
        return None
    a, b = equation.invars
    x, d = signal.inputs, signal.deltas
    return [(a, Outer(x, d @ _value(b, fixed).T)), (b, Outer(x @ _value(a, fixed), d))]


def _value(atom, fixed):
    return atom.val if isinstance(atom, core.Literal) else fixed[atom]


def _parts(program, equation, v, signal, fixed):
    """Arrays side by side: each has its part of the operands."""
    del program, fixed
    axis = equation.params["dimension"]
    if isinstance(signal, Bias | Scale):
        names = signal._fields
    elif isinstance(signal, Outer):
        names = (signal._fields[axis],)
    else:
        return None
    terms, at = [], 0
    for u in equation.invars:
        size = u.aval.shape[axis]
        own = {name: getattr(signal, name)[..., at : at + size] for name in names}
        terms.append((u, signal._replace(**own)))
        at += size
    return terms


_reshaped = _move(lambda view, equation, shape: view.reshape(shape))
_same = _move(lambda view, equation, shape: view)

_RULES = {
    "reshape": _reshaped,
    "squeeze": _reshaped,
    "expand_dims": _reshaped,
    "broadcast_in_dim": _narrowed,
    "transpose": _move(_transposed_back),
    "rev": _move(lambda view, equation, shape: view.flip(*equation.params["dimensions"])),
    "slice": _move(_unsliced),
    "dynamic_slice": _unsliced_dynamically,
    "gather": _rows,
    "copy": _same,
    "copy_p": _same,
    "convert_element_type": _cast,
    "add": _terms,
    "add_any": _terms,
    "sub": _terms,
    "neg": _negated,
    "mul": _by_number,
    "dot_general": _by_matrix,
    "concatenate": _parts,
}
