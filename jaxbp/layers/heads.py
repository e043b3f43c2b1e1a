"""The layout of attention's heads: side by side in the last axis outside, in rows inside.

Letters are those of `types` and `dot_product`. Queries, keys and values are [N, T, heads, size].
The rows that `attend` takes are [N, G, T heads / G, size].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbp.layers.rotations import Rotary, require_rotary, require_rotated, require_size, rotate
from jaxbp.require import require_count, require_positive
from jaxbp.types import LayerError, Shape, show_shape


class Heads(NamedTuple):
    """Splits inputs into the queries, keys and values of the heads, and joins them again.

    Attributes:
      heads: H.
      groups: G.
      value_size: u, or None for u = d.
      scale: what a product q . k is multiplied by, or None for 1 / sqrt(d).
      rotary: how queries and keys are rotated, or None.
    """

    heads: int
    groups: int
    value_size: int | None = None
    scale: float | None = None
    rotary: Rotary | None = None

    @property
    def group(self) -> int:
        """H / G."""
        return self.heads // self.groups

    def split(self, x: jax.Array, start: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Splits x [N, T, (H + G) d + G u] into rotated queries, rotated keys, and values.

        `start` is the position of the first of them.
        """
        d = self.size_of(x.shape[2])
        q, k, v = jnp.split(x, [self.heads * d, (self.heads + self.groups) * d], axis=2)
        q, k, v = apart(q, self.heads), apart(k, self.groups), apart(v, self.groups)
        return self._rotate(q, 1, start), self._rotate(k, 1, start), v

    def join(self, dq: jax.Array, dk: jax.Array, dv: jax.Array, start: int) -> jax.Array:
        """The derivative of `split`: dx from the derivatives with respect to its results."""
        dq, dk = self._rotate(dq, -1, start), self._rotate(dk, -1, start)
        return jnp.concatenate([together(dq), together(dk), together(dv)], axis=2)

    def size_of(self, features: int) -> int:
        """The d of inputs with so many features, (H + G) d + G u."""
        if self.value_size is None:
            return features // (self.heads + 2 * self.groups)
        return (features - self.groups * self.value_size) // (self.heads + self.groups)

    def scaled(self, q: jax.Array) -> jax.Array:
        """Queries times the scale, because there are fewer of them than scores."""
        return q * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)

    def rows(self, x: jax.Array) -> jax.Array:
        """Rearranges heads [N, T, heads, size] to rows [N, G, T heads / G, size]."""
        n, t, heads, size = x.shape
        x = jnp.moveaxis(x.reshape(n, t, self.groups, heads // self.groups, size), 1, 2)
        return x.reshape(n, self.groups, t * heads // self.groups, size)

    def from_rows(self, rows: jax.Array, heads: int) -> jax.Array:
        """The inverse of `rows`, for so many heads."""
        n, _, n_rows, size = rows.shape
        t, group = n_rows * self.groups // heads, heads // self.groups
        x = jnp.moveaxis(rows.reshape(n, self.groups, t, group, size), 2, 1)
        return x.reshape(n, t, heads, size)

    def require_packed(self, name: str, shape: Shape) -> tuple[int, int]:
        """Returns d and u of inputs x [N, *shape], or raises if these do not fit."""
        if self.value_size is None:
            d = u = require_size(name, shape, self.heads + 2 * self.groups, "(H + 2 G) d")
        else:
            u, shared = self.value_size, self.heads + self.groups
            d, rest = divmod(shape[-1] - self.groups * u, shared) if len(shape) == 2 else (0, 1)
            if rest or d < 1:
                raise LayerError(
                    name,
                    f"got inputs of shape {show_shape(('N', *shape))}; it takes [N, T, (H + G) d + "
                    f"G u], a last axis of {shared} d + {self.groups * u}.",
                )
        if self.rotary is not None:
            require_rotated(name, shape, d, self.rotary)
        return d, u

    def require_past(self, name: str, shapes: Any, d: int, u: int) -> int:
        """Returns P of a past (k, v), arrays [N, *shape], or raises if these do not fit."""
        wanted = self.groups * d, self.groups * u
        if [shape[1:] for shape in shapes] != [(size,) for size in wanted] or (
            shapes[0][0] != shapes[1][0]
        ):
            raise LayerError(
                name,
                f"got a past of {_show(shapes)}; it takes a pair, keys [N, P, {wanted[0]}] and "
                f"values [N, P, {wanted[1]}].",
            )
        return shapes[0][0]

    def require_apart(self, name: str, shapes: Any) -> tuple[int, int]:
        """Returns d and u of arrays (q, k, v), [N, *shape], or raises if these do not fit."""
        if self.rotary is not None:
            raise LayerError(
                name,
                "got (q, k, v), which it does not rotate. Apply rotary() to q and k, and leave out "
                "rotary here?",
            )
        q, k, v = shapes
        fits = {len(shape) for shape in shapes} == {2} and k[0] == v[0]
        d, u = (k[-1] // self.groups, v[-1] // self.groups) if fits else (0, 0)
        wanted = self.heads * d, self.groups * d, self.groups * u
        if not fits or (q[1], k[1], v[1]) != wanted or self.value_size not in (None, u):
            letter = "u" if self.value_size is None else self.value_size
            raise LayerError(
                name,
                f"got (q, k, v) of {_show(shapes)}; it takes [N, T, {self.heads} d], "
                f"[N, S, {self.groups} d] and [N, S, {self.groups} {letter}].",
            )
        return d, u

    def _rotate(self, x, sign, start):
        return x if self.rotary is None else rotate(x, self.rotary, sign, start)


def apart(x: jax.Array, heads: int) -> jax.Array:
    """Reshapes [N, T, heads size] to [N, T, heads, size]."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads)


def together(x: jax.Array) -> jax.Array:
    """The inverse of `apart`."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])


def make_heads(
    name: str,
    heads: int,
    kv_heads: int | None,
    value_size: int | None,
    scale: float | None,
    rotary: bool | Rotary,
) -> Heads:
    """`Heads` of the arguments of an attention layer; raises unless they are in their ranges."""
    heads = require_count(name, "heads", heads)
    groups = heads if kv_heads is None else require_count(name, "kv_heads", kv_heads)
    if heads % groups:
        raise ValueError(f"{name}: kv_heads is {groups}, which does not divide {heads} heads.")
    if value_size is not None:
        value_size = require_count(name, "value_size", value_size)
    if scale is not None:
        require_positive(name, "scale", scale)
    how = Rotary() if rotary is True else rotary
    return Heads(
        heads, groups, value_size, scale, None if how is False else require_rotary(name, how)
    )


def require_head_size(name: str, features: int, heads: int, head_size: int | None) -> int:
    """Returns the size d of a head, features / H if it is not given; raises if there is none."""
    if head_size is not None:
        return require_count(name, "head_size", head_size)
    if features % heads:
        raise ValueError(
            f"{name}: features is {features}, not a multiple of {heads} heads. Give a head_size?"
        )
    return features // heads


def _show(shapes: Any) -> str:
    """Shapes of arrays [N, *shape], for messages."""
    return f"shapes {', '.join(show_shape(('N', *shape)) for shape in shapes)}"
