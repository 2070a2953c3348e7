"""Where text comes from: a path, a folder named by the environment, the user's cache, a download, or the package itself.

Responsible for finding the bytes of a text, or of GPT-2's tokenizer, and saying where they were found, with their digest.
A text that was recorded by a run is found again by its digest. Not responsible for fetching over the network
(`download.py`) or for what the text means (`data.py`). Imports no jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from jgpt.config import DataConfig
from jgpt.data.download import PinnedFile
from jgpt.data.paths import find_token_files, find_tokenizer, list_files
from jgpt.errors import UserError, near_matches
from jgpt.system.cache import cache_dir, digest_bytes

BUNDLED_DIR = Path(__file__).resolve().parent.parent / "bundled"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PinnedText(PinnedFile):
  """A public text.

  Attributes:
    chars: its distinct characters, so that parameters can be counted before anything is read.
  """

  chars: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeText:
  """A text that every installation has.

  Attributes:
    kind: what it is, for a person.
    location: whose it is, for a person.
    make: returns its characters.
  """

  kind: str
  location: str
  make: Callable[[], str]


@dataclasses.dataclass(frozen=True)
class Text:
  """A text and where it was found.

  Attributes:
    text: its characters.
    kind: "path", "JGPT_DATA_DIR", "cache", "download", "bundled", or the `kind` of a `MadeText`.
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


def _make_hamlet() -> str:
  lines = [
    "To be or not to be that is the question",
    "Whether tis nobler in the mind to suffer",
    "The slings and arrows of outrageous fortune",
    "Or to take arms against a sea of troubles",
    "And by opposing end them to die to sleep",
    "No more and by a sleep to say we end",
  ]
  return "".join(["\n", *(f"{line}\n" for line in lines)]) * 50


def _make_python_docs() -> str:
  try:
    from pydoc_data.topics import topics  # only here: half a megabyte
  except ImportError:
    raise UserError("this Python lacks its pydoc_data. Try --set data.path=FILE for a text of your own") from None
  return "\n\n".join(topics[name] for name in sorted(topics))


SOURCES: dict[str, PinnedText | MadeText] = {
  "names": PinnedText(
    filename="names.txt",
    url="https://raw.githubusercontent.com/karpathy/makemore/988aa59/names.txt",
    sha256="0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
    num_bytes=228145,
    chars="\n" + string.ascii_lowercase,
    bundled=True,
  ),
  "tiny_shakespeare": PinnedText(
    filename="tinyshakespeare.txt",
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    num_bytes=1115394,
    chars="\n !$&',-.3:;?" + string.ascii_letters,
  ),
  "hamlet": MadeText(kind="built in", location="six lines of Hamlet, 50 times", make=_make_hamlet),
  "python_docs": MadeText(
    kind="Python's documentation", location=f"Python {platform.python_version()}", make=_make_python_docs
  ),
}
GPT2_FILES = (
  PinnedFile(
    filename="gpt2/encoder.json",
    url="https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
    sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    num_bytes=1042301,
  ),
  PinnedFile(
    filename="gpt2/vocab.bpe",
    url="https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
    sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    num_bytes=456318,
  ),
)


# --- Texts ---


def find_text(config: DataConfig, *, sha256: str | None = None) -> Text:
  """Finds the text that `config` names: its `path`, or the first place that has its `source`.

  Args:
    config: `path` goes before `source`.
    sha256: digest that the text must have, as recorded by a run; None takes the first text found.

  Raises:
    UserError: if there is no such text, it is not UTF-8, or none found has the digest.
  """
  if config.path is not None:
    expanded = os.path.expanduser(config.path)
    if sha256 is not None and os.path.exists(expanded) and not (os.path.isfile(expanded) or os.path.isdir(expanded)):
      raise UserError(
        f"{config.path} is no plain file, and a recorded path is read from nothing else. Try a copy of the text"
      )
    found = read_path(config.path)
    return check_same_text(found, sha256, config.path, "Put the old text back, or start over with --fresh")
  source = get_source(config.source)
  if isinstance(source, MadeText):
    text = source.make()
    found = Text(text, source.kind, source.location, digest_bytes(text.encode()))
    advice = "It comes with Python or jgpt: resume with the versions this run began with, or start over with --fresh"
    return check_same_text(found, sha256, f"the {config.source} text (this is {source.location})", advice)
  for found in _places(source, sha256):
    if sha256 in (None, found.sha256):
      return found
  raise UserError(
    f"the {config.source} text this run began with (SHA-256 {sha256[:12] if sha256 else 'any'}) was not found. Put "
    f"that {source.filename} into a folder and set JGPT_DATA_DIR to the folder, or start over with --fresh"
  )


def get_source(name: str) -> PinnedText | MadeText:
  """Looks a source up by name; raises `UserError` with near matches."""
  if name not in SOURCES:
    raise UserError(
      f"data.source={name!r} is not known.{near_matches(name, SOURCES)} There are: {', '.join(SOURCES)}; "
      "or --set data.path=FILE for a text of your own."
    )
  return SOURCES[name]


def expected_vocab_size(config: DataConfig) -> int:
  """Ids of the tokenizer that the data will have, known without a download or reading ids: parameters can be counted."""
  if (files := find_token_files(config.path)) and (tokenizer := find_tokenizer(files, config)):
    return tokenizer.vocab_size
  if config.tokenizer != "characters":
    return {"bytes": 256, "bpe": config.bpe_vocab_size, "gpt2": 50257}[config.tokenizer]
  is_documents = config.batching == "documents"
  source = get_source(config.source) if config.path is None else None
  if isinstance(source, PinnedText):
    chars = set(source.chars) - set("\n" if is_documents else "")
  else:
    text = find_text(config)
    chars = set().union(*text.documents()) if is_documents else set(text.text)
  return len(chars) + is_documents  # BOS


def read_text(path: Path, kind: str) -> Text:
  """Reads a UTF-8 file (a leading byte order mark is dropped).

  Raises:
    UserError: naming the file, if it cannot be read or is not UTF-8.
  """
  content = _read_bytes(path)
  return Text(_decode(content, str(path)), kind, str(path), digest_bytes(content))


def read_path(path: str) -> Text:
  """Reads what `data.path` names: a UTF-8 file, a folder's *.txt files or a glob's files, joined in the order of names.

  A newline is put between two files where the first does not end with one. The digest is that of the joined bytes.

  Raises:
    UserError: naming the file, if one cannot be read or is not UTF-8; or if there is none.
  """
  files = _list_texts(path)
  if files is None:
    return read_text(Path(path), "path")
  contents = [_read_bytes(file) for file in files]
  texts = [_decode(content, str(file)) for content, file in zip(contents, files, strict=True)]
  for n, content in enumerate(contents[:-1]):
    if not content.endswith(b"\n"):
      contents[n] += b"\n"
      texts[n] += "\n"
  location = f"{path} ({len(files)} {'file' if len(files) == 1 else 'files'})"
  return Text("".join(texts), "path", location, digest_bytes(b"".join(contents)))


def check_text_path(path: str) -> None:
  """Raises the `UserError` of `read_path` if `path` names nothing that can be opened; reads no text."""
  for file in _list_texts(path) or [Path(path)]:
    with _opened(file):
      pass


def _list_texts(path: str) -> list[Path] | None:
  """The files of a folder or glob; None where `path` can only be the name of one file; raises `UserError` for none."""
  if not path:
    raise UserError("data.path is empty: it names a file, a folder or a glob. Try --set data.path=none for data.source")
  files = list_files(path, ["*.txt"])
  if files == []:
    raise UserError(f"the folder {path} holds no *.txt file. For others try --set data.path='{Path(path, '*')}'")
  return files


def check_same_text(found: Text, sha256: str | None, what: str, advice: str) -> Text:
  """Returns what was found; raises `UserError` if it does not have the digest, where one is given."""
  if sha256 not in (None, found.sha256):
    raise UserError(
      f"{what} has changed since this run began: its SHA-256 was {sha256[:12]} and is now {found.sha256[:12]}. {advice}"
    )
  return found


def _places(source: PinnedText, sha256: str | None) -> Iterator[Text]:
  """Yields the source's text from each place that has it, in the order of preference."""
  if own := own_file(source):
    yield read_text(own, "JGPT_DATA_DIR")
  if cached := _read_cache(source):
    yield Text(_decode(cached, source.filename), "cache", str(cache_dir() / source.filename), source.sha256)
  note = ""
  if sha256 in (None, source.sha256):  # a download can only be the original
    from jgpt.data.download import (
      DownloadError,
      download,  # only here: the network's modules take a while to import
    )

    try:
      content = download(source)
    except DownloadError as error:
      if not source.bundled:
        other = ". Or try --set data.source=python_docs, the documentation text inside every Python installation"
        raise UserError(f"{error}. {by_hand(source)}{other if sha256 is None else ''}") from None
      note = f"{error}; the bundled list stands in. For the original, set JGPT_DATA_DIR to a folder that has it"
    else:
      yield Text(_decode(content, source.url), "download", source.url, source.sha256)
      return
  if source.bundled:
    found = read_text(BUNDLED_DIR / source.filename, "bundled")
    yield dataclasses.replace(found, location="the list that comes with jgpt", note=note)


# --- GPT-2's tokenizer ---


def find_gpt2_files() -> tuple[bytes, bytes]:
  """Finds `encoder.json` and `vocab.bpe`: in `$JGPT_DATA_DIR/gpt2`, in the cache, or by a download.

  Raises:
    UserError: if one is nowhere, or is not the original.
  """
  encoder_json, vocab_bpe = map(_find_gpt2_file, GPT2_FILES)
  return encoder_json, vocab_bpe


def _find_gpt2_file(file: PinnedFile) -> bytes:
  if own := own_file(file):
    content = _read_bytes(own)
    if (digest := digest_bytes(content)) != file.sha256:
      raise UserError(f"{own} is not GPT-2's: its SHA-256 is {digest[:12]}, not {file.sha256[:12]}. {by_hand(file)}")
    return content
  if cached := _read_cache(file):
    return cached
  from jgpt.data.download import (
    DownloadError,
    download,  # only here: the network's modules take a while to import
  )

  try:
    return download(file)
  except DownloadError as error:
    raise UserError(f"{error}. {by_hand(*GPT2_FILES)}") from None


# --- Files ---


def own_file(file: PinnedFile) -> Path | None:
  """The user's file of this name, in the folder that they name."""
  folder = os.environ.get("JGPT_DATA_DIR")
  own = Path(os.path.expanduser(folder or "")) / file.filename
  return own if folder and os.path.isfile(own) else None


def _read_cache(file: PinnedFile) -> bytes | None:
  with contextlib.suppress(OSError):  # a cache that is absent or closed is no error
    content = (cache_dir() / file.filename).read_bytes()
    if digest_bytes(content) == file.sha256:  # else the file was damaged: a download replaces it
      return content
  return None


def by_hand(*files: PinnedFile) -> str:
  """Says how to do without a download."""
  names = " and ".join(f"{file.url} as {file.filename}" for file in files)
  return f"Save {names} in a folder and set JGPT_DATA_DIR to the folder"


def _read_bytes(path: Path) -> bytes:
  with _opened(path) as file:
    return file.read()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
  """Opens a file; raises `UserError` naming it where it cannot be opened or read."""
  try:
    with open(path.expanduser(), "rb") as file:
      yield file
  except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL in the path; RuntimeError: no such ~user
    raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None


def _decode(content: bytes, location: str) -> str:
  try:
    return content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    what = f"byte {error.start} is 0x{content[error.start]:02x}"
    raise UserError(f"{location} is not UTF-8 text: {what}. Save it as UTF-8, or name another file") from None
