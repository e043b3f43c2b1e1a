"""Combinators for several streams: networks whose inputs or inner values are a tuple or a dict.

    on        applies layers to one entry, and passes the others on
    select    picks one entry
    fork      gives the whole inputs to each branch; the outputs are a tuple
    shared    applies the same layer, with the same parameters, to each entry

`residual(..., at=0)` adds to one entry what layers make of all entries. `joins` has the layers that
make one array of several: `add`, `subtract`, `multiply` and `concatenate`.

A chain of these is any network with several inputs. For two towers,

    chain(on("user", user_tower), on("item", item_tower), inner_product())

and for an encoder-decoder transformer, whose inputs are the pair (target, source),

    block = chain(
        on(0, residual(layer_norm(), attention(64, 4, causal=True))),
        residual(on(0, layer_norm()), cross_attention(64, 4), at=0),
        on(0, residual(layer_norm(), dense(256), gelu(), dense(64))),
    )
    chain(on(1, encoder), on(0, embedding(...), positions), stack(block, 6), select(0), head)

Each block sees the memory at entry 1 and passes it on, so its gradient is summed over the blocks.
"""

import jax
import jax.numpy as jnp

from jaxbp.combinators.compose import chain, side_by_side, sum_trees
from jaxbp.combinators.entries import (
    entry,
    kept_arrays,
    kept_others,
    require_others,
    require_place,
    split,
    with_entry,
)
from jaxbp.require import (
    first_difference,
    placed,
    require_array,
    require_cache,
    require_deltas,
    require_entries,
    require_key,
    require_layers,
    require_shape,
)
from jaxbp.signals.kinds import joined, keep, map_signals
from jaxbp.types import Layer, LayerError, is_shape, shape_alone, show_shapes, split_keys

__all__ = ["fork", "on", "select", "shared"]


def on(at: int | str, *layers: Layer) -> Layer:
    """The layers applied to one entry of the inputs; the other entries are passed on.

        y_a = f(x_a),   dx_a = J^T dy_a       y_b = x_b,   dx_b = dy_b   for every other entry b

    Inputs and outputs are a tuple or a dict. Several layers form a chain. Parameters and readings
    are those of f.

    Args:
      at: the index or the key of the entry.
      *layers: f, or the parts of f in the order of the forward pass.

    Raises:
      TypeError: `at` is no index or key, a part is not a Layer, or there is none.
      LayerError: the inputs have no such entry, or f refuses its inputs or parameters.

    Example:
      >>> import jax, jaxbp as bp
      >>> net = bp.chain(
      ...     bp.on("user", bp.embedding(9, 4)), bp.on("item", bp.dense(4)), bp.inner_product()
      ... )
      >>> net.init(jax.random.key(0), {"user": (), "item": (7,)})[1]
      (1,)
    """
    require_place("on", at)
    require_layers("on: part", layers)
    if not layers:
        raise TypeError("on: takes a Layer, or several that form a chain; got none.")
    inner = layers[0] if len(layers) == 1 else chain(*layers)
    name, place = f"on({at!r}, {inner.name})", f"on({at!r})"

    def init(key, shape):
        own = entry(name, shape, at)
        with placed(place, inner):
            params, out_shape = inner.init(key, own)
        return params, with_entry(shape, at, out_shape)

    def forward(params, x, *, key=None):
        own = entry(name, x, at)
        with placed(place, inner):
            y, cache = inner.forward(params, own, key=key)
        return with_entry(x, at, y), (cache, kept_others(name, x, at))

    def backward(params, cache, dy, *, read=keep):
        require_cache(name, cache, 2)
        cache, others = cache
        own = entry(name, dy, at, "a dy")
        require_others(name, dy, at, others)
        with placed(place, inner):
            dx, readings = inner.backward(params, cache, own, read=read)
        return with_entry(dy, at, dx), readings

    return Layer(name, init, forward, backward)


def select(at: int | str) -> Layer:
    """One entry of the inputs, a tuple or a dict. y = x_a; dx_a = dy, and 0 for every other entry.

    Integers have no derivative: where an entry is an array of them, its dx is None.

    Args:
      at: the index or the key of the entry.

    Raises:
      TypeError: `at` is no index or key.
      LayerError: the inputs have no such entry.

    Example:
      >>> import jax, jaxbp as bp
      >>> bp.select(1).init(jax.random.key(0), ((3,), (4, 2)))[1]
      (4, 2)
    """
    require_place("select", at)
    name = f"select({at!r})"

    def init(key, shape):
        del key
        out_shape = entry(name, shape, at)
        jax.tree.map(lambda own: require_shape(name, own), shape, is_leaf=is_shape)
        return (), out_shape

    def forward(params, x, *, key=None):
        del params, key
        y = entry(name, x, at)
        for leaf in jax.tree.leaves(x):
            require_array(name, leaf)
        return y, jax.tree.map(shape_alone, x)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        own = entry(name, cache, at, "a cache")
        require_deltas(name, dy, kept_arrays(own))
        return with_entry(jax.tree.map(_zeros, kept_arrays(cache)), at, dy), ()

    return Layer(name, init, forward, backward)


def _zeros(like):
    """The derivative with respect to what is not used; integers have none."""
    if not jnp.issubdtype(like.dtype, jnp.floating):
        return None
    return jnp.zeros(like.shape, like.dtype)


def fork(*layers: Layer) -> Layer:
    """Branches that all see the whole inputs: y = (f_1(x), ..., f_n(x)), dx = sum_i J_i^T dy_i.

    The outputs are a tuple, and stay apart until another layer joins them. Where the outputs are
    added or concatenated at once, `parallel` is shorter. Unlike `parallel`, a fork does not deal
    out the entries of a tuple: each branch gets all of them. Parameters, caches and readings are
    tuples with one entry for each branch.

    Args:
      *layers: the branches. `chain()`, without parts, passes on the inputs themselves.

    Raises:
      TypeError: a branch is not a Layer, or there is none.
      LayerError: a branch refuses its inputs or parameters; the message says which.

    Example:
      FiLM: features [H, W, C], and a vector that says how to scale and to shift them.

      >>> import jax, jaxbp as bp
      >>> scaled = bp.gated(bp.select(0), bp.chain(bp.select(1), bp.dense(3)))
      >>> film = bp.chain(bp.fork(scaled, bp.chain(bp.select(1), bp.dense(3))), bp.add())
      >>> film.init(jax.random.key(0), ((5, 5, 3), (2,)))[1]
      (5, 5, 3)

      The encoder of a variational autoencoder, with outputs (mean, logarithm of the variance):

      >>> encoder = bp.chain(bp.dense(8), bp.relu(), bp.fork(bp.dense(2), bp.dense(2)))
      >>> encoder.init(jax.random.key(0), (4,))[1]
      ((2,), (2,))
    """
    require_layers("fork: branch", layers)
    if not layers:
        raise TypeError("fork: takes a Layer for each branch; got none.")
    n = len(layers)
    name = f"fork({', '.join(layer.name for layer in layers)})"
    places = [f"fork: branch {i}" for i in range(1, n + 1)]
    init_each, forward_each, backward_each = side_by_side(name, layers, places)

    def init(key, shape):
        params, out_shapes = init_each(key, (shape,) * n)
        return params, out_shapes

    def forward(params, x, *, key=None):
        outputs, caches = forward_each(params, (x,) * n, key)
        return outputs, caches

    def backward(params, caches, dy, *, read=keep):
        require_entries(name, dy, n, "a dy")
        dxs, readings = backward_each(params, caches, dy, read)
        return sum_trees(dxs), readings

    return Layer(name, init, forward, backward)


def shared(*layers: Layer) -> Layer:
    """The same layers, with the same parameters, applied to each entry of the inputs.

        y_k = f(x_k),   dx_k = J_k^T dy_k,   dE_n/dW = sum_k dE_n/dW_k

    with W_k the parameter in its use for entry k. Inputs and outputs are a tuple or a dict, whose
    entries may be of different shapes. A reading gets all uses of a parameter in one signal, as if
    they were positions, because the norm of a sum is not the sum of the norms. So N remains the
    number of examples, and a per-example gradient is that of the whole tuple. Layers that draw
    random numbers draw others for each entry.

    Args:
      *layers: f, or the parts of f in the order of the forward pass. Parameters and readings are
        those of f, and the cache is a tuple with one of f for each entry.

    Raises:
      TypeError: a part is not a Layer, or there is none.
      LayerError: the inputs are no tuple or dict, their shapes need different parameters, or f
        refuses its inputs or parameters.

    References:
      "Signature Verification using a Siamese Time Delay Neural Network", Bromley, Guyon, LeCun,
      Saeckinger, Shah, 1993.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> siamese = bp.chain(bp.shared(bp.dense(8), bp.tanh()), bp.distance())
      >>> params, out_shape = siamese.init(jax.random.key(0), ((4,), (4,)))
      >>> sweep = bp.backprop(siamese, bp.squared_error, read=bp.sq_norms)
      >>> pair = jnp.ones((5, 4)), jnp.zeros((5, 4))
      >>> values, norms = sweep(params, pair, jnp.zeros((5, 1)))
      >>> out_shape, norms[0][0]["weight"].shape
      ((1,), (5,))
    """
    require_layers("shared: part", layers)
    if not layers:
        raise TypeError("shared: takes a Layer, or several that form a chain; got none.")
    inner = layers[0] if len(layers) == 1 else chain(*layers)
    name = f"shared({inner.name})"

    def place(k):
        return placed(f"shared: input {k}", inner)

    def init(key, shape):
        require_key(name, "key", key)
        shapes, like = split(name, shape)
        drawn = []
        for k, own in enumerate(shapes, 1):
            with place(k):
                drawn.append(inner.init(key, own))
        (params, _), *others = drawn
        for own, (other, _) in zip(shapes[1:], others, strict=True):
            different = first_difference(other, params)
            if different is not None:
                raise LayerError(
                    name,
                    f"needs other parameters for inputs {show_shapes(own)} than for "
                    f"{show_shapes(shapes[0])}: {different}.",
                )
        return params, like([out_shape for _, out_shape in drawn])

    def forward(params, x, *, key=None):
        require_key(name, "key", key)
        inputs, like = split(name, x)
        outputs, caches = [], []
        keys = split_keys(key, len(inputs))
        for k, (own, own_key) in enumerate(zip(inputs, keys, strict=True), 1):
            with place(k):
                y, cache = inner.forward(params, own, key=own_key)
            outputs.append(y)
            caches.append(cache)
        return like(outputs), tuple(caches)

    def backward(params, caches, dy, *, read=keep):
        errors, like = split(name, dy, "a dy")
        require_cache(name, caches, len(errors))
        dxs, uses = [], []
        for k, (cache, error) in enumerate(zip(caches, errors, strict=True), 1):
            with place(k):
                dx, signals = inner.backward(params, cache, error)
            dxs.append(dx)
            uses.append(signals)
        return like(dxs), map_signals(lambda *signals: read(joined(signals)), *uses)

    return Layer(name, init, forward, backward)
