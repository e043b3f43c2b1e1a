"""Sweeps: the calls that run a network forwards and backwards.

`gradients` computes the mean gradient (`value_and_grad`) and any readings (`backprop`). `reweight`
clips and weighs the per-example gradients, `noise_scale` measures their scatter, `curvature`
multiplies vectors by the Hessian and the Gauss-Newton matrix, and `tangent_kernel` compares
examples by their Jacobians.

This chapter joins networks, losses, errors, rules and readings. Add a new call to the module of its
subject.
"""

from jaxbp.sweeps.curvature import gauss_newton_vector_product as gauss_newton_vector_product
from jaxbp.sweeps.curvature import hessian_vector_product as hessian_vector_product
from jaxbp.sweeps.gradients import backprop as backprop
from jaxbp.sweeps.gradients import value_and_grad as value_and_grad
from jaxbp.sweeps.noise_scale import GradientNoise as GradientNoise
from jaxbp.sweeps.noise_scale import gradient_noise as gradient_noise
from jaxbp.sweeps.reweight import Reweighted as Reweighted
from jaxbp.sweeps.reweight import automatic_weights as automatic_weights
from jaxbp.sweeps.reweight import clip_weights as clip_weights
from jaxbp.sweeps.reweight import private_gradient as private_gradient
from jaxbp.sweeps.reweight import reweighted as reweighted
from jaxbp.sweeps.tangent_kernel import neural_tangent_kernel as neural_tangent_kernel
from jaxbp.sweeps.tangent_kernel import (
    neural_tangent_kernel_per_class as neural_tangent_kernel_per_class,
)
