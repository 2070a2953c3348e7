"""Finds jax's devices in a process of its own with a deadline.

A driver may hang, and XLA aborts the process for an unknown flag. `probe_devices` starts
`python -m jgpt.doctor.probe`, which prints JSON, and explains how it ended. What is reported about
it is in `machine.py`. Imports the standard library only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROBE_SECONDS = 60.0  # the devices of a TPU pod take tens of seconds
KILL_SECONDS = 2.0  # a killed process may hang in a driver, and is not waited for longer
MAX_OUTPUT = 100_000  # bytes of a child's output that are read
ANSWER_PREFIX = "jgpt.doctor.probe: "  # libraries may print other lines


@dataclasses.dataclass(frozen=True)
class ProcessResult:
  """The exit status and the output of a process.

  Attributes:
    status: exit status, -n for signal n; None where it could not be started or was too slow.
    out: end of its standard output.
    err: end of its standard error.
    why: why there is no status, "not found" or "no answer within 60 s"; else "".
  """

  status: int | None
  out: str
  err: str
  why: str = ""


@dataclasses.dataclass(frozen=True)
class Probe:
  """The devices that jax found, or why it found none.

  Attributes:
    devices: platform, kind and memory (bytes that it may use, or None) of each.
    error: why there are none, or why they do not compute; "" without an error.
    seconds: from the start of the process to its answer.
    cause: "hangs", "import", "devices", "computes" or the name of the signal that ended the
      process; "" without an error.
  """

  devices: list[dict[str, Any]]
  error: str
  seconds: float
  cause: str = ""


def run_bounded(
  args: Sequence[str], seconds: float, env: Mapping[str, str] | None = None
) -> ProcessResult:
  """Runs a program, and kills it and its children after `seconds`."""
  # Files, because a child that is left could hold a pipe open.
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:

    def make_result(status: int | None, why: str = "") -> ProcessResult:
      return ProcessResult(status, _read_tail(out), _read_tail(err), why)

    try:
      process = subprocess.Popen(
        args,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        env=env,
        start_new_session=os.name == "posix",
      )
    except OSError as error:
      return make_result(
        None, "not found" if isinstance(error, FileNotFoundError) else str(error.strerror)
      )
    try:
      return make_result(process.wait(seconds))
    except subprocess.TimeoutExpired:
      return make_result(None, f"no answer within {seconds:g} s")
    finally:
      if process.poll() is None:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
  with contextlib.suppress(OSError):
    if os.name == "posix":
      os.killpg(process.pid, signal.SIGKILL)
    else:
      process.kill()
  with contextlib.suppress(subprocess.TimeoutExpired):
    process.wait(KILL_SECONDS)


def _read_tail(file: Any) -> str:
  size = file.seek(0, os.SEEK_END)
  file.seek(max(0, size - MAX_OUTPUT))
  return file.read().decode(errors="replace")


def probe_devices(env: Mapping[str, str], seconds: float = PROBE_SECONDS) -> Probe:
  """Finds jax's devices in a process of its own, where the first one multiplies two matrices.

  The process allocates memory as it needs it, since a run may be using the same GPU.

  Args:
    env: environment of the process.
    seconds: until the process is killed.
  """
  root = str(Path(__file__).resolve().parents[2])
  path = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
  env = {
    **env,
    "PYTHONPATH": path,
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
  }
  began = time.monotonic()
  done = run_bounded([sys.executable, "-m", "jgpt.doctor.probe"], seconds, env)
  taken = time.monotonic() - began
  if done.status is None:
    return Probe([], done.why, taken, "hangs")
  lines = done.out.splitlines()
  answers = [x.removeprefix(ANSWER_PREFIX) for x in lines if x.startswith(ANSWER_PREFIX)]
  if done.status == 0 and answers:
    answer = json.loads(answers[-1])
    return Probe(answer["devices"], answer["error"], taken, answer["cause"])
  last = find_error_line(done.err)
  if done.status < 0:
    name = (
      signal.Signals(-done.status).name
      if -done.status in set(signal.Signals)
      else f"signal {-done.status}"
    )
    return Probe([], f"the process was ended by {name}{f': {last}' if last else ''}", taken, name)
  return Probe([], last or f"exit status {done.status}", taken, "import")


def find_error_line(text: str) -> str:
  """Returns the line that gives the cause: the last fatal one of a C++ library, or the last one."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  fatal = [line.partition("] ")[2] for line in lines if re.match(r"F\d{4} ", line)]
  return (fatal or lines or [""])[-1][:300]


# --- In the process of its own ---


def find_devices() -> dict[str, Any]:
  """Finds jax's devices in this process; returns devices, error and cause of a `Probe`."""
  try:
    import jax
    import jax.numpy as jnp
    import numpy as np
  except Exception as error:  # a broken installation may raise anything
    return _make_answer("import", error)
  try:
    found = jax.devices()
  except Exception as error:
    return _make_answer("devices", error)
  devices = [
    {"platform": d.platform, "kind": d.device_kind, "memory": _find_memory(d)} for d in found
  ]
  try:
    x = np.arange(64.0, dtype=np.float32).reshape(8, 8) / 64
    product = jax.device_get(jax.jit(lambda x: x @ jnp.eye(8))(jax.device_put(x)))
  except Exception as error:
    return _make_answer("computes", error, devices)
  if not np.array_equal(product, x):
    return {
      "devices": devices,
      "error": "a matrix times the identity is not that matrix",
      "cause": "computes",
    }
  return {"devices": devices, "error": "", "cause": ""}


def _make_answer(cause: str, error: Exception, devices: Sequence[dict] = ()) -> dict[str, Any]:
  first = (str(error).splitlines() or [""])[0][:300]
  said = f"{type(error).__name__}: {first}".removesuffix(": ")
  return {"devices": list(devices), "error": said, "cause": cause}


def _find_memory(device: Any) -> int | None:
  """Returns the bytes that this process may use on a device; None where it does not say."""
  try:
    return (device.memory_stats() or {}).get("bytes_limit")
  except Exception:  # not every backend has `memory_stats`
    return None


if __name__ == "__main__":
  print(ANSWER_PREFIX + json.dumps(find_devices()), flush=True)
  os._exit(0)  # a driver may hang while Python ends
