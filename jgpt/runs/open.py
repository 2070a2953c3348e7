"""Checkpoints: saving a state while training goes on, and reading back what is verified.

Responsible for arrays in a run folder: that a save costs the training loop no more than a copy, that what is read has the
digests it was saved with, and that damage is named and never read. Orbax is named in this file only. What files a
checkpoint has, and when it exists, is described in `manifest.py`. Not responsible for what is trained.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax

from jgpt.config import Experiment
from jgpt.devices import runtime
from jgpt.errors import UserError, printable
from jgpt.model import init_params
from jgpt.runs import manifest
from jgpt.runs.checkpoint import _restore
from jgpt.runs.folder import read_run_files
from jgpt.runs.manifest import find_damage, find_step, list_steps
from jgpt.system.files import may_pass
from jgpt.system.signals import say
from jgpt.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Run:
  """What sampling needs of a run.

  Attributes:
    params: arrays, as `init_params` returns them.
    tokenizer: of the run.
    experiment: resolved.
    step: updates that made these parameters.
    workdir: the folder.
  """

  params: dict
  tokenizer: Tokenizer
  experiment: Experiment
  step: int
  workdir: Path


def load_run(workdir: str | Path, step: int | None = None) -> Run:
  """Reads a run's parameters and settings from one of its checkpoints, verified; changes nothing in the folder.

  Args:
    workdir: a run folder; a run may be going on in it.
    step: which checkpoint; None takes the newest that is not damaged, and says so on standard error where one is.

  Raises:
    UserError: if it is no run folder, has no such checkpoint, or what is asked for is damaged.
  """
  workdir = Path(workdir)
  if not os.path.isdir(workdir / "checkpoints"):
    read_run_files(workdir)  # says what is missing
  runtime.devices()  # says where there is none
  if step is not None:
    return _load_step(workdir, find_step(workdir, step))
  while True:
    find_step(workdir, None)
    steps = list_steps(workdir)
    for newest in reversed(steps):
      try:
        return _load_step(workdir, newest)
      except UserError as error:
        if may_pass(error):
          raise
        if newest not in list_steps(workdir):
          break  # deleted meanwhile, so there is a newer one
        if newest == steps[0]:
          raise UserError(f"every checkpoint of {workdir} is damaged; of the oldest: {error}") from error
        say(f"WARNING: step {newest} is damaged, the one before it is taken: {printable(str(error))}")


def _load_step(workdir: Path, step: int) -> Run:
  folder = manifest.checkpoints_dir(workdir) / str(step)
  if damage := find_damage(folder, ["params"]):
    raise UserError(damage)
  files = read_run_files(folder)
  place = jax.sharding.SingleDeviceSharding(runtime.devices()[0])
  shapes = jax.eval_shape(lambda key: init_params(key, files.experiment.model), jax.random.key(0))
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
  params = _restore(folder, {"params": target})["params"]
  return Run(params, files.tokenizer, files.experiment, step, workdir)
