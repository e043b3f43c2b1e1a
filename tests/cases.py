"""The registry: what is listed here is put to every property that there is for its kind.

A new public layer, loss, reading or rule joins by a line; `test_package` fails until it has.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers

import jaxbp as bp
from jaxbp.lift.routes import Pullback
from jaxbp.signals.views import View
from jaxbp.types import is_shape

N = 3


class Case(NamedTuple):
    """A layer, made when it is wanted, and the shape of one example, or a tree of shapes."""

    make: Callable[[], bp.Layer]
    shape: Any
    vocabulary: int | None = None  # of tokens, if that is what the layer takes

    def __hash__(self):
        return hash(self.make)  # a dict of shapes has no hash


# Layers without parameters that `test_maps` puts to the test in one program. The tests of single
# layers leave them to the thorough run.
MAPS = {
    "log_sigmoid": Case(bp.log_sigmoid, (3,)),
    "softplus of another beta": Case(lambda: bp.softplus(2.0), (3,)),
    "elu of a negative alpha": Case(lambda: bp.elu(-0.5), (3,)),
    "celu": Case(lambda: bp.celu(0.6), (3,)),
    "selu": Case(bp.selu, (3,)),
    "mish": Case(bp.mish, (3,)),
    "softsign": Case(bp.softsign, (3,)),
    "tanh_shrink": Case(bp.tanh_shrink, (4,)),
    "leaky_relu of a negative slope": Case(lambda: bp.leaky_relu(-0.4), (3,)),
    "relu6": Case(bp.relu6, (3,)),
    "hard_tanh": Case(lambda: bp.hard_tanh(-0.3, 0.8), (5,)),
    "hard_sigmoid": Case(bp.hard_sigmoid, (3,)),
    "hardswish": Case(bp.hardswish, (3,)),
    "hard_shrink": Case(bp.hard_shrink, (5,)),
    "soft_shrink": Case(bp.soft_shrink, (5,)),
    "threshold": Case(lambda: bp.threshold(0.2, 3.0), (5,)),
    "elementwise": Case(lambda: bp.elementwise(jnp.sin, jnp.cos), (3,)),
    "scale": Case(lambda: bp.scale(-2.5), (3,)),
    "scale by an array": Case(lambda: bp.scale(jnp.array([[2.0], [-3.0]])), (2, 3)),
    "softmax": Case(bp.softmax, (2, 3)),
    "softmax of the first axis": Case(lambda: bp.softmax(0), (3, 2)),
    "log_softmax": Case(lambda: bp.log_softmax(-2), (3, 2)),
    "glu": Case(bp.glu, (2, 4)),
    "glu of the first axis": Case(lambda: bp.glu(0), (4, 3)),
    "reshape": Case(lambda: bp.reshape(2, -1), (3, 4)),
    "permute": Case(lambda: bp.permute(1, 2, 0), (2, 3, 4)),
    "take": Case(lambda: bp.take(-1), (3, 2)),
    "take of a slice": Case(lambda: bp.take(slice(None, 0, -2), axis=1), (2, 5)),
    "pad": Case(lambda: bp.pad(((1, 2), (-1, 1)), value=3.0), (2, 3, 2)),
    "pad, reflect": Case(lambda: bp.pad(((1, -1), (1, 2)), mode="reflect"), (3, 3)),
    "pad, edge": Case(lambda: bp.pad(((4, 1),), mode="edge"), (3, 2)),
    "pad, wrap": Case(lambda: bp.pad(((0, 0), (-1, 2)), mode="wrap"), (2, 3)),
}

LAYERS = {
    "dense": Case(lambda: bp.dense(4), (5,)),
    "dense to one": Case(lambda: bp.dense(1), (5,)),
    "dense from one": Case(lambda: bp.dense(4), (1,)),
    "dense without bias": Case(lambda: bp.dense(4, use_bias=False), (5,)),
    "dense at positions": Case(lambda: bp.dense(4), (6, 5)),
    "dense at few positions": Case(lambda: bp.dense(7), (2, 8)),
    "dense at positions of two axes": Case(lambda: bp.dense(2), (4, 3, 5)),
    "dense with initialisers": Case(
        lambda: bp.dense(4, weight_init=initializers.orthogonal(), bias_init=initializers.ones),
        (5,),
    ),
    "sigmoid": Case(bp.sigmoid, (5,)),
    "tanh": Case(bp.tanh, (2, 5)),
    "relu": Case(bp.relu, (5,)),
    "leaky_relu": Case(bp.leaky_relu, (5,)),
    "leaky_relu of a large slope": Case(lambda: bp.leaky_relu(1.5), (5,)),
    "elu": Case(bp.elu, (5,)),
    "elu of another alpha": Case(lambda: bp.elu(0.3), (5,)),
    "gelu": Case(bp.gelu, (5,)),
    "gelu, exact": Case(lambda: bp.gelu(approximate=False), (5,)),
    "silu": Case(bp.silu, (5,)),
    "softplus": Case(bp.softplus, (5,)),
    "prelu": Case(bp.prelu, (2, 3)),
    "prelu, shared": Case(lambda: bp.prelu(shared=True), (2, 3)),
    "layer_scale": Case(lambda: bp.layer_scale(0.5), (2, 3)),
    "prepend": Case(lambda: bp.prepend(2), (3, 2)),
    **MAPS,
    "flatten": Case(bp.flatten, (2, 3, 4)),
    "flatten what is flat": Case(bp.flatten, (4,)),
    "dropout": Case(lambda: bp.dropout(0.4), (5,)),
    "dropout of nothing": Case(lambda: bp.dropout(0.0), (5,)),
    "layer_norm": Case(bp.layer_norm, (5,)),
    "layer_norm at positions": Case(lambda: bp.layer_norm(eps=0.1), (3, 4)),
    "layer_norm without bias": Case(lambda: bp.layer_norm(use_bias=False), (2, 3, 4)),
    "rms_norm": Case(bp.rms_norm, (5,)),
    "rms_norm at positions": Case(lambda: bp.rms_norm(eps=0.1), (3, 4)),
    "group_norm": Case(lambda: bp.group_norm(2), (6,)),
    "group_norm at positions": Case(lambda: bp.group_norm(3), (2, 2, 6)),
    "group_norm without bias": Case(lambda: bp.group_norm(1, use_bias=False), (3, 4)),
    "fixed_norm": Case(
        lambda: bp.fixed_norm(jnp.array([1.0, 0.0, 2.0]), jnp.array([0.5, 0.0, 2.0]), eps=0.1),
        (2, 3),
    ),
    "l2_norm": Case(bp.l2_norm, (2, 3)),
    "local_response_norm": Case(lambda: bp.local_response_norm(4, alpha=2.0), (2, 5)),
    "conv": Case(lambda: bp.conv(3, (3, 2)), (4, 3, 4)),
    "conv in groups": Case(
        lambda: bp.conv(
            4, (3,), strides=2, padding=((1, 3),), dilation=2, groups=2, use_bias=False
        ),
        (6, 4),
    ),
    "conv_transpose": Case(
        lambda: bp.conv_transpose(
            4, (3, 2), strides=(2, 1), padding=((1, 0), (0, 1)), output_padding=1, groups=2
        ),
        (2, 3, 4),
    ),
    "max_pool": Case(lambda: bp.max_pool((3, 2), strides=(2, 1), padding="SAME"), (5, 4, 2)),
    "avg_pool": Case(
        lambda: bp.avg_pool((3, 2), strides=(2, 1), padding=((1, 2), (0, 1))), (5, 4, 2)
    ),
    "lp_pool": Case(lambda: bp.lp_pool((2, 3), 3, strides=1, padding="SAME"), (3, 4, 2)),
    "adaptive_pool": Case(lambda: bp.adaptive_pool((2, 3)), (3, 4, 2)),
    "resize": Case(lambda: bp.resize((5, 2)), (3, 4, 2)),
    "global_pool": Case(bp.global_pool, (3, 2, 4)),
    "upsample": Case(lambda: bp.upsample((1, 3)), (3, 2, 4)),
    "repeat of a conv": Case(
        lambda: bp.repeat(bp.repeat(bp.chain(bp.conv(2, (3,)), bp.tanh()), 2), 2), (4, 2)
    ),
    "stack of a conv": Case(
        lambda: bp.stack(bp.remat(bp.residual(bp.conv(2, (3,), dilation=2), bp.tanh())), 2), (5, 2)
    ),
    "chain": Case(lambda: bp.chain(bp.dense(4), bp.tanh(), bp.dense(3)), (5,)),
    "chain of nothing": Case(bp.chain, (5,)),
    "gated": Case(
        lambda: bp.gated(bp.dense(4), bp.chain(bp.dense(4), bp.silu(), bp.dropout(0.3))), (3, 5)
    ),
    "repeat": Case(lambda: bp.repeat(bp.chain(bp.dense(4), bp.tanh()), 3), (4,)),
    "repeat in a repeat": Case(
        lambda: bp.repeat(bp.chain(bp.repeat(bp.dense(2), 2), bp.sigmoid()), 2), (2,)
    ),
    "embedding": Case(lambda: bp.embedding(5, 4), (6,), vocabulary=5),
    "embedding of single tokens": Case(lambda: bp.embedding(3, 4), (), vocabulary=3),
    "embedding of tokens in two axes": Case(lambda: bp.embedding(3, 2), (2, 3), vocabulary=3),
    "embedding with a padding row": Case(
        lambda: bp.embedding(3, 2, padding_row=1), (4,), vocabulary=3
    ),
    "tied_embedding": Case(
        lambda: bp.tied_embedding(5, 4, bp.dense(4), bp.tanh()), (6,), vocabulary=5
    ),
    "learned_positions": Case(lambda: bp.learned_positions(7), (5, 4)),
    "sinusoidal_positions": Case(bp.sinusoidal_positions, (5, 4)),
    "rotary": Case(lambda: bp.rotary(2), (3, 8)),
    "dot_product_attention": Case(lambda: bp.dot_product_attention(2), (3, 12)),
    "dot_product_attention, causal, grouped and turned": Case(
        lambda: bp.dot_product_attention(4, kv_heads=2, causal=True, rotary=True), (5, 16)
    ),
    "dot_product_attention, lean and masked": Case(
        lambda: bp.dot_product_attention(
            1, lean=True, causal=True, mask=jnp.array([False, True, True, False, True])
        ),
        (5, 6),
    ),
    "attention": Case(lambda: bp.attention(4, 2, causal=True), (3, 4)),
    "attention to the same": Case(
        lambda: bp.attention(6, 2, kv_heads=1, use_bias=False, rotary=False), (2, 4)
    ),
    # Without a soft cap the gradient of the keys' bias is zero, and its value only rounding.
    "cross_attention": Case(
        lambda: bp.cross_attention(4, 2, soft_cap=1.0, mask=jnp.array([True, False, True])),
        ((2, 3), (3, 2)),
    ),
    "recurrent": Case(lambda: bp.recurrent(bp.simple_rnn(3)), (4, 2)),
    "recurrent, masked and backwards": Case(
        lambda: bp.recurrent(
            bp.lstm(2), mask=jnp.array([True, True, False]), reverse=True, learn_initial=True
        ),
        (3, 4),
    ),
    "recurrent in segments": Case(
        lambda: bp.recurrent(bp.gru(2, reset="before"), segment=2), (4, 3)
    ),
    "recurrent of a projection": Case(
        lambda: bp.recurrent(bp.lstm(3, projection=2), use_bias=False), (2, 2)
    ),
    "stateful": Case(lambda: bp.stateful(bp.lstm(2)), ((2, 3), ((2,), (2,)))),
    "bidirectional": Case(lambda: bp.bidirectional(bp.gru(1)), (2, 2)),
    "stack": Case(
        lambda: bp.stack(bp.residual(bp.layer_norm(), bp.dense(4), bp.dropout(0.3)), 3), (2, 4)
    ),
    "stack in a stack": Case(
        lambda: bp.stack(bp.chain(bp.stack(bp.dense(3), 2), bp.tanh()), 2), (3,)
    ),
    "stack of what has no parameters": Case(lambda: bp.stack(bp.sigmoid(), 2), (3,)),
    "stack that is repeated": Case(
        lambda: bp.repeat(bp.stack(bp.chain(bp.dense(3), bp.silu()), 2), 2), (3,)
    ),
    "remat": Case(lambda: bp.remat(bp.chain(bp.dense(4), bp.gelu(), bp.dropout(0.3))), (5,)),
    "remat in a stack": Case(
        lambda: bp.stack(bp.remat(bp.chain(bp.dense(4), bp.tanh(), bp.dropout(0.3))), 3), (4,)
    ),
    "cast": Case(lambda: bp.cast(bp.chain(bp.dense(4), bp.tanh()), compute=float), (5,)),
    "repeat once": Case(lambda: bp.repeat(bp.dense(4), 1), (4,)),
    "residual": Case(lambda: bp.residual(bp.dense(5)), (5,)),
    "residual of several": Case(
        lambda: bp.residual(bp.layer_norm(), bp.dense(6), bp.gelu(), bp.dense(4)), (3, 4)
    ),
    "on": Case(
        lambda: bp.chain(
            bp.on(0, bp.dense(3), bp.tanh()), bp.residual(bp.subtract(), bp.dense(3), at=1)
        ),
        ((4,), (3,)),
    ),
    "select": Case(lambda: bp.chain(bp.on(0, bp.dense(2)), bp.select(0)), ((3,), (4,))),
    "fork": Case(lambda: bp.fork(bp.dense(3), bp.chain(bp.dense(2), bp.tanh())), (4,)),
    "shared": Case(
        lambda: bp.chain(bp.shared(bp.dense(3), bp.tanh()), bp.distance()), ((2, 4), (2, 4))
    ),
    "mixture": Case(
        lambda: bp.mixture(bp.dense(2), bp.dense(3), bp.chain(bp.dense(3), bp.tanh())), (3, 4)
    ),
    "add": Case(bp.add, ((3, 2), (2,), (3, 1))),
    "subtract and concatenate at positions": Case(
        lambda: bp.chain(
            bp.fork(bp.subtract(), bp.concatenate()), bp.on(0, bp.dense(4)), bp.concatenate(axis=0)
        ),
        ((2, 2), (2, 2)),
    ),
    "multiply": Case(bp.multiply, ((3, 2, 2), (2,), (3, 1, 2))),
    "inner_product": Case(bp.inner_product, ((2, 3), (2, 3))),
    "cosine_similarity": Case(
        lambda: bp.chain(bp.on("a", bp.dense(3)), bp.cosine_similarity()), {"a": (2,), "b": (3,)}
    ),
    "bilinear": Case(lambda: bp.bilinear(2), ((3, 2), (3, 3))),
    "sample_gaussian": Case(bp.sample_gaussian, ((3,), (3,))),
    "parallel": Case(lambda: bp.parallel(bp.dense(4), bp.dense(4, use_bias=False)), (5,)),
    "parallel, concatenated": Case(
        lambda: bp.parallel(
            bp.dense(2), bp.tanh(), bp.chain(bp.dense(3), bp.relu()), combine="concatenate"
        ),
        (3, 4),
    ),
}

# Further cases of the same layers, which are left to the thorough run.
VARIANTS = {
    "rotary, interleaved and partial": Case(
        lambda: bp.rotary(2, base=100.0, size=2, interleaved=True), (3, 6)
    ),
    "dot_product_attention of (q, k, v)": Case(
        lambda: bp.dot_product_attention(4, kv_heads=2, soft_cap=0.5, window=2),
        ((3, 8), (5, 4), (5, 6)),
    ),
    "dot_product_attention of (x, past)": Case(
        lambda: bp.dot_product_attention(
            2, value_size=3, causal=True, rotary=bp.Rotary(size=2), lean=True
        ),
        ((2, 22), ((3, 8), (3, 6))),
    ),
    "dot_product_attention, lean, of pairs that see and drop": Case(
        lambda: bp.chain(
            bp.dot_product_attention(
                2,
                pair_mask=jnp.arange(5) < jnp.array([[0], [1], [4], [5], [4]]),
                bias=jnp.cos(jnp.arange(50.0)).reshape(1, 2, 5, 5),
                drop_prob=0.3,
                lean=True,
            ),
            bp.dropout(0.0),  # whose name says that the case draws
        ),
        (5, 12),
    ),
    "attention in a window": Case(
        lambda: bp.attention(
            3, 2, kv_heads=1, head_size=4, value_size=3, causal=True, window=2, rotary=True
        ),
        (5, 4),
    ),
    "attention of (x, past)": Case(
        lambda: bp.attention(4, 2, mask=jnp.array([True, False, True])), ((1, 3), ((2, 4), (2, 4)))
    ),
    "cross_attention of (x, keys, values)": Case(
        lambda: bp.cross_attention(
            4, 2, kv_heads=1, value_size=3, scale=0.9, use_bias=False, lean=True
        ),
        ((2, 3), (4, 2), (4, 5)),
    ),
    "decoder": Case(
        lambda: bp.chain(
            bp.on(0, bp.residual(bp.layer_norm(), bp.attention(4, 2, causal=True))),
            bp.residual(bp.on(0, bp.layer_norm()), bp.cross_attention(4, 2, use_bias=False), at=0),
        ),
        ((2, 4), (3, 2)),
    ),
    "residual at an entry": Case(
        lambda: bp.residual(bp.on("b", bp.tanh()), bp.concatenate(), bp.dense(3), at="a"),
        {"a": (3,), "b": (2,)},
    ),
    "shared by inputs of several shapes": Case(
        lambda: bp.shared(bp.dense(2), bp.dropout(0.3)), {"a": (4,), "b": (3, 4)}
    ),
    "shared conv of several sizes": Case(lambda: bp.shared(bp.conv(2, (2,))), ((4, 2), (3, 2))),
    "shared stack": Case(
        lambda: bp.shared(bp.stack(bp.chain(bp.dense(3), bp.tanh()), 2)), ((3,), (2, 3))
    ),
    "mixture of the best two": Case(
        lambda: bp.mixture(bp.dense(3), bp.dense(2), bp.tanh(), bp.dense(2), top_k=2), (4, 2)
    ),
    "mixture, one for all positions": Case(
        lambda: bp.mixture(bp.chain(bp.global_pool(), bp.dense(2)), bp.dense(3), bp.dense(3)),
        (3, 4),
    ),
    "gated by channel": Case(
        lambda: bp.gated(bp.chain(), bp.chain(bp.global_pool(), bp.dense(3))),
        (2, 2, 3),
    ),
    "gated by position": Case(lambda: bp.gated(bp.dense(3), bp.dense(1)), (2, 2, 3)),
    "distance, squared": Case(lambda: bp.distance("squared"), ((3,), (3,))),
    "distance, manhattan": Case(lambda: bp.distance("manhattan"), ((3,), (3,))),
}

NETWORKS = {
    "perceptron": Case(lambda: bp.chain(bp.dense(1)), (2,)),
    "two layers": Case(
        lambda: bp.chain(bp.dense(3), bp.sigmoid(), bp.dense(1), bp.sigmoid()), (2,)
    ),
    "classifier": Case(
        lambda: bp.chain(bp.dense(6), bp.relu(), bp.dense(5), bp.gelu(), bp.dense(3)), (4,)
    ),
    "images": Case(
        lambda: bp.chain(bp.flatten(), bp.dense(5), bp.elu(), bp.dropout(0.3), bp.dense(3)), (2, 4)
    ),
    "sequence": Case(
        lambda: bp.chain(bp.dense(5), bp.silu(), bp.dense(3, use_bias=False), bp.tanh()), (6, 4)
    ),
    "normalised": Case(
        lambda: bp.chain(
            bp.dense(6), bp.layer_norm(), bp.gelu(), bp.group_norm(2), bp.dense(4), bp.rms_norm()
        ),
        (2, 3),
    ),
    "recurrent": Case(
        lambda: bp.chain(
            bp.dense(3),
            bp.repeat(bp.residual(bp.layer_norm(), bp.dense(3), bp.dropout(0.2)), 2),
            bp.dense(2),
        ),
        (2, 4),
    ),
    "branching": Case(
        lambda: bp.chain(
            bp.dense(4),
            bp.residual(bp.rms_norm(), bp.dense(5), bp.silu(), bp.dropout(0.2), bp.dense(4)),
            bp.parallel(bp.dense(2), bp.chain(bp.dense(3), bp.tanh()), combine="concatenate"),
            bp.gated(bp.dense(3), bp.chain(bp.dense(3), bp.sigmoid())),
        ),
        (3,),
    ),
    "transformer": Case(
        lambda: bp.chain(
            bp.embedding(5, 4),
            bp.learned_positions(4),
            bp.residual(bp.layer_norm(), bp.attention(4, 2, causal=True)),
            bp.residual(bp.dense(4), bp.gelu(), bp.dropout(0.2)),
            bp.dense(2),
        ),
        (3,),
        vocabulary=5,
    ),
    "convolutional": Case(
        lambda: bp.chain(
            bp.conv(4, (3, 2), groups=2),
            bp.relu(),
            bp.max_pool((2, 2)),
            bp.flatten(),
            bp.dense(3),
        ),
        (4, 4, 2),
    ),
    "sequence by lstm": Case(
        lambda: bp.chain(bp.recurrent(bp.lstm(3)), bp.dropout(0.2), bp.dense(2)), (3, 2)
    ),
    "nested": Case(
        lambda: bp.chain(
            bp.chain(bp.dense(4), bp.chain(bp.softplus(), bp.dropout(0.2))),
            bp.chain(bp.leaky_relu(), bp.dense(2)),
        ),
        (3,),
    ),
    "deep": Case(
        lambda: bp.chain(*[part for _ in range(8) for part in (bp.dense(4), bp.tanh())]), (4,)
    ),
}


# Each of these has something that the others have not. The rest are left to the thorough run of
# what takes long to compile.
FEW_NETWORKS = {
    name: case
    for name, case in NETWORKS.items()
    if name not in ("perceptron", "two layers", "images", "nested", "deep")
}
SOON_NETWORKS = {"classifier", "branching", "transformer", "convolutional"}


def every(argument, cases, soon):
    """A test for each case. All but those named in `soon` are left to the thorough run."""
    params = [
        pytest.param(case, id=name, marks=() if name in soon else pytest.mark.thorough)
        for name, case in cases.items()
    ]
    return pytest.mark.parametrize(argument, params)


def late(*values):
    """Values of parameters that are left to the thorough run."""
    return pytest.param(*values, marks=pytest.mark.thorough)


class LossCase(NamedTuple):
    """A loss, the shape of one example's outputs, and targets for it of shape [N, ...].

    If the outputs are a tuple of arrays, so is the shape a tuple of theirs.
    """

    loss: bp.Loss
    shape: tuple
    targets: Callable[[np.random.Generator], object]
    link: Callable | None = None  # from any numbers to outputs that the loss takes
    samples: bool = True  # whether it has a distribution
    has_factor: bool = True  # whether it has a factor of its Hessian

    @property
    def is_one_array(self):
        return isinstance(self.shape[0], int)

    def outputs(self, key):
        """Random outputs, [N, ...] or a tuple of them."""
        shapes = [self.shape] if self.is_one_array else self.shape
        rng = numpy_rng(key)
        drawn = [2 * normals(rng, *shape) for shape in shapes]
        y = drawn[0] if self.is_one_array else tuple(drawn)
        return self.link(y) if self.link else y


def labels(rng, *shape, classes=4):
    return jnp.asarray(rng.integers(classes, size=(N, *shape)))


def probabilities(rng, *shape):
    return jnp.asarray(rng.dirichlet(np.ones(4), size=(N, *shape)))


def bits(rng, *shape):
    return jnp.asarray(rng.integers(2, size=(N, *shape)), float)


def signs(rng, *shape):
    return 2 * bits(rng, *shape) - 1


def spelled(rng):
    """Labels of 4 classes, filled up with the blank 0, and lengths of at most 5 frames."""
    del rng
    labels = [[1, 1, 0], [3, 2, 1], [2, 0, 0]]
    return jnp.asarray(labels[:N]), jnp.asarray([5, 4, 3][:N])


def normals(rng, *shape):
    return jnp.asarray(rng.normal(size=(N, *shape)))


def weights(rng, *shape):
    """Weights, the first of them zero."""
    return jnp.asarray(rng.uniform(0.5, 2, size=(N, *shape))).at[0].set(0)


LOSSES = {
    "softmax_cross_entropy": LossCase(bp.softmax_cross_entropy, (4,), labels),
    "softmax_cross_entropy at positions": LossCase(
        bp.softmax_cross_entropy, (5, 4), lambda rng: labels(rng, 5)
    ),
    "softmax_cross_entropy of probabilities": LossCase(
        bp.softmax_cross_entropy, (4,), probabilities
    ),
    "softmax_cross_entropy of probabilities at positions": LossCase(
        bp.softmax_cross_entropy, (5, 4), lambda rng: probabilities(rng, 5)
    ),
    "softmax_cross_entropy, weighted": LossCase(
        bp.weighted(bp.softmax_cross_entropy),
        (5, 4),
        lambda rng: (labels(rng, 5), weights(rng, 5)),
    ),
    "softmax_cross_entropy, ignoring a label": LossCase(
        bp.ignoring(bp.softmax_cross_entropy, 1), (5, 4), lambda rng: labels(rng, 5)
    ),
    "sigmoid_cross_entropy": LossCase(bp.sigmoid_cross_entropy, (1,), lambda rng: bits(rng, 1)),
    "sigmoid_cross_entropy of many labels": LossCase(
        bp.sigmoid_cross_entropy, (4,), lambda rng: bits(rng, 4)
    ),
    "sigmoid_cross_entropy of probabilities at positions": LossCase(
        bp.sigmoid_cross_entropy, (5, 4), lambda rng: probabilities(rng, 5)
    ),
    "sigmoid_cross_entropy, weighted": LossCase(
        bp.weighted(bp.sigmoid_cross_entropy), (4,), lambda rng: (bits(rng, 4), weights(rng))
    ),
    "squared_error": LossCase(bp.squared_error, (4,), lambda rng: normals(rng, 4)),
    "squared_error at positions": LossCase(
        bp.squared_error, (5, 4), lambda rng: normals(rng, 5, 4)
    ),
    "squared_error, weighted": LossCase(
        bp.weighted(bp.squared_error), (5, 4), lambda rng: (normals(rng, 5, 4), weights(rng, 5, 4))
    ),
    "huber": LossCase(bp.huber, (4,), lambda rng: 3 * normals(rng, 4)),
    "huber of another threshold at positions": LossCase(
        bp.make_huber(0.4), (5, 4), lambda rng: normals(rng, 5, 4)
    ),
    "huber, weighted": LossCase(
        bp.weighted(bp.huber), (4,), lambda rng: (3 * normals(rng, 4), weights(rng))
    ),
}

# Those of which every property is tested in the default run.
SOON_LOSSES = {
    "softmax_cross_entropy at positions",
    "softmax_cross_entropy of probabilities",
    "softmax_cross_entropy, weighted",
    "softmax_cross_entropy, ignoring a label",
    "sigmoid_cross_entropy",
    "sigmoid_cross_entropy of many labels",
    "squared_error",
    "squared_error, weighted",
    "huber of another threshold at positions",
}

CLASS_WEIGHTS = [1.0, 2.0, 0.5, 0.25]
LOSSES |= {
    "softmax_cross_entropy, smoothed": LossCase(
        bp.make_softmax_cross_entropy(label_smoothing=0.1), (4,), labels
    ),
    "softmax_cross_entropy of classes with weights, smoothed, at positions": LossCase(
        bp.make_softmax_cross_entropy(class_weights=CLASS_WEIGHTS, label_smoothing=0.1),
        (5, 4),
        lambda rng: labels(rng, 5),
    ),
    "softmax_cross_entropy of probabilities of classes with weights": LossCase(
        bp.make_softmax_cross_entropy(class_weights=CLASS_WEIGHTS), (4,), probabilities
    ),
    "sigmoid_cross_entropy of answers with weights": LossCase(
        bp.make_sigmoid_cross_entropy(positive_weights=CLASS_WEIGHTS),
        (4,),
        lambda rng: probabilities(rng),
    ),
    "absolute_error": LossCase(
        bp.absolute_error, (4,), lambda rng: normals(rng, 4), has_factor=False
    ),
    "log_cosh": LossCase(bp.log_cosh, (5, 4), lambda rng: normals(rng, 5, 4)),
    "poisson_nll": LossCase(
        bp.poisson_nll, (4,), lambda rng: labels(rng, 4).astype(float), lambda y: y / 4
    ),
    "poisson_nll of rates, in full": LossCase(
        bp.make_poisson_nll(log_rates=False, full=True),
        (4,),
        lambda rng: labels(rng, 4).astype(float),
        lambda y: jnp.exp(y / 4),
    ),
    "gaussian_nll": LossCase(
        bp.gaussian_nll, (5, 4), lambda rng: normals(rng, 5, 2), has_factor=False
    ),
    "standard_normal_kl": LossCase(
        bp.standard_normal_kl, (5, 4), lambda rng: None, samples=False
    ),
    "binary_cross_entropy": LossCase(
        bp.binary_cross_entropy, (4,), lambda rng: probabilities(rng), jax.nn.sigmoid
    ),
    "nll": LossCase(bp.nll, (4,), labels, has_factor=False),
    "nll of classes with weights": LossCase(
        bp.make_nll(class_weights=CLASS_WEIGHTS),
        (5, 4),
        lambda rng: labels(rng, 5),
        has_factor=False,
    ),
    "kl_divergence": LossCase(bp.kl_divergence, (4,), probabilities),
    "kl_divergence, log targets": LossCase(
        bp.make_kl_divergence(log_targets=True),
        (5, 4),
        lambda rng: jnp.log(probabilities(rng, 5)),
    ),
    "kl_divergence, log outputs": LossCase(
        bp.make_kl_divergence(log_outputs=True), (4,), probabilities, has_factor=False
    ),
    "sigmoid_focal": LossCase(
        bp.make_sigmoid_focal(alpha=0.25), (4,), lambda rng: bits(rng, 4),
        samples=False, has_factor=False,
    ),
    "softmax_focal": LossCase(
        bp.make_softmax_focal(gamma=0.5, class_weights=CLASS_WEIGHTS), (4,), labels,
        samples=False, has_factor=False,
    ),
    "hinge": LossCase(
        bp.hinge, (4,), lambda rng: signs(rng, 4), samples=False, has_factor=False
    ),
    "multi_margin": LossCase(
        bp.make_multi_margin(margin=0.5), (5, 4), lambda rng: labels(rng, 5),
        samples=False, has_factor=False,
    ),
    "multi_margin, squared": LossCase(
        bp.make_multi_margin(power=2, class_weights=CLASS_WEIGHTS), (4,), labels, samples=False
    ),
    "multi_label_margin": LossCase(
        bp.multi_label_margin, (5, 4), lambda rng: bits(rng, 5, 4), samples=False, has_factor=False
    ),
    "hinge_embedding": LossCase(
        bp.make_hinge_embedding(), (4,), lambda rng: signs(rng, 4), samples=False, has_factor=False
    ),
    "margin_ranking": LossCase(
        bp.make_margin_ranking(margin=0.5), ((4,), (4,)), lambda rng: signs(rng, 4),
        samples=False, has_factor=False,
    ),
    "cosine_embedding": LossCase(
        bp.make_cosine_embedding(margin=-0.5), ((5, 4), (5, 4)), lambda rng: signs(rng, 5),
        samples=False, has_factor=False,
    ),
    "contrastive": LossCase(
        bp.make_contrastive(margin=5.0), ((4,), (4,)), signs, samples=False, has_factor=False
    ),
    "triplet": LossCase(
        bp.make_triplet(), ((4,), (4,), (4,)), lambda rng: None, samples=False, has_factor=False
    ),
    "ctc": LossCase(bp.make_ctc(), (5, 4), spelled, has_factor=False),
}  # fmt: skip


class Blocks(NamedTuple):
    """The layers of each block of a chain, and the shape of one example."""

    layers: tuple[tuple[bp.Layer, ...], ...]
    shape: tuple[int, ...]

    @property
    def parts(self):
        return [bp.chain(*layers) for layers in self.layers]


BLOCKS = {
    "vectors": Blocks(
        ((bp.dense(6), bp.tanh()), (bp.dense(5), bp.relu()), (bp.dense(3),)),
        (4,),
    ),
    "networks for blocks": Blocks(
        ((bp.dense(4), bp.silu(), bp.dense(5), bp.elu()), (bp.dense(2), bp.tanh(), bp.dense(3))),
        (3,),
    ),
    "positions": Blocks(
        ((bp.dense(5), bp.gelu()), (bp.dense(4, use_bias=False), bp.sigmoid()), (bp.dense(2),)),
        (3, 4),
    ),
    "positions that end": Blocks(
        ((bp.dense(3), bp.tanh()), (bp.flatten(), bp.dense(5), bp.softplus()), (bp.dense(2),)),
        (2, 3),
    ),
}

# Each takes the blocks of the network.
RULES = {
    "exact": lambda *blocks: bp.exact(),
    "random_feedback": lambda *blocks: bp.random_feedback(),
    "random_feedback for some": lambda *blocks: bp.random_feedback(
        scale=2.0, where=lambda path, leaf: path.startswith("1.") and leaf.ndim == 2
    ),
    "sign_symmetric, uniform": lambda *blocks: bp.sign_symmetric(),
    "sign_symmetric, fixed": lambda *blocks: bp.sign_symmetric("fixed"),
    "sign_symmetric, batchwise": lambda *blocks: bp.sign_symmetric("batchwise"),
    "kolen_pollack": lambda *blocks: bp.kolen_pollack(),
    "weight_mirror": lambda *blocks: bp.weight_mirror(0.2, every=2),
    "direct_feedback": lambda *blocks: bp.direct_feedback(*blocks),
    "direct_feedback of random_feedback": lambda *blocks: bp.direct_feedback(
        *blocks, rules=[bp.random_feedback() for _ in blocks]
    ),
    "direct_feedback of what learns and draws": lambda *blocks: bp.direct_feedback(
        *blocks,
        rules=[bp.kolen_pollack(), *[bp.sign_symmetric("batchwise") for _ in blocks[1:]]],
    ),
    # Of recurrent layers, whose gradients by these rules are in `test_credit`.
    "rtrl": lambda *blocks: bp.rtrl(),
    "snap1": lambda *blocks: bp.snap1(),
    "eprop": lambda *blocks: bp.eprop(),
}

READINGS = {
    "keep": bp.keep,
    "total": bp.total,
    "mean": bp.mean,
    "per_example": bp.per_example,
    "sq_norms": bp.sq_norms,
    "second_moment": bp.second_moment,
    "variance": bp.variance,
    "diagonal": bp.diagonal,
    "per_example_diagonal": bp.per_example_diagonal,
    "kronecker": bp.kronecker,
    "gram": bp.gram,
    "health": bp.health,
}

ERRORS = {
    "ggn_columns": bp.ggn_columns,
    "sampled": bp.sampled,
    "jacobian_rows": bp.jacobian_rows,
}


def convolution(*, i=4, o=6, images=(), **geometry):
    """A function that makes the signal of a convolution, by how many windows there are."""
    geometry = bp.Geometry(**geometry)

    def make(rng, *t):
        counts = (*[1] * (len(geometry.kernel) - len(t)), *t)
        # A position more than the windows need, where they do not see it.
        more = (s - 1 for s in geometry.strides)
        axes = zip(geometry.covered(counts), geometry.padding, more, strict=True)
        sizes = tuple(covered - sum(pair) + rest for covered, pair, rest in axes)
        if geometry.transposed:
            sizes, counts = counts, sizes
        return bp.Conv(
            jnp.asarray(rng.normal(size=(N, *images, *sizes, i))),
            jnp.asarray(rng.normal(size=(N, *images, *counts, o))),
            geometry,
        )

    return make


# Every move that a view can make, of a matrix [5, 4].
VIEW = (
    View((5, 4))
    .transpose(1, 0)
    .reshape((2, 2, 5))
    .flip(0, 2)
    .embed((0, 1, 2), (2, 4, 11), (1, 2, 2))
)


class Own(NamedTuple):
    """A kind of signal that the library does not know: of a matrix, as `Outer`."""

    inputs: jax.Array
    deltas: jax.Array

    def per_example(self):
        rows = [a.reshape(a.shape[0], -1, a.shape[-1]) for a in self]
        return jnp.einsum("nti,nto->nio", *rows)


# A signal of each kind, by the shape of the positions.
SIGNALS = {
    "Conv": convolution(
        kernel=(1, 2, 2),
        strides=(1, 1, 3),
        padding=((0, 0), (1, 0), (0, 2)),
        dilation=(1, 3, 2),
        groups=2,
        images=(2,),
    ),
    "Conv, transposed": convolution(
        kernel=(2, 3),
        strides=(2, 1),
        padding=((1, 0), (0, 1)),
        dilation=(2, 1),
        transposed=True,
    ),
    "Outer": lambda rng, *t: bp.Outer(
        jnp.asarray(rng.normal(size=(N, *t, 5))), jnp.asarray(rng.normal(size=(N, *t, 4)))
    ),
    "Bias": lambda rng, *t: bp.Bias(jnp.asarray(rng.normal(size=(N, *t, 4)))),
    "Scale": lambda rng, *t: bp.Scale(*map(jnp.asarray, rng.normal(size=(2, N, *t, 4)))),
    "Lookup": lambda rng, *t: bp.Lookup(
        jnp.asarray(rng.integers(5, size=(N, *t))),
        jnp.asarray(rng.normal(size=(N, *t, 4))),
        jnp.zeros((5, 0)),
    ),
    "Own": lambda rng, *t: Own(*SIGNALS["Outer"](rng, *t)),
    "Through": lambda rng, *t: bp.Through(SIGNALS["Outer"](rng, *t), VIEW),
    "Through, a rank of its own": lambda rng, *t: bp.Through(
        SIGNALS["Lookup"](rng, *t), View((5, 4)).reshape((5, 2, 2))
    ),
    "Through, by pull-back": lambda rng, *t: bp.Through(
        SIGNALS["Outer"](rng, *t), pullback(lambda w: w / jnp.linalg.norm(w), (5, 4), rng)
    ),
    "Sum": lambda rng, *t: bp.Sum((SIGNALS["Lookup"](rng, *t), transposed(rng, *t))),
    "Sum, of matrices": lambda rng, *t: bp.Sum((SIGNALS["Outer"](rng, *t), transposed(rng, *t))),
    "Sum, of what is looked up": lambda rng, *t: bp.Sum(
        (SIGNALS["Outer"](rng, *t), SIGNALS["Lookup"](rng, *t))
    ),
}


def transposed(rng, *t):
    """The signal of a matrix [5, 4] that is used as its transpose."""
    inputs, deltas = rng.normal(size=(N, *t, 4)), rng.normal(size=(N, *t, 5))
    outer = bp.Outer(jnp.asarray(inputs), jnp.asarray(deltas))
    return bp.Through(outer, View((4, 5)).transpose(1, 0))


def pullback(f, shape, rng):
    """The pull-back of a parameter that is used as f(W)."""
    w = jnp.asarray(rng.normal(size=shape))
    return Pullback(jax.vjp(lambda leaves: f(leaves[0]), [w])[1], 0, w.dtype)


POSITIONS = ((), (1,), (2,), (7,), (2, 3))
# Convolutions have positions in any case, and take the longest to compile. What is made of other
# kinds reads those.
SIGNALS_AT_POSITIONS = [
    (kind, t)
    for kind in SIGNALS
    for t in (POSITIONS if kind in ("Outer", "Bias", "Scale", "Lookup") else POSITIONS[-1:])
]


def make_inputs(case, key, n=N):
    if case.vocabulary is None:
        return normal(key, with_n(case.shape, n))
    return jnp.asarray(numpy_rng(key).integers(case.vocabulary, size=(n, *case.shape)))


def with_n(shape, n=N):
    """The shape of n examples, or a tree of such shapes."""
    return jax.tree.map(lambda own: (n, *own), shape, is_leaf=is_shape)


def numpy_rng(key):
    """A generator of NumPy, which compiles nothing, whose seed is a key."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def normal(key, shape):
    """Normal random numbers, or a tree of them for a tree of shapes."""
    rng = numpy_rng(key)
    return jax.tree.map(lambda own: jnp.asarray(rng.normal(size=own)), shape, is_leaf=is_shape)


def output_shape(layer, params, x):
    """The shape of a layer's outputs, or a tree of shapes, without computing them."""
    outputs, _ = jax.eval_shape(layer.forward, params, x)
    return jax.tree.map(lambda y: y.shape, outputs)


@functools.partial(jax.jit, static_argnames=("layer", "read"))
def swept(layer, params, x, dy, *, key=None, tree=None, read=bp.total):
    """(y, dx, readings): forward by the parameters, back by a tree like them or by themselves."""
    y, cache = layer.forward(params, x, key=key)
    return y, *layer.backward(params if tree is None else tree, cache, dy, read=read)


def prepare(case, key, n=N):
    """A layer of the registry with parameters away from zero, inputs, and a key if it draws.

    They are made once for all tests that ask for the same, which then share what is compiled too.
    """
    return _prepare(case, tuple(jax.random.key_data(key).tolist()), n, jax.config.jax_enable_x64)


@functools.cache
def _prepare(case, key_data, n, x64):
    del x64  # by which the dtypes of the arrays differ
    layer = case.make()
    key = jax.random.wrap_key_data(np.array(key_data, np.uint32))
    params_key, input_key, draw_key = jax.random.split(key, 3)
    like = jax.eval_shape(lambda key: layer.init(key, case.shape)[0], params_key)
    rng = numpy_rng(params_key)
    params = jax.tree.map(lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape), p.dtype), like)
    draws = "dropout" in layer.name or "sample" in layer.name
    return layer, params, make_inputs(case, input_key, n), draw_key if draws else None
