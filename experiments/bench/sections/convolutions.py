"""Convolutional networks, against Flax, PyTorch and autodiff, from the same weights and images.

gradient    the mean loss and its gradient
quantities  the norm of every example's gradient, and clipped sums, against the gradient alone,
            and those of BackPACK and Opacus against PyTorch's gradient
"""

import functools

from experiments.bench.comparing import gradient_rows, norms_rows, peer_rows
from experiments.bench.networks.convnets import (
    Convnet,
    explicit,
    make_case,
    make_net,
    plain,
    plain_mean_loss,
    same_layers,
    step_products,
)
from experiments.bench.peers import flax_networks, torch_networks
from experiments.bench.peers.per_example import backpack_runs, opacus_runs
from experiments.bench.tables import Table


def gradient(case, repeats, seed):
    """A row for each peer."""
    peers = {
        "Flax": (flax_networks.convnet_side, "<= 1.00"),
        "jax.grad, the same layers": (same_layers, "<= 1.00"),
        "jax.grad, plain lax": (plain, "<= 1.00"),
        "PyTorch": (torch_networks.convnet_side, ""),
    }
    data, products = make_case(case, seed), step_products(case)
    return gradient_rows(case, data, explicit, peers, repeats, products=products)


def quantities(case, repeats, seed):
    """A row for the norms and each clipped sum, and the peers' rows."""
    data = make_case(case, seed)
    yield from norms_rows(case, make_net(case), data, plain_mean_loss(case), repeats)
    peers = {
        "BackPACK": (backpack_runs, "norms"),
        "Opacus": (opacus_runs, "clipped sum, ghost"),
    }
    for peer, (make_runs, what) in peers.items():
        runs = functools.partial(torch_runs, make_runs, what, case, *data)
        yield from peer_rows(case, peer, runs, repeats)


def torch_runs(make_runs, what, case, params, images, labels):
    """The maker of a peer's two runs for one quantity."""
    make_model = functools.partial(torch_networks.convnet, case)
    runs = make_runs(params, torch_networks.channels_first(images), labels, make_model)
    return {what: runs[what]}


CASES = tuple(
    Convnet(*network, n)
    for network in ((28, 1, (16, 32)), (32, 3, (16, 32, 64)), (32, 3, (64, 64)))
    for n in (64, 256)
)
GPU_CASES = Convnet(32, 3, (64, 128, 256), 1024), Convnet(32, 3, (64, 64), 1024)

TABLES = {
    "gradient": Table(
        "Gradient of a convolutional network",
        "explicit / peer",
        gradient,
        CASES,
        GPU_CASES,
        "PyTorch's memory is the largest number of bytes allocated at a time.",
    ),
    "quantities": Table(
        "Norms and clipped sums of a convolutional network in one sweep",
        "with the quantity / against",
        quantities,
        CASES,
        GPU_CASES[:1],
        "BackPACK and Opacus are compared with the plain gradient of PyTorch.",
    ),
}
