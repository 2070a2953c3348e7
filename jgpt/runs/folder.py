"""The files of a run folder, apart from its checkpoints.

    experiment.json      name, resolved settings; location and digest of the text, and of the
                         weights that the run began from
    tokenizer.json       the whole tokenizer
    env.json             one entry per start: time, command and its folder, versions, devices,
                         settings that may change, and how `compute` was resolved
    metrics.jsonl        one line per update, per call (its time), and per evaluation (`log.py`)
    result.json          how the run ended (`result.py`); absent while it goes on, or if it was
                         killed
    checkpoints/<step>/  arrays, with copies of experiment.json and tokenizer.json, and a manifest
                         (`manifest.py`)
    samples/             texts drawn at the end
    plot.svg             the curves, drawn at the end where matplotlib is installed, or by jgpt.plot

Nothing in a run folder is executed, and no symbolic link in it is followed. Imports no jax. Arrays
are in `checkpoint.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jgpt.config import Experiment
from jgpt.config.settings import (
  RENAMED,
  experiment_from_json,
  experiment_to_json,
  is_circumstance,
  list_settings,
)
from jgpt.errors import UserError, show
from jgpt.system import files
from jgpt.text.tokenizer import Tokenizer, tokenizer_from_json

RUN_FORMAT = 1
PLOT_FILE = "plot.svg"
MAX_NAME = 200
MAX_LOCATION = 8192  # characters; a path has at most 4,096 bytes
# Bytes of experiment.json: it has 3 kB and a few paths. Parsed, JSON takes 25 times as much memory.
MAX_SETTINGS = 1 << 20
MAX_STARTS = 8 << 20  # bytes of env.json: several thousand starts


@dataclasses.dataclass(frozen=True)
class RunFiles:
  """The contents of experiment.json and tokenizer.json.

  Attributes:
    name: of the experiment that the run was started with.
    experiment: resolved.
    tokenizer: of the run.
    data: where the text was found: kind, location, sha256.
    weights: where the weights that the run began from were found: location, sha256; None for
      weights that were drawn.
    origin: of a continued run: `Origin.record` (`origin.py`); None for others.
    adopted: names of the settings that were decided by the weights, or by the origin.
  """

  name: str
  experiment: Experiment
  tokenizer: Tokenizer
  data: dict[str, str]
  weights: dict[str, str] | None = None
  origin: dict[str, Any] | None = None
  adopted: tuple[str, ...] = ()


# --- Settings ---


def write_run_files(workdir: Path, recorded: RunFiles) -> None:
  """Writes experiment.json and tokenizer.json; makes the folder if it is missing."""
  workdir.mkdir(parents=True, exist_ok=True)
  files.write_json(workdir / "tokenizer.json", recorded.tokenizer.to_json())
  settings = {
    "format": RUN_FORMAT,
    "name": recorded.name,
    "experiment": experiment_to_json(recorded.experiment),
    "data": recorded.data,
    "weights": recorded.weights,
    "origin": recorded.origin,
    "adopted": recorded.adopted,
    "tokenizer_sha256": recorded.tokenizer.digest,
  }
  files.write_json(workdir / "experiment.json", settings)


def read_run_files(workdir: Path) -> RunFiles:
  """Reads experiment.json and tokenizer.json.

  Raises:
    UserError: if it is not a run folder, has a later format, or its files do not belong together.
  """
  if not os.path.lexists(workdir / "experiment.json"):
    raise UserError(
      f"{workdir} is not a run folder: it has no experiment.json. Runs are made by python -m "
      "jgpt.run."
    )
  path = workdir / "experiment.json"
  settings = read_run_json(path, MAX_SETTINGS)
  if not isinstance(settings, dict) or settings.get("format") != RUN_FORMAT:
    got = settings.get("format") if isinstance(settings, dict) else None
    raise UserError(f"{path} has format {show(got)}; this jgpt reads format {RUN_FORMAT}.")
  with _name_in_errors(workdir / "tokenizer.json"):
    tokenizer = tokenizer_from_json(read_run_json(workdir / "tokenizer.json"))
  if settings.get("tokenizer_sha256") != tokenizer.digest:
    raise UserError(
      f"{workdir / 'tokenizer.json'} is not the tokenizer that this run was trained with."
    )
  with _name_in_errors(path):
    experiment = experiment_from_json(settings.get("experiment"))
  if experiment.model.vocab_size is None or experiment.model.vocab_size < tokenizer.vocab_size:
    raise UserError(f"{path} has too small a model.vocab_size for its tokenizer.")
  name, data, weights, origin = (settings.get(key) for key in ("name", "data", "weights", "origin"))
  if not isinstance(name, str) or len(name) > MAX_NAME or (name and not name.isprintable()):
    raise UserError(
      f"{path} has the name {show(name)}; it must be printable text of at most {MAX_NAME} "
      "characters."
    )
  if not _is_origin(data):
    raise UserError(f"{path} does not say which data it was trained on.")
  if weights is not None and not _is_origin(weights):
    raise UserError(f"{path} does not say which weights it began from.")
  if origin is not None and not _is_checkpoint(origin):
    raise UserError(f"{path} does not say which checkpoint it continues.")
  adopted = settings.get("adopted", [])
  if not isinstance(adopted, list) or not {*map(str, adopted)} <= {*list_settings(experiment)}:
    raise UserError(f"{path} does not say which settings came with the weights.")
  return RunFiles(name, experiment, tokenizer, data, weights, origin, tuple(map(str, adopted)))


@contextlib.contextmanager
def _name_in_errors(path: Path) -> Iterator[None]:
  """Adds the file's name to every `UserError` that does not have it."""
  try:
    yield
  except UserError as error:
    raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _is_origin(value: Any) -> bool:
  """Returns whether a value has the form of `RunFiles.data`: short strings, with a "sha256".

  The strings may have any characters, because names of files may.
  """
  if not isinstance(value, dict) or "sha256" not in value:
    return False
  return all(isinstance(v, str) and len(v) <= MAX_LOCATION for v in value.values())


def _is_checkpoint(value: Any) -> bool:
  """Returns whether a value has the form of `RunFiles.origin`."""
  if not isinstance(value, dict) or value.keys() != {"location", "step", "sha256", "tokens"}:
    return False
  step, tokens = value["step"], value["tokens"]
  are_counts = all(type(n) is int and 0 <= n < 2**63 for n in (step, tokens or 0))
  return are_counts and _is_origin({name: value[name] for name in ("location", "sha256")})


# --- Starts ---


def append_env(workdir: Path, entry: dict[str, Any]) -> None:
  """Adds one start of the run to env.json; replaces a file that is damaged or too large."""
  try:
    lines = [json.dumps(start) for start in read_starts(workdir)]
  except (ValueError, RecursionError) as error:  # it holds what cannot be written again
    if files.is_temporary(error):
      raise
    lines = []
  # ASCII, because a word of the command may not be UTF-8.
  rows = ",\n".join([*lines, json.dumps(entry)])
  files.write_text(workdir / "env.json", f"[\n{rows}\n]\n")


def current_folder() -> str | None:
  """Returns the folder that relative paths of a start are below; None where it was deleted."""
  try:
    return os.getcwd()
  except OSError:
    return None


def read_starts(workdir: Path) -> list[Any]:
  """Reads env.json: one value for each start of the run, oldest first, of any type.

  Returns:
    The values; [] where the file is absent, damaged or too large.
  """
  try:
    starts = read_run_json(workdir / "env.json", MAX_STARTS)
  except (ValueError, RecursionError) as error:
    if files.is_temporary(error):
      raise
    return []
  return starts if isinstance(starts, list) else []


def read_last_settings(workdir: Path, recorded: RunFiles) -> Experiment:
  """Reads the settings that the last start of a run had.

  Identity is that of experiment.json; circumstances are those of the last entry in env.json that
  has any. Of those, settings are left out that this version of jgpt does not have.

  Args:
    workdir: a run folder.
    recorded: its files.

  Raises:
    UserError: if a setting there has a value that it cannot have.
  """
  settings = [start.get("settings") for start in read_starts(workdir) if isinstance(start, dict)]
  settings = [found for found in settings if isinstance(found, dict)]
  there = experiment_to_json(recorded.experiment)
  for name, value in (settings[-1] if settings else {}).items():
    if name in RENAMED or (name in list_settings(recorded.experiment) and is_circumstance(name)):
      section, field = name.split(".")
      there[section][field] = value
  with _name_in_errors(workdir / "env.json"):
    return experiment_from_json(there)


def read_run_json(path: Path, most: int = files.MAX_BYTES) -> Any:
  """Reads a JSON file of a run folder.

  Args:
    path: the file.
    most: bytes that it may have.

  Raises:
    UserError: if it is not JSON, too large, or a link; names the file.
  """
  check_no_link(path)
  return files.read_json(path, most)


def read_file(path: Path) -> bytes:
  """Reads a small file of a run folder.

  Raises:
    UserError: if it is not a plain file, or a link; names the file.
  """
  check_no_link(path)
  return files.read_small(path)


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
  """Opens a file of a run folder for reading.

  Raises:
    UserError: if it is not a plain file, or a link; names the file.
  """
  check_no_link(path)
  with files.open_plain(path) as file:
    yield file


def make_subfolder(workdir: Path, name: str) -> Path:
  """Makes a folder inside a run folder, or returns the existing one.

  Raises:
    UserError: if it is a link, through which files would be written elsewhere, or a file.
  """
  folder = workdir / name
  check_no_link(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except FileExistsError:
    raise UserError(f"{folder} is no folder. Remove it, or choose another --workdir") from None
  # Without this a power cut could remove the folder's name, and with it what is saved inside.
  for parent in (workdir, workdir.parent):
    files.sync_folder(parent)
  return folder


def check_no_link(path: Path) -> None:
  """Checks that a path inside a run folder is not a symbolic link, which may lead anywhere.

  Raises:
    UserError: if it is one.
  """
  if os.path.islink(path):
    raise UserError(
      f"{path} is a symbolic link, which a run folder never holds. Put what it leads to in its "
      "place"
    )
