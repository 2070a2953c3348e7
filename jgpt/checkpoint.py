"""The run folder: what a run leaves on disk, and reading it back.

    experiment.json     name, settings as resolved; place and digest of the text and of the weights it began from
    tokenizer.json      the tokenizer, whole
    env.json            one entry per start: time, command, versions, devices, settings that may change
    metrics.jsonl       one line per update
    checkpoints/<step>/ params (all that sampling needs) and train_state (step, moments), written by orbax
    samples/            text drawn at the end

Responsible for writing these so that a reader never sees half a file, and for reading them without executing anything.
Not responsible for what is trained. Orbax is named in this file only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jgpt import runtime
from jgpt import settings as settings_lib
from jgpt import tokenizer as tokenizer_lib
from jgpt.checks import UserError
from jgpt.config import Experiment
from jgpt.model import init_params
from jgpt.step import TrainState
from jgpt.tokenizer import Tokenizer

FORMAT = 1
Manager = ocp.CheckpointManager
KEEP_LATEST = 2


@dataclasses.dataclass(frozen=True)
class RunFiles:
  """A run folder's settings.

  Attributes:
    name: of the experiment it began from.
    experiment: resolved.
    tokenizer: of the run.
    data: where the text was found: kind, location, sha256.
    weights: where the weights that it began from were found: location, sha256; None for weights that were drawn.
  """

  name: str
  experiment: Experiment
  tokenizer: Tokenizer
  data: dict[str, str]
  weights: dict[str, str] | None = None


# --- Settings ---


def write_run_files(workdir: Path, files: RunFiles) -> None:
  """Writes experiment.json and tokenizer.json; the folder is made where it is missing."""
  workdir.mkdir(parents=True, exist_ok=True)
  write_json(workdir / "tokenizer.json", files.tokenizer.to_json())
  settings = {
    "format": FORMAT,
    "name": files.name,
    "experiment": settings_lib.to_json(files.experiment),
    "data": files.data,
    "weights": files.weights,
  }
  settings["tokenizer_sha256"] = files.tokenizer.digest
  write_json(workdir / "experiment.json", settings)


def read_run_files(workdir: Path) -> RunFiles:
  """Reads experiment.json and tokenizer.json.

  Raises:
    UserError: if the folder is no run folder, is of a later format, or its files do not go together.
  """
  if not (workdir / "experiment.json").is_file():
    raise UserError(f"{workdir} is not a run folder: it has no experiment.json. Runs are made by python -m jgpt.run.")
  settings = read_json(workdir / "experiment.json")
  if not isinstance(settings, dict) or settings.get("format") != FORMAT:
    got = settings.get("format") if isinstance(settings, dict) else None
    raise UserError(f"{workdir / 'experiment.json'} has format {got!r}; this jgpt reads format {FORMAT}.")
  tokenizer = tokenizer_lib.from_json(read_json(workdir / "tokenizer.json"))
  if settings.get("tokenizer_sha256") != tokenizer.digest:
    raise UserError(f"{workdir / 'tokenizer.json'} is not the tokenizer that this run was trained with.")
  experiment = settings_lib.from_json(settings.get("experiment"))
  if experiment.model.vocab_size is None or experiment.model.vocab_size < tokenizer.vocab_size:
    raise UserError(f"{workdir / 'experiment.json'} has too small a model.vocab_size for its tokenizer.")
  data, weights = settings.get("data"), settings.get("weights")
  if not _is_found(data):
    raise UserError(f"{workdir / 'experiment.json'} does not say which data it was trained on.")
  if weights is not None and not _is_found(weights):
    raise UserError(f"{workdir / 'experiment.json'} does not say which weights it began from.")
  return RunFiles(str(settings.get("name")), experiment, tokenizer, data, weights)


def _is_found(value: Any) -> bool:
  """Whether a value says where something was found, with its digest."""
  return isinstance(value, dict) and all(isinstance(v, str) for v in value.values()) and "sha256" in value


def append_env(workdir: Path, entry: dict[str, Any]) -> None:
  """Adds one start of the run to env.json."""
  path = workdir / "env.json"
  starts = []
  with contextlib.suppress(UserError):  # absent, or damaged: it is a log, and begins anew
    starts = read_json(path)
  write_json(path, [*starts, entry] if isinstance(starts, list) else [entry])


def read_json(path: Path) -> Any:
  """Reads a JSON file.

  Raises:
    UserError: naming the file, if it is absent or not JSON.
  """
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"{path} does not exist.") from None
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is not readable as JSON: {error}") from None


def write_json(path: Path, value: Any) -> None:
  """Writes JSON under a temporary name, then renames."""
  write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
  """Writes UTF-8 text under a temporary name, then renames: a reader sees the old file or the new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  with open(temporary, "w", encoding="utf-8", newline="\n") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


# --- Arrays ---


@contextlib.contextmanager
def open_checkpoints(workdir: Path) -> Iterator[Manager]:
  """Opens a run's checkpoints for writing; leaving waits until the last save is on disk."""
  options = ocp.CheckpointManagerOptions(max_to_keep=KEEP_LATEST, create=True)
  manager = Manager((workdir / "checkpoints").resolve(), options=options)
  try:
    yield manager
    manager.wait_until_finished()
  finally:
    manager.close()


def save(manager: Manager, state: TrainState) -> None:
  """Saves a state under its step, unless that step is saved already; the state may be donated right after."""
  step = int(state.step)
  if step in manager.all_steps():
    return
  train_state = {"step": state.step, "opt_state": state.opt_state}
  args = ocp.args.Composite(params=ocp.args.StandardSave(state.params), train_state=ocp.args.StandardSave(train_state))
  if not manager.save(step, args=args):
    raise RuntimeError(f"orbax did not save step {step}")


def latest_step(workdir: Path) -> int | None:
  """The newest saved step of a run folder, or None. Opens no arrays."""
  steps = list_steps(workdir)
  return steps[-1] if steps else None


def list_steps(workdir: Path) -> list[int]:
  """The saved steps of a run folder, ascending; orbax gives a step's folder its number when it is complete."""
  folder = workdir / "checkpoints"
  return (
    sorted(int(p.name) for p in folder.iterdir() if re.fullmatch("[0-9]+", p.name) and p.is_dir())
    if folder.is_dir()
    else []
  )


def find_step(workdir: Path, step: int | None) -> int:
  """Returns a saved step, the newest for None; raises `UserError` where there is none, or not that one."""
  steps = list_steps(workdir)
  if not steps:
    raise UserError(f"{workdir} has no checkpoint yet.")
  if step is not None and step not in steps:
    raise UserError(f"{workdir} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}.")
  return steps[-1] if step is None else step


def restore(manager: Manager, step: int, shapes: TrainState) -> TrainState:
  """Restores a state.

  Args:
    manager: from `open_checkpoints`.
    step: a saved step.
    shapes: the state's shapes, dtypes and shardings (`jax.ShapeDtypeStruct`s).

  Raises:
    UserError: if the files are damaged or hold something else.
  """
  _refuse_other_params(manager.directory / str(step), shapes.params)
  targets = {"params": shapes.params, "train_state": {"step": shapes.step, "opt_state": shapes.opt_state}}
  args = ocp.args.Composite(**{name: ocp.args.StandardRestore(target) for name, target in targets.items()})
  with _explained(manager.directory / str(step)):
    items = manager.restore(step, args=args)
  return TrainState(step=items["train_state"]["step"], params=items["params"], opt_state=items["train_state"]["opt_state"])


@dataclasses.dataclass(frozen=True)
class Run:
  """What sampling needs of a run.

  Attributes:
    params: arrays, as `init_params` returns them.
    tokenizer: of the run.
    experiment: resolved.
    step: updates that made these parameters.
    workdir: the folder.
  """

  params: dict
  tokenizer: Tokenizer
  experiment: Experiment
  step: int
  workdir: Path


def load_run(workdir: str | Path, step: int | None = None) -> Run:
  """Reads a run's parameters, from the folder alone.

  Args:
    workdir: a run folder.
    step: which checkpoint; None takes the newest.

  Raises:
    UserError: if it is no run folder, or has no such checkpoint.
  """
  workdir = Path(workdir)
  files = read_run_files(workdir)
  step = find_step(workdir, step)
  place = jax.sharding.SingleDeviceSharding(runtime.devices()[0])
  shapes = jax.eval_shape(lambda key: init_params(key, files.experiment.model), jax.random.key(0))
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
  path = (workdir / "checkpoints" / str(step)).resolve()
  _refuse_other_params(path, target)
  with _explained(path), ocp.StandardCheckpointer() as reader:
    params = reader.restore(path / "params", target)
  return Run(params, files.tokenizer, files.experiment, step, workdir)


def _refuse_other_params(path: Path, target: dict) -> None:
  """Raises `UserError` where the parameters on disk are not the target's in name, shape and dtype; reads no array.

  Orbax would cast another dtype silently, and would leave reads behind when a shape differs.
  """

  def describe(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}" for p, x in leaves}

  with _explained(path):
    there = describe(ocp.StandardCheckpointHandler().metadata(path / "params").tree)
  wanted = describe(target)
  for name in sorted(there.keys() | wanted.keys()):
    if there.get(name) != wanted.get(name):
      got, need = there.get(name, "nothing"), wanted.get(name, "nothing")
      raise UserError(f"cannot read the checkpoint {path}: {name} is {got} there, and {need} by the run's experiment.json.")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
  """Turns orbax's errors about damaged or foreign files into one line that names the folder."""
  try:
    yield
  except (ValueError, KeyError, TypeError, OSError) as error:
    lines = str(error).splitlines() or [type(error).__name__]
    raise UserError(f"cannot read the checkpoint {path}: {lines[0][:200]}") from error
