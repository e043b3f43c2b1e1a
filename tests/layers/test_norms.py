"""Normalisation and rescaling: what they make of each example, by definition; what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from oracles import assert_close, by_example, layer_per_example_grads, layer_vjp

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
    x = 3 + 2 * normal(key, (5, 2, 4, 6))
    y, _ = layer.forward(params, x)
    parts = np.asarray(x).reshape(5, 8, groups, -1)
    want = by_definition(
        parts, axes, np.asarray(params["gain"]), np.asarray(params.get("bias", 0.0)), eps=0.1,
        centred=centred,
    )  # fmt: skip
    assert_close(y, jnp.asarray(want).reshape(x.shape))
    assert out_shape == (2, 4, 6)


OPTIONS = {  # with the axes of x [N, 2, 3, 4] that are normalised together
    "layer, two axes": (bp.layer_norm(axes=2, eps=0.1), (2, 3)),
    "layer, three axes": (bp.layer_norm(axes=3, eps=0.1, use_bias=False), (1, 2, 3)),
    "layer, no gain": (bp.layer_norm(eps=0.1, use_gain=False), (3,)),
    "layer, neither": (bp.layer_norm(axes=2, eps=0.1, use_gain=False, use_bias=False), (2, 3)),
    "rms, two axes": (bp.rms_norm(axes=2, eps=0.1), (2, 3)),
    "rms, no gain": (bp.rms_norm(eps=0.1, use_gain=False), (3,)),
    "group, neither": (bp.group_norm(1, eps=0.1, use_gain=False, use_bias=False), (1, 2, 3)),
    "instance": (bp.group_norm(4, eps=0.1), (1, 2)),
}


def test_axes_and_what_is_switched_off(key):
    x, dy = normal(key, (2, 3, 2, 3, 4))
    params = {name: layer.init(key, x.shape[1:])[0] for name, (layer, _) in OPTIONS.items()}
    params = jax.tree.map(lambda p: p + 0.1 * jnp.arange(1.0, len(p) + 1), params)

    @jax.jit
    def sweeps(params):
        got, want = {}, {}
        for name, (layer, _) in OPTIONS.items():
            y, cache = layer.forward(params[name], x)
            dx, grads = layer.backward(params[name], cache, dy, read=bp.per_example)
            got[name] = y, dx, by_example(grads)
            dx, _ = layer_vjp(layer, params[name], x, dy)
            want[name] = dx, layer_per_example_grads(layer, params[name], x, dy)
        return got, want

    got, want = sweeps(params)
    for name, (_, axes) in OPTIONS.items():
        centred = "rms" not in name
        z = np.asarray(x) - (np.asarray(x).mean(axes, keepdims=True) if centred else 0)
        y = z / np.sqrt((z**2).mean(axes, keepdims=True) + 0.1)
        own = params[name] or {}
        shape = x.shape[min(axes) :] if "layer" in name or "rms" in name else (4,)
        y = y * own["gain"].reshape(shape) if "gain" in own else y
        y = y + own["bias"].reshape(shape) if "bias" in own else y
        assert_close(got[name], (jnp.asarray(y), *want[name]))
        assert set(own) == {
            leaf for leaf in ("gain", "bias")
            if "neither" not in name and f"no {leaf}" not in name
            and not (leaf == "bias" and ("rms" in name or "three" in name))
        }  # fmt: skip
        assert own or params[name] == ()


def test_a_fixed_norm_is_batch_normalisation_at_inference(key):
    x = normal(key, (3, 2, 4))
    mean, variance, gain, bias = (np.random.default_rng(i).uniform(1, 2, 4) for i in range(4))
    layer = bp.fixed_norm(mean, variance, eps=0.1)
    params = {"gain": jnp.asarray(gain), "bias": jnp.asarray(bias)}
    want = (np.asarray(x) - mean) / np.sqrt(variance + 0.1) * gain + bias
    assert_close(layer.forward(params, x)[0], jnp.asarray(want))
    plain = bp.fixed_norm(mean, variance, eps=0.1, use_gain=False, use_bias=False)
    assert plain.init(key, (4,)) == ((), (4,))
    assert_close(plain.forward((), x)[0], jnp.asarray((want - bias) / gain))
    with pytest.raises(bp.LayerError, match="got inputs of 1 features; its mean and variance are"):
        layer.forward(params, x[..., :1])


def test_a_vector_is_scaled_to_length_one_unless_it_is_short(key):
    layer = bp.l2_norm(eps=0.5)
    x = jnp.array([[3.0, -4.0], [0.3, 0.4], [0.1, 0.0], [0.0, 0.0]])
    dy = jnp.array([[1.0, 2.0]] * 4)
    y, cache = layer.forward((), x)
    dx, _ = layer.backward((), cache, dy)
    assert_close(y, jnp.array([[0.6, -0.8], [0.6, 0.8], [0.2, 0.0], [0.0, 0.0]]))
    # (dy - y (y . dy)) / 5 with y . dy = -1; the others are shorter than eps, or as short.
    assert_close(dx, jnp.array([[0.32, 0.24], [2.0, 4.0], [2.0, 4.0], [2.0, 4.0]]))


def test_local_responses_are_those_of_a_loop_over_channels(key):
    x, dy = normal(key, (2, 3, 2, 5))
    layers = {n: bp.local_response_norm(n, alpha=0.7, beta=0.6, k=1.5) for n in (1, 2, 3, 4, 11)}

    @jax.jit
    def sweeps(x):
        return {
            size: (y, layer.backward((), cache, dy), layer_vjp(layer, (), x, dy))
            for size, layer in layers.items()
            for y, cache in [layer.forward((), x)]
        }

    for size, (y, got, by_autodiff) in sweeps(x).items():
        want = np.array(x)
        for o in range(5):
            seen = [c for c in range(o - size // 2, o - size // 2 + size) if 0 <= c < 5]
            squares = sum(np.asarray(x)[..., c] ** 2 for c in seen)
            want[..., o] = np.asarray(x)[..., o] / (1.5 + 0.7 / size * squares) ** 0.6
        assert_close(y, jnp.asarray(want))
        assert_close(got, by_autodiff)


def test_local_responses_are_those_that_pytorch_gave():
    """torch.nn.LocalResponseNorm(3, alpha=0.5, beta=0.75, k=2.0), and dx by dy of ones."""
    layer = bp.local_response_norm(3, alpha=0.5, beta=0.75, k=2.0)
    y, cache = layer.forward((), jnp.array([[1.0, 2.0, 3.0, 4.0]]))
    dx, _ = layer.backward((), cache, jnp.ones((1, 4)))
    assert_close(
        (y, dx),
        (
            jnp.array([[0.45790643500456, 0.66590675814048, 0.70981765956858, 1.02216765933610]]),
            jnp.array([[0.37908522844855, 0.12337308842879, -0.08087171082397, -0.01409075795497]]),
        ),
    )


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
    x, dy = normal(key, (2, 5, 4, 6))
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


@pytest.mark.parametrize("layer", [bp.l2_norm(), bp.local_response_norm(5)])
def test_sums_of_squares_of_16_bits_are_taken_in_32(layer, key):
    x = 300 * jax.random.normal(key, (2, 400), jnp.float32)
    dy = jax.random.normal(jax.random.fold_in(key, 1), x.shape, jnp.float32)
    (y, dx), (want, wanted) = (
        (y, layer.backward((), cache, dy.astype(x.dtype))[0])
        for x in (x.astype(jnp.float16), x)
        for y, cache in [layer.forward((), x)]
    )
    assert y.dtype == dx.dtype == jnp.float16
    np.testing.assert_allclose(np.float32(y), want, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(np.float32(dx), wanted, atol=2e-3 * float(jnp.max(jnp.abs(wanted))))


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
    x = normal(key, (1, 3, 4))
    y, _ = layer.forward(params, x)
    moved, _ = layer.forward(params, x.at[0, 2, 3].add(1))
    changed = np.asarray(moved != y)[0]
    assert changed[:, 2:].all()
    assert not changed[:, :2].any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bp.layer_norm(axes=0), ValueError, "layer_norm: axes is 0; it takes a positive"),
        (
            lambda: bp.layer_norm(axes=2).init(jax.random.key(0), (4,)),
            bp.LayerError, r"got inputs of shape \[N, 4\]; it normalises the last 2 axes of",
        ),
        (
            lambda: bp.rms_norm(axes=2).forward({"gain": jnp.ones(4)}, jnp.ones((2, 4))),
            bp.LayerError, r"got inputs of shape \[2, 4\]; it normalises the last 2 axes of",
        ),
        (
            lambda: bp.group_norm(4, use_gain=False, use_bias=False).forward((), jnp.ones((2, 6))),
            bp.LayerError, r"group_norm\(4\) got inputs of 6 channels, not a multiple of 4 groups",
        ),
        (
            lambda: bp.fixed_norm(jnp.ones(3), jnp.ones(2)),
            ValueError, r"fixed_norm: mean has shape \[3\] and variance \[2\]; it takes two",
        ),
        (
            lambda: bp.fixed_norm(jnp.ones(2), jnp.array([1.0, -1.0])),
            ValueError, "fixed_norm: variance has entries below zero",
        ),
        (
            lambda: bp.fixed_norm(jnp.ones(3), jnp.ones(3)).init(jax.random.key(0), (4,)),
            bp.LayerError, "fixed_norm got inputs of 4 features; its mean and variance are of 3",
        ),
        (lambda: bp.l2_norm(eps=0), ValueError, "l2_norm: eps is 0; it takes a positive number"),
        (
            lambda: bp.l2_norm().forward((), jnp.ones(3)),
            bp.LayerError, r"l2_norm got inputs of shape \[3\]; it takes \[N, \.\.\., O\]",
        ),
        (lambda: bp.local_response_norm(0), ValueError, "local_response_norm: size is 0; it takes"),
        (lambda: bp.local_response_norm(3, k=0), ValueError, "k is 0; it takes a positive number"),
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


def test_a_batch_may_be_empty(key):
    x, constants = jnp.zeros((0, 2, 4)), (jnp.zeros(4), jnp.ones(4))
    norms = bp.layer_norm(axes=2), bp.rms_norm(), bp.group_norm(2), bp.fixed_norm(*constants)
    for layer in norms:
        params, _ = layer.init(key, (2, 4))
        y, cache = layer.forward(params, x)
        dx, grads = layer.backward(params, cache, y, read=bp.total)
        assert y.shape == dx.shape == x.shape
        assert jax.tree.all(jax.tree.map(lambda grad: bool(jnp.all(grad == 0)), grads))
