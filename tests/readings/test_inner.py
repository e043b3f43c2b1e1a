"""Inner products of gradients, against gradients formed one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    FEW_NETWORKS,
    SIGNALS,
    SIGNALS_AT_POSITIONS,
    N,
    every,
    late,
    output_shape,
    prepare,
)
from oracles import (
    assert_close,
    in_dtype,
    per_example_grads,
    ravel,
    ravel_examples,
    signal_gradients,
    squared,
)

import jaxbp as bp
from jaxbp.readings import costs
from jaxbp.readings import inner_products as inner

every_network = every("case", FEW_NETWORKS, soon={"classifier", "convolutional"})


def flat(signal):
    gradients = signal_gradients(signal)
    return gradients.reshape(len(gradients), -1)


def test_gram_is_of_all_pairs(signal):
    assert_close(jax.jit(bp.gram)(signal), flat(signal) @ flat(signal).T)


def test_its_diagonal_is_the_squared_norms(signal):
    assert_close(jnp.diagonal(jax.jit(bp.gram)(signal)), jax.jit(bp.sq_norms)(signal))


@pytest.mark.parametrize("s", [late(()), (3,)])
@pytest.mark.parametrize(
    ("kind", "t"), [case for case in SIGNALS_AT_POSITIONS if "pull-back" not in case[0]]
)
def test_gram_of_two_batches_of_different_sizes_and_lengths(kind, t, s):
    rng = np.random.default_rng(3)
    first, second = SIGNALS[kind](rng, *t), SIGNALS[kind](rng, *s)
    more = SIGNALS[kind](rng, *s)
    second = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b[:2]]) if len(a) == N else a, second, more
    )
    got = jax.jit(bp.gram)(first, second)
    assert got.shape == (3, 5)
    assert_close(got, flat(first) @ flat(second).T)


@pytest.mark.parametrize(("t", "s"), [(2, 2), (3, 5), (40, 40)])
def test_gram_and_gradient_give_the_same_products_each_by_its_own_way(t, s, monkeypatch):
    rng = np.random.default_rng(3)
    first, second = SIGNALS["Outer"](rng, t), SIGNALS["Outer"](rng, s)
    answers = {}
    for gram in (True, False):
        monkeypatch.setattr(inner, "gram_is_less_work", lambda *_, gram=gram, **__: gram)
        answers[gram] = jax.jit(lambda a, b: bp.gram(a, b))(first, second)
    assert_close(answers[True], answers[False])
    assert not np.array_equal(answers[True], answers[False])


def test_the_choice_is_asked_for_the_sizes_that_are_there(monkeypatch):
    asked = []
    monkeypatch.setattr(inner, "gram_is_less_work", lambda *a, **k: asked.append((a, k)) or True)
    rng = np.random.default_rng(3)
    first, second = SIGNALS["Outer"](rng, 2), SIGNALS["Outer"](rng, 7)
    second = jax.tree.map(lambda a: jnp.concatenate([a, a]), second)
    bp.gram(first, second)
    bp.gram(first)
    assert asked == [
        ((5, 4), {"pairs": 3 * 2 * 6 * 7, "rows": 3 * 2 + 6 * 7, "products": 3 * 6}),
        ((5, 4), {"pairs": (3 * 2) ** 2, "rows": 3 * 2, "products": 3 * 3}),
    ]


@pytest.mark.parametrize("n", [2, 16])
@pytest.mark.parametrize("t", [2, 4, 24, 64])
def test_the_cheaper_way_has_fewer_flop(n, t, monkeypatch):
    i, o = 64, 32

    def flop(gram):
        monkeypatch.setattr(inner, "gram_is_less_work", lambda *_, **__: gram)
        shapes = bp.Outer(jnp.zeros((n, t, i)), jnp.zeros((n, t, o)))
        compiled = jax.jit(lambda s: bp.gram(s)).lower(shapes).compile()
        return compiled.cost_analysis()["flops"]

    cheaper = flop(True) < flop(False)
    monkeypatch.undo()
    rule = costs.gram_is_less_work(i, o, pairs=(n * t) ** 2, rows=n * t, products=n * n)
    assert rule == cheaper


@every_network
def test_gram_of_a_network_sums_over_its_parameters(case, key):
    net, params, x, _ = prepare(case, key)
    _, _, others, _ = prepare(case, jax.random.fold_in(key, 1), n=4)
    pairs = [signals_and_grads(net, params, inputs) for inputs in (x, others)]
    signals, grads = zip(*pairs, strict=True)
    assert_close(jax.jit(bp.gram)(*signals), grads[0] @ grads[1].T)
    assert_close(jax.jit(bp.gram)(signals[0]), grads[0] @ grads[0].T)


@every_network
def test_directional_derivatives_are_products_with_the_direction(case, key):
    net, params, x, _ = prepare(case, key)
    _, direction, _, _ = prepare(case, jax.random.fold_in(key, 1))
    signals, grads = signals_and_grads(net, params, x)
    assert_close(jax.jit(bp.directional_derivatives)(signals, direction), grads @ ravel(direction))


def signals_and_grads(net, params, x):
    targets = jnp.zeros(output_shape(net, params, x))
    sweep = jax.jit(bp.backprop(net, bp.squared_error, read=bp.keep))
    _, signals = sweep(params, x, targets)
    grads = per_example_grads(net, squared, params, x, targets)
    return signals, ravel_examples(grads)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits_are_accumulated_in_32(signal, dtype):
    short = in_dtype(signal, dtype)
    wide = in_dtype(short, jnp.float32)
    assert_close(jax.jit(bp.gram)(short), jax.jit(bp.gram)(wide))
    direction = jnp.ones(signal_gradients(signal).shape[1:], dtype)
    along = jax.jit(bp.directional_derivatives)
    assert_close(along(short, direction), along(wide, direction.astype(jnp.float32)))


OUTER, BIAS = bp.Outer(jnp.ones((3, 2)), jnp.ones((3, 4))), bp.Bias(jnp.ones((3, 4)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bp.gram((OUTER,), (BIAS,)), ValueError, "gram: .* not of the same network"),
        (lambda: bp.gram((OUTER,), (OUTER, BIAS)), ValueError, "not of the same network"),
        (
            lambda: bp.gram((BIAS,), (bp.Bias(jnp.ones((3, 5))),)),
            ValueError,
            r"not of the same network: their parameters have shapes \[4\] and \[5\]",
        ),
        (lambda: bp.gram(()), ValueError, "gram: there are no signals in the tree"),
        (
            lambda: bp.gram({"weight": jnp.ones(3)}),
            TypeError,
            "gram: takes the signal .* got Array",
        ),
        (lambda: bp.gram(jnp.arange(3)), TypeError, "gram: takes the signal .* got Array"),
        (
            lambda: bp.directional_derivatives((OUTER, BIAS), (jnp.ones((2, 4)),)),
            ValueError,
            r"not a tree like the parameters, which have shapes \[2, 4\], \[4\]; it has \[2, 4\]\.",
        ),
        (
            lambda: bp.directional_derivatives(OUTER, jnp.ones((4, 2))),
            ValueError,
            r"not a tree like the parameters, which have shapes \[2, 4\]; it has \[4, 2\]\.",
        ),
        (lambda: bp.directional_derivatives((), ()), ValueError, "there are no signals"),
    ],
)
def test_what_is_wrong_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()
