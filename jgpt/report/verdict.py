"""A verdict on a finished run's losses, with the numbers behind it.

Pure: reads training and held-out losses, and compares a result with the one that the experiment
expects. Printing is in `summary.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jgpt.config import Expected

# Relative thresholds.
RISE = 0.02  # a held-out loss this much above its lowest has risen
GAP = 0.25  # a held-out loss this much above the training loss is overfitting
FALL = 0.02  # a training loss that fell by this in its last tenth was still falling
LEARNED = 0.1  # a training loss less than this below uniform guessing is underfitting

LAST = 50  # updates whose mean is the training loss of a run


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """The verdict on a run's losses.

  Attributes:
    verdict: "healthy", "overfitting", "underfitting" or "diverging".
    evidence: the numbers behind it, for a person.
  """

  verdict: str
  evidence: str


def diagnose_losses(
  losses: Sequence[float],
  heldout_losses: Sequence[tuple[int, float]],
  heldout_loss: float | None,
  baseline: float,
) -> Diagnosis:
  """Diagnoses a finished run from its losses.

  The first of these that holds:

    diverging      a loss is not finite; or the training loss ends more than 5% above uniform
                   guessing; or it lost more than half of what its lowest stretch had gained over
                   uniform guessing, and more than 0.1
    overfitting    the held-out loss rose by 2% from its lowest, or ends 25% above the training loss
    underfitting   the training loss is less than 10% below uniform guessing; or a loss still falls
                   by 2% in a tenth of the updates: the held-out loss between its last two
                   evaluations, or the training loss (also by three standard errors) in the last
                   tenth
    healthy        otherwise

  Args:
    losses: of each update, nats per token; at least one.
    heldout_losses: (updates, loss) of the evaluations during training.
    heldout_loss: after the last update, over the whole held-out part; None where nothing is held
      out.
    baseline: the loss of uniform guessing, nats per token.
  """
  losses = np.asarray(losses, np.float64)
  return (
    _find_divergence(losses, baseline)
    or _find_overfitting(losses, heldout_losses, heldout_loss)
    or _find_underfitting(losses, heldout_losses, baseline)
    or _describe_health(losses, heldout_loss, baseline)
  )


def final_loss(losses: Sequence[float]) -> float:
  """Computes the training loss of a run: the mean of its last 50 updates."""
  return float(np.mean(np.asarray(losses[-LAST:], np.float64)))


def _find_divergence(losses: np.ndarray, baseline: float) -> Diagnosis | None:
  if not np.isfinite(losses).all():
    step = int(np.argmin(np.isfinite(losses))) + 1
    return Diagnosis("diverging", f"the loss of step {step:,} is not finite")
  # Stretches of at least 50 updates, whose means are not noise.
  groups = np.array_split(losses, min(20, max(1, len(losses) // LAST)))
  means = [float(g.mean()) for g in groups]
  lowest = int(np.argmin(means))
  rise, won = means[-1] - means[lowest], baseline - means[lowest]
  if means[-1] > 1.05 * baseline or (rise > 0.5 * abs(won) and rise > 0.1):
    end = sum(len(g) for g in groups[: lowest + 1])
    return Diagnosis(
      "diverging",
      f"the training loss ends at {means[-1]:.2f}, after {means[lowest]:.2f} by step {end:,}; "
      f"uniform guessing has {baseline:.2f}",
    )
  return None


def _find_overfitting(
  losses: np.ndarray, heldout_losses: Sequence[tuple[int, float]], heldout_loss: float | None
) -> Diagnosis | None:
  train = final_loss(losses)
  measured = [e for e in heldout_losses if e[0] > 0]
  if measured:
    (step, lowest), (_, last) = min(measured, key=lambda e: e[1]), measured[-1]
    if last > (1 + RISE) * lowest and train < last:
      return Diagnosis(
        "overfitting", f"the held-out loss rose from {lowest:.2f} at step {step:,} to {last:.2f}"
      )
  if heldout_loss is not None and heldout_loss > (1 + GAP) * train:
    return Diagnosis(
      "overfitting",
      f"the held-out loss, {heldout_loss:.2f}, is far above the training loss, {train:.2f}",
    )
  return None


def _find_underfitting(
  losses: np.ndarray, heldout_losses: Sequence[tuple[int, float]], baseline: float
) -> Diagnosis | None:
  train = final_loss(losses)
  if train > (1 - LEARNED) * baseline:
    return Diagnosis(
      "underfitting",
      f"the training loss, {train:.2f}, is hardly below uniform guessing, {baseline:.2f}",
    )
  measured = [e for e in heldout_losses if e[0] > 0]
  if len(measured) > 1:
    (before_step, before), (step, last) = measured[-2:]
    if before - last > FALL * last * (step - before_step) / (0.1 * len(losses)):
      return Diagnosis(
        "underfitting",
        f"the held-out loss still fell, from {before:.2f} at step {before_step:,} to {last:.2f} at "
        f"step {step:,}",
      )
  tenth = max(2, len(losses) // 10)
  before, last = losses[-2 * tenth : -tenth], losses[-tenth:]
  if len(before) < 2:
    return None
  fall = before.mean() - last.mean()
  error = math.sqrt(before.var(ddof=1) / len(before) + last.var(ddof=1) / len(last))
  if fall > FALL * last.mean() and fall > 3 * error:
    return Diagnosis(
      "underfitting",
      f"the training loss still fell from {before.mean():.2f} to {last.mean():.2f} in the last "
      "tenth of the steps",
    )
  return None


def _describe_health(losses: np.ndarray, heldout_loss: float | None, baseline: float) -> Diagnosis:
  train = final_loss(losses)
  evidence = f"the training loss fell to {train:.2f} ({baseline:.2f} is guessing) and levelled off"
  if heldout_loss is not None:
    side = "above" if heldout_loss >= train else "below"
    evidence += f"; the held-out loss is {abs(heldout_loss - train):.2f} {side} it"
  return Diagnosis("healthy", evidence)


def compare_expected(
  expected: Sequence[Expected],
  label: str | None,
  losses: Sequence[float],
  heldout_loss: float | None,
) -> str:
  """Compares a finished run with the result that its experiment expects on this data.

  Args:
    expected: of the experiment.
    label: of the data, `data.corpus.Data.label`.
    losses: of each update, nats per token.
    heldout_loss: over the whole held-out part, nats per token.

  Returns:
    For example "as expected: training loss 2.37 (2.37 ± 0.05)"; "" where nothing is expected.
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
