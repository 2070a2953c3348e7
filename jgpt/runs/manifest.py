"""The files of a checkpoint: its manifest, which checkpoints exist, damage, and deletion.

checkpoints/<step>/ in a run folder holds the state after `step` updates:

    params/            the parameters by name, as `init_params` returns them, layers stacked; all
                       that sampling needs
    train_state/       step and the optimizer's state (opt_state/adam/mu/..., nu/...), named as the
                       parameters are
    experiment.json    copy of the run folder's: settings, location and SHA-256 of the text
    tokenizer.json     copy of the run folder's
    manifest.json      described below

Both folders of arrays are written by orbax: an OCDBT database of zarr arrays. Without jgpt and
orbax, TensorStore reads one as `{"driver": "zarr", "kvstore": {"driver": "ocdbt", "base":
"file:///.../params/", "path": "blocks.w_up/"}}`. There the parts of a name are joined by dots, and
everywhere else by "/".

manifest.json:

    format        1, the version of this description; a reader raises for any other
    step          updates so far, applied or skipped; the folder's name
    data          kind, location and sha256 of the text; sequences and tokens: how many were trained
                  on, repetitions counted. The batch of a step is a function of seed and step
                  (`batches.py`), so there is no other position in the data to save
    heldout_loss  nats per token, null where it was not evaluated at this step
    heldout_tokens, heldout_batches
                  the predictions that heldout_loss is over, and the batches if they are a sample of
                  the held-out part, else null. Losses that differ in them are not compared. Absent
                  from older manifests, as are data's tokens; their sequences count the short last
                  batches of epochs as whole ones
    leaves        name -> dtype, shape and digest (`digest.py`), for each array of both folders
    files         name -> bytes and sha256, for each other file below the step's folder, except
                  those that begin with a dot
    sha256        of the other fields, as JSON with sorted keys, no spaces, and non-ASCII characters
                  escaped (u00e9)

A checkpoint exists if and only if its folder contains a manifest, which is written last: the arrays
are written to a temporary folder, by each process of a run its part; when all are done, one process
joins the parts, renames the folder to <step>, writes the JSON files, syncs everything to disk, and
writes the manifest under a temporary name and renames it. A checkpoint is deleted manifest first.
What a killed process leaves has no manifest; it is never read, and the next writer deletes it.

No link is followed, and no path from a manifest is opened. Imports no jax; arrays are saved and
restored in `checkpoint.py`.
"""

from __future__ import annotations

import contextlib
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
from jgpt.system.files import is_temporary, sync_file, sync_folder, write_json

MANIFEST_FORMAT = 1
MANIFEST_FILE = "manifest.json"
ITEMS = ("params", "train_state")
STEP = re.compile("0|[1-9][0-9]{0,9}")
PARTIAL_SUFFIX = ".orbax-checkpoint-tmp"  # of a step's folder while its arrays are written
PARTIAL = re.compile(rf"({STEP.pattern})({re.escape(PARTIAL_SUFFIX)}.*)?")


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The fields of manifest.json but its format and digest.

  Attributes:
    step: updates so far, applied or skipped.
    data: kind, location and sha256 of the text; sequences and tokens trained on.
    heldout_loss: nats per token; None where it was not evaluated at this step.
    leaves: name -> dtype, shape, digest.
    files: name -> bytes, sha256.
    heldout_tokens: predictions that `heldout_loss` is over; None where unknown.
    heldout_batches: of a sample of the held-out part; None for all of it, or unknown.
  """

  step: int
  data: dict[str, Any]
  heldout_loss: float | None
  leaves: dict[str, dict[str, Any]]
  files: dict[str, dict[str, Any]]
  heldout_tokens: int | None = None
  heldout_batches: int | None = None

  @property
  def is_rated(self) -> bool:
    """Returns whether there is a held-out loss that is a number."""
    return self.heldout_loss is not None and math.isfinite(self.heldout_loss)

  @property
  def targets(self) -> tuple[int | None, int | None]:
    """Returns what says which predictions the held-out loss is over, within one run."""
    return self.heldout_tokens, self.heldout_batches


def checkpoints_dir(workdir: Path) -> Path:
  """Returns the folder of a run's checkpoints.

  Raises:
    UserError: if it is a symbolic link.
  """
  folder = workdir / "checkpoints"
  check_no_link(folder)
  return folder


def list_steps(workdir: Path) -> list[int]:
  """Lists the steps of a run's checkpoints, ascending.

  Raises:
    UserError: if `checkpoints` is a symbolic link.
  """
  folder = checkpoints_dir(workdir)
  if not os.path.isdir(folder):
    return []
  names: list[str] = []
  while True:
    before = names
    names = [
      e.name
      for e in os.scandir(folder)
      if STEP.fullmatch(e.name) and e.is_dir(follow_symlinks=False)
    ]
    steps = sorted(int(name) for name in names if _exists(folder / name / MANIFEST_FILE))
    # If all of them were deleted between scanning and looking, there is a newer one: scan again.
    if steps or names == before:
      return steps


def _exists(path: Path) -> bool:
  """Returns whether there is a file or folder, without following a link.

  Raises:
    OSError: if the system does not say, as in a folder without permission.
  """
  try:
    path.lstat()
  except (FileNotFoundError, NotADirectoryError):
    return False
  return True


def find_step(workdir: Path, step: int | None) -> int:
  """Returns a step that has a checkpoint: the given one, or the newest for None.

  Raises:
    UserError: if there is no such checkpoint, or none at all.
  """
  steps = list_steps(workdir)
  if not steps:
    raise UserError(f"{workdir} has no checkpoint yet.")
  if step is not None and step not in steps:
    raise UserError(
      f"{workdir} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}."
    )
  return steps[-1] if step is None else step


# --- Writing and deleting ---


def write_manifest(folder: Path, manifest: Manifest) -> None:
  """Writes a step's manifest, with its files as they are now.

  From then on the checkpoint exists, also after a power cut.

  Args:
    folder: complete except for the manifest.
    manifest: its `files` are ignored.
  """
  # Orbax syncs arrays, but not the small files beside them.
  for parent, _, files in os.walk(folder, topdown=False):
    for name in files:
      sync_file(Path(parent) / name)
    sync_folder(Path(parent))
  sync_folder(folder.parent)
  content = {
    "format": MANIFEST_FORMAT,
    **dataclasses.asdict(manifest),
    "files": digest_files(folder),
  }
  write_json(folder / MANIFEST_FILE, content | {"sha256": _digest_json(content)})


def _digest_json(value: dict[str, Any]) -> str:
  return hashlib.sha256(
    json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
  ).hexdigest()


def digest_files(folder: Path) -> dict[str, dict[str, Any]]:
  """Computes the size and SHA-256 of every file below a folder except the manifest, by name."""
  files = {
    name: path for name, path in walk_files(folder) if name != MANIFEST_FILE and not is_hidden(name)
  }
  with ThreadPoolExecutor(2) as pool:  # hashing releases Python's lock
    return dict(zip(files, pool.map(_digest_file, files.values()), strict=True))


def remove_step(folder: Path) -> None:
  """Deletes a step's folder, its manifest first; a link or a file is unlinked."""
  if folder.is_symlink() or not folder.is_dir():
    folder.unlink(missing_ok=True)
    return
  (folder / MANIFEST_FILE).unlink(missing_ok=True)
  shutil.rmtree(folder)


class Leftovers(NamedTuple):
  """Steps' folders without a manifest, as the next writer treats them.

  Attributes:
    remove: to be deleted: killed writers left them.
    aside: to be renamed: no step has a manifest, so it may be all that is left of a run.
  """

  remove: list[Path]
  aside: list[Path]


def find_leftovers(workdir: Path) -> Leftovers:
  """Finds the steps' folders without a manifest.

  Raises:
    UserError: if there are several and no step has a manifest (a killed writer leaves at most one,
      so the manifests were lost in another way), or if `checkpoints` is not a folder.
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
      f"none of the checkpoints in {folder} has its {MANIFEST_FILE}. Put them back, choose another "
      "--workdir, or start over with --fresh"
    )
  aside = [] if steps else complete
  return Leftovers(
    [folder / name for name in partial if name not in aside], [folder / name for name in aside]
  )


def clear_leftovers(workdir: Path) -> Leftovers:
  """Deletes and renames what `find_leftovers` finds; must be called by the only writer.

  Returns:
    What was done; `aside` has the new names.

  Raises:
    UserError: as `find_leftovers` does.
  """
  found = find_leftovers(workdir)
  for path in found.remove:
    remove_step(path)
  return Leftovers(
    found.remove, [set_checkpoint_aside(workdir, int(path.name)) for path in found.aside]
  )


def set_checkpoint_aside(workdir: Path, step: int) -> Path:
  """Renames a damaged step's folder, so that it is no longer a checkpoint, and keeps its files.

  Returns:
    The new path.
  """
  folder = checkpoints_dir(workdir) / str(step)
  number = 1
  while os.path.lexists(
    aside := folder.with_name(f"{step}.damaged{f'-{number}' if number > 1 else ''}")
  ):
    number += 1
  folder.rename(aside)
  return aside


def delete_old_steps(workdir: Path, keep_latest: int, keep_best: int) -> None:
  """Deletes all checkpoints but the newest and those of the lowest held-out loss.

  Those with an unreadable manifest are kept. Losses over different targets are not compared: of
  each kind the best are kept.

  Args:
    workdir: a run folder.
    keep_latest: at least 1.
    keep_best: counts only steps with a held-out loss; of equal losses the newer step is better.
  """
  steps = list_steps(workdir)
  manifests = read_manifests(workdir)
  kept = set(steps[-keep_latest:]) | set(steps) - manifests.keys()
  rated = [found for found in manifests.values() if found.is_rated]
  for targets in {found.targets for found in rated}:
    alike = [found for found in rated if found.targets == targets]
    alike.sort(key=lambda found: (found.heldout_loss, -found.step))
    kept |= {found.step for found in alike[:keep_best]}
  for step in steps:
    if step not in kept:
      remove_step(checkpoints_dir(workdir) / str(step))


# --- Reading ---


def read_manifests(workdir: Path) -> dict[int, Manifest]:
  """Reads the manifests of a run's checkpoints, by step; leaves out those that cannot be read."""
  found = {}
  for step in list_steps(workdir):
    with contextlib.suppress(UserError):
      found[step] = read_manifest(checkpoints_dir(workdir) / str(step))
  return found


def read_manifest(folder: Path) -> Manifest:
  """Reads a step's manifest.

  Raises:
    UserError: if it is absent, of another format, changed, or not a manifest of this step; names
      the file.
  """
  path = folder / MANIFEST_FILE
  value = read_run_json(path)
  if not isinstance(value, dict) or value.get("format") != MANIFEST_FORMAT:
    got = value.get("format") if isinstance(value, dict) else None
    raise UserError(f"{path} has format {show(got)}; this jgpt reads format {MANIFEST_FORMAT}.")
  try:
    digest = _digest_json({name: field for name, field in value.items() if name != "sha256"})
  except (ValueError, RecursionError):  # a lone surrogate; lists nested too deep
    digest = None
  if digest is None or value.get("sha256") != digest:
    raise UserError(f"{path} has changed: its SHA-256 is not the one it says.")
  fields = {field.name: value.get(field.name) for field in dataclasses.fields(Manifest)}
  sound = (
    type(fields["step"]) is int
    and type(fields["heldout_loss"]) in (float, type(None))
    and all(type(fields[f"heldout_{n}"]) in (int, type(None)) for n in ("tokens", "batches"))
    and isinstance(fields["data"], dict)
    and all(_is_table(fields[name], columns) for name, columns in _TABLES.items())
  )
  if not sound:
    raise UserError(f"{path} is not a manifest: a field is missing or of the wrong type.")
  if re.fullmatch("[0-9]+", folder.name) and str(fields["step"]) != folder.name:
    raise UserError(f"{path} is the manifest of step {show(fields['step'])}.")
  return Manifest(**fields)


_TABLES = {
  "leaves": {"dtype": str, "shape": list, "digest": str},
  "files": {"bytes": int, "sha256": str},
}


def _is_table(value: Any, columns: dict[str, type]) -> bool:
  """Returns whether a value is an object of objects that have fields of these types."""
  return isinstance(value, dict) and all(
    isinstance(row, dict) and all(_has_type(row.get(name), kind) for name, kind in columns.items())
    for row in value.values()
  )


def _has_type(value: Any, kind: type) -> bool:
  """Returns whether a value is of a type; an int must also be a possible size of a file."""
  return type(value) is kind and (kind is not int or 0 <= value < 2**63)


def find_damage(folder: Path, items: Sequence[str] = ITEMS) -> str | None:
  """Compares a step's files with its manifest.

  Args:
    folder: the step's.
    items: folders of arrays to read; others are skipped.

  Returns:
    What is wrong with which file, for a person; None where nothing is. Files that begin with a dot
    are ignored.

  Raises:
    OSError: if a file cannot be read for a reason that may pass, such as missing permission.
  """
  try:
    manifest = read_manifest(folder)
    there = {name: path for name, path in walk_files(folder, items) if name != MANIFEST_FILE}
  except UserError as error:
    if is_temporary(error):
      raise OSError(error.errno, os.strerror(error.errno), str(folder / MANIFEST_FILE)) from None
    return str(error)
  except (FileNotFoundError, NotADirectoryError) as error:
    return f"{error.filename}: {error.strerror}"
  wanted = {
    name: file
    for name, file in manifest.files.items()
    if name.split("/")[0] not in set(ITEMS) - set(items)
  }
  for name in sorted(wanted.keys() | there.keys()):
    if name not in there:
      return f"{folder / MANIFEST_FILE} lists a file that is not there: {name[:200]!r}"
    if name not in wanted and not is_hidden(name):
      return f"{there[name]} is not in the manifest"
  try:
    for name in wanted:  # sizes first: they cost nothing
      if (size := there[name].stat().st_size) != wanted[name]["bytes"]:
        return f"{there[name]} has {size:,} bytes instead of {wanted[name]['bytes']:,}"
    with ThreadPoolExecutor(2) as pool:
      digests = pool.map(_digest_file, [there[name] for name in wanted])
      for name, found in zip(wanted, digests, strict=True):
        if found["sha256"] != wanted[name]["sha256"]:
          return f"{there[name]} has changed: its SHA-256 is not the manifest's"
  except OSError as error:
    if is_temporary(error):
      raise
    return f"{error.filename}: {error.strerror}"
  return None


def is_hidden(name: str) -> bool:
  """Returns whether a file or a folder above it begins with a dot, as file managers' files do.

  Args:
    name: relative to the step's folder.
  """
  return any(part.startswith(".") for part in name.split("/"))


def walk_files(folder: Path, items: Sequence[str] = ITEMS) -> Iterator[tuple[str, Path]]:
  """Yields the plain files below a step's folder, as name and path.

  Args:
    folder: the step's.
    items: folders of arrays to enter; others are skipped.

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
        raise UserError(
          f"{path} is neither a plain file nor a folder, and a checkpoint holds nothing else."
        )
    yield from (((inside / name).as_posix(), Path(parent) / name) for name in sorted(files))


def _raise(error: OSError) -> None:
  raise error


def _digest_file(path: Path) -> dict[str, Any]:
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": file.tell(), "sha256": digest}
