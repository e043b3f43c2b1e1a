"""Lift: any JAX function of parameters and inputs as a `Layer`, with its backward pass open.

The function is traced for one example and cut at its parameters (`program`). N comes in by
`jax.vmap`, piece by piece, so it is the first axis of every operand, whatever the function does
with the axes of its arrays. The program is traced once for each shape of the inputs.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import get_abstract_mesh

from jaxbp.lift.cutting import cut
from jaxbp.lift.examples import Examples, without_devices
from jaxbp.lift.loops import Checkpoint, Scan
from jaxbp.lift.program import Program, Use
from jaxbp.lift.trace import EXAMPLE, PARAMETER, is_float
from jaxbp.signals.kinds import keep
from jaxbp.signals.stacked import Stacked, is_stacked
from jaxbp.types import Layer, LayerError, Params, PyTree, show_path, show_shape

__all__ = ["lift", "unstacked"]

# By how much the outputs of a batch may differ from those of its examples one by one, relative to
# the largest: rounding does by less, and a function that mixes examples by more.
BATCH_TOLERANCE = 1e-3
ROUNDINGS = 8  # how many roundings in 16 bits may add up


def lift(
    function: Callable[..., Any],
    params: Params,
    inputs: PyTree,
    *,
    init: Callable[[jax.Array], Params] | None = None,
    per_example: bool = False,
    draws: bool = False,
    name: str | None = None,
) -> tuple[Layer, Params]:
    """Makes a Layer of any function of parameters and inputs: of Flax, Equinox, Haiku, or your own.

    Everything that works on a network works on it: readings, clipped sums, curvature, rules, `fit`,
    `check`. Only what is in `params` is swept. What the function closes over is frozen, and nothing
    is computed for it.

    Args:
      function: `function(params, x) -> y`, of a batch in which examples do not see each other, or
        of one example (see `per_example`). Inputs and outputs may be trees of arrays.
      params: a tree of floating-point arrays.
      inputs: a batch, for its shapes. On it the outputs of the batch are compared with those of its
        examples one by one, unless this runs inside `jit`.
      init: `init(key) -> params`, for `fit`, and for rules that draw matrices.
      per_example: whether the function takes one example, without N, as Equinox's models do.
      draws: whether the function draws random numbers. With a key it is then called as
        `function(params, x, key)`, with a key of its own for each example; without, as above.
      name: the name in messages.

    Returns:
      The layer, and the parameters as it takes them: the same tree, with a `Stacked` in place of
      each leaf that a scan runs over. What is read of such a leaf is read layer by layer.
      `unstacked` gives the function's own tree, but for `Stacked` nodes that it had before.

    Raises:
      LayerError: parameters are not floating-point; examples see each other; a `while_loop` is on
        the way from a parameter to the outputs; or the function does not take the inputs.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> def model(params, x):
      ...     return jnp.tanh(x @ params["w"] + params["b"])
      >>> params, x = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}, jnp.ones((5, 3))
      >>> net, params = bp.lift(model, params, x)
      >>> sweep = bp.backprop(net, bp.squared_error, read=bp.sq_norms)
      >>> values, sq_norms = sweep(params, x, jnp.zeros((5, 2)))
      >>> sq_norms["w"].shape
      (5,)
    """
    name = name or f"lift({getattr(function, '__name__', type(function).__name__)})"
    given = jax.tree.structure(params)
    # The function's tree may have Stacked nodes of its own; those of the layer are where scans run.
    structure = jax.tree.structure(unstacked(params))
    paths = [show_path(path) for path, _ in jax.tree.leaves_with_path(params)]
    leaves = jax.tree.leaves(params)
    integers = [p for p, leaf in zip(paths, leaves, strict=True) if not is_float(jnp.asarray(leaf))]
    if integers:
        raise LayerError(
            name,
            f"has parameters that are not floating-point: {', '.join(integers)}. Take them out of "
            "params, and let the function close over them?",
        )

    def single(leaves, x, *keys):
        """The function of one example."""
        tree = given.unflatten(leaves)
        if per_example:
            return function(tree, x, *keys)
        y = function(tree, jax.tree.map(lambda array: array[None], x), *keys)
        _require_batch_of_one(name, y)
        return jax.tree.map(lambda array: array[0], y)

    programs: dict[Any, _Traced] = {}

    def trace(leaves, x, keys):
        """The program for inputs of these shapes."""
        like = [jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)) for p in leaves]
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (x, *keys))
        with without_devices():
            spec = str((like, one, get_abstract_mesh()))
        if spec not in programs:
            n_inputs = len(jax.tree.leaves(one))
            kinds = [PARAMETER] * len(like) + [EXAMPLE] * n_inputs
            try:
                with _hinted(name, per_example), without_devices():
                    closed, out = jax.make_jaxpr(single, return_shape=True)(like, *one)
                program = cut(closed, kinds, [*paths, *["inputs"] * n_inputs])
            except LayerError as error:
                raise LayerError(name, error.problem) from error.__cause__
            structures = jax.tree.structure(one[0]), jax.tree.structure(out)
            programs[spec] = _Traced(program, *structures)
        return programs[spec]

    traced = trace(leaves, inputs, ())
    depths = _stack_depths(traced.program)

    def stacked(tree):
        """The function's own tree of parameters as the layer takes it."""
        own = zip(given.flatten_up_to(tree), depths, strict=True)
        return structure.unflatten([_wrapped(leaf, depth) for leaf, depth in own])

    def leaves_of(tree):
        """The leaves of parameters as the layer takes them."""
        try:
            own = structure.flatten_up_to(tree)
        except (ValueError, TypeError) as error:
            raise LayerError(name, f"got parameters that are not its own: {error}") from error
        for path, leaf, depth in zip(paths, own, depths, strict=True):
            if is_stacked(leaf) != (depth > 0):
                raise LayerError(
                    name,
                    f"got {path} as the function has it; a scan runs over it, and the layer takes "
                    "the parameters that lift returned, with a Stacked in its place.",
                )
        return jax.tree.leaves(unstacked(tree))

    def make(key, shape):
        del shape  # known from the inputs
        if init is None:
            raise LayerError(
                name,
                "was lifted without init, and cannot draw parameters. Pass lift(..., init=...)?",
            )
        shapes = [v.aval.shape for v in traced.program.outs]
        return stacked(init(key)), traced.outputs.unflatten(shapes)

    def forward(params, x, *, key=None):
        own = leaves_of(params)
        examples = Examples.of(x, beside=own)
        keys = examples.keys(key) if draws else ()
        traced = trace(own, x, keys)
        inputs = examples.placed(jax.tree.leaves((x, *keys)))
        outs, cache = traced.program.forward([*examples.shared(own), *inputs], examples)
        return traced.outputs.unflatten(outs), Tape([*own, *inputs], cache, traced)

    def backward(tree, tape, dy, *, read=keep):
        (traced, values), carriers = (tape.traced, tape.values), leaves_of(tree)
        n_params, program = len(carriers), traced.program
        errors = traced.outputs.flatten_up_to(dy)
        examples = Examples.of(dy, beside=(values, carriers))
        own, inputs = values[:n_params], values[n_params:]
        shared = examples.shared(own)
        pairs = zip(carriers, own, shared, strict=True)
        carriers = [s if a is x else examples.shared(a) for a, x, s in pairs]
        readers = [read] * n_params
        dxs, readings = program.backward(
            *([*shared, *inputs], [*carriers, *inputs], tape.cache),
            *(examples.placed(errors), readers, examples),
        )
        dxs = dxs[n_params : n_params + traced.inputs.num_leaves]
        return traced.inputs.unflatten(dxs), structure.unflatten(readings)

    def table():
        """The uses of all parameters, from a backward pass whose shapes alone are computed."""
        log = []

        def sweep(leaves, x):
            examples = Examples.of(x, beside=leaves)
            values, nothing = [*leaves, *jax.tree.leaves(x)], [None] * len(leaves)
            outs, cache = traced.program.forward(values, examples)
            traced.program.backward(values, values, cache, outs, nothing, examples, log)

        jax.eval_shape(sweep, leaves, inputs)
        return log

    def of_batch(params, x):
        tree = given.unflatten(jax.tree.leaves(params))
        return jax.vmap(function, (None, 0))(tree, x) if per_example else function(tree, x)

    layer = Layer(name, make, Lifted(forward, of_batch, table), backward)
    if not per_example:
        tolerance = _tolerance(traced.program)
        own = params, stacked(params)
        _require_separate_examples(name, function, layer, *own, inputs, tolerance)
    return layer, stacked(params)


@dataclasses.dataclass(eq=False)
class Lifted:
    """The forward function of a lifted layer, which knows where it comes from.

    Attributes:
      forward: what it does when it is called.
      reference: `reference(params, x) -> y`, the user's own function of a batch, for `check`.
      table: returns the uses of all parameters, for `uses`.
    """

    forward: Callable[..., Any]
    reference: Callable[..., Any]
    table: Callable[[], list[Use]]

    def __call__(self, params, x, /, *, key=None):
        """The outputs and the cache, as of any layer."""
        return self.forward(params, x, key=key)


@dataclasses.dataclass(eq=False)
class _Traced:
    """A program, and the trees of its inputs and outputs."""

    program: Program
    inputs: Any
    outputs: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tape:
    """What a lifted layer keeps for the backward pass.

    Attributes:
      values: the inputs of the program: parameters, inputs and keys.
      cache: of the program.
      traced: the program.
    """

    values: list[Any]
    cache: Any
    traced: _Traced = dataclasses.field(metadata={"static": True})


def unstacked(params: Params) -> PyTree:
    """Parameters as the lifted function has them, without the `Stacked` nodes of `lift`.

    Use it on the parameters of a lifted layer, or on a tree like them, such as a mean gradient.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bp.unstacked({"w": bp.Stacked(jnp.ones((3, 2)))})["w"].shape
      (3, 2)
    """

    def strip(node):
        return unstacked(node.layers) if is_stacked(node) else node

    return jax.tree.map(strip, params, is_leaf=is_stacked)


def _wrapped(leaf, depth):
    return Stacked(_wrapped(leaf, depth - 1)) if depth else leaf


def _stack_depths(program):
    """For each parameter, how many loops run over it, one inside the other."""
    depths = []
    for leaf in program.leaves:
        depth = 0
        for step in program.cuts if program.uses[leaf] == 1 else ():
            body = step.body
            if leaf in step.invars and isinstance(body, Scan | Checkpoint):
                i, inner = step.invars.index(leaf), body.program
                below = dict(zip(inner.leaves, _stack_depths(inner), strict=True))
                if isinstance(body, Checkpoint):
                    depth = below[inner.invars[i]]
                elif body.scans_over(i):
                    depth = 1 + below[inner.invars[i]]
        depths.append(depth)
    return depths


@contextlib.contextmanager
def _hinted(name, per_example):
    """Says of an error in the user's function how it was called."""
    try:
        yield
    except LayerError:
        raise
    except Exception as error:
        called, hint = (
            "a batch of one example",
            "takes one example, without N, pass per_example=True",
        )
        if per_example:
            called, hint = "one example, without N", "takes a batch, leave out per_example"
        problem = str(error).rstrip(". ")
        raise LayerError(name, f"failed on {called}: {problem}. If it {hint}?") from error


def _require_batch_of_one(name, y):
    """Refuses outputs that are not [1, ...] for a batch of one example."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(y)]
    if not shapes or any(shape[:1] != (1,) for shape in shapes):
        raise LayerError(
            name,
            f"gave outputs of shapes {', '.join(map(show_shape, shapes))} for a batch of one "
            "example; it takes [N, ...] for each. Leave out what is no output, such as the state "
            "of batch normalisation. If the function takes one example, pass per_example=True?",
        )


def _require_separate_examples(name, function, layer, own, params, inputs, tolerance):
    """Refuses a function whose outputs for a batch are not those of its examples one by one."""
    arrays = jax.tree.leaves((own, inputs))
    if jax.tree.leaves(inputs)[0].shape[0] < 2 or any(isinstance(a, Tracer) for a in arrays):
        return
    ours = jax.tree.leaves(jax.jit(lambda p, x: layer.forward(p, x)[0])(params, inputs))
    theirs = jax.tree.leaves(jax.jit(function)(own, inputs))
    for y, batch in zip(ours, theirs, strict=True):
        error = _difference(y, batch) if y.shape == batch.shape else math.inf
        if error > tolerance:
            raise LayerError(
                name,
                f"gives other outputs for a batch than for its examples one by one, by {error:.1e} "
                "of the largest. Examples see each other, as in batch normalisation in training, "
                "and have no gradients of their own. Use group, layer or RMS normalisation, or "
                "running averages?",
            )


def _difference(y, batch):
    """The largest difference, relative to the largest finite entry. Equal infinities count as 0."""
    y, batch = np.asarray(y, np.float64), np.asarray(batch, np.float64)
    finite = np.isfinite(y) & np.isfinite(batch)
    if not np.array_equal(y[~finite], batch[~finite], equal_nan=True):
        return math.inf
    y, batch = y[finite], batch[finite]
    return np.max(np.abs(y - batch), initial=0) / (np.max(np.abs(batch), initial=0) or 1)


def _tolerance(program):
    """By how much rounding may change outputs, in the coarsest dtype that the function uses."""
    dtypes = {v.aval.dtype for v in program.kinds if is_float(v.aval)}
    own = max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)
    inner = [p for cut in program.cuts for p in cut.body.programs]
    return max(BATCH_TOLERANCE, ROUNDINGS * own, *map(_tolerance, inner))
