"""Finds texts, and the files of GPT-2's tokenizer, and records where they were found.

A text comes from `data.path`, or by name from `$JGPT_DATA_DIR`, the user's cache, a download, or
the package itself. A resumed run finds its text again by the digest. Downloads are in
`download.py`, and tokenization is in `corpus.py`. Imports no jax.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import glob
import os
import platform
import shlex
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from jgpt.config import DataConfig
from jgpt.data.paths import find_token_files, find_tokenizer, list_files
from jgpt.errors import UserError, near_matches
from jgpt.system.cache import PinnedFile, cache_dir, digest_bytes

BUNDLED_DIR = Path(__file__).resolve().parent.parent / "bundled"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PinnedText(PinnedFile):
  """A public text.

  Attributes:
    chars: its distinct characters. They give the size of the vocabulary without reading the text.
    bundled_sha256: of the substitute in the package; None where there is none.
  """

  chars: str
  bundled_sha256: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedText:
  """A text that jgpt makes, which needs no file.

  Attributes:
    kind: printable word for its origin.
    location: printable description of its content.
    make: returns the text.
  """

  kind: str
  location: str
  make: Callable[[], str]


@dataclasses.dataclass(frozen=True)
class Text:
  """A text and its origin.

  Attributes:
    text: the characters.
    kind: "path", "JGPT_DATA_DIR", "cache", "download", "bundled", or the `kind` of a
      `GeneratedText`.
    location: path or address.
    sha256: of the bytes, in hexadecimal.
    note: printable remark on why this text was chosen, or "".
  """

  text: str
  kind: str
  location: str
  sha256: str
  note: str = ""

  def documents(self) -> list[str]:
    """Returns the documents of the text, as `split_documents` does."""
    return split_documents(self.text)


class RecordedTextError(UserError):
  """A place does not hold the text that a run recorded; others may.

  Attributes:
    found: the text that it holds; None where it holds none.
    advice: how to get the recorded text there, or "".
  """

  def __init__(self, message: str, found: Text | None, advice: str = ""):
    super().__init__(f"{message}. {advice}" if advice else message)
    self.found, self.advice = found, advice


def split_documents(text: str) -> list[str]:
  """Splits a text into documents: its lines, stripped, in order, without empty ones."""
  lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
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
    from pydoc_data.topics import topics  # imported late: it takes half a megabyte
  except ImportError:
    raise UserError(
      "this Python lacks its pydoc_data. --set data.path= names a text of your own"
    ) from None
  return "\n\n".join(topics[name] for name in sorted(topics))


SOURCES: dict[str, PinnedText | GeneratedText] = {
  "names": PinnedText(
    filename="names.txt",
    url="https://raw.githubusercontent.com/karpathy/makemore/988aa59/names.txt",
    sha256="0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
    num_bytes=228145,
    chars="\n" + string.ascii_lowercase,
    bundled=True,
    bundled_sha256="f41db6ca320a2757aba9c320a4370138ff280b8dccfca0a8cebd14186d626ac6",
  ),
  "tiny_shakespeare": PinnedText(
    filename="tinyshakespeare.txt",
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    num_bytes=1115394,
    chars="\n !$&',-.3:;?" + string.ascii_letters,
  ),
  "hamlet": GeneratedText(
    kind="built in", location="six lines of Hamlet, 50 times", make=_make_hamlet
  ),
  "python_docs": GeneratedText(
    kind="Python's documentation",
    location=f"Python {platform.python_version()}",
    make=_make_python_docs,
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
  """Finds the text that `config` names.

  Args:
    config: `path`, or if that is None `source`, which is looked for in `$JGPT_DATA_DIR`, in the
      cache, on the network and in the package, in this order.
    sha256: digest that the text must have, as recorded by a run; None takes the first text found.

  Raises:
    UserError: if there is no such text, or it is not UTF-8.
    RecordedTextError: if no text found has the digest.
  """
  if config.path is not None:
    expanded = os.path.expanduser(config.path)
    is_plain = os.path.isfile(expanded) or os.path.isdir(expanded)
    if sha256 is not None and os.path.exists(expanded) and not is_plain:
      raise UserError(
        f"{config.path} is no plain file, and a resumed run reads its text from nothing else. Try "
        "a copy of the text"
      )
    return check_same_text(read_path(config.path), sha256)
  source = get_source(config.source)
  if isinstance(source, GeneratedText):
    text = source.make()
    found = Text(text, source.kind, source.location, digest_bytes(text.encode()))
    return check_same_text(
      found, sha256, "It comes with Python or jgpt: use the versions that the run began with"
    )
  others = []
  for found in _find_copies(source, sha256):
    if sha256 in (None, found.sha256):
      return found
    others.append(found)
  advice = f"Put that {source.filename} into a folder and set JGPT_DATA_DIR to the folder"
  if others:
    return check_same_text(others[0], sha256, advice)
  raise RecordedTextError(
    f"no {source.filename} with the SHA-256 {sha256[:12]} was found", None, advice
  )


def get_source(name: str) -> PinnedText | GeneratedText:
  """Returns the source of a name; raises `UserError` with near matches if there is none."""
  if name not in SOURCES:
    raise UserError(
      f"data.source={name!r} is not known.{near_matches(name, SOURCES)} There are: "
      f"{', '.join(SOURCES)}; or --set data.path=FILE for a text of your own."
    )
  return SOURCES[name]


def find_label(text: Text) -> str | None:
  """Finds the name under which a text is known, whatever its path.

  Returns:
    The name of the source whose digest the text has, followed by "(bundled)" for the list that
    comes with jgpt; for a text that jgpt makes, the name of that source. None for any other text.
  """
  for name, source in SOURCES.items():
    if isinstance(source, GeneratedText):
      if text.kind == source.kind:
        return name
    elif text.sha256 == source.sha256:
      return name
    elif text.sha256 == source.bundled_sha256:
      return f"{name} (bundled)"
  return None


def expected_vocab_size(config: DataConfig) -> int:
  """Returns the size of the vocabulary that the data will have.

  Needed to count parameters before a run; downloads nothing and reads no ids. A user's own file in
  the place of a known text is read.

  Raises:
    UserError: if `data.path` or `data.source` names nothing, or a file cannot be read.
  """
  if (files := find_token_files(config.path)) and (tokenizer := find_tokenizer(files, config)):
    return tokenizer.vocab_size
  if config.tokenizer != "characters":
    return {"bytes": 256, "bpe": config.bpe_vocab_size, "gpt2": 50257}[config.tokenizer]
  is_documents = config.batching == "documents"
  source = get_source(config.source) if config.path is None else None
  own = find_user_file(source) if isinstance(source, PinnedText) else None
  if isinstance(source, PinnedText) and (
    own is None or digest_bytes(_read_bytes(own)) == source.sha256
  ):
    chars = set(source.chars) - set("\n" if is_documents else "")
  else:
    text = find_text(config) if own is None else read_text(own, "JGPT_DATA_DIR")
    chars = set().union(*text.documents()) if is_documents else set(text.text)
  return len(chars) + is_documents  # documents have a BOS


def read_text(path: Path, kind: str) -> Text:
  """Reads a UTF-8 file, without a leading byte order mark.

  Args:
    path: of the file; "~" is the user's home.
    kind: see `Text`.

  Raises:
    UserError: naming the file, if it cannot be read or is not UTF-8.
  """
  content = _read_bytes(path)
  return Text(_decode(content, str(path)), kind, str(path), digest_bytes(content))


def read_path(path: str) -> Text:
  """Reads the text that `data.path` names, and joins several files in the order of their names.

  A file that does not end with a newline gets one before the next file, and a byte order mark is
  dropped. The digest is that of the joined bytes, so it is that of a single file with all of them.

  Args:
    path: of a UTF-8 file; of a folder, which stands for its *.txt files; or a glob.

  Raises:
    UserError: naming the file, if one cannot be read or is not UTF-8; or if there is none.
  """
  files = _list_texts(path)
  if files is None:
    return read_text(Path(path), "path")
  contents = [_read_bytes(file) for file in files]
  contents[1:] = [content.removeprefix(codecs.BOM_UTF8) for content in contents[1:]]
  texts = [_decode(content, str(file)) for content, file in zip(contents, files, strict=True)]
  for n, content in enumerate(contents[:-1]):
    if not content.endswith(b"\n"):
      contents[n] += b"\n"
      texts[n] += "\n"
  location = f"{path} ({len(files)} {'file' if len(files) == 1 else 'files'})"
  return Text("".join(texts), "path", location, digest_bytes(b"".join(contents)))


def check_text_path(path: str) -> None:
  """Checks that `read_path` could open its files, and raises its `UserError` otherwise."""
  for file in _list_texts(path) or [Path(path)]:
    with _open_file(file):
      pass


def _list_texts(path: str) -> list[Path] | None:
  """Lists the *.txt files of a folder, or the files of a glob; returns None for a single file.

  Raises `UserError` if there is no such file.
  """
  if not path:
    raise UserError(
      "data.path is empty: it names a file, a folder or a glob, and none takes data.source. Try "
      "--set data.path=none"
    )
  files = list_files(path, ["*.txt"])
  if files == []:
    others = shlex.quote(f"data.path={Path(glob.escape(path), '*')}")
    raise UserError(f"the folder {path} holds no *.txt file. For others try --set {others}")
  return files


def check_same_text(found: Text, sha256: str | None, advice: str = "") -> Text:
  """Checks that a text has the digest that a run recorded, and returns the text.

  Args:
    found: the text.
    sha256: the recorded digest; None accepts any.
    advice: last sentence of the error.

  Raises:
    RecordedTextError: if the digest differs.
  """
  if sha256 not in (None, found.sha256):
    raise RecordedTextError(
      f"{found.location} is not the text of the run: its SHA-256 is {found.sha256[:12]} instead of "
      f"{sha256[:12]}",
      found,
      advice,
    )
  return found


def _find_copies(source: PinnedText, sha256: str | None) -> Iterator[Text]:
  """Yields the text of a source from each place that has it, in the order of preference.

  Raises `UserError` if it is neither found nor downloaded, and not bundled.
  """
  if own := find_user_file(source):
    yield read_text(own, "JGPT_DATA_DIR")
  if cached := _read_cache(source):
    yield Text(
      _decode(cached, source.filename), "cache", str(cache_dir() / source.filename), source.sha256
    )
  note = ""
  if sha256 in (None, source.sha256):  # a download can only be the original
    # Imported late: the modules of the network take a while to import.
    from jgpt.data.download import DownloadError, download

    try:
      content = download(source)
    except DownloadError as error:
      if not source.bundled:
        advice = describe_manual_download(source)
        if sha256 is None:
          advice += (
            ", or train on the documentation text inside every Python installation. Try --set "
            "data.source=python_docs"
          )
          raise UserError(f"{error}. {advice}") from None
        words = f"{error}; no {source.filename} with the SHA-256 {sha256[:12]} is here"
        raise RecordedTextError(words, None, advice) from None
      note = (
        f"{error}; the bundled list stands in. For the original, set JGPT_DATA_DIR to a folder "
        "that has it"
      )
    else:
      yield Text(_decode(content, source.url), "download", source.url, source.sha256)
      return
  if source.bundled:
    found = read_text(BUNDLED_DIR / source.filename, "bundled")
    yield dataclasses.replace(found, location="the list that comes with jgpt", note=note)


# --- GPT-2's tokenizer ---


def find_gpt2_files() -> tuple[bytes, bytes]:
  """Finds `encoder.json` and `vocab.bpe` in `$JGPT_DATA_DIR/gpt2`, in the cache or by a download.

  Returns:
    The content of the two files.

  Raises:
    UserError: if a file is not found, or that in `$JGPT_DATA_DIR` is not the original.
  """
  encoder_json, vocab_bpe = map(_find_gpt2_file, GPT2_FILES)
  return encoder_json, vocab_bpe


def _find_gpt2_file(file: PinnedFile) -> bytes:
  if own := find_user_file(file):
    content = _read_bytes(own)
    if (digest := digest_bytes(content)) != file.sha256:
      raise UserError(
        f"{own} is not GPT-2's: its SHA-256 is {digest[:12]}, not {file.sha256[:12]}. "
        f"{describe_manual_download(file)}"
      )
    return content
  if cached := _read_cache(file):
    return cached
  # Imported late: the modules of the network take a while to import.
  from jgpt.data.download import DownloadError, download

  try:
    return download(file)
  except DownloadError as error:
    raise UserError(f"{error}. {describe_manual_download(*GPT2_FILES)}") from None


# --- Files ---


def find_user_file(file: PinnedFile) -> Path | None:
  """Returns the file's path in `$JGPT_DATA_DIR`; None if it is not there."""
  folder = os.environ.get("JGPT_DATA_DIR")
  own = Path(os.path.expanduser(folder or "")) / file.filename
  return own if folder and os.path.isfile(own) else None


def _read_cache(file: PinnedFile) -> bytes | None:
  with contextlib.suppress(OSError):  # a cache that cannot be read counts as empty
    content = (cache_dir() / file.filename).read_bytes()
    if digest_bytes(content) == file.sha256:  # a download replaces a damaged file
      return content
  return None


def describe_manual_download(*files: PinnedFile) -> str:
  """Returns the advice to save files in a folder and set JGPT_DATA_DIR, without a final period."""
  names = " and ".join(f"{file.url} as {file.filename}" for file in files)
  return f"Save {names} in a folder and set JGPT_DATA_DIR to the folder"


def _read_bytes(path: Path) -> bytes:
  with _open_file(path) as file:
    return file.read()


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[BinaryIO]:
  """Opens a file; an error of opening or reading becomes a `UserError` that names the file."""
  try:
    with open(path.expanduser(), "rb") as file:
      yield file
  # ValueError: a NUL in the path. RuntimeError: an unknown ~user.
  except (OSError, ValueError, RuntimeError) as error:
    raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None


def _decode(content: bytes, location: str) -> str:
  try:
    return content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    what = f"byte {error.start} is 0x{content[error.start]:02x}"
    raise UserError(
      f"{location} is not UTF-8 text: {what}. Save it as UTF-8, or name another file"
    ) from None
