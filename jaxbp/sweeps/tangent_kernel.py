"""The empirical neural tangent kernel: how a step on one example moves the outputs of another.

  K[n, c, m, d] = (dy_nc / dp) . (dy'_md / dp), summed over all parameters p

It is the inner product of Jacobians that are too large to be formed: from the operands of the
sweeps of one-hot errors, a weight matrix contributes (x_n . x'_m) (d_nc . d'_md).

Source:
  "Neural Tangent Kernel: Convergence and Generalization in Neural Networks", Jacot, Gabriel,
  Hongler, 2018.
"""

import jax

from jaxbp.outputs.errors import jacobian_rows
from jaxbp.readings.inner_products import gram
from jaxbp.signals.kinds import is_signal
from jaxbp.signals.stacked import stack_axes
from jaxbp.sweeps.gradients import sweep_columns


def neural_tangent_kernel(net):
    """The empirical neural tangent kernel of a network, K[n, c, m, d] = J_nc . J_md, [N, C, M, C].

    C counts all outputs of an example, T C with positions.

    Args:
      net: a Layer.

    Returns:
      `function(params, inputs, other=None) -> kernel`; without other inputs, that of the inputs
      among themselves. Layers that draw random numbers do not.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2))
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> kernel = jax.jit(bp.neural_tangent_kernel(net))
      >>> kernel(params, jnp.ones((5, 3)), jnp.ones((6, 3))).shape
      (5, 2, 6, 2)
    """

    def function(params, inputs, other=None):
        rows, others, axes = _two_jacobians(net, params, inputs, other)
        against_all = jax.vmap(gram, in_axes=(None, axes), out_axes=-1)
        return jax.vmap(against_all, in_axes=(axes, None), out_axes=1)(rows, others)

    return function


def neural_tangent_kernel_per_class(net):
    """The kernel of each class with itself, K[n, c, m, c] = J_nc . J_mc, [N, M, C].

    Its sum over the last axis is the trace form of the kernel, [N, M]. Of the products between
    examples it takes C times fewer than the whole, and as many sweeps.

    Args:
      net: a Layer.

    Returns:
      `function(params, inputs, other=None) -> kernels`, as of `neural_tangent_kernel`.
    """

    def function(params, inputs, other=None):
        rows, others, axes = _two_jacobians(net, params, inputs, other)
        return jax.vmap(gram, in_axes=(axes, axes), out_axes=-1)(rows, others)

    return function


def _two_jacobians(net, params, inputs, other):
    """The Jacobians of both batches as signals with deltas [C, N, ...], and where C stands."""

    def jacobian(inputs):
        outputs, cache = net.forward(params, inputs)
        rows = jacobian_rows(None, outputs, None)
        return sweep_columns(net, params, params, cache, rows, {"rows": _keep_columns})["rows"]

    rows = jacobian(inputs)
    others = rows if other is None else jacobian(other)
    return rows, others, _column_axes(rows)


def _keep_columns(signal, *, columns):
    """The signal with the deltas of every column, and what is not of a column but once."""
    return signal._replace(deltas=jax.lax.all_gather(signal.deltas, columns))


def _column_axes(signals):
    """For `jax.vmap`: the columns are the first axis of a layer's deltas, and of nothing else."""

    def axes(signal, stacked):
        return type(signal)(*(stacked if field == "deltas" else None for field in signal._fields))

    deltas = jax.tree.map(lambda signal: signal.deltas, signals, is_leaf=is_signal)
    return jax.tree.map(axes, signals, stack_axes(deltas), is_leaf=is_signal)
