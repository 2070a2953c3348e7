"""What is known of the losses so far, and how far one is above them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgpt.optim import MIN_COUNT, STATS_DECAY, LossStats, observe, z_score
from jgpt.runs import health
from jgpt.runs.health import compute_z_scores


def observed(losses):
  stats = LossStats()
  for loss in losses:
    stats = observe(stats, float(loss))
  return stats


def random_losses(num, seed=0):
  return np.random.default_rng(seed).normal(3.0, 0.4, num)


@pytest.mark.parametrize("num", [1, 2, 19, 500])
def test_mean_and_variance_are_those_of_the_weighted_losses(num):
  """Weight STATS_DECAY^i for the i-th before the last, nothing for the statistics' beginning."""
  losses = random_losses(num)
  weights = STATS_DECAY ** np.arange(num)[::-1]
  mean = np.average(losses, weights=weights)
  stats = observed(losses)
  assert stats.count == num
  assert stats.mean == pytest.approx(mean, rel=1e-12)
  assert stats.variance == pytest.approx(
    np.average((losses - mean) ** 2, weights=weights), rel=1e-9, abs=1e-15
  )


def test_z_counts_standard_deviations_once_enough_was_seen():
  losses = random_losses(200)
  stats = observed(losses)
  assert z_score(stats, stats.mean + 5 * math.sqrt(stats.variance + 1e-4)) == pytest.approx(5)
  assert z_score(stats, stats.mean - 1) < 0
  assert z_score(observed(losses[: MIN_COUNT - 1]), 100.0) == 0
  assert z_score(observed(losses[:MIN_COUNT]), 100.0) > 10


def test_losses_that_are_all_alike_have_finite_scores():
  """Without any deviation a rise of 0.07 nats is the least that counts as a spike."""
  stats = observed([2.5] * 100)
  assert stats.variance == 0 and z_score(stats, 2.5) == 0
  assert z_score(stats, 2.5 + 0.069) < health.SPIKE < z_score(stats, 2.5 + 0.071)


@pytest.mark.parametrize("height", [2.0, 10.0, 1e6])
def test_a_loss_that_rises_for_good_is_soon_no_spike(height):
  """Whatever the height: below 10 at its second update, below 6 at its fourth."""
  stats, found = observed(random_losses(1000)), []
  for _ in range(6):
    found.append(z_score(stats, 3.0 + height))
    stats = observe(stats, 3.0 + height)
  assert found[0] > 4 and found[1] < 10 and found[3] < 6


@pytest.mark.parametrize("lengths", [[3000], [1] * 30 + [1500, 1470], [1024, 1024, 952]])
def test_many_at_once_are_one_after_the_other(lengths):
  """Also after a jump, beside an outlier, and for losses that do not vary.

  Whatever is taken at once.
  """
  losses = random_losses(3000)
  losses[700] = 50.0
  losses[1500:] += 5
  losses[2000:2400] = 1.0
  stats, expected, means = LossStats(), [], []
  for loss in losses.tolist():
    expected.append(z_score(stats, loss))
    means.append(stats.mean)
    stats = observe(stats, loss)
  many, got, got_means = LossStats(), [], []
  for part in np.split(losses, np.cumsum(lengths)[:-1]):
    zs, before, many = compute_z_scores(many, part)
    got.extend(zs)
    got_means.extend(before)
  np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-7)
  np.testing.assert_allclose(got_means, means, rtol=1e-9)
  np.testing.assert_allclose(many, stats, rtol=1e-9)


def test_none_at_once_changes_nothing():
  stats = observed(random_losses(30))
  zs, means, after = compute_z_scores(stats, np.zeros(0))
  assert len(zs) == len(means) == 0 and after == stats


def test_the_formula_serves_jax_as_well():
  """Compiled in float32 it gives what it gives for Python's floats but for rounding."""

  @jax.jit
  def run(losses):
    def add(stats, loss):
      return observe(stats, loss), z_score(stats, loss)

    return jax.lax.scan(add, LossStats(jnp.int32(0), jnp.float32(0), jnp.float32(0)), losses)

  losses = random_losses(300).astype(np.float32)
  stats, zs = run(losses)
  expected, _, expected_stats = compute_z_scores(LossStats(), losses)
  assert zs.dtype == stats.mean.dtype == jnp.float32 and stats.count == 300
  np.testing.assert_allclose(zs, expected, atol=1e-4)
  np.testing.assert_allclose(stats[1:], expected_stats[1:], rtol=1e-4)
