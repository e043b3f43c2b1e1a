"""A step of training under each rule, and the same in BioTorch.

The error is carried back by other weights than those that lead forward, and the rest of a step is
as it was: so a rule should cost what it does with those weights, and no more. Every step is of the
same network of blocks, that direct feedback may reach each of them, from the same parameters, by
the same optimizer: SGD with momentum and the weight decay that Kolen-Pollack learns by.

BioTorch has its rules in layers that stand for PyTorch's `Linear`, whose own step is the exact one
there. From the parameters, the inputs [N, I] and the labels [N], it has for each rule a maker of a
pair of runs, its step and the exact one. Those go on training from call to call.

It asks for far more than its layers need: `pip install --no-deps biotorch`.

Source:
  "Benchmarking the Accuracy and Robustness of Feedback Alignment Algorithms", Jiménez Sanfiz,
  Akrout, 2021: BioTorch.
"""

import functools

import jax
import jax.numpy as jnp
import optax

import jaxbp as bp
from experiments.bench.peers import at_their_fastest, make_torch_data, make_torch_model
from experiments.bench.trainers import LOSS
from experiments.common.measuring import compile_program

RATE, MOMENTUM, DECAY = 0.02, 0.9, 1e-4
OPTIMIZER = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM))


def make_rules(blocks):
    """Every rule but the exact one, with what is wanted of it as a multiple of the exact step."""
    return [
        (bp.random_feedback(), 1.02),
        (bp.sign_symmetric("uniform"), 1.02),
        (bp.sign_symmetric("fixed"), 1.02),
        (bp.sign_symmetric("batchwise"), 1.02),
        (bp.kolen_pollack(), 1.10),
        (bp.weight_mirror(), None),
        (bp.direct_feedback(*blocks), 1.00),
    ]


def make_blocks(sizes):
    """The hidden layers of a relu network, each a block with what bends its outputs, and the last.

    The blocks make one chain.
    """
    hidden = [bp.chain(bp.dense(units, dtype=jnp.float32), bp.relu()) for units in sizes[1:-1]]
    return [*hidden, bp.dense(sizes[-1], dtype=jnp.float32)]


def compile_step(blocks, rule, inputs, labels, seed):
    """A training step from the start, which does not depend on the rule but for its own state.

    Each run goes on from the last and takes over its memory, as training does.
    """
    net = bp.chain(*blocks)
    start = bp.init_state(net, OPTIMIZER, jax.random.key(seed), inputs.shape[1:], rule=rule)
    step = bp.make_step(net, LOSS, OPTIMIZER, rule=rule)
    program = compile_program(step, start, inputs, labels, donate_argnums=0)
    state = jax.tree.map(jnp.copy, start)

    def go_on(start, *data):
        nonlocal state
        state, record = program.compiled(state, *data)
        return state, record

    return program._replace(compiled=go_on)


def biotorch_runs(params, inputs, labels):
    import torch
    from biotorch.layers import brsf, fa, frsf, usf

    rules = {
        "random_feedback": fa,
        "sign_symmetric('uniform')": usf,
        "sign_symmetric('fixed')": frsf,
        "sign_symmetric('batchwise')": brsf,
    }
    x, t = make_torch_data(inputs, labels)
    loss_function = torch.nn.CrossEntropyLoss()

    def make_run(linear):
        model = make_model(params, linear)
        how = {"lr": RATE, "momentum": MOMENTUM, "weight_decay": DECAY}
        optimizer = torch.optim.SGD(model.parameters(), **how)

        def run():
            optimizer.zero_grad()
            loss_function(model(x), t).backward()
            optimizer.step()
            return model

        return run

    def make_pair(rule):
        return at_their_fastest(make_run(rule.Linear), make_run(torch.nn.Linear))

    return {name: functools.partial(make_pair, rule) for name, rule in rules.items()}


def make_model(params, linear):
    """The blocks in PyTorch, of a kind of linear layer."""
    import torch

    layers = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, dict))
    model = make_torch_model([part for layer in layers for part in (layer, ())])
    for i, layer in enumerate(model):
        if isinstance(layer, torch.nn.Linear):
            model[i] = linear(layer.in_features, layer.out_features)
            model[i].load_state_dict(layer.state_dict(), strict=False)  # it has more than these
    return model
