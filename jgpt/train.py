"""The host loop: the one place where time, files and printing meet the compiled step.

Responsible for planning a run (its data, its resolved settings, its mesh), and for running it: restoring or initialising
the state, calling `train_steps`, handing metrics to writers one call late, saving, stopping on a signal. Everything that
is computed is in the pure files it calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
import numpy as np

from jgpt import sharding
from jgpt.config import Experiment, TrainConfig
from jgpt.devices import runtime
from jgpt.errors import TrainingError
from jgpt.evaluation import begin_evaluation, evaluate_heldout
from jgpt.generate import begin_texts
from jgpt.keys import SAMPLE, derive_key
from jgpt.plan import Plan, claim_folder
from jgpt.program import Program, compile_program
from jgpt.runs import checkpoint
from jgpt.runs.health import explain
from jgpt.runs.log import JsonlWriter, Log, Writer, read_losses
from jgpt.sharding import stack_blocks
from jgpt.step import MAX_STEPS_PER_CALL, TrainState
from jgpt.system.signals import Stop, describe_stop, stop_signals
from jgpt.text.tokenizer import Tokenizer


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


def train_run(
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
      stack.callback(_close_quietly, writer)
    if workdir is not None:
      saved_step = claim_folder(plan, mesh, stack)
      train = experiment.train
      manager = stack.enter_context(
        checkpoint.open_checkpoints(workdir, keep_latest=train.keep_latest, keep_best=train.keep_best)
      )
      log_file = JsonlWriter(workdir / "metrics.jsonl", saved_step or 0)
      stack.callback(_close_quietly, log_file)
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
  checkpoint.save_checkpoint(manager, stacked, heldout_loss)


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


def _close_quietly(writer: Writer) -> None:
  with contextlib.suppress(OSError):  # it was said when writing failed
    writer.close()


SECONDS_PER_CALL = 8.0  # of training between two looks at signals and the clock; two calls may be under way


def next_stop(step: int, train: TrainConfig, epoch_steps: int | None = None, block_steps: int | None = None) -> int:
  """The step at which the host looks next: after the first update, where something is due, or at the end.

  Args:
    step: updates that are done.
    train: says when what is due; `steps` resolved.
    epoch_steps: updates in an epoch, where the run is counted in epochs.
    block_steps: the corpus is on the devices up to the next multiple of this only; None for all of it.
  """
  if step == 0:
    return min(1, train.steps)
  stops = [train.steps, step + MAX_STEPS_PER_CALL, next_line(step, train.log_every, epoch_steps)]
  stops += [(step // p + 1) * p for p in (train.save_every, train.eval_every, train.sample_every, block_steps) if p]
  return min(stops)


def next_line(step: int, log_every: int, epoch_steps: int | None) -> int:
  """The first step after `step` at which a line of progress is due; in epochs the steps of each are counted anew."""
  if epoch_steps is None:
    return (step // log_every + 1) * log_every
  begin = step // epoch_steps * epoch_steps
  return min(begin + epoch_steps, begin + ((step - begin) // log_every + 1) * log_every)


def is_save_due(step: int, train: TrainConfig, seconds: float) -> bool:
  """Whether a checkpoint is due after a step, `seconds` after the one before."""
  by_steps = train.save_every and step % train.save_every == 0
  return bool(by_steps or (train.save_every_seconds is not None and seconds >= train.save_every_seconds))
