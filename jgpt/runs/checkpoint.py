"""Checkpoints: saving a state while training goes on, and reading back what is verified.

Responsible for arrays in a run folder: that a save costs the training loop no more than a copy, that what is read has the
digests it was saved with, and that damage is named and never read. Orbax is named in this file only. What files a
checkpoint has, and when it exists, is described in `manifest.py`. Not responsible for what is trained.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jgpt.errors import TrainingError, UserError, first_line
from jgpt.runs import manifest
from jgpt.runs.digest import format_digest, name_leaves, survey
from jgpt.runs.folder import check_no_link, make_subfolder, read_file, read_run_json
from jgpt.runs.manifest import Manifest, list_steps
from jgpt.step import TrainState
from jgpt.system.files import write_file
from jgpt.system.memory import measure_memory
from jgpt.system.signals import say

COPIES = ("experiment.json", "tokenizer.json")  # of the run folder's files, in each checkpoint
survey_jit = jax.jit(survey)

# --- Writing ---


class Manager:
  """A run's checkpoints, open for writing; from `open_checkpoints`.

  One thread finishes what `save` begins: it waits for orbax, writes the manifest and deletes what is not kept.
  """

  def __init__(self, workdir: Path, keep_latest: int, keep_best: int):
    self.folder = make_subfolder(workdir, "checkpoints").resolve()
    self._workdir, self._keep = workdir, (keep_latest, keep_best)
    self._copies = {name: read_file(workdir / name) for name in COPIES}
    recorded = read_run_json(workdir / "experiment.json")
    self._data, self._batch_size = recorded["data"], recorded["experiment"]["data"]["batch_size"]
    # Where orbax makes folders meanwhile and cannot, it waits for them for ever.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    self._arrays = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
    self._thread = ThreadPoolExecutor(1, thread_name_prefix="jgpt-save")
    self._last: Future | None = None

  def begin(self, step: int, items: dict[str, Any], leaves: dict[str, Any], heldout_loss: float | None) -> None:
    """Saves arrays under a step, after the save before; returns when they may be donated."""
    copied = threading.Event()
    self._last = self._thread.submit(self._save, step, items, leaves, heldout_loss, copied)
    copied.wait()

  def wait(self) -> None:
    """Waits until the last save is on disk.

    Raises:
      TrainingError: if it could not be written.
    """
    if self._last is None:
      return
    try:
      self._last.result()  # two threads may wait: the loop, and the one that ends the process
    except Exception as error:  # orbax and TensorStore have no family of errors of their own
      raise TrainingError(self.describe_failure(error)) from error

  def describe_failure(self, error: BaseException) -> str:
    """What a save that failed leaves, as of now."""
    return f"a checkpoint could not be written to {self.folder}: {_shorten(error)}. {_describe_last(self._workdir)}"

  def close(self) -> None:
    """Ends the thread, after the save under way."""
    self._thread.shutdown()
    with contextlib.suppress(Exception):  # of the last save, which `wait` raised
      self._arrays.close()

  def _save(
    self,
    step: int,
    items: dict[str, Any],
    leaves: dict[str, Any],
    heldout_loss: float | None,
    copied: threading.Event,
  ) -> None:
    """What the thread does for one step."""
    folder = self.folder / str(step)
    try:
      described = {name: {"dtype": str(leaf.dtype), "shape": list(leaf.shape)} for name, leaf in name_leaves(items).items()}
      if os.path.lexists(folder):
        manifest.remove_step(folder)  # what is left of a try that failed
      args = ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in items.items()})
      self._arrays.save(folder, args=args)  # returns when the arrays are copied
    finally:
      copied.set()
    for name, (sums, _) in leaves.items():
      described[name]["digest"] = format_digest(sums)
    self._arrays.wait_until_finished()
    for name, content in self._copies.items():
      write_file(folder / name, content)
    data = {**self._data, "sequences": step * self._batch_size}
    manifest.write_manifest(folder, Manifest(step, data, heldout_loss, described, {}))
    try:
      manifest.retain(self._workdir, *self._keep)
    except OSError as error:  # somebody reads there, on a system that then deletes nothing; this checkpoint is whole
      say(f"WARNING: an old checkpoint could not be deleted: {error.filename}: {error.strerror}")


@contextlib.contextmanager
def open_checkpoints(workdir: Path, *, keep_latest: int = 2, keep_best: int = 0) -> Iterator[Manager]:
  """Opens a run's checkpoints for writing and clears away what killed writers left; the run folder's files must be there.

  Leaving waits until the last save is on disk.

  Args:
    workdir: a run folder, held by this process alone (`locks.py`).
    keep_latest: see `manifest.retain`.
    keep_best: see `manifest.retain`.
  """
  newest = max(list_steps(workdir), default=None)
  removed, aside = manifest.sweep(workdir)
  for folder in removed:
    if folder.name.isdigit() and newest is not None and int(folder.name) > newest:
      say(f"{folder} had no {manifest.MANIFEST_FILE}, as a save leaves it that is cut short: it was removed")
  for kept in aside:
    say(f"WARNING: no checkpoint is complete; one without its manifest is kept as {kept}, and training begins anew")
  manager = Manager(workdir, keep_latest, keep_best)
  try:
    yield manager
    manager.wait()
  except TrainingError:  # a save's, or after one
    raise
  except BaseException:
    try:
      manager.wait()
    except TrainingError as failed:
      say(f"error: {failed}")
    raise
  finally:
    manager.close()


def compile_save(shapes: TrainState) -> Callable[[], Any]:
  """Traces what `save` runs on the devices; calling what it returns compiles it."""
  return survey_jit.lower(_items(shapes)).compile


def save_checkpoint(manager: Manager, state: TrainState, heldout_loss: float | None = None) -> None:
  """Saves a state under its step, unless that step is saved already; the state may be donated right after.

  Args:
    manager: from `open_checkpoints`.
    state: blocks stacked.
    heldout_loss: nats per token at this step, where it was evaluated.

  Raises:
    TrainingError: if an entry is not finite (a checkpoint never holds such a state), or if the save before this one could
      not be written.
  """
  step = int(state.step)
  try:
    manager.wait()
  except TrainingError as error:  # this one may be lucky; what is raised is what went wrong before
    _begin(manager, step, state, heldout_loss)
    with contextlib.suppress(TrainingError):
      manager.wait()
    raise TrainingError(manager.describe_failure(error.__cause__)) from error.__cause__
  _begin(manager, step, state, heldout_loss)


def _begin(manager: Manager, step: int, state: TrainState, heldout_loss: float | None) -> None:
  """Begins to save a state, unless its step is saved already or an entry is not finite."""
  if step in list_steps(manager.folder.parent):
    return
  items = _items(state)
  leaves = survey_jit(items)
  bad = [name for name, (_, is_finite) in leaves.items() if not is_finite]
  if bad:
    raise TrainingError(
      f"after step {step} {bad[0]} is not finite ({len(bad)} of {len(leaves)} arrays are not): that is not saved. "
      f"{_describe_last(manager.folder.parent)}. "
      "Try a lower optimizer.peak_lr"
    )
  manager.begin(step, items, leaves, heldout_loss)


def _describe_last(workdir: Path) -> str:
  steps = list_steps(workdir)
  return f"The last checkpoint is of step {steps[-1]}" if steps else "There is no checkpoint yet"


def _items(state: TrainState) -> dict[str, Any]:
  """A state as a checkpoint divides it."""
  return {"params": state.params, "train_state": {"step": state.step, "opt_state": state.opt_state}}


# --- Reading ---


def restore(folder: Path, shapes: TrainState) -> TrainState:
  """Restores a state, and checks each leaf's digest.

  Args:
    folder: a step's, whose files were compared with its manifest.
    shapes: the state's shapes, dtypes and shardings (`jax.ShapeDtypeStruct`s).

  Raises:
    UserError: if the files are damaged or hold something else.
  """
  items = _restore(folder, _items(shapes))
  if (step := int(items["train_state"]["step"])) != int(folder.name):
    raise UserError(f"{folder} holds the state of step {step}")
  return TrainState(step=items["train_state"]["step"], params=items["params"], opt_state=items["train_state"]["opt_state"])


def _restore(folder: Path, targets: dict[str, Any]) -> dict[str, Any]:
  """Reads items of a step and compares each leaf's digest with the manifest's.

  Args:
    folder: the step's; its files were compared with the manifest.
    targets: item -> shapes, dtypes and shardings.

  Raises:
    UserError: naming the leaf, if it is another or has another digest.
  """
  leaves = manifest.read_manifest(folder).leaves
  wanted = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in name_leaves(targets).items()}
  there = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in leaves.items() if name.split("/")[0] in targets}
  _check_same_leaves(folder, there, wanted)
  _check_fits(folder, targets)
  for item in targets:
    check_no_link(folder / item)

  def read() -> dict[str, Any]:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
      args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
      return dict(reader.restore(folder.resolve(), args=ocp.args.Composite(**args)).items())

  with _explained(folder):
    # Orbax would cast another dtype silently, and would leave reads behind when a shape differs.
    for item, target in targets.items():
      saved = ocp.StandardCheckpointHandler().metadata((folder / item).resolve()).tree
      _check_chunks(folder, saved)
      _check_same_leaves(
        folder, *({n: f"{x.dtype}{list(x.shape)}" for n, x in name_leaves(t).items()} for t in (saved, target))
      )
    items = _in_thread(read)
  found = {name: format_digest(sums) for name, (sums, _) in survey_jit(items).items()}
  for name, digest in found.items():
    if digest != leaves[name]["digest"]:
      raise UserError(
        f"{folder}: {name} is not what was saved: its digest is {digest} instead of {leaves[name]['digest'][:16]!r}"
      )
  return items


def _check_same_leaves(folder: Path, there: dict[str, str], wanted: dict[str, str]) -> None:
  """Raises `UserError`, naming the first leaf, where what is there is not what the settings ask for."""
  for name in sorted(there.keys() | wanted.keys()):
    if there.get(name) != wanted.get(name):
      got, need = there.get(name, "nothing"), wanted.get(name, "nothing")
      raise UserError(
        f"cannot read the checkpoint {folder}: {name} is {got[:200]} there, and {need} by the run's experiment.json."
      )


def _check_chunks(folder: Path, saved: Any) -> None:
  """Raises `UserError` where a part of an array would unpack to more than the whole."""
  for name, leaf in name_leaves(saved).items():
    chunk = getattr(leaf.storage, "chunk_shape", None) or ()
    if math.prod(chunk) > max(1, math.prod(leaf.shape)):
      raise UserError(f"{folder}: {name} has parts of shape {list(chunk)}, and is of shape {list(leaf.shape)}.")


def _check_fits(folder: Path, targets: dict[str, Any]) -> None:
  """Raises `UserError` where this process would have to hold more than its machine's memory: small files can claim to."""

  def count_bytes(x: jax.ShapeDtypeStruct) -> int:
    """On the host: an accelerator's replicas have memory of their own."""
    devices = x.sharding.addressable_devices
    replicas = len(devices) if next(iter(devices)).platform == "cpu" else 1
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize * replicas

  need = sum(count_bytes(x) for x in jax.tree.leaves(targets))
  there = measure_memory()[0]
  if there is not None and need > there:
    raise UserError(
      f"{folder} needs {need / 1e9:,.1f} GB of memory by its experiment.json; this machine has {there / 1e9:,.1f} GB."
    )


def _in_thread(function: Callable[[], Any]) -> Any:
  """Calls a function in a thread of its own: orbax's event loop would take the main thread's signals."""
  with ThreadPoolExecutor(1) as pool:
    return pool.submit(function).result()


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
  """Turns orbax's errors about damaged or foreign files into one line that names the folder."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # whatever orbax makes of files that somebody changed
    raise UserError(f"cannot read the checkpoint {folder}: {_shorten(error)}") from error


def _shorten(error: BaseException) -> str:
  """The first line of an error, shortened in the middle: TensorStore begins with a path, and ends with the reason."""
  line = first_line(error)
  return line if len(line) <= 300 else f"{line[:100]} ... {line[-190:]}"
