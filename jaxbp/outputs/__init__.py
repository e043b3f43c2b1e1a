"""Outputs: what is computed from a network's outputs and the targets.

`losses` has the losses: the value of each example, and its derivative with respect to the outputs.
`errors` has other arrays to propagate back from the outputs: deltas at sampled targets, columns of
the loss's Hessian, rows of the Jacobian.

This chapter imports only `types`. A new loss goes into `losses`, a new error into `errors`.
"""

from jaxbp.outputs import errors, joint, losses
from jaxbp.outputs.errors import *
from jaxbp.outputs.joint import *
from jaxbp.outputs.losses import *

__all__ = [
    *errors.__all__,
    *joint.__all__,
    *losses.__all__,
]
