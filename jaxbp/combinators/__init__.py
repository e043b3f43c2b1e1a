"""Combinators: layers made of other layers.

`compose` joins several layers: one after another, added, side by side, or multiplied. `mixtures`
weighs branches by a softmax. `streams` is for networks with several inputs: it applies layers to
one of them, gives all to each branch, or shares parameters between them, and `joins` makes one
array of several. `wrap` changes one layer: it repeats, stacks, recomputes, casts or masks it.
`freezing` fixes a part of the parameters.

A combinator knows the `Layer` record and the signals, but no particular layer. A new combinator
goes into one of these modules, as one more function. `entries` and `broadcasting` are what several
of them stand on.
"""

from jaxbp.combinators import compose, freezing, joins, mixtures, streams, wrap
from jaxbp.combinators.compose import *
from jaxbp.combinators.freezing import *
from jaxbp.combinators.joins import *
from jaxbp.combinators.mixtures import *
from jaxbp.combinators.streams import *
from jaxbp.combinators.wrap import *

__all__ = [
    *compose.__all__,
    *freezing.__all__,
    *joins.__all__,
    *mixtures.__all__,
    *streams.__all__,
    *wrap.__all__,
]
