"""Watching the other processes of a run: an error, a signal or the end of one is one of all.

Every process tells the others several times a second which exchange or wait it is at, of those that
`processes.py` counts. So a process that waits in vain can say for whom: one that has not come as
far, or has given no sign of life.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jgpt.devices.processes import (
  MAKING,
  decide,
  get_client,
  here,
  is_alone,
  jax_state,
  mark_told,
  set_timeout,
  together,
)
from jgpt.errors import TrainingError, UserError, first_line
from jgpt.system.signals import EXIT_BY_SIGNAL, Stop, print_stderr

BEAT_SECONDS = 0.25  # between two signs of life; more in runs of many processes
BEATS_PER_SECOND = 400  # of all processes together, at most
SILENT_SECONDS = 60.0  # without a sign of life a process is gone, unless the timeout is shorter
GONE_SECONDS = 3.0  # the same once a collective has failed
CAUSE_SECONDS = 10.0  # that one waits for the cause of a collective that failed
LEAVE_SECONDS = 5.0  # that the lead waits for the others to end before it does
END_SECONDS = 2.5  # that a process has to end by itself after a signal: before the lead is gone

_runs = itertools.count(1)  # as every process watches the same runs, they number them alike


@contextlib.contextmanager
def watching(
  stop: Stop | None = None,
  describe: Callable[[BaseException], tuple[int, str]] | None = None,
  *,
  seconds: float | None = None,
) -> Iterator[None]:
  """Handles what befalls other processes: an error, a signal or the end of one is one of all.

  Inside another `watching`, and in a run of one process, nothing is done.

  Args:
    stop: gets the signals that reach any process.
    describe: returns the exit status and a line for an error; given by a command. Its process then
      ends at an error of its own or another one, wherever it is, and the lead prints the line. None
      is for library users: errors are raised in the functions of this module, and no process ends.
    seconds: as for `set_timeout`; None leaves it as it is.

  Raises:
    UserError: if another thread of this process watches: two runs at once would mix what they tell.
  """
  set_timeout(seconds or here.seconds)
  if here.watch is not None and here.watch.thread != threading.get_ident():
    raise UserError(
      "another thread of this process trains in the same processes; two runs need processes of "
      "their own. Call train_run again when the first has ended"
    )
  if is_alone() or here.watch is not None:
    yield
    return
  watch = here.watch = _Watch(stop, describe)
  try:
    watch.start()
    yield
    together("the end", lambda: None)  # the others may not be done
  except Exception as error:
    watch.fail(error)
  except KeyboardInterrupt:
    watch.interrupt()
    raise
  finally:
    watch.close()
    here.begin_anew(next(_runs))


class _Watch:
  """Two threads: one that talks to the coordination service, and one that judges what it heard.

  Attributes:
    others: by process, what it said last: see `Here`; "at", when it was heard, and "beat".
    thread: the one that watches.
  """

  def __init__(
    self, stop: Stop | None, describe: Callable[[BaseException], tuple[int, str]] | None
  ):
    self._stop, self._describe = stop, describe
    self._me, self._num = jax_state().process_id, jax_state().num_processes
    self._prefix, self.thread = here.prefix, threading.get_ident()
    self._deleted: collections.Counter[str] = collections.Counter()  # exchanges, by thread
    self._period = max(BEAT_SECONDS, self._num / BEATS_PER_SECOND)
    self._closed = threading.Event()
    self._lock = threading.Lock()
    self._threads = [
      threading.Thread(target=run, name=f"jgpt-{run.__name__.strip('_')}", daemon=True)
      for run in (self._talk, self._judge)
    ]
    self._answered = time.monotonic()
    self._end: dict[str, Any] | None = None  # the error or the signal that ends all
    self._end_heard = 0.0
    self._failure: TrainingError | None = None
    self.others: dict[int, dict[str, Any]] = {}

  def start(self) -> None:
    """Starts the threads."""
    if self._stop is not None and self._describe is not None:
      self._stop.leave_process, self._stop.tell_end = self.leave, self._tell_end
    if self._stop is not None:
      self._stop.is_quiet = self._me > 0
    for thread in self._threads:
      thread.start()

  def close(self) -> None:
    """Ends the threads."""
    self._closed.set()
    for thread in self._threads:
      if thread is not threading.current_thread():
        thread.join(1)

  def check(self) -> None:
    """Checks that no other process has failed.

    Raises:
      TrainingError: that, or that it is gone.
    """
    if self._failure is not None:
      raise self._failure

  # --- Talking ---

  def _talk(self) -> None:
    """Sends the others where this process is, and receives where they are."""
    beat = 0
    while not self._closed.wait(self._period):
      beat += 1
      mine = {
        "beat": beat,
        "host": socket.gethostname(),
        **{name: getattr(here, name) for name in ("number", "what", "is_waiting", "is_busy")},
        "numbers": dict(here.numbers),
        "for": time.monotonic() - here.since,
      }
      with contextlib.suppress(Exception):  # the judge sees that there is no answer
        client = get_client()
        client.key_value_set(
          f"{self._prefix}/at/{self._me}", json.dumps(mine), allow_overwrite=True
        )
        signal = self._stop.signal if self._stop is not None else None
        for key, text in client.key_value_dir_get(f"{self._prefix}/at/"):
          self._hear(int(key.rpartition("/")[2]), json.loads(text))
        news = {
          key.rpartition("/")[2]: json.loads(text)
          for key, text in client.key_value_dir_get(f"{self._prefix}/news/")
        }
        self._answered = time.monotonic()
        if signal is not None and "signal" not in news:
          self._post("signal", {"number": signal})
        if signal is None and self._stop is not None and "signal" in news:
          self._stop.receive(news["signal"]["number"])
        if self._end is None and "end" in news:
          self._end, self._end_heard = news["end"], time.monotonic()
        if self._me == 0:
          self._delete_passed(client)

  def _delete_passed(self, client: Any) -> None:
    """Deletes the exchanges that every process has passed: a run makes millions."""
    if len(self.others) < self._num:
      return
    everyone = [here.numbers, *(said["numbers"] for said in self.others.values())]
    for thread in list(here.numbers):
      under_way = min(numbers.get(thread, 0) for numbers in everyone)
      for number in range(self._deleted[thread] + 1, under_way):
        client.key_value_delete(f"{self._prefix}/{thread}/{number}")
        self._deleted[thread] = number

  def _hear(self, process: int, said: dict[str, Any]) -> None:
    before = self.others.get(process)
    if before is None or before["beat"] != said["beat"]:
      self.others[process] = said | {"at": time.monotonic()}

  def _post(self, key: str, news: dict[str, Any]) -> None:
    """Sends news to all, unless another process was first."""
    with contextlib.suppress(Exception):
      get_client().key_value_set(f"{self._prefix}/news/{key}", json.dumps(news))

  # --- Judging ---

  def _judge(self) -> None:
    """Looks whether another process has ended, is gone or does not come."""
    began = time.monotonic()
    while not self._closed.wait(self._period):
      end = self._end
      if end is not None:
        # Each process ends by itself after a signal, unless it waits for one that has ended.
        is_signal = end["status"] > EXIT_BY_SIGNAL
        if is_signal and time.monotonic() - self._end_heard < END_SECONDS:
          continue
        self._give_up(end["line"], end["status"])
      elif found := self._find_lost(began, min(here.seconds, SILENT_SECONDS)) or self._find_late():
        self._give_up(found)

  def _give_up(self, line: str, status: int = TrainingError.status) -> None:
    """Ends the process of a command; in others the main thread raises an error."""
    line = line.removeprefix("error: ")
    if self._describe is None:
      self._failure = self._failure or TrainingError(line)
    else:
      self.leave(status, line if status > EXIT_BY_SIGNAL else f"error: {line}", is_told=True)

  def _find_lost(self, began: float, seconds: float) -> str | None:
    """Describes the processes that have given no sign of life for so long; None without any."""
    now, lost = time.monotonic(), []
    if now - self._answered > seconds:
      lost = [0]
    else:
      for process in range(self._num):
        at = self.others.get(process, {}).get("at", began)
        if process != self._me and now - max(at, began) > seconds:
          lost.append(process)
    if not lost:
      return None
    said = self.others.get(lost[0])
    last = f"; the last that it said: {said['what']}" if said else ""
    now_at = f"waited for {here.what}" if here.is_waiting else f"was at: {here.what}"
    who = self._name(lost)
    return f"{who} gave no sign of life for {seconds:.3g} s{last}; process {self._me} {now_at}"

  def _find_late(self) -> str | None:
    """Describes the processes that this one has waited for too long; None without any."""
    waited = time.monotonic() - here.since
    if not here.is_waiting or waited < here.seconds:
      return None
    others = {p: said for p, said in self.others.items() if p != self._me}
    if any(said["is_busy"] for said in others.values()):
      return None
    late = [
      p
      for p, said in others.items()
      if said["number"] < here.number
      or (said["number"] == here.number and said["what"].startswith(MAKING))
    ]
    if not late:
      return None
    said = others[late[0]]
    silent = time.monotonic() - said["at"]
    state = "has not come so far" if silent < GONE_SECONDS else "gives no sign of life"
    return (
      f"process {self._me} waited {waited:.0f} s for {here.what}: {self._name(late)} {state}; "
      f"what it said {said['for'] + silent:.0f} s ago: {said['what']}"
    )

  def _name(self, numbers: list[int]) -> str:
    hosts = [self.others.get(p, {}).get("host") for p in numbers]
    named = [
      f"{p} (host {host})" if host else f"{p}" for p, host in zip(numbers[:4], hosts, strict=False)
    ]
    more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(named)}{more}"

  # --- Leaving ---

  def fail(self, error: Exception) -> None:
    """Ends this process, or raises, for an error of its main thread.

    Raises:
      TrainingError: in place of an error of jax's that another process has caused.
      Exception: the error otherwise.
    """
    failure = self._find_cause(error)
    is_told = getattr(failure, "is_told", False)
    if self._describe is None:
      if not is_told and self._failure is None:
        self._post_end(1, str(failure))
      raise failure from (None if failure is error else error)
    if not is_told and not isinstance(
      failure, (UserError, OSError, MemoryError, jax.errors.JaxRuntimeError)
    ):
      traceback.print_exception(failure)  # a bug; the line that all show is not enough
    status, line = self._describe(failure)
    self.leave(status, line, is_told=is_told)

  def interrupt(self) -> None:
    """Sends the others that a library user has interrupted this process."""
    self._post_end(1, "interrupted")

  def _find_cause(self, error: Exception) -> Exception:
    """Returns what has caused an error: that of a collective is another process's end."""
    if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" in str(error):
      return error
    began, until = time.monotonic(), time.monotonic() + CAUSE_SECONDS
    while time.monotonic() < until:
      if self._end is not None:
        return mark_told(TrainingError(self._end["line"]))
      if found := self._find_lost(began - 1e9, GONE_SECONDS):
        return TrainingError(f"{found} ({first_line(error)[:100]})")
      time.sleep(0.05)
    return error

  def _post_end(self, status: int, line: str, *, is_told: bool = False) -> None:
    said = {"status": status, "line": line, "process": self._me, "host": socket.gethostname()}
    self._post("end", said | {"is_told": is_told})

  def _tell_end(self, status: int, line: str) -> None:
    """Sends the others an end at once; does not wait for a service that does not answer."""
    helper = threading.Thread(target=self._post_end, args=(status, line), daemon=True)
    helper.start()
    helper.join(GONE_SECONDS / 10)

  def leave(self, status: int, line: str, *, is_told: bool = False) -> None:
    """Ends this process together with the others; returns never.

    The first that leaves decides with which status and line, and the lead, which the others cannot
    do without, prints the line and is the last.
    """
    if not self._lock.acquire(blocking=False):
      threading.Event().wait()  # another thread leaves
    self._closed.set()
    helper = threading.Thread(target=self._say_goodbye, args=(status, line, is_told), daemon=True)
    helper.start()
    helper.join(2 * LEAVE_SECONDS)  # the coordination service may not answer
    if helper.is_alive():
      print_stderr(line)
    os._exit(status)

  def _say_goodbye(self, status: int, line: str, is_told: bool) -> None:
    if status > EXIT_BY_SIGNAL:  # the thread that tells of signals ends with this one
      self._post("signal", {"number": status - EXIT_BY_SIGNAL})
    self._post_end(status, line, is_told=is_told)
    try:
      end = json.loads(get_client().blocking_key_value_get(f"{self._prefix}/news/end", 2000))
    except Exception:
      end = {"status": status, "line": line, "process": self._me, "is_told": True}
    status, line, number = end["status"], end["line"], end["process"]
    if self._me == 0:
      is_own = number == self._me or end["is_told"] or status > EXIT_BY_SIGNAL
      where = "" if is_own else f"process {number} on {end['host']}: "
      prefix = "error: " if line.startswith("error: ") else ""
      _flush_output()
      print_stderr(f"{prefix}{where}{line.removeprefix(prefix)}")
      self._post("shown", {})
      until = time.monotonic() + LEAVE_SECONDS
      while time.monotonic() < until and self._count_gone() < self._num - 1:
        time.sleep(0.02)
    else:
      try:
        wait = int(1000 * LEAVE_SECONDS)
        get_client().blocking_key_value_get(f"{self._prefix}/news/shown", wait)
      except Exception:
        print_stderr(line)  # the lead cannot
      with contextlib.suppress(Exception):
        get_client().key_value_set(f"{self._prefix}/gone/{self._me}", "1")
    os._exit(status)

  def _count_gone(self) -> int:
    try:
      return len(get_client().key_value_dir_get(f"{self._prefix}/gone/"))
    except Exception:
      return self._num


def _flush_output() -> None:
  with contextlib.suppress(OSError, ValueError, AttributeError):
    sys.stdout.flush()


# --- Stopping ---


class SharedStop(Stop):
  """A request to stop that all processes see at the same update: it is true once they agreed.

  Attributes:
    signal: number of the signal that they agreed on; None before.
  """

  def __init__(self, own: Stop):
    """Initialises it.

    Args:
      own: gets the signals of this process, and of the others (`watching`).
    """
    super().__init__()
    self._own = own

  def agree(self, num_steps: int) -> int:
    """Finds, with the other processes, the number of updates of the next call.

    Returns:
      The lead's number; 0 where a signal has reached it.
    """
    told = decide("the number of updates of the next call", [num_steps, self._own.signal])
    self.signal = told[1]
    if self.signal is not None and self._own.signal is None:
      self._own.receive(self.signal)
    return told[0] if self.signal is None else 0

  @contextlib.contextmanager
  def leaving(self, line: str, finish: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Marks a block of code in which nothing is unsaved; see `Stop.leaving`."""

    def finish_with_signal() -> None:
      self.signal = self._own.signal  # the end that is on record is a signal's
      finish()

    with self._own.leaving(line, finish_with_signal):
      yield

  def leave(self, line: str) -> None:
    """Prints what was saved after a signal; a command's process then ends."""
    self._own.leave(line)


def share_stop(stop: Stop) -> Stop:
  """Returns a stop on which all processes agree; in a run of one process the same one."""
  return stop if is_alone() else SharedStop(stop)
