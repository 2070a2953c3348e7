"""Which checkpoint a run resumes from: the newest that is undamaged and of this run.

Also what can be done where a run cannot be resumed.

What damage is, and which checkpoints exist, is in `manifest.py`. Imports no jax.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from jgpt.config import DataConfig
from jgpt.config.settings import differences
from jgpt.errors import UserError
from jgpt.runs import manifest
from jgpt.runs.folder import RunFiles, read_run_files
from jgpt.runs.manifest import Manifest
from jgpt.system.files import is_temporary


def find_sound_step(workdir: Path, trusted: int | None = None) -> tuple[int | None, dict[int, str]]:
  """Finds the newest checkpoint that a run can resume from: undamaged, and of this run.

  Args:
    workdir: a run folder.
    trusted: a step that was checked before.

  Returns:
    The step, None where the folder has no checkpoint; and what is wrong with each newer one.

  Raises:
    UserError: if there are checkpoints and all are damaged.
  """
  damaged: dict[int, str] = {}
  for step in reversed(manifest.list_steps(workdir)):
    folder = manifest.checkpoints_dir(workdir) / str(step)
    damage = None if step == trusted else find_fault(workdir, folder)
    if damage is None:
      return step, damaged
    damaged[step] = damage
  if damaged:
    first = next(iter(damaged.values()))
    raise UserError(
      f"every checkpoint of {workdir} is damaged ({', '.join(map(str, damaged))}): {first}. "
      "Nothing was changed; put a backup in its place, choose another --workdir, or start over "
      "with --fresh"
    )
  return None, {}


def find_fault(workdir: Path, folder: Path) -> str | None:
  """Returns why a run cannot resume from a checkpoint; None where it can."""
  if damage := manifest.find_damage(folder):
    return damage
  recorded = read_run_files(workdir)
  try:
    contradiction = find_contradiction(
      recorded, read_run_files(folder), manifest.read_manifest(folder)
    )
  except UserError as error:
    if is_temporary(error):
      raise
    return str(error)
  return contradiction and f"{folder} is of another run: {contradiction}"


def find_contradiction(recorded: RunFiles, copies: RunFiles, described: Manifest) -> str | None:
  """Finds a difference that shows that a checkpoint belongs to another run than its folder.

  Args:
    recorded: the run folder's files.
    copies: the checkpoint's.
    described: the checkpoint's manifest.

  Returns:
    The first difference, for a person; None where there is none.
  """
  if differing := differences(recorded.experiment, copies.experiment):
    setting, (here, there) = next(iter(differing.items()))
    return f"{setting} is {there} in its experiment.json, and {here} in the run folder's"
  if copies.tokenizer.digest != recorded.tokenizer.digest:
    return "its tokenizer.json is not the run folder's"
  if (
    copies.data["sha256"] != recorded.data["sha256"]
    or described.data.get("sha256") != recorded.data["sha256"]
  ):
    return "it was trained on data with another SHA-256"
  return _find_miscount(recorded.experiment.data, described)


def _find_miscount(config: DataConfig, described: Manifest) -> str | None:
  """Finds a count of a manifest that no run with these steps has; None where there is none.

  The last batch of an epoch may be short, and how short is not known without the text.
  """
  step, B = described.step, config.batch_size
  counted, tokens = (described.data.get(name) for name in ("sequences", "tokens"))
  if counted is None:
    return None
  least = step if config.batching == "epochs" else step * B
  if type(counted) is not int or not least <= counted <= step * B:
    wanted = f"{least} to {step * B}" if least < step * B else f"{step * B}"
    return f"its manifest counts {str(counted)[:20]} sequences, and its steps take {wanted}"
  least, most = counted, counted * config.seq_len
  if config.batching != "documents":
    least = most
  if tokens is not None and (type(tokens) is not int or not least <= tokens <= most):
    wanted = f"{least} to {most}" if least < most else f"{most}"
    return f"its manifest counts {str(tokens)[:20]} tokens, and its sequences have {wanted}"
  return None


def find_recorded(workdir: Path) -> RunFiles | None:
  """Reads the files of the run in a folder.

  Returns:
    Them; None where the folder holds no run.

  Raises:
    UserError: if it is a run's checkpoint, or the folder of its checkpoints; has checkpoints but no
      experiment.json; or as `read_run_files` does.
  """
  here = workdir.absolute()
  runs = {here.parent.parent: here.parent.name, here.parent: here.name}
  for folder, name in runs.items():
    if name == "checkpoints" and os.path.lexists(folder / "experiment.json"):
      run = folder if workdir.is_absolute() else os.path.relpath(folder)
      ways = f"To go on with the run: --workdir {shlex.quote(str(run))}"
      if here.parent != folder:
        step = shlex.quote(str(workdir))
        ways += (
          "; to begin a new run from this step, in another --workdir: --init-from "
          f"{step} or, to keep the moments, --continue-from {step}"
        )
      raise UserError(f"{workdir} is a part of the run folder {run}, and none itself. {ways}")
  if os.path.lexists(workdir / "experiment.json"):
    return read_run_files(workdir)
  if steps := manifest.list_steps(workdir):
    raise UserError(
      f"{workdir} has checkpoints but no experiment.json to say what they are. Copy the one in "
      f"checkpoints/{steps[-1]}, or choose another --workdir"
    )
  return None


def describe_ways(workdir: Path, *, keeps_moments: bool) -> str:
  """Describes what can be done instead of resuming a run, as the end of a sentence.

  Args:
    workdir: of the run.
    keeps_moments: whether a new run can take over its moments (`origin.can_continue`).
  """
  if not manifest.list_steps(workdir):
    return "choose another --workdir, or start over with --fresh"
  run = shlex.quote(str(workdir))
  moments = f" or, to keep the moments, --continue-from {run}" if keeps_moments else ""
  return (
    "choose another --workdir; start over with --fresh; or begin a new run from this one, in "
    f"another --workdir, with --init-from {run}{moments}"
  )
