"""The optimizer: one optax chain, and its schedule.

Responsible for turning `OptimizerConfig` into an `optax.GradientTransformation` whose state has names. Not responsible for
applying it (`step.py`).
"""

import jax
import optax

from jgpt.config import ModelConfig, OptimizerConfig
from jgpt.params import param_table


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
  """Makes the learning rate as a function of the step: `peak_lr * (1 - step / decay_steps)`, and 0 from there on.

  Args:
    config: `decay_steps` resolved.

  Returns:
    A function of an int32 step (updates applied before this one) to a float32 rate.
  """
  return optax.linear_schedule(init_value=config.peak_lr, end_value=0.0, transition_steps=config.decay_steps)


def make_optimizer(config: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformation:
  """Makes AdamW as the chain clip, adam, decay, lr; its state is a dict with these names.

  update = -lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), the decay only for `decay_kinds`. Clipping divides by the
  exact norm (torch adds 1e-6 to it).

  Args:
    config: `decay_steps` resolved.
    model: sizes; gives each parameter its kind.

  Source: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2.
  """
  decays = jax.tree.map(lambda param: param.kind in config.decay_kinds, param_table(model))
  return optax.named_chain(
    ("clip", optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)),
    ("adam", optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)),
    ("decay", optax.add_decayed_weights(config.weight_decay, mask=decays) if config.weight_decay else optax.identity()),
    ("lr", optax.scale_by_learning_rate(make_schedule(config))),
  )
