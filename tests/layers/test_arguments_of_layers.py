"""Arguments, shapes and keys of layers and combinators: what is taken, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close

import jaxbp as bp
from jaxbp.require import ACTIVATIONS

D = bp.dense(3)
X = jnp.ones((2, 4), jnp.float32)

# By the sizes that each of them takes.
SIZED = {
    "dense": bp.dense,
    "conv": lambda n: bp.conv(n, (3,)),
    "conv's kernel": lambda n: bp.conv(4, (n,)),
    "conv's strides": lambda n: bp.conv(4, (3,), strides=n),
    "conv_transpose": lambda n: bp.conv_transpose(n, (3,), groups=n),
    "embedding": lambda n: bp.embedding(n, n),
    "tied_embedding": lambda n: bp.tied_embedding(n, n),
    "learned_positions": bp.learned_positions,
    "max_pool": lambda n: bp.max_pool((n,)),
    "upsample": bp.upsample,
    "group_norm": bp.group_norm,
    "rotary": bp.rotary,
    "attention": lambda n: bp.attention(8, n),
    "attention's features": lambda n: bp.attention(n, 2),
    "simple_rnn": bp.simple_rnn,
    "lstm": bp.lstm,
    "gru": bp.gru,
    "repeat": lambda n: bp.repeat(D, n),
    "stack": lambda n: bp.stack(D, n),
}


@pytest.mark.parametrize("make", SIZED.values(), ids=SIZED)
def test_sizes(make):
    for n in (np.int64(4), np.uint8(4)):
        make(n)
    for wrong in (0, -1, 2.0, "4", None, True, np.bool_(True), np.float32(4)):
        with pytest.raises(ValueError, match=r"it takes a (positive integer|tuple of)"):
            make(wrong)


def test_short_integers_do_not_overflow(key):
    short = np.uint8(100)
    params, out_shape = bp.recurrent(bp.lstm(short)).init(key, (np.uint8(3), 2))
    assert (params["bias"].shape, out_shape) == ((400,), (3, 100))
    assert bp.upsample((short,)).init(key, (short, 1))[1] == (10_000, 1)
    assert bp.attention(short, short).init(key, (2, 3))[0][0]["bias"].shape == (300,)


@pytest.mark.parametrize(
    "make",
    [lambda v: bp.layer_norm(eps=v), bp.sinusoidal_positions,
     lambda v: bp.rotary(2, base=v), bp.dropout],
)  # fmt: skip
def test_numbers(make):
    for wrong in ("1", None, -1.0, np.nan, [0.5]):
        with pytest.raises(ValueError, match=r"is .*it takes a (positive )?number"):
            make(wrong)


# Each with the shape that it takes.
DRAWING = {
    "dense": (D, (4,)),
    "conv": (bp.conv(2, (3,)), (3, 4)),
    "embedding": (bp.embedding(3, 2), (4,)),
    "tied_embedding": (bp.tied_embedding(3, 2), (4,)),
    "learned_positions": (bp.learned_positions(3), (3, 4)),
    "recurrent": (bp.recurrent(bp.gru(2)), (3, 4)),
    "attention": (bp.attention(4, 2), (3, 4)),
    "chain": (bp.chain(bp.relu()), (4,)),
    "residual": (bp.residual(bp.dense(4)), (4,)),
    "parallel": (bp.parallel(bp.relu()), (4,)),
    "gated": (bp.gated(bp.relu(), bp.relu()), (4,)),
    "repeat": (bp.repeat(bp.dense(4), 2), (4,)),
    "stack": (bp.stack(bp.relu(), 2), (4,)),
    "remat": (bp.remat(D), (4,)),
    "cast": (bp.cast(D), (4,)),
    "masked": (bp.masked(lambda mask: D), ((4,), None)),
}


@pytest.mark.parametrize(("layer", "shape"), DRAWING.values(), ids=DRAWING)
def test_keys_and_shapes_of_init(layer, shape, key):
    for wrong in (3, "key", jax.random.split(key, 3), np.ones(2)):
        with pytest.raises(ValueError, match=r"it takes one key, such as jax\.random\.key\(0\)"):
            layer.init(wrong, shape)
    for wrong in (4, None, "ab", np.array([3, 4]), (3.0,), (True, 4), (0, 4), (-1,)):
        wrong_shape = (wrong, None) if layer.name.startswith("masked") else wrong
        with pytest.raises(bp.LayerError, match="for the shape of one example; it takes a tuple"):
            layer.init(key, wrong_shape)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (bp.dropout(0.5), X),
        (bp.chain(bp.dropout(0.5)), X),
        (bp.residual(bp.dropout(0.5)), X),
        (bp.parallel(bp.relu()), X),
        (bp.repeat(bp.dropout(0.5), 2), X),
        (bp.stack(bp.dropout(0.5), 2), X),
        (bp.remat(bp.dropout(0.5)), X),
        (bp.cast(bp.dropout(0.5)), X),
        (bp.masked(lambda mask: bp.dropout(0.5)), (X, None)),
    ],
    ids=lambda a: getattr(a, "name", None),
)
def test_keys_of_forward(layer, x, key):
    params, _ = layer.init(key, ((4,), None) if isinstance(x, tuple) else (4,))
    for wrong in (3, "key", jax.random.split(key, 3)):
        with pytest.raises(ValueError, match=r"it takes one key, such as jax\.random\.key\(0\)"):
            layer.forward(params, x, key=wrong)


COMBINED = {
    "chain": lambda part: bp.chain(D, part),
    "residual": bp.residual,
    "parallel": bp.parallel,
    "gated": lambda part: bp.gated(D, part),
    "repeat": lambda part: bp.repeat(part, 2),
    "stack": lambda part: bp.stack(part, 2),
    "remat": bp.remat,
    "cast": bp.cast,
    "masked": lambda part: bp.masked(lambda mask: part),
    "freeze": lambda part: bp.freeze(part, (), lambda path, leaf: True),
    "tied_embedding": lambda part: bp.tied_embedding(3, 2, part),
}


@pytest.mark.parametrize("make", COMBINED.values(), ids=COMBINED)
def test_what_is_no_layer(make):
    for part, hint in (
        (bp.relu, r"Call it: relu\(\)\?"),
        (jax.nn.relu, r"is the function relu; it takes a Layer\. Use bp\.relu\(\)\?$"),
        (jnp.tanh, r"Use bp\.tanh\(\)\?$"),
        (lambda x: x, r"with bp\.function, or with bp\.lift if it has parameters\?$"),
        ("relu", r"it takes a Layer\. Use bp\.relu\(\)\?$"),
        ("rellu", r"it takes a Layer\.$"),
        ([D, D], r"is a list of 2; it takes a Layer\. Pass the layers one by one"),
        (None, r"it takes a Layer\.$"),
    ):
        with pytest.raises(TypeError, match=hint):
            make(part)


def test_each_activation_of_jax_is_answered_by_its_own_layer():
    functions = {name: getattr(jax.nn, name) for name in dir(jax.nn) if name[0] != "_"}
    x = jnp.linspace(-2.0, 2.0, 6)
    for name, function in functions.items():
        named = getattr(function, "__name__", None)
        layer = ACTIVATIONS.get(named)
        assert layer is not None or not hasattr(bp, name) or name == "dot_product_attention"
        if layer is not None:
            assert_close(getattr(bp, layer)().forward((), x[None])[0], function(x)[None])


@pytest.mark.parametrize("compute", [None, "nonsense", int, bool, object()])
def test_what_is_no_dtype(compute):
    with pytest.raises(TypeError, match=r"cast: compute is .*; it takes a floating-point dtype"):
        bp.cast(D, compute)


def test_a_cast_of_integers_leaves_them():
    y, cache = bp.cast(bp.flatten()).forward((), jnp.ones((2, 3, 2), int))
    assert (y.shape, y.dtype) == ((2, 6), int)
    assert bp.cast(bp.flatten()).backward((), cache, None)[0] is None
