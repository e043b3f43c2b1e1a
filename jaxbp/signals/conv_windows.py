"""Windows: which inputs an output of a convolution, or of a pooling layer, sees.

Along each axis of positions, an output at t sees the inputs at

  u = s t + d k - p,   k = 0, ..., K - 1

for a kernel of K places, a stride s, a dilation d, and p places of padding before the first input.
What lies outside of the inputs is zero. A window spans d (K - 1) + 1 positions.

Here S are the sizes of what the windows lie on, S' how many windows there are, and C what an image
has at each position; the axes are always [N, *S, C].

Source:
  "A guide to convolution arithmetic for deep learning", Dumoulin, Visin, 2016.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from jaxbp.types import LayerError, show_shape


class Axis(NamedTuple):
    """Where windows lie along one axis of positions.

    Attributes:
      kernel: K.
      stride: s.
      before: p.
      after: how many places are added behind.
      dilation: d.
    """

    kernel: int
    stride: int
    before: int
    after: int
    dilation: int

    @property
    def span(self):
        """How many positions a window reaches over, d (K - 1) + 1."""
        return self.dilation * (self.kernel - 1) + 1

    def count(self, size):
        """S', how many windows there are on S positions."""
        return (size + self.before + self.after - self.span) // self.stride + 1

    def covered(self, count):
        """How many positions S' windows cover, s (S' - 1) + d (K - 1) + 1."""
        return self.stride * (count - 1) + self.span

    def sees(self, size):
        """Whether the window at t sees a position by its place k, [S', K]."""
        t, k = np.arange(self.count(size))[:, None], np.arange(self.kernel)
        u = self.stride * t + self.dilation * k - self.before
        return (u >= 0) & (u < size)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where the windows of a convolution lie: numbers alone, so that in a tree it has no leaves.

    A signal `Conv` has one, and so need not hold what its windows see.

    Attributes:
      kernel: K, for each axis of positions.
      strides: s.
      padding: how many places are added before and after, a pair for each axis.
      dilation: d.
      groups: G.
      transposed: whether it is the outputs on which the windows lie, as those of `conv_transpose`.

    Example:
      >>> import jax, jaxbp as bp
      >>> same = bp.Geometry((3, 3), strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
      >>> same.count((28, 28)), jax.tree.leaves(same)
      ((28, 28), [])
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @property
    def axes(self):
        """The windows along each axis of positions."""
        numbers = zip(self.kernel, self.strides, self.padding, self.dilation, strict=True)
        return tuple(Axis(k, s, *pair, d) for k, s, pair, d in numbers)

    def along(self, axes):
        """The windows along a slice of the axes alone."""
        numbers = self.kernel, self.strides, self.padding, self.dilation
        return Geometry(*(each[axes] for each in numbers))

    def count(self, sizes):
        """S', how many windows there are on each axis of S positions."""
        return tuple(axis.count(size) for axis, size in zip(self.axes, sizes, strict=True))

    def covered(self, counts):
        """How many positions S' windows cover on each axis."""
        return tuple(axis.covered(count) for axis, count in zip(self.axes, counts, strict=True))


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows as a layer asks for them, before it is known on how many positions they lie.

    Attributes:
      name: of the layer, for messages.
      kernel: K, for each axis of positions.
      strides: s.
      padding: `SAME`, `VALID`, or pairs.
      dilation: d.
      groups: G.
      called: what the layer calls its kernel.
    """

    name: str
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    called: str

    def require_axes(self, shape, letter):
        """The shape [*S, C] of one example, once it is known to have these axes."""
        if len(shape) != len(self.kernel) + 1:
            axes = ("N", *("T", "HW", "DHW")[len(self.kernel) - 1], letter)
            raise LayerError(
                self.name,
                f"got inputs of shape {show_shape(('N', *shape))}; its {self.called} of "
                f"{len(self.kernel)} axes takes {show_shape(axes)}.",
            )
        return shape

    def on(self, sizes):
        """The windows on S positions, of which there has to be at least one."""
        geometry = self._geometry(sizes)
        for i, (axis, size) in enumerate(zip(geometry.axes, sizes, strict=True), 1):
            if axis.count(size) < 1:
                padded = " with their padding" if axis.before or axis.after else ""
                spans = [axis.span for axis in geometry.axes]
                raise LayerError(
                    self.name,
                    f"got inputs of {show_shape(sizes)} positions; its {self.called} spans "
                    f"{show_shape(spans)}, more than the {size + axis.before + axis.after} of axis "
                    f"{i}{padded}. Pad by 'SAME'?",
                )
        return geometry

    def onto(self, counts):
        """The windows, S' of them, and the sizes S of what they lie on: of a transposed layer.

        S is s S' for SAME, and else what they cover, less the padding if there is any.
        """
        if self.padding == "SAME":
            sizes = tuple(n * s for n, s in zip(counts, self.strides, strict=True))
            geometry = self._geometry(sizes)
        else:
            geometry = self._geometry(counts)
            pairs = zip(geometry.covered(counts), geometry.padding, strict=True)
            sizes = tuple(size - sum(pair) for size, pair in pairs)
        if min(sizes) < 1:
            raise LayerError(
                self.name,
                f"got inputs of {show_shape(counts)} positions; with its padding taken off there "
                f"would be outputs of {show_shape(sizes)}.",
            )
        return dataclasses.replace(geometry, transposed=True), sizes

    def _geometry(self, sizes):
        padding = self.padding
        if padding == "SAME":
            padding = tuple(map(_same, sizes, self.kernel, self.strides, self.dilation))
        elif isinstance(padding, str):
            padding = ((0, 0),) * len(sizes)
        return Geometry(self.kernel, self.strides, padding, self.dilation, self.groups)


def make_windows(factory, name, kernel, strides, padding, dilation=1, *, groups=1, called="kernel"):
    """The windows of a layer from what its factory is given, once it is known to describe some."""
    if not isinstance(kernel, tuple) or not 1 <= len(kernel) <= 3 or not _are_counts(kernel):
        raise ValueError(
            f"{factory}: {called} is {kernel!r}; it takes a tuple of one to three positive "
            "integers, a size for each axis of positions, such as (3, 3)."
        )
    rank = len(kernel)
    strides = _for_each_axis(factory, "strides", strides, rank)
    dilation = _for_each_axis(factory, "dilation", dilation, rank)
    padding = _padding(factory, padding, rank)
    return Windows(name, kernel, strides, padding, dilation, groups, called)


def _same(size, k, s, d):
    """The padding before and after for ceil(S / s) windows on S positions."""
    count = -(-size // s)
    missing = max(Axis(k, s, 0, 0, d).covered(count) - size, 0)
    return missing // 2, missing - missing // 2


def _are_counts(values):
    return all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)


def _for_each_axis(factory, argument, value, rank):
    """A number for each axis, from one for all or from a tuple."""
    values = value if isinstance(value, tuple) else (value,) * rank
    if len(values) != rank or not _are_counts(values):
        raise ValueError(
            f"{factory}: {argument} is {value!r}; it takes a positive integer, or a tuple of "
            f"{rank}, one for each axis."
        )
    return values


def _padding(factory, padding, rank):
    """The padding as it was given, explicit pairs as tuples."""
    if padding in ("SAME", "VALID"):
        return padding
    try:
        pairs = tuple((before, after) for before, after in padding)
    except (TypeError, ValueError):
        pairs = ()
    places = [places for pair in pairs for places in pair]
    if len(pairs) != rank or not all(isinstance(p, int) and p >= 0 for p in places):
        raise ValueError(
            f"{factory}: padding is {padding!r}; it takes 'SAME', 'VALID', or a pair (before, "
            f"after) for each of {rank} axes."
        )
    return pairs
