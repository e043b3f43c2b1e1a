"""Cells: what becomes of a recurrent layer's state from one step of time to the next.

At each step a cell meets the drive of the inputs, a_t = x_t W + b, and the echo of its own outputs,
e_t = h_(t-1) U (+ c). What it makes of them is elementwise: each of its H units has G gates, G
numbers of a and of e, a state of one part, h, or of two, h and c, and sees no other unit. So are
its derivatives, which stand beside it. The products with W and U are the business of `recurrent`.

Letters beside those of `types`:

  H   units                               a, da   the drive and dE/da, [N, G H]: all units' first
  G   gates of each unit                          gates, then all units' second gates, ...
  s(x) = 1 / (1 + e^-x)                   e, de   the echo and dE/de, the same
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxbp.require import require_count


class Cell(NamedTuple):
    """The elementwise formulas of a recurrent layer, and their derivatives.

    Attributes:
      name: what messages and tables call it, such as `lstm(10)`.
      features: H.
      gates: G.
      parts: how many arrays [N, H] the state has; the first is h, the output.
      recurrent_bias: whether the echo has a bias c of its own, since its derivative is not that of
        the drive: de != da.
      bias_init: an initialiser in the form of `jax.nn.initializers`, for b.
      forward: `forward(a, e, state) -> (state, kept)`. `state` is a tuple of its parts, and `kept`
        a tuple of arrays [N, G H], as many as there are of `deltas`, which take their place.
      backward: `backward(kept, before, dstate) -> (deltas, dbefore)`, with the state before the
        step. `deltas` is (da, de), or (da,) if they are the same; `dbefore` the derivative with
        respect to the state before, at a given echo.
    """

    name: str
    features: int
    gates: int
    parts: int
    recurrent_bias: bool
    bias_init: Callable[..., jax.Array]
    forward: Callable[..., tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]]
    backward: Callable[..., tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]]


def simple_rnn(features):
    """The simple recurrent cell: h = tanh(a + e). da = de = (1 - h^2) dh.

    Args:
      features: H.

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
    require_count("simple_rnn", "features", features)

    def forward(a, e, state):
        del state
        h = jnp.tanh(a + e)
        return (h,), (h,)

    def backward(kept, before, dstate):
        (h,), (dh,) = kept, dstate
        return ((1 - h * h) * dh,), tuple(map(jnp.zeros_like, before))

    name = f"simple_rnn({features})"
    return Cell(name, features, 1, 1, False, initializers.zeros, forward, backward)


def lstm(features, *, forget_bias=1.0):
    """Long short-term memory: a memory c that gates write to, keep, and read.

      i, f, o = s(a + e)     g = tanh(a + e)     c = f c' + i g     h = o tanh(c)

    with c' the memory before. The gates stand in the order i, f, g, o. With q = tanh(c) and
    dc += o (1 - q^2) dh:

      di = i (1 - i) g dc    df = f (1 - f) c' dc    dg = (1 - g^2) i dc    do = o (1 - o) q dh
      dc' = f dc

    Args:
      features: H.
      forget_bias: what b is for the forget gate f before training; it is zero for the others. The
        memory then begins by keeping what it has.

    Raises:
      ValueError: `features` is not a positive integer.

    References:
      "Long Short-Term Memory", Hochreiter, Schmidhuber, 1997.
      "Learning to Forget: Continual Prediction with LSTM", Gers, Schmidhuber, Cummins, 2000: f.
      "An Empirical Exploration of Recurrent Network Architectures", Jozefowicz, Zaremba, Sutskever,
      2015: its bias.

    Example:
      >>> import jax, jaxbp as bp
      >>> params, _ = bp.recurrent(bp.lstm(2)).init(jax.random.key(0), (7, 3))
      >>> params["bias"].tolist()
      [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    require_count("lstm", "features", features)

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
        # Once more: a third of what a step keeps beside the gates is saved for one tanh.
        q = jnp.tanh(f * c + i * g)
        dc = dc + dh * o * (1 - q * q)
        di, df = dc * g * i * (1 - i), dc * c * f * (1 - f)
        dg, do = dc * i * (1 - g * g), dh * q * o * (1 - o)
        deltas = jnp.concatenate([di, df, dg, do], axis=-1)
        return (deltas,), (jnp.zeros_like(dh), dc * f)

    return Cell(f"lstm({features})", features, 4, 2, False, bias_init, forward, backward)


def gru(features):
    """The gated recurrent unit: a state that gates overwrite in part.

      r, z = s(a + e)     n = tanh(a + r e)     h = (1 - z) n + z h'

    with h' the state before. The gates stand in the order r, z, n. This is the form in which the
    reset r is applied to the echo, behind the product, so that one product makes the echo of all
    gates; there the derivatives with respect to drive and echo differ:

      dn = (1 - n^2) (1 - z) dh     dz = z (1 - z) (h' - n) dh     dr = r (1 - r) e dn
      da = (dr, dz, dn)             de = (dr, dz, r dn)            dh' = z dh

    Args:
      features: H.

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
    require_count("gru", "features", features)

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
