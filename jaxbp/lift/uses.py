"""Uses: in which way an operation uses a parameter, and the signal that this makes.

    operation                          signal                        layout of the parameter
    dot_general                        Outer                         any order of its axes
    dot_general with batch axes        Conv of one place, in groups  any order
    conv_general_dilated               Conv                          any, in groups, transposed
    gather, dynamic_slice of rows      Lookup                        [V, ...]
    add, sub                           Bias                          any axes of the sum
    mul                                Scale                         any axes of the product

Everything else has no recipe here, and the gradient of each example is formed (`operation`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxbp.sharding import reshaped
from jaxbp.signals.conv_windows import Geometry
from jaxbp.signals.kinds import Bias, Conv, Lookup, Outer, Scale, Signal, Through
from jaxbp.signals.views import View


class Recipe(NamedTuple):
    """How an operation uses a parameter.

    Attributes:
      operand: the value whose signal is made: the operand itself, or what was broadcast to it.
      make: `make(operands, dy) -> signal`, with the example's operands and dy [N, ...].
    """

    operand: Any
    make: Callable[[list[jax.Array], jax.Array], Signal]


def recipe_of(equation: Any, i: int, made_by: dict[Any, Any]) -> Recipe | None:
    """The recipe for operand i of an operation, the only one that is made of parameters."""
    find = _RECIPES.get(equation.primitive.name)
    return find(equation, i, made_by) if find else None


def _viewed(signal: Signal, view: View) -> Signal:
    return Through(signal, view) if view.moves else signal


def _dot(equation, i, made_by):
    del made_by
    contracted, batched = equation.params["dimension_numbers"]
    x_shape, w_shape = equation.invars[1 - i].aval.shape, equation.invars[i].aval.shape
    of_x, of_w = (contracted[1 - i], batched[1 - i]), (contracted[i], batched[i])
    free_x = [a for a in range(len(x_shape)) if a not in (*of_x[0], *of_x[1])]
    free_w = [a for a in range(len(w_shape)) if a not in (*of_w[0], *of_w[1])]
    # The axes of the result: batched ones, then the free ones of the first and the second operand.
    rank, n_first = len(of_x[1]), len(free_x if i == 1 else free_w)
    first = range(rank, rank + n_first)
    second = range(rank + n_first, rank + len(free_x) + len(free_w))
    y_of_x, y_of_w = (first, second) if i == 1 else (second, first)
    places = [x_shape[a] for a in free_x]
    sizes = [[w_shape[a] for a in axes] for axes in (of_w[1], of_w[0], free_w)]
    groups, inputs, outputs = map(math.prod, sizes)
    w_sizes = tuple(n for part in sizes for n in part)
    order = (*of_w[1], *of_w[0], *free_w)
    inverse = tuple(order.index(a) for a in range(len(order)))

    def arranged(array, *axes):
        """[N, positions, the rest as one]."""
        array = array.transpose(0, *(1 + a for part in axes for a in part))
        return reshaped(array, *places, -1)

    if groups == 1:
        view = View((inputs, outputs)).reshape(w_sizes).transpose(*inverse)
    else:
        # A matrix for each entry of the batch: a convolution of one place, in groups.
        view = View((1, inputs, groups * outputs)).reshape((inputs, groups, outputs))
        view = view.transpose(1, 0, 2).reshape(w_sizes).transpose(*inverse)

    def make(operands, dy):
        x = arranged(operands[1 - i], free_x, of_x[1], of_x[0])
        deltas = arranged(dy, y_of_x, range(rank), y_of_w)
        if groups == 1:
            return _viewed(Outer(x, deltas), view)
        x, deltas = (reshaped(a, -1, a.shape[-1]) for a in (x, deltas))
        geometry = Geometry((1,), (1,), ((0, 0),), (1,), groups)
        return _viewed(Conv(x, deltas, geometry), view)

    return Recipe(equation.invars[i], make)


def _conv(equation, i, made_by):
    del made_by
    p, (x, w), y = equation.params, equation.invars, equation.outvars[0]
    lhs, rhs, out = p["dimension_numbers"]
    rank = len(lhs) - 2
    geometry = _geometry(p, x.aval.shape, w.aval.shape, y.aval.shape) if i == 1 else None
    if geometry is None or not 1 <= rank <= 3 or p["batch_group_count"] != 1:
        return None
    order = (*rhs[2:], rhs[1], rhs[0])
    view = View(tuple(w.aval.shape[a] for a in order))
    if geometry.transposed:
        view = view.flip(*range(rank))
    view = view.transpose(*(order.index(a) for a in range(rank + 2)))

    def channels_last(array, spec):
        return array.transpose(0, 1 + spec[0], *(1 + s for s in spec[2:]), 1 + spec[1])

    def make(operands, dy):
        return _viewed(
            Conv(channels_last(operands[0], lhs), channels_last(dy, out), geometry), view
        )

    return Recipe(w, make)


def _geometry(p, x_shape, w_shape, y_shape):
    """Where the windows of a convolution lie; None if it is of a kind that has no signal."""
    lhs, rhs, out = p["dimension_numbers"]
    kernel = tuple(w_shape[a] for a in rhs[2:])
    strides, dilation = tuple(p["window_strides"]), tuple(p["rhs_dilation"])
    padding, spread = tuple(map(tuple, p["padding"])), tuple(p["lhs_dilation"])
    groups = p["feature_group_count"]
    if all(s == 1 for s in spread):
        usable = all(pad >= 0 for pair in padding for pad in pair)
        return Geometry(kernel, strides, padding, dilation, groups) if usable else None
    if any(s != 1 for s in strides):
        return None
    # The transpose of a convolution: its windows lie on the outputs, and its kernel is flipped.
    spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    before = [span - pair[0] for span, pair in zip(spans, padding, strict=True)]
    counts, sizes = [x_shape[a] for a in lhs[2:]], [y_shape[a] for a in out[2:]]
    covered = [s * (n - 1) + 1 + span for s, n, span in zip(spread, counts, spans, strict=True)]
    after = [c - b - size for c, b, size in zip(covered, before, sizes, strict=True)]
    if min(*before, *after) < 0:
        return None
    pairs = tuple(zip(before, after, strict=True))
    return Geometry(kernel, spread, pairs, dilation, groups, transposed=True)


def _rows(equation, i, made_by):
    """Whole rows of a table, by integers of the example."""
    del made_by
    table = equation.invars[0].aval.shape
    if i != 0 or equation.params["slice_sizes"] != (1, *table[1:]):
        return None
    if equation.primitive.name == "dynamic_slice":
        index, *rest = equation.invars[1:]
        if isinstance(index, core.Literal) or not all(isinstance(v, core.Literal) for v in rest):
            return None
        offsets, in_row = range(1, 1 + len(table)), False
    else:
        numbers = equation.params["dimension_numbers"]
        if numbers.start_index_map != (0,) or numbers.operand_batching_dims:
            return None
        if numbers.collapsed_slice_dims not in ((), (0,)):
            return None
        offsets, in_row = [1 + a for a in numbers.offset_dims], True
    fills = "FILL" in str(equation.params.get("mode", "CLIP"))
    view = View((table[0], math.prod(table[1:]))).reshape(table)

    def make(operands, dy):
        rows = jnp.asarray(operands[1])
        rows = rows[..., 0] if in_row else rows
        deltas = dy.transpose([a for a in range(dy.ndim) if a not in offsets] + [*offsets])
        deltas = reshaped(deltas, *rows.shape[1:], -1)
        if fills:  # what lies outside the table is filled in, and no row has an error from there
            deltas = jnp.where(((rows >= 0) & (rows < table[0]))[..., None], deltas, 0)
        rows = jnp.clip(rows, 0, table[0] - 1)
        return _viewed(Lookup(rows, deltas, jnp.zeros((table[0], 0), dy.dtype)), view)

    return Recipe(equation.invars[0], make)


def _elementwise(equation, i, made_by):
    """A parameter that is broadcast and then added, subtracted or multiplied."""
    v, shape = equation.invars[i], equation.outvars[0].aval.shape
    before = made_by.get(v)
    if before is not None and before.primitive.name == "broadcast_in_dim":
        v, axes = before.invars[0], before.params["broadcast_dimensions"]
    else:
        axes = range(len(shape) - len(v.aval.shape), len(shape))
    if isinstance(v, core.Literal):
        return None
    varying = [a for a, n in zip(axes, v.aval.shape, strict=True) if n > 1]
    shared = [a for a in range(len(shape)) if a not in varying]
    view = View((math.prod(v.aval.shape),)).reshape(v.aval.shape)
    name = equation.primitive.name

    def arranged(array):
        """[N, positions, O]."""
        array = jnp.broadcast_to(array, (array.shape[0], *shape))
        array = array.transpose(0, *(1 + a for a in (*shared, *varying)))
        places = array.shape[1 : 1 + len(shared)]
        return reshaped(array, *(n for n in places if n > 1), view.shape[0])

    def make(operands, dy):
        deltas = arranged(dy)
        if name == "mul":
            x = operands[1 - i]
            x = reshaped(x, *[1] * (len(shape) + 1 - x.ndim), *x.shape[1:])
            return _viewed(Scale(arranged(x), deltas), view)
        return _viewed(Bias(-deltas if name == "sub" and i == 1 else deltas), view)

    return Recipe(v, make)


_RECIPES = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _rows,
    "dynamic_slice": _rows,
    "add": _elementwise,
    "add_any": _elementwise,
    "sub": _elementwise,
    "mul": _elementwise,
}
