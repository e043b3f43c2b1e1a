"""Activations, and softmax along an axis."""

import functools

import jax.numpy as jnp
from torch import nn

import jaxbp as bp
from experiments.peers_suite.written import (
    CannotBeWrittenError,
    Layout,
    Written,
    channels_last,
    examples,
)

ACTIVATIONS = {
    nn.CELU: lambda module: bp.celu(module.alpha),
    nn.ELU: lambda module: bp.elu(module.alpha),
    nn.GELU: lambda module: bp.gelu(approximate=module.approximate == "tanh"),
    nn.Hardshrink: lambda module: bp.hard_shrink(module.lambd),
    nn.Hardswish: lambda _: bp.hardswish(),
    nn.Hardtanh: lambda module: bp.hard_tanh(module.min_val, module.max_val),
    nn.LeakyReLU: lambda module: _leaky_relu(module.negative_slope),
    nn.LogSigmoid: lambda _: bp.log_sigmoid(),
    nn.Mish: lambda _: bp.mish(),
    nn.ReLU: lambda _: bp.relu(),
    nn.ReLU6: lambda _: bp.relu6(),
    nn.SELU: lambda _: bp.selu(),
    nn.SiLU: lambda _: bp.silu(),
    nn.Sigmoid: lambda _: bp.sigmoid(),
    nn.Softplus: lambda module: bp.softplus(module.beta),
    nn.Softshrink: lambda module: bp.soft_shrink(module.lambd),
    nn.Softsign: lambda _: bp.softsign(),
    nn.Tanh: lambda _: bp.tanh(),
    nn.Tanhshrink: lambda _: bp.tanh_shrink(),
    nn.Threshold: lambda module: bp.threshold(module.threshold, module.value),
}


def activation(module, x):
    """Which axis counts examples makes no difference, so the first one does."""
    if isinstance(module, nn.Softplus) and module.threshold < 0:
        raise CannotBeWrittenError(
            "softplus has no threshold: it is exact where PyTorch replaces it by x"
        )
    layout = examples(x, 0)
    return Written(ACTIVATIONS[type(module)](module), layout.into, layout.back)


def _leaky_relu(slope):
    return bp.leaky_relu(slope) if slope else bp.relu()


def prelu(module, x):
    """One slope for all, or one for each channel, the second axis of PyTorch."""
    shared = module.num_parameters == 1
    layout = _as_rows(x) if shared else channels_last(x, x.ndim - 2)
    layer = bp.prelu(shared=shared)
    return Written(layer, layout.into, layout.back, lambda params: {"slope": params["weight"]})


def along_axis(make, module, x):
    """An axis of PyTorch counts N, one of the library does not."""
    layout, axis = _without_first(x, module.dim)
    return Written(make(axis), layout.into, layout.back)


def softmax_2d(_, x):
    layout = examples(x, 3)
    return Written(bp.softmax(axis=0), layout.into, layout.back)


def softmin(module, x):
    layout, axis = _without_first(x, module.dim)
    layer = bp.chain(bp.scale(-1.0), bp.softmax(axis))
    return Written(layer, layout.into, layout.back, lambda _: ((), ()))


def _without_first(x, axis):
    """A layout with N, and the axis counted without N. N is added if the axis is the first."""
    axis %= max(x.ndim, 1)
    if axis == 0:
        return _as_rows(x), 0
    return examples(x, 0), axis - 1


def _as_rows(x):
    """The layout of any array as one example with at least one axis."""
    return Layout(lambda x: jnp.atleast_1d(x)[None], lambda y: y[0] if x.ndim else y[0, 0])


TRANSLATIONS = {
    **dict.fromkeys(ACTIVATIONS, activation),
    nn.PReLU: prelu,
    nn.GLU: functools.partial(along_axis, bp.glu),
    nn.Softmax: functools.partial(along_axis, bp.softmax),
    nn.LogSoftmax: functools.partial(along_axis, bp.log_softmax),
    nn.Softmin: softmin,
    nn.Softmax2d: softmax_2d,
}
