"""Progress in the terminal: one line at a time, a bar, a curve of the losses, and samples.

The interface of writers, and the one that writes metrics.jsonl, are in `runs/log.py`; when they are
called is decided in `train.py`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

import numpy as np

from jgpt.devices.footprint import Budget, describe_bytes
from jgpt.runs.log import Chunk

MIN_TIMED_SECONDS = 10.0  # lines of shorter runs say no time
MAX_DRAWN_LOSS = 1e12  # larger values do not fit the plot's labels


class ConsoleWriter:
  """Prints a line of progress after the first update, every `log_every` updates, and the last.

  Evaluations also print one. On a terminal the lines are above a bar that shows the remaining time;
  elsewhere they end with the time of day and the remaining time.
  A sample drawn at that moment ends the line if it is short, and is below it otherwise.
  """

  def __init__(
    self,
    *,
    steps: int,
    log_every: int,
    start_step: int = 0,
    epoch_steps: int | None = None,
    terminal: bool | None = None,
  ):
    """Prepares the bar, which appears with the first `write`.

    Args:
      steps: updates in all.
      log_every: updates between two lines.
      start_step: updates already done.
      epoch_steps: updates in an epoch; lines then count the steps of each epoch. None counts the
        steps of the run.
      terminal: whether to show the bar; None asks standard output.
    """
    self._steps, self._log_every, self._epoch_steps = steps, log_every, epoch_steps
    self._losses: list[np.ndarray] = []
    self._first: tuple[int, float] | None = None  # step and time of the first call
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
    """Returns whether lines can end with a sample."""
    return self._progress is not None

  def is_line_due(self, step: int) -> bool:
    """Returns whether a line is printed after this update."""
    in_epoch = step if self._epoch_steps is None else step % self._epoch_steps
    return step in (1, self._steps) or in_epoch % self._log_every == 0

  def write(self, chunk: Chunk) -> None:
    """Adds the chunk to the current line, and prints the line if it is due."""
    if "train/loss" in chunk.metrics:
      self._losses.append(chunk.metrics["train/loss"])
    if chunk.perf is not None and self._first is None:
      self._first = chunk.step, chunk.perf.elapsed
    if self._progress:
      # Started only now, so that an error before the first update leaves no bar behind.
      self._progress.start()
      self._progress.update(self._task, completed=chunk.step)
    if chunk.budget is not None and chunk.budget.step is not None:
      self._print(describe_budget(chunk.budget))
    if not self.is_line_due(chunk.step) and chunk.heldout_loss is None and not chunk.texts:
      return
    losses = np.concatenate(self._losses) if self._losses else np.zeros(0)
    loss = float(losses.mean()) if len(losses) else None
    where = format_step(chunk.step, self._steps, self._epoch_steps)
    line = format_line(chunk, where, loss, self._describe_time(chunk))
    self._losses = []
    self._print(line)

  def _print(self, line: str) -> None:
    if self._progress:
      self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
    else:
      print(line, flush=True)

  def _describe_time(self, chunk: Chunk) -> str:
    """Describes the time of day and how long the rest takes: "14:05:33, 1 h 02 min left".

    The rest takes as long a step as all since the first call, with evaluations, samples and saves.
    Says nothing beside the bar, or in a run of a few seconds.
    """
    if self._progress or chunk.perf is None:
      return ""
    step, began = self._first
    if chunk.step == step or chunk.perf.elapsed < 1:
      return ""
    left = (self._steps - chunk.step) * (chunk.perf.elapsed - began) / (chunk.step - step)
    if chunk.perf.elapsed + left < MIN_TIMED_SECONDS:
      return ""
    clock = time.strftime("%H:%M:%S")
    return f"{clock}, {format_duration(left)} left" if chunk.step < self._steps else clock

  def close(self) -> None:
    """Removes the bar."""
    if self._progress:
      self._progress.stop()


def describe_budget(budget: Budget) -> str:
  """Describes the memory that a compiled step takes: "compiled: a step takes 4.2 of 15.8 GB"."""
  there = "" if budget.memory is None else f", of {describe_bytes(budget.memory)} that were free"
  return f"compiled: a step takes {describe_bytes(budget.step)} of memory on each device{there}"


def format_step(step: int, steps: int, epoch_steps: int | None) -> str:
  """Formats the progress of training: `step  100/1000`, or `Epoch 1/3 | step  50/171`."""
  if epoch_steps is None:
    return f"step {step:>{len(str(steps))}}/{steps}"
  epoch = max(0, step - 1) // epoch_steps
  done, width = step - epoch * epoch_steps, len(str(epoch_steps))
  return f"Epoch {epoch + 1}/{-(-steps // epoch_steps)} | step {done:>{width}}/{epoch_steps}"


def format_duration(seconds: float) -> str:
  """Formats a length of time by its two largest units: "48 s", "3 min 05 s", "1 h 02 min"."""
  whole = round(seconds)
  for size, unit, smaller, name in (
    (86400, "d", 3600, "h"),
    (3600, "h", 60, "min"),
    (60, "min", 1, "s"),
  ):
    if whole >= size:
      return f"{whole // size} {unit} {whole % size // smaller:02} {name}"
  return f"{whole} s"


def format_line(chunk: Chunk, where: str, loss: float | None, clock: str = "") -> str:
  """Formats a line of progress.

  For example `step  100/1000 | loss 2.4321 | grad norm 1.02 | lr 9.0e-03 | 21,000 steps/s`, and
  where the devices' peak is known `| 412,000 tokens/s, MFU 41.2%`.

  Args:
    chunk: the last; its held-out loss and first text are added if it has them.
    where: from `format_step`.
    loss: mean training loss since the line before; None before the first update.
    clock: the time and what is left; "" says nothing.
  """
  parts = [where] if loss is None else [where, f"loss {loss:.4f}"]
  if chunk.heldout_loss is not None:
    parts.append(f"held out {chunk.heldout_loss:.4f}")
  if loss is not None:
    parts += [
      f"grad norm {chunk.metrics['train/grad_norm'][-1]:.2f}",
      f"lr {chunk.metrics['train/lr'][-1]:.1e}",
    ]
  if chunk.perf is not None:
    rate = chunk.perf.steps_per_second
    parts.append(f"{rate:,.0f} steps/s" if rate >= 10 else f"{rate:.2f} steps/s")
    if chunk.perf.mfu is not None:
      parts.append(f"{chunk.perf.tokens_per_second:,.0f} tokens/s, MFU {chunk.perf.mfu:.1%}")
  parts += [clock] if clock else []
  if not chunk.texts:
    return " | ".join(parts)
  text = chunk.texts[0]
  if len(text) <= 20 and "\n" not in text:
    return " | ".join([*parts, text])
  return "\n".join([" | ".join(parts), indent(text)])


def indent(text: str) -> str:
  """Indents each line of a text by "  | ", and replaces unprintable characters by U+FFFD."""
  shown = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
  return "\n".join(f"  | {line}" for line in shown.split("\n"))


def draw_curve(
  losses: Sequence[float],
  heldout_losses: Sequence[tuple[int, float]] = (),
  *,
  width: int = 64,
  height: int = 12,
) -> str:
  """Draws losses over steps as text: the training loss as a line, each held-out loss as an o.

  Args:
    losses: one per update, nats per token; averaged in equal groups, one for each column. A column
      is empty if a loss of its group is not finite, or too large for the labels.
    heldout_losses: (updates, loss); those that are not finite are left out.
    width: columns.
    height: rows; each label is the value at the middle of its row.
  """
  import uniplot  # takes 0.1 s to import, and is needed at the end of a run only

  losses = np.asarray(losses, np.float64)
  groups = [
    g
    for g in np.array_split(np.arange(len(losses)), width)
    if len(g) and (np.abs(losses[g]) < MAX_DRAWN_LOSS).all()
  ]
  if not groups:
    return "no training loss is finite: there is no curve to draw"
  steps = [1 + float(g.mean()) for g in groups]
  means = np.array([losses[g].mean() for g in groups])
  points = [
    (step, loss)
    for step, loss in heldout_losses
    if math.isfinite(loss) and abs(loss) < MAX_DRAWN_LOSS
  ]
  values = np.concatenate([means, [loss for _, loss in points]])
  margin = max(1e-6, 0.02 * float(np.ptp(values)))
  low, high = float(values.min()) - margin, float(values.max()) + margin
  limits = {"y_min": low, "y_max": high, "x_min": 0.5, "x_max": len(losses) + 0.5}
  lines = uniplot.plot_to_string(
    means, steps, lines=len(means) > 1, width=width, height=height, **limits
  )
  lines = lines.split("\n") if isinstance(lines, str) else list(lines)
  frame = [line[: line.rindex("│") + 1] for line in lines if "│" in line]
  inner = len(frame[0]) - 2  # columns between the two edges
  for step, loss in points:
    row = min(len(frame) - 1, int((high - loss) / (high - low) * len(frame)))
    column = 1 + min(inner - 1, int(max(0.0, step - 0.5) / len(losses) * inner))
    frame[row] = frame[row][:column] + "o" + frame[row][column + 1 :]
  labels = [high - (row + 0.5) / len(frame) * (high - low) for row in range(len(frame))]
  # Uniplot's own labels have too few digits: its 2 may be 2.5.
  body = [
    f"{line} {label:.3g}" if row % 3 == 1 else line
    for row, (line, label) in enumerate(zip(frame, labels, strict=True))
  ]
  ends = f" step 1{f'step {len(losses):,}':>{max(0, inner - 6)}}"
  edge = "─" * inner
  what = "training loss (line) and held-out loss (o)" if points else "training loss"
  return "\n".join([f"{what}, nats per token", f"┌{edge}┐", *body, f"└{edge}┘", ends])


def format_samples(texts: list[str], known: set[str]) -> str:
  """Formats samples in columns; those in the training list are marked with *."""
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
  """Formats exp(loss) with two decimals if that is short, else four digits.

  "inf" where it overflows a float.
  """
  perplexity = math.exp(loss) if loss < 700 else math.inf
  return f"{perplexity:,.2f}" if perplexity < 1e6 else f"{perplexity:.4g}"


def uniform_loss(vocab_size: int) -> float:
  """Computes the loss of uniform guessing: ln(vocab_size), in nats per token."""
  return math.log(vocab_size)
