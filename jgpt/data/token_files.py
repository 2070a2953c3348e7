"""Reads, checks and writes token files: ids on disk, in the formats of llm.c and nanoGPT.

  llm.c     a header of 256 int32, little-endian: magic, version, count, then zeros; `count` ids
            magic 20240520, version 1: uint16 ids; magic 20240801, version 7: uint32 ids
  nanoGPT   uint16 ids, little-endian, without a header

Several files can be read as one stream. Which files a path names is decided in `paths.py`, and ids
are made from text in `preparation.py`. Imports no jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pickletools
import stat
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jgpt.errors import UserError

HEADER_BYTES = 1024
# Magic -> version, dtype of an id.
TOKEN_FORMATS = {
  20240520: (1, np.dtype("<u2")),
  20240801: (7, np.dtype("<u4")),
}
OTHER_MAGICS = {
  20240326: "llm.c's weights of a model",
  20240327: "llm.c's debug state",
  20240328: "llm.c's tokenizer",
  20240522: "llm.c's questions for an evaluation (HellaSwag)",
}
# The first bytes of files in other formats.
SIGNATURES = {
  b"\x93NUMPY": "a NumPy array (.npy)",
  b"PK\x03\x04": "a zip archive (.npz, .pt)",
  b"\x1f\x8b\x08": "compressed by gzip",
  b"\x28\xb5\x2f\xfd": "compressed by zstd",
  b"\x89HDF": "an HDF5 file",
  b"PAR1": "a Parquet file",
}
CHECK_BLOCK_BYTES = 4 << 20
HINT = "Token files are made by python -m jgpt.prepare"


@dataclasses.dataclass(frozen=True)
class TokenFile:
  """The layout of one token file.

  Attributes:
    path: the file.
    offset: bytes before the first id.
    dtype: of an id.
    count: number of ids, at least 1.
  """

  path: Path
  offset: int
  dtype: np.dtype
  count: int


# --- Reading ---


def read_header(path: Path) -> TokenFile:
  """Reads the layout of a token file from its header and size, without reading ids.

  Raises:
    UserError: naming file and field, if the file cannot be read, has no ids, is damaged, or is not
      a token file.
  """
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
      raise UserError(f"cannot read {path}: it is no plain file.")
    with open(path, "rb") as file:
      head = file.read(HEADER_BYTES)
      size = os.fstat(file.fileno()).st_size
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}.") from None
  return parse_header(path, head, size)


def parse_header(path: Path, head: bytes, size: int) -> TokenFile:
  """Parses the beginning of a token file.

  A header is recognized by its magic. A header with a damaged magic is recognized by the zeros that
  follow its first 12 bytes, which no tokenized text has.

  Args:
    path: names the file in errors.
    head: the file's first `HEADER_BYTES` bytes, or all of them where there are fewer.
    size: of the file in bytes.

  Raises:
    UserError: as `read_header` does.
  """
  if not size:
    raise UserError(f"{path} is empty: a token file needs at least 1 id. {HINT}.")
  magic = int.from_bytes(head[:4], "little", signed=True) if len(head) >= 4 else None
  if magic in TOKEN_FORMATS:
    return _parse_fields(path, head, size)
  if what := _identify_other_format(head, size):
    raise UserError(f"{path} holds no tokens: it is {what}. {HINT}.")
  if len(head) == HEADER_BYTES and not any(head[12:]):
    magics = " or ".join(map(str, TOKEN_FORMATS))
    raise UserError(
      f"{path} has magic {magic} in its header and must have {magics}: it is damaged. {HINT}."
    )
  if size % 2:
    raise UserError(
      f"{path} has {size:,} bytes, and ids of 16 bits without a header need an even number: it is "
      f"cut or not a token file. {HINT}."
    )
  ids = np.frombuffer(head, "<u2", len(head) // 2)
  if len(ids) >= 32 and ids.any() and not ids[1::2].any():
    raise UserError(
      f"{path} has an id of 0 in every second place: these are ids of 32 bits or more, and without "
      f"a header they must have 16. {HINT}."
    )
  return TokenFile(path, 0, np.dtype("<u2"), size // 2)


def _parse_fields(path: Path, head: bytes, size: int) -> TokenFile:
  """Parses and checks version and count of a file that begins with a magic of `TOKEN_FORMATS`."""
  if len(head) < HEADER_BYTES:
    raise UserError(
      f"{path} has {size:,} bytes, and its header alone needs {HEADER_BYTES:,}: it is cut. {HINT}."
    )
  magic, version, count = struct.unpack("<3i", head[:12])
  need, dtype = TOKEN_FORMATS[magic]
  if version != need:
    raise UserError(
      f"{path} has version {version} in its header, and magic {magic} needs version {need}. {HINT}."
    )
  if count < 1:
    raise UserError(f"{path} has count {count} in its header, and needs at least 1 id. {HINT}.")
  if size != HEADER_BYTES + count * dtype.itemsize:
    raise UserError(
      f"{path} has count {count:,} in its header, which makes "
      f"{HEADER_BYTES + count * dtype.itemsize:,} bytes, and has {size:,}: it is "
      f"{'cut' if size < HEADER_BYTES + count * dtype.itemsize else 'damaged'}. {HINT}, or copy it "
      "again."
    )
  return TokenFile(path, HEADER_BYTES, dtype, count)


def _identify_other_format(head: bytes, size: int) -> str:
  """Returns what kind of file this is if it is not a token file; "" if it may be one."""
  number = int.from_bytes(head[:4], "little")
  if number in OTHER_MAGICS:
    return OTHER_MAGICS[number]
  if int.from_bytes(head[:4], "big") in TOKEN_FORMATS:
    return "tokens in big-endian order, and little-endian is needed"
  for signature, what in SIGNATURES.items():
    if head.startswith(signature):
      return what
  if _looks_pickled(head, size):
    return "a pickle (.pkl, .pt)"
  if _looks_like_text(head, size):
    return "text. Give a text a name that does not end in .bin"
  return ""


def _looks_pickled(head: bytes, size: int) -> bool:
  """Returns whether a file begins like a pickle.

  After the protocol there must be a frame that fits in the file, or at least seven more opcodes.
  """
  if head[:1] != b"\x80" or head[1:2] not in (b"\x02", b"\x03", b"\x04", b"\x05"):
    return False
  if head[2:3] == b"\x95" and int.from_bytes(head[3:11], "little") <= size:
    return True
  count = 0
  with contextlib.suppress(ValueError):  # not an opcode, or cut off at the end of `head`
    for _ in pickletools.genops(head):  # parses, and executes nothing
      count += 1
  return count >= 8


def _looks_like_text(head: bytes, size: int) -> bool:
  """Returns whether a file begins with UTF-8 without control characters, which ids do contain."""
  if size < 16:  # a few ids may look like text by chance
    return False
  controls = {*range(0x20), 0x7F} - set(b"\t\n\f\r\x1b")
  try:
    text = head.decode()
  except UnicodeDecodeError as error:
    if error.end < len(head) or size == len(head):
      return False
    text = head[: error.start].decode()  # the last character is cut off at the end of `head`
  return not any(ord(c) in controls for c in text)


def check_ids(file: TokenFile, vocab_size: int) -> str:
  """Checks that every id of a file is in the vocabulary, and computes the file's SHA-256.

  JAX clamps an index that is out of range, so that a wrong id would go unnoticed in training.

  Args:
    file: from `read_header`.
    vocab_size: ids of the tokenizer.

  Returns:
    SHA-256 of the file, in hexadecimal.

  Raises:
    UserError: naming the first id that is too large, or if the file changed since `read_header`.
  """
  digest, buffer, count = hashlib.sha256(), memoryview(bytearray(CHECK_BLOCK_BYTES)), 0
  try:
    with open(file.path, "rb", buffering=0) as source:
      digest.update(source.read(file.offset))
      while num_bytes := _fill_buffer(source, buffer):
        digest.update(buffer[:num_bytes])
        ids = np.frombuffer(buffer, file.dtype, num_bytes // file.dtype.itemsize)
        if len(ids) and ids.max() >= vocab_size:
          first = int(np.argmax(ids >= vocab_size))
          raise UserError(
            f"{file.path} has id {ids[first]:,} at position {count + first:,}, and the tokenizer's "
            f"ids are below {vocab_size:,}: it was made with another tokenizer, or is damaged. "
            "--set data.tokenizer= names the tokenizer that it was made with"
          )
        count += len(ids)
  except OSError as error:
    raise UserError(f"cannot read {file.path}: {error.strerror}.") from None
  if count != file.count:
    raise UserError(
      f"{file.path} had {file.count:,} ids, and {count:,} when they were read: something writes to "
      "it."
    )
  return digest.hexdigest()


def _fill_buffer(source, buffer: memoryview) -> int:
  """Reads until the buffer is full or the file ends, so that no id is split; returns the bytes."""
  filled = 0
  while filled < len(buffer) and (num_bytes := source.readinto(buffer[filled:])):
    filled += num_bytes
  return filled


def check_files(train: Sequence[TokenFile], heldout: Sequence[TokenFile], vocab_size: int) -> str:
  """Checks the ids of all files, several files at a time.

  Args:
    train: the training files, in order.
    heldout: the held-out files, in order.
    vocab_size: ids of the tokenizer.

  Returns:
    A digest of the contents and their parts that does not depend on the names of the files:
    SHA-256, in hexadecimal, of the JSON of two lists, which are the SHA-256 of the training files
    and of the held-out files, in order.

  Raises:
    UserError: as `check_ids` does, for the first file that fails.
  """
  with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    digests = list(pool.map(lambda file: check_ids(file, vocab_size), [*train, *heldout]))
  parts = [digests[: len(train)], digests[len(train) :]]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFiles:
  """The ids of several files as one stream, which are read from the disk on demand.

  Attributes:
    maps: memory maps of the files' ids, in order.
    ends: int64 [files], number of ids up to the end of each file.
  """

  maps: tuple[np.ndarray, ...]
  ends: np.ndarray

  def __len__(self) -> int:
    return int(self.ends[-1]) if len(self.ends) else 0

  def read(self, start: int, stop: int) -> np.ndarray:
    """Reads the ids from `start` up to `stop`, across the boundaries of files.

    Returns:
      int32 [stop - start].

    Raises:
      IndexError: unless 0 <= start <= stop <= len.
    """
    if not 0 <= start <= stop <= len(self):
      raise IndexError(f"ids {start} to {stop} of {len(self)}")
    ids, done = np.empty(stop - start, np.int32), start
    number = int(np.searchsorted(self.ends, start, side="right"))
    while done < stop:
      part, end = self.maps[number], int(self.ends[number])
      last = min(stop, end)
      ids[done - start : last - start] = part[len(part) - (end - done) : len(part) - (end - last)]
      done, number = last, number + 1
    return ids

  def part(self, start: int, stop: int) -> TokenFiles:
    """Returns the ids from `start` up to `stop` as a stream of their own, without reading them.

    Raises:
      IndexError: unless 0 <= start <= stop <= len.
    """
    if not 0 <= start <= stop <= len(self):
      raise IndexError(f"ids {start} to {stop} of {len(self)}")
    begins = self.ends - [len(ids) for ids in self.maps]
    cut = [
      ids[max(0, start - b) : max(0, stop - b)]
      for ids, b in zip(self.maps, begins.tolist(), strict=True)
    ]
    return TokenFiles(tuple(cut), np.cumsum([len(ids) for ids in cut], dtype=np.int64))


def open_files(files: Sequence[TokenFile]) -> TokenFiles:
  """Maps files into memory as one stream, without reading their ids."""
  maps = tuple(np.memmap(file.path, file.dtype, "r", file.offset, (file.count,)) for file in files)
  return TokenFiles(maps, np.cumsum([file.count for file in files], dtype=np.int64))


# --- Writing ---


def id_bytes(vocab_size: int) -> int:
  """Returns the bytes of an id, 2 or 4, in the files that `write_tokens` writes."""
  return TOKEN_FORMATS[_choose_magic(vocab_size)][1].itemsize


def _choose_magic(vocab_size: int) -> int:
  """Returns the magic of the format with the smallest ids that hold a vocabulary."""
  return next(
    magic for magic, (_, dtype) in TOKEN_FORMATS.items() if vocab_size <= 1 << 8 * dtype.itemsize
  )


class TokenWriter:
  """Writes ids after a header that is filled in at the end; made by `write_tokens`.

  Attributes:
    count: number of ids written so far.
  """

  def __init__(self, file, vocab_size: int):
    self._file, self._vocab_size = file, vocab_size
    self._magic = _choose_magic(vocab_size)
    self._version, self._dtype = TOKEN_FORMATS[self._magic]
    self.count = 0
    file.write(bytes(HEADER_BYTES))

  def append(self, ids: np.ndarray) -> None:
    """Writes ids after those before.

    Args:
      ids: [n], any integer dtype.

    Raises:
      ValueError: if an id is not in the vocabulary, or there are more ids than a header can count.
    """
    if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocab_size:
      raise ValueError(f"ids {ids.min()} to {ids.max()} of a vocabulary of {self._vocab_size}")
    self.count += len(ids)
    if self.count >= 2**31:
      raise ValueError(f"{self.count} ids are more than a header can count")
    self._file.write(np.ascontiguousarray(ids, self._dtype).data)

  def write_header(self) -> None:
    """Writes the header, with the number of ids appended so far."""
    self._file.seek(0)
    self._file.write(struct.pack("<3i", self._magic, self._version, self.count))


@contextlib.contextmanager
def write_tokens(path: Path, vocab_size: int) -> Iterator[TokenWriter]:
  """Writes a token file with a header.

  The ids are uint16 if the vocabulary has at most 65,536 ids, else uint32. They are written to
  `.<name>.tmp`, which is renamed once all of them are on the disk, and deleted if the body raises.
  The new name survives a power failure only after the folder is synced (`sync_folder`).

  Args:
    path: of the file; replaced if it exists.
    vocab_size: ids of the tokenizer.
  """
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    with open(temporary, "wb") as file:
      writer = TokenWriter(file, vocab_size)
      yield writer
      writer.write_header()
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
