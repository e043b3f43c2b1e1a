"""The gradient check: compares an explicit backward pass with independent witnesses.

Use it to test a layer, a network or a loss of your own. It runs in float64, with random inputs and
a random cotangent u. With f the forward pass, p the parameters and the input, and J the Jacobian:

    autodiff             J^T u from `jax.vjp`, for each parameter and for the input
    finite differences   u . (f(p + h v) - f(p - h v)) / 2h against (J^T u) . v, for a random v
    adjoint identity     <J v, u> = <v, J^T u>, with J v from `jax.jvp`, for everything at once
    readings             `per_example`, `sq_norms` and `keep` of each parameter, and `gram` if its
                         signal has a formula of its own, against the gradient of each example
                         from `jax.vjp`

For a layer it also checks the rest of the contract in `types.Layer`:

    same key             `init` draws the same parameters from the same key
    out_shape            the outputs have the shape that `init` promised
    jit                  `forward` computes the same under `jax.jit`, and a second time
    other examples       the outputs of an example do not depend on other examples
    without a key        the same for the pass without a key, if it is another one
    another tree         `backward` carries the error by the tree that it gets
    linear in dy         `backward` is linear in dy, whatever the tree

`sweep` runs the backward pass with every reading, `derivatives` and `contract` compare, `report`
has the result, and `subject` the call.

The layers, losses and readings of the package never use automatic differentiation. It appears here,
in `lift` for what lies between the parameters of a foreign model, and in `sweeps.curvature` as the
forward derivative of the explicit backward pass.
"""

from jaxbp.check import report, subject
from jaxbp.check.report import *
from jaxbp.check.subject import *

__all__ = [*report.__all__, *subject.__all__]
