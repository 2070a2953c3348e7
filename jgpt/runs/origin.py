"""The origin of a continued run: the checkpoint that `train.continue_from` names.

A continued run is a new run that begins with the parameters and moments of another, Adam's with
their count. Its step, schedule, order of the data and statistics of losses begin anew, so that
batch size, rate, schedule and text may be others. The state is made in `program.py`; initial
weights without moments are in `weights/initial.py`. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jgpt.config import Experiment, OptimizerConfig
from jgpt.config.settings import format_value, list_settings
from jgpt.errors import UserError, printable
from jgpt.runs import manifest
from jgpt.runs.folder import RunFiles, read_run_files
from jgpt.runs.locate import find_checkpoint
from jgpt.runs.manifest import Manifest
from jgpt.runs.resume import find_fault
from jgpt.runs.rows import read_lines
from jgpt.runs.text import find_place
from jgpt.system.signals import print_stderr
from jgpt.text.tokenizer import Tokenizer

# Settings of the model that change neither the shape nor the meaning of a parameter.
FREE_MODEL_SETTINGS = ("dropout", "dropout_places", "init_std", "scale_residual_init")
# Links of the optimizer's chain whose states hold moments; a chain has one of them.
MOMENT_LINKS = ("adam", "momentum")


@dataclasses.dataclass(frozen=True)
class Origin:
  """A checkpoint that a continued run begins from.

  Attributes:
    folder: of the checkpoint.
    experiment: of its run, as recorded.
    tokenizer: of its run.
    record: what the continued run records of it: "location" (printable path of the run folder),
      "step", "sha256" (of the digests of its arrays), and "tokens", which its
      run and the runs before it had trained on, None where that is not known.
  """

  folder: Path
  experiment: Experiment
  tokenizer: Tokenizer
  record: dict[str, Any]

  @property
  def location(self) -> str:
    """Returns the run folder and the step, for a person."""
    return f"{self.record['location']} at step {self.record['step']:,}"


def read_source_files(source: str) -> RunFiles:
  """Reads the settings and the tokenizer of the run that `train.continue_from` names.

  The settings name its text where that lies now.

  Raises:
    UserError: if it names no run.
  """
  workdir, _ = _find_run(source)
  files = read_run_files(workdir)
  data = find_place(workdir, files)
  return dataclasses.replace(files, experiment=dataclasses.replace(files.experiment, data=data))


def open_origin(source: str, recorded: dict[str, Any] | None = None) -> Origin:
  """Opens the checkpoint that a run continues, and compares its files with their digests.

  Args:
    source: `train.continue_from`: a run folder, whose newest undamaged checkpoint is taken, or one
      of its checkpoints/STEP.
    recorded: the `record` of a run that began before; the origin must still be that.

  Raises:
    UserError: if there is no such checkpoint, it is damaged, or it is not the recorded one.
  """
  workdir, step = _find_run(source)
  if step is None and recorded is not None:
    step = recorded["step"]
  if recorded is not None and step not in manifest.list_steps(workdir):
    raise UserError(
      f"this run continues {workdir} at step {recorded['step']:,}, and that checkpoint is gone. "
      "Put it back, or start over with --fresh, which takes the newest one"
    )
  if step is None:
    step = _find_newest(workdir)
  else:
    manifest.find_step(workdir, step)
    if fault := find_fault(workdir, manifest.checkpoints_dir(workdir) / str(step)):
      raise UserError(f"the checkpoint of step {step} of {workdir} is damaged: {fault}")
  folder = manifest.checkpoints_dir(workdir) / str(step)
  files, there = read_run_files(folder), manifest.read_manifest(folder)
  record = {
    "location": str(workdir),
    "step": step,
    "sha256": _digest_leaves(there),
    "tokens": _count_tokens(workdir, files, there),
  }
  if recorded is not None and record["sha256"] != recorded["sha256"]:
    raise UserError(
      f"{workdir} at step {step:,}, which this run continues, has changed since this run began. "
      "Put the old checkpoint back, or start over with --fresh"
    )
  return Origin(folder, files.experiment, files.tokenizer, record)


def _find_run(source: str) -> tuple[Path, int | None]:
  """Returns what `find_checkpoint` does; raises `UserError` where it finds no run."""
  if found := find_checkpoint(source):
    return found
  what = "a run folder or one of its checkpoints/STEP, which hold an optimizer's moments"
  if not source.strip():
    raise UserError(f"train.continue_from is empty: it must be {what}.")
  try:
    is_there = os.path.lexists(os.path.expanduser(source))
  except ValueError:  # a NUL in the path
    is_there = False
  problem = "must be" if is_there else "does not exist: it must be"
  raise UserError(
    f"train.continue_from={source[:200]!r} {problem} {what}. Weights without moments (Hugging "
    "Face's, llm.c's, gpt2) are named with --init-from"
  )


def _find_newest(workdir: Path) -> int:
  """Finds the newest undamaged checkpoint, with a warning for each newer one."""
  while True:
    manifest.find_step(workdir, None)  # raises where there is none
    steps = manifest.list_steps(workdir)
    for step in reversed(steps):
      fault = find_fault(workdir, manifest.checkpoints_dir(workdir) / str(step))
      if fault is None:
        return step
      if step not in manifest.list_steps(workdir):
        break  # its writer deleted it, so there is a newer one
      if step == steps[0]:
        raise UserError(f"every checkpoint of {workdir} is damaged; of the oldest: {fault}")
      print_stderr(
        f"WARNING: step {step} of {workdir} is damaged, the one before it is taken: "
        f"{printable(fault)}"
      )


def _digest_leaves(there: Manifest) -> str:
  """Computes the SHA-256 of the names, dtypes, shapes and digests of a checkpoint's arrays."""
  return hashlib.sha256(json.dumps(there.leaves, sort_keys=True).encode()).hexdigest()


def _count_tokens(workdir: Path, files: RunFiles, there: Manifest) -> int | None:
  """Counts the tokens that a run and the runs before it trained on, up to a checkpoint.

  Its log says it; in the logs of older runs it is missing, and of a stream the manifest's sequences
  are counted.
  """
  data, tokens, sequences = files.experiment.data, None, there.data.get("sequences")
  if there.step == 0:
    tokens = 0
  elif data.batching != "documents" and type(sequences) is int:
    tokens = sequences * data.seq_len
  for line in read_lines(workdir / "metrics.jsonl"):
    if line.row is not None and line.row["step"] == there.step and "tokens" in line.row:
      tokens = int(line.row["tokens"])
  before = files.origin["tokens"] if files.origin else 0
  return None if before is None or tokens is None else before + tokens


# --- What a continued run must have in common with its origin ---


def check_origin(origin: Origin, experiment: Experiment) -> None:
  """Checks that a run has the network and the optimizer of its origin.

  Args:
    origin: from `open_origin`.
    experiment: resolved.

  Raises:
    UserError: naming each setting that differs, and the one to set.
  """
  check_origin_settings(origin, list_settings(experiment))
  _check_moments(origin)


def check_origin_settings(origin: Origin, here: dict[str, Any]) -> None:
  """Checks that settings are the origin's, where they must be.

  Args:
    origin: from `open_origin`.
    here: `section.field` -> value. `model.vocab_size` may be None, which means the tokenizer's.

  Raises:
    UserError: naming each setting that differs, and the one to set.
  """
  there = list_settings(origin.experiment)
  kept = list_kept_settings(origin.experiment)
  differing = [n for n in kept if here.get(n, there[n]) not in (there[n], None)]
  if not differing:
    return
  said = ", ".join(
    f"{name}={format_value(there[name])} there and {format_value(here[name])} here"
    for name in differing
  )
  tries = " ".join(f"--set {name}={format_value(there[name])}" for name in differing)
  what = "network" if any(name.startswith("model.") for name in differing) else "optimizer"
  raise UserError(
    f"{origin.location} has another {what}, and its moments belong to it: {said}. Try {tries}, or "
    f"begin from the parameters alone, with --init-from {shlex.quote(origin.record['location'])}"
  )


def list_kept_settings(origin: Experiment) -> list[str]:
  """Lists the settings that a continued run has from its origin, as `section.field`."""
  model = [f.name for f in dataclasses.fields(origin.model) if f.name not in FREE_MODEL_SETTINGS]
  moments = list_moment_settings(origin.optimizer)
  return [*(f"model.{name}" for name in model), *(f"optimizer.{name}" for name in moments)]


def list_moment_settings(optimizer: OptimizerConfig) -> tuple[str, ...]:
  """Lists the settings of an optimizer that its moments depend on.

  They are sums weighted by powers of b1 and b2, or of the momentum, as are the divisors that
  correct Adam's; and Adam's with decay in the gradient are not AdamW's.
  """
  return ("name", "momentum") if optimizer.name == "sgd" else ("name", "momentum", "b1", "b2")


def can_continue(origin: Experiment, changed: Iterable[str] = ()) -> bool:
  """Returns whether a run with some settings changed can take over the moments of another.

  Args:
    origin: settings of the other run.
    changed: names of settings, `section.field`.
  """
  return origin.optimizer.num_moments > 0 and not {*changed} & {*list_kept_settings(origin)}


def _check_moments(origin: Origin) -> None:
  """Checks that a checkpoint holds the moments of each parameter, and no other optimizer's.

  Raises:
    UserError: naming the first array that is missing or unknown, or if the optimizer has none.
  """
  optimizer = origin.experiment.optimizer
  alone = f"To begin from the parameters alone: --init-from {origin.record['location']}"
  if not optimizer.num_moments:
    raise UserError(
      f"{origin.location} has no moments to continue with: its optimizer is sgd without momentum. "
      f"{alone}"
    )
  leaves = manifest.read_manifest(origin.folder).leaves
  states, params = _list_below(leaves, "train_state/opt_state/"), _list_below(leaves, "params/")
  if optimizer.name == "sgd":
    what, moments = "its momentum", {f"momentum/trace/{name}" for name in params}
  else:
    what = "Adam's count and its moments mu and nu"
    moments = {"adam/count"} | {f"adam/{m}/{name}" for m in ("mu", "nu") for name in params}
  unknown = {name for name in states - moments if name.split("/")[0] not in ("lr", "spikes")}
  for name in sorted((moments - states) | unknown):
    got = "missing" if name in moments else "there"
    raise UserError(
      f"{origin.location} has another optimizer: {name} is {got}, and a continued run takes over "
      f"{what} of each parameter. {alone}"
    )


def _list_below(names: Iterable[str], prefix: str) -> set[str]:
  """Returns the names that begin with a prefix, without it."""
  return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
