"""jaxbp: backpropagation in JAX with the backward pass kept open.

A network is a `Layer`, a record of pure functions, made by calls such as `chain(dense(32), relu(),
dense(10))`. One backward pass through it computes the gradient and whatever else is asked for:

  value_and_grad   the mean loss and its gradient, like `jax.value_and_grad`
  backprop         any readings, such as per-example gradients, norms or curvature factors, for any
                   error at the outputs and any rule that carries it back
  fit              training with validation and early stopping; `make_step` makes a single step
  check            the test of a layer's backward pass against autodiff

Shapes are written in brackets, with the letters of `jaxbp.types`: N examples, T positions, I
inputs, O outputs, C classes.
"""

from jaxbp.check import Finding as Finding
from jaxbp.check import Report as Report
from jaxbp.check import check as check
from jaxbp.combinators import Direct as Direct
from jaxbp.combinators import cast as cast
from jaxbp.combinators import chain as chain
from jaxbp.combinators import gated as gated
from jaxbp.combinators import masked as masked
from jaxbp.combinators import parallel as parallel
from jaxbp.combinators import remat as remat
from jaxbp.combinators import repeat as repeat
from jaxbp.combinators import residual as residual
from jaxbp.combinators import stack as stack
from jaxbp.layers import Cell as Cell
from jaxbp.layers import ForwardInTime as ForwardInTime
from jaxbp.layers import attention as attention
from jaxbp.layers import avg_pool as avg_pool
from jaxbp.layers import bidirectional as bidirectional
from jaxbp.layers import conv as conv
from jaxbp.layers import conv_transpose as conv_transpose
from jaxbp.layers import dense as dense
from jaxbp.layers import dot_product_attention as dot_product_attention
from jaxbp.layers import dropout as dropout
from jaxbp.layers import elu as elu
from jaxbp.layers import embedding as embedding
from jaxbp.layers import flatten as flatten
from jaxbp.layers import gelu as gelu
from jaxbp.layers import global_pool as global_pool
from jaxbp.layers import group_norm as group_norm
from jaxbp.layers import gru as gru
from jaxbp.layers import layer_norm as layer_norm
from jaxbp.layers import leaky_relu as leaky_relu
from jaxbp.layers import learned_positions as learned_positions
from jaxbp.layers import lstm as lstm
from jaxbp.layers import max_pool as max_pool
from jaxbp.layers import recurrent as recurrent
from jaxbp.layers import relu as relu
from jaxbp.layers import rms_norm as rms_norm
from jaxbp.layers import rotary as rotary
from jaxbp.layers import sigmoid as sigmoid
from jaxbp.layers import silu as silu
from jaxbp.layers import simple_rnn as simple_rnn
from jaxbp.layers import sinusoidal_positions as sinusoidal_positions
from jaxbp.layers import softplus as softplus
from jaxbp.layers import tanh as tanh
from jaxbp.layers import upsample as upsample
from jaxbp.outputs import accuracy as accuracy
from jaxbp.outputs import ggn_columns as ggn_columns
from jaxbp.outputs import huber as huber
from jaxbp.outputs import jacobian_rows as jacobian_rows
from jaxbp.outputs import make_huber as make_huber
from jaxbp.outputs import sampled as sampled
from jaxbp.outputs import sigmoid_cross_entropy as sigmoid_cross_entropy
from jaxbp.outputs import softmax_cross_entropy as softmax_cross_entropy
from jaxbp.outputs import squared_error as squared_error
from jaxbp.outputs import weighted as weighted
from jaxbp.readings import Kronecker as Kronecker
from jaxbp.readings import diagonal as diagonal
from jaxbp.readings import directional_derivatives as directional_derivatives
from jaxbp.readings import example_norms as example_norms
from jaxbp.readings import gram as gram
from jaxbp.readings import kronecker as kronecker
from jaxbp.readings import layer_norms as layer_norms
from jaxbp.readings import mean as mean
from jaxbp.readings import per_example as per_example
from jaxbp.readings import per_example_diagonal as per_example_diagonal
from jaxbp.readings import second_moment as second_moment
from jaxbp.readings import sq_norms as sq_norms
from jaxbp.readings import total as total
from jaxbp.readings import variance as variance
from jaxbp.rules import Alignment as Alignment
from jaxbp.rules import DirectState as DirectState
from jaxbp.rules import Magnitudes as Magnitudes
from jaxbp.rules import MirrorState as MirrorState
from jaxbp.rules import alignment as alignment
from jaxbp.rules import direct_feedback as direct_feedback
from jaxbp.rules import eprop as eprop
from jaxbp.rules import exact as exact
from jaxbp.rules import kolen_pollack as kolen_pollack
from jaxbp.rules import random_feedback as random_feedback
from jaxbp.rules import rtrl as rtrl
from jaxbp.rules import sign_symmetric as sign_symmetric
from jaxbp.rules import snap1 as snap1
from jaxbp.rules import weight_mirror as weight_mirror
from jaxbp.signals import Bias as Bias
from jaxbp.signals import Conv as Conv
from jaxbp.signals import Geometry as Geometry
from jaxbp.signals import Lookup as Lookup
from jaxbp.signals import Outer as Outer
from jaxbp.signals import Scale as Scale
from jaxbp.signals import Stacked as Stacked
from jaxbp.signals import keep as keep
from jaxbp.signals import map_signals as map_signals
from jaxbp.sweeps import GradientNoise as GradientNoise
from jaxbp.sweeps import Reweighted as Reweighted
from jaxbp.sweeps import automatic_weights as automatic_weights
from jaxbp.sweeps import backprop as backprop
from jaxbp.sweeps import clip_weights as clip_weights
from jaxbp.sweeps import gauss_newton_vector_product as gauss_newton_vector_product
from jaxbp.sweeps import gradient_noise as gradient_noise
from jaxbp.sweeps import hessian_vector_product as hessian_vector_product
from jaxbp.sweeps import neural_tangent_kernel as neural_tangent_kernel
from jaxbp.sweeps import neural_tangent_kernel_per_class as neural_tangent_kernel_per_class
from jaxbp.sweeps import private_gradient as private_gradient
from jaxbp.sweeps import reweighted as reweighted
from jaxbp.sweeps import value_and_grad as value_and_grad
from jaxbp.training import Fit as Fit
from jaxbp.training import KfacState as KfacState
from jaxbp.training import NonFiniteError as NonFiniteError
from jaxbp.training import TrainState as TrainState
from jaxbp.training import evaluate as evaluate
from jaxbp.training import fit as fit
from jaxbp.training import init_state as init_state
from jaxbp.training import kfac_factors as kfac_factors
from jaxbp.training import make_epoch as make_epoch
from jaxbp.training import make_step as make_step
from jaxbp.training import scale_by_kfac as scale_by_kfac
from jaxbp.types import Layer as Layer
from jaxbp.types import LayerError as LayerError
from jaxbp.types import Loss as Loss
from jaxbp.types import Rule as Rule
