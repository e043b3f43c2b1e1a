"""Normalisation: what it makes of each example, by its definition, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close

import jaxbp as bp


def by_definition(x, axes, gain, bias=0.0, *, eps, centred=True):
    """In numpy, over these axes of the positions and the groups [N, T, G, O / G]."""
    if centred:
        x = x - x.mean(axes, keepdims=True)
    h = x / np.sqrt((x**2).mean(axes, keepdims=True) + eps)
    return h.reshape(len(x), -1, len(gain)) * gain + bias


@pytest.mark.parametrize(
    ("layer", "groups", "axes", "centred"),
    [
        (bp.layer_norm(eps=0.1), 1, 3, True),
        (bp.rms_norm(eps=0.1), 1, 3, False),
        (bp.group_norm(3, eps=0.1), 3, (1, 3), True),
    ],
    ids=["layer", "rms", "group"],
)
def test_the_outputs_are_those_of_the_definition(layer, groups, axes, centred, key):
    params, out_shape = layer.init(key, (2, 4, 6))
    params = jax.tree.map(lambda p: p + jnp.arange(6.0), params)
    x = 3 + 2 * jax.random.normal(key, (5, 2, 4, 6))
    y, _ = layer.forward(params, x)
    parts = np.asarray(x).reshape(5, 8, groups, -1)
    want = by_definition(
        parts, axes, np.asarray(params["gain"]), np.asarray(params.get("bias", 0.0)), eps=0.1,
        centred=centred,
    )  # fmt: skip
    assert_close(y, jnp.asarray(want).reshape(x.shape))
    assert out_shape == (2, 4, 6)


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm"])
def test_outputs_and_gradients_are_those_of_pytorch(name, key):
    torch = pytest.importorskip("torch")
    layer, theirs = {
        "LayerNorm": (bp.layer_norm(), torch.nn.LayerNorm(6)),
        "RMSNorm": (bp.rms_norm(), torch.nn.RMSNorm(6, eps=1e-6)),
        "GroupNorm": (bp.group_norm(3), torch.nn.GroupNorm(3, 6)),
    }[name]
    params, _ = layer.init(key, (4, 6))
    params = jax.tree.map(lambda p: p + 0.1 * jnp.arange(6.0), params)
    for leaf, parameter in (("gain", "weight"), ("bias", "bias")):
        if leaf in params:
            setattr(theirs, parameter, torch.nn.Parameter(torch.tensor(np.array(params[leaf]))))
    x, dy = jax.random.normal(key, (2, 5, 4, 6))
    y, cache = layer.forward(params, x)
    dx, grads = layer.backward(params, cache, dy, read=bp.total)

    their_x = torch.tensor(np.array(x), requires_grad=True)
    # PyTorch's groups are of the second axis.
    places = (0, 2, 1) if name == "GroupNorm" else (0, 1, 2)
    their_y = theirs(their_x.permute(places)).permute(places)
    their_y.backward(torch.tensor(np.array(dy)))
    np.testing.assert_allclose(y, their_y.detach(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, their_x.grad, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads["gain"], theirs.weight.grad, rtol=1e-5, atol=1e-5)
    if "bias" in params:
        np.testing.assert_allclose(grads["bias"], theirs.bias.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [bp.layer_norm(), bp.rms_norm(), bp.group_norm(2)])
def test_a_constant_example_is_no_division_by_zero(layer, key):
    params, _ = layer.init(key, (3, 4))
    y, cache = layer.forward(params, jnp.zeros((2, 3, 4)))
    dx, signals = layer.backward(params, cache, jnp.ones((2, 3, 4)))
    for array in jax.tree.leaves((y, dx, signals)):
        assert bool(jnp.all(jnp.isfinite(array)))


@pytest.mark.parametrize(
    "make", [bp.layer_norm, bp.rms_norm, lambda **how: bp.group_norm(2, **how)]
)
def test_means_of_16_bits_are_taken_in_32(make, key):
    """Squares of 300 overflow in float16, and their sums much sooner."""
    layer, wide = make(dtype=jnp.float16), make(dtype=jnp.float32)
    x = 300 * jax.random.normal(key, (2, 3, 400), jnp.float32)
    params, _ = layer.init(key, (3, 400))
    wide_params, _ = wide.init(key, (3, 400))
    dy = jax.random.normal(jax.random.fold_in(key, 1), x.shape, jnp.float32)
    y, cache = layer.forward(params, x.astype(jnp.float16))
    want, wide_cache = wide.forward(wide_params, x)
    dx, _ = layer.backward(params, cache, dy.astype(jnp.float16))
    wanted, _ = wide.backward(wide_params, wide_cache, dy)
    assert y.dtype == dx.dtype == jnp.float16
    np.testing.assert_allclose(np.float32(y), want, atol=5e-3)
    np.testing.assert_allclose(np.float32(dx), wanted, atol=1e-2 * float(jnp.max(jnp.abs(wanted))))


def test_a_group_sees_all_positions_and_no_other_group(key):
    layer = bp.group_norm(2)
    params, _ = layer.init(key, (3, 4))
    x = jax.random.normal(key, (1, 3, 4))
    y, _ = layer.forward(params, x)
    moved, _ = layer.forward(params, x.at[0, 2, 3].add(1))
    changed = np.asarray(moved != y)[0]
    assert changed[:, 2:].all()
    assert not changed[:, :2].any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bp.layer_norm(eps=0.0), ValueError, "layer_norm: eps is 0.0; it takes a positive"),
        (lambda: bp.group_norm(0), ValueError, "groups is 0; it takes a positive integer"),
        (lambda: bp.group_norm(True), ValueError, "groups is True; it takes a positive integer"),
        (
            lambda: bp.group_norm(4).init(jax.random.key(0), (6,)),
            bp.LayerError, r"group_norm\(4\) got inputs of 6 channels, not a multiple of 4 groups",
        ),
        (
            lambda: bp.layer_norm().init(jax.random.key(0), ()),
            bp.LayerError, r"layer_norm got inputs of shape \[N\]; it takes \[N, \.\.\., O\]",
        ),
        (
            lambda: bp.rms_norm().forward({"gain": jnp.ones(3)}, jnp.ones((2, 4))),
            bp.LayerError, r"got a gain of shape \[3\]; it takes \[4\]",
        ),
        (
            lambda: bp.rms_norm().forward({"gain": jnp.ones(4)}, jnp.ones(4)),
            bp.LayerError, r"rms_norm got inputs of shape \[4\]; it takes \[N, \.\.\., O\]",
        ),
        (
            lambda: bp.layer_norm().forward({"gain": jnp.ones(4)}, jnp.ones((2, 4))),
            bp.LayerError, "that are not its own: a dict of gain; it takes a dict of gain and bias",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("make", [bp.layer_norm, lambda **how: bp.group_norm(2, **how)])
def test_an_offset_changes_little_and_a_constant_row_is_zero(make, key):
    """The mean of values near 1e6 has an error of their rounding, which eps would not hide."""
    layer = make(dtype=jnp.float32)
    params, _ = layer.init(key, (96,))
    offsets = jnp.linspace(1, 1e6, 40, dtype=jnp.float32)[:, None]
    y, _ = layer.forward(params, jnp.broadcast_to(offsets, (40, 96)))
    np.testing.assert_allclose(y, 0, atol=1e-4)
    x = offsets + jnp.round(8 * jax.random.normal(key, (40, 96), jnp.float32))
    wide = make()
    want, _ = wide.forward(wide.init(key, (96,))[0], x.astype(float))
    y, _ = layer.forward(params, x)
    np.testing.assert_allclose(y, want, atol=2e-5)
