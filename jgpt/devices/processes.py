"""Agreement between the processes of one run: values, errors and deadlines.

Each process of a run on several hosts computes the same program on devices of its own. What one
process alone can know or do (a clock, a signal, the disk, a message to the user) is decided in
process 0, the lead, and told to the others through JAX's coordination service, which needs no
device. In a run of one process every function here calls what it is given and returns.

Starting the processes is in `cluster.py`.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jgpt.errors import TrainingError, UserError

# Names of the exchanges so far, by thread: every process makes the same ones in the same order.
_numbers: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)
_seconds = [600.0]  # `mesh.timeout_seconds` of the run


def set_timeout(seconds: float) -> None:
  """Sets how long this process waits for another one."""
  _seconds[0] = seconds


def is_alone() -> bool:
  """Returns whether this is the only process of the run."""
  return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_lead() -> bool:
  """Returns whether this process decides, prints and writes what only one process may."""
  return is_alone() or jax.process_index() == 0


def on_lead(what: str, function: Callable[[], Any], *, thread: str = "main") -> Any:
  """Calls a function in the lead alone; returns its value, or raises its error, in every process.

  Args:
    what: is waited for, for the message of a process that waits in vain: "the run folder".
    function: returns what JSON can hold; a `UserError` that it raises is raised everywhere.
    thread: names the thread that this is called in; the exchanges of each have an order of its own.

  Raises:
    UserError: of the function.
    TrainingError: of the function, or if the lead does not answer in time.
  """
  if is_alone():
    return function()
  key = f"jgpt/{thread}/{next(_numbers[thread])}/0"
  if not is_lead():
    return _open(_read(key, 0, what))
  with _posting(key) as post:
    value = function()
    post(value)
  return value


def decide(what: str, value: Any) -> Any:
  """Returns the lead's value in every process; the values of the others are not used."""
  return on_lead(what, lambda: value)


def together(what: str, function: Callable[[], Any], *, thread: str = "main") -> list[Any]:
  """Calls a function in every process, and returns the values of all, by process.

  No process goes on before all are done. Where it fails in one it fails in all.

  Args:
    what: is waited for: "the data of process".
    function: returns what JSON can hold.
    thread: as for `on_lead`.

  Raises:
    UserError: of the function, in whichever process; the first one's.
    TrainingError: of the function, or if a process does not answer in time.
  """
  if is_alone():
    return [function()]
  key = f"jgpt/{thread}/{next(_numbers[thread])}"
  with _posting(f"{key}/{jax.process_index()}") as post:
    post(function())
  return [_open(_read(f"{key}/{i}", i, what)) for i in range(jax.process_count())]


def _client() -> Any:
  """Returns the client of JAX's coordination service, which jax itself keeps private."""
  from orbax.checkpoint import multihost

  return multihost.get_jax_distributed_client()


@contextlib.contextmanager
def _posting(key: str) -> Iterator[Callable[[Any], None]]:
  """Yields what posts a value under a key; an error is posted in its place, and raised."""

  def post(value: Any) -> None:
    _client().key_value_set(key, json.dumps({"value": value}))

  try:
    yield post
  except UserError as error:
    kind = "training" if isinstance(error, TrainingError) else "user"
    _client().key_value_set(key, json.dumps({"error": str(error), "kind": kind}))
    raise


def _read(key: str, process: int, what: str) -> dict[str, Any]:
  """Waits for what a process posts.

  Raises:
    TrainingError: if it does not come in time.
  """
  try:
    return json.loads(_client().blocking_key_value_get(key, int(1000 * _seconds[0])))
  except jax.errors.JaxRuntimeError as error:
    raise TrainingError(
      f"process {jax.process_index()} waited {_seconds[0]:g} s for {what} of process {process}"
    ) from error


def _open(message: dict[str, Any]) -> Any:
  """Returns the value of a message, or raises its error."""
  if "error" in message:
    raise (TrainingError if message["kind"] == "training" else UserError)(message["error"])
  return message["value"]
