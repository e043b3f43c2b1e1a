"""Training a relu network: epochs of `bp.make_epoch`, against PyTorch and scikit-learn."""

import functools

import jax

from experiments.bench.comparing import training_rows
from experiments.bench.loops import Training, train_jaxbp
from experiments.bench.machine import on_gpu
from experiments.bench.networks.perceptrons import Perceptron, make_data, make_net, step_products
from experiments.bench.peers import scikit, torch_networks
from experiments.bench.peers.torch_runs import train_torch
from experiments.bench.tables import Table


def training(case, repeats, seed):
    """A row for each peer that trains the same network."""
    net = make_net(case.network)
    params, _ = net.init(jax.random.key(seed), case.network.sizes[:1])
    data = make_data(case.network.sizes, case.examples, seed)
    run, program = train_jaxbp(case, net, params, *data, seed)
    peers = {"PyTorch": (functools.partial(make_torch_run, case, params, *data, seed), ">= 1.3")}
    if not on_gpu():  # scikit-learn runs on a CPU only
        make = functools.partial(scikit.train_sklearn, case, *data, seed)
        peers["scikit-learn"] = (make, ">= 5")
    products = step_products(case.network) * case.examples / case.network.n
    yield from training_rows(
        case, run, program, peers, repeats, items=case.examples, products=products
    )


def make_torch_run(case, params, inputs, labels, seed):
    from torch.nn import functional

    start = torch_networks.perceptron(params)
    return train_torch(case, start, functional.cross_entropy, inputs, labels, seed)


SMALL = (64, 128, 10)
WIDE, WIDER = (784, 512, 512, 10), (784, 4096, 4096, 10)

TABLES = {
    "training": Table(
        "Training",
        "theirs / ours",
        training,
        (
            Training(Perceptron(SMALL, 64), 1437, "Adam", 10),
            Training(Perceptron(SMALL, 32), 1437, "SGD", 10),
            Training(Perceptron(WIDE, 128), 10_000, "SGD", 2),
            Training(Perceptron(WIDE, 128), 10_000, "Adam", 2),
        ),
        (
            Training(Perceptron(SMALL, 64), 1437, "Adam", 10),
            Training(Perceptron(WIDER, 4096), 65_536, "SGD", 2),
            Training(Perceptron(WIDER, 4096), 65_536, "Adam", 2),
        ),
        "Times are of one epoch. PyTorch has one thread or as many as there are cores, whichever "
        "is faster.",
        "examples / s, ours / theirs",
    ),
}
