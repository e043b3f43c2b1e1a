"""Outputs: what is computed from a network's outputs and the targets.

`losses` has the losses: the value of each example, and its derivative with respect to the outputs.
`weighting` weighs their terms or leaves some out, `joint` adds the losses of several outputs, and
`metrics` counts right predictions. `errors` has other arrays to propagate back from the outputs:
deltas at sampled targets, columns of the loss's Hessian, rows of the Jacobian. `arguments` checks
outputs and targets.

This chapter imports only `types` and `require`. A new loss goes into `losses`, a new error into
`errors`.
"""

from jaxbp.outputs import errors, joint, losses, metrics, weighting
from jaxbp.outputs.errors import *
from jaxbp.outputs.joint import *
from jaxbp.outputs.losses import *
from jaxbp.outputs.metrics import *
from jaxbp.outputs.weighting import *

__all__ = [
    *errors.__all__,
    *joint.__all__,
    *losses.__all__,
    *metrics.__all__,
    *weighting.__all__,
]
