"""Joins the processes of a run on several hosts, before any device is touched.

A run is told of its processes by options of the command or by environment variables, or a launcher
is recognised that jax knows: Slurm's srun, Open MPI's mpirun, TPU pods, indexed jobs of Kubernetes.
Before jax's own service starts, process 0 calls the roll (`roll.py`).

What the processes say to each other afterwards is in `processes.py`.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import re
import signal
import socket
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jgpt.devices import processes
from jgpt.devices.roll import Member, call_roll
from jgpt.errors import UserError, first_line, show

# Seconds after ours until jax's own limits end a process: they print a stack trace.
LAST_RESORT_SECONDS = 100
# Of a launcher: how many processes there are, this one's number, and the same on its host. In a job
# of Slurm's, mpirun starts its daemons with srun, and their variables are in its processes too.
LAUNCHERS = {
  "mpirun": (
    *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    *("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
  ),
  "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID"),
}
TOLD_BY = {
  "--coordinator": "JAX_COORDINATOR_ADDRESS",
  "--num-processes": "JAX_NUM_PROCESSES",
  "--process-id": "JAX_PROCESS_ID",
}
METADATA = "computeMetadata/v1/instance/attributes/worker-network-endpoints"


def join(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: float,
) -> None:
  """Joins the processes of this run, if it has several; does nothing where that was done before.

  Args:
    coordinator: HOST:PORT at which process 0 is reached; None is found out, as are the others.
    num_processes: of the run.
    process_id: of this process.
    timeout: seconds to wait for the others, now and later.

  Raises:
    UserError: if what is told is incomplete or contradicts itself, or not all come in time.
  """
  processes.set_timeout(timeout)
  if jax.distributed.is_initialized():
    return
  place = find_member(coordinator, num_processes, process_id, os.environ)
  if place is None or place.num_processes == 1:
    return
  call_roll(place, timeout)
  # jax would record SIGTERM in place of whoever handles it now, and end nothing.
  if hasattr(jax.config, "jax_enable_preemption_service"):  # newer than jax 0.7.2
    jax.config.update("jax_enable_preemption_service", False)
  last_resort = math.ceil(timeout) + LAST_RESORT_SECONDS
  limits = {
    f"{name}_timeout_seconds": last_resort
    for name in ("heartbeat", "shutdown")  # the second is newer than jax 0.7.2
    if f"{name}_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters
  }
  try:
    jax.distributed.initialize(
      place.coordinator,
      place.num_processes,
      place.process_id,
      local_device_ids=place.local_device_ids,
      cluster_detection_method="deactivate",
      initialization_timeout=last_resort,
      **limits,
    )
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM):
      signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
  except RuntimeError as error:
    raise UserError(
      f"process {place.process_id} could not join the others at {place.coordinator}: "
      f"{first_line(error)[:200]}. Try another port"
    ) from error


# --- Where this process stands ---


def find_member(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  env: Mapping[str, str],
) -> Member | None:
  """Finds this process's place; None where nothing says that it is one of several.

  Args:
    coordinator: as for `join`, as the other two.
    num_processes: of the run.
    process_id: of this process.
    env: environment variables.

  Raises:
    UserError: if what is told is incomplete or contradicts itself.
  """
  coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
  count = _read_count(num_processes, "JAX_NUM_PROCESSES", env)
  number = _read_count(process_id, "JAX_PROCESS_ID", env)
  if count == 1 and not number:  # alone, whatever a launcher says
    return None
  launched, ids = _read_launcher(env)
  if (coordinator, count, number) == (None, None, None):
    if not _is_clustered(env, launched):
      return None
    found = _ask_jax(launched)
    coordinator, count, number = found[:3]
  elif coordinator is not None and count is None and number is None and launched:
    count, number = launched
  told = dict(zip(TOLD_BY, (coordinator, count, number), strict=True))
  if missing := [name for name, value in told.items() if value is None]:
    variables = " or ".join(TOLD_BY[name] for name in missing)
    raise UserError(
      f"{', '.join(n for n in told if n not in missing)} without {' and '.join(missing)} does not "
      f"say which process of a run this is. Add {' and '.join(missing)} (or {variables})"
    )
  _check_address(coordinator)
  if count < 1 or not 0 <= number < count:
    raise UserError(
      f"--process-id={number} of --num-processes={count}: ids are 0 to {max(count - 1, 0)}, one "
      "for each process"
    )
  return Member(coordinator, count, number, ids)


def _read_count(option: int | None, name: str, env: Mapping[str, str]) -> int | None:
  if option is not None or not env.get(name):
    return option
  if not re.fullmatch("[0-9]{1,9}", env[name]):
    raise UserError(f"{name}={show(env[name])} must be a whole number")
  return int(env[name])


def _check_address(coordinator: str) -> None:
  host, colon, port = coordinator.rpartition(":")
  if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
    raise UserError(
      f"--coordinator={show(coordinator)} must be HOST:PORT, the host of process 0 and a free port "
      "there, for example 10.0.0.1:12355"
    )


def _read_launcher(
  env: Mapping[str, str],
) -> tuple[tuple[int, int] | None, tuple[int, ...] | None]:
  """Reads how many processes a launcher started and which one this is, and its GPUs.

  A process has one GPU where its host has several processes, unless the launcher or the user has
  chosen each one's GPUs already.
  """
  for launcher, names in LAUNCHERS.items():
    size, rank, local_size, local_rank = (env.get(name, "") for name in names)
    if not (size.isdecimal() and rank.isdecimal()):
      continue
    visible = [n for n in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if n]
    is_chosen = "JAX_LOCAL_DEVICE_IDS" in env or len(visible) == 1
    is_chosen |= launcher == "srun" and "SLURM_GPUS_PER_TASK" in env
    is_shared = _count_tasks(local_size, env) > 1 and local_rank.isdecimal() and not is_chosen
    return (int(size), int(rank)), (int(local_rank),) if is_shared else None
  return None, None


def _count_tasks(text: str, env: Mapping[str, str]) -> int:
  """Counts a launcher's processes on this host; Slurm's text has all hosts, as in "2(x3),1"."""
  counts = [
    int(num)
    for num, times in re.findall(r"([0-9]+)(?:\(x([0-9]+)\))?", text)
    for _ in range(int(times or 1))
  ]
  node = env.get("SLURM_NODEID", "")
  return counts[min(int(node) if node.isdecimal() else 0, len(counts) - 1)] if counts else 1


def _is_clustered(env: Mapping[str, str], launched: tuple[int, int] | None) -> bool:
  """Returns whether this is one of several processes of a cluster that jax recognises."""
  if launched is not None:
    return launched[0] > 1
  if "JOB_COMPLETION_INDEX" in env and "KUBERNETES_SERVICE_HOST" in env:
    return True
  workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
  if not any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0"))):
    return False
  if workers is None and "TPU_SKIP_MDS_QUERY" not in env:  # a TPU VM of Google's asks its host
    workers = _read_metadata(env)
  return workers is not None and "," in workers


def _read_metadata(env: Mapping[str, str]) -> str | None:
  host = env.get("GCE_METADATA_IP", "metadata.google.internal")
  request = urllib.request.Request(f"http://{host}/{METADATA}")
  request.add_header("Metadata-Flavor", "Google")
  with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=3) as reply:
    return reply.read(1 << 20).decode(errors="replace")
  return None


def _ask_jax(launched: tuple[int, int] | None) -> tuple[str, int, int, Any]:
  """Finds, by asking jax, the coordinator, the number of processes and this one's, in its cluster.

  Raises:
    UserError: if jax does not know them.
  """
  from jax._src import clusters  # what `jax.distributed.initialize` calls; it tells nobody

  try:
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, None, LAST_RESORT_SECONDS
    )
  except (RuntimeError, KeyError, ValueError, OSError, ImportError) as error:
    reason = f": {first_line(error)[:200]}"
  else:
    if None not in found[:3]:
      return found
    reason = ""
  count = f"{launched[0]} processes were" if launched else "several processes were"
  raise UserError(
    f"{count} started, and jax does not find out where process 0 is reached{reason}. Add "
    "--coordinator HOST:PORT, the host of process 0 and a free port there"
  )


# --- The devices of all ---


def survey_devices(devices: Sequence[jax.Device]) -> list[tuple[str, str, str]]:
  """Lists every process, its host and its devices; one process has no list.

  Args:
    devices: of all processes, as `runtime.devices` finds them.

  Returns:
    A header and a row for each process.

  Raises:
    UserError: if processes have devices of different kinds or not equally many.
  """
  if processes.is_alone():
    return []
  mine = [d for d in devices if d.process_index == jax.process_index()]
  kinds = sorted({(d.platform.upper(), d.device_kind) for d in mine})
  hosts = processes.together("the devices", lambda: [socket.gethostname(), kinds, len(mine)])
  rows = [("process", "host", "devices")]
  for number, (host, found, count) in enumerate(hosts):
    words = ", ".join(p if p.lower() == k.lower() else f"{p} ({k})" for p, k in found)
    rows.append((str(number), host, f"{count} × {words}"))
  if len({(json.dumps(found), count) for _, found, count in hosts}) > 1:
    there = "; ".join(f"process {n} on {host} has {words}" for n, host, words in rows[1:9])
    raise processes.mark_told(
      UserError(
        f"the processes of a run must have equally many devices of one kind, and {there}. See what "
        "JAX_PLATFORMS, CUDA_VISIBLE_DEVICES and JAX_LOCAL_DEVICE_IDS are in each"
      )
    )
  return rows
