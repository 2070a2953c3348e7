"""What compiled calls returned: handed to the writers, watched, and kept.

Responsible for waiting for a call's metrics, for giving them to every writer, and for what a run remembers of them while it
trains. Not responsible for what writers make of them (`metrics.py`), for judging them (`health.py`) or for when calls are
made (`train.py`).
"""

from __future__ import annotations

import array
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jgpt.config import TrainConfig
from jgpt.health import Health
from jgpt.metrics import Chunk, Clock, JsonlWriter, Writer
from jgpt.signals import Stop, say


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
