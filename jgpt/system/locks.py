"""One writer for a folder.

Responsible for keeping a second process from writing into a folder that one is writing to. The system lets a lock go when
its process ends, however it ends, so none is ever stale. Where the file system has no locks, and on Windows, nothing is
kept. Imports no jax.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jgpt.errors import UserError, show

LOCK_FILE = ".lock"
ATTEMPTS = 100
LOOK_SECONDS = 0.2  # somebody may hold it for a moment, to see whether it is held


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
  """Holds a folder's lock; the folder must exist. On a file system without locks, and on Windows, it holds nothing.

  Raises:
    UserError: naming the process that holds it, if another one does.
  """
  path = folder / LOCK_FILE
  file = _acquire(path)
  if file is None:
    holder = describe_holder(folder)
    raise UserError(f"{folder} is being written by another process{f' ({holder})' if holder else ''}. Wait until it ends")
  with file:
    with contextlib.suppress(OSError):  # a full disk: the lock holds, whatever the file says
      file.truncate(0)
      file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
      file.flush()
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        path.unlink()  # still held: whoever opened the file before finds it gone, and tries again


def is_held(folder: Path) -> bool:
  """Whether another process writes to a folder; changes nothing."""
  try:
    file = _open(folder / LOCK_FILE, os.O_RDWR)
  except OSError:
    return False
  with file:
    return not _lock(file)


def describe_holder(folder: Path) -> str:
  """The process that a lock file names, or "" where it names none."""
  try:
    with _open(folder / LOCK_FILE, os.O_RDONLY) as file:
      holder = json.loads(file.read(500))
    return f"process {show(holder['pid'])} on {show(holder['host'])}"
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return ""


def _acquire(path: Path) -> IO[str] | None:
  """Opens and locks a file, creating it; None where another process has the lock."""
  end = time.monotonic() + LOOK_SECONDS
  for _ in range(ATTEMPTS):
    try:
      file = _open(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
      raise UserError(f"cannot write to {path.parent}: {error.strerror}.") from None
    while not (locked := _lock(file)) and time.monotonic() < end:
      time.sleep(0.01)
    if not locked:
      file.close()
      return None
    with contextlib.suppress(OSError):
      if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
        return file
    file.close()  # its holder ended and removed it between the two
  raise UserError(f"cannot lock {path}: it is another file each time. Choose another folder")


def _open(path: Path, flags: int) -> IO[str]:
  """Opens a file, never through a symbolic link and never waiting for the other end of a pipe."""
  flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
  descriptor = os.open(path, flags, 0o644)
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise OSError(errno.EINVAL, f"{path.name} is no plain file", str(path))
  return os.fdopen(descriptor, "r" if flags & 3 == os.O_RDONLY else "r+", encoding="utf-8")


def _lock(file: IO[str]) -> bool:
  try:
    import fcntl
  except ImportError:  # Windows
    return True
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:  # a file system without locks
    return True
  return True
