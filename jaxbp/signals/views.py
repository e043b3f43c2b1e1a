"""Views: a parameter whose entries lie in another order or shape than its signal's gradient.

A signal has its gradient in a fixed layout, such as [I, O] for an `Outer`. A parameter may hold the
same entries transposed, with its axes split, as a part of a larger array, and so on. A `View` is
the map from the signal's layout to the parameter's: a list of moves, each of which puts every entry
into one place and fills what is left with zeros. So norms and inner products stay what they are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbp.types import Shape, register_static


class Move(NamedTuple):
    """One move of a view.

    Attributes:
      name: `reshape`, `transpose`, `flip` or `embed`.
      argument: the new shape, the order of the axes, the axes, or the first index and the stride on
        each axis.
      before: the shape before the move.
      after: the shape after it.
    """

    name: str
    argument: tuple[Any, ...]
    before: Shape
    after: Shape


_FORWARD: dict[str, Callable[[jax.Array, Move], jax.Array]] = {
    "reshape": lambda x, move: x.reshape(move.after),
    "transpose": lambda x, move: x.transpose(move.argument),
    "flip": lambda x, move: jnp.flip(x, move.argument),
    "embed": lambda x, move: jnp.zeros(move.after, x.dtype).at[_part(move)].set(x),
}
_BACK: dict[str, Callable[[jax.Array, Move], jax.Array]] = {
    "reshape": lambda x, move: x.reshape(move.before),
    "transpose": lambda x, move: x.transpose(_inverse(move.argument)),
    "flip": _FORWARD["flip"],
    "embed": lambda x, move: x[_part(move)],
}


@dataclasses.dataclass(frozen=True)
class View:
    """Where the entries of a signal's gradient stand in the parameter. In a tree it has no leaves.

    Attributes:
      shape: of the signal's gradient.
      moves: what is done to it, in order.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxbp.signals.views import View
      >>> view = View((2, 3)).transpose(1, 0).embed((0, 1), (3, 4))
      >>> view(jnp.ones((2, 3))).tolist()
      [[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]]
    """

    shape: Shape
    moves: tuple[Move, ...] = ()

    @property
    def out_shape(self) -> Shape:
        """The shape of the parameter."""
        return self.moves[-1].after if self.moves else self.shape

    @property
    def transposes(self) -> bool:
        """Whether the parameter is the transposed matrix of the signal."""
        return [(move.name, move.argument) for move in self.moves] == [("transpose", (1, 0))]

    def __call__(self, gradient: jax.Array) -> jax.Array:
        """A gradient in the signal's layout as one in the parameter's."""
        for move in self.moves:
            gradient = _FORWARD[move.name](gradient, move)
        return gradient

    def take(self, array: jax.Array) -> jax.Array:
        """The entries of an array like the parameter, in the signal's layout."""
        for move in reversed(self.moves):
            array = _BACK[move.name](array, move)
        return array

    def reshape(self, shape: Shape) -> "View":
        """This view, then another shape of the same entries."""
        if tuple(shape) == self.out_shape:
            return self
        return self._then("reshape", tuple(shape), tuple(shape))

    def transpose(self, *axes: int) -> "View":
        """This view, then its axes in another order."""
        if axes == tuple(range(len(axes))):
            return self
        return self._then("transpose", axes, tuple(self.out_shape[a] for a in axes))

    def flip(self, *axes: int) -> "View":
        """This view, then some of its axes backwards."""
        return self._then("flip", axes, self.out_shape) if axes else self

    def embed(self, start: Shape, shape: Shape, strides: Shape | None = None) -> "View":
        """This view as a part of a larger array, which is zero elsewhere."""
        argument = tuple(zip(start, strides or (1,) * len(shape), strict=True))
        return self._then("embed", argument, tuple(shape))

    def then(self, other: "View") -> "View":
        """This view, then the moves of another one."""
        return View(self.shape, self.moves + other.moves)

    def _then(self, name, argument, after):
        return View(self.shape, (*self.moves, Move(name, argument, self.out_shape, after)))


register_static(View, lambda shape, moves: View(shape, tuple(Move(*move) for move in moves)))


def _part(move):
    """The slices of the larger array that an `embed` fills."""
    pairs = zip(move.argument, move.before, strict=True)
    return tuple(slice(start, start + (n - 1) * step + 1, step) for (start, step), n in pairs)


def _inverse(order):
    return tuple(sorted(range(len(order)), key=order.__getitem__))
