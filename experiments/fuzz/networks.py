"""Draws networks: every layer and combinator of the library, nested at random.

A network is drawn as Python source, such as `bp.chain(bp.dense(3), bp.relu())`, so that a report
can print the expression that makes it. All sizes are small.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbp as bp

SIZE = 80  # the largest number of entries of one example at any layer
POINTWISE = (
    *("sigmoid()", "tanh()", "relu()", "leaky_relu(0.2)", "elu()", "gelu()", "silu()"),
    *("gelu(approximate=False)", "softplus()", "dropout(0.3)", "layer_norm()", "rms_norm()"),
    *("mish()", "selu()", "celu(0.7)", "relu6()", "hardswish()", "hard_sigmoid()", "softsign()"),
    *("log_sigmoid()", "hard_tanh(-0.5, 1.5)", "tanh_shrink()", "hard_shrink()", "soft_shrink()"),
    *("threshold(0.1, -1.0)", "elementwise(jnp.sin, jnp.cos)", "scale(-1.5)", "layer_scale(0.8)"),
    *("prelu()", "prelu(shared=True)", "softmax()", "log_softmax()", "softmax(0)"),
)


class Drawn(NamedTuple):
    """A network that was drawn.

    Attributes:
      source: the expression that makes it.
      shape: the shape of one example: a tuple of integers, or of such shapes for several inputs.
      vocabulary: the number of different tokens, if the inputs are tokens.
      masked: whether the inputs are a pair of a sequence and its mask.
    """

    source: str
    shape: Any
    vocabulary: int | None = None
    masked: bool = False

    @property
    def draws(self) -> bool:
        """Whether the network draws random numbers."""
        return "dropout" in self.source or "sample" in self.source


def make(source: str) -> bp.Layer:
    """Makes the network of an expression."""
    return eval(source, {"bp": bp, "jnp": jnp})


@functools.lru_cache(maxsize=10_000)
def out_shape(source: str, shape: Any) -> Any:
    """The shape of one example's output."""
    shapes = []

    def init(key):
        params, out = make(source).init(key, shape)
        shapes.append(out)
        return params

    jax.eval_shape(init, jax.random.key(0))
    return shapes[0]


def draw(rng: np.random.Generator) -> Drawn:
    """Draws a network for vectors, sequences, images, tokens, masked sequences or two inputs."""
    kind = rng.choice(["vector", "sequence", "image", "tokens", "masked", "pair"])
    depth = int(rng.choice([0, 1, 1, 2]))  # of combinators inside one another
    if kind == "tokens":
        vocabulary, length = int(rng.integers(2, 6)), int(rng.integers(1, 5))
        features = int(rng.integers(1, 5))
        if rng.random() < 0.3:
            body = _body(rng, (length, features), depth, features)
            source = f"bp.tied_embedding({vocabulary}, {features}, {body})"
            return Drawn(source, (length,), vocabulary)
        padding_row = rng.choice([None, 0, vocabulary - 1])
        first = f"bp.embedding({vocabulary}, {features}, padding_row={padding_row})"
        return Drawn(_chain(rng, (length,), [first], depth), (length,), vocabulary)
    if kind == "masked":
        length, features = int(rng.integers(1, 5)), 2 * int(rng.integers(1, 3))
        body = _body(rng, (length, features), depth, features)
        chain = f"bp.chain({body}, {_masked_part(rng, features)})"
        shape = (length, features), (length,)
        return Drawn(f"bp.masked(lambda mask: {chain})", shape, masked=True)
    if kind == "pair":
        if rng.random() < 0.3:
            (t, s), (i, j) = rng.integers(2, 5, size=2), rng.integers(1, 4, size=2)
            features, lean = int(rng.integers(1, 4)), bool(rng.integers(2))
            # Without the cap, the gradient of the keys' bias would be a rounding error.
            cross = f"bp.cross_attention({2 * features}, 2, soft_cap=2.0, lean={lean})"
            shapes = (int(t), int(i)), (int(s), int(j))
            return Drawn(_chain(rng, shapes, [cross], depth), shapes)
        shapes = (int(rng.integers(1, 5)),), (int(rng.integers(1, 5)),)
        parts = PAIRS[rng.integers(len(PAIRS))](rng, shapes, depth, int(rng.integers(1, 5)))
        return Drawn(_chain(rng, shapes, [f"bp.chain({', '.join(parts)})"], depth), shapes)
    axes = {"vector": 0, "sequence": 1, "image": 2}[kind]
    shape = *(int(rng.integers(1, 5)) for _ in range(axes)), int(rng.integers(1, 5))
    return Drawn(_chain(rng, shape, [], depth), shape)


def _branches(rng, shapes, depth, features):
    branches = ", ".join(_body(rng, shape, depth, features) for shape in shapes)
    combine = str(rng.choice(["sum", "concatenate"]))
    return [f"bp.parallel({branches}, combine={combine!r})"]


def _towers(rng, shapes, depth, features):
    bodies = (_body(rng, shape, depth, features) for shape in shapes)
    return [*(f"bp.on({i}, {body})" for i, body in enumerate(bodies)), _join(rng)]


def _siamese(rng, shapes, depth, features):
    body = _body(rng, (features,), depth, features)
    parts = [f"bp.on({i}, bp.dense({features}))" for i in range(len(shapes))]
    return [*parts, f"bp.shared({body})", _join(rng)]


def _decoder(rng, shapes, depth, features):
    memory = f"bp.on(1, {_body(rng, shapes[1], depth, features)})"
    seen = rng.choice(["bp.concatenate()", "bp.fork(bp.select(1), bp.select(1)), bp.multiply()"])
    step = f"bp.residual({seen}, bp.dense({shapes[0][0]}), at=0)"
    return [memory, step, f"bp.stack({step}, 2)", "bp.select(0)"]


PAIRS = (_branches, _towers, _siamese, _decoder)


def _join(rng):
    """A layer that makes one array of two of the same shape."""
    kind = str(rng.choice(["euclidean", "squared", "manhattan"]))
    options = ["add()", "subtract()", "multiply()", "concatenate()", "inner_product()"]
    options += [
        "sample_gaussian()",
        "cosine_similarity()",
        f"distance({kind!r})",
        f"bilinear({rng.integers(1, 4)})",
    ]
    return f"bp.{rng.choice(options)}"


def _chain(rng, shape, parts, depth):
    """A chain that begins with some parts, and a few more layers."""
    for part in parts:
        shape = out_shape(part, shape)
    for _ in range(int(rng.integers(1, 4))):
        part = _layer(rng, shape, depth)
        after = out_shape(part, shape)
        if np.prod(after) <= SIZE:
            parts, shape = [*parts, part], after
    return f"bp.chain({', '.join(parts)})"


def _masked_part(rng, features):
    """A layer that takes a mask, and maps to the same number of features."""
    return str(
        rng.choice(
            [
                f"bp.recurrent(bp.gru({features}), mask=mask)",
                f"bp.recurrent(bp.lstm({features}), mask=mask, reverse=True, learn_initial=True)",
                f"bp.attention({features}, 2, mask=mask)",
                f"bp.attention({features}, 1, mask=mask, causal=True, lean=True)",
                f"bp.bidirectional(bp.simple_rnn({features}), mask=mask)",
            ]
        )
    )


def _layer(rng, shape, depth):
    """A layer or combinator for inputs of this shape; it may change all axes."""
    options = [_keeping, _keeping, _keeping]
    if len(shape) > 1:
        options += [_shrinking]
    return options[rng.integers(len(options))](rng, shape, depth)


def _shrinking(rng, shape, depth):
    """A layer that changes the axes of positions."""
    del depth
    axes = len(shape) - 1
    window = tuple(int(rng.integers(1, min(n, 3) + 1)) for n in shape[:-1])
    features = int(rng.integers(1, 5))
    order = tuple(int(axis) for axis in rng.permutation(len(shape)))
    axis = int(rng.integers(len(shape)))
    before = int(rng.integers(-1 if shape[0] > 1 else 0, 2))
    mode = str(rng.choice(["constant", "edge", "wrap"]))
    options = ["bp.flatten()", "bp.global_pool()", "bp.global_pool('max')"]
    options += [
        f"bp.reshape({shape[-1]}, -1)",
        f"bp.permute{order}",
        f"bp.take({int(rng.integers(shape[axis]))}, axis={axis})",
        f"bp.take(slice(None, None, {int(rng.choice([-2, -1, 2]))}), axis={axis})",
        f"bp.pad((({before}, 1),), mode={mode!r})",
    ]
    if len(shape) == 2:
        options += [f"bp.prepend({int(rng.integers(1, 3))})"]
    if axes <= 3:
        strides = tuple(int(rng.integers(1, 3)) for _ in range(axes))
        sizes = tuple(int(rng.integers(1, 5)) for _ in range(axes))
        padding = str(rng.choice(["SAME", "VALID"]))
        options += [
            f"bp.max_pool({window}, strides={strides}, padding={padding!r})",
            f"bp.avg_pool({window}, strides={strides}, padding={padding!r})",
            f"bp.conv({features}, {window}, strides={strides}, padding={padding!r})",
            f"bp.conv_transpose({features}, {window}, strides={strides}, padding={padding!r})",
            f"bp.conv_transpose({features}, {window}, strides={strides}, padding='VALID', "
            f"output_padding={int(rng.integers(1, 3))})",
            f"bp.upsample({strides})",
            f"bp.max_pool({window}, strides=1, dilation=2, padding='SAME')",
            f"bp.avg_pool({window}, strides={strides}, padding={padding!r}, divisor='window')",
            f"bp.lp_pool({window}, {int(rng.integers(1, 4))}, strides={strides})",
            f"bp.adaptive_pool({sizes}, {str(rng.choice(['mean', 'max']))!r})",
            f"bp.resize({sizes}, method={str(rng.choice(['nearest', 'linear', 'cubic']))!r})",
        ]
    return options[rng.integers(len(options))]


def _keeping(rng, shape, depth):
    """A layer or combinator that keeps all axes but the last."""
    features = int(rng.integers(1, 5))
    options = [_simple, _simple]
    if depth > 0:
        options += [_residual, _parallel, _gated, _mixture, _loop, _wrapped]
    return options[rng.integers(len(options))](rng, shape, depth, features)


def _simple(rng, shape, depth, features):
    del depth
    last = shape[-1]
    options = [f"bp.dense({features})", f"bp.dense({features}, use_bias=False)"]
    options += [f"bp.{name}" for name in rng.choice(POINTWISE, size=2, replace=False)]
    if last % 2 == 0:
        options += ["bp.glu()"]
    groups = int(rng.choice([n for n in range(1, last + 1) if last % n == 0]))
    norms = [
        f"bp.group_norm({groups})",
        f"bp.group_norm({groups}, use_gain=False, use_bias=False)",
        f"bp.layer_norm(axes={int(rng.integers(1, len(shape) + 1))}, use_gain=False)",
        f"bp.rms_norm(axes={len(shape)})",
        f"bp.fixed_norm(jnp.arange({last}.0), jnp.arange({last}.0), eps=0.5)",
        f"bp.local_response_norm({int(rng.integers(1, 4))}, alpha=0.5)",
        "bp.l2_norm()",
    ]
    options += [str(rng.choice(norms))]
    if len(shape) == 2:
        length = shape[0]
        heads = int(rng.integers(1, 3))
        causal, lean = bool(rng.integers(2)), bool(rng.integers(2))
        cells = [f"{cell}({features})" for cell in ("simple_rnn", "lstm", "gru")]
        cells += [
            f"gru({features}, reset='before')",
            f"lstm(3, projection={features})",
            f"simple_rnn({features}, activation='sigmoid')",
        ]
        cell = rng.choice(cells)
        options += [
            f"bp.attention({heads * features}, {heads}, causal={causal}, lean={lean})",
            f"bp.attention({4 * features}, 2, kv_heads=1, rotary=True, use_bias=False)",
            f"bp.attention({features}, {heads}, head_size=4, causal={causal}, window=2, "
            f"rotary=bp.Rotary(size=2, interleaved={lean}))",
            f"bp.attention({features}, {heads}, head_size=2, value_size=3, soft_cap=2.0, "
            f"bias=jnp.cos(jnp.arange({length**2}.0)).reshape({length}, {length}), lean={lean})",
            f"bp.recurrent(bp.{cell}, learn_initial={causal}, reverse={lean})",
            f"bp.recurrent(bp.{cell}, horizon={length})",
            f"bp.recurrent(bp.{cell}, segment={length}, use_bias={causal})",
            f"bp.bidirectional(bp.{cell})",
            f"bp.learned_positions({length + 1})",
        ]
        if last % 2 == 0:
            options += ["bp.sinusoidal_positions()", "bp.rotary(1)"]
        if last % 3 == 0:
            options += [f"bp.dot_product_attention(1, causal={causal}, lean={lean})"]
    if 2 <= len(shape) <= 4:
        kernel = tuple(int(rng.integers(1, 4)) for _ in shape[:-1])
        options += [
            f"bp.conv({features}, {kernel}, dilation={int(rng.integers(1, 3))})",
            f"bp.conv({groups * features}, {kernel}, groups={groups}, use_bias=False)",
        ]
    return options[rng.integers(len(options))]


def _body(rng, shape, depth, features):
    """A chain that keeps all axes but the last, which becomes the number of features."""
    parts, current = [], shape
    for _ in range(int(rng.integers(1, 3))):
        part = _keeping(rng, current, depth - 1)
        after = out_shape(part, current)
        if np.prod(after) <= SIZE:
            parts, current = [*parts, part], after
    if current[-1] != features or not parts:
        parts += [f"bp.dense({features})"]
    return parts[0] if len(parts) == 1 else f"bp.chain({', '.join(parts)})"


def _residual(rng, shape, depth, features):
    del features
    return f"bp.residual({_body(rng, shape, depth, shape[-1])})"


def _parallel(rng, shape, depth, features):
    n = int(rng.integers(1, 4))
    if rng.random() < 0.5:
        branches = ", ".join(_body(rng, shape, depth, features) for _ in range(n))
        return f"bp.parallel({branches})"
    branches = ", ".join(_keeping(rng, shape, depth - 1) for _ in range(n))
    return f"bp.parallel({branches}, combine='concatenate')"


def _gated(rng, shape, depth, features):
    layer, gate = (_body(rng, shape, depth, features) for _ in range(2))
    if len(shape) > 1 and rng.random() < 0.4:  # a factor for each channel, or each position
        gate = str(rng.choice([f"bp.chain({gate}, bp.global_pool())", "bp.dense(1)"]))
    return f"bp.gated({layer}, {gate})"


def _mixture(rng, shape, depth, features):
    n = int(rng.integers(1, 4))
    experts = ", ".join(_body(rng, shape, depth, features) for _ in range(n))
    gate = f"bp.dense({n})"
    if len(shape) > 1 and rng.random() < 0.3:  # one mixture for all positions
        gate = f"bp.chain(bp.global_pool(), {gate})"
    return f"bp.mixture({gate}, {experts}, top_k={rng.choice([None, int(rng.integers(1, n + 1))])})"


def _loop(rng, shape, depth, features):
    del features
    combinator = rng.choice(["repeat", "stack"])
    return f"bp.{combinator}({_body(rng, shape, depth, shape[-1])}, {int(rng.integers(1, 4))})"


def _wrapped(rng, shape, depth, features):
    body = _body(rng, shape, depth, features)
    return f"bp.remat({body})" if rng.random() < 0.6 else f"bp.cast({body}, float)"
