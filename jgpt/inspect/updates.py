"""The first updates of one number: gradient, moments, rate, and what Adam makes of them.

Responsible for running a training run's own program from its beginning, one update at a time, and for reading one entry of
the parameters and of the optimizer's state in between. Not responsible for the table (`inspect.py`).
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from jgpt.batches import Corpus, make_batch_fn
from jgpt.config import Experiment
from jgpt.data.corpus import Data
from jgpt.devices.compute import choose_tricks
from jgpt.params import Entry
from jgpt.program import compile_program
from jgpt.step import TrainState, dropout_key


@dataclasses.dataclass(frozen=True)
class Update:
  """One update of one number.

  Attributes:
    step: from 1, as the run's log counts; Adam's t.
    loss: of the batch before the update, nats per token.
    gradient: of the loss by this number as Adam sees it: where `clip_norm` is set, after clipping. 0 where the batch does
      not use the number.
    m: first moment, b1 m + (1 - b1) gradient.
    v: second moment, b2 v + (1 - b2) gradient^2.
    m_hat: corrected, m / (1 - b1^step).
    v_hat: corrected, v / (1 - b2^step).
    decay: weight_decay * value_before; 0 where this kind of parameter does not decay.
    rate: the learning rate.
    update: -rate * (m_hat / (sqrt(v_hat) + eps) + decay).
    value_before: the number before the update.
    value: the number after it.
  """

  step: int
  loss: float
  gradient: float
  m: float
  v: float
  m_hat: float
  v_hat: float
  decay: float
  rate: float
  update: float
  value_before: float
  value: float


def trace_updates(
  experiment: Experiment, data: Data, entry: Entry, num_steps: int = 10, params: dict | None = None
) -> list[Update]:
  """Makes a run's first updates again and follows one number through them.

  Loss, moments, rate and values are those of the training program itself, called for one update at a time: on the same
  devices their bits are the run's. Corrected moments, decay and update are computed from them by formula, in float64.

  Args:
    experiment: resolved.
    data: the run's.
    entry: which number, from `params.find_entry`.
    num_steps: updates from the initial weights on.
    params: the initial weights, NumPy arrays; None draws them as the run did.

  Returns:
    One row for each update.

  Source: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2.
  """
  optimizer = experiment.optimizer
  weight_decay = optimizer.weight_decay if entry.param.kind in optimizer.decay_kinds else 0.0
  program = compile_program(experiment, data, params)
  gradients_fn = jax.jit(partial(_gradients, experiment=experiment))  # all of them: one program for every entry
  state, rows = program.state, []
  value = float(_read(state.params, entry))
  for step in range(1, num_steps + 1):
    corpus = program.feed.corpus_at(step - 1)
    gradient = float(_read(gradients_fn(state, corpus), entry))
    state, metrics = program.run_steps(corpus, state, np.int32(1))
    m, v = (float(_read(moment, entry)) for moment in (state.opt_state["adam"].mu, state.opt_state["adam"].nu))
    loss, rate = (float(metrics[name][0]) for name in ("train/loss", "train/lr"))
    m_hat, v_hat, decay = m / (1 - optimizer.b1**step), v / (1 - optimizer.b2**step), weight_decay * value
    update = 0 - rate * (m_hat / (math.sqrt(v_hat) + optimizer.eps) + decay)  # -rate * 0 would be shown as -0
    value_before, value = value, float(_read(state.params, entry))
    rows.append(Update(step, loss, gradient, m, v, m_hat, v_hat, decay, rate, update, value_before, value))
  return rows


def _gradients(state: TrainState, corpus: Corpus, experiment: Experiment) -> dict:
  """The gradients that the next update hands to Adam."""
  model, train, clip_norm = experiment.model, experiment.train, experiment.optimizer.clip_norm
  batch = make_batch_fn(experiment.data, train.seed)(corpus, state.step)
  key = dropout_key(train.seed, state.step, model)
  grads_fn = choose_tricks(experiment, jax.default_backend()).grads_fn  # as the run's program adds up
  _, grads = grads_fn(state.params, batch, model, key, train.micro_batch_size)
  return grads if clip_norm is None else optax.clip_by_global_norm(clip_norm).update(grads, optax.EmptyState())[0]


def _read(tree: dict, entry: Entry) -> Any:
  """One number of a tree shaped like the parameters; blocks may be stacked or a list."""
  group, _, name = entry.name.rpartition("/")
  if not group:
    return tree[name][entry.index]
  if isinstance(tree[group], dict):
    return tree[group][name][entry.index]
  layer, *rest = entry.index
  return tree[group][layer][name][tuple(rest)]
