"""Readings: functions of a signal, applied inside the backward pass or after it.

`sums` computes the gradient, summed, averaged or per example, `norms` its norm per example,
`moments` second moments and curvature factors, and `inner_products` products of the gradients of
different examples. `costs` chooses between two ways to compute the same quantity.

Readings know signals, but no layers. Each is one function with an implementation for every kind of
signal. Add a new reading to one of these modules.
"""

from jaxbp.readings.inner_products import directional_derivatives as directional_derivatives
from jaxbp.readings.inner_products import gram as gram
from jaxbp.readings.moments import Kronecker as Kronecker
from jaxbp.readings.moments import diagonal as diagonal
from jaxbp.readings.moments import kronecker as kronecker
from jaxbp.readings.moments import per_example_diagonal as per_example_diagonal
from jaxbp.readings.moments import second_moment as second_moment
from jaxbp.readings.moments import variance as variance
from jaxbp.readings.norms import example_norms as example_norms
from jaxbp.readings.norms import layer_norms as layer_norms
from jaxbp.readings.norms import sq_norms as sq_norms
from jaxbp.readings.sums import mean as mean
from jaxbp.readings.sums import per_example as per_example
from jaxbp.readings.sums import total as total
