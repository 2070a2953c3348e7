"""A lock on a folder, so that only one process writes to it.

The operating system releases a lock when its process ends, however it ends, so no lock is ever
stale. On Windows, and on file systems without locks, nothing is locked. Imports no jax.
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
LOCK_WAIT_SECONDS = 0.2  # `is_held` in another process holds the lock for a moment


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
  """Holds a folder's lock inside a `with` statement; the folder must exist.

  Raises:
    UserError: naming the process that holds the lock, if another one does, or if the folder cannot
      be written to.
  """
  path = folder / LOCK_FILE
  file = _acquire(path)
  if file is None:
    holder = describe_holder(folder)
    raise UserError(
      f"{folder} is being written by another process{f' ({holder})' if holder else ''}. Wait until "
      "it ends"
    )
  with file:
    with contextlib.suppress(OSError):  # on a full disk the lock holds without its content
      file.truncate(0)
      file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
      file.flush()
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        # Removed while it is held: a process that has opened it sees that it is gone, and retries.
        path.unlink()


def is_held(folder: Path) -> bool:
  """Returns whether another process holds a folder's lock; changes nothing."""
  try:
    file = _open(folder / LOCK_FILE, os.O_RDWR)
  except OSError:
    return False
  with file:
    return not _try_lock(file)


def describe_holder(folder: Path) -> str:
  """Returns "process PID on HOST" as a folder's lock file has it, or "" where it names none."""
  try:
    with _open(folder / LOCK_FILE, os.O_RDONLY) as file:
      holder = json.loads(file.read(500))
    return f"process {show(holder['pid'])} on {show(holder['host'])}"
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return ""


def _acquire(path: Path) -> IO[str] | None:
  """Opens and locks a file, creating it; returns None where another process has the lock."""
  end = time.monotonic() + LOCK_WAIT_SECONDS
  for _ in range(ATTEMPTS):
    try:
      file = _open(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
      raise UserError(f"cannot write to {path.parent}: {error.strerror}.") from None
    while not (locked := _try_lock(file)) and time.monotonic() < end:
      time.sleep(0.01)
    if not locked:
      file.close()
      return None
    with contextlib.suppress(OSError):
      if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
        return file
    file.close()  # its holder removed it after it was opened here
  raise UserError(f"cannot lock {path}: other processes keep replacing it. Choose another folder")


def _open(path: Path, flags: int) -> IO[str]:
  """Opens a regular file, without following a symbolic link or waiting for a pipe."""
  flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
  descriptor = os.open(path, flags, 0o644)
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise OSError(errno.EINVAL, f"{path.name} is no plain file", str(path))
  return os.fdopen(descriptor, "r" if flags & 3 == os.O_RDONLY else "r+", encoding="utf-8")


def _try_lock(file: IO[str]) -> bool:
  """Locks a file without waiting; returns False where another process has the lock."""
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
