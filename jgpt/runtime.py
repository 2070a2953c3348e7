"""JAX as the commands set it up: a cache of compiled programs, quiet libraries, and compiler options.

Responsible for what depends on the machine and changes no result. Every trick stands here with its reason. A library user
who calls none of this gets plain JAX.
"""

import logging
import os
import stat
import warnings

import jax

from jgpt import sources
from jgpt.checks import UserError

SMALL_MODEL_PARAMS = 100_000


def set_up() -> str:
  """Turns on the persistent compilation cache in the user's cache folder, and silences libraries' remarks.

  A cache folder that others can write is not used: whoever can write compiled programs can run code. Nothing here
  touches a device.

  Returns:
    What the user should know, or "".
  """
  logging.getLogger("absl").setLevel(logging.ERROR)
  logging.getLogger("jax").setLevel(logging.ERROR)
  if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return ""  # the user's own choice
  folder = sources.cache_dir() / "compiled"
  try:
    sources.make_private(folder.parent)
    sources.make_private(folder)
    info = folder.stat()
  except OSError:
    return ""  # a read-only home: compile each time
  if hasattr(os, "getuid") and (info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o022):
    return f"{folder} can be written by others: compiled programs are not kept there"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
  warnings.filterwarnings("ignore", message="Error reading persistent compilation cache entry")  # it compiles instead
  return ""


def devices() -> list[jax.Device]:
  """The devices that jax sees.

  Raises:
    UserError: where JAX_PLATFORMS asks for a kind that is not there.
  """
  try:
    return jax.devices()
  except RuntimeError as error:
    asked = os.environ.get("JAX_PLATFORMS", "")
    raise UserError(f"jax finds no device (JAX_PLATFORMS={asked!r}): {str(error).splitlines()[0][:200]}") from error


def init_options(platform: str) -> dict:
  """Compiler options for a program that runs once: on a CPU, LLVM's heavier passes took 0.9 s of `names`' 1.4 s."""
  return {"xla_backend_optimization_level": 1} if platform == "cpu" else {}


def step_options(num_params: int, platform: str) -> dict:
  """Compiler options for the training step.

  On a CPU a small model's operations are shorter than the cost of handing them to other threads, and of XLA's YNNPACK
  fusions: without both, a step of `names` takes 36 us instead of 46. LLVM's heavier passes make its loops of 16 longer,
  not faster: at level 1 it takes 31 us, and compiles in 1.5 s instead of 1.8 (medians of 9 rounds of 1,000 steps, 2 cores).
  """
  if platform == "cpu" and num_params <= SMALL_MODEL_PARAMS:
    return {
      "xla_cpu_multi_thread_eigen": False,
      "xla_cpu_experimental_ynn_fusion_type": "",
      "xla_backend_optimization_level": 1,
    }
  return {}
