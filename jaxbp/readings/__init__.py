"""Readings: functions of a signal, applied inside the backward pass or after it.

`sums` computes the gradient, summed, averaged or per example, `norms` its norm per example,
`moments` second moments and curvature factors, `inner_products` products of the gradients of
different examples, and `summaries` a few numbers to watch training by. `costs` chooses between two
ways to compute the same quantity, and `formed` shares per-example gradients between a norm and a
sum.

Readings know signals, but no layers. Each is one function with an implementation for every kind of
signal. Add a new reading to one of these modules.
"""

from jaxbp.readings import inner_products, moments, norms, summaries, sums
from jaxbp.readings.inner_products import *
from jaxbp.readings.moments import *
from jaxbp.readings.norms import *
from jaxbp.readings.summaries import *
from jaxbp.readings.sums import *

__all__ = [
    *inner_products.__all__,
    *moments.__all__,
    *norms.__all__,
    *summaries.__all__,
    *sums.__all__,
]
