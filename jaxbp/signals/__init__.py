"""Signals: the operands of a parameter's gradient, kept separate until a reading combines them.

`kinds` has the five records `Outer`, `Bias`, `Scale`, `Lookup` and `Conv`. `operands` checks that
the arrays of a signal fit each other. `stacked` handles trees that hold many alike layers in one
array, and `changing` changes other arrays of a stack while its layers are read. `views` says where
the entries of a gradient stand in the parameter. Convolutions need four more modules:
`conv_windows` says which inputs each window sees, `conv_products` computes the forward product, its
transpose and the kernel gradient, `conv_winograd` computes the first two for many channels on a
CPU, and `conv_patches` turns a `Conv` into the `Outer` of its patches.

This chapter imports only `types`. To add a kind of signal, add a record to `kinds`, its checks to
`operands` and its formulas to the modules of `readings`. A reading without a formula for a kind
forms the gradient of each example. Outside of the library, a kind is a record with methods.
"""

from jaxbp.signals import conv_windows, kinds, stacked
from jaxbp.signals.conv_windows import *
from jaxbp.signals.kinds import *
from jaxbp.signals.stacked import *

__all__ = [
    *conv_windows.__all__,
    *kinds.__all__,
    *stacked.__all__,
]
