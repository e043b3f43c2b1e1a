"""The third part: one network under four rules, which carry the error back by other weights.

All start from the same weights and see the same points. Beside the loss, `bp.alignment` measures in
each layer the angle between the error that the rule carries to it and the exact one.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jaxbp as bp
from experiments.explorer import networks

HIDDEN = (8, 8)
STEPS = 400
EVERY = 5  # steps between two points of a curve
STAGES = 9
LEARNING_RATE = 0.3


def collect(seed: int) -> dict[str, Any]:
    """Trains by each rule; returns the curves, and the regions at some stages."""
    problem = networks.problems(seed)["moons"]
    hidden = [bp.chain(bp.dense(width), bp.tanh()) for width in HIDDEN]
    blocks = *hidden, bp.dense(1)
    rules = {
        "backpropagation": (bp.exact(), "by the weights W themselves"),
        "feedback alignment": (bp.random_feedback(), "by fixed random weights B"),
        "direct feedback": (
            bp.direct_feedback(*blocks),
            "by a random matrix from the output to each layer",
        ),
        "sign-symmetry": (bp.sign_symmetric(), "by the signs of W alone"),
    }
    low, high = networks.corners(problem.inputs)
    curve = np.arange(0, STEPS + 1, EVERY)
    stages = np.linspace(0, STEPS // EVERY, STAGES).round().astype(int)
    return {
        "inputs": problem.inputs,
        "labels": problem.labels,
        "low": low,
        "high": high,
        "grid": networks.GRID,
        "layers": [f"layer {i + 1}" for i in range(len(blocks))],
        "steps": curve.tolist(),
        "stages": stages.tolist(),
        "rules": [
            {"name": name, "how": how, **learn(problem, blocks, rule, seed, stages)}
            for name, (rule, how) in tqdm(rules.items(), desc="rules", unit="rule")
        ],
    }


def learn(
    problem: networks.Problem, blocks: Any, rule: bp.Rule, seed: int, stages: np.ndarray
) -> dict[str, Any]:
    """Trains by one rule; returns the losses, accuracies and angles, and the regions."""
    net, loss, optimizer = bp.chain(*blocks), problem.loss, optax.sgd(LEARNING_RATE, momentum=0.9)
    x, targets = problem.inputs, problem.targets
    align = bp.alignment(net, loss, rule=rule)
    step = bp.make_step(net, loss, optimizer, rule=rule)

    def look(state):
        outputs, _ = net.forward(state.params, x)
        values, _ = loss(outputs, targets)
        right = (outputs[:, 0] > 0) == (targets[:, 0] == 1)
        angles = align(state.params, x, targets, rule_state=state.rule_state)
        return {
            "error": jnp.mean(values),
            "accuracy": jnp.mean(right.astype(float)),
            "angles": jnp.stack([at_weight(block).delta for block in angles]),
        }

    def several(state, _):
        seen = look(state)
        state, _ = jax.lax.scan(lambda s, _: step(s, x, targets), state, length=EVERY)
        return state, (seen, state.params)

    start = bp.init_state(net, optimizer, jax.random.key(seed), (2,), rule=rule)
    last, (curves, path) = jax.jit(
        lambda state: jax.lax.scan(several, state, length=STEPS // EVERY)
    )(start)
    curves = jax.tree.map(lambda a, b: jnp.append(a, b[None], axis=0), curves, look(last))
    path = jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest]), start.params, path
    )
    points = networks.plane(*networks.corners(x))
    regions = []
    for k in stages:
        outputs, _ = net.forward(jax.tree.map(lambda leaf, k=k: leaf[k], path), points)
        regions.append(networks.region(problem, outputs))
    return {**curves, "regions": np.stack(regions)}


def at_weight(block: Any) -> bp.Alignment:
    """The alignment at the weight matrix of a block."""
    dense = block[0] if isinstance(block, tuple) else block
    return dense["weight"]
