"""Strict by default: float64, no silent promotion of dtypes, and (in pyproject) no warnings."""

import contextlib
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from cases import SIGNALS, SIGNALS_AT_POSITIONS

from jaxbp.layers import dot_product

# Small programs, compiled once and run once: the less is done for their speed, the sooner the suite
# is through. What is asserted of cost (FLOP, bytes) is decided before that.
SOON_AND_SLOW = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}


def pytest_configure(config):
    """Before anything is compiled: how, and that it is kept for other workers and the next run.

    Most of the time is compilation. A test counts traces, or asks the compiler; how long it took,
    none does.
    """
    if "XLA_FLAGS" not in os.environ:  # workers get it from the process that starts them
        flags = [f"--{name}={value}" for name, value in SOON_AND_SLOW.items()]
        known = flags if are_known(*flags) else filter(are_known, flags)
        os.environ["XLA_FLAGS"] = " ".join(known)
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def are_known(*flags):
    """Whether XLA has such flags in this version: one that it does not know ends the process."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return not subprocess.run(
        command, env={**os.environ, "XLA_FLAGS": " ".join(flags)}, capture_output=True
    ).returncode


@pytest.fixture(autouse=True)
def strict():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), precise():
        yield


def precise():
    """On a GPU, products of numbers of 32 bits in 32 bits, which are in 19 (TF32) otherwise."""
    on_gpu = jax.default_backend() == "gpu"
    return jax.default_matmul_precision("highest") if on_gpu else contextlib.nullcontext()


@pytest.fixture(autouse=True, scope="module")
def forgetful():
    """A process can map only so many pieces of memory, and every program has some."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def short_bands():
    """Attention to the few positions of a test is divided as that to many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dot_product, "BAND_ROWS", 1)
        yield


@pytest.fixture
def key():
    return jax.random.key(20)


@pytest.fixture(
    params=[
        pytest.param(case, marks=[pytest.mark.thorough] if case[0] == "Own" else ())
        for case in SIGNALS_AT_POSITIONS
    ],
    ids=[f"{kind} at {list(positions)}" for kind, positions in SIGNALS_AT_POSITIONS],
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
