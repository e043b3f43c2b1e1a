"""Rules: which weights carry the error back.

Exact backpropagation carries it by the weights that lead forward, dx = dy W^T. No neuron could know
those of another, and none has to: a sweep reads one tree, and any tree like the parameters will do.
What is read at each parameter stays as it is, the operands of its gradient, dE/dW = x dy^T.

  rule              carries the error by              and after each step
  exact             W
  random_feedback   B, fixed                          -
  sign_symmetric    M sign(W), magnitudes M > 0       -
  kolen_pollack     B                                 B is moved as W is, and decays as W does
  weight_mirror     B                                 B is drawn to W by noise sent through W

(One more, in `direct`, has the error leap over the layers between.) B is another draw by the
network's own initialisers, and the magnitudes are of its scale.

A rule of one's own is such a record, or changes one:

  >>> import optax, jaxbp as bp
  >>> def noisy(deviation):
  ...     def choose(state, params, *, key):
  ...         noise = optax.tree.random_like(key, params)
  ...         return optax.tree.add_scale(params, deviation, noise)
  ...     return bp.exact()._replace(name="noisy", choose=choose)
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbp.signals.stacked import Stacked, is_stacked, map_layers, one_layer, stack_axes
from jaxbp.types import Rule, show_path, show_shape, widened

# Away from the keys that layers split off: a rule that is made by the key of the parameters
# themselves must not draw the same numbers.
FEEDBACK_STREAM = 2**31


def exact():
    """Backpropagation: the weights that lead forward carry the error back.

    References:
      "Learning representations by back-propagating errors", Rumelhart, Hinton, Williams, 1986.

    Example:
      >>> import jax, jaxbp as bp
      >>> net, rule = bp.dense(2), bp.exact()
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> rule.choose(rule.make(jax.random.key(1), net, (3,)), params) is params
      True
    """

    def make(key, net, shape):
        del key, net, shape
        return ()

    def choose(state, params, *, key=None):
        del key
        if jax.tree.leaves(state):
            raise wrong_state("exact", "it remembers nothing")
        return params

    return Rule("exact", make, choose, _stay)


def matrices(path, leaf):
    """Whether a parameter is a matrix, which has two axes or more."""
    del path
    return leaf.ndim >= 2


def random_feedback(*, scale=1.0, where=matrices):
    """Feedback alignment: fixed random matrices B in the place of W. dx = dy B^T.

    The forward weights come to lie along B, and the error that B carries then teaches.

    Args:
      scale: B is another draw by the network's initialisers, times this. (Where they draw zeros,
        B is zero, and nothing comes back.)
      where: `where(path, leaf) -> bool`, which parameters have a B; `path` is such as `0.weight`,
        and `leaf` has the parameter's `shape`, `ndim` and `dtype` (in a stack, those of one of its
        layers, and one path for all, such as `1.layers.0.weight`). The first matrix of a network
        carries the error to the inputs alone: rules that update their B save that work by
        `where=lambda path, leaf: leaf.ndim >= 2 and path != "0.weight"`. A bias carries nothing.

    Raises:
      ValueError: on `make`, `where` matches nothing; on `choose`, the state is of another network.

    References:
      "Random synaptic feedback weights support error backpropagation for deep learning",
      Lillicrap, Cownden, Tweed, Akerman, 2016.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net, rule = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2)), bp.random_feedback()
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> rule_state = rule.make(jax.random.key(1), net, (3,))
      >>> sweep = bp.backprop(net, bp.squared_error, read=bp.sq_norms, rule=rule)
      >>> x, targets = jnp.ones((5, 3)), jnp.zeros((5, 2))
      >>> _, squares = sweep(params, x, targets, rule_state=rule_state)
      >>> bp.example_norms(squares).shape
      (5,)
    """
    make, choose = _drawn("random_feedback", scale, where)
    return Rule("random_feedback", make, choose, _stay)


class Magnitudes(NamedTuple):
    """What `sign_symmetric` remembers.

    Attributes:
      magnitudes: of each matrix that has some, M where they are fixed, else s.
    """

    magnitudes: Any


def sign_symmetric(magnitudes="uniform", *, scale=1.0, where=matrices):
    """Sign-symmetry: the signs of W, with magnitudes of their own. dx = dy (M sign(W))^T.

      uniform      M = s, one number for each matrix                       uSF
      fixed        M = s |xi|, drawn once                                  frSF
      batchwise    M = s |xi|, drawn anew for each batch                   brSF

    with xi ~ Normal(0, 1) for every entry. s is the root mean square of another draw by the
    network's initialisers, times `scale`. The sign of zero is zero.

    Args:
      magnitudes: `uniform`, `fixed` or `batchwise`.
      scale: as of `random_feedback`.
      where: as of `random_feedback`.

    Raises:
      ValueError: `magnitudes` is none of these; or as of `random_feedback`; or, on `choose`,
        batchwise magnitudes have no key.

    References:
      "How Important Is Weight Symmetry in Backpropagation?", Liao, Leibo, Poggio, 2016.
      "Feedback alignment in deep convolutional networks", Moskovitz, Litwin-Kumar, Abbott, 2018.

    Example:
      >>> import jax, jaxbp as bp
      >>> net, rule = bp.dense(2), bp.sign_symmetric()
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> tree = rule.choose(rule.make(jax.random.key(1), net, (3,)), params)
      >>> bool((tree["weight"] * params["weight"] > 0).all())
      True
    """
    kinds = "uniform", "fixed", "batchwise"
    if magnitudes not in kinds:
        raise ValueError(
            f"sign_symmetric: magnitudes is {magnitudes!r}; it takes one of {', '.join(kinds)}."
        )
    name = f"sign_symmetric({magnitudes!r})"

    def half_normal(key, s, like):
        return s * jnp.abs(jax.random.normal(key, like.shape, like.dtype))

    def root_mean_square(b):
        return jnp.sqrt(jnp.mean(jnp.square(widened(b)))).astype(b.dtype)

    def make(key, net, shape):
        draw = _draw(name, key, net, shape, scale, where)
        scales = map_layers(root_mean_square, draw)
        if magnitudes != "fixed":
            return Magnitudes(scales)
        keys = _keys_like(jax.random.fold_in(key, FEEDBACK_STREAM + 1), draw)
        return Magnitudes(map_layers(half_normal, keys, scales, draw))

    def choose(state, params, *, key=None):
        if not isinstance(state, Magnitudes):
            raise wrong_state(name, f"it is {type(state).__name__}, not Magnitudes")
        state = state.magnitudes
        _require_own(name, params, state, scalars=magnitudes != "fixed")
        if magnitudes != "batchwise":
            return _replace(lambda w, m: m * jnp.sign(w), params, state)
        if key is None:
            raise ValueError(f"{name}: draws magnitudes and needs a random key. Pass rule_key=...?")
        keys = _keys_like(key, params)
        return _replace(lambda w, s, k: half_normal(k, s, w) * jnp.sign(w), params, state, keys)

    return Rule(name, make, choose, _stay)


def kolen_pollack(*, scale=1.0, where=matrices):
    """Kolen-Pollack: B starts at random, and is moved and decays as W does. dx = dy B^T.

    The gradient of W is that of B too, so that their difference is left to weight decay: with a
    rate eta and a decay lambda, as of `optax.adamw`, B - W shrinks by 1 - eta lambda a step.
    Without weight decay it stays.

    Any optax optimizer will do. It is asked for B's update by its state for W, with B in the place
    of the parameters. So what it reads of them beside their decay (a trust ratio, a line search) it
    reads of B; of a decay that it has put into its momentum, only the newest step's is B's own; and
    where it remembers parameters (`schedule_free`, L-BFGS), they are those of W, which B then sees.

    Args:
      scale: of B at the start, as of `random_feedback`.
      where: as of `random_feedback`.

    Raises:
      ValueError: as of `random_feedback`.

    References:
      "Back-propagation without weight transport", Kolen, Pollack, 1994.
      "Deep Learning without Weight Transport", Akrout, Wilson, Humphreys, Lillicrap, Tweed, 2019.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxbp as bp
      >>> net, rule = bp.dense(2), bp.kolen_pollack()
      >>> optimizer = optax.adamw(0.1, weight_decay=0.5)
      >>> state = bp.init_state(net, optimizer, jax.random.key(0), (3,), rule=rule)
      >>> apart = state.rule_state["weight"] - state.params["weight"]
      >>> step = bp.make_step(net, bp.squared_error, optimizer, rule=rule)
      >>> state, _ = step(state, jnp.ones((5, 3)), jnp.zeros((5, 2)))
      >>> after = state.rule_state["weight"] - state.params["weight"]
      >>> bool(jnp.allclose(after, (1 - 0.1 * 0.5) * apart))
      True
    """
    make, choose = _drawn("kolen_pollack", scale, where)

    def update(feedback, params, *, move, key=None):
        del key
        moved = move(choose(feedback, params))
        return jax.tree.map(lambda b, old: None if old is None else b, moved, feedback)

    return Rule("kolen_pollack", make, choose, update)


class MirrorState(NamedTuple):
    """What `weight_mirror` remembers.

    Attributes:
      feedback: B, in place of each matrix that has one.
      step: how many steps have been made.
    """

    feedback: Any
    step: jax.Array


def weight_mirror(rate=0.1, *, examples=64, every=1, scale=1.0, where=matrices):
    """Weight mirrors: B is drawn to W by noise sent through W, between steps of learning.

      xi ~ Normal(0, 1)  [M, I],   zeta = xi W  [M, O],   B += rate (xi^T zeta / M - B)

    In a mirror phase each matrix has noise for its inputs and nothing else, and B comes to agree
    with what it answers: the mean of xi^T zeta / M is W. Biases, and what bends the answer behind
    the matrix, are shut off meanwhile. A matrix of more than two axes has all but the last of them
    as its inputs.

    Args:
      rate: how far B moves in a phase, and as much it forgets; in (0, 1].
      examples: M, of noise, in a phase.
      every: how many steps of learning there are to a phase.
      scale: of B at the start, as of `random_feedback`.
      where: as of `random_feedback`.

    Raises:
      ValueError: a number is out of range; or as of `random_feedback`; or, on `update`, there is no
        key.

    References:
      "Deep Learning without Weight Transport", Akrout, Wilson, Humphreys, Lillicrap, Tweed, 2019.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxbp as bp
      >>> net, rule = bp.dense(2), bp.weight_mirror(0.1, examples=1000)
      >>> state = bp.init_state(net, optax.sgd(0.0), jax.random.key(0), (3,), rule=rule)
      >>> step = bp.make_step(net, bp.squared_error, optax.sgd(0.0), rule=rule)
      >>> for _ in range(100):
      ...     state, _ = step(state, jnp.ones((5, 3)), jnp.zeros((5, 2)))
      >>> apart = state.rule_state.feedback["weight"] - state.params["weight"]
      >>> bool(jnp.max(jnp.abs(apart)) < 0.1)
      True
    """
    wrong = []
    if not 0 < rate <= 1:
        wrong.append(f"rate is {rate}, expected a number in (0, 1]")
    for argument, count in (("examples", examples), ("every", every)):
        if not isinstance(count, int) or count < 1:
            wrong.append(f"{argument} is {count!r}, expected a positive integer")
    if wrong:
        raise ValueError(f"weight_mirror: {'; '.join(wrong)}.")
    make_feedback, choose_feedback = _drawn("weight_mirror", scale, where)

    def make(key, net, shape):
        return MirrorState(make_feedback(key, net, shape), jnp.zeros((), jnp.int32))

    def choose(state, params, *, key=None):
        del key
        if not isinstance(state, MirrorState):
            raise wrong_state("weight_mirror", f"it is {type(state).__name__}, not MirrorState")
        return choose_feedback(state.feedback, params)

    def mirror(w, b, key):
        if b is None:
            return None
        matrix, wide = widened(w.reshape(-1, w.shape[-1])), widened(b)
        noise = jax.random.normal(key, (examples, len(matrix)), wide.dtype) / math.sqrt(examples)
        agreement = (noise.T @ (noise @ matrix)).reshape(b.shape)
        return (wide + jnp.asarray(rate, wide.dtype) * (agreement - wide)).astype(b.dtype)

    def update(state, params, *, move, key=None):
        del move
        if key is None:
            raise ValueError("weight_mirror: draws noise and needs a random key. Pass key=...?")
        feedback = jax.lax.cond(
            (state.step + 1) % every == 0,
            lambda: map_layers(mirror, params, state.feedback, _keys_like(key, params)),
            lambda: state.feedback,
        )
        return MirrorState(feedback, state.step + 1)

    return Rule("weight_mirror", make, choose, update)


def require_rule(name, rule):
    """Refuses what is no rule, for a function of this name."""
    if not isinstance(rule, Rule):
        raise ValueError(
            f"{name}: rule is {type(rule).__name__}, expected a Rule, such as exact()."
        )


def wrong_state(name, problem):
    """The error of a rule that got a state which is not its own, or of another network."""
    return ValueError(
        f"{name}: got a state that is not its own: {problem}. Make it for this rule and network, "
        "by init_state(..., rule=rule) or by rule.make(key, net, shape), and pass it on?"
    )


def _stay(state, params, *, move, key=None):
    """The update of a rule that learns nothing."""
    del params, move, key
    return state


def _drawn(name, scale, where):
    """The make and the choose of a rule that has a matrix B in the place of each W."""

    def make(key, net, shape):
        return _draw(name, key, net, shape, scale, where)

    def choose(feedback, params, *, key=None):
        del key
        _require_own(name, params, feedback)
        return _replace(lambda w, b: b, params, feedback)

    return make, choose


def _draw(name, key, net, shape, scale, where):
    """Another draw of the chosen parameters, times `scale`; None in place of the others."""
    params, _ = net.init(jax.random.fold_in(key, FEEDBACK_STREAM), shape)
    paths = jax.tree.leaves_with_path(one_layer(params))
    likes = [(show_path(path), like) for path, like in paths]
    chosen = [where(path, like) for path, like in likes]
    if not any(chosen):
        there = ", ".join(f"{path} {show_shape(like.shape)}" for path, like in likes)
        raise ValueError(f"{name}: where matches none of the parameters: {there or 'no such'}.")
    leaves, structure = jax.tree.flatten(params)
    pairs = zip(leaves, chosen, strict=True)
    return structure.unflatten(
        [jnp.asarray(scale, w.dtype) * w if wanted else None for w, wanted in pairs]
    )


def _require_own(name, params, state, *, scalars=False):
    """Refuses a state that has not an array like it, or a number, for each chosen parameter."""

    def require(path, w, axes, s):
        shape = w.shape[:axes] if scalars else w.shape
        if s is not None and (s.shape, s.dtype) != (shape, w.dtype):
            raise ValueError(
                f"for {show_path(path)} it has {s.dtype} {show_shape(s.shape)}, not {w.dtype} "
                f"{show_shape(shape)}"
            )

    try:
        jax.tree_util.tree_map_with_path(require, params, stack_axes(params), state)
    except (ValueError, TypeError, AttributeError) as error:
        raise wrong_state(name, error) from error


def _replace(function, params, state, *trees):
    """`function(w, s, ...)` for each parameter w that has an s in the state, and w for others."""

    def place(w, s, *others):
        return w if s is None else function(w, s, *others)

    return map_layers(place, params, state, *trees)


def _keys_like(key, tree):
    """A key for each leaf, and in a stack for that of each layer."""
    nodes, structure = jax.tree.flatten(tree, is_leaf=is_stacked)

    def keys_of(node, key):
        if not is_stacked(node):
            return key
        leaves = jax.tree.leaves(node)
        if not leaves:
            return node
        return Stacked(jax.vmap(_keys_like)(jax.random.split(key, len(leaves[0])), node.layers))

    return structure.unflatten(map(keys_of, nodes, jax.random.split(key, len(nodes))))
