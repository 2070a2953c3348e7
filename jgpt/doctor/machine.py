"""Checks of a machine: processor, memory, limits, environment variables, devices.

Each check is a function of facts that are passed to it. jax's devices are found in `probe.py`,
memory is measured in `system/memory.py`. Imports the standard library only.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jgpt.doctor.findings import Finding, format_bytes, note, ok, problem
from jgpt.doctor.packages import find_version
from jgpt.doctor.probe import Probe, run_bounded
from jgpt.errors import near_matches
from jgpt.system.command import python_command
from jgpt.system.memory import measure_memory, read_kernel, read_quota
from jgpt.system.processor import find_bfloat16

PREFIXES = ("JAX_", "XLA_", "JGPT_", "CUDA_", "NVIDIA_", "TPU_")
VARIABLES = (
  "LD_LIBRARY_PATH",
  "LIBTPU_INIT_ARGS",
  "OMP_NUM_THREADS",
  "PYTHONPATH",
  "TF_CPP_MIN_LOG_LEVEL",
)
OWN_VARIABLES = ("JGPT_CACHE_DIR", "JGPT_DATA_DIR", "JGPT_FAULT")
# Variables that change every result or take far longer, with their effect.
NOTED_VARIABLES = {
  "JAX_ENABLE_X64": "changes no number of a run, which names its types: float32 stays float32",
  "JAX_RANDOM_SEED_OFFSET": "changes every random number",
  "JAX_DISABLE_JIT": "compiles nothing: a step takes many times as long",
  "JAX_DEBUG_NANS": "looks at every result: a step takes longer",
  "JAX_DEFAULT_MATMUL_PRECISION": "changes the digits of every product",
  "JAX_LOG_COMPILES": "writes a line for every program",
}
FALSE_VALUES = ("", "0", "false", "no", "off", "n", "f")
MIN_MEMORY, LITTLE_MEMORY = 5e8, 2e9  # `names` takes 0.6 GB with the libraries; GPT-2's step 8 GB
CUDA13_DRIVER = 580  # the first driver that runs CUDA 13
MAX_VALUE_CHARS = 120  # of a variable


# --- Processor and memory ---


def count_usable_cores() -> int:
  """Counts the cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def examine_processor(
  there: int, usable: int, quota: float | None, load: float | None
) -> list[Finding]:
  """Examines cores, a container's quota, and load.

  Args:
    there: cores of the machine.
    usable: cores that this process may use; XLA starts a thread for each.
    quota: cores of time that a container may use, or None.
    load: average number of processes that were running or waiting in the last minute, or None.
  """
  model = re.search(r"^model name\s*: (.+)$", read_kernel(Path("/proc/cpuinfo")), re.M)
  name = model.group(1) if model else platform.processor() or platform.machine()
  text = f"{name}, {usable} of {there} cores usable, {usable} threads of XLA"
  instructions = find_bfloat16()
  rounded = f"multiplies bfloat16 ({instructions})" if instructions else "multiplies no bfloat16"
  text = f"{text}, {rounded}"
  found = [ok("processor", text if load is None else f"{text}, load {load:.1f}")]
  if quota is not None and math.ceil(quota) < usable:
    cores = max(1, math.floor(quota))
    text = (
      f"this container may use the time of {quota:g} cores, and XLA starts {usable} threads, which "
      "wait for each other"
    )
    found.append(
      note(
        "processor", text, f"taskset -c 0-{cores - 1} before the command, or docker's --cpuset-cpus"
      )
    )
  if load is not None and load > usable + 1:
    text = f"{load:.1f} processes want {usable} cores: training is slower, and times do not repeat"
    found.append(note("processor", text, "see with top what else is running"))
  return found


def examine_memory(total: int | None, available: int | None) -> list[Finding]:
  """Examines whether there is enough memory to train.

  Args:
    total: bytes, or None where the system does not say.
    available: bytes, or None.
  """
  if total is None or available is None:
    return [note("memory", "this system does not say how much memory there is")]
  text = f"{format_bytes(available)} available of {format_bytes(total)}"
  if available < MIN_MEMORY:
    return [
      problem(
        "memory",
        f"{text}; the smallest experiment takes 0.6 GB",
        "end other programs, or raise the container's limit",
      )
    ]
  if available < LITTLE_MEMORY:
    return [note("memory", f"{text}: enough for small experiments; gpt2_shakespeare takes 8 GB")]
  return [ok("memory", text)]


def examine_limits(limits: Mapping[str, float]) -> list[Finding]:
  """Examines the limits of `ulimit`.

  Args:
    limits: "address space" and "file size" in bytes, and "open files"; infinite without a limit.
  """
  found = []
  if limits.get("address space", math.inf) < 1e11:
    size = format_bytes(limits["address space"])
    text = f"the address space is limited to {size}: XLA reserves more than it uses"
    found.append(note("limits", text, "ulimit -v unlimited"))
  if limits.get("file size", math.inf) < 1e10:
    text = f"files are limited to {format_bytes(limits['file size'])}: a checkpoint may not fit"
    found.append(note("limits", text, "ulimit -f unlimited"))
  if limits.get("open files", math.inf) < 256:
    text = f"{limits['open files']:.0f} open files are allowed: saving a checkpoint may need more"
    found.append(note("limits", text, "ulimit -n 1024"))
  return found


def read_limits() -> dict[str, float]:
  """Reads the limits of this process, for `examine_limits`; {} on Windows."""
  try:
    import resource  # POSIX only
  except ImportError:
    return {}
  names = {
    "address space": resource.RLIMIT_AS,
    "file size": resource.RLIMIT_FSIZE,
    "open files": resource.RLIMIT_NOFILE,
  }
  soft = {name: resource.getrlimit(number)[0] for name, number in names.items()}
  return {
    name: math.inf if limit == resource.RLIM_INFINITY else limit for name, limit in soft.items()
  }


def limit_memory() -> None:
  """Limits the memory of this process to what is available now; on Linux only.

  An allocation beyond it fails, and the system does not end other programs.
  """
  taken = re.search(r"^VmData:\s*(\d+) kB", read_kernel(Path("/proc/self/status")), re.M)
  available = measure_memory()[1]
  if taken is None or available is None:
    return
  import resource  # here, because Windows does not have it

  most = int(taken.group(1)) * 1024 + available
  hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
  with contextlib.suppress(OSError, ValueError):  # a lower limit may be set already
    resource.setrlimit(
      resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
    )


# --- Environment ---


def examine_environment(env: Mapping[str, str]) -> list[Finding]:
  """Examines the environment variables that change what jax, XLA or jgpt do."""
  shown = sorted(name for name in env if name.startswith(PREFIXES) or name in VARIABLES)
  found = [
    ok(
      "environment",
      " ".join(f"{n}={_shorten(env[n])}" for n in shown) or "nothing set for jax, XLA or jgpt",
    )
  ]
  for name in shown:
    if name.startswith("JGPT_") and name not in OWN_VARIABLES and name != "JGPT_TEST_CACHE":
      meant = near_matches(name, OWN_VARIABLES)
      found.append(note("environment", f"jgpt knows no {name}.{meant}", f"unset {name}"))
  for name, effect in NOTED_VARIABLES.items():
    if env.get(name, "").lower() not in FALSE_VALUES:
      found.append(
        note(
          "environment",
          f"{name}={_shorten(env[name])} {effect}",
          f"unset {name}, unless you want that",
        )
      )
  if env.get("JAX_ENABLE_COMPILATION_CACHE", "1").lower() in FALSE_VALUES:
    text = "JAX_ENABLE_COMPILATION_CACHE turns the cache off: everything is compiled at each start"
    found.append(note("environment", text, "unset JAX_ENABLE_COMPILATION_CACHE"))
  return found


def _shorten(value: str) -> str:
  return value if len(value) <= MAX_VALUE_CHARS else f"{value[:MAX_VALUE_CHARS]}..."


# --- Devices ---


def find_gpus(root: Path = Path("/")) -> list[str]:
  """Finds NVIDIA's GPUs, without jax.

  Args:
    root: folder that contains proc and dev.

  Returns:
    For each GPU a line such as "NVIDIA H200, driver 570.1, 143771 MiB, 0 MiB used".
  """
  fields = "name,driver_version,memory.total,memory.used"
  done = run_bounded(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], 10)
  rows = (
    [[part.strip() for part in line.split(",")] for line in done.out.splitlines()]
    if done.status == 0
    else []
  )
  if found := [
    f"{row[0]}, driver {row[1]}, {row[2]}, {row[3]} used" for row in rows if len(row) == 4
  ]:
    return found
  if (root / "proc/driver/nvidia/gpus").is_dir() or (root / "dev/nvidia0").exists():
    return [
      "an NVIDIA GPU (nvidia-smi: "
      f"{done.why or done.out.strip()[:100] or done.err.strip()[:100] or done.status})"
    ]
  return []


def examine_devices(probe: Probe, gpus: Sequence[str], env: Mapping[str, str]) -> list[Finding]:
  """Examines whether jax finds devices, whether they compute, and whether it finds the GPUs.

  Args:
    probe: from `probe_devices`.
    gpus: from `find_gpus`.
    env: the environment in which jax ran.
  """
  found = [ok("gpu", gpu) for gpu in gpus]
  if probe.error:
    return [
      *found,
      problem("devices", f"jax: {probe.error} ({probe.seconds:.1f} s)", _advise(probe, env)),
    ]
  kinds: dict[tuple, int] = {}
  for device in probe.devices:
    what = device["platform"], device["kind"], device["memory"]
    kinds[what] = kinds.get(what, 0) + 1
  words = [
    f"{count} {name.upper()}{'' if kind.lower() == name.lower() else f' ({kind})'}"
    + ("" if memory is None else f", {format_bytes(memory)} for jax{' each' if count > 1 else ''}")
    for (name, kind, memory), count in kinds.items()
  ]
  found.append(
    ok(
      "devices",
      f"jax finds {'; '.join(words)}, and computes ({probe.seconds:.1f} s with importing jax)",
    )
  )
  if gpus and all(device["platform"] == "cpu" for device in probe.devices):
    found.append(_explain_unused(gpus, env))
  return found


def _explain_unused(gpus: Sequence[str], env: Mapping[str, str]) -> Finding:
  """Makes the finding that says why jax finds the CPU only, although there is a GPU."""
  for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
    if name in env and (name != "JAX_PLATFORMS" or env[name]):
      return note(
        "devices",
        f"{name}={_shorten(env[name])} hides the GPU from jax",
        f"unset {name} to train on it",
      )
  driver = re.search(r"driver (\d+)", gpus[0])
  extra = "cuda13" if driver and int(driver.group(1)) >= CUDA13_DRIVER else "cuda12"
  why = "no plugin for it is installed"
  for cuda in ("cuda12", "cuda13"):
    if version := find_version(f"jax-{cuda}-plugin"):
      extra, versions = cuda, f"jax-{cuda}-plugin {version}, jaxlib {find_version('jaxlib')}"
      why = f"its plugin does not work ({versions})"
  return problem(
    "devices",
    f"a GPU is in this machine, but jax sees only the CPU: {why}",
    f"{python_command()} -m pip install --upgrade 'jax[{extra}]'",
  )


def _advise(probe: Probe, env: Mapping[str, str]) -> str:
  """Returns what to do where jax finds no device, or one that does not compute."""
  if "ModuleNotFoundError" in probe.error:
    return "mend the packages first: see above"
  flags, platforms = env.get("XLA_FLAGS"), env.get("JAX_PLATFORMS")
  named = re.search(r"\b(JAX_\w+|XLA_FLAGS)\b", probe.error.replace("set JAX_PLATFORMS=''", ""))
  if named and env.get(named.group(1)):
    return f"unset {named.group(1)} (it is {_shorten(env[named.group(1)])!r})"
  if probe.cause == "devices" and platforms:
    return f"unset JAX_PLATFORMS (it is {_shorten(platforms)!r}), or set it to cpu"
  if probe.cause == "SIGILL":
    return (
      "this processor lacks instructions that jaxlib was built with (AVX): use another machine, or "
      "build jaxlib for it"
    )
  if probe.cause == "SIGKILL":
    return "the system ended it, most often for want of memory: see the line about memory"
  if flags:
    return f"unset XLA_FLAGS (it is {_shorten(flags)!r})"
  if probe.cause == "import":
    return f"{python_command()} -m pip install --upgrade --force-reinstall jax jaxlib"
  return (
    "see whether nvidia-smi answers; JAX_PLATFORMS=cpu before the command goes without accelerators"
  )


# --- All but the devices ---


def examine_machine(env: Mapping[str, str]) -> list[Finding]:
  """Examines processor, memory, limits and environment.

  Args:
    env: the environment in which jax would run.
  """
  quota, _ = read_quota()
  load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
  return [
    *examine_processor(os.cpu_count() or 1, count_usable_cores(), quota, load),
    *examine_memory(*measure_memory()),
    *examine_limits(read_limits()),
    *examine_environment(env),
  ]
