"""Credit in recurrent layers that does not have to travel back through time.

Backpropagation through time waits for the end of a sequence and then goes back through all of it.
Carried forward, credit is there at each step: with the influence of a parameter on the state,
M_t = ds_t / d theta, and L_t = dE/dh_t, what the error says of the outputs of this step,

  dE/d theta = sum_t L_t . M_t,     M_t = D_t M_(t-1) + I_t     (L_t of the rows of h)

I_t is what the parameter does to s_t at the step, and D_t = ds_t / ds_(t-1), by which units
influence each other. How much of the two is kept makes the rule; J is what a unit's state does to
the next within the unit, without U:

  rule      D_t                                          M has, for each example
  rtrl      all of it                                    all units by all parameters
  snap1     of each unit by itself: J, and U_jj          one number for each parameter and part
  eprop     J alone                                      the same

Since D_t of the last two leads from a unit to itself alone, the sum over t can be taken in either
order: they ARE backward sweeps, through a tree in which U is its diagonal (of each gate), or zero.
So they are carried out here, with a signal of the same kind and the same positions as that of
`exact`, and every reading holds. An online learner would carry M forward, in N numbers for each
parameter and part whatever T is.

Rules concern the layers of `recurrent` alone; the others are exact. L_t comes as the network brings
it: with `direct_feedback(*blocks, rules=[eprop(), exact()])` it is broadcast by a random matrix.
"""

import jax
import jax.numpy as jnp

from jaxbp.layers.recurrence import ForwardInTime
from jaxbp.rules.feedback import exact, wrong_state


def rtrl():
    """Real-time recurrent learning: the exact gradient, carried forward in time.

    Backward then goes through the steps from the first to the last. What is read off the gradients
    of examples (`total`, `mean`, `per_example`, `sq_norms`, ...) is that of `exact`. The operands
    are not, since a step has none: those of a matrix [I, O] are its rows, N of them unit vectors,
    with the gradients of the examples; so of `kronecker` there are other factors. dx takes the
    way of `exact`, as a layer below has to.

    For small cells: each example carries P H (I + H) G H numbers, P the parts of the state, and
    each step takes P H times as many multiplications.

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


def snap1():
    """SnAp-1, the sparse approximation of `rtrl` with an influence of one step's reach.

    Of a parameter of unit j it keeps the influence on the state of j, of which U_jj is a part: in
    an `lstm` that on h_j and on c_j, for each of the gates. A `gru` is of the form that has such
    an influence from each parameter on one unit alone.

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


def eprop():
    """E-prop: an eligibility trace for each parameter, and the error at the step as what teaches.

    The trace goes on as the state does within its unit: in an `lstm` by its forget gate, in a `gru`
    by z. In a `simple_rnn`, whose state lives on through U alone, it lasts for one step.

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


def _of_recurrent(name, change):
    """The rule that changes the parameters of recurrent layers for backward, and no others."""

    def is_recurrent(node):
        return isinstance(node, dict) and "recurrent" in node

    def choose(state, params, *, key=None):
        del key
        if jax.tree.leaves(state):
            raise wrong_state(name, "it remembers nothing")
        return jax.tree.map(
            lambda node: change(node) if is_recurrent(node) else node, params, is_leaf=is_recurrent
        )

    return exact()._replace(name=name, choose=choose)
