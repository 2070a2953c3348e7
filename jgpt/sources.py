"""Where text comes from: a path, a folder named by the environment, the user's cache, a download, or the package itself.

Responsible for finding the bytes of a text and saying where they were found, with their digest. A text that was recorded
by a run is found again by its digest. Not responsible for fetching over the network (`download.py`) or for what the text
means (`data.py`). Imports no jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from jgpt.config import DataConfig, UserError, near_matches


@dataclasses.dataclass(frozen=True)
class Source:
  """A text that jgpt knows.

  Attributes:
    filename: its name in `$JGPT_DATA_DIR`, in the cache and, where `bundled`, in the package.
    url: https address of the original.
    sha256: of the original, in hexadecimal.
    num_bytes: of the original.
    chars: its distinct characters, so that parameters can be counted before anything is read.
    bundled: whether the package holds a stand-in for where there is no network.
  """

  filename: str
  url: str
  sha256: str
  num_bytes: int
  chars: str
  bundled: bool


SOURCES = {
  "names": Source(
    filename="names.txt",
    url="https://raw.githubusercontent.com/karpathy/makemore/988aa59/names.txt",
    sha256="0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
    num_bytes=228145,
    chars="abcdefghijklmnopqrstuvwxyz",
    bundled=True,
  )
}


@dataclasses.dataclass(frozen=True)
class Text:
  """A text and where it was found.

  Attributes:
    text: its characters.
    kind: "path", "JGPT_DATA_DIR", "cache", "download" or "bundled".
    location: the file it was read from, or the address.
    sha256: of its bytes, in hexadecimal.
    note: what the user should know about the choice, or "".
  """

  text: str
  kind: str
  location: str
  sha256: str
  note: str = ""

  def documents(self) -> list[str]:
    """The stripped lines that are not empty: one document each, in the order of the text."""
    lines = self.text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line.strip() for line in lines if line.strip()]


def find_text(config: DataConfig, *, sha256: str | None = None) -> Text:
  """Finds the text that `config` names: its `path`, or the first place that has its `source`.

  Args:
    config: `path` goes before `source`.
    sha256: digest that the text must have, as recorded by a run; None takes the first text found.

  Raises:
    UserError: if there is no such text, it is not UTF-8, or none found has the digest.
  """
  if config.path is not None:
    found = read_text(Path(config.path), "path")
    if sha256 not in (None, found.sha256):
      raise UserError(
        f"{config.path} has changed since this run began: its SHA-256 was {sha256[:12]} and is now {found.sha256[:12]}. "
        "Put the old file back, or start over with --fresh"
      )
    return found
  source = get_source(config.source)
  for found in _places(source, sha256):
    if sha256 in (None, found.sha256):
      return found
  raise UserError(
    f"the {config.source} text this run began with (SHA-256 {sha256[:12] if sha256 else 'any'}) was not found. Put "
    f"that {source.filename} into a folder and set JGPT_DATA_DIR to the folder, or start over with --fresh"
  )


def get_source(name: str) -> Source:
  """Looks a source up by name; raises `UserError` with near matches."""
  if name not in SOURCES:
    raise UserError(
      f"data.source={name!r} is not known.{near_matches(name, SOURCES)} There are: {', '.join(SOURCES)}; "
      "or --set data.path=FILE for a text of your own."
    )
  return SOURCES[name]


def expected_vocab_size(config: DataConfig) -> int:
  """Ids of the tokenizer that the data will have, BOS included, known without a download: parameters can be counted."""
  if config.path is None:
    return len(get_source(config.source).chars) + 1
  return len(set().union(*read_text(Path(config.path), "path").documents())) + 1


def read_text(path: Path, kind: str) -> Text:
  """Reads a UTF-8 file (a leading byte order mark is dropped).

  Raises:
    UserError: naming the file, if it cannot be read or is not UTF-8.
  """
  try:
    content = path.expanduser().read_bytes()
  except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL in the path; RuntimeError: no such ~user
    raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None
  return _to_text(content, kind, str(path))


def _to_text(content: bytes, kind: str, location: str, note: str = "") -> Text:
  try:
    text = content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise UserError(f"{location} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}.") from None
  return Text(text, kind, location, hashlib.sha256(content).hexdigest(), note)


def _places(source: Source, sha256: str | None) -> Iterator[Text]:
  """Yields the source's text from each place that has it, in the order of preference."""
  folder = os.environ.get("JGPT_DATA_DIR")
  if folder and os.path.isfile(Path(folder).expanduser() / source.filename):
    yield read_text(Path(folder).expanduser() / source.filename, "JGPT_DATA_DIR")
  cached = cache_dir() / source.filename
  with contextlib.suppress(OSError):  # a cache that is absent or closed is no error
    content = cached.read_bytes()
    if hashlib.sha256(content).hexdigest() == source.sha256:  # else the file was damaged: the download below replaces it
      yield _to_text(content, "cache", str(cached))
  if sha256 in (None, source.sha256):  # a download can only be the original
    from jgpt.download import DownloadError, download  # only here: the network's modules take a while to import

    try:
      content = download(source)
    except DownloadError as error:
      note = f"{error}; the bundled list stands in. For the original, set JGPT_DATA_DIR to a folder that has it"
    else:
      yield _to_text(content, "download", source.url)
      return
  else:
    note = ""
  if source.bundled:
    bundled = Path(__file__).parent / "bundled" / source.filename
    yield _to_text(bundled.read_bytes(), "bundled", "the list that comes with jgpt", note)


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
