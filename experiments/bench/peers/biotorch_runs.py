"""Training steps under feedback rules in BioTorch, beside PyTorch's exact step.

BioTorch implements each rule as a layer that replaces PyTorch's `Linear`. It declares many packages
that its layers do not need: `pip install --no-deps biotorch`.

Source:
  "Benchmarking the Accuracy and Robustness of Feedback Alignment Algorithms", Jiménez Sanfiz,
  Akrout, 2021: BioTorch.
"""

import functools

import jax

from experiments.bench.loops import OPTIMIZERS
from experiments.bench.peers import torch_networks
from experiments.bench.peers.torch_runs import at_their_fastest, make_torch_data, to_device


def biotorch_runs(params, inputs, labels):
    """For each rule, a maker of two runs: its step and the exact one, which go on training."""
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
    _, options = OPTIMIZERS["SGD with weight decay"]

    def make_run(linear):
        model = make_model(params, linear)
        optimizer = torch.optim.SGD(model.parameters(), **options)

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
    """The network of the library's blocks, with this kind of linear layer."""
    import torch

    denses = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, dict))
    model = torch_networks.perceptron([part for dense in denses for part in (dense, ())])
    for i, layer in enumerate(model):
        if isinstance(layer, torch.nn.Linear):
            model[i] = linear(layer.in_features, layer.out_features)
            # Not strict, because a rule's layer has more than weight and bias.
            model[i].load_state_dict(layer.state_dict(), strict=False)
    return to_device(model)
