"""Layers made of one: a stack is its layers one by one, whatever is asked of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import READINGS, N, every, late, normal, swept
from oracles import assert_close, in_dtype, layer_vjp

import jaxbp as bp
from jaxbp.signals.stacked import is_stacked, map_layers, stack_axes, sum_leaves

L = 3


def block():
    return bp.residual(bp.layer_norm(), bp.dense(5), bp.tanh(), bp.dropout(0.3), bp.dense(4))


def two_ways(key, shape=(2, 4)):
    """A network with a stack, the same with its layers in a chain, parameters of both, a batch."""
    stacked = bp.chain(bp.dense(4), bp.stack(block(), L), bp.dense(2))
    chained = bp.chain(bp.dense(4), bp.chain(*[block()] * L), bp.dense(2))
    params, out_shape = stacked.init(key, shape)
    params = optax.tree.add_scale(params, 0.3, optax.tree.random_like(key, params))
    x = normal(key, (N, *shape))
    targets = normal(jax.random.fold_in(key, 1), (N, *out_shape))
    return stacked, chained, params, x, targets


def unstacked(tree):
    """The same tree with a tuple of the layers in place of every stack."""

    def layers(node):
        if not is_stacked(node):
            return node
        n = len(jax.tree.leaves(node)[0])
        return tuple(
            jax.tree.map(lambda a, i=i: jnp.asarray(np.asarray(a)[i]), node.layers)
            for i in range(n)
        )

    return jax.tree.map(layers, tree, is_leaf=is_stacked)


def test_a_stack_initialises_each_layer_by_a_key_of_its_own(key):
    params, shape = bp.stack(bp.dense(4), L).init(key, (4,))
    keys = jax.random.split(key, L)
    assert_close(unstacked(params), tuple(bp.dense(4).init(k, (4,))[0] for k in keys))
    assert shape == (4,)


def test_a_stack_is_its_layers_one_by_one(key):
    stacked, chained, params, x, dy = two_ways(key)
    for draw_key in (None, key):
        *got, signals = swept(stacked, params, x, dy, key=draw_key, read=bp.keep)
        want = swept(chained, unstacked(params), x, dy, key=draw_key, read=bp.keep)
        assert_close((*got, unstacked(signals)), want)


ERRORS = {
    "the loss's": None,
    "ggn_columns": bp.ggn_columns,
    "jacobian_rows": bp.jacobian_rows,
}


@every("error", ERRORS, soon={"ggn_columns"})
def test_every_reading_reads_each_layer(error, key):
    """Of columns, those that are not summed stand before the layers."""
    stacked, chained, params, x, targets = two_ways(key)
    # With a Hessian that differs between examples: a variance of zero would be all rounding, as
    # that of the Jacobian's rows is at the outputs.
    loss, targets = bp.softmax_cross_entropy, jax.nn.softmax(targets)
    nothing = {"variance"} if error is bp.jacobian_rows else set()
    readings = {name: read for name, read in READINGS.items() if name not in nothing}

    def answers(net, params):
        sweep = bp.backprop(net, loss, read=readings, error=error)
        return jax.jit(sweep)(params, x, targets, key=key, error_key=key)[1]

    got, want = answers(stacked, params), answers(chained, unstacked(params))
    if error is not None:
        columns = set(readings) - {"diagonal", "per_example_diagonal", "kronecker"}
        for name in columns:
            got[name] = jax.tree.map(
                lambda a, axes: jnp.moveaxis(a, 0, axes), got[name], stack_axes(got[name])
            )
    assert_close(unstacked(got), want)


def test_what_is_read_after_the_sweep_is_what_is_read_inside(key):
    stacked, _, params, x, targets = two_ways(key)

    @jax.jit
    def both_ways(params, x, targets):
        _, inside = bp.backprop(stacked, bp.squared_error, read=READINGS)(params, x, targets)
        _, signals = bp.backprop(stacked, bp.squared_error, read=bp.keep)(params, x, targets)
        return inside, {name: bp.map_signals(read, signals) for name, read in READINGS.items()}

    assert_close(*both_ways(params, x, targets))


def test_norms_join_the_layers_of_a_stack_and_tell_them_apart(key):
    stacked, chained, params, x, targets = two_ways(key)

    def answer(net, params):
        sweep = jax.jit(bp.backprop(net, bp.squared_error, read=bp.sq_norms))
        return sweep(params, x, targets)[1]

    squares, want = answer(stacked, params), answer(chained, unstacked(params))
    assert_close(bp.example_norms(squares), bp.example_norms(want))
    assert_close(unstacked(bp.layer_norms(squares)), bp.layer_norms(want))


@pytest.mark.parametrize(
    "options",
    [{"sweeps": 1}, late({"sweeps": 2}), {"per_layer": True}],
    ids=["one", "two", "per layer"],
)
def test_reweighted_sums(options, key):
    stacked, chained, params, x, targets = two_ways(key)

    def answer(net, params):
        clipped = bp.reweighted(net, bp.squared_error, bp.clip_weights(0.5), **options)
        return jax.jit(clipped)(params, x, targets, key=key)

    assert_close(unstacked(answer(stacked, params)), answer(chained, unstacked(params)))


def test_weights_per_layer_may_be_any_function_of_its_norms(key):
    """Ranks among the examples, and not among those of all layers."""
    stacked, _, params, x, targets = two_ways(key)

    def ranks(norms):
        assert norms.shape == (N,)
        return jnp.argsort(norms).astype(float)

    reweighted = jax.jit(bp.reweighted(stacked, bp.squared_error, ranks, per_layer=True))
    answer = reweighted(params, x, targets)
    for weights in jax.tree.leaves(unstacked(answer.weights)):
        assert sorted(np.asarray(weights).tolist()) == [0, 1, 2]


def test_inner_products_sum_over_the_layers(key):
    stacked, chained, params, x, targets = two_ways(key)
    direction = optax.tree.random_like(key, params)

    @functools.partial(jax.jit, static_argnums=0)
    def answer(net, params, direction):
        read = {"signals": bp.keep, "grads": bp.mean}
        _, got = bp.backprop(net, bp.squared_error, read=read)(params, x, targets)
        _, others = bp.backprop(net, bp.squared_error, read=bp.keep)(params, x[1:], targets[1:])
        return (
            bp.gram(got["signals"]),
            bp.gram(got["signals"], others),
            bp.directional_derivatives(got["signals"], direction),
            bp.gradient_noise(got["signals"], got["grads"]),
        )

    got = answer(stacked, params, direction)
    assert_close(got, answer(chained, unstacked(params), unstacked(direction)))


def test_products_of_curvature(key):
    stacked, chained, params, x, targets = two_ways(key)
    vector = optax.tree.random_like(key, params)
    for product in (bp.hessian_vector_product, bp.gauss_newton_vector_product):
        got = jax.jit(product(stacked, bp.squared_error))(params, x, targets, vector, key=key)
        want = jax.jit(product(chained, bp.squared_error))(
            unstacked(params), x, targets, unstacked(vector), key=key
        )
        assert_close(unstacked(got), want)


def test_kernels(key):
    stacked, chained, params, x, _ = two_ways(key)
    for kernel in (bp.neural_tangent_kernel, bp.neural_tangent_kernel_per_class):
        got = jax.jit(kernel(stacked))(params, x, x[:2])
        assert_close(got, jax.jit(kernel(chained))(unstacked(params), x, x[:2]))


RULES = {
    "random_feedback": bp.random_feedback(),
    "sign_symmetric, uniform": bp.sign_symmetric(),
    "sign_symmetric, fixed": bp.sign_symmetric("fixed"),
    "sign_symmetric, batchwise": bp.sign_symmetric("batchwise"),
    "kolen_pollack": bp.kolen_pollack(),
    "weight_mirror": bp.weight_mirror(0.2),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_rules_have_each_layer_by_itself(rule, key):
    """By the same state as of a chain where that says it all, and by what it replaces."""
    stacked, chained, params, x, targets = two_ways(key)
    state = rule.make(key, stacked, x.shape[1:])
    choose = jax.jit(rule.choose)
    tree = choose(state, params, key=key)
    for path, changed in jax.tree.leaves_with_path(
        jax.tree.map(lambda a, b: np.any(np.asarray(a) != np.asarray(b)), tree, params)
    ):
        # Matrices alone, though a gain of three layers is [L, O].
        assert bool(changed) == ("weight" in jax.tree_util.keystr(path)), path
    if "batchwise" not in rule.name:
        assert_close(unstacked(tree), choose(unstacked(state), unstacked(params), key=key))
    sweep = bp.backprop(stacked, bp.squared_error, rule=rule)
    _, grads = jax.jit(sweep)(params, x, targets, rule_state=state, rule_key=key)
    delta = jax.jit(chained.forward)(unstacked(params), x)[0] - targets
    *_, want = swept(chained, unstacked(params), x, delta, tree=unstacked(tree), read=bp.mean)
    assert_close(unstacked(grads), want)

    def move(tree):
        return jax.tree.map(lambda w: 0.9 * w, tree)

    after = jax.jit(functools.partial(rule.update, move=move))(state, params, key=key)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    if rule.name == "kolen_pollack":
        assert_close(after, move(state))


def test_a_mirror_draws_each_layer_to_its_own_weights(key):
    """On average over phases, to the root of what noise is left."""
    net = bp.stack(bp.dense(3), L)
    params, _ = net.init(key, (3,))
    rule = bp.weight_mirror(0.5, examples=20_000)
    state = rule.make(key, net, (3,))
    update = jax.jit(functools.partial(rule.update, move=None))
    for own in jax.random.split(key, 12):
        state = update(state, params, key=own)
    apart = state.feedback.layers["weight"] - params.layers["weight"]
    assert float(jnp.max(jnp.abs(apart))) < 0.05


def test_uniform_magnitudes_are_one_number_for_each_layer(key):
    net = bp.stack(bp.dense(3), L)
    state = bp.sign_symmetric().make(key, net, (3,))
    assert state.magnitudes.layers["weight"].shape == (L,)
    assert len(set(np.asarray(state.magnitudes.layers["weight"]).tolist())) == L


def test_random_magnitudes_are_drawn_for_each_layer(key):
    net = bp.stack(bp.dense(3), L)
    params, _ = net.init(key, (3,))
    for magnitudes in ("fixed", "batchwise"):
        rule = bp.sign_symmetric(magnitudes)
        tree = rule.choose(rule.make(key, net, (3,)), params, key=key)
        first, second, _ = jnp.abs(tree.layers["weight"])
        scale = jnp.linalg.norm(first) / jnp.linalg.norm(second)
        assert not np.allclose(first, scale * second)


def test_the_where_of_a_rule_sees_one_layer(key):
    seen = {}

    def where(path, leaf):
        seen[path] = leaf.shape
        return leaf.ndim == 2

    stacked, *_ = two_ways(key)
    bp.random_feedback(where=where).make(key, stacked, (2, 4))
    assert seen["1.layers.1.weight"] == (4, 5)
    assert seen["1.layers.0.gain"] == (4,)


def test_a_state_of_another_stack_is_refused(key):
    rule, net = bp.random_feedback(), bp.stack(bp.dense(3), L)
    state = rule.make(key, bp.stack(bp.dense(3), L + 1), (3,))
    with pytest.raises(ValueError, match=r"for layers\.weight it has .* \[4, 3, 3\], not .*\[3, 3"):
        rule.choose(state, net.init(key, (3,))[0])


def test_angles_of_each_layer(key):
    stacked, chained, params, x, targets = two_ways(key)
    rule = bp.random_feedback()
    state = rule.make(key, stacked, x.shape[1:])

    def angles(net, params, state):
        measure = jax.jit(bp.alignment(net, bp.squared_error, rule=rule))
        return measure(params, x, targets, rule_state=state)

    want = angles(chained, unstacked(params), unstacked(state))
    assert_close(unstacked(angles(stacked, params, state)), want)


def test_kfac_has_the_factors_of_each_layer(key, standard_promotion):
    layer = bp.chain(bp.dense(3), bp.tanh())
    stacked = bp.chain(bp.stack(layer, L), bp.dense(2))
    chained = bp.chain(bp.chain(*[layer] * L), bp.dense(2))
    params, _ = stacked.init(key, (3,))
    x, targets = normal(key, (5, 3)), jnp.zeros((5, 2))
    optimizer = bp.scale_by_kfac()

    @functools.partial(jax.jit, static_argnums=0)
    def update(net, params):
        make = bp.kfac_factors(net, bp.squared_error, error=bp.ggn_columns)
        factors = make(params, x, targets, key=key)
        _, grads = bp.value_and_grad(net, bp.squared_error)(params, x, targets)
        return optimizer.update(grads, optimizer.init(params), params, factors=factors)

    assert_close(unstacked(update(stacked, params)), update(chained, unstacked(params)))


def test_a_network_with_a_stack_is_trained(key, standard_promotion):
    stacked, _, _, x, targets = two_ways(key)
    loss, rule = bp.squared_error, bp.kolen_pollack()
    state = bp.init_state(stacked, optax.adam(1e-2), key, x.shape[1:], rule=rule)
    step = bp.make_step(stacked, loss, optax.adam(1e-2), rule=rule, read={"norms": bp.sq_norms})
    losses = []
    for _ in range(3):
        state, record = step(state, x, targets)
        losses.append(float(record["loss"]))
    assert losses[2] < losses[0]
    assert record["norms"][1].layers[1]["weight"].shape == (L, N)


def test_trees_of_stacks_in_stacks():
    inner = bp.Stacked({"a": jnp.arange(12.0).reshape(2, 3, 2)})
    tree = (jnp.ones(2), bp.Stacked((inner, jnp.ones((2, 2)))))
    assert stack_axes(tree) == (0, bp.Stacked((bp.Stacked({"a": 2}), 1)))
    assert_close(sum_leaves(tree), jnp.array([1.0, 1]) + jnp.array([30.0, 36]) + 2)
    doubled = map_layers(lambda leaf: 2 * leaf.reshape(2), tree)
    assert_close(doubled, jax.tree.map(lambda leaf: 2 * leaf, tree))


def cost(function, *args):
    compiled = jax.jit(function).lower(*args).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def deep(wrap, n=8):
    """Gradient of a deep network whose caches are large beside its parameters; its arguments."""
    layer = bp.residual(bp.layer_norm(), bp.dense(64), bp.gelu(), bp.dense(16))
    net = bp.stack(wrap(layer), n)
    params = jax.eval_shape(lambda key: net.init(key, (16,))[0], jax.random.key(0))
    x = jax.ShapeDtypeStruct((512, 16), float)
    return bp.value_and_grad(net, bp.squared_error), params, x, x


def test_recomputing_a_stack_keeps_the_inputs_of_its_layers_alone():
    """Of [N, O] a layer without remat keeps seven: of O = 64 gelu's output and its derivative."""
    one = 512 * 16 * 8
    _, plain = cost(*deep(lambda layer: layer))
    _, lean = cost(*deep(bp.remat))
    assert 8 * 9 * one < plain
    assert lean < 8 * one + 22 * one
    # A layer more is its inputs more.
    _, deeper = cost(*deep(bp.remat, 9))
    assert deeper - lean < 1.2 * one


def test_what_layers_share_is_kept_once():
    """The outputs of relu are the inputs of the next layer: one array, not two."""
    net = bp.stack(bp.chain(bp.dense(16), bp.relu(), bp.dense(16), bp.relu()), 8)
    params = jax.eval_shape(lambda key: net.init(key, (16,))[0], jax.random.key(0))
    x = jax.ShapeDtypeStruct((512, 16), float)
    _, temporary = cost(bp.value_and_grad(net, bp.squared_error), params, x, x)
    # Of each layer the inputs and the outputs of both relus, and a few of the one at hand.
    assert temporary < (8 * 3 + 5) * 512 * 16 * 8


def test_the_program_of_a_stack_does_not_grow_with_its_depth():
    sizes = [str(jax.make_jaxpr(deep(bp.remat, n)[0])(*deep(bp.remat, n)[1:])) for n in (2, 40)]
    assert sizes[0].count("\n") == sizes[1].count("\n")


def test_recomputing_draws_the_same_numbers(key):
    layer = bp.chain(bp.dense(4), bp.dropout(0.5), bp.dense(3))
    params, _ = layer.init(key, (5,))
    x, dy = normal(key, (N, 5)), jnp.ones((N, 3))

    got = swept(bp.remat(layer), params, x, dy, key=key)
    assert_close(got, swept(layer, params, x, dy, key=key))


def test_recomputing_goes_forward_by_the_weights_and_back_by_the_tree(key):
    layer = bp.chain(bp.dense(4), bp.tanh(), bp.dense(3))
    params, _ = layer.init(key, (5,))
    tree = jax.tree.map(lambda p: p + 1, params)
    x, dy = normal(key, (N, 5)), jnp.ones((N, 3))
    _, kept = bp.remat(layer).forward(params, x)
    _, cache = layer.forward(params, x)
    got, want = bp.remat(layer).backward(tree, kept, dy), layer.backward(tree, cache, dy)
    assert_close(got, want)
    assert kept[0] is params


NARROW = bp.chain(bp.layer_norm(), bp.dense(32), bp.gelu(), bp.dense(8))


@pytest.mark.parametrize("compute", [jnp.bfloat16, jnp.float16])
def test_cast_is_within_the_error_of_its_numbers(compute, key):
    params, _ = NARROW.init(key, (16,))
    params, x, dy = in_dtype((params, normal(key, (64, 16)), normal(key, (64, 8))), jnp.float32)
    layer = bp.cast(NARROW, compute)
    got = swept(layer, params, x, dy)
    want = jax.jit(NARROW.forward)(params, x)[0], *layer_vjp(NARROW, params, x, dy)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.float32
        error = float(np.max(np.abs(np.subtract(a, b))) / np.max(np.abs(b)))
        assert 0 < error < 4 * float(jnp.finfo(compute).eps)


def test_what_is_cast_is_computed_in_its_numbers_and_summed_in_those_of_the_parameters(key):
    """Ones in 1 and the rest of 1,000 small: bfloat16 would lose them in the sum."""
    layer = bp.cast(bp.dense(1, use_bias=False))
    params = {"weight": jnp.ones((1, 1), jnp.float32)}
    x = jnp.full((4096, 1), 0.125, jnp.float32)
    _, cache = layer.forward(params, x)
    assert cache.dtype == jnp.bfloat16
    _, grads = layer.backward(params, cache, jnp.ones((4096, 1), jnp.float32), read=bp.total)
    assert_close(grads["weight"], jnp.full((1, 1), 512.0, jnp.float32))
    _, signals = layer.backward(params, cache, jnp.ones((4096, 1), jnp.float32))
    assert signals["weight"].inputs.dtype == signals["weight"].deltas.dtype == jnp.float32


def test_a_network_of_tokens_is_cast_to_the_numbers_of_its_parameters(key):
    net = bp.cast(bp.chain(bp.embedding(5, 4, dtype=jnp.float32), bp.tanh()))
    params, _ = net.init(key, (3,))
    y, dx, grads = swept(net, params, jnp.ones((2, 3), int), jnp.ones((2, 3, 4), jnp.float32))
    assert y.dtype == grads[0]["weight"].dtype == jnp.float32
    assert dx is None


def masked_network():
    """Two attending blocks in a stack, without the mask's shape anywhere but in the mask."""

    def make(mask):
        block = bp.residual(bp.layer_norm(), bp.attention(4, 2, mask=mask))
        return bp.chain(bp.dense(4), bp.stack(block, 2), bp.dense(3))

    return bp.masked(make), make


def test_a_masked_layer_is_the_layer_of_its_mask(key):
    net, make = masked_network()
    params, out_shape = net.init(key, ((5, 4), (5,)))
    assert out_shape == (5, 3)
    x, mask = normal(key, (2, 5, 4)), jnp.arange(5) < jnp.array([[3], [5]])
    dy = jnp.ones((2, 5, 3))
    got = swept(net, params, (x, mask), dy, read=bp.per_example)
    assert_close(got, swept(make(mask), params, x, dy, read=bp.per_example))
    # A mask that is false nowhere is none.
    got = swept(net, params, (x, jnp.ones_like(mask)), dy, read=bp.per_example)
    assert_close(got[0], swept(make(None), params, x, dy, read=bp.per_example)[0])


def test_what_is_padded_changes_nothing_and_learns_nothing(key):
    net, _ = masked_network()
    params, _ = net.init(key, ((5, 4), (5,)))
    x, mask = normal(key, (2, 5, 4)), jnp.arange(5) < jnp.array([[3], [5]])
    loss = bp.weighted(bp.squared_error)
    sweep = jax.jit(bp.backprop(net, loss, read=bp.per_example))
    targets = jnp.zeros((2, 5, 3)), mask.astype(float)

    def answers(padding):
        return sweep(params, (jnp.where(mask[..., None], x, padding), mask), targets)

    assert_close(answers(0.0), answers(1e6))
    # The first example is that of three positions.
    alone = jax.jit(bp.backprop(net, bp.squared_error, read=bp.per_example))
    values, grads = alone(params, (x[:1, :3], mask[:1, :3]), jnp.zeros((1, 3, 3)))
    got = answers(0.0)
    first = jax.tree.map(
        lambda g, axes: jnp.take(g, jnp.array([0]), axes), got[1], stack_axes(got[1])
    )
    assert_close((got[0][:1], first), (values, grads))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bp.stack(bp.relu, 2), TypeError, r"stack: part 1 is .*Call it: relu\(\)\?"),
        (lambda: bp.stack(bp.relu(), 0), ValueError, "stack: n is 0; it takes a positive integer"),
        (
            lambda: bp.stack(bp.dense(5), 2).init(jax.random.key(0), (6,)),
            bp.LayerError,
            r"stack\(dense\(5\), 2\) has an inner layer that maps \[6\] to \[5\]; a stack needs",
        ),
        (
            lambda: bp.stack(bp.dense(4), 2).init(jax.random.key(0), ()),
            bp.LayerError,
            r"^stack \(dense\(4\)\) got inputs of shape \[N\]",
        ),
        (
            lambda: bp.stack(bp.dense(4), 2).forward({"weight": 1}, jnp.ones((1, 4))),
            bp.LayerError,
            r"it takes Stacked, of arrays \[2, \.\.\.\]",
        ),
        (
            lambda: bp.stack(bp.dense(4), 2).forward(
                bp.stack(bp.dense(4), 3).init(jax.random.key(0), (4,))[0], jnp.ones((1, 4))
            ),
            bp.LayerError,
            r"parameters that are not its own: it takes Stacked, of arrays \[2",
        ),
        (
            lambda: bp.stack(bp.dense(4), 2).forward(
                bp.stack(bp.dense(4), 2).init(jax.random.key(0), (4,))[0], jnp.ones((1, 3))
            ),
            bp.LayerError,
            r"stack \(dense\(4\)\) got inputs of shape \[1, 3\]",
        ),
        (lambda: bp.remat(bp.relu), TypeError, r"remat: part 1 is .*relu\(\)\?"),
        (lambda: bp.cast(bp.relu), TypeError, r"cast: part 1 is .*relu\(\)\?"),
        (lambda: bp.cast(bp.relu(), int), TypeError, "compute is <class 'int'>; it takes a floa"),
        (lambda: bp.masked(lambda mask: 3), TypeError, "masked: part 1 is 3; it takes a Layer"),
        (
            lambda: bp.masked(lambda mask: bp.relu()).forward((), jnp.ones((3, 2))),
            bp.LayerError,
            r"masked\(relu\) got inputs that are not a pair, \(x, mask\)",
        ),
        (
            lambda: bp.total(bp.Stacked(bp.Bias(jnp.ones((2, 3, 4))))),
            TypeError,
            r"got Stacked.* or apply it to a tree by map_signals\(total, signals\)",
        ),
    ],
)
def test_what_is_wrong_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()


def noise():
    """A layer whose output is what it draws from its key, whatever its input."""

    def forward(params, x, *, key=None):
        del params
        return jax.random.normal(key, x.shape), x

    def backward(params, x, dy, *, read=bp.keep):
        del params, read
        return dy, ()

    return bp.Layer("noise", lambda key, shape: ((), shape), forward, backward)


def drawn(net, key):
    """What each part of a network draws, in order."""
    seen = []

    def forward(params, x, *, key=None):
        y, cache = noise().forward(params, x, key=key)
        jax.debug.callback(lambda y: seen.append(np.asarray(y)), y, ordered=True)
        return y, cache

    net = net(noise()._replace(forward=forward))
    params, _ = net.init(key, (4,))
    jax.block_until_ready(jax.jit(net.forward)(params, jnp.ones((2, 4)), key=key))
    jax.effects_barrier()
    return seen


every_composition = pytest.mark.parametrize(
    ("make", "draws"),
    [
        (lambda part: bp.chain(part, part, part), 3),
        (lambda part: bp.parallel(part, part, part), 3),
        (lambda part: bp.parallel(part, part, combine="concatenate"), 2),
        (lambda part: bp.gated(part, part), 2),
        (lambda part: bp.repeat(part, 3), 3),
        (lambda part: bp.stack(part, 3), 3),
        (lambda part: bp.residual(part, part), 2),
        (lambda part: bp.stack(bp.chain(part, bp.parallel(part, part)), 2), 6),
        (lambda part: bp.repeat(bp.gated(part, bp.chain(part, part)), 2), 6),
    ],
    ids=["chain", "parallel", "concatenated", "gated", "repeat", "stack", "residual", "nested",
         "nested gates"],
)  # fmt: skip


@every_composition
def test_every_part_draws_by_a_key_of_its_own(make, draws, key):
    seen = drawn(make, key)
    assert len(seen) == draws
    assert len({a.tobytes() for a in seen}) == draws


@every_composition
def test_every_part_is_initialised_by_a_key_of_its_own(make, draws, key):
    del draws
    part = noise()._replace(init=lambda key, shape: (jax.random.normal(key, (3,)), shape))
    params, _ = make(part).init(key, (4,))
    rows = np.concatenate([np.reshape(leaf, (-1, 3)) for leaf in jax.tree.leaves(params)])
    assert len(np.unique(rows, axis=0)) == len(rows)
