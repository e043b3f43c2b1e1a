"""Signals of one's own kinds: all they need is the gradient of each example."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import READINGS
from oracles import assert_close

import jaxbp as bp

N = 4

BY_DEFINITION = {
    "total": lambda g: jnp.sum(g, 0),
    "mean": lambda g: jnp.mean(g, 0),
    "sq_norms": lambda g: jnp.sum(g**2, 1),
    "per_example": lambda g: g,
    "second_moment": lambda g: jnp.mean(g**2, 0),
    "variance": lambda g: jnp.var(g, 0),
    "diagonal": lambda g: jnp.sum(g**2, 0),
    "per_example_diagonal": lambda g: g**2,
    "gram": lambda g: g @ g.T,
}


class Plain(NamedTuple):
    """Of the coefficients [3] of a polynomial, sum_k c_k x^k. None of its fields is a library's."""

    x: jax.Array
    dy: jax.Array

    def per_example(self):
        return jnp.stack([jnp.sum(self.x**k * self.dy, axis=1) for k in range(3)], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Formulas:
    """The same with formulas of its own, and a field that is no array."""

    x: jax.Array
    dy: jax.Array
    degree: int = dataclasses.field(metadata={"static": True})

    def per_example(self):
        return Plain(self.x, self.dy).per_example()

    def total(self, weights):
        dy = self.dy if weights is None else self.dy * weights[:, None]
        return jnp.stack([jnp.vdot(self.x**k, dy) for k in range(self.degree + 1)])

    def sq_norms(self):
        return sum(jnp.sum(self.x**k * self.dy, axis=1) ** 2 for k in range(self.degree + 1))

    def gram(self, other):
        return self.per_example() @ other.per_example().T


def polynomial(kind):
    def init(key, shape):
        return {"c": jax.random.normal(key, (3,))}, shape

    def forward(params, x, *, key=None):
        del key
        c = params["c"]
        return c[0] + c[1] * x + c[2] * x**2, x

    def backward(params, x, dy, *, read=bp.keep):
        c = params["c"]
        return (c[1] + 2 * c[2] * x) * dy, {"c": read(kind(x, dy))}

    return bp.Layer("polynomial", init, forward, backward)


def with_formulas(x, dy):
    return Formulas(x, dy, 2)


def operands():
    return tuple(jnp.asarray(np.random.default_rng(3).normal(size=(2, N, 5))))


@pytest.mark.parametrize("kind", [Plain, with_formulas])
def test_every_reading_takes_it_alone_and_as_one_of_several_uses(kind):
    signal, one = kind(*operands()), Plain(*operands()).per_example()
    for signals, gradients in ((signal, one), (bp.Sum((signal, signal)), 2 * one)):
        for name in READINGS.keys() - {"keep", "health", "kronecker"}:
            assert_close(READINGS[name](signals), BY_DEFINITION[name](gradients))
        assert_close(bp.total(signals, weights=jnp.arange(4.0)), jnp.arange(4.0) @ gradients)
        assert_close(
            bp.directional_derivatives(signals, jnp.arange(3.0)), gradients @ jnp.arange(3.0)
        )
        assert_close(bp.health(signals).gradient.largest, jnp.abs(jnp.mean(gradients, 0)).max())
        assert bp.kronecker(signals) == ()


def test_every_sweep_takes_it_in_every_combinator(key):
    x, y = operands()
    loss, answers = bp.squared_error, []
    for kind in (Plain, with_formulas):
        layer = polynomial(kind)
        net = bp.chain(bp.dense(5), bp.remat(layer), bp.repeat(layer, 2), bp.stack(layer, 2))
        params, _ = net.init(key, (5,))
        rule = bp.sign_symmetric()
        state = rule.make(key, net, (5,))

        @jax.jit
        def sweeps(params, net=net, rule=rule, state=state):
            batch, clip = (params, x, y), bp.clip_weights(1.0)
            angles = bp.alignment(net, loss, rule=rule)(*batch, rule_state=state)
            once = bp.reweighted(net, loss, clip)(*batch)
            twice = bp.reweighted(net, loss, clip, sweeps=2)(*batch)
            return (
                (once.grads, twice.grads),
                bp.value_and_grad(net, loss)(*batch)[1],
                bp.gram(bp.backprop(net, loss, read=bp.keep)(*batch)[1]),
                bp.neural_tangent_kernel(net)(params, x),
                bp.kfac_factors(net, loss, error=bp.ggn_columns)(*batch, key=key),
                jax.tree.map(jnp.nan_to_num, angles),  # no deltas, so no angle between them
            )

        answers.append(sweeps(params))
    assert_close(*answers)
    assert_close(*answers[0][0])


def test_the_check_finds_each_formula_that_is_wrong(key):
    assert bp.check(polynomial(with_formulas), key, (5,)).ok
    for method in ("total", "sq_norms", "gram"):
        wrong = type("Wrong", (Formulas,), {method: lambda *a: 1.1 * getattr(Formulas, method)(*a)})  # noqa: B023
        wrong = jax.tree_util.register_dataclass(wrong, ["x", "dy"], ["degree"])
        report = bp.check(polynomial(lambda x, dy, wrong=wrong: wrong(x, dy, 2)), key, (5,))
        found = str(report)
        assert not report.ok
        assert "params.c" in found
        assert method in found or method == "total"


def test_a_record_that_is_no_pytree_is_refused_with_what_to_do():
    class Unregistered:
        def per_example(self):
            return jnp.ones((2, 3))

    for name, reading in READINGS.items():
        if name != "keep":
            with pytest.raises(TypeError, match=rf"{name}: .* not a pytree\. Make it a NamedTuple"):
                reading(Unregistered())
    with pytest.raises(TypeError, match=r"gram: .* not a pytree"):
        bp.gram(Unregistered())
