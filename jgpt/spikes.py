"""How far a loss is above those before it.

Responsible for running statistics of the training loss and for the z-score that calls one a spike: the same few lines serve
the optimizer, which may skip the update, on JAX scalars, and the log on floats and NumPy arrays. Not responsible for what
then happens (`step.py`, `health.py`). Pure.
"""

from typing import Any, NamedTuple

import numpy as np

DECAY = 0.99  # losses of the last hundred updates count: a schedule's trend is slower, and one outlier is soon forgotten
MIN_COUNT = 20  # the first losses fall too fast, and are too few, to say what is usual
MIN_DEVIATION = 0.01  # nats per token: a rise of less than a few of these is no spike, however still the loss was before
SPIKE = 7.0  # the z-score above which a loss is logged as a spike


class LossStats(NamedTuple):
  """What is known of the losses so far: Python numbers, or scalars of JAX.

  Attributes:
    count: losses observed, int.
    mean: of them, the i-th before the last weighted by DECAY^i, nats per token.
    variance: about that mean, under the same weights.
  """

  count: Any = 0
  mean: Any = 0.0
  variance: Any = 0.0


def observe(stats: LossStats, loss: Any) -> LossStats:
  """Takes one more loss, which must be finite, into account.

  With n losses, a = (1 - DECAY) / (1 - DECAY^n) is the newest one's share of all weights, and
  mean += a (loss - mean);  variance = (1 - a) (variance + a (loss - mean)^2), with the mean before.
  The share is 1 for the first loss, so nothing is biased towards what the statistics began with.

  A spike is observed like any other loss, so that a loss that rises for good is no spike for long: after a jump of any
  height the z-score is below 10 at the second update and below 6 at the fourth.

  Source: Finch 2009, "Incremental calculation of weighted mean and variance"; the weights are normalised as Adam's are.
  """
  count = stats.count + 1
  share = (1 - DECAY) / (1 - DECAY**count)
  rise = loss - stats.mean
  return LossStats(count, stats.mean + share * rise, (1 - share) * (stats.variance + share * rise * rise))


def z_score(stats: LossStats, loss: Any) -> Any:
  """How many standard deviations a loss is above the mean of those before it; 0 for the first `MIN_COUNT` losses.

  z = (loss - mean) / sqrt(variance + MIN_DEVIATION^2), finite also where all losses were alike.

  Source: Team OLMo 2025, "2 OLMo 2 Furious", counts as spikes what is seven standard deviations from the mean of the last
  1,000 losses; Kumar et al. 2025, "ZClip", takes exponentially decayed mean and variance, of the gradient's norm.
  """
  return (stats.count >= MIN_COUNT) * (loss - stats.mean) / (stats.variance + MIN_DEVIATION**2) ** 0.5


def z_scores(stats: LossStats, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, LossStats]:
  """`z_score` and `observe` of many losses, one after the other, but computed at once.

  Args:
    stats: of the losses before them, Python numbers.
    losses: finite, [n].

  Returns:
    float64 [n]: the z-scores, and the mean before each; and the statistics after all.
  """
  zs, means = np.zeros(len(losses)), np.zeros(len(losses))
  for begin in range(0, len(losses), 1024):
    part = slice(begin, begin + 1024)  # DECAY^-1024 is 3e4: 16 digits are enough
    zs[part], means[part], stats = _z_scores_of_part(stats, losses[part].astype(np.float64))
  return zs, means, stats


def _z_scores_of_part(stats: LossStats, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, LossStats]:
  n = np.arange(len(losses) + 1)
  decay = DECAY**n
  before = (1 - DECAY**stats.count) / (1 - DECAY)  # the weights' sum
  centre = stats.mean if stats.count else float(losses[0])
  rises = losses - centre  # so that squares lose no digits
  weights, firsts, seconds = (
    decay * (start + np.concatenate([[0.0], np.cumsum(values / decay[1:])]))
    for start, values in (
      (before, np.ones(len(losses))),
      (0.0, rises),
      (before * stats.variance, rises * rises),
    )
  )
  weights[0] = weights[0] or 1.0  # nothing was observed
  shifts = firsts / weights
  means, variances = centre + shifts, np.maximum(0.0, seconds / weights - shifts * shifts)
  means[0], variances[0] = stats.mean, stats.variance
  known = LossStats(stats.count + n[:-1], means[:-1], variances[:-1])
  return z_score(known, losses), means[:-1], LossStats(stats.count + len(losses), float(means[-1]), float(variances[-1]))
