"""Training: from one optimizer step to a whole run.

`step` has the train state, the jitted step and epoch, and evaluation. `fitting` trains for many
epochs, with validation and early stopping. `nonfinite` finds the layer in which the first
non-finite value appeared. `kfac` is an optimizer that uses Kronecker factors.

This chapter stands on `sweeps`, and no other chapter imports it. A new way to train goes into
`fitting`, a new optimizer that needs readings into a module of its own.
"""

from jaxbp.training.fitting import Fit as Fit
from jaxbp.training.fitting import fit as fit
from jaxbp.training.kfac import KfacState as KfacState
from jaxbp.training.kfac import kfac_factors as kfac_factors
from jaxbp.training.kfac import scale_by_kfac as scale_by_kfac
from jaxbp.training.nonfinite import NonFiniteError as NonFiniteError
from jaxbp.training.step import TrainState as TrainState
from jaxbp.training.step import evaluate as evaluate
from jaxbp.training.step import init_state as init_state
from jaxbp.training.step import make_epoch as make_epoch
from jaxbp.training.step import make_step as make_step
