"""What a module of PyTorch is translated to: a layer, and how numbers move between the two layouts.

PyTorch has channels first, weights [O, I] and optional batch axes; the library has channels last,
weights [I, O] and N in front of every example. A translation therefore consists of the network,
made with the public API, and of functions of arrays that only rearrange: transpose, reshape, split
and join (`rearranging` makes sure). Their transposes take gradients back to PyTorch's layout.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

import jaxbp as bp


class CannotBeWrittenError(Exception):
    """A case that the library has no layer or loss for. The message says why, in a sentence."""


class Written(NamedTuple):
    """A module of PyTorch, written with the library.

    Attributes:
      layer: the network.
      inputs: the inputs of the network, from the inputs of the module that have a derivative.
      outputs: the outputs of the module, from those of the network or, if there is a loss, from the
        loss's terms.
      params: the parameters of the network, from those of the module by name.
      loss: the loss on the outputs of the network, or None.
      targets: the targets of the loss.
      n_outputs: how many of the module's outputs these are, from the first on; None means all.
    """

    layer: bp.Layer
    inputs: Callable[..., Any]
    outputs: Callable[[Any], Any]
    params: Callable[[dict[str, Any]], Any] = lambda _: ()
    loss: bp.Loss | None = None
    targets: Any = None
    n_outputs: int | None = None


class Part(NamedTuple):
    """A part of a network, and its parameters from those of a module of PyTorch by name."""

    layer: bp.Layer
    params: Callable[[dict[str, Any]], Any]


def under(params: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The parameters of a part of a module, by their names in the part."""
    start = f"{prefix}."
    return {k.removeprefix(start): array for k, array in params.items() if k.startswith(start)}


class Layout(NamedTuple):
    """How an array of PyTorch is laid out in the library.

    Attributes:
      into: PyTorch's array in the library's layout.
      back: an array in the library's layout in PyTorch's.
    """

    into: Callable[[Any], Any]
    back: Callable[[Any], Any]


def channels_last(x, n_axes: int) -> Layout:
    """The layout of [N, C, *S] or [C, *S] with this number of axes S: [N, *S, C]."""
    batched = x.ndim == n_axes + 2

    def into(x):
        return jnp.moveaxis(x if batched else x[None], 1, -1)

    def back(y):
        y = jnp.moveaxis(y, -1, 1)
        return y if batched else y[0]

    return Layout(into, back)


def examples(x, n_axes: int) -> Layout:
    """The layout of examples with this number of axes: N is added if it is missing."""
    if x.ndim > n_axes:
        return Layout(lambda x: x, lambda y: y)
    return Layout(lambda x: x[None], lambda y: y[0])


def sequences(x, *, batch_first: bool) -> Layout:
    """The layout of [T, O], and of [N, T, O] or, if not `batch_first`, [T, N, O]: [N, T, O]."""
    if x.ndim == 2 or batch_first:
        return examples(x, 2)
    return Layout(lambda x: jnp.swapaxes(x, 0, 1), lambda y: jnp.swapaxes(y, 0, 1))


def to_array(tensor):
    """A tensor of PyTorch as an array of JAX."""
    return jnp.asarray(tensor.detach().numpy())
