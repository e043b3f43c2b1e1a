"""What goes into the calls: which axis counts examples, what a loss returns, wrong arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from oracles import assert_close

import jaxbp as bp

N = 6
NET = bp.chain(bp.dense(3), bp.tanh(), bp.dense(2))


@pytest.fixture(scope="module")
def params():
    with jax.enable_x64(True):
        return NET.init(jax.random.key(0), (4,))[0]


X, T = np.ones((N, 4)), np.zeros((N, 2))


def times_params(make):
    """A product with a vector as a call without one."""

    def made(net, loss):
        product = make(net, loss)
        return lambda params, x, t, **how: product(params, x, t, params, **how)

    return made


def of_params(make):
    """A step or an epoch as a call with parameters in place of a state."""

    def made(net, loss):
        step = make(net, loss, optax.sgd(0.1))
        return lambda params, x, t: step(
            bp.TrainState(params, (optax.EmptyState(),) * 2, jnp.zeros((), int), jax.random.key(0)),
            x,
            t,
        )

    return made


# Each call as `function(net, loss)(params, inputs, targets)`.
CALLS = {
    "value_and_grad": bp.value_and_grad,
    "backprop": bp.backprop,
    "hessian_vector_product": times_params(bp.hessian_vector_product),
    "gauss_newton_vector_product": times_params(bp.gauss_newton_vector_product),
    "alignment": lambda net, loss: bp.alignment(net, loss, rule=bp.exact()),
}
TRAINING = {
    "make_step": of_params(functools.partial(bp.make_step, donate=False)),
    "make_epoch": of_params(functools.partial(bp.make_epoch, batch_size=N)),
    "evaluate": bp.evaluate,
}


def each(calls):
    return pytest.mark.parametrize(
        ("name", "make"), [pytest.param(name, make, id=name) for name, make in calls.items()]
    )


SOON = {"value_and_grad", "make_step"}
every_call = each(CALLS | TRAINING)
every_call_with_a_key = each(CALLS)


def scalar(outputs, targets):
    value, delta = bp.squared_error(outputs, targets)
    return jnp.mean(value), delta


def of_outputs(outputs, targets):
    return jnp.square(outputs - targets), outputs - targets


def integer(outputs, targets):
    value, delta = bp.squared_error(outputs, targets)
    return value.astype(int), delta


def of_another_shape(outputs, targets):
    value, delta = bp.squared_error(outputs, targets)
    return value, delta[:, :1]


def of_another_structure(outputs, targets):
    value, delta = bp.squared_error(outputs, targets)
    return value, (delta,)


LOSSES_THAT_ARE_NONE = [
    (scalar, r"value of shape \[\], expected \[6\]: .*, not their mean or sum"),
    (of_outputs, r"value of shape \[6, 2\], expected \[6\]: one number for each example\."),
    (integer, r"value of dtype int64, expected floating-point"),
    (of_another_shape, r"delta of shape \[6, 1\], expected \[6, 2\]"),
    (of_another_structure, r"delta of structure .*, expected that of the outputs"),
    (optax.l2_loss, r"an array of shape \[6, 2\], expected a pair .* bp\.loss_of\(function\)"),
]


@every_call
@pytest.mark.parametrize(("loss", "message"), LOSSES_THAT_ARE_NONE)
def test_what_a_loss_returns_wrong_is_said(name, make, loss, message, params):
    # A step runs the sweep of another call, whose name the message has.
    name = "value_and_grad" if name in ("make_step", "make_epoch") else name
    with pytest.raises(ValueError, match=f"^{name}: the loss returned .*{message}"):
        make(NET, loss)(params, X, T)


@every_call
@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (X, T[:3], r"inputs has 6 examples .* and targets has 3 \(shape \[3, 2\]\)"),
        (X, np.tile(T, (2, 1)), r"inputs has 6 examples .* and targets has 12"),
        (X, (T, T[:2]), r".* and targets\.1 has 2"),
        ((X, X[:2]), T, r".* and inputs\.1 has 2"),
        (X[:0], T[:0], r"inputs has shape \[0, 4\]: no examples"),
        (X[0, 0], T, r"inputs has shape \[\]; its first axis has to count the examples"),
        (X.astype(str), T, r"inputs is an array of dtype <U32; it takes numbers"),
        (X, T.astype(object), r"targets is an array of dtype object; it takes numbers"),
        ("images", T, r"inputs is 'images'; it takes an array"),
        (X, [0] * N, r"targets\.0 (is 0; it takes an array|has shape \[\]; its first axis)"),
    ],
)
def test_which_axis_counts_examples(name, make, inputs, targets, message, params):
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        make(NET, bp.squared_error)(params, inputs, targets)


@every_call
def test_a_network_and_a_loss_that_are_none(name, make):
    with pytest.raises(TypeError, match=rf"^{name}: net is .* takes a Layer\. Call it: tanh\(\)"):
        make(bp.tanh, bp.squared_error)
    with pytest.raises(TypeError, match=rf"^{name}: loss is 'mse'; it takes a function"):
        make(NET, "mse")


@pytest.mark.parametrize("key", [3, "key", np.zeros(2), jax.random.split(jax.random.key(0))])
@every_call_with_a_key
def test_a_key_that_is_none(name, make, key, params):
    with pytest.raises(ValueError, match=rf"^{name}: key is .*; it takes one key"):
        make(NET, bp.squared_error)(params, X, T, key=key)


def test_a_legacy_key_is_a_key(params):
    key = jax.random.PRNGKey(0)
    assert_close(*(bp.value_and_grad(NET, bp.squared_error)(params, X, T, key=k)
                   for k in (key, None)))  # fmt: skip


@pytest.mark.parametrize("layer", ["plain", "cast"])
def test_the_mean_gradient_of_float16_keeps_small_errors(layer, key):
    """Divided by N before the sweep, these errors would be zero."""
    net = bp.dense(2) if layer == "plain" else bp.cast(bp.dense(2), compute=jnp.float16)
    dtype = jnp.float16 if layer == "plain" else jnp.float32
    params, _ = net.init(key, (3,))
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    n, delta = 5000, 3e-5

    def loss(outputs, targets):
        return jnp.sum(outputs, 1), jnp.full_like(outputs, delta) + 0 * targets

    x = jnp.ones((n, 3), dtype)
    _, grads = bp.value_and_grad(net, loss)(params, x, jnp.zeros((n, 2), dtype))
    _, want = bp.backprop(net, loss)(params, x, jnp.zeros((n, 2), dtype))
    for got, same in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got, same)


@pytest.mark.parametrize(
    "make",
    [bp.hessian_vector_product, bp.gauss_newton_vector_product],
    ids=["hessian", "gauss_newton"],
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree[:2], r"it has no 2\.weight|it has no 2\.bias"),
        (lambda tree: tree[2]["weight"], r"it has no 0\.bias"),
        (lambda tree: jax.tree.map(lambda p: p[:1], tree), r"0\.bias has .*\[1\], expected"),
        (lambda tree: jax.tree.map(np.float32, tree), r"0\.bias has float32 .*, expected float64"),
        (lambda tree: list(tree), r"its structure is .*, expected"),
        (lambda tree: [], r"it has no 0\.bias"),
    ],
)
def test_a_vector_that_is_not_like_the_parameters(make, change, message, params):
    with pytest.raises(ValueError, match=rf"vector is not a tree like params: {message}"):
        make(NET, bp.squared_error)(params, X, T, change(params))


@pytest.mark.parametrize(
    "make", [bp.neural_tangent_kernel, bp.neural_tangent_kernel_per_class], ids=["all", "per_class"]
)
def test_wrong_arguments_of_a_kernel(make, params):
    with pytest.raises(TypeError, match=rf"^{make.__name__}: net is"):
        make([bp.dense(2)])
    kernel = make(NET)
    with pytest.raises(ValueError, match=rf"^{make.__name__}: inputs has shape \[0, 4\]: no ex"):
        kernel(params, X[:0])
    with pytest.raises(ValueError, match=rf"^{make.__name__}: other has shape \[\]"):
        kernel(params, X, X[0, 0])
    with pytest.raises(ValueError, match=rf"^{make.__name__}: .* and inputs\.1 has 2"):
        kernel(params, (X, X[:2]))


def test_wrong_arguments_of_as_function(params):
    with pytest.raises(TypeError, match=r"^as_function: net is"):
        bp.as_function("net")
    with pytest.raises(TypeError, match=r"^as_function: read is 'mean'; it takes a function"):
        bp.as_function(NET, read="mean")
    call, make_slots = bp.as_function(NET, read=bp.sq_norms)
    with pytest.raises(ValueError, match=r"^as_function: x has shape \[0, 4\]: no examples"):
        call(params, X[:0])
    with pytest.raises(ValueError, match=r"^as_function: key is 3"):
        call(params, X, key=3)
    slots = make_slots(params, X)
    for x, wrong in ((X, slots[:1]), (X[:2], slots)):
        with pytest.raises(ValueError, match=r"^as_function: slots are not those of make_slots"):
            jax.grad(lambda slots, x=x: jnp.sum(call(params, x, slots)))(wrong)
    with pytest.raises(ValueError, match=r"^as_function: there are no slots without a reading"):
        bp.as_function(NET)[0](params, X, slots)


TWO = bp.masked(lambda mask: bp.chain(bp.recurrent(bp.gru(2), mask=mask), bp.dense(2)))


def test_inputs_that_are_a_tree(key):
    """A pair of inputs gives what the same network gives with the second input inside."""
    x, mask = normal(key, (N, 3, 2)), jax.random.bernoulli(key, 0.7, (N, 3))
    params, _ = TWO.init(key, ((3, 2), (3,)))
    one = bp.chain(bp.recurrent(bp.gru(2), mask=mask), bp.dense(2))
    targets, rule = jnp.zeros((N, 3, 2)), bp.sign_symmetric()
    rule_state = rule.make(key, one, (3, 2))

    def everything(net, x):
        how = {"rule_state": rule_state}
        angles = bp.alignment(net, bp.squared_error, rule=rule)(params, x, targets, **how)
        product = bp.hessian_vector_product(net, bp.squared_error)(params, x, targets, params)
        read = {"grads": bp.mean, "signals": bp.keep}
        _, answers = bp.backprop(net, bp.squared_error, read=read)(params, x, targets)
        noise = bp.gradient_noise(answers["signals"], answers["grads"])
        return angles, product, noise, bp.neural_tangent_kernel(net)(params, x)

    ways = (TWO, (x, mask)), (one, x)
    got, want = (jax.jit(everything, static_argnums=0)(*way) for way in ways)
    assert_close(got, want)


def test_outputs_that_are_a_tree_are_measured_too(key):
    """Two heads are as far from backpropagation as one that is cut into both."""

    def forward(params, x, *, key=None):
        y, cache = NET.forward(params, x, key=key)
        return (y[:, :1], y[:, 1:]), cache

    def backward(params, cache, dy, *, read=bp.keep):
        return NET.backward(params, cache, jnp.concatenate(dy, axis=1), read=read)

    heads = NET._replace(forward=forward, backward=backward)
    both = bp.joint_loss((bp.squared_error, bp.squared_error))
    params, _ = NET.init(key, (4,))
    rule = bp.random_feedback()
    x, how = normal(key, (N, 4)), {"rule_state": rule.make(key, NET, (4,))}
    got = bp.alignment(heads, both, rule=rule)(params, x, (T[:, :1], T[:, 1:]), **how)
    want = bp.alignment(NET, bp.squared_error, rule=rule)(params, x, T, **how)
    assert_close(got, want)


# What can be wrong with an array [N, ...], and each of these with inputs and with targets.
WRONG = {
    "an example less": lambda a: a[1:],
    "twice the examples": lambda a: np.concatenate([a, a]),
    "no examples": lambda a: a[:0],
    "an axis less": lambda a: a[:, 0],
    "an axis more": lambda a: a[:, None],
    "an entry less": lambda a: a[:, 1:],
    "an entry more": lambda a: np.concatenate([a, a[:, :1]], axis=1),
    "one number": lambda a: a[0, 0],
    "complex numbers": lambda a: a.astype(complex),
    "strings": lambda a: a.astype(str),
    "objects": lambda a: a.astype(object),
    "lists": lambda a: a.tolist(),
    "a tuple": lambda a: (a, a),
    "a dict": lambda a: {"x": a},
    "nothing": lambda a: None,
    "a name": lambda a: "data",
}
# A layer or the loss may be the first to see it: then the message has its name.
OUR_WORDS = r"^({name}|value_and_grad|chain: part 1 \(dense\(3\)\)|dense\(3\)|squared_error)[: ]"


@pytest.mark.parametrize("argument", ["inputs", "targets"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        pytest.param(name, make, id=name, marks=() if name in SOON else pytest.mark.thorough)
        for name, make in (CALLS | TRAINING).items()
    ],
)
def test_no_wrong_argument_becomes_a_number(name, make, wrong, argument, params):
    data = {"inputs": X, "targets": T}
    data[argument] = wrong(data[argument])
    with pytest.raises((ValueError, TypeError), match=OUR_WORDS.format(name=name)):
        make(NET, bp.squared_error)(params, data["inputs"], data["targets"])
