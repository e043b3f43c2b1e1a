"""The gradient noise against its definition from gradients formed one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import NETWORKS, SOON_NETWORKS, N, every, normal, output_shape, prepare
from oracles import assert_close, per_example_grads, ravel_examples, squared

import jaxbp as bp


@functools.partial(jax.jit, static_argnums=0)
def read_noise(net, params, x, targets):
    read = {"grads": bp.mean, "signals": bp.keep}
    _, answers = bp.backprop(net, bp.squared_error, read=read)(params, x, targets)
    return bp.gradient_noise(answers["signals"], answers["grads"])


@every("case", NETWORKS, soon=SOON_NETWORKS)
def test_every_scalar_is_its_formula(case, key):
    net, params, x, _ = prepare(case, key)
    targets = jnp.zeros(output_shape(net, params, x))
    got = read_noise(net, params, x, targets)
    g = np.asarray(ravel_examples(per_example_grads(net, squared, params, x, targets)))
    m = g.mean(0)
    trace = np.var(g, axis=0, ddof=1).sum()
    sq_norm = m @ m - trace / N
    cosines = g @ m / np.linalg.norm(g, axis=1) / np.linalg.norm(m)
    want = trace, sq_norm, trace / sq_norm, np.linalg.norm(m) / trace**0.5, cosines.mean()
    assert_close(got, bp.GradientNoise(*map(jnp.asarray, want)))


def test_the_estimates_are_unbiased(key):
    """Over batches of 4 of a population whose covariance and mean are known."""
    net = bp.dense(1, use_bias=False)
    params = {"weight": jnp.zeros((3, 1))}
    # With weight 0 and target -1 the gradient of an example is its input.
    mean, deviation = jnp.array([0.5, -0.3, 0.2]), jnp.array([1.0, 0.5, 2.0])
    batches = mean + deviation * normal(key, (20_000, 4, 3))
    targets = -jnp.ones((4, 1))
    noise = jax.jit(jax.vmap(lambda x: read_noise(net, params, x, targets)))(batches)
    np.testing.assert_allclose(jnp.mean(noise.trace), 5.25, rtol=0.03)
    np.testing.assert_allclose(jnp.mean(noise.sq_norm), 0.38, atol=0.05)


def test_an_example_without_error_has_cosine_zero(key):
    net = bp.chain(bp.dense(3), bp.tanh(), bp.dense(2))
    params, _ = net.init(key, (4,))
    x = normal(key, (2, 4))
    targets = net.forward(params, x)[0].at[0].add(1)
    noise = read_noise(net, params, x, targets)
    np.testing.assert_allclose(noise.cosine, 0.5)  # of 1 and 0
    slope = jax.jit(jax.grad(lambda x: read_noise(net, params, x, targets).cosine))(x)
    assert np.isfinite(slope).all()


def test_16_bits_are_accumulated_in_32(key):
    net = bp.dense(40)
    params, _ = net.init(key, (30,))
    x, targets = jax.random.uniform(key, (9, 30)), jnp.full((9, 40), 10.0)
    short = jax.tree.map(lambda a: a.astype(jnp.float16), (params, x, targets))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), short)
    got, want = (read_noise(net, *arguments) for arguments in (short, wide))
    np.testing.assert_allclose(got, want, rtol=0.05)


def test_examples_that_are_all_alike_have_no_variance(as_shipped):
    net = bp.dense(4)
    for seed in range(6):
        params, _ = net.init(jax.random.key(seed), (7,))
        x = jnp.tile(normal(jax.random.key(seed), (1, 7)), (9, 1))
        noise = read_noise(net, params, x, jnp.ones((9, 4)))
        assert float(noise.trace) >= 0
        assert float(noise.signal_to_noise) > 100


def test_one_example_has_no_scatter(key):
    net = bp.dense(2)
    params, _ = net.init(key, (3,))
    with pytest.raises(ValueError, match="gradient_noise: takes two examples or more; got 1"):
        read_noise(net, params, jnp.ones((1, 3)), jnp.ones((1, 2)))
