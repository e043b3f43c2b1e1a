"""Alignment: the angles are those of the two sweeps, and the forward pass is not made twice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BLOCKS, N, late, normal
from oracles import angle, assert_close, per_example_grads_by_rule, squared

import jaxbp as bp

BLOCK_CASE = BLOCKS["networks for blocks"]
NET = bp.chain(*BLOCK_CASE.parts)


@pytest.fixture
def batch(key):
    params, _ = NET.init(key, BLOCK_CASE.shape)
    x, targets = normal(key, (N, *BLOCK_CASE.shape)), jnp.ones((N, 3))
    return params, x, targets


def measure(rule, params, x, targets, **how):
    return jax.jit(bp.alignment(NET, bp.squared_error, rule=rule))(params, x, targets, **how)


@pytest.mark.parametrize(
    "rule",
    [
        late(bp.random_feedback(scale=2.0)),
        bp.sign_symmetric("batchwise"),
        late(bp.direct_feedback(*BLOCK_CASE.parts)),
        bp.direct_feedback(*BLOCK_CASE.parts, rules=[bp.random_feedback(), bp.exact()]),
    ],
    ids=["random", "batchwise", "direct", "direct and random"],
)
def test_the_angles_are_those_of_the_two_sweeps(rule, batch, key):
    params, x, targets = batch
    state = rule.make(key, NET, BLOCK_CASE.shape)
    got = measure(rule, *batch, rule_state=state, rule_key=key)
    tree = rule.choose(state, params, key=key)
    trees = tree.parts if isinstance(tree, bp.Direct) else tree

    def grads(tree):
        per_example = per_example_grads_by_rule(BLOCK_CASE, squared, params, tree, x, targets)
        return jax.tree.leaves(per_example)

    # Of a bias, the example's gradient is its delta, and of a weight it is no other layer's.
    ruled, exact = grads(tree), grads(params)
    measured = jax.tree.leaves(got, is_leaf=lambda node: isinstance(node, bp.Alignment))
    own, carriers = jax.tree.leaves(params), jax.tree.leaves(trees)
    for i, one in enumerate(measured):
        bias = i - i % 2
        deltas = [angle(a, b) for a, b in zip(ruled[bias], exact[bias], strict=True)]
        assert float(one.gradient) == pytest.approx(
            angle(ruled[i].sum(0), exact[i].sum(0)), 1e-6, 2e-6
        )
        assert float(one.delta) == pytest.approx(np.mean(deltas), 1e-6, 2e-6)
        if not np.any(own[i]):  # a bias that begins at zero
            assert (float(one.weight), float(one.norm_ratio)) == (0.0, 1.0)
            continue
        ratio = np.linalg.norm(carriers[i]) / np.linalg.norm(own[i])
        assert float(one.weight) == pytest.approx(angle(carriers[i], own[i]), 1e-6, 2e-6)
        assert float(one.norm_ratio) == pytest.approx(ratio, 1e-10)
    assert any(float(one.gradient) > 10 for one in measured)


def test_backpropagation_is_at_an_angle_of_zero_to_itself(batch):
    for one in jax.tree.leaves(
        measure(bp.exact(), *batch), is_leaf=lambda node: isinstance(node, bp.Alignment)
    ):
        assert [float(value) for value in one] == [0.0, 0.0, 0.0, 1.0]


def test_small_angles_keep_their_digits(key):
    """A rotation by a millionth of a degree, of which the cosine is 1 in 16 digits."""
    net, small = bp.dense(2, use_bias=False), np.radians(1e-6)
    params = {"weight": jnp.array([[1.0, 0.0]])}
    turned = {"weight": 3 * jnp.array([[np.cos(small), np.sin(small)]])}
    rule = bp.exact()._replace(choose=lambda state, params, *, key=None: turned)
    got = bp.alignment(net, bp.squared_error, rule=rule)(params, jnp.ones((1, 1)), jnp.ones((1, 2)))
    assert float(got["weight"].weight) == pytest.approx(1e-6, rel=1e-8)
    assert float(got["weight"].norm_ratio) == pytest.approx(3)


@pytest.mark.parametrize(
    ("factor", "angles", "ratio"),
    [(-2.0, [180.0, 180.0], 2.0), (0.0, [90.0, 90.0], 0.0), (0.5, [0.0, 0.0], 0.5)],
)
def test_the_edges_of_an_angle(factor, angles, ratio, key):
    """Feedback of a multiple of the last weights: the deltas before it are a multiple too."""
    net = bp.chain(bp.dense(4), bp.dense(3))
    params, _ = net.init(key, (2,))
    rule = bp.exact()._replace(
        choose=lambda state, params, *, key=None: (params[0], optax.tree.scale(factor, params[1]))
    )
    batch = normal(key, (N, 2)), jnp.ones((N, 3))
    got = bp.alignment(net, bp.squared_error, rule=rule)(params, *batch)
    first, last = got[0]["weight"], got[1]["weight"]
    assert [float(first.gradient), float(first.delta)] == pytest.approx(angles, abs=1e-6)
    assert float(last.weight) == pytest.approx(angles[0], abs=1e-6)
    assert float(last.norm_ratio) == pytest.approx(ratio)
    assert (float(last.gradient), float(last.delta)) == (0.0, 0.0)
    # Both of nothing: no error at all, and biases of zero.
    targets, _ = net.forward(params, batch[0])
    nothing = bp.alignment(net, bp.squared_error, rule=rule)(params, batch[0], targets)
    assert [float(value) for value in nothing[0]["bias"]] == [0.0, 0.0, 0.0, 1.0]


def test_a_feedback_for_weights_of_zero_has_an_infinite_ratio():
    net = bp.dense(2, use_bias=False)
    rule = bp.exact()._replace(
        choose=lambda state, params, *, key=None: {"weight": jnp.ones((1, 2))}
    )
    params, batch = {"weight": jnp.zeros((1, 2))}, (jnp.ones((1, 1)), jnp.ones((1, 2)))
    got = bp.alignment(net, bp.squared_error, rule=rule)(params, *batch)["weight"]
    assert (float(got.weight), float(got.norm_ratio)) == (pytest.approx(90), np.inf)


def test_numbers_of_16_bits_are_measured_in_32(key):
    net = bp.chain(bp.dense(4, dtype=jnp.float16), bp.dense(3, dtype=jnp.float16))
    params, _ = net.init(key, (2,))
    rule = bp.random_feedback(scale=1000.0)
    state = rule.make(key, net, (2,))
    batch = jnp.ones((N, 2), jnp.float16), jnp.zeros((N, 3), jnp.float16)
    measure = jax.jit(bp.alignment(net, bp.squared_error, rule=rule))
    got = measure(params, *batch, rule_state=state)
    for value in got[1]["weight"]:
        assert value.dtype == jnp.float32
    assert 100 < float(got[1]["weight"].norm_ratio) < 10_000  # squares would overflow


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_size_of_an_error_does_not_change_an_angle(size, key):
    """Their squares are no numbers of 32 bits."""
    params, _ = NET.init(key, BLOCK_CASE.shape)
    rule, x = bp.random_feedback(), normal(key, (N, *BLOCK_CASE.shape))
    state = rule.make(key, NET, BLOCK_CASE.shape)

    def angles(size):
        def loss(outputs, targets):
            return jnp.zeros(N), size * targets

        targets = jnp.arange(3.0 * N).reshape(N, 3)
        return jax.jit(bp.alignment(NET, loss, rule=rule))(params, x, targets, rule_state=state)

    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-3),
        angles(size),
        angles(1.0),
    )
    assert float(angles(size)[0][0]["weight"].delta) > 5


def test_nothing_is_divided_by_zero(batch):
    with jax.debug_nans(True):
        bp.alignment(NET, bp.squared_error, rule=bp.exact())(*batch)


def flop(function, *args):
    return function.lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.usefixtures("standard_promotion")
def test_measuring_while_training_adds_one_sweep_and_no_forward_pass(key):
    net, optimizer = (
        bp.chain(bp.dense(256), bp.tanh(), bp.dropout(0.1), bp.dense(256)),
        optax.sgd(0.1),
    )
    rule = bp.random_feedback()
    batch = normal(key, (128, 256)), jnp.ones((128, 256))
    state = bp.init_state(net, optimizer, key, (256,), rule=rule)
    how = {"rule": rule, "donate": False}
    measures = {"alignment": bp.alignment(net, bp.squared_error, rule=rule)}
    plain = bp.make_step(net, bp.squared_error, optimizer, **how)
    measured = bp.make_step(net, bp.squared_error, optimizer, measures=measures, **how)
    more = flop(measured, state, *batch) - flop(plain, state, *batch)
    product = 2 * 128 * 256 * 256
    # The exact sweep has two products: what is sent back to the first layer, and that layer's
    # gradient; the last one's is the same. A forward pass would be two more.
    assert 2 * product < more < 2.6 * product


@pytest.mark.usefixtures("standard_promotion")
def test_fit_records_the_mean_over_the_epoch(key):
    """At a learning rate of zero every epoch measures the same."""
    rule, optimizer = bp.random_feedback(), optax.sgd(0.0)
    x = normal(key, (6, *BLOCK_CASE.shape))
    targets = jnp.ones((6, 3))
    measure = bp.alignment(NET, bp.squared_error, rule=rule)
    run = bp.fit(
        NET,
        bp.squared_error,
        optimizer,
        (x, targets),
        key=key,
        rule=rule,
        measures={"alignment": measure},
        epochs=2,
        batch_size=6,
    )
    want = measure(run.params, x, targets, rule_state=run.state.rule_state)
    for record in run.records:
        assert_close(jax.tree.map(jnp.asarray, record["alignment"]), want)


def test_a_measure_may_not_take_the_name_of_a_reading():
    rule = bp.random_feedback()
    how = {"rule": rule, "read": {"angles": bp.sq_norms}}
    with pytest.raises(ValueError, match="measures has measures called angles: names are taken"):
        bp.make_step(
            NET, bp.squared_error, optax.sgd(0.1),
            measures={"angles": bp.alignment(NET, bp.squared_error, rule=rule)}, **how,
        )  # fmt: skip
