"""Combinators: layers made of other layers.

`compose` joins several layers: one after another, added, side by side, or multiplied. `wrap`
changes one layer: it repeats, stacks, recomputes, casts or masks it. `freezing`
fixes a part of the parameters.

A combinator knows the `Layer` record and the signals, but no particular layer. A new combinator
goes into one of these modules, as one more function.
"""

from jaxbp.combinators import compose, freezing, wrap
from jaxbp.combinators.compose import *
from jaxbp.combinators.freezing import *
from jaxbp.combinators.wrap import *

__all__ = [
    *compose.__all__,
    *freezing.__all__,
    *wrap.__all__,
]
