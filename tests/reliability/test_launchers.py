"""What launchers start is one run: srun, Open MPI's mpirun, and processes told by hand.

Slurm's variables are those that srun of Slurm 22.05 sets for two tasks on one host, and those of an
interactive step (`salloc` with `use_interactive_step`); recorded. `tests/devices/test_cluster.py`
has what is read from them.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys

import children
import pytest

pytestmark = pytest.mark.slow

# One network of "bytes", divided over two processes of one device.
RUN = {"train__steps": 4, "data__batch_size": 4, "mesh__data": 1, "mesh__fsdp": 2}


def srun(task: int, job: int) -> dict[str, str]:
  """The variables of one of two tasks that decide where it stands."""
  return {
    "SLURM_JOB_ID": f"{job}",
    "SLURM_JOB_NODELIST": "localhost",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_LOCALID": f"{task}",
    "SLURM_NODEID": "0",
    "SLURM_NPROCS": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": f"{task}",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2",
  }


# The shell of `salloc -n 2` is one task of a step of its own; SLURM_NTASKS is the allocation's.
INTERACTIVE = {
  "SLURM_JOB_NAME": "interactive",
  "SLURM_STEP_ID": "4294967290",
  "SLURM_STEP_NUM_TASKS": "1",
  "SLURM_STEP_TASKS_PER_NODE": "1",
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
  """Removes what a launcher of these tests has set, and the eight virtual devices of the tests."""
  for name in list(os.environ):
    if name.startswith(("SLURM_", "OMPI_", "PMI", "JAX_COORDINATOR", "JAX_PROCESS", "JAX_NUM_P")):
      monkeypatch.delenv(name)
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def find_port(ports: range = range(20000, 30000)) -> int:
  """A free port."""
  for port in ports[os.getpid() % len(ports) :]:
    with contextlib.suppress(OSError), socket.create_server(("", port)):
      return port
  raise AssertionError("no port is free")


def check_is_one_run(folder, outputs: list[str]) -> None:
  """Process 0 prints all there is to read, and there is one run folder with every step."""
  lead, other = outputs
  assert "0        " in lead.split("\n")[1] and "1        " in lead.split("\n")[2], lead
  assert "mesh.fsdp=2" in lead and "step 4/4" in lead
  assert "step" not in other and "experiment" not in other
  assert children.steps_there(folder) == [4]


def train_two(tmp_path, env) -> list[children.Child]:
  """Trains in two processes, with the environment that `env` makes of a number."""
  arguments = children.arguments("bytes", "run", **RUN)
  with contextlib.ExitStack() as stack:
    both = [
      stack.enter_context(children.Child("jgpt.run", *arguments, cwd=tmp_path, env=env(i)))
      for i in range(2)
    ]
    for child in both:
      child.status = child.wait()
  assert [child.status for child in both] == [0, 0], [child.out + child.err for child in both]
  return both


def test_the_tasks_of_srun_are_one_run(tmp_path):
  children.write_texts(tmp_path)
  job = find_port(range(61440, 65536)) - 61440  # jax's port is 61440 + job % 4096
  both = train_two(tmp_path, lambda i: srun(i, job))
  check_is_one_run(tmp_path / "run", [child.out for child in both])


def test_told_by_jaxs_variables(tmp_path):
  children.write_texts(tmp_path)
  address = f"localhost:{find_port()}"
  told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
  both = train_two(tmp_path, lambda i: told | {"JAX_PROCESS_ID": str(i)})
  check_is_one_run(tmp_path / "run", [child.out for child in both])


def test_mpirun_starts_one_run(tmp_path):
  """Of Open MPI: version 5 no longer says where process 0 is reached, so the command does."""
  mpirun = shutil.which("mpirun")
  version = mpirun and subprocess.check_output([mpirun, "--version"], text=True)
  if not version or "Open MPI" not in version:
    pytest.skip("Open MPI's mpirun is not installed")
  children.write_texts(tmp_path)
  options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"]
  options += ["--output-filename" if "Open MPI) 4" in version else "--output", "logs"]
  arguments = children.arguments("bytes", "run", **RUN)
  if "Open MPI) 4" not in version:
    arguments += ["--coordinator", f"localhost:{find_port()}"]
  env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, children.PATHS))}
  command = [mpirun, *options, sys.executable, "-m", "jgpt.run", *arguments]
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  outputs = [
    "".join(path.read_text() for path in (tmp_path / "logs").rglob(f"*{i}/stdout"))
    for i in range(2)
  ]
  check_is_one_run(tmp_path / "run", outputs)


@pytest.mark.parametrize(
  "env",
  [
    srun(0, 7) | INTERACTIVE,
    {n: v for n, v in srun(0, 7).items() if "STEP" not in n},
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
  ],
  ids=["an interactive step", "a batch script", "mpirun of one"],
)
def test_one_process_trains_alone(env, tmp_path):
  """Within a Slurm job of two tasks, but not started by srun; and as the only one of mpirun."""
  children.write_texts(tmp_path)
  alone = RUN | {"mesh__fsdp": 1}
  child = children.train(*children.arguments("bytes", "run", **alone), cwd=tmp_path, env=env)
  assert "process" not in child.out and "step 4/4" in child.out
