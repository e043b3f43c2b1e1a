"""Products of curvature matrices with a vector, at the cost of a few gradients.

The Hessian of a loss over all parameters has as many rows as there are parameters, but its product
with a vector v is the derivative of the gradient along v: the forward derivative (`jax.jvp`) of the
explicit sweep.

  hessian_vector_product        H v, with H the Hessian of the mean loss
  gauss_newton_vector_product   sum_n J_n^T H_n J_n v / N, with H_n that of a loss by its outputs

Sources:
  "Fast Exact Multiplication by the Hessian", Pearlmutter, 1994.
  "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent", Schraudolph, 2002.
"""

import jax

from jaxbp.readings.sums import total
from jaxbp.sweeps.gradients import value_and_grad


def hessian_vector_product(net, loss):
    """The Hessian of the mean loss times a vector, H v: forward over the explicit backward.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.

    Returns:
      `function(params, inputs, targets, vector, *, key=None) -> product`; vector and product are
      trees like params.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.dense(1, use_bias=False)
      >>> params, _ = net.init(jax.random.key(0), (2,))
      >>> product = jax.jit(bp.hessian_vector_product(net, bp.squared_error))
      >>> x, v = jnp.array([[1.0, 2.0]]), {"weight": jnp.array([[1.0], [0.0]])}
      >>> product(params, x, jnp.zeros((1, 1)), v)["weight"][:, 0].tolist()  # x x^T v
      [1.0, 2.0]
    """
    gradient = value_and_grad(net, loss)

    def function(params, inputs, targets, vector, *, key=None):
        return jax.jvp(
            lambda params: gradient(params, inputs, targets, key=key)[1], (params,), (vector,)
        )[1]

    return function


def gauss_newton_vector_product(net, loss):
    """The Gauss-Newton matrix of the mean loss times a vector, sum_n J_n^T H_n J_n v / N.

    It is the Hessian without the curvature of the network itself: never indefinite for a loss that
    is convex in the outputs, and the same for a network that is linear in its parameters.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.

    Returns:
      `function(params, inputs, targets, vector, *, key=None) -> product`; vector and product are
      trees like params.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.dense(1, use_bias=False), bp.softplus())
      >>> params, _ = net.init(jax.random.key(0), (2,))
      >>> product = jax.jit(bp.gauss_newton_vector_product(net, bp.squared_error))
      >>> x, v = jnp.ones((3, 2)), jax.tree.map(jnp.ones_like, params)
      >>> bool(product(params, x, jnp.zeros((3, 1)), v)[0]["weight"].min() > 0)
      True
    """

    def function(params, inputs, targets, vector, *, key=None):
        def error(params):
            outputs, cache = net.forward(params, inputs, key=key)
            return loss(outputs, targets)[1], cache

        # Along v the outputs move by J v, and delta, their derivative of the loss, by H J v.
        delta, moved, cache = jax.jvp(error, (params,), (vector,), has_aux=True)
        return net.backward(params, cache, moved / len(delta), read=total)[1]

    return function
