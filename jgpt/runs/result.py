"""The outcome of a run, and result.json, which holds it in a run folder.

result.json, of format 1, is written when a run ends: when it is finished, and when a signal,
`train.max_seconds` or too many skipped updates end it before. A start that makes updates deletes
the one before, so that a run that was killed has none. What is in it is described in
`report/outcome.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jgpt import sharding
from jgpt.batches import Seen
from jgpt.config import Experiment
from jgpt.devices import processes
from jgpt.devices.compilations import Compilations
from jgpt.errors import UserError, show
from jgpt.evaluation import HeldoutLoss
from jgpt.runs.folder import check_no_link, read_run_json
from jgpt.step import TrainState
from jgpt.system import files
from jgpt.system.signals import print_stderr
from jgpt.text.tokenizer import Tokenizer

RESULT_FILE = "result.json"
RESULT_FORMAT = 1
MAX_RESULT = 1 << 20  # bytes of result.json


@dataclasses.dataclass(frozen=True)
class Result:
  """The outcome of a run.

  Attributes:
    state: after the last update; blocks stacked or a list, as the run used them.
    step: of the state.
    losses: training loss of each update since the run first began, nats per token, float32; of
      this start in other processes than the lead, as are `heldout_losses`.
    heldout_losses: (updates, nats per token) of each evaluation since the run first began.
    heldout_loss: nats per token over the whole held-out part; None where nothing is held out or the
      run was interrupted.
    heldout_tokens: predictions that `heldout_loss` is over.
    tokenizer: of the run.
    experiment: resolved, `compute` for the devices that the run used.
    signal: the signal that ended the run early, or None.
    ended_by: "finished", "signal", "max_seconds" or "skipped updates".
    bits_per_byte: `heldout_loss` in bits per byte of text.
    best: (updates, loss) of the lowest of the comparable evaluations after an update; None without
      any.
    best_saved: the same of those whose state is saved.
    seen: what the run was trained on since it first began.
    seconds: of this start, by part of the run.
    tokens_per_second: that this start trained on, over its seconds of training; None without any.
    mfu: share of the devices' peak that this rate takes; None where no peak is known.
    step_memory: bytes of each device that a step takes, by its compiler ("compiled") and by the
      formulas of `Footprint`, and what was free for it ("available").
    compilations: of this start.
  """

  state: TrainState
  step: int
  losses: np.ndarray
  heldout_losses: list[tuple[int, float]]
  heldout_loss: float | None
  heldout_tokens: int
  tokenizer: Tokenizer
  experiment: Experiment
  signal: int | None
  ended_by: str
  bits_per_byte: float | None
  best: tuple[int, HeldoutLoss] | None
  best_saved: tuple[int, HeldoutLoss] | None
  seen: Seen
  seconds: dict[str, float]
  tokens_per_second: float | None
  mfu: float | None
  step_memory: dict[str, int | None]
  compilations: Compilations

  @property
  def params(self) -> dict:
    """Returns the parameters after the last update, as `init_params` returns them."""
    return sharding.stack_blocks(self.state.params)


def find_best(evaluations: Sequence[tuple[int, HeldoutLoss]]) -> tuple[int, HeldoutLoss] | None:
  """Finds the lowest held-out loss among those that are over the same targets as the last.

  Those that are not finite, and those before the first update, do not count; of equal losses the
  later is better. None without any.

  Args:
    evaluations: (updates, loss), in order.
  """
  rated = [e for e in evaluations if e[0] > 0 and math.isfinite(e[1].loss)]
  alike = [e for e in rated if e[1].targets == rated[-1][1].targets]
  return min(alike, key=lambda e: (e[1].loss, -e[0]), default=None)


def remove_result(workdir: Path) -> None:
  """Deletes result.json of an earlier end; only the lead does."""
  if processes.is_lead():
    (workdir / RESULT_FILE).unlink(missing_ok=True)


def write_result(workdir: Path, content: dict[str, Any]) -> None:
  """Writes result.json; a failure is a warning, since the run itself is saved.

  Args:
    workdir: a run folder.
    content: its fields but the format.
  """
  try:
    check_no_link(workdir / RESULT_FILE)
    files.write_json(workdir / RESULT_FILE, {"format": RESULT_FORMAT, **content})
  except (OSError, UserError) as error:
    why = getattr(error, "strerror", None) or error
    print_stderr(f"WARNING: {workdir / RESULT_FILE} was not written: {why}")


def read_result(workdir: Path) -> dict[str, Any] | None:
  """Reads result.json; None where there is none.

  The numbers of steps are checked. The other fields may be anything that JSON can be.

  Raises:
    UserError: if it is no plain file, has another format, or is of no run.
  """
  path = workdir / RESULT_FILE
  if not path.is_symlink() and not path.exists():
    return None
  found = read_run_json(path, MAX_RESULT)
  if not isinstance(found, dict) or found.get("format") != RESULT_FORMAT:
    got = found.get("format") if isinstance(found, dict) else None
    raise UserError(f"{path} has format {show(got)}; this jgpt reads format {RESULT_FORMAT}.")
  if not all(type(found.get(name)) is int and found[name] >= 0 for name in ("step", "steps")):
    raise UserError(f"{path} is no result of a run: a field is missing or of the wrong type.")
  return found
