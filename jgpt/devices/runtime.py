"""Process-wide setup of JAX for the commands: the compilation cache, log levels, devices.

Library users who call nothing here get plain JAX. Compiler options are in `compute.py`.
"""

import collections
import contextlib
import json
import logging
import os
import stat
import sys
import warnings
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from jgpt.config import ComputeConfig
from jgpt.devices import processes
from jgpt.devices.compute import PRECISIONS, describe_products
from jgpt.devices.limits import TPU_PASSES, find_memory_limit, find_peak
from jgpt.errors import UserError, first_line
from jgpt.system import files
from jgpt.system.cache import cache_dir, digest_bytes, make_private
from jgpt.system.memory import measure_memory, measure_obtainable_memory

# Bytes: with less, jax cannot start its threads, and the process is aborted without a message.
MIN_ADDRESS_SPACE = 3 << 29
# Options of jax that change random numbers or the digits of results, with their defaults.
NUMERIC_OPTIONS = {
  "jax_enable_x64": False,
  "jax_default_prng_impl": "threefry2x32",
  "jax_threefry_partitionable": True,
  "jax_random_seed_offset": 0,
  "jax_high_dynamic_range_gumbel": False,
  "jax_default_matmul_precision": None,
  "jax_allow_f16_reductions": True,
  "jax_disable_jit": False,
  "jax_disable_most_optimizations": False,
}
NUMERIC_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
# Platform of JAX_PLATFORMS -> what brings its devices.
PLATFORM_EXTRAS = {"cuda": "cuda12 or cuda13", "gpu": "cuda12 or cuda13", "tpu": "tpu"}
BY_EXTRA = {"cuda12": "a GPU of NVIDIA's", "tpu": "a TPU"}  # by the extra that brings it


def set_up() -> str:
  """Turns on the persistent compilation cache and lowers the log levels of libraries.

  A cache folder that other users can write to is not used, since compiled programs are machine
  code. No device is initialized.

  Returns:
    A line for the user about a cache that is not used, or "".

  Raises:
    UserError: where the address space is too small to compile anything.
  """
  check_address_space()
  # Errors of a save are raised as well, and printed in one line.
  for name, level in {
    "absl": logging.CRITICAL,
    "asyncio": logging.CRITICAL,
    "jax": logging.ERROR,
  }.items():
    logging.getLogger(name).setLevel(level)
  _silence_closed_loops()
  if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return ""  # jax reads the variable itself
  try:
    folder = cache_dir() / "compiled"
    make_private(folder.parent)
    make_private(folder)
    info = folder.stat()
  except (OSError, RuntimeError):
    return ""  # no home, or a read-only one: compile each time
  if hasattr(os, "getuid") and (info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o022):
    return f"{folder} can be written by others: compiled programs are not kept there"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
  ignored = "Error (reading|writing) persistent compilation cache entry"  # it compiles instead
  warnings.filterwarnings("ignore", message=ignored)
  delete_damaged_programs(folder)
  return ""


def find_numeric_options() -> dict[str, Any]:
  """Finds what is set in this process that may change random numbers or the digits of results.

  Returns:
    Options of jax that are not at their defaults, and environment variables that XLA and its
    libraries read, by name.
  """
  options = {
    name: value
    for name, default in NUMERIC_OPTIONS.items()
    if (value := getattr(jax.config, name, default)) != default
  }
  return options | {name: os.environ[name] for name in NUMERIC_VARIABLES if os.environ.get(name)}


def _silence_closed_loops() -> None:
  """Hides the errors of TensorStore's threads after a cancelled save ("Event loop is closed")."""
  show = sys.unraisablehook

  def show_others(unraisable: Any) -> None:
    if not (
      unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"
    ):
      show(unraisable)

  sys.unraisablehook = show_others


def check_address_space() -> None:
  """Checks that `ulimit -v` leaves enough address space to compile the smallest model.

  Raises:
    UserError: with the limit and what is needed.
  """
  with contextlib.suppress(ImportError):  # POSIX only
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= limit < MIN_ADDRESS_SPACE:
      raise UserError(
        f"this process may use {limit / 2**30:.1f} GB of address space, and needs "
        f"{MIN_ADDRESS_SPACE / 2**30:.1f} GB at least. Try ulimit -v unlimited before the command"
      )


def delete_damaged_programs(folder: Path) -> None:
  """Deletes compiled programs whose digest has changed, and records the digests of new ones.

  A damaged program may crash or compute wrong values. jax detects damage in files compressed with
  zlib but not with zstd, which it prefers where it is installed, and never replaces a file, so that
  one that was cut off would stay.

  Args:
    folder: of the compilation cache; unchanged where it cannot be read or written.
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
  """Returns whether a program can be decompressed; only zlib is tried, and an empty one cannot."""
  try:
    return bool(zlib.decompress(content)) if content[:1] == b"\x78" else bool(content)
  except zlib.error:
    return False


def read_memory_stats(device: jax.Device) -> dict[str, int]:
  """Reads what a device says of its memory; nothing where it does not say."""
  try:
    return device.memory_stats() or {}
  except RuntimeError:  # not every backend has `memory_stats`, nor has a device of a topology
    return {}


def has_room(tree: Any) -> bool:
  """Returns whether the devices of arrays have room for a copy; false where they do not say.

  On the CPU a copy must leave twice its size available, for saving and evaluating. On other devices
  it must fit beside the most that was ever in use.

  Args:
    tree: of arrays.
  """
  needed = collections.Counter()
  for x in jax.tree.leaves(tree):
    for shard in x.addressable_shards:
      needed[shard.device] += shard.data.nbytes
  if next(iter(needed)).platform == "cpu":
    available = measure_memory()[1]
    return available is not None and 3 * needed.total() <= available
  for device, num_bytes in needed.items():
    stats = read_memory_stats(device)
    free = stats.get("bytes_limit", 0) - stats.get("peak_bytes_in_use", 0)
    if num_bytes > free:
      return False
  return True


def devices(*, to_train: bool = False, is_local: bool = False) -> list[jax.Device]:
  """Returns the devices that jax finds, of all processes.

  Args:
    to_train: whether it is an error that jax would compute on the CPU although an accelerator is
      there.
    is_local: whether to return those of this process only, for what it computes alone.

  Raises:
    UserError: where there are none, as with a JAX_PLATFORMS that this machine lacks, and for that.
  """
  try:
    found = processes.wait("the devices of all processes", jax.devices)
  # Where "cuda" is asked for and its plugin is not installed, an assertion of jax's fails.
  except (RuntimeError, AssertionError) as error:
    asked = jax.config.jax_platforms or ""
    reason = str(error) and f": {first_line(error).partition(' (set JAX_PLATFORMS')[0][:200]}"
    extra = next((e for p, e in PLATFORM_EXTRAS.items() if p in asked.split(",")), None)
    advice = f", or install jgpt with the extra {extra}" if extra else ""
    raise UserError(
      f"jax finds no device (JAX_PLATFORMS={asked!r}){reason}. Try JAX_PLATFORMS=cpu before the "
      f"command{advice}"
    ) from error
  if to_train:
    there = find_accelerator_files(os.environ)
    check_no_fallback({device.platform for device in found}, jax.config.jax_platforms, there)
  return jax.local_devices() if is_local else found


def check_no_fallback(platforms: set[str], asked: str | None, there: str | None) -> None:
  """Checks that jax does not compute on the CPU for want of what finds an accelerator.

  Args:
    platforms: of the devices that jax finds.
    asked: JAX_PLATFORMS; where it is set, its platforms are meant.
    there: from `find_accelerator_files`.

  Raises:
    UserError: with what to install.
  """
  if there is not None and not asked and platforms == {"cpu"}:
    raise UserError(
      f"this machine has {BY_EXTRA[there]}, and jax finds the CPU only. Install what finds "
      f"it, pip install 'jgpt[{there}]' (python -m jgpt.doctor says more), or put "
      "JAX_PLATFORMS=cpu before the command to compute on the CPU"
    )


def find_accelerator_files(env: Mapping[str, str], root: Path = Path("/")) -> str | None:
  """Finds an accelerator of this machine by its device files, without jax.

  Args:
    env: environment variables; a GPU that they hide is none.
    root: folder that contains dev. The folders of a driver in /proc are a host's, and in a
      container without GPUs too.

  Returns:
    The extra of jgpt that finds it, "cuda12" or "tpu"; None where there is none.
  """
  is_hidden = env.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles")
  if not is_hidden and any((root / "dev").glob("nvidia[0-9]*")):
    return "cuda12"
  is_tpu = any(name.startswith("TPU_") for name in env) and (root / "dev/vfio/0").exists()
  return "tpu" if is_tpu or (root / "dev/accel0").exists() else None


def describe_precision(device: jax.Device, compute: ComputeConfig) -> str:
  """Describes in which precision a device multiplies, as a run and jax are configured.

  Args:
    device: one of those that compute.
    compute: from `resolve_compute`.
  """
  if compute.dtype == "bfloat16":
    return "bfloat16, summed in float32"
  precision = _find_precision(compute)
  return describe_products(device.platform, device.device_kind, precision)


def find_free_memory(device: jax.Device, num_devices: int) -> int | None:
  """Finds the bytes that programs can still have on a device; None where it is not known.

  On a CPU, whose devices share the machine's memory, this is what the kernel could free for each.
  A device that does not say has what its kind has (`limits.find_memory_limit`).

  Args:
    device: one of those that compute.
    num_devices: that compute on this machine.
  """
  if device.platform == "cpu":
    free = measure_obtainable_memory()
    return None if free is None else free // num_devices
  stats = read_memory_stats(device)
  if "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  return find_memory_limit(device.device_kind)


def find_peaks(devices: Collection[jax.Device], compute: ComputeConfig) -> float | None:
  """Finds the peak rate of devices together, in FLOP/s, for the products that a run computes.

  Args:
    devices: of one kind.
    compute: from `resolve_compute`.

  Returns:
    None where it is not known, as of a CPU.
  """
  precision = PRECISIONS.get(chosen := _find_precision(compute), chosen)
  if compute.dtype == "float32" and precision not in TPU_PASSES:  # a `DotAlgorithmPreset`
    return None
  peak = find_peak(next(iter(devices)).device_kind, compute.dtype, precision)
  return None if peak is None else len(devices) * peak


def _find_precision(compute: ComputeConfig) -> str | None:
  """Returns `compute.precision`, or how jax is configured where that is its default."""
  is_default = compute.precision == "default"
  return jax.config.jax_default_matmul_precision if is_default else compute.precision
