"""Making token files from text of any size: in little memory, on all cores, and going on after an interruption.

Responsible for the folder of token files: its shards, its `tokenizer.json`, and the manifest `prepare.json`, which says
what they were made from, which are complete, and where the next one begins. Not responsible for the bytes of a token file
(`shards.py`), for cutting text (`documents.py`) or for ids (`encoding.py`). Imports no jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jgpt.data import sources
from jgpt.data.paths import (
  MAX_PREPARATION_BYTES,
  PREPARATION_FILE,
  TOKENIZER_FILE,
  is_plain_name,
  list_files,
  part_of_name,
  read_tokenizer,
)
from jgpt.data.token_files import HEADER_BYTES, id_bytes, write_tokens
from jgpt.errors import UserError
from jgpt.system import locks
from jgpt.system.files import digest_file, read_json, sync_folder, write_json
from jgpt.text.bpe import make_gpt2_tokenizer
from jgpt.text.documents import KINDS, Block, DocumentEncoder, Position, check_jsonl, parse_block, read_blocks
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

PREPARATION_FORMAT = 1
INPUT_BYTES = 120  # of an input in the manifest, besides its name
MAX_THREADS = 16  # they share one interpreter, which has no more to give
MAX_WAITING_BYTES = 1 << 24  # of text that was read and is not written; a line of JSON may be all of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
  """What is asked for.

  Attributes:
    inputs: files of text or JSON lines, in order; from `find_inputs`.
    tokenizer: from `find_tokenizer`.
    out: the folder to make.
    documents: what a document of text is: "paragraphs", "lines" or "files".
    field: of the text in JSON lines.
    heldout_tokens: ids of the validation shard, the first of all; 0 makes none.
    shard_tokens: ids of each training shard but the last.
  """

  inputs: Sequence[Path]
  tokenizer: Tokenizer
  out: Path
  documents: str = "paragraphs"
  field: str = "text"
  heldout_tokens: int = 32_768
  shard_tokens: int = 100_000_000

  def __post_init__(self):
    if self.documents not in KINDS:
      raise UserError(f"--documents {self.documents} must be one of {', '.join(KINDS)}.")
    for name, least in (("heldout_tokens", 0), ("shard_tokens", 1)):
      if not least <= getattr(self, name) < 2**31:
        option = f"--{name.replace('_', '-')} {getattr(self, name)}"
        raise UserError(f"{option} must be at least {least}, and below 2**31, which is what a header can count.")
    if sum(len(str(file)) + INPUT_BYTES for file in self.inputs) > MAX_PREPARATION_BYTES // 2:
      raise UserError(
        f"--data is {len(self.inputs):,} files, more than {PREPARATION_FILE} can list. Join them, as JSON lines"
      )
    for file in self.inputs:
      if file.resolve().is_relative_to(self.out.resolve()):
        raise UserError(f"{file} is inside --out {self.out}. Choose another --out")
      check_jsonl(file)

  @property
  def prefix(self) -> str:
    """How the shards' names begin: with the folder's, unless that would hide them or say that all are held out."""
    name = self.out.resolve().name.lstrip(".")
    return name if name and part_of_name(name) != "heldout" else "tokens"

  def shard_name(self, number: int) -> str:
    """The name of a shard: number 0 is for validation, and the others for training."""
    return f"{self.prefix}_{'train' if number else 'val'}_{number:06}.bin"

  @property
  def num_bytes(self) -> int:
    """Of all inputs."""
    return sum(file.stat().st_size for file in self.inputs)

  def describe(self) -> dict[str, Any]:
    """What decides the ids, as the manifest records it."""
    base = os.path.commonpath([file.resolve().parent for file in self.inputs])
    inputs = []
    for file in self.inputs:
      stat = file.stat()
      name = Path(os.path.relpath(file.resolve(), base)).as_posix()
      inputs.append({"name": name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns})
    names = ("documents", "field", "heldout_tokens", "shard_tokens")
    options = {name: getattr(self, name) for name in names}
    return {
      "format": PREPARATION_FORMAT,
      "inputs": inputs,
      **options,
      "tokenizer_sha256": self.tokenizer.digest,
      "prefix": self.prefix,
    }


def find_inputs(path: str) -> list[Path]:
  """Lists the files that `path` names: one file, a folder's *.txt and *.jsonl, or a glob's; raises `UserError` for none."""
  files = list_files(path, ["*.txt", "*.jsonl"])
  if files is None:
    file = Path(os.path.expanduser(path))
    if not os.path.isfile(file):
      raise UserError(f"there is no file {path}.")
    return [file]
  if not files:
    raise UserError(f"the folder {path} holds no *.txt or *.jsonl file. For others try --data '{Path(path, '*')}'")
  return files


def choose_tokenizer(word: str) -> Tokenizer:
  """Finds a tokenizer: "gpt2", "bytes", or the path of a `tokenizer.json` or of a folder that holds one.

  Such a file is jgpt's, of a run or of token files, or Hugging Face's for the same tokenizer.

  Raises:
    UserError: if there is none, or it has the BOS of documents in rows, which a stream has no place for.
  """
  if word == "gpt2":
    return make_gpt2_tokenizer(*sources.find_gpt2_files())
  if word == "bytes":
    return ByteTokenizer()
  path = Path(os.path.expanduser(word))
  path = path / TOKENIZER_FILE if os.path.isdir(path) else path
  if not os.path.isfile(path):
    raise UserError(f"--tokenizer {word} must be gpt2, bytes, a {TOKENIZER_FILE} or a run folder; there is no file {path}.")
  tokenizer = read_tokenizer(path)
  if isinstance(tokenizer, CharTokenizer) and tokenizer.bos:
    raise UserError(f"{path} is the tokenizer of a run of documents, with BOS; token files hold one stream. Choose another")
  return tokenizer


# --- The folder ---


def prepare(wanted: Preparation, on_progress: Callable[[int, int], None] = lambda done, tokens: None) -> dict[str, Any]:
  """Makes token files, or goes on with making them.

  Killed at any moment and called again, it goes on after the last complete shard, and the files are in the end the same,
  byte by byte, as those of a call that was not interrupted. A finished folder is left as it is.

  Args:
    wanted: what to make, and where.
    on_progress: is called with the bytes of input and the ids that are done.

  Returns:
    The manifest.

  Raises:
    UserError: if the folder holds something else, the inputs cannot be read, or hold too little for a shard.
  """
  try:
    new = [folder for folder in (wanted.out, *wanted.out.parents) if not folder.exists()]
    wanted.out.mkdir(parents=True, exist_ok=True)
    with locks.hold(wanted.out):
      manifest = _begin(wanted)
      try:
        if not manifest["finished"]:
          _go_on(wanted, manifest, on_progress)
      except UserError:
        if not manifest["files"]:
          _remove_beginning(wanted, new)
        raise
      return manifest
  except OSError as error:
    again = "The same command goes on from there when that is mended"
    raise UserError(f"cannot write to --out {wanted.out}: {error.strerror}. {again}") from None


def read_preparation(out: Path) -> dict[str, Any] | None:
  """Reads `prepare.json`; None where there is none; raises `UserError` where it is damaged."""
  path = out / PREPARATION_FILE
  if not os.path.lexists(path):
    return None
  again = f"Delete {out} to start over, or choose another --out"
  try:
    value = read_json(path, MAX_PREPARATION_BYTES)
  except UserError as error:
    raise UserError(f"{path} is damaged: {str(error).removeprefix(f'{path} ')} {again}") from None
  match value:
    case {"finished": bool(), "files": [*files], "next": {"start": dict(start), "skip": skip}}:
      known = dataclasses.asdict(Position())
      right = start.keys() <= known.keys() and all(_is_count(start[n], type(known[n])) for n in start) and _is_count(skip)
      if right and all(isinstance(f, dict) and is_plain_name(f.get("name")) and _is_count(f.get("tokens")) for f in files):
        return value
  raise UserError(f'{path} is damaged: "finished", "files" or "next" is not as it was written. {again}')


def _is_count(value: Any, kind: type = int) -> bool:
  """Whether a value is of a type, and if it is a number neither negative nor beyond what files have bytes."""
  return type(value) is kind and 0 <= value < 2**63


def _begin(wanted: Preparation) -> dict[str, Any]:
  """The manifest of the folder, checked, or a new one: in an empty folder, or in the place of one without any shard."""
  out, asked = wanted.out, wanted.describe()
  manifest = read_preparation(out)
  if manifest is None and (shown := sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))):
    raise UserError(f"--out {out} holds other files ({shown[0]}), which are left alone. Choose another --out")
  differing = [name for name in asked if (manifest or {}).get(name) != asked[name]]
  if differing and manifest and (manifest["files"] or manifest["finished"]):
    what = ", ".join(differing[:3])
    raise UserError(f"--out {out} was made from something else: {what} differs. Choose another --out, or delete {out}")
  if differing:
    start = {"start": dataclasses.asdict(Position()), "skip": 0}
    _remove_beginning(wanted)
    manifest = {**asked, "files": [], "finished": False, "next": start}
    write_json(out / PREPARATION_FILE, manifest)
  for file in manifest["files"]:
    path, need = out / file["name"], HEADER_BYTES + file["tokens"] * id_bytes(wanted.tokenizer.vocab_size)
    size = path.stat().st_size if path.is_file() else None
    if size != need:
      raise UserError(f"{path} has {size or 'no'} bytes and was written with {need:,}. Delete {out} to start over")
  if not (out / TOKENIZER_FILE).exists():
    write_json(out / TOKENIZER_FILE, wanted.tokenizer.to_json())
  return manifest


def _remove_beginning(wanted: Preparation, folders: Sequence[Path] = ()) -> None:
  """Removes what was written before a shard was recorded, and then those of the folders that are empty."""
  for name in (PREPARATION_FILE, TOKENIZER_FILE, wanted.shard_name(0), wanted.shard_name(1), locks.LOCK_FILE):
    (wanted.out / name).unlink(missing_ok=True)
  with contextlib.suppress(OSError):
    for folder in folders:
      folder.rmdir()


# --- Shards ---


def _go_on(wanted: Preparation, manifest: dict[str, Any], on_progress: Callable[[int, int], None]) -> None:
  """Writes the shards that are missing; the manifest is written after each."""
  sizes = [file["bytes"] for file in manifest["inputs"]]
  start, skip = Position(**manifest["next"]["start"]), manifest["next"]["skip"]
  encoder = DocumentEncoder(wanted.tokenizer)
  encoder.encode([""])  # a package that is missing is missed here, and not by every thread
  blocks = read_blocks(wanted.inputs, sizes, wanted.documents, start)

  def encode(block: Block) -> np.ndarray:
    texts = parse_block(block, wanted.field, part=encoder.eot_id is None)
    try:
      return encoder.encode(texts, inside=block.start.inside)
    except UserError as error:
      raise UserError(f"{block.path}: {error}") from None

  with _encode_in_order(blocks, encode) as arrays:
    ids = _Ids(arrays, start, skip)
    while ids.are_left():
      is_first = not manifest["files"] and wanted.heldout_tokens > 0
      limit = wanted.heldout_tokens if is_first else wanted.shard_tokens
      number = 0 if is_first else len(manifest["files"]) + (not wanted.heldout_tokens)
      path = wanted.out / wanted.shard_name(number)
      before = sum(file["tokens"] for file in manifest["files"])
      with write_tokens(path, wanted.tokenizer.vocab_size) as writer:
        while writer.count < limit and ids.are_left():
          writer.append(ids.take(limit - writer.count))
          on_progress(sum(sizes[: ids.start.file]) + ids.start.offset, before + writer.count)
        if is_first and not ids.are_left():
          few = f"the input has only {writer.count:,} tokens, none beyond the {limit:,} for validation"
          raise UserError(f"{few}. Try a smaller --heldout-tokens, or 0")
      sync_folder(wanted.out)  # before the manifest says that the file is there
      manifest["files"].append({"name": path.name, "tokens": writer.count, "sha256": digest_file(path)})
      manifest["next"] = {"start": dataclasses.asdict(ids.start), "skip": ids.used}
      write_json(wanted.out / PREPARATION_FILE, manifest)
  if not manifest["files"]:
    raise UserError(f"the input holds no text: {wanted.inputs[0]}.")
  manifest["finished"] = True
  write_json(wanted.out / PREPARATION_FILE, manifest)
  on_progress(sum(sizes), sum(file["tokens"] for file in manifest["files"]))


class _Ids:
  """The ids of blocks, taken in pieces.

  Attributes:
    start: where the block begins whose ids are taken.
    used: how many of them are taken.
  """

  def __init__(self, arrays: Iterator[tuple[Position, np.ndarray]], start: Position, skip: int):
    self._arrays, self._ids = arrays, np.empty(0, np.uint32)
    self.start, self.used = start, 0
    while skip and self._next():
      self.used = min(skip, len(self._ids))
      skip -= self.used

  def _next(self) -> bool:
    following = next(self._arrays, None)
    if following is not None:
      self.start, self._ids = following
      self.used = 0
    return following is not None

  def are_left(self) -> bool:
    """Whether there are ids to take; moves on to their block."""
    while self.used == len(self._ids):
      if not self._next():
        return False
    return True

  def take(self, limit: int) -> np.ndarray:
    """The next ids of the block, at most `limit`."""
    taken = self._ids[self.used : self.used + limit]
    self.used += len(taken)
    return taken


@contextlib.contextmanager
def _encode_in_order(
  blocks: Iterator[Block], encode: Callable[[Block], np.ndarray]
) -> Iterator[Iterator[tuple[Position, np.ndarray]]]:
  """Gives an iterator of where each block begins and its ids; threads work ahead of it, as far as the memory allows.

  Where the body ends early, what the threads have not begun is dropped.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  num_threads = min(cores, MAX_THREADS)
  pool = ThreadPoolExecutor(num_threads)

  def results() -> Iterator[tuple[Position, np.ndarray]]:
    waiting, num_bytes = deque(), 0
    for block in blocks:
      while waiting and (len(waiting) > 2 * num_threads or num_bytes + len(block.content) > MAX_WAITING_BYTES):
        start, size, future = waiting.popleft()
        num_bytes -= size
        yield start, future.result()
      waiting.append((block.start, len(block.content), pool.submit(encode, block)))
      num_bytes += len(block.content)
    while waiting:
      start, _, future = waiting.popleft()
      yield start, future.result()

  try:
    yield results()
  finally:
    pool.shutdown(cancel_futures=True)
