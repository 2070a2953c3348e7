"""The host loop: the one place where time, files and printing meet the compiled step.

Responsible for planning a run (its data, its resolved settings, its mesh), and for running it: restoring or initialising
the state, calling `train_steps`, handing metrics to writers one call late, saving, stopping on a signal. Everything that
is computed is in the pure files it calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import os
import platform
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import jgpt
from jgpt.batches import count_epoch_steps
from jgpt.config import Experiment
from jgpt.config.settings import change, differences, format_value, is_circumstance, list_settings, resolve
from jgpt.data.corpus import Data, check_path, find_data
from jgpt.errors import UserError, printable
from jgpt.generate import check_prompt
from jgpt.runs import manifest
from jgpt.runs.folder import RunFiles, append_env, read_run_files, write_run_files
from jgpt.runs.manifest import Manifest
from jgpt.system import locks
from jgpt.system.files import may_pass
from jgpt.system.signals import say
from jgpt.weights.initial import (
  InitialParams,
  check_same_weights,
  check_weights_tokenizer,
  check_weights_vocabulary,
  load_params,
  open_weights,
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run that is about to begin or go on; nothing is on a device yet.

  Attributes:
    name: of the experiment.
    experiment: resolved.
    data: loaded.
    workdir: the run folder, or None to leave nothing on disk.
    start_step: updates that the folder's newest sound checkpoint holds; 0 without any.
    epoch_steps: updates in an epoch, where the run is counted in epochs.
    initial: the parameters to begin from; None draws them, or restores a checkpoint.
    weights: where the weights that it begins from, or began from, were found: location, sha256; None where they are drawn.
  """

  name: str
  experiment: Experiment
  data: Data
  workdir: Path | None
  start_step: int
  epoch_steps: int | None
  initial: InitialParams | None = None
  weights: dict[str, str] | None = None


def plan_run(
  experiment: Experiment,
  *,
  workdir: str | Path | None = None,
  name: str = "",
  report: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
  """Decides what a run will be, without touching a device.

  Args:
    experiment: may leave open what `settings.resolve` fills in.
    workdir: where the run is kept. A folder that holds the same run is resumed, with the data recorded there.
    name: of the experiment, to be recorded.
    report: told the bytes that are there and the bytes in all while weights to begin from are downloaded.

  Raises:
    UserError: if the settings, the data, the weights to begin from or the folder do not go together.
  """
  workdir = Path(workdir) if workdir is not None else None
  recorded = None
  if workdir is not None:
    check_workdir(workdir)
  if workdir is not None and os.path.lexists(workdir / "experiment.json"):
    recorded = read_run_files(workdir)
    experiment = inherit(experiment, recorded)
    check_same_run(experiment, recorded, workdir)
  elif workdir is not None and (steps := manifest.list_steps(workdir)):
    raise UserError(
      f"{workdir} has checkpoints but no experiment.json to say what they are. Copy the one in checkpoints/{steps[-1]}, or "
      "choose another --workdir"
    )
  saved_step = find_sound_step(workdir)[0] if workdir is not None else None
  weights = None
  if experiment.train.init_from is not None and saved_step is None:
    check_path(experiment.data)  # before a download of gigabytes begins
    weights = open_weights(experiment.train.init_from, report)
    check_weights_tokenizer(weights, experiment.data)
  data = find_data(
    experiment.data,
    experiment.train.seed,
    sha256=recorded.data["sha256"] if recorded else None,
    tokenizer=recorded.tokenizer if recorded else weights.tokenizer if weights else None,
  )
  if weights:
    check_weights_vocabulary(weights, data.tokenizer)
  epoch_steps = count_epoch_steps(data.train, experiment.data) if experiment.train.epochs else None
  experiment = resolve(experiment, data.tokenizer.vocab_size, epoch_steps)
  if saved_step is not None:
    check_schedule(experiment, saved_step, workdir)
  initial = load_params(weights, experiment.model) if weights else None
  if initial and recorded and recorded.weights:
    initial = check_same_weights(initial, recorded.weights["sha256"])
  found = {"location": initial.location, "sha256": initial.sha256} if initial else recorded.weights if recorded else None
  check_prompt(experiment.sample, data.tokenizer)  # what it does not know would be noticed after the training
  return Plan(name, experiment, data, workdir, saved_step or 0, epoch_steps, initial, found)


def claim_folder(plan: Plan, mesh: jax.sharding.Mesh, stack: contextlib.ExitStack) -> int | None:
  """Makes a run folder this process's alone until the stack closes; returns the step to restore, if any."""
  workdir = plan.workdir
  workdir.mkdir(parents=True, exist_ok=True)
  stack.enter_context(locks.hold(workdir))
  if os.path.lexists(workdir / "experiment.json"):  # another run may have begun here since the plan was made
    recorded = read_run_files(workdir)
    check_same_run(plan.experiment, recorded, workdir)
    if recorded.data["sha256"] != plan.data.text.sha256:
      raise UserError(f"{workdir} holds a run on another text, {recorded.data.get('location')}. Choose another --workdir")
  saved_step, damaged = find_sound_step(workdir, trusted=plan.start_step)
  if plan.start_step and saved_step is None:
    raise UserError(
      f"the checkpoint of step {plan.start_step} in {workdir} has gone since the run was planned. Plan it again"
    )
  for step, damage in damaged.items():
    aside, shown = manifest.set_checkpoint_aside(workdir, step), printable(damage)
    say(f"WARNING: the checkpoint of step {step} is damaged and kept as {aside}; going on from step {saved_step}: {shown}")
  _record_start(dataclasses.replace(plan, start_step=saved_step or 0), mesh)
  return saved_step


def _record_start(plan: Plan, mesh: jax.sharding.Mesh) -> None:
  """Writes the run folder's settings where it is new, and what may differ between starts."""
  text = plan.data.text
  if not os.path.lexists(plan.workdir / "experiment.json"):
    data = {"kind": text.kind, "location": text.location, "sha256": text.sha256}
    write_run_files(plan.workdir, RunFiles(plan.name, plan.experiment, plan.data.tokenizer, data, plan.weights))
  devices = mesh.devices.flatten()
  entry = {
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "start_step": plan.start_step,
    "command": sys.argv,
    "versions": {"jgpt": jgpt.__version__, "jax": jax.__version__, "python": platform.python_version()},
    "platform": platform.platform(),
    "devices": [f"{d.platform} {d.device_kind}" for d in devices],
    "settings": {name: value for name, value in list_settings(plan.experiment).items() if is_circumstance(name)},
  }
  append_env(plan.workdir, entry)


# --- The run folder ---


def default_workdir(name: str, base: Experiment, experiment: Experiment) -> Path:
  """The folder of a run for which none was named.

  `runs/<name>`; with changed settings their names and values are added, so that a changed run has a folder of its own. A
  folder that holds another run all the same (the experiment's file was edited) is left alone, and a digest is added.
  """
  before, now = list_settings(base), list_settings(experiment)
  starts_anew = [n for n in now if not is_circumstance(n) or n in ("train.steps", "train.epochs")]
  changed = [f"{n}={format_value(now[n])}" for n in starts_anew if now[n] != before[n]]
  label = ",".join([name, *changed])
  plain = re.sub(r"[^\w.,=-]+", "-", label)[:120]
  if plain != label:  # what was replaced or cut must still tell two runs apart
    plain += f"-{_short_digest(label)}"
  folder = Path("runs") / plain
  if os.path.lexists(folder / "experiment.json") and not _holds(folder, experiment):
    folder = Path("runs") / f"{plain}-{_short_digest({n: now[n] for n in starts_anew})}"
  return folder


def _holds(folder: Path, experiment: Experiment) -> bool:
  """Whether a run folder holds this experiment."""
  from jgpt.runs.folder import read_run_files

  try:
    recorded = read_run_files(folder)
    there, here = recorded.experiment.train, experiment.train
    if (there.epochs != here.epochs) if here.steps is None else (there.steps != here.steps):
      return False
    return not differences(recorded.experiment, inherit(experiment, recorded))
  except UserError:
    return False


def _short_digest(value: Any) -> str:
  return hashlib.sha256(repr(value).encode()).hexdigest()[:6]


def check_workdir(workdir: Path) -> None:
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


def check_schedule(experiment: Experiment, saved_step: int, workdir: Path) -> None:
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


def check_same_run(experiment: Experiment, recorded: RunFiles, workdir: Path) -> None:
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
