"""The machine: whether JAX runs on a GPU, and what depends on it.

On a GPU all networks are in float32 and their matrix products and convolutions run in TF32. That is
JAX's default there, and PyTorch is set to the same. Nothing is measured in bfloat16.
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from experiments.common.measuring import describe_environment


class Peak(NamedTuple):
    """The FLOP per second of a chip's tensor cores for dense matrices."""

    tf32: float
    bf16: float


H100_SXM, H100_PCIE = Peak(494.7e12, 989.4e12), Peak(378e12, 756e12)
A100 = Peak(156e12, 312e12)
# By the name that JAX gives the chip. Source: the data sheets "NVIDIA H100 Tensor Core GPU",
# "NVIDIA H200 Tensor Core GPU" and "NVIDIA A100 Tensor Core GPU", whose figures for the first two
# are with sparsity: twice these.
PEAKS = {
    "NVIDIA H100 80GB HBM3": H100_SXM,
    "NVIDIA H100 PCIe": H100_PCIE,
    "NVIDIA H200": H100_SXM,  # the same tensor cores, with more memory
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA A100-PCIE-40GB": A100,
    "NVIDIA A100 80GB PCIe": A100,
}


def on_gpu():
    return jax.default_backend() == "gpu"


def find_peak():
    """The peak rates of the chip, or None if it is a CPU or unknown."""
    return PEAKS.get(jax.devices()[0].device_kind) if on_gpu() else None


def peak_shares(flop, *seconds):
    """The median rate of each program as a share of the TF32 peak, or None if that is unknown.

    Args:
      flop: of the matrix products of one run.
      *seconds: for each program, those of every round.
    """
    peak = find_peak()
    return peak and tuple(flop / float(np.median(s)) / peak.tf32 for s in seconds)


def describe_machine():
    """What the figures were measured on, by what it is called."""
    environment = describe_environment()
    if on_gpu():
        environment["precision"] = (
            "float32, matrix products in TF32 (JAX's default; PyTorch is set to the same)"
        )
    if peak := find_peak():
        environment["peak"] = (
            f"{peak.tf32 / 1e12:,g} TFLOP/s dense in TF32 ({peak.bf16 / 1e12:,g} in bfloat16)"
        )
    return environment


def long_rounds(repeats):
    """Rounds for what takes up to seconds: a third of the others, on a GPU a fifth."""
    return math.ceil(repeats / (5 if on_gpu() else 3))


def per_example_limit():
    """The largest number of bytes that the gradients of all examples may take."""
    return 16 * 1024**3 if on_gpu() else 512 * 1024**2


def gemm_side():
    """The side of the square matrices whose product gives the machine's GEMM rate."""
    return 8192 if on_gpu() else 1024
