"""The user's cache folder, files with a known digest, and digests of bytes.

What is kept in the folder is decided by those who write to it: `data/download.py`,
`devices/runtime.py` and `devices/canary.py`. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class PinnedFile:
  """A public file with a known size and digest.

  Attributes:
    filename: path of the file below `$JGPT_DATA_DIR`, below the cache and, if `bundled`, in the
      package.
    url: https address of the original.
    sha256: of the original, in hexadecimal.
    num_bytes: size of the original.
    bundled: whether the package holds a substitute, which is used without a network.
  """

  filename: str
  url: str
  sha256: str
  num_bytes: int
  bundled: bool = False


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
