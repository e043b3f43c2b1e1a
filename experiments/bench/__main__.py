"""Runs the benchmark."""

import os

import jax
import tyro

from experiments.bench.runner import main

os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.5")  # PyTorch needs memory on the same GPU
jax.config.update("jax_enable_compilation_cache", False)  # compilations are timed
tyro.cli(main)
