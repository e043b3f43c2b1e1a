"""Errors: what else than the loss's derivative can be sent back through a network.

A sweep is linear in the error that enters at the outputs, and any array of their shape may enter.
An error here is `error(loss, outputs, targets, key) -> columns [K, ...outputs' shape]`: K arrays to
be sent back side by side, for `backprop(net, loss, error=...)` or for a `jax.vmap` of one's own.

  ggn_columns     a square root of the loss's Hessian H: sum_k s_k s_k^T = H, exactly
  sampled         the same on average: deltas at targets drawn from the model itself
  jacobian_rows   one-hot: what comes back are the rows of the Jacobian

With the first two, the readings of `moments` are the curvature of the loss: the generalised
Gauss-Newton matrix sum_n J_n^T H_n J_n, which for losses that are the negative logarithm of a
distribution of their outputs is the Fisher information.

Sources:
  "BackPACK: Packing more into backprop", Dangel, Kunstner, Hennig, 2020.
  "New Insights and Perspectives on the Natural Gradient Method", Martens, 2020: Fisher and
  Gauss-Newton.
"""

import math

import jax
import jax.numpy as jnp

from jaxbp.types import Loss, widened


def ggn_columns(loss, outputs, targets, key=None):
    """The columns of a square root of each example's loss Hessian, [K, ...outputs' shape].

      sum_k s_nk s_nk^T = H_n

    K is the number of outputs, C for classes. Positions each have columns of their own, since the
    loss is a sum over them: K = T C.

    Args:
      loss: a Loss.
      outputs: those of the network, [N, ..., O].
      targets: as the loss takes them.
      key: not used.

    Raises:
      TypeError: `loss` is a plain function.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bp.ggn_columns(bp.squared_error, jnp.zeros((1, 2)), jnp.ones((1, 2)))[:, 0].tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    del key
    _require_loss("ggn_columns", loss)
    columns = loss.hessian_factor(outputs, targets)
    places = outputs.shape[1:-1]
    at = jnp.eye(math.prod(places), dtype=outputs.dtype).reshape(-1, 1, 1, *places, 1)
    return (at * columns).reshape(-1, *outputs.shape)


def sampled(loss, outputs, targets, key, *, draws=1):
    """Deltas at targets drawn from the model's own distribution, [draws, ...outputs' shape].

      E[sum_k s_nk s_nk^T] = H_n

    Each is divided by the root of their number. The mean is over the draws; for `huber`, whose
    Hessian depends on the target, it is the mean of the Hessian too, not that at the given targets.

    Args:
      loss: a Loss.
      outputs: those of the network, [N, ..., O].
      targets: of which what is beside the answer, such as weights, is kept.
      key: a random key.
      draws: how many, K.

    Raises:
      TypeError: `loss` is a plain function.
      ValueError: there is no key, or `draws` is not a positive integer.

    Example:
      >>> import functools, jax, jaxbp as bp
      >>> net = bp.dense(3)
      >>> params, _ = net.init(jax.random.key(0), (4,))
      >>> x, labels = jax.random.normal(jax.random.key(1), (5, 4)), jax.numpy.arange(5) % 3
      >>> sweep = bp.backprop(
      ...     net, bp.softmax_cross_entropy, read=bp.diagonal,
      ...     error=functools.partial(bp.sampled, draws=8),
      ... )
      >>> _, curvature = sweep(params, x, labels, error_key=jax.random.key(2))
      >>> curvature["weight"].shape
      (4, 3)
    """
    _require_loss("sampled", loss)
    if key is None:
        raise ValueError("sampled: draws targets and needs a random key. Pass error_key=...?")
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"sampled: draws is {draws!r}; it takes a positive integer.")

    wide = widened(outputs)  # in 16 bits the draws would round, and be biased

    def draw(key):
        return loss(wide, loss.sample(key, wide, targets))[1].astype(outputs.dtype)

    return jax.vmap(draw)(jax.random.split(key, draws)) / math.sqrt(draws)


def jacobian_rows(loss, outputs, targets, key=None):
    """One-hot errors, one for each of an example's outputs, [K, ...outputs' shape].

    What comes back for k is the gradient of output k of each example: `per_example` reads the
    Jacobian. With positions, K = T C.

    Args:
      loss: not used.
      outputs: those of the network, [N, ..., O].
      targets: not used.
      key: not used.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.dense(3)
      >>> params, _ = net.init(jax.random.key(0), (4,))
      >>> rows = bp.backprop(net, bp.squared_error, read=bp.per_example, error=bp.jacobian_rows)
      >>> _, jacobian = rows(params, jnp.ones((5, 4)), jnp.zeros((5, 3)))
      >>> jacobian["weight"].shape
      (3, 5, 4, 3)
    """
    del loss, targets, key
    shape = outputs.shape[1:]
    rows = jnp.eye(math.prod(shape), dtype=outputs.dtype).reshape(-1, 1, *shape)
    return jnp.broadcast_to(rows, (len(rows), *outputs.shape))


def _require_loss(name, loss):
    if not isinstance(loss, Loss):
        raise TypeError(
            f"{name}: takes a Loss, which knows its Hessian and its distribution; "
            f"got {type(loss).__name__}."
        )
