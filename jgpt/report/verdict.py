"""A verdict on a finished run's losses, with the numbers behind it.

Pure: reads training and held-out losses, and compares a result with the one that the experiment
expects. Printing is in `summary.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jgpt.config import Expected, OptimizerConfig

# Relative thresholds.
RISE = 0.02  # a held-out loss this much above its lowest has risen
GAP = 0.25  # a held-out loss this much above the training loss is overfitting
FALL = 0.02  # a loss that falls by this in a tenth of the updates is still falling
UNSURE = 0.1  # a fall in a tenth of the updates that must be ruled out to say "levelled off"
LEARNED = 0.1  # a training loss less than this below uniform guessing is underfitting
BY_HEART = 0.1  # of uniform guessing: a loss below it is usually a text learnt by heart

LAST = 50  # updates whose mean is the training loss of a run
MIN_UPDATES = 20  # fewer say nothing about uniform guessing
MIN_LEVEL_UPDATES = 100  # the training loss of fewer does not show that it levelled off


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """The verdict on a run's losses.

  Attributes:
    verdict: "not trained", "diverging", "overfitting", "underfitting", "too short to say",
      "levelled off" or "healthy".
    evidence: the numbers behind it, and what they cannot show, for a person.
  """

  verdict: str
  evidence: str


def diagnose_losses(
  losses: Sequence[float],
  heldout_losses: Sequence[tuple[int, float]],
  heldout_loss: float | None,
  baseline: float,
  *,
  num_idle: int = 0,
) -> Diagnosis:
  """Diagnoses a finished run from its losses.

  The first of these that holds:

    diverging        a loss is not finite
    not trained      the learning rate was 0 at more than half of the updates
    diverging        the training loss ends above uniform guessing and above its first value, by 5%
                     and four standard deviations, or by half; or it lost more than half of what its
                     lowest stretch had gained, more than 0.1, and more than three standard errors.
                     A loss that falls is not diverging, however far above uniform guessing
    overfitting      the held-out loss rose by 2% from its lowest, or ends 25% above the training
                     loss, more than 0.05, and more than three standard errors
    underfitting     a loss still falls by 2% in a tenth of the updates: the held-out loss between
                     its last two evaluations, or the training loss (also by four standard errors of
                     the slope) over the last third, or the last half of fewer than 100 updates; or
                     the training loss of 20 updates or more is not 10% below uniform guessing
    too short to say fewer than 100 updates, or training losses that scatter so much that a fall by
                     10% in a tenth of the updates is within two standard errors; unless the last
                     two evaluations, a tenth of the updates apart, show that nothing falls
                     Losses below a tenth of uniform guessing are compared with that tenth
    levelled off     none of these, and nothing is held out: overfitting cannot be seen
    healthy          none of these, and the held-out loss agrees

  Args:
    losses: of each update, nats per token; at least one.
    heldout_losses: (updates, loss) of the evaluations during training.
    heldout_loss: after the last update, over the whole held-out part; None where nothing is held
      out.
    baseline: the loss of uniform guessing, nats per token.
    num_idle: updates at a learning rate of 0, from `count_idle_updates`.
  """
  losses = np.asarray(losses, np.float64)
  found = (
    _find_nonfinite(losses)
    or _find_idleness(losses, num_idle)
    or _find_divergence(losses, baseline)
    or _find_overfitting(losses, heldout_losses, heldout_loss)
    or _find_underfitting(losses, heldout_losses, baseline)
    or _find_doubt(losses, heldout_losses, baseline)
    or _describe_level(losses, heldout_loss, baseline)
  )
  if num_idle and found.verdict != "not trained":
    idle = f"the learning rate was 0 at {num_idle:,} of {len(losses):,} updates"
    return Diagnosis(found.verdict, f"{found.evidence}; {idle}")
  return found


def count_idle_updates(optimizer: OptimizerConfig, steps: int) -> int:
  """Counts the updates whose learning rate is 0, but for the single ones that begin a rise.

  Args:
    optimizer: `decay_steps` resolved.
    steps: updates of the run.
  """
  is_constant = optimizer.schedule == "constant"
  peak, end = np.float32(optimizer.peak_lr), np.float32(optimizer.end_lr)
  falling = steps if is_constant else min(steps, optimizer.decay_steps)
  idle = 0 if end else steps - falling
  if not peak:
    rises = end and not is_constant
    idle += min(optimizer.warmup_steps, falling) if rises else falling
  return idle


def final_loss(losses: Sequence[float]) -> float:
  """Computes the training loss of a run: the mean of its last 50 updates."""
  return float(np.mean(np.asarray(losses[-LAST:], np.float64)))


def _find_nonfinite(losses: np.ndarray) -> Diagnosis | None:
  if np.isfinite(losses).all():
    return None
  step = int(np.argmin(np.isfinite(losses))) + 1
  return Diagnosis("diverging", f"the loss of step {step:,} is not finite")


def _find_idleness(losses: np.ndarray, num_idle: int) -> Diagnosis | None:
  if 2 * num_idle <= len(losses):
    return None
  what = "every update" if num_idle >= len(losses) else f"{num_idle:,} of {len(losses):,} updates"
  return Diagnosis(
    "not trained",
    f"the learning rate was 0 at {what}, which changed nothing; the training loss ends at "
    f"{final_loss(losses):.2f}",
  )


def _standard_error(losses: np.ndarray) -> float:
  """Computes the standard error of a mean; infinite for a single loss."""
  return float(losses.std(ddof=1)) / math.sqrt(len(losses)) if len(losses) > 1 else math.inf


def _find_divergence(losses: np.ndarray, baseline: float) -> Diagnosis | None:
  # Stretches of at least 50 updates, whose means are not noise.
  groups = np.array_split(losses, min(20, max(1, len(losses) // LAST)))
  means = [float(g.mean()) for g in groups]
  lowest, last, end = int(np.argmin(means)), groups[-1], means[-1]
  highest_start = max(baseline, float(losses[0]))
  is_above = end > 1.5 * highest_start or (
    end > 1.05 * highest_start and end - losses[0] > 4 * last.std()
  )
  # What was to be gained: from uniform guessing, or from where given weights began.
  first = float(losses[:10].mean())
  gained = (first if first < 0.9 * baseline else max(first, baseline)) - means[lowest]
  rise = end - means[lowest]
  error = math.hypot(_standard_error(groups[lowest]), _standard_error(last))
  if is_above and len(losses) > 1:
    since = f"after {losses[0]:.2f} at step 1"
  elif len(groups) > 1 and rise > 0.5 * abs(gained) and rise > 0.1 and rise > 3 * error:
    since = f"after {means[lowest]:.2f} by step {sum(len(g) for g in groups[: lowest + 1]):,}"
  else:
    return None
  return Diagnosis(
    "diverging",
    f"the training loss ends at {end:.2f}, {since}; uniform guessing has {baseline:.2f}",
  )


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
  if heldout_loss is None:
    return None
  gap = heldout_loss - train
  if gap > GAP * train and gap > 0.05 and gap > 3 * _standard_error(losses[-LAST:]):
    return Diagnosis(
      "overfitting",
      f"the held-out loss, {heldout_loss:.2f}, is far above the training loss, {train:.2f}",
    )
  return None


def _fit_fall(losses: np.ndarray) -> tuple[float, float, int] | None:
  """Computes how the last losses fall, by the least squares of a line.

  Returns:
    Its fall in a tenth of all updates, the standard error of that, and the losses it is fitted to;
    None for fewer than 10.
  """
  num = max(10, len(losses) // (2 if len(losses) < 100 else 3))
  if len(losses) < num:
    return None
  at = np.arange(num) - (num - 1) / 2
  slope = float(at @ losses[-num:] / (at @ at))
  rest = losses[-num:] - losses[-num:].mean() - slope * at
  error = math.sqrt(float(rest @ rest) / (num - 2) / float(at @ at))
  tenth = len(losses) / 10
  return -slope * tenth, error * tenth, num


def _find_underfitting(
  losses: np.ndarray, heldout_losses: Sequence[tuple[int, float]], baseline: float
) -> Diagnosis | None:
  train = final_loss(losses)
  measured = [e for e in heldout_losses if e[0] > 0]
  if len(measured) > 1:
    (before_step, before), (step, last) = measured[-2:]
    if before - last > FALL * last * (step - before_step) / (0.1 * len(losses)):
      return Diagnosis(
        "underfitting",
        f"the held-out loss still fell, from {before:.2f} at step {before_step:,} to {last:.2f} at "
        f"step {step:,}",
      )
  if fitted := _fit_fall(losses):
    fall, error, num = fitted
    part = losses[-num:]
    if fall > FALL * max(part.mean(), BY_HEART * baseline) and fall > 4 * error:
      third = max(2, num // 3)
      return Diagnosis(
        "underfitting",
        f"the training loss still fell, from {part[:third].mean():.2f} to "
        f"{part[-third:].mean():.2f} within the last {num:,} updates",
      )
  if train > (1 - LEARNED) * baseline and len(losses) >= MIN_UPDATES:
    below = "hardly below" if train < baseline else "not below"
    return Diagnosis(
      "underfitting",
      f"the training loss, {train:.2f}, is {below} uniform guessing, {baseline:.2f}",
    )
  return None


def _find_doubt(
  losses: np.ndarray, heldout_losses: Sequence[tuple[int, float]], baseline: float
) -> Diagnosis | None:
  measured = [e for e in heldout_losses if e[0] > 0]
  is_compared = len(measured) > 1 and len(losses) >= MIN_UPDATES
  if is_compared and measured[-1][0] - measured[-2][0] >= 0.1 * len(losses):
    return None  # the held-out loss does not fall, as `_find_underfitting` found
  fitted = _fit_fall(losses)
  if fitted is None or len(losses) < MIN_LEVEL_UPDATES:
    count = "1 update does" if len(losses) == 1 else f"{len(losses):,} updates do"
    return Diagnosis(
      "too short to say",
      f"{count} not show whether the loss falls further; the training loss is "
      f"{final_loss(losses):.2f}",
    )
  fall, error, num = fitted
  level = float(losses[-num:].mean())
  if max(fall, 0.0) + 2 * error <= UNSURE * max(level, BY_HEART * baseline):
    return None
  return Diagnosis(
    "too short to say",
    f"the last {num:,} training losses, {level:.2f} on average, scatter by "
    f"{losses[-num:].std():.2f}, too much to show whether they fall",
  )


def _describe_level(losses: np.ndarray, heldout_loss: float | None, baseline: float) -> Diagnosis:
  train = final_loss(losses)
  evidence = f"the training loss fell to {train:.2f} ({baseline:.2f} is guessing)"
  if heldout_loss is not None:
    side = "above" if heldout_loss >= train else "below"
    gap = f"the held-out loss is {abs(heldout_loss - train):.2f} {side} it"
    return Diagnosis("healthy", f"{evidence} and levelled off; {gap}")
  by_heart = " (so low a loss usually is)" if train < BY_HEART * baseline else ""
  unknown = f"nothing is held out: whether it is learnt by heart{by_heart} cannot be seen"
  return Diagnosis("levelled off", f"{evidence}; {unknown}")


def match_expected(
  expected: Sequence[Expected],
  label: str | None,
  losses: Sequence[float],
  heldout_loss: float | None,
) -> dict[str, str | float | bool] | None:
  """Finds the result that an experiment expects on this data, and whether a run is inside its band.

  Args:
    expected: of the experiment.
    label: of the data, `data.corpus.Data.label`.
    losses: of each update, nats per token.
    heldout_loss: over the whole held-out part, nats per token.

  Returns:
    what ("held-out loss" or "training loss"), loss, band, got and is_inside; None where nothing is
    expected, or it was not evaluated.
  """
  entry = find_expected(expected, label)
  if entry is None or not len(losses):
    return None
  got = heldout_loss if entry.heldout else final_loss(losses)
  if got is None:
    return None
  return {
    "what": "held-out loss" if entry.heldout else "training loss",
    "loss": entry.loss_nats_per_token,
    "band": entry.band,
    "got": got,
    "is_inside": abs(got - entry.loss_nats_per_token) <= entry.band,
  }


def find_expected(expected: Sequence[Expected], label: str | None) -> Expected | None:
  """Finds the result that an experiment expects on a text; None where it expects none.

  Args:
    expected: of the experiment.
    label: of the data, `data.corpus.Data.label`.
  """
  return next((entry for entry in expected if entry.data == label), None)


def describe_expected(found: dict[str, str | float | bool]) -> str:
  """Describes what `match_expected` found: "as expected: training loss 2.37 (2.37 ± 0.05)"."""
  words = "as expected" if found["is_inside"] else "outside the expected band"
  return f"{words}: {found['what']} {found['got']:.2f} ({found['loss']:.2f} ± {found['band']:.2f})"
