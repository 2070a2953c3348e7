"""A run's end as numbers: what `train_run` returns, and the content of result.json.

    format             1
    name               of the experiment
    ended_by           "finished", "signal", "max_seconds" or "skipped updates"
    is_finished        whether it made all its updates; the same command goes on with others
    step, steps        updates that were made, and `train.steps`
    sequences, tokens  trained on since the run first began, repetitions counted
    origin             of a continued run: location, step and sha256 of the checkpoint that it began
                       from, and the tokens that went before; null for others and where not known
    training_loss      mean of the last 50 updates, nats per token; null without updates
    heldout_loss       nats per token over the whole held-out part; null where nothing is held out,
                       or a signal ended the run before it was evaluated
    heldout_tokens, heldout_bits_per_byte
                       that `heldout_loss` is over, and the same in bits per byte of text
    best, best_saved   the lowest of the losses on the held-out part during training, and the lowest
                       whose state is saved: step, loss, tokens, and batches of a sample (null: the
                       whole part); null without evaluations
    verdict            verdict and evidence (`verdict.py`); null without updates
    expected           what the experiment expects on this text: what, loss, band, got, and
                       is_inside; null where it expects nothing
    seconds            of this start by part: planning, compiling (with restoring), training,
                       evaluating, sampling, saving (while training waits)
    compiled           programs that this start needed, how many of them were from_cache (jax's
                       persistent cache), and seconds: of XLA and of reading that cache, added up
                       over programs, of which two compile at once
    tokens_per_second  this start's tokens, padding not counted, over its seconds of training; null
                       without updates
    mfu                of these the share of the devices' peak (`limits.find_peak`), a token taking
                       6 P + 6 L D T floating-point operations (`limits.count_train_flops`); null
                       where no peak is known
    step_memory_bytes  of each device: what a step takes by its compiler (compiled), what was free
                       for it (available), and its parts by formula; null where not known
    peak_memory_bytes  of this process (host), and the largest of a device; null where not known
    time               when it was written, UTC

Numbers that JSON cannot hold (NaN, infinity) are null.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from typing import Any

from jgpt.config import Experiment
from jgpt.devices import processes
from jgpt.devices.footprint import estimate_footprint
from jgpt.devices.runtime import read_memory_stats
from jgpt.evaluation import HeldoutLoss, count_bytes
from jgpt.plan import Plan
from jgpt.report.console import uniform_loss
from jgpt.report.verdict import (
  count_idle_updates,
  diagnose_losses,
  final_loss,
  match_expected,
)
from jgpt.runs.log import Log, collect_losses
from jgpt.runs.result import Result, find_best, read_result, write_result
from jgpt.runs.saving import Saver
from jgpt.step import TrainState
from jgpt.system.memory import measure_peak_memory
from jgpt.system.signals import Stop


def conclude_run(
  plan: Plan,
  experiment: Experiment,
  state: TrainState,
  step: int,
  log: Log,
  saver: Saver,
  stop: Stop,
  heldout: HeldoutLoss | None = None,
) -> Result:
  """Waits until a run is saved, writes its end to the log and to result.json, and returns it.

  Args:
    plan: `start_step` is the step that was restored.
    experiment: with `compute` resolved.
    state: after the last update.
    step: of the state.
    log: of this start.
    saver: has begun to save the state.
    stop: true where a signal ended the run.
    heldout: over the whole held-out part; None where it was not evaluated.

  Raises:
    TrainingError: if the state could not be saved.
  """
  saver.wait()
  log.clock.look("saving")
  steps = experiment.train.steps
  bits_per_byte = None
  if heldout is not None:
    bits_per_byte = heldout.bits_per_byte(count_bytes(plan.data.heldout, plan.data.tokenizer))
    log.write_final(step, heldout, bits_per_byte)
  losses, heldout_losses = collect_losses(log, plan.workdir, step)
  ended_by = "finished" if step == steps else "max_seconds"
  if log.health.exhausted or stop:
    ended_by = "skipped updates" if log.health.exhausted else "signal"
  here = log.count_seen(step).tokens - log.count_seen(plan.start_step).tokens
  rate = here / log.clock.seconds["training"] if here else None
  result = Result(
    state=state,
    step=step,
    losses=losses,
    heldout_losses=heldout_losses,
    heldout_loss=heldout and heldout.loss,
    heldout_tokens=heldout.num_tokens if heldout else 0,
    tokenizer=plan.data.tokenizer,
    experiment=experiment,
    signal=stop.signal,
    ended_by=ended_by,
    bits_per_byte=bits_per_byte,
    best=find_best(log.list_evaluations()),
    best_saved=saver.find_best_saved(),
    seen=log.count_seen(step),
    seconds=log.clock.seconds | {"planning": plan.seconds},
    tokens_per_second=rate,
    mfu=rate and log.compute_mfu(rate),
    step_memory={
      "compiled": log.budget.step,
      "available": log.budget.memory,
      **dataclasses.asdict(estimate_footprint(experiment, len(state.step.devices()))),
    },
    compilations=dataclasses.replace(log.clock.compilations),  # which counts on
  )
  write_outcome(plan, result)
  return result


def write_outcome(plan: Plan, result: Result) -> None:
  """Writes result.json; leaves that of a finished run which is only sampled again."""
  if plan.workdir is None or not processes.is_lead():
    return
  if result.step > plan.start_step or not _is_there(plan, result.step):
    write_result(plan.workdir, describe_outcome(plan, result))


def _is_there(plan: Plan, step: int) -> bool:
  """Returns whether result.json is of this end of the run."""
  try:
    found = read_result(plan.workdir)
  except ValueError:  # of a file that is damaged
    return False
  return found is not None and found["step"] == step and found["steps"] == step


def describe_outcome(plan: Plan, result: Result) -> dict[str, Any]:
  """Returns the content of result.json, as this module describes it."""
  experiment, num_updates = result.experiment, len(result.losses)
  verdict = None
  if num_updates:
    baseline = uniform_loss(experiment.model.vocab_size)
    num_idle = count_idle_updates(experiment.optimizer, num_updates)
    losses = result.losses, result.heldout_losses, result.heldout_loss
    found = diagnose_losses(*losses, baseline, num_idle=num_idle)
    verdict = {"verdict": found.verdict, "evidence": found.evidence}
  of_finished = experiment.expected if result.ended_by == "finished" else ()
  expected = match_expected(of_finished, plan.data.label, result.losses, result.heldout_loss)
  return _drop_nonfinite(
    {
      "name": plan.name,
      "ended_by": result.ended_by,
      "is_finished": result.ended_by == "finished",
      "step": result.step,
      "steps": experiment.train.steps,
      **result.seen._asdict(),
      "origin": plan.origin,
      "training_loss": final_loss(result.losses) if num_updates else None,
      "heldout_loss": result.heldout_loss,
      "heldout_tokens": result.heldout_tokens or None,
      "heldout_bits_per_byte": result.bits_per_byte,
      "best": _describe_best(result.best),
      "best_saved": _describe_best(result.best_saved),
      "verdict": verdict,
      "expected": expected,
      "seconds": {part: round(seconds, 6) for part, seconds in result.seconds.items()},
      "compiled": dataclasses.asdict(result.compilations),
      "tokens_per_second": result.tokens_per_second,
      "mfu": result.mfu,
      "step_memory_bytes": result.step_memory,
      "peak_memory_bytes": {
        "host": measure_peak_memory(),
        "device": _measure_device_peak(result.state),
      },
      "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
  )


def _describe_best(best: tuple[int, HeldoutLoss] | None) -> dict[str, Any] | None:
  if best is None:
    return None
  step, heldout = best
  return {
    "step": step,
    "loss": heldout.loss,
    "tokens": heldout.num_tokens,
    "batches": heldout.num_batches,
  }


def _drop_nonfinite(value: Any) -> Any:
  """Replaces NaN and infinity in nested dicts by None."""
  if isinstance(value, dict):
    return {name: _drop_nonfinite(entry) for name, entry in value.items()}
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _measure_device_peak(state: TrainState) -> int | None:
  """Measures the largest memory in use on a device of a state so far; None on the CPU."""
  stats = [read_memory_stats(device) for device in state.step.sharding.addressable_devices]
  return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)
