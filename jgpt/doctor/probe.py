"""A first look at what jax finds, in a process of its own with a deadline.

A driver may hang, and XLA ends the process where it does not like a flag. Responsible for starting that process, for being
it (`python -m jgpt.doctor.probe` prints JSON), and for what can be learned from how it ended. Not responsible for what
is said about it (`machine.py`). Importing this imports nothing that has to be installed.
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

SECONDS = 60.0  # a pod's devices take tens of seconds
KILL_SECONDS = 2.0  # for a process that was killed to be gone; one that hangs in a driver stays
MAX_OUTPUT = 100_000  # bytes of a child's output that are read
MARK = "jgpt.doctor.probe: "  # libraries may print lines of their own


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a process ended.

  Attributes:
    status: its exit status, -n for signal n; None where it could not be started, or time was up.
    out: the last of its standard output.
    err: the last of its standard error.
    why: why there is no status: "not found", "no answer within 60 s"; or "".
  """

  status: int | None
  out: str
  err: str
  why: str = ""


@dataclasses.dataclass(frozen=True)
class Probe:
  """What jax found.

  Attributes:
    devices: platform, kind and memory (bytes that it may use, or None) of each.
    error: why there are none, or why they do not compute; "" where all is well.
    seconds: from the process's start to its answer.
    cause: "hangs", "import", "devices", "computes" or the name of the signal that ended it; "" where all is well.
  """

  devices: list[dict[str, Any]]
  error: str
  seconds: float
  cause: str = ""


def run_bounded(args: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> Ended:
  """Runs a program and waits for it no longer than `seconds`; then it is killed with its children, and not waited for."""
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:  # a pipe could be held open by what is left behind

    def ended(status: int | None, why: str = "") -> Ended:
      return Ended(status, _read_end(out), _read_end(err), why)

    try:
      process = subprocess.Popen(
        args, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, start_new_session=os.name == "posix"
      )
    except OSError as error:
      return ended(None, "not found" if isinstance(error, FileNotFoundError) else str(error.strerror))
    try:
      return ended(process.wait(seconds))
    except subprocess.TimeoutExpired:
      return ended(None, f"no answer within {seconds:g} s")
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


def _read_end(file: Any) -> str:
  size = file.seek(0, os.SEEK_END)
  file.seek(max(0, size - MAX_OUTPUT))
  return file.read().decode(errors="replace")


def probe_devices(env: Mapping[str, str], seconds: float = SECONDS) -> Probe:
  """Asks jax for its devices, in a process of its own, and has the first one multiply two matrices.

  The process takes memory as it needs it, so that a run under way on the same GPU is not in the way.

  Args:
    env: the environment that jax is to see.
    seconds: until it is given up.
  """
  root = str(Path(__file__).resolve().parents[2])
  path = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
  env = {**env, "PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_ENABLE_COMPILATION_CACHE": "false"}
  began = time.monotonic()
  ended = run_bounded([sys.executable, "-m", "jgpt.doctor.probe"], seconds, env)
  taken = time.monotonic() - began
  if ended.status is None:
    return Probe([], ended.why, taken, "hangs")
  answers = [line.removeprefix(MARK) for line in ended.out.splitlines() if line.startswith(MARK)]
  if ended.status == 0 and answers:
    answer = json.loads(answers[-1])
    return Probe(answer["devices"], answer["error"], taken, answer["cause"])
  last = _last_words(ended.err)
  if ended.status < 0:
    name = signal.Signals(-ended.status).name if -ended.status in set(signal.Signals) else f"signal {-ended.status}"
    return Probe([], f"the process was ended by {name}{f': {last}' if last else ''}", taken, name)
  return Probe([], last or f"exit status {ended.status}", taken, "import")


def _last_words(text: str) -> str:
  """The line that says why: the last one that a C++ library calls fatal, or the last at all."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  fatal = [line.partition("] ")[2] for line in lines if re.match(r"F\d{4} ", line)]
  return (fatal or lines or [""])[-1][:300]


# --- In the process of its own ---


def look() -> dict[str, Any]:
  """What `probe_devices` asks: devices, error, cause."""
  try:
    import jax
    import jax.numpy as jnp
    import numpy as np
  except Exception as error:  # a broken installation raises anything
    return _answer("import", error)
  try:
    found = jax.devices()
  except Exception as error:
    return _answer("devices", error)
  devices = [{"platform": d.platform, "kind": d.device_kind, "memory": _memory(d)} for d in found]
  try:
    x = np.arange(64.0, dtype=np.float32).reshape(8, 8) / 64
    product = np.asarray(jax.jit(lambda x: x @ jnp.eye(8))(x))
  except Exception as error:
    return _answer("computes", error, devices)
  if not np.array_equal(product, x):
    return {"devices": devices, "error": "a matrix times the identity is not that matrix", "cause": "computes"}
  return {"devices": devices, "error": "", "cause": ""}


def _answer(cause: str, error: Exception, devices: Sequence[dict] = ()) -> dict[str, Any]:
  first = (str(error).splitlines() or [""])[0][:300]
  return {"devices": list(devices), "error": f"{type(error).__name__}: {first}", "cause": cause}


def _memory(device: Any) -> int | None:
  """Bytes that a device lets this process use, where it says."""
  try:
    return (device.memory_stats() or {}).get("bytes_limit")
  except Exception:  # not every backend has it
    return None


if __name__ == "__main__":
  print(MARK + json.dumps(look()), flush=True)
  os._exit(0)  # a driver that hangs when it is let go has answered already
