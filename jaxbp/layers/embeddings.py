"""Embeddings: a vector for each token, and a vector for each position of a sequence.

A table W [V, O] is a weight matrix whose inputs are one-hot vectors, which are never formed. The
forward pass looks up rows, and the gradient of a row is the sum of the deltas where it was looked
up. The gradient of one example has as many nonzero rows as the example has different tokens.
"""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxbp.combinators.compose import chain
from jaxbp.require import (
    placed,
    require_array,
    require_cache,
    require_count,
    require_delta,
    require_entries,
    require_floats,
    require_key,
    require_params,
    require_positive,
    require_same_shape,
    require_shape,
    require_shape_alone,
)
from jaxbp.sharding import gathered, placement, product, repeated
from jaxbp.signals.kinds import Lookup, Outer, Sum, Through, keep
from jaxbp.signals.views import View
from jaxbp.types import Layer, LayerError, Shape, shape_alone, show_shape, widened

__all__ = ["embedding", "learned_positions", "sinusoidal_positions", "tied_embedding"]


def embedding(
    vocabulary: int,
    features: int,
    *,
    padding_row: int | None = None,
    weight_init: Initializer = initializers.normal(0.02),  # noqa: B008 -- a pure function
    dtype: DTypeLike = float,
) -> Layer:
    """Looks up a vector for each token, y_nt = W[x_nt].

        dE/dW[v] = sum of dy_nt over the n and t with x_nt = v

    Inputs are integers [N, ...], outputs [N, ..., O], parameters `{"weight": [V, O]}`. Integers
    have no derivative, so dx is None. For a token outside [0, V) the output is nan, and its dy
    reaches no row.

    A padding row is the vector of a token that fills short sequences. It is not trained: it is zero
    in the beginning, and its gradient is zero in every reading. (If you assign other values to it,
    the outputs have them.)

    Args:
      vocabulary: V, the number of different tokens.
      features: O, the size of a vector.
      padding_row: the token whose row is not trained, or None.
      weight_init: the initialiser of W, as in `jax.nn.initializers`. The default is that of GPT-2.
      dtype: the dtype of the parameters. `float` means JAX's default.

    Raises:
      ValueError: `vocabulary` or `features` is not a positive integer, or `padding_row` is not a
        token.
      LayerError: the inputs or the parameters do not fit.

    References:
      "A Neural Probabilistic Language Model", Bengio, Ducharme, Vincent, Jauvin, 2003.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> layer = bp.embedding(5, 2)
      >>> params, out_shape = layer.init(jax.random.key(0), (3,))
      >>> y, cache = layer.forward(params, jnp.array([[4, 0, 4]]))
      >>> _, grads = layer.backward(params, cache, jnp.ones((1, 3, 2)), read=bp.total)
      >>> out_shape, grads["weight"][:, 0].tolist()
      ((3, 2), [1.0, 0.0, 0.0, 0.0, 2.0])
    """
    vocabulary = require_count("embedding", "vocabulary", vocabulary)
    features = require_count("embedding", "features", features)
    if padding_row is not None:
        padding_row = _require_token("embedding", "padding_row", padding_row, vocabulary)
    name = f"embedding({vocabulary}, {features})"
    shapes = {"weight": (vocabulary, features)}

    def require_tokens(x, what):
        require_array(name, x, what)
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise LayerError(
                name,
                f"got {what} of dtype {x.dtype} and shape {show_shape(x.shape)}; it takes tokens, "
                "integers [N, ...].",
            )

    def rows_of(x):
        """The rows of tokens, which tokens are none of the table's, and which train no row."""
        rows = jnp.asarray(x)
        if rows.dtype.itemsize < 4:
            rows = rows.astype(jnp.int32)  # int8 could not hold V
        outside = (rows < 0) | (rows >= vocabulary)
        return rows, outside, outside if padding_row is None else outside | (rows == padding_row)

    def init(key, shape):
        require_key(name, "key", key)
        shape = require_shape(name, shape)
        weight = weight_init(key, (vocabulary, features), dtype)
        if padding_row is not None:
            weight = weight.at[padding_row].set(0)
        return {"weight": weight}, (*shape, features)

    def forward(params, x, *, key=None):
        del key
        require_params(name, params, shapes)
        require_tokens(x, "inputs")
        params = gathered(params, x)
        # Plain indexing silently wraps negative tokens and clips large ones. A nan is noticed.
        rows, outside, untrained = rows_of(x)
        rows = jnp.where(outside, vocabulary, rows)
        weight, axes = params["weight"], [(rows, i) for i in range(rows.ndim)]
        after = placement(rows, *axes, (weight, 1))
        y = weight.at[rows].get(mode="fill", fill_value=jnp.nan, out_sharding=after)
        if padding_row is not None:
            # For autodiff of this function, such as that of `check`. XLA removes it.
            y = jnp.where(untrained[..., None], jax.lax.stop_gradient(y), y)
        return y, x

    def backward(params, x, dy, *, read=keep):
        require_params(name, params, shapes)
        require_tokens(x, "a cache")
        require_delta(name, dy, (*x.shape, features))
        rows, outside, untrained = rows_of(x)
        # A row of the table with a delta of zero: every reading can look it up, and none sees it.
        rows, dy = jnp.where(outside, 0, rows), jnp.where(untrained[..., None], 0, dy)
        table = gathered(params["weight"], x)[:, :0]
        return None, {"weight": read(Lookup(rows, dy, table))}

    return Layer(name, init, forward, backward)


def tied_embedding(
    vocabulary: int,
    features: int,
    *layers: Layer,
    weight_init: Initializer = initializers.normal(0.02),  # noqa: B008 -- a pure function
    dtype: DTypeLike = float,
) -> Layer:
    """Embeds tokens, applies layers, and maps the result to logits by the same table, transposed.

        y_nt = f(W[x_nt]) W^T

    The gradient of the table is the sum of both uses, and its signal is a `Sum`: a per-example norm
    has the inner product of the two uses in it. Inputs are integers [N, ...], outputs
    [N, ..., V], parameters a tuple of
    `{"weight": [V, O]}` and those of f, a chain of the layers.

    Args:
      vocabulary: V, the number of different tokens.
      features: O, the size of a vector.
      *layers: they have to map [..., O] to [..., O].
      weight_init: an initialiser in the form of `jax.nn.initializers`.
      dtype: the dtype of the table.

    Raises:
      TypeError: one of the layers is not a Layer.
      ValueError: `vocabulary` or `features` is not a positive integer.
      LayerError: the inputs or the parameters do not fit.

    References:
      "Using the Output Embedding to Improve Language Models", Press, Wolf, 2017.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.tied_embedding(5, 4, bp.residual(bp.layer_norm(), bp.dense(4)))
      >>> params, out_shape = net.init(jax.random.key(0), (3,))
      >>> tokens = jnp.array([[4, 0, 4], [1, 2, 3]])
      >>> sweep = bp.backprop(net, bp.softmax_cross_entropy, read=bp.sq_norms)
      >>> values, sq_norms = sweep(params, tokens, tokens)
      >>> out_shape, sq_norms[0]["weight"].shape
      ((3, 5), (2,))
    """
    vocabulary = require_count("tied_embedding", "vocabulary", vocabulary)
    features = require_count("tied_embedding", "features", features)
    table = embedding(vocabulary, features, weight_init=weight_init, dtype=dtype)
    body = chain(*layers)
    name = f"tied_embedding({vocabulary}, {features})"

    def require_parts(params):
        """The parameters, a tuple of those of the table and of each layer, if they fit."""
        require_entries(name, params, 1 + len(layers))
        require_params(name, params[0], {"weight": (vocabulary, features)})
        return params

    def init(key, shape):
        require_key(name, "key", key)
        shape = require_shape(name, shape)
        table_key, body_key = jax.random.split(key)
        own, body_shape = table.init(table_key, shape)
        with placed(name, body):
            params, out_shape = body.init(body_key, body_shape)
        require_same_shape(name, body_shape, out_shape, "what a table maps back to tokens")
        return (own, *params), (*shape, vocabulary)

    def forward(params, x, *, key=None):
        own, *rest = require_parts(params)
        h, tokens = table.forward(own, x)
        with placed(name, body):
            h, cache = body.forward(tuple(rest), h, key=key)
        return product(h, gathered(own["weight"], h).T), (tokens, h, cache)

    def backward(params, caches, dy, *, read=keep):
        own, *rest = require_parts(params)
        require_cache(name, caches, 3)
        tokens, h, cache = caches
        require_delta(name, dy, (*h.shape[:-1], vocabulary))
        with placed(name, body):
            dh = product(dy, gathered(own["weight"], dy))
            dh, readings = body.backward(tuple(rest), cache, dh, read=read)
        _, lookup = table.backward(own, tokens, dh)
        head = Through(Outer(h, dy), View((features, vocabulary)).transpose(1, 0))
        return None, ({"weight": read(Sum((lookup["weight"], head)))}, *readings)

    return Layer(name, init, forward, backward)


def learned_positions(
    length: int,
    *,
    weight_init: Initializer = initializers.normal(0.02),  # noqa: B008 -- a pure function
    dtype: DTypeLike = float,
) -> Layer:
    """Adds a learned vector to each position, y_nt = x_nt + W[t].

        dE/dW[t] = sum_n dy_nt     dx = dy

    Inputs and outputs are [N, T, O] with T at most `length`, parameters `{"weight": [length, O]}`.

    Args:
      length: the number of positions that have a vector, the largest T.
      weight_init: the initialiser of W, as in `jax.nn.initializers`. The default is that of GPT-2.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      ValueError: `length` is not a positive integer.
      LayerError: the inputs or the parameters do not fit.

    References:
      "Convolutional Sequence to Sequence Learning", Gehring, Auli, Grangier, Yarats, Dauphin, 2017.

    Example:
      >>> import jax, jaxbp as bp
      >>> net = bp.chain(bp.embedding(5, 2), bp.learned_positions(16))
      >>> params, out_shape = net.init(jax.random.key(0), (10,))
      >>> out_shape, params[1]["weight"].shape
      ((10, 2), (16, 2))
    """
    length = require_count("learned_positions", "length", length)
    name = f"learned_positions({length})"

    def init(key, shape):
        require_key(name, "key", key)
        shape = _require_sequence(name, shape, length)
        return {"weight": weight_init(key, (length, shape[-1]), dtype)}, shape

    def forward(params, x, *, key=None):
        del key
        require_floats(name, x)
        _require_sequence(name, x.shape[1:], length)
        require_params(name, params, {"weight": (length, x.shape[-1])})
        require_floats(name, x, params["weight"].dtype)
        return x + gathered(params["weight"], x)[: x.shape[1]], shape_alone(x)

    def backward(params, cache, dy, *, read=keep):
        shape = require_shape_alone(name, cache)
        require_delta(name, dy, shape)
        require_params(name, params, {"weight": (length, shape[-1])})
        rows = repeated(jnp.arange(dy.shape[1]), dy)
        table = gathered(params["weight"], dy)[:, :0]
        return dy, {"weight": read(Lookup(rows, dy, table))}

    return Layer(name, init, forward, backward)


def sinusoidal_positions(base: float = 10_000.0) -> Layer:
    """Adds sines and cosines of many wavelengths to each position, y_nt = x_nt + p_t. dx = dy.

        p_t[2 i] = sin(t / base^(2 i / O)),   p_t[2 i + 1] = cos(t / base^(2 i / O))

    Inputs and outputs are [N, T, O] with an even O. There are no parameters.

    Args:
      base: a positive number. Wavelengths go from 2 pi to nearly 2 pi `base`.

    Raises:
      ValueError: `base` is not positive.
      LayerError: the inputs are not [N, T, O], or O is odd.

    References:
      "Attention Is All You Need", Vaswani et al., 2017.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.sinusoidal_positions().forward((), jnp.zeros((1, 3, 4)))
      >>> y[0, 0].tolist(), bool(jnp.allclose(y[0, 1, :2], jnp.array([jnp.sin(1), jnp.cos(1)])))
      ([0.0, 1.0, 0.0, 1.0], True)
    """
    require_positive("sinusoidal_positions", "base", base)
    name = "sinusoidal_positions"

    def require(shape):
        shape = _require_sequence(name, shape)
        if shape[-1] % 2:
            raise LayerError(
                name, f"got inputs with O = {shape[-1]}; pairs of sine and cosine take an even O."
            )
        return shape

    def init(key, shape):
        del key
        return (), require(shape)

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        t, o = require(x.shape[1:])
        wide = widened(x).dtype
        angles = jnp.arange(t, dtype=wide)[:, None] / base ** (jnp.arange(0, o, 2, dtype=wide) / o)
        waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(t, o)
        return x + waves.astype(x.dtype), shape_alone(x)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        require_delta(name, dy, require_shape_alone(name, cache))
        return dy, ()

    return Layer(name, init, forward, backward)


def _require_token(name: str, argument: str, value: Any, vocabulary: int) -> int:
    """Returns a token as an integer of Python; raises unless it is one of the vocabulary."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"{name}: {argument} is {value!r}; it takes a token, an integer.")
    token = int(value)
    if not 0 <= token < vocabulary:
        raise ValueError(f"{name}: {argument} is {token}; the tokens are 0 to {vocabulary - 1}.")
    return token


def _require_sequence(name: str, shape: Shape, length: int | None = None) -> Shape:
    """Returns the shape of one example, or raises if it is not [T, O] with T at most `length`."""
    shape = require_shape(name, shape)
    if len(shape) != 2:
        raise LayerError(
            name, f"got inputs of shape {show_shape(('N', *shape))}; it takes [N, T, O]."
        )
    if length is not None and shape[0] > length:
        raise LayerError(name, f"got {shape[0]} positions; it has vectors for {length}.")
    return shape
