"""Files read with suspicion and written whole.

Responsible for small files that may be anybody's: plain ones only, of bounded size, without waiting for a pipe; and for
writing so that a reader sees the old file or the new one, after a power cut too. Not responsible for what they hold.
Imports no jax.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jgpt.checks import UserError

MAX_BYTES = 64 << 20  # of a small file; a tokenizer of 50,257 ids has 2 MB


@contextlib.contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
  """Opens a plain file, or what a link to one leads to, for reading.

  Raises:
    UserError: naming the file, if it is absent, anything else or cannot be read.
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
    raise UserError(f"cannot read {path}: {error.strerror}.") from None


def read_small(path: Path) -> bytes:
  """Reads a plain file of at most `MAX_BYTES`; raises `UserError` naming it if it is anything else."""
  with open_plain(path) as file:
    size = os.fstat(file.fileno()).st_size
    if size > MAX_BYTES:
      raise UserError(f"{path} has {size:,} bytes; at most {MAX_BYTES:,} are read of such a file.")
    return file.read(size)


def read_json(path: Path) -> Any:
  """Reads a JSON file as `read_small` does; raises `UserError` naming it if it is none."""
  content = read_small(path)
  try:
    return json.loads(content)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is not readable as JSON: {str(error)[:200]}.") from None


def write_json(path: Path, value: Any) -> None:
  """Writes JSON under a temporary name, then renames."""
  write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_text(path: Path, text: str) -> None:
  """Writes UTF-8 text under a temporary name, then renames."""
  write_file(path, text.encode())


def write_file(path: Path, content: bytes) -> None:
  """Writes bytes under a temporary name, then renames; the folder must exist.

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
