"""Planning a run: data, resolved settings, initial weights, folder, and when something is due.

A plan is made without a device. Programs are compiled in `program.py`, and a run is trained in
`train.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import glob
import hashlib
import os
import platform
import re
import stat
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import jgpt
from jgpt.batches import count_epoch_steps
from jgpt.config import Experiment, TrainConfig
from jgpt.config.settings import (
  change,
  differences,
  format_value,
  is_circumstance,
  list_settings,
  resolve,
)
from jgpt.data.corpus import Data, check_path, find_data, is_text_of
from jgpt.devices import processes, runtime
from jgpt.devices.compute import resolve_compute, resolve_dtype
from jgpt.errors import UserError, printable
from jgpt.evaluation import schedule_evaluations
from jgpt.generate import check_prompt
from jgpt.keys import IMPLEMENTATION
from jgpt.runs import manifest
from jgpt.runs.folder import (
  MAX_SETTINGS,
  RunFiles,
  append_env,
  current_folder,
  read_run_files,
  read_run_json,
  write_run_files,
)
from jgpt.runs.locate import find_checkpoint
from jgpt.runs.origin import Origin, can_continue, check_origin, open_origin
from jgpt.runs.profile import Profile
from jgpt.runs.resume import describe_ways, find_recorded, find_sound_step
from jgpt.runs.text import find_run_data
from jgpt.sharding import leave_mesh, make_mesh
from jgpt.step import MAX_STEPS_PER_CALL
from jgpt.system import locks
from jgpt.system.signals import print_stderr
from jgpt.weights.adoption import adopt_settings
from jgpt.weights.gpt2 import Weights
from jgpt.weights.initial import (
  InitialParams,
  check_same_weights,
  check_weights_tokenizer,
  check_weights_vocabulary,
  is_same_source,
  load_params,
  open_weights,
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run that is about to start or to be resumed; nothing is on a device yet.

  Attributes:
    name: of the experiment.
    experiment: resolved.
    data: loaded.
    workdir: the run folder; None leaves nothing on disk.
    start_step: updates of the folder's newest undamaged checkpoint; 0 where there is none.
    epoch_steps: updates in an epoch; None where the run is not counted in epochs.
    initial: the parameters to begin from, or the checkpoint of another run to continue; None draws
      parameters, or restores a checkpoint of this run.
    weights: where the weights that the run begins from, or began from, were found: location,
      sha256; None for weights that are drawn.
    origin: of a continued run: `Origin.record`; None for others.
    adopted: names of the settings that the weights or the origin decided.
    seconds: that planning took.
    profile: updates to profile; None profiles nothing.
  """

  name: str
  experiment: Experiment
  data: Data
  workdir: Path | None
  start_step: int
  epoch_steps: int | None
  initial: InitialParams | Origin | None = None
  weights: dict[str, str] | None = None
  origin: dict[str, Any] | None = None
  adopted: tuple[str, ...] = ()
  seconds: float = 0.0
  profile: Profile | None = None


@leave_mesh()
def plan_run(
  experiment: Experiment,
  *,
  workdir: str | Path | None = None,
  name: str = "",
  report: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
  """Plans a run: loads its data and resolves its settings, without a device.

  Settings that come with `train.init_from` or `train.continue_from` replace those of the experiment
  (`weights/adoption.py`), except those in its `given`.

  Args:
    experiment: fields that `settings.resolve` fills in may be None.
    workdir: the run folder; None leaves nothing on disk. A run in it with the same settings is
      resumed, with the text that it began with, wherever that lies now.
    name: of the experiment, to be recorded.
    report: called with the bytes downloaded and the bytes in all, while weights to begin from are
      downloaded.

  Raises:
    UserError: if the settings, the data, the weights to begin from and the folder do not fit
      together.

  Example:
    >>> plan = jgpt.plan_run(jgpt.load_experiment("names"), workdir="runs/names")
    >>> plan.start_step, plan.experiment.train.steps
  """
  began = time.perf_counter()
  workdir = Path(workdir) if workdir is not None else None
  recorded = None
  if workdir is not None:
    check_workdir(workdir)
    recorded = find_recorded(workdir)
  if recorded:
    check_other_folder(experiment, workdir, recorded)
    experiment = resolve_as_recorded(experiment, recorded)
    check_same_run(experiment, recorded, workdir)
  saved_step = None
  if workdir is not None:
    saved_step = processes.on_lead("the checkpoints", lambda: find_sound_step(workdir)[0])
  data, origin = None, recorded.origin if recorded else None
  if recorded:
    ways = describe_ways(workdir, keeps_moments=can_continue(recorded.experiment))
    data, place = processes.lead_first(
      "the data", lambda: find_run_data(workdir, recorded, experiment.data, f"; or {ways}")
    )
    experiment = dataclasses.replace(experiment, data=place)
  source = None
  if saved_step is None:
    source = processes.lead_first("the weights", lambda: open_source(experiment, origin, report))
  adopted = recorded.adopted if recorded else ()
  if source and not recorded:
    values = list_settings(experiment)
    given = {name: values[name] for name in experiment.given}
    experiment, adopted = adopt_settings(experiment, source, given)
  if source:
    check_weights_tokenizer(source, experiment.data)
  if data is None:
    tokenizer = source.tokenizer if source else None
    seed = experiment.train.seed
    data = processes.lead_first(
      "the data", lambda: find_data(experiment.data, seed, tokenizer=tokenizer)
    )
  epoch_steps = count_epoch_steps(data.train, experiment.data) if experiment.train.epochs else None
  if isinstance(source, Weights):
    check_weights_vocabulary(source, data.tokenizer)
  experiment = resolve(experiment, data.tokenizer.vocab_size, epoch_steps)
  experiment = schedule_evaluations(experiment, data.heldout, epoch_steps)
  if recorded is not None:
    check_schedule(experiment, recorded.experiment, saved_step, workdir)
  initial = _load_initial(source, experiment, recorded)
  weights = recorded.weights if recorded else None
  if isinstance(initial, InitialParams):
    weights = {"location": initial.location, "sha256": initial.sha256}
  elif initial:
    origin = initial.record
  check_prompt(experiment.sample, data.tokenizer)  # else the error would come after the training
  plan = Plan(
    *(name, experiment, data, workdir, saved_step or 0, epoch_steps),
    *(initial, weights, origin, adopted, time.perf_counter() - began),
  )
  check_same_plan(plan)
  return plan


def check_same_plan(plan: Plan) -> None:
  """Checks that all processes of a run have planned the same.

  Raises:
    UserError: in every process, naming what differs and in which one.
  """
  settings = {n: format_value(value) for n, value in list_settings(plan.experiment).items()}
  for name in ("data.path", "data.source"):  # the same text may lie elsewhere on another host
    del settings[name]
  processes.check_same(
    "the plan",
    {
      "jgpt": jgpt.__version__,
      "jax": jax.__version__,
      "jgpt's keys": IMPLEMENTATION,
      "the run folder": None if plan.workdir is None else os.path.abspath(plan.workdir),
      "the SHA-256 of the text": plan.data.text.sha256,
      "the tokenizer": plan.data.tokenizer.digest,
      "the step to begin at": plan.start_step,
      "the SHA-256 of the weights": (plan.weights or plan.origin or {}).get("sha256"),
      **settings,
      **{n: v for n, v in runtime.find_numeric_options().items() if n.startswith("jax_")},
    },
    "Start every process with the same command, on the same files",
  )


def open_source(
  experiment: Experiment,
  recorded: dict[str, Any] | None = None,
  report: Callable[[int, int], None] = lambda done, total: None,
) -> Weights | Origin | None:
  """Opens what a run begins from; None for weights that are drawn.

  Args:
    experiment: `train.init_from` and `train.continue_from` name it.
    recorded: `Origin.record` of a continued run that began before, or None.
    report: as for `plan_run`.

  Raises:
    UserError: as `open_weights` and `open_origin` do, or if there is no text to train on.
  """
  train = experiment.train
  if train.init_from is None and train.continue_from is None:
    return None
  check_path(experiment.data)  # before a download of gigabytes begins
  if train.init_from is not None:
    return open_weights(train.init_from, report)
  return open_origin(train.continue_from, recorded)


def _load_initial(
  source: Weights | Origin | None, experiment: Experiment, recorded: RunFiles | None
) -> InitialParams | Origin | None:
  """Reads weights, or checks that an origin fits, whose arrays `program.py` restores."""
  if isinstance(source, Origin):
    check_origin(source, experiment)
  if not isinstance(source, Weights):
    return source
  initial = load_params(source, experiment.model)
  return check_same_weights(
    initial, recorded.weights["sha256"] if recorded and recorded.weights else None
  )


def claim_folder(
  plan: Plan, devices: Sequence[jax.Device], stack: contextlib.ExitStack
) -> int | None:
  """Locks a run folder until the stack closes, and records this start in it.

  Damaged checkpoints are renamed, with a warning. The lead does this for all processes.

  Returns:
    The step to restore; None where there is no checkpoint.

  Raises:
    UserError: if another process writes to the folder, or it changed since the plan was made.
  """
  return processes.on_lead("the run folder", lambda: _claim_folder(plan, devices, stack))


def _claim_folder(
  plan: Plan, devices: Sequence[jax.Device], stack: contextlib.ExitStack
) -> int | None:
  """Locks a run folder and records a start in it, in the lead; see `claim_folder`."""
  mesh = make_mesh(plan.experiment, devices)
  plan = dataclasses.replace(plan, experiment=resolve_dtype(plan.experiment, devices[0]))
  workdir = plan.workdir
  workdir.mkdir(parents=True, exist_ok=True)
  stack.enter_context(locks.hold(workdir))
  # Another run may have begun here since the plan was made.
  if os.path.lexists(workdir / "experiment.json"):
    recorded = read_run_files(workdir)
    check_same_run(plan.experiment, recorded, workdir)
    if recorded.data["sha256"] != plan.data.text.sha256:
      raise UserError(
        f"{workdir} holds a run on another text, {recorded.data.get('location')} (SHA-256 "
        f"{recorded.data['sha256'][:12]}). To begin a run on {plan.data.text.location}, "
        f"{describe_ways(workdir, keeps_moments=can_continue(recorded.experiment))}"
      )
  saved_step, damaged = find_sound_step(workdir, trusted=plan.start_step)
  if plan.start_step and saved_step is None:
    raise UserError(
      f"the checkpoint of step {plan.start_step} in {workdir} has gone since the run was planned. "
      "Plan it again"
    )
  for step, damage in damaged.items():
    aside, shown = manifest.set_checkpoint_aside(workdir, step), printable(damage)
    print_stderr(
      f"WARNING: the checkpoint of step {step} is damaged and kept as {aside}; going on from step "
      f"{saved_step}: {shown}"
    )
  _record_start(dataclasses.replace(plan, start_step=saved_step or 0), mesh)
  return saved_step


def _record_start(plan: Plan, mesh: jax.sharding.Mesh) -> None:
  """Writes the settings of a new run folder, and adds an entry to env.json."""
  text = plan.data.text
  if not os.path.lexists(plan.workdir / "experiment.json"):
    data = {"kind": text.kind, "location": text.location, "sha256": text.sha256}
    tokenizer = plan.data.tokenizer
    write_run_files(
      plan.workdir,
      RunFiles(
        *(plan.name, plan.experiment, tokenizer, data),
        *(plan.weights, plan.origin, plan.adopted),
      ),
    )
  devices = mesh.devices.flatten()
  compute = resolve_compute(plan.experiment, devices[0]).compute
  entry = {
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "start_step": plan.start_step,
    "command": sys.argv,
    "folder": current_folder(),
    "versions": {
      "jgpt": jgpt.__version__,
      "jax": jax.__version__,
      "python": platform.python_version(),
    },
    "platform": platform.platform(),
    "keys": IMPLEMENTATION,
    "numeric_options": runtime.find_numeric_options(),
    "devices": [f"{d.platform} {d.device_kind}" for d in devices],
    "products": runtime.describe_precision(devices[0], compute),
    "settings": {
      name: value for name, value in list_settings(plan.experiment).items() if is_circumstance(name)
    },
    "compute": dataclasses.asdict(compute),
  }
  append_env(plan.workdir, entry)


# --- The run folder ---


def default_workdir(name: str, base: Experiment, experiment: Experiment) -> Path:
  """Returns the folder of a run for which `--workdir` names none.

  It is `runs/<name>`, followed by the names and values of changed settings, so that a changed run
  has a folder of its own; a shell takes the name without quotes. A digest is added where that
  folder holds another run, because the experiment's file was edited.

  Args:
    name: of the experiment.
    base: the experiment of that name.
    experiment: with the changed settings.
  """
  folder = Path("runs") / _folder_name(name, base, experiment, re.ASCII)
  if os.path.lexists(folder / "experiment.json") and not _holds_run(folder, experiment):
    anew = {n: value for n, value in list_settings(experiment).items() if _starts_anew(n)}
    folder = folder.with_name(f"{folder.name}-{_short_digest(anew)}")
  return folder


def find_default_run(name: str, base: Experiment, experiment: Experiment) -> Path | None:
  """Finds the run of an experiment in the folder that it had under another name of its text.

  Args:
    name: of the experiment.
    base: the experiment of that name.
    experiment: with the changed settings; its text lies at `data.path` now.

  Returns:
    A folder in `runs` that `default_workdir` named when `data.path` or `data.source` was another,
    and whose run has the same settings and the same text; None where there is none.
  """
  for folder in sorted(Path("runs").glob(f"{glob.escape(name)}*")):
    try:  # without the tokenizer, which may take megabytes
      match read_run_json(folder / "experiment.json", MAX_SETTINGS):
        case {"experiment": {"data": {"source": source, "path": path}}}:
          there = change(experiment, {"data.path": path, "data.source": source})
        case _:
          continue
    except UserError:
      continue
    # Folders were named by all of Unicode's letters once.
    names = [_folder_name(name, base, there, flags) for flags in (re.ASCII, re.UNICODE)]
    is_default = any(re.fullmatch(f"{re.escape(n)}(-[0-9a-f]{{6}})?", folder.name) for n in names)
    if is_default and _holds_run(folder, experiment):
      return folder
  return None


def _starts_anew(name: str) -> bool:
  """Returns whether a run with another value of a setting has another folder by default."""
  return not is_circumstance(name) or name in (
    *("train.steps", "train.epochs"),
    *("data.path", "data.source"),
  )


def _folder_name(name: str, base: Experiment, experiment: Experiment, flags: re.RegexFlag) -> str:
  """Returns the name and the changed settings, with other characters than letters replaced."""
  before, now = list_settings(base), list_settings(experiment)
  changed = [f"{n}={format_value(now[n])}" for n in now if _starts_anew(n) and now[n] != before[n]]
  label = ",".join([name, *changed])
  plain = re.sub(r"[^\w.,=-]+", "-", label, flags=flags)[:120]
  # Two labels may differ only in characters that were replaced or cut.
  return plain if plain == label else f"{plain}-{_short_digest(label)}"


def _holds_run(folder: Path, experiment: Experiment) -> bool:
  """Returns whether a run folder holds a run of this experiment, of its length and on its text."""
  try:
    recorded = read_run_files(folder)
    there, here = recorded.experiment, experiment
    length = "epochs" if here.train.steps is None else "steps"
    if getattr(there.train, length) != getattr(here.train, length):
      return False
    if differences(there, resolve_as_recorded(here, recorded)):
      return False
    if (there.data.path, there.data.source) == (here.data.path, here.data.source):
      return True
    return is_text_of(here.data, recorded.data["sha256"], recorded.tokenizer)
  except UserError:
    return False


def _short_digest(value: Any) -> str:
  return hashlib.sha256(repr(value).encode()).hexdigest()[:6]


def check_workdir(workdir: Path) -> None:
  """Checks that a path can be a run folder.

  Raises:
    UserError: if it is a file or a part of another run folder, or the system does not accept the
      name.
  """
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
    raise UserError(
      f"{str(workdir)[:200]} cannot be a run folder: {reason}. Choose another --workdir"
    )


def check_other_folder(experiment: Experiment, workdir: Path, recorded: RunFiles) -> None:
  """Checks that a run which begins from another run is not to be kept in that run's folder.

  Args:
    experiment: of the new run.
    workdir: its folder.
    recorded: what is in it.

  Raises:
    UserError: if `train.continue_from` or `train.init_from` names this folder, and the run in it
      did not begin so.
  """
  for name in ("continue_from", "init_from"):
    source = getattr(experiment.train, name)
    found = None if source is None else find_checkpoint(source)
    is_new = source != getattr(recorded.experiment.train, name)
    if found and is_new and found[0].resolve() == workdir.resolve():
      flag = f"--{name.replace('_', '-')}"
      raise UserError(
        f"{workdir} holds the run to begin from, train.{name}={source}. The new run needs a folder "
        f"of its own: choose another --workdir. Without {flag} the old run goes on"
      )


def check_schedule(
  experiment: Experiment, recorded: Experiment, saved_step: int | None, workdir: Path
) -> None:
  """Checks that the updates which are added to a recorded run have a learning rate above zero.

  A schedule keeps the length that it had at the run's first start. Updates that were planned then
  are not checked, whatever their rate.

  Args:
    experiment: resolved, with the recorded schedule; `train.steps` may have grown.
    recorded: the experiment as the run first began.
    saved_step: of the checkpoint that the run would go on from; None where there is none.
    workdir: the run folder.

  Raises:
    UserError: if the schedule ends before the added updates, or has no length.
  """
  optimizer, steps, planned = experiment.optimizer, experiment.train.steps, recorded.train.steps
  ends_at = optimizer.decay_steps
  if (saved_step or 0) >= steps or optimizer.schedule == "constant":
    return
  # Made with train.steps=0: the schedule's length of 1 was not chosen.
  if saved_step == 0 and ends_at == 1 and steps > 1:
    raise UserError(
      f"{workdir} was made without any update, so the schedule of its learning rate has no length. "
      f"Begin a new run from it, in another --workdir, with --init-from {workdir}"
    )
  if planned is None or steps <= max(planned, ends_at) or optimizer.end_lr > 0:
    return
  problem = (
    f"train.steps={steps} would add updates at a learning rate of 0: this run was planned for "
    f"{planned}, and its schedule ends at optimizer.decay_steps={ends_at} for good"
  )
  if not saved_step:
    raise UserError(f"{problem}. It has no checkpoint yet: start over with --fresh")
  kept = f"keep train.steps={planned}, or begin" if saved_step < planned else "Begin"
  way = f"from its parameters with --init-from {workdir}"
  if optimizer.num_moments:
    way = f"from its parameters and moments with --continue-from {workdir}"
  raise UserError(
    f"{problem}; it is at step {saved_step}. {kept[0].upper()}{kept[1:]} a new run in another "
    f"--workdir: {way} --set train.steps={steps - saved_step}, or from the beginning with --set "
    f"optimizer.decay_steps={steps}"
  )


def resolve_as_recorded(experiment: Experiment, recorded: RunFiles) -> Experiment:
  """Resolves the settings of a recorded run; a schedule's length that is None is the recorded one.

  So the schedule does not follow `train.steps`, which may have grown. `compute.dtype`="auto" is the
  recorded dtype, on whatever device the run goes on. Settings that came with the
  weights, or with the origin of a continued run, are the recorded ones too, unless given by name.
  Another path of the same weights is the recorded path.
  """
  optimizer = recorded.experiment.optimizer
  kept = {
    f"optimizer.{name}": getattr(experiment.optimizer, name) or getattr(optimizer, name)
    for name in ("decay_steps", "cooldown_steps")
  }
  there = list_settings(recorded.experiment)
  if experiment.compute.dtype == "auto":
    kept["compute.dtype"] = there["compute.dtype"]
  kept |= {name: there[name] for name in recorded.adopted if name not in experiment.given}
  for name in ("train.init_from", "train.continue_from"):
    if is_same_source(there[name], list_settings(experiment)[name]):
      kept[name] = there[name]
  changed = dataclasses.replace(change(experiment, kept), expected=experiment.expected)
  return resolve(changed, recorded.tokenizer.vocab_size)


def check_same_run(experiment: Experiment, recorded: RunFiles, workdir: Path) -> None:
  """Checks that the run in a folder differs only in settings that may change on resume.

  Raises:
    UserError: naming each other field that differs.
  """
  differing = differences(recorded.experiment, experiment)
  if differing:
    fields = ", ".join(
      f"{name} is {old} there and {new} here" for name, (old, new) in differing.items()
    )
    ways = describe_ways(workdir, keeps_moments=can_continue(recorded.experiment, differing))
    raise UserError(
      f"{workdir} holds a run with other settings: {fields}. {ways[0].upper()}{ways[1:]}"
    )


# --- When the host looks at a run: no bit of the training depends on it ---

SECONDS_PER_CALL = 8.0  # of training between two looks at signals and the clock


def next_stop(
  step: int,
  train: TrainConfig,
  epoch_steps: int | None = None,
  block_steps: int | None = None,
  profile: Profile | None = None,
) -> int:
  """Computes the step at which a call ends: the first, where something is due, or the last.

  Args:
    step: updates that are done.
    train: says when what is due; `steps` resolved.
    epoch_steps: updates in an epoch, where the run is counted in epochs.
    block_steps: the corpus is on the devices up to the next multiple of this; None for all of it.
    profile: updates whose calls begin and end with them.
  """
  if step == 0:
    return min(1, train.steps)
  border = profile.next_border(step) if profile else None
  stops = [train.steps, step + MAX_STEPS_PER_CALL, next_line(step, train.log_every, epoch_steps)]
  periods = (train.save_every, train.eval_every, train.sample_every, block_steps)
  stops += [] if border is None else [border]
  return min(stops + [(step // period + 1) * period for period in periods if period])


def next_line(step: int, log_every: int, epoch_steps: int | None) -> int:
  """Computes the first step after `step` at which a line of progress is due.

  In a run counted in epochs the steps of each epoch are counted anew.
  """
  if epoch_steps is None:
    return (step // log_every + 1) * log_every
  begin = step // epoch_steps * epoch_steps
  return min(begin + epoch_steps, begin + ((step - begin) // log_every + 1) * log_every)


def is_sample_due(step: int, train: TrainConfig) -> bool:
  """Returns whether texts are due after a step; at the end of the run its caller samples."""
  return bool(train.sample_every and step % train.sample_every == 0 and step < train.steps)
