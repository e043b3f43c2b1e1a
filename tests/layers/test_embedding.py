"""Tokens and positions: tables against one-hot products, norms with repeated tokens, waves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import every, normal
from oracles import assert_close

import jaxbp as bp

TOKENS = jnp.array([[2, 0, 2, 2], [1, 1, 3, 3], [4, 3, 1, 0]])


def one_hot_signals(key, vocabulary=5, features=3):
    """The signal of a table, and that of the matrix which is applied to one-hot vectors."""
    deltas = normal(key, (*TOKENS.shape, features))
    table = bp.Lookup(TOKENS, deltas, jnp.zeros((vocabulary, 0)))
    return table, bp.Outer(jax.nn.one_hot(TOKENS, vocabulary), deltas)


def test_an_embedding_is_a_matrix_applied_to_one_hot_vectors(key):
    layer, matrix = bp.embedding(5, 3), bp.dense(3, use_bias=False)
    params, out_shape = layer.init(key, (4,))
    y, cache = layer.forward(params, TOKENS)
    assert out_shape == (4, 3)
    assert_close(y, matrix.forward(params, jax.nn.one_hot(TOKENS, 5))[0])
    dx, signals = layer.backward(params, cache, y)
    assert dx is None
    assert_close(signals["weight"], bp.Lookup(TOKENS, y, jnp.zeros((5, 0))))


@pytest.mark.parametrize(
    "read",
    [bp.total, bp.mean, bp.per_example, bp.sq_norms, bp.second_moment, bp.variance, bp.diagonal,
     bp.per_example_diagonal, bp.gram],
)  # fmt: skip
def test_what_is_read_of_a_table_is_what_is_read_of_the_matrix(read, key):
    table, matrix = one_hot_signals(key)
    assert_close(jax.jit(read)(table), read(matrix))


def test_the_norm_with_repeated_tokens_is_that_of_the_sum(key):
    table, _ = one_hot_signals(key)
    d = np.asarray(table.deltas)
    rows = [d[0, 0] + d[0, 2] + d[0, 3], d[0, 1]]  # token 2 three times, token 0 once
    np.testing.assert_allclose(bp.sq_norms(table)[0], sum(np.sum(row**2) for row in rows))
    # What one would get by taking every position for a token of its own.
    assert abs(float(bp.sq_norms(table)[0]) / np.sum(d[0] ** 2) - 1) > 0.1


def test_norms_form_no_table_for_an_example():
    vocabulary, n, t, o = 50_000, 4, 16, 32
    signal = bp.Lookup(
        jax.ShapeDtypeStruct((n, t), int),
        jax.ShapeDtypeStruct((n, t, o), float),
        jax.ShapeDtypeStruct((vocabulary, 0), float),
    )
    for read, tables in ((bp.sq_norms, 0), (bp.total, 1), (bp.diagonal, 1), (bp.gram, 0)):
        memory = jax.jit(lambda s, read=read: read(s)).lower(signal).compile().memory_analysis()
        held = memory.temp_size_in_bytes + memory.output_size_in_bytes
        # One for a total; and the compiler may keep a second while it adds to it.
        assert held < (2 * tables + 0.05) * 8 * vocabulary * o, read


@pytest.mark.parametrize("vocabulary", [5, 500])
def test_inner_products_of_two_batches_by_both_ways(vocabulary, key):
    """Of few rows by the gradients, of many by the pairs of positions that look up the same."""
    table, matrix = one_hot_signals(key, vocabulary)
    one, other = (jax.tree.map(lambda a: a[:1], s) for s in (table, matrix))
    one = one._replace(table=table.table)
    assert_close(jax.jit(bp.gram)(table, one), bp.gram(matrix, other))
    direction = normal(key, (vocabulary, 3))
    assert_close(
        bp.directional_derivatives(table, direction),
        bp.directional_derivatives(matrix, direction),
    )


@pytest.mark.parametrize("token", [-1, 5, 700])
def test_what_is_no_token_has_a_vector_that_is_not_a_number(token, key):
    layer = bp.embedding(5, 3)
    params, _ = layer.init(key, (2,))
    y, _ = jax.jit(layer.forward)(params, jnp.array([[1, token]]))
    assert jnp.isnan(y).tolist() == [[[False] * 3, [True] * 3]]


def test_tokens_may_be_of_any_integers(key):
    layer = bp.embedding(5, 3)
    params, _ = layer.init(key, (4,))
    for dtype in (jnp.uint8, jnp.int16, jnp.int64):
        y, cache = layer.forward(params, TOKENS.astype(dtype))
        assert_close(y, params["weight"][TOKENS])
        _, grads = layer.backward(params, cache, y, read=bp.per_example)
        assert grads["weight"].shape == (3, 5, 3)


def test_learned_positions_are_added(key):
    layer = bp.learned_positions(7)
    params, _ = layer.init(key, (4, 3))
    x = normal(key, (2, 4, 3))
    y, cache = layer.forward(params, x)
    assert_close(y, x + params["weight"][None, :4])
    # A sequence may be shorter than the one that it was made for.
    assert_close(layer.forward(params, x[:, :2])[0], y[:, :2])
    _, grads = layer.backward(params, cache, y, read=bp.total)
    assert_close(grads["weight"], jnp.concatenate([y.sum(0), jnp.zeros((3, 3))]))


def test_sinusoidal_positions_are_waves():
    y, _ = bp.sinusoidal_positions(base=100.0).forward((), jnp.zeros((1, 5, 4)))
    want = [[np.sin(t), np.cos(t), np.sin(t / 10), np.cos(t / 10)] for t in range(5)]
    assert_close(y[0], jnp.asarray(want))


TIED = {
    "few": (5, 4, (4,)),
    "many": (40, 3, (7,)),  # more rows than an example looks up
    "single tokens": (5, 3, ()),
    "two axes": (5, 3, (2, 3)),
}


@every("name", {name: name for name in TIED}, soon={"few"})
def test_a_tied_embedding_is_both_uses_of_its_table(name, key):
    vocabulary, features, shape = TIED[name]
    net = bp.tied_embedding(vocabulary, features, bp.residual(bp.dense(features)), bp.tanh())
    params, out_shape = net.init(key, shape)
    params = jax.tree.map(lambda p: 3 * p, params)
    assert out_shape == (*shape, vocabulary)
    x = jax.random.randint(key, (3, *shape), 0, vocabulary)
    dy = normal(key, (3, *out_shape))

    def by_hand(params, x):
        (table, *rest), body = params, bp.chain(bp.residual(bp.dense(features)), bp.tanh())
        return body.forward(tuple(rest), table["weight"][x])[0] @ table["weight"].T

    @jax.jit
    def sweep(params, x, dy):
        y, cache = net.forward(params, x)
        dx, signals = net.backward(params, cache, dy)
        assert dx is None
        readings = (bp.per_example, bp.sq_norms, bp.diagonal, bp.per_example_diagonal, bp.variance)
        answers = [bp.map_signals(read, signals) for read in readings]
        along = bp.directional_derivatives(signals, params)
        return y, answers, bp.gram(signals), along, bp.kronecker(signals[0]["weight"])

    y, (grads, norms, diagonal, squares, variance), gram, along, factors = sweep(params, x, dy)
    want = jax.vmap(jax.grad(lambda p, x, dy: jnp.vdot(by_hand(p, x[None])[0], dy)), (None, 0, 0))(
        params, x, dy
    )
    rows = jnp.concatenate([g.reshape(3, -1) for g in jax.tree.leaves(want)], 1)
    assert_close(y, by_hand(params, x))
    assert_close(grads, want)
    assert_close(norms, jax.tree.map(lambda g: jnp.sum(g**2, (1, 2)[: g.ndim - 1]), want))
    assert_close(squares, jax.tree.map(lambda g: g**2, want))
    assert_close(diagonal, jax.tree.map(lambda g: jnp.sum(g**2, 0), want))
    assert_close(variance, jax.tree.map(lambda g: jnp.var(g, 0), want))
    assert_close(gram, rows @ rows.T)
    direction = jnp.concatenate([p.ravel() for p in jax.tree.leaves(params)])
    assert_close(along, rows @ direction)
    assert factors == ()


def test_norms_of_a_tied_embedding_form_no_table_for_an_example():
    vocabulary, n, t, o = 50_000, 4, 16, 32
    net = bp.tied_embedding(vocabulary, o)
    params, _ = jax.eval_shape(lambda: net.init(jax.random.key(0), (t,)))
    x = jax.ShapeDtypeStruct((n, t), int)

    def norms(params, x):
        y, cache = net.forward(params, x)
        return net.backward(params, cache, y, read=bp.sq_norms)[1]

    memory = jax.jit(norms).lower(params, x).compile().memory_analysis()
    # The logits, [N, T, V], are as large as the tables of two examples. A Gram matrix scales them.
    assert memory.temp_size_in_bytes < 2.5 * 8 * n * t * vocabulary


def test_a_tied_embedding_refuses_layers_that_change_the_features(key):
    with pytest.raises(bp.LayerError, match=r"tied_embedding\(5, 3\).* what a table maps back"):
        bp.tied_embedding(5, 3, bp.dense(4)).init(key, (2,))
    net = bp.tied_embedding(5, 3)
    params, _ = net.init(key, (2,))
    _, cache = net.forward(params, jnp.zeros((2, 4), int))
    with pytest.raises(bp.LayerError, match=r"dy of shape \[2, 4, 3\]; its outputs are \[2, 4, 5"):
        net.backward(params, cache, jnp.ones((2, 4, 3)))


EMBEDDING = {"weight": np.ones((5, 3))}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bp.embedding(0, 3), "embedding: vocabulary is 0; it takes a positive integer"),
        (lambda: bp.embedding(5, 2.0), r"embedding: features is 2\.0"),
        (
            lambda: bp.embedding(5, 3).forward(EMBEDDING, jnp.ones((2, 4))),
            r"embedding\(5, 3\) got inputs of dtype float64 and shape \[2, 4\]; it takes tokens",
        ),
        (
            lambda: bp.embedding(5, 3, padding_row=5),
            "embedding: padding_row is 5; the tokens are 0 to 4",
        ),
        (
            lambda: bp.embedding(5, 3, padding_row=-1),
            "embedding: padding_row is -1; the tokens are 0 to 4",
        ),
        (
            lambda: bp.embedding(5, 3, padding_row=True),
            "embedding: padding_row is True; it takes a token, an integer",
        ),
        (lambda: bp.embedding(5, 3).forward(EMBEDDING, [[1]]), "got inputs of type list"),
        (lambda: bp.embedding(5, 3).forward(EMBEDDING, jnp.int32(1)), r"got inputs of shape \[\]"),
        (
            lambda: bp.embedding(6, 3).forward(EMBEDDING, jnp.ones((2, 4), int)),
            r"got a weight of shape \[5, 3\]; it takes \[6, 3\]\. Is it that of another",
        ),
        (
            lambda: bp.embedding(5, 3).backward(
                EMBEDDING, jnp.ones((2, 4), int), jnp.ones((2, 4, 1))
            ),
            r"got a dy of shape \[2, 4, 1\]; its outputs are \[2, 4, 3\]",
        ),
        (lambda: bp.learned_positions(True), "learned_positions: length is True"),
        (
            lambda: bp.learned_positions(5).init(jax.random.key(0), (6, 3)),
            r"learned_positions\(5\) got 6 positions; it has vectors for 5",
        ),
        (
            lambda: bp.learned_positions(5).forward(EMBEDDING, jnp.ones((2, 6, 3))),
            r"learned_positions\(5\) got 6 positions",
        ),
        (
            lambda: bp.learned_positions(5).forward(EMBEDDING, jnp.ones((2, 3))),
            r"got inputs of shape \[N, 3\]; it takes \[N, T, O\]",
        ),
        (
            lambda: bp.learned_positions(5).forward(EMBEDDING, jnp.ones((2, 5, 4))),
            r"got a weight of shape \[5, 3\]; it takes \[5, 4\]",
        ),
        (
            lambda: bp.learned_positions(5).backward(
                EMBEDDING, jnp.ones((0, 2, 4, 3)), jnp.ones((2, 3, 3))
            ),
            r"got a dy of shape \[2, 3, 3\]; its outputs are \[2, 4, 3\]",
        ),
        (
            lambda: bp.sinusoidal_positions().init(jax.random.key(0), (4, 3)),
            "sinusoidal_positions got inputs with O = 3; pairs of sine and cosine take an even",
        ),
        (lambda: bp.sinusoidal_positions(0), "sinusoidal_positions: base is 0"),
        (
            lambda: bp.sinusoidal_positions().forward((), jnp.ones((2, 4, 4), int)),
            "sinusoidal_positions got inputs of dtype int64",
        ),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


READS = {"total": bp.total, "per_example": bp.per_example, "sq_norms": bp.sq_norms}


@pytest.mark.parametrize("compiled", [pytest.param(False, marks=pytest.mark.thorough), True])
@pytest.mark.parametrize("outside", [-1, pytest.param(127, marks=pytest.mark.thorough)])
def test_a_token_outside_the_table_reads_no_row_and_reaches_none(outside, compiled, key):
    layer = bp.embedding(5, 2)
    params, _ = layer.init(key, (3,))
    tokens = jnp.array([[4, outside, 4], [0, 1, outside]], jnp.int8)
    dy = normal(key, (2, 3, 2))

    def both(params, x, dy):
        y, cache = layer.forward(params, x)
        return y, {name: layer.backward(params, cache, dy, read=r) for name, r in READS.items()}

    y, got = (jax.jit(both) if compiled else both)(params, tokens, dy)
    bad = np.asarray(tokens) == outside
    assert np.isnan(np.asarray(y)[bad]).all()
    assert np.isfinite(np.asarray(y)[~bad]).all()
    # As if nothing were asked of these positions, whatever comes back to them.
    _, want = both(params, jnp.where(bad, 2, tokens), jnp.where(bad[..., None], 0, dy))
    assert_close(got, want)
    _, of_nan = both(params, tokens, jnp.where(bad[..., None], jnp.nan, dy))
    assert_close(of_nan, want)


def test_a_padding_row_begins_as_zero_and_gets_no_gradient(key):
    """In any reading, whatever comes back to it; the other rows are as without it."""
    layer, plain = bp.embedding(5, 2, padding_row=3), bp.embedding(5, 2)
    params, _ = layer.init(key, (3,))
    drawn, _ = plain.init(key, (3,))
    assert_close(params, {"weight": drawn["weight"].at[3].set(0)})
    tokens = jnp.array([[4, 3, 4], [3, 1, 0]], jnp.int8)
    dy = normal(key, (2, 3, 2))

    @jax.jit
    def both(dy):
        y, cache = layer.forward(drawn, tokens)
        return y, [layer.backward(drawn, cache, dy, read=r)[1]["weight"] for r in READS.values()]

    y, got = both(jnp.where((tokens == 3)[..., None], jnp.nan, dy))
    assert_close(y, drawn["weight"][tokens])
    grads = jax.vmap(jax.grad(lambda w, x, dy: jnp.vdot(w.at[3].set(0)[x], dy)), (None, 0, 0))(
        drawn["weight"], tokens, dy
    )
    assert_close(got, [grads.sum(0), grads, jnp.sum(grads**2, (1, 2))])


@pytest.mark.parametrize(
    ("dtype", "vocabulary"),
    [(jnp.int8, 128), (jnp.int8, 200), (jnp.uint8, 256), (jnp.uint8, 300), (jnp.int16, 70_000),
     (jnp.uint32, 300)],
)  # fmt: skip
def test_tokens_of_few_bits_of_a_table_of_many_rows(dtype, vocabulary, key):
    layer = bp.embedding(vocabulary, 1)
    params, _ = layer.init(key, ())
    tokens = jnp.array([0, 3, 127], dtype)
    y, cache = layer.forward(params, tokens)
    assert_close(y, params["weight"][np.array([0, 3, 127])])
    _, grads = layer.backward(params, cache, jnp.ones((3, 1)), read=bp.total)
    assert np.flatnonzero(grads["weight"]).tolist() == [0, 3, 127]
