"""What a finished run's losses say: a verdict, with the numbers it rests on.

Responsible for reading training and held-out losses as a person would, and for holding a result against what the experiment
expects. Pure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jgpt.config import Expected

RISE = 0.02  # a held-out loss this much above its lowest, relatively, has risen
GAP = 0.25  # a held-out loss this much above the training loss, relatively, is another text's
FALL = 0.02  # a training loss that fell this much over its last tenth, relatively, was still falling
LEARNED = 0.1  # a training loss less than this below uniform guessing, relatively, has learned next to nothing
LAST = 50  # updates that "the training loss" of a run is the mean of


@dataclasses.dataclass(frozen=True)
class Reading:
  """A run's losses in a word.

  Attributes:
    verdict: "healthy", "overfitting", "underfitting" or "diverging".
    evidence: the numbers that say so, for a person.
  """

  verdict: str
  evidence: str


def judge_losses(
  losses: Sequence[float], heldout_losses: Sequence[tuple[int, float]], heldout_loss: float | None, baseline: float
) -> Reading:
  """Reads a finished run's losses.

  Diverging: a loss that is not finite, or a training loss that ends above guessing, or has lost half of what its lowest
  stretch had won over it. Overfitting: a held-out loss that rose by 2% from its lowest, or ends 25% above the training
  loss. Underfitting: a training loss less than 10% below uniform guessing, or a loss that still falls by 2% in a tenth of
  the updates: the held-out loss between its last two evaluations, or the training loss (and by three standard errors) in
  the last tenth. Otherwise healthy.

  Args:
    losses: of each update, nats per token; at least one.
    heldout_losses: (updates, loss) of the evaluations during training.
    heldout_loss: after the last update, over the whole held-out part; None where nothing is held out.
    baseline: the loss of uniform guessing.
  """
  losses = np.asarray(losses, np.float64)
  return (
    _diverging(losses, baseline)
    or _overfitting(losses, heldout_losses, heldout_loss)
    or _underfitting(losses, heldout_losses, baseline)
    or _healthy(losses, heldout_loss, baseline)
  )


def final_loss(losses: Sequence[float]) -> float:
  """The training loss of a run: the mean of its last 50 updates."""
  return float(np.mean(np.asarray(losses[-LAST:], np.float64)))


def _diverging(losses: np.ndarray, baseline: float) -> Reading | None:
  if not np.isfinite(losses).all():
    step = int(np.argmin(np.isfinite(losses))) + 1
    return Reading("diverging", f"the loss of step {step:,} is not finite")
  groups = np.array_split(losses, min(20, max(1, len(losses) // LAST)))  # stretches long enough to have a mean
  means = [float(g.mean()) for g in groups]
  lowest = int(np.argmin(means))
  rise, won = means[-1] - means[lowest], baseline - means[lowest]
  if means[-1] > 1.05 * baseline or (rise > 0.5 * abs(won) and rise > 0.1):
    end = sum(len(g) for g in groups[: lowest + 1])
    return Reading(
      "diverging",
      f"the training loss ends at {means[-1]:.2f}, after {means[lowest]:.2f} by step {end:,}; uniform guessing has "
      f"{baseline:.2f}",
    )
  return None


def _overfitting(
  losses: np.ndarray, heldout_losses: Sequence[tuple[int, float]], heldout_loss: float | None
) -> Reading | None:
  train = final_loss(losses)
  measured = [e for e in heldout_losses if e[0] > 0]
  if measured:
    (step, lowest), (_, last) = min(measured, key=lambda e: e[1]), measured[-1]
    if last > (1 + RISE) * lowest and train < last:
      return Reading("overfitting", f"the held-out loss rose from {lowest:.2f} at step {step:,} to {last:.2f}")
  if heldout_loss is not None and heldout_loss > (1 + GAP) * train:
    return Reading("overfitting", f"the held-out loss, {heldout_loss:.2f}, is far above the training loss, {train:.2f}")
  return None


def _underfitting(losses: np.ndarray, heldout_losses: Sequence[tuple[int, float]], baseline: float) -> Reading | None:
  train = final_loss(losses)
  if train > (1 - LEARNED) * baseline:
    return Reading("underfitting", f"the training loss, {train:.2f}, is hardly below uniform guessing, {baseline:.2f}")
  measured = [e for e in heldout_losses if e[0] > 0]
  if len(measured) > 1:
    (before_step, before), (step, last) = measured[-2:]
    if before - last > FALL * last * (step - before_step) / (0.1 * len(losses)):
      evidence = f"the held-out loss still fell, from {before:.2f} at step {before_step:,} to {last:.2f} at step {step:,}"
      return Reading("underfitting", evidence)
  tenth = max(2, len(losses) // 10)
  before, last = losses[-2 * tenth : -tenth], losses[-tenth:]
  if len(before) < 2:
    return None
  fall = before.mean() - last.mean()
  error = math.sqrt(before.var(ddof=1) / len(before) + last.var(ddof=1) / len(last))
  if fall > FALL * last.mean() and fall > 3 * error:
    return Reading(
      "underfitting",
      f"the training loss still fell from {before.mean():.2f} to {last.mean():.2f} in the last tenth of the steps",
    )
  return None


def _healthy(losses: np.ndarray, heldout_loss: float | None, baseline: float) -> Reading:
  train = final_loss(losses)
  evidence = f"the training loss fell to {train:.2f} ({baseline:.2f} is guessing) and levelled off"
  if heldout_loss is not None:
    side = "above" if heldout_loss >= train else "below"
    evidence += f"; the held-out loss is {abs(heldout_loss - train):.2f} {side} it"
  return Reading("healthy", evidence)


def compare_expected(
  expected: Sequence[Expected], label: str | None, losses: Sequence[float], heldout_loss: float | None
) -> str:
  """Holds a finished run against what its experiment expects on this data; "" where nothing is expected.

  Args:
    expected: of the experiment.
    label: of the data, `jgpt.data.Data.label`.
    losses: of each update.
    heldout_loss: over the whole held-out part.
  """
  for entry in expected:
    if entry.data == label and len(losses):
      got = heldout_loss if entry.heldout else final_loss(losses)
      if got is None:
        return ""
      what = "held-out loss" if entry.heldout else "training loss"
      within = abs(got - entry.loss_nats_per_token) <= entry.band
      words = "as expected" if within else "outside the expected band"
      return f"{words}: {what} {got:.2f} ({entry.loss_nats_per_token:.2f} ± {entry.band:.2f})"
  return ""
