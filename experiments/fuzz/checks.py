"""Checks a network: what one sweep reads, against autodiff of the loss of each example.

The oracle differentiates the loss of each example by `jax.jacrev`, so that it has the gradient of
every example, [N, ...]. Everything else follows from these by its definition. Networks that draw no
random numbers are also run on one example at a time: an example's loss must not depend on the
others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbp as bp
from experiments.fuzz.networks import Drawn, make
from jaxbp.signals.stacked import stack_axes

N = 3
MAX_NORM = 0.5
# The largest difference, relative to the largest entry of the expected array.
TOLERANCES = {"float64": 1e-9, "float32": 2e-3, "bfloat16": 0.3, "float16": 0.05}
LOSSES = {
    "squared_error": bp.squared_error,
    "softmax_cross_entropy": bp.softmax_cross_entropy,
    "softmax_cross_entropy of probabilities": bp.softmax_cross_entropy,
    "sigmoid_cross_entropy": bp.sigmoid_cross_entropy,
    "huber": bp.huber,
    "weighted": bp.weighted(bp.squared_error),
    "ignoring": bp.ignoring(bp.softmax_cross_entropy, -1),
}


class Trial(NamedTuple):
    """How a network is checked.

    Attributes:
      drawn: the network.
      loss: the name of the loss.
      dtype: the dtype of the computation; 16 bits by `bp.cast`.
      way: the name of the transformation of JAX around the sweep, one of `WAYS`.
      questions: what is compared, some of `QUESTIONS`.
      seed: of parameters, inputs and targets.
    """

    drawn: Drawn
    loss: str
    dtype: str
    way: str
    questions: tuple[str, ...]
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.drawn.source}\n    inputs {self.drawn.shape}, {self.loss}, {self.dtype}, "
            f"{self.way}: {', '.join(self.questions)}"
        )


def draw_trial(drawn: Drawn, rng: np.random.Generator, seed: int) -> Trial:
    """Draws loss, dtype and transformation for a network."""
    dtype = str(rng.choice(list(TOLERANCES), p=[0.55, 0.25, 0.1, 0.1]))
    ways = list(WAYS) if dtype in ("float64", "float32") else ["jit", "vmap", "scan"]
    if "attention" in drawn.source and drawn.shape[0] == 1:
        # The scores of a single position have no derivative. In the second derivative, terms that
        # grow with the queries and keys have to cancel; what is left is their rounding error.
        ways = [way for way in ways if way != "grad"]
    loss, way = str(rng.choice(list(LOSSES))), str(rng.choice(ways))
    # In float16, the errors of a second sweep can be too small to be represented; it is refused.
    asked = [name for name in QUESTIONS if dtype != "float16" or "two sweeps" not in name]
    questions = tuple(map(str, rng.choice(asked, size=3, replace=False)))
    return Trial(drawn, loss, dtype, way, questions, seed)


def check(trial: Trial) -> list[str]:
    """Runs a trial; returns a sentence for everything that is wrong."""
    with jax.enable_x64(trial.dtype == "float64"):
        net, loss = make(trial.drawn.source), LOSSES[trial.loss]
        if trial.dtype in ("float16", "bfloat16"):
            net = bp.cast(net, jnp.dtype(trial.dtype))
        params, inputs, targets, key = make_data(net, loss, trial)
        opened, own = net, params
        if trial.way == "lift":
            opened, own = bp.lift(
                lambda params, x: net.forward(params, x)[0], params, inputs, name="lifted"
            )
        way = WAYS[trial.way]
        got = way(_answers(opened, loss, key, trial.questions))(own, inputs, targets)
        expected = way(_expected(net, loss, key, trial.questions))(params, inputs, targets)
        wrong = _differences(got, expected, trial.dtype)
        if key is None and trial.dtype == "float64":
            wrong += _coupled(net, params, inputs)
    return wrong


def make_data(net: bp.Layer, loss: bp.Loss, trial: Trial) -> tuple[Any, Any, Any, Any]:
    """Draws parameters, inputs, targets, and a key if the network draws random numbers."""
    drawn, rng = trial.drawn, np.random.default_rng(trial.seed)

    def normal(like):
        return jnp.asarray(0.7 * rng.normal(size=like.shape), like.dtype)

    def batch(shape):
        return jnp.asarray(rng.normal(size=(N, *shape)), float)

    # By NumPy: the initialisers would be compiled for every network.
    shapes = jax.eval_shape(lambda key: net.init(key, drawn.shape)[0], jax.random.key(0))
    params = jax.tree.map(normal, shapes)
    if drawn.vocabulary is not None:
        inputs = jnp.asarray(rng.integers(drawn.vocabulary, size=(N, *drawn.shape)))
    elif drawn.masked:
        sequence, mask = drawn.shape
        inputs = batch(sequence), jnp.asarray(rng.random((N, *mask)) < 0.7)
    elif isinstance(drawn.shape[0], tuple):
        inputs = tuple(map(batch, drawn.shape))
    else:
        inputs = batch(drawn.shape)
    key = jax.random.key(trial.seed) if drawn.draws and trial.way != "lift" else None
    outputs, _ = jax.eval_shape(lambda: net.forward(params, inputs, key=key))
    return params, inputs, _draw_targets(rng, trial.loss, outputs), key


def _draw_targets(rng, loss, outputs):
    """Targets in one of the forms that a loss takes."""
    shape, dtype = outputs.shape, outputs.dtype
    match loss:
        case "softmax_cross_entropy":
            return jnp.asarray(rng.integers(shape[-1], size=shape[:-1]))
        case "softmax_cross_entropy of probabilities":
            return jnp.asarray(rng.dirichlet(np.ones(shape[-1]), size=shape[:-1]), dtype)
        case "sigmoid_cross_entropy":
            return jnp.asarray(rng.integers(2, size=shape), dtype)
        case "ignoring":
            return jnp.asarray(rng.integers(-1, shape[-1], size=shape[:-1]))
        case "weighted":
            weights = rng.uniform(0.5, 2, size=N) * (np.arange(N) > 0)  # the first is zero
            return jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(weights, dtype)
    return jnp.asarray(rng.normal(size=shape), dtype)


class Oracle(NamedTuple):
    """What autodiff says of a batch.

    Attributes:
      values: the loss of each example, [N].
      rows: the gradient of each example, a tree like params with [N, ...].
      axes: the number of axes of stacked layers that each parameter begins with.
      dx: the derivative of the total loss in the inputs, for those that are floats.
    """

    values: jax.Array
    rows: Any
    axes: Any
    dx: list[jax.Array]

    @property
    def flat(self) -> jax.Array:
        """The gradient of each example as one vector, [N, P]."""
        rows = [g.reshape(N, -1) for g in jax.tree.leaves(self.rows)]
        return jnp.concatenate(rows, axis=1) if rows else jnp.zeros((N, 0))

    def map(self, function: Callable[[jax.Array], jax.Array]) -> Any:
        """A tree like params with the result for each parameter's per-example gradients."""
        return jax.tree.map(function, self.rows)

    def per_example(self) -> Any:
        """The gradient of each example, with the axes of stacked layers before N."""
        return jax.tree.map(lambda g, a: jnp.moveaxis(g, 0, a), self.rows, self.axes)

    def sq_norms(self) -> Any:
        """The squared norm of each example's gradient, [N], of each layer on its own."""

        def squares(g, a):
            return jnp.sum(g * g, axis=tuple(range(a + 1, g.ndim)))

        return jax.tree.map(squares, self.per_example(), self.axes)

    def clipped(self) -> Any:
        """The sum of the per-example gradients, each clipped to `MAX_NORM`."""
        squares = jnp.sum(self.flat**2, axis=1)
        norms = jnp.sqrt(jnp.where(squares == 0, 1, squares))
        weights = jnp.minimum(1, MAX_NORM / norms)
        return self.map(lambda g: jnp.einsum("n,n...->...", weights, g))


class Question(NamedTuple):
    """One thing that the library computes, and its definition.

    Attributes:
      ask: `ask(net, loss, data, key)`, with `data` the parameters, inputs and targets.
      define: the same from an `Oracle`.
    """

    ask: Callable[..., Any]
    define: Callable[[Oracle], Any]


def _read(reading):
    def ask(net, loss, data, key):
        return bp.backprop(net, loss, read=reading)(*data, key=key)[1]

    return ask


def _clip(sweeps):
    def ask(net, loss, data, key):
        weigh = bp.clip_weights(MAX_NORM)
        return bp.reweighted(net, loss, weigh, sweeps=sweeps)(*data, key=key).grads

    return ask


def _gram(net, loss, data, key):
    _, signals = bp.backprop(net, loss, read=bp.keep)(*data, key=key)
    return bp.gram(signals, signals) if jax.tree.leaves(data[0]) else jnp.zeros((N, N))


def _dx(net, loss, data, key):
    params, inputs, targets = data
    outputs, cache = net.forward(params, inputs, key=key)
    return jax.tree.leaves(net.backward(params, cache, loss(outputs, targets)[1])[0])


QUESTIONS = {
    "value and gradient": Question(
        lambda net, loss, data, key: bp.value_and_grad(net, loss)(*data, key=key),
        lambda o: (jnp.mean(o.values), o.map(lambda g: jnp.mean(g, axis=0))),
    ),
    "total": Question(_read(bp.total), lambda o: o.map(lambda g: jnp.sum(g, axis=0))),
    "mean": Question(_read(bp.mean), lambda o: o.map(lambda g: jnp.mean(g, axis=0))),
    "per_example": Question(_read(bp.per_example), Oracle.per_example),
    "sq_norms": Question(_read(bp.sq_norms), Oracle.sq_norms),
    "second_moment": Question(
        _read(bp.second_moment), lambda o: o.map(lambda g: jnp.mean(g * g, axis=0))
    ),
    "clipped sum": Question(_clip(1), Oracle.clipped),
    "clipped sum in two sweeps": Question(_clip(2), Oracle.clipped),
    "gram": Question(_gram, lambda o: o.flat @ o.flat.T),
    "dx": Question(_dx, lambda o: o.dx),
}


def _answers(net, loss, key, questions):
    """The answers of the library to some questions about a batch."""

    def answers(*data):
        return {name: QUESTIONS[name].ask(net, loss, data, key) for name in questions}

    return answers


def _expected(net, loss, key, questions):
    """The same by autodiff of each example's loss."""

    def values_of(params, inputs, targets):
        return loss(net.forward(params, inputs, key=key)[0], targets)[0]

    def answers(params, inputs, targets):
        leaves, structure = jax.tree.flatten(inputs)
        floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]

        def total_of(some):
            rest = iter(some)
            pairs = zip(leaves, floats, strict=True)
            x = structure.unflatten([next(rest) if is_float else leaf for leaf, is_float in pairs])
            return jnp.sum(values_of(params, x, targets))

        oracle = Oracle(
            values_of(params, inputs, targets),
            jax.jacrev(values_of)(params, inputs, targets) if jax.tree.leaves(params) else params,
            stack_axes(params),
            jax.grad(total_of)([x for x, is_float in zip(leaves, floats, strict=True) if is_float]),
        )
        return {name: QUESTIONS[name].define(oracle) for name in questions}

    return answers


def _twice(tree: Any) -> Any:
    """A batch and another one, stacked for `vmap` and `scan`."""
    return jax.tree.map(lambda a: jnp.stack([a, jnp.flip(a, axis=0)]), tree)


def _jit(function):
    return jax.jit(function)


def _vmap(function):
    def two(params, inputs, targets):
        return jax.vmap(function, (None, 0, 0))(params, _twice(inputs), _twice(targets))

    return jax.jit(two)


def _scan(function):
    def two(params, inputs, targets):
        def body(carry, batch):
            return carry, function(params, *batch)

        return jax.lax.scan(body, (), (_twice(inputs), _twice(targets)))[1]

    return jax.jit(two)


def _checkpoint(function):
    return jax.jit(jax.checkpoint(function))


def _grad(function):
    """The gradient of a function of all answers: what is read is differentiated once more."""

    def scalar(params, inputs, targets):
        answers = jax.tree.leaves(function(params, inputs, targets))
        weights = [jnp.cos(jnp.arange(a.size, dtype=float)).reshape(a.shape) for a in answers]
        return sum(map(jnp.vdot, weights, answers), start=jnp.zeros(()))

    return jax.jit(jax.grad(scalar))


WAYS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "jit": _jit,
    "vmap": _vmap,
    "scan": _scan,
    "checkpoint": _checkpoint,
    "grad": _grad,
    "lift": _jit,
}


def _differences(got: Any, expected: Any, dtype: str) -> list[str]:
    """A sentence for every array that is wrong, leaf by leaf: a lifted tree has other nodes."""
    ours, theirs = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(expected)
    if len(ours) != len(theirs):
        return [f"{len(ours)} arrays, expected {len(theirs)}"]
    finite = (leaf for _, leaf in theirs if np.all(np.isfinite(np.asarray(leaf, float))))
    largest = max(map(_largest, finite), default=0.0)
    wrong = []
    for (_, leaf), (path, right) in zip(ours, theirs, strict=True):
        leaf, right, what = np.asarray(leaf, float), np.asarray(right, float), _show(path)
        if leaf.shape != right.shape:
            wrong.append(f"{what}: shape {leaf.shape}, expected {right.shape}")
        elif right.size and np.all(np.isfinite(right)):
            # Where terms nearly cancel, their sum has the rounding errors of the terms.
            scale = _largest(right) if dtype == "float64" else largest
            error = _largest(leaf - right) / max(scale, 1e-3)
            if not error <= TOLERANCES[dtype]:
                wrong.append(f"{what}: relative error {error:.1e}")
    return wrong


def _largest(array: Any) -> float:
    return float(np.max(np.abs(np.asarray(array, float)), initial=0))


def _show(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _coupled(net: bp.Layer, params: Any, inputs: Any) -> list[str]:
    """Whether the outputs of an example change if it is the only one."""
    forward = jax.jit(lambda x: net.forward(params, x)[0])
    first = {"first example alone": forward(jax.tree.map(lambda x: x[:1], inputs))}
    return _differences(first, {"first example alone": forward(inputs)[:1]}, "float64")
