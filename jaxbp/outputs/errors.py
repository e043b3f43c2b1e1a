"""Errors: what to propagate back through a network instead of the loss's derivative.

A backward pass is linear in the error that enters at the outputs, and any array of the outputs'
shape may enter. An error is a function `error(loss, outputs, targets, key) -> columns [K,
...outputs' shape]`: K arrays to propagate side by side, by `backprop(net, loss, error=...)` or by
your own `jax.vmap`.

    ggn_columns     a square root of the loss's Hessian H: sum_k s_k s_k^T = H, exactly
    sampled         the same in expectation: deltas at targets drawn from the model
    jacobian_rows   one-hot: the backward pass computes the rows of the Jacobian

With the first two, the readings of `readings.moments` compute the curvature of the loss: the
generalised Gauss-Newton matrix sum_n J_n^T H_n J_n. For the cross-entropies and the squared error
it is also the Fisher information of the distribution p(target | outputs).

Sources:
  "BackPACK: Packing more into backprop", Dangel, Kunstner, Hennig, 2020.
  "New Insights and Perspectives on the Natural Gradient Method", Martens, 2020: Fisher and
  Gauss-Newton.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.outputs.joint import JointLoss
from jaxbp.require import require_count, require_key
from jaxbp.sharding import broadcast, placement
from jaxbp.types import Loss, PyTree, widened

__all__ = ["ggn_columns", "jacobian_rows", "sampled"]


def ggn_columns(
    loss: Loss, outputs: PyTree, targets: PyTree, key: jax.Array | None = None
) -> PyTree:
    """The columns of a square root of each example's loss Hessian, [K, ...outputs' shape].

        sum_k s_nk s_nk^T = H_n

    K is the number of outputs, C for classes. If there are positions, each has its own columns,
    because the loss is a sum over positions: K = T C.

    Args:
      loss: a Loss.
      outputs: the network's outputs, [N, ..., O].
      targets: as the loss takes them.
      key: not used.

    Raises:
      TypeError: `loss` is a plain function.

    References:
      "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent", Schraudolph, 2002.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bp.ggn_columns(bp.squared_error, jnp.zeros((1, 2)), jnp.ones((1, 2)))[:, 0].tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    del key
    _require_loss("ggn_columns", loss)
    if isinstance(loss, JointLoss):
        return loss.columns(ggn_columns, outputs, targets)
    columns = loss.hessian_factor(outputs, targets)
    places = outputs.shape[1:-1]
    at = jnp.eye(math.prod(places), dtype=outputs.dtype).reshape(-1, 1, 1, *places, 1)
    return (at * columns).reshape(-1, *outputs.shape)


def sampled(
    loss: Loss, outputs: PyTree, targets: PyTree, key: jax.Array | None, *, draws: int = 1
) -> PyTree:
    """Deltas at targets drawn from the model's own distribution, [draws, ...outputs' shape].

        E[sum_k s_nk s_nk^T] = H_n

    Each delta is divided by the square root of `draws`. The Hessian of `huber` depends on the
    target; H_n is then the mean of the Hessian over the drawn targets, not the Hessian at the given
    ones.

    Args:
      loss: a Loss.
      outputs: the network's outputs, [N, ..., O].
      targets: as the loss takes them. The answers are replaced by the draws; what comes beside
        them, such as weights, is used.
      key: a random key.
      draws: the number of draws, K.

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
    require_key("sampled", "key", key)
    require_count("sampled", "draws", draws)

    # In 16 bits the draws would be rounded, and so biased.
    wide = jax.tree.map(widened, outputs)

    def draw(key):
        _, delta = loss(wide, loss.sample(key, wide, targets))
        return jax.tree.map(lambda d, y: d.astype(y.dtype), delta, outputs)

    deltas = jax.vmap(draw)(jax.random.split(key, draws))
    return jax.tree.map(lambda d: d / math.sqrt(draws), deltas)


def jacobian_rows(
    loss: Any, outputs: PyTree, targets: PyTree, key: jax.Array | None = None
) -> PyTree:
    """One-hot errors, one for each output of an example, [K, ...outputs' shape].

    Column k propagates back to the gradient of output k of each example, so `per_example` reads the
    Jacobian. If there are positions, K = T C.

    Args:
      loss: not used.
      outputs: the network's outputs, [N, ..., O].
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
    leaves, structure = jax.tree.flatten(outputs)
    sizes = [math.prod(y.shape[1:]) for y in leaves]
    at, rows = 0, []
    for y, size in zip(leaves, sizes, strict=True):
        own = jnp.eye(sum(sizes), size, k=-at, dtype=y.dtype).reshape(-1, 1, *y.shape[1:])
        after = placement(y, None, *((y, axis) for axis in range(y.ndim)))
        rows.append(broadcast(own, (own.shape[0], *y.shape), after))
        at += size
    return structure.unflatten(rows)


def _require_loss(name, loss):
    if not isinstance(loss, Loss):
        raise TypeError(
            f"{name}: takes a Loss, which knows its Hessian and its distribution; "
            f"got {type(loss).__name__}."
        )
