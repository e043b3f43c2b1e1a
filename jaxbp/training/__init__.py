"""Training: from one optimizer step to a whole run.

`state` has the train state, `step` the jitted step, and `batches` the jitted epoch and evaluation.
`fitting` trains for many epochs, with validation and early stopping. It stands on `data`, the
checks of what it trains on; `epochs`, which run in parts; `runs`, how far a run is and when it
stops; and `storage`, which keeps it in `checkpoints`, as the plain `arrays` of its trees.
`interrupts` has Ctrl-C, and `nonfinite` finds the layer in which the first non-finite value
appeared. `placing` keeps batches and the state divided among devices, and `processes` lets several
processes decide alike. `fused` updates inside the sweep: `leafwise` finds out whether an optimizer
can, and `updates` calls it for one layer after another. `kfac` is an optimizer that uses Kronecker
factors.

This chapter stands on `sweeps`, and no other chapter imports it. A new way to train goes into
`fitting`, a new optimizer that needs readings into a module of its own.
"""

from jaxbp.training import arrays, batches, fitting, interrupts, kfac, nonfinite, state, step
from jaxbp.training.arrays import *
from jaxbp.training.batches import *
from jaxbp.training.fitting import *
from jaxbp.training.interrupts import *
from jaxbp.training.kfac import *
from jaxbp.training.nonfinite import *
from jaxbp.training.state import *
from jaxbp.training.step import *

__all__ = [
    *arrays.__all__,
    *batches.__all__,
    *fitting.__all__,
    *interrupts.__all__,
    *kfac.__all__,
    *nonfinite.__all__,
    *state.__all__,
    *step.__all__,
]
