"""A recurrent layer and a dense one behind it, against Flax, PyTorch and autodiff.

  jax.grad, the same layers    autodiff of the library's forward pass
  jax.grad, a scan             autodiff of `lax.scan` over the steps, with the inputs' products
                               computed before it
  Flax, nnx.RNN                autodiff of its cells, `OptimizedLSTMCell` or `GRUCell`
  PyTorch                      `nn.LSTM` or `nn.GRU`

The fair comparison with autodiff is the scan: the library's forward pass writes into arrays that
its loop carries, and autodiff keeps a copy of them for every step. Flax's GRU has no bias c, and
therefore no gradient for it.
"""

from experiments.bench.comparing import gradient_rows
from experiments.bench.networks.recurrent import (
    CELLS,
    Sequence,
    explicit,
    make_case,
    plain,
    same_layers,
    step_products,
)
from experiments.bench.peers import flax_networks, torch_networks
from experiments.bench.tables import Table


def gradient(case, repeats, seed):
    """A row for each peer."""
    wanted = "<= 0.80, memory <= 0.70"
    peers = {
        "jax.grad, the same layers": (same_layers, wanted),
        "jax.grad, a scan": (plain, wanted),
        "Flax, nnx.RNN": (flax_networks.recurrent_side, wanted),
        "PyTorch": (torch_networks.recurrent_side, ""),
    }
    data, products = make_case(case, seed), step_products(case)
    return gradient_rows(case, data, explicit, peers, repeats, products=products)


TABLES = {
    "gradient": Table(
        "Gradient of a recurrent layer",
        "explicit / peer",
        gradient,
        tuple(Sequence(cell, width) for cell in CELLS for width in (128, 256, 512)),
        tuple(Sequence(cell, width, n=256) for cell in CELLS for width in (512, 1024)),
        "PyTorch's memory is the largest number of bytes allocated at a time.",
    ),
}
