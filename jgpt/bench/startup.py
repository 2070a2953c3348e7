"""The time of a whole command, by parts: `run` in a new process, from its start to its end.

`split_command` starts the process, which is `python -m jgpt.bench.startup`: it calls `run` with
timers around its functions. At every moment one part is counted, so that they add up:

  import   from the start of the process until every module is imported
  plan     finding the text, tokenizing it, resolving settings, initializing the devices
  compile  drawing the state, compiling the step, evaluation and sampling
  train    the steps, and the evaluation at their end
  save     making the checkpoint's folder, saving, waiting until it is on disk
  sample   drawing texts
  other    the rest: reading arguments, printing, the curve
  exit     from the end of `run` to the end of the process

The case that calls this is in `cases.py`.
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
from jgpt.bench.rounds import make_child_env

STARTUP_PARTS = ("import", "plan", "compile", "train", "save", "sample", "other", "exit")


def time_command(args: Sequence[str], env: dict[str, str]) -> float:
  """Times `python -m jgpt.run` with these arguments, in seconds.

  Args:
    args: of the command.
    env: variables set in addition.
  """
  began = time.time()
  _run([sys.executable, "-m", "jgpt.run", *args], env)
  return time.time() - began


def split_command(args: Sequence[str], env: dict[str, str]) -> dict[str, float]:
  """Times each of `STARTUP_PARTS` of a run in a new process, in seconds.

  Args:
    args: of `run`.
    env: variables set in addition.
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
    command,
    env=make_child_env() | env,
    capture_output=True,
    encoding="utf-8",
    errors="replace",
    check=False,
  )
  if done.returncode:
    raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")


class Recorder:
  """A timer of nested parts; time counts for the innermost one."""

  def __init__(self, began: float, part: str):
    """Begins with a part at the time `began`, as `time.time` returns it."""
    self.seconds = dict.fromkeys(STARTUP_PARTS, 0.0)
    self._parts, self._last = [part], began

  def lap(self) -> float:
    """Adds the time since the last lap to the current part, and returns the present time."""
    now = time.time()
    self.seconds[self._parts[-1]] += now - self._last
    self._last = now
    return now

  def switch(self, part: str) -> None:
    """Replaces the outermost part by another."""
    self.lap()
    self._parts[0] = part

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Counts the time in the context for a part."""
    self.lap()
    self._parts.append(name)
    try:
      yield
    finally:
      self.lap()
      self._parts.pop()

  def wrap(self, owner: Any, function: str, part: str) -> None:
    """Replaces a function of a module by one whose time counts for a part."""
    inner = getattr(owner, function)

    @functools.wraps(inner)
    def counted(*args: Any, **kwargs: Any) -> Any:
      with self.part(part):
        return inner(*args, **kwargs)

    setattr(owner, function, counted)

  def wrap_context(self, owner: Any, function: str, part: str) -> None:
    """Replaces a context manager: entering and leaving count for a part, its body does not."""
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
  """Runs `run` and writes seconds by part, and the time at the end, as JSON.

  Args:
    argv: time at which the process was started, path of the JSON, arguments of `run`.
  """
  began, report, *args = argv
  recorder = Recorder(float(began), "import")
  names = ("run", "plan", "train", "generate", "report.summary", "runs.checkpoint")
  modules = (importlib.import_module(f"jgpt.{name}") for name in names)
  run, plan, train, generate, summary, checkpoint = modules
  recorder.switch("other")
  recorder.wrap(plan, "plan_run", "plan")
  recorder.wrap(summary, "describe_plan", "plan")
  recorder.wrap(train, "train_run", "train")
  recorder.wrap(train, "compile_program", "compile")
  recorder.wrap(checkpoint, "save_checkpoint", "save")
  recorder.wrap_context(checkpoint, "open_checkpoints", "save")
  recorder.wrap(generate, "sample_texts", "sample")
  status = run.main(args)
  sys.stdout.flush()
  finished = recorder.lap()
  Path(report).write_text(json.dumps([recorder.seconds, finished]), encoding="utf-8")
  return status


if __name__ == "__main__":
  sys.exit(cli.guard(lambda: main(sys.argv[1:])))
