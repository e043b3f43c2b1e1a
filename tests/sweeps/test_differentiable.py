"""Layers inside code that `jax.grad` differentiates: gradients, readings by slots, and rules."""

import jax
import jax.numpy as jnp
import pytest
from cases import normal
from jax import lax
from oracles import assert_close

import jaxbp as bp

N = 4


def network():
    return bp.chain(bp.dense(4), bp.tanh(), bp.dense(3))


def problem(key, net=None, shape=(3,)):
    net = net or network()
    params, _ = net.init(key, shape)
    return net, params, normal(key, (N, *shape))


def sq_norms(grads, axes=1):
    return jax.tree.map(lambda g: jnp.sum(g**2, range(axes, g.ndim)), grads)


def test_gradient_dx_and_norms_by_slots(key):
    net, params, x = problem(key)
    call, make_slots = bp.as_function(net, read=bp.sq_norms)
    slots = make_slots(params, x)

    def loss(params, x, slots):
        return jnp.sum(jnp.sin(call(params, jnp.cos(x), slots)))

    def by_hand(params, x):
        return jnp.sum(jnp.sin(net.forward(params, jnp.cos(x))[0]))

    got = jax.jit(jax.grad(loss, (0, 1, 2)))(params, x, slots)
    grads = jax.vmap(jax.grad(lambda p, x: by_hand(p, x[None])), (None, 0))(params, x)
    want = *jax.grad(by_hand, (0, 1))(params, x), sq_norms(grads)
    assert_close(got, want)
    assert_close(call(params, x, slots), net.forward(params, x)[0])
    assert_close(call(params, x), net.forward(params, x)[0])
    # A value has no slots in it.
    assert_close(loss(params, x, slots), loss(params, x, jax.tree.map(lambda s: s + 1, slots)))


def test_without_slots_only_the_gradient_is_computed(key):
    net, params, x = problem(key)
    reads = []

    def read(signal):
        reads.append(signal)
        return bp.sq_norms(signal)

    call, make_slots = bp.as_function(net, read=read)
    got = jax.grad(lambda p: jnp.sum(call(p, x) ** 2))(params)
    assert not reads
    assert_close(got, jax.grad(lambda p: jnp.sum(net.forward(p, x)[0] ** 2))(params))
    jax.grad(lambda s: jnp.sum(call(params, x, s) ** 2))(make_slots(params, x))
    assert reads


def test_under_a_scan_of_checkpoints_each_layer_has_its_own_slots(key):
    inner = bp.chain(bp.dense(5), bp.tanh(), bp.dense(3))
    call, make_slots = bp.as_function(inner, read=bp.sq_norms)
    params = jax.vmap(lambda k: inner.init(k, (3,))[0])(jax.random.split(key, 3))
    x = normal(key, (N, 3))
    one = make_slots(jax.tree.map(lambda p: p[0], params), x)
    slots = jax.tree.map(lambda s: jnp.zeros((3, *s.shape)), one)

    def run(apply, params, slots, x):
        body = jax.checkpoint(lambda h, own: (h + apply(own[0], h, own[1]), None))
        return jnp.sum(jnp.sin(lax.scan(body, x, (params, slots))[0]))

    def plain(params, h, slots):
        del slots
        return inner.forward(params, h)[0]

    got = jax.jit(jax.grad(lambda p, s: run(call, p, s, x), (0, 1)))(params, slots)
    grads = jax.vmap(jax.grad(lambda p, x: run(plain, p, slots, x[None])), (None, 0))(params, x)
    norms = jax.tree.map(jnp.transpose, sq_norms(grads, 2))
    assert_close(got, (jax.tree.map(lambda g: g.sum(0), grads), norms))


def test_under_vmap(key):
    net, params, x = problem(key)
    call, make_slots = bp.as_function(net, read=bp.per_example)
    several = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    slots = jax.tree.map(lambda s: jnp.stack([s, s]), make_slots(params, x))

    def loss(params, slots):
        return jnp.sum(jnp.sin(call(params, x, slots)))

    got = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(several, slots)
    for i in range(2):
        own = jax.tree.map(lambda p, i=i: p[i], several)
        grads = jax.vmap(
            jax.grad(lambda p, x: jnp.sum(jnp.sin(net.forward(p, x[None])[0]))), (None, 0)
        )(own, x)
        want = jax.tree.map(lambda g: g.sum(0), grads), grads
        assert_close(jax.tree.map(lambda g, i=i: g[i], got), want)


def test_integer_inputs(key):
    net = bp.chain(bp.embedding(5, 3), bp.dense(2))
    params, _ = net.init(key, (4,))
    x = jax.random.randint(key, (N, 4), 0, 5)
    call, make_slots = bp.as_function(net, read=bp.sq_norms)

    def loss(params, slots):
        return jnp.sum(call(params, x, slots) ** 2)

    got = jax.jit(jax.grad(loss, (0, 1)))(params, make_slots(params, x))
    plain = lambda p, x: jnp.sum(net.forward(p, x[None])[0] ** 2)  # noqa: E731
    grads = jax.vmap(jax.grad(plain), (None, 0))(params, x)
    assert_close(got, (jax.tree.map(lambda g: g.sum(0), grads), sq_norms(grads)))


def test_a_lifted_layer_with_trees_of_inputs(key):
    def f(p, x):
        return {"y": jnp.tanh(x["h"] @ p["w"] + p["t"][x["at"]]), "z": x["h"] * p["g"]}

    p = {"w": jnp.eye(3) + 0.1, "t": jnp.ones((2, 3)), "g": jnp.arange(3.0)}
    x = {"h": normal(key, (N, 3)), "at": jnp.array([0, 1, 1, 0])}
    net, params = bp.lift(f, p, x)
    call, make_slots = bp.as_function(net, read=bp.sq_norms)

    def total(y):
        return jnp.sum(y["y"] * y["z"])

    def loss(params, h, slots):
        return total(call(params, {**x, "h": h}, slots))

    got = jax.jit(jax.grad(loss, (0, 1, 2)))(params, x["h"], make_slots(params, x))

    def one(p, x):
        return total(f(p, jax.tree.map(lambda a: a[None], x)))

    grads = jax.vmap(jax.grad(one), (None, 0))(p, x)
    dx = jax.grad(lambda h: total(f(p, {**x, "h": h})))(x["h"])
    assert_close(got, (jax.tree.map(lambda g: g.sum(0), grads), dx, sq_norms(grads)))


@pytest.mark.parametrize("rule", [bp.random_feedback(), bp.sign_symmetric("batchwise")])
def test_a_rule_is_that_of_backward(rule, key):
    net, params, x = problem(key)
    state = rule.make(key, net, (3,))
    call, _ = bp.as_function(net, rule=rule)

    def loss(params, x):
        return jnp.sum(jnp.sin(call(params, x, rule_state=state, rule_key=key)))

    got = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    y, cache = net.forward(params, x)
    tree = rule.choose(state, params, key=key)
    dx, want = net.backward(tree, cache, jnp.cos(y), read=bp.total)
    assert_close(got, (want, dx))
    exact, _ = net.backward(params, cache, jnp.cos(y), read=bp.total)
    assert float(jnp.max(jnp.abs(exact - dx))) > 1e-3


def test_a_key_draws(key):
    net, params, x = problem(key, bp.chain(bp.dense(6), bp.dropout(0.5), bp.dense(2)))
    call, _ = bp.as_function(net)
    got = jax.grad(lambda p: jnp.sum(call(p, x, key=key) ** 2))(params)
    want = jax.grad(lambda p: jnp.sum(net.forward(p, x, key=key)[0] ** 2))(params)
    assert_close(got, want)


def test_inside_a_flax_module(key, standard_promotion):
    del standard_promotion
    nn = pytest.importorskip("flax.linen")
    inner = network()
    call, make_slots = bp.as_function(inner, read=bp.sq_norms)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, slots=None):
            x = nn.Dense(3, param_dtype=float)(x)
            own = self.param("inner", lambda key: inner.init(key, (3,))[0])
            return nn.Dense(2, param_dtype=float)(call(own, x, slots))

    model, x = Outer(), normal(key, (N, 5))
    params = model.init(key, x)
    slots = make_slots(params["params"]["inner"], jnp.ones((N, 3)))

    def loss(params, x, slots=None):
        return jnp.sum(jnp.sin(model.apply(params, x, slots)))

    got = jax.jit(jax.grad(loss, (0, 2)))(params, x, slots)
    grads = jax.vmap(jax.grad(lambda p, x: loss(p, x[None])), (None, 0))(params, x)
    norms = sq_norms(grads["params"]["inner"])
    assert_close(got, (jax.tree.map(lambda g: g.sum(0), grads), norms))


def test_what_is_wrong_is_said(key):
    net, params, x = problem(key)
    with pytest.raises(ValueError, match="as_function: rule"):
        bp.as_function(net, rule=3)
    _, make_slots = bp.as_function(net)
    with pytest.raises(ValueError, match="as_function: there are no slots without a reading"):
        make_slots(params, x)
