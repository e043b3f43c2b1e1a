"""Combinators that wrap one layer: repeat, stack, remat, cast, masked.

    repeat    applies the layer n times, with the same parameters
    stack     applies n layers of this kind, each with its own parameters, in one compiled loop
    remat     keeps only the inputs, and runs the layer again in the backward pass
    cast      computes in another floating-point dtype, such as bfloat16
    masked    makes the layer from the mask that comes with each batch

Parameters and readings are those of the layer. Those of a stack hold all of its layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbp.require import (
    placed,
    require_array,
    require_cache,
    require_count,
    require_entries,
    require_key,
    require_layer,
    require_layers,
    require_same_outputs,
    require_same_shape,
)
from jaxbp.signals.changing import change_of
from jaxbp.signals.kinds import joined, keep, map_signals
from jaxbp.signals.stacked import Stacked, divided_like
from jaxbp.types import Layer, LayerError, split_keys

__all__ = ["cast", "masked", "remat", "repeat", "stack"]


def repeat(layer: Layer, n: int) -> Layer:
    """The same layer n times with the same parameters, y = f(f(... f(x))).

        dE/dW = sum_k dE/dW_k,   with W_k the parameter in its k-th use

    A reading gets all uses of a parameter in one signal, as if they were positions, because the
    norm of a sum is not the sum of the norms. So the backward pass keeps the operands of all uses
    until it has gone through all of them. Parameters and readings are those of one layer; the cache
    is a tuple of n.

    Args:
      layer: a layer that maps a shape to itself.
      n: the number of uses, at least 1.

    Raises:
      TypeError: `layer` is not a Layer.
      ValueError: `n` is not a positive integer.
      LayerError: the layer does not map a shape to itself, or refuses its inputs or parameters.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.repeat(bp.dense(2), 3)
      >>> params, _ = net.init(jax.random.key(0), (2,))
      >>> y, cache = net.forward(params, jnp.ones((5, 2)))
      >>> _, signals = net.backward(params, cache, y)
      >>> signals["weight"].inputs.shape                        # three uses
      (5, 3, 2)
    """
    require_layers("repeat: part", (layer,))
    n = require_count("repeat", "n", n)
    name = f"repeat({layer.name}, {n})"

    def init(key, shape):
        with placed("repeat", layer):
            params, out_shape = layer.init(key, shape)
        require_same_shape(name, shape, out_shape, "a repeated layer")
        return params, out_shape

    def forward(params, x, *, key=None):
        require_key(name, "key", key)
        caches = []
        for use_key in split_keys(key, n):
            with placed("repeat", layer):
                x, cache = layer.forward(params, x, key=use_key)
            caches.append(cache)
        return x, tuple(caches)

    def backward(params, caches, dy, *, read=keep):
        require_entries(name, caches, n, "a cache")
        uses = []
        for cache in reversed(caches):
            with placed("repeat", layer):
                dy, signals = layer.backward(params, cache, dy)
            uses.append(signals)
        return dy, map_signals(lambda *signals: read(joined(signals)), *reversed(uses))

    return Layer(name, init, forward, backward)


def stack(layer: Layer, n: int) -> Layer:
    """Several layers of the same kind, one after another, each with its own parameters.

    It computes what `chain(layer, ..., layer)` computes, but runs as one loop, compiled as one
    layer, so the compile time does not grow with n. Parameters and readings are `Stacked`: each
    array has L = n as its first axis, such as [L, I, O] for a weight and [L, N] for its squared
    norms. Readings are taken for each layer separately, inside the loop of the backward pass.

    Args:
      layer: a layer that maps a shape to itself.
      n: the number of layers, at least 1.

    Raises:
      TypeError: `layer` is not a Layer.
      ValueError: `n` is not a positive integer.
      LayerError: the layer does not map a shape to itself, or refuses its inputs or parameters.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.stack(bp.residual(bp.dense(2), bp.tanh()), 50)
      >>> params, _ = net.init(jax.random.key(0), (2,))
      >>> y, cache = net.forward(params, jnp.ones((5, 2)))
      >>> _, squares = net.backward(params, cache, y, read=bp.sq_norms)
      >>> squares.layers[0]["weight"].shape, bp.example_norms(squares).shape
      ((50, 5), (5,))
    """
    require_layers("stack: part", (layer,))
    n = require_count("stack", "n", n)
    name = f"stack({layer.name}, {n})"

    def require_stacked(tree):
        if not isinstance(tree, Stacked) or any(
            jnp.shape(leaf)[:1] != (n,) for leaf in jax.tree.leaves(tree)
        ):
            raise LayerError(
                name,
                f"got parameters that are not its own: it takes Stacked, of arrays [{n}, ...]. Are "
                "they those of another network?",
            )

    def init(key, shape):
        require_key(name, "key", key)
        out_shapes = []

        def init_one(key):
            params, out_shape = layer.init(key, shape)
            out_shapes.append(out_shape)
            return params

        with placed("stack", layer):
            params = jax.vmap(init_one)(jax.random.split(key, n))
        require_same_shape(name, shape, out_shapes[0], "a stack")
        return Stacked(params), out_shapes[0]

    def forward(params, x, *, key=None):
        require_stacked(params)
        require_key(name, "key", key)
        for leaf in jax.tree.leaves(x):
            require_array(name, leaf)
        keys = None if key is None else jax.random.split(key, n)
        whole = []

        def step(x, own):
            layer_params, layer_key = own
            with placed("stack", layer):
                y, cache = layer.forward(layer_params, x, key=layer_key)
            require_same_outputs(name, "a stack", x, y)
            arrays, put_back = _distinct(cache)
            whole.append(put_back)
            return y, arrays

        y, arrays = jax.lax.scan(step, x, (params.layers, keys), length=n)
        return y, whole[-1](arrays)

    def backward(params, caches, dy, *, read=keep):
        require_stacked(params)
        if any(jnp.shape(leaf)[:1] != (n,) for leaf in jax.tree.leaves(caches)):
            raise LayerError(
                name, f"got a cache that is not its own: it takes arrays [{n}, ...], from forward."
            )
        arrays, whole = _distinct((params.layers, caches))

        def step(dy, arrays):
            layer_params, cache = whole(arrays)
            with placed("stack", layer):
                dx, readings = layer.backward(layer_params, cache, dy, read=read)
            return dx, divided_like(layer_params, readings, dy)

        if change := change_of(read, params):
            return change.run(step, dy, arrays)
        put_back = []

        def step_of_distinct(dy, arrays):
            dx, readings = step(dy, arrays)
            own, like = _distinct(readings)  # of kept signals, several have the same deltas
            put_back.append(like)
            return dx, own

        dx, readings = jax.lax.scan(step_of_distinct, dy, arrays, length=n, reverse=True)
        return dx, Stacked(put_back[-1](readings))

    return Layer(name, init, forward, backward)


def _distinct(tree):
    """The distinct arrays of a tree, and a function that rebuilds the tree from arrays like them.

    Layers share what they keep: the outputs of one layer are the inputs of the next. A loop would
    store such an array once for every layer that keeps it.
    """
    leaves, structure = jax.tree.flatten(tree)
    arrays = {id(leaf): leaf for leaf in leaves}
    places = {identity: i for i, identity in enumerate(arrays)}
    order = [places[id(leaf)] for leaf in leaves]
    return tuple(arrays.values()), lambda like: structure.unflatten([like[i] for i in order])


def remat(layer: Layer) -> Layer:
    """The same layer with less memory: keeps only its inputs, and runs again in the backward pass.

    Costs a second forward pass. Use it inside a `stack`: the stack then keeps only the inputs of
    each layer, and the inner values exist for one layer at a time. Outside a stack, a compiler that
    merges equal computations may keep the inner values after all; XLA's compiler for CPUs does.

    Args:
      layer: any layer.

    Raises:
      TypeError: `layer` is not a Layer.

    References:
      "Training Deep Nets with Sublinear Memory Cost", Chen, Xu, Zhang, Guestrin, 2016.

    Example:
      >>> import jax, jaxbp as bp
      >>> block = bp.residual(bp.layer_norm(), bp.dense(8), bp.gelu(), bp.dense(4))
      >>> net = bp.stack(bp.remat(block), 32)
      >>> net.init(jax.random.key(0), (4,))[1]
      (4,)
    """
    require_layers("remat: part", (layer,))
    name = f"remat({layer.name})"

    def init(key, shape):
        with placed("remat", layer):
            return layer.init(key, shape)

    def forward(params, x, *, key=None):
        with placed("remat", layer):
            y, _ = layer.forward(params, x, key=key)
        # The parameters too: the tree that carries the error may be another one.
        return y, (params, x, key)

    def backward(tree, cache, dy, *, read=keep):
        require_cache(name, cache, 3)
        params, x, key = cache
        # The barrier on dy keeps XLA from merging the recomputation with the forward pass.
        x, dy = jax.lax.optimization_barrier((x, dy))
        with placed("remat", layer):
            _, cache = layer.forward(params, x, key=key)
            return layer.backward(tree, cache, dy, read=read)

    return Layer(name, init, forward, backward)


def cast(layer: Layer, compute: DTypeLike = jnp.bfloat16) -> Layer:
    """The same layer computed in another dtype: parameters keep theirs, products are in `compute`.

    Parameters, inputs and the error are rounded to `compute`, and so are the caches. Outputs and dx
    are returned in the dtype of the inputs, or of the parameters if the inputs are integers;
    integer outputs stay integers. Signals hold the rounded operands in the dtype of the outputs. So
    a reading, such as the gradient (a sum of products), is accumulated in the dtype of the outputs
    and not in `compute`. Normalisations, softmax and norms compute their sums in 32 bits in any
    case.

    Args:
      layer: any layer.
      compute: a floating-point dtype.

    Raises:
      TypeError: `layer` is not a Layer, or `compute` is not a floating-point dtype.

    References:
      "Mixed Precision Training", Micikevicius et al., 2018.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> layer = bp.cast(bp.dense(3))
      >>> params, _ = layer.init(jax.random.key(0), (4,))
      >>> y, cache = layer.forward(params, jnp.ones((2, 4)))
      >>> str(y.dtype), str(cache.dtype), str(params["weight"].dtype)
      ('float32', 'bfloat16', 'float32')
    """
    require_layers("cast: part", (layer,))
    if not _is_floating_dtype(compute):
        raise TypeError(f"cast: compute is {compute!r}; it takes a floating-point dtype.")
    name = f"cast({layer.name}, {jnp.dtype(compute).name})"

    def init(key, shape):
        with placed("cast", layer):
            return layer.init(key, shape)

    def forward(params, x, *, key=None):
        wide = _float_dtype((x, params), compute)
        with placed("cast", layer):
            y, cache = layer.forward(_as(compute, params), _as(compute, x), key=key)
        return _as(wide, y), cache

    def backward(tree, cache, dy, *, read=keep):
        wide = _float_dtype(dy, compute)

        def read_wide(signal):
            return read(_as(wide, signal))

        with placed("cast", layer):
            dx, readings = layer.backward(
                _as(compute, tree), cache, _as(compute, dy), read=read_wide
            )
        return _as(wide, dx), readings

    return Layer(name, init, forward, backward)


def masked(make: Callable[[Any], Layer]) -> Layer:
    """The layer `make(mask)` applied to x, for inputs (x, mask).

    The mask comes with each batch and says which positions of an example count. Layers anywhere in
    a network may need it, such as `attention(..., mask=mask)`, so the network is a function of the
    mask. It is made while the program is traced, which costs nothing at run time. The mask has no
    derivative: dx is the derivative with respect to x.

    Several masks are a tuple or a dict of arrays, such as one of positions and one of pairs, and x
    may be a tuple too, such as the (x, memory) of `cross_attention`.

    Args:
      make: `make(mask) -> layer`. `init` calls it with None, which means that every position
        counts.

    Raises:
      TypeError: `make(None)` is not a Layer.
      LayerError: the inputs are not a pair (x, mask), or the layer refuses its inputs or
        parameters.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.masked(lambda mask: bp.chain(bp.attention(4, 2, mask=mask), bp.dense(3)))
      >>> params, out_shape = net.init(jax.random.key(0), ((5, 4), (5,)))
      >>> x, mask = jnp.ones((2, 5, 4)), jnp.arange(5) < jnp.array([[3], [5]])
      >>> y, cache = net.forward(params, (x, mask))
      >>> out_shape, y.shape
      ((5, 3), (2, 5, 3))
    """
    unmasked = make(None)
    require_layers("masked: part", (unmasked,))
    name = f"masked({unmasked.name})"

    def make_layer(mask):
        layer = make(mask)
        require_layer("masked: make(mask)", layer)
        return layer

    def require_pair(pair):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise LayerError(name, "got inputs that are not a pair, (x, mask).")
        return pair

    def init(key, shape):
        with placed("masked", unmasked):
            return unmasked.init(key, require_pair(shape)[0])

    def forward(params, x, *, key=None):
        x, mask = require_pair(x)
        with placed("masked", unmasked):
            y, cache = make_layer(mask).forward(params, x, key=key)
        return y, (cache, mask)

    def backward(params, cache, dy, *, read=keep):
        require_cache(name, cache, 2)
        cache, mask = cache
        with placed("masked", unmasked):
            return make_layer(mask).backward(params, cache, dy, read=read)

    return Layer(name, init, forward, backward)


def _is_floating_dtype(dtype):
    """Whether something says a floating-point dtype. NumPy reads None as one."""
    try:
        return dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


def _is_float(x):
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _float_dtype(tree, otherwise):
    """The dtype of the first floating-point array of a tree, or another one if it has none."""
    return next((leaf.dtype for leaf in jax.tree.leaves(tree) if _is_float(leaf)), otherwise)


def _as(dtype, tree):
    """The tree with its floating-point arrays in this dtype."""
    return jax.tree.map(lambda x: x.astype(dtype) if _is_float(x) else x, tree)
