"""Runs the benchmark."""

import os

if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.5")  # PyTorch shares the GPU

import jax
import tyro

from experiments.bench.runner import main

jax.config.update("jax_enable_compilation_cache", False)  # compilations are timed
tyro.cli(main)
