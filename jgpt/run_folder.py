"""The run folder: what a run leaves on disk, apart from its checkpoints.

    experiment.json     name, settings as resolved; place and digest of the text and of the weights it began from
    tokenizer.json      the tokenizer, whole
    env.json            one entry per start: time, command, versions, devices, settings that may change
    metrics.jsonl       one line per update, one per evaluation (`metrics.py`)
    checkpoints/<step>/ arrays, with copies of experiment.json and tokenizer.json, and a manifest (`manifest.py`)
    samples/            text drawn at the end

Responsible for writing these so that a reader never sees half a file, and for reading them without executing anything,
following a link or waiting for one. Not responsible for what is trained, or for arrays. Imports no jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jgpt import settings as settings_lib
from jgpt import tokenizer as tokenizer_lib
from jgpt.checks import UserError
from jgpt.config import Experiment
from jgpt.tokenizer import Tokenizer

FORMAT = 1
MAX_JSON_BYTES = 64 << 20  # a tokenizer of 50,257 ids has 2 MB


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
  if not os.path.lexists(workdir / "experiment.json"):
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
  """Reads a JSON file of at most `MAX_JSON_BYTES`.

  Raises:
    UserError: naming the file, if it is absent, no plain file, too large or not JSON.
  """
  try:
    return json.loads(read_file(path).decode())
  except (ValueError, RecursionError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f"{path} is not readable as JSON: {error}") from None


def read_file(path: Path) -> bytes:
  """Reads a plain file of at most `MAX_JSON_BYTES`.

  Raises:
    UserError: naming the file, if it is anything else.
  """
  with open_plain(path) as file:
    size = os.fstat(file.fileno()).st_size
    if size > MAX_JSON_BYTES:
      raise UserError(f"{path} has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read.")
    return file.read(MAX_JSON_BYTES)


@contextlib.contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
  """Opens a plain file for reading; follows no link and waits for no pipe.

  Raises:
    UserError: naming the file, if it is anything else or cannot be read.
  """
  flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
  try:
    if path.is_symlink():
      raise UserError(f"{path} is a symbolic link, which a run folder never holds.")
    with os.fdopen(os.open(path, flags), "rb") as file:
      if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise UserError(f"{path} is no plain file.")
      yield file
  except FileNotFoundError:
    raise UserError(f"{path} does not exist.") from None
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}.") from None


def write_json(path: Path, value: Any) -> None:
  """Writes JSON under a temporary name, then renames."""
  write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_text(path: Path, text: str) -> None:
  """Writes UTF-8 text under a temporary name, then renames."""
  write_file(path, text.encode())


def write_file(path: Path, content: bytes) -> None:
  """Writes bytes under a temporary name, then renames: a reader sees the old file or the new one, after a power cut too.

  A link that somebody put in the place of either name is replaced and never followed.
  """
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.unlink(missing_ok=True)
  try:
    with open(temporary, "xb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError:
    with contextlib.suppress(OSError):
      temporary.unlink()  # half a file is no use, and a disk that is full needs the room
    raise
  sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
  """Makes renames in a folder last through a power cut, where the system can."""
  with contextlib.suppress(OSError):  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def make_subfolder(workdir: Path, name: str) -> Path:
  """Makes a folder inside a run folder, or returns the one that is there.

  Raises:
    UserError: if a link or a file has its name: writing there would leave the run folder.
  """
  folder = workdir / name
  folder.mkdir(parents=True, exist_ok=True)
  require_real(folder)
  return folder


def require_real(folder: Path) -> None:
  """Raises `UserError` if a folder inside a run folder is a symbolic link."""
  if folder.is_symlink():
    raise UserError(f"{folder} is a symbolic link, which a run folder never holds. Put what it leads to in its place")
