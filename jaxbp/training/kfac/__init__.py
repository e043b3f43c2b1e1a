"""KFAC: natural gradients from Kronecker factors, as an optax transformation.

The Fisher information of each weight matrix and each kernel is approximated by A x G, where A is
the second moment of the layer's inputs and G that of its error signals (see `readings.moments`; a
kernel [*K, I, O] counts as a matrix [K I, O]). The natural gradient F^-1 g is then

    A^-1 g G^-1   for the gradient g [I + 1, O] of a weight and, as its last row, the bias.

Layers are treated as independent. The factors are averaged over steps. Damping by lambda adds
sqrt(lambda) times the identity to both factors, balanced by pi, the square root of the ratio of
their mean eigenvalues:

    A + pi sqrt(lambda) I,   G + sqrt(lambda) / pi I,   pi^2 = (tr A / dim A) / (tr G / dim G)

The gradient is known to rounding error only, and the inverses multiply its error in directions in
which the factors are nearly singular. So the damping of an entry of the diagonal is never less than
300 eps times the entry (4e-5 in float32). This matters if lambda is small beside the curvature,
such as with features in the thousands that were not standardised. In float32 the natural gradient
is then within a few percent of the one in exact arithmetic where that floor is at work only in
directions without curvature; elsewhere it is a more strongly damped one. Standardise the features,
or choose a larger lambda, for all digits.

A parameter without factors, such as a gain or a table, has a diagonal instead, the second moment v
of its gradient: its natural gradient is g / (v + lambda).

A step multiplies each gradient by both inverses, and the gradient itself takes three products. With
one matrix product counted as one multiplication per pair of operands, a weight [I, O] at T
positions of N examples takes

    3 N T I O    the gradient
    (I + O) I O  the natural gradient, in every step

So a step costs little more than one of Adam only where N T is several times I + O, such as for
sequences. The factors take N T (I^2 + O^2) and another backward pass, when `factors_every` makes
them due. The inverses take about 7 / 6 of I^3 + O^3, when `every` makes them due.

`factors` computes the factors of a batch, `inverses` inverts them and multiplies gradients by the
inverses, and `optimizer` is the transformation. `layers` finds the layers in a tree of factors.

Source:
  "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", Martens, Grosse, 2015.
  "A Kronecker-factored approximate Fisher matrix for convolution layers", Grosse, Martens, 2016.
"""

from jaxbp.training.kfac import factors, optimizer
from jaxbp.training.kfac.factors import *
from jaxbp.training.kfac.optimizer import *

__all__ = [*factors.__all__, *optimizer.__all__]
