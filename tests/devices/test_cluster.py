"""Joining the processes of a run: who is told, who is recognised, who is missing.

Whole runs of several processes are in `tests/reliability`, rows 30 and 31.
"""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from jgpt.devices import cluster, processes, runtime, watch
from jgpt.devices.cluster import find_member
from jgpt.devices.roll import Member, call_roll
from jgpt.errors import UserError

SLURM = {
  "SLURM_JOB_ID": "4711",
  "SLURM_STEP_NODELIST": "node[003-004],host9",
  "SLURM_NTASKS": "4",
  "SLURM_STEP_NUM_TASKS": "4",
  "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "1",
}
OPEN_MPI = {
  "OMPI_COMM_WORLD_SIZE": "2",
  "OMPI_COMM_WORLD_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
  "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
URI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
TOLD = {
  "JAX_COORDINATOR_ADDRESS": "host0:1234",
  "JAX_NUM_PROCESSES": "3",
  "JAX_PROCESS_ID": "2",
}


@pytest.fixture
def found(monkeypatch):
  """Finds the place of a process whose environment has these variables and none of a launcher's."""

  def find(env, *told):
    for name in (*SLURM, *OPEN_MPI, *URI, *TOLD):
      monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
      monkeypatch.setenv(name, value)
    return find_member(*(told or (None, None, None)), env)

  return find


def test_a_process_alone_is_told_nothing(found):
  assert found({}) is None
  batch_script = {n: SLURM[n] for n in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")}
  assert found(batch_script) is None  # srun starts the tasks
  assert found(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
  assert found(OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}) is None
  assert found(SLURM, None, 1, None) is None  # asked for


def test_options_and_variables_say_where_a_process_stands(found):
  assert found(TOLD) == Member("host0:1234", 3, 2)
  assert found({}, "[::1]:99", 2, 0) == Member("[::1]:99", 2, 0)
  assert found(TOLD, None, None, 0) == Member("host0:1234", 3, 0)  # an option comes first
  # A launcher that jax does not recognise says the rest; its processes of one host share its GPUs.
  shared = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
  assert found(shared, "host0:1234", None, None) == Member("host0:1234", 2, 1, (1,))
  assert found(shared | {"CUDA_VISIBLE_DEVICES": "3"}, "host0:1234", None, None) == Member(
    "host0:1234", 2, 1
  )


def test_launchers_are_recognised(found):
  """The addresses are those that jax derives, documented in its source."""
  assert found(SLURM) == Member(f"node003:{4711 % 4096 + 61440}", 4, 3, (1,))
  assert found(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}).local_device_ids is None
  by_mpirun = Member(f"10.96.0.1:{1531576320 // 4096 % 4096 + 61440}", 2, 1)
  assert found(OPEN_MPI | URI) == by_mpirun
  # In a job of Slurm's, its variables are those of mpirun's daemons.
  assert found(SLURM | OPEN_MPI | URI) == by_mpirun


@pytest.mark.parametrize(
  ("changed", "ids"),
  [
    ({"SLURM_STEP_TASKS_PER_NODE": "1,2", "SLURM_NODEID": "1"}, (1,)),
    ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"}, None),
    ({"SLURM_STEP_TASKS_PER_NODE": "1(x3),2", "SLURM_NODEID": "2"}, None),
    ({"SLURM_GPUS_PER_TASK": "4"}, None),  # Slurm has divided them
    ({"JAX_LOCAL_DEVICE_IDS": "0"}, None),
  ],
)
def test_tasks_of_one_host_share_its_gpus_unless_they_are_given_out(found, changed, ids):
  assert found(SLURM | changed).local_device_ids == ids


@pytest.mark.parametrize(
  ("env", "told", "words"),
  [
    ({}, ("host:1", None, 0), "Add --num-processes .or JAX_NUM_PROCESSES"),
    ({}, (None, 2, 0), "Add --coordinator"),
    ({"JAX_PROCESS_ID": "1"}, (None, None, None), "--coordinator and --num-processes"),
    ({"JAX_PROCESS_ID": "one"}, ("h:1", 2, None), "JAX_PROCESS_ID='one' must be a whole number"),
    ({}, ("host:1", 2, 2), "ids are 0 to 1"),
    ({}, ("host:1", 2, -1), "ids are 0 to 1"),
    ({}, ("host", 2, 1), "must be HOST:PORT"),
    ({}, ("host:http", 2, 1), "must be HOST:PORT"),
    (OPEN_MPI, (None, None, None), "2 processes were started.*Add --coordinator HOST:PORT"),
  ],
)
def test_what_is_incomplete_is_an_error(found, env, told, words):
  with pytest.raises(UserError, match=words):
    found(env, *told)


# --- The roll ---


def find_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def call_all(places, timeout):
  """Calls the roll in a thread for each place; returns what each raised, or None."""

  def call(place):
    try:
      call_roll(place, timeout)
    except UserError as error:
      return str(error)

  with ThreadPoolExecutor(len(places)) as pool:
    return list(pool.map(call, places))


@pytest.mark.parametrize("late", [None, 0, 2])
def test_the_roll_waits_for_all(late):
  """Whoever is last, process 0 too; other programs that connect, or say nothing, are nobody."""
  address = f"127.0.0.1:{find_port()}"
  places = [Member(address, 4, i) for i in range(4)]

  def call(place):
    if place.process_id == late:
      time.sleep(0.4)
    call_roll(place, 5)
    return time.monotonic()

  wrong = {"process": 7, "num_processes": 4, "host": "nowhere"}
  strays = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"",
    b"{",
    b"[" * 4000 + b"\n",
    json.dumps(wrong).encode() + b"\n",
  ]
  began = time.monotonic()
  with contextlib.ExitStack() as stack, ThreadPoolExecutor(4 + len(strays)) as pool:
    talking = [pool.submit(talk, address, words, stack) for words in strays]
    ended = pool.map(call, places)
    assert max(ended) - began < 3
    for stray in talking:
      stray.result()


def talk(address, words, stack):
  """Connects, says so much, and goes on holding the connection."""
  host, port = address.split(":")
  for _ in range(50):
    try:
      peer = stack.enter_context(socket.create_connection((host, int(port)), timeout=1))
      peer.sendall(words)
      return
    except OSError:
      time.sleep(0.01)


def test_who_is_missing_is_named_to_all_that_came():
  address = f"127.0.0.1:{find_port()}"
  errors = call_all([Member(address, 5, i) for i in (0, 1, 3)], 0.6)
  assert len(set(errors)) == 1
  assert errors[0].startswith(f"processes 2, 4 of 5 did not join within 0.6 s at {address}")


def test_without_process_0_the_others_say_so():
  address = f"127.0.0.1:{find_port()}"
  (error,) = call_all([Member(address, 2, 1)], 0.3)
  assert f"did not reach process 0 at {address} within 0.3 s: Connection refused" in error


@pytest.mark.parametrize(
  ("third", "words"),
  [((3, 1), "two processes have --process-id=1"), ((4, 2), "says --num-processes=4")],
)
def test_processes_that_contradict_each_other(third, words):
  address = f"127.0.0.1:{find_port()}"
  errors = call_all([Member(address, 3, 0), Member(address, 3, 1), Member(address, *third)], 5)
  assert len(set(errors)) == 1 and words in errors[0]


def test_a_port_in_use():
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(UserError, match=r"cannot listen.*Choose another port"):
      call_roll(Member(address, 2, 0), 5)


# --- A process alone ---


def test_alone_every_exchange_is_a_call():
  assert processes.is_alone() and processes.is_lead()
  assert processes.on_lead("it", lambda: 3) == 3 and processes.decide("it", 4) == 4
  assert processes.together("it", lambda: 5) == [5] and processes.lead_first("it", lambda: 6) == 6
  assert processes.wait("it", lambda: 7, jax.numpy.zeros(2)) == 7
  assert cluster.survey_devices(jax.devices()) == []
  threads = threading.active_count()
  with watch.watching():
    assert threading.active_count() == threads
  with pytest.raises(ZeroDivisionError), watch.watching():
    processes.on_lead("it", lambda: 1 / 0)


# --- Accelerators ---


def test_an_accelerator_that_jax_does_not_find_is_an_error(tmp_path):
  assert runtime.find_accelerator_files({}, tmp_path) is None
  (tmp_path / "dev").mkdir()
  # What a container without GPUs has of its host's.
  (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
  (tmp_path / "dev" / "nvidiactl").touch()
  assert runtime.find_accelerator_files({}, tmp_path) is None
  (tmp_path / "dev" / "nvidia3").touch()
  assert runtime.find_accelerator_files({}, tmp_path) == "cuda12"
  assert runtime.find_accelerator_files({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) is None
  (tmp_path / "dev" / "nvidia3").unlink()
  (tmp_path / "dev" / "accel0").touch()
  assert runtime.find_accelerator_files({}, tmp_path) == "tpu"
  with pytest.raises(UserError, match=r"a TPU, and jax finds the CPU only.*pip install 'jgpt\[tpu"):
    runtime.check_no_fallback({"cpu"}, None, "tpu")
  for platforms, asked, there in (
    ({"tpu"}, None, "tpu"),
    ({"cpu"}, "cpu", "cuda12"),
    ({"cpu"}, "", None),
  ):
    runtime.check_no_fallback(platforms, asked, there)
