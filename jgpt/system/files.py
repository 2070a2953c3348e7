"""Files read with suspicion and written whole.

Responsible for small files that may be anybody's: plain ones only, of bounded size, without waiting for a pipe; and for
writing so that a reader sees the old file or the new one, after a power cut too. Not responsible for what they hold.
Imports no jax.
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


# Errors that are a file's own, and say that it is damaged.
DAMAGE = ("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENXIO", "ENODEV", "EIO", "EBADMSG", "EUCLEAN")


def may_pass(error: Exception) -> bool:
  """Whether an error may be gone the next time: no permission, too many open files, a server that is away."""
  number = getattr(error, "errno", None)
  return number is not None and number not in (getattr(errno, name, None) for name in DAMAGE)


class UnreadableError(UserError):
  """A file that the system would not read. Attributes: `errno` says why."""

  def __init__(self, text: str, number: int):
    super().__init__(text)
    self.errno = number


@contextlib.contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
  """Opens a plain file, or what a link to one leads to, for reading.

  Raises:
    UserError: naming the file, if it is absent or no plain file.
    UnreadableError: if the system does not read it.
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
  """Reads a plain file of at most so many bytes; raises `UserError` naming it if it is anything else."""
  with open_plain(path) as file:
    size = os.fstat(file.fileno()).st_size
    if size > most:
      raise UserError(f"{path} has {size:,} bytes; at most {most:,} are read of such a file.")
    return file.read(size)


def read_json(path: Path, most: int = MAX_BYTES) -> Any:
  """Reads a JSON file as `read_small` does; raises `UserError` naming it if it is none.

  As Python's objects it takes up to 25 times its bytes.
  """
  content = read_small(path, most)
  try:
    return json.loads(content)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is not readable as JSON: {str(error)[:200]}.") from None


def digest_file(path: Path) -> str:
  """SHA-256 of a file of any size, in hexadecimal; raises OSError where it cannot be read."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
  """Writes JSON under a temporary name, then renames."""
  text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
  write_file(path, text.encode(errors="backslashreplace"))  # half a surrogate, from a file's name: as JSON escapes it


def write_text(path: Path, text: str) -> None:
  """Writes UTF-8 text under a temporary name, then renames."""
  write_file(path, text.encode())


def write_file(path: Path, content: bytes) -> None:
  """Writes bytes under a temporary name, then renames; the folder must exist.

  A link that somebody put in the place of either name is replaced and never followed.

  Raises:
    OSError: naming the file, whatever went wrong.
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
    error.filename = error.filename or str(path)  # a write that fails names no file
    with contextlib.suppress(OSError):
      temporary.unlink()  # half a file is no use, and a disk that is full needs the room
    raise
  sync_folder(path.parent)


def sync_file(path: Path) -> None:
  """Returns when a file that others wrote is on the disk."""
  descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes what it may write to
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def sync_folder(folder: Path) -> None:
  """Makes renames in a folder last through a power cut, where the system can."""
  with contextlib.suppress(OSError):  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
