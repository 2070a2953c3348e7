"""Finds the files that `data.path` names: texts, or token files with their parts and tokenizer.

Decides which files of a folder or glob are token files, which of those are held out, and which
tokenizer they belong to. Texts are read in `sources.py`, and token files in `token_files.py`.
Imports no jax.
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
# Size of `prepare.json`: 100,000 shards take 16 MB, and as many inputs 14 MB and their names.
MAX_PREPARATION_BYTES = 32 << 20
# A JSON file with one of these keys was written by jgpt.
PREPARATION_KEYS = {"finished", "next", "shard_tokens", "heldout_tokens", "tokenizer_sha256"}
CHARACTERS_FILE = "meta.pkl"  # nanoGPT's vocabulary of characters, in the folder of its token files
# Word in the name of a token file -> the part that the file belongs to.
PART_WORDS = {
  **dict.fromkeys(("train", "training"), "train"),
  **dict.fromkeys(("val", "valid", "validation"), "heldout"),
  "test": "test",
}


def list_files(path: str, patterns: Sequence[str]) -> list[Path] | None:
  """Lists the files of a folder or glob, sorted by name.

  Args:
    path: of a folder, a glob or a file; "~" is the user's home.
    patterns: globs for the names of files, such as "*.txt", in a folder and the folders below it;
      hidden files are skipped. The files of a glob are all listed.

  Returns:
    The files; [] for a folder without such files; None if `path` names a single file.

  Raises:
    UserError: if a glob matches no file.
  """
  expanded = os.path.expanduser(path)
  if os.path.isdir(expanded):
    found = {
      file for pattern in patterns for file in Path(expanded).rglob(pattern) if file.is_file()
    }
    names = sorted(file.relative_to(expanded).as_posix() for file in found)
    return [Path(expanded, name) for name in names if not name.startswith(".") and "/." not in name]
  if os.path.exists(expanded) or not glob.has_magic(expanded):
    return None
  with contextlib.suppress(ValueError):  # a NUL in the path
    if files := [
      Path(name) for name in sorted(glob.glob(expanded, recursive=True)) if os.path.isfile(name)
    ]:
      return files
  raise UserError(f"no file is called {path} or matches it.")


def is_there(path: str) -> bool:
  """Returns whether `data.path` names a file, or a folder or glob with files to read."""
  try:
    files = list_files(path, ["*.txt", "*.bin"])
  except UserError:
    return False
  return os.path.exists(os.path.expanduser(path)) if files is None else bool(files)


# --- Token files ---


def find_token_files(path: str | None) -> list[Path]:
  """Finds the token files (*.bin) that `data.path` names, sorted by name.

  For a folder that `jgpt.prepare` has finished these are the files in its manifest, whatever else
  is there. For any other folder without *.txt files these are all *.bin files in it and below it.

  Args:
    path: `data.path`; None has no token files.

  Returns:
    The token files; [] if the path names text.

  Raises:
    UserError: if a glob matches nothing, or token files together with other files; if a folder has
      both *.bin and *.txt files, was not finished by `jgpt.prepare`, or has a damaged manifest; or
      if the vocabulary of the files is only in a pickle.
  """
  if path is None:
    return []
  files = list_files(path, ["*.txt", "*.bin"])
  expanded = Path(os.path.expanduser(path))
  is_folder = files is not None and expanded.is_dir()
  if files is None:
    files = [expanded]
  elif is_folder and (made := _list_prepared_files(expanded)):
    return made
  tokens = [file for file in files if file.name.endswith(".bin")]
  others = [file for file in files if not file.name.endswith(".bin")]
  _check_no_pickled_vocabulary(tokens)
  for folder in sorted({file.parent for file in tokens if is_folder}):
    _list_prepared_files(folder)  # for its error about a folder that is not finished
  if tokens and others and is_folder:
    globs = [_make_glob(path, expanded, part) for part in (tokens, others)]
    raise UserError(
      f"{path} holds token files ({tokens[0].name}) and texts ({others[0].name}). Choose: --set "
      f"data.path={globs[0]} or --set data.path={globs[1]}"
    )
  if tokens and others:
    raise UserError(
      f"{path} matches {tokens[0]} and {others[0]}: token files (*.bin) are read alone. Name only "
      "them."
    )
  return tokens


def _list_prepared_files(folder: Path) -> list[Path]:
  """Lists the files in the manifest of a folder, sorted by name.

  Returns:
    The files; [] if there is no manifest, or a JSON file of that name which jgpt did not write.

  Raises:
    UserError: if the manifest is damaged, or says that the folder is not finished. Without the
      manifest it is unknown which files are complete.
  """
  path = folder / PREPARATION_FILE
  if not os.path.lexists(path):
    return []
  files = shlex.quote(str(Path(glob.escape(str(folder)), "*.bin")))
  again = (
    "Make the folder again with python -m jgpt.prepare, or name the files to take, as in --set "
    f"data.path={files}"
  )
  try:
    value = read_json(path, MAX_PREPARATION_BYTES)
  except UserError as error:
    raise UserError(f"{str(error).rstrip('.')}. {again}") from None
  match value:
    case {"finished": False}:
      raise UserError(
        f"{folder} is not finished: its {PREPARATION_FILE} says so. Run the same python -m "
        "jgpt.prepare again."
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
  """Returns whether a value from an untrusted file is a printable file name without a folder."""
  is_name = isinstance(name, str) and name.isprintable() and 0 < len(name) < 256
  return is_name and name != ".." and Path(name).name == name


def _make_glob(path: str, folder: Path, files: Sequence[Path]) -> str:
  """Returns the glob, quoted for a shell, that matches all files with the suffix of `files`."""
  steps = [] if all(file.parent == folder for file in files) else ["**"]
  return shlex.quote(str(Path(glob.escape(path), *steps, f"*{files[0].suffix}")))


def _check_no_pickled_vocabulary(files: Sequence[Path]) -> None:
  """Checks that no folder of the files has its vocabulary in a pickle, as nanoGPT writes it.

  Raises `UserError` with the setting that trains on the text instead otherwise.
  """
  for folder in sorted({file.parent for file in files}):
    if (folder / CHARACTERS_FILE).is_file() and not (folder / TOKENIZER_FILE).is_file():
      text = folder / "input.txt"
      text = shlex.quote(str(text)) if text.is_file() else "FILE"
      raise UserError(
        f"{folder} has a {CHARACTERS_FILE}: the ids of its token files are characters, listed in "
        "that pickle, which jgpt does not read. Train on the text that they were made from: "
        f"--set data.path={text} --set data.tokenizer=characters"
      )


def part_of(file: Path, path: str) -> str:
  """Returns the part that a token file belongs to, by its name: "train", "heldout" or "test".

  The last of the words "train", "training"; "val", "valid", "validation"; "test" in the name
  decides; without any of them the part is "train". Words are separated by anything but letters and
  digits. The names of folders count too, if they are below the folder `path`, or match the glob
  `path` from its first wildcard on.

  Args:
    file: one of the files from `find_token_files`.
    path: `data.path`.
  """
  root = Path(os.path.expanduser(path))
  if not root.is_dir():
    steps = (
      [] if root.exists() else [n for n, step in enumerate(root.parts) if glob.has_magic(step)]
    )
    root = Path(*root.parts[: steps[0]]) if steps else root.parent
  name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
  return part_of_name(name) or "train"


def part_of_name(name: str) -> str | None:
  """Returns the part of the last word in a name that is in `PART_WORDS`; None without one."""
  parts = [PART_WORDS[word] for word in re.split(r"[\W_]+", name.lower()) if word in PART_WORDS]
  return parts[-1] if parts else None


def find_tokenizer(files: Sequence[Path], config: DataConfig) -> Tokenizer | None:
  """Finds the tokenizer of token files: the `tokenizer.json` in their folder.

  Args:
    files: from `find_token_files`.
    config: `tokenizer` must be the kind of the tokenizer that is found.

  Returns:
    The tokenizer; None without such a file if `config.tokenizer` is "gpt2" or "bytes", which need
    none.

  Raises:
    UserError: if the file is damaged or of another kind, folders differ, or there is none where it
      is needed.
  """
  found = sorted(
    {file.parent / TOKENIZER_FILE for file in files if (file.parent / TOKENIZER_FILE).is_file()}
  )
  if not found:
    if config.tokenizer in ("gpt2", "bytes"):
      return None
    raise UserError(
      f"{files[0].parent} has token files and no {TOKENIZER_FILE} that says what their ids mean, "
      f"which data.tokenizer={config.tokenizer} needs. Train on the text itself, "
      "--set data.path=TEXT; or make token files of it with python -m jgpt.prepare --tokenizer "
      f"RUN, the folder of a run on that text; or copy RUN/{TOKENIZER_FILE} there"
    )
  tokenizer = read_tokenizer(found[0])
  for other in found[1:]:
    if read_tokenizer(other).digest != tokenizer.digest:
      raise UserError(
        f"{found[0]} and {other} are different tokenizers, and the token files of a run must all "
        "have the same one."
      )
  check_tokenizer_kind(tokenizer, config, str(found[0]))
  return tokenizer


def check_tokenizer_kind(tokenizer: Tokenizer, config: DataConfig, location: str) -> None:
  """Checks that a tokenizer has the kind and size of the settings.

  Raises `UserError` with the settings that match the tokenizer otherwise.

  Args:
    tokenizer: one that was found in a file.
    config: `tokenizer` and `bpe_vocab_size` are compared.
    location: names the tokenizer in the error.
  """
  kind, is_bpe = kind_of(tokenizer), config.tokenizer == "bpe"
  size = tokenizer.vocab_size
  if kind != config.tokenizer or (is_bpe and config.bpe_vocab_size != size):
    settings = [
      f"data.tokenizer={kind}",
      *([f"data.bpe_vocab_size={size}"] if kind == "bpe" else []),
    ]
    settings += ["data.mark_paragraphs=false"] if config.mark_paragraphs and kind != "gpt2" else []
    got = f"data.tokenizer={config.tokenizer}" + (
      f" with data.bpe_vocab_size={config.bpe_vocab_size}" if is_bpe else ""
    )
    raise UserError(
      f"{location} is a tokenizer of the kind {kind} with {size:,} ids, and the run's is {got}. "
      "Try " + " ".join(f"--set {setting}" for setting in settings)
    )


def read_tokenizer(path: Path) -> Tokenizer:
  """Reads a `tokenizer.json` of jgpt, or of Hugging Face for the same kinds of tokenizer.

  Raises:
    UserError: naming the file, if it is damaged or another kind of tokenizer.
  """
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
