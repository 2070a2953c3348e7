"""One update, and many of them in one call.

`TrainState`, the loss and its gradient, `train_step`, and the loop over it inside jit: pure
functions of arrays and a static experiment. Evaluation is in `evaluation.py`; where arrays lie is
decided in `sharding.py`; files, printing and the clock are in `train.py`.
"""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jgpt import batches
from jgpt.batches import Batch, Corpus
from jgpt.config import Experiment, Hyper
from jgpt.keys import DROPOUT, derive_key, derive_row_keys
from jgpt.loss import sum_nats
from jgpt.model import find_head, init_params, run_network
from jgpt.optim.adam import select_tree
from jgpt.optim.chain import make_optimizer
from jgpt.optim.schedule import make_schedule
from jgpt.optim.spikes import z_score
from jgpt.sharding import sum_over_data, with_auto_axes

MAX_STEPS_PER_CALL = 1024  # also the length of the metrics that a call returns


@struct.dataclass
class TrainState:
  """Everything an update reads and replaces.

  Attributes:
    step: int32 scalar, updates so far, applied or skipped. Batch n and rate n make the update
      n -> n + 1.
    params: as `init_params` returns them; blocks stacked or a list.
    opt_state: of the optax chain, a dict with the names clip, adam (of sgd momentum), decay and lr,
      and spikes where `optimizer.skip_spikes` is set.
  """

  step: jax.Array
  params: dict
  opt_state: optax.OptState


def init_state(key: jax.Array, experiment: Experiment, hyper: Hyper | None = None) -> TrainState:
  """Draws the state before the first update; `key` is consumed."""
  return begin_state(init_params(key, experiment.model), experiment, hyper)


def begin_state(params: dict, experiment: Experiment, hyper: Hyper | None = None) -> TrainState:
  """Makes the state before the first update of given parameters."""
  opt_state = make_optimizer(experiment, hyper).init(params)
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)


@with_auto_axes(None)
def loss_fn(
  params: dict,
  batch: Batch,
  experiment: Experiment,
  keys_B: jax.Array | None = None,
  total_weight: jax.Array | None = None,
) -> jax.Array:
  """Computes the mean cross-entropy of the next token: sum(w * -log p(target)) / sum(w).

  Args:
    params: as `init_params` returns them; blocks stacked or a list.
    batch: B sequences of T positions; at least one weight must be positive.
    experiment: `model` and `compute` are read.
    keys_B: of dropout, one for each sequence, consumed; None drops nothing.
    total_weight: divisor in place of sum(w): that of the batch which this is a part of.

  Returns:
    Scalar, nats per token.
  """
  config, compute = experiment.model, experiment.compute
  x_BTD = run_network(params, batch.inputs_BT, config, compute, keys_B)
  total_weight = jnp.sum(batch.weights_BT) if total_weight is None else total_weight
  head_VD, (_, targets_BT, weights_BT) = find_head(params, config, compute), batch
  return sum_nats(x_BTD, head_VD, targets_BT, weights_BT, config, compute) / total_weight


@with_auto_axes(None, "params")
def loss_and_grads(
  params: dict,
  batch: Batch,
  step: int | jax.Array,
  experiment: Experiment,
  hyper: Hyper | None = None,
) -> tuple[jax.Array, dict]:
  """Computes the loss of an update's batch and its gradient.

  The batch is taken at once, or in parts whose gradients are added: micro-batches, or with
  `compute.group_documents` groups of documents of like length, where a group of short ones is cut
  to half of the positions. Every part is divided by the whole batch's weight, so that the sum is
  the whole batch's gradient, with about the whole batch's rounding error. Each device adds its own
  rows' parts, and then loss and gradients are summed over the devices, once.

  Args:
    params: as `init_params` returns them; blocks stacked or a list.
    batch: B sequences of T positions.
    step: updates applied before; with the seed and a row's number it decides what dropout drops.
    experiment: a static value.
    hyper: numbers in place of the experiment's; only `seed` is read.

  Returns:
    The loss in nats per token, and gradients shaped like `params`.
  """
  B, micro_batch_size = batch.inputs_BT.shape[0], experiment.train.micro_batch_size
  num_parts, keys_B = B // (micro_batch_size or B), None
  if experiment.model.dropout:
    seed = experiment.train.seed if hyper is None else hyper.seed
    keys_B = derive_row_keys(derive_key(seed, DROPOUT, step), B)

  def add_parts(whole: tuple, rows: tuple) -> tuple[jax.Array, dict]:
    params, total_weight = whole

    def compute(part: Batch, keys_B: jax.Array | None = None) -> tuple[jax.Array, dict]:
      return jax.value_and_grad(loss_fn)(params, part, experiment, keys_B, total_weight)

    def compute_group(part: Batch) -> tuple[jax.Array, dict]:
      half = jax.tree.map(lambda x: x[:, : x.shape[1] // 2], part)
      return jax.lax.cond(batches.needs_all_positions(part), compute, lambda _: compute(half), part)

    def add(total: dict, part: tuple) -> tuple[dict, jax.Array]:
      loss, grads = compute_group(part[0]) if is_grouped else compute(*part)
      return jax.tree.map(jnp.add, total, grads), loss

    is_grouped = experiment.compute.group_documents is True
    if not is_grouped and num_parts == 1:
      return compute(*rows)
    parts = (batches.group_by_length(rows[0]),) if is_grouped else batches.split(rows, num_parts)
    grads, losses = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
    return jnp.sum(losses), grads

  return sum_over_data(add_parts, (params, jnp.sum(batch.weights_BT)), (batch, keys_B))


@with_auto_axes("state", None)
def train_step(
  state: TrainState, batch: Batch, experiment: Experiment, hyper: Hyper | None = None
) -> tuple[TrainState, dict]:
  """Applies one update, or skips it. The only step: many steps in one call loop over it inside jit.

  An update whose loss or gradient is not finite, or whose loss is a spike, is skipped: parameters,
  moments and their count keep their bits, while the step, the rate and the statistics of the losses
  advance.

  Args:
    state: replaced; donate it when this is jitted.
    batch: of `state.step`, from `batches.batch`.
    experiment: resolved; a static argument under jit.
    hyper: numbers in place of the experiment's, which may be arrays; None takes the experiment's.

  Returns:
    The next state, and scalars: "train/loss" (nats per token, before the update),
    "train/grad_norm" (before clipping), "train/lr", and "train/skipped" (int32, 0 or 1).
  """
  loss, grads = loss_and_grads(state.params, batch, state.step, experiment, hyper)
  grad_norm = optax.tree.norm(grads)
  ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  if experiment.optimizer.skip_spikes is not None:
    ok &= z_score(state.opt_state["spikes"], loss) <= experiment.optimizer.skip_spikes
  optimizer = make_optimizer(experiment, hyper)
  with jax.named_scope("optimizer"):
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss, ok=ok)
    params = select_tree(ok, optax.apply_updates(state.params, updates), state.params)
  metrics = {"train/loss": loss, "train/grad_norm": grad_norm}
  metrics["train/lr"] = make_schedule(experiment.optimizer, hyper)(state.step)
  metrics["train/skipped"] = jnp.int32(~ok)
  return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics


@with_auto_axes("state", None)
def train_steps(
  state: TrainState,
  corpus: Corpus,
  num_steps: jax.Array,
  experiment: Experiment,
  hyper: Hyper | None = None,
  *,
  capacity: int = MAX_STEPS_PER_CALL,
) -> tuple[TrainState, dict]:
  """Applies `num_steps` updates in one call.

  `num_steps` is an argument of the compiled program, so that every call length is one executable,
  and a run resumed at any step is the same program.

  Args:
    state: replaced; donate it when this is jitted.
    corpus: on the device.
    num_steps: int32 scalar, 0 <= num_steps <= capacity.
    experiment: resolved; a static argument under jit.
    hyper: numbers in place of the experiment's, which may be arrays.
    capacity: length of the returned metrics.

  Returns:
    The state after the updates, and metrics [capacity]; entries from `num_steps` on are zero.
  """

  @jax.jit  # traced once, for the shapes of its metrics and for the body of the loop
  def next_step(state: TrainState) -> tuple[TrainState, dict]:
    batch = batches.batch(corpus, state.step, experiment, hyper)
    return train_step(state, batch, experiment, hyper)

  _, shapes = jax.eval_shape(next_step, state)
  history = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), shapes)

  def body(carry: tuple) -> tuple:
    i, state, history = carry
    state, metrics = next_step(state)
    return i + 1, state, jax.tree.map(lambda h, m: h.at[i].set(m), history, metrics)

  start = jnp.int32(0), state, history
  _, state, history = jax.lax.while_loop(lambda carry: carry[0] < num_steps, body, start)
  return state, history
