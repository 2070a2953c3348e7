"""Commands as real processes, and what their run folders hold, bit by bit.

Not responsible for what goes wrong in them: that is `faults.py`, which runs inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import small_runs
import tensorstore

import jgpt

HERE = Path(__file__).parent
PATHS = (Path(jgpt.__file__).parent.parent, HERE, HERE.parent)
VERSE = "To be, or not to be – that is the question:\n\tWhether ’tis nobler in the mind\n" * 15

# As in `experiments/`, but small enough that a run takes two seconds. `text` stands for a file of
# the test.
STREAM = {
  "data.path": "verse.txt",
  "data.seq_len": 16,
  "data.batch_size": 4,
  "model.max_seq_len": 20,
  "model.num_layers": 2,
  "model.d_model": 16,
  "model.d_ff": 32,
  "optimizer.warmup_steps": 5,
  "train.eval_every": None,
  "mesh.data": 1,
  "sample.max_tokens": 5,
  "sample.prompt": "To",
}
DOCUMENTS = {
  "data.path": "words.txt",
  "data.heldout_fraction": 0.2,
  "train.eval_every": None,
  "sample.num": 3,
}
EXPERIMENTS = {
  "names": ("names", DOCUMENTS),
  "microgpt": ("microgpt", {"data.path": "words.txt", "sample.num": 3}),
  "bytes": ("shakespeare_bytes", STREAM | {"optimizer.clip_norm": 0.5, "optimizer.peak_lr": 0.01}),
  "bpe": ("shakespeare_bpe", STREAM | {"data.bpe_vocab_size": 270, "data.seq_len": 8}),
  "epochs": ("shakespeare_bytes", STREAM | {"data.batching": "epochs"}),
  "shards": ("shakespeare_bytes", STREAM | {"data.path": "shards", "data.heldout_fraction": 0}),
}


def arguments(name: str, workdir: Path | str, **changes: object) -> list[str]:
  """The arguments of `run` for one of `EXPERIMENTS`, in `workdir`.

  "__" in a name of `changes` stands for a dot.
  """
  experiment, settings = EXPERIMENTS[name]
  settings = settings | {key.replace("__", "."): value for key, value in changes.items()}
  words = [f"{key}={'none' if value is None else value}" for key, value in settings.items()]
  return [
    "--experiment",
    experiment,
    "--workdir",
    str(workdir),
    *(w for word in words for w in ("--set", word)),
  ]


def write_texts(folder: Path) -> None:
  """Writes what `EXPERIMENTS` train on."""
  words = [f"{a}{b}{c}\n" for a in "abcd" for b in "xyzw" for c in ("", "e", "rst", "rstu")]
  (folder / "words.txt").write_text("".join(words), encoding="utf-8")
  (folder / "verse.txt").write_text(VERSE, encoding="utf-8")
  (folder / "shards").mkdir()
  header = np.zeros(256, "<i4")
  tokens = np.frombuffer((VERSE * 2).encode(), np.uint8).astype("<u2")
  header[:3] = 20240520, 1, len(tokens)  # llm.c's
  (folder / "shards" / "train.bin").write_bytes(header.tobytes() + tokens.tobytes())


class Child:
  """A command in a process of its own; leaving the context kills it where it still runs."""

  def __init__(
    self,
    module: str,
    *args: object,
    cwd: Path,
    fault: str | None = None,
    folder: Path | str = "run",
    env: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
    **options: object,
  ):
    """Starts it.

    Args:
      module: for example "jgpt.run".
      args: the command's.
      cwd: where it runs.
      fault: JGPT_FAULT, see `faults.py`.
      folder: the run folder, where `fault` is to happen.
      env: set besides this process's own.
      prepare: called in the child before the command.
      options: of `subprocess.Popen`.
    """
    self.logs = cwd / ".logs"
    self.logs.mkdir(exist_ok=True)
    number = len(list(self.logs.glob("*.out")))
    self._out, self._err, self.mark = (
      self.logs / f"{number}.{kind}" for kind in ("out", "err", "mark")
    )
    paths = {"PYTHONPATH": os.pathsep.join(map(str, PATHS)), "PYTHONUNBUFFERED": "1"}
    env = os.environ | paths | (env or {})
    command = [sys.executable, "-m", module, *map(str, args)]
    if fault is not None:
      command[2:2] = ["faults"]
      env |= {
        "JGPT_FAULT": fault,
        "JGPT_FAULT_MARK": str(self.mark),
        "JGPT_FAULT_FOLDER": str(cwd / folder),
      }
    self.began = time.monotonic()
    with open(self._out, "wb") as out, open(self._err, "wb") as err:
      self.process = subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdout=out,
        stderr=err,
        stdin=subprocess.DEVNULL,
        preexec_fn=prepare,
        **options,
      )

  def __enter__(self) -> Child:
    return self

  def __exit__(self, *error: object) -> None:
    if self.process.poll() is None:
      self.process.kill()
      self.process.wait()

  @property
  def out(self) -> str:
    return self._out.read_text(encoding="utf-8", errors="replace")

  @property
  def err(self) -> str:
    return self._err.read_text(encoding="utf-8", errors="replace")

  @property
  def fired(self) -> list[str]:
    """What faults have happened."""
    return self.mark.read_text(encoding="utf-8").splitlines() if self.mark.exists() else []

  def wait(self, timeout: float = 200) -> int:
    """Waits for the end.

    Returns the exit status, 128 + n for a process that was ended by signal n.
    """
    status = self.process.wait(timeout)
    self.seconds = time.monotonic() - self.began
    return status if status >= 0 else 128 - status

  def wait_until(self, condition: Callable[[], object], timeout: float = 200) -> None:
    """Waits until something is so; fails where the process ends before."""
    end = time.monotonic() + timeout
    while not condition():
      over = self.process.poll() is not None
      if (over and not condition()) or time.monotonic() > end:
        raise AssertionError(f"status {self.process.poll()}\n{self.out}\n{self.err}")
      time.sleep(0.005)

  def send(self, number: int) -> float:
    """Sends a signal; returns when."""
    self.process.send_signal(number)
    return time.monotonic()

  def at_each_stop(self, visit: Callable[[str], None]) -> int:
    """Calls `visit` with the mark each time the process has stopped itself, until it ends.

    Returns its status.
    """
    while True:
      _, status = os.waitpid(self.process.pid, os.WUNTRACED)
      if not os.WIFSTOPPED(status):
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return self.process.returncode
      visit(self.fired[-1])
      self.process.send_signal(signal.SIGCONT)


def find_port() -> int:
  """A free port of this machine."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def start_processes(
  stack: contextlib.ExitStack,
  *args: object,
  cwd: Path,
  faults: dict[int, str] | None = None,
  more: dict[int, list[str]] | None = None,
  num: int = 2,
  num_devices: int = 1,
  **options: object,
) -> list[Child]:
  """Starts the processes of one run of `jgpt.run`, which are killed when the stack closes.

  Args:
    stack: ends them.
    args: the command's.
    cwd: where they run.
    faults: by process, as for `Child`.
    more: arguments by process.
    num: processes.
    num_devices: of each.
    options: of `Child`.
  """
  told = ["--coordinator", f"127.0.0.1:{find_port()}", "--num-processes", num]
  flags = f"--xla_force_host_platform_device_count={num_devices}"
  env = {"XLA_FLAGS": flags} | options.pop("env", {})
  found = []
  for i in range(num):
    here = [*told, "--process-id", i, *args, *(more or {}).get(i, [])]
    fault = (faults or {}).get(i)
    found.append(
      stack.enter_context(Child("jgpt.run", *here, cwd=cwd, fault=fault, env=env, **options))
    )
  return found


def run(module: str, *args: object, cwd: Path, timeout: float = 200, **options: object) -> Child:
  """Runs a command to its end; `status` is its exit status."""
  with Child(module, *args, cwd=cwd, **options) as child:
    child.status = child.wait(timeout)
  return child


def train(*args: object, cwd: Path, **options: object) -> Child:
  """Runs `jgpt.run`, which must succeed."""
  child = run("jgpt.run", *args, cwd=cwd, **options)
  assert child.status == 0, child.out + child.err
  return child


# --- What a run folder holds ---


def steps_there(workdir: Path) -> list[int]:
  """The steps that have a manifest, ascending: by this file's own rule, not jgpt's."""
  return sorted(
    int(p.parent.name)
    for p in workdir.glob("checkpoints/*/manifest.json")
    if p.parent.name.isdigit()
  )


def read_leaves(
  folder: Path, items: tuple[str, ...] = ("params", "train_state")
) -> dict[str, np.ndarray]:
  """Reads every array of a step's folder, by name; with tensorstore alone."""
  leaves = {}
  for item in items:
    store = {"driver": "ocdbt", "base": f"file://{folder.resolve()}/{item}/"}
    keys = tensorstore.KvStore.open(store).result().list().result()
    for key in keys:
      name = key.decode().removesuffix("/.zarray")
      if name != key.decode():
        array = tensorstore.open(
          {"driver": "zarr", "kvstore": store | {"path": f"{name}/"}}
        ).result()
        leaves[f"{item}/{name}"] = array.read().result()
  assert len(leaves) >= len(items), folder
  return leaves


@dataclasses.dataclass(frozen=True)
class Bits:
  """What must not depend on how often a run was interrupted.

  Attributes:
    step: the newest.
    leaves: name -> dtype, shape and bytes, of parameters and moments.
    digests: those that the manifest records.
    metrics: of metrics.jsonl, but for the rows of time.
    samples: name -> content.
  """

  step: int
  leaves: dict[str, tuple[str, tuple[int, ...], bytes]]
  digests: dict
  metrics: bytes
  samples: dict[str, bytes]


def bits(workdir: Path) -> Bits:
  """Reads a run folder's newest step, its log and its samples."""
  step = steps_there(workdir)[-1]
  folder = workdir / "checkpoints" / str(step)
  leaves = {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in read_leaves(folder).items()}
  return Bits(
    step,
    leaves,
    json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["leaves"],
    small_runs.drop_times((workdir / "metrics.jsonl").read_bytes()),
    {p.name: p.read_bytes() for p in sorted(workdir.glob("samples/*"))},
  )


def assert_same(got: Bits, expected: Bits) -> None:
  """Fails naming what differs, first of all the leaves."""
  assert got.step == expected.step
  assert got.leaves.keys() == expected.leaves.keys()
  assert [name for name in got.leaves if got.leaves[name] != expected.leaves[name]] == []
  assert got.digests == expected.digests
  assert got.metrics.splitlines() == expected.metrics.splitlines()
  assert got == expected


def describe(workdir: Path) -> str:
  """One line: steps, what is half done, rows of the log."""
  folder = workdir / "checkpoints"
  names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
  whole = steps_there(workdir)
  part = [name for name in names if name not in map(str, whole)]
  log = workdir / "metrics.jsonl"
  tail = (
    (log.read_bytes()[-300:].splitlines() or [b""])[-1].decode(errors="replace")
    if log.exists()
    else "no log"
  )
  row = re.match(r'{"step": (\d+)', tail)
  end, torn = row.group(1) if row else repr(tail), "" if tail.endswith("}") else " (torn)"
  return f"steps {whole}, partial {part}, log to row {end}{torn}"


def nothing_half_done(workdir: Path) -> list[str]:
  """What a run that ended well must not leave: temporary files, step folders without manifest."""
  left = [p for p in workdir.rglob("*") if "tmp" in p.name]
  left += [p for p in (workdir / "checkpoints").iterdir() if not (p / "manifest.json").exists()]
  return [str(p.relative_to(workdir)) for p in left]


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[None]:
  """Mounts a disk of that size on a folder; raises `PermissionError` where this process may not."""
  size = f"size={int(megabytes * 2**20)}"
  mount = shutil.which("mount")
  if (
    mount is None
    or subprocess.run(
      [mount, "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True
    ).returncode
  ):
    raise PermissionError("this process may not mount a disk")
  try:
    yield
  finally:
    subprocess.run(["umount", "-l", folder], check=True)
