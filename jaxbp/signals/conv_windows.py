"""Windows: which inputs each output of a convolution or a pooling layer sees.

Along each axis of positions, the output at t sees the inputs at

    u = s t + d k - p,   k = 0, ..., K - 1

for a kernel with K places (its offsets, also called taps), a stride s, a dilation d, and p
positions of padding before the first input. A window spans d (K - 1) + 1 positions.

S are the sizes of the array on which the windows lie, S' the numbers of windows, and C the number
of channels. The axes are always [N, *S, C].

Source:
  "A guide to convolution arithmetic for deep learning", Dumoulin, Visin, 2016.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxbp.types import LayerError, Shape, register_static, show_shape

__all__ = ["Geometry"]


class Axis(NamedTuple):
    """Where windows lie along one axis of positions.

    Attributes:
      kernel: K, the number of places of the kernel.
      stride: s.
      before: p, the padding before the first position.
      after: the padding behind the last position.
      dilation: d.
    """

    kernel: int
    stride: int
    before: int
    after: int
    dilation: int

    @property
    def span(self) -> int:
        """The number of positions from the first to the last of a window, d (K - 1) + 1."""
        return self.dilation * (self.kernel - 1) + 1

    def count(self, size: int) -> int:
        """S', the number of windows on S positions; below 1 if none fits."""
        return (size + self.before + self.after - self.span) // self.stride + 1

    def covered(self, count: int) -> int:
        """The number of positions that S' windows cover, s (S' - 1) + d (K - 1) + 1."""
        return self.stride * (count - 1) + self.span

    def sees(self, size: int) -> NDArray[np.bool_]:
        """Whether place k of the window at t lies on a position and not on padding, [S', K]."""
        t, k = np.arange(self.count(size))[:, None], np.arange(self.kernel)
        u = self.stride * t + self.dilation * k - self.before
        return (u >= 0) & (u < size)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where the windows of a convolution lie. A static record: in a tree it has no leaves.

    A `Conv` signal holds one beside its images, so it does not have to store each window's inputs.

    Attributes:
      kernel: K, for each axis of positions.
      strides: s, for each axis.
      padding: the number of positions added before and behind, a pair for each axis. A negative
        number removes positions, which no window sees.
      dilation: d, for each axis.
      groups: G, the number of groups of channels.
      transposed: whether the windows lie on the outputs, as in `conv_transpose`.

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
    def axes(self) -> tuple[Axis, ...]:
        """The windows along each axis of positions."""
        numbers = zip(self.kernel, self.strides, self.padding, self.dilation, strict=True)
        return tuple(Axis(k, s, *pair, d) for k, s, pair, d in numbers)

    def along(self, axes: slice) -> "Geometry":
        """The windows along some of the axes, with one group."""
        return Geometry(
            self.kernel[axes], self.strides[axes], self.padding[axes], self.dilation[axes]
        )

    def count(self, sizes: Shape) -> Shape:
        """S', the number of windows along each axis of S positions."""
        return tuple(axis.count(size) for axis, size in zip(self.axes, sizes, strict=True))

    def covered(self, counts: Shape) -> Shape:
        """The number of positions that S' windows cover along each axis."""
        return tuple(axis.covered(count) for axis, count in zip(self.axes, counts, strict=True))


register_static(Geometry, Geometry)


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of a layer before the number of positions is known; `on` gives the `Geometry`.

    Attributes:
      name: the name of the layer, for messages.
      kernel: K, for each axis of positions.
      strides: s, for each axis.
      padding: `SAME`, `VALID`, or a pair for each axis.
      dilation: d, for each axis.
      groups: G, the number of groups of channels.
      called: the layer's word for its kernel in messages, such as `window`.
    """

    name: str
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    called: str

    def require_axes(self, shape: Shape, letter: str) -> Shape:
        """Returns the shape [*S, C] of one example; raises if its number of axes does not fit.

        Messages name the last axis by `letter`.
        """
        if len(shape) != len(self.kernel) + 1:
            axes = ("N", *("T", "HW", "DHW")[len(self.kernel) - 1], letter)
            raise LayerError(
                self.name,
                f"got inputs of shape {show_shape(('N', *shape))}; its {self.called} of "
                f"{len(self.kernel)} axes takes {show_shape(axes)}.",
            )
        return shape

    def on(self, sizes: Shape) -> Geometry:
        """The windows on S positions; raises if there is none along some axis."""
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

    def onto(self, counts: Shape, more: Shape) -> tuple[Geometry, Shape]:
        """For a transposed layer with S' inputs: the windows, and the sizes S of its outputs.

        S is s S' for SAME. Otherwise it is s (S' - 1) + d (K - 1) + 1, less the padding, and `more`
        positions behind these, one number for each axis.
        """
        if self.padding == "SAME":
            sizes = tuple(n * s for n, s in zip(counts, self.strides, strict=True))
            geometry = self._geometry(sizes)
        else:
            geometry = self._geometry(counts)
            pairs = zip(geometry.padding, more, strict=True)
            padding = tuple((before, after - extra) for (before, after), extra in pairs)
            geometry = dataclasses.replace(geometry, padding=padding)
            pairs = zip(geometry.covered(counts), padding, strict=True)
            sizes = tuple(size - sum(pair) for size, pair in pairs)
        if min(sizes) < 1:
            raise LayerError(
                self.name,
                f"got inputs of {show_shape(counts)} positions; with its padding taken off there "
                f"would be outputs of {show_shape(sizes)}.",
            )
        return dataclasses.replace(geometry, transposed=True), sizes

    def _geometry(self, sizes: Shape) -> Geometry:
        padding = self.padding
        if padding == "SAME":
            padding = tuple(map(_same_padding, sizes, self.kernel, self.strides, self.dilation))
        elif isinstance(padding, str):
            padding = ((0, 0),) * len(sizes)
        return Geometry(self.kernel, self.strides, padding, self.dilation, self.groups)


def make_windows(
    factory: str,
    name: str,
    kernel: Any,
    strides: Any,
    padding: Any,
    dilation: Any = 1,
    *,
    groups: int = 1,
    called: str = "kernel",
) -> Windows:
    """Makes the windows of a layer from the arguments of its factory; raises if they do not fit.

    Args:
      factory: the name of the factory, for messages about its arguments.
      name: the name of the layer, for messages about its inputs.
      kernel: K, a tuple of one to three positive integers.
      strides: s, one for all axes or one for each.
      padding: `SAME`, `VALID`, or a pair for each axis.
      dilation: d, one for all axes or one for each.
      groups: G.
      called: the layer's word for its kernel.

    Raises:
      ValueError: an argument is out of range.
    """
    if not isinstance(kernel, tuple) or not 1 <= len(kernel) <= 3 or not _are_counts(kernel):
        raise ValueError(
            f"{factory}: {called} is {kernel!r}; it takes a tuple of one to three positive "
            "integers, a size for each axis of positions, such as (3, 3)."
        )
    rank = len(kernel)
    kernel = tuple(map(int, kernel))
    strides = _for_each_axis(factory, "strides", strides, rank)
    dilation = _for_each_axis(factory, "dilation", dilation, rank)
    padding = _padding(factory, padding, rank)
    return Windows(name, kernel, strides, padding, dilation, groups, called)


def make_output_padding(factory: str, windows: Windows, output_padding: Any) -> Shape:
    """The number of positions behind the outputs of a transposed layer, for each axis.

    Raises:
      ValueError: they are not numbers, at least 0, one for all axes or one for each; or the padding
        is SAME, which says how many outputs there are.
    """
    rank = len(windows.kernel)
    values = output_padding if isinstance(output_padding, tuple) else (output_padding,) * rank
    if len(values) != rank or not _are_sizes(values):
        raise ValueError(
            f"{factory}: output_padding is {output_padding!r}; it takes an integer, at least 0, or "
            f"a tuple of {rank}, one for each axis."
        )
    if any(values) and windows.padding == "SAME":
        raise ValueError(
            f"{factory}: output_padding is {output_padding!r}; with padding='SAME' each axis has "
            "its stride times as many outputs as inputs. Give a pair (before, after) for each axis?"
        )
    return tuple(map(int, values))


def _same_padding(size: int, k: int, s: int, d: int) -> tuple[int, int]:
    """The padding before and behind that makes ceil(S / s) windows on S positions."""
    count = -(-size // s)
    missing = max(Axis(k, s, 0, 0, d).covered(count) - size, 0)
    return missing // 2, missing - missing // 2


def _are_counts(values: Sequence[Any]) -> bool:
    return _are_sizes(values) and min(values) > 0


def _are_sizes(values: Sequence[Any]) -> bool:
    return all(
        isinstance(v, int | np.integer) and not isinstance(v, bool) and v >= 0 for v in values
    )


def _for_each_axis(factory: str, argument: str, value: Any, rank: int) -> tuple[int, ...]:
    """One number per axis, from one number for all axes or from a tuple."""
    values = value if isinstance(value, tuple) else (value,) * rank
    if len(values) != rank or not _are_counts(values):
        raise ValueError(
            f"{factory}: {argument} is {value!r}; it takes a positive integer, or a tuple of "
            f"{rank}, one for each axis."
        )
    return tuple(map(int, values))


def _padding(factory: str, padding: Any, rank: int) -> str | tuple[tuple[int, int], ...]:
    """The padding as it was given, with explicit pairs as tuples."""
    if padding in ("SAME", "VALID"):
        return padding
    try:
        pairs = tuple((before, after) for before, after in padding)
    except (TypeError, ValueError):
        pairs = ()
    sizes = [size for pair in pairs for size in pair]
    if len(pairs) != rank or not all(isinstance(p, int | np.integer) and p >= 0 for p in sizes):
        raise ValueError(
            f"{factory}: padding is {padding!r}; it takes 'SAME', 'VALID', or a pair (before, "
            f"after) for each of {rank} axes."
        )
    return tuple((int(before), int(after)) for before, after in pairs)
