"""The run folder: what a run leaves on disk, apart from its checkpoints.

    experiment.json     name, settings as resolved; place and digest of the text and of the weights it began from
    tokenizer.json      the tokenizer, whole
    env.json            one entry per start: time, command, versions, devices, settings that may change
    metrics.jsonl       one line per update, one per evaluation (`metrics.py`)
    checkpoints/<step>/ arrays, with copies of experiment.json and tokenizer.json, and a manifest (`manifest.py`)
    samples/            text drawn at the end

Responsible for what these hold, and for reading them without executing anything or following a link. Not responsible for
what is trained, or for arrays. Imports no jax.
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
from jgpt.config.settings import experiment_from_json, experiment_to_json
from jgpt.errors import UserError, show
from jgpt.system import files
from jgpt.text.tokenizer import Tokenizer, tokenizer_from_json

RUN_FORMAT = 1
MAX_NAME = 200
MAX_LOCATION = 8192  # characters; a path has at most 4,096 bytes
MAX_SETTINGS = 1 << 20  # bytes of experiment.json, which has 3 kB and a few paths; as objects they take 25 times as much
MAX_STARTS = 8 << 20  # bytes of env.json: several thousand starts


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


def write_run_files(workdir: Path, recorded: RunFiles) -> None:
  """Writes experiment.json and tokenizer.json; the folder is made where it is missing."""
  workdir.mkdir(parents=True, exist_ok=True)
  files.write_json(workdir / "tokenizer.json", recorded.tokenizer.to_json())
  settings = {
    "format": RUN_FORMAT,
    "name": recorded.name,
    "experiment": experiment_to_json(recorded.experiment),
    "data": recorded.data,
    "weights": recorded.weights,
  }
  settings["tokenizer_sha256"] = recorded.tokenizer.digest
  files.write_json(workdir / "experiment.json", settings)


def read_run_files(workdir: Path) -> RunFiles:
  """Reads experiment.json and tokenizer.json.

  Raises:
    UserError: if the folder is no run folder, is of a later format, or its files do not go together.
  """
  if not os.path.lexists(workdir / "experiment.json"):
    raise UserError(f"{workdir} is not a run folder: it has no experiment.json. Runs are made by python -m jgpt.run.")
  path = workdir / "experiment.json"
  settings = read_run_json(path, MAX_SETTINGS)
  if not isinstance(settings, dict) or settings.get("format") != RUN_FORMAT:
    got = settings.get("format") if isinstance(settings, dict) else None
    raise UserError(f"{path} has format {show(got)}; this jgpt reads format {RUN_FORMAT}.")
  with _naming(workdir / "tokenizer.json"):
    tokenizer = tokenizer_from_json(read_run_json(workdir / "tokenizer.json"))
  if settings.get("tokenizer_sha256") != tokenizer.digest:
    raise UserError(f"{workdir / 'tokenizer.json'} is not the tokenizer that this run was trained with.")
  with _naming(path):
    experiment = experiment_from_json(settings.get("experiment"))
  if experiment.model.vocab_size is None or experiment.model.vocab_size < tokenizer.vocab_size:
    raise UserError(f"{path} has too small a model.vocab_size for its tokenizer.")
  name, data, weights = (settings.get(key) for key in ("name", "data", "weights"))
  if not isinstance(name, str) or len(name) > MAX_NAME or (name and not name.isprintable()):
    raise UserError(f"{path} has the name {show(name)}; it must be printable text of at most {MAX_NAME} characters.")
  if not _is_found(data):
    raise UserError(f"{path} does not say which data it was trained on.")
  if weights is not None and not _is_found(weights):
    raise UserError(f"{path} does not say which weights it began from.")
  return RunFiles(name, experiment, tokenizer, data, weights)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
  """Says in which file something is wrong."""
  try:
    yield
  except UserError as error:
    raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _is_found(value: Any) -> bool:
  """Whether a value says where something was found, with its digest; any characters may be in the name of a file."""
  if not isinstance(value, dict) or "sha256" not in value:
    return False
  return all(isinstance(v, str) and len(v) <= MAX_LOCATION for v in value.values())


def append_env(workdir: Path, entry: dict[str, Any]) -> None:
  """Adds one start of the run to env.json, which begins anew where it is damaged or too large."""
  path = workdir / "env.json"
  try:
    starts = read_run_json(path, MAX_STARTS)
    lines = [json.dumps(start) for start in (starts if isinstance(starts, list) else [])]
  except (ValueError, RecursionError) as error:  # absent, or damaged, or nothing that can be written again
    if files.may_pass(error):
      raise
    lines = []
  rows = ",\n".join([*lines, json.dumps(entry)])  # ASCII: a word of the command may be no UTF-8
  files.write_text(path, f"[\n{rows}\n]\n")


def read_run_json(path: Path, most: int = files.MAX_BYTES) -> Any:
  """Reads a JSON file of a run folder; raises `UserError` naming it where it is none, too large, or a link."""
  check_no_link(path)
  return files.read_json(path, most)


def read_file(path: Path) -> bytes:
  """Reads a small file of a run folder; raises `UserError` naming it where it is none, or a link."""
  check_no_link(path)
  return files.read_small(path)


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
  """Opens a file of a run folder for reading; raises `UserError` naming it where it is none, or a link."""
  check_no_link(path)
  with files.open_plain(path) as file:
    yield file


def make_subfolder(workdir: Path, name: str) -> Path:
  """Makes a folder inside a run folder, or returns the one that is there.

  Raises:
    UserError: if a link or a file has its name: writing there would leave the run folder.
  """
  folder = workdir / name
  check_no_link(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except FileExistsError:
    raise UserError(f"{folder} is no folder. Remove it, or choose another --workdir") from None
  for parent in (workdir, workdir.parent):  # what is saved there is lost with its name
    files.sync_folder(parent)
  return folder


def check_no_link(path: Path) -> None:
  """Raises `UserError` if a file or folder inside a run folder is a symbolic link: it may lead anywhere."""
  if os.path.islink(path):
    raise UserError(f"{path} is a symbolic link, which a run folder never holds. Put what it leads to in its place")
