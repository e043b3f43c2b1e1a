"""Reweighting: sums per-example gradients with weights that depend on their norms.

    sum_n w_n g_n   with   w = weigh(|g_1|, ..., |g_N|)

Clipping is the best-known case, `weigh = clip_weights(max_norm)`. It limits the influence of
outliers and, together with noise, makes the gradient differentially private (`private_gradient`).

The norms are known only at the end of the backward pass, but the sum needs the weights. There are
two ways. Either one backward pass keeps the operands of all gradients and sums them at the end. Or
two backward passes keep nothing: the first computes the norms, and the second starts from
w_n delta_n, which gives w_n g_n because it is linear in delta.

Where the norms of a layer are computed from its gradients, as for kernels on large images, and the
gradients are about as small as the operands, one pass keeps the gradients instead. Two passes keep
them where they are far smaller than the operands.

Sources:
  "Deep Learning with Differential Privacy", Abadi et al., 2016: clipping.
  "Large Language Models Can Be Strong Differentially Private Learners", Li, Tramer, Liang,
  Hashimoto, 2021: two backward passes.
  "Differentially Private Optimization on Large Model at Small Cost", Bu, Wang, Zha, Karypis, 2022:
  one backward pass.
  "Automatic Clipping: Differentially Private Deep Learning Made Easier and Stronger", Bu, Wang,
  Zha, Karypis, 2023: `automatic_weights`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxbp.forward import forward_and_loss, has_short_range
from jaxbp.readings.formed import formed, is_small_formed
from jaxbp.readings.norms import by_layer, joint_norms, parameter_norms
from jaxbp.readings.sums import wide_total
from jaxbp.require import require_call, require_function, require_key
from jaxbp.rules.feedback import exact, require_rule
from jaxbp.signals.kinds import Conv, is_signal, map_signals
from jaxbp.signals.stacked import divided_like, map_layers
from jaxbp.sweeps.gradients import SweepFunction
from jaxbp.types import Layer, LossFunction, Params, PyTree, Rule, exportable, show_shape, weighed

__all__ = ["Reweighted", "automatic_weights", "clip_weights", "private_gradient", "reweighted"]

Weigh: TypeAlias = Callable[[jax.Array], jax.Array]  # from norms [N] to weights [N]


def clip_weights(max_norm: float | jax.Array) -> Weigh:
    """Makes a function that computes clipping weights from norms, w_n = min(1, C / |g_n|).

    Times its weight, each example's gradient has a norm of at most C.

        |g_n| = 0        weight 1 (the gradient is zero anyway)
        |g_n| = inf      weight 0 (but 0 times an infinite gradient is nan)
        C = inf          weight 1
        C = 0            weight 0 (1 where the gradient is zero)

    Args:
      max_norm: C, at least 0.

    Returns:
      `weigh(norms [N]) -> weights [N]`, for `reweighted`.

    Raises:
      ValueError: `max_norm` is negative or not a number.

    References:
      "Deep Learning with Differential Privacy", Abadi et al., 2016.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bp.clip_weights(2.0)(jnp.array([0.0, 1.0, 8.0])).tolist()
      [1.0, 1.0, 0.25]
    """
    if not isinstance(max_norm, Tracer):
        if not max_norm >= 0:
            raise ValueError(
                f"clip_weights: max_norm is {max_norm}; it takes a number, at least 0."
            )
        max_norm = float(max_norm)

    def weigh(norms):
        within = norms <= max_norm
        return jnp.where(within, 1, max_norm / jnp.where(within, 1, norms))

    return weigh


def automatic_weights(gamma: float = 0.01) -> Weigh:
    """Makes a function that computes normalising weights from norms, w_n = 1 / (|g_n| + gamma).

    Times its weight, each example's gradient has a norm below 1. Use it instead of `clip_weights`
    if you do not want to tune a threshold: here it would only multiply all weights, which the
    learning rate does as well. Examples with small gradients count for more than with clipping.

    Args:
      gamma: positive. With a larger gamma, more of the differences between small norms remains.

    Returns:
      `weigh(norms [N]) -> weights [N]`, for `reweighted`.

    Raises:
      ValueError: `gamma` is not positive and finite.

    References:
      "Automatic Clipping: Differentially Private Deep Learning Made Easier and Stronger", Bu, Wang,
      Zha, Karypis, 2023.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bp.automatic_weights(1.0)(jnp.array([0.0, 1.0, 3.0])).tolist()
      [1.0, 0.5, 0.25]
    """
    if not 0 < gamma < math.inf:
        raise ValueError(f"automatic_weights: gamma is {gamma}; it takes a positive number.")
    return lambda norms: 1 / (norms + gamma)


@exportable
class Reweighted(NamedTuple):
    """The results of `reweighted` and `private_gradient`.

    Attributes:
      values: the loss of each example, [N].
      norms: the norm of each example's gradient, before the weights, [N]. With `per_layer`, a tree
        with [N] in place of each layer's parameters.
      weights: w, in the form of the norms.
      grads: sum_n w_n g_n, a tree like params.
    """

    values: jax.Array
    norms: PyTree
    weights: PyTree
    grads: Params


def reweighted(
    net: Layer,
    loss: LossFunction,
    weigh: Weigh,
    *,
    sweeps: int = 1,
    per_layer: bool = False,
    rule: Rule = exact(),
) -> SweepFunction[Reweighted]:
    """Makes a function that sums the per-example gradients with weights computed from their norms.

        sum_n w_n g_n   with   w = weigh(|g_1|, ..., |g_N|)

    It is a sum, not a mean: divide by N for the mean.

    Weights that are known beforehand are part of the loss: see `weighted`.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      weigh: `weigh(norms [N]) -> weights [N]`, such as `clip_weights(1.0)`.
      sweeps: the number of backward passes. 1 keeps the operands of all layers' gradients until the
        weights are known, or the gradients where they are about as small. 2 needs less memory and
        takes a second backward pass, down to the last layer whose gradients are not far smaller
        than their operands. The result is the same.
      per_layer: whether to compute norms and weights for each layer instead of the whole gradient.
        A layer is an innermost collection of parameters, such as a weight and its bias.
      rule: which weights carry the error back (see `feedback`). With another rule than `exact`, the
        g_n are what it computes instead of gradients.

    Returns:
      `function(params, inputs, targets, *, key=None, rule_state=(), rule_key=None) -> Reweighted`.

    Raises:
      TypeError: `net` is not a Layer, or `loss` or `weigh` is not a function.
      ValueError: `sweeps` is not 1 or 2; or it is 2 with `per_layer`, since one error at the
        outputs cannot carry a weight for each layer; or `rule` is not a Rule. When called: the
        arrays do not have the same number of examples, or none; `weigh` does not return weights
        [N]; or `sweeps` is 2 and a part of the error is in float16, which cannot represent it times
        a small weight.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2))
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> clipped = jax.jit(bp.reweighted(net, bp.squared_error, bp.clip_weights(1.0)))
      >>> answer = clipped(params, jnp.ones((5, 3)), jnp.full((5, 2), 10.0))
      >>> round(float(jnp.max(answer.weights * answer.norms)), 4)
      1.0
    """
    name = "reweighted"
    require_call(name, net, loss)
    require_function(name, "weigh", weigh)
    require_rule(name, rule)
    wide = _wide_sums(name, net, loss, lambda parts: weigh, sweeps, rule, per_layer)

    def function(params, inputs, targets, *, key=None, rule_state=(), rule_key=None):
        answer = wide(params, inputs, targets, key, rule_state, rule_key)
        return answer._replace(grads=_like(params, answer.grads))

    return function


def _wide_sums(
    name: str,
    net: Layer,
    loss: LossFunction,
    make_weigh: Callable[[int], Weigh],
    sweeps: int,
    rule: Rule,
    per_layer: bool,
) -> Callable[..., Reweighted]:
    """The function of `reweighted`, but with sums in at least 32 bits.

    `make_weigh(parts)` makes `weigh`, of the number of norms that each example has.
    """
    if sweeps not in (1, 2):
        raise ValueError(f"{name}: sweeps is {sweeps!r}; it takes 1 or 2.")
    if sweeps == 2 and per_layer:
        raise ValueError(
            f"{name}: with per_layer, sweeps has to be 1. In a second sweep, the error at the "
            "outputs carries one weight for each example, not one for each layer."
        )

    def weights_of(norms, weigh):
        weights = weigh(norms)
        if jnp.shape(weights) != norms.shape:
            raise ValueError(
                f"{name}: weigh gave weights of shape {show_shape(jnp.shape(weights))}, "
                f"expected {show_shape(norms.shape)}: one for each example."
            )
        return weights

    def function(params, inputs, targets, key, rule_state, rule_key):
        require_key(name, "rule_key", rule_key)
        _, cache, values, delta = forward_and_loss(name, net, loss, params, inputs, targets, key)
        tree = rule.choose(rule_state, params, key=rule_key)
        if sweeps == 2:
            if has_short_range((delta, cache)):
                raise ValueError(
                    f"{name}: with sweeps=2, the error has to be in a dtype with the range of "
                    "float32, such as bfloat16; here a part of it is in float16, where an error "
                    "times a small weight cannot be represented. Take sweeps=1?"
                )
            _, first = net.backward(tree, cache, delta, read=_norms_or_gradients)
            norms = _whole_norms(map_signals(_norms_of, first), values)
            weights = weights_of(norms, make_weigh(1))
            delta = jax.tree.map(lambda d: weighed(d, weights).astype(d.dtype), delta)
            _, second = net.backward(tree, cache, delta, read=_total_or_none)

            def weighed_total(kept, sums):
                return wide_total(kept, weights=weights) if is_signal(kept) else sums

            grads = map_signals(weighed_total, first, second)
            return Reweighted(values, norms, weights, divided_like(params, grads))

        _, signals = net.backward(tree, cache, delta, read=formed)
        lengths = map_signals(parameter_norms, signals)
        norms = by_layer(joint_norms, lengths) if per_layer else _whole_norms(lengths, values)
        weigh = make_weigh(sum(leaf.size for leaf in jax.tree.leaves(norms)) // values.shape[0])
        weights = map_layers(lambda norms: weights_of(norms, weigh), norms)

        def weighed_sum(weights, signals):
            return map_signals(lambda signal: wide_total(signal, weights=weights), signals)

        grads = map_layers(weighed_sum, weights, signals)
        return Reweighted(values, norms, weights, divided_like(params, grads))

    return function


def _few_numbers(signal):
    """How many numbers, for each of its operands', a gradient may have that two sweeps keep.

    The second sweep ends at the last layer whose gradient is not kept. Matrices get a lower bound:
    with `remat`, a stack of long sequences keeps none of the operands.
    """
    return 1 / 2 if isinstance(signal, Conv) else 1 / 8


def _norms_or_gradients(signal):
    """What the first of two sweeps reads: the norms, or the gradients that are kept."""
    few = _few_numbers(signal)
    return formed(signal, few) if is_small_formed(signal, few) else parameter_norms(signal)


def _norms_of(first):
    """The norms of what the first sweep reads."""
    return parameter_norms(first) if is_signal(first) else first


def _total_or_none(signal):
    """What the second of two sweeps reads: the sum, if the first has not kept the gradients."""
    return None if is_small_formed(signal, _few_numbers(signal)) else wide_total(signal)


def _whole_norms(lengths: PyTree, values: jax.Array) -> jax.Array:
    """The norm of each example's whole gradient, [N]; zero for a network without parameters."""
    return joint_norms(lengths) if jax.tree.leaves(lengths) else jnp.zeros_like(values)


def _like(params: Params, sums: Params) -> Params:
    """The sums in the dtypes of the parameters."""
    return jax.tree.map(lambda p, total: total.astype(p.dtype), params, sums)


class PrivateGradientFunction(Protocol):
    """What `private_gradient` returns: a `SweepFunction` that needs a key for its noise."""

    def __call__(
        self,
        params: Params,
        inputs: PyTree,
        targets: PyTree,
        *,
        key: jax.Array,
        rule_state: PyTree = (),
        rule_key: jax.Array | None = None,
    ) -> Reweighted:
        """Returns the losses, norms and weights, and the private mean gradient."""
        ...


def private_gradient(
    net: Layer,
    loss: LossFunction,
    *,
    max_norm: float,
    noise_multiplier: float,
    batch_size: float,
    sweeps: int = 1,
    per_layer: bool = False,
    rule: Rule = exact(),
) -> PrivateGradientFunction:
    """Makes a function that computes a differentially private mean gradient, as in DP-SGD.

    It clips each example's gradient, sums them, adds Gaussian noise and divides by the batch size:

        (sum_n min(1, C / |g_n|) g_n + sigma C xi) / B,   xi ~ Normal(0, 1) for every entry

    Adding or removing an example changes the sum by at most C in the Euclidean norm over all
    parameters (the sensitivity). So this is the Gaussian mechanism with noise multiplier sigma,
    subsampled in the way that the batches are drawn. Compute the privacy spent over many steps with
    a library such as dp-accounting. B is a constant, not the number of examples in the batch.

    With `per_layer`, each layer's part of g_n is clipped on its own, to C / sqrt(L) for L layers
    with parameters. The whole is then at most C again, so the noise and the privacy are the same. A
    layer with small gradients keeps them where one with large gradients is clipped.

    With Poisson sampling, batches vary in size. Pad them to one size with zeros, and give the
    padding weight 0 with `weighted(loss)`: then its gradient is zero and adds nothing. Clipping
    comes after these weights. An example with an infinite or nan gradient makes the sum infinite or
    nan.

    The privacy guarantee holds for the mechanism in exact arithmetic. The noise here is that of
    `jax.random`, and norms, weights and sums are rounded. For parameters of 16 bits, all of these
    are in 32 bits, and the result is rounded to 16 after the noise. With two sweeps, the error that
    carries the weights is rounded in its own dtype: in bfloat16, an example can add up to 1 % more
    than C.

    Args:
      net: a Layer, in which no example depends on another.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      max_norm: C, positive and finite.
      noise_multiplier: sigma, at least 0; with 0 there is no noise, and no privacy.
      batch_size: B, the expected number of examples in a batch.
      sweeps: the number of backward passes, 1 or 2, as in `reweighted`.
      per_layer: whether to clip each layer's part on its own, with one sweep. A layer is an
        innermost collection of parameters, such as a weight and its bias, and each layer of a
        `stack` counts.
      rule: which weights carry the error back, as in `reweighted`.

    Returns:
      `function(params, inputs, targets, *, key, rule_state=(), rule_key=None) -> Reweighted`. Its
      `grads` are private for any rule, as long as the state of the rule does not depend on the data
      other than through private updates. Its values, norms and weights are not private: use them
      only in experiments on public data.

    Raises:
      TypeError: `net` is not a Layer, or `loss` is not a function.
      ValueError: a number is out of range, `sweeps` is 2 with `per_layer`, or `rule` is not a Rule.
        When called: as for `reweighted`.

    References:
      "Deep Learning with Differential Privacy", Abadi et al., 2016.
      "Learning Differentially Private Recurrent Language Models", McMahan, Ramage, Talwar, Zhang,
      2018: per-layer clipping.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2))
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> private = bp.private_gradient(
      ...     net, bp.weighted(bp.squared_error), max_norm=1.0, noise_multiplier=1.1, batch_size=4,
      ... )
      >>> padded = jnp.zeros((5, 2)), jnp.array([1.0, 1.0, 1.0, 0.0, 0.0])
      >>> answer = jax.jit(private)(params, jnp.ones((5, 3)), padded, key=jax.random.key(1))
      >>> answer.grads[0]["weight"].shape
      (3, 4)
    """
    name = "private_gradient"
    require_call(name, net, loss)
    require_rule(name, rule)
    wrong = []
    if not 0 < max_norm < math.inf:
        wrong.append(f"max_norm is {max_norm}, expected a positive number")
    if not 0 <= noise_multiplier < math.inf:
        wrong.append(f"noise_multiplier is {noise_multiplier}, expected a number, at least 0")
    if not 0 < batch_size < math.inf:
        wrong.append(f"batch_size is {batch_size}, expected a positive number")
    if wrong:
        raise ValueError(f"{name}: {'; '.join(wrong)}.")

    def make_weigh(parts):
        return clip_weights(max_norm / math.sqrt(max(parts, 1)))  # none without parameters

    clipped = _wide_sums(name, net, loss, make_weigh, sweeps, rule, per_layer)
    deviation, batch_size = float(noise_multiplier * max_norm), float(batch_size)

    def function(params, inputs, targets, *, key, rule_state=(), rule_key=None):
        if key is None:
            raise ValueError(
                f"{name}: key is None; the noise takes a key, such as jax.random.key(0)."
            )
        require_key(name, "key", key)
        forward_key, noise_key = jax.random.split(key)
        answer = clipped(params, inputs, targets, forward_key, rule_state, rule_key)
        sums, structure = jax.tree.flatten(answer.grads)
        keys = jax.random.split(noise_key, len(sums))

        def add_noise(key, total):
            return (
                total + deviation * jax.random.normal(key, total.shape, total.dtype)
            ) / batch_size

        grads = structure.unflatten(map(add_noise, keys, sums))
        return answer._replace(grads=_like(params, grads))

    return function
