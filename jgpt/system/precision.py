"""64-bit types for the lines that need them, under every version of jax that jgpt runs on."""

import contextlib

import jax


def enable_x64(enabled: bool) -> contextlib.AbstractContextManager:
  """Returns a context in which jax has 64-bit types, or has none.

  Args:
    enabled: whether it has.
  """
  if hasattr(jax, "enable_x64"):
    return jax.enable_x64(enabled)
  from jax import experimental  # where versions before 0.8.3 have it

  return experimental.enable_x64(enabled)
