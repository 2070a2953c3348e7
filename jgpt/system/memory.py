"""The memory and processor cores of the machine, or of the container that limits them.

Limits are read from the kernel's control groups. Imports no jax.
"""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

NO_LIMIT = 2**60  # bytes; version 1 of control groups writes a larger number for "no limit"


def read_quota(root: Path = Path("/")) -> tuple[float | None, int | None]:
  """Reads a container's limits.

  Args:
    root: folder with proc and sys.

  Returns:
    Cores, and bytes of memory; None where there is no limit.
  """
  cores, memory = [], []
  for folder in _cgroups(root):
    quota, period = [*read_kernel(folder / "cpu.max").split(), "", ""][:2]
    if not quota:
      quota, period = (read_kernel(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota.isdecimal() and period.isdecimal() and int(period):
      cores.append(int(quota) / int(period))
    memory += [limit] if (limit := _read_limit(folder)) is not None else []
  return min(cores, default=None), min(memory, default=None)


def measure_memory(root: Path = Path("/")) -> tuple[int | None, int | None]:
  """Measures the memory of the machine, within a container's limits.

  Args:
    root: folder with proc and sys.

  Returns:
    Bytes in total, and bytes available; None where the system does not say.
  """
  sizes = _read_kilobytes(root / "proc/meminfo")
  total, available = sizes.get("MemTotal"), sizes.get("MemAvailable")
  if total is None:
    with contextlib.suppress(ImportError):
      import psutil  # comes with orbax; only where the kernel has no /proc

      total, available = psutil.virtual_memory()[:2]
  groups = [
    (limit, folder) for folder in _cgroups(root) if (limit := _read_limit(folder)) is not None
  ]
  if total is not None and (
    groups := [(limit, folder) for limit, folder in groups if limit < total]
  ):
    total = min(limit for limit, _ in groups)
    left = [max(0, limit - _read_used(folder)) for limit, folder in groups]
    available = min(*left, total if available is None else available)
  return total, available


def measure_obtainable_memory(root: Path = Path("/")) -> int | None:
  """Measures the most memory that this process could still get, in bytes.

  More than what is available: all of the file cache and of the swap space counts, as the kernel
  gives up both before it ends a process.

  Args:
    root: folder with proc and sys.

  Returns:
    None where the system does not say.
  """
  available = measure_memory(root)[1]
  facts = _read_kilobytes(root / "proc/meminfo")
  free = sum(facts.get(name, 0) for name in ("MemFree", "Active(file)", "Inactive(file)"))
  free += facts.get("SReclaimable", 0)
  swap = facts.get("SwapFree", 0)
  left = [
    max(0, limit - _read_used(folder)) + _read_facts(folder).get("active_file", 0)
    for folder in _cgroups(root)
    if (limit := _read_limit(folder)) is not None
  ]
  obtainable = min([*left, *([free] if free else [])], default=available)
  return None if obtainable is None else max(obtainable, available or 0) + swap


def _read_kilobytes(path: Path) -> dict[str, int]:
  """Reads the sizes of /proc/meminfo, in bytes."""
  lines = (line.partition(":")[::2] for line in read_kernel(path).splitlines())
  found = ((name, re.match(r"\s*(\d+) kB", value)) for name, value in lines)
  return {name: int(size.group(1)) * 1024 for name, size in found if size}


def measure_peak_memory() -> int | None:
  """Measures the most memory that this process ever used, in bytes; None where it is not known."""
  try:
    import resource  # Unix only
  except ImportError:
    return None
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def read_kernel(path: Path) -> str:
  """Reads a file of the kernel, stripped; returns "" where it cannot be read."""
  try:
    return path.read_text(encoding="utf-8", errors="replace").strip()
  except OSError:
    return ""


def _cgroups(root: Path) -> list[Path]:
  """Lists the folders of this process's control groups, and their parents."""
  folders = []
  for line in read_kernel(root / "proc/self/cgroup").splitlines():
    controllers, _, path = line.partition(":")[2].partition(":")
    for base in [
      root / "sys/fs/cgroup",
      *(root / "sys/fs/cgroup" / name for name in controllers.split(",") if name),
    ]:
      # A path with ".." leads to a group outside the container.
      below = base.joinpath(path.strip("/")) if ".." not in path else base
      folders += [folder for folder in (below, *below.parents) if folder.is_relative_to(base)]
  return list(dict.fromkeys(folders))


def _read_limit(folder: Path) -> int | None:
  """Returns the bytes of memory that a control group may use, or None."""
  texts = [read_kernel(folder / name) for name in ("memory.max", "memory.limit_in_bytes")]
  return min(
    (int(text) for text in texts if text.isdecimal() and int(text) < NO_LIMIT), default=None
  )


def _read_used(folder: Path) -> int:
  """Returns the bytes of memory that a control group uses, without its inactive file cache.

  The kernel frees that cache before it runs out of memory.
  """
  texts = [read_kernel(folder / name) for name in ("memory.current", "memory.usage_in_bytes")]
  used = max((int(text) for text in texts if text.isdecimal()), default=0)
  return max(0, used - _read_facts(folder).get("inactive_file", 0))


def _read_facts(folder: Path) -> dict[str, int]:
  """Reads a control group's memory.stat; version 1's totals, of all below, count there."""
  lines = (line.partition(" ")[::2] for line in read_kernel(folder / "memory.stat").splitlines())
  facts = {name: int(value) for name, value in lines if value.isdecimal()}
  return facts | {
    name.removeprefix("total_"): value for name, value in facts.items() if name.startswith("total_")
  }
