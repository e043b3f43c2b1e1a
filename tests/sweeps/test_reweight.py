"""Reweighting: clipped, normalised and private sums against gradients formed one by one."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import NETWORKS, SIGNALS, SOON_NETWORKS, N, every, normal, output_shape, prepare
from oracles import (
    assert_close,
    deltas_of,
    in_dtype,
    per_example_grads,
    ravel,
    ravel_examples,
    squared,
    value_and_grad,
    with_deltas,
)

import jaxbp as bp
from jaxbp.readings.formed import Formed
from jaxbp.readings.norms import parameter_norms

every_network = every("case", NETWORKS, soon=SOON_NETWORKS - {"branching"})
TOTAL = Formed.total
both_ways = pytest.mark.parametrize("sweeps", [1, 2])


def clipped_sum(net, weigh, **options):
    return jax.jit(bp.reweighted(net, bp.squared_error, weigh, **options))


def weighted_sum(weights, grads):
    """sum_n w_n g_n of every parameter, by NumPy."""
    return jax.tree.map(lambda g: np.einsum("n,n...->...", weights, g), grads)


def problem(case, key):
    net, params, x, draw_key = prepare(case, key)
    return net, params, x, jnp.zeros(output_shape(net, params, x)), draw_key


@every_network
@both_ways
def test_the_clipped_sum_is_that_of_clipped_gradients(case, sweeps, key):
    net, params, x, targets, draw_key = problem(case, key)
    grads = per_example_grads(net, squared, params, x, targets, draw_key)
    norms = np.linalg.norm(ravel_examples(grads), axis=1)
    threshold = float(np.median(norms))
    clipped = clipped_sum(net, bp.clip_weights(threshold), sweeps=sweeps)
    got = clipped(params, x, targets, key=draw_key)
    weights = np.minimum(1.0, threshold / norms)
    assert 0 < np.sum(weights < 1) < N
    outputs = jax.jit(net.forward)(params, x, key=draw_key)[0]
    assert_close(got.values, squared(outputs, targets))
    assert_close(got.norms, norms)
    assert_close(got.weights, weights)
    assert_close(got.grads, weighted_sum(weights, grads))


@both_ways
def test_gradients_that_are_smaller_than_their_operands_are_kept(sweeps, key):
    """Of a kernel on large images, of matrices on long sequences in a stack, of their biases."""
    image = bp.chain(bp.conv(3, (3, 3)), bp.tanh(), bp.flatten(), bp.dense(2))
    cases = [(image, (12, 12, 2)), (bp.stack(bp.chain(bp.dense(2), bp.tanh()), 3), (24, 2))]
    data = []
    for net, shape in cases:
        params, out_shape = net.init(key, shape)
        data.append((params, normal(key, (N, *shape)), jnp.zeros((N, *out_shape))))
    weigh = bp.automatic_weights()

    def clip(data):
        calls = [bp.reweighted(net, bp.squared_error, weigh, sweeps=sweeps) for net, _ in cases]
        return [call(*batch) for call, batch in zip(calls, data, strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        kept = []
        patch.setattr(Formed, "total", lambda self, w: (kept.append(1), TOTAL(self, w))[1])
        answers = jax.jit(clip)(data)
    assert len(kept) == 4  # those of a stack are traced once
    for (net, _), batch, got in zip(cases, data, answers, strict=True):
        grads = per_example_grads(net, squared, *batch, None)
        norms = np.linalg.norm(ravel_examples(grads), axis=1)
        assert_close(got.norms, norms)
        assert_close(got.grads, weighted_sum(weigh(norms), grads))


@every("case", NETWORKS, soon={"branching"})
@both_ways
def test_clipping_at_infinity_gives_the_total(case, sweeps, key):
    net, params, x, targets, draw_key = problem(case, key)
    clipped = clipped_sum(net, bp.clip_weights(np.inf), sweeps=sweeps)
    got = clipped(params, x, targets, key=draw_key).grads
    _, mean = value_and_grad(net, squared, params, x, targets, draw_key)
    assert_close(got, jax.tree.map(lambda g: N * g, mean))


@pytest.mark.parametrize("name", ["classifier", "sequence"])
def test_one_sweep_and_two_are_equal_each_by_its_own_way(name, key):
    net, params, x, targets, _ = problem(NETWORKS[name], key)
    one, two = (
        clipped_sum(net, bp.automatic_weights(), sweeps=sweeps)(params, x, targets)
        for sweeps in (1, 2)
    )
    assert_close(one, two)
    leaves = [jax.tree.leaves(way.grads) for way in (one, two)]
    assert any(not np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


@every_network
def test_weights_per_layer_are_of_the_norms_of_its_own_parameters(case, key):
    net, params, x, targets, draw_key = problem(case, key)
    weigh = bp.clip_weights(0.5)
    clipped = clipped_sum(net, weigh, per_layer=True)
    got = clipped(params, x, targets, key=draw_key)
    grads = per_example_grads(net, squared, params, x, targets, draw_key)

    def clip(layer):
        norms = np.linalg.norm(ravel_examples(layer), axis=1)
        return weighted_sum(weigh(norms), layer)

    want = jax.tree.map(clip, grads, is_leaf=lambda node: isinstance(node, dict))
    assert_close(got.grads, want)
    dicts = jax.tree.leaves(grads, is_leaf=lambda node: isinstance(node, dict))
    norms = jax.tree.leaves(got.norms)
    assert_close(norms, [np.linalg.norm(ravel_examples(layer), axis=1) for layer in dicts])


def test_the_function_of_the_norms_may_be_any(key):
    net, params, x, targets, _ = problem(NETWORKS["classifier"], key)
    ranks = clipped_sum(net, lambda norms: jnp.argsort(norms).astype(float))
    got = ranks(params, x, targets)
    assert sorted(np.asarray(got.weights).tolist()) == [0, 1, 2]
    _, grads = jax.jit(bp.backprop(net, bp.squared_error, read=bp.per_example))(params, x, targets)
    assert_close(got.grads, weighted_sum(got.weights, grads))


@both_ways
def test_an_example_without_error_is_not_divided_by_its_norm(sweeps, key):
    net, params, x, _, _ = problem(NETWORKS["classifier"], key)
    targets = net.forward(params, x)[0].at[0].add(1)
    for weigh in (bp.clip_weights(1e-3), bp.automatic_weights()):
        got = clipped_sum(net, weigh, sweeps=sweeps)(params, x, targets)
        assert list(np.asarray(got.norms) == 0) == [False, True, True]
        chex.assert_tree_all_finite(got)


@pytest.mark.parametrize(
    ("max_norm", "weights"),
    [(0.0, [1, 0, 0, 0]), (2.0, [1, 1, 0.5, 0]), (np.inf, [1, 1, 1, 1])],
)
def test_clip_weights_at_the_edges(max_norm, weights):
    got = bp.clip_weights(max_norm)(jnp.array([0.0, 2.0, 4.0, np.inf]))
    assert_close(got, jnp.array(weights, float))


def test_a_clipped_gradient_is_never_longer_than_the_threshold(as_shipped):
    norms = jnp.asarray(np.random.default_rng(0).lognormal(0, 5, 10_000), jnp.float32)
    assert float(jnp.max(bp.clip_weights(1.5)(norms) * norms)) <= 1.5 * (1 + 1e-6)


@both_ways
def test_what_cancels_over_positions_does_not_pass_for_short(sweeps, as_shipped):
    """Rounding in the Gram matrices is not to hide a gradient longer than the threshold."""
    net, rng = bp.dense(90, use_bias=False), np.random.default_rng(0)
    clipped = clipped_sum(net, bp.clip_weights(1.0), sweeps=sweeps)
    for _ in range(12):
        params = {"weight": jnp.zeros((100, 90), jnp.float32)}
        x = jnp.asarray(np.repeat(rng.normal(size=(1, 1, 100)), 3, axis=1), jnp.float32)
        d = rng.normal(size=(1, 3, 90)) * 1000
        d[:, 2] = -d[:, 0] - d[:, 1] + 0.05 * rng.normal(size=90)
        grads = clipped(params, x, jnp.asarray(-d, jnp.float32)).grads
        assert np.linalg.norm(grads["weight"]) <= 1.001


SIZES = {jnp.float16: [1e-2, 30], jnp.bfloat16: [1e-25, 1e25], jnp.float32: [1e-30, 1e-20, 1e25]}
EACH_ROUNDED = {jnp.float16: 2**-10, jnp.bfloat16: 2**-7, jnp.float32: 1e-5}


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("kind", [kind for kind in SIGNALS if "pull-back" not in kind])
def test_a_clipped_gradient_of_each_kind_keeps_the_bound(kind, dtype):
    exact = SIGNALS[kind](np.random.default_rng(3), 2, 3)

    @jax.jit
    def clipped(signal, threshold):
        norms = parameter_norms(signal)
        weights = bp.clip_weights(threshold)(norms)
        each = [bp.total(signal, weights=w) for w in jnp.diag(weights)]
        return norms, jnp.stack(each).reshape(N, -1)

    for size in SIZES[dtype]:
        deltas = jax.tree.map(lambda d, size=size: d * size, deltas_of(exact))
        signal = in_dtype(with_deltas(exact, deltas), dtype)
        for share in (0.01, 1.0, 100.0):
            norms, grads = clipped(signal, share * float(jnp.median(clipped(signal, 1.0)[0])))
            threshold = share * float(jnp.median(norms))
            got = np.linalg.norm(np.asarray(grads, np.float64), axis=1)
            want = np.minimum(threshold, np.asarray(norms, np.float64))
            np.testing.assert_allclose(got, want, rtol=EACH_ROUNDED[dtype])


@pytest.mark.parametrize(
    ("dtype", "sweeps"),
    [
        (dtype, sweeps)
        for dtype in SIZES
        for sweeps in (1, 2)
        if (dtype, sweeps) != (jnp.float16, 2)
    ],
)
@pytest.mark.parametrize("positions", [(), (2,)])
def test_the_bound_holds_for_norms_of_any_size(positions, dtype, sweeps):
    """One example alone, of a norm from 1e-30 to 1e30, as far as the dtype goes."""
    net, rng = bp.dense(20), np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.zeros_like(p, dtype), net.init(jax.random.key(0), (30,))[0])
    clipped = clipped_sum(net, bp.clip_weights(1.0), sweeps=sweeps)
    sizes = (
        [1e-4, 1.0, 100.0, 3e4]
        if dtype == jnp.float16
        else [1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e30]
    )
    for size in sizes:
        x = jnp.asarray(rng.uniform(0.5, 1, size=(1, *positions, 30)) * min(size, 1e3), dtype)
        targets = jnp.asarray(rng.uniform(0.5, 1, size=(1, *positions, 20)), jnp.float32)
        targets = (targets * size / min(size, 1e3)).astype(dtype)
        got = clipped(params, x, targets)
        summed = np.linalg.norm(np.asarray(ravel(got.grads), np.float64))
        assert summed <= 1 + EACH_ROUNDED[dtype]
        atol = 1e-6 if dtype == jnp.float16 else 0  # where its numbers have fewer digits
        want = min(1.0, float(got.norms[0]))
        np.testing.assert_allclose(summed, want, rtol=EACH_ROUNDED[dtype], atol=atol)


def test_large_norms_in_float16_are_clipped_to_the_threshold():
    """At a norm of 1e8, a weight in 16 bits would be zero; at 3e7, twice what it should be."""
    net = bp.dense(1, use_bias=False)
    params = {"weight": jnp.zeros((4, 1), jnp.float16)}
    x = jnp.array([[3e4], [500.0], [1.0], [0.01]], jnp.float16) * jnp.ones((4, 4), jnp.float16)
    targets = jnp.full((4, 1), 1000, jnp.float16)
    clipped = clipped_sum(net, bp.clip_weights(1.0))
    for i in range(4):
        got = clipped(params, x[i : i + 1], targets[i : i + 1])
        np.testing.assert_allclose(np.linalg.norm(got.grads["weight"].astype(float)), 1, rtol=1e-3)
        assert got.grads["weight"].dtype == jnp.float16


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_one_sweep_and_two_agree_on_norms_out_of_range(dtype):
    net, rng = bp.chain(bp.dense(4), bp.relu(), bp.dense(3)), np.random.default_rng(0)
    params = jax.tree.map(lambda p: p.astype(dtype), net.init(jax.random.key(0), (5,))[0])
    x = jnp.asarray(rng.normal(size=(3, 5)), dtype)
    targets = jnp.asarray(rng.normal(size=(3, 3)) * np.array([[1e25], [1.0], [1e-25]]), dtype)
    one, two = (
        clipped_sum(net, bp.clip_weights(1.0), sweeps=sweeps)(params, x, targets)
        for sweeps in (1, 2)
    )
    assert float(jnp.max(one.norms)) > 1e24
    assert_close(one[1:], two[1:])


def test_with_two_sweeps_float16_is_refused_wherever_it_carries_the_error():
    params = bp.dense(2).init(jax.random.key(0), (3,))[0]
    inside = bp.cast(bp.dense(2), jnp.float16)
    short = jax.tree.map(lambda p: p.astype(jnp.float16), params)
    for make in (
        lambda net: bp.reweighted(net, bp.squared_error, bp.clip_weights(1.0), sweeps=2),
        lambda net: functools.partial(
            bp.private_gradient(
                net, bp.squared_error, max_norm=1, noise_multiplier=0, batch_size=1, sweeps=2
            ),
            key=jax.random.key(0),
        ),
    ):
        for net, own, dtype in ((inside, params, float), (bp.dense(2), short, jnp.float16)):
            with pytest.raises(ValueError, match="with sweeps=2, the error has to be in a dtype"):
                make(net)(own, jnp.ones((4, 3), dtype), jnp.ones((4, 2), dtype))


@both_ways
def test_a_reweighted_sum_is_differentiable_where_a_gradient_is_zero(sweeps, key):
    net, params, x, _, _ = problem(NETWORKS["classifier"], key)
    targets = net.forward(params, x)[0].at[0].add(1)
    clipped = bp.reweighted(net, bp.squared_error, bp.clip_weights(1e-3), sweeps=sweeps)
    grads = jax.jit(jax.grad(lambda p: optax.tree.sum(clipped(p, x, targets).grads)))(params)
    chex.assert_tree_all_finite(grads)


@both_ways
def test_weights_may_be_integers_booleans_negative_or_no_number(sweeps, key):
    net, params, x, targets, _ = problem(NETWORKS["perceptron"], key)
    for weigh, want in (
        (lambda norms: norms < jnp.inf, 1),
        (lambda norms: jnp.full(norms.shape, 2), 2),
        (lambda norms: -norms / norms, -1),
        (lambda norms: norms * jnp.nan, np.nan),
    ):
        got = clipped_sum(net, weigh, sweeps=sweeps)(params, x, targets)
        _, mean = value_and_grad(net, squared, params, x, targets)
        np.testing.assert_allclose(ravel(got.grads), want * N * ravel(mean), rtol=1e-10)


def test_the_threshold_may_be_traced():
    weights = jax.jit(lambda c: bp.clip_weights(c)(jnp.array([1.0, 4.0])))(2.0)
    assert_close(weights, jnp.array([1.0, 0.5]))


class TestPrivate:
    def make(self, net, loss=bp.squared_error, **options):
        defaults = {"max_norm": 0.7, "noise_multiplier": 0.0, "batch_size": 10}
        return jax.jit(bp.private_gradient(net, loss, **(defaults | options)))

    @both_ways
    def test_without_noise_it_is_the_clipped_sum_over_the_expected_size(self, sweeps, key):
        net, params, x, targets, _ = problem(NETWORKS["classifier"], key)
        got = self.make(net, sweeps=sweeps)(params, x, targets, key=key)
        want = clipped_sum(net, bp.clip_weights(0.7))(params, x, targets)
        assert_close(got.grads, jax.tree.map(lambda g: g / 10, want.grads))
        assert_close(got[:3], want[:3])

    @every("case", NETWORKS, soon={"branching"})
    def test_each_layer_is_clipped_to_its_share_of_the_threshold(self, case, key):
        """Against a loop over examples; the whole is at most the threshold."""
        net, params, x, targets, draw_key = problem(case, key)
        draws = {"key": key} if draw_key is None else {"key": draw_key}
        private = self.make(net, per_layer=True)
        got = private(params, x, targets, **draws)
        forward_key = jax.random.split(draws["key"])[0]
        each = per_example_grads(net, squared, params, x, targets, forward_key)
        each = jax.tree.map(np.asarray, each)
        layers, structure = jax.tree.flatten(each, is_leaf=lambda node: isinstance(node, dict))
        share = 0.7 / np.sqrt(len(layers))
        sums = [jax.tree.map(lambda g: np.zeros(g.shape[1:]), layer) for layer in layers]
        for n in range(N):
            parts = [jax.tree.map(lambda g, n=n: g[n], layer) for layer in layers]
            norms = [float(np.linalg.norm(ravel(part))) for part in parts]
            weights = [min(1.0, share / norm) if norm else 1.0 for norm in norms]
            assert sum((w * norm) ** 2 for w, norm in zip(weights, norms, strict=True)) <= 0.49001
            sums = jax.tree.map(
                lambda total, part: total + part,
                sums,
                [
                    jax.tree.map(lambda g, w=w: w * g, part)
                    for w, part in zip(weights, parts, strict=True)
                ],
            )
        assert_close(got.grads, jax.tree.map(lambda g: g / 10, structure.unflatten(sums)))

    def test_each_layer_of_a_stack_has_a_share(self, key):
        net = bp.chain(bp.stack(bp.chain(bp.dense(3), bp.tanh()), 3), bp.dense(3))
        params, _ = net.init(key, (3,))
        x, targets = normal(key, (N, 3)), jnp.full((N, 3), 1e3)
        quiet, loud = (
            self.make(net, per_layer=True, noise_multiplier=sigma, batch_size=1)(
                params, x, targets, key=key
            )
            for sigma in (0.0, 1.0)
        )
        lengths = [leaf.ravel() for leaf in jax.tree.leaves(
            jax.tree.map(jnp.multiply, quiet.norms, quiet.weights)
        )]  # fmt: skip
        assert_close(jnp.concatenate(lengths), jnp.full(4 * N, 0.35))
        # The noise is that of the whole threshold, whatever is clipped.
        whole = [
            self.make(net, noise_multiplier=sigma, batch_size=1)(params, x, targets, key=key).grads
            for sigma in (0.0, 1.0)
        ]
        noise = jax.tree.map(jnp.subtract, loud.grads, quiet.grads)
        assert_close(noise, jax.tree.map(jnp.subtract, whole[1], whole[0]))

    def test_the_noise_has_the_deviation_of_the_mechanism_in_every_parameter(self, key):
        net = bp.chain(bp.dense(60), bp.tanh(), bp.dense(50))
        params, _ = net.init(key, (40,))
        x, targets = jnp.ones((2, 40)), jnp.zeros((2, 50))
        grads = {
            sigma: self.make(net, noise_multiplier=sigma)(params, x, targets, key=key).grads
            for sigma in (0.0, 3.0)
        }
        noise = jax.tree.map(lambda a, b: a - b, grads[3.0], grads[0.0])
        for leaf in jax.tree.leaves(noise):
            # 3 sigma C / B; the estimate's own deviation is 1 / sqrt(2 size) of it, at most 10 %.
            np.testing.assert_allclose(jnp.std(leaf), 3 * 0.7 / 10, rtol=0.4)
        # Of all 5510 entries it is 1 %; that of the fourth moment, 3 for the normal, is 0.13.
        pooled = ravel(noise) / (3 * 0.7 / 10)
        np.testing.assert_allclose(jnp.std(pooled), 1, rtol=0.05)
        np.testing.assert_allclose(jnp.mean(pooled**4), 3, atol=0.6)
        leaves = [np.asarray(leaf).ravel()[:50] for leaf in jax.tree.leaves(noise)]
        for a, b in itertools.combinations(leaves, 2):
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.5  # of which the deviation is 0.14

    def test_one_example_more_or_less_moves_the_sum_by_no_more_than_the_sensitivity(self, key):
        net, params, x, targets, _ = problem(NETWORKS["classifier"], key)
        private = self.make(net, batch_size=1)
        x = 100 * x
        whole, without = (private(params, x[i:], targets[i:], key=key).grads for i in (0, 1))
        moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, whole, without))
        np.testing.assert_allclose(moved, 0.7, rtol=1e-10)

    def test_padded_examples_change_nothing(self, key):
        net, params, x, targets, _ = problem(NETWORKS["classifier"], key)
        private = self.make(net, bp.weighted(bp.squared_error), noise_multiplier=1.0)
        padded = (
            jnp.concatenate([x, jnp.ones((4, 4))]),
            (
                jnp.concatenate([targets, jnp.full((4, 3), 9.0)]),
                jnp.array([1.0] * N + [0.0] * 4),
            ),
        )
        got = private(params, *padded, key=key)
        want = private(params, x, (targets, jnp.ones(N)), key=key)
        assert_close(got.grads, want.grads)
        assert list(np.asarray(got.norms[N:])) == [0] * 4

    def test_another_key_draws_other_noise_and_the_same_key_the_same(self, key):
        net, params, x, targets, _ = problem(NETWORKS["classifier"], key)
        private = self.make(net, noise_multiplier=1.0)
        first, again, other = (
            private(params, x, targets, key=k).grads for k in (key, key, jax.random.key(3))
        )
        chex.assert_trees_all_equal(first, again)
        assert not np.allclose(first[0]["weight"], other[0]["weight"])

    def test_the_noise_of_16_bits_is_that_of_32(self, key):
        net = bp.dense(100, use_bias=False)
        params = {"weight": jnp.zeros((100, 100), jnp.bfloat16)}
        x, targets = jnp.zeros((2, 100), jnp.bfloat16), jnp.zeros((2, 100), jnp.bfloat16)
        private = self.make(net, max_norm=1.0, noise_multiplier=1.0, batch_size=1)
        noise = private(params, x, targets, key=key).grads["weight"]
        assert noise.dtype == jnp.bfloat16
        # Of 10 000 normal numbers the largest is about 3.9; drawn in bfloat16, at most 2.9.
        assert float(jnp.max(jnp.abs(noise))) > 3.2

    def test_what_numpy_calibrates_keeps_the_dtype(self, as_shipped):
        net = bp.dense(2)
        with jax.enable_x64(True):
            params = {"weight": jnp.zeros((3, 2), jnp.float32), "bias": jnp.zeros(2, jnp.float32)}
            x, targets = jnp.ones((4, 3), jnp.float32), jnp.ones((4, 2), jnp.float32)
            private = self.make(net, noise_multiplier=np.float64(1.1), max_norm=np.float64(1))
            grads = private(params, x, targets, key=jax.random.key(0)).grads
        assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}

    def test_noise_and_layers_have_keys_of_their_own(self, key, monkeypatch):
        seen = {"layer": [], "noise": []}
        normal = jax.random.normal

        def spy_on_noise(key, *args):
            seen["noise"].append(jax.random.key_data(key).tolist())
            return normal(key, *args)

        def forward(params, x, *, key=None):
            seen["layer"] += jax.random.key_data(jax.random.split(key, 9)).tolist()
            seen["layer"].append(jax.random.key_data(key).tolist())
            return net.forward(params, x)

        net, params, x, targets, _ = problem(NETWORKS["perceptron"], key)
        monkeypatch.setattr(jax.random, "normal", spy_on_noise)
        spied = net._replace(forward=forward)
        with jax.disable_jit():  # so that keys are numbers
            self.make(spied, noise_multiplier=1.0)(params, x, targets, key=key)
        assert len(seen["noise"]) == 2
        assert not [k for k in seen["noise"] if k in seen["layer"]]

    def test_layers_that_draw_get_a_key_of_their_own(self, key):
        net, params, x, targets, _ = problem(NETWORKS["images"], key)
        private = self.make(net, max_norm=1e9)
        first, other = (private(params, x, targets, key=k).grads for k in (key, jax.random.key(3)))
        assert not np.allclose(first[1]["weight"], other[1]["weight"])


NET = bp.chain(bp.dense(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bp.clip_weights(-1.0), r"clip_weights: max_norm is -1\.0; it takes a number, at"),
        (lambda: bp.clip_weights(np.nan), "clip_weights: max_norm is nan"),
        (lambda: bp.automatic_weights(0.0), r"automatic_weights: gamma is 0\.0; it takes a pos"),
        (
            lambda: bp.reweighted(NET, bp.huber, bp.clip_weights(1), sweeps=3),
            "reweighted: sweeps is 3; it takes 1 or 2",
        ),
        (
            lambda: bp.reweighted(NET, bp.huber, bp.clip_weights(1), sweeps=2, per_layer=True),
            "reweighted: with per_layer, sweeps has to be 1",
        ),
        (
            lambda: bp.private_gradient(
                NET,
                bp.huber,
                max_norm=1,
                noise_multiplier=1,
                batch_size=1,
                sweeps=2,
                per_layer=True,
            ),
            "private_gradient: with per_layer, sweeps has to be 1",
        ),
        (
            lambda: bp.reweighted(NET, bp.huber, jnp.sum)(
                NET.init(jax.random.key(0), (3,))[0], jnp.ones((5, 3)), jnp.ones((5, 2))
            ),
            r"weigh gave weights of shape \[\], expected \[5\]: one for each example",
        ),
        (
            lambda: bp.private_gradient(
                NET, bp.huber, max_norm=np.inf, noise_multiplier=-1, batch_size=0
            ),
            "max_norm is inf, expected a positive number; noise_multiplier is -1, expected a "
            "number, at least 0; batch_size is 0, expected a positive number",
        ),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("wrong", [None, 3, "key"])
def test_a_private_gradient_refuses_what_is_no_key(wrong):
    net = bp.dense(2)
    params, _ = net.init(jax.random.key(0), (3,))
    private = bp.private_gradient(
        net, bp.squared_error, max_norm=1.0, noise_multiplier=1.0, batch_size=2
    )
    with pytest.raises(
        ValueError, match=f"private_gradient: key is {wrong!r}; (it|the noise) takes"
    ):
        private(params, jnp.ones((2, 3)), jnp.ones((2, 2)), key=wrong)


@pytest.mark.parametrize("sweeps", [1, 2])
def test_without_parameters_there_is_nothing_to_sum(sweeps):
    clipped = bp.reweighted(bp.relu(), bp.squared_error, bp.clip_weights(1.0), sweeps=sweeps)
    answer = clipped((), jnp.ones((3, 2)), jnp.zeros((3, 2)))
    assert answer.grads == ()
    assert answer.norms.tolist() == [0, 0, 0]
    assert answer.weights.tolist() == [1, 1, 1]
    private = bp.private_gradient(
        bp.relu(),
        bp.squared_error,
        max_norm=1,
        noise_multiplier=1,
        batch_size=1,
        sweeps=sweeps,
        per_layer=sweeps == 1,
    )
    assert private((), jnp.ones((3, 2)), jnp.zeros((3, 2)), key=jax.random.key(0)).grads == ()
