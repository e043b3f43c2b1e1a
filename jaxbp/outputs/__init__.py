"""Outputs: what is computed from a network's outputs and the targets.

A loss maps outputs [N, ..., O] and targets to the value of each example, [N], and to its derivative
with respect to the outputs, delta = dE/dy, of the outputs' shape. Nothing is averaged over the
examples. The positions and outputs of one example are summed: the loss of a sequence is minus the
logarithm of its probability. A mean over them is this sum divided by their number, so that a mean
of PyTorch over all elements is the loss divided by a constant.

    regression       numbers that should be near their targets
    likelihoods      distributions whose parameters are the outputs: counts, means with variances
    softmax          logits of classes, of which one is right
    sigmoid          logits of questions with two answers
    probabilities    the same two, of outputs that are probabilities already
    divergence       a predicted distribution and a given one
    focal            cross-entropies in which easy examples count less
    margins          the right output is ahead by a margin
    pairs            two or three outputs that belong together
    ctc              sequences of labels without their places

The cross-entropies take logits, not probabilities. Value and delta are exact to the last digits
wherever the result can be represented, also where a prediction is certain or a logit is infinite.
16-bit outputs are computed in 32 bits; delta is returned in the dtype of the outputs, the value in
32 bits. Outside jit, targets out of range are refused. Under jit they are not known, and the value
and delta of that position are NaN.

Most losses are the negative logarithm of a distribution p(target | outputs), up to a constant. They
can draw targets from this distribution, and most know a factor of their Hessian (see `Loss`); the
others raise an error that says why.

`weighting` weighs the terms of a loss or leaves some out, `joint` adds the losses of several
outputs, and `metrics` counts right predictions. `errors` has other arrays to propagate back from
the outputs: deltas at sampled targets, columns of the loss's Hessian, rows of the Jacobian.
`arguments` checks outputs and targets, and `curvature` has what the losses share.

This chapter imports only `types` and `require`. A new loss goes into the module of its family, a
new error into `errors`.

Example:
  >>> import jax.numpy as jnp, jaxbp as bp
  >>> logits, labels = jnp.array([[0.0, 0.0], [-1e4, 1e4]]), jnp.array([0, 0])
  >>> value, delta = bp.softmax_cross_entropy(logits, labels)
  >>> [round(float(v), 4) for v in value], delta.tolist()
  ([0.6931, 20000.0], [[-0.5, 0.5], [-1.0, 1.0]])
"""

from jaxbp.outputs import (
    ctc,
    divergence,
    errors,
    focal,
    joint,
    likelihoods,
    margins,
    metrics,
    pairs,
    probabilities,
    regression,
    sigmoid,
    softmax,
    weighting,
)
from jaxbp.outputs.ctc import *
from jaxbp.outputs.divergence import *
from jaxbp.outputs.errors import *
from jaxbp.outputs.focal import *
from jaxbp.outputs.joint import *
from jaxbp.outputs.likelihoods import *
from jaxbp.outputs.margins import *
from jaxbp.outputs.metrics import *
from jaxbp.outputs.pairs import *
from jaxbp.outputs.probabilities import *
from jaxbp.outputs.regression import *
from jaxbp.outputs.sigmoid import *
from jaxbp.outputs.softmax import *
from jaxbp.outputs.weighting import *

__all__ = [
    *ctc.__all__,
    *divergence.__all__,
    *errors.__all__,
    *focal.__all__,
    *joint.__all__,
    *likelihoods.__all__,
    *margins.__all__,
    *metrics.__all__,
    *pairs.__all__,
    *probabilities.__all__,
    *regression.__all__,
    *sigmoid.__all__,
    *softmax.__all__,
    *weighting.__all__,
]
