"""Checks of what a run needs to resume: its log, its data, room for the next checkpoint.

Nothing is changed and no network is used. What is read is bounded, since a run folder of somebody
else may name any file and contain any number. Checkpoints are checked in `soundness.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import itertools
import math
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from jgpt.config import Experiment
from jgpt.data import sources
from jgpt.data.paths import list_files
from jgpt.data.sources import PinnedText
from jgpt.devices.limits import FLOAT_BYTES
from jgpt.doctor.findings import Finding, format_bytes, from_error, note, ok, problem
from jgpt.errors import UserError
from jgpt.params import count_params
from jgpt.plan import plan_run
from jgpt.runs import manifest
from jgpt.runs.folder import RunFiles, read_last_settings
from jgpt.runs.origin import can_continue
from jgpt.runs.resume import describe_ways
from jgpt.runs.rows import read_lines
from jgpt.runs.text import list_places
from jgpt.system.cache import cache_dir, digest_bytes
from jgpt.system.memory import measure_memory
from jgpt.weights.initial import RELEASED

MAX_LOG = 10**10  # bytes of metrics.jsonl
MAX_FILES = 100_000  # in a folder of data
MAX_SHOWN = 10  # gaps in the log

# --- The log ---


@dataclasses.dataclass
class _Rows:
  """Counts over the rows of metrics.jsonl, the last step, and gaps between steps."""

  last: int = 0
  updates: int = 0
  evaluations: int = 0
  skipped: int = 0
  not_finite: int = 0
  gaps: list[str] = dataclasses.field(default_factory=list)

  def add(self, row: dict) -> None:
    """Counts the next row."""
    step, loss = row["step"], row.get("train/loss")
    self.evaluations += "heldout/loss" in row and "final" not in row
    if loss is None:
      return
    if step != self.last + 1 and len(self.gaps) < MAX_SHOWN:
      self.gaps.append(f"step {step:,} follows step {self.last:,}")
    self.last, self.updates = step, self.updates + 1
    self.skipped += bool(row.get("train/skipped"))
    self.not_finite += not math.isfinite(loss)


def examine_metrics(path: Path, newest: int) -> list[Finding]:
  """Examines whether the log is readable, has every update, and reaches the newest checkpoint.

  Args:
    path: metrics.jsonl.
    newest: step of the newest checkpoint; 0 without any.
  """
  if not os.path.lexists(path):
    return (
      [note("metrics", f"{path} is not there: the losses of {newest:,} steps are lost")]
      if newest
      else []
    )
  if (size := path.lstat().st_size) > MAX_LOG:
    return [
      note(
        "metrics",
        f"{path} has {format_bytes(size)}, and at most {format_bytes(MAX_LOG)} are read here",
      )
    ]
  rows, unreadable, first, is_torn = _Rows(), 0, 0, False
  for number, line in enumerate(read_lines(path), 1):
    if line.row is not None:
      rows.add(line.row)
    elif line.is_whole:
      unreadable, first = unreadable + 1, first or number
    else:
      is_torn = True
  parts = [f"{rows.updates:,} updates", f"{rows.evaluations:,} evaluations"]
  parts += [f"{rows.skipped:,} updates were skipped"] if rows.skipped else []
  parts += [f"{rows.not_finite:,} losses are not finite"] if rows.not_finite else []
  words = f"{path}: {', '.join(parts)}, to step {rows.last:,}"
  found = [note("metrics", words) if rows.not_finite else ok("metrics", words)]
  if unreadable:
    words = (
      f"lines that cannot be read and are passed over: {unreadable:,}, the first is line {first:,}"
    )
    found.append(note("metrics", f"{path}: {words}"))
  if is_torn:
    found.append(
      note("metrics", f"{path}: its last line is torn, and dropped when the run goes on")
    )
  if rows.gaps:
    found.append(
      note(
        "metrics",
        f"{path} has gaps: {'; '.join(rows.gaps)}. Writing it may have failed; training is not "
        "concerned",
      )
    )
  if rows.last < newest:
    found.append(
      note(
        "metrics",
        f"{path} ends at step {rows.last:,}, and the newest checkpoint is of step {newest:,}",
      )
    )
  return found


# --- Resuming ---


def examine_resume(workdir: Path, files: RunFiles, has_steps: bool) -> list[Finding]:
  """Examines whether the run can resume: its data have the recorded digest, its settings agree.

  Args:
    workdir: a run folder.
    files: of the run folder.
    has_steps: whether there is a checkpoint; otherwise the run starts at step 0.
  """
  recorded, experiment = files.data["sha256"], read_last_settings(workdir, files)
  config = experiment.data
  for place in list_places(workdir, files, config):
    if reason := find_risk(place.path):
      return [note("going on", f"the data were not looked at: {reason}")]
  if config.path is None and _needs_download(config.source, recorded):
    return [
      note(
        "going on",
        f"the text {config.source} (SHA-256 {recorded[:12]}) is not here: going on begins with a "
        "download",
      )
    ]
  if not has_steps and files.experiment.train.init_from in RELEASED:
    return [
      note(
        "going on",
        f"it begins with the weights {files.experiment.train.init_from}, which are not looked for "
        "here",
      )
    ]
  try:
    plan = plan_run(experiment, workdir=workdir, name=files.name)
  except UserError as error:
    ways = describe_ways(workdir, keeps_moments=can_continue(files.experiment))
    return [from_error("going on", error, ways)]
  text, steps = plan.data.text, plan.experiment.train.steps
  where = f"data: {text.location} ({text.kind}, SHA-256 {text.sha256[:12]}, as recorded)"
  if plan.start_step >= steps:
    return [ok("going on", f"finished at step {plan.start_step:,}; {where}")]
  return [ok("going on", f"from step {plan.start_step:,} of {steps:,}; {where}")]


def _needs_download(name: str, wanted: str) -> bool:
  """Returns whether the text of a source that a run recorded is not on this machine."""
  source = sources.get_source(name)
  if not isinstance(source, PinnedText):
    return False
  bundled = sources.BUNDLED_DIR / source.filename
  places = [
    sources.find_user_file(source),
    cache_dir() / source.filename,
    bundled if source.bundled else None,
  ]
  return not any(
    place is not None and place.is_file() and digest_bytes(place.read_bytes()) == wanted
    for place in places
  )


def find_risk(path: str | None) -> str | None:
  """Returns why `data.path` should not be read, or None; a run may name any file here.

  Args:
    path: a file, a folder or a glob; None for a known source.
  """
  if path is None:
    return None
  expanded = os.path.expanduser(path)
  if _lists_too_many(expanded):
    return f"{path} may stand for more than {MAX_FILES:,} files"
  try:
    files = list_files(path, ["*.txt", "*.bin"])
  except UserError:
    return None  # `plan_run` raises it again
  total = 0
  for file in [Path(expanded)] if files is None else files:
    try:
      info = file.stat()
    except (OSError, ValueError):
      continue
    if not stat.S_ISREG(info.st_mode):
      return f"{file} is no plain file"
    total += info.st_size if file.suffix != ".bin" else 0
  memory = measure_memory()[0]
  if memory is not None and total > (most := memory // 8):
    return f"{path} has {format_bytes(total)}, and at most {format_bytes(most)} are read here"
  return None


def _lists_too_many(path: str) -> bool:
  """Returns whether listing the files of a folder or glob meets more than `MAX_FILES` names."""
  if os.path.isdir(path):
    return _are_many(name for _, folders, names in os.walk(path) for name in (*folders, *names))
  if os.path.exists(path):
    return False
  parts = Path(path).parts
  for n, part in enumerate(parts):
    if glob.has_magic(part):  # the names that are listed to find those that match
      pattern = os.path.join(*parts[:n], "**" if part == "**" else "*")
      with contextlib.suppress(ValueError):  # a NUL in the path
        if _are_many(glob.iglob(pattern, recursive=True, include_hidden=True)):
          return True
  return False


def _are_many(names: Iterable[str]) -> bool:
  """Returns whether there are more than `MAX_FILES`; reads no more than needed."""
  return sum(1 for _ in itertools.islice(names, MAX_FILES + 1)) > MAX_FILES


def estimate_state(experiment: Experiment) -> int:
  """Estimates the bytes of a run's parameters and moments."""
  copies = 1 + experiment.optimizer.num_moments
  return FLOAT_BYTES * copies * count_params(experiment.model)


def examine_next_save(workdir: Path, newest: int | None, size: int) -> list[Finding]:
  """Examines whether the disk has room for another checkpoint.

  Args:
    workdir: a run folder.
    newest: step of the newest sound checkpoint, whose size is expected; None where there is none.
    size: bytes of the state, from `estimate_state`.
  """
  if newest is not None:
    folder = workdir / "checkpoints" / str(newest)
    with contextlib.suppress(OSError, UserError):  # `examine_checkpoint` finds these
      size = max(size, sum(path.lstat().st_size for _, path in manifest.walk_files(folder)))
  free = shutil.disk_usage(workdir).free
  text = f"{format_bytes(free)} free, a checkpoint takes {format_bytes(size)}"
  if free < size:
    return [problem("room", text, f"make room on the disk of {workdir}: the next save would fail")]
  return [note("room", text, "make room soon") if free < 3 * size else ok("room", text)]
