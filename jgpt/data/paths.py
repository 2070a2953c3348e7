"""What a path stands for: files of text, or token files, their parts and their tokenizer.

Responsible for which files a folder or a glob means, which of them are token files, which of those are held out, and what
their ids mean. Not responsible for what is inside a text (`sources.py`) or a token file (`shards.py`). Imports no jax.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jgpt.config import DataConfig
from jgpt.errors import UserError, show
from jgpt.system.files import read_json
from jgpt.text.tokenizer import Tokenizer, kind_of, tokenizer_from_json
from jgpt.text.tokenizer_files import read_hugging_face_tokenizer

TOKENIZER_FILE = "tokenizer.json"
PREPARATION_FILE = "prepare.json"
MAX_PREPARATION_BYTES = (
  32 << 20
)  # bytes of it: 100,000 shards have 16 MB, and as many inputs 14 MB and the length of their names
PREPARATION_KEYS = {"finished", "next", "shard_tokens", "heldout_tokens", "tokenizer_sha256"}  # that only `prepare` writes
CHARACTERS_FILE = "meta.pkl"  # nanoGPT's list of characters, beside ids of characters
# Words of a name -> the part that a token file is.
PART_WORDS = {
  **dict.fromkeys(("train", "training"), "train"),
  **dict.fromkeys(("val", "valid", "validation"), "heldout"),
  "test": "test",
}


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

  A folder that `prepare` finished holds the files that its manifest names, whatever else lies there. Another folder holds
  all *.bin files in it and in its folders, if there is no *.txt file.

  Raises:
    UserError: if a glob matches nothing, or token files and others; a folder has both *.bin and *.txt files, was not
      finished by `prepare`, or has a damaged manifest; or the ids are characters that only a pickle lists.
  """
  if path is None:
    return []
  files = list_files(path, ["*.txt", "*.bin"])
  expanded = Path(os.path.expanduser(path))
  is_folder = files is not None and expanded.is_dir()
  if files is None:
    files = [expanded]
  elif is_folder and (made := _prepared_files(expanded)):
    return made
  tokens = [file for file in files if file.name.endswith(".bin")]
  others = [file for file in files if not file.name.endswith(".bin")]
  _check_characters_named(tokens)
  for folder in sorted({file.parent for file in tokens if is_folder}):
    _prepared_files(folder)  # raises where it is not finished
  if tokens and others and is_folder:
    globs = [_glob_for(path, expanded, part) for part in (tokens, others)]
    raise UserError(
      f"{path} holds token files ({tokens[0].name}) and texts ({others[0].name}). Choose: --set data.path={globs[0]} or "
      f"--set data.path={globs[1]}"
    )
  if tokens and others:
    raise UserError(f"{path} matches {tokens[0]} and {others[0]}: token files (*.bin) are read alone. Name only them.")
  return tokens


def _prepared_files(folder: Path) -> list[Path]:
  """The files that the manifest of a folder names, sorted; [] where there is none, or some other JSON of that name.

  Raises:
    UserError: if the manifest is damaged, or says that the folder is not finished: which files are whole, only it knows.
  """
  path = folder / PREPARATION_FILE
  if not os.path.lexists(path):
    return []
  files = shlex.quote(str(Path(glob.escape(str(folder)), "*.bin")))
  again = f"Make the folder anew with python -m jgpt.prepare, or name the files to take, as in --set data.path={files}"
  try:
    value = read_json(path, MAX_PREPARATION_BYTES)
  except UserError as error:
    raise UserError(f"{str(error).rstrip('.')}. {again}") from None
  match value:
    case {"finished": False}:
      raise UserError(
        f"{folder} is not finished: its {PREPARATION_FILE} says so. Run the same python -m jgpt.prepare again."
      )
    case {"finished": True, "files": [*files]}:
      names = [file.get("name") if isinstance(file, dict) else None for file in files]
      if not all(map(is_plain_name, names)):
        bad = next(name for name in names if not is_plain_name(name))
        raise UserError(f"{path} is damaged: {show(bad)} is not the name of a file beside it.")
      return sorted(folder / name for name in names)
  if isinstance(value, dict) and value.keys() & PREPARATION_KEYS:
    raise UserError(f'{path} is damaged: "finished" or "files" is not as it was written. {again}')
  return []


def is_plain_name(name: Any) -> bool:
  """Whether a value out of somebody's file is a printable file name that leads to no other folder."""
  is_name = isinstance(name, str) and name.isprintable() and 0 < len(name) < 256
  return is_name and name != ".." and Path(name).name == name


def _glob_for(path: str, folder: Path, files: Sequence[Path]) -> str:
  """The glob that matches files of a folder, quoted for a shell."""
  steps = [] if all(file.parent == folder for file in files) else ["**"]
  return shlex.quote(str(Path(glob.escape(path), *steps, f"*{files[0].suffix}")))


def _check_characters_named(files: Sequence[Path]) -> None:
  """Raises `UserError` for ids of characters as nanoGPT makes them: which id is which, only its pickle says."""
  for folder in sorted({file.parent for file in files}):
    if (folder / CHARACTERS_FILE).is_file() and not (folder / TOKENIZER_FILE).is_file():
      text = folder / "input.txt"
      text = shlex.quote(str(text)) if text.is_file() else "FILE"
      raise UserError(
        f"{folder} has a {CHARACTERS_FILE}: the ids of its token files are characters, listed in that pickle, which jgpt "
        f"does not read. Train on the text that they were made from: --set data.path={text} --set data.tokenizer=characters"
      )


def part_of(file: Path, path: str) -> str:
  """The part that a token file is, by its name: "train", "heldout" or "test".

  The last word decides that says so, between other signs: "train" or "training"; "val", "valid" or "validation"; "test".
  Without such a word it is "train". The names of folders below `path` count too: below a folder, those in it; of a glob,
  those from the first wildcard on.

  Args:
    file: one of those that `find_token_files` found.
    path: `data.path`.
  """
  root = Path(os.path.expanduser(path))
  if not root.is_dir():
    steps = [] if root.exists() else [n for n, step in enumerate(root.parts) if glob.has_magic(step)]
    root = Path(*root.parts[: steps[0]]) if steps else root.parent
  name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
  return part_of_name(name) or "train"


def part_of_name(name: str) -> str | None:
  """The part that the last word of a name says, of those in `PART_WORDS`; None where no word does."""
  parts = [PART_WORDS[word] for word in re.split(r"[\W_]+", name.lower()) if word in PART_WORDS]
  return parts[-1] if parts else None


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
      f"data.tokenizer={config.tokenizer} needs. Train on the text itself, --set data.path=TEXT; or make token files of it "
      f"with python -m jgpt.prepare --tokenizer RUN, the folder of a run on that text; or copy RUN/{TOKENIZER_FILE} there"
    )
  tokenizer = read_tokenizer(found[0])
  for other in found[1:]:
    if read_tokenizer(other).digest != tokenizer.digest:
      raise UserError(f"{found[0]} and {other} are different tokenizers: their token files are no one stream.")
  check_tokenizer_kind(tokenizer, config, str(found[0]))
  return tokenizer


def check_tokenizer_kind(tokenizer: Tokenizer, config: DataConfig, location: str) -> None:
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
  """Reads a `tokenizer.json`, jgpt's or Hugging Face's of such a tokenizer; raises `UserError` naming the file."""
  value = read_json(path)
  try:
    try:
      return tokenizer_from_json(value)
    except UserError:
      if not isinstance(value, dict) or "model" not in value:
        raise
      return read_hugging_face_tokenizer(value)
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
