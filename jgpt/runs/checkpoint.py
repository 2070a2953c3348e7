"""Checkpoints: saving a state in the background, and restoring it with its digests verified.

Only this file uses orbax. The files of a checkpoint, and when one exists, are described in
`manifest.py`; digests of arrays are in `digest.py`.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jgpt.batches import Seen
from jgpt.errors import TrainingError, UserError, first_line
from jgpt.evaluation import HeldoutLoss
from jgpt.runs import manifest
from jgpt.runs.digest import format_digest, name_leaves, survey_leaves
from jgpt.runs.folder import check_no_link, make_subfolder, read_file, read_run_json
from jgpt.runs.manifest import Manifest, list_steps
from jgpt.sharding import stack_blocks
from jgpt.step import TrainState
from jgpt.system.files import write_file
from jgpt.system.memory import measure_memory
from jgpt.system.signals import print_stderr

COPIES = ("experiment.json", "tokenizer.json")  # of the run folder's files, in each checkpoint
survey_jit, stack_jit = jax.jit(survey_leaves), jax.jit(stack_blocks)

# --- Writing ---


class StepNote(NamedTuple):
  """What a manifest says about a step besides its arrays.

  Attributes:
    step: updates so far.
    seen: what the run was trained on so far; None where nobody counted.
    heldout: the held-out loss at this step; None where it was not evaluated.
  """

  step: int
  seen: Seen | None = None
  heldout: HeldoutLoss | None = None


class Manager:
  """A run's checkpoints, open for writing; from `open_checkpoints`.

  A thread completes each save: it waits for orbax, writes the manifest and deletes old checkpoints.

  Attributes:
    folder: of the run's checkpoints.
  """

  def __init__(self, workdir: Path, keep_latest: int, keep_best: int):
    self.folder = make_subfolder(workdir, "checkpoints").resolve()
    self._workdir, self._keep = workdir, (keep_latest, keep_best)
    self._copies = {name: read_file(workdir / name) for name in COPIES}
    self._data = read_run_json(workdir / "experiment.json")["data"]
    # With asynchronous folders orbax waits for ever where it cannot make one.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    self._arrays = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
    self._thread = ThreadPoolExecutor(1, thread_name_prefix="jgpt-save")
    self._saves: list[Future] = []  # that `wait` waits for

  def begin_save(
    self, note: StepNote, items: dict[str, Any], leaves: dict[str, Any], *, is_held: bool
  ) -> None:
    """Starts to save arrays once the saves before are done; returns when they may be donated.

    Args:
      note: see `save_checkpoint`.
      items: trees of arrays, by the name of their folder.
      leaves: of `items`, from `survey_leaves`.
      is_held: the arrays are never donated, and so this returns at once; the saves before need not
        have been waited for.
    """
    copied = threading.Event()
    save = self._thread.submit(self._save, note, items, leaves, copied)
    self._saves = [*self._saves, save] if is_held else [save]
    if not is_held:
      copied.wait()

  def wait(self) -> None:
    """Waits until every save is on disk.

    Raises:
      TrainingError: if one since the last call could not be written.
    """
    saves = self._saves
    try:
      for save in saves:  # two threads may wait: the loop, and the one that ends the process
        save.result()
    except Exception as error:  # orbax and TensorStore have no base class for their errors
      raise TrainingError(self.describe_failure(error)) from error

  def describe_failure(self, error: BaseException) -> str:
    """Describes a failed save, and which checkpoint is the last one now."""
    return (
      f"a checkpoint could not be written to {self.folder}: {_shorten(error)}. "
      f"{_describe_last(self._workdir)}"
    )

  def close(self) -> None:
    """Waits for the save in progress and ends the thread."""
    self._thread.shutdown()
    with contextlib.suppress(Exception):  # of the last save, which `wait` raised
      self._arrays.close()

  def _save(
    self,
    note: StepNote,
    items: dict[str, Any],
    leaves: dict[str, Any],
    copied: threading.Event,
  ) -> None:
    """Saves one checkpoint, in the thread; sets `copied` when the arrays may be donated."""
    folder = self.folder / str(note.step)
    try:
      described = {
        name: {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
        for name, leaf in name_leaves(items).items()
      }
      if os.path.lexists(folder):
        manifest.remove_step(folder)  # left by a save that failed
      args = ocp.args.Composite(
        **{name: ocp.args.StandardSave(item) for name, item in items.items()}
      )
      self._arrays.save(folder, args=args)  # returns when the arrays are copied
    finally:
      copied.set()
    for name, (sums, _) in leaves.items():
      described[name]["digest"] = format_digest(sums)
    self._arrays.wait_until_finished()
    for name, content in self._copies.items():
      write_file(folder / name, content)
    counts = {} if note.seen is None else note.seen._asdict()
    loss, tokens, batches = note.heldout or (None, None, None)
    data = {**self._data, **counts}
    manifest.write_manifest(folder, Manifest(note.step, data, loss, described, {}, tokens, batches))
    try:
      manifest.delete_old_steps(self._workdir, *self._keep)
    # Some systems delete no file that another process has open. The new checkpoint is complete.
    except OSError as error:
      print_stderr(
        f"WARNING: an old checkpoint could not be deleted: {error.filename}: {error.strerror}"
      )


@contextlib.contextmanager
def open_checkpoints(
  workdir: Path, *, keep_latest: int = 2, keep_best: int = 0
) -> Iterator[Manager]:
  """Opens a run's checkpoints for writing, and deletes what killed writers left.

  Leaving the context waits until the last save is on disk.

  Args:
    workdir: a run folder with its files, locked by this process (`system/locks.py`).
    keep_latest: see `manifest.delete_old_steps`.
    keep_best: see `manifest.delete_old_steps`.
  """
  newest = max(list_steps(workdir), default=None)
  removed, aside = manifest.clear_leftovers(workdir)
  for folder in removed:
    if folder.name.isdigit() and newest is not None and int(folder.name) > newest:
      print_stderr(
        f"{folder} had no {manifest.MANIFEST_FILE}, as a save leaves it that is cut short: it was "
        "removed"
      )
  for kept in aside:
    print_stderr(
      f"WARNING: no checkpoint is complete; one without its manifest is kept as {kept}, and "
      "training begins anew"
    )
  manager = Manager(workdir, keep_latest, keep_best)
  try:
    yield manager
    manager.wait()
  except TrainingError:  # of a save, or raised after the last save was waited for
    raise
  except BaseException:
    try:
      manager.wait()
    except TrainingError as failed:
      print_stderr(f"error: {failed}")
    raise
  finally:
    manager.close()


def lower_save(shapes: TrainState) -> jax.stages.Lowered:
  """Traces the program with which `save_checkpoint` computes digests.

  Args:
    shapes: of the state, with shardings; blocks stacked.
  """
  return survey_jit.lower(_to_items(shapes))


def save_checkpoint(
  manager: Manager, state: TrainState, note: StepNote | None = None, *, is_held: bool = False
) -> None:
  """Starts to save a state under its step; does nothing where that step is saved already.

  Returns as soon as the state may be donated.

  Args:
    manager: from `open_checkpoints`.
    state: blocks stacked or a list; on disk they are always stacked.
    note: of the state's step; None says nothing but the step.
    is_held: nobody donates the state; it is saved after the saves in progress, and this waits for
      none of them.

  Raises:
    TrainingError: if an entry of the state is not finite (such a state is never saved), or if the
      save before this one failed.
  """
  note = note or StepNote(int(jax.device_get(state.step)))
  if isinstance(state.params["blocks"], list):
    state = stack_jit(state)
  try:
    if not is_held:
      manager.wait()
  except TrainingError as error:  # this save may succeed; the earlier error is raised
    _begin_save(manager, state, note, is_held)
    with contextlib.suppress(TrainingError):
      manager.wait()
    raise TrainingError(manager.describe_failure(error.__cause__)) from error.__cause__
  _begin_save(manager, state, note, is_held)


def _begin_save(manager: Manager, state: TrainState, note: StepNote, is_held: bool) -> None:
  """Starts to save a state whose step has no checkpoint, and checks that it is finite.

  Raises:
    TrainingError: if it is not.
  """
  if note.step in list_steps(manager.folder.parent):
    return
  items = _to_items(state)
  leaves = jax.device_get(survey_jit(items))
  bad = [name for name, (_, is_finite) in leaves.items() if not is_finite]
  if bad:
    raise TrainingError(
      f"after step {note.step} {bad[0]} is not finite ({len(bad)} of {len(leaves)} arrays are "
      f"not): that is not saved. {_describe_last(manager.folder.parent)}. "
      "Try a lower optimizer.peak_lr"
    )
  manager.begin_save(note, items, leaves, is_held=is_held)


def _describe_last(workdir: Path) -> str:
  steps = list_steps(workdir)
  return f"The last checkpoint is of step {steps[-1]}" if steps else "There is no checkpoint yet"


def _to_items(state: TrainState) -> dict[str, Any]:
  """Divides a state into the two folders of a checkpoint."""
  return {"params": state.params, "train_state": {"step": state.step, "opt_state": state.opt_state}}


# --- Reading ---


def restore(folder: Path, shapes: TrainState) -> TrainState:
  """Restores a state and checks each leaf's digest.

  Args:
    folder: of the step; its files were compared with the manifest (`manifest.find_damage`).
    shapes: the state's shapes, dtypes and shardings (`jax.ShapeDtypeStruct`s), blocks stacked.

  Raises:
    UserError: if the files are damaged or hold something else.
  """
  items = restore_items(folder, _to_items(shapes))
  if (step := int(jax.device_get(items["train_state"]["step"]))) != int(folder.name):
    raise UserError(f"{folder} holds the state of step {step}")
  return TrainState(
    step=items["train_state"]["step"],
    params=items["params"],
    opt_state=items["train_state"]["opt_state"],
  )


def restore_items(folder: Path, targets: dict[str, Any]) -> dict[str, Any]:
  """Restores folders of arrays of a step, and checks each leaf's digest against the manifest.

  Args:
    folder: of the step; its files were compared with the manifest (`manifest.find_damage`).
    targets: shapes, dtypes and shardings, by the name of the folder: "params", "train_state".

  Raises:
    UserError: if a leaf has another shape, dtype or digest, which it names, or the files are
      damaged.
  """
  leaves = manifest.read_manifest(folder).leaves
  there = {
    name: f"{leaf['dtype']}{leaf['shape']}"
    for name, leaf in leaves.items()
    if name.split("/")[0] in targets
  }
  _check_same_leaves(folder, there, _describe_leaves(targets))
  _check_fits(folder, targets)
  for item in targets:
    check_no_link(folder / item)

  def read() -> dict[str, Any]:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
      args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
      return dict(reader.restore(folder.resolve(), args=ocp.args.Composite(**args)).items())

  with _explain_errors(folder):
    # Orbax casts another dtype silently, and leaves reads running where a shape differs.
    for item, target in targets.items():
      saved = ocp.StandardCheckpointHandler().metadata((folder / item).resolve()).tree
      _check_chunks(folder, saved)
      _check_same_leaves(folder, _describe_leaves(saved), _describe_leaves(target))
    restored = _call_in_thread(read)
  found = {name: format_digest(sums) for name, (sums, _) in survey_jit(restored).items()}
  for name, digest in found.items():
    if digest != leaves[name]["digest"]:
      raise UserError(
        f"{folder}: {name} is not what was saved: its digest is {digest} instead of "
        f"{leaves[name]['digest'][:16]!r}"
      )
  return restored


def _describe_leaves(tree: Any) -> dict[str, str]:
  """Returns each leaf's dtype and shape by name, as in "float32[16, 64]"."""
  return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in name_leaves(tree).items()}


def _check_same_leaves(folder: Path, there: dict[str, str], wanted: dict[str, str]) -> None:
  """Checks that a checkpoint has the leaves that its settings ask for.

  Raises:
    UserError: naming the first leaf that differs.
  """
  for name in sorted(there.keys() | wanted.keys()):
    if there.get(name) != wanted.get(name):
      got, need = there.get(name, "nothing"), wanted.get(name, "nothing")
      raise UserError(
        f"cannot read the checkpoint {folder}: {name} is {got[:200]} there, and {need} by the "
        "run's experiment.json."
      )


def _check_chunks(folder: Path, saved: Any) -> None:
  """Checks that no chunk of an array would unpack to more than the whole array.

  Raises:
    UserError: naming the array.
  """
  for name, leaf in name_leaves(saved).items():
    chunk = getattr(leaf.storage, "chunk_shape", None) or ()
    if math.prod(chunk) > max(1, math.prod(leaf.shape)):
      raise UserError(
        f"{folder}: {name} has parts of shape {list(chunk)}, and is of shape {list(leaf.shape)}."
      )


def _check_fits(folder: Path, targets: dict[str, Any]) -> None:
  """Checks that arrays fit this machine's memory, because small files can claim large arrays.

  Raises:
    UserError: if they do not.
  """

  def count_host_bytes(x: jax.ShapeDtypeStruct) -> int:
    """Counts a leaf's bytes in the host's memory: on the CPU every replica is there."""
    devices = x.sharding.addressable_devices
    replicas = len(devices) if next(iter(devices)).platform == "cpu" else 1
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize * replicas

  need = sum(count_host_bytes(x) for x in jax.tree.leaves(targets))
  memory = measure_memory()[0]
  if memory is not None and need > memory:
    raise UserError(
      f"{folder} needs {need / 1e9:,.1f} GB of memory by its experiment.json; this machine has "
      f"{memory / 1e9:,.1f} GB."
    )


def _call_in_thread(function: Callable[[], Any]) -> Any:
  """Calls a function in a thread, because orbax's event loop takes the main thread's signals."""
  with ThreadPoolExecutor(1) as pool:
    return pool.submit(function).result()


@contextlib.contextmanager
def _explain_errors(folder: Path) -> Iterator[None]:
  """Turns orbax's errors about damaged or foreign files into one line that names the folder."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # orbax raises any kind of error for files that somebody changed
    raise UserError(f"cannot read the checkpoint {folder}: {_shorten(error)}") from error


def _shorten(error: BaseException) -> str:
  """Returns the first line of an error, cut in the middle.

  TensorStore's begin with a path and end with the reason.
  """
  line = first_line(error)
  return line if len(line) <= 300 else f"{line[:100]} ... {line[-190:]}"
