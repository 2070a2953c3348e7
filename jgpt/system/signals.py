"""Stopping a run: the first signal asks, the second insists.

Responsible for SIGINT, SIGTERM and SIGHUP (a terminal that is closed) while training, and for one line that says what
becomes of the run. What is saved then is decided by `train.py`.

A library user's process is not ours to end: `stop_signals` collects the first signal, and what interrupts Python as usual
is the second. A command ends itself: `exit_on_signals` hears a signal at once, whatever the main thread is waiting for,
because a thread of its own reads what the system's handler writes; Python's handlers would wait until XLA has compiled or
computed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jgpt.errors import TrainingError

REPEAT_SECONDS = 0.5  # a key that is held down, or a signal sent to the whole group, is one signal
EXIT_BY_SIGNAL = 128  # a process ended by signal n has status 128 + n, by the shell's convention
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
ASKED = "\nstopping after the steps under way; once more quits at once"


def say(line: str) -> None:
  """One line on standard error, also from a signal handler; without a standard error, none."""
  if sys.stderr is None:
    return  # what has its number now is another file
  with contextlib.suppress(OSError):
    os.write(2, f"{line}\n".encode(errors="replace"))


def describe_stop(step: int, workdir: Path | None) -> str:
  """What a run leaves that is stopped after a step, with nothing unsaved."""
  if workdir is None:
    return f"stopped after step {step:,}; nothing is kept"
  if not step:
    return f"stopped before the first step; the same command begins again in {workdir}"
  return f"stopped after step {step:,}, which is saved in {workdir}; the same command goes on from there"


class Stop:
  """Whether a run was asked to stop.

  Attributes:
    signal: the first signal that came while there was something to save; None before.
  """

  def __init__(self):
    self.signal: int | None = None

  def __bool__(self) -> bool:
    return self.signal is not None

  @contextlib.contextmanager
  def leaving(self, line: str, finish: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While this is entered nothing is unsaved, and a signal ends the process.

    Args:
      line: says so.
      finish: called before, for example to wait for a save.
    """
    yield

  def leave(self, line: str) -> None:
    """Says what was saved after a signal; a process of ours ends with it."""
    say(line)


# --- In somebody's process ---


class _Asked(Stop):
  """Inside `leaving` signals have their usual effect."""

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
  """Collects the first of `SIGNALS` instead of dying of it.

  A second one, more than `REPEAT_SECONDS` later, has its usual effect. Signals that were ignored stay ignored.
  """
  stop = _Asked()
  first = 0.0

  def on_signal(number: int, frame: object) -> None:
    nonlocal first
    if stop.is_leaving or (stop and time.monotonic() - first > REPEAT_SECONDS):
      signal.signal(number, previous[number])
      signal.raise_signal(number)
    elif not stop:
      first = time.monotonic()
      stop.signal = number
      say(ASKED)

  with _handled(on_signal) as previous:
    yield stop


# --- In a process of ours ---


class _Exiting(Stop):
  """Inside `leaving` a signal ends the process, with the line and the shell's status for the signal."""

  def __init__(self):
    super().__init__()
    self._lock = threading.Lock()
    self._leave: tuple[str, Callable[[], None]] | None = None
    self._first = 0.0

  @contextlib.contextmanager
  def leaving(self, line: str, finish: Callable[[], None] = lambda: None) -> Iterator[None]:
    with self._lock:
      before, self._leave = self._leave, (line, finish)
      asked = self.signal
    if asked is not None:
      self._end(asked, line, finish)
    try:
      yield
    finally:
      with self._lock:
        self._leave = before

  def leave(self, line: str) -> None:
    self._end(self.signal, line)

  def hear(self, number: int) -> None:
    """What becomes of a signal; called by the thread that hears it."""
    with self._lock:
      is_first = self.signal is None
      if is_first:
        self._first, self.signal = time.monotonic(), number
      elif time.monotonic() - self._first <= REPEAT_SECONDS:
        return
      leave = self._leave
    if not is_first:
      _exit(EXIT_BY_SIGNAL + number, "\nstopped at once; the last checkpoint is as it was")
    if leave is None:
      say(ASKED)
      return
    say("\nstopping")
    threading.Thread(target=self._end, args=(number, *leave), daemon=True).start()  # a second signal is heard meanwhile

  def _end(self, number: int, line: str, finish: Callable[[], None] = lambda: None) -> None:
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(REPEAT_SECONDS)  # a reader that does not read must not keep the process
    try:
      finish()
    except Exception as error:  # whatever kept the last save from being finished is what there is to say
      _exit(TrainingError.status, f"error: {error}")
    _exit(EXIT_BY_SIGNAL + number, line)


@contextlib.contextmanager
def exit_on_signals() -> Iterator[Stop]:
  """Collects the first of `SIGNALS`, or ends the process where nothing is unsaved (`Stop.leaving`).

  A second one, more than `REPEAT_SECONDS` later, ends it at once. Signals that were ignored stay ignored.
  """
  stop = _Exiting()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  ours, theirs = socket.socketpair()
  theirs.setblocking(False)

  def listen() -> None:
    with contextlib.suppress(OSError):
      while number := ours.recv(1):
        if number[0] in SIGNALS:
          stop.hear(number[0])

  with ours, theirs, _handled(lambda number, frame: None):
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
def _handled(on_signal: Callable[[int, object], None]) -> Iterator[dict]:
  """Installs a handler for the signals that are not ignored; yields the handlers that were there, by signal."""
  if threading.current_thread() is not threading.main_thread():
    yield {}  # only the main thread may install handlers
    return
  handlers = {s: signal.getsignal(s) for s in SIGNALS}
  previous = {s: handler for s, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
  for s in previous:
    signal.signal(s, on_signal)
  try:
    yield previous
  finally:
    for s, handler in previous.items():
      signal.signal(s, handler)


def _flush() -> None:
  with contextlib.suppress(OSError, ValueError, AttributeError):
    sys.stdout.flush()


def _exit(status: int, line: str) -> None:
  """Ends the process from any thread, whatever the others are doing."""
  try:
    show_cursor = "\x1b[?25h" if sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty() else ""
    say(f"{show_cursor}{line}")
  finally:
    os._exit(status)
