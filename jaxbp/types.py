"""The records everything is made of, and the letters used throughout.

A network is a `Layer`, and so is each of its parts: a few pure functions that fit together. What
it is asked to do better is a `Loss`. Neither knows of the other: they meet in an array of outputs
on the way up, and in its derivative, delta, on the way down. Which weights carry that down is for
a `Rule` to say.

Letters, for shapes in brackets and for indices in formulas:

  N   examples, always the first axis of data     n   one example
  M   other examples, to compare N with           m   one of them
  T   positions that share a weight (a sequence,  t   one position
      the pixels of an image): there may be none,
      or several axes of them
  I   inputs of a layer                           i   one input
  O   outputs of a layer                          o   one output
  C   classes                                     c   one class
  K   columns of a matrix factor                  k   one column
  L   stacked layers
  V   rows of a table                             v   one row

  E      the loss of one example
  x, y   what goes into a layer's forward, and what comes out of it
  dy, dx   dE/dy, which goes into its backward, and dE/dx, which comes out of it
  delta  the derivative of the loss with respect to some layer's output
  W, B   the weights that lead forward, and those that lead the error back in their place
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Layer(NamedTuple):
    """A layer or a whole network: a name and three pure functions.

    Attributes:
      name: what messages and tables call it, such as `dense(10)`.
      init: `init(key, shape) -> (params, out_shape)`. `shape` is that of one example, without N.
        A layer without parameters has `()`. What cannot be composed is refused here.
      forward: `forward(params, x, *, key=None) -> (y, cache)`. The cache is what backward will
        need. A layer that draws random numbers takes them from `key`, and is deterministic
        without one.
      backward: `backward(params, cache, dy, *, read=keep) -> (dx, readings)`. The readings have
        the tree structure of `params`, each parameter replaced by `read(signal)`. The first
        argument is the tree that carries the error down: pass another of the same structure, and
        the learning rule has changed.
    """

    name: str
    init: Callable[..., tuple[Any, tuple[int, ...]]]
    forward: Callable[..., tuple[jax.Array, Any]]
    backward: Callable[..., tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Loss:
    """How far outputs are from their targets, called as `loss(outputs, targets) -> (value, delta)`.

    The value is that of each example, [N], and delta its derivative with respect to the outputs,
    of their shape. Nothing is averaged over examples; an example's positions are summed.

    Attributes:
      name: what messages and tables call it.
      terms: `terms(outputs, targets) -> (terms [N, ...], delta)`, where an example's value is the
        sum of its terms, and a term's axes are the first of the outputs'. Its docstring is the
        loss's.
      sample: `sample(key, outputs, targets=None) -> targets`, drawn from the distribution
        p(target | outputs) of which the loss is the negative logarithm, up to a constant, so that
        the mean of delta delta^T over the draws is the loss's Hessian. What `targets` says beside
        the answer is kept in a form for which that holds: of weights, the square root.
      hessian_factor: `hessian_factor(outputs, targets) -> columns [K, ...outputs' shape]` with
        `sum_k s_k s_k^T` the Hessian of one position's loss with respect to its O outputs.
    """

    name: str
    terms: Callable[..., tuple[jax.Array, jax.Array]]
    sample: Callable[..., Any]
    hessian_factor: Callable[..., jax.Array]

    def __post_init__(self):
        # A loss is documented where its formula is, not where all losses are.
        object.__setattr__(self, "__doc__", self.terms.__doc__)

    def __call__(self, outputs, targets):
        """The value of each example, [N], and its derivative with respect to the outputs."""
        terms, delta = self.terms(outputs, targets)
        return jnp.sum(terms, axis=range(1, terms.ndim)), delta


class Rule(NamedTuple):
    """Which weights carry the error back: a rule makes, chooses and updates the tree for backward.

    Attributes:
      name: what messages and tables call it.
      make: `make(key, net, shape) -> state`, before training. `shape` is that of one example. The
        state is a pytree of arrays, `()` for a rule that remembers nothing.
      choose: `choose(state, params, *, key=None) -> tree`, the first argument of `net.backward`.
        `key` is for rules that draw anew for each batch.
      update: `update(state, params, *, move, key=None) -> state`, after each step of the optimizer.
        `params` are the new parameters, and `move(tree)` moves another tree like them as the
        optimizer has just moved them: by the same gradients and its state before the step, and by
        the tree's own weight decay.
    """

    name: str
    make: Callable[..., Any]
    choose: Callable[..., Any]
    update: Callable[..., Any]


class LayerError(ValueError):
    """A layer was composed or called wrongly: which one, where it stands, and what to do.

    Attributes:
      name: the name of the layer.
      problem: what is wrong with it, a sentence that continues the name.
      places: where the layer stands, from the outermost combinator inwards.
    """

    def __init__(self, name, problem, places=()):
        """Takes the name of the layer, what is wrong with it, and where it stands."""
        super().__init__(name, problem, places)
        self.name, self.problem, self.places = name, problem, places

    def __str__(self):
        """The message: `chain: part 3 (dense(10)) got ...`, or `dense(10) got ...` on its own."""
        return f"{self.where} {self.problem}"

    @property
    def where(self):
        """Which layer it is: `chain: part 3 (dense(10))`, or `dense(10)` on its own."""
        return f"{': '.join(self.places)} ({self.name})" if self.places else self.name

    def inside(self, place):
        """The same error seen from outside, where the layer stands at `place`."""
        return LayerError(self.name, self.problem, (place, *self.places))


def show_shape(shape):
    """A shape as messages write it: `[N, 28, 28]`, each axis a size or a letter."""
    return "[" + ", ".join(map(str, shape)) + "]"


def show_path(path):
    """The path of a leaf in a tree as messages write it: `0.weight`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def split_keys(key, n):
    """A key for each of n parts, or None for each."""
    return (None,) * n if key is None else tuple(jax.random.split(key, n))


def widened(x):
    """Numbers of 16 bits as 32, others as they are: for sums that would round or overflow."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
    return x.astype(jnp.float32) if narrow else x


def weighed(deltas, weights):
    """Each example's deltas [N, ..., O] times its weight, [N]; as they are if there are none."""
    if weights is None:
        return deltas
    if jnp.shape(weights) != deltas.shape[:1]:
        raise ValueError(
            f"weights has shape {show_shape(jnp.shape(weights))}, expected [{len(deltas)}]: "
            "one for each example."
        )
    weights = jnp.asarray(weights, deltas.dtype)
    return deltas * weights.reshape(-1, *[1] * (deltas.ndim - 1))
