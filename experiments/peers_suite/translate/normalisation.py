"""Normalisations: gain and bias of PyTorch are called weight and bias."""

import functools

import numpy as np
from torch import nn

import jaxbp as bp
from experiments.peers_suite.written import CannotBeWrittenError, Written, channels_last, to_array


def gain_and_bias(params):
    """Those of a normalisation, as vectors; `()` if it has none."""
    names = {"weight": "gain", "bias": "bias"}
    return {names[name]: array.ravel() for name, array in params.items()} or ()


def layer_norm(module, x):
    layer = bp.layer_norm(
        axes=len(module.normalized_shape),
        eps=module.eps,
        use_gain=module.weight is not None,
        use_bias=module.bias is not None,
    )
    return Written(layer, lambda x: x, lambda y: y, gain_and_bias)


def rms_norm(module, x):
    layer = bp.rms_norm(
        axes=len(module.normalized_shape),
        eps=np.finfo(np.float64).eps if module.eps is None else module.eps,
        use_gain=module.weight is not None,
    )
    return Written(layer, lambda x: x, lambda y: y, gain_and_bias)


def group_norm(module, x):
    return _by_channels(bp.group_norm, module, x, module.num_groups)


def instance_norm(n_axes, module, x):
    if module.track_running_stats:
        return _by_running_statistics(n_axes, module, x)
    return _by_channels(bp.group_norm, module, x, module.num_features, n_axes=n_axes)


def batch_norm(module, x):
    if not module.track_running_stats:
        raise CannotBeWrittenError(
            "batch normalisation by the batch's own statistics has no per-example gradient"
        )
    return _by_running_statistics(x.ndim - 2, module, x)


def local_response_norm(module, x):
    layer = bp.local_response_norm(module.size, alpha=module.alpha, beta=module.beta, k=module.k)
    layout = channels_last(x, x.ndim - 2)
    return Written(layer, layout.into, layout.back)


def _by_running_statistics(n_axes, module, x):
    statistics = to_array(module.running_mean), to_array(module.running_var)
    return _by_channels(bp.fixed_norm, module, x, *statistics, n_axes=n_axes)


def _by_channels(make, module, x, *arguments, n_axes=None):
    """A normalisation of inputs with channels in front, with a gain and a bias for each channel."""
    layer = make(
        *arguments,
        eps=module.eps,
        use_gain=module.weight is not None,
        use_bias=module.bias is not None,
    )
    layout = channels_last(x, x.ndim - 2 if n_axes is None else n_axes)
    return Written(layer, layout.into, layout.back, gain_and_bias)


TRANSLATIONS = {
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.GroupNorm: group_norm,
    nn.InstanceNorm1d: functools.partial(instance_norm, 1),
    nn.InstanceNorm2d: functools.partial(instance_norm, 2),
    nn.InstanceNorm3d: functools.partial(instance_norm, 3),
    nn.LocalResponseNorm: local_response_norm,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), batch_norm),
}
