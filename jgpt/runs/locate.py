"""Finds the run that a path names, and the checkpoint that a path and a step name.

A path may be that of a run folder, of a folder or file in it, or of one of its checkpoints. Imports
no jax.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from jgpt.errors import UserError
from jgpt.runs import manifest
from jgpt.runs.folder import PLOT_FILE
from jgpt.runs.manifest import MANIFEST_FILE, STEP, Manifest

BEST = "best"  # in place of a step
# What a run folder holds beside its checkpoints (`folder.py`).
PARTS = (
  *("checkpoints", "samples", "experiment.json", "tokenizer.json", "env.json", "metrics.jsonl"),
  *("result.json", PLOT_FILE),
)

Step = int | Literal["best"] | None  # None: the newest


def find_checkpoint(source: str | Path) -> tuple[Path, int | None] | None:
  """Finds the run folder that a path names, and the step where it names a checkpoint.

  Args:
    source: a run folder, one of its checkpoints/STEP, a folder or file in either, or a link to one
      of them; "~" is the user's home.

  Returns:
    The run folder, and the step or None; None where the path names no run.
  """
  path = Path(os.path.expanduser(source))  # unlike Path.expanduser, keeps an unknown ~user
  try:
    found = _look_around(path, Path(os.path.abspath(path)))
    if found is None and os.path.isfile(path / MANIFEST_FILE):  # by a link to a checkpoint
      real = Path(os.path.realpath(path))
      found = _look_around(real, real)
    return found
  except ValueError:  # a NUL in the path
    return None


def _look_around(path: Path, full: Path) -> tuple[Path, int | None] | None:
  """Finds a run as `find_checkpoint` does, from a path and the same as an absolute one."""
  if _is_run(full) and os.path.isdir(full / "checkpoints"):
    return path, None  # also where it is called checkpoints/5
  for up, folder in enumerate((full, *full.parents[:2])):  # .../checkpoints/5/params/FILE at most
    run = folder.parent.parent
    is_step = STEP.fullmatch(folder.name) and folder.parent.name == "checkpoints"
    if is_step and (_is_run(run) or os.path.isfile(folder / MANIFEST_FILE)):
      return _parent(path, full, up + 2), int(folder.name)
  if full.name in PARTS and os.path.exists(full) and _is_run(full.parent):
    return _parent(path, full, 1), None
  return (path, None) if _is_run(full) and not os.path.isfile(full / MANIFEST_FILE) else None


def _is_run(folder: Path) -> bool:
  return os.path.isfile(folder / "experiment.json")


def _parent(path: Path, full: Path, up: int) -> Path:
  """Returns a path's parent, `up` levels up, relative where the path is."""
  is_plain = len(path.parts) > up and ".." not in path.parts
  return (path if is_plain else full).parents[up - 1]


def locate_run(source: str | Path, step: Step = None) -> tuple[Path, Step]:
  """Returns the run folder and the step that a path and a step name together.

  Args:
    source: see `find_checkpoint`. A folder that is no run is returned as it is.
    step: asked for beside the path.

  Raises:
    UserError: if the path names the checkpoint of another step, or a checkpoint outside of a run.
  """
  found = find_checkpoint(source)
  if found is None:
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path / MANIFEST_FILE):
      raise UserError(
        f"{path} is a checkpoint outside of a run folder. Put it, named by its step, into the "
        "folder checkpoints of its run"
      )
    return path, step
  workdir, there = found
  if step is not None and there is not None and step != there:
    raise UserError(
      f"{source} is the checkpoint of step {there}, and --step asks for {step}. Try "
      f"--run {shlex.quote(str(workdir))} --step {step}"
    )
  return workdir, step if there is None else there


def order_steps(workdir: Path, step: Step) -> list[int]:
  """Lists the checkpoints of a run that a step names, the first to be taken first.

  Args:
    workdir: the run folder.
    step: "best" lists those with a recorded held-out loss, the lowest first; of equal losses the
      newer step is better. Losses over other targets than the newest one's are not compared with
      it, and come after all that are. None lists all, the newest first.

  Raises:
    UserError: if there is no such checkpoint.
  """
  if step != BEST:
    newest = manifest.find_step(workdir, step)
    return [newest] if step is not None else manifest.list_steps(workdir)[::-1] or [newest]
  manifest.find_step(workdir, None)  # raises where there is none
  rated = _read_rated(workdir)
  if not rated:
    steps = ", ".join(map(str, manifest.list_steps(workdir)))
    raise UserError(
      f"no checkpoint of {workdir} has a held-out loss, so none is the best: its steps {steps} "
      "were not evaluated. Leave --step out for the newest"
    )
  targets = rated[max(rated)].targets

  def rank(saved: int) -> tuple:
    return rated[saved].targets != targets, rated[saved].heldout_loss, -saved

  return sorted(rated, key=rank)


def _read_rated(workdir: Path) -> dict[int, Manifest]:
  """Reads the manifests with a held-out loss, by step; leaves out those that cannot be read."""
  return {k: found for k, found in manifest.read_manifests(workdir).items() if found.is_rated}


def describe_better_step(workdir: Path, step: int, rows: Iterable[dict[str, float]]) -> str:
  """Describes the evaluated step that has a lower held-out loss than the best saved one.

  Losses over other targets are not compared, and that before any update does not count.

  Args:
    workdir: the run folder.
    step: the best saved one.
    rows: of metrics.jsonl.

  Returns:
    A sentence; "" where no step has a lower loss.
  """
  saved = _read_rated(workdir).get(step)
  if saved is None:
    return ""
  loss = saved.heldout_loss
  losses = [
    (row["heldout/loss"], row["step"])
    for row in rows
    if "heldout/loss" in row
    and row["step"] > 0
    and saved.targets == (row.get("heldout/tokens"), row.get("heldout/batches"))
  ]
  best, at = min(losses, default=(math.inf, 0))
  if not best < loss or at == step:
    return ""
  return (
    f"step {at:,} had a lower held-out loss, {best:.4f}, and was not saved; the best that was "
    f"saved is step {step:,} with {loss:.4f}"
  )
