"""Sweeps: the calls that run a network forwards and backwards.

`gradients` computes the mean gradient (`value_and_grad`) and any readings (`backprop`). `reweight`
clips and weighs the per-example gradients, `noise_scale` measures their scatter, `curvature`
multiplies vectors by the Hessian and the Gauss-Newton matrix, and `tangent_kernel` compares
examples by their Jacobians. `differentiable` is the way back: a network inside code that `jax.grad`
differentiates.

This chapter joins networks, losses, errors, rules and readings. Add a new call to the module of its
subject.
"""

from jaxbp.sweeps import curvature, differentiable, gradients, noise_scale, reweight, tangent_kernel
from jaxbp.sweeps.curvature import *
from jaxbp.sweeps.differentiable import *
from jaxbp.sweeps.gradients import *
from jaxbp.sweeps.noise_scale import *
from jaxbp.sweeps.reweight import *
from jaxbp.sweeps.tangent_kernel import *

__all__ = [
    *curvature.__all__,
    *differentiable.__all__,
    *gradients.__all__,
    *noise_scale.__all__,
    *reweight.__all__,
    *tangent_kernel.__all__,
]
