"""Explain: the values, the deltas and the chain rule of a small network, as plain arrays.

A chain with parts f_1 ... f_n computes x_i = f_i(x_(i-1)), and E = loss(x_n, target). The
derivative of E with respect to one weight w of part i is a product of matrices, from the error to
the weight:

    dE/dw = dE/dx_n  dx_n/dx_(n-1)  ...  dx_(i+1)/dx_i  dx_i/dw

The first is a row, with an entry for each output, and the last a column. A matrix product sums over
all paths from the weight to the error. Where there is one path, all factors are single numbers.

A weight that is an entry of a matrix (`Outer`), of a bias or of a gain acts on the network through
one value z = ... + x w of each position, and nothing else. So the last factor is split in two, also
inside a part that is not a chain, such as a lifted function:

    dx_i/dw = dx_i/dz  dz/dw,      dz/dw = x

All of it comes from backward passes: those of the error, and those of one-hot columns through each
part, whose results are the rows of its Jacobian.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxbp.combinators.compose import parts_of
from jaxbp.forward import forward_and_loss
from jaxbp.outputs.regression import squared_error
from jaxbp.outputs.softmax import softmax_cross_entropy
from jaxbp.readings.sums import per_example
from jaxbp.require import require_call
from jaxbp.signals.kinds import Bias, Outer, Scale, keep, map_signals
from jaxbp.signals.stacked import stack_axes
from jaxbp.types import (
    Layer,
    LossFunction,
    Params,
    PyTree,
    Reading,
    exportable,
    show_path,
    show_shape,
)

__all__ = ["ChainRule", "Explanation", "Factor", "explain"]

OUTPUTS = "outputs"  # the place of a network that is not a chain
AXES = {Outer: 2, Bias: 1, Scale: 1}  # of one parameter, without those of a stack


@exportable
class Factor(NamedTuple):
    """One factor of the chain rule: the derivative of some values with respect to others.

    Attributes:
      name: such as `d(2)/d(1)`, with the places of `Explanation.values`.
      matrix: the derivative, [A, B]. Its columns are the rows of the next factor.
      units: which entries of the values the A rows are, as indices of the flat array of one
        example. Entries that the weight does not reach are left out.
    """

    name: str
    matrix: np.ndarray
    units: np.ndarray


@exportable
class ChainRule(NamedTuple):
    """The derivative of one example's loss with respect to one weight, factor by factor.

    Attributes:
      path: the path of the parameter, such as `0.weight`.
      at: the place of the weight in it, such as `(1, 2)`.
      example: n.
      factors: from the error to the weight. Their matrix product is [[dE_n/dw]].
      gradient: that product, dE_n/dw.
    """

    path: str
    at: tuple[int, ...]
    example: int
    factors: tuple[Factor, ...]
    gradient: float


@exportable
class Explanation(NamedTuple):
    """What a forward and a backward pass compute, in numpy arrays.

    Places are `inputs` and the parts of a chain by their paths: `0`, `1`, `2.0` in a chain inside
    the chain. A network that is not a chain has the places `inputs` and `outputs`. Parameters have
    paths such as `0.weight`. In a stack, signals have L as their first axis.

    Attributes:
      losses: E_n, [N].
      layers: the name of the layer at each place but `inputs`.
      values: the values at each place, [N, ...].
      deltas: the derivative of E_n with respect to them, of their shape; None for integers.
      signals: the operands of each parameter's gradient (see `signals`), by its path.
      gradients: dE_n/dw of each parameter, [N, ...], by its path.
      norms: the norm of that gradient, [N], by the path of the parameter.
      example_norms: the norm of each example's whole gradient, [N].
      chain_rule: the chain rule of the chosen weight, or None.
    """

    losses: np.ndarray
    layers: dict[str, str]
    values: dict[str, PyTree]
    deltas: dict[str, PyTree]
    signals: dict[str, Any]
    gradients: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]
    example_norms: np.ndarray
    chain_rule: ChainRule | None


def explain(
    net: Layer,
    params: Params,
    inputs: PyTree,
    targets: PyTree,
    *,
    loss: LossFunction | None = None,
    weight: tuple[str, *tuple[int, ...]] | None = None,
    example: int = 0,
) -> Explanation:
    """What a small network computes on the way to a gradient, and the chain rule of one weight.

        dE/dw = dE/dx_n  dx_n/dx_(n-1)  ...  dx_(i+1)/dx_i  dx_i/dw

    Use it to look at a network, not to train it: it forms the gradient of every example, and for a
    weight the Jacobian of every part after it. It works on any Layer, also on one that `lift` made.
    A chain is shown part by part, also chains inside it. Any other layer is one part.

    Args:
      net: a Layer.
      params: its parameters.
      inputs: arrays [N, ...].
      targets: arrays [N, ...], as the loss takes them.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`. None stands for
        `softmax_cross_entropy` if targets are integers, and for `squared_error` otherwise.
      weight: the path of a parameter and the place in it: `("0.weight", 1, 2)` is the weight from
        input 1 to output 2 of a dense layer.
      example: n, the example whose chain rule is written out.

    Raises:
      TypeError: `net` is not a Layer, or `loss` is not a function.
      ValueError: there is no such weight or example; a part after the weight has integers among its
        inputs or outputs; or as for `value_and_grad`.

    References:
      "Learning representations by back-propagating errors", Rumelhart, Hinton, Williams, 1986.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, jaxbp as bp
      >>> net = bp.chain(bp.dense(1), bp.tanh(), bp.dense(1))
      >>> params, _ = net.init(jax.random.key(0), (2,))
      >>> x, y = jnp.array([[1.0, 2.0]]), jnp.array([[0.5]])
      >>> shown = bp.explain(net, params, x, y, weight=("0.weight", 1, 0))
      >>> list(shown.values), shown.deltas["1"].shape, sorted(shown.norms)
      (['inputs', '0', '1', '2'], (1, 1), ['0.bias', '0.weight', '2.bias', '2.weight'])
      >>> [factor.name for factor in shown.chain_rule.factors]
      ['dE/d(2)', 'd(2)/d(1)', 'd(1)/d(0)', 'd(0)/dw']
      >>> product = np.prod([factor.matrix.item() for factor in shown.chain_rule.factors])
      >>> bool(np.isclose(product, shown.gradients["0.weight"][0, 1, 0]))
      True
    """
    loss = usual_loss(targets) if loss is None else loss
    require_call("explain", net, loss)
    # This checks what goes in and comes out. The walk below repeats it, part by part.
    _, _, losses, delta = forward_and_loss("explain", net, loss, params, inputs, targets)

    steps, x = [], inputs
    for place, layer, own in _parts(net, params):
        y, cache = layer.forward(own, x)
        steps.append(_Step(place, layer, own, cache, x, y))
        x = y
    values = {"inputs": inputs, **{step.place: step.y for step in steps}}

    deltas, signals, dx = {}, {}, delta
    for step in reversed(steps):
        deltas[step.place] = dx
        dx, own = step.layer.backward(step.params, step.cache, dx, read=keep)
        signals[step.place] = own
    deltas["inputs"] = dx

    operands, gradients = {}, {}
    for step in steps:
        own = signals[step.place]
        operands |= _by_path(step, own)
        formed = _by_path(step, map_signals(per_example, own))
        axes = _by_path(step, stack_axes(step.params))  # of stacked layers, which stand before N
        gradients |= {path: np.moveaxis(np.asarray(g), axes[path], 0) for path, g in formed.items()}
    squares = {path: _sums(np.square(g)) for path, g in gradients.items()}
    return Explanation(
        np.asarray(losses),
        {step.place: step.layer.name for step in steps},
        {place: jax.tree.map(np.asarray, value) for place, value in values.items()},
        {place: jax.tree.map(np.asarray, deltas[place]) for place in values},
        {path: jax.tree.map(np.asarray, own) for path, own in operands.items()},
        gradients,
        {path: np.sqrt(square) for path, square in squares.items()},
        np.sqrt(sum(squares.values(), np.zeros(losses.shape))),
        None if weight is None else _chain_rule(steps, delta, gradients, weight, example),
    )


def usual_loss(targets: PyTree) -> LossFunction:
    """The loss for targets of which nothing else is known: cross-entropy for integers."""
    integers = all(
        jnp.issubdtype(jnp.result_type(t), jnp.integer) for t in jax.tree.leaves(targets)
    )
    return softmax_cross_entropy if integers else squared_error


class _Step(NamedTuple):
    """One part of the network, with what it got and returned in the forward pass."""

    place: str
    layer: Layer
    params: Params
    cache: PyTree
    x: PyTree
    y: PyTree


def _parts(net: Layer, params: Params, place: str = "") -> Iterator[tuple[str, Layer, Params]]:
    """The place, layer and parameters of each part of a chain, and of the chains inside it."""
    parts = parts_of(net)
    if parts is None:
        yield place or OUTPUTS, net, params
        return
    for i, (layer, own) in enumerate(zip(parts, params, strict=True)):
        yield from _parts(layer, own, f"{place}.{i}" if place else f"{i}")


def _by_path(step: _Step, tree: PyTree) -> dict[str, Any]:
    """The nodes of a tree like the parameters of a part, by the paths of the parameters."""
    leaves, structure = jax.tree.flatten_with_path(step.params)
    prefix = "" if step.place == OUTPUTS else step.place
    paths = [".".join(filter(None, (prefix, show_path(path)))) for path, _ in leaves]
    return dict(zip(paths, structure.flatten_up_to(tree), strict=True))


def _sums(array: np.ndarray) -> np.ndarray:
    """Sums over all axes but N."""
    return array.reshape(len(array), -1).sum(axis=1)


def _chain_rule(
    steps: Sequence[_Step],
    delta: PyTree,
    gradients: Mapping[str, np.ndarray],
    weight: tuple[str, *tuple[int, ...]],
    example: int,
) -> ChainRule:
    """Collects the factors of dE_n/dw on the way from the weight to the error."""
    path, *index = weight
    _require_weight(path, index, gradients)
    if not 0 <= example < len(gradients[path]):
        raise ValueError(
            f"explain: example is {example}; there are {len(gradients[path])}, from 0."
        )
    first = next(i for i, step in enumerate(steps) if path in _by_path(step, step.params))
    holder, *after = [_of_example(step, example) for step in steps[first:]]

    factors, place = _at_weight(holder, path, tuple(index)), holder.place
    for step in after:
        _require_floats(step.place, step.x)
        dx, _ = _jacobians(step, lambda signal: ())
        name = f"d({step.place})/d({place})"
        factors.append(_reached(name, _as_matrix(dx), factors[-1].units))
        place = step.place
    error = _as_matrix(jax.tree.map(lambda d: d[None, example], delta))
    factors.append(Factor(f"dE/d({place})", error[:, factors[-1].units], np.arange(1)))

    factors = tuple(reversed(factors))
    product = functools.reduce(np.matmul, [factor.matrix for factor in factors])
    return ChainRule(path, tuple(index), example, factors, product.item())


def _of_example(step: _Step, example: int) -> _Step:
    """The step for one example, as a batch of one."""
    x = jax.tree.map(lambda array: array[example : example + 1], step.x)
    y, cache = step.layer.forward(step.params, x)
    return step._replace(x=x, y=y, cache=cache)


def _jacobians(step: _Step, read: Reading) -> tuple[PyTree, PyTree]:
    """The derivatives of each output of a part, by one backward pass for each: [outputs, ...]."""
    _require_floats(step.place, step.y)
    flat, unravel = ravel_pytree(step.y)

    def derivatives(one_hot):
        return step.layer.backward(step.params, step.cache, unravel(one_hot), read=read)

    return jax.vmap(derivatives)(jnp.eye(flat.size, dtype=flat.dtype))


def _at_weight(step: _Step, path: str, index: tuple[int, ...]) -> list[Factor]:
    """The factors inside the part that holds the weight, from the weight up."""
    _, answers = _jacobians(step, lambda signal: (signal, per_example(signal)))
    signal, formed = _by_path(step, answers)[path]
    shape = jnp.shape(_by_path(step, step.params)[path])
    name = f"d({step.place})/dw"
    if len(shape) != AXES.get(type(signal)):
        column = np.asarray(formed).reshape(-1, *shape)[(slice(None), *index)]
        return [_reached(name, column[:, None], np.arange(1))]

    through_z = np.asarray(signal.deltas[..., index[-1]]).reshape(len(formed), -1)
    if isinstance(signal, Bias):
        x = np.ones_like(through_z[0])
    else:
        x = np.asarray(signal.inputs[0, ..., index[0]]).ravel()  # the same for every output
    from_z = _reached(f"d({step.place})/dz", through_z, np.arange(len(x)))
    if np.array_equal(from_z.matrix, np.eye(len(x))):
        return [Factor(name, x[:, None], from_z.units)]  # z are themselves outputs of the part
    return [Factor("dz/dw", x[:, None], np.arange(len(x))), from_z]


def _as_matrix(rows: PyTree) -> np.ndarray:
    """The arrays [A, ...] of a tree side by side, each row as a vector: [A, B]."""
    return np.asarray(jax.vmap(lambda tree: ravel_pytree(tree)[0])(rows))


def _reached(name: str, matrix: np.ndarray, units: np.ndarray) -> Factor:
    """The columns of a derivative [A, B] that a weight reaches, without the rows that are zero.

    Of an elementwise part the same units are kept, so that a derivative of zero is shown.
    """
    if matrix.shape[0] == matrix.shape[1] and not (matrix - np.diag(np.diag(matrix))).any():
        rows = units
    else:
        rows = np.flatnonzero(matrix[:, units].any(axis=1))
        rows = rows if rows.size else np.arange(len(matrix))
    return Factor(name, matrix[np.ix_(rows, units)], rows)


def _require_weight(path: Any, index: Sequence[Any], gradients: Mapping[str, np.ndarray]) -> None:
    if path not in gradients:
        there = ", ".join(gradients) or "none"
        raise ValueError(f"explain: there is no parameter {path!r}; the network has {there}.")
    shape = gradients[path].shape[1:]
    fits = len(index) == len(shape) and all(
        isinstance(i, int | np.integer) and 0 <= i < size
        for i, size in zip(index, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"explain: weight is at {show_shape(index)} in {path} of shape {show_shape(shape)}; it "
            "takes an integer for each axis, from 0 and below its size."
        )


def _require_floats(place: str, tree: PyTree) -> None:
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        raise ValueError(
            f"explain: {place} has values of dtypes {', '.join(sorted(dtypes))}, on the way from "
            "the weight to the error; the chain rule takes floating-point values there."
        )
