"""Rows that an example looks up more than once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracles import assert_close

import jaxbp as bp
from jaxbp.signals.kinds import each_row_once

ROWS = [[3, 0, 3, 5, 3], [2, 2, 2, 2, 2], [-1, 4, 9, 1, -1], [0, 1, 2, 3, 4], [7, 5, 5, 7, 9]]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_each_row_once_gathers_the_deltas_of_a_row(kind):
    mesh = jax.make_mesh((1,), ("data",), (kind,))
    deltas = np.random.default_rng(0).normal(size=(5, 5, 2))
    operands = jax.device_put((np.array(ROWS), deltas), NamedSharding(mesh, PartitionSpec("data")))

    @jax.jit
    def once(indices, deltas):
        merged = each_row_once(bp.Lookup(indices, deltas, jax.ShapeDtypeStruct((6, 2), float)))
        return merged.indices, merged.deltas

    rows, sums = once(*operands)
    expected, got = np.zeros((2, 5, 7, 2))
    np.add.at(expected, (np.arange(5)[:, None], np.where(np.isin(ROWS, range(6)), ROWS, 6)), deltas)
    np.add.at(got, (np.arange(5)[:, None], np.asarray(rows)), np.asarray(sums))
    assert_close(got[:, :6], expected[:, :6])
    assert not np.any(got[:, 6])
    for own in np.asarray(rows):
        known = own[own < 6]
        assert len(set(known)) == len(known)
    assert jnp.issubdtype(rows.dtype, jnp.integer)
