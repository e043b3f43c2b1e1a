"""Outputs: what is computed from a network's outputs and the targets.

`losses` has the losses: the value of each example, and its derivative with respect to the outputs.
`errors` has other arrays to propagate back from the outputs: deltas at sampled targets, columns of
the loss's Hessian, rows of the Jacobian.

This chapter imports only `types`. A new loss goes into `losses`, a new error into `errors`.
"""

from jaxbp.outputs.errors import ggn_columns as ggn_columns
from jaxbp.outputs.errors import jacobian_rows as jacobian_rows
from jaxbp.outputs.errors import sampled as sampled
from jaxbp.outputs.losses import accuracy as accuracy
from jaxbp.outputs.losses import huber as huber
from jaxbp.outputs.losses import make_huber as make_huber
from jaxbp.outputs.losses import sigmoid_cross_entropy as sigmoid_cross_entropy
from jaxbp.outputs.losses import softmax_cross_entropy as softmax_cross_entropy
from jaxbp.outputs.losses import squared_error as squared_error
from jaxbp.outputs.losses import weighted as weighted
