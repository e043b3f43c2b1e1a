"""Curvature: products of the Hessian and the Gauss-Newton matrix with a vector.

These matrices have one row per parameter, so they are too large to form. Their product with a
vector v costs only a few gradients: the Hessian times v is the derivative of the gradient along v,
computed as the forward derivative (`jax.jvp`) of the explicit backward pass.

    hessian_vector_product        H v, with H the Hessian of the mean loss
    gauss_newton_vector_product   sum_n J_n^T H_n J_n v / N, with J_n the Jacobian of the outputs
                                  and H_n the Hessian of example n's loss in its outputs

Sources:
  "Fast Exact Multiplication by the Hessian", Pearlmutter, 1994.
  "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent", Schraudolph, 2002.
"""

from typing import Protocol

import jax

from jaxbp.forward import forward_and_loss, scaled_for_mean
from jaxbp.require import require_call, require_like
from jaxbp.signals.stacked import divided_like
from jaxbp.types import Layer, LossFunction, Params, PyTree

__all__ = ["gauss_newton_vector_product", "hessian_vector_product"]


class ProductFunction(Protocol):
    """What this module's calls return: the product of a curvature matrix with a vector."""

    def __call__(
        self,
        params: Params,
        inputs: PyTree,
        targets: PyTree,
        vector: Params,
        *,
        key: jax.Array | None = None,
    ) -> Params:
        """Returns the product, a tree like params; `key` is for layers that draw."""
        ...


def hessian_vector_product(net: Layer, loss: LossFunction) -> ProductFunction:
    """Makes a function that multiplies the Hessian of the mean loss by a vector, H v.

    It takes about two gradients' work and is exact, without finite differences. Use it for
    eigenvalues of the Hessian (power iteration, Lanczos) or in conjugate gradients.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.

    Returns:
      `function(params, inputs, targets, vector, *, key=None) -> product`. `vector` and `product`
      are trees like params. `key` is for layers that draw random numbers.

    Raises:
      TypeError: `net` is not a Layer, or `loss` is not a function.
      ValueError: when called, `vector` is not like params, or as for `value_and_grad`.

    References:
      "Fast Exact Multiplication by the Hessian", Pearlmutter, 1994.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.dense(1, use_bias=False)
      >>> params, _ = net.init(jax.random.key(0), (2,))
      >>> product = jax.jit(bp.hessian_vector_product(net, bp.squared_error))
      >>> x, v = jnp.array([[1.0, 2.0]]), {"weight": jnp.array([[1.0], [0.0]])}
      >>> product(params, x, jnp.zeros((1, 1)), v)["weight"][:, 0].tolist()  # x x^T v
      [1.0, 2.0]
    """
    name = "hessian_vector_product"
    require_call(name, net, loss)

    def function(params, inputs, targets, vector, *, key=None):
        require_like(name, "vector", vector, params)

        def gradient(params):
            _, cache, values, delta = forward_and_loss(
                name, net, loss, params, inputs, targets, key
            )
            delta, read = scaled_for_mean(delta, cache, values.shape[0])
            return net.backward(params, cache, delta, read=read)[1]

        return divided_like(params, jax.jvp(gradient, (params,), (vector,))[1])

    return function


def gauss_newton_vector_product(net: Layer, loss: LossFunction) -> ProductFunction:
    """Makes a function that multiplies the Gauss-Newton matrix of the mean loss by a vector.

        sum_n J_n^T H_n J_n v / N

    The Gauss-Newton matrix is the Hessian without the curvature of the network itself. It is
    positive semi-definite if the loss is convex in the outputs, so it can precondition a step where
    the Hessian cannot. It equals the Hessian if the network is linear in its parameters.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.

    Returns:
      `function(params, inputs, targets, vector, *, key=None) -> product`. `vector` and `product`
      are trees like params. `key` is for layers that draw random numbers.

    Raises:
      TypeError: `net` is not a Layer, or `loss` is not a function.
      ValueError: when called, `vector` is not like params, or as for `value_and_grad`.

    References:
      "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent", Schraudolph, 2002.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.dense(1, use_bias=False), bp.softplus())
      >>> params, _ = net.init(jax.random.key(0), (2,))
      >>> product = jax.jit(bp.gauss_newton_vector_product(net, bp.squared_error))
      >>> x, v = jnp.ones((3, 2)), jax.tree.map(jnp.ones_like, params)
      >>> bool(product(params, x, jnp.zeros((3, 1)), v)[0]["weight"].min() > 0)
      True
    """
    name = "gauss_newton_vector_product"
    require_call(name, net, loss)

    def function(params, inputs, targets, vector, *, key=None):
        require_like(name, "vector", vector, params)

        def error(params):
            _, cache, _, delta = forward_and_loss(name, net, loss, params, inputs, targets, key)
            return delta, cache

        # Along v, the outputs change by J v, and delta by H J v.
        delta, change, cache = jax.jvp(error, (params,), (vector,), has_aux=True)
        change, read = scaled_for_mean(change, cache, jax.tree.leaves(delta)[0].shape[0])
        return divided_like(params, net.backward(params, cache, change, read=read)[1])

    return function
