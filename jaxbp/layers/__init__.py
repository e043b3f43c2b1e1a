"""Layers: each a forward pass with its derivative beside it.

Each module holds one family of layers. `linear`, `activations` (smooth), `piecewise` and `axiswise`
activations, `factors`, `shapes`, `padding`, `stochastic`, `normalisation`, `rescaling`,
`convolution`, `pooling`, `adaptive` pooling, `resizing` and `embeddings` (of tokens and of
positions) stand on their own, and `pointwise` is for elementwise formulas of one's own. Attention
is `multihead`, built on `dot_product`, `scores`, `heads` and `rotations`; `self_attention` and
`cross` add dense layers. `recurrence` is built on `cells`, the formulas of one step, and on
`through_time` and `segments`, the loops over the steps. `axis_maps` are the constant maps of
`adaptive` and `resizing`.

A layer hands the operands of its gradients, as signals, to the reading that backward is given. It
uses combinators if it is made of other layers, and knows no readings, rules or losses. To add a
layer, write a factory in the module of its family, export it as its neighbours are, and list it in
`tests/cases.py`, so that every property is tested. To try another recurrent cell, make a `Cell` and
pass it to `recurrent`.
"""

from jaxbp.layers import (
    activations,
    adaptive,
    axiswise,
    cells,
    convolution,
    cross,
    embeddings,
    factors,
    linear,
    multihead,
    normalisation,
    padding,
    pairs,
    piecewise,
    pointwise,
    pooling,
    recurrence,
    rescaling,
    resizing,
    rotations,
    self_attention,
    shapes,
    stochastic,
)
from jaxbp.layers.activations import *
from jaxbp.layers.adaptive import *
from jaxbp.layers.axiswise import *
from jaxbp.layers.cells import *
from jaxbp.layers.convolution import *
from jaxbp.layers.cross import *
from jaxbp.layers.embeddings import *
from jaxbp.layers.factors import *
from jaxbp.layers.linear import *
from jaxbp.layers.multihead import *
from jaxbp.layers.normalisation import *
from jaxbp.layers.padding import *
from jaxbp.layers.pairs import *
from jaxbp.layers.piecewise import *
from jaxbp.layers.pointwise import *
from jaxbp.layers.pooling import *
from jaxbp.layers.recurrence import *
from jaxbp.layers.rescaling import *
from jaxbp.layers.resizing import *
from jaxbp.layers.rotations import *
from jaxbp.layers.self_attention import *
from jaxbp.layers.shapes import *
from jaxbp.layers.stochastic import *

__all__ = [
    *activations.__all__,
    *adaptive.__all__,
    *axiswise.__all__,
    *cells.__all__,
    *convolution.__all__,
    *cross.__all__,
    *embeddings.__all__,
    *factors.__all__,
    *linear.__all__,
    *multihead.__all__,
    *normalisation.__all__,
    *padding.__all__,
    *pairs.__all__,
    *piecewise.__all__,
    *pointwise.__all__,
    *pooling.__all__,
    *recurrence.__all__,
    *rescaling.__all__,
    *resizing.__all__,
    *rotations.__all__,
    *self_attention.__all__,
    *shapes.__all__,
    *stochastic.__all__,
]
