"""The fourth part: any small network, shown by what `bp.explain` returns.

It shows the examples with the largest gradients. In each parameter, the weight with the largest
derivative for the shown example has its chain rule written out, with the number of `jax.grad`.
"""

import inspect
import runpy
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jaxbp as bp
from experiments.common import data
from experiments.explorer import networks
from jaxbp.explain import usual_loss

CANDIDATES = 300  # examples of which those with the largest gradients are shown
EXAMPLES = 10
MOST_VALUES = 4096  # of one place for one example, and of one factor of a chain rule
NEEDED = "net", "params", "inputs", "targets"


class Network(NamedTuple):
    """A network and the examples on which it is shown.

    Attributes:
      title: what it is.
      net: a Layer.
      params: its parameters.
      inputs: arrays [N, ...].
      targets: arrays [N, ...].
      loss: the loss, or None for that which `bp.explain` takes for such targets.
      code: the program that made it, to be shown; or nothing.
      image: (height, width) if an input is a grey image.
    """

    title: str
    net: bp.Layer
    params: Any
    inputs: Any
    targets: Any
    loss: bp.LossFunction | None = None
    code: str = ""
    image: tuple[int, int] | None = None


def model(params, x):
    """A function of parameters and inputs, as anyone writes it: `bp.lift` makes it a Layer."""
    gate = jax.nn.sigmoid(x @ params["gate"])
    hidden = jnp.tanh(x @ params["weight"] + params["bias"])
    return (gate * hidden) @ params["out"]


def lifted(seed: int) -> Network:
    """The function above with random parameters, lifted."""
    rng = np.random.default_rng(seed)
    shapes = {"gate": (3, 4), "weight": (3, 4), "bias": (4,), "out": (4, 1)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    x, targets = (jnp.asarray(rng.normal(size=(40, size))) for size in (3, 1))
    net, params = bp.lift(model, params, x)
    return Network("A lifted function", net, params, x, targets, code=inspect.getsource(model))


def digits(seed: int) -> Network:
    """A network that reads digits, 64-16-10, trained here; on examples of the test set."""
    dataset = data.load(None, seed=seed)
    net = bp.chain(bp.dense(16), bp.tanh(), bp.dense(10))
    (x, labels), (test_x, test_labels) = dataset.train, dataset.test
    params, _ = net.init(jax.random.key(seed), x.shape[1:])
    loss = bp.softmax_cross_entropy
    path = networks.train(net, loss, params, jnp.asarray(x, float), jnp.asarray(labels), 150)
    params = jax.tree.map(lambda leaf: leaf[-1], path)
    test = jnp.asarray(test_x, float), jnp.asarray(test_labels)
    code = "net = bp.chain(bp.dense(16), bp.tanh(), bp.dense(10))"
    return Network("Handwritten digits", net, params, *test, loss, code, dataset.image_shape)


def from_file(path: Path) -> Network:
    """Runs a Python file that makes `net`, `params`, `inputs`, `targets`, and perhaps `loss`.

    Raises:
      ValueError: there is no such file, it raises an error, or one of these names is missing.
    """
    if not path.is_file():
        raise ValueError(f"run is {path}: no such file.")
    try:
        made = runpy.run_path(str(path))
    except Exception as error:
        raise ValueError(f"{path} raised {type(error).__name__}: {error}") from error
    if missing := [name for name in NEEDED if name not in made]:
        raise ValueError(
            f"{path} leaves no {', no '.join(missing)}. It has to make a network and "
            "examples, by the names net, params, inputs and targets; loss is optional."
        )
    own = (made[name] for name in NEEDED)
    return Network(path.name, *own, made.get("loss"), path.read_text(encoding="utf-8"))


def collect(network: Network) -> dict[str, Any]:
    """Explains a network; returns what the page shows of it.

    Raises:
      ValueError: the network is too large to be shown, or as for `bp.explain`.
    """
    net, params, loss = network.net, network.params, network.loss
    x, targets = network.inputs, network.targets
    x, targets = (jax.tree.map(lambda a: a[:CANDIDATES], tree) for tree in (x, targets))
    try:
        norms = bp.explain(net, params, x, targets, loss=loss).example_norms
    except TypeError as error:  # what the file calls `net` or `loss` is none
        raise ValueError(f"{network.title}: {error}") from error
    order = np.argsort(-norms, kind="stable")[:EXAMPLES]
    x, targets = (jax.tree.map(lambda a: a[order], tree) for tree in (x, targets))
    shown = bp.explain(net, params, x, targets, loss=loss)
    return {
        "title": network.title,
        "code": network.code,
        "image": network.image,
        "examples": order.tolist(),
        "candidates": len(norms),
        "targets": [np.asarray(t).tolist() for t in by_example(targets, len(order))],
        "losses": shown.losses,
        "norms": shown.example_norms,
        "places": [
            {
                "name": place,
                "layer": shown.layers.get(place, ""),
                "shape": shape_of(shown.values[place]),
                "values": flat(place, shown.values[place]),
                "deltas": flat(place, shown.deltas[place]),
            }
            for place in shown.values
        ],
        "parameters": [
            {"path": path, "shape": gradient.shape[1:], "norms": shown.norms[path]}
            for path, gradient in shown.gradients.items()
        ],
        "rules": chain_rules(network, x, targets, shown),
    }


def by_example(tree: Any, n: int) -> list[Any]:
    """What the page prints as the target of each example: its only array, or all of them flat."""
    leaves = [np.asarray(leaf).reshape(n, -1) for leaf in jax.tree.leaves(tree)]
    return list(np.concatenate(leaves, axis=1))


def shape_of(tree: Any) -> list[int]:
    """The shape of one example, or its number of values for a tree of several arrays."""
    leaves = jax.tree.leaves(tree)
    sizes = [leaf.shape[1:] for leaf in leaves]
    return list(sizes[0]) if len(sizes) == 1 else [sum(int(np.prod(size)) for size in sizes)]


def flat(place: str, tree: Any) -> np.ndarray | None:
    """The values of each example as one row, [N, values]; None if there are none."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    leaves = [
        leaf.reshape(len(leaf), -1).astype(float) for leaf in leaves if leaf.dtype.kind in "fiu"
    ]
    if not leaves:
        return None
    rows = np.concatenate(leaves, axis=1)
    if rows.shape[1] > MOST_VALUES:
        raise ValueError(
            f"{place} has {rows.shape[1]} values for one example; the page shows up to "
            f"{MOST_VALUES}. Show a smaller network?"
        )
    return rows


def chain_rules(
    network: Network, x: Any, targets: Any, shown: bp.Explanation
) -> list[list[dict[str, Any]]]:
    """For each example and parameter, the chain rule of the weight with the largest derivative."""
    net, params, loss = network.net, network.params, network.loss
    grads = dict(zip(shown.gradients, by_autodiff(network, x, targets), strict=True))
    rules = []
    for n in tqdm(range(len(shown.losses)), desc=network.title, unit="example"):
        rules.append([])
        for path, gradient in shown.gradients.items():
            at = np.unravel_index(np.argmax(abs(gradient[n])), gradient.shape[1:])
            at = tuple(int(i) for i in at)
            own = bp.explain(
                net, params, x, targets, loss=loss, weight=(path, *at), example=n
            ).chain_rule
            factors = [{"name": f.name, "matrix": f.matrix} for f in own.factors]
            largest = max(f.matrix.size for f in own.factors)
            if largest > MOST_VALUES:
                raise ValueError(
                    f"the chain rule of {path} has a factor of {largest} numbers; the "
                    f"page shows up to {MOST_VALUES}. Show a smaller network?"
                )
            rules[-1].append(
                {
                    "path": path,
                    "at": at,
                    "factors": factors,
                    "gradient": own.gradient,
                    "autodiff": float(grads[path][(n, *at)]),
                }
            )
    return rules


def by_autodiff(network: Network, x: Any, targets: Any) -> list[np.ndarray]:
    """The gradients of each example by `jax.grad`, in the order of the parameters: [N, ...]."""
    loss = network.loss or usual_loss(targets)

    def error(params, *example):
        one, target = jax.tree.map(lambda a: a[None], example)
        outputs, _ = network.net.forward(params, one)
        values, _ = loss(outputs, target)
        return values[0]

    grads = jax.vmap(jax.grad(error), (None, 0, 0))(network.params, x, targets)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(grads)]
