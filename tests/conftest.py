"""Every test sees 8 virtual CPU devices, and implicit rank promotion is an error."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
  """Turns on float64 for one test."""
  with jax.enable_x64(True):
    yield
