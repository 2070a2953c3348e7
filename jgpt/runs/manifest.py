"""Checkpoints as files: which there are, and whether they are whole.

A run's checkpoints/<step>/ holds what makes the run at that step, after `step` updates:

    params/           the parameters by name, as `init_params` returns them, layers stacked: all that sampling needs
    train_state/      step and the optimizer's state (opt_state/adam/mu/..., nu/...), named as the parameters are
    experiment.json   the settings, with the place and SHA-256 of the text; a copy of the run folder's
    tokenizer.json    the tokenizer; a copy
    manifest.json     what follows

Both folders of arrays are written by orbax: an OCDBT database of zarr arrays. Without jgpt and without orbax, TensorStore
reads one as `{"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": "file:///.../params/", "path": "blocks.w_up/"}}`:
parts of a name are joined by dots there, and by "/" everywhere else.

manifest.json:

    format        1, the number of this description; a reader refuses what it does not know
    step          updates so far, applied or skipped; the folder's name
    data          kind, location and sha256 of the text, and sequences: how many were taken. The batch of a step is a
                  function of seed and step (`batches.py`), so this is the whole position in the data
    heldout_loss  nats per token where it was evaluated at this step, else null
    leaves        name -> dtype, shape and digest (`digest.py`), for each array of both folders
    files         name -> bytes and sha256, for every other file below the step's folder but those that begin with a dot
    sha256        of the other fields, as JSON with sorted keys, no spaces, and what is not ASCII escaped (u00e9)

A step exists if and only if it contains its manifest, which is written last: orbax renames its temporary folder to <step>,
then the JSON files are written, then all of it is brought to the disk, then the manifest is written under a temporary name,
which is renamed. A step is deleted manifest first. What a killed process left has no manifest; nothing reads it, and the
next writer clears it away.

Responsible for that order, for finding damage and for deleting; nothing here follows a link or opens a name that a manifest
gives. Not responsible for arrays (`checkpoint.py`). Imports no jax.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from jgpt.errors import UserError, show
from jgpt.runs.folder import check_no_link, read_run_json
from jgpt.system.files import may_pass, sync_file, sync_folder, write_json

MANIFEST_FORMAT = 1
MANIFEST_FILE = "manifest.json"
ITEMS = ("params", "train_state")
UNREADABLE = -math.inf
STEP = re.compile("0|[1-9][0-9]{0,9}")
PARTIAL = re.compile(rf"({STEP.pattern})(\.orbax-checkpoint-tmp.*)?")  # orbax's name for what it is writing


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a checkpoint says of itself.

  Attributes:
    step: updates so far, applied or skipped.
    data: kind, location and sha256 of the text; sequences taken.
    heldout_loss: nats per token, where it was evaluated at this step.
    leaves: name -> dtype, shape, digest.
    files: name -> bytes, sha256.
  """

  step: int
  data: dict[str, Any]
  heldout_loss: float | None
  leaves: dict[str, dict[str, Any]]
  files: dict[str, dict[str, Any]]


def checkpoints_dir(workdir: Path) -> Path:
  """The folder of a run's checkpoints; raises `UserError` if it is a symbolic link."""
  folder = workdir / "checkpoints"
  check_no_link(folder)
  return folder


def list_steps(workdir: Path) -> list[int]:
  """The steps that a run folder has checkpoints of, ascending; raises `UserError` if `checkpoints` is a link."""
  folder = checkpoints_dir(workdir)
  if not os.path.isdir(folder):
    return []
  names: list[str] = []
  while True:
    before = names
    names = [e.name for e in os.scandir(folder) if STEP.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    steps = sorted(int(name) for name in names if _exists(folder / name / MANIFEST_FILE))
    if steps or names == before:  # else those that were there went away while they were looked at: a newer one came before
      return steps


def _exists(path: Path) -> bool:
  """Whether there is such a name; raises `OSError` where the system does not say, as in a folder without permission."""
  try:
    path.lstat()
  except (FileNotFoundError, NotADirectoryError):
    return False
  return True


def find_step(workdir: Path, step: int | None) -> int:
  """Returns a saved step, the newest for None; raises `UserError` where there is none, or not that one."""
  steps = list_steps(workdir)
  if not steps:
    raise UserError(f"{workdir} has no checkpoint yet.")
  if step is not None and step not in steps:
    raise UserError(f"{workdir} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}.")
  return steps[-1] if step is None else step


# --- Writing and deleting ---


def write_manifest(folder: Path, manifest: Manifest) -> None:
  """Writes a step's manifest, with its files as they are now; from then on the step exists, after a power cut too.

  Args:
    folder: complete but for the manifest.
    manifest: its `files` are not looked at.
  """
  for parent, _, files in os.walk(folder, topdown=False):  # orbax syncs arrays, and none of the small files beside them
    for name in files:
      sync_file(Path(parent) / name)
    sync_folder(Path(parent))
  sync_folder(folder.parent)
  content = {"format": MANIFEST_FORMAT, **dataclasses.asdict(manifest), "files": digest_files(folder)}
  write_json(folder / MANIFEST_FILE, content | {"sha256": _digest_json(content)})


def _digest_json(value: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_files(folder: Path) -> dict[str, dict[str, Any]]:
  """The size and SHA-256 of every file below a folder but the manifest, by name; two cores' worth at a time."""
  files = {name: path for name, path in walk_files(folder) if name != MANIFEST_FILE and not is_hidden(name)}
  with ThreadPoolExecutor(2) as pool:  # hashing lets other threads run
    return dict(zip(files, pool.map(_digest_file, files.values()), strict=True))


def remove_step(folder: Path) -> None:
  """Deletes a step, its manifest first; of what is no folder, or a link, the name alone."""
  if folder.is_symlink() or not folder.is_dir():
    folder.unlink(missing_ok=True)
    return
  (folder / MANIFEST_FILE).unlink(missing_ok=True)
  shutil.rmtree(folder)


class Sweep(NamedTuple):
  """What the next writer does with steps that have no manifest.

  Attributes:
    remove: deleted: what killed writers left.
    aside: renamed, because no step has a manifest: it may be all that is left of a run.
  """

  remove: list[Path]
  aside: list[Path]


def plan_sweep(workdir: Path) -> Sweep:
  """Finds the steps without a manifest.

  Raises:
    UserError: if none of several has one: a writer leaves one such at most, so they were lost otherwise; or if
      `checkpoints` is no folder.
  """
  folder = checkpoints_dir(workdir)
  steps = list_steps(workdir)
  if os.path.lexists(folder) and not folder.is_dir():
    raise UserError(f"{folder} is no folder. Remove it, or choose another --workdir")
  names = [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []
  partial = [name for name in names if PARTIAL.fullmatch(name) and name not in map(str, steps)]
  complete = [name for name in partial if STEP.fullmatch(name)]
  if not steps and len(complete) > 1:
    raise UserError(
      f"none of the checkpoints in {folder} has its {MANIFEST_FILE}. Put them back, or start over with --fresh"
    )
  aside = [] if steps else complete
  return Sweep([folder / name for name in partial if name not in aside], [folder / name for name in aside])


def sweep(workdir: Path) -> Sweep:
  """Does what `plan_sweep` finds, and raises as it does; to be called by the only writer. Returns what was done.

  `aside` then has the new names.
  """
  planned = plan_sweep(workdir)
  for path in planned.remove:
    remove_step(path)
  return Sweep(planned.remove, [set_checkpoint_aside(workdir, int(path.name)) for path in planned.aside])


def set_checkpoint_aside(workdir: Path, step: int) -> Path:
  """Renames a damaged step so that it exists no more and is still there for a person; returns its new name."""
  folder = checkpoints_dir(workdir) / str(step)
  number = 1
  while os.path.lexists(aside := folder.with_name(f"{step}.damaged{f'-{number}' if number > 1 else ''}")):
    number += 1
  folder.rename(aside)
  return aside


def retain(workdir: Path, keep_latest: int, keep_best: int) -> None:
  """Deletes all steps but the newest and those of the lowest held-out loss; one whose manifest is unreadable stays.

  Args:
    workdir: a run folder.
    keep_latest: at least 1.
    keep_best: of the steps that say their held-out loss; of equal ones the newer is better.
  """
  steps = list_steps(workdir)
  losses = {step: _read_loss(checkpoints_dir(workdir) / str(step)) for step in steps}
  kept = set(steps[-keep_latest:]) | {step for step in steps if losses[step] == UNREADABLE}
  known = [step for step in steps if losses[step] not in (None, UNREADABLE)]
  kept |= set(sorted(known, key=lambda step: (losses[step], -step))[:keep_best])
  for step in steps:
    if step not in kept:
      remove_step(checkpoints_dir(workdir) / str(step))


def _read_loss(folder: Path) -> float | None:
  """A step's held-out loss; None where it says none, `UNREADABLE` where nobody knows: it may be the best."""
  try:
    loss = read_manifest(folder).heldout_loss
  except UserError:
    return UNREADABLE
  return loss if loss is not None and math.isfinite(loss) else None


# --- Reading ---


def read_manifest(folder: Path) -> Manifest:
  """Reads a step's manifest.

  Raises:
    UserError: naming the file, if it is absent, of another format or not a manifest of this step.
  """
  path = folder / MANIFEST_FILE
  value = read_run_json(path)
  if not isinstance(value, dict) or value.get("format") != MANIFEST_FORMAT:
    got = value.get("format") if isinstance(value, dict) else None
    raise UserError(f"{path} has format {show(got)}; this jgpt reads format {MANIFEST_FORMAT}.")
  try:
    digest = _digest_json({name: field for name, field in value.items() if name != "sha256"})
  except (ValueError, RecursionError):  # a surrogate without its other half; lists in lists in lists
    digest = None
  if digest is None or value.get("sha256") != digest:
    raise UserError(f"{path} has changed: its SHA-256 is not the one it says.")
  fields = {field.name: value.get(field.name) for field in dataclasses.fields(Manifest)}
  sound = (
    type(fields["step"]) is int
    and type(fields["heldout_loss"]) in (float, type(None))
    and isinstance(fields["data"], dict)
    and all(_is_table(fields[name], keys) for name, keys in _TABLES.items())
  )
  if not sound:
    raise UserError(f"{path} is not a manifest: a field is missing or of the wrong type.")
  if re.fullmatch("[0-9]+", folder.name) and str(fields["step"]) != folder.name:
    raise UserError(f"{path} is the manifest of step {show(fields['step'])}.")
  return Manifest(**fields)


_TABLES = {"leaves": {"dtype": str, "shape": list, "digest": str}, "files": {"bytes": int, "sha256": str}}


def _is_table(value: Any, keys: dict[str, type]) -> bool:
  """Whether a value is an object of objects with such fields."""
  return isinstance(value, dict) and all(
    isinstance(row, dict) and all(_is_of(kind, row.get(key)) for key, kind in keys.items()) for row in value.values()
  )


def _is_of(kind: type, value: Any) -> bool:
  """Whether a value is of a type; a whole number must be a file's size."""
  return type(value) is kind and (kind is not int or 0 <= value < 2**63)


def find_damage(folder: Path, items: Sequence[str] = ITEMS) -> str | None:
  """Compares a step's files with its manifest.

  Args:
    folder: the step's.
    items: folders of arrays to look into; the others are left unread.

  Returns:
    What is wrong with which file, in words; None where nothing is. Files that begin with a dot do not count.

  Raises:
    OSError: if a file cannot be read for a reason that is not its own.
  """
  try:
    manifest = read_manifest(folder)
    there = {name: path for name, path in walk_files(folder, items) if name != MANIFEST_FILE}
  except UserError as error:
    if may_pass(error):
      raise OSError(error.errno, os.strerror(error.errno), str(folder / MANIFEST_FILE)) from None
    return str(error)
  except (FileNotFoundError, NotADirectoryError) as error:
    return f"{error.filename}: {error.strerror}"
  wanted = {name: file for name, file in manifest.files.items() if name.split("/")[0] not in set(ITEMS) - set(items)}
  for name in sorted(wanted.keys() | there.keys()):
    if name not in there:
      return f"{folder / MANIFEST_FILE} lists a file that is not there: {name[:200]!r}"
    if name not in wanted and not is_hidden(name):
      return f"{there[name]} is not in the manifest"
  try:
    for name in wanted:  # first what costs nothing
      if (size := there[name].stat().st_size) != wanted[name]["bytes"]:
        return f"{there[name]} has {size:,} bytes instead of {wanted[name]['bytes']:,}"
    with ThreadPoolExecutor(2) as pool:
      for name, found in zip(wanted, pool.map(_digest_file, [there[name] for name in wanted]), strict=True):
        if found["sha256"] != wanted[name]["sha256"]:
          return f"{there[name]} has changed: its SHA-256 is not the manifest's"
  except OSError as error:
    if may_pass(error):
      raise
    return f"{error.filename}: {error.strerror}"
  return None


def is_hidden(name: str) -> bool:
  """Whether a file, or a folder that it is in, begins with a dot: what file managers leave is not ours, and no damage."""
  return any(part.startswith(".") for part in name.split("/"))


def walk_files(folder: Path, items: Sequence[str] = ITEMS) -> Iterator[tuple[str, Path]]:
  """Yields the plain files below a step's folder, as name and path; of the folders of arrays those in `items` only.

  Raises:
    UserError: at anything that is neither a plain file nor a folder, such as a link.
  """
  for parent, folders, files in os.walk(folder, onerror=_raise):
    inside = Path(parent).relative_to(folder)
    if inside == Path():
      folders[:] = [name for name in folders if name not in set(ITEMS) - set(items)]
    for name in [*folders, *files]:
      path = Path(parent) / name
      if path.is_symlink() or not (path.is_dir() or path.is_file()):
        raise UserError(f"{path} is neither a plain file nor a folder, and a checkpoint holds nothing else.")
    yield from (((inside / name).as_posix(), Path(parent) / name) for name in sorted(files))


def _raise(error: OSError) -> None:
  raise error


def _digest_file(path: Path) -> dict[str, Any]:
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": file.tell(), "sha256": digest}
