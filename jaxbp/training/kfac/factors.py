"""The factors of a batch: what is read of each parameter, and which bias is that of a weight."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax

from jaxbp.outputs.errors import sampled
from jaxbp.readings.moments import diagonal, kronecker
from jaxbp.require import is_count, require_call, require_function
from jaxbp.signals.kinds import Bias, Conv, Outer, Signal, Through
from jaxbp.signals.operands import count_examples
from jaxbp.signals.stacked import is_stacked, one_layer
from jaxbp.signals.views import View
from jaxbp.sweeps.gradients import backprop
from jaxbp.training.kfac.layers import bare, extent, inside, is_factors, is_stack, parts_of
from jaxbp.types import Layer, Loss, Params, PyTree

__all__ = ["kfac_factors"]

# Folded into the key of the forward pass. A small number would not do: layers split that key, and
# one of them gets the key that fold_in(key, 1) gives.
ERROR_STREAM = 2**31


class FactorsOfBatch(Protocol):
    """What `kfac_factors` returns: the factors of a network's parameters on a batch."""

    def __call__(
        self, params: Params, inputs: PyTree, targets: PyTree, *, key: jax.Array
    ) -> PyTree:
        """Returns the factors; `key` is for layers that draw and for the sampled targets."""
        ...


def kfac_factors(
    net: Layer,
    loss: Loss,
    *,
    error: Callable[..., jax.Array] = sampled,
    shared: Literal["expand", "reduce"] = "expand",
    rest: Literal["diagonal", "identity"] = "diagonal",
    largest: int | None = None,
) -> FactorsOfBatch:
    """The Kronecker factors of a network's parameters on a batch, for `scale_by_kfac`.

    They are computed by exact backpropagation, whatever rule computes the gradient. What a
    parameter gets depends on how the network uses it, not on its name:

        parameter                            there is
        weight or kernel [I, O]              Kronecker(A [I + 1, I + 1], G [O, O])
        the same in another layout           Through(Kronecker(A, G), view)
        bias of such a weight                (): it is the last row of the weight
        another vector that is added, [O]    Kronecker([[1]], G [O, O])
        anything else, rest="diagonal"       its squared gradient, in the parameter's shape
        anything else, rest="identity"       None: its gradient stays as it is

    A vector that is added is the bias of a weight if the two are the only parameters in their dict,
    list or tuple, and it has an entry for each output of the weight. It may have several axes, if
    they are the last axes of the weight. A kernel with groups has a pair of factors for each group.
    Anything else means gains, tables, parameters that are used in several ways, parameters behind a
    norm or another function, and arrays of which only a part is used.

    The diagonal of a parameter that is used in several ways or behind a function needs the gradient
    of each example, [N, ...]. Use `identity` where there is no memory for this.

    Args:
      net: a Layer.
      loss: a Loss.
      error: the error whose second moment is the curvature: `sampled` for KFAC, `ggn_columns` for
        its exact form, KFLR.
      shared: how positions are treated, `expand` or `reduce` (see `kronecker`).
      rest: what parameters without factors get, `diagonal` or `identity`.
      largest: the largest number of inputs or outputs of a matrix that gets factors. A larger one
        counts as anything else, such as the weight that maps to the logits of a large vocabulary.
        None stands for no limit.

    Returns:
      `function(params, inputs, targets, *, key) -> factors`, a tree like params.

    Raises:
      ValueError: `rest` is not one of its two values, or `largest` is not a positive integer.
      TypeError: `net` is not a Layer, or `error` is not a function; or, when called, `loss` is a
        plain function, and `error` takes a Loss.

    References:
      "Practical Gauss-Newton Optimisation for Deep Learning", Botev, Ritter, Barber, 2017: KFLR.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.dense(2), bp.layer_norm())
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> factors_of = bp.kfac_factors(net, bp.squared_error)
      >>> batch = jnp.ones((5, 3)), jnp.zeros((5, 2))
      >>> dense, norm = factors_of(params, *batch, key=jax.random.key(1))
      >>> dense["weight"].inputs.shape, dense["weight"].deltas.shape, dense["bias"]
      ((4, 4), (2, 2), ())
      >>> norm["gain"].shape, norm["bias"].deltas.shape
      ((2,), (2, 2))
    """
    wrong = []
    if rest not in ("diagonal", "identity"):
        wrong.append(f"rest is {rest!r}; it takes 'diagonal' or 'identity'")
    if largest is not None and not is_count(largest):
        wrong.append(f"largest is {largest!r}, expected a positive integer or None")
    if wrong:
        raise ValueError(f"kfac_factors: {'; '.join(wrong)}.")
    require_call("kfac_factors", net, loss)
    require_function("kfac_factors", "error", error)

    def read(signal, *, columns=None):
        def of_rest():
            if rest == "identity":
                return None
            return diagonal(signal, columns=columns) / count_examples(signal)

        inner, view = _layout(signal)
        if view is None:
            return of_rest()
        fits = largest is None or max(_sides(inner), default=0) <= largest
        if isinstance(inner, Outer | Conv) and fits and _covers(view):
            return kronecker(signal, shared=shared, columns=columns)
        if isinstance(inner, Bias) and _keeps_order(view):
            if not fits or len(view.out_shape) > 1:
                return _Added(of_rest())
            return _Added(kronecker(inner, bias="apart", shared=shared, columns=columns))
        return of_rest()

    sweep = backprop(net, loss, read=read, error=error)

    def function(params, inputs, targets, *, key):
        error_key = jax.random.fold_in(key, ERROR_STREAM)
        return _folded(sweep(params, inputs, targets, key=key, error_key=error_key)[1], params)

    return function


class _Added(NamedTuple):
    """What is read of a parameter that is added, before it is known whether it is a layer's bias.

    Attributes:
      alone: what it gets if it is not.
    """

    alone: Any


def _layout(signal: Signal) -> tuple[Any, View | None]:
    """The signal of what a parameter is used as, and the view between; None if it is no view."""
    if isinstance(signal, Through):
        return signal.signal, signal.back if isinstance(signal.back, View) else None
    return signal, View(signal.deltas.shape[-1:] if isinstance(signal, Bias) else ())


def _sides(signal: Any) -> tuple[int, ...]:
    """The sizes of the factors of a signal, without the row for a bias."""
    if isinstance(signal, Outer):
        return signal.inputs.shape[-1], signal.deltas.shape[-1]
    if isinstance(signal, Conv):
        groups, places = signal.geometry.groups, math.prod(signal.geometry.kernel)
        return places * signal.inputs.shape[-1] // groups, signal.deltas.shape[-1] // groups
    return signal.deltas.shape[-1:] if isinstance(signal, Bias) else ()


def _covers(view: View) -> bool:
    """Whether a view fills the whole parameter."""
    return math.prod(view.shape) == math.prod(view.out_shape)


def _keeps_order(view: View) -> bool:
    """Whether a view only gives the entries another shape."""
    return all(move.name == "reshape" for move in view.moves)


def _folded(found: PyTree, params: Params) -> PyTree:
    """The factors, from what was read: nothing at the biases of layers."""

    def visit(node, factors, shapes):
        folds = _is_pair(node) and _is_bias_of_weight(factors, shapes)
        return jax.tree.map(
            lambda n: (() if folds else n.alone) if isinstance(n, _Added) else n,
            node,
            is_leaf=lambda n: isinstance(n, _Added),
        )

    def is_leaf(node):
        return _is_pair(node) or is_factors(node) or isinstance(node, _Added) or node is None

    return jax.tree.map(visit, found, one_layer(found), one_layer(params), is_leaf=is_leaf)


def _is_pair(node):
    """Whether a collection holds a weight and one more parameter, which is added."""
    if is_stacked(node):
        return False
    if is_stack(node):
        return _is_pair(inside(node))
    parts = parts_of(node)
    one_added = sum(isinstance(part, _Added) for part in parts) == 1
    return len(parts) == 2 and one_added and any(map(is_factors, parts))


def _is_bias_of_weight(factors, shapes):
    """Whether the second parameter of a pair has an entry for each output, in the same order."""
    found, shapes = map(bare, parts_of(factors)), map(bare, parts_of(shapes))
    pairs = sorted(zip(found, shapes, strict=True), key=lambda pair: isinstance(pair[0], _Added))
    (factors, weight), (_, bias) = pairs
    outputs = math.prod(factors.deltas.shape[:-1])  # [O, O], or [G, O / G, O / G]
    same_order = bias.ndim == 1 or weight.shape[-bias.ndim :] == bias.shape
    return bias.size == outputs and same_order and extent(weight) > extent(bias)
