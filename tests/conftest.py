"""Strict by default: float64, no silent promotion of dtypes, and (in pyproject) no warnings."""

import itertools
import os

# Small programs, compiled once and run once: less of LLVM's optimization makes the suite faster.
# What is asserted of cost (FLOP, bytes) is decided before LLVM.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import numpy as np
import pytest
from cases import POSITIONS, SIGNALS


def pytest_configure(config):
    """Keeps what is compiled for the other workers and for the next run: most of the time is that.

    A test counts traces, or asks the compiler; how long it took, none does.
    """
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True)
def strict():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def key():
    return jax.random.key(20)


@pytest.fixture(
    params=itertools.product(SIGNALS, POSITIONS), ids=lambda case: f"{case[0]} at {list(case[1])}"
)
def signal(request):
    """A signal of each kind, at positions of each shape."""
    kind, positions = request.param
    return SIGNALS[kind](np.random.default_rng(3), *positions)


@pytest.fixture
def standard_promotion():
    """For what optax computes, which relies on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def as_shipped():
    """Without the strictness: in float32, as the library is used."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield
