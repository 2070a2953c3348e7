"""Where text comes from: a path, a folder named by the environment, the user's cache, a download, or the package itself.

Responsible for finding the bytes of a text, or of GPT-2's tokenizer, and saying where they were found, with their digest.
A text that was recorded by a run is found again by its digest. Not responsible for fetching over the network
(`download.py`) or for what the text means (`data.py`). Imports no jax.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def digest_bytes(content: bytes) -> str:
  """SHA-256 in hexadecimal."""
  return hashlib.sha256(content).hexdigest()


def cache_dir() -> Path:
  """The user's cache folder for jgpt (`$JGPT_CACHE_DIR` where set); it may not exist yet."""
  if os.environ.get("JGPT_CACHE_DIR"):
    return Path(os.environ["JGPT_CACHE_DIR"])
  import platformdirs  # only here, so that --help does not wait for it

  return Path(platformdirs.user_cache_dir("jgpt", appauthor=False))


def make_private(folder: Path) -> None:
  """Creates a folder that only its user can enter (0700); one that exists is left as it is. Raises OSError."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  folder.mkdir(exist_ok=True, mode=0o700)
