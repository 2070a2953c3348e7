"""Rounds in which contenders take turns, and the parent's side of a contender's process.

The process itself is in `peers.py`, and in `scaling.py`. Imports no jax.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jgpt.errors import UserError

STOP_SECONDS = 10


class PeerUnavailableError(Exception):
  """An error of a peer that cannot run here; its text gives the reason in a few words."""


def interleave(
  timers: Sequence[Callable[[int], Any]], steps: Sequence[int], rounds: int
) -> list[list[Any]]:
  """Calls timers in turn, after one round that warms up and is not counted.

  Args:
    timers: functions of a number of steps.
    steps: of each timer in a round.
    rounds: that are counted.

  Returns:
    For each timer the values it returned, one a round.
  """
  found = [
    [timer(num) for timer, num in zip(timers, steps, strict=True)] for _ in range(rounds + 1)
  ]
  return [list(of_one) for of_one in zip(*found[1:], strict=True)]


def make_child_env() -> dict[str, str]:
  """Makes the environment of a child process that imports this jgpt and has no jax cache set."""
  root = str(Path(__file__).resolve().parents[2])
  env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
  return env | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


class Worker:
  """A contender in a process of its own, built and warmed up once; calling it times steps.

  Attributes:
    process: in which it runs.
    about: what it said of itself when it was warmed up.
  """

  def __init__(self, spec: dict[str, Any], module: str = "jgpt.bench.peers"):
    """Starts a process and waits until what it runs is warmed up.

    Args:
      spec: what to build, as described in the module.
      module: that is run: it speaks the protocol of `peers.py`.

    Raises:
      UserError: if the peer has no such model.
      PeerUnavailableError: if it cannot run here.
    """
    self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
    self.process = subprocess.Popen(
      [sys.executable, "-m", module],
      env=make_child_env(),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
      encoding="utf-8",
    )
    try:
      self.about: dict[str, Any] = self._ask(spec)
    except BaseException:
      self.close()
      raise

  def __call__(self, steps: int) -> float:
    """Runs that many steps and returns the seconds of one.

    Raises:
      UserError: if the process has ended.
    """
    try:
      return self._ask({"steps": steps})["seconds"]
    except PeerUnavailableError as error:
      raise UserError(f"a peer stopped while it was timed: {error}") from error

  def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
    """Sends a line, and returns the answer."""
    try:
      self.process.stdin.write(json.dumps(request) + "\n")
      self.process.stdin.flush()
      line = self.process.stdout.readline()
    except OSError:
      line = ""
    if not line:
      raise PeerUnavailableError(f"its process ended: {self._describe_end()}")
    answer = json.loads(line)
    if "user_error" in answer:
      raise UserError(answer["user_error"])
    if "unavailable" in answer:
      raise PeerUnavailableError(answer["unavailable"])
    return answer

  def _describe_end(self) -> str:
    """Returns the last line on standard error, or the exit status."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.process.wait(STOP_SECONDS)
    self._errors.seek(0)
    lines = self._errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else f"status {self.process.returncode}"

  def close(self) -> None:
    """Closes the input of the process, which ends it, and kills it if it goes on."""
    with contextlib.suppress(OSError):
      self.process.stdin.close()
    try:
      self.process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
    self.process.stdout.close()
    self._errors.close()


@contextlib.contextmanager
def open_workers(specs: dict[str, dict[str, Any]]) -> Iterator[dict[str, Worker | str]]:
  """Starts a process for each peer, one after the other, and ends them at the end.

  Args:
    specs: for each peer's name what to build.

  Yields:
    For each name its worker, or the reason why it cannot run here.

  Raises:
    UserError: as `Worker` does.
  """
  with contextlib.ExitStack() as stack:
    found: dict[str, Worker | str] = {}
    for name, spec in specs.items():
      try:
        found[name] = Worker(spec)
        stack.callback(found[name].close)
      except PeerUnavailableError as error:
        found[name] = str(error)
    yield found
