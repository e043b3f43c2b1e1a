"""jaxbp: backpropagation in JAX with the backward pass kept open.

A network is a `Layer`, a record of pure functions, made by calls such as `chain(dense(32), relu(),
dense(10))`. One backward pass through it computes the gradient and whatever else is asked for:

    value_and_grad   the mean loss and its gradient, like `jax.value_and_grad`
    backprop         any readings, such as per-example gradients, norms or curvature factors, for
                     any error at the outputs and any rule that carries it back
    fit              training with validation and early stopping; `make_step` makes a single step
    explain          the values, the deltas and the chain rule of a small network, to look at
    check            the test of a layer's backward pass against autodiff

Shapes are written in brackets, with the letters of `jaxbp.types`: N examples, T positions, I
inputs, O outputs, C classes.
"""

from jaxbp.check import *
from jaxbp.combinators import *
from jaxbp.explain import *
from jaxbp.layers import *
from jaxbp.lift import *
from jaxbp.outputs import *
from jaxbp.readings import *
from jaxbp.rules import *
from jaxbp.signals import *
from jaxbp.sweeps import *
from jaxbp.training import *
from jaxbp.types import *

__version__ = "0.1.0"
