"""Examples: how many there are, and how their arrays lie on the devices of a mesh.

A lifted function is traced for one example on one device, so its program says nothing of devices.
What is computed for all examples, [N, ...], runs in each of the three modes (see `sharding`):

    automatic    as it is
    explicit     inside `jax.sharding.auto_axes`: the types of its results say that they are divided
                 as the examples are
    manual       `unvaried`: it is traced for arrays that do not vary over devices, as the function
                 was, and what this gives runs on those that do

Everything that such a function uses is an argument of it, since a value that it closed over would
have the types outside.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import (
    AbstractMesh,
    AxisType,
    NamedSharding,
    PartitionSpec,
    auto_axes,
    get_abstract_mesh,
    reshard,
    use_abstract_mesh,
)

from jaxbp.lift.trace import as_closed
from jaxbp.lift.versions import CALLS, CHECKPOINTS, apply
from jaxbp.sharding import placement, replicated, varies_over, vary
from jaxbp.types import PyTree

# Operations with programs inside, whose types have to be those of their operands.
_WITH_PROGRAMS = {"scan", "while", "cond", "custom_linear_solve", *CHECKPOINTS}
_CALLS = {*CALLS, "custom_jvp_call", "custom_vjp_call"}


@dataclasses.dataclass(frozen=True)
class Examples:
    """N examples, and how arrays [N, ...] lie on devices.

    Attributes:
      n: N.
      sharding: how the first axis is divided, in the explicit mode; otherwise None.
      varying: the axes of the mesh over which arrays vary inside `shard_map`.
    """

    n: int
    sharding: NamedSharding | None
    varying: frozenset[str]

    @classmethod
    def of(cls, arrays: PyTree, beside: PyTree = ()) -> "Examples":
        """The examples of a tree of arrays [N, ...], beside others, such as parameters."""
        first, *_ = jax.tree.leaves(arrays)
        varying = varies_over(jax.tree.leaves((arrays, beside)))
        return cls(first.shape[0], placement(first, (first, 0)), varying)

    def placed(self, tree: PyTree) -> PyTree:
        """Arrays [N, ...] that were made without regard to devices, divided as the examples are."""
        tree = vary(tree, self.varying)
        return tree if self.sharding is None else reshard(tree, self.sharding)

    def zeros(self, shape: Sequence[int], dtype: Any) -> jax.Array:
        """Zeros [N, *shape]."""
        return self.placed(jnp.zeros((self.n, *shape), dtype))

    def repeated(self, x: jax.Array) -> jax.Array:
        """The same array for each example, [N, ...]."""
        return self.placed(jnp.broadcast_to(x, (self.n, *jnp.shape(x))))

    def keys(self, key: jax.Array | None) -> tuple[jax.Array, ...]:
        """A key for each example, [N], in a tuple; without a key, an empty tuple."""
        return () if key is None else (self.placed(jax.random.split(key, self.n)),)

    def shared(self, tree: PyTree) -> PyTree:
        """Arrays that all examples share, such as parameters: each device has them whole."""
        return vary(replicated(tree), self.varying)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """The results of a function, all of them [N, ...]."""
        if self.sharding is None:
            return unvaried(function)(*args)
        return auto_axes(function, out_sharding=self.sharding)(*args)

    def run_shared(self, function: Callable[..., Any], *args: Any) -> Any:
        """The results of a function of what all examples share."""
        if self.sharding is None:
            return unvaried(function)(*args)
        whole = NamedSharding(self.sharding.mesh, PartitionSpec())
        return auto_axes(function, out_sharding=whole)(*args)

    def vjp(self, function: Callable[..., Any], live: Any, *args: Any) -> tuple[Any, Any, Any]:
        """The derivative of a function of all examples, as of `jax.vjp`.

        Args:
          function: `function(live, *args) -> (results, others)`, all of them [N, ...].
          live: what it is differentiated with respect to.
          *args: the other arguments.

        Returns:
          The results, `vjp(errors) -> (derivatives,)`, and the others.
        """
        if not self.varying:
            return jax.vjp(lambda live: self.run(function, live, *args), live, has_aux=True)

        def own(live, *args):
            return jax.vjp(lambda live: function(live, *args), live, has_aux=True)

        results, vjp, others = unvaried(own)(live, *args)
        return results, jax.tree_util.Partial(_carried_back, vjp), others


def without_devices() -> contextlib.AbstractContextManager[Any]:
    """A context in which a function is traced as on one device, inside of what runs on several."""
    kinds = set(get_abstract_mesh().axis_types)
    if kinds <= {AxisType.Auto}:
        return contextlib.nullcontext()
    return use_abstract_mesh(AbstractMesh((), ()))


def shared_vjp(function: Callable[..., Any], live: Any, *args: Any) -> Any:
    """The `vjp` of a function of what all examples share; `carried_back` calls it.

    Args:
      function: `function(live, *args)`.
      live: what it is differentiated with respect to.
      *args: the other arguments.
    """

    def own(live, *args):
        return jax.vjp(lambda live: function(live, *args), live)[1]

    return _on_each_device(own, live, *args)


def carried_back(vjp: Any, error: PyTree) -> Any:
    """The derivatives for an error, by what `shared_vjp` returned."""
    return _on_each_device(lambda vjp, error: vjp(error)[0], vjp, error)


def _on_each_device(function, *args):
    """The results of a function of what all examples share."""
    whole = next(filter(None, map(placement, jax.tree.leaves(args))), None)
    if whole is not None:
        return auto_axes(function, out_sharding=whole)(*args)
    return unvaried(function)(*args)


def _carried_back(vjp, errors):
    return unvaried(lambda vjp, errors: vjp(errors))(vjp, errors)


def unvaried(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays that vary over the devices of a `shard_map`, traced as if they did not.

    Equations that were traced outside of `shard_map` take operands that all vary or that all do
    not, whereas those of a parameter, a constant and an example differ. Without operands that vary
    it is the function itself.
    """

    def on_each_device(*args):
        leaves, structure = jax.tree.flatten(args)
        axes = varies_over(leaves)
        if not axes:
            return function(*args)
        like = [_without_axes(jax.typeof(leaf)) for leaf in leaves]
        flat = jax.make_jaxpr(lambda *own: function(*structure.unflatten(own)), return_shape=True)
        with without_devices():
            closed, out = flat(*like)
        return jax.tree.structure(out).unflatten(_evaluated(closed, axes, leaves))

    return on_each_device


def _without_axes(kind: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=kind.weak_type)


def _evaluated(closed, axes, values):
    """The results of a program, all of whose values vary over these axes."""
    jaxpr = closed.jaxpr
    environment = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    environment.update(zip(jaxpr.invars, values, strict=True))

    def read(atom):
        kind: Any = atom.aval
        is_literal = isinstance(atom, core.Literal)
        return vary(jnp.asarray(atom.val, kind.dtype) if is_literal else environment[atom], axes)

    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        operands = list(map(read, equation.invars))
        called = params.get("jaxpr", params.get("call_jaxpr"))
        if name in _CALLS and called is not None:
            results = _evaluated(as_closed(called), axes, operands)
        else:
            if name in _WITH_PROGRAMS:
                params = {key: _retraced(value, axes) for key, value in params.items()}
            results = apply(equation, operands, params)
        environment.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _retraced(value, axes):
    """A parameter of an equation, with every program in it traced for values that vary."""
    if isinstance(value, tuple):
        parts = [_retraced(part, axes) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if not isinstance(value, core.Jaxpr | core.ClosedJaxpr):
        return value
    closed = as_closed(value)
    like: list[Any] = [_without_axes(v.aval) for v in closed.jaxpr.invars]
    own = jax.make_jaxpr(lambda *values: _evaluated(closed, axes, values))(
        *jax.eval_shape(lambda *values: vary(values, axes), *like)
    )
    return own if isinstance(value, core.ClosedJaxpr) else own.jaxpr
