"""Combinators that join several layers: one after another, added, side by side, or multiplied.

The backward pass visits the parts in reverse order: the dx of one part is the dy of the part before
it. Nothing else passes between layers.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxbp.combinators.broadcasting import expand, fits, reduce_like
from jaxbp.combinators.entries import entry, kept_others, require_others, require_place, with_entry
from jaxbp.require import (
    placed,
    require_array,
    require_cache,
    require_deltas,
    require_entries,
    require_examples,
    require_key,
    require_layers,
    require_same_outputs,
    require_same_shape,
)
from jaxbp.signals.kinds import keep
from jaxbp.types import (
    Layer,
    LayerError,
    Params,
    PyTree,
    exportable,
    is_shape,
    shape_alone,
    show_shape,
    show_shapes,
    split_keys,
)

__all__ = ["Direct", "chain", "gated", "parallel", "residual"]


@exportable
class Direct(NamedTuple):
    """A tree for backward that sends the error at a chain's outputs directly to each of its parts.

    Attributes:
      parts: the tree that carries the error inside each part. It has the structure of the chain's
        parameters.
      matrices: the matrix B of each part but the last, which gets the error itself. B is [C, O] if
        the part's outputs have the positions of the chain's outputs. Otherwise it maps all of the
        chain's outputs to all of the part's, both as flat vectors: [T C, ...].
    """

    parts: tuple[Params, ...]
    matrices: tuple[jax.Array, ...]


PARTS = "parts"  # an attribute of a chain's forward function


def chain(*layers: Layer) -> Layer:
    """The layers one after another, y = f_n(... f_2(f_1(x))). dx = J_1^T J_2^T ... J_n^T dy.

    Parameters, caches and readings are tuples with one entry for each part.

    If the tree for `backward` is a `Direct`, each part but the last gets dy B_i instead of the dx
    of the part after it, so no part waits for another. The dx of the chain is then the dx of its
    first part for the error dy B_1.

    Args:
      *layers: the parts, in the order of the forward pass.

    Raises:
      TypeError: a part is not a Layer.
      LayerError: a part refuses its inputs or parameters; the message says which part.

    Example:
      >>> import jax, jaxbp as bp
      >>> net = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2))
      >>> params, out_shape = net.init(jax.random.key(0), (3,))
      >>> out_shape, [sorted(part) for part in params]
      ((2,), [['bias', 'weight'], [], ['bias', 'weight']])
    """
    require_layers("chain: part", layers)
    name = f"chain({', '.join(layer.name for layer in layers)})"

    def parts(params, *trees):
        """For each part: the layer, its place for error messages, and its entry in each tree."""
        require_entries(name, params, len(layers))
        places = [placed(f"chain: part {i}", layer) for i, layer in enumerate(layers, 1)]
        return list(zip(layers, places, params, *trees, strict=True))

    def init(key, shape):
        require_key(name, "key", key)
        params = []
        keys = jax.random.split(key, len(layers))
        for layer, place, part_key in parts(tuple(keys)):
            with place:
                part_params, shape = layer.init(part_key, shape)
            params.append(part_params)
        return tuple(params), shape

    def forward(params, x, *, key=None):
        require_key(name, "key", key)
        caches = []
        for layer, place, part_params, part_key in parts(params, split_keys(key, len(layers))):
            with place:
                x, cache = layer.forward(part_params, x, key=part_key)
            caches.append(cache)
        return x, tuple(caches)

    def backward(params, caches, dy, *, read=keep):
        if isinstance(params, Direct):
            trees, matrices = params.parts, (*params.matrices, None)
            if len(matrices) != len(layers):
                raise LayerError(
                    name,
                    f"got {len(params.matrices)} direct matrices; it takes {len(layers) - 1}, one "
                    "for each part but the last.",
                )
        else:
            trees, matrices = params, (None,) * len(layers)
        require_entries(name, caches, len(layers), "a cache")
        error, dx, readings = dy, dy, []
        for layer, place, tree, cache, matrix in reversed(parts(trees, caches, matrices)):
            with place:
                dy = dx if matrix is None else _sent_directly(layer, error, matrix, dx.shape)
                dx, reading = layer.backward(tree, cache, dy, read=read)
            readings.append(reading)
        return dx, tuple(reversed(readings))

    setattr(forward, PARTS, layers)
    return Layer(name, init, forward, backward)


def parts_of(net: Layer) -> tuple[Layer, ...] | None:
    """The parts of a chain, or None for any other layer."""
    return getattr(net.forward, PARTS, None)


def residual(*layers: Layer, at: int | str | None = None) -> Layer:
    """The output of the layers added to their input, y = x + f(x). dx = dy + J^T dy.

    Several layers form a chain. Parameters and readings are those of f.

    With `at`, inputs are a tuple or a dict, f sees all of them, and its outputs are added to one
    entry. The other entries are passed on:

        y_a = x_a + f(x),   y_b = x_b for every other entry b       dx = dy + J^T dy_a

    Args:
      *layers: f, or the parts of f in the order of the forward pass.
      at: the index or the key of the entry to which f(x) is added. None stands for all of x.

    Raises:
      TypeError: a part is not a Layer, or there is none; or `at` is no index or key.
      LayerError: f does not map a shape to itself (with `at`, to the shape of the entry), or
        refuses its inputs or parameters.

    References:
      "Deep Residual Learning for Image Recognition", He, Zhang, Ren, Sun, 2016.

    Example:
      >>> import jax, jaxbp as bp
      >>> block = bp.residual(bp.layer_norm(), bp.dense(8), bp.gelu(), bp.dense(4))
      >>> params, out_shape = block.init(jax.random.key(0), (4,))
      >>> out_shape, len(params)
      ((4,), 4)

      A step that depends on a second input, which is passed on to the next step:

      >>> step = bp.residual(bp.concatenate(), bp.dense(4), at=0)
      >>> bp.chain(step, step).init(jax.random.key(0), ((4,), (2,)))[1]
      ((4,), (2,))
    """
    require_layers("residual: part", layers)
    if not layers:
        raise TypeError("residual: takes a Layer, or several that form a chain; got none.")
    if at is not None:
        require_place("residual", at)
    inner = layers[0] if len(layers) == 1 else chain(*layers)
    name = f"residual({inner.name}{'' if at is None else f', at={at!r}'})"

    def own(tree, what="inputs"):
        """What f(x) is added to."""
        return tree if at is None else entry(name, tree, at, what)

    def init(key, shape):
        own_shape = own(shape)
        with placed("residual", inner):
            params, out_shape = inner.init(key, shape)
        require_same_shape(name, own_shape, out_shape, "a residual")
        return params, shape if at is None else with_entry(shape, at, out_shape)

    def forward(params, x, *, key=None):
        own_x = own(x)
        with placed("residual", inner):
            y, cache = inner.forward(params, x, key=key)
        require_same_outputs(name, "a residual", own_x, y)
        y = jax.tree.map(jnp.add, own_x, y)
        if at is None:
            return y, cache
        return with_entry(x, at, y), (cache, kept_others(name, x, at))

    def backward(params, cache, dy, *, read=keep):
        own_dy = own(dy, "a dy")
        if at is not None:
            require_cache(name, cache, 2)
            cache, others = cache
            require_others(name, dy, at, others)
        with placed("residual", inner):
            dx, readings = inner.backward(params, cache, own_dy, read=read)
        return sum_trees((dy, dx)), readings

    return Layer(name, init, forward, backward)


def parallel(*layers: Layer, combine: Literal["sum", "concatenate"] = "sum") -> Layer:
    """Branches side by side, whose outputs are added or concatenated.

        sum           y = f_1(x) + ... + f_n(x)         each branch gets dy
        concatenate   y = (f_1(x), ..., f_n(x))         each branch gets its own part of dy

    Outputs are concatenated along their last axis. If x is an array, every branch gets x, and dx is
    the sum over the branches. If x is a tuple with an array for each branch, each branch gets its
    own, and dx is a tuple too. Parameters, caches and readings are tuples with one entry for each
    branch.

    Args:
      *layers: the branches.
      combine: `sum` or `concatenate`.

    Raises:
      TypeError: a branch is not a Layer, or there is none.
      ValueError: `combine` is neither `sum` nor `concatenate`.
      LayerError: the outputs of the branches do not fit together, the number of inputs is not the
        number of branches, or a branch refuses its inputs or parameters; the message says which.

    Example:
      >>> import jax, jaxbp as bp
      >>> wide = bp.parallel(bp.dense(3), bp.chain(bp.dense(4), bp.tanh()), combine="concatenate")
      >>> wide.init(jax.random.key(0), (5,))[1], wide.init(jax.random.key(0), ((5,), (2,)))[1]
      ((7,), (7,))
    """
    require_layers("parallel: branch", layers)
    if not layers:
        raise TypeError("parallel: takes a Layer for each branch; got none.")
    if combine not in ("sum", "concatenate"):
        raise ValueError(f"parallel: combine is {combine!r}; it takes 'sum' or 'concatenate'.")
    name = f"parallel({', '.join(layer.name for layer in layers)})"
    places = [f"parallel: branch {i}" for i in range(1, len(layers) + 1)]
    init_each, forward_each, backward_each = side_by_side(name, layers, places)

    def for_each(x, *, several):
        """The input of each branch: its own entry if there are several, else the one input."""
        if several and len(x) != len(layers):
            raise LayerError(name, f"got {len(x)} inputs; it takes {len(layers)}, or one for all.")
        return tuple(x) if several else (x,) * len(layers)

    def require_concatenable(outputs):
        """Raises unless the outputs are arrays that differ in their last axis alone."""
        for output in outputs:
            require_array(name, output, "outputs of a branch")
        if any(output.ndim < 2 or output.shape[:-1] != outputs[0].shape[:-1] for output in outputs):
            raise LayerError(
                name,
                f"has branches with outputs {', '.join(show_shape(y.shape) for y in outputs)}; to "
                "concatenate them takes equal shapes but for the last axis.",
            )

    def init(key, shape):
        several = isinstance(shape, tuple | list) and any(
            isinstance(part, tuple | list) for part in shape
        )
        params, shapes = init_each(key, for_each(shape, several=several))
        first, *others = shapes
        if combine == "sum":
            out_shape, fit = first, all(other == first for other in others)
        else:
            fit = all(shape and shape[:-1] == first[:-1] for shape in shapes)
            out_shape = (*first[:-1], sum(shape[-1] for shape in shapes if shape))
        if not fit:
            raise LayerError(
                name,
                f"has branches with outputs {', '.join(map(show_shape, shapes))}; to {combine} "
                f"them takes equal shapes{'' if combine == 'sum' else ' but for the last axis'}.",
            )
        return params, out_shape

    def forward(params, x, *, key=None):
        inputs = for_each(x, several=isinstance(x, tuple))
        outputs, caches = forward_each(params, inputs, key)
        if combine == "sum":
            require_same_outputs(name, "a sum", *outputs)
            y = sum_trees(outputs)
        else:
            require_concatenable(outputs)
            y = jnp.concatenate(outputs, axis=-1)
        # Backward needs to know whether x is a tuple, and the shapes of the outputs.
        return y, (caches, *jax.tree.map(shape_alone, (x, outputs)))

    def backward(params, cache, dy, *, read=keep):
        require_cache(name, cache, 3)
        caches, x, outputs = cache
        outputs = jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape[1:], y.dtype), outputs)
        if combine == "sum":
            require_deltas(name, dy, outputs[0])
            errors = (dy,) * len(layers)
        else:
            ends = list(itertools.accumulate(output.shape[-1] for output in outputs))
            require_deltas(name, dy, outputs[0].update(shape=(*outputs[0].shape[:-1], ends[-1])))
            errors = (None,) * len(layers) if dy is None else jnp.split(dy, ends[:-1], axis=-1)
        dxs, readings = backward_each(params, caches, errors, read)
        return (dxs if isinstance(x, tuple) else sum_trees(dxs)), readings

    return Layer(name, init, forward, backward)


def gated(layer: Layer, gate: Layer) -> Layer:
    """The output of a layer times the output of a gate, elementwise: y = f(x) g(x).

        dx = J_f^T (g dy) + J_g^T (f dy)

    A dense layer, gated by a dense layer with an activation, is the first half of a gated
    feed-forward network: of SwiGLU if the activation is silu. Parameters, caches and readings are
    pairs, of f and of g.

    The gate's outputs may lack positions of f(x), which then share them, and f dy is summed over
    those positions. For f(x) of shape [N, H, W, C], the gate may be

        [N, H, W, C]   a factor for each value
        [N, C]         a factor for each channel; [N, 1, 1, C] is the same
        [N, H, W, 1]   a factor for each position
        [N, 1]         a factor for each example

    Args:
      layer: f. `chain()`, without parts, is x itself.
      gate: g.

    Raises:
      TypeError: one of the two is not a Layer.
      LayerError: the shape of the gate's outputs does not fit, or one of the two refuses its inputs
        or parameters.

    References:
      "GLU Variants Improve Transformer", Shazeer, 2020.
      "Squeeze-and-Excitation Networks", Hu, Shen, Sun, 2018: a gate for each channel.

    Example:
      >>> import jax, jaxbp as bp
      >>> swiglu = bp.chain(
      ...     bp.gated(bp.dense(8), bp.chain(bp.dense(8), bp.silu())), bp.dense(4)
      ... )
      >>> swiglu.init(jax.random.key(0), (4,))[1]
      (4,)
      >>> squeeze_excite = bp.gated(
      ...     bp.chain(),
      ...     bp.chain(bp.global_pool(), bp.dense(2), bp.relu(), bp.dense(8), bp.sigmoid()),
      ... )
      >>> squeeze_excite.init(jax.random.key(0), (5, 5, 8))[1]
      (5, 5, 8)
    """
    require_layers("gated: part", (layer, gate))
    name = f"gated({layer.name}, {gate.name})"
    places = "gated: layer", "gated: gate"
    init_each, forward_each, backward_each = side_by_side(name, (layer, gate), places)

    def require_fit(out_shape, gate_shape):
        """Raises unless the gate's outputs can multiply the layer's; shapes of one example."""
        arrays = is_shape(out_shape) and is_shape(gate_shape)
        if not arrays or not fits(gate_shape, out_shape):
            raise LayerError(
                name,
                f"has a layer with outputs {show_shapes(out_shape)} and a gate with "
                f"{show_shapes(gate_shape)}; it takes equal shapes, sizes of 1 in the gate, or one "
                "vector for all positions.",
            )

    def init(key, shape):
        params, (out_shape, gate_shape) = init_each(key, (shape, shape))
        require_fit(out_shape, gate_shape)
        return params, out_shape

    def forward(params, x, *, key=None):
        (f, g), caches = forward_each(params, (x, x), key)
        for own in (f, g):
            require_array(name, own, "outputs of a part")
        require_examples(name, layer=f, gate=g)
        require_fit(f.shape[1:], g.shape[1:])
        return f * expand(g, f.shape), (f, g, caches)

    def backward(params, cache, dy, *, read=keep):
        require_cache(name, cache, 3)
        f, g, caches = cache
        require_deltas(name, dy, f)
        errors = (None, None)
        if dy is not None:
            errors = expand(g, f.shape) * dy, reduce_like(f * dy, g.shape)
        dxs, readings = backward_each(params, caches, errors, read)
        return sum_trees(dxs), readings

    return Layer(name, init, forward, backward)


def side_by_side(name, layers, places):
    """The init, forward and backward of layers that do not see each other.

    All arguments but `key` and `read`, and all results, are tuples with one entry for each layer:

        init(key, shapes) -> (params, out_shapes)
        forward(params, inputs, key) -> (outputs, caches)
        backward(params, caches, errors, read) -> (dxs, readings)
    """

    def each(function, params, *trees):
        """The pairs that `function(layer, *entries)` returns for the layers, as two tuples."""
        pairs = []
        require_entries(name, params, len(layers))
        for place, layer, *own in zip(places, layers, params, *trees, strict=True):
            with placed(place, layer):
                pairs.append(function(layer, *own))
        return tuple(zip(*pairs, strict=True))

    def init(key, shapes):
        require_key(name, "key", key)
        keys = tuple(jax.random.split(key, len(layers)))
        return each(lambda layer, key, shape: layer.init(key, shape), keys, shapes)

    def forward(params, inputs, key):
        require_key(name, "key", key)
        return each(
            lambda layer, params, x, key: layer.forward(params, x, key=key),
            *(params, inputs, split_keys(key, len(layers))),
        )

    def backward(params, caches, errors, read):
        require_entries(name, caches, len(layers), "a cache")
        return each(
            lambda layer, params, cache, dy: layer.backward(params, cache, dy, read=read),
            *(params, caches, errors),
        )

    return init, forward, backward


def sum_trees(trees: Sequence[PyTree]) -> PyTree:
    """Adds up trees of arrays. None adds nothing: integers have no derivative."""
    trees = [tree for tree in trees if tree is not None]
    if len(trees) < 2:
        return trees[0] if trees else None
    if hasattr(trees[0], "shape"):
        return functools.reduce(jnp.add, trees)
    return jax.tree.map(lambda *parts: sum_trees(parts), *trees, is_leaf=lambda part: part is None)


def _sent_directly(layer, error, matrix, shape):
    """The error at a chain's outputs [N, ..., C], sent to the outputs of one part by its matrix."""
    if error.shape[:-1] == shape[:-1] and matrix.shape == (error.shape[-1], shape[-1]):
        return error @ matrix
    sizes = math.prod(error.shape[1:]), math.prod(shape[1:])
    if matrix.shape != sizes:
        raise LayerError(
            layer.name,
            f"got a direct matrix of shape {show_shape(matrix.shape)}; to its outputs, "
            f"{show_shape(shape)}, from an error {show_shape(error.shape)}, it takes "
            f"{show_shape(sizes)}.",
        )
    return (error.reshape(error.shape[0], -1) @ matrix).reshape(shape)
