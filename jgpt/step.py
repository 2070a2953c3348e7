"""One update, and many of them in one call.

Responsible for `TrainState`, the loss, `train_step`, the loop over it inside jit, and evaluation. Everything is a pure
function of arrays and static settings; where the arrays live is decided outside (`sharding.py`). Not responsible for
time, files or printing (`train.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jgpt.attention import Attend, attend_causally
from jgpt.batches import Batch, Corpus, make_batch_fn
from jgpt.config import Experiment, ModelConfig
from jgpt.keys import DROPOUT, derive_key
from jgpt.model import apply, init_params
from jgpt.optim import make_optimizer, make_schedule, z_score

MAX_STEPS_PER_CALL = 1024  # also the length of the metrics that a call returns

# (params, batch, config, key, micro_batch_size) -> (loss, gradients): `loss_and_grads` and what computes the same.
GradsFn = Callable[[dict, Batch, ModelConfig, jax.Array | None, int | None], tuple[jax.Array, dict]]
# (ok, new, old) -> new where the bool scalar `ok` holds, else old: `keep_unless` and what computes the same.
Keep = Callable[[jax.Array, Any, Any], Any]


@struct.dataclass
class TrainState:
  """Everything an update reads and replaces.

  Attributes:
    step: int32 scalar, updates so far, applied or skipped. Batch n and rate n make the update n -> n + 1.
    params: as `init_params` returns them.
    opt_state: of the optax chain, a dict with the names clip, adam, decay and lr, and spikes where those are skipped.
  """

  step: jax.Array
  params: dict
  opt_state: optax.OptState


def init_state(key: jax.Array, config: ModelConfig, tx: optax.GradientTransformation) -> TrainState:
  """Makes the state before the first update; `key` is consumed."""
  return begin_state(init_params(key, config), tx)


def begin_state(params: dict, tx: optax.GradientTransformation) -> TrainState:
  """Makes the state before the first update of given parameters."""
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def loss_fn(
  params: dict,
  batch: Batch,
  config: ModelConfig,
  key: jax.Array | None = None,
  total_weight: jax.Array | None = None,
  *,
  attend: Attend = attend_causally,
) -> jax.Array:
  """Computes the mean cross-entropy of the next token: sum(w * -log p(target)) / sum(w).

  Args:
    params: as `init_params` returns them.
    batch: B sequences of T positions; at least one weight must be positive.
    config: sizes and switches.
    key: of what is dropped out, consumed; None drops nothing.
    total_weight: divides instead of this batch's own sum(w): that of the batch this is a part of.
    attend: see `apply`.

  Returns:
    Scalar, nats per token.
  """
  logits_BTV = apply(params, batch.inputs_BT, config, key, attend)
  nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch.targets_BT)
  total_weight = jnp.sum(batch.weights_BT) if total_weight is None else total_weight
  return jnp.sum(nats_BT * batch.weights_BT) / total_weight


def loss_and_grads(
  params: dict,
  batch: Batch,
  config: ModelConfig,
  key: jax.Array | None = None,
  micro_batch_size: int | None = None,
  *,
  attend: Attend = attend_causally,
) -> tuple[jax.Array, dict]:
  """Computes the loss and its gradient, the whole batch at once or accumulated over micro-batches.

  Args:
    params: as `init_params` returns them, or with unstacked blocks.
    batch: B sequences.
    config: sizes and switches.
    key: of what is dropped out, consumed; None drops nothing. Each micro-batch folds its number into it.
    micro_batch_size: sequences per forward and backward pass; must divide B. The sum is weighted by valid tokens, so
      the result is the whole batch's.
    attend: see `apply`.

  Returns:
    The loss in nats per token, and gradients shaped like `params`.
  """
  value_and_grad = jax.value_and_grad(partial(loss_fn, attend=attend))
  if micro_batch_size is None:
    return value_and_grad(params, batch, config, key)
  num_micro = batch.inputs_BT.shape[0] // micro_batch_size
  # Micro-batch i takes every num_micro-th sequence: of a batch divided over devices each then uses all of them.
  parts = jax.tree.map(lambda x: x.reshape(micro_batch_size, num_micro, *x.shape[1:]).swapaxes(0, 1), batch)
  total_weight = jnp.sum(batch.weights_BT)

  def add(carry: tuple, number_and_part: tuple[jax.Array, Batch]) -> tuple[tuple, None]:
    number, part = number_and_part
    part_key = None if key is None else jax.random.fold_in(key, number)
    return jax.tree.map(jnp.add, carry, value_and_grad(params, part, config, part_key, total_weight)), None

  loss = jax.eval_shape(partial(loss_fn, config=config), params, batch)
  zeros = jnp.zeros((), loss.dtype), jax.tree.map(jnp.zeros_like, params)
  return jax.lax.scan(add, zeros, (jnp.arange(num_micro), parts))[0]


def dropout_key(seed: int, step: jax.Array, config: ModelConfig) -> jax.Array | None:
  """The key of what an update drops out, a function of seed and step; None for a model without dropout."""
  return derive_key(seed, DROPOUT, step) if config.dropout else None


def keep_unless(ok: jax.Array, new: Any, old: Any) -> Any:
  """The new tree where `ok`, a bool scalar, holds, and else the old one: bit by bit, without a branch."""
  return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  config: ModelConfig,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  seed: int = 0,
  micro_batch_size: int | None = None,
  skip_spikes: float | None = None,
  grads_fn: GradsFn = loss_and_grads,
  keep: Keep = keep_unless,
) -> tuple[TrainState, dict]:
  """Applies one update, or skips it. The only step there is: many steps in one call is a loop over it inside jit.

  An update whose loss or gradient is not finite, or whose loss is a spike, is skipped: parameters, moments and their count
  are bit by bit what they were; the step, the rate and what is known of the losses go on.

  Args:
    state: replaced; donate it when this is jitted.
    batch: what to learn from.
    config: sizes and switches.
    tx: the optimizer, from `make_optimizer`.
    schedule: the rate it uses, to report.
    seed: of what is dropped out, which is a function of it and the step.
    micro_batch_size: see `loss_and_grads`.
    skip_spikes: the z-score of the loss above which the update is skipped; None skips none for that.
    grads_fn: `loss_and_grads`, or what computes the same.
    keep: `keep_unless`, or what computes the same.

  Returns:
    The next state, and metrics, scalars: "train/loss" (nats per token, before the update), "train/grad_norm" (before
    clipping), "train/lr", and "train/skipped" (int32, 0 or 1).
  """
  key = dropout_key(seed, state.step, config)
  loss, grads = grads_fn(state.params, batch, config, key, micro_batch_size)
  grad_norm = optax.tree.norm(grads)
  ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  if skip_spikes is not None:
    ok &= z_score(state.opt_state["spikes"], loss) <= skip_spikes
  updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss, keep=partial(keep, ok))
  params = keep_unless(ok, optax.apply_updates(state.params, updates), state.params)
  metrics = {"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": schedule(state.step)}
  metrics["train/skipped"] = jnp.int32(~ok)
  return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics


def train_steps(
  state: TrainState,
  corpus: Corpus,
  num_steps: jax.Array,
  *,
  step_fn: Callable[[TrainState, Batch], tuple[TrainState, dict]],
  batch_fn: Callable[[Corpus, jax.Array], Batch],
  capacity: int,
) -> tuple[TrainState, dict]:
  """Applies `num_steps` updates in one call.

  `num_steps` is an argument of the compiled program, so that every call length is one executable and a run resumed at
  any step is the same program.

  Args:
    state: replaced; donate it when this is jitted.
    corpus: on the device.
    num_steps: int32 scalar, 0 <= num_steps <= capacity.
    step_fn: `train_step` with its settings bound.
    batch_fn: the batch of a step, from `batches.make_batch_fn`.
    capacity: length of the returned metrics.

  Returns:
    The state after the updates, and metrics [capacity]; entries from `num_steps` on are zero.
  """
  # Under jit, so that asking for the metrics' shapes and writing the loop's body trace the step once.
  next_step = jax.jit(lambda state, corpus: step_fn(state, batch_fn(corpus, state.step)))
  _, shapes = jax.eval_shape(next_step, state, corpus)
  history = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), shapes)

  def body(carry: tuple) -> tuple:
    i, state, history = carry
    state, metrics = next_step(state, corpus)
    return i + 1, state, jax.tree.map(lambda h, m: h.at[i].set(m), history, metrics)

  _, state, history = jax.lax.while_loop(lambda carry: carry[0] < num_steps, body, (jnp.int32(0), state, history))
  return state, history


def make_train_step(
  experiment: Experiment, grads_fn: GradsFn = loss_and_grads, keep: Keep = keep_unless
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
  """Binds `train_step` to a resolved experiment's settings."""
  return partial(
    train_step,
    config=experiment.model,
    tx=make_optimizer(experiment.optimizer, experiment.model),
    schedule=make_schedule(experiment.optimizer),
    seed=experiment.train.seed,
    micro_batch_size=experiment.train.micro_batch_size,
    skip_spikes=experiment.optimizer.skip_spikes,
    grads_fn=grads_fn,
    keep=keep,
  )


def make_train_steps(
  experiment: Experiment,
  capacity: int,
  place: Callable[[Batch], Batch] = lambda batch: batch,
  grads_fn: GradsFn = loss_and_grads,
  keep: Keep = keep_unless,
) -> Callable[[TrainState, Corpus, jax.Array], tuple[TrainState, dict]]:
  """Binds `train_steps` to a resolved experiment's settings.

  Args:
    experiment: resolved.
    capacity: the most steps one call may take.
    place: applied to each batch, for example a sharding constraint.
    grads_fn: see `train_step`.
    keep: see `train_step`.
  """
  batch_fn = make_batch_fn(experiment.data, experiment.train.seed)
  return partial(
    train_steps,
    step_fn=make_train_step(experiment, grads_fn, keep),
    batch_fn=lambda corpus, step: place(batch_fn(corpus, step)),
    capacity=capacity,
  )
