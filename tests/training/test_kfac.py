"""KFAC: an update against the inverse of the whole Kronecker product, and its place in the loop."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import assert_close

import jaxbp as bp

NET = bp.chain(bp.dense(4), bp.tanh(), bp.dense(3))
LOSS = bp.softmax_cross_entropy
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def batch(key):
    params, _ = NET.init(key, (5,))
    x, labels = jax.random.normal(key, (8, 5)), jnp.arange(8) % 3
    _, grads = bp.value_and_grad(NET, LOSS)(params, x, labels)
    return params, x, labels, grads


def factors_of(params, x, labels, key, **options):
    return bp.kfac_factors(NET, LOSS, **options)(params, x, labels, key=key)


def damped(a, g, damping):
    """(A + pi sqrt(damping) I) x (G + sqrt(damping) / pi I), formed whole."""
    pi = np.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g)))
    root = np.sqrt(damping)
    return np.kron(a + pi * root * np.eye(len(a)), g + root / pi * np.eye(len(g)))


def solve(grads, factors, damping):
    """The natural gradient of one layer by a linear system over all of its parameters."""
    rows = np.concatenate([grads["weight"], grads["bias"][None]])
    natural = np.linalg.solve(damped(*map(np.asarray, factors), damping), rows.ravel())
    natural = jnp.asarray(natural.reshape(rows.shape))
    return {"weight": natural[:-1], "bias": natural[-1]}


def test_an_update_solves_the_damped_system_of_each_layer(batch, key):
    params, x, labels, grads = batch
    factors = factors_of(params, x, labels, key)
    kfac = bp.scale_by_kfac(damping=0.03)
    got, state = kfac.update(grads, kfac.init(params), params, factors=factors)
    for i in (0, 2):
        assert_close(got[i], solve(grads[i], factors[i]["weight"], 0.03))
        assert_close(state.factors[i], factors[i]["weight"])


def test_factors_are_averaged_evenly_at_first_and_then_decay(batch, key):
    params, x, labels, grads = batch
    kfac = bp.scale_by_kfac(damping=0.03, decay=0.6, every=1)
    state, seen = kfac.init(params), []
    for i in range(4):
        seen.append(factors_of(params, x + i, labels, jax.random.key(i)))
        got, state = kfac.update(grads, state, params, factors=seen[-1])
    first, second, third, fourth = (f[0]["weight"].inputs for f in seen)
    average = 0.6 * (0.6 * (first + second) / 2 + 0.4 * third) + 0.4 * fourth
    assert_close(state.factors[0].inputs, average)
    assert_close(got[0], solve(grads[0], state.factors[0], 0.03))


def test_inverses_are_renewed_every_few_steps(batch, key):
    params, x, labels, grads = batch
    kfac = bp.scale_by_kfac(every=3)
    state, inverses = kfac.init(params), []
    for i in range(7):
        factors = factors_of(params, x * (i + 1), labels, key)
        _, state = kfac.update(grads, state, params, factors=factors)
        inverses.append(np.asarray(state.inverses[0].inputs))
    same = [np.array_equal(a, b) for a, b in itertools.pairwise(inverses)]
    assert same == [True, True, False, True, True, False]


def test_a_layer_without_bias_has_the_factors_of_its_inputs_alone(key):
    net = bp.chain(bp.dense(4, use_bias=False), bp.tanh(), bp.dense(3, use_bias=False))
    params, _ = net.init(key, (5,))
    x, labels = jax.random.normal(key, (8, 5)), jnp.arange(8) % 3
    _, grads = bp.value_and_grad(net, LOSS)(params, x, labels)
    factors = bp.kfac_factors(net, LOSS)(params, x, labels, key=key)
    kfac = bp.scale_by_kfac(damping=0.1)
    got, state = kfac.update(grads, kfac.init(params), params, factors=factors)
    assert_close(state.factors[0].inputs, x.T @ x / 8)
    natural = np.linalg.solve(
        damped(*map(np.asarray, state.factors[0]), 0.1), np.ravel(grads[0]["weight"])
    )
    assert_close(got[0]["weight"], jnp.asarray(natural.reshape(5, 4)))


def test_a_kernel_is_a_matrix(key):
    """[*K, I, O] as [K I, O], with the same factors."""
    rows, deltas = jax.random.normal(key, (2, 40, 40))
    factors = bp.Kronecker(rows[:, :13].T @ rows[:, :13], deltas[:, :3].T @ deltas[:, :3])
    grads = {"weight": rows[:12, 13:16], "bias": rows[12, 13:16]}
    kernel = {**grads, "weight": grads["weight"].reshape(3, 2, 2, 3)}
    kfac = bp.scale_by_kfac(damping=0.1)

    def update(grads):
        tree = {"weight": factors, "bias": ()}
        return kfac.update(grads, kfac.init(grads), grads, factors=tree)[0]

    got, want = update(kernel), update(grads)
    assert_close(got, {**want, "weight": want["weight"].reshape(3, 2, 2, 3)})
    assert_close(want, solve(grads, factors, 0.1))


def test_a_convnet_has_an_update_for_each_layer_and_groups_are_refused(key):
    x, labels = jax.random.normal(key, (8, 4, 4, 2)), jnp.arange(8) % 3
    kfac = bp.scale_by_kfac()

    def update(groups):
        net = bp.chain(bp.conv(4, (3, 3), groups=groups), bp.tanh(), bp.flatten(), bp.dense(3))
        params, _ = net.init(key, (4, 4, 2))
        factors = bp.kfac_factors(net, LOSS)(params, x, labels, key=key)
        return params, kfac.update(params, kfac.init(params), params, factors=factors)[0]

    params, updates = jax.eval_shape(lambda: update(1))
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    with pytest.raises(ValueError, match=r"A convolution in groups has a pair for each group"):
        jax.eval_shape(lambda: update(2))


def test_damping_may_follow_a_schedule(batch, key):
    params, x, labels, grads = batch
    factors = factors_of(params, x, labels, key)
    make = optax.inject_hyperparams(bp.scale_by_kfac, static_args=("decay", "every"))
    scheduled = make(damping=optax.linear_schedule(0.3, 0.1, 2), every=1)
    state = scheduled.init(params)
    update = jax.jit(lambda state: scheduled.update(grads, state, params, factors=factors))
    for damping in (0.3, 0.2, 0.1):
        got, state = update(state)
        scheduled_damping = float(state.hyperparams["damping"])  # which optax computes in float32
        assert scheduled_damping == pytest.approx(damping)
        assert_close(got[0], solve(grads[0], factors[0]["weight"], scheduled_damping))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits_are_inverted_in_32_and_kept(batch, key, dtype):
    params, x, labels, grads = batch
    short = jax.tree.map(lambda a: a.astype(dtype), (params, x, grads))
    factors = factors_of(*short[:2], labels, key)
    kfac = bp.scale_by_kfac(damping=0.1)
    got, state = kfac.update(short[2], kfac.init(short[0]), short[0], factors=factors)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.factors)} == {jnp.dtype("float32")}
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (short[2][0], factors[0]["weight"]))
    want = solve(*wide, 0.1)
    np.testing.assert_allclose(np.asarray(got[0]["weight"], float), want["weight"], atol=0.02)


def test_other_layers_may_have_an_optimizer_of_their_own(batch, key):
    params, x, labels, grads = batch
    labels_of = ({"weight": "kfac", "bias": "kfac"}, (), {"weight": "sgd", "bias": "sgd"})
    both = optax.partition({"kfac": bp.scale_by_kfac(), "sgd": optax.sgd(0.5)}, labels_of)
    factors = factors_of(params, x, labels, key)
    got, _ = both.update(grads, both.init(params), params, factors=factors)
    kfac = bp.scale_by_kfac()
    want, _ = kfac.update(grads, kfac.init(params), params, factors=factors)
    assert_close(got[0], want[0])
    assert_close(got[2], jax.tree.map(lambda g: -0.5 * g, grads[2]))


def test_factors_are_of_the_forward_pass_that_draws(key):
    net = bp.chain(bp.dense(4), bp.dropout(0.5), bp.dense(3))
    params, _ = net.init(key, (5,))
    x, labels = jax.random.normal(key, (8, 5)), jnp.arange(8) % 3
    got = bp.kfac_factors(net, LOSS, error=bp.ggn_columns)(params, x, labels, key=key)
    sweep = bp.backprop(net, LOSS, read=bp.kronecker, error=bp.ggn_columns)
    assert_close(got, sweep(params, x, labels, key=key)[1])
    assert not np.allclose(got[2]["weight"].inputs, sweep(params, x, labels)[1][2]["weight"].inputs)


def test_factors_may_be_exact(batch, key):
    params, x, labels, _ = batch
    got = factors_of(params, x, labels, key, error=bp.ggn_columns)
    sweep = bp.backprop(NET, LOSS, read=bp.kronecker, error=bp.ggn_columns)
    assert_close(got, sweep(params, x, labels)[1])
    assert not np.allclose(
        got[0]["weight"].deltas, factors_of(params, x, labels, key)[0]["weight"].deltas
    )


def test_the_key_decides_what_is_drawn(batch):
    params, x, labels, _ = batch
    first, again, other = (
        factors_of(params, x, labels, jax.random.key(seed))[0]["weight"] for seed in (1, 1, 2)
    )
    assert_close(first, again)
    assert_close(first.inputs, other.inputs)
    assert not np.allclose(first.deltas, other.deltas)


def test_targets_are_drawn_by_a_key_that_no_layer_has(batch):
    params, x, labels, _ = batch
    seen = []

    def spy(loss, outputs, targets, key):
        seen.append(np.asarray(jax.random.key_data(key)).tolist())
        return bp.ggn_columns(loss, outputs, targets)

    key = jax.random.key(5)
    factors_of(params, x, labels, key, error=spy)
    of_layers = np.asarray(jax.random.key_data(jax.random.split(key, 100))).tolist()
    assert seen[0] not in of_layers
    assert jax.random.key_data(jax.random.fold_in(key, 1)).tolist() in of_layers


def test_a_layer_that_no_error_reaches_gets_a_finite_update(batch, key):
    params, x, labels, grads = batch
    factors = jax.tree.map(jnp.zeros_like, factors_of(params, x, labels, key))
    kfac = bp.scale_by_kfac(damping=0.04)
    got, _ = kfac.update(grads, kfac.init(params), params, factors=factors)
    assert_close(got, jax.tree.map(lambda g: g / 0.04, grads))


def test_it_is_an_optimizer_of_optax_that_fit_can_train_with(key):
    x = jax.random.normal(key, (60, 5))
    labels = jnp.argmax(x[:, :3], axis=1)
    optimizer = optax.chain(bp.scale_by_kfac(), optax.sgd(0.1))
    extra = {"factors": bp.kfac_factors(NET, LOSS)}
    run = bp.fit(NET, LOSS, optimizer, (x, labels), key=key, epochs=4, extra_args=extra)
    losses = [float(record["loss"]) for record in run.records]
    assert losses[-1] < losses[0]
    batches = [(x[:30], labels[:30]), (x[30:], labels[30:])]
    again = bp.fit(NET, LOSS, optimizer, batches, key=key, epochs=2, extra_args=extra)
    assert again.state.step == 4
    # The state goes on where it was: two runs of two epochs are one of four.
    half = bp.fit(NET, LOSS, optimizer, (x, labels), key=key, epochs=2, extra_args=extra)
    rest = bp.fit(NET, LOSS, optimizer, (x, labels), state=half.state, epochs=2, extra_args=extra)
    assert_close(rest.state.params, run.state.params)


def test_extra_arguments_reach_the_optimizer_by_name(key):
    def scale(updates, state, params=None, *, size, **extra_args):
        return jax.tree.map(lambda g: size * g, updates), state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (), scale)
    state = bp.init_state(NET, optimizer, key, (5,))
    x, labels = jax.random.normal(key, (8, 5)), jnp.arange(8) % 3
    keys = []

    def mean_input(params, inputs, targets, *, key):
        keys.append(key)
        return jnp.mean(inputs)

    def see_key(params, x, *, key=None):
        keys.append(key)
        return NET.forward(params, x, key=key)

    extra = {"size": mean_input}
    spied = NET._replace(forward=see_key)
    step = bp.make_step(spied, LOSS, optimizer, extra_args=extra, donate=False)
    after, _ = step(state, x, labels)
    _, grads = bp.value_and_grad(NET, LOSS)(state.params, x, labels)
    want = jax.tree.map(lambda p, g: p + jnp.mean(x) * g, state.params, grads)
    assert_close(after.params, want)
    of_forward, of_argument = keys
    assert of_forward is of_argument


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        (bp.kfac_factors(NET, LOSS), "extra_args is function, expected a dict of arguments by na"),
        ({"value": jnp.mean}, "extra_args has arguments called value: names are taken"),
    ],
)
def test_wrong_extra_arguments_are_refused(extra_args, message):
    with pytest.raises(ValueError, match=message):
        bp.make_step(NET, LOSS, bp.scale_by_kfac(), extra_args=extra_args)


def test_the_second_update_does_not_trace_again(batch, key):
    params, x, labels, grads = batch
    kfac = bp.scale_by_kfac()
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(kfac.update, n=1))
    state = kfac.init(params)
    for i in range(2):
        factors = factors_of(params, x + i, labels, key)
        _, state = update(grads, state, params, factors=factors)
    assert state.step == 2


def test_what_is_wrong_is_said(batch, key):
    params, x, labels, grads = batch
    with pytest.raises(ValueError, match=r"damping is 0, .*; decay is 1, .*; every is 0, expected"):
        bp.scale_by_kfac(damping=0, decay=1, every=0)
    kfac = bp.scale_by_kfac()
    with pytest.raises(ValueError, match=r"got gain of shape \[3\]\. Give others an optimizer"):
        kfac.init({"gain": jnp.ones(3)})
    state = kfac.init(params)
    with pytest.raises(ValueError, match=r"takes factors=\.\.\., as kfac_factors computes them"):
        kfac.update(grads, state, params)
    apart = bp.backprop(NET, LOSS, read=lambda s: bp.kronecker(s, bias="apart"))
    _, factors = apart(params, x, labels)
    with pytest.raises(ValueError, match="not those of this network's layers with their"):
        kfac.update(grads, state, params, factors=factors)
    with pytest.raises(ValueError, match="not those of this network's layers"):
        kfac.update(grads, state, params, factors=factors[:1])
