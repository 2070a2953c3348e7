"""Stopping a run: the first signal asks, the second insists.

Responsible for SIGINT and SIGTERM while training. What is saved then is decided by `train.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

REPEAT_SECONDS = 0.5  # a key that is held down, or a signal sent to the whole group, is one signal


def say(line: str) -> None:
  """One line on standard error, also from a signal handler; without a standard error, none."""
  with contextlib.suppress(OSError):
    os.write(2, f"{line}\n".encode())


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
  """Collects the first SIGINT or SIGTERM in a list instead of dying of it.

  A second one, more than `REPEAT_SECONDS` later, has its usual effect. Signals that were ignored stay ignored.
  """
  received: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield received  # only the main thread may install handlers
    return
  handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
  previous = {s: handler for s, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
  first = 0.0

  def on_signal(number: int, frame: object) -> None:
    nonlocal first
    if not received:
      first = time.monotonic()
      received.append(number)
      say("\nstopping after the steps under way; once more quits at once")
    elif time.monotonic() - first > REPEAT_SECONDS:
      signal.signal(number, previous[number])
      signal.raise_signal(number)

  for s in previous:
    signal.signal(s, on_signal)
  try:
    yield received
  finally:
    for s, handler in previous.items():
      signal.signal(s, handler)
