"""JAX as the commands set it up: a cache of compiled programs, quiet libraries, and the devices there are.

Responsible for what is set once for a process, before it computes anything. A library user who calls none of this gets
plain JAX. Not responsible for how a program is compiled (`tricks.py`).
"""

import logging
import os
import stat
import warnings

import jax

from jgpt import sources
from jgpt.checks import UserError


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
