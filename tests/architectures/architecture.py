"""What an architecture is, and how it is compared: with PyTorch, or with values recorded from it.

Each family is a module: `vision`, `language`, `sequence`, `tabular`, `generative`, `multi_input`.
An architecture is a network of the library, and beside it the same mathematics in PyTorch, which
reads the same tree of parameters. `record.py` computes the values of PyTorch once.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbp as bp

RECORDED = Path(__file__).parent / "recorded"  # a file for each family
N = 3


class Architecture(NamedTuple):
    """A published architecture, small.

    Attributes:
      source: title, authors, year.
      net: makes the network.
      inputs: the shape of one example, or a tree of shapes; `Tokens` stands for integers,
        and `Among` for values of a set.
      loss: the loss, of the library.
      targets: what the targets are, in the same form; None for a loss of outputs alone.
      torch: `torch(params, inputs, targets) -> values [N]`, the same in PyTorch: the loss of each
        example. Arrays are those of the library, as tensors; images have their channels last.
    """

    source: str
    net: Callable[[], bp.Layer]
    inputs: Any
    loss: Callable[..., Any]
    targets: Any
    torch: Callable[..., Any]


class Tokens(NamedTuple):
    """Integers from 0 to `below` - 1 of this shape, for each example."""

    below: int
    shape: tuple[int, ...] = ()


class Among(NamedTuple):
    """Values drawn from these, of this shape, for each example: masks, lengths, signs."""

    values: tuple[Any, ...]
    shape: tuple[int, ...] = ()


class Problem(NamedTuple):
    """An architecture with numbers: a network, a loss, parameters, inputs and targets."""

    net: bp.Layer
    loss: Any
    params: Any
    inputs: Any
    targets: Any


class Values(NamedTuple):
    """What is compared: the loss and the gradient's norm of each example, and the gradients.

    Attributes:
      losses: [N].
      norms: [N], of all parameters together.
      gradients: a list with the sum over the examples of each parameter's gradient, in the order
        of the tree's leaves.
    """

    losses: np.ndarray
    norms: np.ndarray
    gradients: list[np.ndarray]


def problem_of(architecture: Architecture) -> Problem:
    """The numbers are NumPy's, so that they are the same for every version of JAX."""
    rng = np.random.default_rng(0)
    net = architecture.net()
    shapes = jax.tree.map(
        lambda spec: spec.shape if isinstance(spec, Tokens | Among) else spec,
        architecture.inputs,
        is_leaf=_is_spec,
    )
    params = jax.eval_shape(lambda key: net.init(key, shapes)[0], jax.random.key(0))
    params = jax.tree.map(lambda leaf: _parameter(rng, leaf.shape), params)
    inputs, targets = (
        jax.tree.map(lambda spec: _draw(rng, spec), tree, is_leaf=_is_spec)
        for tree in (architecture.inputs, architecture.targets)
    )
    return Problem(net, architecture.loss, params, inputs, targets)


def values_of(problem: Problem) -> Values:
    """The values that the library computes, in one sweep."""
    net, loss, params, inputs, targets = problem
    sweep = bp.backprop(net, loss, read={"grads": bp.total, "sq_norms": bp.sq_norms})
    losses, readings = jax.jit(sweep)(params, inputs, targets)
    return Values(
        np.asarray(losses),
        np.asarray(bp.example_norms(readings["sq_norms"])),
        list(map(np.asarray, jax.tree.leaves(readings["grads"]))),
    )


def torch_values_of(architecture: Architecture, problem: Problem) -> Values:
    """The values that PyTorch computes, one backward pass for each example."""
    import torch

    leaves, structure = jax.tree.flatten(problem.params)
    tensors = [torch.tensor(np.asarray(leaf), requires_grad=True) for leaf in leaves]
    inputs, targets = (
        jax.tree.map(lambda a: torch.tensor(np.asarray(a)), tree)
        for tree in (problem.inputs, problem.targets)
    )
    losses = architecture.torch(structure.unflatten(tensors), inputs, targets)
    examples = []
    for value in losses:
        grads = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
        pairs = zip(tensors, grads, strict=True)
        examples.append([np.zeros(p.shape) if g is None else g.numpy() for p, g in pairs])
    norms = [np.sqrt(sum(np.sum(g * g) for g in grads)) for grads in examples]
    gradients = [np.sum(grads, axis=0) for grads in zip(*examples, strict=True)]
    return Values(losses.detach().numpy(), np.array(norms), gradients)


def fingerprint(values: Values) -> dict[str, Any]:
    """What is recorded of values: of each gradient its norm and its product with fixed numbers."""
    rng = np.random.default_rng(1)
    return {
        "losses": values.losses.tolist(),
        "norms": values.norms.tolist(),
        "gradients": [
            [float(np.linalg.norm(g)), float(np.sum(g * rng.normal(size=g.shape)))]
            for g in values.gradients
        ],
    }


def recorded(family: str) -> dict[str, Any]:
    """The fingerprints of PyTorch's values, by the name of the architecture."""
    return json.loads((RECORDED / f"{family}.json").read_text())


def _is_spec(node: Any) -> bool:
    return isinstance(node, Tokens | Among) or (
        isinstance(node, tuple) and all(isinstance(size, int) for size in node)
    )


def _draw(rng: np.random.Generator, spec: Any) -> jax.Array:
    if isinstance(spec, Tokens):
        return jnp.asarray(rng.integers(spec.below, size=(N, *spec.shape)))
    if isinstance(spec, Among):
        return jnp.asarray(rng.choice(spec.values, size=(N, *spec.shape)))
    return jnp.asarray(rng.normal(size=(N, *spec)))


def _parameter(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    """A matrix that keeps the size of its inputs, or a vector of any numbers."""
    fan_in = np.prod(shape[:-1]) if len(shape) > 1 else 4
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(fan_in))
