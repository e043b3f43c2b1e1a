"""The loss of every network, and its gradient by the library and by autodiff.

A side of a comparison is `side(case, params, inputs, labels)`. It returns a function to compile
followed by the function's arguments, or a `Program` that is compiled already.
"""

import jax
import jax.numpy as jnp
import optax

import jaxbp as bp

LOSS = bp.softmax_cross_entropy


def mean_cross_entropy(logits, labels):
    """The mean over examples of the sum over positions, if there are any."""
    terms = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(terms) / len(terms)


def explicit_side(make_net):
    """The library's gradient of the network `make_net(case)`."""

    def side(case, *data):
        return bp.value_and_grad(make_net(case), LOSS), *data

    return side


def same_layers_side(make_net):
    """The gradient of the library's forward pass by autodiff."""

    def make_mean_loss(case):
        net = make_net(case)

        def mean_loss(params, inputs, labels):
            return mean_cross_entropy(net.forward(params, inputs)[0], labels)

        return mean_loss

    return autodiff_side(make_mean_loss)


def autodiff_side(make_mean_loss):
    """The gradient of the mean loss `make_mean_loss(case)` by autodiff."""

    def side(case, *data):
        return jax.value_and_grad(make_mean_loss(case)), *data

    return side
