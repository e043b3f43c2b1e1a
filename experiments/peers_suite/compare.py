"""Runs a module of PyTorch and what it is translated to, and compares all numbers.

These are the outputs, and for a random cotangent of the outputs the gradient of every input and of
every parameter. The outputs of a loss are its terms, as PyTorch reduces them. Equal means that they
differ by at most 1e-10 of the largest value.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxbp as bp
from experiments.peers_suite.cases import Case, tensors
from experiments.peers_suite.rearranging import find_arithmetic
from experiments.peers_suite.written import Written, to_array

TOLERANCE = 1e-10


class Run(NamedTuple):
    """The numbers of one forward and backward pass, in PyTorch's layout.

    Attributes:
      outputs: the outputs that have a derivative, one after the other.
      cotangents: the derivative with respect to each of them.
      dx: the gradient of each input.
      grads: the gradient of each parameter by name.
    """

    outputs: list[Any]
    cotangents: list[Any]
    dx: list[Any]
    grads: dict[str, Any]


def run_module(case: Case, n_outputs: int | None, rng: np.random.Generator) -> Run:
    """Runs the module, and its backward pass for drawn cotangents of its first outputs."""
    named = dict(case.module.named_parameters())
    y = case.module(*case.args, **case.kwargs)
    outputs = [leaf for leaf in jax.tree.leaves(y) if leaf.requires_grad][:n_outputs]
    cotangents = [torch.from_numpy(rng.normal(size=leaf.shape)) for leaf in outputs]
    wanted = [*tensors(case), *named.values()]
    found = torch.autograd.grad(outputs, wanted, cotangents, materialize_grads=True)
    arrays = list(map(to_array, found))
    n = len(wanted) - len(named)
    return Run(
        list(map(to_array, outputs)),
        list(map(to_array, cotangents)),
        arrays[:n],
        dict(zip(named, arrays[n:], strict=True)),
    )


def run_written(written: Written, case: Case, cotangents: list[Any]) -> Run:
    """Runs the translation: the layouts in, forward, backward, and the layouts back."""
    inputs = list(map(to_array, tensors(case)))
    x, inputs_back = jax.vjp(written.inputs, *inputs)
    params, params_back = jax.vjp(written.params, _parameters(case))
    y, cache = written.layer.forward(params, x)
    if written.loss is None:
        shown, outputs_back = jax.vjp(written.outputs, y)
        (dy,) = outputs_back(_like(shown, cotangents))
    else:
        terms, _ = written.loss.terms(y, written.targets)
        shown, outputs_back = jax.vjp(written.outputs, terms)
        # The derivative with respect to a term of the loss is the weight of this term.
        (weights,) = outputs_back(_like(shown, cotangents))
        _, dy = bp.weighted(written.loss).terms(y, (written.targets, weights))
    dx, grads = written.layer.backward(params, cache, dy, read=bp.total)
    (named_grads,) = params_back(grads)
    dx = list(inputs_back(dx)) if inputs else []  # integers have no derivative
    return Run(jax.tree.leaves(shown), cotangents, dx, named_grads)


def find_differences(case: Case, written: Written, seed: int = 0) -> list[str]:
    """A clause for everything that differs between a module and its translation."""
    theirs = run_module(case, written.n_outputs, np.random.default_rng(seed))
    ours = run_written(written, case, theirs.cotangents)
    outputs = _by_name("output", theirs.outputs), _by_name("output", ours.outputs)
    gradients = (
        _by_name("gradient of input", theirs.dx) | _by_name("gradient of", theirs.grads),
        _by_name("gradient of input", ours.dx) | _by_name("gradient of", ours.grads),
    )
    return [
        *_differences(*outputs),
        *_differences(*gradients),
        *_arithmetic("inputs", written.inputs, *map(to_array, tensors(case))),
        *_arithmetic("parameters", written.params, _parameters(case)),
    ]


def _parameters(case):
    """The parameters of the module by name."""
    return {name: to_array(tensor) for name, tensor in case.module.named_parameters()}


def _arithmetic(what, layout, *arrays):
    """What a layout computes, where it should only rearrange."""
    return [f"the layout of {what} has {name}" for name in find_arithmetic(layout, *arrays)]


def _like(shown, cotangents):
    """The cotangents as a tree like the outputs that are shown."""
    return jax.tree.structure(shown).unflatten(cotangents)


def _by_name(what, arrays):
    pairs = arrays.items() if isinstance(arrays, dict) else enumerate(arrays)
    return {f"{what} {name}": array for name, array in pairs}


def _differences(theirs, ours):
    """Compares arrays by name, by the largest value of them all: one alone may be zero."""
    scale = max((_largest(array) for array in theirs.values()), default=0)
    found = []
    for name, array in theirs.items():
        if ours[name].shape != array.shape:
            found.append(f"{name} has shape {ours[name].shape}, not {array.shape}")
        elif not jnp.array_equal(_not_finite(ours[name]), _not_finite(array), equal_nan=True):
            found.append(f"{name} is infinite or nan in other places")
        elif (error := _largest(ours[name] - array)) > TOLERANCE * scale:
            found.append(f"{name} differs by {error / scale:.1e} of the largest value")
    return found


def _largest(array):
    """The largest absolute value that is finite."""
    return float(jnp.max(jnp.abs(jnp.where(jnp.isfinite(array), array, 0)), initial=0))


def _not_finite(array):
    """The infinities and nans, and 0 elsewhere."""
    return jnp.where(jnp.isfinite(array), 0, array)
