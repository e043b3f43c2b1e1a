"""Lift: the backward pass of any JAX function, open.

`model` has the function itself, `lift`. It traces a function of one example and cuts it at its
parameters (`cutting`), which makes a `Program` of pieces and cuts (`program`). `operation` and
`loops` say what happens at a cut, `uses` which kind of signal an operation makes, and `routes` how
a signal goes back to the parameters that a value is made of. `table` lists all of this for a model.

`plain` makes a layer of a function without parameters, and `objective` a loss of a function.

This chapter stands on signals and readings, and nothing imports it. Autodiff stands here for what
lies between parameters. A new way to use a parameter is a recipe in `uses`; what differs between
versions of JAX goes into `versions`.
"""

from jaxbp.lift import model, objective, plain, table
from jaxbp.lift.model import *
from jaxbp.lift.objective import *
from jaxbp.lift.plain import *
from jaxbp.lift.table import *

__all__ = [
    *model.__all__,
    *objective.__all__,
    *plain.__all__,
    *table.__all__,
]
