"""Stopping a run by SIGINT, SIGTERM or SIGHUP (a terminal that is closed).

The first signal asks the run to stop after the steps under way, the second ends it at once. What is
saved on a stop is decided in `train.py`.

jgpt must not end the process of a library user: `stop_signals` records the first signal, and the
second has its usual effect in Python. A command ends its own process: `exit_on_signals` reacts to a
signal at once, also while XLA compiles or computes in the main thread. Python's handlers would run
only after that; so a thread reads the numbers of signals from a socket, to which the interpreter's
C handler writes them (`signal.set_wakeup_fd`).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jgpt.errors import TrainingError
from jgpt.system.command import python_command

# Signals so close together count as one: a key is held down, or a whole process group is signalled.
REPEAT_SECONDS = 0.5
EXIT_BY_SIGNAL = 128  # a process ended by signal n has status 128 + n, by the shell's convention
SIGNALS = tuple(
  getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
STOPPING = "\nstopping after the steps under way; once more quits at once"


def print_stderr(line: str) -> None:
  """Prints a line to standard error, where there is one; may be called in a signal handler."""
  if sys.stderr is None:
    return  # file descriptor 2 may be another file now
  with contextlib.suppress(OSError):
    os.write(2, f"{line}\n".encode(errors="replace"))


def describe_stop(step: int, workdir: Path | None) -> str:
  """Describes in one line what a run has saved when it stops after a step.

  Args:
    step: updates so far, all of them saved.
    workdir: the run folder; None for a run that saves nothing.
  """
  if workdir is None:
    return f"stopped after step {step:,}; nothing is kept"
  if not step:
    return f"stopped before the first step; the same command begins again in {workdir}"
  command = shlex.join([python_command(), "-m", "jgpt.run", "--workdir", str(workdir)])
  return (
    f"stopped after step {step:,}, which is saved in {workdir}; the same command goes on from "
    f"there, and so does {command}"
  )


class Stop:
  """A request to stop a run; true once a signal has arrived.

  Attributes:
    signal: number of the first signal that arrived outside `leaving`; None before.
  """

  def __init__(self):
    self.signal: int | None = None
    # Of a run of several processes: what ends this one together with the others, what tells them
    # that it ends at once, whether another one prints, and whether the signal reached another one,
    # so that this one's own, where a launcher sends it to all, is still to come.
    self.leave_process: Callable[[int, str], None] = _exit
    self.tell_end: Callable[[int, str], None] | None = None
    self.is_quiet = False
    self.is_relayed = False

  def __bool__(self) -> bool:
    return self.signal is not None

  @contextlib.contextmanager
  def leaving(self, line: str, finish: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Marks a block of code in which nothing is unsaved: a signal need not wait for its end.

    In a library user's process the signal has its usual effect in the block. A command's process
    ends.

    Args:
      line: printed when a command ends in the block; says what is saved.
      finish: called before the line is printed, for example to wait for a save.
    """
    yield

  def leave(self, line: str) -> None:
    """Prints what was saved after a signal; a command's process then ends."""
    if not self.is_quiet:
      print_stderr(line)

  def receive(self, number: int) -> None:
    """Records a signal that has reached another process of the run."""
    if self.signal is None:
      self.signal, self.is_relayed = number, True

  def agree(self, num_steps: int) -> int:
    """Returns the updates that the next call makes; `SharedStop` asks the other processes."""
    return num_steps


# --- Signal handling for library users ---


class _LibraryStop(Stop):
  """A stop in a library user's process: inside `leaving` signals have their usual effect."""

  def __init__(self):
    super().__init__()
    self.is_leaving = False

  @contextlib.contextmanager
  def leaving(self, line: str, finish: Callable[[], None] = lambda: None) -> Iterator[None]:
    self.is_leaving = True
    try:
      yield
    finally:
      self.is_leaving = False


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
  """Records the first of `SIGNALS` as a request to stop, in place of its usual effect.

  A second signal, more than `REPEAT_SECONDS` later, has its usual effect. Signals that were ignored
  stay ignored. Outside the main thread nothing is recorded, for only it may install handlers.
  """
  stop = _LibraryStop()
  first = 0.0

  def on_signal(number: int, frame: object) -> None:
    nonlocal first
    if stop.is_relayed and not stop.is_leaving:
      stop.is_relayed, first = False, time.monotonic()
    elif stop.is_leaving or (stop and time.monotonic() - first > REPEAT_SECONDS):
      signal.signal(number, previous[number])
      signal.raise_signal(number)
    elif not stop:
      first = time.monotonic()
      stop.signal = number
      if not stop.is_quiet:
        print_stderr(STOPPING)

  with _install_handlers(on_signal) as previous:
    yield stop


# --- Signal handling for commands ---


class _CommandStop(Stop):
  """A stop in a command's process: inside `leaving` a signal ends the process.

  It ends with the line given to `leaving` and the shell's status for the signal.
  """

  def __init__(self):
    super().__init__()
    self._lock = threading.Lock()
    self._block: tuple[str, Callable[[], None]] | None = None  # arguments of `leaving`
    self._first = 0.0
    self._has_arrived = False  # a signal, which the thread that reads them may not have read yet

  @contextlib.contextmanager
  def leaving(self, line: str, finish: Callable[[], None] = lambda: None) -> Iterator[None]:
    with self._lock:
      outer, self._block = self._block, (line, finish)
      number = self.signal
    if number is not None:
      self._end(number, line, finish)
    try:
      yield
    finally:
      with self._lock:
        is_ending = self._has_arrived
        self._block = self._block if is_ending else outer
      if is_ending:
        threading.Event().wait()  # another thread ends the process; nothing may run beside it

  def leave(self, line: str) -> None:
    self._end(self.signal, line)

  def receive(self, number: int) -> None:
    self._has_arrived = True
    self.on_signal(number, is_relayed=True)

  def on_arrival(self, number: int, frame: object) -> None:
    """Records that a signal has arrived; Python's handler, in the main thread."""
    self._has_arrived = True

  def on_signal(self, number: int, *, is_relayed: bool = False) -> None:
    """Handles a signal, in the thread that reads signals, or one that reached another process."""
    now = time.monotonic()
    with self._lock:
      is_first = self.signal is None
      if is_first:
        self._first, self.signal, self.is_relayed = now, number, is_relayed
      elif self.is_relayed and not is_relayed:  # the same signal, by a launcher
        self._first, self.is_relayed = now, False
        return
      elif is_relayed or now - self._first <= REPEAT_SECONDS:
        return
      block = self._block
    if not is_first:
      status, line = EXIT_BY_SIGNAL + number, "\nstopped at once; the last checkpoint is as it was"
      if self.tell_end is not None:
        self.tell_end(status, line)
      _exit(status, line)
    if block is None:
      if not self.is_quiet:
        print_stderr(STOPPING)
      return
    if not self.is_quiet:
      print_stderr("\nstopping")
    # In a thread of its own, so that this one can handle a second signal.
    threading.Thread(target=self._end, args=(number, *block), daemon=True).start()

  def _end(self, number: int, line: str, finish: Callable[[], None] = lambda: None) -> None:
    """Ends the process for a signal: flushes the output, calls `finish` and prints the line."""
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(REPEAT_SECONDS)  # a pipe whose reader has stalled must not keep the process alive
    try:
      finish()
    except Exception as error:  # the last save failed
      self.leave_process(TrainingError.status, f"error: {error}")
    self.leave_process(EXIT_BY_SIGNAL + number, line)


@contextlib.contextmanager
def exit_on_signals() -> Iterator[Stop]:
  """Records the first of `SIGNALS` as a request to stop; inside `Stop.leaving` ends the process.

  A second signal, more than `REPEAT_SECONDS` later, ends the process at once. Signals that were
  ignored stay ignored. Outside the main thread nothing is recorded.
  """
  stop = _CommandStop()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  ours, theirs = socket.socketpair()
  theirs.setblocking(False)

  def listen() -> None:
    with contextlib.suppress(OSError):
      while number := ours.recv(1):
        if number[0] in SIGNALS:
          stop.on_signal(number[0])

  with ours, theirs, _install_handlers(stop.on_arrival):
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, name="jgpt-signals", daemon=True)
    thread.start()
    try:
      yield stop
    finally:
      signal.set_wakeup_fd(before)
      theirs.close()
      thread.join()


@contextlib.contextmanager
def _install_handlers(handler: Callable[[int, object], None]) -> Iterator[dict]:
  """Installs a handler for those of `SIGNALS` that are not ignored; restores the previous ones.

  Yields:
    The previous handlers, by signal.
  """
  if threading.current_thread() is not threading.main_thread():
    yield {}  # only the main thread may install handlers
    return
  handlers = {s: signal.getsignal(s) for s in SIGNALS}
  previous = {s: old for s, old in handlers.items() if old not in (None, signal.SIG_IGN)}
  for s in previous:
    signal.signal(s, handler)
  try:
    yield previous
  finally:
    for s, old in previous.items():
      signal.signal(s, old)


def _flush() -> None:
  with contextlib.suppress(OSError, ValueError, AttributeError):
    sys.stdout.flush()


def _exit(status: int, line: str) -> None:
  """Prints a line and ends the process from any thread, without joining the others."""
  try:
    show_cursor = (
      "\x1b[?25h"
      if sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()
      else ""
    )
    print_stderr(f"{show_cursor}{line}")
  finally:
    os._exit(status)
