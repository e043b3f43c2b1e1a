"""Frozen parameters: what is trained alone is seen, and nothing is spent on the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal, swept
from oracles import assert_close, by_example

import jaxbp as bp

N = 4


def flop(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def problem(key, net, shape):
    params, out_shape = net.init(key, shape)
    params = jax.tree.map(lambda p: p + 0.1 * np.sin(np.arange(p.size)).reshape(p.shape), params)
    return params, normal(key, (N, *shape)), normal(key, (N, *out_shape))


def deep(width=5, depth=3):
    return bp.chain(*[part for _ in range(depth) for part in (bp.dense(width), bp.tanh())])


def below(path, leaf):
    del leaf
    return not path.startswith("4.")


def biases(path, leaf):
    return path.endswith("bias") and leaf.ndim == 1


def nothing(path, leaf):
    del path, leaf
    return False


def with_a_stack():
    return bp.chain(bp.stack(deep(depth=1), 3), bp.tanh(), *[bp.dense(5)] * 3)


@pytest.mark.parametrize("where", [below, biases, nothing])
@pytest.mark.parametrize("make", [deep, with_a_stack])
def test_readings_are_those_of_the_trainable_part(make, where, key):
    net = make()
    params, x, targets = problem(key, net, (5,))
    part, trainable = bp.freeze(net, params, where)
    read = {"mean": bp.mean, "sq_norms": bp.sq_norms, "grads": bp.per_example}
    whole = jax.jit(bp.backprop(net, bp.squared_error, read=read))(params, x, targets)[1]
    _, got = jax.jit(bp.backprop(part, bp.squared_error, read=read))(trainable, x, targets)
    is_none = lambda node: node is None  # noqa: E731
    for name in read:
        assert jax.tree.structure(got[name]) == jax.tree.structure(trainable)
        want = jax.tree.map(
            lambda p, answer: None if p is None else answer,
            trainable,
            whole[name],
            is_leaf=is_none,
        )
        assert_close(got[name], want)
    grads = by_example(got["grads"])
    norms = sum(jnp.sum(g**2, range(1, g.ndim)) for g in jax.tree.leaves(grads))
    assert_close(bp.example_norms(got["sq_norms"]), jnp.sqrt(norms))
    assert_close(part.forward(trainable, x)[0], net.forward(params, x)[0])
    assert part.init(key, (5,))[1] == net.init(key, (5,))[1]
    assert jax.tree.structure(part.init(key, (5,))[0]) == jax.tree.structure(trainable)


def test_an_optimizer_sees_the_trainable_part_alone(key, standard_promotion):
    del standard_promotion
    net = deep()
    params, x, targets = problem(key, net, (5,))
    part, trainable = bp.freeze(net, params, below)
    optimizer = optax.adamw(0.1)
    state = optimizer.init(trainable)
    assert len(jax.tree.leaves(state)) == 1 + 2 * 2
    _, grads = bp.value_and_grad(part, bp.squared_error)(trainable, x, targets)
    updates, _ = optimizer.update(grads, state, trainable)
    after = optax.apply_updates(trainable, updates)
    assert float(jnp.max(jnp.abs(after[4]["weight"] - trainable[4]["weight"]))) > 0.01
    history = bp.fit(part, bp.squared_error, optax.sgd(0.1), (x, targets), key=key, epochs=2)
    assert jax.tree.structure(history.params) == jax.tree.structure(trainable)


def test_the_check_and_rules(key):
    net = deep()
    params, x, targets = problem(key, net, (5,))
    part, trainable = bp.freeze(net, params, biases)
    bp.check(part, key, (5,)).raise_if_wrong()
    rule = bp.sign_symmetric()
    state = rule.make(key, part, (5,))
    sweep = bp.backprop(part, bp.squared_error, rule=rule, read=bp.total)
    _, got = sweep(trainable, x, targets, rule_state=state)
    whole = bp.backprop(net, bp.squared_error, rule=rule, read=bp.total)
    _, want = whole(params, x, targets, rule_state=rule.make(key, net, (5,)))
    assert_close(got[4]["weight"], want[4]["weight"])


def test_the_readings_of_what_is_fixed_are_not_computed(key):
    """Of a reading that is called, nothing is left in the compiled program."""
    net = deep(width=32)
    params, x, targets = problem(key, net, (32,))
    whole = flop(bp.value_and_grad(net, bp.squared_error), params, x, targets)
    last, trainable = bp.freeze(net, params, below)
    cost = flop(bp.value_and_grad(last, bp.squared_error), trainable, x, targets)
    product = 2 * N * 32 * 32
    # Forward 3 products, then one for the last weight: no error goes below it.
    assert cost < 4.4 * product
    assert whole > 7.6 * product  # 3, 3, and 2 for the errors
    part, trainable = bp.freeze(net, params, lambda path, leaf: leaf.ndim == 2)
    cost = flop(bp.value_and_grad(part, bp.squared_error), trainable, x, targets)
    assert cost < 5.6 * product  # 3, and 2 for the errors


def test_in_a_stack_nothing_is_spent_on_fixed_gradients(key):
    net = bp.chain(bp.stack(bp.chain(bp.dense(32), bp.tanh()), 2), bp.dense(32))
    params, x, targets = problem(key, net, (32,))

    def cost(where):
        part, trainable = bp.freeze(net, params, where)
        return flop(bp.value_and_grad(part, bp.squared_error), trainable, x, targets)

    product = 2 * N * 32 * 32  # of a loop, one turn is counted
    whole = cost(lambda path, leaf: False)
    no_weights = cost(lambda path, leaf: path.startswith("0.") and leaf.ndim == 2)
    nothing_below = cost(lambda path, leaf: path.startswith("0."))
    assert whole - no_weights > 0.9 * product
    assert whole - nothing_below > 2.6 * product


def low_rank(p, x):
    h = jnp.tanh(x @ (p["w"] + p["a"] @ p["b"]))
    return h @ (p["w"] + p["a"] @ p["b"])


@pytest.mark.parametrize("how", ["frozen", "closed over"])
def test_low_rank_adaptation(how, key):
    """Of a large matrix that is fixed, a small change is trained."""
    width, rank = 32, 2
    keys = jax.random.split(key, 4)
    shapes = {"w": (width, width), "a": (width, rank), "b": (rank, width)}
    p = {n: normal(k, s) / 6 for k, (n, s) in zip(keys, shapes.items(), strict=False)}
    x, targets = normal(keys[3], (2, N, width))
    net, params = bp.lift(low_rank, p, x)
    if how == "frozen":
        part, trainable = bp.freeze(net, params, lambda path, leaf: path == "w")
        assert trainable["w"] is None
    else:
        part, trainable = bp.lift(
            lambda own, x: low_rank({"w": p["w"], **own}, x), {"a": p["a"], "b": p["b"]}, x
        )
    read = {"mean": bp.mean, "grads": bp.per_example, "sq_norms": bp.sq_norms}
    sweep = jax.jit(bp.backprop(part, bp.squared_error, read=read))
    _, got = sweep(trainable, x, targets)

    def value(own, x, t):
        return jnp.sum((low_rank({"w": p["w"], **own}, x[None])[0] - t) ** 2) / 2

    own = {"a": p["a"], "b": p["b"]}
    want = jax.jit(jax.vmap(jax.grad(value), (None, 0, 0)))(own, x, targets)
    assert_close({n: got["grads"][n] for n in own}, want)
    assert_close({n: got["mean"][n] for n in own}, jax.tree.map(lambda g: g.mean(0), want))
    norms = jax.tree.map(lambda g: jnp.sum(g**2, (1, 2)), want)
    assert_close({n: got["sq_norms"][n] for n in own}, norms)
    whole = flop(bp.value_and_grad(net, bp.squared_error), params, x, targets)
    cost = flop(bp.value_and_grad(part, bp.squared_error), trainable, x, targets)
    assert whole - cost > 0.9 * 2 * (2 * N) * width * width  # the matrix's own gradient


def test_below_frozen_weights_that_a_function_closes_over_nothing_is_spent(key):
    width = 32
    fixed = normal(key, (2, width, width)) / 6
    p = {"head": normal(key, (width, width)) / 6}
    x, targets = normal(key, (2, N, width))

    def f(p, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, fixed)
        return jnp.tanh(h @ fixed[0]) @ p["head"]

    net, params = bp.lift(f, p, x)
    got = flop(bp.value_and_grad(net, bp.squared_error), params, x, targets)
    product = 2 * N * width * width
    assert got < 4.6 * product  # 1 in the loop, 2 after it, and the gradient
    _, dx, _ = swept(net, params, x, targets)
    assert_close(dx, jax.jit(lambda x, dy: jax.vjp(lambda x: f(p, x), x)[1](dy)[0])(x, targets))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda net, p: bp.freeze(net, p, lambda path, leaf: True),
            ValueError,
            "freeze: every parameter is fixed; where has to leave something to train",
        ),
        (lambda net, p: bp.freeze(3, p, biases), TypeError, "freeze: part"),
    ],
)
def test_what_is_wrong_is_said(call, error, message, key):
    net = bp.dense(3)
    with pytest.raises(error, match=message):
        call(net, net.init(key, (3,))[0])


def test_where_sees_paths_and_one_layer_of_a_stack(key):
    net = bp.chain(bp.stack(bp.dense(4), 3), bp.dense(2))
    params, _ = net.init(key, (4,))
    seen = {}

    def where(path, leaf):
        seen[path] = leaf.shape
        return False

    part, _ = bp.freeze(net, params, where)
    assert sorted(seen.values()) == [(2,), (4,), (4, 2), (4, 4)]
    assert part.name == f"freeze({net.name})"
