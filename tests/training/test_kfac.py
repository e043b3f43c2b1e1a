"""KFAC: an update against the inverse of the whole Kronecker product, and its place in the loop."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import late, normal, output_shape, swept
from oracles import assert_close

import jaxbp as bp

NET = bp.chain(bp.dense(4), bp.tanh(), bp.dense(3))
LOSS = bp.softmax_cross_entropy
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def batch(key):
    params, _ = NET.init(key, (5,))
    x, labels = normal(key, (8, 5)), jnp.arange(8) % 3
    _, grads = jax.jit(bp.value_and_grad(NET, LOSS))(params, x, labels)
    return params, x, labels, grads


@functools.cache
def compiled_factors(net, loss=LOSS, **options):
    return jax.jit(bp.kfac_factors(net, loss, **options))


def factors_of(params, x, labels, key, *, net=NET, **options):
    return compiled_factors(net, **options)(params, x, labels, key=key)


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
    got, state = jax.jit(kfac.update)(grads, kfac.init(params), params, factors=factors)
    for i in (0, 2):
        assert_close(got[i], solve(grads[i], factors[i]["weight"], 0.03))
        assert_close(state.factors[i], factors[i]["weight"])


def test_factors_are_averaged_evenly_at_first_and_then_decay(batch, key):
    params, x, labels, grads = batch
    kfac = bp.scale_by_kfac(damping=0.03, decay=0.6, every=1)
    state, seen = kfac.init(params), []
    for i in range(4):
        seen.append(factors_of(params, x + i, labels, jax.random.key(i)))
        got, state = jax.jit(kfac.update)(grads, state, params, factors=seen[-1])
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
        _, state = jax.jit(kfac.update)(grads, state, params, factors=factors)
        inverses.append(np.asarray(state.inverses[0].inputs))
        np.testing.assert_array_equal(inverses[-1], inverses[-1].T)
    same = [np.array_equal(a, b) for a, b in itertools.pairwise(inverses)]
    assert same == [True, True, False, True, True, False]


def test_a_layer_without_bias_has_the_factors_of_its_inputs_alone(key):
    net = bp.chain(bp.dense(4, use_bias=False), bp.tanh(), bp.dense(3, use_bias=False))
    params, _ = net.init(key, (5,))
    x, labels = normal(key, (8, 5)), jnp.arange(8) % 3
    _, grads = jax.jit(bp.value_and_grad(net, LOSS))(params, x, labels)
    factors = factors_of(params, x, labels, key, net=net)
    kfac = bp.scale_by_kfac(damping=0.1)
    got, state = jax.jit(kfac.update)(grads, kfac.init(params), params, factors=factors)
    assert_close(state.factors[0].inputs, x.T @ x / 8)
    natural = np.linalg.solve(
        damped(*map(np.asarray, state.factors[0]), 0.1), np.ravel(grads[0]["weight"])
    )
    assert_close(got[0]["weight"], jnp.asarray(natural.reshape(5, 4)))


def test_a_kernel_is_a_matrix(key):
    """[*K, I, O] as [K I, O], with the same factors."""
    rows, deltas = normal(key, (2, 40, 40))
    factors = bp.Kronecker(rows[:, :13].T @ rows[:, :13], deltas[:, :3].T @ deltas[:, :3])
    grads = {"weight": rows[:12, 13:16], "bias": rows[12, 13:16]}
    kernel = {**grads, "weight": grads["weight"].reshape(3, 2, 2, 3)}
    kfac = bp.scale_by_kfac(damping=0.1)

    def update(grads):
        tree = {"weight": factors, "bias": ()}
        return jax.jit(kfac.update)(grads, kfac.init(grads), grads, factors=tree)[0]

    got, want = update(kernel), update(grads)
    assert_close(got, {**want, "weight": want["weight"].reshape(3, 2, 2, 3)})
    assert_close(want, solve(grads, factors, 0.1))


def test_a_convnet_has_an_update_for_each_layer_and_groups_are_refused(key):
    x, labels = normal(key, (8, 4, 4, 2)), jnp.arange(8) % 3
    kfac = bp.scale_by_kfac()

    def update(groups):
        net = bp.chain(bp.conv(4, (3, 3), groups=groups), bp.tanh(), bp.flatten(), bp.dense(3))
        params, _ = net.init(key, (4, 4, 2))
        factors = bp.kfac_factors(net, LOSS)(params, x, labels, key=key)
        return params, jax.jit(kfac.update)(params, kfac.init(params), params, factors=factors)[0]

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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, late(jnp.float16)])
def test_16_bits_are_inverted_in_32_and_kept(batch, key, dtype):
    params, x, labels, grads = batch
    short = jax.tree.map(lambda a: a.astype(dtype), (params, x, grads))
    factors = factors_of(*short[:2], labels, key)
    kfac = bp.scale_by_kfac(damping=0.1)
    got, state = jax.jit(kfac.update)(short[2], kfac.init(short[0]), short[0], factors=factors)
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
    want, _ = jax.jit(kfac.update)(grads, kfac.init(params), params, factors=factors)
    assert_close(got[0], want[0])
    assert_close(got[2], jax.tree.map(lambda g: -0.5 * g, grads[2]))


@pytest.mark.thorough
def test_factors_are_of_the_forward_pass_that_draws(key):
    net = bp.chain(bp.dense(4), bp.dropout(0.5), bp.dense(3))
    params, _ = net.init(key, (5,))
    x, labels = normal(key, (8, 5)), jnp.arange(8) % 3
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
    bp.kfac_factors(NET, LOSS, error=spy)(params, x, labels, key=key)
    of_layers = np.asarray(jax.random.key_data(jax.random.split(key, 100))).tolist()
    assert seen[0] not in of_layers
    assert jax.random.key_data(jax.random.fold_in(key, 1)).tolist() in of_layers


def test_a_layer_that_no_error_reaches_gets_a_finite_update(batch, key):
    params, x, labels, grads = batch
    factors = jax.tree.map(jnp.zeros_like, factors_of(params, x, labels, key))
    kfac = bp.scale_by_kfac(damping=0.04)
    got, _ = jax.jit(kfac.update)(grads, kfac.init(params), params, factors=factors)
    assert_close(got, jax.tree.map(lambda g: g / 0.04, grads))


def test_it_is_an_optimizer_of_optax_that_fit_can_train_with(key):
    x = normal(key, (60, 5))
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
    x, labels = normal(key, (8, 5)), jnp.arange(8) % 3
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


# Any network: the factors say which parameters are matrices.


def natural_gradient(net, params, x, labels, **options):
    """The natural gradient by exact factors, which do not depend on a key, and the factors."""
    factors_of = bp.kfac_factors(net, LOSS, error=bp.ggn_columns, **options)

    def factors_on_batch(params):
        return factors_of(params, x, labels, key=jax.random.key(0))

    @jax.jit
    def solve(params):
        kfac = bp.scale_by_kfac(factors_on_batch, damping=0.03)
        _, grads = bp.value_and_grad(net, LOSS)(params, x, labels)
        factors = factors_on_batch(params)
        got, _ = kfac.update(grads, kfac.init(params), params, factors=factors)
        return got, factors, grads

    return solve(params)


def rows_of_dense(params, x):
    hidden = jnp.tanh(x @ params[0]["kernel"] + params[0]["bias"])
    return hidden @ params[1]["kernel"] + params[1]["bias"]


def transposed(params, x):
    hidden = jnp.tanh(x @ params[0]["kernel"].T + params[0]["bias"])
    return jnp.einsum("oi,ni->no", params[1]["kernel"], hidden) + params[1]["bias"]


def of_heads(params, x):
    hidden = jnp.einsum("ni,ihd->nhd", x, params[0]["kernel"]) + params[0]["bias"]
    return jnp.einsum("nhd,hdo->no", jnp.tanh(hidden), params[1]["kernel"]) + params[1]["bias"]


def to_layout(name, layers):
    """The weights and biases of dense layers 5 -> 4 -> 3 as a lifted model has them."""
    first, second = ({"kernel": p["weight"], "bias": p["bias"]} for p in layers)
    if name == "transposed":
        first, second = ({**p, "kernel": p["kernel"].T} for p in (first, second))
    if name == "of_heads":
        first = {"kernel": first["kernel"].reshape(5, 2, 2), "bias": first["bias"].reshape(2, 2)}
        second = {**second, "kernel": second["kernel"].reshape(2, 2, 3)}
    return [first, second]


@pytest.mark.parametrize("model", [rows_of_dense, transposed, of_heads])
def test_a_lifted_model_has_the_natural_gradient_of_its_layers_in_any_layout(model, batch):
    params, x, labels, _ = batch
    want, _, _ = natural_gradient(NET, params, x, labels)
    own = to_layout(model.__name__, params[::2])
    net, own = bp.lift(model, own, x)
    got, factors, _ = natural_gradient(net, own, x, labels)
    assert_close(got, to_layout(model.__name__, want[::2]))
    assert [layer["bias"] for layer in factors] == [(), ()]


def test_parameters_in_tuples_have_no_names_at_all(batch):
    params, x, labels, _ = batch
    own = [(p["weight"], p["bias"]) for p in params[::2]]

    def model(params, x):
        (w, b), (v, c) = params
        return jnp.tanh(x @ w + b) @ v + c

    want, _, _ = natural_gradient(NET, params, x, labels)
    got, _, _ = natural_gradient(*bp.lift(model, own, x), x, labels)
    assert_close(got, [(p["weight"], p["bias"]) for p in want[::2]])


def test_a_loop_over_layers_is_a_stack(key):
    block = bp.chain(bp.layer_norm(eps=1e-5), bp.dense(4), bp.tanh())
    net = bp.chain(bp.dense(4), bp.stack(block, 3), bp.dense(3))
    params, _ = net.init(key, (5,))
    x, labels = normal(key, (8, 5)), jnp.arange(8) % 3

    def model(params, x):
        def step(x, p):
            x = x - jnp.mean(x, -1, keepdims=True)
            x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)
            x = x * p["norm"]["scale"] + p["norm"]["shift"]
            return jnp.tanh(x @ p["dense"]["kernel"] + p["dense"]["bias"]), None

        x = x @ params["first"]["kernel"] + params["first"]["bias"]
        x, _ = jax.lax.scan(step, x, params["loop"])
        return x @ params["last"]["kernel"] + params["last"]["bias"]

    def as_lifted(params):
        first, stack, last = params
        norm, dense, _ = stack.layers
        first, dense, last = (
            {"kernel": p["weight"], "bias": p["bias"]} for p in (first, dense, last)
        )
        loop = {"norm": {"scale": norm["gain"], "shift": norm["bias"]}, "dense": dense}
        return {"first": first, "loop": loop, "last": last}

    want, _, _ = natural_gradient(net, params, x, labels)
    got, _, _ = natural_gradient(*bp.lift(model, as_lifted(params), x), x, labels)
    assert isinstance(got["loop"]["dense"]["kernel"], bp.Stacked)
    assert_close(bp.unstacked(got), as_lifted(want))


def part_of_group(tree, group, size):
    """The outputs of one group, of the factors or the parameters of a convolution."""
    return jax.tree.map(lambda a: a[..., group * size : (group + 1) * size], tree)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("conv", [bp.conv, bp.conv_transpose])
def test_a_convolution_in_groups_is_one_convolution_for_each(conv, use_bias, key):
    whole = conv(6, (3, 2), groups=2, use_bias=use_bias)
    one = conv(3, (3, 2), use_bias=use_bias)
    params, _ = whole.init(key, (4, 5, 4))
    x = normal(key, (8, 4, 5, 4))
    y, _ = jax.jit(whole.forward)(params, x)
    *_, factors = swept(whole, params, x, y, read=bp.kronecker)
    kfac = bp.scale_by_kfac(factors, damping=0.03)
    got, _ = jax.jit(kfac.update)(params, kfac.init(params), params, factors=factors)
    for group in range(2):
        own = part_of_group(params, group, 3)
        inputs = x[..., 2 * group : 2 * group + 2]
        dy = y[..., 3 * group : 3 * group + 3]
        *_, factors = swept(one, own, inputs, dy, read=bp.kronecker)
        kfac = bp.scale_by_kfac(damping=0.03)
        want, _ = jax.jit(kfac.update)(own, kfac.init(own), own, factors=factors)
        assert_close(part_of_group(got, group, 3), want)


@pytest.mark.thorough
def test_a_convolution_in_groups_is_a_layer_with_its_bias(key):
    net = bp.chain(bp.conv(4, (3, 3), groups=2), bp.tanh(), bp.flatten(), bp.dense(3))
    params, _ = net.init(key, (4, 4, 2))
    x, labels = normal(key, (8, 4, 4, 2)), jnp.arange(8) % 3
    factors = factors_of(params, x, labels, key, net=net, largest=9)
    assert factors[0]["weight"].inputs.shape == (2, 10, 10)
    assert factors[0]["bias"] == ()
    factors = factors_of(params, x, labels, key, net=net, largest=8)
    assert factors[0]["weight"].shape == (3, 3, 1, 4)


def test_a_call_of_lapack_inverts_one_matrix(key):
    """Two calls side by side that take a batch each may wait for ever on a CPU (jaxlib 0.10.2)."""
    net = bp.chain(bp.conv(4, (1, 1), groups=2), bp.stack(bp.conv(4, (1, 1), groups=2), 3))
    params = jax.eval_shape(lambda: net.init(key, (3, 3, 4))[0])
    x = jax.ShapeDtypeStruct((2, 3, 3, 4), float)
    factors = jax.eval_shape(bp.kfac_factors(net, bp.squared_error), params, x, x, key=key)
    kfac = bp.scale_by_kfac(factors)
    shapes = params, jax.eval_shape(kfac.init, params)

    def update(grads, state):
        return kfac.update(grads, state, factors=state.factors)

    many = jax.tree.map(lambda one: jax.ShapeDtypeStruct((7, *one.shape), one.dtype), shapes)
    for program in (jax.make_jaxpr(update)(*shapes), jax.make_jaxpr(jax.vmap(update))(*many)):
        calls = re.findall(r":f\d+\[([\d,]+)\] = (?:cholesky|triangular_solve)\[", str(program))
        assert {call.count(",") for call in calls} == {1}


def test_an_update_has_a_derivative(batch, key):
    """With respect to the damping, against the difference of two updates."""
    params, x, labels, grads = batch
    factors = factors_of(params, x, labels, key)

    def size(damping):
        kfac = bp.scale_by_kfac(damping=damping)
        return optax.tree.norm(kfac.update(grads, kfac.init(params), factors=factors)[0])

    got = jax.jit(jax.grad(size))(0.1)
    at = jax.jit(size)
    np.testing.assert_allclose(got, (at(0.10001) - at(0.09999)) / 2e-5, rtol=1e-7)


@pytest.mark.thorough
def test_every_expert_has_factors_of_its_own(key):
    params = {"experts": normal(key, (3, 5, 4))}
    x, dy = normal(key, (8, 3, 5)), normal(key, (8, 3, 4))
    net, params = bp.lift(lambda p, x: jnp.einsum("nei,eio->neo", x, p["experts"]), params, x)
    _, cache = net.forward(params, x)
    _, factors = net.backward(params, cache, dy, read=bp.kronecker)
    kfac = bp.scale_by_kfac(factors, damping=0.03)
    got, _ = jax.jit(kfac.update)(params, kfac.init(params), params, factors=factors)
    for i in range(3):
        matrices = damped(x[:, i].T @ x[:, i] / 8, dy[:, i].T @ dy[:, i] / 8, 0.03)
        want = np.linalg.solve(matrices, np.ravel(params["experts"][i]))
        assert_close(got["experts"][i], jnp.asarray(want.reshape(5, 4)))


def test_what_has_no_factors_has_a_diagonal(key):
    """g / (v + damping), with v of the sampled gradient."""
    net = bp.chain(bp.embedding(6, 4), bp.layer_norm(), bp.dense(3))
    params, _ = net.init(key, (5,))
    tokens, labels = jax.random.randint(key, (8, 5), 0, 6), jnp.arange(40).reshape(8, 5) % 3
    got, factors, grads = natural_gradient(net, params, tokens, labels)
    exact = jax.jit(bp.backprop(net, LOSS, read=bp.diagonal, error=bp.ggn_columns))
    _, diagonals = exact(params, tokens, labels)
    for place, name in ((0, "weight"), (1, "gain")):
        v = diagonals[place][name] / 8
        assert_close(factors[place][name], v)
        assert_close(got[place][name], grads[place][name] / (v + 0.03))
    got, factors, _ = natural_gradient(net, params, tokens, labels, rest="identity")
    assert factors[0]["weight"] is factors[1]["gain"] is None
    assert_close(got[0], grads[0])
    assert_close(got[1]["gain"], grads[1]["gain"])


def test_a_vector_that_is_added_on_its_own_has_its_own_factor(key):
    net = bp.chain(bp.dense(4), bp.layer_norm(), bp.dense(3))
    params, _ = net.init(key, (5,))
    x, labels = normal(key, (8, 5)), jnp.arange(8) % 3
    got, factors, grads = natural_gradient(net, params, x, labels)
    apart = bp.backprop(
        net, LOSS, read=lambda s, columns: bp.kronecker(s, bias="apart", columns=columns),
        error=bp.ggn_columns,
    )  # fmt: skip
    a, g = apart(params, x, labels)[1][1]["bias"]
    assert_close(factors[1]["bias"], bp.Kronecker(jnp.ones((1, 1)), g))
    want = np.linalg.solve(damped(np.asarray(a), np.asarray(g), 0.03), grads[1]["bias"])
    assert_close(got[1]["bias"], jnp.asarray(want))


@pytest.mark.parametrize(
    ("function", "shapes", "kind"),
    [
        (lambda p, x: x @ p["w"] + p["b"], {"w": (4, 4), "b": (4,)}, "folded"),
        (lambda p, x: x[:, :1] @ p["w"] + p["b"], {"w": (1, 4), "b": (4,)}, "folded"),
        # Nothing tells the two apart.
        (lambda p, x: x[:, :1] @ p["w"][None] + p["b"], {"w": (4,), "b": (4,)}, "alone"),
        # A vector among more than two parameters may belong to anything.
        (lambda p, x: (x * p["g"] + p["b"]) @ p["w"], {"w": (4, 4), "b": (4,), "g": (4,)}, "alone"),
        (lambda p, x: x @ p["w"] @ p["v"] + p["b"], {"w": (4, 4), "v": (4, 4), "b": (4,)}, "alone"),
        # It has an entry for each input, and none for each output.
        (lambda p, x: (x + p["b"]) @ p["w"], {"w": (4, 3), "b": (4,)}, "alone"),
        # Its axes are not the last ones of the weight.
        (lambda p, x: x @ p["w"] + p["b"][0], {"w": (4, 3), "b": (1, 3)}, "diagonal"),
        (
            lambda p, x: jnp.einsum("ni,ihd->ndh", x, p["w"]) + p["b"],
            {"w": (4, 2, 3), "b": (3, 2)},
            "diagonal",
        ),
        # Its entries are in another order than the outputs.
        (lambda p, x: x @ p["w"] + jnp.flip(p["b"]), {"w": (4, 3), "b": (3,)}, "diagonal"),
    ],
)
def test_a_bias_is_folded_in_where_it_is_plain_whose_it_is(function, shapes, kind, key):
    params = {name: normal(key, shape) for name, shape in shapes.items()}
    x = normal(key, (8, 4))
    net, params = bp.lift(lambda p, x: function(p, x).reshape(len(x), -1), params, x)
    targets = jnp.zeros(output_shape(net, params, x))
    factors = compiled_factors(net, bp.squared_error)(params, x, targets, key=key)
    kinds = {bp.Kronecker: "alone", tuple: "folded"}
    assert kinds.get(type(factors["b"]), "diagonal") == kind
    kfac = bp.scale_by_kfac(factors, damping=0.03)
    got, _ = jax.jit(kfac.update)(params, kfac.init(params), params, factors=factors)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, params)
    if kind == "folded":
        both = {"weight": params["w"], "bias": params["b"]}
        want = solve(both, factors["w"], 0.03)
        assert_close(got, {"w": want["weight"], "b": want["bias"]})


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: x[:, :3] @ w[:3],
        lambda w, x: jnp.tanh(x @ w[:2].T) @ w[2:],
        lambda w, x: jnp.tanh(x @ w) @ w.T,
        lambda w, x: x @ (w / jnp.linalg.norm(w)),
        lambda w, x: x * w[0] + w[1],
    ],
    ids=["a part", "two parts", "both ways", "normalised", "rows"],
)
def test_arrays_that_are_no_matrix_have_a_diagonal(function, key):
    x = normal(key, (8, 4))
    net, w = bp.lift(function, normal(key, (4, 4)), x)
    factors = compiled_factors(net, bp.squared_error)(w, x, jnp.zeros((8, 4)), key=key)
    assert factors.shape == (4, 4)
    kfac = bp.scale_by_kfac(factors, damping=0.03)
    got, _ = jax.jit(kfac.update)(w, kfac.init(w), w, factors=factors)
    assert_close(got, w / (factors + 0.03))


def test_a_matrix_that_is_too_large_has_a_diagonal(batch, key):
    params, x, labels, _ = batch
    factors = factors_of(params, x, labels, key, largest=4)
    assert factors[0]["weight"].shape == (5, 4)
    assert factors[0]["bias"].deltas.shape == (4, 4)  # its weight has no factors, so it is alone
    assert factors[2]["bias"] == ()
    factors = factors_of(params, x, labels, key, largest=3)
    assert factors[0]["bias"].shape == (4,)
    assert factors[2]["weight"].shape == (4, 3)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_diagonals_of_16_bits_are_kept_in_32(key, dtype):
    net = bp.chain(bp.dense(4, dtype=dtype), bp.layer_norm(dtype=dtype), bp.dense(3, dtype=dtype))
    params, _ = net.init(key, (5,))
    x, labels = jax.random.normal(key, (8, 5), dtype), jnp.arange(8) % 3
    factors = bp.kfac_factors(net, LOSS)(params, x, labels, key=key)
    kfac = bp.scale_by_kfac(factors)
    got, state = jax.jit(kfac.update)(params, kfac.init(params), params, factors=factors)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.factors)} == {jnp.dtype("float32")}


# Factors in some steps only.


def test_factors_are_computed_where_they_are_due(batch, key):
    params, x, labels, grads = batch
    kfac = bp.scale_by_kfac(damping=0.03, decay=0.6, every=1, factors_every=3)
    of_step = [factors_of(params, x + i, labels, key) for i in range(10)]
    state, computed, averages = kfac.init(params), [], []
    with jax.disable_jit():  # `cond` then runs one of its branches alone
        for i in range(10):

            def factors(i=i):
                computed.append(i)
                return of_step[i]

            got, state = kfac.update(grads, state, params, factors=factors)
            averages.append(state.factors[0].inputs)
    assert computed == [0, 3, 6, 9]
    same = [np.array_equal(a, b) for a, b in itertools.pairwise(averages)]
    assert same == [i not in (2, 5, 8) for i in range(9)]
    first, second, third, fourth = (of_step[i][0]["weight"].inputs for i in computed)
    average = 0.6 * (0.6 * (first + second) / 2 + 0.4 * third) + 0.4 * fourth
    assert_close(averages[-1], average)
    assert_close(got[0], solve(grads[0], state.factors[0], 0.03))


@pytest.mark.thorough
def test_fit_computes_deferred_factors(key):
    x = normal(key, (60, 5))
    labels = jnp.argmax(x[:, :3], axis=1)
    factors = bp.kfac_factors(NET, LOSS)

    def train(factors, **options):
        optimizer = optax.chain(bp.scale_by_kfac(**options), optax.sgd(0.1))
        extra = {"factors": factors}
        return bp.fit(
            NET, LOSS, optimizer, (x, labels), key=key, epochs=2, batch_size=20, extra_args=extra
        ).state

    want = train(factors, every=1)
    got = train(bp.deferred(factors), every=1, factors_every=1)
    assert_close(got.params, want.params)
    fewer = train(bp.deferred(factors), every=1, factors_every=3)
    assert not np.allclose(fewer.params[0]["weight"], want.params[0]["weight"])


def test_deferred_factors_are_inside_the_branch(batch, key):
    """In a step in which no factors are due, only the two products of each layer remain."""
    params, x, labels, grads = batch
    kfac = bp.scale_by_kfac(factors_every=3)

    def update(state):
        factors = bp.deferred(bp.kfac_factors(NET, LOSS))(params, x, labels, key=key)
        return kfac.update(grads, state, params, factors=factors)

    outside = jax.make_jaxpr(update)(kfac.init(params)).jaxpr.eqns
    assert sum(equation.primitive.name == "cond" for equation in outside) == 2
    assert sum(equation.primitive.name == "dot_general" for equation in outside) == 4


GPT = bp.chain(
    bp.embedding(7, 8),
    bp.learned_positions(6),
    bp.stack(
        bp.chain(
            bp.residual(bp.layer_norm(), bp.attention(8, 2, causal=True)),
            bp.residual(bp.layer_norm(), bp.dense(16), bp.gelu(), bp.dense(8)),
        ),
        2,
    ),
    bp.layer_norm(),
    bp.dense(7),
)


def trained(net, x, labels, key, state=None):
    """The losses of a short training run by KFAC, with all of its options."""
    factors = bp.kfac_factors(net, LOSS)
    kfac = bp.scale_by_kfac(
        lambda params: factors(params, x, labels, key=key), every=2, factors_every=2
    )
    optimizer = optax.chain(kfac, optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    if state is not None:
        state = bp.TrainState(state, optimizer.init(state), jnp.zeros((), jnp.int32), key)
    run = bp.fit(
        net, LOSS, optimizer, (x, labels), key=None if state else key, state=state, batch_size=8,
        epochs=25, extra_args={"factors": bp.deferred(factors)},
    )  # fmt: skip
    return [float(record["loss"]) for record in run.records]


@pytest.mark.thorough
@pytest.mark.thorough
def test_a_gpt_trains(key):
    tokens = (jnp.arange(16)[:, None] + jnp.arange(7)) % 7
    losses = trained(GPT, tokens[:, :-1], tokens[:, 1:], key)
    assert losses[-1] < 0.5 * losses[0]


def test_a_lifted_function_trains(key):
    x = normal(key, (32, 5))
    labels = jnp.argmax(x[:, :3], axis=1)
    w, v = 0.3 * normal(key, (4, 5)), 0.3 * normal(key, (4, 3))
    params = {"in": {"w": w, "b": jnp.zeros(4)}, "gain": jnp.ones(4), "out": v}

    def model(params, x):
        hidden = jnp.tanh(x @ params["in"]["w"].T + params["in"]["b"])
        return (hidden * params["gain"]) @ params["out"]

    net, params = bp.lift(model, params, x)
    losses = trained(net, x, labels, key, state=params)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.thorough
def test_a_flax_model_trains(key):
    nn = pytest.importorskip("flax.linen")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(7, 8, param_dtype=float)(tokens)
            y = nn.LayerNorm(param_dtype=float)(x)
            y = nn.MultiHeadDotProductAttention(2, param_dtype=float)(
                y, mask=nn.make_causal_mask(tokens)
            )
            x = x + y
            return nn.Dense(7, param_dtype=float)(nn.LayerNorm(param_dtype=float)(x))

    tokens = (jnp.arange(16)[:, None] + jnp.arange(7)) % 7
    x, labels = tokens[:, :-1], tokens[:, 1:]
    model = Model()
    net, params = bp.lift(model.apply, model.init(key, x), x)
    factors = bp.kfac_factors(net, LOSS)(params, x, labels, key=key)["params"]
    attention = factors["MultiHeadDotProductAttention_0"]
    for name in ("query", "key", "value", "out"):
        assert attention[name]["bias"] == ()
        assert attention[name]["kernel"].signal.inputs.shape == (9, 9)
    losses = trained(net, x, labels, key, state=params)
    assert losses[-1] < 0.7 * losses[0]


def test_the_factors_tell_what_another_optimizer_leaves(batch, key):
    net = bp.chain(bp.dense(4), bp.layer_norm(), bp.dense(3))
    params, _ = net.init(key, (5,))
    _, x, labels, _ = batch
    _, grads = bp.value_and_grad(net, LOSS)(params, x, labels)
    factors = bp.kfac_factors(net, LOSS)(params, x, labels, key=key)
    labels_of = (
        {"weight": "kfac", "bias": "sgd"},
        {"gain": "sgd", "bias": "kfac"},
        {"weight": "sgd", "bias": "sgd"},
    )

    def both(like):
        kfac = bp.scale_by_kfac(like, damping=0.03)
        return optax.partition({"kfac": kfac, "sgd": optax.sgd(0.5)}, labels_of)

    optimizer = both(jax.eval_shape(lambda: factors))
    got, _ = optimizer.update(grads, optimizer.init(params), params, factors=factors)
    kfac = bp.scale_by_kfac(factors, damping=0.03)
    want, _ = jax.jit(kfac.update)(grads, kfac.init(params), params, factors=factors)
    assert_close(got[1]["bias"], want[1]["bias"])
    assert_close(got[0]["bias"], -0.5 * grads[0]["bias"])
    assert_close(got[2], jax.tree.map(lambda g: -0.5 * g, grads[2]))
    a, g = map(np.asarray, factors[0]["weight"])
    alone = np.linalg.solve(damped(a[:-1, :-1], g, 0.03), np.ravel(grads[0]["weight"]))
    assert_close(got[0]["weight"], jnp.asarray(alone.reshape(5, 4)))
    with pytest.raises(ValueError, match="like is a function of the parameters, but some"):
        both(lambda params: factors).init(params)


@pytest.mark.thorough
def test_any_network_is_traced_once(key):
    tokens = (jnp.arange(16)[:, None] + jnp.arange(7)) % 7
    x, labels = tokens[:, :-1], tokens[:, 1:]
    factors = bp.kfac_factors(GPT, LOSS)
    kfac = bp.scale_by_kfac(lambda params: factors(params, x, labels, key=key), factors_every=2)
    chex.clear_trace_counter()
    counted = GPT._replace(backward=chex.assert_max_traces(GPT.backward, n=3))
    extra = {"factors": bp.deferred(bp.kfac_factors(counted, LOSS))}
    step = bp.make_step(counted, LOSS, kfac, extra_args=extra, donate=False)
    state = bp.init_state(counted, kfac, key, (6,))
    for _ in range(3):
        state, _ = step(state, x, labels)


def test_wrong_arguments_for_any_network_are_refused(batch, key):
    params, x, labels, grads = batch
    with pytest.raises(ValueError, match=r"rest is 'unit'; it takes .*; largest is 0, expected"):
        bp.kfac_factors(NET, LOSS, rest="unit", largest=0)
    with pytest.raises(ValueError, match=r"factors_every is 0, expected a positive integer or"):
        bp.scale_by_kfac(factors_every=0)
    factors = factors_of(params, x, labels, key)
    kfac = bp.scale_by_kfac(factors_every=2)
    with pytest.raises(ValueError, match=r"factors_every is 2, but the factors were computed al"):
        kfac.update(grads, kfac.init(params), params, factors=factors)
    # Made for one network, and used for another.
    other = bp.chain(bp.dense(4), bp.layer_norm(), bp.dense(3))
    own, _ = other.init(key, (5,))
    others = bp.kfac_factors(other, LOSS)(own, x, labels, key=key)
    with pytest.raises(ValueError, match="not those of this network's layers"):
        bp.scale_by_kfac(others).init(params)
    kfac = bp.scale_by_kfac(others)
    without = bp.kfac_factors(other, LOSS, rest="identity")(own, x, labels, key=key)
    with pytest.raises(ValueError, match="not those of this network's layers"):
        kfac.update(own, kfac.init(own), own, factors=without)
    # A reading gives nothing for a gain, but says nothing of what to do with it either.
    _, read = bp.backprop(other, LOSS, read=bp.kronecker)(own, x, labels)
    with pytest.raises(ValueError, match="not those of this network's layers"):
        bp.scale_by_kfac(read).init(own)


@pytest.mark.parametrize("mean", [3.0, pytest.param(0.0, marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    "scale", ["mixed", *(pytest.param(s, marks=pytest.mark.thorough) for s in (1.0, 1e3, 1e5))]
)
def test_features_that_are_not_standardised(scale, mean):
    """In float32 as in float64: what the inverses would make of rounding errors is damped."""
    scales = np.array([1, 1e3, 1e5, 1e-2, 1]) if scale == "mixed" else np.full(5, scale)
    rng = np.random.default_rng(0)
    x, labels = (rng.normal(size=(64, 5)) + mean) * scales, rng.integers(4, size=64)
    net, loss = bp.dense(4), bp.softmax_cross_entropy

    def natural(dtype):
        params = {"weight": jnp.zeros((5, 4), dtype), "bias": jnp.zeros(4, dtype)}
        batch = jnp.asarray(x, dtype), jnp.asarray(labels)
        factors = bp.kfac_factors(net, loss, error=bp.ggn_columns)
        optimizer = bp.scale_by_kfac(damping=1e-3)

        @jax.jit
        def update(params, *batch):
            _, grads = bp.value_and_grad(net, loss)(params, *batch)
            found = factors(params, *batch, key=jax.random.key(0))
            return optimizer.update(grads, optimizer.init(params), factors=found)[0]

        return update(params, *batch)

    got, want = natural(jnp.float32), natural(jnp.float64)
    for name, array in want.items():
        error = np.linalg.norm(np.float64(got[name]) - array) / np.linalg.norm(array)
        assert error < 0.03, (name, error)
