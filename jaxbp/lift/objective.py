"""Losses from a function that computes the value alone, with the derivative by `jax.vjp`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.lift.examples import Examples
from jaxbp.require import require_examples
from jaxbp.types import Loss, show_shape, widened

__all__ = ["loss_of"]


def loss_of(function: Callable[[Any, Any], jax.Array], *, name: str | None = None) -> Loss:
    """A Loss from a function `(outputs, targets) -> value` of a batch. delta = dE/dy by autodiff.

    Use it for a loss that the library does not have, such as those of optax. The function returns a
    value per example, [N], or per position or output, [N, ...], which are summed for each example.
    It must not take a mean over the examples, nor let one example's value depend on another.

    Such a loss has no distribution and no factor of its Hessian. The errors `sampled` and
    `ggn_columns` refuse it.

    Args:
      function: `function(outputs, targets) -> [N, ...]`. 16-bit outputs reach it in 32 bits.
      name: the name in messages.

    Raises:
      TypeError: `function` cannot be called; or a sample or a Hessian is asked for.
      ValueError: when called, the function does not return floating-point numbers [N, ...].

    Example:
      >>> import jax.numpy as jnp, optax, jaxbp as bp
      >>> loss = bp.loss_of(optax.huber_loss)
      >>> value, delta = loss(jnp.array([[0.5, 3.0]]), jnp.zeros((1, 2)))
      >>> value.tolist(), delta.tolist()
      ([2.625], [[0.5, 1.0]])
    """
    if isinstance(function, Loss) or not callable(function):
        got = "already a Loss" if isinstance(function, Loss) else "not callable"
        raise TypeError(
            f"loss_of: function is {function!r}, {got}; it takes a function (outputs, targets) -> "
            "value [N]."
        )
    name = name or f"loss_of({getattr(function, '__name__', type(function).__name__)})"

    def terms(outputs, targets):
        """The loss of a function (see `loss_of`)."""
        n = require_examples(name, outputs=outputs)
        # In 32 bits, as in the losses of the library.
        wide = jax.tree.map(lambda y: widened(jnp.asarray(y)), outputs)

        def values_of(outputs, targets):
            values = function(outputs, targets)
            _require_values(name, values, n)
            return values, ()

        values, vjp, _ = Examples.of(outputs, beside=targets).vjp(values_of, wide, targets)
        (delta,) = vjp(jnp.ones_like(values))
        return values, jax.tree.map(lambda d, y: d.astype(y.dtype), delta, outputs)

    def sample(key, outputs, targets=None):
        raise TypeError(
            f"{name}: has no distribution to draw targets from. Give targets, or use a Loss that "
            "has one, such as squared_error."
        )

    def hessian_factor(outputs, targets):
        raise TypeError(
            f"{name}: has no factor of its Hessian. Use a Loss that has one, such as "
            "squared_error, or hessian_vector_product."
        )

    return Loss(name, terms, sample, hessian_factor)


def _require_values(name, values, n):
    """Raises unless the function returned one or more values for each of n examples."""
    if not hasattr(values, "dtype") or not jnp.issubdtype(values.dtype, jnp.floating):
        got = f"an array of {values.dtype}" if hasattr(values, "dtype") else type(values).__name__
        raise ValueError(
            f"{name}: the function returned {got}; it has to return the value alone, an array of "
            "floating-point numbers [N, ...]."
        )
    if values.shape[:1] != (n,):
        mean = " Is it a mean? Return the value of each example." if not values.shape else ""
        raise ValueError(
            f"{name}: the function returned shape {show_shape(values.shape)}, expected one value "
            f"per example, {show_shape((n,))}.{mean}"
        )
