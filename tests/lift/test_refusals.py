"""What cannot be lifted, and what is passed wrongly: errors say what, where, and what to do."""

import jax
import jax.numpy as jnp
import pytest
from functions import ONE, affine, inputs_in_a_tree, stack_of_layers
from jax import lax
from opened import Model, N, normal

import jaxbp as bp


def halved(x, by):
    return lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: x / (1 + by**2), x)


def lift(f, params, x, **options):
    return bp.lift(f, params, x, **options)


def lifted_stack():
    return stack_of_layers().lift()


W = {"w": jnp.ones((3, 3))}
X = normal(0, N, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: lift(lambda p, x: x @ p["w"] - x.mean(0), W, X),
            r"lift\(<lambda>\) gives other outputs for a batch than for its examples one by one, "
            r"by .* Examples see each other",
        ),
        (
            lambda: lift(lambda p, x: (x @ p["w"]) @ (x @ p["w"]).T, W, X, name="contrastive"),
            r"contrastive gives other outputs for a batch than for its examples one by one, by inf",
        ),
        (
            lambda: lift(lambda p, x: jnp.sum(x @ p["w"]), W, X),
            r"gave outputs of shapes \[\] for a batch of one example; it takes \[N, \.\.\.\] for",
        ),
        (
            lambda: lift(lambda p, x: (x @ p["w"], p["w"]), W, X),
            r"gave outputs of shapes \[1, 3\], \[3, 3\] for a batch of one example",
        ),
        (
            lambda: lift(lambda p, x: (), W, X),
            r"gave outputs of shapes  for a batch of one example",
        ),
        (
            lambda: lift(lambda p, x: halved(x, p["w"][0, 0]) @ p["w"], W, X, **ONE),
            r"meets w in a while_loop, through which no error can be carried back "
            r"\(.*test_refusals\.py:\d+.*halved.*\)\. Use lax\.scan, or fori_loop",
        ),
        (
            lambda: lift(lambda p, x: halved(x * p["a"] * p["b"], 1.0), {"a": X[0], "b": X[1]}, X),
            r"has a while_loop on the way to its outputs.*\(.*test_refusals\.py:\d+.*halved",
        ),
        (
            lambda: lift(lambda p, x: halved(x, p["a"] + p["b"]), {"a": X[0], "b": X[1]}, X, **ONE),
            r"meets (a and b|b and a) in a while_loop",
        ),
        (
            lambda: lift(
                lambda p, x: lax.scan(lambda h, _: (halved(h, p["w"][0]), None), x, None, 2)[0],
                W, X, **ONE,
            ),
            r"lift\(<lambda>\) meets w in a while_loop",
        ),
        (
            lambda: lift(lambda p, x: x * p["n"], {"n": jnp.arange(3), "w": jnp.ones(3)}, X),
            r"has parameters that are not floating-point: n\. Take them out of params, and let the "
            r"function close over them\?",
        ),
        (
            lambda: lift(lambda p, x: p["w"] @ x, W, X),
            r"failed on a batch of one example: .*\. If it takes one example, without N, pass "
            r"per_example=True\?",
        ),
        (
            lambda: lift(lambda p, x: jnp.einsum("ni,io->no", x, p["w"]), W, X, per_example=True),
            r"failed on one example, without N: .*\. If it takes a batch, leave out per_example\?",
        ),
        (
            lambda: lift(lambda p, x: x @ p["w"], W, X)[0].init(jax.random.key(0), (3,)),
            r"was lifted without init, and cannot draw parameters\. Pass lift\(\.\.\., init=",
        ),
        (
            lambda: bp.random_feedback().make(
                jax.random.key(0), lift(lambda p, x: x @ p["w"], W, X)[0], (3,)
            ),
            "was lifted without init",
        ),
        (
            lambda: lifted_stack()[0].forward(stack_of_layers().params, X),
            r"got (b|w) as the function has it; a scan runs over it, and the layer takes the "
            r"parameters that lift returned, with a Stacked in its place",
        ),
        (
            lambda: lifted_stack()[0].forward({"w": jnp.ones(3)}, X),
            r"got parameters that are not its own",
        ),
        (
            lambda: bp.value_and_grad(inputs_in_a_tree().lift()[0], bp.squared_error)(
                inputs_in_a_tree().params, inputs_in_a_tree().inputs, X
            ),
            r"squared_error: outputs is a dict, expected one array .* by joint_loss\?",
        ),
        (
            lambda: bp.softmax_cross_entropy((X, X), jnp.zeros(N, int)),
            r"softmax_cross_entropy: outputs is a tuple, .* by joint_loss\?",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_uses_are_those_of_a_lifted_layer():
    with pytest.raises(TypeError, match=r"uses: dense\(3\) was not made by lift"):
        bp.uses(bp.dense(3))


def test_outputs_that_are_infinite_or_of_integers_are_compared_too():
    x = normal(0, N, 3)

    def f(p, x):
        h = x @ p["w"]
        return {"masked": jnp.where(h > 0, h, -jnp.inf), "nan": h * jnp.nan, "at": h.argmax(-1)}

    net, params = bp.lift(f, {"w": normal(1, 3, 3)}, x)
    y, cache = net.forward(params, x)
    dy = {"masked": jnp.where(y["masked"] > 0, 1.0, 0.0), "nan": 0 * x, "at": y["at"]}
    _, grads = net.backward(params, cache, dy, read=bp.total)
    assert grads["w"].shape == (3, 3)
    with pytest.raises(bp.LayerError, match="by inf of the largest"):
        bp.lift(lambda p, x: x * p + jnp.where(jnp.arange(N) == 1, jnp.nan, 0.0)[:, None][: len(x)],
                jnp.ones(3), x)  # fmt: skip


def test_a_batch_of_one_is_not_compared():
    x = normal(0, N, 3)
    net, params = bp.lift(lambda p, x: x * p - x.mean(0), jnp.ones(3), x[:1])
    assert not bool(jnp.any(net.forward(params, x)[0]))


def test_messages_name_the_function():
    def my_model(p, x):
        return x @ p["w"]

    assert Model(my_model, W, X).lift()[0].name == "lift(my_model)"
    assert Model(my_model, W, X).lift(name="mine")[0].name == "mine"
    assert affine().lift()[0].name == "lift(f)"
