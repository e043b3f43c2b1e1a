"""What the benchmark reads off beside a gradient, each as a program of its own.

A maker takes a network and gives `function(params, inputs, labels)`, which answers with the mean
gradient and the quantity; the clipped sums stand in the gradient's place.
"""

import jax
import jax.numpy as jnp

import jaxbp as bp
from experiments.bench.peers import MAX_NORM
from experiments.bench.trainers import LOSS


def gradient_and_norms(net):
    """The mean gradient and the norm of every example's, in one sweep."""
    sweep = bp.backprop(net, LOSS, read={"grads": bp.mean, "sq_norms": bp.sq_norms})

    def function(params, inputs, labels):
        values, answers = sweep(params, inputs, labels)
        return jnp.mean(values), answers["grads"], bp.example_norms(answers["sq_norms"])

    return function


def make_beside(read):
    """A reading of the sweep that the gradient comes from."""

    def make(net):
        return bp.backprop(net, LOSS, read={"grads": bp.mean, "quantity": read})

    return make


def make_clipped(sweeps):
    """The sum of clipped gradients."""

    def make(net):
        return bp.reweighted(net, LOSS, bp.clip_weights(MAX_NORM), sweeps=sweeps)

    return make


def make_curvature(read, error):
    """A reading of a further sweep, of another error.

    Both are written with a forward pass of their own, which the compiler finds to be the same.
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


# What is wanted of each, as a multiple of the gradient's time, and who makes it.
QUANTITIES = {
    "norms": (1.05, gradient_and_norms),
    "clipped sum, one sweep": (1.10, make_clipped(1)),
    "clipped sum, two sweeps": (None, make_clipped(2)),
    "second moment": (1.4, make_beside(bp.second_moment)),
    "variance": (None, make_beside(bp.variance)),
    "KFAC (MC 1)": (1.8, make_curvature(bp.kronecker, bp.sampled)),
    "GGN diagonal (MC 1)": (1.6, make_curvature(bp.diagonal, bp.sampled)),
    # 0.35 for each of ten classes, beside the gradient.
    "GGN diagonal (exact)": (4.5, make_curvature(bp.diagonal, bp.ggn_columns)),
    "gram": (1.3, make_gram),
}
