"""Where a run's time goes: seconds by part of the run, and rates of training over a window."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

from jgpt.devices.compilations import Compilations, count_compilations

RUN_PARTS = ("planning", "compiling", "training", "evaluating", "sampling", "saving")
WINDOW_SECONDS = 10.0  # of training that a rate is over; a single short call says nothing


class Perf(NamedTuple):
  """How fast a run trains, as of one of its calls.

  Attributes:
    seconds: that the call's updates took.
    steps_per_second: over the last calls, `WINDOW_SECONDS` of training at least where there were as
      many; evaluations, samples and saves are not counted. The first call of a start, in which
      devices warm up, counts only for its own rate.
    tokens_per_second: the same, of tokens trained on.
    elapsed: seconds since the first call of this start was made, everything counted.
    mfu: share of the devices' peak that `tokens_per_second` takes by `limits.count_train_flops`;
      None where no peak is known.
  """

  seconds: float
  steps_per_second: float
  tokens_per_second: float
  elapsed: float
  mfu: float | None = None


class Clock:
  """Counts the seconds of a start by part: what passed since the last look belongs to one of them.

  Attributes:
    seconds: by part, one of `RUN_PARTS`.
    compilations: what jax compiled meanwhile; nothing where that is not counted.
  """

  def __init__(self, compilations: Compilations | None = None):
    """Starts the clock."""
    self.compilations = compilations or Compilations()
    self.seconds = dict.fromkeys(RUN_PARTS, 0.0)
    self._began = self._last = time.perf_counter()

  def look(self, part: str) -> float:
    """Adds the seconds since the last look to a part; returns them."""
    now = time.perf_counter()
    seconds, self._last = now - self._last, now
    self.seconds[part] += seconds
    return seconds

  def count_seconds(self) -> float:
    """Returns the seconds since the clock was started."""
    return time.perf_counter() - self._began

  @property
  def elapsed(self) -> float:
    """Returns the seconds since the clock was started, as of the last look."""
    return self._last - self._began


@contextlib.contextmanager
def start_clock() -> Iterator[Clock]:
  """Starts a clock that counts compilations until the context ends."""
  with count_compilations() as counts:
    yield Clock(counts)


class Pace:
  """Rates of training over the last calls."""

  def __init__(self):
    """Begins without any call."""
    # Steps, tokens and seconds of calls; short ones in a row are one entry.
    self._calls: collections.deque[list] = collections.deque()
    self._sums, self._is_first = [0, 0, 0.0], True

  def add(self, steps: int, tokens: int, seconds: float) -> tuple[float, float]:
    """Adds a call; returns steps and tokens per second over the window that ends with it."""
    if self._is_first:
      self._is_first = False
      return steps / max(seconds, 1e-9), tokens / max(seconds, 1e-9)
    if not self._calls or self._calls[-1][2] >= WINDOW_SECONDS / 100:
      self._calls.append([0, 0, 0.0])
    for i, value in enumerate((steps, tokens, seconds)):
      self._calls[-1][i] += value
      self._sums[i] += value
    while len(self._calls) > 1 and self._sums[2] - self._calls[0][2] >= WINDOW_SECONDS:
      oldest = self._calls.popleft()
      self._sums = [total - value for total, value in zip(self._sums, oldest, strict=True)]
    steps, tokens, seconds = self._sums
    return steps / max(seconds, 1e-9), tokens / max(seconds, 1e-9)
