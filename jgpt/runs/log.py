"""What compiled calls returned: handed to the writers, watched, and kept.

Responsible for waiting for a call's metrics, for giving them to every writer, and for what a run remembers of them while it
trains. Not responsible for what writers make of them (`metrics.py`), for judging them (`health.py`) or for when calls are
made (`train.py`).
"""

from __future__ import annotations

import array
import collections
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jgpt.config import TrainConfig
from jgpt.runs.folder import open_file
from jgpt.runs.health import Health
from jgpt.system.signals import Stop, say

LAST_ROWS = 2000  # of earlier starts, that a run which goes on looks at
MAX_LINE = 1 << 16  # bytes of a line of metrics.jsonl; what is longer is no row
MAX_NUMBER = 1e39  # of a row, but for infinity: float32 holds no larger one


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Metrics of consecutive updates.

  Attributes:
    step: the last of them; the first update of a run is step 1, and step 0 comes with an evaluation only.
    metrics: name -> float array [updates].
    seconds: the time they took.
    heldout_loss: nats per token on the held-out part after them, where it was evaluated.
    texts: drawn after them, where some were asked for.
  """

  step: int
  metrics: dict[str, np.ndarray]
  seconds: float
  heldout_loss: float | None = None
  texts: tuple[str, ...] = ()


class Writer(Protocol):
  """What `train` writes to."""

  def write(self, chunk: Chunk) -> None:
    """Takes the metrics of consecutive updates."""

  def close(self) -> None:
    """Called once, also when training ends early."""


class JsonlWriter:
  """Writes one JSON object per update: {"step": 1, "train/loss": 3.29, ...}, floats so that float32 reads back equal.

  Where the held-out part was evaluated, a row of its own follows: {"step": 100, "heldout/loss": 2.41}.
  """

  def __init__(self, path: Path, step: int):
    """Opens the file, in a folder that exists.

    The first chunk cuts off what a run resumed from `step` writes again: the rows after it, and a torn last line. Where
    they begin is where fewest rows contradict: one wrong number among the rows before does not end them. A run that has
    nothing to write leaves the file as it is. Of the rows up to `step`, `kept` has the last 2,000 and all of evaluations
    and skipped updates.
    """
    kept: list[tuple[int, dict]] = []
    last: collections.deque[tuple[int, dict]] = collections.deque(maxlen=LAST_ROWS)
    end, is_whole, balance, best = 0, True, 0, 0
    for line in read_lines(path):
      is_before = line.row is not None and line.row["step"] <= step
      balance += 0 if line.row is None else 1 if is_before else -1
      if balance >= best and (line.is_whole or is_before):
        best, end, is_whole = balance, line.end, line.is_whole
      if is_before:
        if len(last) == LAST_ROWS and (last[0][1].get("train/skipped") or "heldout/loss" in last[0][1]):
          kept.append(last[0])
        last.append((line.end, line.row))
    self.kept = [row for at, row in (*kept, *last) if at <= end]
    self._lost = len(kept) + len(last) - len(self.kept)
    self._path, self._cut_at, self._is_whole = path, end, is_whole
    self._file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by close)

  def write(self, chunk: Chunk) -> None:
    """Appends the chunk's rows."""
    if self._cut_at is not None:
      self._cut()
    count = len(next(iter(chunk.metrics.values()), ()))
    # str of a NumPy float32 is the shortest text that reads back as the same float32.
    columns = {
      name: values.tolist() if values.dtype.kind in "iu" else [float(str(value)) for value in values]
      for name, values in chunk.metrics.items()
    }
    rows = [
      {"step": chunk.step - count + 1 + i, **{name: values[i] for name, values in columns.items()}} for i in range(count)
    ]
    if chunk.heldout_loss is not None:
      rows.append({"step": chunk.step, "heldout/loss": chunk.heldout_loss})
    self._file.writelines(json.dumps(row) + "\n" for row in rows)
    self._file.flush()

  def _cut(self) -> None:
    """Cuts off what this start writes again."""
    if self._lost:
      say(f"WARNING: {self._path} is damaged: {self._lost} earlier rows stand behind later ones, and are cut off with them")
    self._file.truncate(self._cut_at)
    self._file.write("" if self._is_whole else "\n")
    self._cut_at = None

  def sync(self) -> None:
    """Returns when what was written is on the disk: a checkpoint must not be there without the rows that led to it."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


class Line(NamedTuple):
  """A line of metrics.jsonl.

  Attributes:
    end: bytes of the file up to where the next one begins.
    row: numbers by name, with `step`; None where the line is no row.
    is_whole: whether it ends with a line break: the last one of a process that was killed may not.
  """

  end: int
  row: dict[str, float] | None
  is_whole: bool


def read_lines(path: Path) -> Iterator[Line]:
  """Yields the lines of metrics.jsonl, whatever they hold, in little memory however long they are; none of an absent file.

  Raises:
    UserError: if something else than a plain file has the name.
  """
  if not os.path.lexists(path):
    return
  end = 0
  with open_file(path) as file:
    while line := file.readline(MAX_LINE):
      end, row = end + len(line), _parse_row(line)
      while len(line) == MAX_LINE and not line.endswith(b"\n"):  # the rest of a line that is too long
        line = file.readline(MAX_LINE)
        end, row = end + len(line), None
      yield Line(end, row, line.endswith(b"\n"))


def _parse_row(line: bytes) -> dict[str, float] | None:
  """A line's row: an object of numbers that fit float32 (NaN and infinity do), whose `step` is a whole one; else None."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  is_row = isinstance(row, dict) and type(row.get("step")) is int and row["step"] >= 0
  return row if is_row and all(map(_is_number, row.values())) else None


def _is_number(value: object) -> bool:
  return type(value) in (int, float) and not MAX_NUMBER < abs(value) < math.inf


def read_jsonl(path: Path) -> list[dict]:
  """Reads the rows of metrics.jsonl; lines that are none are left out, and an absent file is empty.

  Raises:
    UserError: if something else than a plain file has the name.
  """
  return [line.row for line in read_lines(path) if line.row is not None]


def read_losses(path: Path, step: int) -> tuple[np.ndarray, list[tuple[int, float]]]:
  """Reads the losses up to a step from metrics.jsonl, in little memory: float32 [updates], and (step, held-out loss)."""
  losses, heldout_losses = array.array("f"), []
  for line in read_lines(path):
    row = line.row if line.row is not None and line.row["step"] <= step else {}
    if "train/loss" in row:
      losses.append(row["train/loss"])
    if "heldout/loss" in row:
      heldout_losses.append((row["step"], row["heldout/loss"]))
  return np.array(losses, np.float32), heldout_losses


class Clock:
  """Seconds since the last look."""

  def __init__(self):
    """Starts."""
    self._last = time.perf_counter()

  def lap(self) -> float:
    """Seconds since the last lap."""
    now = time.perf_counter()
    seconds, self._last = now - self._last, now
    return seconds


class Log:
  """A run's metrics since it was started.

  Attributes:
    losses: training loss of each update of this start, nats per token, float32.
    evaluations: (step, nats per token, tokens) of each evaluation of this start.
    evaluated: steps of the evaluations that are on record, earlier starts' too.
    health: counts updates that were skipped.
  """

  def __init__(self, writers: list[Writer], rows: Sequence[dict], max_consecutive_skips: int):
    """Begins; `rows` are those of earlier starts."""
    self._writers, self._clock = writers, Clock()
    self._seconds_per_step = 0.0
    self.losses = array.array("f")  # a list would take eight times the room
    self.evaluations: list[tuple[int, float, int]] = []
    self.evaluated = {row["step"] for row in rows if "heldout/loss" in row}
    self.health = Health(rows, max_consecutive_skips)

  def whole_evaluation(self, train: TrainConfig) -> tuple[float, int] | None:
    """The loss after the last update and its tokens, if it was computed over the whole held-out part."""
    if train.eval_batches is None and self.evaluations and self.evaluations[-1][0] == train.steps:
      return self.evaluations[-1][1:]
    return None

  def find_heldout_loss(self, step: int) -> float | None:
    """The held-out loss at a step of this start, where that was evaluated."""
    return next((loss for at, loss, _ in self.evaluations if at == step), None)

  def count_steps(self, seconds: float) -> int:
    """Updates that take about so long, as the last ones did; one where none was timed yet."""
    if not self._seconds_per_step:
      return 1
    return max(1, int(min(seconds / max(self._seconds_per_step, 1e-9), 2**31)))

  def write(
    self,
    step: int,
    num: int,
    metrics: dict,
    evaluation: tuple[Any, Any] | None,
    texts: Callable[[], list[str]] | None,
    stop: Stop,
  ) -> None:
    """Waits for the call that ended at `step` with its last `num` updates, and for what was begun after it.

    An evaluation that is not done when `stop` becomes true is left out, and so are texts: whoever goes on makes it again.
    """
    metrics = {name: np.asarray(values)[:num] for name, values in metrics.items()}
    self.losses.frombytes(np.asarray(metrics.get("train/loss", ()), np.float32).tobytes())
    heldout_loss = None
    while evaluation is not None and not evaluation[0].is_ready() and not stop:
      time.sleep(0.002)
    if evaluation is not None and evaluation[0].is_ready():
      heldout_loss = float(evaluation[0])
      self.evaluations.append((step, heldout_loss, int(evaluation[1])))
    seconds = self._clock.lap()
    self._seconds_per_step = seconds / num if num else self._seconds_per_step
    chunk = Chunk(step, metrics, seconds, heldout_loss, tuple(texts()) if texts and not stop else ())
    for line in self.health.observe(step, metrics) if num else ():
      say(line)
    self._each(lambda writer: writer.write(chunk), step)

  def sync(self) -> None:
    """Returns when what was written to files is on the disk."""
    self._each(lambda writer: writer.sync() if isinstance(writer, JsonlWriter) else None)

  def _each(self, call: Callable[[Writer], None], step: int | None = None) -> None:
    for writer in list(self._writers):
      try:
        call(writer)
      except (OSError, ValueError) as error:  # a full disk, a reader that left, an encoding: training is worth more
        self._writers.remove(writer)
        at = "" if step is None else f" at step {step}"
        say(f"{type(writer).__name__} stopped{at} ({getattr(error, 'strerror', None) or error}); training goes on")
