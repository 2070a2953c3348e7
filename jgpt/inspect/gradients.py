"""The gradient and the update that a run's parameters would have now, for one batch of the run.

Reads the optimizer's state beside the parameters of an opened run. What is measured of the two is
in `parameters.py`.
"""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgpt import batches
from jgpt.batches import Corpus
from jgpt.config import Experiment, MeshConfig
from jgpt.data.corpus import Data
from jgpt.data.feed import make_feed
from jgpt.devices import runtime
from jgpt.errors import UserError
from jgpt.optim.chain import make_optimizer
from jgpt.optim.schedule import make_schedule
from jgpt.runs import checkpoint, manifest
from jgpt.runs.open import Run
from jgpt.sharding import count_usable_devices, make_mesh, replicated, use_mesh
from jgpt.step import begin_state, loss_and_grads


class NextUpdate(NamedTuple):
  """What one batch would change.

  Attributes:
    step: of the batch and of the rate, from 0: they made the update step -> step + 1.
    rate: the learning rate.
    loss: of the batch, nats per token.
    grads: its gradient before clipping, shaped like the parameters.
    updates: what the optimizer would add to the parameters, shaped like them.
  """

  step: int
  rate: float
  loss: float
  grads: dict
  updates: dict


def compute_next_update(run: Run, data: Data) -> NextUpdate:
  """Computes the gradient of a run's parameters for one batch, and the update it would make.

  The batch and the rate are those of the update that made the parameters, because the rate after
  a schedule's end is often 0; of a run without updates they are the first update's. The update is
  computed from the optimizer's state as it is now, and is not applied.

  Args:
    run: from `open_run`.
    data: the run's, from `Run.data`.

  Raises:
    UserError: if the checkpoint has no optimizer state, or it is damaged.

  Example:
    >>> run = jgpt.open_run("runs/names")
    >>> found = compute_next_update(run, run.data())
    >>> rows = measure_params(run.params, found.grads, found.updates, run.experiment.model)
  """
  devices = runtime.devices(is_local=True)
  experiment, step = _fit_mesh(run.experiment, len(devices)), max(0, run.step - 1)
  mesh = make_mesh(experiment, devices)
  place = replicated(mesh)
  opt_state = _restore_opt_state(run, place)
  feed = make_feed(data.train, experiment.data, experiment.train.seed, mesh)
  params = jax.device_put(run.params, place)
  compute = jax.jit(partial(_compute, experiment=experiment))
  with use_mesh(params):
    rate, loss, grads, updates = compute(
      params, opt_state, feed.corpus_at(step), jax.device_put(jnp.int32(step), place)
    )
  return NextUpdate(step, float(rate), float(loss), grads, updates)


def _fit_mesh(experiment: Experiment, num_devices: int) -> Experiment:
  """Returns the experiment for the devices there are, which may be fewer than the run had."""
  size = experiment.mesh.num_devices
  if size is not None and size <= num_devices:
    return experiment
  mesh = MeshConfig(data=count_usable_devices(experiment, num_devices))
  return dataclasses.replace(experiment, mesh=mesh)


def _restore_opt_state(run: Run, place: jax.sharding.Sharding) -> dict:
  """Reads and verifies the optimizer's state of the checkpoint that a run was opened at."""
  folder = manifest.checkpoints_dir(run.workdir) / str(run.step)
  if not os.path.lexists(folder / "train_state"):
    raise UserError(f"{folder} has no optimizer state, only parameters")
  if damage := manifest.find_damage(folder, ["train_state"]):
    raise UserError(damage)
  state = jax.eval_shape(partial(begin_state, experiment=run.experiment), run.params)
  items = {"step": state.step, "opt_state": state.opt_state}
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), items)
  return checkpoint.restore_items(folder, {"train_state": target})["train_state"]["opt_state"]


def _compute(
  params: dict, opt_state: dict, corpus: Corpus, step: jax.Array, experiment: Experiment
) -> tuple[jax.Array, jax.Array, dict, dict]:
  batch = batches.batch(corpus, step, experiment)
  loss, grads = loss_and_grads(params, batch, step, experiment)
  # The rate's own count is one further, at the update after this one.
  opt_state = opt_state | {"lr": opt_state["lr"]._replace(count=step)}
  updates, _ = make_optimizer(experiment).update(grads, opt_state, params, value=loss, ok=True)
  return make_schedule(experiment.optimizer)(step), loss, grads, updates
