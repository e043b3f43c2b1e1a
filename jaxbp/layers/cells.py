"""Cells: how the state of a recurrent layer changes in one step of a sequence.

At each step a cell has two inputs. The drive a_t = x_t W + b comes from the inputs of the layer.
The echo e_t = h_(t-1) U (+ c) comes from the previous outputs of the cell. `recurrent` computes
both, and the cell computes the new state from them. A cell is elementwise: each of its H units
has G gates, which read G numbers of a and G numbers of e, and a state of one part (h) or two parts
(h and c). No unit sees another. The derivatives are elementwise too, and stand beside the formulas.

Letters in addition to those of `types`:

    H   units                  s(x)    the logistic function, 1 / (1 + e^-x)
    G   gates of each unit     a, da   the drive and dE/da, [N, G H]: the first gate of all units,
                                       then the second gate of all units, and so on
                               e, de   the echo and dE/de, [N, G H], in the same order
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxbp.require import require_count

__all__ = ["Cell", "gru", "lstm", "simple_rnn"]


class Cell(NamedTuple):
    """The elementwise formulas of a recurrent layer, and their derivatives.

    `simple_rnn`, `lstm` and `gru` make cells. To try another one, make a `Cell` of your own and
    pass it to `recurrent`.

    Attributes:
      name: the name in messages and tables, such as `lstm(10)`.
      features: H, the number of units.
      gates: G, the number of gates of each unit.
      parts: the number of arrays [N, H] in the state. The first one is h, the output.
      recurrent_bias: whether the echo has a bias c of its own. It needs one if de differs from da.
      bias_init: the initialiser of b, called as `bias_init(key, shape, dtype)`.
      forward: `forward(a, e, state) -> (state, kept)`. `state` is the tuple of its parts. `kept` is
        a tuple of arrays [N, G H], as many as `deltas` has: the backward pass overwrites the one
        with the other.
      backward: `backward(kept, before, dstate) -> (deltas, dbefore)`. `before` is the state before
        the step, and `dstate` the derivative with respect to the state after it. `deltas` is
        (da, de), or (da,) if both are equal. `dbefore` is the derivative with respect to `before`,
        without the path through the echo.
    """

    name: str
    features: int
    gates: int
    parts: int
    recurrent_bias: bool
    bias_init: Callable[..., jax.Array]
    forward: Callable[..., tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]]
    backward: Callable[..., tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]]


def simple_rnn(features: int) -> Cell:
    """The simple recurrent cell: h = tanh(a + e). da = de = (1 - h^2) dh.

    In `recurrent`, the drive is a = x W + b and the echo is e = h' U, with h' the previous h.

    Args:
      features: H, the number of units.

    Raises:
      ValueError: `features` is not a positive integer.

    References:
      "Finding Structure in Time", Elman, 1990.

    Example:
      >>> import jax, jaxbp as bp
      >>> params, out_shape = bp.recurrent(bp.simple_rnn(4)).init(jax.random.key(0), (7, 3))
      >>> out_shape, params["weight"].shape, params["recurrent"].shape
      ((7, 4), (3, 4), (4, 4))
    """
    features = require_count("simple_rnn", "features", features)

    def forward(a, e, state):
        del state
        h = jnp.tanh(a + e)
        return (h,), (h,)

    def backward(kept, before, dstate):
        (h,), (dh,) = kept, dstate
        return ((1 - h * h) * dh,), tuple(map(jnp.zeros_like, before))

    name = f"simple_rnn({features})"
    return Cell(name, features, 1, 1, False, initializers.zeros, forward, backward)


def lstm(features: int, *, forget_bias: float = 1.0) -> Cell:
    """Long short-term memory: a memory c, and gates that write to it, keep it and read it.

        i, f, o = s(a + e)     g = tanh(a + e)     c = f c' + i g     h = o tanh(c)

    In `recurrent`, the drive is a = x W + b and the echo is e = h' U. Here h' and c' are the
    previous h and c, s is the logistic function, and each gate has its own part of a and e, in the
    order i, f, g, o. The state is (h, c). Backward, with q = tanh(c) and dc += o (1 - q^2) dh:

        di = i (1 - i) g dc    df = f (1 - f) c' dc    dg = (1 - g^2) i dc    do = o (1 - o) q dh
        da = de = (di, df, dg, do)                     dc' = f dc

    where di, df, dg and do are derivatives with respect to the arguments of s and tanh.

    Args:
      features: H, the number of units.
      forget_bias: the initial b of the forget gate f; that of the other gates is zero. A positive
        value makes the memory keep its content at the beginning of training.

    Raises:
      ValueError: `features` is not a positive integer.

    References:
      "Long Short-Term Memory", Hochreiter, Schmidhuber, 1997.
      "Learning to Forget: Continual Prediction with LSTM", Gers, Schmidhuber, Cummins, 2000: the
      forget gate.
      "An Empirical Exploration of Recurrent Network Architectures", Jozefowicz, Zaremba, Sutskever,
      2015: the bias of the forget gate.

    Example:
      >>> import jax, jaxbp as bp
      >>> params, _ = bp.recurrent(bp.lstm(2)).init(jax.random.key(0), (7, 3))
      >>> params["bias"].tolist()
      [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    features = require_count("lstm", "features", features)

    def bias_init(key, shape, dtype=float):
        del key
        gates = jnp.zeros((4, shape[0] // 4), dtype).at[1].set(forget_bias)
        return gates.reshape(shape)

    def forward(a, e, state):
        _, c = state
        i, f, g, o = jnp.split(a + e, 4, axis=-1)
        i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
        c = f * c + i * g
        return (o * jnp.tanh(c), c), (jnp.concatenate([i, f, g, o], axis=-1),)

    def backward(kept, before, dstate):
        i, f, g, o = jnp.split(kept[0], 4, axis=-1)
        (_, c), (dh, dc) = before, dstate
        # tanh(c) is computed again. To keep it would take a third array [N, T, H] beside h and c.
        q = jnp.tanh(f * c + i * g)
        dc = dc + dh * o * (1 - q * q)
        di, df = dc * g * i * (1 - i), dc * c * f * (1 - f)
        dg, do = dc * i * (1 - g * g), dh * q * o * (1 - o)
        deltas = jnp.concatenate([di, df, dg, do], axis=-1)
        return (deltas,), (jnp.zeros_like(dh), dc * f)

    return Cell(f"lstm({features})", features, 4, 2, False, bias_init, forward, backward)


def gru(features: int) -> Cell:
    """The gated recurrent unit: the gate z mixes the previous state with a new one.

        r, z = s(a + e)     n = tanh(a + r e)     h = (1 - z) n + z h'

    In `recurrent`, the drive is a = x W + b and the echo is e = h' U + c. Here h' is the previous
    h, s is the logistic function, and each gate has its own part of a and e, in the order r, z, n.

    This form applies the reset gate r to the echo, after the product with U. One product then gives
    the echo of all gates. (The original form applies r to h', before the product.) The derivatives
    with respect to drive and echo differ:

        dn = (1 - n^2) (1 - z) dh     dz = z (1 - z) (h' - n) dh     dr = r (1 - r) e dn
        da = (dr, dz, dn)             de = (dr, dz, r dn)            dh' = z dh

    where dr, dz and dn are derivatives with respect to the arguments of s and tanh, e in dr is the
    echo of n, and dh' leaves out the path through the echo.

    Args:
      features: H, the number of units.

    Raises:
      ValueError: `features` is not a positive integer.

    References:
      "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine
      Translation", Cho et al., 2014.

    Example:
      >>> import jax, jaxbp as bp
      >>> params, _ = bp.recurrent(bp.gru(2)).init(jax.random.key(0), (7, 3))
      >>> sorted(params)
      ['bias', 'recurrent', 'recurrent_bias', 'weight']
    """
    features = require_count("gru", "features", features)

    def forward(a, e, state):
        (h,) = state
        (a_r, a_z, a_n), (e_r, e_z, e_n) = (jnp.split(x, 3, axis=-1) for x in (a, e))
        r, z = jax.nn.sigmoid(a_r + e_r), jax.nn.sigmoid(a_z + e_z)
        n = jnp.tanh(a_n + r * e_n)
        return (n + z * (h - n),), (jnp.concatenate([r, z, n], axis=-1), e)

    def backward(kept, before, dstate):
        (r, z, n), (*_, e) = (jnp.split(x, 3, axis=-1) for x in kept)
        (h,), (dh,) = before, dstate
        dn = dh * (1 - z) * (1 - n * n)
        dz, dr = dh * (h - n) * z * (1 - z), dn * e * r * (1 - r)
        da, de = (jnp.concatenate([dr, dz, last], axis=-1) for last in (dn, dn * r))
        return (da, de), (dh * z,)

    return Cell(f"gru({features})", features, 3, 1, True, initializers.zeros, forward, backward)
