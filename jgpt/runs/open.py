"""A run folder opened for reading: parameters, tokenizer, settings and metrics of one checkpoint.

Nothing in the folder is changed or executed. Arrays are read and verified by `checkpoint.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jgpt.batches import Stream
from jgpt.config import Experiment, MeshConfig, SampleConfig
from jgpt.config.synonyms import describe_synonym
from jgpt.data.corpus import Data, make_documents
from jgpt.data.sources import split_documents
from jgpt.devices import runtime
from jgpt.devices.compute import resolve_compute
from jgpt.errors import UserError, near_matches, printable
from jgpt.evaluation import evaluate_loss
from jgpt.generate import generate_texts
from jgpt.keys import SAMPLE, derive_key
from jgpt.model import init_params
from jgpt.runs import checkpoint, manifest
from jgpt.runs.folder import read_run_files
from jgpt.runs.locate import BEST, Step, describe_better_step, locate_run, order_steps
from jgpt.runs.rows import Series, read_jsonl, read_series
from jgpt.runs.text import find_run_data
from jgpt.sharding import count_usable_devices, leave_mesh
from jgpt.system.files import is_temporary
from jgpt.system.signals import print_stderr
from jgpt.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Run:
  """A run at one of its checkpoints, from `open_run`.

  Attributes:
    params: as `init_params` returns them.
    tokenizer: of the run.
    experiment: resolved, `compute` and `mesh` for this machine's devices; replace `compute` by
      `PLAIN` to compute by the definition.
    step: updates that made these parameters.
    workdir: the run folder.

  Example:
    >>> run = jgpt.open_run("runs/names")
    >>> run.sample("an")
    >>> run.loss("anna")
  """

  params: dict
  tokenizer: Tokenizer
  experiment: Experiment
  step: int
  workdir: Path

  @functools.cached_property
  def metrics(self) -> dict[str, Series]:
    """Reads the run's metrics up to its step, by name: "train/loss", "heldout/loss" and more.

    Those of the run's end are called "final/heldout/loss" and so on: they are over the whole
    held-out part, where evaluations before may be over a sample.
    """
    return read_series(self.workdir / "metrics.jsonl", self.step)

  def sample(
    self, prompt: str | None = None, *, seed: int | None = None, **settings: Any
  ) -> list[str]:
    """Draws texts, as `python -m jgpt.sample` does.

    Args:
      prompt: how each text begins; None takes the run's.
      seed: of the draws; None takes the run's.
      **settings: fields of `SampleConfig` in place of the run's, for example `num=5`.

    Returns:
      `num` texts, with the prompt.

    Raises:
      UserError: for a prompt with characters that the tokenizer does not know, or a setting out of
        its range.
    """
    if prompt is not None:
      settings["prompt"] = prompt
    config, seed = choose_sample(self.experiment, seed, settings)
    key = derive_key(seed, SAMPLE, self.step)
    return generate_texts(self.params, self.tokenizer, key, self.experiment, config)

  def loss(self, text: str) -> float:
    """Computes the loss of a text, nats per token, as evaluation does.

    Args:
      text: documents, one a line, where the run's batches are documents; otherwise one stream, cut
        into windows of `data.seq_len` tokens that do not see each other.

    Raises:
      UserError: if the tokenizer does not know a character, or nothing can be predicted.
    """
    if self.experiment.data.batching == "documents":
      lines = split_documents(text)
      corpus = make_documents(lines, self.tokenizer, self.experiment.data.seq_len)
      is_empty = not lines
    else:
      corpus = Stream(np.asarray(self.tokenizer.encode(text), np.int32))
      is_empty = len(corpus.tokens) < 2
    if is_empty:
      raise UserError(f"the text {text[:40]!r} has nothing to predict. Try a longer one")
    evaluation = evaluate_loss(self.params, corpus, self.tokenizer, self.experiment)
    return evaluation.loss_nats_per_token

  def data(self, path: str | None = None) -> Data:
    """Loads the text that the run was trained on, found by its recorded digest.

    Args:
      path: where it lies now (`data.path`); None looks where the run's starts found it.

    Raises:
      UserError: if there is no such text.
    """
    recorded = read_run_files(self.workdir)
    ours = recorded.experiment.data
    config = None if path is None else dataclasses.replace(ours, path=path)
    return find_run_data(self.workdir, recorded, config)[0]


def choose_sample(
  experiment: Experiment, seed: int | None, settings: dict[str, Any]
) -> tuple[SampleConfig, int]:
  """Returns how texts are drawn and from which seed: as given, or else as in an experiment.

  Args:
    experiment: resolved.
    seed: of the draws; None takes the experiment's.
    settings: fields of `SampleConfig` in place of the experiment's.

  Raises:
    UserError: if there is no such field, or a value is out of its range.
  """
  unknown = settings.keys() - {field.name for field in dataclasses.fields(experiment.sample)}
  if unknown:
    name = min(unknown)
    known = [field.name for field in dataclasses.fields(experiment.sample)]
    near = describe_synonym(name) or near_matches(name, known)
    raise UserError(f"there is no setting sample.{name}.{near}")
  config, train = dataclasses.replace(experiment.sample, **settings), experiment.train
  if seed is not None:
    train = dataclasses.replace(train, seed=seed)
  return config, train.seed


@leave_mesh()
def open_run(workdir: str | Path, step: Step = None) -> Run:
  """Reads a run's parameters and settings from one of its checkpoints, and verifies them.

  Args:
    workdir: a run folder, in which a process may be training, or one of its checkpoints/STEP.
    step: of the checkpoint; "best" takes the saved one with the lowest held-out loss, and says on
      standard error if a better one was not saved; None takes the newest. Of these the first that
      is not damaged is taken, with a warning for each one before it.

  Raises:
    UserError: if it is not a run folder, has no such checkpoint, or the checkpoint is damaged.

  Example:
    >>> run = jgpt.open_run("runs/names")
    >>> run.experiment.model.num_layers
  """
  workdir, step = locate_run(workdir, step)
  if not os.path.isdir(workdir / "checkpoints"):
    read_run_files(workdir)  # raises an error that says what is missing
  devices = runtime.devices(is_local=True)
  if step is not None and step != BEST:
    return _open_step(workdir, manifest.find_step(workdir, step), devices)
  while True:
    order = order_steps(workdir, step)
    for candidate in order:
      try:
        run = _open_step(workdir, candidate, devices)
      except UserError as error:
        if is_temporary(error):
          raise
        if candidate not in manifest.list_steps(workdir):
          break  # its writer deleted it, so there is a newer one
        if candidate == order[-1]:
          what = "every checkpoint of" if step is None else "every checkpoint with a loss of"
          words = f"{what} {workdir} is damaged; of step {candidate}: {error}"
          raise UserError(words) from error
        shown = printable(str(error))
        after = "the one before it" if step is None else "the next best"
        print_stderr(f"WARNING: step {candidate} is damaged, {after} is taken: {shown}")
      else:
        if step == BEST and (
          better := describe_better_step(workdir, candidate, read_jsonl(workdir / "metrics.jsonl"))
        ):
          print_stderr(better)
        return run


def _open_step(workdir: Path, step: int, devices: Sequence[jax.Device]) -> Run:
  """Reads and verifies the parameters of one checkpoint, on the first device."""
  folder = manifest.checkpoints_dir(workdir) / str(step)
  if damage := manifest.find_damage(folder, ["params"]):
    raise UserError(damage)
  files = read_run_files(folder)
  place = jax.sharding.SingleDeviceSharding(devices[0])
  shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), files.experiment.model))
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
  params = checkpoint.restore_items(folder, {"params": target})["params"]
  experiment = resolve_compute(files.experiment, devices[0])
  if experiment.mesh.num_devices is None:  # evaluation takes as many sequences as training
    mesh = MeshConfig(data=count_usable_devices(experiment, len(devices)))
    experiment = dataclasses.replace(experiment, mesh=mesh)
  return Run(params, files.tokenizer, experiment, step, workdir)
