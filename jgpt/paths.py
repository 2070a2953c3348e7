"""What a path stands for: files of text, or token files, their parts and their tokenizer.

Responsible for which files a folder or a glob means, which of them are token files, which of those are held out, and what
their ids mean. Not responsible for what is inside a text (`sources.py`) or a token file (`shards.py`). Imports no jax.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from jgpt.checks import UserError
from jgpt.config import DataConfig
from jgpt.tokenizer import Tokenizer, from_json, kind_of

TOKENIZER_FILE = "tokenizer.json"
MANIFEST_FILE = "prepare.json"
HELDOUT_WORDS = {"val", "valid", "validation"}


def list_files(path: str, patterns: Sequence[str]) -> list[Path] | None:
  """Lists the files of a folder or glob, sorted, hidden ones left out.

  Args:
    path: "~" stands for the user's folder.
    patterns: names that count in a folder and the folders in it, for example "*.txt"; a glob's files count all.

  Returns:
    None where `path` can only be the name of one file; [] for a folder without such files.

  Raises:
    UserError: if a glob matches no file.
  """
  expanded = os.path.expanduser(path)
  if os.path.isdir(expanded):
    found = {file for pattern in patterns for file in Path(expanded).rglob(pattern) if file.is_file()}
    names = sorted(file.relative_to(expanded).as_posix() for file in found)
    return [Path(expanded, name) for name in names if not name.startswith(".") and "/." not in name]
  if os.path.exists(expanded) or not glob.has_magic(expanded):
    return None
  with contextlib.suppress(ValueError):  # a NUL in the path
    if files := [Path(name) for name in sorted(glob.glob(expanded, recursive=True)) if os.path.isfile(name)]:
      return files
  raise UserError(f"no file is called {path} or matches it.")


# --- Token files ---


def find_token_files(path: str | None) -> list[Path]:
  """The token files that `data.path` names: files *.bin, in the order of their names; [] where it names text.

  A folder holds token files if it has *.bin files and no *.txt file.

  Raises:
    UserError: if a glob matches nothing, or token files and others; or the folder was not finished by `prepare`.
  """
  if path is None:
    return []
  files = list_files(path, ["*.txt", "*.bin"])
  if files is None:
    return [Path(os.path.expanduser(path))] if path.endswith(".bin") else []
  tokens = [file for file in files if file.name.endswith(".bin")]
  others = [file for file in files if not file.name.endswith(".bin")]
  is_folder = os.path.isdir(os.path.expanduser(path))
  if is_folder and others:
    return []
  if tokens and others:
    raise UserError(f"{path} matches {tokens[0]} and {others[0]}: token files (*.bin) are read alone. Name only them.")
  if tokens and is_folder and not _is_finished(Path(os.path.expanduser(path), MANIFEST_FILE)):
    raise UserError(f"{path} is not finished: its {MANIFEST_FILE} says so. Run the same python -m jgpt.prepare again.")
  return tokens


def _is_finished(manifest: Path) -> bool:
  """Whether `prepare` wrote all files of a folder; what has no manifest that can be read was not written by it."""
  try:
    value = json.loads(manifest.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return True
  return not isinstance(value, dict) or value.get("finished") is not False


def is_heldout(path: Path) -> bool:
  """Whether a token file is held out: "val", "valid" or "validation" is a word of its name, between other signs."""
  return not HELDOUT_WORDS.isdisjoint(re.split(r"[\W_]+", path.name.lower()))


def find_tokenizer(files: Sequence[Path], config: DataConfig) -> Tokenizer | None:
  """Finds what the ids of token files mean: the `tokenizer.json` of their folder.

  Args:
    files: from `find_token_files`.
    config: `tokenizer` must be of the kind that was found.

  Returns:
    None where there is no such file, and `config.tokenizer` says it all: "gpt2" or "bytes".

  Raises:
    UserError: if the file is damaged or of another kind, folders differ, or there is none where it is needed.
  """
  found = sorted({file.parent / TOKENIZER_FILE for file in files if (file.parent / TOKENIZER_FILE).is_file()})
  if not found:
    if config.tokenizer in ("gpt2", "bytes"):
      return None
    raise UserError(
      f"{files[0].parent} has token files and no {TOKENIZER_FILE} that says what their ids mean, which "
      f"data.tokenizer={config.tokenizer} needs. Make them with python -m jgpt.prepare, which writes one, or copy the "
      f"{TOKENIZER_FILE} of the run that they belong to"
    )
  tokenizer = read_tokenizer(found[0])
  for other in found[1:]:
    if read_tokenizer(other).digest != tokenizer.digest:
      raise UserError(f"{found[0]} and {other} are different tokenizers: their token files are no one stream.")
  require_kind(tokenizer, config, str(found[0]))
  return tokenizer


def require_kind(tokenizer: Tokenizer, config: DataConfig, location: str) -> None:
  """Raises `UserError` where a tokenizer that was found is of another kind or size than the settings say."""
  kind, is_bpe = kind_of(tokenizer), config.tokenizer == "bpe"
  size = tokenizer.vocab_size
  if kind != config.tokenizer or (is_bpe and config.bpe_vocab_size != size):
    settings = [f"data.tokenizer={kind}", *([f"data.bpe_vocab_size={size}"] if kind == "bpe" else [])]
    settings += ["data.mark_paragraphs=false"] if config.mark_paragraphs and kind != "gpt2" else []
    got = f"data.tokenizer={config.tokenizer}" + (f" with data.bpe_vocab_size={config.bpe_vocab_size}" if is_bpe else "")
    raise UserError(
      f"{location} is a tokenizer of the kind {kind} with {size:,} ids, and the run's is {got}. Try "
      + " ".join(f"--set {setting}" for setting in settings)
    )


def read_tokenizer(path: Path) -> Tokenizer:
  """Reads a `tokenizer.json` as jgpt writes it; raises `UserError` naming the file."""
  try:
    return from_json(json.loads(path.read_text(encoding="utf-8")))
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}.") from None
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is not readable as JSON: {error}") from None
