"""Checks of the arguments, inputs and parameters of layers, with the messages of their errors.

Each raises if its condition does not hold. `name` is the name of the layer or of its factory, with
which the message begins.
"""

import contextlib
import math
import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxbp.types import Layer, LayerError, Shape, is_shape, show_path, show_shape, show_shapes

# Functions of jax.nn by their `__name__`, and the layers that compute the same.
ACTIVATIONS = {
    name: name
    for name in (
        "celu elu gelu glu hard_sigmoid hard_tanh leaky_relu log_sigmoid log_softmax mish relu "
        "relu6 selu sigmoid silu softmax softplus tanh"
    ).split()
} | {"hard_silu": "hardswish", "hard_swish": "hardswish", "soft_sign": "softsign", "swish": "silu"}


def require_positive(name: str, argument: str, value: Any) -> None:
    """Raises unless the value of an argument is a number above zero."""
    if isinstance(value, bool | np.bool_ | str) or np.ndim(value) or value is None or not value > 0:
        raise ValueError(f"{name}: {argument} is {value}; it takes a positive number.")


def require_drop_prob(name: str, value: Any) -> None:
    """Raises unless the value of `drop_prob` is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < 1:
        raise ValueError(f"{name}: drop_prob is {value}; it takes a number in [0, 1).")


def require_number(name: str, argument: str, value: Any, *, least: float = -math.inf) -> float:
    """Returns a finite real number, at least `least`, as one of Python; raises otherwise.

    Numbers and arrays of NumPy and JAX have a dtype, to which they would convert 16-bit inputs.
    """
    number = math.nan
    if not isinstance(value, bool | np.bool_ | str) and np.ndim(value) == 0:
        with contextlib.suppress(TypeError, ValueError):
            number = float(value)
    if not math.isfinite(number) or number < least:
        bound = "" if least == -math.inf else f" of at least {least}"
        raise ValueError(f"{name}: {argument} is {value!r}; it takes a finite number{bound}.")
    return number


def require_nonzero(name: str, argument: str, value: Any) -> float:
    """Returns a finite number other than zero as one of Python; raises otherwise."""
    number = require_number(name, argument, value)
    if number == 0:
        raise ValueError(
            f"{name}: {argument} is {value!r}; it takes a finite number other than zero. "
            "Use relu()?"
        )
    return number


def require_integer(name: str, argument: str, value: Any) -> int:
    """Returns an integer, of Python or of NumPy, as one of Python; raises otherwise."""
    if not is_integer(value):
        raise ValueError(f"{name}: {argument} is {value!r}; it takes an integer.")
    return int(value)


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, of Python or of NumPy; booleans are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def require_count(name: str, argument: str, value: Any) -> int:
    """Returns an integer above zero, of Python or of NumPy, as one of Python; raises otherwise.

    Products of NumPy's short integers could overflow.
    """
    if not is_count(value):
        raise ValueError(f"{name}: {argument} is {value!r}; it takes a positive integer.")
    return int(value)


def is_count(value: Any) -> bool:
    """Whether a value is an integer above zero, of Python or of NumPy; booleans are not."""
    return is_integer(value) and int(value) > 0


def require_function(name: str, argument: str, value: Any) -> None:
    """Raises unless the value of an argument can be called."""
    if not callable(value):
        raise TypeError(f"{name}: {argument} is {value!r}; it takes a function.")


def require_key(name: str, argument: str, key: Any) -> None:
    """Raises unless the value of an argument is None or one random key of JAX."""
    if key is None:
        return
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if shape == ():
            return
    elif dtype == np.uint32 and shape is not None and len(shape) == 1:  # of jax.random.PRNGKey
        return
    got = repr(key) if shape is None else f"an array of {dtype} {show_shape(shape)}"
    raise ValueError(f"{name}: {argument} is {got}; it takes one key, such as jax.random.key(0).")


def require_shape(name: str, shape: Any) -> Shape:
    """Returns the shape of one example as a tuple; raises unless it is a shape."""
    if not isinstance(shape, tuple | list) or not all(map(is_count, shape)):
        raise LayerError(
            name,
            f"got {shape!r} for the shape of one example; it takes a tuple of positive integers, "
            "such as (64,), without N.",
        )
    return tuple(map(int, shape))


def require_last_axis(name: str, shape: Any, letter: str) -> Shape:
    """Returns the shape of one example; raises unless it has an axis, called `letter`."""
    shape = require_shape(name, shape)
    if not shape:
        raise LayerError(
            name,
            f"got inputs of shape [N]; it takes [N, ..., {letter}]. Give each example an axis?",
        )
    return shape


def require_axis(name: str, axis: int, shape: Any) -> int:
    """Returns which axis of one example is meant, from 0; raises unless there is one.

    Axes are counted from 0 without N, and negative ones from the last.
    """
    shape = require_shape(name, shape)
    if not -len(shape) <= axis < len(shape):
        raise LayerError(
            name,
            f"got inputs of shape {show_shape(('N', *shape))}, without an axis {axis}: axes are "
            "counted from 0 after N, or backwards from -1.",
        )
    return axis % len(shape)


def require_positions(name: str, shape: Shape, axes: int | None = None) -> Shape:
    """Returns the shape [*S, O] of one example; raises unless it has axes of positions.

    If `axes` is given, it has to have so many.
    """
    fits = len(shape) > 1 if axes is None else len(shape) == axes + 1
    if not fits:
        takes = f"{axes} {'axis' if axes == 1 else 'axes'} of positions"
        if axes is None:
            takes = "[N, ..., O], with axes of positions"
        got = show_shape(("N", *shape))
        raise LayerError(name, f"got inputs of shape {got}; it takes {takes}.")
    return shape


def require_sizes(name: str, sizes: Any) -> tuple[int | None, ...]:
    """Returns the new sizes of the axes of positions; raises unless they are integers or None."""
    are_sizes = isinstance(sizes, tuple) and all(s is None or is_count(s) for s in sizes)
    if not are_sizes or not sizes:
        raise ValueError(
            f"{name}: sizes is {sizes!r}; it takes a tuple of positive integers, one for each axis "
            "of positions, or None for an axis that keeps its size."
        )
    return tuple(s if s is None else int(s) for s in sizes)


# The kinds of NumPy's dtypes that JAX has not: objects, strings, bytes, and dates.
NO_NUMBERS = set("OUSMm")


def require_examples(name: str, **trees: Any) -> int:
    """Returns N, the first axis of every array in some trees; raises unless all have the same N.

    Args:
      name: the call or layer, for messages.
      **trees: trees of arrays by their name in messages, such as `inputs=` and `targets=`.
    """
    first = None
    for what, tree in trees.items():
        for path, leaf in jax.tree.leaves_with_path(tree):
            if not hasattr(leaf, "shape"):
                raise ValueError(f"{name}: {_place(what, path)} is {leaf!r}; it takes an array.")
            if getattr(leaf.dtype, "kind", None) in NO_NUMBERS:
                raise ValueError(
                    f"{name}: {_place(what, path)} is an array of dtype {leaf.dtype}; it takes "
                    "numbers."
                )
            if not leaf.shape:
                raise ValueError(
                    f"{name}: {_place(what, path)} has shape []; its first axis has to count the "
                    "examples, [N, ...]."
                )
            first = first or (_place(what, path), leaf.shape)
            if leaf.shape[0] != first[1][0]:
                raise ValueError(
                    f"{name}: {first[0]} has {first[1][0]} examples (shape "
                    f"{show_shape(first[1])}), and {_place(what, path)} has {leaf.shape[0]} (shape "
                    f"{show_shape(leaf.shape)}). The first axis of each has to be N."
                )
    if first is None:
        raise ValueError(f"{name}: {' and '.join(trees)} have no arrays, so there are no examples.")
    if first[1][0] == 0:
        raise ValueError(f"{name}: {first[0]} has shape {show_shape(first[1])}: no examples.")
    return first[1][0]


def _place(what: str, path: Any) -> str:
    """The name of an array of a tree in messages, such as `inputs.0`."""
    return f"{what}.{show_path(path)}" if path else what


def require_array(name: str, x: Any, what: str = "inputs") -> None:
    """Raises unless something is an array of numbers; `what` names it in messages."""
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise LayerError(name, f"got {what} of type {type(x).__name__}; it takes an array.")
    if getattr(x.dtype, "kind", None) in NO_NUMBERS:
        raise LayerError(name, f"got {what} of dtype {x.dtype}; it takes numbers.")
    if not x.shape:
        raise LayerError(name, f"got {what} of shape []; it takes [N, ...].")


def require_like(name: str, argument: str, tree: Any, params: Any) -> None:
    """Raises unless a tree has the structure of the parameters, and their shapes and dtypes."""
    difference = first_difference(tree, params)
    if difference is not None:
        raise ValueError(f"{name}: {argument} is not a tree like params: {difference}.")


def first_difference(tree: Any, like: Any, *, dtypes: bool = True) -> str | None:
    """Where a tree first differs from another in structure or shape, in words; or None.

    With `dtypes`, a difference of dtypes counts too.
    """
    got, expected = (
        {show_path(path): leaf for path, leaf in jax.tree.leaves_with_path(t)} for t in (tree, like)
    )
    for path, leaf in expected.items():
        if path not in got:
            return f"it has no {path}" if path else "it is not one array"
        if not hasattr(got[path], "dtype"):
            return f"{path} is {got[path]!r}, expected an array".lstrip()
        shapes = [
            f"{a.dtype} {show_shape(a.shape)}" if dtypes else f"shape {show_shape(a.shape)}"
            for a in (got[path], leaf)
        ]
        if shapes[0] != shapes[1]:
            return f"{path} has {shapes[0]}, expected {shapes[1]}".lstrip()
    for path in got:
        if path not in expected:
            return f"it has {path or 'one array'}, expected none there"
    structures = jax.tree.structure(tree), jax.tree.structure(like)
    if structures[0] != structures[1]:
        return f"its structure is {structures[0]}, expected {structures[1]}"
    return None


def require_floats(
    name: str, x: Any, dtype: DTypeLike | None = None, *, what: str = "inputs"
) -> None:
    """Raises unless inputs are an array of floating-point numbers, and of `dtype` if given."""
    require_array(name, x, what)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise LayerError(
            name, f"got {what} of dtype {x.dtype}; it takes floating-point numbers. Convert them?"
        )
    if dtype is not None and x.dtype != dtype:
        raise LayerError(
            name, f"got {what} of dtype {x.dtype}, but its parameters are {dtype}. Convert one?"
        )


def require_mask(name: str, mask: Any) -> None:
    """Raises unless a mask is None or an array of booleans, [T] or [N, T]."""
    if mask is not None and (
        not hasattr(mask, "dtype") or mask.dtype != bool or mask.ndim not in (1, 2)
    ):
        got = show_shape(np.shape(mask))
        raise ValueError(
            f"{name}: mask is of type {getattr(mask, 'dtype', type(mask).__name__)} and shape "
            f"{got}; it takes an array of booleans, [T] or [N, T]."
        )


def require_fit(name: str, mask: Any, n: int | str, shape: Shape, hint: str = "") -> None:
    """Raises unless a mask fits the positions of inputs [n, *shape]; the message ends with a hint.

    In init, where the number of examples is not known, n is the letter N.
    """
    if mask is None or mask.shape == shape[:1]:
        return
    if mask.ndim == 2 and mask.shape[1] == shape[0] and n in ("N", mask.shape[0]):
        return
    raise LayerError(
        name,
        f"has a mask of shape {show_shape(mask.shape)}; inputs of shape "
        f"{show_shape((n, *shape))} take [{shape[0]}] or {show_shape((n, shape[0]))}.{hint}",
    )


def require_delta(name: str, dy: Any, shape: Shape) -> None:
    """Raises unless dy has the shape of the outputs; another shape could broadcast silently."""
    if getattr(dy, "shape", None) != shape:
        got = show_shape(dy.shape) if hasattr(dy, "shape") else None
        raise LayerError(
            name,
            f"got a dy of {f'shape {got}' if got else f'type {type(dy).__name__}'}; its outputs "
            f"are {show_shape(shape)}. Do dy and the cache belong to the same batch?",
        )
    require_floats(name, dy, what="a dy")


def entries_of(tree: Any) -> tuple[list[Any], Any]:
    """The entries of a tuple or dict of arrays or of shapes, and its structure; of one, itself."""
    several = isinstance(tree, tuple | list | dict) and not is_shape(tree)
    return jax.tree.flatten(tree, is_leaf=lambda node: not several or node is not tree)


def require_pair(name: str, tree: Any, what: str = "inputs") -> list[Any]:
    """Returns the two entries of a tuple or dict of arrays or of shapes; raises unless it has two.

    Whether the entries are arrays or shapes is not checked.
    """
    entries, _ = entries_of(tree)
    if len(entries) != 2:
        raise LayerError(name, f"got {what} of {len(entries)} arrays; it takes a pair of them.")
    return entries


def require_float_pair(name: str, x: Any, what: str = "inputs") -> list[Any]:
    """Returns the two arrays of a pair; raises unless they are floats of one dtype."""
    pair = require_pair(name, x, what)
    for own in pair:
        require_floats(name, own, what=what)
    if pair[0].dtype != pair[1].dtype:
        got = " and ".join(str(own.dtype) for own in pair)
        raise LayerError(name, f"got {what} of dtypes {got}; it takes one dtype. Convert one?")
    return pair


def require_same_shapes(name: str, shape: Any, other: Any, what: str = "inputs") -> None:
    """Raises unless the shapes of two inputs are equal."""
    if tuple(shape) != tuple(other):
        raise LayerError(
            name,
            f"got {what} of shapes {show_shape(shape)} and {show_shape(other)}; it takes equal "
            "shapes.",
        )


def require_deltas(name: str, dy: Any, outputs: Any) -> None:
    """Raises unless dy is a tree like the outputs; where these are integers it may be anything."""
    structure = jax.tree.structure(outputs)
    try:
        parts = structure.flatten_up_to(dy)
    except ValueError:
        raise LayerError(
            name, f"got a dy of structure {jax.tree.structure(dy)}; its outputs are {structure}."
        ) from None
    for part, y in zip(parts, jax.tree.leaves(outputs), strict=True):
        if jnp.issubdtype(y.dtype, jnp.floating):
            require_delta(name, part, y.shape)


def require_same_outputs(name: str, what: str, *outputs: Any) -> None:
    """Raises unless trees have the same structure and shapes; `what` is what needs that."""
    first, *others = (jax.tree.map(lambda y: jnp.shape(y), tree) for tree in outputs)
    if any(other != first for other in others):
        got = ", ".join(map(_show_shapes, outputs))
        raise LayerError(name, f"has arrays of shapes {got}; {what} needs equal shapes.")


def _show_shapes(tree: Any) -> str:
    """The shapes of the arrays of a tree, for messages."""
    shapes = [show_shape(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree)]
    return shapes[0] if len(shapes) == 1 else f"({', '.join(shapes)})"


def require_shape_alone(name: str, cache: Any) -> Shape:
    """Returns the shape of x from a cache that is `shape_alone(x)`; raises unless it is one."""
    require_array(name, cache, "a cache")
    if cache.shape[0] != 0 or len(cache.shape) < 2:
        raise LayerError(
            name,
            f"got a cache that is not its own: {_outline(cache)}; it takes the one that forward "
            "returned. The order is backward(params, cache, dy).",
        )
    return cache.shape[1:]


def require_cache(name: str, cache: Any, n: int) -> None:
    """Raises unless a cache is a tuple of n entries, as forward returned it."""
    if not isinstance(cache, tuple) or len(cache) != n:
        raise LayerError(
            name,
            f"got a cache that is not its own: {_outline(cache)}; it takes the tuple of {n} that "
            "forward returned. The order is backward(params, cache, dy).",
        )


def require_call(name: str, net: Any, loss: Any) -> None:
    """Raises unless a call gets a Layer and a loss; `name` is the call."""
    require_layer(f"{name}: net", net)
    require_function(name, "loss", loss)


def require_params(name: str, params: Any, shapes: dict[str, Any]) -> None:
    """Raises unless parameters are floating-point arrays of these shapes, all of one dtype.

    Another shape could broadcast: the outputs would be right, and the gradient, which has the shape
    that belongs here, would change the shape of the parameter.

    Args:
      name: the name of the layer.
      params: its parameters, or the tree that carries the error in their place.
      shapes: the shape of each parameter by its name, or a tuple of shapes if it is a tuple of
        arrays. A letter stands for any size.
    """
    if not isinstance(params, dict) or set(params) != set(shapes):
        raise LayerError(
            name,
            f"got parameters that are not its own: {_outline(params)}; it takes a dict of "
            f"{' and '.join(shapes)}. Are they those of another network?",
        )
    dtypes = {}
    for leaf, param, wanted in _with_shapes(name, params, shapes):
        _require_param(name, leaf, param, wanted)
        dtypes[param.dtype] = leaf
    if len(dtypes) > 1:
        got = " and ".join(f"a {leaf} of dtype {dtype}" for dtype, leaf in dtypes.items())
        raise LayerError(name, f"got {got}; it takes one dtype for all. Convert them?")


def _with_shapes(name: str, params: dict[str, Any], shapes: dict[str, Any]) -> Iterator[Any]:
    """The name, the value and the shape of each parameter, also of those in tuples."""
    for leaf, shape in shapes.items():
        if not any(isinstance(part, tuple) for part in shape):
            yield leaf, params[leaf], shape
        elif isinstance(params[leaf], tuple) and len(params[leaf]) == len(shape):
            parts = zip(params[leaf], shape, strict=True)
            yield from ((f"{leaf}.{i}", *pair) for i, pair in enumerate(parts))
        else:
            raise LayerError(
                name,
                f"got a parameter {leaf} that is {_outline(params[leaf])}; it takes a tuple of "
                f"{len(shape)}, {', '.join(map(show_shape, shape))}.",
            )


def _require_param(name: str, leaf: str, param: Any, shape: tuple[Any, ...]) -> None:
    """Raises unless a parameter is an array of floating-point numbers of this shape."""
    if not hasattr(param, "dtype") or not hasattr(param, "shape"):
        got = type(param).__name__
        raise LayerError(
            name, f"got a {leaf} of type {got}; it takes an array {show_shape(shape)}."
        )
    if len(param.shape) != len(shape) or any(
        size != wanted
        for size, wanted in zip(param.shape, shape, strict=True)
        if not isinstance(wanted, str)
    ):
        raise LayerError(
            name,
            f"got a {leaf} of shape {show_shape(param.shape)}; it takes {show_shape(shape)}. "
            "Is it that of another network?",
        )
    if not jnp.issubdtype(param.dtype, jnp.floating):
        raise LayerError(
            name, f"got a {leaf} of dtype {param.dtype}; it takes floating-point numbers."
        )


def require_layers(place: str, layers: Iterable[Any]) -> None:
    """Raises unless all are Layers; the message says which is not, by its place and number."""
    for i, layer in enumerate(layers, 1):
        require_layer(f"{place} {i}", layer)


def require_layer(what: str, layer: Any) -> None:
    """Raises unless something is a Layer; `what` names it, such as `backprop: net`."""
    if isinstance(layer, Layer):
        return
    got, hint, called = repr(layer), "", getattr(layer, "__name__", None)
    if callable(layer):
        got = f"the function {called}" if called else got
        if str(getattr(layer, "__module__", "")).startswith("jaxbp."):
            hint = f" Call it: {called}()?"
        elif called in ACTIVATIONS:
            hint = f" Use bp.{ACTIVATIONS[called]}()?"
        else:
            hint = (
                " Use a layer, such as bp.relu(), or make one of your function with bp.function, "
                "or with bp.lift if it has parameters?"
            )
    elif isinstance(layer, str) and layer in ACTIVATIONS:
        hint = f" Use bp.{ACTIVATIONS[layer]}()?"
    elif isinstance(layer, list | tuple) and layer and isinstance(layer[0], Layer):
        got = f"a {type(layer).__name__} of {len(layer)}"
        hint = " Pass the layers one by one: chain(*layers)?"
    raise TypeError(f"{what} is {got}; it takes a Layer.{hint}")


def require_entries(name: str, tree: Any, n: int, what: str = "parameters") -> None:
    """Raises unless a tree is a tuple with one entry for each of the n parts of a combinator."""
    if not isinstance(tree, tuple) or len(tree) != n:
        got = f"{len(tree)} entries" if isinstance(tree, tuple) else type(tree).__name__
        raise LayerError(
            name,
            f"got {what} with {got}; it takes a tuple of {n}, one for each part. Is it that of "
            "another network?",
        )


def require_same_shape(name: str, shape: Any, out_shape: Any, what: str) -> None:
    """Raises unless an inner layer maps a shape to itself; `what` is what needs that."""
    shapes = [s if isinstance(s, dict) else tuple(s) for s in (shape, out_shape)]
    if shapes[0] != shapes[1]:
        raise LayerError(
            name,
            f"has an inner layer that maps {show_shapes(shape)} to {show_shapes(out_shape)}; "
            f"{what} needs equal shapes.",
        )


@contextlib.contextmanager
def placed(place: str, layer: Layer) -> Iterator[None]:
    """Adds the place of a layer to the errors that are raised inside the block."""
    try:
        yield
    except LayerError as error:
        raise error.inside(place) from None
    except FloatingPointError as error:  # under jax.debug_nans or jax.debug_infs
        raise LayerError(layer.name, f"has an {error}").inside(place) from error


def _outline(params: Any) -> str:
    """Describes a tree of parameters or a cache in a few words, for messages."""
    if isinstance(params, dict):
        return f"a dict of {', '.join(map(str, params)) or 'nothing'}"
    if isinstance(params, tuple | list):
        return f"a {type(params).__name__} of {len(params)}"
    if hasattr(params, "shape"):
        return f"an array {show_shape(params.shape)}"
    return f"a {type(params).__name__}"
