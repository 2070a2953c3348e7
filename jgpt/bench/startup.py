"""Where the time of a whole command goes: `run`, timed in a fresh process from its start to its end.

Responsible for starting such processes, and (as `python -m jgpt.bench.startup`) for being one: it calls `run` with clocks
around the functions that a run consists of. The parts add up to the whole, because at every moment one of them is counted:

  import   from the process's start until every module is imported
  plan     finding the text, tokenizing it, resolving settings, the first look at the devices
  compile  drawing the state, compiling step, evaluation and sampling
  train    the steps, and the evaluation at their end
  save     making the checkpoint's folder, saving, waiting until it is on the disk
  sample   drawing texts
  other    the rest: reading arguments, printing, the curve
  exit     from the end of `run` until the process is gone

Not responsible for what is done with the seconds (`bench.py`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jgpt import cli
from jgpt.bench.rounds import package_env

STARTUP_PARTS = ("import", "plan", "compile", "train", "save", "sample", "other", "exit")


def time_command(args: Sequence[str], env: dict[str, str]) -> float:
  """Seconds of `python -m jgpt.run` with these arguments, from start to end.

  Args:
    args: the command's.
    env: set besides this process's own.
  """
  began = time.time()
  _run([sys.executable, "-m", "jgpt.run", *args], env)
  return time.time() - began


def split_command(args: Sequence[str], env: dict[str, str]) -> dict[str, float]:
  """Seconds of each of `PARTS` of a run in a fresh process; they add up to the whole.

  Args:
    args: of `run`.
    env: set besides this process's own.
  """
  with tempfile.TemporaryDirectory() as folder:
    report = Path(folder) / "report.json"
    began = time.time()
    _run([sys.executable, "-m", "jgpt.bench.startup", repr(began), str(report), *args], env)
    ended = time.time()
    parts, finished = json.loads(report.read_text(encoding="utf-8"))
  parts["exit"] = ended - finished
  return {name: parts[name] for name in STARTUP_PARTS}


def _run(command: list[str], env: dict[str, str]) -> None:
  done = subprocess.run(
    command, env=package_env() | env, capture_output=True, encoding="utf-8", errors="replace", check=False
  )
  if done.returncode:
    raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")


class Recorder:
  """Counts each moment for one part: the innermost one that is going on."""

  def __init__(self, began: float, part: str):
    """Begins at `began` (seconds as `time.time` counts them) with a part."""
    self.seconds = dict.fromkeys(STARTUP_PARTS, 0.0)
    self._parts, self._last = [part], began

  def lap(self) -> float:
    """Counts what has passed since the last lap for the part that is going on; returns the time."""
    now = time.time()
    self.seconds[self._parts[-1]] += now - self._last
    self._last = now
    return now

  def switch(self, part: str) -> None:
    """Ends the outermost part and goes on with another."""
    self.lap()
    self._parts[0] = part

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Counts what happens inside for a part."""
    self.lap()
    self._parts.append(name)
    try:
      yield
    finally:
      self.lap()
      self._parts.pop()

  def wrap(self, owner: Any, function: str, part: str) -> None:
    """Replaces a module's function with one that is counted."""
    inner = getattr(owner, function)

    @functools.wraps(inner)
    def counted(*args: Any, **kwargs: Any) -> Any:
      with self.part(part):
        return inner(*args, **kwargs)

    setattr(owner, function, counted)

  def wrap_context(self, owner: Any, function: str, part: str) -> None:
    """Like `wrap` for a context manager: entering and leaving are counted, and not what happens inside."""
    inner: Callable[..., contextlib.AbstractContextManager] = getattr(owner, function)

    @contextlib.contextmanager
    def counted(*args: Any, **kwargs: Any) -> Iterator[Any]:
      with contextlib.ExitStack() as stack:
        with self.part(part):
          value = stack.enter_context(inner(*args, **kwargs))
        yield value
        with self.part(part):
          stack.close()

    setattr(owner, function, counted)


def main(argv: list[str]) -> int:
  """Runs `run` and writes [seconds by part, time at the end] as JSON.

  Args:
    argv: when the process was started, where to write, and the arguments of `run`.
  """
  began, report, *args = argv
  recorder = Recorder(float(began), "import")
  names = ("run", "plan", "train", "report.summary", "runs.checkpoint")
  run, plan, train, summary, checkpoint = (importlib.import_module(f"jgpt.{name}") for name in names)
  recorder.switch("other")
  recorder.wrap(plan, "plan_run", "plan")
  recorder.wrap(summary, "describe_plan", "plan")
  recorder.wrap(train, "train_run", "train")
  recorder.wrap(train, "compile_program", "compile")
  recorder.wrap(train, "save", "save")
  recorder.wrap_context(checkpoint, "open_checkpoints", "save")
  recorder.wrap(train, "sample_texts", "sample")
  status = run.main(args)
  sys.stdout.flush()
  finished = recorder.lap()
  Path(report).write_text(json.dumps([recorder.seconds, finished]), encoding="utf-8")
  return status


if __name__ == "__main__":
  sys.exit(cli.guard(lambda: main(sys.argv[1:])))
