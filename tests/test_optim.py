"""The optimizer in float32 beside float64: rates, Adam's moments and their corrections; and what is
known of the losses so far, and how far one is above them.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equivalence import QUICK, initial_params, names_experiment

from jgpt.config import Hyper, OptimizerConfig
from jgpt.optim.adam import average, one_minus_power, scale_by_adam
from jgpt.optim.chain import make_optimizer
from jgpt.optim.schedule import make_schedule
from jgpt.optim.spikes import MIN_COUNT, STATS_DECAY, LossStats, observe, z_score
from jgpt.runs import health
from jgpt.runs.health import compute_z_scores


def quick_jit(function):
  return jax.jit(function, compiler_options=QUICK)


# --- Rates ---


def rate_of(config, step):
  """The documented formulas in float64, of the rates that float32 holds."""
  peak, end = float(np.float32(config.peak_lr)), float(np.float32(config.end_lr))
  warmup, is_constant = config.warmup_steps, config.schedule == "constant"
  if step < (warmup if is_constant else min(warmup, config.decay_steps)):
    first = not config.warmup_from_zero
    return peak * (step + first) / (warmup + first)
  if is_constant or step >= config.decay_steps:
    return peak if is_constant else end
  length = config.decay_steps - warmup
  length = min(config.cooldown_steps, length) if config.schedule == "wsd" else length
  left = min(1.0, (config.decay_steps - step) / length)
  left = (1 - math.cos(math.pi * left)) / 2 if config.schedule == "cosine" else left
  return peak * left + end * (1 - left)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
def test_rates_in_float32_are_exact_at_their_ends_and_between_them_elsewhere(schedule):
  """Compiled, and with a peak that is an array under `vmap`: to a millionth of the larger end.

  Peaks below the floor and of 0, floors of 0, warmups of none, some and all steps, lengths that are
  no powers of 2. At the peak, and at every step from `decay_steps` on, the bits are those of the
  settings; no rate is above the larger or below the smaller.
  """
  peaks = jnp.array([0.0, 3e-4, 0.3])
  shapes = ((0, True, 1), (7, False, 5), (0, True, 97), (7, True, 97), (7, False, 10007))
  names = ("warmup_steps", "warmup_from_zero", "decay_steps")
  steps = [0, 1, 5, 6, 7, 8, 43, 44, 45, 95, 96, 97, 98, 9953, 9954, 9955, 10006, 10007, 2**31 - 1]
  steps = np.array(steps, np.int32)
  configs = [
    OptimizerConfig(
      **dict(zip(names, shape, strict=True)),
      schedule=schedule,
      peak_lr=0.3,
      end_lr=end,
      cooldown_steps=53,
      b1=0.9,
      b2=0.9,
      eps=1e-8,
    )
    for shape, end in itertools.product(shapes, (0.0, 1e-5, 0.1))
  ]

  @quick_jit
  def compute(peaks):
    def of_array(config):
      return lambda peak: make_schedule(config, Hyper(peak, None, None, None, None))(steps)

    return [(jax.vmap(of_array(config))(peaks), make_schedule(config)(steps)) for config in configs]

  for config, (of_arrays, of_number) in zip(configs, compute(peaks), strict=True):
    end, is_constant = np.float32(config.end_lr), schedule == "constant"
    warmup = config.warmup_steps if is_constant else min(config.warmup_steps, config.decay_steps)
    for peak, rates in zip([*peaks, peaks[-1]], [*of_arrays, of_number], strict=True):
      peak, rates = np.float32(peak), np.asarray(rates)
      one = dataclasses.replace(config, peak_lr=float(peak))
      expected = [rate_of(one, int(step)) for step in steps]
      error = 2e-7 * max(peak, end)
      np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=error, err_msg=f"{one}")
      if is_constant:
        assert np.all(rates[steps >= warmup] == peak), one
      else:
        assert np.all(rates[steps >= config.decay_steps] == end), one
        assert np.all(rates[steps >= warmup] >= min(peak, end)), one
      if warmup in steps and (is_constant or warmup < config.decay_steps):
        assert rates[steps == warmup] == peak, one
      assert rates.dtype == np.float32 and np.all(rates >= 0)
      assert np.all(rates <= (peak if is_constant else max(peak, end))), one


# --- Adam ---

DECAYS = (0.0, 1e-9, 0.1, 0.5, 0.85, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.99999, 0.999999, 1 - 2**-24)


@pytest.mark.parametrize("is_array", [False, True])
def test_bias_corrections_have_six_digits_whatever_b_and_t(is_array):
  """Up to a million updates. optax's `1 - b**t` is off by 1.3% at 0.999999.

  An array is taken for the number that it holds.
  """
  ts = [1, 2, 3, 10, 99, 1000, 9999, 123_456, 1_000_000]
  bs = [jnp.float32(b) if is_array else b for b in DECAYS]
  got = quick_jit(lambda t: [one_minus_power(b, t) for b in bs])(jnp.array(ts, jnp.int32))
  for b, corrections in zip(bs, got, strict=True):
    assert corrections.dtype == jnp.float32
    with np.errstate(divide="ignore"):
      expected = -np.expm1(np.array(ts) * np.log1p(float(b) - 1.0))
    np.testing.assert_allclose(corrections, expected, rtol=1e-6, err_msg=f"{b}")
    assert is_array or one_minus_power(b, 7) == pytest.approx(1 - b**7, rel=1e-9)


@pytest.mark.parametrize("b", [0.0, 0.3, 0.85, 0.9999, 0.999999])
def test_moments_and_updates_over_thousands_of_steps_are_those_of_float64(b):
  """Noise of very unequal sizes: no entry of either moment, and no update, is off by 1e-4.

  With a b of 0.999999 that float32 rounds, moments would be 1.3% too small in the end.
  """
  num, size = (20_000, 4) if b > 0.99 else (300, 4)
  rng = np.random.default_rng(0)
  grads = (rng.normal(1.0, 0.5, (num, size)) * [1e-4, 1e-2, 1.0, 1e2]).astype(np.float32)
  tx = scale_by_adam(b, b, 1e-12)

  @quick_jit
  def run(grads):
    def step(state, g):
      update, state = tx.update({"w": g}, state)
      return state, update["w"]

    return jax.lax.scan(step, tx.init({"w": grads[0]}), grads)

  state, updates = run(grads)
  m, v, expected = np.zeros(size), np.zeros(size), []
  for t, g in enumerate(grads.astype(np.float64), start=1):
    m, v = b * m + (1 - b) * g, b * v + (1 - b) * g * g
    expected.append(m / (1 - b**t) / (np.sqrt(v / (1 - b**t)) + 1e-12))
  np.testing.assert_allclose(state.mu["w"], m, rtol=1e-4)
  np.testing.assert_allclose(state.nu["w"], v, rtol=1e-4)
  np.testing.assert_allclose(updates, expected, rtol=1e-4)


def test_an_average_of_equal_numbers_is_that_number():
  """Also where float32 rounds b by 3% of 1 - b, and for arrays."""
  bs = (*DECAYS, *map(jnp.float32, DECAYS))
  got = quick_jit(lambda x: [average(x, x, b) for b in bs])(jnp.float32(0.3))
  np.testing.assert_allclose(got, 0.3, rtol=2e-7)


def test_adam_begins_with_a_skipped_update_and_forgets_at_once_with_decays_of_0():
  """Neither divides 0 by 0: the update of moments that are 0 is 0."""
  tx, grads = scale_by_adam(0.0, 0.0, 1e-8), jnp.array([3.0, 0.0, -1e-3])
  update = quick_jit(lambda grads, ok: tx.update(grads, tx.init(grads), ok=ok))
  for ok, signs in ((False, [0, 0, 0]), (True, [1, 0, -1])):
    updates, state = update(grads, ok)
    np.testing.assert_allclose(updates, signs, rtol=1e-4)
    assert int(state.count) == ok


def test_trajectories_are_those_of_optax_but_for_rounding():
  """With decays whose 1 - b^t float32 holds well, as those of every experiment."""
  rng = np.random.default_rng(1)
  grads = rng.normal(0.3, 1.0, (200, 8)).astype(np.float32)

  def run(tx):
    def step(state, g):
      update, state = tx.update(g, state)
      return state, update

    return quick_jit(lambda grads: jax.lax.scan(step, tx.init(grads[0]), grads)[1])(grads)

  for b1, b2 in ((0.85, 0.99), (0.9, 0.95), (0.9, 0.999)):
    expected = run(optax.scale_by_adam(b1, b2, 1e-8))
    np.testing.assert_allclose(run(scale_by_adam(b1, b2, 1e-8)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  "rule",
  [
    {"optimizer__name": "adamw"},
    pytest.param({"optimizer__name": "adam"}, marks=pytest.mark.slow),
    {"optimizer__name": "sgd", "optimizer__momentum": 0.9},
  ],
  ids=lambda rule: rule["optimizer__name"],
)
def test_numbers_given_beside_an_experiment_make_the_updates_of_one_that_has_them(rule):
  """Two updates at another rate, decays and weight decay, where the experiment has none.

  Of two members of a sweep at once; the second has no decay. The state is that of the experiment:
  without an array for the decay.
  """
  plain = names_experiment(optimizer__weight_decay=0.0, **rule)
  numbers = {"peak_lr": 0.02, "weight_decay": 0.3, "b1": 0.5, "b2": 0.7}
  numbers = {f"optimizer__{name}": value for name, value in numbers.items()} | rule
  others = [names_experiment(**numbers | {"optimizer__weight_decay": d}) for d in (0.3, 0.0)]
  params, rng = initial_params(plain.model), np.random.default_rng(0)
  grads = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype("f"), params) for _ in range(2)]

  def updates(tx):
    first, state = tx.update(grads[0], tx.init(params), params)
    return first, tx.update(grads[1], state, params)[0]

  @quick_jit
  def run(members):
    given = jax.vmap(lambda hyper: updates(make_optimizer(plain, hyper)))(members)
    return given, [updates(make_optimizer(other)) for other in others]

  members = jax.tree.map(lambda *x: jnp.array(x), *map(Hyper.of, others))
  given, expected = run(members)
  for i, wanted in enumerate(expected):
    for got, one in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
      np.testing.assert_allclose(got[i], one, rtol=1e-5, atol=1e-8)
  given = make_optimizer(plain, Hyper.of(others[0]))
  structures = {jax.tree.structure(tx.init(params)) for tx in (given, make_optimizer(plain))}
  assert len(structures) == 1 and given.init(params)["decay"] == optax.EmptyState()


# --- Losses ---


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


@pytest.mark.parametrize("loss", [3.0, 1e3, 3e7])
def test_losses_that_are_all_alike_have_no_variance_in_float32_either(loss):
  """Whatever their size: a variance below 0 would have no root, and every update be skipped."""

  @jax.jit
  def run(losses):
    zeros = LossStats(jnp.int32(0), jnp.float32(0), jnp.float32(0))
    return jax.lax.scan(lambda stats, x: (observe(stats, x), z_score(stats, x)), zeros, losses)

  stats, zs = run(jnp.full(60, loss))
  assert float(stats.mean) == pytest.approx(loss, rel=1e-5) and float(stats.variance) >= 0
  assert np.all(np.abs(zs) < 3)
