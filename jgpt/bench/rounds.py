"""Contenders that take turns, and peers in processes of their own.

Responsible for interleaving rounds, and for the bench's end of a peer's process (`peers.py` is the other): what is sent to
it, and what becomes of it when it fails. Imports no jax.
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
  """A peer that cannot run here; its text says why, in a few words."""


def interleave(timers: Sequence[Callable[[int], Any]], steps: Sequence[int], rounds: int) -> list[list[Any]]:
  """Lets timers take turns; a round before the first warms them up and is not counted.

  Args:
    timers: each is called with its number of steps.
    steps: of each timer in a round.
    rounds: that count.

  Returns:
    For each timer what it returned, round by round.
  """
  found = [[timer(num) for timer, num in zip(timers, steps, strict=True)] for _ in range(rounds + 1)]
  return [list(of_one) for of_one in zip(*found[1:], strict=True)]


def package_env() -> dict[str, str]:
  """The environment of this process, in which a child imports its own jgpt, without a cache of jax's own."""
  root = str(Path(__file__).resolve().parents[2])
  env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}  # "cold" is without
  return env | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


class Worker:
  """A peer in a process of its own: it builds and warms up once, then times the steps it is asked for."""

  def __init__(self, spec: dict[str, Any]):
    """Starts `python -m jgpt.bench.peers` and waits until it is warm.

    Args:
      spec: what to build, as `peers.py` reads it.

    Raises:
      UserError: if the peer's package is missing, or the process cannot be started.
      PeerUnavailableError: if it cannot run here for another reason.
    """
    self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
    self._process = subprocess.Popen(
      [sys.executable, "-m", "jgpt.bench.peers"],
      env=package_env(),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
      encoding="utf-8",
    )
    try:
      self.versions: dict[str, str] = self._ask(spec)["versions"]
    except BaseException:
      self.close()
      raise

  def __call__(self, steps: int) -> float:
    """Seconds per step of that many; raises `UserError` if the process is gone."""
    try:
      return self._ask({"steps": steps})["seconds"]
    except PeerUnavailableError as error:
      raise UserError(f"a peer stopped while it was timed: {error}") from error

  def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
    """Sends a line and reads the line that answers it."""
    try:
      self._process.stdin.write(json.dumps(request) + "\n")
      self._process.stdin.flush()
      line = self._process.stdout.readline()
    except OSError:
      line = ""
    if not line:
      raise PeerUnavailableError(f"its process ended: {self._last_words()}")
    answer = json.loads(line)
    if "user_error" in answer:
      raise UserError(answer["user_error"])
    if "unavailable" in answer:
      raise PeerUnavailableError(answer["unavailable"])
    return answer

  def _last_words(self) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(STOP_SECONDS)
    self._errors.seek(0)
    lines = self._errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else f"status {self._process.returncode}"

  def close(self) -> None:
    """Ends the process: it stops where its input ends."""
    with contextlib.suppress(OSError):
      self._process.stdin.close()
    try:
      self._process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()
    self._errors.close()


@contextlib.contextmanager
def open_workers(specs: dict[str, dict[str, Any]]) -> Iterator[dict[str, Worker | str]]:
  """Starts a process for each peer, one after the other, and ends them all at the end.

  Args:
    specs: the peers' names and what `Worker` takes.

  Yields:
    For each name its worker, or why there is none.

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
