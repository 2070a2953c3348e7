"""The host loop: the one place where time, files and printing meet the compiled step.

Responsible for planning a run (its data, its resolved settings, its mesh), and for running it: restoring or initialising
the state, calling `train_steps`, handing metrics to writers one call late, saving, stopping on a signal. Everything that
is computed is in the pure files it calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np

import jgpt
from jgpt import checkpoint, locks, manifest, runtime, sharding
from jgpt.batches import Corpus, count_epoch_steps
from jgpt.cadence import SECONDS_PER_CALL, is_save_due, next_stop
from jgpt.checks import TrainingError, UserError, printable
from jgpt.config import Experiment
from jgpt.data import Data, check_path, find_data
from jgpt.generate import begin_texts, check_prompt
from jgpt.health import explain
from jgpt.keys import SAMPLE, derive_key
from jgpt.log import Log
from jgpt.metrics import JsonlWriter, Writer, read_losses
from jgpt.model import stack_blocks
from jgpt.program import Program, begin_evaluation, compile_program
from jgpt.resume import find_sound_step, inherit, refuse_differences, refuse_no_folder, refuse_schedule_that_ended
from jgpt.run_folder import RunFiles, append_env, read_run_files, write_run_files
from jgpt.settings import is_circumstance, resolve, settings
from jgpt.signals import Stop, describe_stop, say, stop_signals
from jgpt.step import TrainState
from jgpt.tokenizer import Tokenizer
from jgpt.weights import (
  InitialParams,
  load_params,
  open_weights,
  refuse_other_tokenizer,
  refuse_other_vocabulary,
  require_same,
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


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run came to.

  Attributes:
    state: after the last update; its blocks are stacked or a list, whichever the run used.
    losses: training loss of each update since the run first began, nats per token, float32.
    heldout_losses: (updates, loss in nats per token) of each evaluation since the run first began.
    heldout_loss: nats per token over the whole held-out part; None where nothing is held out or the run was interrupted.
    heldout_tokens: how many tokens that is over.
    tokenizer: of the run.
    experiment: resolved.
    signal: the signal that ended the run early, or None.
  """

  state: TrainState
  losses: np.ndarray
  heldout_losses: list[tuple[int, float]]
  heldout_loss: float | None
  heldout_tokens: int
  tokenizer: Tokenizer
  experiment: Experiment
  signal: int | None

  @property
  def params(self) -> dict:
    """The parameters after the last update, as `init_params` returns them."""
    return stack_blocks(self.state.params)


def plan(
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
    refuse_no_folder(workdir)
  if workdir is not None and os.path.lexists(workdir / "experiment.json"):
    recorded = read_run_files(workdir)
    experiment = inherit(experiment, recorded)
    refuse_differences(experiment, recorded, workdir)
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
    refuse_other_tokenizer(weights, experiment.data)
  data = find_data(
    experiment.data,
    experiment.train.seed,
    sha256=recorded.data["sha256"] if recorded else None,
    tokenizer=recorded.tokenizer if recorded else weights.tokenizer if weights else None,
  )
  if weights:
    refuse_other_vocabulary(weights, data.tokenizer)
  epoch_steps = count_epoch_steps(data.train, experiment.data) if experiment.train.epochs else None
  experiment = resolve(experiment, data.tokenizer.vocab_size, epoch_steps)
  if saved_step is not None:
    refuse_schedule_that_ended(experiment, saved_step, workdir)
  initial = load_params(weights, experiment.model) if weights else None
  if initial and recorded and recorded.weights:
    initial = require_same(initial, recorded.weights["sha256"])
  found = {"location": initial.location, "sha256": initial.sha256} if initial else recorded.weights if recorded else None
  check_prompt(experiment.sample, data.tokenizer)  # what it does not know would be noticed after the training
  return Plan(name, experiment, data, workdir, saved_step or 0, epoch_steps, initial, found)


def train(
  plan: Plan,
  *,
  writers: Sequence[Writer] = (),
  sample_at: Callable[[int], bool] | None = None,
  stop: Stop | None = None,
) -> Result:
  """Trains to `train.steps` updates, or until a signal; then evaluates on the whole held-out part.

  Args:
    plan: from `plan`.
    writers: get the metrics of each compiled call; closed at the end. The run folder's metrics.jsonl is written besides.
    sample_at: says after which updates texts are drawn for the writers, besides `train.sample_every`; that changes no
      bit of the training.
    stop: what signals mean; None collects the first, which ends the training, and lets the second interrupt Python.

  Raises:
    UserError: if the devices do not fit the settings, another process writes to the run folder, or it cannot be read.
    TrainingError: if updates were skipped `train.max_consecutive_skips` times in a row, or the parameters are not finite.
  """
  experiment, workdir = plan.experiment, plan.workdir
  mesh = sharding.make_mesh(experiment, runtime.devices())
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(stop_signals()) if stop is None else stop
    saved_step, manager, rows = None, None, ()
    for writer in writers:
      stack.callback(_close, writer)
    if workdir is not None:
      saved_step = _claim_folder(plan, mesh, stack)
      train = experiment.train
      manager = stack.enter_context(
        checkpoint.open_checkpoints(workdir, keep_latest=train.keep_latest, keep_best=train.keep_best)
      )
      log_file = JsonlWriter(workdir / "metrics.jsonl", saved_step or 0)
      stack.callback(_close, log_file)
      rows, writers = log_file.kept, [log_file, *writers]
    plan = dataclasses.replace(plan, start_step=saved_step or 0)  # the folder may have moved on since the plan was made
    with stop.leaving(describe_stop(plan.start_step, workdir)):
      program = compile_program(
        experiment,
        plan.data,
        plan.initial.params if plan.initial else None,
        manager=manager,
        saved_step=saved_step,
        num_steps=experiment.train.steps - plan.start_step,
      )
    log = Log(list(writers), rows, experiment.train.max_consecutive_skips)  # its clock starts here: compiling is no step's
    state = _loop(plan, program, manager, log, stop, sample_at)
    if manager is not None:
      save(manager, state, log.find_heldout_loss(int(state.step)))  # goes on in the background during the evaluation
    heldout_loss, heldout_tokens = None, 0
    if not stop:
      finish = manager.wait if manager else lambda: None
      with stop.leaving(describe_stop(int(state.step), workdir), finish):
        done = log.whole_evaluation(experiment.train)
        heldout_loss, heldout_tokens = done or evaluate_heldout(state.params, program.heldout, experiment)
  losses, heldout_losses = log.losses, [(step, loss) for step, loss, _ in log.evaluations]
  if workdir is not None:  # those of earlier starts too
    losses, heldout_losses = read_losses(workdir / "metrics.jsonl", int(state.step))
  return Result(
    state=state,
    losses=np.asarray(losses, np.float32),
    heldout_losses=heldout_losses,
    heldout_loss=heldout_loss,
    heldout_tokens=heldout_tokens,
    tokenizer=plan.data.tokenizer,
    experiment=experiment,
    signal=stop.signal,
  )


def save(manager: checkpoint.Manager, state: TrainState, heldout_loss: float | None = None) -> None:
  """Saves a state under its step; on disk blocks are always stacked."""
  stacked = jax.jit(stack_blocks)(state) if isinstance(state.params["blocks"], list) else state
  checkpoint.save(manager, stacked, heldout_loss)


def _loop(
  plan: Plan,
  program: Program,
  manager: checkpoint.Manager | None,
  log: Log,
  stop: Stop,
  sample_at: Callable[[int], bool] | None,
) -> TrainState:
  """Runs the compiled calls; returns the last state."""
  train, state, step = plan.experiment.train, program.state, plan.start_step

  def evaluation(step: int) -> tuple[jax.Array, jax.Array] | None:
    if not (train.eval_every and step % train.eval_every == 0 and len(program.heldout.tokens)):
      return None
    return begin_evaluation(state.params, program.heldout, plan.experiment, train.eval_batches)

  def texts(step: int) -> Callable[[], list[str]] | None:
    due = train.sample_every and step % train.sample_every == 0 and step < train.steps  # at the end the caller samples
    return begin_samples(plan, state.params, step) if due or (sample_at and sample_at(step)) else None

  pending, last_save = None, time.monotonic()
  if train.steps and step not in log.evaluated and (first := evaluation(step)):  # a stop may have come before it was done
    pending = step, 0, {}, first, None
  while step < train.steps and not stop and not log.health.exhausted:
    num = min(next_stop(step, train, plan.epoch_steps, program.feed.block_steps) - step, log.count_steps(SECONDS_PER_CALL))
    state, metrics = program.run_steps(program.feed.corpus_at(step), state, np.int32(num))
    step += num
    due = step, num, metrics, evaluation(step), texts(step)
    if pending:  # the previous call's: the device is busy with this one meanwhile
      log.write(*pending, stop)
    pending = due
    if manager is not None and is_save_due(step, train, time.monotonic() - last_save):
      log.write(*pending, stop)  # first the rows up to here, then the checkpoint
      log.sync()
      save(manager, state, log.find_heldout_loss(step))
      pending, last_save = None, time.monotonic()
  if pending:
    log.write(*pending, stop)
  log.sync()
  if log.health.exhausted:
    _stop_training(plan, program, manager, state, log)
  return state


def _stop_training(
  plan: Plan, program: Program, manager: checkpoint.Manager | None, state: TrainState, log: Log
) -> NoReturn:
  """Saves a state after a series of skipped updates, and says why they were skipped."""
  first, step, kept, advice = log.health.exhausted, int(state.step), "Nothing was kept", ""
  if manager is not None:
    save(manager, state)
    manager.wait()
    last = "of the last good update" if log.health.is_skipping else "of the good updates that followed"
    kept = f"The parameters {last} are saved as checkpoint {step} in {plan.workdir}"
    advice = f", in another --workdir with --init-from {plan.workdir}/checkpoints/{step}"
  words = explain(plan.experiment, state, program.feed.corpus_at(first - 1), first)
  lower = plan.experiment.optimizer.peak_lr / 10
  raise TrainingError(f"{words}. {kept}. Try a lower rate, --set optimizer.peak_lr={lower:g}{advice}")


def sample_texts(plan: Plan, params: dict, step: int) -> list[str]:
  """Draws texts as the experiment says; a function of the seed and the step."""
  return begin_samples(plan, params, step)()


def begin_samples(plan: Plan, params: dict, step: int) -> Callable[[], list[str]]:
  """Like `sample_texts`, and returns at once: calling what it returns waits for the texts."""
  key = derive_key(plan.experiment.train.seed, SAMPLE, step)
  return begin_texts(params, plan.data.tokenizer, key, plan.experiment.model, plan.experiment.sample)


def evaluate_heldout(params: dict, heldout: Corpus, experiment: Experiment) -> tuple[float | None, int]:
  """Computes the loss over the held-out part, nats per token, and over how many tokens; (None, 0) without any."""
  if not len(heldout.tokens):
    return None, 0
  loss, tokens = begin_evaluation(params, heldout, experiment)
  return float(loss), int(tokens)


def _claim_folder(plan: Plan, mesh: jax.sharding.Mesh, stack: contextlib.ExitStack) -> int | None:
  """Makes a run folder this process's alone until the stack closes; returns the step to restore, if any."""
  workdir = plan.workdir
  workdir.mkdir(parents=True, exist_ok=True)
  stack.enter_context(locks.hold(workdir))
  if os.path.lexists(workdir / "experiment.json"):  # another run may have begun here since the plan was made
    recorded = read_run_files(workdir)
    refuse_differences(plan.experiment, recorded, workdir)
    if recorded.data["sha256"] != plan.data.text.sha256:
      raise UserError(f"{workdir} holds a run on another text, {recorded.data.get('location')}. Choose another --workdir")
  saved_step, damaged = find_sound_step(workdir, trusted=plan.start_step)
  if plan.start_step and saved_step is None:
    raise UserError(
      f"the checkpoint of step {plan.start_step} in {workdir} has gone since the run was planned. Plan it again"
    )
  for step, damage in damaged.items():
    aside, shown = manifest.set_aside(workdir, step), printable(damage)
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
    "settings": {name: value for name, value in settings(plan.experiment).items() if is_circumstance(name)},
  }
  append_env(plan.workdir, entry)


def _close(writer: Writer) -> None:
  with contextlib.suppress(OSError):  # it was said when writing failed
    writer.close()
