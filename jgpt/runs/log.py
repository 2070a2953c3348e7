"""A run's metrics: metrics.jsonl, and the log that hands each compiled call's metrics to writers.

Holds the interface of writers, the one that writes metrics.jsonl, and `Log`. The file is read in
`rows.py`, printing is in `report/console.py`, skipped updates and spikes are in `health.py`, and
when calls are made is decided in `train.py`.
"""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import numpy as np

from jgpt.batches import make_seen_counter
from jgpt.config import Experiment
from jgpt.data.corpus import Data
from jgpt.devices import processes
from jgpt.devices.footprint import Budget
from jgpt.devices.limits import count_train_flops
from jgpt.evaluation import (
  EvalSums,
  HeldoutLoss,
  count_sample_batches,
  finish_evaluation,
)
from jgpt.runs.clock import Clock, Pace, Perf
from jgpt.runs.health import Health
from jgpt.runs.rows import TIMED, read_lines, read_losses
from jgpt.system.signals import Stop, print_stderr

LAST_ROWS = 2000  # rows of earlier starts that a resumed run reads


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Metrics of consecutive updates.

  Attributes:
    step: the last of them; the first update of a run is step 1. At step 0 there is only an
      evaluation.
    metrics: name -> float array [updates].
    seconds: that the updates took.
    heldout_loss: nats per token on the held-out part after the last update; None where it was not
      evaluated.
    texts: drawn after the last update, where samples were due.
    heldout: `heldout_loss` with what it is over.
    tokens: trained on since the run first began, repetitions counted.
    perf: how fast the updates were; None where there are none.
    budget: what the run has of its devices, in the first chunk of a start; None in others.
  """

  step: int
  metrics: dict[str, np.ndarray]
  seconds: float
  heldout_loss: float | None = None
  texts: tuple[str, ...] = ()
  heldout: HeldoutLoss | None = None
  tokens: int = 0
  perf: Perf | None = None
  budget: Budget | None = None


class Writer(Protocol):
  """The interface of objects that receive a run's metrics."""

  def write(self, chunk: Chunk) -> None:
    """Receives the metrics of consecutive updates."""

  def close(self) -> None:
    """Ends writing; called once, also when training ends early."""


class JsonlWriter:
  """Writes one JSON object per update: {"step": 1, "train/loss": 3.29, ...}.

  Numbers are written so that float32 reads back equal. Rows of their own are added by

    each call        {"step": 100, "perf/seconds": 0.003, "perf/tokens_per_second": 2e5, "tokens":
                     710}: the only ones that are not the same in a run that is resumed, or run
                     again. tokens: trained on since the run first began, repetitions counted,
                     without padding. "perf/mfu" too where the devices' peak is known
    each evaluation  {"step": 100, "heldout/loss": 2.41, "heldout/tokens": 1573}, and
                     "heldout/batches" where it is over a sample of so many batches
    the end          {"step": 1000, "heldout/loss": 2.39, "heldout/tokens": 1573,
                     "heldout/bits_per_byte": 3.45, "final": true}, over the whole held-out part. A
                     run that goes on cuts it off
  """

  def __init__(self, path: Path, step: int):
    """Opens the file, in a folder that exists.

    The first `write` cuts off the rows that a run resumed from `step` writes again, and a torn last
    line; a run that writes nothing leaves the file unchanged. The cut is at the position where the
    fewest rows are on the wrong side of it, so that a single wrong number among the earlier rows
    does not lose the rows after it. `kept` holds, of the rows up to `step`, the last 2,000 and all
    of evaluations and skipped updates; none of the time and of an end.
    """
    kept: list[tuple[int, dict]] = []
    last: collections.deque[tuple[int, dict]] = collections.deque(maxlen=LAST_ROWS)
    end, is_whole, balance, best = 0, True, 0, 0
    self._final_step = None  # of the last row, if that is of an end
    for line in read_lines(path):
      is_final = line.row is not None and "final" in line.row
      is_before = line.row is not None and line.row["step"] <= step and not is_final
      self._final_step = line.row["step"] if is_final and line.is_whole else None
      balance += 0 if line.row is None else 1 if is_before else -1
      if balance >= best and (line.is_whole or is_before):
        best, end, is_whole = balance, line.end, line.is_whole
      if is_before and TIMED not in line.row:
        if len(last) == LAST_ROWS:
          oldest = last[0]
          if oldest[1].get("train/skipped") or "heldout/loss" in oldest[1]:
            kept.append(oldest)
        last.append((line.end, line.row))
    self.kept = [row for at, row in (*kept, *last) if at <= end]
    self._lost = len(kept) + len(last) - len(self.kept)
    self._path, self._cut_at, self._is_whole = path, end, is_whole
    self._file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by close)

  def write(self, chunk: Chunk) -> None:
    """Appends the chunk's rows."""
    if self._cut_at is not None:
      self._cut()
    count = len(next(iter(chunk.metrics.values()), ()))
    # str of a NumPy float32 is the shortest text that reads back as the same float32.
    columns = {
      name: column.tolist()
      if column.dtype.kind in "iu"
      else [float(str(value)) for value in column]
      for name, column in chunk.metrics.items()
    }
    rows = [
      {"step": chunk.step - count + 1 + i, **{name: column[i] for name, column in columns.items()}}
      for i in range(count)
    ]
    if chunk.perf is not None:
      seconds, rate = chunk.perf.seconds, chunk.perf.tokens_per_second
      timed = {TIMED: float(f"{seconds:.6g}"), "perf/tokens_per_second": float(f"{rate:.6g}")}
      if chunk.perf.mfu is not None:
        timed["perf/mfu"] = float(f"{chunk.perf.mfu:.4g}")
      rows.append({"step": chunk.step, **timed, "tokens": chunk.tokens})
    if chunk.heldout_loss is not None:
      row = {"step": chunk.step, "heldout/loss": chunk.heldout_loss}
      rows.append(row | (_describe_sample(chunk.heldout) if chunk.heldout else {}))
    self._write_rows(rows)

  def write_final(self, step: int, heldout: HeldoutLoss, bits_per_byte: float) -> None:
    """Appends the row of the run's end, unless it is there."""
    if self._final_step == step:
      return
    if self._cut_at is not None:
      self._cut()
    row = {"step": step, "heldout/loss": heldout.loss, **_describe_sample(heldout)}
    self._write_rows([row | {"heldout/bits_per_byte": bits_per_byte, "final": True}])

  def _write_rows(self, rows: list[dict]) -> None:
    self._file.writelines(json.dumps(row) + "\n" for row in rows)
    self._file.flush()

  def _cut(self) -> None:
    """Cuts off the rows that this start writes again."""
    if self._lost:
      print_stderr(
        f"WARNING: {self._path} is damaged: {self._lost} earlier rows stand behind later ones, and "
        "are cut off with them"
      )
    self._file.truncate(self._cut_at)
    self._file.write("" if self._is_whole else "\n")
    self._cut_at = self._final_step = None  # an end is never kept

  def sync(self) -> None:
    """Waits until the rows written so far are on disk; called before a checkpoint is saved."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def _describe_sample(heldout: HeldoutLoss) -> dict[str, int]:
  """Returns the entries of a row that say what a held-out loss is over."""
  batches = {} if heldout.num_batches is None else {"heldout/batches": heldout.num_batches}
  return {"heldout/tokens": heldout.num_tokens, **batches}


def open_log(
  workdir: Path, step: int, writers: Sequence[Writer], stack: contextlib.ExitStack
) -> tuple[list[dict], list[Writer]]:
  """Opens a run's metrics.jsonl until the stack closes; in the lead, as the others write nothing.

  Args:
    workdir: a run folder.
    step: that the run goes on from.
    writers: further ones.
    stack: closes the file.

  Returns:
    The rows of earlier starts, as `JsonlWriter.kept`, in every process; and all writers.
  """
  rows, writers = None, list(writers)
  if processes.is_lead():
    log_file = JsonlWriter(workdir / "metrics.jsonl", step)
    stack.callback(close_quietly, log_file)
    rows, writers = log_file.kept, [log_file, *writers]
  return processes.decide("metrics.jsonl", rows), writers


class Call(NamedTuple):
  """A compiled call that was made, and what was started after it.

  Attributes:
    step: updates done after the call.
    num_steps: updates that the call made.
    metrics: name -> array [capacity] on the device, whose first `num_steps` entries are set.
    evaluation: of the held-out part, on the device; None where none was due.
    texts: waits for the samples and returns them; None where none were due.
  """

  step: int
  num_steps: int
  metrics: dict[str, jax.Array]
  evaluation: EvalSums | None
  texts: Callable[[], list[str]] | None


class Log:
  """A run's metrics since it was started.

  Attributes:
    losses: training loss of each update of this start, nats per token, float32.
    evaluations: (step, held-out loss) of each evaluation of this start.
    evaluated: steps of all evaluations on record, including earlier starts'.
    health: statistics of losses and skipped updates.
    count_seen: counts what the run was trained on up to a step.
    clock: seconds of this start by part.
    tokens_per_second: of training lately; None before the first update.
    budget: what the run has of its devices.
  """

  def __init__(
    self,
    writers: list[Writer],
    rows: Sequence[dict],
    experiment: Experiment,
    data: Data,
    clock: Clock,
    budget: Budget | None = None,
  ):
    """Begins a start of the run.

    Args:
      writers: a writer whose writing fails is removed from the list.
      rows: of earlier starts.
      experiment: resolved.
      data: of the run.
      clock: has counted what came before the first call, so that compiling counts for no step.
      budget: what the run has of its devices; None where that is not known.
    """
    self._writers, self._data, self._pace = writers, data, Pace()
    self.clock, self._before, self._seconds_per_step = clock, clock.elapsed, 0.0
    self._max_seconds = experiment.train.max_seconds
    self.count_seen = make_seen_counter(data.train, experiment.data)
    self._flops = count_train_flops(experiment.model, experiment.data.seq_len)
    self.budget, self._has_begun = budget or Budget(), False
    self._is_whole = experiment.train.eval_batches is None
    self._sample_batches = count_sample_batches(data.heldout, experiment)
    self.tokens_per_second: float | None = None
    self.losses = array.array("f")  # a list would take eight times the memory
    self.evaluations: list[tuple[int, HeldoutLoss]] = []
    self._earlier = [(row["step"], _read_heldout(row)) for row in rows if "heldout/loss" in row]
    self.evaluated = {step for step, _ in self._earlier}
    self.health = Health(rows, experiment.train.max_consecutive_skips, experiment.data.batch_size)

  def list_evaluations(self) -> list[tuple[int, HeldoutLoss]]:
    """Lists (step, held-out loss) of all evaluations on record, earlier starts' included."""
    return [*self._earlier, *self.evaluations]

  def find_whole_evaluation(self, step: int) -> HeldoutLoss | None:
    """Returns the held-out loss at a step.

    None where this start did not evaluate it, or a number of batches was asked for, also if that is
    the whole held-out part.
    """
    return self.find_heldout_loss(step) if self._is_whole else None

  def find_heldout_loss(self, step: int) -> HeldoutLoss | None:
    """Returns the held-out loss at a step; None where this start did not evaluate it."""
    return next((heldout for at, heldout in self.evaluations if at == step), None)

  def count_steps(self, seconds: float, pending: Call | None = None) -> int:
    """Estimates from the last calls how many updates take `seconds`; 1 before any was timed.

    Args:
      seconds: that a call may take.
      pending: the call under way.

    Returns:
      0 where `train.max_seconds` are over, or will be once the call under way is done.
    """
    if not self._seconds_per_step:
      return 1
    if self._max_seconds is not None:
      under_way = pending.num_steps * self._seconds_per_step if pending else 0.0
      left = self._max_seconds - self.clock.count_seconds() - under_way
      if left <= 0:
        return 0
      seconds = min(seconds, left)
    return max(1, int(min(seconds / max(self._seconds_per_step, 1e-9), 2**31)))

  def write(self, call: Call | None, stop: Stop) -> None:
    """Waits for a call and what was started after it, and hands its metrics to the writers.

    Args:
      call: None writes nothing.
      stop: once it is true, an unfinished evaluation and the samples are dropped; a resumed run
        makes them again.
    """
    if call is None:
      return
    metrics = processes.wait(_name_call(call), lambda: jax.device_get(call.metrics), call.metrics)
    metrics = {k: column[: call.num_steps] for k, column in metrics.items()}
    losses = np.asarray(metrics.get("train/loss", ()), np.float32)
    self.losses.frombytes(losses.tobytes())
    seconds = self.clock.look("training" if call.num_steps else "evaluating")
    heldout, evaluation = None, call.evaluation
    if evaluation is not None:
      processes.wait("the held-out loss", lambda: _wait_unless(stop, evaluation))
    # With a stop, devices may be done in one process and not in another.
    if evaluation is not None and processes.decide("the loss", evaluation.nats.is_ready()):
      heldout = HeldoutLoss(*finish_evaluation(evaluation), self._sample_batches)
      self.evaluations.append((call.step, heldout))
      self.clock.look("evaluating")
    drawn = ()
    if call.texts and not stop:
      drawn = tuple(processes.wait("the samples", call.texts))
    if drawn:
      self.clock.look("sampling")
    loss, tokens = heldout.loss if heldout else None, self.count_seen(call.step).tokens
    perf = self._measure(call, tokens, seconds) if call.num_steps else None
    budget, self._has_begun = None if self._has_begun else self.budget, True
    chunk = Chunk(call.step, metrics, seconds, loss, drawn, heldout, tokens, perf, budget)
    for line in self.health.observe(call.step, metrics) if call.num_steps else ():
      if processes.is_lead():
        print_stderr(line)
    self._for_each_writer(lambda writer: writer.write(chunk), call.step)

  def _measure(self, call: Call, tokens: int, seconds: float) -> Perf:
    """Adds a call to the rates of training."""
    new_tokens = tokens - self.count_seen(call.step - call.num_steps).tokens
    steps_per_second, self.tokens_per_second = self._pace.add(call.num_steps, new_tokens, seconds)
    # A call that was done before the host asked for it seems to have taken no time.
    self._seconds_per_step = max(seconds / call.num_steps, 1 / steps_per_second)
    elapsed = self.clock.elapsed - self._before
    mfu = self.compute_mfu(self.tokens_per_second)
    return Perf(seconds, steps_per_second, self.tokens_per_second, elapsed, mfu)

  def compute_mfu(self, tokens_per_second: float) -> float | None:
    """Computes the share of the devices' peak that a rate takes; None where no peak is known."""
    peak = self.budget.flops
    return None if peak is None else tokens_per_second * self._flops / peak

  def write_final(self, step: int, heldout: HeldoutLoss, bits_per_byte: float) -> None:
    """Writes the loss over the whole held-out part to metrics.jsonl, once the run has ended."""
    self._for_each_writer(
      lambda writer: (
        writer.write_final(step, heldout, bits_per_byte)
        if isinstance(writer, JsonlWriter)
        else None
      )
    )

  def sync(self) -> None:
    """Waits until the rows written to metrics.jsonl are on disk."""
    self._for_each_writer(lambda writer: writer.sync() if isinstance(writer, JsonlWriter) else None)

  def _for_each_writer(self, call: Callable[[Writer], None], step: int | None = None) -> None:
    for writer in list(self._writers):
      try:
        call(writer)
      # A full disk, a closed pipe or an encoding: not worth ending the training.
      except (OSError, ValueError) as error:
        self._writers.remove(writer)
        at = "" if step is None else f" at step {step}"
        print_stderr(
          f"{type(writer).__name__} stopped{at} ({getattr(error, 'strerror', None) or error}); "
          "training goes on"
        )


def _wait_unless(stop: Stop, evaluation: EvalSums) -> None:
  """Waits until an evaluation is done, or for a stop."""
  while not evaluation.nats.is_ready() and not stop:
    processes.check()
    time.sleep(0.002)


def _name_call(call: Call) -> str:
  """Describes the updates of a call, for processes that wait for one another."""
  first, last = call.step - call.num_steps + 1, call.step
  return f"update {last}" if first >= last else f"updates {first} to {last}"


def _read_heldout(row: dict[str, float]) -> HeldoutLoss:
  """Reads the held-out loss of a row; those of older runs do not say what it is over."""
  tokens, batches = (row.get(f"heldout/{name}") for name in ("tokens", "batches"))
  return HeldoutLoss(row["heldout/loss"], tokens, batches)


def close_quietly(writer: Writer) -> None:
  """Closes a writer; an error was reported when writing failed."""
  with contextlib.suppress(OSError):
    writer.close()


def collect_losses(
  log: Log, workdir: Path | None, step: int
) -> tuple[np.ndarray, list[tuple[int, float]]]:
  """Returns the losses of a run up to a step, those of earlier starts included.

  In other processes than the lead, which alone writes them, those of this start.

  Returns:
    Training losses, float32 [updates], and (step, held-out loss) pairs, nats per token.
  """
  if workdir is not None and processes.is_lead():
    return read_losses(workdir / "metrics.jsonl", step)
  pairs = [(at, heldout.loss) for at, heldout in log.evaluations]
  return np.asarray(log.losses, np.float32), pairs
