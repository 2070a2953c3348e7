"""Running statistics of the training loss, which tell a spike from a usual loss.

What is said about losses is in `runs/health.py`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgpt.optim.adam import Transformation, one_minus_power, select_tree

STATS_DECAY = 0.99  # losses of the last hundred updates count: one outlier is soon forgotten
MIN_COUNT = 20  # the first losses are too few, and fall too fast, to say what is usual
MIN_DEVIATION = 0.01  # nats per token: a rise of less than a few of these is no spike


class LossStats(NamedTuple):
  """Running statistics of the training loss: Python numbers, or scalars of JAX.

  Attributes:
    count: losses observed, int.
    mean: of them, the i-th before the last weighted by STATS_DECAY^i, nats per token.
    variance: about that mean, with the same weights.
  """

  count: Any = 0
  mean: Any = 0.0
  variance: Any = 0.0


def observe(stats: LossStats, loss: Any) -> LossStats:
  """Returns the statistics with one more loss, which must be finite.

  With n losses and d = STATS_DECAY, a = (1 - d) / (1 - d^n) is the newest one's share of the
  weights; mean += a (loss - mean);  variance = (1 - a) (variance + a (loss - mean)^2), with the old
  mean. The first loss has share 1, so nothing is biased towards the initial values. 1 - a is
  computed as d (1 - d^(n-1)) / (1 - d^n): never negative, and 0 at the first loss.

  A spike is observed like any other loss: after a jump of any height the z-score is below 10 at the
  second update and below 6 at the fourth.

  Source: Finch 2009, "Incremental calculation of weighted mean and variance"; the weights are
  normalised as Adam's are.
  """
  count = stats.count + 1
  before, after = (one_minus_power(STATS_DECAY, n) for n in (stats.count, count))
  share, rise = (1 - STATS_DECAY) / after, loss - stats.mean
  variance = STATS_DECAY * before / after * (stats.variance + share * rise * rise)
  return LossStats(count, stats.mean + share * rise, variance)


def z_score(stats: LossStats, loss: Any) -> Any:
  """Computes (loss - mean) / sqrt(variance + MIN_DEVIATION^2); 0 for the first `MIN_COUNT` losses.

  Source: Team OLMo 2025, "2 OLMo 2 Furious", counts as spikes what is seven standard deviations
  from the mean of the last 1,000 losses; Kumar et al. 2025, "ZClip", uses exponentially decayed
  mean and variance of the gradient's norm.
  """
  is_known = stats.count >= MIN_COUNT
  return is_known * (loss - stats.mean) / (stats.variance + MIN_DEVIATION**2) ** 0.5


def observe_losses() -> Transformation:
  """Makes a transformation that changes no gradient; its state is the `LossStats` of `value`.

  A loss that is not finite, or whose square is not, leaves the statistics as they are.
  """

  def init(params: dict) -> LossStats:
    return LossStats(jnp.int32(0), jnp.float32(0), jnp.float32(0))

  def update(
    updates: dict, state: LossStats, params: dict | None = None, *, value: jax.Array, **_: Any
  ) -> tuple[dict, LossStats]:
    new = observe(state, value)
    return updates, select_tree(jnp.isfinite(new.variance), new, state)

  return Transformation(init, update)
