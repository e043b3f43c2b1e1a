"""KFAC: natural gradients from Kronecker factors, as an optax transformation.

The Fisher information of each weight matrix and each kernel is approximated by A x G, where A is
the second moment of the layer's inputs and G that of its error signals (see `readings.moments`; a
kernel [*K, I, O] counts as a matrix [K I, O]). The natural gradient F^-1 g is then

    A^-1 g G^-1   for the gradient g [I + 1, O] of a weight and, as its last row, the bias.

Layers are treated as independent. The factors are averaged over steps. Damping by lambda adds
sqrt(lambda) times the identity to both factors, balanced by pi, the square root of the ratio of
their mean eigenvalues:

    A + pi sqrt(lambda) I,   G + sqrt(lambda) / pi I,   pi^2 = (tr A / dim A) / (tr G / dim G)

The gradient is known to rounding error only, and the inverses multiply its error in directions in
which the factors are nearly singular. So the damping of an entry of the diagonal is never less than
300 eps times the entry (4e-5 in float32). This matters if lambda is small beside the curvature,
such as with features in the thousands that were not standardised. In float32 the natural gradient
is then within a few percent of the one in exact arithmetic where that floor is at work only in
directions without curvature; elsewhere it is a more strongly damped one. Standardise the features,
or choose a larger lambda, for all digits.

A parameter without factors, such as a gain or a table, has a diagonal instead, the second moment v
of its gradient: its natural gradient is g / (v + lambda).

Source:
  "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", Martens, Grosse, 2015.
  "A Kronecker-factored approximate Fisher matrix for convolution layers", Grosse, Martens, 2016.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxbp.outputs.errors import sampled
from jaxbp.readings.moments import Kronecker, diagonal, kronecker
from jaxbp.require import is_count, require_call, require_function
from jaxbp.signals.kinds import Bias, Conv, Outer, Signal, Through
from jaxbp.signals.stacked import Stacked, is_stacked, map_layers, one_layer
from jaxbp.signals.views import View
from jaxbp.sweeps.gradients import backprop
from jaxbp.types import Layer, Loss, Params, PyTree, show_path, show_shape, widened

__all__ = ["KfacState", "kfac_factors", "scale_by_kfac"]

# Folded into the key of the forward pass. A small number would not do: layers split that key, and
# one of them gets the key that fold_in(key, 1) gives.
ERROR_STREAM = 2**31


class FactorsOfBatch(Protocol):
    """What `kfac_factors` returns: the factors of a network's parameters on a batch."""

    def __call__(
        self, params: Params, inputs: PyTree, targets: PyTree, *, key: jax.Array
    ) -> PyTree:
        """Returns the factors; `key` is for layers that draw and for the sampled targets."""
        ...


def kfac_factors(
    net: Layer,
    loss: Loss,
    *,
    error: Callable[..., jax.Array] = sampled,
    shared: Literal["expand", "reduce"] = "expand",
    rest: Literal["diagonal", "identity"] = "diagonal",
    largest: int | None = None,
) -> FactorsOfBatch:
    """The Kronecker factors of a network's parameters on a batch, for `scale_by_kfac`.

    They are computed by exact backpropagation, whatever rule computes the gradient. What a
    parameter gets depends on how the network uses it, not on its name:

        parameter                            there is
        weight or kernel [I, O]              Kronecker(A [I + 1, I + 1], G [O, O])
        the same in another layout           Through(Kronecker(A, G), view)
        bias of such a weight                (): it is the last row of the weight
        another vector that is added, [O]    Kronecker([[1]], G [O, O])
        anything else, rest="diagonal"       its squared gradient, in the parameter's shape
        anything else, rest="identity"       None: its gradient stays as it is

    A vector that is added is the bias of a weight if the two are the only parameters in their dict,
    list or tuple, and it has an entry for each output of the weight. It may have several axes, if
    they are the last axes of the weight. A kernel with groups has a pair of factors for each group.
    Anything else means gains, tables, parameters that are used in several ways, parameters behind a
    norm or another function, and arrays of which only a part is used.

    The diagonal of a parameter that is used in several ways or behind a function needs the gradient
    of each example, [N, ...]. Use `identity` where there is no memory for this.

    Args:
      net: a Layer.
      loss: a Loss.
      error: the error whose second moment is the curvature: `sampled` for KFAC, `ggn_columns` for
        its exact form, KFLR.
      shared: how positions are treated, `expand` or `reduce` (see `kronecker`).
      rest: what parameters without factors get, `diagonal` or `identity`.
      largest: the largest number of inputs or outputs of a matrix that gets factors. A larger one
        counts as anything else, such as the weight that maps to the logits of a large vocabulary.
        None stands for no limit.

    Returns:
      `function(params, inputs, targets, *, key) -> factors`, a tree like params.

    Raises:
      ValueError: `rest` is not one of its two values, or `largest` is not a positive integer.
      TypeError: `net` is not a Layer, or `error` is not a function; or, when called, `loss` is a
        plain function, and `error` takes a Loss.

    References:
      "Practical Gauss-Newton Optimisation for Deep Learning", Botev, Ritter, Barber, 2017: KFLR.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.dense(2), bp.layer_norm())
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> factors_of = bp.kfac_factors(net, bp.squared_error)
      >>> batch = jnp.ones((5, 3)), jnp.zeros((5, 2))
      >>> dense, norm = factors_of(params, *batch, key=jax.random.key(1))
      >>> dense["weight"].inputs.shape, dense["weight"].deltas.shape, dense["bias"]
      ((4, 4), (2, 2), ())
      >>> norm["gain"].shape, norm["bias"].deltas.shape
      ((2,), (2, 2))
    """
    wrong = []
    if rest not in ("diagonal", "identity"):
        wrong.append(f"rest is {rest!r}; it takes 'diagonal' or 'identity'")
    if largest is not None and not is_count(largest):
        wrong.append(f"largest is {largest!r}, expected a positive integer or None")
    if wrong:
        raise ValueError(f"kfac_factors: {'; '.join(wrong)}.")
    require_call("kfac_factors", net, loss)
    require_function("kfac_factors", "error", error)

    def read(signal, *, columns=None):
        def of_rest():
            if rest == "identity":
                return None
            return diagonal(signal, columns=columns) / len(signal.deltas)

        inner, view = _layout(signal)
        if view is None:
            return of_rest()
        fits = largest is None or max(_sides(inner), default=0) <= largest
        if isinstance(inner, Outer | Conv) and fits and _covers(view):
            return kronecker(signal, shared=shared, columns=columns)
        if isinstance(inner, Bias) and _keeps_order(view):
            if not fits or len(view.out_shape) > 1:
                return _Added(of_rest())
            return _Added(kronecker(inner, bias="apart", shared=shared, columns=columns))
        return of_rest()

    sweep = backprop(net, loss, read=read, error=error)

    def function(params, inputs, targets, *, key):
        error_key = jax.random.fold_in(key, ERROR_STREAM)
        return _folded(sweep(params, inputs, targets, key=key, error_key=error_key)[1], params)

    return function


class _Added(NamedTuple):
    """What is read of a parameter that is added, before it is known whether it is a layer's bias.

    Attributes:
      alone: what it gets if it is not.
    """

    alone: Any


def _layout(signal: Signal) -> tuple[Any, View | None]:
    """The signal of what a parameter is used as, and the view between; None if it is no view."""
    if isinstance(signal, Through):
        return signal.signal, signal.back if isinstance(signal.back, View) else None
    return signal, View(signal.deltas.shape[-1:] if isinstance(signal, Bias) else ())


def _sides(signal: Any) -> tuple[int, ...]:
    """The sizes of the factors of a signal, without the row for a bias."""
    if isinstance(signal, Outer):
        return signal.inputs.shape[-1], signal.deltas.shape[-1]
    if isinstance(signal, Conv):
        groups, places = signal.geometry.groups, math.prod(signal.geometry.kernel)
        return places * signal.inputs.shape[-1] // groups, signal.deltas.shape[-1] // groups
    return signal.deltas.shape[-1:] if isinstance(signal, Bias) else ()


def _covers(view: View) -> bool:
    """Whether a view fills the whole parameter."""
    return math.prod(view.shape) == math.prod(view.out_shape)


def _keeps_order(view: View) -> bool:
    """Whether a view only gives the entries another shape."""
    return all(move.name == "reshape" for move in view.moves)


def _folded(found: PyTree, params: Params) -> PyTree:
    """The factors, from what was read: nothing at the biases of layers."""

    def visit(node, factors, shapes):
        folds = _is_pair(node) and _is_bias_of_weight(factors, shapes)
        return jax.tree.map(
            lambda n: (() if folds else n.alone) if isinstance(n, _Added) else n,
            node,
            is_leaf=lambda n: isinstance(n, _Added),
        )

    def is_leaf(node):
        return _is_pair(node) or _is_factors(node) or isinstance(node, _Added) or node is None

    return jax.tree.map(visit, found, one_layer(found), one_layer(params), is_leaf=is_leaf)


def _is_pair(node):
    """Whether a collection holds a weight and one more parameter, which is added."""
    if is_stacked(node):
        return False
    if _is_stack(node):
        return _is_pair(_inside(node))
    parts = _parts(node)
    one_added = sum(isinstance(part, _Added) for part in parts) == 1
    return len(parts) == 2 and one_added and any(map(_is_factors, parts))


def _is_bias_of_weight(factors, shapes):
    """Whether the second parameter of a pair has an entry for each output, in the same order."""
    found, shapes = map(_bare, _parts(factors)), map(_bare, _parts(shapes))
    pairs = sorted(zip(found, shapes, strict=True), key=lambda pair: isinstance(pair[0], _Added))
    (factors, weight), (_, bias) = pairs
    outputs = math.prod(factors.deltas.shape[:-1])  # [O, O], or [G, O / G, O / G]
    same_order = bias.ndim == 1 or weight.shape[-bias.ndim :] == bias.shape
    return bias.size == outputs and same_order and _extent(weight) > _extent(bias)


class KfacState(NamedTuple):
    """The state of `scale_by_kfac`.

    Attributes:
      step: the number of updates so far.
      factors: the running averages: a `Kronecker` for each layer, in a `Through` if its weight has
        another layout, or the diagonal of a parameter without factors.
      inverses: the inverses of the damped averages, from the last time they were computed.
    """

    step: jax.Array
    factors: PyTree
    inverses: PyTree


def scale_by_kfac(
    like: PyTree | Callable[[Params], PyTree] | None = None,
    *,
    damping: float | jax.Array = 1e-2,
    decay: float = 0.95,
    every: int = 10,
    factors_every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation from gradients to natural gradients, A^-1 g G^-1 for each layer.

    Its update takes the factors of the batch, `update(grads, state, params, factors=factors)`,
    which `kfac_factors` computes. In `fit`, `make_epoch` and `make_step`, pass
    `extra_args={"factors": bp.kfac_factors(net, loss)}`.

    The state has a place for each factor before the first batch comes. For networks that consist of
    dense layers and convolutions, their parameters tell the shapes. For any other network, pass
    `like`.

    Factors cost about as much as another gradient. With `factors_every=k` they are computed in
    every k-th step only. They are then passed as a function, which is called where they are due:
    `extra_args={"factors": bp.deferred(bp.kfac_factors(net, loss))}`.

    Learning rate and momentum come from optax transformations after this one. A natural gradient
    also needs a trust region while the averages hold few batches: put `optax.clip_by_global_norm`
    directly after this transformation.

    Args:
      like: the factors of any batch, for their shapes, or a function of the parameters that returns
        them and is not run. Without it, all parameters have to be those of dense layers and of
        convolutions without groups, dicts of a `weight` and a `bias`.
      damping: lambda, positive, in units of the curvature of one example's loss. A number, or a
        schedule by `optax.inject_hyperparams(scale_by_kfac, static_args=("like", "decay", "every",
        "factors_every"))`.
      decay: the decay of the running averages, in [0, 1), for each batch of factors. The first
        batches are averaged with equal weights.
      every: the number of steps from one inversion of the factors to the next.
      factors_every: the number of steps from one batch of factors to the next. None for every step.

    Raises:
      ValueError: an argument is out of range; at `init`, there is no `like`, and there are
        parameters of other layers than dense layers and convolutions; at `update`, factors are
        missing, are not a function where `factors_every` is given, or are not like those that the
        state was made for.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxbp as bp
      >>> x = jax.random.normal(jax.random.key(0), (200, 2))
      >>> labels = (x[:, 0] * x[:, 1] > 0).astype(int)
      >>> net = bp.chain(bp.dense(16), bp.layer_norm(), bp.tanh(), bp.dense(2))
      >>> loss = bp.softmax_cross_entropy
      >>> factors = bp.kfac_factors(net, loss)
      >>> def like(params):
      ...     return factors(params, x, labels, key=jax.random.key(0))
      >>> run = bp.fit(
      ...     net, loss,
      ...     optax.chain(
      ...         bp.scale_by_kfac(like, factors_every=2),
      ...         optax.clip_by_global_norm(1.0),
      ...         optax.sgd(0.3, momentum=0.9),
      ...     ),
      ...     (x, labels), key=jax.random.key(1), metric=bp.accuracy, target=0.95, batch_size=50,
      ...     extra_args={"factors": bp.deferred(factors)},
      ... )
      >>> run.stopped_by
      'target'
    """
    wrong = []
    if not isinstance(damping, Tracer) and not 0 < damping < math.inf:
        wrong.append(f"damping is {damping}, expected a positive number")
    if not 0 <= decay < 1:
        wrong.append(f"decay is {decay}, expected a number in [0, 1)")
    if not is_count(every):
        wrong.append(f"every is {every!r}, expected a positive integer")
    if factors_every is not None and not is_count(factors_every):
        wrong.append(f"factors_every is {factors_every!r}, expected a positive integer or None")
    if wrong:
        raise ValueError(f"scale_by_kfac: {'; '.join(wrong)}.")
    period = factors_every or 1

    def init(params):
        if like is None:
            _require_layers(params)
            factors = jax.eval_shape(_by_name, params)
        elif callable(like):
            _require_unmasked(params)
            factors = jax.eval_shape(like, params)
        else:
            factors = like
        shapes = jax.eval_shape(_own_factors, params, factors)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return KfacState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(updates, state, params=None, *, factors=None, **extra_args):
        del params, extra_args
        _require_factors(factors, factors_every)

        def averages():
            batch = _own_factors(updates, factors() if callable(factors) else factors)
            if jax.tree.map(jnp.shape, batch) != jax.tree.map(jnp.shape, state.factors):
                raise ValueError(WRONG_FACTORS)
            batches = state.step // period + 1  # with this one

            def average(old, new):
                kept = jnp.minimum(decay, 1 - 1 / batches.astype(old.dtype))
                return kept * old + (1 - kept) * new

            return jax.tree.map(average, state.factors, batch)

        averaged = (
            averages()
            if period == 1
            else jax.lax.cond(state.step % period == 0, averages, lambda: state.factors)
        )
        inverses = jax.lax.cond(
            state.step % every == 0,
            lambda: _map(lambda factors: _inverted(factors, damping), averaged),
            lambda: state.inverses,
        )
        natural = _map(_natural, inverses, updates)
        # `_map` may put a Stacked around a layer instead of around each of its parameters.
        natural = jax.tree.structure(updates).unflatten(jax.tree.leaves(natural))
        return natural, KfacState(state.step + 1, averaged, inverses)

    return optax.GradientTransformationExtraArgs(init, update)


def _inverted(factors: Any, damping: float | jax.Array) -> Any:
    """The inverses of both damped factors, or of the damped diagonal."""
    if factors is None or _is_nothing(factors):
        return factors
    if not _is_factors(factors):
        return 1 / (factors + jnp.asarray(damping, factors.dtype))
    if isinstance(factors, Through):
        return factors._replace(signal=_inverted(factors.signal, damping))
    if factors.inputs.ndim == 3:  # a pair for each group
        return jax.vmap(lambda factors: _inverted(factors, damping))(factors)
    a, g = factors
    pi = jnp.sqrt(_mean_eigenvalue(a) / _mean_eigenvalue(g))
    # A layer that no error reaches has a factor of zero, and its pi would be infinite.
    pi = jnp.where(jnp.isfinite(pi) & (pi > 0), pi, 1)
    root = jnp.sqrt(jnp.asarray(damping, a.dtype))
    return Kronecker(_inverse(a, pi * root), _inverse(g, root / pi))


def _mean_eigenvalue(matrix):
    return jnp.trace(matrix) / len(matrix)


# Of a matrix in which an entry of the diagonal is raised by less than about this many units of its
# last place, the inverse is rounding error in some directions.
FLOOR = 300


def _inverse(matrix, shift):
    """The inverse of a damped factor, with more damping where it would be lost in rounding.

    Each entry of the diagonal has a floor of its own, so features may have any scale.
    """
    diagonal = jnp.diagonal(matrix)
    damping = jnp.maximum(shift, FLOOR * jnp.finfo(matrix.dtype).eps * diagonal)
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)
    damped = matrix + damping * eye
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(damped), eye)


def _natural(inverses, grads):
    """A^-1 g G^-1 of one layer, with the bias as the last row of g; or g / (v + lambda)."""
    if inverses is None or _is_nothing(inverses):
        return grads
    if not _is_factors(inverses):
        return (widened(grads) * inverses).astype(grads.dtype)
    matrices, view = _matrices(inverses)
    leaves, structure = jax.tree.flatten(grads)
    at, weight, bias = _weight_and_bias(leaves)
    rows = widened(_as_rows(weight, bias, matrices, view))
    rows = matrices.inputs @ rows @ matrices.deltas
    rows = jnp.moveaxis(rows, -2, 0)  # [I, O], or [I, G, O / G]
    natural = rows if bias is None else rows[:-1]
    if view is not None:
        natural = view(natural.reshape(view.shape))
    natural = natural.reshape(weight.shape).astype(weight.dtype)
    if bias is None:
        return structure.unflatten([natural])
    natural_bias = rows[-1].reshape(bias.shape).astype(bias.dtype)
    return structure.unflatten([natural, natural_bias] if at == 0 else [natural_bias, natural])


def _as_rows(weight, bias, matrices, view):
    """The matrix [I, O] of a layer, or [G, I, O / G], with the bias as its last row."""
    *groups, _, o = matrices.deltas.shape
    matrix = weight if view is None else view.take(weight)
    rows = matrix.reshape(-1, *groups, o)
    if bias is not None:
        rows = jnp.concatenate([rows, bias.reshape(1, *groups, o)])
    return jnp.moveaxis(rows, 0, -2)


def _weight_and_bias(leaves):
    """The place of the weight among the one or two parameters of a layer, and both of them."""
    at = max(range(len(leaves)), key=lambda i: _extent(leaves[i]))
    rest = [*leaves[:at], *leaves[at + 1 :]]
    return at, leaves[at], rest[0] if rest else None


def _extent(array):
    """What is larger for the weight of a layer than for its bias."""
    return array.size, array.ndim


def _matrices(factors: Any) -> tuple[Kronecker, View | None]:
    """The two factors, and the view through which the parameter is seen, if there is one."""
    return (factors.signal, factors.back) if isinstance(factors, Through) else (factors, None)


def _is_factors(node):
    return isinstance(node.signal if isinstance(node, Through) else node, Kronecker)


def _is_layer(node):
    """Whether a node of a tree of factors is one layer: a weight's, alone or with its bias."""
    if _is_factors(node):
        return True
    if is_stacked(node):
        return False
    if _is_stack(node):
        return _is_layer(_inside(node))
    parts = _parts(node)
    rest = [part for part in parts if not _is_factors(part)]
    return len(parts) - len(rest) == 1 and len(rest) < 2 and all(map(_is_nothing, rest))


def _is_nothing(node):
    return type(node) is tuple and not node


def _parts(node):
    """The nodes directly below a node of a tree; of a leaf, itself."""
    return jax.tree.leaves(node, is_leaf=lambda n: n is not node)


def _bare(node):
    """A node without the stacks around it."""
    return _bare(node.layers) if is_stacked(node) else node


def _is_stack(node):
    """Whether a node is a stack, or a collection in which each part is one."""
    parts = _parts(node)
    return is_stacked(node) or (len(parts) > 0 and all(map(is_stacked, parts)))


def _inside(node):
    """A stack without its `Stacked`, or without those of its parts."""
    if is_stacked(node):
        return node.layers
    structure = jax.tree.structure(node, is_leaf=lambda n: n is not node)
    return structure.unflatten([p.layers if is_stacked(p) else p for p in _parts(node)])


def _map(function, factors, *rest, is_layer=_is_factors):
    """Maps a function over layers, over each one of a stack separately, as `map_layers` does.

    A layer is a node of a tree of factors, and what other trees have there. In a lifted network
    each of its parameters may have a `Stacked` of its own. The result then has one, around the
    layer.
    """

    def is_leaf(node):
        return node is None or _is_nothing(node) or is_stacked(node) or is_layer(node)

    def visit(node, *others):
        if not _is_stack(node):
            return function(node, *others)
        trees = tuple(map(_inside, (node, *others)))

        def one(trees):
            return _map(function, *trees, is_layer=is_layer)

        return Stacked(jax.lax.map(one, trees) if jax.tree.leaves(trees) else one(trees))

    return jax.tree.map(visit, factors, *rest, is_leaf=is_leaf)


WRONG_FACTORS = (
    "scale_by_kfac: the factors are not those of this network's layers with their biases "
    "folded in, as kfac_factors computes them. (A convolution in groups has a pair for each "
    "group. Give it another optimizer by optax.partition, or pass like=...?)"
)


def _own_factors(params: PyTree, factors: PyTree) -> PyTree:
    """The factors of each layer in its dtype, after a check that they fit its parameters."""

    def own(factors, params):
        leaves = jax.tree.leaves(params)
        if factors is None or (_is_nothing(factors) and not leaves):
            return factors
        if not leaves:  # masked by optax.partition: another optimizer updates it
            if _is_factors(factors) or not _is_layer(factors):
                return None
            structure = jax.tree.structure(factors, is_leaf=lambda n: n is not factors)
            return structure.unflatten([None] * structure.num_leaves)
        if _is_layer(factors):
            return _of_layer(factors, leaves)
        (leaf,) = leaves
        if _is_nothing(factors) or factors.shape != leaf.shape:
            raise ValueError(WRONG_FACTORS)
        return factors.astype(widened(leaf).dtype)

    try:
        return _map(own, factors, params, is_layer=_is_layer)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(WRONG_FACTORS) from error


def _of_layer(node, leaves):
    """The factors of a layer with these parameters, without a row for a bias if it has none."""
    factors = node if _is_factors(node) else next(filter(_is_factors, _parts(node)))
    matrices, view = _matrices(factors)
    a, g = matrices
    _, weight, bias = _weight_and_bias(leaves)
    rows = _as_rows(weight, bias, matrices, view).shape[-2]
    if bias is None and a.shape[-1] == rows + 1:  # A is that of (x, 1)
        a = a[..., :-1, :-1]
    if a.shape[-1] != rows:
        raise ValueError(WRONG_FACTORS)
    dtype = widened(weight).dtype
    own = Kronecker(a.astype(dtype), g.astype(dtype))
    return own if view is None else Through(own, view)


def _require_factors(factors, factors_every):
    if factors is None:
        raise ValueError(
            "scale_by_kfac: its update takes factors=..., as kfac_factors computes them. With fit "
            "or make_step: extra_args={'factors': bp.kfac_factors(net, loss)}."
        )
    if factors_every is not None and not callable(factors):
        raise ValueError(
            f"scale_by_kfac: factors_every is {factors_every}, but the factors were computed "
            "already; it takes a function that computes them. With fit or make_step: "
            "extra_args={'factors': bp.deferred(bp.kfac_factors(net, loss))}."
        )


def _is_named_layer(node):
    """Whether a node of a tree of parameters looks like a dense layer's or a convolution's."""
    return (
        isinstance(node, dict)
        and set(node) in ({"weight"}, {"weight", "bias"})
        and getattr(node["weight"], "ndim", 0) >= 2
    )


def _by_name(params):
    """Factors of the right shapes for the parameters of dense layers and convolutions."""

    def factors_of(layer):
        if layer is None:
            return None
        *rows, o = layer["weight"].shape
        i = math.prod(rows) + 1
        factors = Kronecker(jnp.zeros((i, i)), jnp.zeros((o, o)))
        return {name: factors if name == "weight" else () for name in layer}

    # What optax.partition masks is updated by another optimizer.
    own = jax.tree.map(lambda n: None if _is_masked(n) else n, params, is_leaf=_is_masked)
    return map_layers(factors_of, own, is_leaf=lambda n: n is None or _is_named_layer(n))


def _is_masked(node):
    return isinstance(node, optax.MaskedNode)


def _require_unmasked(params):
    if any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked))):
        raise ValueError(
            "scale_by_kfac: like is a function of the parameters, but some parameters belong to "
            "another optimizer. Pass the factors of a batch, or their shapes: "
            "like=jax.eval_shape(function, params)."
        )


def _require_layers(params: Params) -> None:
    for path, leaf in jax.tree.leaves_with_path(one_layer(params), is_leaf=_is_named_layer):
        if not _is_named_layer(leaf):
            raise ValueError(
                "scale_by_kfac: takes the parameters of dense layers and convolutions, dicts of a "
                f"weight [..., I, O] and a bias; got {show_path(path)} of shape "
                f"{show_shape(jnp.shape(leaf))}. Give others an optimizer of their own by "
                "optax.partition, or pass like=..., the factors of a batch?"
            )
