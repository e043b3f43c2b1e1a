"""Every call of the library on lifted functions.

The oracle is a twin: the same network of the library's own layers, whose calls have tests of their
own. Its parameters are the same tree, but for the place of `Stacked`.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from cases import ERRORS, READINGS, every, late
from jax import lax
from opened import N, assert_agree, normal
from oracles import assert_close, is_float

import jaxbp as bp

LABELS = jnp.array([0, 2, 1, 2])
RULES = {
    "random_feedback": bp.random_feedback(),
    "sign_symmetric": bp.sign_symmetric(),
    "sign_symmetric, batchwise": bp.sign_symmetric("batchwise"),
    "kolen_pollack": bp.kolen_pollack(),
}


def affine(p, x):
    return x @ p["weight"] + p["bias"]


def plain(params, x):
    """A layer normalisation between two layers, at positions that are averaged."""
    first, _, norm, last, _ = params
    h = jnp.tanh(affine(first, x))
    h = h - h.mean(-1, keepdims=True)
    h = h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-5) * norm["gain"] + norm["bias"]
    return affine(last, h).mean(1)


def scanned(params, x):
    """Layers in a loop with a checkpoint."""
    stack, last = params

    @jax.checkpoint
    def body(h, p):
        return h + jnp.tanh(affine(p, h)), None

    return affine(last, lax.scan(body, x, stack)[0])


TWINS = {
    "plain": (
        plain,
        lambda: bp.chain(
            bp.dense(5), bp.tanh(), bp.layer_norm(), bp.dense(3), bp.function(lambda y: y.mean(0))
        ),
        (2, 4),
    ),
    "scanned": (
        scanned,
        lambda: bp.chain(bp.stack(bp.residual(bp.dense(4), bp.tanh()), 3), bp.dense(3)),
        (4,),
    ),
}


class Pair:
    """A lifted function and its twin."""

    def __init__(self, name):
        function, make, self.shape = TWINS[name]
        self.twin = make()
        self.twin_params, _ = self.twin.init(jax.random.key(1), self.shape)
        self.twin_params = jax.tree.map(
            lambda p: p + 0.3 * normal(p.size, *p.shape), self.twin_params
        )
        self.x = normal(0, N, *self.shape)

        def flat(tree):  # residual has a tuple of its parts, and the function has one part
            return drop_residual(bp.unstacked(tree))

        self.flat = flat
        self.net, self.params = bp.lift(
            function,
            flat(self.twin_params),
            self.x,
            init=lambda key: flat(self.twin.init(key, self.shape)[0]),
        )

    def both(self, make_call, *args, **kwargs):
        """The results of a call on the lifted function and on the twin."""
        return (
            jax.jit(make_call(self.net))(self.params, *args, **kwargs),
            jax.jit(make_call(self.twin))(self.twin_params, *args, **kwargs),
        )


def drop_residual(tree):
    """A tree without the tuples of `residual` in a stack."""
    stack, *rest = tree
    return (stack[0], *rest) if isinstance(stack, tuple) else tree


@pytest.fixture(scope="module", params=[late("plain"), "scanned"])
def pair(request):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield Pair(request.param)


def leaves(tree):
    """The arrays of a tree in the order of the parameters, whatever nodes stand around them."""
    return jax.tree.leaves(bp.unstacked(tree))


# Those of the gradients alone: the operands of a lifted function may have their positions summed.
OF_GRADIENTS = {n: reading for n, reading in READINGS.items() if n not in ("keep", "health")}


def test_every_reading(pair):
    def call(net):
        return bp.backprop(net, bp.softmax_cross_entropy, read=OF_GRADIENTS)

    (values, got), (want_values, want) = pair.both(call, pair.x, LABELS)
    assert_close(values, want_values)
    kronecker = got.pop("kronecker"), want.pop("kronecker")
    for name in got:
        assert_agree(leaves(got[name]), leaves(want[name]))
    assert_kronecker(*kronecker)


def assert_kronecker(got, want):
    """The same factors, but that a bias of a lifted function may have its positions summed."""
    is_factors = lambda node: hasattr(node, "inputs")  # noqa: E731
    pairs = zip(
        jax.tree.leaves(bp.unstacked(got), is_leaf=is_factors),
        jax.tree.leaves(bp.unstacked(want), is_leaf=is_factors),
        strict=True,
    )
    found = [(a, b) for a, b in pairs if hasattr(a, "inputs")]
    assert found
    for a, b in found:
        assert_agree(jax.tree.leaves(a), jax.tree.leaves(b))


@every("error", {name: name for name in ERRORS}, soon={"ggn_columns"})
def test_every_error(pair, error, key):
    def call(net):
        return bp.backprop(net, bp.softmax_cross_entropy, read=OF_GRADIENTS, error=ERRORS[error])

    (_, got), (_, want) = pair.both(call, pair.x, LABELS, error_key=key)
    assert_kronecker(got.pop("kronecker"), want.pop("kronecker"))
    for name in got:
        assert_agree(leaves(got[name]), leaves(want[name]))


def test_sums_with_weights(pair, key):
    loss, weigh = bp.softmax_cross_entropy, bp.clip_weights(0.4)

    def call(net):
        one = bp.reweighted(net, loss, weigh)
        two = bp.reweighted(net, loss, weigh, sweeps=2)
        options = {"max_norm": 0.4, "noise_multiplier": 0.0, "batch_size": 4}
        private = bp.private_gradient(net, loss, **options)

        def function(*args):
            return {"one": one(*args), "two": two(*args), "private": private(*args, key=key)}

        return function

    got, want = pair.both(call, pair.x, LABELS)
    assert float(jnp.min(want["one"].weights)) < 1
    assert_agree(leaves(got), leaves(want))


def test_inner_products(pair):
    other = normal(7, 3, *pair.shape)

    def call(net):
        sweep = bp.backprop(
            net, bp.softmax_cross_entropy, read={"grads": bp.mean, "signals": bp.keep}
        )

        def function(params, x, targets):
            _, read = sweep(params, x, targets)
            signals, grads = read["signals"], read["grads"]
            _, others = bp.backprop(net, bp.softmax_cross_entropy, read=bp.keep)(
                params, other, targets[:3]
            )
            return {
                "gram": bp.gram(signals),
                "against others": bp.gram(signals, others),
                "along": bp.directional_derivatives(signals, grads),
                "noise": bp.gradient_noise(signals, grads),
                "ntk": bp.neural_tangent_kernel(net)(params, x, other),
                "of classes": bp.neural_tangent_kernel_per_class(net)(params, x),
            }

        return function

    got, want = pair.both(call, pair.x, LABELS)
    assert_agree(jax.tree.leaves(got), jax.tree.leaves(want))


def test_products_with_curvature(pair):
    loss = bp.softmax_cross_entropy

    def call(net, own):
        direction = jax.tree.map(lambda p: jnp.sin(3 * p), own)

        def function(params, x, targets):
            hessian = bp.hessian_vector_product(net, loss)
            gauss_newton = bp.gauss_newton_vector_product(net, loss)
            return [f(params, x, targets, direction) for f in (hessian, gauss_newton)]

        return jax.jit(function)(own, pair.x, LABELS)

    got, want = call(pair.net, pair.params), call(pair.twin, pair.twin_params)
    for a, b in zip(got, want, strict=True):
        assert_agree(leaves(a), leaves(b))


@every("name", {name: name for name in RULES}, soon={"random_feedback", "kolen_pollack"})
def test_rules_carry_the_error(pair, name, key):
    rule = RULES[name]

    def call(net):
        state = rule.make(key, net, pair.shape)
        sweep = bp.backprop(net, bp.softmax_cross_entropy, rule=rule, read=bp.per_example)
        measure = bp.alignment(net, bp.softmax_cross_entropy, rule=rule)

        def function(*args):
            how = {"rule_state": state, "rule_key": key}
            return {"grads": sweep(*args, **how)[1], "angles": measure(*args, **how)}

        return function

    got, want = pair.both(call, pair.x, LABELS)
    exact = jax.jit(bp.backprop(pair.net, bp.softmax_cross_entropy, read=bp.per_example))
    _, exact = exact(pair.params, pair.x, LABELS)
    if name != "sign_symmetric, batchwise":  # which draws by the tree's own structure
        assert_agree(leaves(got["grads"]), leaves(want["grads"]))
        assert_agree(angles(got["angles"])["gradient"], angles(want["angles"])["gradient"])
    first, last = leaves(got["grads"]), leaves(exact)
    assert float(jnp.max(jnp.abs(first[0] - last[0]))) > 1e-3
    assert_close(first[-1], last[-1])  # the last layer's error comes from the loss


def angles(tree):
    """The leaves of an alignment, by what they are."""
    is_one = lambda node: hasattr(node, "norm_ratio")  # noqa: E731
    found = jax.tree.leaves(bp.unstacked(tree), is_leaf=is_one)
    return {name: [getattr(a, name) for a in found] for name in ("gradient", "delta")}


def test_random_feedback_by_hand(key):
    """dx = dy B^T, written out for two layers."""

    def f(p, x):
        return jnp.tanh(x @ p["a"] + p["b"]) @ p["c"].T

    p = {"a": normal(1, 5, 4), "b": normal(2, 4), "c": normal(3, 3, 4)}
    draw = lambda key: jax.tree.map(lambda a: jax.random.normal(key, a.shape), p)  # noqa: E731
    x, rule = normal(0, N, 5), bp.random_feedback()
    net, params = bp.lift(f, p, x, init=draw)
    state = rule.make(key, net, (5,))
    sweep = bp.backprop(net, bp.softmax_cross_entropy, rule=rule, read=bp.per_example)
    _, got = jax.jit(sweep)(params, x, LABELS, rule_state=state)
    feedback = rule.choose(state, params)["c"]
    assert float(jnp.max(jnp.abs(feedback - p["c"]))) > 0.1
    h = jnp.tanh(x @ p["a"] + p["b"])
    dy = jax.nn.softmax(h @ p["c"].T) - jax.nn.one_hot(LABELS, 3)
    da = (dy @ feedback) * (1 - h**2)
    want = {
        "a": jnp.einsum("ni,no->nio", x, da),
        "b": da,
        "c": jnp.einsum("no,ni->noi", dy, h),
    }
    assert_close(got, want)


def test_feedback_goes_through_the_ways_in_which_parameters_are_used():
    """Another tree is transposed, split, normalised and scanned as the parameters are."""

    def f(p, x):
        w = p["w"] / jnp.linalg.norm(p["w"])
        h, _ = lax.scan(jax.checkpoint(lambda h, u: (jnp.tanh(h @ u.T), None)), x @ w, p["u"])
        return h @ jnp.concatenate([p["v"], p["v"]], 1)

    def tree(seed):
        return {
            "w": normal(seed, 5, 4),
            "u": normal(seed + 1, 2, 4, 4),
            "v": normal(seed + 2, 4, 3),
        }

    p, b, x, dy = tree(1), tree(11), normal(0, N, 5), normal(9, N, 6)
    net, params = bp.lift(f, p, x)
    _, cache = net.forward(params, x)
    carrier = params | {"w": b["w"], "v": b["v"], "u": bp.Stacked(b["u"])}
    dx, got = net.backward(carrier, cache, dy, read=bp.total)
    h = [x @ (p["w"] / jnp.linalg.norm(p["w"]))]
    for u in p["u"]:
        h.append(jnp.tanh(h[-1] @ u.T))
    d, du = dy @ jnp.concatenate([b["v"], b["v"]], 1).T, []
    for i in (1, 0):
        da = d * (1 - h[i + 1] ** 2)
        du.insert(0, da.T @ h[i])
        d = da @ b["u"][i]
    dv = h[2].T @ dy
    normalise = jax.vjp(lambda w: w / jnp.linalg.norm(w), p["w"])[1]
    want = {
        "w": normalise(x.T @ d)[0],
        "u": bp.Stacked(jnp.stack(du)),
        "v": dv[:, :3] + dv[:, 3:],
    }
    assert_close(dx, d @ (b["w"] / jnp.linalg.norm(b["w"])).T)
    assert_close(got, want)


def test_direct_feedback_to_lifted_parts(key):
    """Blocks that are lifted get the errors that blocks of the library's layers get."""
    own = [bp.chain(bp.dense(5), bp.tanh()), bp.dense(3)]
    twin_params, _ = bp.chain(*own).init(key, (4,))
    x = normal(0, N, 4)

    def part(function, layer, params, inputs, shape):
        draw = lambda key: layer.init(key, shape)[0]  # noqa: E731
        return bp.lift(function, params, inputs, init=draw)

    first = lambda p, x: jnp.tanh(affine(p[0], x))  # noqa: E731
    one, p_one = part(first, own[0], twin_params[0], x, (4,))
    two, p_two = part(affine, own[1], twin_params[1], normal(1, N, 5), (5,))
    got, want = (
        bp.backprop(
            bp.chain(*parts),
            bp.softmax_cross_entropy,
            rule=bp.direct_feedback(*parts),
            read=bp.per_example,
        )(
            params,
            x,
            LABELS,
            rule_state=bp.direct_feedback(*parts).make(key, bp.chain(*parts), (4,)),
        )
        for parts, params in (((one, two), (p_one, p_two)), (tuple(own), twin_params))
    )
    assert_close(got, want)


@pytest.mark.parametrize("rule", [bp.exact(), bp.kolen_pollack()], ids=["exact", "kolen_pollack"])
def test_training(pair, rule, key):
    def losses(net):
        answer = bp.fit(
            net,
            bp.softmax_cross_entropy,
            optax.sgd(0.1),
            (pair.x, LABELS),
            key=key,
            rule=rule,
            metric=bp.accuracy,
            epochs=3,
            batch_size=2,
            read={"sq_norms": bp.sq_norms},
        )
        return answer.params, answer.records

    with jax.numpy_dtype_promotion("standard"):
        got, want = losses(pair.net), losses(pair.twin)
    floats = lambda tree: [a for a in map(jnp.asarray, jax.tree.leaves(tree)) if is_float(a)]  # noqa: E731
    assert_agree(floats(bp.unstacked(got)), floats(bp.unstacked(want)))


def test_check(pair, key):
    report = bp.check(pair.net, key, pair.shape).raise_if_wrong()
    assert report.largest_error <= 1e-10
    by_autodiff = [f for f in report.findings if f.witness == "autodiff"]
    assert len(by_autodiff) == 1 + len(leaves(pair.params))


def test_check_finds_a_mistake(pair, key):
    def backward(params, cache, dy, *, read=bp.keep):
        dx, readings = pair.net.backward(params, cache, dy, read=read)
        return -dx, readings

    assert not bp.check(pair.net._replace(backward=backward), key, pair.shape).ok


def square(p, x):
    return x + jnp.tanh(affine(p, x))


@pytest.mark.parametrize(
    "combine",
    [
        lambda layer: bp.chain(layer, bp.tanh(), layer),
        lambda layer: bp.stack(layer, 3),
        lambda layer: bp.stack(bp.remat(layer), 2),
        lambda layer: bp.repeat(layer, 3),
        lambda layer: bp.residual(layer, bp.gelu()),
        lambda layer: bp.parallel(layer, layer, combine="concatenate"),
        lambda layer: bp.gated(layer, layer),
        lambda layer: bp.cast(layer, compute=float),
    ],
    ids=["chain", "stack", "remat in a stack", "repeat", "residual", "parallel", "gated", "cast"],
)
def test_combinators_of_a_lifted_layer(combine, key):
    twin = bp.residual(bp.dense(4), bp.tanh())
    own = lambda key: twin.init(key, (4,))[0][0]  # noqa: E731
    lifted, _ = bp.lift(square, own(key), normal(0, N, 4), init=own)
    x = normal(0, N, 4)
    params, shape = combine(lifted).init(key, (4,))
    twin_params, twin_shape = combine(twin).init(key, (4,))
    assert shape == twin_shape
    assert_close(jax.tree.leaves(params), jax.tree.leaves(twin_params))
    read = {"total": bp.total, "sq_norms": bp.sq_norms}
    targets = normal(5, N, *shape)
    got, want = (
        jax.jit(bp.backprop(combine(layer), bp.squared_error, read=read))(own, x, targets)
        for layer, own in ((lifted, params), (twin, twin_params))
    )
    assert_agree(jax.tree.leaves(got), jax.tree.leaves(want))
