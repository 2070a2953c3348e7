"""The optimizer: one optax chain, its schedule, and the statistics of the losses it has seen.

The chain's state has names (`optax.named_chain`). Applying the update is in `step.py`; what is said
about losses is in `runs/health.py`.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jgpt.config import Experiment, Hyper, OptimizerConfig
from jgpt.params import param_at

Transformation = optax.GradientTransformationExtraArgs
AdamState = optax.ScaleByAdamState
STATS_DECAY = 0.99  # losses of the last hundred updates count: one outlier is soon forgotten
MIN_COUNT = 20  # the first losses are too few, and fall too fast, to say what is usual
MIN_DEVIATION = 0.01  # nats per token: a rise of less than a few of these is no spike


def make_schedule(config: OptimizerConfig, hyper: Hyper | None = None) -> optax.Schedule:
  """Makes the learning rate as a function of the step.

  While step < warmup_steps: peak_lr * step / warmup_steps, or with `warmup_from_zero=False`
  peak_lr * (step + 1) / (warmup_steps + 1). Then, with r from 0 at warmup_steps to 1 at
  decay_steps, and end_lr from there on:

    linear    peak_lr + (end_lr - peak_lr) * r
    cosine    end_lr + (peak_lr - end_lr) * (1 + cos(pi r)) / 2
    constant  peak_lr, without an end
    wsd       peak_lr, and linear over the last `cooldown_steps` before decay_steps

  The shapes are optax's; the rates at both ends are `peak_lr` and `end_lr` exactly, and the others
  lie between them, where rounding would miss them by an ulp.

  Args:
    config: `decay_steps` and `cooldown_steps` resolved. A warmup longer than `decay_steps` is cut
      there.
    hyper: `peak_lr` in place of the config's.

  Returns:
    A function of an int32 step (updates applied before this one) to a float32 rate.

  Source: Loshchilov and Hutter 2017, "SGDR", equation 5 (cosine); Hu et al. 2024, "MiniCPM",
  section 4 (wsd).
  """
  peak = config.peak_lr if hyper is None else hyper.peak_lr
  end, is_constant = config.end_lr, config.schedule == "constant"
  warmup = config.warmup_steps if is_constant else min(config.warmup_steps, config.decay_steps)
  rest = math.inf if is_constant else config.decay_steps - warmup
  if is_constant or not rest:
    share = optax.constant_schedule(1.0)
  elif config.schedule == "linear":
    share = optax.linear_schedule(1.0, 0.0, rest)
  elif config.schedule == "cosine":
    share = optax.cosine_decay_schedule(1.0, rest)
  else:
    cooldown = min(config.cooldown_steps, rest)
    share = optax.linear_schedule(1.0, 0.0, cooldown, transition_begin=rest - cooldown)

  def falling(step: jax.Array) -> jax.Array:
    step = jnp.asarray(step) / 1  # float32 of an int32, whatever JAX's default
    part = jnp.where(step < rest, share(step), 0 * step)
    return jnp.clip(peak * part + end * (1 - part), jnp.minimum(peak, end), jnp.maximum(peak, end))

  if not config.warmup_steps:
    return falling
  first = 0.0 if config.warmup_from_zero else peak / (config.warmup_steps + 1)
  rising = optax.linear_schedule(first, peak, config.warmup_steps)
  return optax.join_schedules([rising, falling], [warmup])


def make_optimizer(experiment: Experiment, hyper: Hyper | None = None) -> Transformation:
  """Makes AdamW as the chain clip, adam, decay, lr; its state is a dict with these names.

  update = -lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), the decay for `decay_kinds` only.
  Clipping divides by the exact norm (torch adds 1e-6 to it). `update` takes two more arguments:
  `value`, the loss, which `skip_spikes` observes in a state called spikes, and `ok`, a bool scalar;
  where it is False, Adam's state stays as it is.

  Args:
    experiment: resolved.
    hyper: peak_lr, weight_decay, b1 and b2 in place of the experiment's.

  Source: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2.
  """

  def is_decayed(path: tuple, leaf: Any) -> bool:
    return param_at(path, experiment.model).kind in config.decay_kinds

  config, numbers = experiment.optimizer, hyper or Hyper.of(experiment)
  clip_norm, weight_decay = config.clip_norm, numbers.weight_decay
  clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
  decay = optax.add_decayed_weights(weight_decay, partial(jax.tree.map_with_path, is_decayed))
  if not config.weight_decay:  # the state has the same tree with and without `hyper`
    decay = optax.identity() if hyper is None else make_stateless(decay)
  return optax.named_chain(
    *([] if config.skip_spikes is None else [("spikes", observe_losses())]),
    ("clip", clip),
    ("adam", scale_by_adam(numbers.b1, numbers.b2, config.eps, experiment.compute.select)),
    ("decay", decay),
    ("lr", optax.scale_by_learning_rate(make_schedule(config, hyper))),
  )


def make_stateless(tx: Transformation) -> Transformation:
  """Makes a transformation without a state of one whose state holds no array."""
  return optax.stateless(lambda updates, params: tx.update(updates, tx.init(params), params)[0])


def scale_by_adam(b1: Any, b2: Any, eps: float, select: str = "plain") -> Transformation:
  """Makes `optax.scale_by_adam`, whose state stays as it is where `ok` is False.

  Written out for two reasons. The update is computed from the moments that are kept: with the
  selection outside, XLA computes the new moments once for the state and again for the parameters,
  and a step of `names` took 1.1 times as long at best. And optax computes 1 - b^t in float32, which
  at the first update is 2e-4 too large for a b of 0.9999, and 1.3% for 0.999999.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    select: see `ComputeConfig.select`.
  """

  def update(
    grads: dict, state: AdamState, params: Any = None, *, ok: Any = True, **_: Any
  ) -> tuple[dict, AdamState]:
    mu = jax.tree.map(lambda m, g: average(m, g, b1), state.mu, grads)
    nu = jax.tree.map(lambda v, g: average(v, g * g, b2), state.nu, grads)
    new = AdamState(optax.safe_increment(state.count), mu, nu)
    state = select_in_order(ok, new, state) if select == "ordered" else select_tree(ok, new, state)
    t = jnp.maximum(state.count, 1)  # 0 where the first update is skipped
    c1, c2 = one_minus_power(b1, t), one_minus_power(b2, t)
    return jax.tree.map(lambda m, v: m / c1 / (jnp.sqrt(v / c2) + eps), *state[1:]), state

  return Transformation(optax.scale_by_adam(b1, b2, eps).init, update)


def average(old: jax.Array, new: jax.Array, b: Any) -> jax.Array:
  """Computes b * old + (1 - b) * new.

  What float32 cannot hold of a Python number b is multiplied apart: at 0.999999 it is 1.3% of
  1 - b, by which the average of equal numbers would be too small.

  Args:
    old: float array.
    new: float array of the same shape.
    b: from 0 to below 1; of an array the value that it holds counts.
  """
  rest = b - float(np.asarray(b, old.dtype)) if isinstance(b, float) else 0.0
  return b * old + (rest * old + (1 - b) * new)


def one_minus_power(b: Any, t: Any) -> Any:
  """Computes 1 - b^t as -expm1(t log b), to a relative error below 1e-6 for any t.

  Args:
    b: from 0 to below 1. A Python number counts with all its digits. Of a float32 array the value
      that it holds counts, whose 1 - b is up to 3e-8 / (1 - b) beside that of the number it was
      rounded from: 3e-4 at 0.9999, 3% at 0.999999.
    t: at least 0, at least 1 where b is 0. Python's int; or an int32 scalar for a float32 result,
      int64 for float64.
  """
  log = math.log(max(b, 1e-300)) if isinstance(b, float) else jnp.log1p(b - 1)
  expm1 = math.expm1 if isinstance(t, int) else jnp.expm1
  return -expm1(t / 1 * log)  # t / 1 is float32 of an int32


def select_tree(ok: Any, new: Any, old: Any) -> Any:
  """Returns the new tree where the bool scalar `ok` holds, else the old one, bit by bit."""
  return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)


def select_in_order(ok: Any, new: AdamState, old: AdamState) -> AdamState:
  """Computes `select_tree` one parameter after the other.

  Once `ok` is known all leaves are ready, and XLA:CPU hands more than eight ready operations to
  other threads: a step of `names` took 50 us of processor time instead of 31. Each selection
  therefore depends on the second moment before it, which is never negative: a fact that a compiler
  cannot derive from the program. (XLA:CPU drops `optimization_barrier` before it schedules.)
  """
  (mus, structure), nus = jax.tree.flatten(new.mu), jax.tree.leaves(new.nu)
  kept = []
  for m, v, m_old, v_old in zip(mus, nus, *map(jax.tree.leaves, (old.mu, old.nu)), strict=True):
    kept.append((jnp.where(ok, m, m_old), jnp.where(ok, v, v_old)))
    ok &= ~(kept[-1][1].ravel()[0] < 0)
  mu, nu = (jax.tree.unflatten(structure, leaves) for leaves in zip(*kept, strict=True))
  return AdamState(jnp.where(ok, new.count, old.count), mu, nu)


# --- Losses ---


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
