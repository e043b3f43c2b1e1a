"""Rules: each against autodiff with that rule's derivative, each state by what becomes of it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BLOCKS, READINGS, RULES, N, every, late, normal
from oracles import angle, assert_close, per_example_grads_by_rule, squared

import jaxbp as bp

every_rule = pytest.mark.parametrize("make_rule", RULES.values(), ids=RULES.keys())
# One that has a state and keeps it, one that draws, one that learns, one that does both and leaps.
SOME = {
    name: RULES[name]
    for name in (
        "random_feedback",
        "sign_symmetric, batchwise",
        "weight_mirror",
        "direct_feedback of what learns and draws",
    )
}
# Of every rule, what takes long to compile only for these soon.
every_rule_thoroughly = every("make_rule", RULES, soon=SOME)
DRAWS = {"sign_symmetric, batchwise", "direct_feedback of what learns and draws"}
some_rules = every("make_rule", SOME, soon=DRAWS)
every_blocks = every("blocks", BLOCKS, soon=("positions that end",))

VECTORS = BLOCKS["vectors"]
NET = bp.chain(*VECTORS.parts)


def problem(blocks, rule, key):
    """A network with parameters away from zero, the rule's state, and a batch."""
    net = bp.chain(*blocks.parts)
    init_key, state_key, *keys = jax.random.split(key, 5)
    params, out_shape = net.init(init_key, blocks.shape)
    params = optax.tree.add_scale(params, 0.3, optax.tree.random_like(keys[0], params))
    x = normal(keys[1], (N, *blocks.shape))
    targets = normal(keys[2], (N, *out_shape))
    return net, params, rule.make(state_key, net, blocks.shape), x, targets


@every_rule
@every_blocks
def test_every_gradient_is_that_of_autodiff_with_the_rules_derivative(blocks, make_rule, key):
    rule = make_rule(*blocks.parts)
    net, params, rule_state, x, targets = problem(blocks, rule, key)
    tree = rule.choose(rule_state, params, key=key)
    want = per_example_grads_by_rule(blocks, squared, params, tree, x, targets)

    how = {"rule_state": rule_state, "rule_key": key}
    read = {"per_example": bp.per_example, "mean": bp.mean, "sq_norms": bp.sq_norms}
    sweep = jax.jit(bp.backprop(net, bp.squared_error, read=read, rule=rule))
    _, answers = sweep(params, x, targets, **how)
    assert_close(answers["per_example"], want)
    mean = jax.tree.map(lambda g: g.mean(0), want)
    assert_close(answers["mean"], mean)
    squares = jax.tree.map(lambda g: (g**2).reshape(N, -1).sum(1), want)
    assert_close(answers["sq_norms"], squares)
    gradient = jax.jit(bp.value_and_grad(net, bp.squared_error, rule=rule))
    assert_close(gradient(params, x, targets, **how)[1], mean)


@some_rules
def test_every_reading_of_a_rule_is_that_of_its_signals(make_rule, key):
    rule = make_rule(*VECTORS.parts)
    net, params, rule_state, x, targets = problem(VECTORS, rule, key)
    how = {"rule_state": rule_state, "rule_key": key}
    sweep = bp.backprop(net, bp.squared_error, read=READINGS, rule=rule)
    _, answers = jax.jit(sweep)(params, x, targets, **how)

    @jax.jit
    def read_after(signals):
        return {
            name: jax.tree.map(lambda _, signal, read=read: read(signal), params, signals)
            for name, read in READINGS.items()
        }

    assert_close(answers, read_after(answers["keep"]))


@some_rules
@pytest.mark.parametrize("sweeps", [1, 2])
def test_clipped_sums_are_of_the_rules_own_gradients(sweeps, make_rule, key):
    rule = make_rule(*VECTORS.parts)
    net, params, rule_state, x, targets = problem(VECTORS, rule, key)
    tree = rule.choose(rule_state, params, key=key)
    grads = per_example_grads_by_rule(VECTORS, squared, params, tree, x, targets)
    norms = jnp.sqrt(sum((g**2).reshape(N, -1).sum(1) for g in jax.tree.leaves(grads)))
    max_norm = jnp.median(norms)
    want = jax.tree.map(
        lambda g: jnp.einsum("n,n...->...", jnp.minimum(1, max_norm / norms), g), grads
    )
    how = {"rule_state": rule_state, "rule_key": key}
    clip = {"sweeps": sweeps, "rule": rule}
    clipped = bp.reweighted(net, bp.squared_error, bp.clip_weights(float(max_norm)), **clip)
    got = jax.jit(clipped)(params, x, targets, **how)
    assert_close(got.norms, norms)
    assert_close(got.grads, want)

    private = bp.private_gradient(
        net, bp.squared_error, max_norm=float(max_norm), noise_multiplier=0.0, batch_size=2, **clip
    )
    got = jax.jit(private)(params, x, targets, key=key, **how)
    assert_close(got.grads, jax.tree.map(lambda g: g / 2, want))


@some_rules
def test_another_error_goes_back_by_the_rule_too(make_rule, key):
    """One-hot errors, weighed by the loss's delta and summed, come to its sweep."""
    rule = make_rule(*VECTORS.parts)
    net, params, rule_state, x, targets = problem(VECTORS, rule, key)
    how = {"rule_state": rule_state, "rule_key": key}
    rows = bp.backprop(
        net, bp.squared_error, read=bp.per_example, error=bp.jacobian_rows, rule=rule
    )
    _, jacobian = jax.jit(rows)(params, x, targets, **how)
    delta = net.forward(params, x)[0] - targets
    _, want = bp.backprop(net, bp.squared_error, read=bp.per_example, rule=rule)(
        params, x, targets, **how
    )
    assert_close(jax.tree.map(lambda j: jnp.einsum("nk,kn...->n...", delta, j), jacobian), want)


@every_blocks
def test_feedback_that_is_the_parameters_is_backpropagation_to_the_last_bit(blocks, key):
    rule = bp.random_feedback(where=lambda path, leaf: True)
    net, params, _, x, targets = problem(blocks, rule, key)
    read = {"grads": bp.mean, "signals": bp.keep}
    exact = jax.jit(bp.backprop(net, bp.squared_error, read=read))(params, x, targets)
    sweep = jax.jit(bp.backprop(net, bp.squared_error, read=read, rule=rule))
    got = sweep(params, x, targets, rule_state=jax.tree.map(jnp.copy, params))
    chex.assert_trees_all_equal(got, exact)


def test_direct_feedback_by_the_last_weights_is_backpropagation_to_the_last_bit(key):
    """Where one linear layer follows, a direct matrix can be what the chain rule has there."""
    blocks = bp.chain(bp.dense(5), bp.tanh()), bp.dense(3)
    net, rule = bp.chain(*blocks), bp.direct_feedback(*blocks)
    params, _ = net.init(key, (4,))
    x, targets = normal(key, (N, 4)), jnp.ones((N, 3))
    state = rule.make(key, net, (4,))
    state = state._replace(matrices=(params[1]["weight"].T,))
    got = bp.backprop(net, bp.squared_error, rule=rule)(params, x, targets, rule_state=state)
    chex.assert_trees_all_equal(got, bp.backprop(net, bp.squared_error)(params, x, targets))


# Feedback within the last block changes what stands before it there.
LAST_LAYER = {"exact", "random_feedback", "random_feedback for some", "direct_feedback"}


@pytest.mark.parametrize("name", sorted(LAST_LAYER))
@pytest.mark.parametrize("blocks", [VECTORS, BLOCKS["positions"]], ids=["vectors", "positions"])
def test_the_last_layers_gradient_is_exact_and_others_are_not(name, blocks, key):
    rule = RULES[name](*blocks.parts)
    net, params, rule_state, x, targets = problem(blocks, rule, key)
    how = {"rule_state": rule_state, "rule_key": key}
    _, got = bp.backprop(net, bp.squared_error, rule=rule)(params, x, targets, **how)
    _, exact = bp.backprop(net, bp.squared_error)(params, x, targets)
    chex.assert_trees_all_equal(got[-1], exact[-1])
    if name != "exact":
        assert angle(got[0][0]["weight"], exact[0][0]["weight"]) > 1


def test_dx_of_direct_feedback_is_that_of_the_first_block(key):
    rule = bp.direct_feedback(*VECTORS.parts)
    net, params, state, x, _ = problem(VECTORS, rule, key)
    y, cache = net.forward(params, x)
    dx, _ = net.backward(rule.choose(state, params), cache, y)
    want, _ = VECTORS.parts[0].backward(params[0], cache[0], y @ state.matrices[0])
    assert_close(dx, want)


def test_direct_feedback_nests_and_stands_inside_a_chain(key):
    """A block with routes of its own, in the middle of a chain that is exact."""
    first, last = bp.chain(bp.dense(4), bp.tanh()), bp.dense(3)
    parts = [bp.chain(bp.dense(5), bp.tanh()), bp.chain(bp.dense(6), bp.tanh()), bp.dense(4)]
    net = bp.chain(first, bp.chain(*parts), last)
    inner = bp.direct_feedback(*parts)
    nested = bp.direct_feedback(
        first, bp.chain(*parts), last, rules=[bp.exact(), inner, bp.exact()]
    )
    params, _ = net.init(key, (2,))
    x, delta = normal(key, (N, 2)), normal(key, (N, 3))
    _, cache = net.forward(params, x)
    state = nested.make(key, net, (2,))
    _, signals = net.backward(nested.choose(state, params), cache, delta)
    outer, inside = state.matrices, state.blocks[1].matrices
    error = delta @ outer[1]  # at the outputs of the block that has routes of its own
    slopes = [1 - cache[1][i][1] ** 2 for i in (0, 1)]
    assert_close(signals[0][0]["bias"].deltas, (delta @ outer[0]) * (1 - cache[0][1] ** 2))
    assert_close(signals[1][0][0]["bias"].deltas, (error @ inside[0]) * slopes[0])
    assert_close(signals[1][1][0]["bias"].deltas, (error @ inside[1]) * slopes[1])
    assert_close(signals[1][2]["bias"].deltas, error)

    tree = (params[0], inner.choose(state.blocks[1], params[1]), params[2])
    _, signals = net.backward(tree, cache, delta)
    assert_close(signals[1][2]["bias"].deltas, delta @ params[2]["weight"].T)
    _, want = first.backward(
        params[0],
        cache[0],
        parts[0].backward(params[1][0], cache[1][0], delta @ params[2]["weight"].T @ inside[0])[0],
    )
    assert_close(signals[0], want)


@every_rule
def test_making_a_rule_by_the_key_of_the_parameters_does_not_draw_them_again(make_rule, key):
    rule = make_rule(*VECTORS.parts)
    params, _ = NET.init(key, VECTORS.shape)
    tree = rule.choose(rule.make(key, NET, VECTORS.shape), params, key=key)
    trees = tree.parts if isinstance(tree, bp.Direct) else tree
    for (path, own), carrier in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(trees), strict=True
    ):
        if carrier is not own:
            assert own.ndim == 2, path
            assert angle(own, carrier) > 5


@every_rule_thoroughly
def test_a_rule_is_pure_and_jit_compiles_and_keeps_its_trees(make_rule, key):
    blocks = BLOCKS["positions that end"]
    rule = make_rule(*blocks.parts)
    net, params, state, *_ = problem(blocks, rule, key)
    tree = rule.choose(state, params, key=key)
    assert_close(jax.jit(rule.choose)(state, params, key=key), tree)
    like = tree.parts if isinstance(tree, bp.Direct) else tree
    chex.assert_trees_all_equal_shapes_and_dtypes(like, params)
    after = rule.update(state, params, move=lambda tree: optax.tree.scale(0.5, tree), key=key)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    made = jax.jit(lambda key: rule.make(key, net, blocks.shape))(key)
    assert_close(made, rule.make(key, net, blocks.shape))


# What the rules choose and become.


def weights(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 2]


def wide_problem(rule, key):
    net = bp.dense(300, bias_init=jax.nn.initializers.ones)
    params, _ = net.init(key, (200,))
    return net, params, rule.make(key, net, (200,))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_random_feedback_has_the_scale_of_the_forward_initialiser(scale, key):
    _, params, feedback = wide_problem(bp.random_feedback(scale=scale), key)
    # 60,000 numbers: their deviation has a relative one of 0.3 %.
    assert float(jnp.std(feedback["weight"])) == pytest.approx(scale / np.sqrt(200), rel=0.02)
    assert feedback["bias"] is None
    assert abs(angle(feedback["weight"], params["weight"]) - 90) < 2  # within 0.23 on average


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_direct_feedback_has_the_scale_of_a_dense_layer_that_wide(scale, key):
    blocks = bp.dense(400), bp.dense(400), bp.dense(100)
    rule = bp.direct_feedback(*blocks, scale=scale, rules=[bp.random_feedback()] * 3)
    state = rule.make(key, bp.chain(*blocks), (400,))
    first, second = state.matrices
    assert first.shape == second.shape == (100, 400)
    for matrix in state.matrices:  # 40,000 numbers: their deviation has a relative one of 0.4 %
        assert float(jnp.std(matrix)) == pytest.approx(scale / np.sqrt(400), rel=0.02)
    assert abs(angle(first, second) - 90) < 2
    inside = [block["weight"] for block in state.blocks[:2]]
    assert abs(angle(*inside) - 90) < 2


def test_where_chooses_by_path_and_by_leaf(key):
    rule = bp.random_feedback(where=lambda path, leaf: path == "1.0.weight" or leaf.shape == (3,))
    _, params, feedback, *_ = problem(VECTORS, rule, key)
    tree = rule.choose(feedback, params)
    own = [a is b for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True)]
    paths = [jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in
             jax.tree.leaves_with_path(params)]  # fmt: skip
    assert {p for p, same in zip(paths, own, strict=True) if not same} == {
        "1.0.weight", "2.0.bias",
    }  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("magnitudes", ["uniform", "fixed", "batchwise"])
def test_sign_symmetry_has_the_signs_of_the_weights_and_magnitudes_of_its_own(
    magnitudes, scale, key
):
    rule = bp.sign_symmetric(magnitudes, scale=scale)
    _, params, state = wide_problem(rule, key)
    params["weight"] = params["weight"].at[0].set(0)
    other = jax.tree.map(lambda w: 2 * w, params)
    first, second = jax.random.split(key)
    tree = rule.choose(state, params, key=first)
    w, b = params["weight"], tree["weight"]
    assert tree["bias"] is params["bias"]
    assert_close(jnp.sign(b), jnp.sign(w))
    s = scale / np.sqrt(200)
    assert float(jnp.sqrt(jnp.mean(b[1:] ** 2))) == pytest.approx(s, rel=0.02)
    mean = {"uniform": s}.get(magnitudes, s * np.sqrt(2 / np.pi))  # of |normal numbers|
    assert float(jnp.mean(jnp.abs(b[1:]))) == pytest.approx(mean, rel=0.02)
    # How large the weights are changes nothing, a key only what is drawn for each batch.
    again = rule.choose(state, other, key=second)["weight"]
    assert bool(jnp.all(again == b)) == (magnitudes != "batchwise")
    # Seen from outside, magnitudes know nothing of the weights'.
    correlation = np.corrcoef(np.abs(np.ravel(w[1:])), np.abs(np.ravel(b[1:])))[0, 1]
    assert magnitudes == "uniform" or abs(correlation) < 0.02


# (optimizer, by how much B - W shrinks in a step), lr 0.1 and decay 0.2.
DECAYS = {
    "sgd": (optax.chain(optax.add_decayed_weights(0.2), optax.sgd(0.1)), 0.98),
    "sgd without decay": (optax.sgd(0.1), 1.0),
    "momentum, decay behind it": (
        optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.2), optax.scale(-0.1)), 0.98,
    ),
    "adamw": (optax.adamw(0.1, weight_decay=0.2), 0.98),
    "lion": (optax.lion(0.1, weight_decay=0.2), 0.98),
    "a schedule": (optax.adamw(optax.constant_schedule(0.1), weight_decay=0.2), 0.98),
    "clipped": (
        optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.1, weight_decay=0.2)), 0.98,
    ),
    "decay of matrices alone": (
        optax.adamw(0.1, weight_decay=0.2, mask=lambda p: jax.tree.map(lambda w: w.ndim > 1, p)),
        0.98,
    ),
}  # fmt: skip


@pytest.mark.usefixtures("standard_promotion")
@every("case", DECAYS, soon={"sgd", "momentum, decay behind it", "clipped"})
@every("inside", {"": False, "inside direct feedback": True}, soon={"inside direct feedback"})
def test_kolen_pollacks_difference_shrinks_at_the_rate_of_the_decay(inside, case, key):
    optimizer, rate = case
    rule = bp.kolen_pollack()
    if inside:
        rule = bp.direct_feedback(*VECTORS.parts, rules=[rule] * 3)
    net, _, _, x, targets = problem(VECTORS, rule, key)
    state = bp.init_state(net, optimizer, key, VECTORS.shape, rule=rule)
    step = bp.make_step(net, bp.squared_error, optimizer, rule=rule, donate=False)

    def apart(state):
        feedback = state.rule_state.blocks if inside else state.rule_state
        pairs = zip(weights(feedback), weights(state.params), strict=True)
        return [b - w for b, w in pairs]

    start = state
    for _ in range(5):
        state, _ = step(state, x, targets)
    assert_close(apart(state), [rate**5 * d for d in apart(start)])
    # That both have moved, and not by the decay alone.
    moved = zip(weights(state.params), weights(start.params), strict=True)
    assert all(angle(new, old) > 1 for new, old in moved)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
        optax.lamb(0.01, weight_decay=0.1),
        late(optax.MultiSteps(optax.adamw(0.1, weight_decay=0.1), 2)),
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
        late(optax.lbfgs()),
    ],
    ids=["nesterov", "coupled decay", "lamb", "accumulated", "plateau", "lbfgs"],
)
def test_kolen_pollack_lowers_the_loss_with_any_optimizer(optimizer, key):
    rule = bp.kolen_pollack()
    net, _, _, x, targets = problem(VECTORS, rule, key)
    state = bp.init_state(net, optimizer, key, VECTORS.shape, rule=rule)
    step = bp.make_step(net, bp.squared_error, optimizer, rule=rule)
    losses = []
    for _ in range(20):
        state, record = step(state, x, targets)
        losses.append(float(record["loss"]))
    assert losses[-1] < losses[0]
    assert all(bool(jnp.all(jnp.isfinite(b))) for b in weights(state.rule_state))


def test_a_mirror_phase_is_the_mean_of_noise_times_its_answer(key):
    """(B' - (1 - rate) B) W^-1 / rate = xi^T xi / M: symmetric, positive, about the identity."""
    rule, net = bp.weight_mirror(0.3, examples=500), bp.dense(4)
    params, _ = net.init(key, (4,))
    state = rule.make(key, net, (4,))
    after = rule.update(state, params, move=None, key=key)
    b, moved = state.feedback["weight"], after.feedback["weight"]
    moment = (moved - 0.7 * b) @ jnp.linalg.inv(params["weight"]) / 0.3
    assert_close(moment, moment.T)
    # Variances of 500 normal numbers scatter by 0.063; 0.3 is nearly five of that.
    assert float(jnp.max(jnp.abs(moment - jnp.eye(4)))) < 0.3
    assert float(jnp.max(jnp.abs(moment - jnp.eye(4)))) > 1e-3  # drawn, not transported
    other = rule.update(state, params, move=None, key=jax.random.fold_in(key, 1))
    assert not np.array_equal(other.feedback["weight"], moved)


def test_mirror_phases_alternate_with_learning(key):
    rule, net = bp.weight_mirror(0.3, every=3), bp.dense(4)
    params, _ = net.init(key, (4,))
    state, moved = rule.make(key, net, (4,)), []
    update = jax.jit(functools.partial(rule.update, move=None))
    for _ in range(7):
        after = update(state, params, key=key)
        moved.append(not np.array_equal(after.feedback["weight"], state.feedback["weight"]))
        state = after
    assert moved == [False, False, True, False, False, True, False]


@pytest.mark.usefixtures("standard_promotion")
def test_weight_mirrors_come_to_the_weights_while_these_learn(key):
    rule = bp.weight_mirror(0.1, examples=32)
    net, _, _, x, targets = problem(VECTORS, rule, key)
    state = bp.init_state(net, optax.sgd(0.02), key, VECTORS.shape, rule=rule)
    step = bp.make_step(net, bp.squared_error, optax.sgd(0.02), rule=rule, donate=False)

    def angles(state):
        pairs = zip(weights(state.rule_state), weights(state.params), strict=True)
        return [float(angle(b, w)) for b, w in pairs]

    before = angles(state)
    for _ in range(60):
        state, _ = step(state, x, targets)
    # Over 20 seeds, at the start at least 60.8 degrees, after 60 steps at most 9.2.
    assert min(before) > 40
    assert max(angles(state)) < 15


@pytest.mark.usefixtures("standard_promotion")
@every_rule_thoroughly
def test_a_state_that_was_saved_goes_on_as_if_nothing_had_been(make_rule, tmp_path, key):
    rule, optimizer = make_rule(*VECTORS.parts), optax.adamw(0.01, weight_decay=0.1)
    net, _, _, x, targets = problem(VECTORS, rule, key)
    step = bp.make_step(net, bp.squared_error, optimizer, rule=rule, donate=False)
    start = bp.init_state(net, optimizer, key, VECTORS.shape, rule=rule)
    for _ in range(3):
        start, _ = step(start, x, targets)

    arrays = start._replace(key=jax.random.key_data(start.key))
    leaves, structure = jax.tree.flatten(arrays)
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz") as saved:
        restored = structure.unflatten([jnp.asarray(saved[name]) for name in saved.files])
    restored = restored._replace(key=jax.random.wrap_key_data(restored.key))

    for _ in range(3):
        start, _ = step(start, x, targets)
        restored, _ = step(restored, x, targets)
    chex.assert_trees_all_equal(restored, start)


@pytest.mark.usefixtures("standard_promotion")
@every_rule_thoroughly
def test_no_rule_traces_again(make_rule, key):
    rule = make_rule(*VECTORS.parts)
    net, _, _, x, targets = problem(VECTORS, rule, key)
    chex.clear_trace_counter()
    net = net._replace(forward=chex.assert_max_traces(net.forward, n=1))
    rule = rule._replace(
        choose=chex.assert_max_traces(rule.choose, n=1),
        update=chex.assert_max_traces(rule.update, n=1),
    )
    state = bp.init_state(net, optax.sgd(0.1), key, VECTORS.shape, rule=rule)
    step = bp.make_step(net, bp.squared_error, optax.sgd(0.1), rule=rule)
    for _ in range(3):
        state, _ = step(state, x, targets)


@pytest.mark.usefixtures("standard_promotion")
def test_a_rule_does_not_change_the_parameters_at_the_start(key):
    make = lambda rule: bp.init_state(NET, optax.sgd(0.1), key, (4,), rule=rule).params  # noqa: E731
    chex.assert_trees_all_equal(make(bp.random_feedback()), make(bp.exact()))


@pytest.mark.usefixtures("standard_promotion")
def test_batchwise_magnitudes_and_mirrors_draw_anew_at_each_step(key):
    """The learning rate is zero: what is drawn can alone make two steps differ."""
    rule = bp.sign_symmetric("batchwise")
    _, _, _, x, targets = problem(VECTORS, rule, key)
    read = {"size": lambda signal: jnp.sum(signal.deltas**2)}
    state = bp.init_state(NET, optax.sgd(0.0), key, (4,), rule=rule)
    step = bp.make_step(NET, bp.squared_error, optax.sgd(0.0), rule=rule, read=read)
    state, first = step(state, x, targets)
    state, second = step(state, x, targets)
    assert float(first["size"][0][0]["bias"]) != float(second["size"][0][0]["bias"])

    rule = bp.weight_mirror(1.0)
    state = bp.init_state(NET, optax.sgd(0.0), key, (4,), rule=rule)
    step = bp.make_step(NET, bp.squared_error, optax.sgd(0.0), rule=rule, donate=False)
    first, _ = step(state, x, targets)
    second, _ = step(first, x, targets)
    assert not np.array_equal(weights(first.rule_state)[0], weights(second.rule_state)[0])


@pytest.mark.usefixtures("standard_promotion")
def test_a_rule_is_made_by_a_key_of_its_own_and_updated_with_the_new_parameters(key):
    def make(key, net, shape):
        return net.init(key, shape)[0]

    def update(state, params, *, move, key):
        del state, move, key
        return jax.tree.map(jnp.copy, params)

    def choose(state, params, *, key=None):
        return params

    rule = bp.Rule("follower", make, choose, update)
    _, _, _, x, targets = problem(VECTORS, bp.exact(), key)
    state = bp.init_state(NET, optax.sgd(0.1), key, (4,), rule=rule)
    for b, w in zip(weights(state.rule_state), weights(state.params), strict=True):
        assert angle(b, w) > 5
    state, _ = bp.make_step(NET, bp.squared_error, optax.sgd(0.1), rule=rule)(state, x, targets)
    chex.assert_trees_all_equal(state.rule_state, state.params)


def noisy(deviation):
    def choose(state, params, *, key):
        noise = optax.tree.random_like(key, params)
        return optax.tree.add_scale(params, deviation, noise)

    return bp.exact()._replace(name="noisy", choose=choose)


@pytest.mark.usefixtures("standard_promotion")
def test_a_rule_of_ones_own_trains(key):
    run = bp.fit(
        NET,
        bp.squared_error,
        optax.sgd(0.05),
        (jnp.ones((8, 4)) * jnp.arange(8)[:, None] / 8, jnp.ones((8, 3))),
        key=key,
        rule=noisy(0.1),
        epochs=5,
        batch_size=4,
    )
    assert run.records[-1]["loss"] < run.records[0]["loss"]


@pytest.mark.usefixtures("standard_promotion")
@some_rules
def test_fit_trains_by_a_rule_and_goes_on_from_its_state(make_rule, key):
    rule = make_rule(*VECTORS.parts)
    net, _, _, x, targets = problem(VECTORS, rule, key)
    how = {"rule": rule, "batch_size": 2, "read": {"grads_by_rule": bp.mean}}

    def fit(epochs, **start):
        return bp.fit(
            net, bp.squared_error, optax.sgd(0.05), (x, targets), epochs=epochs, **start, **how
        )

    whole = fit(4, key=key)
    half = fit(2, key=key)
    rest = fit(2, state=half.state)
    assert_close(rest.state._replace(key=None), whole.state._replace(key=None))
    assert whole.records[-1]["loss"] < whole.records[0]["loss"]


def test_one_block_of_direct_feedback_is_exact(key):
    block = bp.chain(bp.dense(4), bp.tanh(), bp.dense(3))
    net, rule = bp.chain(block), bp.direct_feedback(block)
    params, _ = net.init(key, (4,))
    batch = normal(key, (N, 4)), jnp.ones((N, 3))
    got = bp.backprop(net, bp.squared_error, rule=rule)(
        params, *batch, rule_state=rule.make(key, net, (4,))
    )
    chex.assert_trees_all_equal(got, bp.backprop(net, bp.squared_error)(params, *batch))


@pytest.mark.parametrize("dtype", [late(jnp.float16), jnp.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_keeps_the_dtype_of_the_parameters_and_its_own_scale_in_it(name, dtype, key):
    """By scales that are numpy's, of which the squares are not numbers of 16 bits."""
    scale = np.float64(1e-3)
    blocks = bp.chain(bp.dense(5, dtype=dtype), bp.tanh()), bp.dense(40, dtype=dtype)
    rule = {
        "random_feedback": bp.random_feedback(scale=scale),
        "sign_symmetric, uniform": bp.sign_symmetric(scale=scale),
        "sign_symmetric, fixed": bp.sign_symmetric("fixed", scale=scale),
        "sign_symmetric, batchwise": bp.sign_symmetric("batchwise", scale=scale),
        "weight_mirror": bp.weight_mirror(np.float64(1.0), examples=70_000),
        "direct_feedback": bp.direct_feedback(*blocks, scale=scale),
    }.get(name) or RULES[name](*blocks)
    net = bp.chain(*blocks)
    params, _ = net.init(key, (30,))
    state = rule.make(key, net, (30,))
    state = rule.update(state, params, move=lambda tree: tree, key=key)
    tree = rule.choose(state, params, key=key)
    for leaf in jax.tree.leaves((state, tree)):
        assert leaf.dtype in (dtype, jnp.int32)
        assert bool(jnp.all(jnp.isfinite(leaf)))
    carriers = tree.matrices if name == "direct_feedback" else weights(tree)
    if name == "weight_mirror":  # of 70,000 examples the scatter is a hundredth
        for b, w in zip(carriers, weights(params), strict=True):
            assert angle(np.float64(b), np.float64(w)) < 5
    elif "symmetric" in name or name == "random_feedback":
        size = float(jnp.sqrt(jnp.mean(jnp.square(carriers[1].astype(float)))))
        assert size == pytest.approx(1e-3 / np.sqrt(5), rel=0.25)  # of 200 numbers


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("train", ["arrays", "batches"])
def test_a_state_of_the_rule_that_is_not_finite_is_found_when_it_becomes_so(train, key):
    def update(state, params, *, move, key):
        return state * 1e150

    rule = bp.Rule("explode", lambda *_: jnp.ones(()), lambda s, params, **_: params, update)
    data = jnp.ones((4, 4)), jnp.ones((4, 3))
    with pytest.raises(bp.NonFiniteError, match="came from the update of explode") as raised:
        bp.fit(
            NET, bp.squared_error, optax.sgd(0.01), data if train == "arrays" else [data],
            key=key, rule=rule, epochs=4,
        )  # fmt: skip
    assert (raised.value.epoch, raised.value.step) == (3, 1)
    assert float(raised.value.state.rule_state) == pytest.approx(1e300)


@pytest.mark.usefixtures("standard_promotion")
def test_what_a_rule_blows_up_is_found_in_the_backward_pass(key):
    blocks = bp.chain(bp.dense(4), bp.tanh()), bp.dense(3)
    rule = bp.random_feedback(scale=1e308)
    data = 1e3 * jnp.ones((4, 4)), 1e3 * jnp.ones((4, 3))
    with pytest.raises(bp.NonFiniteError) as raised:
        bp.fit(bp.chain(*blocks), bp.squared_error, optax.sgd(0.1), data, key=key, rule=rule)
    assert raised.value.place == "the backward pass, chain: part 2 (dense(3))"


# What is refused.

OTHER = bp.chain(bp.dense(2), bp.tanh())


@pytest.mark.parametrize(
    "rule",
    [
        bp.random_feedback(where=lambda path, leaf: path == "weights"),
        bp.sign_symmetric(where=lambda path, leaf: False),
        bp.kolen_pollack(where=lambda path, leaf: leaf.ndim == 3),
        bp.weight_mirror(where=lambda path, leaf: "kernel" in path),
    ],
    ids=lambda rule: rule.name,
)
def test_a_where_that_matches_nothing_is_refused(rule, key):
    message = r"where matches none of the parameters: 0\.bias \[2\], 0\.weight \[4, 2\]\."
    with pytest.raises(ValueError, match=message) as raised:
        rule.make(key, OTHER, (4,))
    assert str(raised.value).startswith(rule.name)


# Of feedforward layers, where those of `credit` are exact, and none remembers anything.
EXACT = {"exact", "rtrl", "snap1", "eprop"}


@pytest.mark.parametrize("name", [name for name in RULES if name not in EXACT])
def test_a_state_of_another_network_is_refused(name, key):
    rule = RULES[name](*VECTORS.parts)
    _, params, state, *_ = problem(VECTORS, rule, key)
    with pytest.raises(ValueError, match="got a state that is not its own"):
        rule.choose(state, OTHER.init(key, (4,))[0], key=key)
    with pytest.raises(ValueError, match=r"Make it for this rule and network, by init_state"):
        rule.choose((), params, key=key)


def test_a_matrix_of_another_shape_is_refused(key):
    rule = bp.random_feedback()
    _, params, state, *_ = problem(VECTORS, rule, key)
    state[1][0]["weight"] = jnp.ones((6, 4))
    with pytest.raises(
        ValueError, match=r"for 1\.0\.weight it has float64 \[6, 4\], not float64 \[6, 5\]"
    ):
        rule.choose(state, params)


def test_a_tree_of_another_structure_is_refused(key):
    _, params, _, x, _ = problem(VECTORS, bp.exact(), key)
    y, cache = NET.forward(params, x)
    with pytest.raises(bp.LayerError, match="got parameters with 2 entries; it takes a tuple of 3"):
        NET.backward(params[:2], cache, y)
    two = (jnp.ones((3, 6)), jnp.ones((3, 5)))
    with pytest.raises(bp.LayerError, match="got 1 direct matrices; it takes 2, one for each part"):
        NET.backward(bp.Direct(params, two[:1]), cache, y)
    with pytest.raises(
        bp.LayerError,
        match=r"part 1 \(chain\(dense\(6\), tanh\)\) got a direct matrix of shape \[3, 5\]; to its "
        r"outputs, \[3, 6\], from an error \[3, 3\], it takes \[3, 6\]\.",
    ):
        NET.backward(bp.Direct(params, (two[1], two[1])), cache, y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bp.sign_symmetric("random"), "magnitudes is 'random'; it takes one of uniform, "),
        (lambda: bp.weight_mirror(0.0), r"rate is 0.0, expected a number in \(0, 1\]"),
        (
            lambda: bp.weight_mirror(2, examples=0, every=1.5),
            "rate is 2, .*; examples is 0, expected a positive integer; every is 1.5, expected",
        ),
        (
            lambda: bp.direct_feedback(OTHER, OTHER, rules=[bp.exact()]),
            "got 1 rules for 2 blocks; it takes a Rule for each",
        ),
        (
            lambda: bp.direct_feedback(OTHER, rules=[bp.exact]),
            "got 1 rules for 1 blocks; it takes a Rule for each",
        ),
        (bp.direct_feedback, "takes the blocks of a chain; got none"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_draws_needs_a_key(key):
    rule = bp.sign_symmetric("batchwise")
    with pytest.raises(ValueError, match=r"draws magnitudes and needs a random key"):
        rule.choose(rule.make(key, OTHER, (4,)), OTHER.init(key, (4,))[0])
    rule = bp.weight_mirror()
    with pytest.raises(ValueError, match=r"draws noise and needs a random key"):
        rule.update(rule.make(key, OTHER, (4,)), OTHER.init(key, (4,))[0], move=None)


def test_direct_feedback_refuses_what_is_no_block_and_another_network(key):
    with pytest.raises(TypeError, match="chain: part 1 is a list of 1; it takes a Layer"):
        bp.direct_feedback([OTHER], OTHER)
    with pytest.raises(
        ValueError, match=r"the network is not the chain of the blocks: chain\(chain"
    ):
        bp.direct_feedback(*VECTORS.parts[:2]).make(key, NET, (4,))


@pytest.mark.parametrize(
    ("rule", "other"),
    [
        (bp.exact(), bp.random_feedback()),
        (bp.random_feedback(), bp.exact()),
        (bp.random_feedback(), bp.sign_symmetric()),
        (bp.sign_symmetric(), bp.random_feedback()),
        (bp.sign_symmetric("fixed"), bp.sign_symmetric("batchwise")),
        (bp.sign_symmetric("batchwise"), bp.sign_symmetric("fixed")),
        (bp.weight_mirror(), bp.kolen_pollack()),
        (bp.kolen_pollack(), bp.direct_feedback(*VECTORS.parts)),
        (bp.direct_feedback(*VECTORS.parts), bp.kolen_pollack()),
    ],
    ids=lambda rule: rule.name,
)
def test_the_state_of_another_rule_is_refused(rule, other, key):
    _, params, state, *_ = problem(VECTORS, other, key)
    with pytest.raises(ValueError, match=r"got a state that is not its own") as raised:
        rule.choose(state, params, key=key)
    assert str(raised.value).startswith(rule.name)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("value_and_grad", lambda rule: bp.value_and_grad(NET, bp.squared_error, rule=rule)),
        ("backprop", lambda rule: bp.backprop(NET, bp.squared_error, rule=rule)),
        ("alignment", lambda rule: bp.alignment(NET, bp.squared_error, rule=rule)),
        (
            "reweighted",
            lambda rule: bp.reweighted(NET, bp.squared_error, bp.clip_weights(1.0), rule=rule),
        ),
        (
            "init_state",
            lambda rule: bp.init_state(NET, optax.sgd(0.1), jax.random.key(0), (4,), rule=rule),
        ),
    ],
)
def test_a_rule_that_was_not_called_is_refused(name, make):
    with pytest.raises(ValueError, match=rf"{name}: rule is function, expected a Rule, such as"):
        make(bp.random_feedback)


def test_fit_refuses_what_is_no_rule(key):
    with pytest.raises(ValueError, match="rule is function, expected a Rule, such as exact"):
        bp.fit(
            NET, bp.squared_error, optax.sgd(0.1), (jnp.ones((2, 4)), jnp.ones((2, 3))),
            key=key, rule=bp.exact,
        )  # fmt: skip
