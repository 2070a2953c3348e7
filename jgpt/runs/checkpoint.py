"""Checkpoints: saving a state in the background, and restoring it with its digests verified.

Only this file uses orbax. The files of a checkpoint, and when one exists, are described in
`manifest.py`; digests of arrays are in `digest.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jgpt.batches import Seen
from jgpt.devices import processes
from jgpt.errors import TrainingError, UserError, first_line
from jgpt.evaluation import HeldoutLoss
from jgpt.runs import manifest
from jgpt.runs.digest import format_digest, name_leaves, survey_leaves
from jgpt.runs.folder import check_no_link, make_subfolder, read_file, read_run_json
from jgpt.runs.manifest import PARTIAL_SUFFIX, Manifest, list_steps
from jgpt.sharding import beside, stack_blocks
from jgpt.step import TrainState
from jgpt.system.files import write_file
from jgpt.system.memory import measure_memory
from jgpt.system.signals import print_stderr

COPIES = ("experiment.json", "tokenizer.json")  # of the run folder's files, in each checkpoint
SAVES, READS = "save", "read"  # threads with exchanges of their own (`devices/processes.py`)
# In which a host sees what another one has made: NFS keeps for so long that there was nothing.
SHARING_SECONDS = 60.0

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

  A thread completes each save. Of a run's processes each one writes its part of the arrays, which
  no process gathers. The lead does everything else: it makes folders, writes the manifest when all
  parts are on disk, and deletes old checkpoints. What fails in one process fails in all.

  Attributes:
    folder: of the run's checkpoints.
    steps: of the checkpoints that were there after the last save, ascending.
  """

  def __init__(self, workdir: Path, keep_latest: int, keep_best: int):
    self.folder = workdir.resolve() / "checkpoints"
    self._workdir, self._keep = workdir, (keep_latest, keep_best)
    self._copies, self._data = {}, {}
    self.steps: list[int] = processes.on_lead("the checkpoints", self._open)
    processes.together("the run folder", self._check_shared)
    self._writer = _make_handler()
    self._thread = ThreadPoolExecutor(1, thread_name_prefix="jgpt-save")
    self._saves: list[Future] = []  # that `wait` waits for

  def _open(self) -> list[int]:
    """Makes the folder and reads what every checkpoint holds; returns the steps that are there."""
    make_subfolder(self._workdir, "checkpoints")
    self._copies = {name: read_file(self._workdir / name) for name in COPIES}
    self._data = read_run_json(self._workdir / "experiment.json")["data"]
    return list_steps(self._workdir)

  def _check_shared(self) -> None:
    """Checks that this process sees the folder that the lead made.

    Raises:
      UserError: if it does not: then each process would keep its part of the arrays to itself.
    """
    end = time.monotonic() + SHARING_SECONDS
    while not self.folder.is_dir() and time.monotonic() < end:
      for folder in self.folder.parents[:2]:  # a list asks the server again
        with contextlib.suppress(OSError):
          os.listdir(folder)
      time.sleep(0.5)
    if not self.folder.is_dir():
      raise UserError(
        f"process {jax.process_index()} on {socket.gethostname()} does not see {self.folder}, "
        "which process 0 made. Try a --workdir on a file system that all hosts share"
      )

  def begin_save(
    self, note: StepNote, items: dict[str, Any], leaves: dict[str, Any], *, is_held: bool
  ) -> None:
    """Starts to save arrays once the saves before are done; returns when they may be donated.

    Args:
      note: see `save_checkpoint`.
      items: trees of arrays, by the name of their folder.
      leaves: of `items`, from `survey`.
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
      raise self.describe_failure(error) from error

  def describe_failure(self, error: BaseException) -> TrainingError:
    """Describes a failed save, and which checkpoint is the last one now, in every process alike."""
    return processes.mark_told(
      TrainingError(
        f"a checkpoint could not be written to {self.folder}: {_shorten(error)}. "
        f"{self.describe_last()}"
      )
    )

  def describe_last(self) -> str:
    """Describes in a sentence which checkpoint is the last one."""
    if not self.steps:
      return "There is no checkpoint yet"
    return f"The last checkpoint is of step {self.steps[-1]}"

  def close(self) -> None:
    """Waits for the save in progress and ends the thread."""
    self._thread.shutdown()
    self._writer.close()

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
      make = functools.partial(_make_folders, folder, list(items))
      name = processes.on_lead("the folder of a checkpoint", make, thread=SAVES)
      partial = folder.with_name(name)
      write = functools.partial(self._write_arrays, partial, items, copied)
      processes.together("the arrays of a checkpoint", write, thread=SAVES)
    finally:
      copied.set()
    complete = functools.partial(self._complete, note, items, leaves, partial, folder)
    self.steps = processes.on_lead("a checkpoint", complete, thread=SAVES)

  def _write_arrays(self, partial: Path, items: dict[str, Any], copied: threading.Event) -> None:
    """Writes this process's part of the arrays, and waits until it is written."""
    with _naming_process():
      writes = []
      for name, item in items.items():
        arrays = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), item)
        args = ocp.args.PyTreeSave(arrays)  # they are copied when `async_save` returns
        writes += asyncio.run(self._writer.async_save(epath.Path(partial / name), args=args)) or []
      copied.set()
      for write in writes:
        write.result()

  def _complete(
    self,
    note: StepNote,
    items: dict[str, Any],
    leaves: dict[str, Any],
    partial: Path,
    folder: Path,
  ) -> list[int]:
    """Makes a checkpoint of the folder in which all processes have written their arrays.

    Old checkpoints are deleted.

    Returns:
      The steps that are there.
    """
    with _naming_process():
      for name in items:
        self._writer.finalize(epath.Path(partial / name))  # the processes' parts become one
      os.rename(partial, folder)
      for name, content in self._copies.items():
        write_file(folder / name, content)
      described = {
        name: {
          "dtype": str(leaf.dtype),
          "shape": list(leaf.shape),
          "digest": format_digest(leaves[name][0]),
        }
        for name, leaf in name_leaves(items).items()
      }
      counts = {} if note.seen is None else note.seen._asdict()
      loss, tokens, batches = note.heldout or (None, None, None)
      data = {**self._data, **counts}
      manifest.write_manifest(
        folder, Manifest(note.step, data, loss, described, {}, tokens, batches)
      )
    try:
      manifest.delete_old_steps(self._workdir, *self._keep)
    # Some systems delete no file that another process has open. The new checkpoint is complete.
    except OSError as error:
      print_stderr(
        f"WARNING: an old checkpoint could not be deleted: {error.filename}: {error.strerror}"
      )
    return list_steps(self._workdir)


def _make_handler() -> ocp.PyTreeCheckpointHandler:
  """Makes what reads and writes trees of arrays.

  It is used without orbax's checkpointers. The processes of those wait for one another by computing
  on the devices, in the background, beside programs of the training that may wait for just that;
  and for a process that failed they wait until a deadline of minutes.
  """
  # The default array handler writes metadata that nothing here reads, for which the others poll
  # the disk until process 0 has made a folder.
  types = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler()), (np.ndarray, ocp.type_handlers.NumpyHandler())
  )
  return ocp.PyTreeCheckpointHandler(type_handler_registry=types)


def _make_folders(folder: Path, items: Collection[str]) -> str:
  """Makes the folders in which a checkpoint is written, and deletes what failed saves left.

  Returns:
    The name of the temporary folder. Each attempt has its own, because a process whose save has
    failed may still be writing.
  """
  with _naming_process():
    if os.path.lexists(folder):
      manifest.remove_step(folder)
    for left in folder.parent.glob(f"{folder.name}{PARTIAL_SUFFIX}*"):
      shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}{PARTIAL_SUFFIX}-{secrets.token_hex(4)}")
    os.mkdir(partial)
    for name in items:
      os.mkdir(partial / name)
    return partial.name


@contextlib.contextmanager
def _naming_process() -> Iterator[None]:
  """Turns the errors of a save, of any kind, into one that all processes can raise."""
  try:
    yield
  except TrainingError:
    raise
  except Exception as error:
    where = "" if processes.is_alone() else f"process {jax.process_index()}: "
    raise TrainingError(f"{where}{_shorten(error)}") from error


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
  processes.on_lead("the checkpoints", functools.partial(_clear_leftovers, workdir))
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


def _clear_leftovers(workdir: Path) -> None:
  """Deletes what killed writers left, and says so where work was lost."""
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


def lower_save(shapes: TrainState) -> jax.stages.Lowered:
  """Traces the program with which `save_checkpoint` computes digests.

  Args:
    shapes: of the state, with shardings; blocks stacked.
  """
  items = _to_items(shapes)
  return _jit_survey(beside(items)).lower(items)


def lower_stack(shapes: TrainState) -> jax.stages.Lowered:
  """Traces the program with which `save_checkpoint` stacks blocks.

  Args:
    shapes: of the state, with shardings; blocks a list.
  """
  return _jit_stack(shapes).lower(shapes)


def survey(tree: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Computes `survey_leaves`, compiled; every process gets the results."""
  return _jit_survey(beside(tree))(tree)


@functools.cache
def _jit_survey(whole: jax.sharding.Sharding | None) -> Callable:
  return jax.jit(survey_leaves, out_shardings=whole)


def _jit_stack(state: TrainState) -> Callable:
  """Returns what stacks blocks, compiled: stacked ones are divided as those of a list are."""
  shardings, structure = jax.tree.flatten(jax.tree.map(_stack_shardings, state, is_leaf=_is_list))
  return _jit_stack_to(tuple(shardings), structure)


@functools.cache
def _jit_stack_to(shardings: tuple[jax.sharding.Sharding | None, ...], structure: Any) -> Callable:
  return jax.jit(stack_blocks, out_shardings=structure.unflatten(shardings))


def _is_list(tree: Any) -> bool:
  """Returns whether a tree has blocks that are a list."""
  return isinstance(tree, dict) and isinstance(tree.get("blocks"), list)


def _stack_shardings(tree: Any) -> Any:
  """Returns the shardings of a tree's arrays once its blocks are stacked."""

  def add_layers(x: jax.Array) -> jax.sharding.Sharding:
    spec = x.sharding
    return (
      NamedSharding(spec.mesh, P(None, *spec.spec)) if isinstance(spec, NamedSharding) else spec
    )

  def find(x: Any) -> Any:
    return jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), x)

  if not _is_list(tree):
    return find(tree)
  others = {name: find(x) for name, x in tree.items() if name != "blocks"}
  return {**others, "blocks": jax.tree.map(add_layers, tree["blocks"][0])}


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
    state = _jit_stack(state)(state)
  try:
    if not is_held:
      manager.wait()
  except TrainingError as error:  # this save may succeed; the earlier error is raised
    _begin_save(manager, state, note, is_held)
    with contextlib.suppress(TrainingError):
      manager.wait()
    raise manager.describe_failure(error.__cause__) from error.__cause__
  _begin_save(manager, state, note, is_held)


def _begin_save(manager: Manager, state: TrainState, note: StepNote, is_held: bool) -> None:
  """Starts to save a state whose step has no checkpoint, and checks that it is finite.

  Raises:
    TrainingError: if it is not.
  """
  if note.step in manager.steps:
    return
  items = _to_items(state)
  surveyed = survey(items)
  leaves = processes.wait("the digests", lambda: jax.device_get(surveyed), surveyed)
  bad = [name for name, (_, is_finite) in leaves.items() if not is_finite]
  if bad:
    raise processes.mark_told(
      TrainingError(
        f"after step {note.step} {bad[0]} is not finite ({len(bad)} of {len(leaves)} arrays are "
        f"not): that is not saved. {manager.describe_last()}. Try a lower optimizer.peak_lr"
      )
    )
  manager.begin_save(note, items, leaves, is_held=is_held)


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
  is_shared = not all(x.sharding.is_fully_addressable for x in jax.tree.leaves(targets))
  restored, leaves = {}, {}

  def read() -> None:
    leaves.update(manifest.read_manifest(folder).leaves)
    restored.update(_read_items(folder, targets, leaves))

  if is_shared:
    processes.together("the checkpoint", read, thread=READS)
  else:
    read()
  found = {name: format_digest(sums) for name, (sums, _) in survey(restored).items()}
  for name, digest in found.items():
    if digest != leaves[name]["digest"]:
      raise UserError(
        f"{folder}: {name} is not what was saved: its digest is {digest} instead of "
        f"{leaves[name]['digest'][:16]!r}"
      )
  return restored


def _read_items(
  folder: Path, targets: dict[str, Any], leaves: dict[str, dict[str, Any]]
) -> dict[str, Any]:
  """Reads folders of arrays, each process the parts that its devices hold; see `restore_items`."""
  there = {
    name: f"{leaf['dtype']}{leaf['shape']}"
    for name, leaf in leaves.items()
    if name.split("/")[0] in targets
  }
  _check_same_leaves(folder, there, _describe_leaves(targets))
  _check_fits(folder, targets)
  for item in targets:
    check_no_link(folder / item)
  reader = _make_handler()

  def read(item: str) -> Any:
    how = ocp.checkpoint_utils.construct_restore_args(targets[item])
    args = ocp.args.PyTreeRestore(targets[item], restore_args=how)
    return reader.restore(epath.Path((folder / item).resolve()), args=args)

  with _explain_errors(folder):
    # Orbax casts another dtype silently, and leaves reads running where a shape differs.
    for item, target in targets.items():
      saved = reader.metadata(epath.Path((folder / item).resolve())).tree
      _check_chunks(folder, saved)
      _check_same_leaves(folder, _describe_leaves(saved), _describe_leaves(target))
    return {item: _call_in_thread(functools.partial(read, item)) for item in targets}


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
    replicas = len(devices) if {d.platform for d in devices} == {"cpu"} else 1
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
