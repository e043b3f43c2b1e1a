"""The gradient of a perceptron's mean loss, against autodiff.

A network can be written for autodiff in two ways: as the library's layers, or in plain JAX. The
peer is the faster of the two.
"""

import numpy as np

from experiments.bench.comparing import gemm_share, make_products
from experiments.bench.networks.perceptrons import (
    explicit,
    make_case,
    perceptrons,
    plain,
    same_layers,
    step_products,
)
from experiments.bench.tables import Row, Table, fill
from experiments.common.measuring import make_program, measure


def gradient(case, repeats, seed):
    """A row for one step's gradient."""
    data = make_case(case, seed)
    ours = make_program(explicit, case, *data)
    peers = {
        "the same layers": make_program(same_layers, case, *data),
        "plain jnp": make_program(plain, case, *data),
    }
    multiply, multiply_flop = make_products()
    programs = [ours, *peers.values()]
    runs = [*(program.run for program in programs), multiply]
    seconds, *peers_seconds, gemm = measure(runs, repeats)
    peer, fastest = min(zip(peers, peers_seconds, strict=True), key=lambda pair: np.median(pair[1]))
    products = step_products(case)
    share = gemm_share(products / seconds, multiply_flop / gemm)
    row = Row(str(case), f"jax.value_and_grad, {peer}", "<= 1.00", gemm_share=share)
    yield fill(row, seconds / fastest, seconds, fastest, ours, peers[peer], products=products)


TABLES = {
    "gradient": Table(
        "Gradient of a batch",
        "explicit / autodiff",
        gradient,
        (
            *perceptrons((64, 32), (128, 256), (256, 64), (512, 128), (512, 1024)),
            *perceptrons((512, 256), activation="gelu"),
            *perceptrons((1024, 32), (1024, 256), (2048, 128)),
        ),
        (
            *perceptrons((1024, 4096), (4096, 4096), (8192, 8192)),
            *perceptrons((4096, 4096), activation="gelu"),
        ),
    ),
}
