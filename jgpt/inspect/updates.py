"""The first updates of one number of the parameters: gradient, moments, rate and update.

Runs the training program of a run again from its beginning, one update at a time, and reads one
entry of the parameters and of the optimizer's state in between. The table is made in
`trace_table.py`.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import optax

from jgpt import batches
from jgpt.batches import Corpus
from jgpt.config import Experiment
from jgpt.data.corpus import Data
from jgpt.params import Entry
from jgpt.program import compile_program
from jgpt.runs.origin import Origin
from jgpt.step import TrainState, loss_and_grads
from jgpt.weights.initial import InitialParams


@dataclasses.dataclass(frozen=True)
class Update:
  """One update of one number, by the formulas of `OptimizerConfig`.

  Attributes:
    step: from 1, as the run's log counts.
    t: Adam's: updates applied so far, this one included. Skipped ones do not count, and those of
      the run that `train.continue_from` names do; 0 before the first that is applied. sgd
      keeps no count: the step.
    is_skipped: whether the update was skipped: the moments and the number stay as they are.
    loss: of the batch before the update, nats per token.
    gradient: of the loss with respect to this number, after clipping; 0 where the batch does not
      use the number.
    m: first moment, or momentum; of sgd without momentum the gradient and the decay.
    v: second moment; for sgd, 0.
    m_hat: first moment with bias correction, m / (1 - b1^t); 0 where t is 0; for sgd, m.
    v_hat: second moment with bias correction, v / (1 - b2^t); 0 where t is 0, and for sgd.
    decay: weight_decay * value_before; 0 where this kind of parameter does not decay.
    rate: the learning rate.
    update: -rate * (m_hat / (sqrt(v_hat) + eps) + decay), of adam without the decay, which is in
      its moments; -rate * m of sgd; 0 where it was skipped.
    value_before: the number before the update.
    value: the number after it.
  """

  step: int
  t: int
  is_skipped: bool
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
  experiment: Experiment,
  devices: Sequence[jax.Device],
  data: Data,
  entry: Entry,
  num_steps: int = 10,
  initial: InitialParams | Origin | None = None,
) -> list[Update]:
  """Repeats a run's first updates and follows one number through them.

  Loss, moments, rate and values come from the training program itself, called for one update at a
  time: on the same devices their bits are the run's. Corrected moments, decay and update are
  computed from them in float64.

  Args:
    experiment: resolved.
    devices: those there are.
    data: the run's.
    entry: the number to follow, from `params.find_entry`.
    num_steps: updates, from the initial weights on.
    initial: what the run began from; None draws the weights as the run did.

  Returns:
    One row for each update.

  Source: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithms 1 and 2.
  """
  optimizer = experiment.optimizer
  weight_decay = optimizer.weight_decay if entry.param.kind in optimizer.decay_kinds else 0.0
  program = compile_program(experiment, devices, data, initial)
  # Computes all gradients, so that one program serves every entry.
  compute_gradients = jax.jit(partial(_compute_gradients, experiment=program.experiment))
  state, rows = program.state, []
  value = float(_read_entry(state.params, entry))
  for step in range(1, num_steps + 1):
    corpus = program.feed.corpus_at(step - 1)
    gradient = float(_read_entry(compute_gradients(state, corpus), entry))
    state, metrics = program.advance(state, step - 1, 1)
    metrics = jax.device_get(metrics)
    is_skipped = bool(metrics["train/skipped"][0])
    loss, rate = (float(metrics[name][0]) for name in ("train/loss", "train/lr"))
    value_before, value = value, float(_read_entry(state.params, entry))
    decay = weight_decay * value_before
    if optimizer.name == "sgd":
      t, v, v_hat = step, 0.0, 0.0
      m = gradient + decay
      if optimizer.momentum:
        m = float(_read_entry(state.opt_state["momentum"].trace, entry))
      m_hat = move = m
    else:
      adam = state.opt_state["adam"]
      m, v = (float(_read_entry(moment, entry)) for moment in (adam.mu, adam.nu))
      t = int(jax.device_get(adam.count))
      m_hat = m / (1 - optimizer.b1**t) if t else 0.0
      v_hat = v / (1 - optimizer.b2**t) if t else 0.0
      move = m_hat / (math.sqrt(v_hat) + optimizer.eps)
      move += decay if optimizer.name == "adamw" else 0.0
    rows.append(
      Update(
        step=step,
        t=t,
        is_skipped=is_skipped,
        loss=loss,
        gradient=gradient,
        m=m,
        v=v,
        m_hat=m_hat,
        v_hat=v_hat,
        decay=decay,
        rate=rate,
        update=0.0 if is_skipped else 0 - rate * move,  # -rate * 0 would be printed as -0
        value_before=value_before,
        value=value,
      )
    )
  return rows


def _compute_gradients(state: TrainState, corpus: Corpus, experiment: Experiment) -> dict:
  """Computes the gradients of the next update, after clipping."""
  clip_norm = experiment.optimizer.clip_norm
  batch = batches.batch(corpus, state.step, experiment)
  _, grads = loss_and_grads(state.params, batch, state.step, experiment)
  if clip_norm is None:
    return grads
  return optax.clip_by_global_norm(clip_norm).update(grads, optax.EmptyState())[0]


def _read_entry(tree: dict, entry: Entry) -> Any:
  """Reads one number of a tree shaped like the parameters; blocks stacked or a list."""
  group, _, name = entry.name.rpartition("/")
  if not group:
    return jax.device_get(tree[name])[entry.index]
  if isinstance(tree[group], dict):
    return jax.device_get(tree[group][name])[entry.index]
  layer, *rest = entry.index
  return jax.device_get(tree[group][layer][name])[tuple(rest)]
