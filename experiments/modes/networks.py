"""The networks that the calls are tried on, with a loss and data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbp as bp
from jaxbp.types import PyTree

EXAMPLES = 16


class Subject(NamedTuple):
    """A network with its parameters, a loss, and a batch.

    Attributes:
      net: the network.
      loss: the loss.
      params: its parameters.
      inputs: [N, ...].
      targets: [N, ...].
    """

    net: bp.Layer
    loss: bp.Loss
    params: PyTree
    inputs: jax.Array
    targets: jax.Array


def make_subject(name: str) -> Subject:
    """Makes one of `NETWORKS`, in JAX's default dtype."""
    net, shape, tokens, positions = NETWORKS[name]()
    rng = np.random.default_rng(0)
    if tokens:
        inputs = jnp.asarray(rng.integers(tokens, size=(EXAMPLES, *shape)))
    else:
        inputs = jnp.asarray(rng.normal(size=(EXAMPLES, *shape)), float)
    params, (*_, classes) = net.init(jax.random.key(0), shape)
    targets = jnp.asarray(rng.integers(classes, size=(EXAMPLES, *positions)))
    return Subject(net, bp.softmax_cross_entropy, params, inputs, targets)


def _mlp():
    net = bp.chain(bp.dense(8), bp.layer_norm(), bp.relu(), bp.dropout(0.2), bp.dense(5))
    return net, (6,), 0, ()


def _convnet():
    net = bp.chain(
        *[bp.conv(4, (3, 3)), bp.group_norm(2), bp.relu(), bp.max_pool((2, 2))],
        *[bp.conv(6, (3, 3), groups=2), bp.gelu(), bp.global_pool(), bp.dense(3)],
    )
    return net, (6, 6, 2), 0, ()


def _gpt():
    block = bp.chain(
        bp.residual(bp.layer_norm(), bp.attention(8, 2, causal=True, lean=True)),
        bp.residual(bp.layer_norm(), bp.dense(16), bp.gelu(), bp.dense(8)),
    )
    stacked = bp.stack(bp.remat(block), 2)
    table = bp.tied_embedding(7, 8, bp.learned_positions(5), stacked, bp.layer_norm())
    return table, (5,), 7, (5,)


def _lstm():
    net = bp.chain(
        bp.recurrent(bp.lstm(4), learn_initial=True), bp.recurrent(bp.gru(3)), bp.dense(3)
    )
    return net, (5, 4), 0, (5,)


def _lifted():
    def apply(params: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ params["in"] + params["shift"])
        h, _ = jax.lax.scan(lambda h, w: (h + jax.nn.silu(h @ w), None), h, params["inner"])
        return jnp.einsum("nto,oc->ntc", h * params["gain"], params["out"])

    def init(key: jax.Array) -> dict[str, jax.Array]:
        shapes = {"in": (4, 6), "shift": (6,), "inner": (2, 6, 6), "gain": (6,), "out": (6, 3)}
        keys = jax.random.split(key, len(shapes))
        return {
            own: jax.random.normal(key, shape, float)
            for key, (own, shape) in zip(keys, shapes.items(), strict=True)
        }

    net, _ = bp.lift(apply, init(jax.random.key(1)), jnp.ones((2, 5, 4)), init=init)
    return net, (5, 4), 0, (5,)


# Each returns a network, the shape of an example, the number of tokens that the examples are of (0
# for numbers), and the positions of a target.
NETWORKS: dict[str, Callable[[], tuple]] = {
    "MLP": _mlp,
    "convolutions": _convnet,
    "GPT": _gpt,
    "LSTM": _lstm,
    "lifted": _lifted,
}
