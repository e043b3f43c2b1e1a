"""Views: placing and taking are inverse on the entries, and norms and inner products are kept."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_close

from jaxbp.signals.views import View


@st.composite
def views(draw):
    """A view of up to five moves of each sort, and how many entries it has."""
    view = View(tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(0, 5))):
        shape = view.out_shape
        move = draw(st.sampled_from(["reshape", "transpose", "flip", "embed"]))
        if move == "reshape":
            size, new = int(np.prod(shape)), []
            while size > 1:
                factor = draw(st.sampled_from([n for n in range(2, size + 1) if size % n == 0]))
                new.append(factor)
                size //= factor
            view = view.reshape((*new, *[1] * draw(st.integers(0, 2))))
        elif move == "transpose":
            view = view.transpose(*draw(st.permutations(range(len(shape)))))
        elif move == "flip":
            axes = draw(st.sets(st.sampled_from(range(len(shape))))) if shape else ()
            view = view.flip(*sorted(axes))
        else:
            start = [draw(st.integers(0, 2)) for _ in shape]
            strides = [draw(st.integers(1, 2)) for _ in shape]
            rest = [draw(st.integers(0, 1)) for _ in shape]
            axes = zip(start, strides, rest, shape, strict=True)
            larger = tuple(s + (n - 1) * step + 1 + r for s, step, r, n in axes)
            if np.prod(larger) < 500:
                view = view.embed(tuple(start), larger, tuple(strides))
    return view


@settings(max_examples=40, deadline=None)
@given(view=views(), data=st.data())
def test_a_view_moves_entries(view, data):
    x = 1 + jnp.arange(np.prod(view.shape), dtype=float).reshape(view.shape)
    placed = view(x)
    assert placed.shape == view.out_shape
    # Every entry stands in one place, and everything else is zero.
    assert sorted(placed.ravel()[placed.ravel() != 0].tolist()) == x.ravel().tolist()
    np.testing.assert_array_equal(view.take(placed), x)
    array = jnp.sin(jnp.arange(np.prod(view.out_shape), dtype=float)).reshape(view.out_shape)
    np.testing.assert_array_equal(view(view.take(array)), jnp.where(placed == 0, 0, array))
    # So it keeps norms, and taking is its transpose.
    np.testing.assert_allclose(jnp.sum(placed**2), jnp.sum(x**2))
    np.testing.assert_allclose(jnp.vdot(placed, array), jnp.vdot(x, view.take(array)))
    # Views are equal, and hash alike, if their moves are.
    same = View(view.shape).then(View(view.shape, view.moves))
    assert same == view
    assert hash(same) == hash(view)


def test_moves_that_change_nothing_are_left_out():
    view = View((2, 3))
    assert view.reshape((2, 3)).transpose(0, 1).flip() == view
    assert not view.transposes
    assert view.transpose(1, 0).transposes


def test_a_view_has_no_leaves_and_is_static_under_jit():
    view = View((2, 3)).transpose(1, 0)
    assert jax.tree.leaves(view) == []
    x = jnp.arange(6.0).reshape(2, 3)
    assert_close(jax.jit(lambda view, x: view(x))(view, x), x.T)
    assert_close(jax.vmap(view)(jnp.stack([x, x])), jnp.stack([x.T, x.T]))
