"""Agreement between the processes of one run: values, errors and waiting.

Each process of a run on several hosts computes the same program on devices of its own. What one
process alone can know or do (a clock, a signal, the disk, a message to the user) is decided in
process 0, the lead, and told to the others through JAX's coordination service, which needs no
device. In a run of one process every function here calls what it is given and returns.

Every process counts its exchanges and waits, which are the same ones in all of them. What befalls
another process, and what is told of the counts, is in `watch.py`; starting the processes is in
`cluster.py`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

from jgpt.errors import TrainingError, UserError

MAIN, MAKING = "main", "making"
PATIENCE = 6  # times the timeout are waited for in threads that save


class Watch(Protocol):
  """What is known of the other processes while they are watched (`watch.py`).

  Attributes:
    others: by process, what it said last.
    thread: the one that watches.
  """

  others: dict[int, dict[str, Any]]
  thread: int

  def check(self) -> None:
    """Checks that no other process has failed."""


@dataclasses.dataclass
class Here:
  """What this process tells of itself.

  Attributes:
    seconds: `mesh.timeout_seconds` of the run.
    prefix: of the keys of this watch, which no later one in the same processes has.
    number: exchanges and waits of the main thread so far; every process makes the same ones in the
      same order.
    numbers: exchanges so far, by thread.
    what: it is doing, or waits for.
    since: when that began, by this process's clock.
    is_waiting: whether it waits for others.
    is_busy: whether it may take as long as it likes, as a compiler does.
    watch: the one that is open.
  """

  seconds: float = 600.0
  prefix: str = "jgpt/0"
  number: int = 0
  numbers: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  what: str = "starting"
  since: float = 0.0
  is_waiting: bool = False
  is_busy: bool = False
  watch: Watch | None = None

  def begin(self, what: str, *, is_waiting: bool = False, thread: str = MAIN) -> None:
    """Records what the main thread begins; what other threads begin is not told."""
    if thread == MAIN:
      self.what, self.since, self.is_waiting = what, time.monotonic(), is_waiting

  def make_key(self, thread: str = MAIN) -> str:
    """Makes the key of the next exchange of a thread."""
    self.number += thread == MAIN
    self.numbers[thread] += 1
    return f"{self.prefix}/{thread}/{self.numbers[thread]}"

  def begin_anew(self, run: int) -> None:
    """Begins to count again, under other keys: what was told so far is not read again."""
    self.prefix, self.number, self.watch = f"jgpt/{run}", 0, None
    self.numbers = collections.Counter()
    self.begin("between two runs")


here = Here()  # as much belongs to the process as `jax.distributed` does


def set_timeout(seconds: float) -> None:
  """Sets how long this process waits for another one."""
  here.seconds = seconds


def is_alone() -> bool:
  """Returns whether this is the only process of the run; initializes no device."""
  return not jax.distributed.is_initialized() or jax_state().num_processes == 1


def is_lead() -> bool:
  """Returns whether this process decides, prints and writes what only one process may."""
  return is_alone() or jax_state().process_id == 0


def jax_state() -> Any:
  """Returns jax's numbers of processes, which `jax.process_index` gives only with a device."""
  from jax._src import distributed

  return distributed.global_state


def get_client() -> Any:
  """Returns the client of JAX's coordination service, which jax itself keeps private."""
  return jax_state().client


# --- Exchanges ---


def on_lead(what: str, function: Callable[[], Any], *, thread: str = MAIN) -> Any:
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
  key = f"{here.make_key(thread)}/0"
  if not is_lead():
    return _open(_read(key, 0, what, thread))
  with _posting(key, what, thread) as post:
    value = function()
    post(value)
  return value


def decide(what: str, value: Any) -> Any:
  """Returns the lead's value in every process; the values of the others are not used."""
  return on_lead(what, lambda: value)


def lead_first(what: str, function: Callable[[], Any]) -> Any:
  """Calls a function in every process, in the others once the lead's call has returned.

  So a file that the lead has downloaded is there for those that share its disk.

  Args:
    what: is waited for.
    function: may return anything, and take as long as it likes.

  Raises:
    UserError: of the function.
  """
  if is_alone():
    return function()
  made = []
  with busy(what):
    on_lead(what, lambda: made.append(function()))
    return made[0] if made else function()


def together(what: str, function: Callable[[], Any], *, thread: str = MAIN) -> list[Any]:
  """Calls a function in every process, and returns the values of all, by process.

  No process goes on before all are done. Where it fails in one it fails in all.

  Args:
    what: is waited for: "the data".
    function: returns what JSON can hold.
    thread: as for `on_lead`.

  Raises:
    UserError: of the function, in whichever process; the first one's.
    TrainingError: of the function, or if a process does not answer in time.
  """
  if is_alone():
    return [function()]
  key, num = here.make_key(thread), jax_state().num_processes
  with _posting(f"{key}/{jax_state().process_id}", what, thread) as post:
    post(function())
  return [_open(_read(f"{key}/{i}", i, what, thread)) for i in range(num)]


def check_same(what: str, values: dict[str, Any], advice: str) -> None:
  """Checks that all processes have the same values.

  Args:
    what: is compared, for those that wait: "the settings".
    values: name -> what JSON can hold.
    advice: ends the message: what to do.

  Raises:
    UserError: in every process, naming the first values that differ and in which process.
  """
  if is_alone():
    return
  all_values = together(what, lambda: [socket.gethostname(), json.loads(json.dumps(values))])
  _, mine = all_values[0]
  for number, (host, found) in enumerate(all_values):
    differing = [name for name in {**mine, **found} if found.get(name) != mine.get(name)]
    if differing:
      shown = ", ".join(
        f"{n} is {found.get(n)} there and {mine.get(n)} in process 0" for n in differing[:3]
      )
      more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
      raise mark_told(
        UserError(f"process {number} on {host} is to make another run: {shown}{more}. {advice}")
      )


@contextlib.contextmanager
def _posting(key: str, what: str, thread: str) -> Iterator[Callable[[Any], None]]:
  """Yields what posts a value under a key; an error is posted in its place, and raised."""
  here.begin(f"{MAKING} {what}", thread=thread)

  def post(value: Any) -> None:
    get_client().key_value_set(key, json.dumps({"value": value}))
    here.begin(f"after {what}", thread=thread)

  try:
    yield post
  except UserError as error:
    kind = "training" if isinstance(error, TrainingError) else "user"
    get_client().key_value_set(key, json.dumps({"error": str(error), "kind": kind}))
    raise


def _read(key: str, process: int, what: str, thread: str) -> dict[str, Any]:
  """Waits for what a process posts.

  Raises:
    TrainingError: if it does not come in time.
  """
  # The main thread's waits are watched. In other threads a process may write gigabytes.
  seconds = here.seconds * (1 if thread == MAIN else PATIENCE)
  end = time.monotonic() + seconds + (0 if here.watch is None else 2)
  here.begin(what, is_waiting=True, thread=thread)
  while True:
    try:
      found = json.loads(get_client().blocking_key_value_get(key, 1000))
    except jax.errors.JaxRuntimeError as error:
      check()
      if here.watch is not None and here.watch.others.get(process, {}).get("is_busy"):
        end = time.monotonic() + seconds
      if time.monotonic() > end:
        raise TrainingError(
          f"process {jax_state().process_id} waited {seconds:g} s for process {process}: {what}"
        ) from error
    else:
      here.begin(f"after {what}", thread=thread)
      return found


def _open(message: dict[str, Any]) -> Any:
  """Returns the value of a message, or raises its error."""
  if "error" in message:
    kind = TrainingError if message["kind"] == "training" else UserError
    raise mark_told(kind(message["error"]))
  return message["value"]


def mark_told(error: UserError) -> UserError:
  """Marks an error as one that every process has, so that it is shown once."""
  error.is_told = True
  return error


# --- Waiting ---


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
  """Marks a block that may take as long as it likes in one process: the others go on waiting."""
  before, here.is_busy = here.is_busy, True
  here.begin(what)
  try:
    yield
  finally:
    here.is_busy = before
    here.begin(f"after {what}")


def wait(what: str, function: Callable[[], Any], *arrays: Any) -> Any:
  """Calls a function that waits for all processes, and returns its value.

  Args:
    what: is waited for: "updates 11 to 20".
    function: blocks.
    arrays: pytrees of jax's arrays, to be ready before the function is called. Meanwhile an error
      of another process is raised here.

  Raises:
    TrainingError: if another process has failed, or is gone.
  """
  if is_alone():
    return function()
  here.number += 1
  here.begin(what, is_waiting=True)
  pause = 5e-4
  for array in jax.tree.leaves(arrays):
    while not array.is_ready():
      check()
      time.sleep(pause)
      pause = min(0.02, 1.5 * pause)
  value = function()
  here.begin(f"after {what}")
  return value


def check() -> None:
  """Checks that no other process has failed, in a library user's process.

  Raises:
    TrainingError: that, or that it is gone.
  """
  if here.watch is not None:
    here.watch.check()
