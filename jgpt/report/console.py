"""What a run says: one line of progress at a time, and one row per update in a file.

Responsible for the writers, for what is handed to them and when it is on the disk, and for figures drawn as text. A writer
is an object with `write(chunk)` and `close()`; it is called with what one compiled call returned. Not responsible for when
that happens (`train.py`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np

from jgpt.runs.log import Chunk


class ConsoleWriter:
  """Prints a line every `log_every` updates, after the first update, each evaluation and the last update.

  On a terminal the lines stand above a bar with the time that is left. A text drawn at that moment ends the line where it
  is short and stands below it otherwise.
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
    """Begins.

    Args:
      steps: updates in all.
      log_every: updates between two lines.
      start_step: updates already done.
      epoch_steps: updates in an epoch: lines then count the steps of each; None counts those of the run.
      terminal: whether to show the bar; None asks standard output.
    """
    self._steps, self._log_every, self._epoch_steps = steps, log_every, epoch_steps
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
    """Whether lines can end with a text."""
    return self._progress is not None

  def is_line(self, step: int) -> bool:
    """Whether a line is printed after this update."""
    in_epoch = step if self._epoch_steps is None else step % self._epoch_steps
    return step in (1, self._steps) or in_epoch % self._log_every == 0

  def write(self, chunk: Chunk) -> None:
    """Adds the chunk to the line under way, and prints that where it is due."""
    if "train/loss" in chunk.metrics:
      self._losses.append(chunk.metrics["train/loss"])
    self._seconds += chunk.seconds
    if self._progress:
      self._progress.start()  # not before there is something to show, so that an error on the way leaves no bar behind
      self._progress.update(self._task, completed=chunk.step)
    if not self.is_line(chunk.step) and chunk.heldout_loss is None and not chunk.texts:
      return
    losses = np.concatenate(self._losses) if self._losses else np.zeros(0)
    loss = float(losses.mean()) if len(losses) else None
    line = format_line(
      chunk, format_step(chunk.step, self._steps, self._epoch_steps), loss, len(losses) / max(self._seconds, 1e-9)
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


def format_step(step: int, steps: int, epoch_steps: int | None) -> str:
  """Where training is: `step  100/1000`, or `Epoch 1/3 | step  50/171`."""
  if epoch_steps is None:
    return f"step {step:>{len(str(steps))}}/{steps}"
  epoch = max(0, step - 1) // epoch_steps
  done, width = step - epoch * epoch_steps, len(str(epoch_steps))
  return f"Epoch {epoch + 1}/{-(-steps // epoch_steps)} | step {done:>{width}}/{epoch_steps}"


def format_line(chunk: Chunk, where: str, loss: float | None, steps_per_second: float) -> str:
  """One line of progress: `step  100/1000 | loss 2.4321 | grad norm 1.02 | lr 9.0e-03 | 21,000 steps/s`.

  Args:
    chunk: the last; its held-out loss and its texts are added where it has them.
    where: from `format_step`.
    loss: mean training loss since the line before; None before the first update.
    steps_per_second: since the line before.
  """
  parts = [where] if loss is None else [where, f"loss {loss:.4f}"]
  if chunk.heldout_loss is not None:
    parts.append(f"held out {chunk.heldout_loss:.4f}")
  if loss is not None:
    parts += [f"grad norm {chunk.metrics['train/grad_norm'][-1]:.2f}", f"lr {chunk.metrics['train/lr'][-1]:.1e}"]
    parts.append(f"{steps_per_second:,.0f} steps/s" if steps_per_second >= 10 else f"{steps_per_second:.2f} steps/s")
  if not chunk.texts:
    return " | ".join(parts)
  text = chunk.texts[0]
  if len(text) <= 20 and "\n" not in text:
    return " | ".join([*parts, text])
  return "\n".join([" | ".join(parts), indent(text)])


def indent(text: str) -> str:
  """A drawn text with each line set off, unprintable characters shown as the replacement character."""
  shown = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
  return "\n".join(f"  | {line}" for line in shown.split("\n"))


def draw_curve(
  losses: Sequence[float],
  heldout_losses: Sequence[tuple[int, float]] = (),
  *,
  width: int = 64,
  height: int = 12,
) -> str:
  """Draws losses over steps as text: training as a line, each evaluation on the held-out part as an o.

  Args:
    losses: one per update, nats per token; averaged in equal groups, one for each column. A group that is not
      finite, or beyond what the plot can label, leaves its column empty.
    heldout_losses: (updates, loss); what is not finite is left out.
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
  points = [(step, loss) for step, loss in heldout_losses if math.isfinite(loss) and abs(loss) < 1e12]
  values = np.concatenate([means, [loss for _, loss in points]])
  margin = max(1e-6, 0.02 * float(np.ptp(values)))
  low, high = float(values.min()) - margin, float(values.max()) + margin
  limits = {"y_min": low, "y_max": high, "x_min": 0.5, "x_max": len(losses) + 0.5}
  lines = uniplot.plot_to_string(means, steps, lines=len(means) > 1, width=width, height=height, **limits)
  lines = lines.split("\n") if isinstance(lines, str) else list(lines)
  frame = [line[: line.rindex("│") + 1] for line in lines if "│" in line]
  for step, loss in points:
    row = min(len(frame) - 1, int((high - loss) / (high - low) * len(frame)))
    column = 1 + min(len(frame[0]) - 3, int(max(0.0, step - 0.5) / len(losses) * (len(frame[0]) - 2)))
    frame[row] = frame[row][:column] + "o" + frame[row][column + 1 :]
  labels = [high - (row + 0.5) / len(frame) * (high - low) for row in range(len(frame))]
  # Uniplot's own labels have too few digits: what it calls 2 may be 2.5.
  body = [
    f"{line} {label:.3g}" if row % 3 == 1 else line for row, (line, label) in enumerate(zip(frame, labels, strict=True))
  ]
  ends = f" step 1{f'step {len(losses):,}':>{max(0, len(frame[0]) - 8)}}"
  edge = "─" * (len(frame[0]) - 2)
  title = f"{'training loss (line) and held-out loss (o)' if points else 'training loss'}, nats per token"
  return "\n".join([title, f"┌{edge}┐", *body, f"└{edge}┘", ends])


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
