"""Makes a folder of token files from text of any size, on all cores, and resumes when interrupted.

The folder holds the shards, `tokenizer.json`, and the manifest `prepare.json`: what the shards were
made from, which of them are complete, and where the next one begins. The format of a token file is
in `token_files.py`; splitting text into documents and encoding them is in `text/documents.py`.
Imports no jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import shlex
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
from jgpt.text.documents import (
  KINDS,
  Block,
  DocumentEncoder,
  Position,
  check_jsonl,
  parse_block,
  read_blocks,
)
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

PREPARATION_FORMAT = 1
INPUT_BYTES = 120  # size of an input's entry in the manifest, without its name
MAX_THREADS = 16  # more are not faster: they share one interpreter lock
# Text that has been read and not yet written. A single line of JSON may be larger.
MAX_WAITING_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
  """The settings of a folder of token files.

  Attributes:
    inputs: files of text or JSON lines, in the order of the stream; from `find_inputs`.
    tokenizer: from `choose_tokenizer`.
    out: the folder to make.
    documents: what counts as a document in a text file: "paragraphs", "lines" or "files".
    field: key of the text in JSON lines.
    heldout_tokens: ids in the validation shard, which are the first of the stream; 0 makes none.
    shard_tokens: ids in each training shard; the last may have fewer.

  Raises:
    UserError: if a number is out of range, there are too many inputs for the manifest, or an input
      is in `out` or is JSON but not *.jsonl.
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
        raise UserError(
          f"{option} must be at least {least}, and below 2**31, which is what a header can count."
        )
    if sum(len(str(file)) + INPUT_BYTES for file in self.inputs) > MAX_PREPARATION_BYTES // 2:
      raise UserError(
        f"--data is {len(self.inputs):,} files, more than {PREPARATION_FILE} can list. Join them, "
        "as JSON lines"
      )
    for file in self.inputs:
      if file.resolve().is_relative_to(self.out.resolve()):
        raise UserError(f"{file} is inside --out {self.out}. Choose another --out")
      check_jsonl(file)

  @property
  def prefix(self) -> str:
    """Returns how the names of the shards begin.

    It is the name of the folder without leading dots, which would hide the files; or "tokens" if
    that name is empty or says "validation", which would make all shards held out.
    """
    name = self.out.resolve().name.lstrip(".")
    return name if name and part_of_name(name) != "heldout" else "tokens"

  def shard_name(self, number: int) -> str:
    """Returns the name of a shard: number 0 is for validation, the others are for training."""
    return f"{self.prefix}_{'train' if number else 'val'}_{number:06}.bin"

  @property
  def num_bytes(self) -> int:
    """Returns the size of all inputs."""
    return sum(file.stat().st_size for file in self.inputs)

  def describe(self) -> dict[str, Any]:
    """Returns everything that decides the ids, as the manifest records it."""
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
  """Lists the input files that `path` names.

  Args:
    path: of a file; of a folder, which stands for its *.txt and *.jsonl files; or a glob.

  Raises:
    UserError: if there is no such file.
  """
  files = list_files(path, ["*.txt", "*.jsonl"])
  if files is None:
    file = Path(os.path.expanduser(path))
    if not os.path.isfile(file):
      raise UserError(f"there is no file {path}.")
    return [file]
  if not files:
    others = shlex.quote(str(Path(glob.escape(str(path)), "*")))
    raise UserError(
      f"the folder {path} holds no *.txt or *.jsonl file. For others try --data {others}"
    )
  return files


def choose_tokenizer(word: str) -> Tokenizer:
  """Returns the tokenizer that --tokenizer names.

  Args:
    word: "gpt2", "bytes", or the path of a `tokenizer.json` (jgpt's or Hugging Face's) or of a
      folder that has one.

  Raises:
    UserError: if there is no such file, or the tokenizer has a BOS, which belongs to documents in
      rows and not to a stream.
  """
  if word == "gpt2":
    return make_gpt2_tokenizer(*sources.find_gpt2_files())
  if word == "bytes":
    return ByteTokenizer()
  path = Path(os.path.expanduser(word))
  path = path / TOKENIZER_FILE if os.path.isdir(path) else path
  if not os.path.isfile(path):
    raise UserError(
      f"--tokenizer {word} must be gpt2, bytes, a {TOKENIZER_FILE} or a run folder; there is no "
      f"file {path}."
    )
  tokenizer = read_tokenizer(path)
  if isinstance(tokenizer, CharTokenizer) and tokenizer.bos:
    raise UserError(
      f"{path} is the tokenizer of a run of documents, with BOS; token files hold one stream. "
      "Choose another"
    )
  return tokenizer


# --- The folder ---


def prepare(
  wanted: Preparation, on_progress: Callable[[int, int], None] = lambda done, tokens: None
) -> dict[str, Any]:
  """Makes token files, or resumes after the last complete shard.

  A call that was killed at any moment and repeated leaves the same files, byte for byte, as one
  that was not interrupted. A finished folder is not changed.

  Args:
    wanted: what to make, and where.
    on_progress: called with the bytes of input and the number of ids that are done.

  Returns:
    The manifest.

  Raises:
    UserError: if the folder has other content, or the inputs cannot be read or are too short for a
      shard.
  """
  try:
    new = [folder for folder in (wanted.out, *wanted.out.parents) if not folder.exists()]
    wanted.out.mkdir(parents=True, exist_ok=True)
    with locks.hold(wanted.out):
      manifest = _load_or_create_manifest(wanted)
      try:
        if not manifest["finished"]:
          _write_shards(wanted, manifest, on_progress)
      except UserError:
        if not manifest["files"]:
          _remove_unrecorded_files(wanted, new)
        raise
      return manifest
  except OSError as error:
    again = "Fix this, and the same command continues after the last complete shard"
    raise UserError(f"cannot write to --out {wanted.out}: {error.strerror}. {again}") from None


def read_preparation(out: Path) -> dict[str, Any] | None:
  """Reads the manifest of a folder; returns None if there is none.

  Raises:
    UserError: if the manifest is damaged.
  """
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
      right = (
        start.keys() <= known.keys()
        and all(_is_count(start[n], type(known[n])) for n in start)
        and _is_count(skip)
      )
      if right and all(
        isinstance(f, dict) and is_plain_name(f.get("name")) and _is_count(f.get("tokens"))
        for f in files
      ):
        return value
  raise UserError(
    f'{path} is damaged: "finished", "files" or "next" is not as it was written. {again}'
  )


def _is_count(value: Any, kind: type = int) -> bool:
  """Returns whether a value from the manifest is of a type and in 0 <= value < 2**63."""
  return type(value) is kind and 0 <= value < 2**63


def _load_or_create_manifest(wanted: Preparation) -> dict[str, Any]:
  """Reads and checks the manifest of the folder, or writes a new one.

  A new one is written in an empty folder, and in one with other settings and no complete shard.

  Raises:
    UserError: if the folder has other files, or shards of other settings or other sizes.
  """
  out, asked = wanted.out, wanted.describe()
  manifest = read_preparation(out)
  if manifest is None and (
    shown := sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
  ):
    raise UserError(
      f"--out {out} holds other files ({shown[0]}), which are left alone. Choose another --out"
    )
  differing = [name for name in asked if (manifest or {}).get(name) != asked[name]]
  if differing and manifest and (manifest["files"] or manifest["finished"]):
    what = ", ".join(differing[:3])
    raise UserError(
      f"--out {out} was made from something else: {what} differs. Choose another --out, or delete "
      f"{out}"
    )
  if differing:
    start = {"start": dataclasses.asdict(Position()), "skip": 0}
    _remove_unrecorded_files(wanted)
    manifest = {**asked, "files": [], "finished": False, "next": start}
    write_json(out / PREPARATION_FILE, manifest)
  for file in manifest["files"]:
    path = out / file["name"]
    need = HEADER_BYTES + file["tokens"] * id_bytes(wanted.tokenizer.vocab_size)
    size = path.stat().st_size if path.is_file() else None
    if size != need:
      raise UserError(
        f"{path} has {size or 'no'} bytes and was written with {need:,}. Delete {out} to start over"
      )
  if not (out / TOKENIZER_FILE).exists():
    write_json(out / TOKENIZER_FILE, wanted.tokenizer.to_json())
  return manifest


def _remove_unrecorded_files(wanted: Preparation, folders: Sequence[Path] = ()) -> None:
  """Removes the files of a preparation without a complete shard, then the folders that are empty.

  Args:
    wanted: names the files.
    folders: removed in this order, up to the first that is not empty.
  """
  for name in (
    PREPARATION_FILE,
    TOKENIZER_FILE,
    wanted.shard_name(0),
    wanted.shard_name(1),
    locks.LOCK_FILE,
  ):
    (wanted.out / name).unlink(missing_ok=True)
  with contextlib.suppress(OSError):
    for folder in folders:
      folder.rmdir()


# --- Shards ---


def _write_shards(
  wanted: Preparation, manifest: dict[str, Any], on_progress: Callable[[int, int], None]
) -> None:
  """Writes the remaining shards, and the manifest after each."""
  sizes = [file["bytes"] for file in manifest["inputs"]]
  start, skip = Position(**manifest["next"]["start"]), manifest["next"]["skip"]
  encoder = DocumentEncoder(wanted.tokenizer)
  encoder.encode([""])  # raises here, and not in every thread, if a package is missing
  blocks = read_blocks(wanted.inputs, sizes, wanted.documents, start)

  def encode(block: Block) -> np.ndarray:
    texts = parse_block(block, wanted.field, separate=encoder.eot_id is None)
    try:
      return encoder.encode(texts, inside=block.start.inside)
    except UserError as error:
      raise UserError(f"{block.path}: {error}") from None

  with _encode_in_order(blocks, encode) as arrays:
    ids = _IdReader(arrays, start, skip)
    while ids.has_more():
      is_first = not manifest["files"] and wanted.heldout_tokens > 0
      limit = wanted.heldout_tokens if is_first else wanted.shard_tokens
      number = 0 if is_first else len(manifest["files"]) + (not wanted.heldout_tokens)
      path = wanted.out / wanted.shard_name(number)
      before = sum(file["tokens"] for file in manifest["files"])
      with write_tokens(path, wanted.tokenizer.vocab_size) as writer:
        while writer.count < limit and ids.has_more():
          writer.append(ids.take(limit - writer.count))
          on_progress(sum(sizes[: ids.start.file]) + ids.start.offset, before + writer.count)
        if is_first and not ids.has_more():
          few = (
            f"the input has only {writer.count:,} tokens, none beyond the {limit:,} for validation"
          )
          raise UserError(f"{few}. Try a smaller --heldout-tokens, or 0")
      sync_folder(wanted.out)  # before the manifest lists the file
      manifest["files"].append(
        {"name": path.name, "tokens": writer.count, "sha256": digest_file(path)}
      )
      manifest["next"] = {"start": dataclasses.asdict(ids.start), "skip": ids.used}
      write_json(wanted.out / PREPARATION_FILE, manifest)
  if not manifest["files"]:
    raise UserError(f"the input holds no text: {wanted.inputs[0]}.")
  manifest["finished"] = True
  write_json(wanted.out / PREPARATION_FILE, manifest)
  on_progress(sum(sizes), sum(file["tokens"] for file in manifest["files"]))


class _IdReader:
  """Reads the ids of blocks in pieces of any size.

  Attributes:
    start: where the current block begins in the inputs.
    used: number of the current block's ids that have been taken.
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

  def has_more(self) -> bool:
    """Returns whether there are more ids, after advancing to the block that has them."""
    while self.used == len(self._ids):
      if not self._next():
        return False
    return True

  def take(self, limit: int) -> np.ndarray:
    """Returns the next ids of the current block, at most `limit`."""
    taken = self._ids[self.used : self.used + limit]
    self.used += len(taken)
    return taken


@contextlib.contextmanager
def _encode_in_order(
  blocks: Iterator[Block], encode: Callable[[Block], np.ndarray]
) -> Iterator[Iterator[tuple[Position, np.ndarray]]]:
  """Encodes blocks in threads, and gives an iterator over their starts and ids, in order.

  The threads work ahead of the iterator, up to `MAX_WAITING_BYTES` of text. Leaving the context
  drops the blocks that no thread has begun.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  num_threads = min(cores, MAX_THREADS)
  pool = ThreadPoolExecutor(num_threads)

  def results() -> Iterator[tuple[Position, np.ndarray]]:
    waiting, num_bytes = deque(), 0
    for block in blocks:
      while waiting and (
        len(waiting) > 2 * num_threads or num_bytes + len(block.content) > MAX_WAITING_BYTES
      ):
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
