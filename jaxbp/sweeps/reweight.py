"""Reweighting: every example's gradient times a weight that depends on its norm.

  sum_n w_n g_n   with   w = weigh(|g_1|, ..., |g_N|)

The norms are known at the end of a sweep, the weights are needed before the sum over examples. So
either one sweep keeps the operands of every gradient and sums them at its end, or two sweeps keep
nothing: the first reads norms; the second sends back w_n delta_n, which a linear sweep turns into
w_n g_n. No gradient of an example is ever formed.

Clipping is `weigh = clip_weights(max_norm)`. With noise it makes a gradient differentially private,
without it is a defence against outliers.

Sources:
  "Deep Learning with Differential Privacy", Abadi et al., 2016: clipping.
  "Large Language Models Can Be Strong Differentially Private Learners", Li, Tramer, Liang,
  Hashimoto, 2021: in two sweeps.
  "Differentially Private Optimization on Large Model at Small Cost", Bu, Wang, Zha, Karypis, 2022:
  in one.
  "Automatic Clipping: Differentially Private Deep Learning Made Easier and Stronger", Bu, Wang,
  Zha, Karypis, 2023: normalising.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxbp.readings.norms import example_norms, layer_norms, sq_norms
from jaxbp.readings.sums import total
from jaxbp.rules.feedback import exact, require_rule
from jaxbp.signals.kinds import map_signals
from jaxbp.signals.stacked import map_layers
from jaxbp.types import show_shape, weighed, widened


def clip_weights(max_norm):
    """Weights [N] that scale each example's gradient to a norm of at most C: min(1, C / |g_n|).

      |g_n| = 0        weight 1 (the gradient is zero anyway)
      |g_n| = inf      weight 0 (but its product with such a gradient is not a number)
      C = inf          weight 1
      C = 0            weight 0 (1 where the gradient is zero)

    Args:
      max_norm: C, at least 0.

    Returns:
      `weigh(norms) -> weights`.

    Raises:
      ValueError: `max_norm` is negative or not a number.

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


def automatic_weights(gamma=0.01):
    """Weights [N] that bring each example's gradient to a norm just below 1: 1 / (|g_n| + gamma).

    What `clip_weights` does with its threshold, this does without one, up to a factor that the
    learning rate takes in. Examples of small gradients count for more than they would.

    Args:
      gamma: positive; it keeps small gradients apart from smaller ones.

    Returns:
      `weigh(norms) -> weights`.

    Raises:
      ValueError: `gamma` is not positive and finite.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bp.automatic_weights(1.0)(jnp.array([0.0, 1.0, 3.0])).tolist()
      [1.0, 0.5, 0.25]
    """
    if not 0 < gamma < math.inf:
        raise ValueError(f"automatic_weights: gamma is {gamma}; it takes a positive number.")
    return lambda norms: 1 / (norms + gamma)


class Reweighted(NamedTuple):
    """What a reweighted sweep knows.

    Attributes:
      values: the loss of each example, [N].
      norms: of each example's gradient, before the weights, [N]; by layers, a tree with [N] in
        place of each layer's parameters.
      weights: w, as the norms.
      grads: sum_n w_n g_n, a tree like params.
    """

    values: jax.Array
    norms: Any
    weights: Any
    grads: Any


def reweighted(net, loss, weigh, *, sweeps=1, per_layer=False, rule=exact()):
    """The sum of every example's gradient times its weight, sum_n w_n g_n with w = weigh(norms).

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      weigh: `weigh(norms [N]) -> weights [N]`, such as `clip_weights(1.0)`.
      sweeps: 1 keeps the operands of every layer's gradients until the weights are known; 2 keeps
        nothing, at the price of a second sweep. The answer is the same.
      per_layer: whether each layer has norms and weights of its own, in place of the whole
        gradient's. A layer is an innermost collection of parameters, such as a weight and its bias.
      rule: which weights carry the error back (see `feedback`), and so what a gradient is.

    Returns:
      `function(params, inputs, targets, *, key=None, rule_state=(), rule_key=None) -> Reweighted`.

    Raises:
      ValueError: `sweeps` is neither 1 nor 2, or is 2 with weights per layer, which no single error
        at the outputs can carry; or the weights that `weigh` gives are not [N].

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2))
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> clipped = jax.jit(bp.reweighted(net, bp.squared_error, bp.clip_weights(1.0)))
      >>> answer = clipped(params, jnp.ones((5, 3)), jnp.full((5, 2), 10.0))
      >>> round(float(jnp.max(answer.weights * answer.norms)), 4)
      1.0
    """
    require_rule("reweighted", rule)
    if sweeps not in (1, 2):
        raise ValueError(f"reweighted: sweeps is {sweeps!r}; it takes 1 or 2.")
    if sweeps == 2 and per_layer:
        raise ValueError(
            "reweighted: with per_layer, sweeps has to be 1: an error at the outputs carries one "
            "weight for each example, not one for each layer."
        )

    def weights_of(norms):
        weights = weigh(norms)
        if jnp.shape(weights) != norms.shape:
            raise ValueError(
                f"reweighted: weigh gave weights of shape {show_shape(jnp.shape(weights))}, "
                f"expected {show_shape(norms.shape)}: one for each example."
            )
        return weights

    def function(params, inputs, targets, *, key=None, rule_state=(), rule_key=None):
        outputs, cache = net.forward(params, inputs, key=key)
        values, delta = loss(outputs, targets)
        tree = rule.choose(rule_state, params, key=rule_key)
        if sweeps == 2:
            _, squares = net.backward(tree, cache, delta, read=sq_norms)
            norms = example_norms(squares)
            weights = weights_of(norms)
            _, grads = net.backward(tree, cache, weighed(delta, weights), read=total)
            return Reweighted(values, norms, weights, grads)

        _, signals = net.backward(tree, cache, delta)
        squares = map_signals(sq_norms, signals)
        norms = layer_norms(squares) if per_layer else example_norms(squares)
        weights = map_layers(weights_of, norms)

        def weighed_sum(weights, signals):
            return map_signals(lambda signal: total(signal, weights=weights), signals)

        return Reweighted(values, norms, weights, map_layers(weighed_sum, weights, signals))

    return function


def private_gradient(net, loss, *, max_norm, noise_multiplier, batch_size, sweeps=1, rule=exact()):
    """A differentially private mean gradient: clipped, summed, and drowned in noise.

      (sum_n min(1, C / |g_n|) g_n + sigma C xi) / B,   xi ~ Normal(0, 1) for every entry

    Its sensitivity: to add or to remove an example changes the sum by at most C in the Euclidean
    norm over all parameters together. So this is the Gaussian mechanism of noise multiplier sigma,
    subsampled as the batches are; how much privacy is spent over many steps is for a library such
    as dp-accounting to say. B is a constant, not the number of examples that happen to be there.

    Batches of Poisson sampling vary in size. Pad them to one size, and give what is padded weight
    0 by `weighted(loss)`: its gradient is zero, and so is what it adds. Examples are clipped after
    their weights. An example whose gradient is infinite or not a number makes the whole sum so.

    The normal numbers are those of `jax.random`, in 32 bits or more, and norms are rounded: the
    guarantee is that of the mechanism in exact arithmetic. Sums of 16 bits exceed C by rounding.

    Args:
      net: a Layer, in which no example sees another.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      max_norm: C, positive and finite.
      noise_multiplier: sigma, at least 0; with 0 there is no noise, and no privacy.
      batch_size: B, the expected number of examples of a batch.
      sweeps: as of `reweighted`.
      rule: as of `reweighted`.

    Returns:
      `function(params, inputs, targets, *, key, rule_state=(), rule_key=None) -> Reweighted`. Its
      `grads` are private, whatever the rule, as long as its state has nothing of the data that is
      not private: a fixed state, or one that private updates have made. Its
      values, norms and weights are not, and are for experiments on public data.

    Raises:
      ValueError: a number is out of range.

    References:
      "Deep Learning with Differential Privacy", Abadi et al., 2016.

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
    wrong = []
    if not 0 < max_norm < math.inf:
        wrong.append(f"max_norm is {max_norm}, expected a positive number")
    if not 0 <= noise_multiplier < math.inf:
        wrong.append(f"noise_multiplier is {noise_multiplier}, expected a number, at least 0")
    if not 0 < batch_size < math.inf:
        wrong.append(f"batch_size is {batch_size}, expected a positive number")
    if wrong:
        raise ValueError(f"private_gradient: {'; '.join(wrong)}.")
    clipped = reweighted(net, loss, clip_weights(max_norm), sweeps=sweeps, rule=rule)
    deviation, batch_size = float(noise_multiplier * max_norm), float(batch_size)

    def function(params, inputs, targets, *, key, rule_state=(), rule_key=None):
        forward_key, noise_key = jax.random.split(key)
        answer = clipped(
            params, inputs, targets, key=forward_key, rule_state=rule_state, rule_key=rule_key
        )
        sums, structure = jax.tree.flatten(answer.grads)
        keys = jax.random.split(noise_key, len(sums))

        def add_noise(key, total):
            wide = widened(total)  # in 16 bits normal numbers are coarse, and bounded
            noise = deviation * jax.random.normal(key, wide.shape, wide.dtype)
            return ((wide + noise) / batch_size).astype(total.dtype)

        grads = map(add_noise, keys, sums)
        return answer._replace(grads=structure.unflatten(grads))

    return function
