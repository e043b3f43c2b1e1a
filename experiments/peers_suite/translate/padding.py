"""Padding: PyTorch gives the widths of the last axis first, (left, right, top, bottom, ...)."""

import functools

from torch import nn

import jaxbp as bp
from experiments.peers_suite.written import Written, channels_last


def padding(mode, module, x):
    widths = module.padding
    pairs = [*zip(widths[::2], widths[1::2], strict=True)][::-1]
    value = getattr(module, "value", 0)
    layout = channels_last(x, len(pairs))
    return Written(bp.pad(pairs, mode=mode, value=value), layout.into, layout.back)


MODES = {
    "constant": (
        *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
        *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    ),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "edge": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "wrap": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}

TRANSLATIONS = {
    cls: functools.partial(padding, mode) for mode, classes in MODES.items() for cls in classes
}
