"""Whether a run goes on in a folder, and from where.

Responsible for comparing what is asked for with what a run folder records, and for the newest checkpoint that is whole and
of this run. Changes nothing in the folder. Not responsible for reading arrays (`checkpoint.py`), nor for going on
(`train.py`). Imports no jax.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from jgpt import manifest
from jgpt.checks import UserError
from jgpt.config import Experiment
from jgpt.files import may_pass
from jgpt.manifest import Manifest
from jgpt.run_folder import RunFiles, read_run_files
from jgpt.settings import change, differences, resolve


def refuse_no_folder(workdir: Path) -> None:
  """Raises `UserError` where something is in the way of a run folder, or the system takes no such name."""
  try:
    reason = None if stat.S_ISDIR(os.stat(workdir).st_mode) else "it is a file"
  except FileNotFoundError:
    reason = "it is a link to nothing" if os.path.islink(workdir) else None
  except (OSError, ValueError) as error:
    reason = getattr(error, "strerror", None) or error
  if reason is None:
    try:
      os.path.realpath(workdir).encode()
    except UnicodeEncodeError:
      reason = "its whole name is not UTF-8, and TensorStore, which writes arrays, opens no other"
  if reason:
    raise UserError(f"{str(workdir)[:200]} cannot be a run folder: {reason}. Choose another --workdir")


def refuse_schedule_that_ended(experiment: Experiment, saved_step: int, workdir: Path) -> None:
  """Raises `UserError` where a run would get more updates, and its learning rate has come to its end."""
  optimizer, steps = experiment.optimizer, experiment.train.steps
  if saved_step >= steps or optimizer.schedule == "constant":
    return
  if not saved_step and optimizer.decay_steps == 1 and steps > 1:  # a length that nobody chose
    raise UserError(
      f"{workdir} was made without any update, so the schedule of its learning rate has no length. Begin a new run from "
      f"it, in another --workdir, with --init-from {workdir}"
    )
  if saved_step and optimizer.decay_steps <= saved_step and optimizer.end_lr == 0:
    raise UserError(
      f"train.steps={steps} would add updates to a run that is at step {saved_step}, but the schedule of its learning rate "
      f"ends at optimizer.decay_steps={optimizer.decay_steps}. Begin a new run, in another --workdir, with "
      f"--set optimizer.decay_steps={steps}"
    )


def inherit(experiment: Experiment, recorded: RunFiles) -> Experiment:
  """Fills in what was left open from what a run recorded: the schedule's length does not follow `train.steps`."""
  optimizer = recorded.experiment.optimizer
  kept = {
    f"optimizer.{name}": getattr(experiment.optimizer, name) or getattr(optimizer, name)
    for name in ("decay_steps", "cooldown_steps")
  }
  return resolve(change(experiment, kept), recorded.tokenizer.vocab_size)


def refuse_differences(experiment: Experiment, recorded: RunFiles, workdir: Path) -> None:
  """Raises `UserError`, naming each field, if a folder holds a run of another identity."""
  differing = differences(recorded.experiment, experiment)
  if differing:
    fields = ", ".join(f"{name} is {old} there and {new} here" for name, (old, new) in differing.items())
    raise UserError(
      f"{workdir} holds a run with other settings: {fields}. Choose another --workdir, or start over with --fresh"
    )


def find_sound_step(workdir: Path, trusted: int | None = None) -> tuple[int | None, dict[int, str]]:
  """Finds the newest checkpoint that a run can go on from: its files are as they were written, and of this run.

  Args:
    workdir: a run folder.
    trusted: a step that was found sound before.

  Returns:
    The step, None where the folder has no checkpoint; and what is wrong with each newer one.

  Raises:
    UserError: if there are checkpoints and all are damaged.
  """
  damaged: dict[int, str] = {}
  for step in reversed(manifest.list_steps(workdir)):
    damage = None if step == trusted else _find_fault(workdir, manifest.checkpoints_dir(workdir) / str(step))
    if damage is None:
      return step, damaged
    damaged[step] = damage
  if damaged:
    first = next(iter(damaged.values()))
    raise UserError(
      f"every checkpoint of {workdir} is damaged ({', '.join(map(str, damaged))}): {first}. Nothing was changed; "
      "put a backup in its place, or start over with --fresh"
    )
  return None, {}


def _find_fault(workdir: Path, folder: Path) -> str | None:
  """Why a run cannot go on from a checkpoint, or None."""
  if damage := manifest.find_damage(folder):
    return damage
  recorded = read_run_files(workdir)
  try:
    contradiction = find_contradiction(recorded, read_run_files(folder), manifest.read_manifest(folder))
  except UserError as error:
    if may_pass(error):
      raise
    return str(error)
  return contradiction and f"{folder} is of another run: {contradiction}"


def find_contradiction(recorded: RunFiles, copies: RunFiles, described: Manifest) -> str | None:
  """In what a checkpoint is that of another run than its folder's, or None.

  Args:
    recorded: the run folder's.
    copies: the checkpoint's.
    described: the checkpoint's manifest.
  """
  if differing := differences(recorded.experiment, copies.experiment):
    setting, (here, there) = next(iter(differing.items()))
    return f"{setting} is {there} in its experiment.json, and {here} in the run folder's"
  if copies.tokenizer.digest != recorded.tokenizer.digest:
    return "its tokenizer.json is not the run folder's"
  if copies.data["sha256"] != recorded.data["sha256"] or described.data.get("sha256") != recorded.data["sha256"]:
    return "it was trained on data with another SHA-256"
  sequences = described.step * recorded.experiment.data.batch_size
  if described.data.get("sequences") != sequences:
    return f"its manifest counts {str(described.data.get('sequences'))[:20]} sequences, and its steps take {sequences}"
  return None
