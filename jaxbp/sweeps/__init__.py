"""Sweeps: the functions that users call to run a network forwards and backwards.

`gradients` has the gradient and every reading of it. `reweight` clips and weighs the gradients of
examples, `noise_scale` measures their spread, `curvature` multiplies by the Hessian and the
Gauss-Newton matrix, and `tangent_kernel` compares examples by their Jacobians.

This chapter joins networks, losses, errors, rules and readings. A new call goes into the module of
its subject.
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
