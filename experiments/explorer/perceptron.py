"""The first part: one sigmoid unit on points in the plane, from `experiments.perceptron`.

The page computes this part itself, because points and line can be dragged. The path of gradient
descent that the library makes is shown beside it, with the gradient of each step.
"""

from typing import Any

import jax
import numpy as np
import optax

import jaxbp as bp
from experiments import perceptron

POINTS = 40
STEPS = 120
LEARNING_RATE = 0.5


def collect(seed: int) -> dict[str, Any]:
    """Returns the points, the weights before each step and after the last, and their gradients."""
    inputs, targets = perceptron.make_points(jax.random.key(seed), POINTS)
    start = perceptron.poor_start()
    path = perceptron.descend(start, inputs, targets, optax.sgd(LEARNING_RATE), STEPS)
    value_and_grad = bp.value_and_grad(perceptron.NET, perceptron.LOSS)
    values, grads = jax.vmap(value_and_grad, (0, None, None))(path, inputs, targets)
    shown = bp.explain(perceptron.NET, start, inputs, targets, loss=perceptron.LOSS)
    return {
        "inputs": inputs,
        "targets": targets[:, 0],
        "learningRate": LEARNING_RATE,
        "weights": vectors(path),
        "errors": values,
        "gradients": vectors(grads),
        "exampleErrors": shown.losses,
        "exampleGradients": vectors({name: shown.gradients[name] for name in ("weight", "bias")}),
    }


def vectors(params: dict[str, Any]) -> np.ndarray:
    """The vectors (w1, w2, b) of stacked parameters, [..., 3]."""
    weight, bias = np.asarray(params["weight"])[..., 0], np.asarray(params["bias"])
    return np.concatenate([weight, bias], axis=-1)
