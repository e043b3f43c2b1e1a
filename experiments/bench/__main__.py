"""Runs the benchmark."""

import tyro

from experiments.bench.runner import main

tyro.cli(main)
