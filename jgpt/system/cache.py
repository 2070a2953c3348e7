"""The user's cache folder, and digests of bytes.

What is kept in the folder is decided by those who write to it: `data/download.py`,
`devices/runtime.py` and `devices/canary.py`. Imports no jax.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def digest_bytes(content: bytes) -> str:
  """Computes the SHA-256 of bytes, in hexadecimal."""
  return hashlib.sha256(content).hexdigest()


def cache_dir() -> Path:
  """Returns the user's cache folder for jgpt, which may not exist yet.

  `$JGPT_CACHE_DIR` replaces the operating system's default where it is set.
  """
  if os.environ.get("JGPT_CACHE_DIR"):
    return Path(os.environ["JGPT_CACHE_DIR"])
  import platformdirs  # only here, so that --help does not wait for it

  return Path(platformdirs.user_cache_dir("jgpt", appauthor=False))


def make_private(folder: Path) -> None:
  """Creates a folder that only its owner can enter (mode 0700), and its parents.

  A folder that exists keeps its mode.

  Raises:
    OSError: if it cannot be created.
  """
  folder.parent.mkdir(parents=True, exist_ok=True)
  folder.mkdir(exist_ok=True, mode=0o700)
