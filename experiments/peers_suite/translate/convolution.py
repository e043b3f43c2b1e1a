"""Convolutions: PyTorch has weights [O, I / groups, *K], and [I, O / groups, *K] if transposed."""

import jax.numpy as jnp
from torch import nn

import jaxbp as bp
from experiments.peers_suite.written import Written, channels_last


def convolution(module, x):
    layout = channels_last(x, len(module.kernel_size))
    layer = bp.conv(
        module.out_channels,
        module.kernel_size,
        strides=module.stride,
        padding="SAME" if module.padding == "same" else _both_sides(module.padding),
        dilation=module.dilation,
        groups=module.groups,
        use_bias=module.bias is not None,
    )

    def params(params):
        return params | {"weight": jnp.moveaxis(params["weight"], (0, 1), (-1, -2))}

    return Written(layer, layout.into, layout.back, params)


def transposed(module, x):
    layout = channels_last(x, len(module.kernel_size))
    layer = bp.conv_transpose(
        module.out_channels,
        module.kernel_size,
        strides=module.stride,
        padding=_both_sides(module.padding),
        dilation=module.dilation,
        use_bias=module.bias is not None,
    )

    def params(params):
        return params | {"weight": jnp.moveaxis(params["weight"], (0, 1), (-2, -1))}

    return Written(layer, layout.into, layout.back, params)


def _both_sides(padding):
    return tuple((p, p) for p in padding)


TRANSLATIONS = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), transposed),
}
