"""Checks of a run folder: its settings, its tokenizer, and the files and arrays of checkpoints.

Nothing in the folder is changed, no link is followed and no number is trusted. `runs/manifest.py`
and `runs/checkpoint.py` define what a sound checkpoint is. The log, and what resuming needs
besides, are checked in `continuation.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax

from jgpt.devices import runtime
from jgpt.doctor import continuation
from jgpt.doctor.findings import (
  Finding,
  format_bytes,
  from_error,
  note,
  ok,
  problem,
  run_check,
)
from jgpt.errors import UserError
from jgpt.keys import INIT, derive_key
from jgpt.params import count_params
from jgpt.runs import checkpoint, manifest
from jgpt.runs.folder import RunFiles, read_run_files
from jgpt.runs.health import find_nonfinite
from jgpt.runs.resume import find_contradiction
from jgpt.step import TrainState, init_state
from jgpt.system import locks
from jgpt.system.memory import measure_memory
from jgpt.text.tokenizer import Tokenizer

MAX_TEXT = 100_000  # characters that are encoded
MAX_SHOWN_FINDINGS = 10  # of links and of leftovers


def examine_run(workdir: Path) -> Iterator[Finding]:
  """Examines a run folder, and yields findings as they are made.

  Nothing in it is changed. Paths in the findings are relative to the folder.

  Args:
    workdir: any folder.
  """
  for finding in _examine(workdir):
    yield dataclasses.replace(finding, text=finding.text.replace(f"{workdir}{os.sep}", ""))


def _examine(workdir: Path) -> Iterator[Finding]:
  held = locks.is_held(workdir)
  if held:
    holder = locks.describe_holder(workdir) or "another process"
    yield note(
      "writer",
      f"{holder} is writing to it: this is how it is at the moment, and checkpoints come and go",
    )
  yield from run_check("links", lambda: examine_links(workdir))
  try:
    files = read_run_files(workdir)
  except UserError as error:
    yield from _explain_unreadable(workdir, error)
    return
  count = count_params(files.experiment.model)
  yield ok("settings", f"{workdir}: {files.name or 'made from Python'}, {count:,} parameters")
  yield from run_check("tokenizer", lambda: examine_tokenizer(files.tokenizer))
  if not (workdir / "checkpoints").is_symlink():  # `examine_links` reports that
    yield from run_check("checkpoint", lambda: _examine_checkpoints(workdir, files, held))


def _examine_checkpoints(workdir: Path, files: RunFiles, held: bool) -> Iterator[Finding]:
  """Examines the checkpoints, the log, and whether the run can resume."""
  steps, sound = manifest.list_steps(workdir), []
  try:
    leftovers, blocked = manifest.find_leftovers(workdir), None
  except UserError as error:  # resuming would raise it too
    leftovers, blocked = manifest.Leftovers([], []), from_error("checkpoint", error)
  yield from run_check("leftovers", lambda: examine_leftovers(workdir, steps, leftovers, held))
  for step in steps:
    found = list(
      run_check("checkpoint", lambda step=step: examine_checkpoint(workdir, step, files))
    )
    if any(finding.level == "problem" for finding in found) and step not in manifest.list_steps(
      workdir
    ):
      continue  # a run that is training has deleted it meanwhile
    sound += [step] if all(finding.level != "problem" for finding in found) else []
    yield from found
  if blocked:
    yield blocked
  elif steps and not sound:
    yield problem(
      "checkpoint",
      "no checkpoint is sound",
      "put a backup in their place, or start over with --fresh",
    )
  elif not steps:
    yield note("checkpoint", "there is no checkpoint yet: the run begins anew")
  yield from run_check(
    "metrics",
    lambda: continuation.examine_metrics(workdir / "metrics.jsonl", steps[-1] if steps else 0),
  )
  if not blocked and (sound or not steps):
    size = continuation.estimate_state(files.experiment)
    yield from run_check(
      "going on", lambda: continuation.examine_resume(workdir, files, bool(steps))
    )
    yield from run_check(
      "room", lambda: continuation.examine_next_save(workdir, sound[-1] if sound else None, size)
    )


# --- Settings ---


def _explain_unreadable(workdir: Path, error: UserError) -> Iterator[Finding]:
  """Yields the problem that settings are not readable, with the checkpoint to copy them from."""
  what = str(error).partition(". ")[0].rstrip(".")
  steps = []
  with contextlib.suppress(OSError, UserError):  # not readable, or a link: nothing to copy from
    steps = manifest.list_steps(workdir)
  for step in reversed(steps):
    copies = workdir / "checkpoints" / str(step)
    try:
      read_run_files(copies)
    except UserError:
      continue
    names = " ".join(shlex.quote(str(copies / name)) for name in checkpoint.COPIES)
    yield problem("settings", what, f"cp {names} {shlex.quote(str(workdir))}/")
    return
  if os.path.lexists(workdir / "experiment.json"):
    yield problem("settings", what, "put a backup in its place, or start over with --fresh")
  else:
    yield problem("settings", what, "name the folder of a run, as python -m jgpt.run made it")


def examine_links(workdir: Path) -> list[Finding]:
  """Examines whether there are links in the folder, which jgpt never makes and never follows."""
  links = [
    entry.path
    for folder in (workdir, workdir / "checkpoints")
    for entry in _list_entries(folder)
    if entry.is_symlink()
  ]
  text = "is a symbolic link, which a run folder never holds and jgpt never follows"
  do = "put what it leads to in its place, if that is yours; otherwise rm"
  return [
    problem("links", f"{path} {text}", f"{do} {shlex.quote(path)}")
    for path in links[:MAX_SHOWN_FINDINGS]
  ]


def _list_entries(folder: Path) -> list[os.DirEntry]:
  """Returns a folder's entries, sorted; [] where it is a link or cannot be read."""
  if folder.name == "checkpoints" and folder.is_symlink():
    return []
  try:
    with os.scandir(folder) as entries:
      return sorted(entries, key=lambda entry: entry.name)
  except OSError:
    return []


def examine_tokenizer(tokenizer: Tokenizer) -> list[Finding]:
  """Examines whether decoding returns the text that was encoded."""
  text = b"".join(piece for piece in tokenizer.token_bytes if _is_text(piece)).decode()[:MAX_TEXT]
  try:
    ids = tokenizer.encode(text)
  except (UserError, ImportError) as error:
    return [note("tokenizer", f"{tokenizer.describe()}; not tried: {error}")]
  if tokenizer.decode(ids) != text or not all(0 <= i < tokenizer.vocab_size for i in ids):
    text = "its own characters are not the same after encoding and decoding"
    return [problem("tokenizer", text, "put a backup in its place")]
  return [ok("tokenizer", f"{tokenizer.describe()}; {len(ids):,} ids there and back")]


def _is_text(piece: bytes) -> bool:
  try:
    piece.decode()
  except UnicodeDecodeError:
    return False
  return True


# --- Checkpoints ---


def examine_leftovers(
  workdir: Path, steps: Sequence[int], leftovers: manifest.Leftovers, held: bool
) -> list[Finding]:
  """Examines what killed processes and damaged checkpoints have left in the folder.

  Args:
    workdir: a run folder.
    steps: of the checkpoints that have a manifest.
    leftovers: what the next run does with checkpoints that have none.
    held: whether a process is writing to the folder.
  """
  found = []
  known, aside = set(map(str, steps)), {path.name for path in leftovers.aside}
  removed = {path.name for path in leftovers.remove}
  for entry in _list_entries(workdir / "checkpoints")[: 10 * MAX_SHOWN_FINDINGS]:
    if entry.name in known or entry.is_symlink():
      continue
    quoted, is_partial = shlex.quote(entry.path), manifest.PARTIAL.fullmatch(entry.name) is not None
    if is_partial and entry.is_dir() and not os.access(entry.path, os.R_OK | os.X_OK):
      found.append(
        problem("leftovers", f"{entry.path}: Permission denied", f"chmod u+rwx {quoted}")
      )
    elif is_partial and held:
      found.append(note("leftovers", f"{entry.path} is being saved"))
    elif entry.name in aside:
      then = f"goes on from step {steps[-1]:,}" if steps else "begins anew"
      text = (
        f"{entry.path} has no {manifest.MANIFEST_FILE}: the next run keeps it under another name, "
        f"and {then}"
      )
      do = (
        f"if you have the {manifest.MANIFEST_FILE}, put it back; if nobody wants the checkpoint: "
        f"rm -r {quoted}"
      )
      found.append(problem("leftovers", text, do))
    elif entry.name in removed:
      broken_off = "its save was broken off, nothing reads it, and the next run removes it"
      found.append(note("leftovers", f"{entry.path} has no {manifest.MANIFEST_FILE}: {broken_off}"))
    elif is_partial:
      found.append(note("leftovers", f"{entry.path} has no {manifest.MANIFEST_FILE}"))
    elif ".damaged" in entry.name:
      text = f"{entry.path} was found damaged and set aside"
      found.append(note("leftovers", text, f"where nobody wants to look into it: rm -r {quoted}"))
    else:
      found.append(note("leftovers", f"{entry.path} is nothing that jgpt made"))
  for entry in _list_entries(workdir):
    if entry.name.startswith(".") and entry.name.endswith(".tmp") and not held:
      found.append(
        note(
          "leftovers",
          f"{entry.path} is of a process that was killed",
          f"rm {shlex.quote(entry.path)}",
        )
      )
  return sorted(found, key=lambda finding: finding.level != "problem")[:MAX_SHOWN_FINDINGS]


def examine_checkpoint(workdir: Path, step: int, files: RunFiles) -> list[Finding]:
  """Examines a checkpoint: sizes and SHA-256 of its files, its settings, and every array.

  Args:
    workdir: a run folder.
    step: of a checkpoint that has a manifest.
    files: of the run folder.
  """
  folder, name = workdir / "checkpoints" / str(step), f"step {step:,}"
  damage, quoted = manifest.find_damage(folder), shlex.quote(str(folder))
  do = (
    "a run that goes on sets it aside and takes an older one that is sound"
    if damage
    else "a run that goes on stops here"
  )
  try:
    described = None if damage else manifest.read_manifest(folder)
    wrong = described and find_contradiction(files, read_run_files(folder), described)
    need = continuation.estimate_state(files.experiment)
    available = measure_memory()[1]
    is_large = available is not None and need > available
    if not (damage or wrong or is_large):
      damage = _find_bad_array(restore_state(folder, files, runtime.devices()[0]))
  except UserError as error:
    damage = str(error)
  if damage:
    return [
      problem("checkpoint", f"{name}: {damage}", f"{do}; by hand: mv {quoted} {quoted}.damaged")
    ]
  if wrong:
    names = " ".join(shlex.quote(str(folder / copy)) for copy in checkpoint.COPIES)
    do = f"where the checkpoint is right: cp {names} {shlex.quote(str(workdir))}/"
    return [problem("checkpoint", f"{name}: it is of another run: {wrong}", do)]
  size = format_bytes(sum(file["bytes"] for file in described.files.values()))
  text = f"{name}: {len(described.files)} files, {size}"
  text += "" if described.heldout_loss is None else f", held-out loss {described.heldout_loss:.4f}"
  if is_large:
    there = f"they take {format_bytes(need)}, and {format_bytes(available)} are available"
    return [note("checkpoint", f"{text}; its arrays were not read: {there}")]
  return [ok("checkpoint", f"{text}; {len(described.leaves)} arrays, digests right, all finite")]


def _find_bad_array(state: TrainState) -> str | None:
  """Returns which arrays of a state are not finite, or None."""
  bad = find_nonfinite({"params": state.params, "opt_state": state.opt_state})
  return (
    f"{bad[0]} is not finite" + (f", nor are {len(bad) - 1} others" if bad[1:] else "")
    if bad
    else None
  )


def restore_state(folder: Path, files: RunFiles, device: jax.Device) -> TrainState:
  """Restores the state in a checkpoint on one device, as resuming does.

  Args:
    folder: of the checkpoint.
    files: of the run folder.
    device: to restore on.

  Raises:
    UserError: if the checkpoint is damaged.
  """
  key = derive_key(files.experiment.train.seed, INIT, 0)
  shapes = jax.eval_shape(partial(init_state, experiment=files.experiment), key)
  sharding = jax.sharding.SingleDeviceSharding(device)
  placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
  return checkpoint.restore(folder, placed)
