"""Feedback: rules that replace the weight matrices in the backward pass.

Exact backpropagation carries the error back by the weights of the forward pass, dx = dy W^T. A
neuron in a brain could hardly know the weights of other neurons. A backward pass here does not need
them either: it reads one tree, and any tree with the structure of the parameters works. Readings do
not change: the operands of a gradient are x and dy, dE/dW = x^T dy.

    rule              carries the error by              and after each step
    exact             W
    random_feedback   B, fixed                          -
    sign_symmetric    M sign(W), magnitudes M > 0       -
    kolen_pollack     B                                 B gets the update and the decay of W
    weight_mirror     B                                 B moves towards W, estimated from noise

B is another draw by the network's own initialisers, and the magnitudes have the scale of such a
draw. The module `direct` has one more rule, which sends the error past the layers in between.

Your own rule is a `Rule`, made from scratch or from another one:

    >>> import optax, jaxbp as bp
    >>> def noisy(deviation):
    ...     def choose(state, params, *, key):
    ...         noise = optax.tree.random_like(key, params)
    ...         return optax.tree.add_scale(params, deviation, noise)
    ...     return bp.exact()._replace(name="noisy", choose=choose)
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxbp.require import is_count
from jaxbp.sharding import varying_with
from jaxbp.signals.stacked import Stacked, is_stacked, map_layers, one_layer, stack_axes
from jaxbp.types import Params, PyTree, Rule, exportable, show_path, show_shape, widened

__all__ = [
    "Magnitudes",
    "MirrorState",
    "exact",
    "kolen_pollack",
    "random_feedback",
    "sign_symmetric",
    "weight_mirror",
]

# Whether a rule replaces a parameter: `where(path, leaf)`, with the leaf's shape, ndim and dtype.
Where: TypeAlias = Callable[[str, Any], bool]

# Folded into keys by which rules draw. Layers split their keys and never reach this number, so a
# rule that is made with the key of the parameters does not draw the parameters again.
FEEDBACK_STREAM = 2**31


def exact() -> Rule:
    """Backpropagation: the weights of the forward pass carry the error back. dx = dy W^T.

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
            raise wrong_state("exact", "this rule has no state")
        return params

    return Rule("exact", make, choose, _stay)


def matrices(path: str, leaf: Any) -> bool:
    """Whether a parameter is a matrix: it has two axes or more."""
    del path
    return leaf.ndim >= 2


def random_feedback(*, scale: float = 1.0, where: Where = matrices) -> Rule:
    """Feedback alignment: fixed random matrices B replace W in the backward pass. dx = dy B^T.

    During training the forward weights align with B, and the error that B carries becomes useful.

    Args:
      scale: B is another draw by the network's initialisers, times this number. (If an initialiser
        draws zeros, B is zero, and no error comes back.)
      where: `where(path, leaf) -> bool` chooses the parameters that have a B. `path` is a string
        such as `0.weight`, and `leaf` has the parameter's `shape`, `ndim` and `dtype`. In a stack,
        these are those of one layer, and all layers share a path such as `1.layers.0.weight`. The
        first matrix of a network carries the error only to the inputs, so rules that update B can
        skip it: `where=lambda path, leaf: leaf.ndim >= 2 and path != "0.weight"`. Biases carry no
        error.

    Raises:
      ValueError: on `make`, `where` matches no parameter; on `choose`, the state belongs to another
        rule or network.

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


@exportable
class Magnitudes(NamedTuple):
    """The state of `sign_symmetric`.

    Attributes:
      magnitudes: for each matrix that the rule replaces: M if magnitudes are fixed, else s.
    """

    magnitudes: PyTree


def sign_symmetric(
    magnitudes: Literal["uniform", "fixed", "batchwise"] = "uniform",
    *,
    scale: float = 1.0,
    where: Where = matrices,
) -> Rule:
    """Sign-symmetry: the signs of W, with other magnitudes. dx = dy (M sign(W))^T.

        uniform      M = s, one number for each matrix                       uSF
        fixed        M = s |xi|, drawn once                                  frSF
        batchwise    M = s |xi|, drawn anew for each batch                   brSF

    with xi ~ Normal(0, 1) for every entry. s is the root mean square of another draw by the
    network's initialisers, times `scale`. The sign of zero is zero.

    Args:
      magnitudes: `uniform`, `fixed` or `batchwise`.
      scale: a factor of s.
      where: which parameters the rule replaces, as in `random_feedback`.

    Raises:
      ValueError: `magnitudes` is none of the three; on `make`, `where` matches no parameter; on
        `choose`, the state belongs to another rule or network, or batchwise magnitudes get no key.

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


def kolen_pollack(*, scale: float = 1.0, where: Where = matrices) -> Rule:
    """Kolen-Pollack: B starts at random, and gets the updates and the decay of W. dx = dy B^T.

    B is updated with the gradient of W, so only weight decay changes their difference. With
    learning rate eta and weight decay lambda, as in `optax.adamw`, each step multiplies B - W by
    1 - eta lambda. Without weight decay the difference stays constant.

    Any optax optimizer works. It computes the update of B from its state for W, with B as the
    parameters. This has consequences for optimizers that use the parameters:

        weight decay                            that of B
        weight decay that enters the momentum   that of B in the newest step, that of W before
        trust ratio, line search                computed from B
        parameters kept in the state            those of W (`schedule_free`, L-BFGS)

    Args:
      scale: a factor of B at the start, as in `random_feedback`.
      where: which parameters the rule replaces, as in `random_feedback`.

    Raises:
      ValueError: as in `random_feedback`.

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


@exportable
class MirrorState(NamedTuple):
    """The state of `weight_mirror`.

    Attributes:
      feedback: B, in place of each matrix that has one.
      step: the number of training steps so far.
    """

    feedback: PyTree
    step: jax.Array


def weight_mirror(
    rate: float = 0.1,
    *,
    examples: int = 64,
    every: int = 1,
    scale: float = 1.0,
    where: Where = matrices,
) -> Rule:
    """Weight mirrors: between training steps, B learns W from noise sent through W. dx = dy B^T.

        xi ~ Normal(0, 1)  [M, I],   zeta = xi W  [M, O],   B += rate (xi^T zeta / M - B)

    In a mirror phase the inputs of each matrix are noise. The expectation of xi^T zeta / M is W, so
    B approaches W. Biases, and the nonlinearity after the matrix, are left out of the phase. In a
    matrix of more than two axes, all axes but the last count as inputs.

    Args:
      rate: the learning rate of B, in (0, 1]. It is also the fraction of B that decays in a phase.
      examples: M, the number of noise examples in a phase.
      every: the number of training steps from one phase to the next.
      scale: a factor of B at the start, as in `random_feedback`.
      where: which parameters the rule replaces, as in `random_feedback`.

    Raises:
      ValueError: a number is out of range; or as in `random_feedback`; or, on `update`, there is no
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
        if not is_count(count):
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
        before = varying_with(params, state.feedback)
        feedback = jax.lax.cond(
            (state.step + 1) % every == 0,
            lambda: map_layers(mirror, params, before, _keys_like(key, params)),
            lambda: before,
        )
        return MirrorState(feedback, state.step + 1)

    return Rule("weight_mirror", make, choose, update)


def require_rule(name: str, rule: Any) -> None:
    """Refuses what is not a Rule; the message starts with `name`, a function's."""
    if not isinstance(rule, Rule):
        raise ValueError(
            f"{name}: rule is {type(rule).__name__}, expected a Rule, such as exact()."
        )


def wrong_state(name: str, problem: object) -> ValueError:
    """The error of a rule that got the state of another rule or of another network."""
    return ValueError(
        f"{name}: got a state that is not its own: {problem}. Make it for this rule and network, "
        "by init_state(..., rule=rule) or by rule.make(key, net, shape), and pass it on?"
    )


def _stay(state, params, *, move, key=None):
    """The update of a rule that keeps its state."""
    del params, move, key
    return state


def _drawn(
    name: str, scale: float, where: Where
) -> tuple[Callable[..., PyTree], Callable[..., Params]]:
    """The `make` and the `choose` of a rule that replaces each W by a drawn matrix B."""

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
        there = there or "there are none"
        raise ValueError(f"{name}: where matches none of the parameters: {there}.")
    leaves, structure = jax.tree.flatten(params)
    pairs = zip(leaves, chosen, strict=True)
    return structure.unflatten(
        [jnp.asarray(scale, w.dtype) * w if wanted else None for w, wanted in pairs]
    )


def _require_own(name, params, state, *, scalars=False):
    """Refuses a state without an array (or a number, if `scalars`) for each chosen parameter."""

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
    """A tree of `function(w, s, ...)` where the state has an s for the parameter w, else of w."""

    def place(w, s, *others):
        return w if s is None else function(w, s, *others)

    return map_layers(place, params, state, *trees)


def _keys_like(key, tree):
    """A key for each leaf of a tree; in a stack, a key for each leaf of each layer."""
    nodes, structure = jax.tree.flatten(tree, is_leaf=is_stacked)

    def keys_of(node, key):
        if not is_stacked(node):
            return key
        leaves = jax.tree.leaves(node)
        if not leaves:
            return node
        return Stacked(jax.vmap(_keys_like)(jax.random.split(key, len(leaves[0])), node.layers))

    return structure.unflatten(map(keys_of, nodes, jax.random.split(key, len(nodes))))
