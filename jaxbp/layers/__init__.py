"""Layers: each a forward pass with its derivative beside it.

Each module holds one family of layers. `linear`, `activations`, `shapes`, `stochastic`,
`normalisation`, `convolution`, `pooling` and `embeddings` (of tokens and of positions) stand on
their own. `multihead` (attention) is built on `dot_product`. `recurrence` is built on `cells`, the
formulas of one step, and on `through_time` and `segments`, the loops over the steps.

A layer hands the operands of its gradients, as signals, to the reading that backward is given. It
uses combinators if it is made of other layers, and knows no readings, rules or losses. To add a
layer, write a factory in the module of its family, export it as its neighbours are, and list it in
`tests/cases.py`, so that every property is tested. To try another recurrent cell, make a `Cell` and
pass it to `recurrent`.
"""

from jaxbp.layers.activations import elu as elu
from jaxbp.layers.activations import gelu as gelu
from jaxbp.layers.activations import leaky_relu as leaky_relu
from jaxbp.layers.activations import relu as relu
from jaxbp.layers.activations import sigmoid as sigmoid
from jaxbp.layers.activations import silu as silu
from jaxbp.layers.activations import softplus as softplus
from jaxbp.layers.activations import tanh as tanh
from jaxbp.layers.cells import Cell as Cell
from jaxbp.layers.cells import gru as gru
from jaxbp.layers.cells import lstm as lstm
from jaxbp.layers.cells import simple_rnn as simple_rnn
from jaxbp.layers.convolution import conv as conv
from jaxbp.layers.convolution import conv_transpose as conv_transpose
from jaxbp.layers.embeddings import embedding as embedding
from jaxbp.layers.embeddings import learned_positions as learned_positions
from jaxbp.layers.embeddings import sinusoidal_positions as sinusoidal_positions
from jaxbp.layers.linear import dense as dense
from jaxbp.layers.multihead import attention as attention
from jaxbp.layers.multihead import dot_product_attention as dot_product_attention
from jaxbp.layers.multihead import rotary as rotary
from jaxbp.layers.normalisation import group_norm as group_norm
from jaxbp.layers.normalisation import layer_norm as layer_norm
from jaxbp.layers.normalisation import rms_norm as rms_norm
from jaxbp.layers.pooling import avg_pool as avg_pool
from jaxbp.layers.pooling import global_pool as global_pool
from jaxbp.layers.pooling import max_pool as max_pool
from jaxbp.layers.pooling import upsample as upsample
from jaxbp.layers.recurrence import ForwardInTime as ForwardInTime
from jaxbp.layers.recurrence import bidirectional as bidirectional
from jaxbp.layers.recurrence import recurrent as recurrent
from jaxbp.layers.shapes import flatten as flatten
from jaxbp.layers.stochastic import dropout as dropout
