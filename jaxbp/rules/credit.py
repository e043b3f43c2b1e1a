"""Rules for recurrent layers that assign credit forward in time.

Backpropagation through time waits for the end of a sequence and then goes back through all of it.
The rules here instead carry forward how each parameter has influenced the state, so that the
gradient of a step is known at that step. With M_t = ds_t / d theta the influence of a parameter on
the state, and L_t = dE/dh_t the error that the outputs of step t get from the layers above,

    dE/d theta = sum_t L_t . M_t,     M_t = D_t M_(t-1) + I_t     (L_t multiplies the rows of h)

I_t is the direct effect of the parameter on s_t, and D_t = ds_t / ds_(t-1) the effect of each
unit's state on the next state of all units. The rules differ in how much of D_t and M_t they keep.
J stands for the part of D_t that does not go through the recurrent weights U: the effect of a
unit's state on its own next state.

    rule      D_t                                   M has, for each example
    rtrl      all of it                             all units by all parameters
    snap1     each unit on itself: J, and U_jj      one number per parameter and part of the state
    eprop     J only                                the same

For the last two, D_t leads from each unit only to itself, so the sum over t can be taken in either
order. They are therefore backward passes through a tree in which U is replaced by its diagonal (of
each gate), or by zero. That is how they are computed here: the signal has the same kind and the
same positions as that of `exact`, and every reading works. An online learner would carry M forward,
in N numbers per parameter and part of the state, whatever T is.

The rules change only `recurrent` and `stateful` layers; all other layers are exact. They refuse
cells with an `Inner` product, in which a parameter influences several units within its step. L_t is
what the network carries to the outputs of the layer: with
`direct_feedback(*blocks, rules=[eprop(), exact()])` it is the output error times a random matrix.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.layers.recurrence import ForwardInTime
from jaxbp.rules.feedback import exact, wrong_state
from jaxbp.types import Rule

__all__ = ["eprop", "rtrl", "snap1"]


def rtrl() -> Rule:
    """Real-time recurrent learning: the exact gradient, computed forward in time.

    Backward goes through the steps from the first to the last. Readings of per-example gradients
    (`total`, `mean`, `per_example`, `sq_norms`, ...) are the same as with `exact`. The operands are
    not, because a single step has none: a matrix [I, O] gets I positions, with the unit vectors as
    inputs and the rows of the example's gradient as deltas. So the factors of `kronecker` differ.
    dx is computed as with `exact`, because a layer below needs it.

    Use it for small cells: with H units, G gates and P parts of the state, each example carries
    P H (I + H) G H numbers, and each step takes P H times as many multiplications.

    References:
      "A Learning Algorithm for Continually Running Fully Recurrent Neural Networks", Williams,
      Zipser, 1989.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.recurrent(bp.gru(4)), bp.dense(2))
      >>> params, _ = net.init(jax.random.key(0), (7, 3))
      >>> batch = jnp.ones((5, 7, 3)), jnp.zeros((5, 7, 2))
      >>> forward, exact = (
      ...     jax.jit(bp.value_and_grad(net, bp.squared_error, rule=rule))(params, *batch)[1]
      ...     for rule in (bp.rtrl(), bp.exact())
      ... )
      >>> bool(jnp.allclose(forward[0]["recurrent"], exact[0]["recurrent"], atol=1e-5))
      True
    """
    return _of_recurrent("rtrl", ForwardInTime)


def snap1() -> Rule:
    """SnAp-1: the sparse approximation of `rtrl` that keeps the influence of one step only.

    Of a parameter of unit j it keeps the influence on the state of unit j, which includes U_jj: in
    an `lstm` the influence on h_j and on c_j, for each gate. In the form of the `gru` here, too,
    each parameter directly influences only one unit.

    References:
      "A Practical Sparse Approximation for Real Time Recurrent Learning", Menick et al., 2021.

    Example:
      >>> import jax, jaxbp as bp
      >>> params, _ = bp.recurrent(bp.simple_rnn(2)).init(jax.random.key(0), (7, 3))
      >>> (bp.snap1().choose((), params)["recurrent"] != 0).tolist()
      [[True, False], [False, True]]
    """

    def diagonals(params):
        weight = params["recurrent"]
        h = weight.shape[-2]
        gates = weight.reshape(*weight.shape[:-1], weight.shape[-1] // h, h)
        own = gates * jnp.eye(h, dtype=weight.dtype)[:, None]
        return {**params, "recurrent": own.reshape(weight.shape)}

    return _of_recurrent("snap1", diagonals)


def eprop() -> Rule:
    """E-prop: an eligibility trace for each parameter, multiplied by the error of each step.

    The trace decays as the state does within its unit: in an `lstm` by the forget gate, in a `gru`
    by z. In a `simple_rnn` the state persists only through U, so the trace lasts for one step.

    References:
      "A solution to the learning dilemma for recurrent networks of spiking neurons", Bellec et al.,
      2020.

    Example:
      >>> import jax, jaxbp as bp
      >>> params, _ = bp.recurrent(bp.simple_rnn(2)).init(jax.random.key(0), (7, 3))
      >>> bp.eprop().choose((), params)["recurrent"].tolist()
      [[0.0, 0.0], [0.0, 0.0]]
    """
    return _of_recurrent(
        "eprop", lambda params: {**params, "recurrent": jnp.zeros_like(params["recurrent"])}
    )


def _of_recurrent(name: str, change: Callable[[Any], Any]) -> Rule:
    """The rule that changes the parameters of recurrent layers for backward, and no others."""
    elementwise = {"weight", "recurrent", "bias", "recurrent_bias", "initial"}

    def is_recurrent(node):
        return isinstance(node, dict) and "recurrent" in node

    def changed(node):
        inner = sorted(set(node) - elementwise)
        if inner:
            raise ValueError(
                f"{name}: a recurrent layer has a product within its steps, by its parameter "
                f"{inner[0]}; this rule takes elementwise cells, such as lstm(64) or gru(64)."
            )
        return change(node)

    def choose(state, params, *, key=None):
        del key
        if jax.tree.leaves(state):
            raise wrong_state(name, "this rule has no state")
        return jax.tree.map(
            lambda node: changed(node) if is_recurrent(node) else node, params, is_leaf=is_recurrent
        )

    return exact()._replace(name=name, choose=choose)
