"""Errors and curvature: Gauss-Newton matrices and Jacobians against those formed whole."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    ERRORS,
    FEW_NETWORKS,
    LOSSES,
    NETWORKS,
    READINGS,
    SOON_LOSSES,
    Case,
    N,
    every,
    late,
    normal,
    output_shape,
    prepare,
)
from oracles import assert_close, gauss_newton, hessian, jacobian, ravel, ravel_examples

import jaxbp as bp

# Those whose outputs are any one array.
OF_ARRAYS = {name: case for name, case in LOSSES.items() if case.is_one_array and not case.link}
WITH_FACTOR = {name: case for name, case in OF_ARRAYS.items() if case.has_factor}
every_network = every("case", FEW_NETWORKS, soon={"classifier", "transformer"})
CURVATURE = {"diagonal": bp.diagonal, "per_example": bp.per_example_diagonal}


def problem_of(loss_case, key):
    """A network that gives the outputs of a loss's case, with inputs and targets."""
    positions = loss_case.shape[:-1]
    net = bp.chain(bp.dense(3), bp.tanh(), bp.dense(loss_case.shape[-1]))
    params, _ = net.init(key, (*positions, 2))
    x = normal(key, (N, *positions, 2))
    return net, params, x, loss_case.targets(np.random.default_rng(7))


@every("case", WITH_FACTOR, SOON_LOSSES)
def test_ggn_columns_give_the_diagonal_of_every_loss(case, key):
    net, params, x, targets = problem_of(case, key)
    sweep = jax.jit(bp.backprop(net, case.loss, read=CURVATURE, error=bp.ggn_columns))
    _, got = sweep(params, x, targets)
    want = np.diagonal(gauss_newton(net, case.loss, params, x, targets), axis1=1, axis2=2)
    assert_close(ravel_examples(got["per_example"]), want)
    assert_close(ravel(got["diagonal"]), want.sum(0))


@every_network
def test_ggn_columns_give_the_diagonal_of_every_network(case, key):
    net, params, x, draw_key = prepare(case, key)
    targets = normal(key, output_shape(net, params, x))
    sweep = jax.jit(bp.backprop(net, bp.huber, read=CURVATURE, error=bp.ggn_columns))
    _, got = sweep(params, x, targets, key=draw_key)
    matrices = gauss_newton(net, bp.huber, params, x, targets, draw_key)
    want = np.diagonal(matrices, axis1=1, axis2=2)
    assert_close(ravel_examples(got["per_example"]), want)
    assert_close(ravel(got["diagonal"]), want.sum(0))


@every_network
def test_jacobian_rows_give_the_jacobian(case, key):
    net, params, x, draw_key = prepare(case, key)
    targets = jnp.zeros(output_shape(net, params, x))
    read = {"rows": bp.per_example, "sq_norms": bp.sq_norms}
    sweep = jax.jit(bp.backprop(net, bp.squared_error, read=read, error=bp.jacobian_rows))
    _, got = sweep(params, x, targets, key=draw_key)
    want = np.asarray(jacobian(net, params, x, draw_key))
    assert_close(ravel_examples(got["rows"], axes=2), np.swapaxes(want, 0, 1))
    sq_norms = sum(map(np.asarray, jax.tree.leaves(got["sq_norms"])))
    assert_close(sq_norms, np.sum(want**2, axis=-1).T)


@pytest.mark.parametrize("weighted", [late(False), True], ids=["", "weighted"])
@pytest.mark.parametrize(
    "name",
    ["softmax_cross_entropy at positions", "sigmoid_cross_entropy of many labels",
     "squared_error at positions"],
)  # fmt: skip
def test_sampled_comes_to_the_exact_curvature_on_average(name, weighted, key):
    """Over 20 000 draws, whose error is about 1 % of the largest entry."""
    case = LOSSES[name]
    net, params, x, targets = problem_of(case, key)
    loss = case.loss
    if weighted:
        loss, targets = bp.weighted(loss), (targets, jnp.array([0.0, 0.5, 4.0]))
    many = functools.partial(bp.sampled, draws=20_000)
    read = {"diagonal": bp.diagonal, "kronecker": bp.kronecker}
    _, got = jax.jit(bp.backprop(net, loss, read=read, error=many))(
        params, x, targets, error_key=key
    )
    _, want = jax.jit(bp.backprop(net, loss, read=read, error=bp.ggn_columns))(params, x, targets)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=0.05 * np.max(np.abs(b)))


def test_sampled_huber_comes_to_the_fisher_information(key):
    """Whose Hessian depends on the target: its mean is P(|r| <= h), whatever the targets are."""
    outputs = jnp.zeros((1, 1))
    columns = bp.sampled(bp.huber, outputs, outputs, key, draws=40_000)
    r = np.linspace(-40, 40, 400_001)
    density = np.exp(-np.where(np.abs(r) <= 1, r**2 / 2, np.abs(r) - 0.5))
    near = density[np.abs(r) <= 1].sum() / density.sum()
    np.testing.assert_allclose(jnp.sum(columns**2), near, atol=0.01)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_draws_of_16_bits_are_not_biased_by_rounding(dtype, key):
    far = jnp.full((20_000, 1), 3000, dtype)
    columns = bp.sampled(bp.squared_error, far, jnp.zeros_like(far), key)
    assert columns.dtype == dtype
    np.testing.assert_allclose(jnp.mean(columns.astype(float) ** 2), 1, atol=0.05)


def test_one_draw_is_the_delta_at_the_sample(key):
    outputs = normal(key, (N, 4))
    (column,) = bp.sampled(bp.softmax_cross_entropy, outputs, jnp.zeros(N, int), key)
    one_hot = jax.nn.softmax(outputs) - column
    assert_close(jnp.sum(one_hot, axis=-1), jnp.ones(N))
    assert_close(jnp.max(one_hot, axis=-1), jnp.ones(N))


def is_kronecker(node):
    return isinstance(node, bp.Kronecker)


class TestKroneckerIsExact:
    """Where A x G is the Gauss-Newton block.

    "Kronecker-factored Approximate Curvature (KFAC) From Scratch", Dangel et al., 2025.
    """

    def assert_exact(self, net, loss, params, x, targets, shared="expand"):
        read = functools.partial(bp.kronecker, bias="apart", shared=shared)
        sweep = jax.jit(bp.backprop(net, loss, read=read, error=bp.ggn_columns))
        _, factors = sweep(params, x, targets)
        matrix = np.mean(gauss_newton(net, loss, params, x, targets), axis=0)
        at = 0
        for factor in jax.tree.leaves(factors, is_leaf=is_kronecker):
            block = np.kron(*factor)
            assert_close(block, matrix[at : at + len(block), at : at + len(block)])
            at += len(block)
        assert at == len(matrix)

    @pytest.mark.parametrize("shared", ["expand", "reduce"])
    @pytest.mark.parametrize("bias", [True, False])
    def test_for_a_deep_linear_network_with_squared_error(self, bias, shared, key):
        net = bp.chain(*(bp.dense(units, use_bias=bias) for units in (4, 3, 2)))
        params, _ = net.init(key, (5,))
        x, targets = normal(key, (N, 5)), jnp.zeros((N, 2))
        self.assert_exact(net, bp.squared_error, params, x, targets, shared)

    def test_with_positions_that_never_meet_by_expand(self, key):
        net = bp.chain(bp.dense(4), bp.dense(2))
        params, _ = net.init(key, (6, 5))
        x, targets = normal(key, (N, 6, 5)), jnp.zeros((N, 6, 2))
        self.assert_exact(net, bp.squared_error, params, x, targets, "expand")

    def test_with_positions_that_are_averaged_by_reduce(self, key):
        net = bp.chain(bp.dense(4), mean_of_positions(6), bp.dense(2))
        params, _ = net.init(key, (6, 5))
        x, targets = normal(key, (N, 6, 5)), jnp.zeros((N, 2))
        self.assert_exact(net, bp.squared_error, params, x, targets, "reduce")

    @pytest.mark.parametrize("loss", [bp.softmax_cross_entropy, bp.squared_error])
    def test_for_one_example(self, loss, key):
        net = bp.chain(bp.dense(4), bp.tanh(), bp.dense(3))
        params, _ = net.init(key, (5,))
        targets = jnp.array([1]) if loss is bp.softmax_cross_entropy else jnp.zeros((1, 3))
        self.assert_exact(net, loss, params, normal(key, (1, 5)), targets)

    def test_with_the_bias_folded_in_the_block_is_that_of_both(self, key):
        net = bp.dense(3)
        params, _ = net.init(key, (4,))
        x, targets = normal(key, (N, 4)), jnp.zeros((N, 3))
        sweep = jax.jit(bp.backprop(net, bp.squared_error, read=bp.kronecker, error=bp.ggn_columns))
        _, factors = sweep(params, x, targets)
        assert factors["bias"] == ()
        # The bias is the last row of the weight: as in a network whose inputs end in a 1.
        folded = bp.dense(3, use_bias=False)
        ones = jnp.concatenate([x, jnp.ones((N, 1))], axis=1)
        rows = {"weight": jnp.concatenate([params["weight"], params["bias"][None]])}
        matrices = gauss_newton(folded, bp.squared_error, rows, ones, targets)
        assert_close(np.kron(*factors["weight"]), np.mean(matrices, axis=0))

    def test_it_is_not_exact_everywhere(self, key):
        net = bp.chain(bp.dense(4), bp.tanh(), bp.dense(3))
        params, _ = net.init(key, (5,))
        x = normal(key, (N, 5))
        with pytest.raises(AssertionError, match="Not equal"):
            self.assert_exact(net, bp.squared_error, params, x, jnp.zeros((N, 3)))


def mean_of_positions(t):
    def init(key, shape):
        return (), shape[1:]

    def forward(params, x, *, key=None):
        return jnp.mean(x, axis=1), ()

    def backward(params, cache, dy, *, read=bp.keep):
        return jnp.repeat(dy[:, None], t, axis=1) / t, ()

    return bp.Layer("mean_of_positions", init, forward, backward)


class TestProducts:
    @every_network
    def test_hessian_and_gauss_newton_times_a_vector(self, case, key):
        net, params, x, draw_key = prepare(case, key)
        _, vector, _, _ = prepare(case, jax.random.fold_in(key, 1))
        loss, targets = (
            bp.sigmoid_cross_entropy,
            jax.random.uniform(key, output_shape(net, params, x)),
        )
        args = params, x, targets, vector
        got = jax.jit(bp.hessian_vector_product(net, loss))(*args, key=draw_key)
        want = np.asarray(hessian(net, loss, params, x, targets, draw_key)) @ ravel(vector)
        assert_close(ravel(got), want)
        got = jax.jit(bp.gauss_newton_vector_product(net, loss))(*args, key=draw_key)
        matrix = np.mean(gauss_newton(net, loss, params, x, targets, draw_key), axis=0)
        assert_close(ravel(got), matrix @ ravel(vector))

    @every("case", OF_ARRAYS, SOON_LOSSES)
    def test_gauss_newton_of_every_loss(self, case, key):
        net, params, x, targets = problem_of(case, key)
        vector = jax.tree.map(np.sin, params)
        product = jax.jit(bp.gauss_newton_vector_product(net, case.loss))
        got = product(params, x, targets, vector)
        matrix = np.mean(gauss_newton(net, case.loss, params, x, targets), axis=0)
        assert_close(ravel(got), matrix @ ravel(vector))

    def test_they_are_one_for_a_network_linear_in_its_parameters_and_not_otherwise(self, key):
        for net, same in (
            (bp.dense(3), True),
            (bp.chain(bp.dense(3), bp.dense(3)), False),
        ):
            params, _ = net.init(key, (4,))
            x, targets = normal(key, (N, 4)), jnp.zeros((N, 3))
            vector = jax.tree.map(np.cos, params)
            products = [
                ravel(jax.jit(product(net, bp.squared_error))(params, x, targets, vector))
                for product in (bp.hessian_vector_product, bp.gauss_newton_vector_product)
            ]
            assert np.allclose(*products) == same


# A parameter that is used in several ways and transposed.
TIED = {"tied": Case(lambda: bp.tied_embedding(3, 2, bp.tanh()), (2,), vocabulary=3)}


class TestKernel:
    @every("case", {**FEW_NETWORKS, **TIED}, soon={"classifier", "tied"})
    def test_the_kernel_is_the_product_of_jacobians(self, case, key):
        net, params, x, _ = prepare(case, key)
        _, _, others, _ = prepare(case, jax.random.fold_in(key, 1), n=4)
        rows, other_rows = (np.asarray(jacobian(net, params, inputs)) for inputs in (x, others))
        want = np.einsum("ncp,mdp->ncmd", rows, other_rows)
        kernel = jax.jit(bp.neural_tangent_kernel(net))
        assert_close(kernel(params, x, others), want)
        assert_close(kernel(params, x), np.einsum("ncp,mdp->ncmd", rows, rows))
        per_class = jax.jit(bp.neural_tangent_kernel_per_class(net))
        assert_close(per_class(params, x, others), np.einsum("ncmc->nmc", want))
        assert_close(per_class(params, x), np.einsum("ncp,mcp->nmc", rows, rows))


@every("error", {name: name for name in ERRORS}, soon={"sampled"})
def test_every_reading_takes_every_error(error, key):
    """Those with an argument `columns` sum; the others answer for each column."""
    net = bp.chain(bp.dense(3), bp.tanh(), bp.dense(2))
    params, _ = net.init(key, (2, 4))
    x = normal(key, (N, 2, 4))
    targets = jnp.zeros(output_shape(net, params, x))
    sweep = jax.jit(bp.backprop(net, bp.squared_error, read=READINGS, error=ERRORS[error]))
    values, answers = sweep(params, x, targets, error_key=key)
    outputs, _ = net.forward(params, x)
    columns = np.asarray(ERRORS[error](bp.squared_error, outputs, targets, key))
    assert columns.shape[1:] == outputs.shape
    assert_close(values, bp.squared_error(outputs, targets)[0])

    @jax.jit
    def answers_to(column):
        _, cache = net.forward(params, x)
        return {
            name: net.backward(params, cache, column, read=read)[1]
            for name, read in READINGS.items()
        }

    each = [answers_to(column) for column in columns]
    for name in READINGS:
        stacked = jax.tree.map(lambda *rows: np.stack(rows), *(own[name] for own in each))
        if name in ("diagonal", "per_example_diagonal"):
            stacked = jax.tree.map(lambda a: np.sum(a, axis=0), stacked)
        if name == "kronecker":
            stacked = jax.tree.map(
                lambda f: f._replace(inputs=f.inputs[0], deltas=np.sum(f.deltas, axis=0)),
                stacked,
                is_leaf=is_kronecker,
            )
        assert_close(answers[name], stacked)


def test_the_second_call_does_not_trace_again(key):
    net, params, x, _ = prepare(NETWORKS["classifier"], key)
    chex.clear_trace_counter()
    sweep = bp.backprop(net, bp.softmax_cross_entropy, read=bp.kronecker, error=bp.sampled)
    function = jax.jit(chex.assert_max_traces(sweep, n=1))
    labels = jnp.zeros(N, int)
    function(params, x, labels, error_key=key)
    function(params, x + 1, labels, error_key=jax.random.key(7))


OUTPUTS = jnp.ones((3, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: bp.sampled(bp.huber, OUTPUTS, OUTPUTS, None),
            ValueError,
            r"sampled: draws targets and needs a random key\. Pass error_key=",
        ),
        (
            lambda: bp.sampled(bp.huber, OUTPUTS, OUTPUTS, jax.random.key(0), draws=0),
            ValueError,
            "sampled: draws is 0; it takes a positive integer",
        ),
        (
            lambda: bp.sampled(bp.huber, OUTPUTS, OUTPUTS, 0),
            ValueError,
            "sampled: key is 0; it takes one key",
        ),
        (
            lambda: bp.sampled(lambda y, t: (y, t), OUTPUTS, OUTPUTS, jax.random.key(0)),
            TypeError,
            "sampled: takes a Loss, .*; got function",
        ),
        (
            lambda: bp.ggn_columns(lambda y, t: (y, t), OUTPUTS, OUTPUTS),
            TypeError,
            "ggn_columns: takes a Loss, .*; got function",
        ),
        (
            lambda: bp.backprop(bp.relu(), bp.huber, error=lambda loss, y, t, key: y)(
                (), OUTPUTS, OUTPUTS
            ),
            ValueError,
            r"the error has shape \[3, 4\], expected columns of the outputs' shape, \[K, 3, 4\]",
        ),
    ],
)
def test_what_is_wrong_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()
