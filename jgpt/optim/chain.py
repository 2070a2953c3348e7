"""The optimizer: one optax chain.

The chain's state has names (`optax.named_chain`). Its links are in the files beside this one;
applying the update is in `step.py`.
"""

from functools import partial
from typing import Any

import jax
import optax

from jgpt.config import Experiment, Hyper
from jgpt.optim.adam import Transformation, scale_by_adam
from jgpt.optim.momentum import accumulate
from jgpt.optim.schedule import make_schedule
from jgpt.optim.spikes import observe_losses
from jgpt.params import param_at

# The links of each optimizer, in order. After Adam the decay is decoupled from the gradient; before
# a moment it is a part of it (L2).
LINKS = {
  "adamw": ("clip", "adam", "decay", "lr"),
  "adam": ("clip", "decay", "adam", "lr"),
  "sgd": ("clip", "decay", "momentum", "lr"),
}


def make_optimizer(experiment: Experiment, hyper: Hyper | None = None) -> Transformation:
  """Makes the optimizer that `optimizer.name` names; its state is a dict with its links' names.

  `OptimizerConfig` has the formulas. The decay adds weight_decay * p, for `decay_kinds` only.
  Clipping divides by the exact norm (torch adds 1e-6 to it). `update` takes two more arguments:
  `value`, the loss, which `skip_spikes` observes in a state called spikes, and `ok`, a bool scalar;
  where it is False, Adam's state or the momentum stays as it is.

  Args:
    experiment: resolved.
    hyper: peak_lr, weight_decay, b1 and b2 in place of the experiment's.

  Source: Kingma and Ba 2015, algorithm 1 (adam); Loshchilov and Hutter 2019, algorithm 2 (adamw)
  and algorithm 1 (sgd).
  """

  def is_decayed(path: tuple, leaf: Any) -> bool:
    return param_at(path, experiment.model).kind in config.decay_kinds

  config, numbers = experiment.optimizer, hyper or Hyper.of(experiment)
  clip_norm, weight_decay = config.clip_norm, numbers.weight_decay
  clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
  decay = optax.add_decayed_weights(weight_decay, partial(jax.tree.map_with_path, is_decayed))
  if not config.weight_decay:  # the state has the same tree with and without `hyper`
    decay = optax.identity() if hyper is None else make_stateless(decay)
  links = {
    "clip": clip,
    "decay": decay,
    "adam": scale_by_adam(numbers.b1, numbers.b2, config.eps, experiment.compute.select),
    "momentum": accumulate(config.momentum),
    "lr": optax.scale_by_learning_rate(make_schedule(config, hyper)),
    "spikes": observe_losses(),
  }
  names = LINKS[config.name] if config.skip_spikes is None else ("spikes", *LINKS[config.name])
  return optax.named_chain(*((name, links[name]) for name in names))


def make_stateless(tx: Transformation) -> Transformation:
  """Makes a transformation without a state of one whose state holds no array."""
  return optax.stateless(lambda updates, params: tx.update(updates, tx.init(params), params)[0])
