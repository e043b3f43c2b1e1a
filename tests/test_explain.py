"""`explain`: every number against autodiff, and the product of the factors against the gradient."""

import functools
import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import normal

import jaxbp as bp

EXACT = {"rtol": 1e-12, "atol": 1e-14}


def draw(net, shape, n=3, outputs=1):
    keys = jax.random.split(jax.random.key(4), 3)
    params, _ = net.init(keys[0], shape)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # so that no bias is zero
    return params, normal(keys[1], (n, *shape)), normal(keys[2], (n, outputs))


def product(rule):
    return functools.reduce(np.matmul, [factor.matrix for factor in rule.factors])


def weights_of(gradients):
    """Every weight of a network, as `explain` takes it."""
    for path, gradient in gradients.items():
        for at in np.ndindex(gradient.shape[1:]):
            yield path, *at


def autodiff(net, loss, params, x, targets):
    """The gradient of each example by jax.grad, by the path of the parameter."""
    grads = oracles.per_example_grads(net, lambda y, t: loss(y, t)[0], params, x, targets)
    leaves = jax.tree.leaves_with_path(grads)
    return {jax.tree_util.keystr(path, simple=True, separator="."): g for path, g in leaves}


def test_one_path_is_a_product_of_numbers():
    net = bp.chain(bp.dense(1), bp.tanh(), bp.dense(1), bp.sigmoid(), bp.dense(1))
    params, x, targets = draw(net, (2,))
    grads = autodiff(net, bp.squared_error, params, x, targets)
    for weight in [("0.weight", 1, 0), ("0.bias", 0), ("2.weight", 0, 0), ("4.bias", 0)]:
        shown = bp.explain(net, params, x, targets, weight=weight, example=2)
        path, *at = weight
        numbers = [factor.matrix.item() for factor in shown.chain_rule.factors]
        assert len(numbers) == 1 + 5 - int(path[0])
        np.testing.assert_allclose(np.prod(numbers), grads[path][(2, *at)], **EXACT)
    h = float(jnp.tanh(x[2] @ params[0]["weight"] + params[0]["bias"])[0])
    shown = bp.explain(net, params, x, targets, weight=("0.weight", 1, 0), example=2)
    by_name = {factor.name: factor.matrix.item() for factor in shown.chain_rule.factors}
    assert by_name["d(0)/dw"] == x[2, 1]
    assert by_name["d(1)/d(0)"] == pytest.approx(1 - h * h, rel=1e-14)
    assert by_name["d(2)/d(1)"] == params[2]["weight"][0, 0]
    assert list(by_name) == [
        "dE/d(4)", "d(4)/d(3)", "d(3)/d(2)", "d(2)/d(1)", "d(1)/d(0)", "d(0)/dw",
    ]  # fmt: skip


def test_the_factors_of_every_weight_multiply_to_its_gradient():
    net = bp.chain(bp.chain(bp.dense(3), bp.tanh()), bp.chain(bp.dense(2), bp.relu()), bp.dense(2))
    params, x, targets = draw(net, (2,), outputs=2)
    grads = autodiff(net, bp.squared_error, params, x, targets)
    shown = bp.explain(net, params, x, targets)
    assert shown.chain_rule is None
    assert list(shown.values) == ["inputs", "0.0", "0.1", "1.0", "1.1", "2"]
    assert shown.layers["1.1"] == "relu"
    assert grads.keys() == shown.gradients.keys() == shown.norms.keys() == shown.signals.keys()
    for path, n in itertools.product(grads, range(2)):
        np.testing.assert_allclose(shown.gradients[path], grads[path], **EXACT)
        at = tuple(size - 1 for size in grads[path].shape[1:])
        rule = bp.explain(net, params, x, targets, weight=(path, *at), example=n).chain_rule
        assert (rule.path, rule.at, rule.example) == (path, at, n)
        np.testing.assert_allclose(rule.gradient, grads[path][(n, *at)], **EXACT)
        assert product(rule).shape == (1, 1)
        assert product(rule).item() == rule.gradient


def test_values_deltas_and_norms_are_those_of_autodiff():
    parts = bp.dense(3), bp.tanh(), bp.dense(2)
    net = bp.chain(*parts)
    params, x, _ = draw(net, (2,))
    labels = jnp.array([0, 1, 1])
    shown = bp.explain(net, params, x, labels)  # integers: the loss is softmax_cross_entropy
    values, _ = bp.softmax_cross_entropy(net.forward(params, x)[0], labels)
    oracles.assert_close(shown.losses, values)

    value = x
    for place in range(4):
        name = "inputs" if place == 0 else str(place - 1)
        rest = bp.chain(*parts[place:])
        oracles.assert_close(shown.values[name], value)

        def error(value, rest=rest, place=place):
            y, _ = rest.forward(params[place:], value)
            return bp.softmax_cross_entropy(y, labels)[0]

        oracles.assert_close(shown.deltas[name], oracles.slope(error, value))
        if place < 3:
            value, _ = parts[place].forward(params[place], value)

    grads = autodiff(net, bp.softmax_cross_entropy, params, x, labels)
    squares = {path: np.square(g).reshape(len(x), -1).sum(axis=1) for path, g in grads.items()}
    for path, square in squares.items():
        np.testing.assert_allclose(shown.norms[path], np.sqrt(square), rtol=1e-10)
    np.testing.assert_allclose(shown.example_norms, np.sqrt(sum(squares.values())), rtol=1e-10)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(shown[2:-1]))


def test_a_lifted_network_is_split_at_the_weight():
    def model(params, x):
        h = jnp.sin(x @ params["w"] + params["b"])
        return h * h @ params["v"]

    rng = np.random.default_rng(1)
    params = {"w": rng.normal(size=(2, 3)), "b": rng.normal(size=3), "v": rng.normal(size=(3, 2))}
    x, targets = rng.normal(size=(4, 2)), rng.normal(size=(4, 2))
    net, params = bp.lift(model, jax.tree.map(jnp.asarray, params), x)
    grads = autodiff(net, bp.squared_error, params, x, targets)
    for path, *at in [("w", 1, 2), ("b", 0), ("v", 2, 1)]:
        shown = bp.explain(net, params, x, targets, weight=(path, *at), example=3)
        np.testing.assert_allclose(shown.chain_rule.gradient, grads[path][(3, *at)], **EXACT)
        np.testing.assert_allclose(shown.gradients[path], grads[path], **EXACT)
    shown = bp.explain(net, params, x, targets, weight=("w", 1, 2), example=3)
    names = [factor.name for factor in shown.chain_rule.factors]
    assert names == ["dE/d(outputs)", "d(outputs)/dz", "dz/dw"]
    assert shown.chain_rule.factors[-1].matrix.item() == x[3, 1]
    assert list(shown.values) == ["inputs", "outputs"]


def test_positions_and_stacks_and_tokens_are_summed_over():
    net = bp.chain(
        bp.embedding(5, 3), bp.stack(bp.residual(bp.dense(3), bp.tanh()), 2), bp.dense(2)
    )
    params, _ = net.init(jax.random.key(1), (4,))
    tokens, targets = jnp.array([[0, 1, 0, 2], [3, 3, 0, 4]]), jnp.array([[0, 1, 1, 0]] * 2)
    grads = autodiff(net, bp.softmax_cross_entropy, params, tokens, targets)
    for path, *at in [("0.weight", 0, 1), ("1.layers.0.weight", 1, 2, 0), ("2.weight", 1, 1)]:
        shown = bp.explain(net, params, tokens, targets, weight=(path, *at))
        np.testing.assert_allclose(shown.gradients[path], grads[path], **EXACT)
        np.testing.assert_allclose(shown.chain_rule.gradient, grads[path][(0, *at)], **EXACT)
    assert shown.chain_rule.factors[-1].matrix.shape == (4, 1)  # one for each position
    assert shown.deltas["inputs"] is None or not np.any(shown.deltas["inputs"])


def test_a_derivative_of_zero_is_shown():
    net = bp.chain(bp.dense(2), bp.relu(), bp.dense(1))
    params, x, targets = draw(net, (2,))
    params[0]["bias"] = jnp.array([-100.0, 1.0])
    rule = bp.explain(net, params, x, targets, weight=("0.weight", 0, 0)).chain_rule
    assert {f.name: f.matrix.shape for f in rule.factors}["d(1)/d(0)"] == (1, 1)
    assert rule.gradient == 0


@pytest.mark.parametrize(
    ("how", "message"),
    [({"weight": ("0.w", 0, 0)}, r"no parameter '0.w'; the network has 0.bias, 0.weight"),
     ({"weight": ("0.weight", 0)}, r"weight is at \[0\] in 0.weight of shape \[2, 2\]"),
     ({"weight": ("0.weight", 0, 2)}, r"below its size"),
     ({"weight": ("0.weight", 0, 0.5)}, r"takes an integer"),
     ({"weight": ("0.weight", 0, -1)}, r"from 0"),
     ({"weight": ("0.bias", 0), "example": 3}, r"example is 3; there are 3"),
     ({"weight": ("0.bias", 0), "example": -1}, r"example is -1")],
)  # fmt: skip
def test_what_is_not_there_is_refused(how, message):
    net = bp.chain(bp.dense(2), bp.relu())
    params, x, targets = draw(net, (2,), outputs=2)
    with pytest.raises(ValueError, match=message):
        bp.explain(net, params, x, targets, **how)


def test_what_is_not_a_network_is_refused():
    with pytest.raises(TypeError, match="explain: net is"):
        bp.explain(bp.relu, (), jnp.ones((1, 1)), jnp.ones((1, 1)))
    params, x, targets = draw(bp.dense(1), (2,))
    with pytest.raises(ValueError, match="explain: inputs has 3 examples"):
        bp.explain(bp.dense(1), params, x, targets[:2])


def test_integers_on_the_way_are_refused():
    rounding = bp.Layer(
        "rounding",
        lambda key, shape: ((), shape),
        lambda params, x, *, key=None: (jnp.round(x).astype(int), x),
        lambda params, x, dy, *, read=None: (jnp.zeros_like(x), ()),
    )
    embedded = bp.chain(bp.dense(2), rounding, bp.embedding(9, 1))
    params, x, _ = draw(bp.dense(2), (2,))
    table, _ = bp.embedding(9, 1).init(jax.random.key(0), (2,))
    with pytest.raises(ValueError, match="1 has values of dtypes int64, on the way"):
        bp.explain(embedded, (params, (), table), x, jnp.zeros((3, 2, 1)), weight=("0.bias", 0))


@pytest.mark.thorough
@pytest.mark.parametrize("name", cases.LAYERS)
def test_every_layer_is_explained(name, key):
    layer = cases.LAYERS[name]
    layer, params, x, *_ = cases.prepare(layer, key)
    outputs = jax.eval_shape(lambda: layer.forward(params, x)[0])
    if len(jax.tree.leaves(outputs)) != 1 or not jax.tree.leaves(params):
        pytest.skip("several outputs, or no parameters")
    targets = jnp.zeros(outputs.shape)
    grads = autodiff(layer, bp.squared_error, params, x, targets)
    shown = bp.explain(layer, params, x, targets)
    for path, gradient in shown.gradients.items():
        at = np.unravel_index(np.argmax(np.abs(gradient[1])), gradient.shape[1:])
        rule = bp.explain(layer, params, x, targets, weight=(path, *at), example=1).chain_rule
        np.testing.assert_allclose(rule.gradient, gradient[1][at], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(gradient, grads[path], rtol=1e-10, atol=1e-12)
