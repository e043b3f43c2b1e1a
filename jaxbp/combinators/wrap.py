"""Combinators of one layer: many times over, once more on the way back, in other numbers, masked.

  repeat    n times, with the same parameters
  stack     n times, each with its own, in one compiled loop
  remat     again on the way back, in place of what it would have kept
  cast      in numbers of 16 bits
  masked    made anew for the mask that comes with each batch

Parameters and readings are those of the layer; of a stack, those of every one of its layers.
"""

import jax
import jax.numpy as jnp

from jaxbp.require import placed, require_count, require_layers, require_same_shape
from jaxbp.signals.kinds import joined, keep, map_signals
from jaxbp.signals.stacked import Stacked
from jaxbp.types import Layer, LayerError, split_keys


def repeat(layer, n):
    """The same layer n times with the same parameters, y = f(f(... f(x))).

      dE/dW = sum_k dE/dW_k,   with W_k the parameter in its k-th use

    What is read at a parameter sees all of its uses at once, as if they were positions: the norm of
    a sum is not that of its parts. So the operands of all uses are kept until the sweep is through
    the last of them. Parameters and readings are those of one layer, the cache a tuple of n.

    Args:
      layer: it has to map a shape to itself.
      n: how often, at least 1.

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
    require_count("repeat", "n", n)
    name = f"repeat({layer.name}, {n})"

    def init(key, shape):
        with placed("repeat", layer):
            params, out_shape = layer.init(key, shape)
        require_same_shape(name, shape, out_shape, "what is repeated")
        return params, out_shape

    def forward(params, x, *, key=None):
        caches = []
        for use_key in split_keys(key, n):
            with placed("repeat", layer):
                x, cache = layer.forward(params, x, key=use_key)
            caches.append(cache)
        return x, tuple(caches)

    def backward(params, caches, dy, *, read=keep):
        uses = []
        for cache in reversed(caches):
            with placed("repeat", layer):
                dy, signals = layer.backward(params, cache, dy)
            uses.append(signals)
        return dy, map_signals(lambda *signals: read(joined(signals)), *reversed(uses))

    return Layer(name, init, forward, backward)


def stack(layer, n):
    """Layers that are alike, one after another, each with its own parameters, in one loop.

    It is `chain(layer, ..., layer)`, compiled as one layer: the time that takes does not grow with
    n. Parameters and readings are `Stacked`, each array with L = n as its first axis, [L, I, O] for
    a weight and [L, N] for its squared norms. What is read is read of each layer on its own, inside
    the loop of the way back.

    Args:
      layer: it has to map a shape to itself.
      n: how many, at least 1.

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
    require_count("stack", "n", n)
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
        keys = None if key is None else jax.random.split(key, n)
        whole = []

        def step(x, own):
            layer_params, layer_key = own
            with placed("stack", layer):
                y, cache = layer.forward(layer_params, x, key=layer_key)
            require_same_shape(name, x.shape[1:], y.shape[1:], "a stack")
            arrays, put_back = _distinct(cache)
            whole.append(put_back)
            return y, arrays

        y, arrays = jax.lax.scan(step, x, (params.layers, keys), length=n)
        return y, whole[-1](arrays)

    def backward(params, caches, dy, *, read=keep):
        require_stacked(params)
        arrays, whole = _distinct((params.layers, caches))

        def step(dy, arrays):
            layer_params, cache = whole(arrays)
            with placed("stack", layer):
                return layer.backward(layer_params, cache, dy, read=read)

        dx, readings = jax.lax.scan(step, dy, arrays, length=n, reverse=True)
        return dx, Stacked(readings)

    return Layer(name, init, forward, backward)


def _distinct(tree):
    """The arrays of a tree, each once, and the function that makes such a tree of arrays like them.

    Layers share what they keep: the outputs of one are the inputs of the next. A loop would store
    each of them for every layer that keeps it.
    """
    leaves, structure = jax.tree.flatten(tree)
    arrays = {id(leaf): leaf for leaf in leaves}
    places = {identity: i for i, identity in enumerate(arrays)}
    order = [places[id(leaf)] for leaf in leaves]
    return tuple(arrays.values()), lambda like: structure.unflatten([like[i] for i in order])


def remat(layer):
    """The same layer with less memory: it keeps its inputs alone, and runs again on the way back.

    Costs a second forward pass. It saves in a `stack`, of which then the inputs of each layer are
    kept, and what is in a layer is there for one at a time. (Outside of one, a compiler that merges
    equal computations may keep what was to be forgotten; that for CPUs does.)

    Args:
      layer: any.

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

    def init(key, shape):
        with placed("remat", layer):
            return layer.init(key, shape)

    def forward(params, x, *, key=None):
        with placed("remat", layer):
            y, _ = layer.forward(params, x, key=key)
        # The parameters too, since what carries the error back may be another tree.
        return y, (params, x, key)

    def backward(tree, cache, dy, *, read=keep):
        params, x, key = cache
        # Not before dy is there, lest the compiler should take it for the forward pass itself.
        x, dy = jax.lax.optimization_barrier((x, dy))
        with placed("remat", layer):
            _, cache = layer.forward(params, x, key=key)
            return layer.backward(tree, cache, dy, read=read)

    return Layer(f"remat({layer.name})", init, forward, backward)


def cast(layer, compute=jnp.bfloat16):
    """The same layer in other numbers: parameters as they are, products and caches in `compute`.

    Parameters, inputs and the error are rounded to `compute` on their way in, outputs and dx are
    given back in the dtype of the inputs (that of the parameters, if the inputs are integers).
    Signals are the rounded operands in the dtype of the outputs: what is read off them, such as the
    gradient, a sum of products, is accumulated in that and not in `compute`. Normalisations,
    softmax and norms take their sums in 32 bits in any case.

    Args:
      layer: any.
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
    if not jnp.issubdtype(compute, jnp.floating):
        raise TypeError(f"cast: compute is {compute!r}; it takes a floating-point dtype.")
    name = f"cast({layer.name}, {jnp.dtype(compute).name})"

    def init(key, shape):
        with placed("cast", layer):
            return layer.init(key, shape)

    def forward(params, x, *, key=None):
        wide = next(filter(_is_float, jax.tree.leaves((x, params)))).dtype
        with placed("cast", layer):
            y, cache = layer.forward(_as(compute, params), _as(compute, x), key=key)
        return y.astype(wide), cache

    def backward(tree, cache, dy, *, read=keep):
        def read_wide(signal):
            return read(_as(dy.dtype, signal))

        with placed("cast", layer):
            dx, readings = layer.backward(
                _as(compute, tree), cache, dy.astype(compute), read=read_wide
            )
        return _as(dy.dtype, dx), readings

    return Layer(name, init, forward, backward)


def masked(make):
    """A layer whose inputs come with a mask: make(mask), for (x, mask) in the place of x.

    What positions of an example are there is known with the batch, and concerns layers anywhere in
    a network, such as `attention(..., mask=mask)`. So the network is a function of it. Making one
    costs nothing: it happens as the program is traced. The mask has no derivative, and dx is that
    of x alone.

    Args:
      make: `make(mask) -> layer`; with None, as for `init`, every position is there.

    Raises:
      TypeError: `make(None)` is not a Layer.
      LayerError: the inputs are not such a pair, or the layer refuses its inputs or parameters.

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
            y, cache = make(mask).forward(params, x, key=key)
        return y, (cache, mask)

    def backward(params, cache, dy, *, read=keep):
        cache, mask = cache
        with placed("masked", unmasked):
            return make(mask).backward(params, cache, dy, read=read)

    return Layer(name, init, forward, backward)


def _is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def _as(dtype, tree):
    """A tree with its floating-point arrays in this dtype."""
    return jax.tree.map(lambda x: x.astype(dtype) if _is_float(x) else x, tree)
