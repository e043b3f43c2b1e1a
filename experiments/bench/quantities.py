"""The library's quantities beside a gradient, each as a program of its own.

A maker takes a network and returns `function(params, inputs, labels)`, which returns the mean
gradient and the quantity. The clipped sums take the place of the gradient.
"""

import jax
import jax.numpy as jnp

import jaxbp as bp
from experiments.bench.networks.sides import LOSS

MAX_NORM = 1.0  # to which the gradient of an example is clipped, here and by the peers


def gradient_and_norms(net):
    """The mean gradient and the norm of every example's gradient, in one sweep."""
    sweep = bp.backprop(net, LOSS, read={"grads": bp.mean, "sq_norms": bp.sq_norms})

    def function(params, inputs, labels):
        values, answers = sweep(params, inputs, labels)
        return jnp.mean(values), answers["grads"], bp.example_norms(answers["sq_norms"])

    return function


def make_beside(read):
    """A reading in the same sweep as the gradient."""

    def make(net):
        return bp.backprop(net, LOSS, read={"grads": bp.mean, "quantity": read})

    return make


def make_clipped(sweeps):
    """The sum of clipped gradients."""

    def make(net):
        return bp.reweighted(net, LOSS, bp.clip_weights(MAX_NORM), sweeps=sweeps)

    return make


def make_curvature(read, error):
    """A reading in a second sweep, which propagates another error.

    Each sweep has its own forward pass; the compiler merges the two.
    """

    def make(net):
        gradient = bp.value_and_grad(net, LOSS)
        curvature = bp.backprop(net, LOSS, read=read, error=error)

        def function(params, inputs, labels):
            value, grads = gradient(params, inputs, labels)
            _, quantity = curvature(params, inputs, labels, error_key=jax.random.key(0))
            return value, grads, quantity

        return function

    return make


def make_gram(net):
    """The inner products of all pairs of gradients."""
    sweep = bp.backprop(net, LOSS, read={"grads": bp.mean, "signals": bp.keep})

    def function(params, inputs, labels):
        values, answers = sweep(params, inputs, labels)
        return values, answers["grads"], bp.gram(answers["signals"])

    return function


NORMS_AND_CLIPPED_SUMS = {
    "norms": gradient_and_norms,
    "clipped sum, one sweep": make_clipped(1),
    "clipped sum, two sweeps": make_clipped(2),
}
QUANTITIES = {
    **NORMS_AND_CLIPPED_SUMS,
    "second moment": make_beside(bp.second_moment),
    "variance": make_beside(bp.variance),
    "KFAC (MC 1)": make_curvature(bp.kronecker, bp.sampled),
    "GGN diagonal (MC 1)": make_curvature(bp.diagonal, bp.sampled),
    "GGN diagonal (exact)": make_curvature(bp.diagonal, bp.ggn_columns),
    "gram": make_gram,
}
