"""OpenAI's released GPT-2 weights: which files they are, and finding them.

Responsible for a path to the original of each size: the user's file, the cache, or a download. The files have 0.5 to 6.4 GB
and are never read into memory here. Not responsible for what is in them (`hugging_face.py`). Imports no jax.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from jgpt.checks import UserError, near_matches
from jgpt.files import digest_file
from jgpt.sources import PinnedFile, by_hand, cache_dir, own_file


def _pin(name: str, *, commit: str, sha256: str, num_bytes: int) -> PinnedFile:
  url = f"https://huggingface.co/openai-community/{name}/resolve/{commit}/model.safetensors"
  return PinnedFile(filename=f"gpt2/{name}.safetensors", url=url, sha256=sha256, num_bytes=num_bytes)


RELEASED: dict[str, PinnedFile] = {
  "gpt2": _pin(
    "gpt2",
    commit="607a30d783dfa663caf39e06633721c8d4cfcd7e",
    sha256="248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    num_bytes=548105171,
  ),
  "gpt2-medium": _pin(
    "gpt2-medium",
    commit="6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    sha256="fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    num_bytes=1519984962,
  ),
  "gpt2-large": _pin(
    "gpt2-large",
    commit="32b71b12589c2f8d625668d2335a01cac3249519",
    sha256="5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    num_bytes=3247159078,
  ),
  "gpt2-xl": _pin(
    "gpt2-xl",
    commit="15ea56dee5df4983c59b2538573817e1667135e2",
    sha256="0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    num_bytes=6431829964,
  ),
}


def find_released(name: str, report: Callable[[int, int], None] = lambda done, total: None) -> Path:
  """Finds released weights: in `$JGPT_DATA_DIR`, in the cache, or by a download into it.

  Whatever is found has the original's size and SHA-256; hashing takes seconds for each gigabyte.

  Args:
    name: a key of `RELEASED`.
    report: told the bytes that are there and the bytes in all, whenever a download's percentage has changed.

  Returns:
    The path of a safetensors file.

  Raises:
    UserError: if there is no such name, the file in `$JGPT_DATA_DIR` is another, or none is found; says which file to save
      where.
  """
  if name not in RELEASED:
    raise UserError(f"{name!r} is no released GPT-2.{near_matches(name, RELEASED)} There are: {', '.join(RELEASED)}.")
  file = RELEASED[name]
  if own := own_file(file):
    try:
      difference = _difference(own, file)
    except OSError as error:
      raise UserError(f"cannot read {own}: {error.strerror or error}.") from None
    if difference:
      raise UserError(f"{own} is not the released {name}: {difference}. {by_hand(file)}")
    return own
  cached = cache_dir() / file.filename
  with contextlib.suppress(OSError):  # a cache that is absent or closed is no error
    if not _difference(cached, file):  # else the file was damaged: a download replaces it
      return cached
  from jgpt.download import DownloadError, download_file  # only here: the network's modules take a while to import

  try:
    return download_file(file, report)
  except DownloadError as error:
    raise UserError(f"{error}. {by_hand(file)}") from None


def _difference(path: Path, file: PinnedFile) -> str:
  """What tells a file on the disk from the original, or "". Raises OSError."""
  if (num_bytes := path.stat().st_size) != file.num_bytes:
    return f"it has {num_bytes:,} bytes, not {file.num_bytes:,}"
  digest = digest_file(path)
  return f"its SHA-256 is {digest[:12]}, not {file.sha256[:12]}" if digest != file.sha256 else ""
