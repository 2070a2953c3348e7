"""The host loop: the one place where time, files and printing meet the compiled step.

`train_run` restores or initialises the state, calls `train_steps`, hands metrics to writers one
call late, saves, and stops on a signal. What is computed is in the pure files; deciding what a run
will be is in `plan.py`, compiling it in `program.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

from jgpt.devices import processes, runtime, watch
from jgpt.errors import TrainingError
from jgpt.evaluation import begin_due_evaluation, evaluate_heldout
from jgpt.generate import begin_samples
from jgpt.plan import SECONDS_PER_CALL, Plan, claim_folder, is_sample_due, next_stop
from jgpt.program import Program, compile_program
from jgpt.report.outcome import conclude_run
from jgpt.runs import checkpoint
from jgpt.runs.clock import start_clock
from jgpt.runs.health import explain_stop
from jgpt.runs.log import Call, Log, Writer, close_quietly, open_log
from jgpt.runs.profile import end_profile
from jgpt.runs.result import Result, remove_result
from jgpt.runs.saving import Saver
from jgpt.sharding import leave_mesh
from jgpt.step import TrainState
from jgpt.system.signals import Stop, describe_stop, stop_signals


@leave_mesh()
def train_run(
  plan: Plan,
  *,
  writers: Sequence[Writer] = (),
  sample_at: Callable[[int], bool] | None = None,
  stop: Stop | None = None,
) -> Result:
  """Trains to `train.steps` updates, or until a signal; then evaluates on the whole held-out part.

  Args:
    plan: from `plan_run`.
    writers: get the metrics of each compiled call, and are closed at the end. The run folder's
      metrics.jsonl is written besides.
    sample_at: says after which updates texts are drawn for the writers, besides
      `train.sample_every`; it changes no bit of the training.
    stop: what signals mean; None collects the first, which ends the training, and lets the second
      interrupt Python.

  Raises:
    UserError: if the devices do not fit the settings, another process writes to the run folder, or
      the folder cannot be read.
    TrainingError: if `train.max_consecutive_skips` updates in a row were skipped, or the parameters
      are not finite.

  Example:
    >>> plan = jgpt.plan_run(jgpt.load_experiment("names"))
    >>> result = jgpt.train_run(plan)
    >>> result.losses[-1]
  """
  workdir, train, devices = plan.workdir, plan.experiment.train, runtime.devices(to_train=True)
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(stop_signals()) if stop is None else stop
    seconds = plan.experiment.mesh.timeout_seconds
    stack.enter_context(watch.watching(stop, seconds=seconds))
    stop = watch.share_stop(stop)
    saved_step, manager, rows, clock = None, None, (), stack.enter_context(start_clock())
    stack.enter_context(end_profile(plan.profile))
    for writer in writers:
      stack.callback(close_quietly, writer)
    if workdir is not None:
      saved_step = claim_folder(plan, devices, stack)
      keep = {"keep_latest": train.keep_latest, "keep_best": train.keep_best}
      manager = stack.enter_context(checkpoint.open_checkpoints(workdir, **keep))
      rows, writers = open_log(workdir, saved_step or 0, writers, stack)
      if (saved_step or 0) < train.steps:
        remove_result(workdir)
    # The folder may have moved on since the plan was made.
    plan = dataclasses.replace(plan, start_step=saved_step or 0)
    with stop.leaving(describe_stop(plan.start_step, workdir)), processes.busy("compiling"):
      program = compile_program(
        *(plan.experiment, devices, plan.data, plan.initial),
        manager=manager,
        saved_step=saved_step,
        num_steps=train.steps - plan.start_step,
      )
      processes.together("the compiled programs", lambda: None)
    clock.look("compiling")
    log = Log(list(writers), rows, program.experiment, plan.data, clock, program.budget)
    saver = Saver(manager, log, train)
    state, step = _loop(plan, program, saver, log, stop, sample_at)
    end = partial(conclude_run, plan, program.experiment, state, step, log, saver, stop)
    saver.save(state, step)  # goes on in the background during the evaluation
    if log.health.exhausted:
      end()
      corpus = program.feed.corpus_at(log.health.exhausted - 1)
      why = explain_stop(program.experiment, state, corpus, log.health, workdir)
      raise processes.mark_told(TrainingError(why))
    heldout = None
    if not stop:
      with stop.leaving(describe_stop(step, workdir), end):
        evaluate = partial(evaluate_heldout, state.params, program.heldout, program.experiment)
        heldout = log.find_whole_evaluation(step) or processes.wait("the loss", evaluate)
      clock.look("evaluating")
    return end(heldout)


def _loop(
  plan: Plan,
  program: Program,
  saver: Saver,
  log: Log,
  stop: Stop,
  sample_at: Callable[[int], bool] | None,
) -> tuple[TrainState, int]:
  """Runs the compiled calls and returns the last state, and its step.

  A call's metrics are written while the device is busy with the next one.
  """
  train, tokenizer, feed = program.experiment.train, plan.data.tokenizer, program.feed
  state, step, pending = program.state, plan.start_step, None
  if train.steps and step not in log.evaluated:  # a stop may have come before it was done
    evaluation = begin_due_evaluation(state.params, program.heldout, step, program.experiment)
    pending = None if evaluation is None else Call(step, 0, {}, evaluation, None)
  while step < train.steps and not stop and not log.health.exhausted:
    num_steps = next_stop(step, train, plan.epoch_steps, feed.block_steps, plan.profile) - step
    num_steps = stop.agree(min(num_steps, log.count_steps(SECONDS_PER_CALL, pending)))
    if not num_steps:  # train.max_seconds are over, or a signal has reached another process
      break
    state, metrics = program.advance(state, step, num_steps, plan.profile)
    step += num_steps
    evaluation = begin_due_evaluation(state.params, program.heldout, step, program.experiment)
    texts = None
    if is_sample_due(step, train) or (sample_at and sample_at(step)):
      texts = begin_samples(state.params, tokenizer, step, program.experiment)
    log.write(pending, stop)
    pending = Call(step, num_steps, metrics, evaluation, texts)
    if saver.needs(pending):  # it reads the state, which the next call consumes
      log.write(pending, stop)
      saver.keep(state, step)
      pending = None
  log.write(pending, stop)
  log.sync()
  return state, step
