"""Models of other libraries: every value, gradient and reading against autodiff of the model."""

import jax
import pytest
from libraries import LIBRARIES, linen_dropout
from opened import N, assert_opened, normal

import jaxbp as bp

# Their code relies on it.
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if case.always else pytest.mark.thorough)
        for name, case in LIBRARIES.items()
    ],
)
def test_a_model_is_opened(name):
    case = LIBRARIES[name]
    assert_opened(case.make(), tolerance=case.tolerance)


@pytest.mark.thorough
def test_a_model_that_draws_gets_a_key_for_each_example(key):
    net, params = assert_opened(linen_dropout(), key=key)
    x = normal(0, N, 5)
    same = x.at[:].set(x[0])
    y, _ = net.forward(params, same, key=key)
    assert len({tuple(row) for row in y.tolist()}) > 1
    assert len({tuple(row) for row in net.forward(params, same)[0].tolist()}) == 1


def test_batch_normalisation_in_training_is_refused():
    nn = pytest.importorskip("flax.linen")

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, param_dtype=float)(x)
            return nn.BatchNorm(use_running_average=False, param_dtype=float)(x)

    x, model = normal(0, N, 5), Normed()
    variables = model.init(jax.random.key(1), x)

    def with_state(params, x):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        return model.apply(given, x, mutable=["batch_stats"])

    with pytest.raises(bp.LayerError, match=r"gave outputs of shapes .* Leave out what is no outp"):
        bp.lift(with_state, variables["params"], x)
    with pytest.raises(bp.LayerError, match=r"other outputs for a batch.*batch normalisation"):
        bp.lift(lambda p, x: with_state(p, x)[0], variables["params"], x)
