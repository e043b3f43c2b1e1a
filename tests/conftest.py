"""Strict by default: float64, no silent promotion of dtypes, and (in pyproject) no warnings."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def key():
    return jax.random.key(20)
