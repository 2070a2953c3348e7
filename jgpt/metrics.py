"""What a run says: one line of progress at a time, and one row per update in a file.

Responsible for the writers and for figures drawn as text. A writer is an object with `write(chunk)` and `close()`; `train`
calls it with what one compiled call returned. Not responsible for when that happens (`train.py`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Metrics of consecutive updates.

  Attributes:
    step: the last of them; the first update of a run is step 1.
    metrics: name -> float array [updates].
    seconds: the time they took.
    sample: a text drawn after them, where one was asked for.
  """

  step: int
  metrics: dict[str, np.ndarray]
  seconds: float
  sample: str | None = None


class Writer(Protocol):
  """What `train` writes to."""

  def write(self, chunk: Chunk) -> None:
    """Takes the metrics of consecutive updates."""

  def close(self) -> None:
    """Called once, also when training ends early."""


class JsonlWriter:
  """Writes one JSON object per update: {"step": 1, "train/loss": 3.29, ...}, floats so that float32 reads back equal."""

  def __init__(self, path: Path, step: int):
    """Opens the file; rows after `step` (a run resumed from there writes them again) and a torn last line are dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [row for row in read_jsonl(path) if row["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
      file.writelines(json.dumps(row) + "\n" for row in kept)
    temporary.replace(path)  # a run killed before its first write keeps its rows
    self._file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by close)

  def write(self, chunk: Chunk) -> None:
    """Appends the chunk's rows."""
    count = len(next(iter(chunk.metrics.values())))
    for i in range(count):
      # str of a NumPy float32 is the shortest text that reads back as the same float32.
      row = {name: float(str(values[i])) for name, values in chunk.metrics.items()}
      self._file.write(json.dumps({"step": chunk.step - count + 1 + i, **row}) + "\n")
    self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def read_jsonl(path: Path) -> list[dict]:
  """Reads metrics.jsonl up to the first line that is torn; an absent file is empty."""
  rows = []
  if path.exists():
    with open(path, encoding="utf-8", errors="replace") as file:
      for line in file:
        try:
          row = json.loads(line)
        except ValueError:
          break
        if not isinstance(row, dict) or type(row.get("step")) is not int:
          break
        rows.append(row)
  return rows


class ConsoleWriter:
  """Prints a line every `log_every` updates, after the first update and after the last.

  On a terminal the lines stand above a bar with the time that is left, and end with a text drawn at that moment.
  """

  def __init__(self, *, steps: int, log_every: int, start_step: int = 0, terminal: bool | None = None):
    """Begins.

    Args:
      steps: updates in all.
      log_every: updates between two lines.
      start_step: updates already done.
      terminal: whether to show the bar; None asks standard output.
    """
    self._steps, self._log_every = steps, log_every
    self._losses: list[np.ndarray] = []
    self._seconds = 0.0
    self._progress = None
    if (sys.stdout is not None and sys.stdout.isatty()) if terminal is None else terminal:
      from rich import progress

      columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
      )
      self._progress = progress.Progress(*columns, progress.TimeRemainingColumn(), transient=True)
      self._task = self._progress.add_task("training", total=steps, completed=start_step)

  @property
  def wants_samples(self) -> bool:
    """Whether lines end with a text."""
    return self._progress is not None

  def is_line(self, step: int) -> bool:
    """Whether a line is printed after this update."""
    return step in (1, self._steps) or step % self._log_every == 0

  def write(self, chunk: Chunk) -> None:
    """Adds the chunk to the line under way, and prints that where it is due."""
    self._losses.append(chunk.metrics["train/loss"])
    self._seconds += chunk.seconds
    if self._progress:
      self._progress.start()  # not before there is something to show, so that an error on the way leaves no bar behind
      self._progress.update(self._task, completed=chunk.step)
    if not self.is_line(chunk.step):
      return
    losses = np.concatenate(self._losses)
    line = format_line(
      chunk, self._steps, loss=float(losses.mean()), steps_per_second=len(losses) / max(self._seconds, 1e-9)
    )
    self._losses, self._seconds = [], 0.0
    if self._progress:
      self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
    else:
      print(line, flush=True)

  def close(self) -> None:
    """Takes the bar away."""
    if self._progress:
      self._progress.stop()


def format_line(chunk: Chunk, steps: int, *, loss: float, steps_per_second: float) -> str:
  """One line of progress: `step  100/1000 | loss 2.4321 | grad norm 1.02 | lr 9.0e-03 | 21,000 steps/s`."""
  rate = f"{steps_per_second:,.0f}" if steps_per_second >= 10 else f"{steps_per_second:.2f}"
  parts = [
    f"step {chunk.step:>{len(str(steps))}}/{steps}",
    f"loss {loss:.4f}",
    f"grad norm {chunk.metrics['train/grad_norm'][-1]:.2f}",
    f"lr {chunk.metrics['train/lr'][-1]:.1e}",
    f"{rate} steps/s",
  ]
  return " | ".join(parts if chunk.sample is None else [*parts, chunk.sample])


def draw_curve(losses: Sequence[float], *, width: int = 64, height: int = 12) -> str:
  """Draws losses over steps as text.

  Args:
    losses: one per update, nats per token; averaged in equal groups, one for each column. A group that is not
      finite, or beyond what the plot can label, leaves its column empty.
    width: columns.
    height: rows; each label is the value at the middle of its row.
  """
  import uniplot  # 0.1 s that only the end of a run pays

  losses = np.asarray(losses, np.float64)
  groups = [g for g in np.array_split(np.arange(len(losses)), width) if len(g) and (np.abs(losses[g]) < 1e12).all()]
  if not groups:
    return "no training loss is finite: there is no curve to draw"
  steps = [1 + float(g.mean()) for g in groups]
  means = np.array([losses[g].mean() for g in groups])
  margin = max(1e-6, 0.02 * float(np.ptp(means)))
  low, high = float(means.min()) - margin, float(means.max()) + margin
  lines = uniplot.plot_to_string(means, steps, lines=len(means) > 1, width=width, height=height, y_min=low, y_max=high)
  lines = lines.split("\n") if isinstance(lines, str) else list(lines)
  frame = [line[: line.rindex("│") + 1] for line in lines if "│" in line]
  labels = [high - (row + 0.5) / len(frame) * (high - low) for row in range(len(frame))]
  # Uniplot's own labels have too few digits: what it calls 2 may be 2.5.
  body = [
    f"{line} {label:.3g}" if row % 3 == 1 else line for row, (line, label) in enumerate(zip(frame, labels, strict=True))
  ]
  ends = f" step 1{f'step {len(losses):,}':>{max(0, len(frame[0]) - 8)}}"
  edge = "─" * (len(frame[0]) - 2)
  return "\n".join(["training loss, nats per token", f"┌{edge}┐", *body, f"└{edge}┘", ends])


def format_samples(texts: list[str], known: set[str]) -> str:
  """Samples in columns, those that stand in the training list marked with *."""
  cells = [f"{text or '(empty)'}{'*' if text in known else ''}" for text in texts]
  width = max(len(c) for c in cells) + 2
  columns = max(1, min(5, 76 // width))
  rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
  lines = ["  " + "".join(c.ljust(width) for c in row).rstrip() for row in rows]
  marked = sum(text in known for text in texts)
  note = (
    f" (* stands in the training list: {marked} of {len(texts)})"
    if marked
    else " (none of them stands in the training list)"
  )
  return "\n".join([f"{len(texts)} samples{note}", *lines])


def format_perplexity(loss: float) -> str:
  """exp(loss) for a person: two decimals where that is short, else four digits; beyond a float's range "inf"."""
  perplexity = math.exp(loss) if loss < 700 else math.inf
  return f"{perplexity:,.2f}" if perplexity < 1e6 else f"{perplexity:.4g}"


def uniform_loss(vocab_size: int) -> float:
  """The loss of guessing every id alike: ln(vocab_size), in nats."""
  return math.log(vocab_size)


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
