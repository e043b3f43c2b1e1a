"""The gradient check finds every mistake that is planted, and says which parameter it is in."""

import jax
import jax.numpy as jnp
import pytest

import jaxbp as bp


def dense_with(dx=lambda dx: dx, weight=lambda s: s, bias=lambda s: s):
    """`dense(3)` with a mistake planted in its backward."""
    good = bp.dense(3)

    def backward(params, x, dy, *, read=bp.keep):
        return dx(dy @ params["weight"].T), {
            "weight": read(weight(bp.Outer(x, dy))),
            "bias": read(bias(bp.Bias(dy))),
        }

    return good._replace(backward=backward)


MISTAKES = {
    "a sign in dx": (dense_with(dx=lambda dx: -dx), {"inputs"}),
    "a thousandth in dx": (dense_with(dx=lambda dx: 1.001 * dx), {"inputs"}),
    "a tiny factor in dx": (dense_with(dx=lambda dx: (1 + 1e-8) * dx), {"inputs"}),
    "a weight's operand": (
        dense_with(weight=lambda s: s._replace(inputs=s.inputs + 0.1)),
        {"params.1.weight"},
    ),
    "a bias doubled": (
        dense_with(bias=lambda s: bp.Bias(2 * s.deltas)),
        {"params.1.bias"},
    ),
    "one example left out": (
        dense_with(bias=lambda s: bp.Bias(s.deltas.at[0].set(0))),
        {"params.1.bias"},
    ),
    "not a number": (dense_with(dx=lambda dx: dx * jnp.nan), {"inputs"}),
}


@pytest.mark.parametrize(("layer", "wrong"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_planted_mistake_is_found_and_its_place_said(layer, wrong, key):
    net = bp.chain(bp.flatten(), layer, bp.tanh())
    report = bp.check(net, key, (2, 2))
    assert not report.ok
    by_autodiff = {f.what for f in report.findings if f.witness == "autodiff" and not f.ok}
    assert by_autodiff == wrong
    with pytest.raises(AssertionError, match=rf"WRONG +{wrong.pop()} +autodiff"):
        report.raise_if_wrong()


def test_a_layer_that_takes_tokens_is_checked_on_those_that_it_is_given(key):
    good = bp.embedding(4, 3)

    def backward(params, x, dy, *, read=bp.keep):
        return good.backward(params, x, dy.at[0].set(0), read=read)

    tokens = jax.random.randint(key, (3, 5), 0, 4)
    assert bp.check(bp.chain(good, bp.tanh()), key, (5,), inputs=tokens).ok
    wrong = bp.check(good._replace(backward=backward), key, (5,), inputs=tokens)
    assert {f.what for f in wrong.findings if not f.ok} == {"params.weight", "all together"}


@pytest.mark.parametrize("name", ["a sign in dx", "a weight's operand", "a bias doubled"])
def test_each_witness_finds_it_on_its_own(name, key):
    report = bp.check(bp.chain(bp.flatten(), MISTAKES[name][0]), key, (2, 2))
    for witness in ("autodiff", "finite differences", "adjoint identity"):
        assert any(not f.ok for f in report.findings if f.witness == witness)


def test_a_loss_with_a_wrong_delta_is_found(key):
    good = bp.squared_error
    bad = bp.Loss(
        "bad", lambda y, t: (good.terms(y, t)[0], t - y), good.sample, good.hessian_factor
    )
    assert bp.check(good, key, (2, 3)).ok
    assert not bp.check(bad, key, (2, 3)).ok


def test_readings_of_another_structure_are_found(key):
    bad = bp.dense(3)._replace(
        backward=lambda p, x, dy, *, read=bp.keep: (
            dy @ p["weight"].T,
            {"weight": jnp.ones((4, 3))},
        )
    )
    with pytest.raises(AssertionError, match="bias"):
        bp.check(bad, key, (4,))


def test_the_report_prints_a_row_for_each_comparison(key):
    report = bp.check(bp.dense(3), key, (4,))
    lines = str(report).splitlines()
    assert lines[0] == "dense(3): right"
    assert len(lines) == 1 + 3 * 2 + 1
    assert lines[1].split()[:3] == ["ok", "inputs", "autodiff"]
    assert report.raise_if_wrong() is report
    assert report.largest_error == max(f.error for f in report.findings if f.witness == "autodiff")


def test_the_check_leaves_no_trace_in_the_configuration(key):
    with jax.enable_x64(False):
        assert bp.check(bp.dense(3), jax.random.key(0), (4,)).ok
        assert jnp.ones(()).dtype == jnp.float32


def test_a_layer_in_32_bits_is_checked_in_64(key):
    assert bp.check(bp.dense(3, dtype=jnp.float32), key, (4,)).largest_error < 1e-14


@pytest.mark.parametrize("seed", range(4))
def test_the_kinks_of_a_wide_network_are_no_mistakes(seed):
    net = bp.chain(bp.dense(512), bp.relu(), bp.dropout(0.4), bp.dense(256), bp.relu(), bp.dense(9))
    bp.check(net, jax.random.key(seed), (64,)).raise_if_wrong()


def test_what_is_not_a_layer_is_refused(key):
    with pytest.raises(TypeError, match="check: takes a Layer or a Loss; got function"):
        bp.check(bp.relu, key, (4,))
