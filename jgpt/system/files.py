"""Reads small files from untrusted folders, and writes files atomically.

Reading accepts only regular files of bounded size and never waits for a pipe. After a write a
reader sees either the old file or the new one, also after a power cut. Imports no jax.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jgpt.errors import UserError

MAX_BYTES = 64 << 20  # of a small file; a tokenizer of 50,257 ids has 2 MB


# Errors that mean that the file itself is missing or damaged.
DAMAGE = ("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENXIO", "ENODEV", "EIO", "EBADMSG", "EUCLEAN")


def is_temporary(error: Exception) -> bool:
  """Returns whether the system's error is not about the file itself, so that a retry may succeed.

  Examples are a missing permission, too many open files and a file server that does not answer.
  """
  number = getattr(error, "errno", None)
  return number is not None and number not in (getattr(errno, name, None) for name in DAMAGE)


class UnreadableError(UserError):
  """A file that the operating system could not read.

  Attributes:
    errno: the system's error number.
  """

  def __init__(self, text: str, number: int):
    super().__init__(text)
    self.errno = number


@contextlib.contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
  """Opens a regular file, or a link to one, for reading.

  Raises:
    UserError: naming the file, if it does not exist or is not a regular file.
    UnreadableError: if the system cannot read it.
  """
  flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
  try:
    with os.fdopen(os.open(path, flags), "rb") as file:
      if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise UserError(f"cannot read {path}: it is no plain file.")
      yield file
  except FileNotFoundError:
    raise UserError(f"{path} does not exist.") from None
  except OSError as error:
    raise UnreadableError(f"cannot read {path}: {error.strerror}.", error.errno) from None


def read_small(path: Path, most: int = MAX_BYTES) -> bytes:
  """Reads a regular file of at most `most` bytes.

  Raises:
    UserError: naming the file, if it does not exist, is larger or is not a regular file.
    UnreadableError: if the system cannot read it.
  """
  with open_plain(path) as file:
    size = os.fstat(file.fileno()).st_size
    if size > most:
      raise UserError(f"{path} has {size:,} bytes; at most {most:,} are read of such a file.")
    return file.read(size)


def read_json(path: Path, most: int = MAX_BYTES) -> Any:
  """Reads a JSON file of at most `most` bytes; its value may take 25 times as much memory.

  Raises:
    UserError: as `read_small`, and if the file is not JSON.
    UnreadableError: if the system cannot read it.
  """
  content = read_small(path, most)
  try:
    return json.loads(content)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is not readable as JSON: {str(error)[:200]}.") from None


def digest_file(path: Path) -> str:
  """Computes the SHA-256 of a file of any size, in hexadecimal.

  Raises:
    OSError: if the file cannot be read.
  """
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
  """Writes a value as indented JSON, as `write_file` does."""
  text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
  # A file's name may hold a lone surrogate, which UTF-8 cannot encode: JSON has the same escape.
  write_file(path, text.encode(errors="backslashreplace"))


def write_text(path: Path, text: str) -> None:
  """Writes text as UTF-8, as `write_file` does."""
  write_file(path, text.encode())


def write_file(path: Path, content: bytes) -> None:
  """Writes bytes under a temporary name, then renames the file; the folder must exist.

  A link at either name is replaced, never followed.

  Raises:
    OSError: naming the file.
  """
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.unlink(missing_ok=True)
  try:
    with open(temporary, "xb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    error.filename = error.filename or str(path)  # `write` raises errors without a name
    with contextlib.suppress(OSError):
      temporary.unlink()  # a full disk needs the room
    raise
  sync_folder(path.parent)


def sync_file(path: Path) -> None:
  """Flushes to the disk a file that another library wrote."""
  # Windows flushes only files that are open for writing.
  descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def sync_folder(folder: Path) -> None:
  """Flushes a folder's entries to the disk, so that renames in it survive a power cut.

  Where the system cannot do so, nothing happens.
  """
  with contextlib.suppress(OSError):  # Windows cannot open folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
