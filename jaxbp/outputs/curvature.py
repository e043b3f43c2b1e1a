"""What the curvature of a loss is made of: factors of its Hessian, and drawn targets."""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from jaxbp.types import exportable

__all__: list[str] = []


@exportable
class Drawn(NamedTuple):
    """Targets that a loss drew, where the Hessian has a weight that depends on the given targets.

    Attributes:
      targets: the draws.
      roots: the square root of each term's weight, by which delta is multiplied. The mean of delta
        delta^T over the draws is then the Hessian at the given targets.
    """

    targets: Any
    roots: jax.Array


def diagonal(values: jax.Array) -> jax.Array:
    """The columns of diagonal matrices, [O, N, ..., O], from their diagonals, [N, ..., O]."""
    eye = jnp.eye(values.shape[-1], dtype=values.dtype)
    return jnp.moveaxis(values[..., None, :] * eye, -2, 0)


def without_sample(name: str) -> Callable[..., NoReturn]:
    """The `sample` of a loss that is no logarithm of a distribution. It raises a TypeError."""

    def sample(key, outputs, targets=None):
        raise TypeError(
            f"{name}: has no distribution to draw targets from. Give targets, or use a Loss that "
            "has one, such as squared_error."
        )

    return sample


def without_factor(name: str, why: str, instead: str) -> Callable[..., NoReturn]:
    """The `hessian_factor` of a loss that has none. It raises a TypeError that says why."""

    def hessian_factor(outputs, targets):
        raise TypeError(f"{name}: has no factor of its Hessian, {why}. {instead}")

    return hessian_factor


# Why there is no factor, and what to use.
IS_LINEAR = "which is 0 wherever it exists"
IS_INDEFINITE = "which may have negative eigenvalues"
DRAW = "Use sampled, which has the Fisher information?"
MULTIPLY = "Use hessian_vector_product?"
