"""The optimizer: one optax chain, and its schedule.

Responsible for turning `OptimizerConfig` into an `optax.GradientTransformation` whose state has names. Not responsible for
applying it (`step.py`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jgpt.config import ModelConfig, OptimizerConfig
from jgpt.params import param_at

DECAY = 0.99  # losses of the last hundred updates count: a schedule's trend is slower, and one outlier is soon forgotten
MIN_COUNT = 20  # the first losses fall too fast, and are too few, to say what is usual
MIN_DEVIATION = 0.01  # nats per token: a rise of less than a few of these is no spike, however still the loss was before


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


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
  """Makes the learning rate as a function of the step.

  While step < warmup_steps: peak_lr * step / warmup_steps, or peak_lr * (step + 1) / (warmup_steps + 1) where
  `warmup_from_zero` is false. Then, with r running from 0 at warmup_steps to 1 at decay_steps, and end_lr from there on:
  linear  peak_lr + (end_lr - peak_lr) * r;
  cosine  end_lr + (peak_lr - end_lr) * (1 + cos(pi r)) / 2;
  constant  peak_lr, for ever;
  wsd  peak_lr, and linear over the last `cooldown_steps` before decay_steps.

  Args:
    config: `decay_steps` and `cooldown_steps` resolved. A warmup that outlasts `decay_steps` is cut there.

  Returns:
    A function of an int32 step (updates applied before this one) to a float32 rate.

  Source: Loshchilov and Hutter 2017, "SGDR", equation 5 (cosine); Hu et al. 2024, "MiniCPM", section 4 (wsd).
  """
  peak, end, warmup = config.peak_lr, config.end_lr, config.warmup_steps
  if config.schedule != "constant":
    warmup = min(warmup, config.decay_steps)
  rest = config.decay_steps - warmup
  if config.schedule == "constant":
    after = optax.constant_schedule(peak)
  elif not rest:
    after = optax.constant_schedule(end)
  elif config.schedule == "linear":
    after = optax.linear_schedule(peak, end, rest)
  elif config.schedule == "cosine":
    # Its floor is given as a share of the peak; at a peak of 0 any share will do.
    after = optax.cosine_decay_schedule(peak, rest, alpha=end / peak if peak else 0.0)
  else:
    cooldown = min(config.cooldown_steps, rest)
    after = optax.linear_schedule(peak, end, cooldown, transition_begin=rest - cooldown)
  if not config.warmup_steps:
    return after
  first = 0.0 if config.warmup_from_zero else peak / (config.warmup_steps + 1)
  return optax.join_schedules([optax.linear_schedule(first, peak, config.warmup_steps), after], [warmup])


def make_optimizer(config: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformationExtraArgs:
  """Makes AdamW as the chain clip, adam, decay, lr; its state is a dict with these names.

  update = -lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), the decay only for `decay_kinds`. Clipping divides by the
  exact norm (torch adds 1e-6 to it). With `skip_spikes` the chain begins with spikes, whose state is the `LossStats` of the
  losses so far; `update` then takes the loss as `value`.

  Args:
    config: `decay_steps` resolved.
    model: sizes and switches; gives each parameter its kind.

  Source: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2.
  """

  def decays(params: dict) -> dict:
    return jax.tree_util.tree_map_with_path(lambda path, _: param_at(path, model).kind in config.decay_kinds, params)

  return optax.named_chain(
    *([] if config.skip_spikes is None else [("spikes", watch_losses())]),
    ("clip", optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)),
    ("adam", scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)),
    ("decay", optax.add_decayed_weights(config.weight_decay, mask=decays) if config.weight_decay else optax.identity()),
    ("lr", optax.scale_by_learning_rate(make_schedule(config))),
  )


def watch_losses() -> optax.GradientTransformationExtraArgs:
  """Changes no gradient; its state is the `LossStats` of the losses that `update` got as `value`.

  A loss that is not finite, or whose square is not, is none that the statistics know of.
  """

  def init(params: dict) -> LossStats:
    return LossStats(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(()))

  def update(updates: dict, state: LossStats, params: dict | None = None, *, value: jax.Array, **_: Any) -> tuple:
    observed = observe(state, value)
    return updates, jax.tree.map(partial(jnp.where, jnp.isfinite(observed.variance)), observed, state)

  return optax.GradientTransformationExtraArgs(init, update)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_adam`, where `update` may be given how its new state is kept: `keep(new, old)` -> state.

  Parameters are then computed from what is kept. Kept from outside, XLA on a CPU computes moments once for the state and
  once more for the parameters: 10% of a step of `names` and 13% of `gpt2_shakespeare`.
  """

  def update(
    grads: dict, state: optax.ScaleByAdamState, params: dict | None = None, *, keep: Any = lambda new, old: new, **_: Any
  ) -> tuple[dict, optax.ScaleByAdamState]:
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
    state = keep(optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu), state)
    mu_hat, nu_hat = (optax.tree.bias_correction(m, b, state.count) for m, b in ((state.mu, b1), (state.nu, b2)))
    return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat), state

  return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1, b2, eps).init, update)
