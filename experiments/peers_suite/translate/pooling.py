"""Pooling, by windows of a size or into a number of windows."""

import functools

from torch import nn

import jaxbp as bp
from experiments.peers_suite.written import CannotBeWrittenError, Written, channels_last

NO_PLACES = "no layer hands out the places of maxima"


def max_pool(n_axes, module, x):
    if module.return_indices:
        raise CannotBeWrittenError(NO_PLACES)
    windows = _windows(module, n_axes, padding=module.padding, dilation=module.dilation)
    return _written(bp.max_pool(**windows), n_axes, x)


def avg_pool(n_axes, module, x):
    divisor = getattr(module, "divisor_override", None)
    if divisor is None:
        divisor = "window" if module.count_include_pad else "inputs"
    windows = _windows(module, n_axes, padding=module.padding)
    return _written(bp.avg_pool(**windows, divisor=divisor), n_axes, x)


def lp_pool(n_axes, module, x):
    if module.norm_type % 2:
        raise CannotBeWrittenError(
            "for a p that is not even, PyTorch's Lp pooling of negative numbers is nan; lp_pool "
            "takes absolute values"
        )
    return _written(bp.lp_pool(p=module.norm_type, **_windows(module, n_axes)), n_axes, x)


def adaptive_avg_pool(n_axes, module, x):
    return _adaptive("mean", n_axes, module, x)


def adaptive_max_pool(n_axes, module, x):
    if module.return_indices:
        raise CannotBeWrittenError(NO_PLACES)
    return _adaptive("max", n_axes, module, x)


def fractional_max_pool(module, x):
    raise CannotBeWrittenError("fractional max pooling draws its windows")


def _adaptive(how, n_axes, module, x):
    return _written(bp.adaptive_pool(_per_axis(module.output_size, n_axes), how), n_axes, x)


def _written(layer, n_axes, x):
    layout = channels_last(x, n_axes)
    return Written(layer, layout.into, layout.back)


def _windows(module, n_axes, *, padding=0, dilation=1):
    """The arguments that all kinds of windows have. PyTorch pads both sides alike."""
    strides = module.kernel_size if module.stride is None else module.stride
    return {
        "window": _per_axis(module.kernel_size, n_axes),
        "strides": _per_axis(strides, n_axes),
        "padding": [(p, p) for p in _per_axis(padding, n_axes)],
        "dilation": _per_axis(dilation, n_axes),
    }


def _per_axis(sizes, n_axes):
    return sizes if isinstance(sizes, tuple) else (sizes,) * n_axes


def _by_axes(write, *classes):
    """A translation for each of these classes, of one, two and three axes of positions."""
    return {cls: functools.partial(write, n) for n, cls in enumerate(classes, 1)}


TRANSLATIONS = {
    **_by_axes(max_pool, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    **_by_axes(avg_pool, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    **_by_axes(lp_pool, nn.LPPool1d, nn.LPPool2d, nn.LPPool3d),
    **_by_axes(adaptive_avg_pool, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    **_by_axes(adaptive_max_pool, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    **dict.fromkeys((nn.FractionalMaxPool2d, nn.FractionalMaxPool3d), fractional_max_pool),
}
