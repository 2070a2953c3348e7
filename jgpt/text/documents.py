"""Reads files of text or JSON lines, of any size, as documents, and encodes lists of documents.

Files are read in small blocks. A block depends only on the position where it begins, so that
reading may start at any block. Token files are written in `data/preparation.py`. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jgpt.errors import UserError
from jgpt.text import bpe
from jgpt.text.bpe import END_OF_TEXT, GPT2_SPLIT, BpeTokenizer, to_utf8
from jgpt.text.tokenizer import ByteTokenizer, Tokenizer

TEXT_BLOCK_BYTES = 1 << 19
MAX_WORD_BYTES = 1 << 22  # a longer text without a place to cut is cut between any two characters
MAX_LINE_BYTES = 1 << 24  # of JSON: a line is parsed in one piece
KINDS = ("paragraphs", "lines", "files")
_BLANK_LINE = re.compile(r"\n\r?\n")  # with the end of the line before it
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_BLANK_LINE_BYTES = re.compile(_BLANK_LINE.pattern.encode())

# The bytes of characters that no package takes for whitespace: a space or newline after them begins
# a new word for every tokenizer (see `bpe.py`). Some others begin with C2, E1, E2 or E3; leaving
# them out only makes fewer places to cut.
_NO_BLANK = re.compile(
  rb"(?:[\x21-\x7e]|[\xc3-\xdf][\x80-\xbf]|\xe3(?:\x80[\x81-\xbf]|[\x81-\xbf][\x80-\xbf])"
  rb"|[\xe4-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3})\Z"
)


@dataclasses.dataclass(frozen=True)
class Position:
  """The place where a block begins.

  Attributes:
    file: index of the file.
    offset: bytes of the file before it.
    line: newlines of the file before it.
    inside: whether the block continues the last document of the block before.
  """

  file: int = 0
  offset: int = 0
  line: int = 0
  inside: bool = False


@dataclasses.dataclass(frozen=True)
class Block:
  """Consecutive bytes of a file: whole documents, or a part of a long one.

  Attributes:
    path: the file.
    kind: one of `KINDS`, or "jsonl".
    start: where the block begins.
    content: at least 1 byte.
    ends_file: whether the file ends with the block.
    ends_all: whether the last file ends with the block.
  """

  path: Path
  kind: str
  start: Position
  content: bytes
  ends_file: bool
  ends_all: bool


# --- Blocks ---


def check_jsonl(path: Path) -> None:
  """Checks that a file is not JSON that would be read as text: JSON lines are named *.jsonl.

  Raises:
    UserError: for a file named *.json, *.ndjson or *.JSONL, or if it cannot be read.
  """
  if path.suffix.lower() not in (".json", ".ndjson", ".jsonl") or path.name.endswith(".jsonl"):
    return
  try:
    with open(path, "rb") as file:
      begin = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}.") from None
  if begin.startswith(b"["):
    raise UserError(
      f"{path} is one JSON array, which is not JSON lines. Write each object on a line of its own, "
      "in a *.jsonl file"
    )
  raise UserError(
    f"{path} would be read as text: JSON lines must be in a file named *.jsonl. Rename it, or name "
    "files of text"
  )


def read_blocks(
  files: Sequence[Path], sizes: Sequence[int], kind: str, start: Position
) -> Iterator[Block]:
  """Reads files in blocks of about `TEXT_BLOCK_BYTES`, from a position on.

  Args:
    files: in order; *.jsonl holds JSON lines, others text.
    sizes: bytes of each file.
    kind: what a document of text is, one of `KINDS`.
    start: where a block begins: `Position()`, or `Block.start` of an earlier call.

  Yields:
    The blocks, in order.

  Raises:
    UserError: if a file cannot be read, has another size, or has a line of JSON longer than
      `MAX_LINE_BYTES`.
  """
  for number in range(start.file, len(files)):
    first = start if number == start.file else Position(number)
    kind_here = "jsonl" if files[number].name.endswith(".jsonl") else kind
    try:
      yield from _read_file(
        files[number], sizes[number], kind_here, first, number == len(files) - 1
      )
    except OSError as error:
      raise UserError(f"cannot read {files[number]}: {error.strerror}.") from None


def _read_file(
  path: Path, size: int, kind: str, start: Position, ends_all: bool
) -> Iterator[Block]:
  """Reads one file in blocks; bytes after the end of a block are read again for the next."""
  with open(path, "rb") as file:
    num_bytes = TEXT_BLOCK_BYTES
    while start.offset < size:
      file.seek(start.offset)
      content = file.read(num_bytes)
      if os.fstat(file.fileno()).st_size != size or not content:
        raise UserError(
          f"{path} had {size:,} bytes and now has another number: something writes to it."
        )
      ends_file = start.offset + len(content) == size
      cut, inside = (len(content), False) if ends_file else find_cut(content, kind)
      if not cut:
        num_bytes *= 2
        if kind == "jsonl" and num_bytes > MAX_LINE_BYTES:
          raise UserError(
            f"{path} line {start.line + 1} is longer than {MAX_LINE_BYTES:,} bytes, too long for "
            "JSON lines."
          )
        continue
      content, num_bytes = content[:cut], TEXT_BLOCK_BYTES
      yield Block(path, kind, start, content, ends_file, ends_file and ends_all)
      start = Position(start.file, start.offset + cut, start.line + content.count(b"\n"), inside)


def find_cut(content: bytes, kind: str) -> tuple[int, bool]:
  """Finds the last place in some bytes where a file may be cut.

  Args:
    content: bytes from the beginning of a block on, which are followed by others.
    kind: one of `KINDS`, or "jsonl".

  Returns:
    The number of bytes before the cut, 0 where more bytes are needed; and whether the cut is inside
    a document.
  """
  if kind in ("lines", "jsonl") and (cut := content.rfind(b"\n") + 1):
    return cut, False
  if kind == "paragraphs" and (last := max(content.rfind(b"\n\n"), content.rfind(b"\n\r\n"))) >= 0:
    run = len(content[:last].rstrip(b"\r\n"))  # a run of line ends is matched from its first on
    return max(blank.end() for blank in _BLANK_LINE_BYTES.finditer(content, run)), False
  if kind == "jsonl":
    return 0, False
  end = len(content)
  while (end := max(content.rfind(b" ", 0, end), content.rfind(b"\n", 0, end))) > 0:
    if _NO_BLANK.search(content, max(0, end - 4), end):
      return end, True
  if len(content) < MAX_WORD_BYTES:
    return 0, False
  cut = len(content) - 1
  while cut > len(content) - 4 and content[cut] & 0xC0 == 0x80:
    cut -= 1
  # A cut between LF and CR could divide a blank line, so it is moved before the LF.
  return cut - (content[cut - 1 : cut + 1] == b"\n\r"), True


# --- Documents ---


def parse_block(block: Block, field: str, *, separate: bool) -> list[str]:
  """Returns the documents of a block, in order.

  The first continues an earlier document where `block.start.inside` is true.

  Paragraphs are those of `split_paragraphs`. Lines end with their newline; blank lines are skipped.
  A line of JSON is an object with a text; empty texts are skipped. A byte order mark at the start
  of a file is removed.

  Args:
    block: from `read_blocks`.
    field: name of the text in a line of JSON.
    separate: adds a newline where nothing else separates documents: to each text of JSON lines, and
      to each file of text but the last, unless it ends with one.

  Raises:
    UserError: naming the file and the byte or line, for content that is not UTF-8, JSON without
      such a text, and text with a NUL.
  """
  try:
    text = block.content.decode()
  except UnicodeDecodeError as error:
    byte = f"byte {block.start.offset + error.start} is 0x{block.content[error.start]:02x}"
    raise UserError(f"{block.path} is not UTF-8 text: {byte}.") from None
  if block.start.offset == 0:
    text = text.removeprefix("\ufeff")
  if block.kind == "jsonl":
    lines = text.split("\n")
    del text  # frees memory: a line may be as long as the block
    found = [_parse_line(line, block, n, field) for n, line in enumerate(lines, 1) if line.strip()]
    return [f"{t}\n" if separate and not t.endswith("\n") else t for t in found if t]
  if (nul := block.content.find(b"\0")) >= 0:
    raise UserError(
      f"{block.path} is no text: byte {block.start.offset + nul} is 0x00. Leave data files out of "
      "--data"
    )
  if not text:
    return []
  if separate and block.ends_file and not block.ends_all and not text.endswith("\n"):
    text += "\n"
  if block.kind == "files":
    return [text]
  if block.kind == "lines":
    return [
      d for n, d in enumerate(_LINE.findall(text)) if d.strip() or (n == 0 and block.start.inside)
    ]
  *whole, last = split_paragraphs(text)
  return [*whole, last] if last or block.ends_file else whole


def split_paragraphs(text: str) -> list[str]:
  """Splits a text after each blank line; the parts joined are the text.

  A blank line holds nothing, also no spaces; lines end with LF or CRLF. Every two line ends in a
  row, counted from the first, end a paragraph. The last part follows the last blank line, and may
  be "".
  """
  ends = [0, *(blank.end() for blank in _BLANK_LINE.finditer(text)), len(text)]
  return [text[start:end] for start, end in itertools.pairwise(ends)]


def _parse_line(line: str, block: Block, number: int, field: str) -> str:
  """Returns the text in a line of JSON, the `number`-th of its block, counted from 1."""
  where = f"{block.path} line {block.start.line + number}"
  try:
    value = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where} is not JSON: {error}") from None
  if not isinstance(value, dict) or not isinstance(value.get(field), str):
    got = (
      f"the fields {', '.join(map(str, value))}"
      if isinstance(value, dict)
      else f"a JSON {type(value).__name__}"
    )
    if isinstance(value, dict) and field in value:
      got = f"a JSON {type(value[field]).__name__} in it"
    got = "".join(c if c.isprintable() else "?" for c in got[:200])
    raise UserError(f"{where} needs a text in the field {field!r} and has {got}. See --field")
  try:
    value[field].encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f"{where} holds {value[field][error.start]!r}, half of a surrogate pair, which is not "
      "Unicode text."
    ) from None
  return value[field]


# Text is cut as in `bpe.py`. `tiktoken` gets pieces because the list of ids that it returns takes
# ten times the memory of an array; `tokenizers` is faster with short pieces.
_PIECES = re.compile(r"(?s).{262144}.*?(?<=\S)(?=[ \n])|.+")
_AT_ONCE = 128  # short pieces in a call
_SHORT_PIECES = re.compile(r"(?s).{4096}.*?(?<=\S)(?=[ \n])|.+")


@dataclasses.dataclass(frozen=True)
class DocumentEncoder:
  """Encodes lists of documents; may be used by several threads.

  A call of a BPE library for each document would take most of the time. So documents are joined by
  the end-of-text token, at which the libraries cut, and encoded in one call. Documents that contain
  the characters "<|endoftext|>" are encoded by themselves, as ordinary text.

  Attributes:
    tokenizer: a tokenizer without BOS.
  """

  tokenizer: Tokenizer
  # One thread at a time calls `tokenizers`, which takes a hundred times the memory of its text and
  # uses all cores.
  _turn: threading.Lock = dataclasses.field(
    default_factory=threading.Lock, init=False, repr=False, compare=False
  )

  @property
  def eot_id(self) -> int | None:
    """Returns the id that is put before each document; None where the tokenizer has none."""
    return getattr(self.tokenizer, "eot_id", None)

  def encode(self, documents: Sequence[str], *, inside: bool = False) -> np.ndarray:
    """Maps documents to ids, with the tokenizer's end-of-text token, if any, before each.

    Args:
      documents: Unicode texts; "<|endoftext|>" in them is ordinary text.
      inside: whether the first continues an earlier document, so that no token is put before it.

    Returns:
      uint32 [ids].

    Raises:
      UserError: for characters that are not in the vocabulary, or if a package that the tokenizer
        needs is not installed.
    """
    if isinstance(self.tokenizer, ByteTokenizer):
      return np.frombuffer(to_utf8("".join(documents)), np.uint8).astype(np.uint32)
    if not isinstance(self.tokenizer, BpeTokenizer):
      return _to_array(self.tokenizer.encode("".join(documents)))
    parts = []
    for is_plain, run in _group_runs(documents):
      if is_plain:
        parts.append(self._encode_joined(run))
      else:
        parts += [self._encode_alone(document) for document in run]
    ids = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint32), *parts])
    if self.eot_id is None:
      return ids[ids != self._with_eot.eot_id]
    return ids[1:] if inside and documents else ids

  def _encode_alone(self, document: str) -> np.ndarray:
    return _to_array([self._with_eot.eot_id, *self.tokenizer.encode(document)])

  def _encode_joined(self, documents: Sequence[str]) -> np.ndarray:
    text = "".join(f"{END_OF_TEXT}{document}" for document in documents)
    if self._tiktoken is not None and _is_safe_for_tiktoken(text):
      pieces = (piece.group() for piece in _PIECES.finditer(text))
      return np.concatenate(
        [_to_array(self._tiktoken.encode(piece, allowed_special={END_OF_TEXT})) for piece in pieces]
      )
    pieces, parts = _SHORT_PIECES.findall(text), []
    for n in range(0, len(pieces), _AT_ONCE):
      with self._turn:
        found = self._tokenizers.encode_batch_fast(pieces[n : n + _AT_ONCE])
        parts += [_to_array(piece.ids) for piece in found]
    return np.concatenate(parts)

  @functools.cached_property
  def _with_eot(self) -> BpeTokenizer:
    """Makes the tokenizer with an end-of-text token.

    Where it has none of its own, the token separates documents and is removed afterwards.
    """
    return dataclasses.replace(self.tokenizer, end_of_text=True)

  @functools.cached_property
  def _tiktoken(self) -> Any:
    """Makes a `tiktoken.Encoding` with the end-of-text token; None where it gives other ids."""
    if self.tokenizer.tiktoken_encoding is None:
      return None
    import tiktoken

    ranks = {token: rank for rank, token in enumerate(self._with_eot.token_bytes[:-1])}
    special = {END_OF_TEXT: self._with_eot.eot_id}
    return tiktoken.Encoding(
      "jgpt", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens=special
    )

  @functools.cached_property
  def _tokenizers(self) -> Any:
    """Makes a `tokenizers.Tokenizer` with the end-of-text token."""
    return bpe.import_tokenizers().Tokenizer.from_str(json.dumps(self._with_eot.to_json()))


def _group_runs(documents: Iterable[str]) -> list[tuple[bool, list[str]]]:
  """Groups neighbouring documents by whether they are free of "<|endoftext|>"."""
  runs: list[tuple[bool, list[str]]] = []
  for document in documents:
    is_plain = END_OF_TEXT not in document
    if not runs or runs[-1][0] != is_plain:
      runs.append((is_plain, []))
    runs[-1][1].append(document)
  return runs


def _is_safe_for_tiktoken(text: str) -> bool:
  """Returns what `bpe.is_safe_for_tiktoken` does, faster for most ASCII text."""
  probes = text[::1000]  # of any 10,000 blanks in a row, ten neighbouring probes are blank
  if text.isascii() and not any(probes[n : n + 10].isspace() for n in range(len(probes) - 9)):
    return True
  return bpe.is_safe_for_tiktoken(text)


def _to_array(ids: Sequence[int]) -> np.ndarray:
  return np.asarray(ids, np.uint32)
