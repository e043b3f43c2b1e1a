"""What the tests of recurrent layers and of credit assignment share: cells, lengths, a problem."""

import jax
import numpy as np
import pytest
from cases import normal, numpy_rng

import jaxbp as bp

N, T, INPUTS, H = 3, 6, 2, 3
CELLS = {"simple_rnn": bp.simple_rnn, "lstm": bp.lstm, "gru": bp.gru}
every_cell = pytest.mark.parametrize("kind", CELLS)
LENGTHS = np.array([4, 6, 1])
PADDED = np.arange(T) < LENGTHS[:, None]


def problem(layer, key, shape=(T, INPUTS), n=N):
    """Parameters away from zero, inputs, and the error at the outputs."""
    init_key, move_key, x_key, dy_key = jax.random.split(key, 4)
    params, out_shape = layer.init(init_key, shape)
    rng = numpy_rng(move_key)
    moved = jax.tree.map(lambda p: p + 0.5 * rng.normal(size=p.shape), params)
    return moved, normal(x_key, (n, *shape)), normal(dy_key, (n, *out_shape))
