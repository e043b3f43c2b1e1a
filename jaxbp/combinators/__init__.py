"""Combinators: layers made of other layers.

`compose` joins several layers: one after another, added, side by side, or multiplied. `wrap`
changes one layer: it repeats, stacks, recomputes, casts or masks it.

A combinator knows the `Layer` record and the signals, but no particular layer. A new combinator
goes into one of these two modules, as one more function.
"""

from jaxbp.combinators.compose import Direct as Direct
from jaxbp.combinators.compose import chain as chain
from jaxbp.combinators.compose import gated as gated
from jaxbp.combinators.compose import parallel as parallel
from jaxbp.combinators.compose import residual as residual
from jaxbp.combinators.wrap import cast as cast
from jaxbp.combinators.wrap import masked as masked
from jaxbp.combinators.wrap import remat as remat
from jaxbp.combinators.wrap import repeat as repeat
from jaxbp.combinators.wrap import stack as stack
