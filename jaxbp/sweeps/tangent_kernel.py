"""The empirical neural tangent kernel: how a step on one example changes the outputs of another.

    K[n, c, m, d] = (dy_nc / dp) . (dy'_md / dp), summed over all parameters p

It is the inner product of Jacobians, which are too large to form. Instead, one backward pass per
output, with a one-hot error, gives the operands. From them, a weight matrix contributes
(x_n . x'_m) (d_nc . d'_md).

Source:
  "Neural Tangent Kernel: Convergence and Generalization in Neural Networks", Jacot, Gabriel,
  Hongler, 2018.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax

from jaxbp.outputs.errors import jacobian_rows
from jaxbp.readings.inner_products import gram
from jaxbp.require import require_examples, require_layer
from jaxbp.signals.columns import every_column
from jaxbp.signals.kinds import KINDS, Sum, Through, is_signal
from jaxbp.signals.stacked import stack_axes
from jaxbp.sweeps.gradients import sweep_columns
from jaxbp.types import Layer, Params, PyTree

__all__ = ["neural_tangent_kernel", "neural_tangent_kernel_per_class"]


class KernelFunction(Protocol):
    """What this module's calls return: the kernel between two batches of inputs."""

    def __call__(self, params: Params, inputs: PyTree, other: PyTree | None = None) -> jax.Array:
        """Returns the kernel between `inputs` and `other`, or among `inputs` without `other`."""
        ...


def neural_tangent_kernel(net: Layer) -> KernelFunction:
    """Makes a function that computes the empirical neural tangent kernel of a network.

        K[n, c, m, d] = J_nc . J_md, with J_nc the gradient of output c of example n

    If only the kernel of each class with itself is needed, use `neural_tangent_kernel_per_class`.

    Args:
      net: a Layer.

    Returns:
      `function(params, inputs, other=None) -> kernel [N, C, M, C]`, between the N `inputs` and M
      `other` inputs, or among the `inputs` without `other`. C counts all outputs of an example:
      with T positions there are T times as many. Layers that draw random numbers are
      deterministic.

    References:
      "Neural Tangent Kernel: Convergence and Generalization in Neural Networks", Jacot, Gabriel,
      Hongler, 2018.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2))
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> kernel = jax.jit(bp.neural_tangent_kernel(net))
      >>> kernel(params, jnp.ones((5, 3)), jnp.ones((6, 3))).shape
      (5, 2, 6, 2)
    """
    name = "neural_tangent_kernel"
    require_layer(f"{name}: net", net)

    def function(params, inputs, other=None):
        rows, others, axes = _two_jacobians(name, net, params, inputs, other)
        against_all = jax.vmap(gram, in_axes=(None, axes), out_axes=-1)
        return jax.vmap(against_all, in_axes=(axes, None), out_axes=1)(rows, others)

    return function


def neural_tangent_kernel_per_class(net: Layer) -> KernelFunction:
    """Makes a function that computes the tangent kernel of each class with itself.

        K[n, c, m, c] = J_nc . J_mc

    The sum over c is the trace form of the kernel, [N, M]. It takes as many backward passes as
    `neural_tangent_kernel`, but C times fewer products between examples.

    Args:
      net: a Layer.

    Returns:
      `function(params, inputs, other=None) -> kernels [N, M, C]`, with arguments as for
      `neural_tangent_kernel`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2))
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> kernels = jax.jit(bp.neural_tangent_kernel_per_class(net))
      >>> kernels(params, jnp.ones((5, 3)), jnp.ones((6, 3))).shape
      (5, 6, 2)
    """
    name = "neural_tangent_kernel_per_class"
    require_layer(f"{name}: net", net)

    def function(params, inputs, other=None):
        rows, others, axes = _two_jacobians(name, net, params, inputs, other)
        return jax.vmap(gram, in_axes=(axes, axes), out_axes=-1)(rows, others)

    return function


def _two_jacobians(
    name: str, net: Layer, params: Params, inputs: PyTree, other: PyTree | None
) -> tuple[PyTree, PyTree, PyTree]:
    """The Jacobians of both batches as signals with deltas [C, N, ...], and the axes C for vmap."""

    def jacobian(what, inputs):
        require_examples(name, **{what: inputs})
        outputs, cache = net.forward(params, inputs)
        require_examples(name, **{what: inputs, "outputs": outputs})
        rows = jacobian_rows(None, outputs, None)
        return sweep_columns(net, params, params, cache, rows, {"rows": _keep_columns})["rows"]

    rows = jacobian("inputs", inputs)
    others = rows if other is None else jacobian("other", other)
    return rows, others, _column_axes(rows)


def _keep_columns(signal: Any, *, columns: str) -> Any:
    """The signal with the deltas of all columns; its other operands are the same in each column."""
    return _map_deltas(lambda deltas: every_column(deltas, columns), signal, lambda x: x)


def _column_axes(signals: PyTree) -> PyTree:
    """The axes for `jax.vmap` over the columns: the first of a layer's deltas, and no others."""

    def axes(signal, stacked):
        return _map_deltas(lambda deltas: stacked, signal, lambda x: None)

    stacks = stack_axes(jax.tree.map(lambda signal: 0, signals, is_leaf=is_signal))
    return jax.tree.map(axes, signals, stacks, is_leaf=is_signal)


def _map_deltas(function: Callable[[Any], Any], signal: Any, rest: Callable[[Any], Any]) -> Any:
    """A signal with `function` applied to its deltas, and `rest` to its other operands.

    What depends on the deltas in a kind of one's own is not known, so all of it counts as deltas.
    """
    match signal:
        case Through(inner, back):
            return Through(_map_deltas(function, inner, rest), rest(back))
        case Sum(uses):
            return Sum(tuple(_map_deltas(function, use, rest) for use in uses))
    if not isinstance(signal, KINDS):
        return jax.tree.map(function, signal)
    others = (rest(operand) for operand in signal._replace(deltas=None))
    return type(signal)(*others)._replace(deltas=function(signal.deltas))
