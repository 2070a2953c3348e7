"""JAX as the commands set it up: a cache of compiled programs, quiet libraries, and the devices there are.

Responsible for what is set once for a process, before it computes anything, and for the soundness of the cache. A library
user who calls none of this gets plain JAX. Not responsible for how a program is compiled (`tricks.py`).
"""

import contextlib
import json
import logging
import os
import stat
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import jax

from jgpt.errors import UserError, first_line
from jgpt.system import files
from jgpt.system.cache import cache_dir, digest_bytes, make_private

LEAST_ADDRESS_SPACE = 3 << 29  # bytes: with less jax cannot start its threads, and the process is aborted without a word


def set_up() -> str:
  """Turns on the persistent compilation cache in the user's cache folder, and silences libraries' remarks.

  A cache folder that others can write is not used: whoever can write compiled programs can run code. Nothing here
  touches a device.

  Returns:
    What the user should know, or "".

  Raises:
    UserError: where the process may not use enough memory for anything.
  """
  check_address_space()
  for name, level in {"absl": logging.CRITICAL, "asyncio": logging.CRITICAL, "jax": logging.ERROR}.items():
    logging.getLogger(name).setLevel(level)  # what goes wrong with a save is raised too, and said in one line
  _leave_out_closed_loops()
  if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return ""  # the user's own choice
  try:
    folder = cache_dir() / "compiled"
    make_private(folder.parent)
    make_private(folder)
    info = folder.stat()
  except (OSError, RuntimeError):
    return ""  # a read-only home, or none: compile each time
  if hasattr(os, "getuid") and (info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o022):
    return f"{folder} can be written by others: compiled programs are not kept there"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
  ignored = "Error (reading|writing) persistent compilation cache entry"  # it compiles instead
  warnings.filterwarnings("ignore", message=ignored)
  drop_damaged(folder)
  return ""


def _leave_out_closed_loops() -> None:
  """Has Python keep quiet about TensorStore's threads that report on a save which was given up."""
  show = sys.unraisablehook

  def show_others(unraisable: Any) -> None:
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
      show(unraisable)

  sys.unraisablehook = show_others


def check_address_space() -> None:
  """Raises `UserError` where `ulimit -v` leaves less address space than a process needs to compile the smallest model."""
  with contextlib.suppress(ImportError):  # POSIX only
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= limit < LEAST_ADDRESS_SPACE:
      raise UserError(
        f"this process may use {limit / 2**30:.1f} GB of address space, and needs {LEAST_ADDRESS_SPACE / 2**30:.1f} GB at "
        "least. Try ulimit -v unlimited before the command"
      )


def drop_damaged(folder: Path) -> None:
  """Deletes compiled programs that are no longer what was written, and records the digests of new ones.

  A program is machine code, and a damaged one may crash or compute anything. Where jax compresses with zlib it notices
  damage; with zstd, which it prefers where there is one, it does not. A program whose writing broke off would be in the
  way for good: jax replaces none.

  Args:
    folder: of the compilation cache. One that cannot be read or written is left as it is.
  """
  known = _read_digests(folder / "digests.json")
  sound = {}
  for path in sorted(folder.glob("*-cache")):
    with contextlib.suppress(OSError):
      content = path.read_bytes()
      digest = digest_bytes(content)
      if known.get(path.name, digest) == digest and (path.name in known or _is_whole(content)):
        sound[path.name] = digest
      else:
        path.unlink()
  if sound != known:
    with contextlib.suppress(OSError):
      files.write_json(folder / "digests.json", sound)


def _read_digests(path: Path) -> dict[str, str]:
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


def _is_whole(content: bytes) -> bool:
  """Whether a program that was compressed with zlib can be unpacked; True for those of other formats, empty ones aside."""
  try:
    return bool(zlib.decompress(content)) if content[:1] == b"\x78" else bool(content)
  except zlib.error:
    return False


def devices() -> list[jax.Device]:
  """The devices that jax sees.

  Raises:
    UserError: where JAX_PLATFORMS asks for a kind that is not there.
  """
  try:
    return jax.devices()
  except RuntimeError as error:
    asked = os.environ.get("JAX_PLATFORMS", "")
    raise UserError(f"jax finds no device (JAX_PLATFORMS={asked!r}): {first_line(error)[:200]}") from error
