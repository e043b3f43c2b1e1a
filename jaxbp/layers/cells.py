"""Cells: how the state of a recurrent layer changes in one step of a sequence.

At each step a cell has two inputs. The drive a_t = x_t W + b comes from the inputs of the layer.
The echo e_t = h_(t-1) U (+ c) comes from the previous outputs of the cell. `recurrent` computes
both, and the cell computes the new state from them. A cell is elementwise: each of its H units
has G gates, which read G numbers of a and G numbers of e, and a state of one part (h) or two parts
(h and c). No unit sees another. The derivatives are elementwise too, and stand beside the formulas.

Two forms need a second product within a step, between two elementwise parts: v = u V, an `Inner`.
In a `gru` with its reset before the product, v is the echo of the candidate, and in an `lstm` with
a projection it is the output. The cell gets this product as a function.

Letters in addition to those of `types`:

    H   units                  s(x)    the logistic function, 1 / (1 + e^-x)
    G   gates of each unit     a, da   the drive and dE/da, [N, G H]: the first gate of all units,
                                       then the second gate of all units, and so on
                               e, de   the echo and dE/de, [N, G H], in the same order
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxbp.require import require_count

__all__ = ["Cell", "Inner", "gru", "lstm", "simple_rnn"]


class Inner(NamedTuple):
    """A product within the step of a cell, v = u V, after which units have seen each other.

    Attributes:
      name: the name of the parameter V, such as `candidate`.
      inputs: the size of u.
      outputs: the size of v.
      gates: the number of gates, the last ones, whose echo is v. U has no columns for them. If it
        is 0, v is the output h.
    """

    name: str
    inputs: int
    outputs: int
    gates: int


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
      inner: the product within a step, or None. With one, both functions get it as a last argument,
        `product(u)` for u V in the forward pass and `product(dv)` for dv V^T in the backward pass,
        and return its operand as a last result, u [N, inputs] or dv [N, outputs].
    """

    name: str
    features: int
    gates: int
    parts: int
    recurrent_bias: bool
    bias_init: Callable[..., jax.Array]
    forward: Callable[..., tuple]
    backward: Callable[..., tuple]
    inner: Inner | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size of each part of the state; the first is that of the output h."""
        inner, units = self.inner, self.features
        outputs = units if inner is None or inner.gates else inner.outputs
        return (outputs, *[units] * (self.parts - 1))

    @property
    def echoes(self) -> int:
        """The number of gates whose echo is a part of h U, the first ones."""
        return self.gates - (self.inner.gates if self.inner else 0)


# Each with its derivative, as a function of the output.
ACTIVATIONS: dict[str, tuple[Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    "tanh": (jnp.tanh, lambda h, dh: (1 - h * h) * dh),
    "relu": (lambda x: jnp.where(x <= 0, 0, x), lambda h, dh: jnp.where(h > 0, dh, 0)),
    "sigmoid": (jax.nn.sigmoid, lambda h, dh: h * (1 - h) * dh),
}


def simple_rnn(features: int, *, activation: Literal["tanh", "relu", "sigmoid"] = "tanh") -> Cell:
    """The simple recurrent cell: h = f(a + e). da = de = f'(a + e) dh.

    In `recurrent`, the drive is a = x W + b and the echo is e = h' U, with h' the previous h.

        tanh       f' = 1 - h^2
        relu       f' = 1 where h > 0, else 0
        sigmoid    f' = h (1 - h)

    Args:
      features: H, the number of units.
      activation: f.

    Raises:
      ValueError: `features` is not a positive integer, or `activation` is not one of these names.

    References:
      "Finding Structure in Time", Elman, 1990.
      "A Simple Way to Initialize Recurrent Networks of Rectified Linear Units", Le, Jaitly, Hinton,
      2015: relu.

    Example:
      >>> import jax, jaxbp as bp
      >>> params, out_shape = bp.recurrent(bp.simple_rnn(4)).init(jax.random.key(0), (7, 3))
      >>> out_shape, params["weight"].shape, params["recurrent"].shape
      ((7, 4), (3, 4), (4, 4))
    """
    features = require_count("simple_rnn", "features", features)
    if activation not in tuple(ACTIVATIONS):
        raise ValueError(
            f"simple_rnn: activation is {activation!r}; it takes 'tanh', 'relu' or 'sigmoid'."
        )
    activate, derivative = ACTIVATIONS[activation]

    def forward(a, e, state):
        del state
        h = activate(a + e)
        return (h,), (h,)

    def backward(kept, before, dstate):
        (h,), (dh,) = kept, dstate
        return (derivative(h, dh),), tuple(map(jnp.zeros_like, before))

    of = "" if activation == "tanh" else f", activation={activation!r}"
    name = f"simple_rnn({features}{of})"
    return Cell(name, features, 1, 1, False, initializers.zeros, forward, backward)


def lstm(features: int, *, projection: int | None = None, forget_bias: float = 1.0) -> Cell:
    """Long short-term memory: a memory c, and gates that write to it, keep it and read it.

        i, f, o = s(a + e)     g = tanh(a + e)     c = f c' + i g     h = o tanh(c)

    In `recurrent`, the drive is a = x W + b and the echo is e = h' U. Here h' and c' are the
    previous h and c, s is the logistic function, and each gate has its own part of a and e, in the
    order i, f, g, o. The state is (h, c). Backward, with q = tanh(c) and dc += o (1 - q^2) dh:

        di = i (1 - i) g dc    df = f (1 - f) c' dc    dg = (1 - g^2) i dc    do = o (1 - o) q dh
        da = de = (di, df, dg, do)                     dc' = f dc

    where di, df, dg and do are derivatives with respect to the arguments of s and tanh.

    With a projection of size P, the output is h = m V for m = o q, and has P numbers instead of H.
    U is then [P, 4 H], and V is one more parameter, `"projection"` [H, P]. Backward, dh V^T takes
    the place of dh in the formulas, and dE/dV = sum_nt m_nt dh_nt^T.

    Args:
      features: H, the number of units.
      projection: P, the size of the output, or None for H without a projection.
      forget_bias: the initial b of the forget gate f; that of the other gates is zero. A positive
        value makes the memory keep its content at the beginning of training.

    Raises:
      ValueError: `features` or `projection` is not a positive integer.

    References:
      "Long Short-Term Memory", Hochreiter, Schmidhuber, 1997.
      "Learning to Forget: Continual Prediction with LSTM", Gers, Schmidhuber, Cummins, 2000: the
      forget gate.
      "An Empirical Exploration of Recurrent Network Architectures", Jozefowicz, Zaremba, Sutskever,
      2015: the bias of the forget gate.
      "Long Short-Term Memory Based Recurrent Neural Network Architectures for Large Vocabulary
      Speech Recognition", Sak, Senior, Beaufays, 2014: the projection.

    Example:
      >>> import jax, jaxbp as bp
      >>> params, _ = bp.recurrent(bp.lstm(2)).init(jax.random.key(0), (7, 3))
      >>> params["bias"].tolist()
      [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    features = require_count("lstm", "features", features)
    name, inner = f"lstm({features})", None
    if projection is not None:
        projection = require_count("lstm", "projection", projection)
        name = f"lstm({features}, projection={projection})"
        inner = Inner("projection", features, projection, 0)

    def bias_init(key, shape, dtype=float):
        del key
        gates = jnp.zeros((4, shape[0] // 4), dtype).at[1].set(forget_bias)
        return gates.reshape(shape)

    def forward(a, e, state, product=None):
        _, c = state
        i, f, g, o = jnp.split(a + e, 4, axis=-1)
        i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
        c = f * c + i * g
        m = o * jnp.tanh(c)
        kept = (jnp.concatenate([i, f, g, o], axis=-1),)
        return ((m, c), kept) if product is None else ((product(m), c), kept, m)

    def backward(kept, before, dstate, product=None):
        i, f, g, o = jnp.split(kept[0], 4, axis=-1)
        (_, c), (dh, dc) = before, dstate
        dm = dh if product is None else product(dh)
        # tanh(c) is computed again. To keep it would take a third array [N, T, H] beside h and c.
        q = jnp.tanh(f * c + i * g)
        dc = dc + dm * o * (1 - q * q)
        di, df = dc * g * i * (1 - i), dc * c * f * (1 - f)
        dg, do = dc * i * (1 - g * g), dm * q * o * (1 - o)
        deltas = (jnp.concatenate([di, df, dg, do], axis=-1),)
        dbefore = jnp.zeros_like(dh), dc * f
        return (deltas, dbefore) if product is None else (deltas, dbefore, dh)

    return Cell(name, features, 4, 2, False, bias_init, forward, backward, inner)


def gru(features: int, *, reset: Literal["after", "before"] = "after") -> Cell:
    """The gated recurrent unit: the gate z mixes the previous state with a new one.

        r, z = s(a + e)     n = tanh(a + r e)     h = (1 - z) n + z h'

    In `recurrent`, the drive is a = x W + b and the echo is e = h' U + c. Here h' is the previous
    h, s is the logistic function, and each gate has its own part of a and e, in the order r, z, n.

    This form applies the reset gate r to the echo, after the product with U, as cuDNN and PyTorch
    do. One product then gives the echo of all gates. The derivatives with respect to drive and echo
    differ:

        dn = (1 - n^2) (1 - z) dh     dz = z (1 - z) (h' - n) dh     dr = r (1 - r) e dn
        da = (dr, dz, dn)             de = (dr, dz, r dn)            dh' = z dh

    where dr, dz and dn are derivatives with respect to the arguments of s and tanh, e in dr is the
    echo of n, and dh' leaves out the path through the echo.

    The original form, with `reset="before"`, applies r to h' before the product, n = tanh(a + u V)
    with u = r h'. U is then [H, 2 H], for r and z, and V is a parameter of its own, `"candidate"`
    [H, H]. There is no bias c, since da = de:

        du = dn V^T     dr = r (1 - r) h' du     dh' = z dh + r du     dE/dV = sum_nt u_nt dn_nt^T

    Args:
      features: H, the number of units.
      reset: whether r is applied after the product with the recurrent weights, or before it.

    Raises:
      ValueError: `features` is not a positive integer, or `reset` is not one of the two words.

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
    if reset not in ("after", "before"):
        raise ValueError(f"gru: reset is {reset!r}; it takes 'after' or 'before'.")
    if reset == "before":
        return _gru_with_reset_before(features)

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


def _gru_with_reset_before(features: int) -> Cell:
    """The original form of `gru`."""

    def forward(a, e, state, product):
        (h,) = state
        (a_r, a_z, a_n), (e_r, e_z) = jnp.split(a, 3, axis=-1), jnp.split(e, 2, axis=-1)
        r, z = jax.nn.sigmoid(a_r + e_r), jax.nn.sigmoid(a_z + e_z)
        u = r * h
        n = jnp.tanh(a_n + product(u))
        return (n + z * (h - n),), (jnp.concatenate([r, z, n], axis=-1),), u

    def backward(kept, before, dstate, product):
        r, z, n = jnp.split(kept[0], 3, axis=-1)
        (h,), (dh,) = before, dstate
        dn = dh * (1 - z) * (1 - n * n)
        du = product(dn)
        dz, dr = dh * (h - n) * z * (1 - z), du * h * r * (1 - r)
        return (jnp.concatenate([dr, dz, dn], axis=-1),), (dh * z + du * r,), dn

    name = f"gru({features}, reset='before')"
    inner = Inner("candidate", features, features, 1)
    return Cell(name, features, 3, 1, False, initializers.zeros, forward, backward, inner)
