"""The records that everything is made of, and the letters used throughout.

A network is a `Layer`, and so is each of its parts: a few pure functions that fit together. What
the network should do better is a `Loss`. The two meet in plain arrays: the network's outputs in the
forward pass, and their derivative, delta, in the backward pass. A `Rule` says which weights carry
the error back.

Letters, for shapes in brackets and for indices in formulas:

    N   examples, always the first axis of data     n   one example
    M   other examples, to compare N with           m   one of them
    T   positions that share a weight (a sequence,  t   one position
        the pixels of an image): none, one axis,
        or several axes
    I   inputs of a layer                           i   one input
    O   outputs of a layer                          o   one output
    C   classes                                     c   one class
    K   columns of a matrix factor                  k   one column
    L   stacked layers
    V   rows of a table                             v   one row

    E      the loss of one example
    x, y   the input and the output of a layer's forward
    dy, dx   dE/dy, the input of its backward, and dE/dx, the output of its backward
    delta  the derivative of the loss with respect to the output of some layer
    W, B   the weights of the forward pass, and the weights that carry the error back instead
"""

import contextlib
import dataclasses
import json
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import ArrayLike

__all__ = [
    "Backward",
    "Forward",
    "Init",
    "Layer",
    "LayerError",
    "Loss",
    "LossFunction",
    "Params",
    "PyTree",
    "Reading",
    "Rule",
]

PyTree: TypeAlias = Any  # a tree of arrays: nested tuples, lists, dicts and records
Params: TypeAlias = PyTree  # the parameters of a layer, or a tree of the same structure
Shape: TypeAlias = tuple[int, ...]  # of one example, without N
Reading: TypeAlias = Callable[[Any], Any]  # of one signal, such as `mean`
Record = TypeVar("Record")


class Init(Protocol):
    """The first function of a `Layer`."""

    def __call__(self, key: jax.Array, shape: Any, /) -> tuple[Params, Any]:
        """Draws parameters for examples of this shape; returns them and the shape of the output."""
        ...


class Forward(Protocol):
    """The second function of a `Layer`."""

    def __call__(
        self, params: Params, x: PyTree, /, *, key: jax.Array | None = None
    ) -> tuple[Any, PyTree]:
        """Returns the outputs y [N, ...], and the cache for `backward`."""
        ...


class Backward(Protocol):
    """The third function of a `Layer`."""

    def __call__(
        self, params: Params, cache: PyTree, dy: Any, /, *, read: Reading = ...
    ) -> tuple[Any, PyTree]:
        """Returns dx, and what `read` gives for the signal of each parameter."""
        ...


class Layer(NamedTuple):
    """A layer or a whole network: a name and three pure functions.

    Attributes:
      name: the name in messages and tables, such as `dense(10)`.
      init: `init(key, shape) -> (params, out_shape)`. `shape` is the shape of one example, without
        N. A layer without parameters has `()`. Compositions that do not fit are refused here.
      forward: `forward(params, x, *, key=None) -> (y, cache)`. The cache is what backward will
        need. A layer that draws random numbers takes them from `key`, and is deterministic
        without one.
      backward: `backward(params, cache, dy, *, read=keep) -> (dx, readings)`. The readings have
        the tree structure of `params`, with each parameter replaced by `read(signal)`. The first
        argument is the tree that carries the error: pass another tree of the same structure, and
        the learning rule has changed.
    """

    name: str
    init: Init
    forward: Forward
    backward: Backward


@dataclasses.dataclass(frozen=True)
class Loss:
    """How far outputs are from their targets: `loss(outputs, targets) -> (value, delta)`.

    `value` [N] is the loss of each example, and `delta` its derivative with respect to the outputs,
    of their shape. Nothing is averaged over examples; the positions of an example are summed.

    Attributes:
      name: the name in messages and tables.
      terms: `terms(outputs, targets) -> (terms [N, ...], delta)`. The value of an example is the
        sum of its terms, and the axes of a term are the first axes of the outputs. Its docstring
        becomes the docstring of the loss.
      sample: `sample(key, outputs, targets=None) -> targets`, drawn from the distribution
        p(target | outputs) whose negative logarithm is the loss, up to a constant. The mean of
        delta delta^T over the draws is then the Hessian of the loss. If targets hold weights
        beside the answer, the drawn targets hold the square roots of the weights, so that this
        stays true.
      hessian_factor: `hessian_factor(outputs, targets) -> columns [K, ...outputs' shape]` with
        `sum_k s_k s_k^T` the Hessian of one position's loss with respect to its O outputs.
      right: `right(outputs, targets, top) -> (right, weights)`, for each term whether the label is
        among the `top` largest outputs, and how much the term counts. None for a loss without
        labels.
      filler: a target that the loss takes for any outputs, which `weighted` puts where the weight
        is 0; or a function of C that returns it. None stands for class 0, and for equal
        probabilities.
    """

    name: str
    terms: Callable[..., tuple[jax.Array, jax.Array]]
    sample: Callable[..., Any]
    hessian_factor: Callable[..., jax.Array]
    right: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    filler: float | Callable[[int], float] | None = None

    def __post_init__(self):
        # Each loss is documented where its formula is, not by this class.
        object.__setattr__(self, "__doc__", self.terms.__doc__)

    def __call__(self, outputs: jax.Array, targets: PyTree) -> tuple[jax.Array, jax.Array]:
        """The value of each example, [N], and its derivative with respect to the outputs."""
        terms, delta = self.terms(outputs, targets)
        return jnp.sum(terms, axis=range(1, terms.ndim)), delta


# A loss, or any function `(outputs, targets) -> (value [N], delta)`.
LossFunction: TypeAlias = Loss | Callable[[Any, Any], tuple[jax.Array, jax.Array]]


class Rule(NamedTuple):
    """Which weights carry the error back: makes, chooses and updates the tree for backward.

    Attributes:
      name: the name in messages and tables.
      make: `make(key, net, shape) -> state`, before training. `shape` is the shape of one example.
        The state is a pytree of arrays, `()` for a rule without a state.
      choose: `choose(state, params, *, key=None) -> tree`, the first argument of `net.backward`.
        `key` is for rules that draw anew for each batch.
      update: `update(state, params, *, move, key=None) -> state`, after each step of the optimizer.
        `params` are the new parameters. `move(tree)` updates another tree of their structure as the
        optimizer has just updated them: by the same gradients, its state before the step, and the
        tree's own weight decay.
    """

    name: str
    make: Callable[..., PyTree]
    choose: Callable[..., Params]
    update: Callable[..., PyTree]


class LayerError(ValueError):
    """A layer was composed or called wrongly: which layer, where it stands, and what to do.

    Attributes:
      name: the name of the layer.
      problem: what is wrong with it, a sentence that continues the name.
      places: where the layer stands, from the outermost combinator inwards.
    """

    def __init__(self, name: str, problem: str, places: tuple[str, ...] = ()):
        """Takes the name of the layer, what is wrong with it, and where it stands."""
        super().__init__(name, problem, places)
        self.name, self.problem, self.places = name, problem, places

    def __str__(self) -> str:
        """The message: `chain: part 3 (dense(10)) got ...`, or `dense(10) got ...` on its own."""
        return f"{self.where} {self.problem}"

    @property
    def where(self) -> str:
        """Which layer it is: `chain: part 3 (dense(10))`, or `dense(10)` on its own."""
        return f"{': '.join(self.places)} ({self.name})" if self.places else self.name

    def inside(self, place: str) -> "LayerError":
        """The same error seen from outside, where the layer stands at `place`."""
        return LayerError(self.name, self.problem, (place, *self.places))


def show_shape(shape: Any) -> str:
    """A shape as messages write it: `[N, 28, 28]`, each axis a size or a letter."""
    return "[" + ", ".join(map(str, shape)) + "]"


def exportable(record: type[Record]) -> type[Record]:
    """Lets `jax.export` serialize programs that take or return a record, a `NamedTuple`.

    A decorator for every record that stands in a tree of arrays outside a single call. Serialized
    programs hold its name and its fields: renaming either makes them unreadable.
    """
    with contextlib.suppress(ValueError):  # after a reload, the name is that of the first class
        export.register_namedtuple_serialization(record, serialized_name=f"jaxbp.{record.__name__}")
    return record


def register_static(record: type[Record], make: Callable[..., Record]) -> None:
    """Makes a frozen dataclass a node of trees without leaves, which `jax.export` can serialize.

    Args:
      record: the class. Its fields are strings, numbers and tuples.
      make: makes the record again from its fields, in which every record is a plain tuple.
    """

    def serialize(node):
        return json.dumps(dataclasses.astuple(node), default=int).encode()  # NumPy's integers

    def deserialize(data):
        return make(*_as_tuples(json.loads(data)))

    jax.tree_util.register_static(record)
    with contextlib.suppress(ValueError):  # as for `exportable`
        export.register_pytree_node_serialization(
            record,
            serialized_name=f"jaxbp.{record.__name__}",
            serialize_auxdata=serialize,
            deserialize_auxdata=deserialize,
        )


def _as_tuples(value):
    """The tuples that JSON made lists."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def is_shape(node: Any) -> bool:
    """Whether a node of a tree of shapes is the shape of one array."""
    return isinstance(node, tuple | list) and all(isinstance(n, numbers.Integral) for n in node)


def show_shapes(tree: Any) -> str:
    """A shape or a tree of shapes as messages write it: `[3]`, or `([3], [5, 2])`."""
    if is_shape(tree):
        return show_shape(tree)
    shapes = jax.tree.leaves(tree, is_leaf=is_shape)
    return f"({', '.join(show_shape(s) if is_shape(s) else repr(s) for s in shapes)})"


def show_path(path: Any) -> str:
    """The path of a leaf in a tree as messages write it: `0.weight`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def split_keys(key: jax.Array | None, n: int) -> tuple[jax.Array | None, ...]:
    """One key for each of n parts, or None for each."""
    return (None,) * n if key is None else tuple(jax.random.split(key, n))


def shape_alone(x: jax.Array) -> jax.Array:
    """An array [0, *x's shape] without numbers, in which a cache keeps the shape and dtype of x.

    Unlike a tuple of integers it passes through `jit` and `scan`.
    """
    return jnp.zeros((0, *x.shape), x.dtype)


def widened(x: jax.Array) -> jax.Array:
    """Converts 16-bit numbers to 32 bits for sums that would round or overflow."""
    return x.astype(wide_dtype(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x


def wide_dtype(dtype: Any) -> Any:
    """The dtype in which floating-point numbers of a dtype are summed, of at least 32 bits."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def unit_of(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """The power of two next to the largest entry along some axes, which are kept with size 1.

    Divided by it, entries have squares that neither overflow nor vanish. It and its inverse can be
    represented, even for infinity. For zero it is 1. It is a constant for derivatives: it cancels
    from a norm.
    """
    info = jnp.finfo(x.dtype)
    peak = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=axis, keepdims=True, initial=0)
    peak = jnp.where(peak == 0, 1, jnp.clip(peak, float(info.tiny), float(1 / info.tiny)))
    return jax.lax.reduce_precision(peak, exponent_bits=info.nexp, mantissa_bits=0)


def length_and_direction(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The length |x| of vectors [..., O], as [..., 1], and x / |x|; both are 0 for x = 0.

    Squares are of `unit_of`, so lengths of all sizes are right, and all derivatives are finite.
    """
    unit = unit_of(x, axis=-1)
    scaled = x / unit
    squares = jnp.sum(scaled * scaled, axis=-1, keepdims=True)
    is_zero = squares == 0
    root = jnp.sqrt(jnp.where(is_zero, 1, squares))  # the root has no derivative at 0
    return jnp.where(is_zero, 0, unit * root), jnp.where(is_zero, 0, scaled / root)


def weighed(deltas: jax.Array, weights: ArrayLike | None) -> jax.Array:
    """Multiplies each example's deltas [N, ..., O] by its weight, [N], in at least 32 bits.

    A product in 16 bits would round the weight too, and could be too small. None stands for ones.
    """
    if weights is None:
        return deltas
    if jnp.shape(weights) != deltas.shape[:1]:
        raise ValueError(
            f"weights has shape {show_shape(jnp.shape(weights))}, expected [{deltas.shape[0]}]: "
            "one for each example."
        )
    factors = jnp.asarray(weights, wide_dtype(deltas.dtype))
    return widened(deltas) * factors.reshape(-1, *[1] * (deltas.ndim - 1))
