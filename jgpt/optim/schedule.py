"""The learning rate as a function of the step."""

import math

import jax
import jax.numpy as jnp
import optax

from jgpt.config import Hyper, OptimizerConfig


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
