"""What a sweep of a lifted GPT needs, beside what `jax.grad` of the same function does.

Temporary bytes are those of the compiled program, and the same on every run.
"""

import jax
import jax.numpy as jnp
import pytest
from gpt import gpt, gpt_params

import jaxbp as bp

BLOCKS, WIDTH, LENGTH, N, VOCABULARY = 6, 64, 64, 16, 64


def temporary(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["unrolled", "scan", "scan and checkpoint"])
def test_memory_is_that_of_autodiff(how, as_shipped):
    del as_shipped
    params = gpt_params(
        blocks=BLOCKS,
        width=WIDTH,
        vocabulary=VOCABULARY,
        length=LENGTH,
        stacked=how != "unrolled",
        heads=4,
    )
    x = jax.random.randint(jax.random.key(1), (N, LENGTH), 0, VOCABULARY)
    f, loss = gpt(BLOCKS, how), bp.softmax_cross_entropy
    net, own = bp.lift(f, params, x)

    def objective(params, x, targets):
        return jnp.mean(loss(f(params, x), targets)[0])

    def norms(params, x, targets):
        read = {"mean": bp.mean, "sq_norms": bp.sq_norms}
        _, answers = bp.backprop(net, loss, read=read)(params, x, targets)
        return answers["mean"], bp.example_norms(answers["sq_norms"])

    autodiff = temporary(jax.grad(objective), params, x, x)
    mean = temporary(lambda *a: bp.value_and_grad(net, loss)(*a)[1], own, x, x)
    both = temporary(norms, own, x, x)
    assert mean <= 1.1 * autodiff
    assert both <= 1.25 * autodiff
