"""Files of text or JSON lines, of any size, as documents.

Responsible for cutting files into blocks of bytes that are small, begin anywhere a document may be cut, and are the same
whichever block the reading begins with; and for the documents of a block. Not responsible for ids (`encoding.py`). Imports
no jax.
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
MAX_WORD_BYTES = 1 << 22  # a longer stretch without a place to cut is cut anywhere
MAX_LINE_BYTES = 1 << 24  # of JSON: a line is parsed in one piece
KINDS = ("paragraphs", "lines", "files")
_BLANK_LINE = re.compile(r"\n\r?\n")  # with the line end before it; its own may be that of Windows
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_BLANK_LINE_BYTES = re.compile(_BLANK_LINE.pattern.encode())

# Bytes after which a space or newline begins a new word for every tokenizer (see `bpe.py`): those of a character that is
# no blank to anyone. Characters left out (of C2, E1, E2, part of E3) only make fewer places to cut.
_NO_BLANK = re.compile(
  rb"(?:[\x21-\x7e]|[\xc3-\xdf][\x80-\xbf]|\xe3(?:\x80[\x81-\xbf]|[\x81-\xbf][\x80-\xbf])|[\xe4-\xef][\x80-\xbf]{2}"
  rb"|[\xf0-\xf4][\x80-\xbf]{3})\Z"
)


@dataclasses.dataclass(frozen=True)
class Position:
  """Where a block begins.

  Attributes:
    file: number of the file, from 0.
    offset: bytes of the file before it.
    line: newlines before it.
    inside: whether it goes on with the document of the block before.
  """

  file: int = 0
  offset: int = 0
  line: int = 0
  inside: bool = False


@dataclasses.dataclass(frozen=True)
class Block:
  """Some bytes of a file: whole documents, or a part of a long one.

  Attributes:
    path: the file.
    kind: of `KINDS`, or "jsonl".
    start: where it begins.
    content: at least 1 byte.
    ends_file: whether the file ends here.
    ends_all: whether no other file follows.
  """

  path: Path
  kind: str
  start: Position
  content: bytes
  ends_file: bool
  ends_all: bool


# --- Blocks ---


def check_jsonl(path: Path) -> None:
  """Raises `UserError` for a file whose name says JSON, and that would be read as text: all but *.jsonl."""
  if path.suffix.lower() not in (".json", ".ndjson", ".jsonl") or path.name.endswith(".jsonl"):
    return
  try:
    with open(path, "rb") as file:
      begin = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}.") from None
  if begin.startswith(b"["):
    raise UserError(
      f"{path} is one JSON array, which is not JSON lines. Write each object on a line of its own, in a *.jsonl file"
    )
  raise UserError(f"{path} would be read as text: JSON lines have names in .jsonl. Rename it so, or name files of text")


def read_blocks(files: Sequence[Path], sizes: Sequence[int], kind: str, start: Position) -> Iterator[Block]:
  """Cuts files into blocks of about `BLOCK_BYTES`, from a position on.

  Args:
    files: in order; *.jsonl holds JSON lines, others text.
    sizes: bytes of each file.
    kind: what a document of text is, of `KINDS`.
    start: of the first block, as an earlier call gave it.

  Raises:
    UserError: if a file cannot be read, has another size, or has a line of JSON longer than `MAX_LINE_BYTES`.
  """
  for number in range(start.file, len(files)):
    first = start if number == start.file else Position(number)
    kind_here = "jsonl" if files[number].name.endswith(".jsonl") else kind
    try:
      yield from _read_file(files[number], sizes[number], kind_here, first, number == len(files) - 1)
    except OSError as error:
      raise UserError(f"cannot read {files[number]}: {error.strerror}.") from None


def _read_file(path: Path, size: int, kind: str, start: Position, ends_all: bool) -> Iterator[Block]:
  """A block depends on nothing but where it begins: what is after its end is read again."""
  with open(path, "rb") as file:
    num_bytes = TEXT_BLOCK_BYTES
    while start.offset < size:
      file.seek(start.offset)
      content = file.read(num_bytes)
      if os.fstat(file.fileno()).st_size != size or not content:
        raise UserError(f"{path} had {size:,} bytes and now has another number: something writes to it.")
      ends_file = start.offset + len(content) == size
      cut, inside = (len(content), False) if ends_file else find_cut(content, kind)
      if not cut:
        num_bytes *= 2
        if kind == "jsonl" and num_bytes > MAX_LINE_BYTES:
          raise UserError(f"{path} line {start.line + 1} is longer than {MAX_LINE_BYTES:,} bytes, too long for JSON lines.")
        continue
      content, num_bytes = content[:cut], TEXT_BLOCK_BYTES
      yield Block(path, kind, start, content, ends_file, ends_file and ends_all)
      start = Position(start.file, start.offset + cut, start.line + content.count(b"\n"), inside)


def find_cut(content: bytes, kind: str) -> tuple[int, bool]:
  """Finds the last place where a file may be cut.

  Args:
    content: bytes from where the block begins; the file goes on after them.
    kind: of `KINDS`, or "jsonl".

  Returns:
    Bytes before the cut, 0 where more must be read; and whether the cut is inside a document.
  """
  if kind in ("lines", "jsonl") and (cut := content.rfind(b"\n") + 1):
    return cut, False
  if kind == "paragraphs" and (last := max(content.rfind(b"\n\n"), content.rfind(b"\n\r\n"))) >= 0:
    run = len(content[:last].rstrip(b"\r\n"))  # line ends are paired from the first on
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
  # A blank line that may go on after these bytes stays in one piece.
  return cut - (content[cut - 1 : cut + 1] == b"\n\r"), True


# --- Documents ---


def parse_block(block: Block, field: str, *, part: bool) -> list[str]:
  """The documents of a block, in order; the first goes on with an earlier one where `block.start.inside`.

  Paragraphs are those of `split_paragraphs`; a line has its newline, and blank lines are left out; a line of JSON is an
  object with a text, and empty texts are left out. A leading byte order mark is dropped.

  Args:
    block: from `read_blocks`.
    field: of the text in a line of JSON.
    part: whether documents are parted by a newline where nothing else parts them: it is put after each text of JSON lines,
      and after each file of text but the last, where it is missing.

  Raises:
    UserError: naming file and byte or line, for what is not UTF-8 or not such JSON, and for text with a NUL.
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
    del text  # a line may be as long as the block
    found = [_parse_line(line, block, n, field) for n, line in enumerate(lines, 1) if line.strip()]
    return [f"{t}\n" if part and not t.endswith("\n") else t for t in found if t]
  if (nul := block.content.find(b"\0")) >= 0:
    raise UserError(f"{block.path} is no text: byte {block.start.offset + nul} is 0x00. Leave data files out of --data")
  if not text:
    return []
  if part and block.ends_file and not block.ends_all and not text.endswith("\n"):
    text += "\n"
  if block.kind == "files":
    return [text]
  if block.kind == "lines":
    return [d for n, d in enumerate(_LINE.findall(text)) if d.strip() or (n == 0 and block.start.inside)]
  *whole, last = split_paragraphs(text)
  return [*whole, last] if last or block.ends_file else whole


def split_paragraphs(text: str) -> list[str]:
  """Cuts a text after each blank line; joined again, the parts are the text.

  Line ends are LF or CRLF, and a longer run of them is paired from its first on. Other blanks make no line blank. The last
  part is what follows the last blank line, and may be "".
  """
  ends = [0, *(blank.end() for blank in _BLANK_LINE.finditer(text)), len(text)]
  return [text[start:end] for start, end in itertools.pairwise(ends)]


def _parse_line(line: str, block: Block, number: int, field: str) -> str:
  """The text of one line of JSON, the `number`-th of its block."""
  where = f"{block.path} line {block.start.line + number}"
  try:
    value = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where} is not JSON: {error}") from None
  if not isinstance(value, dict) or not isinstance(value.get(field), str):
    got = f"the fields {', '.join(map(str, value))}" if isinstance(value, dict) else f"a JSON {type(value).__name__}"
    if isinstance(value, dict) and field in value:
      got = f"a JSON {type(value[field]).__name__} in it"
    got = "".join(c if c.isprintable() else "?" for c in got[:200])
    raise UserError(f"{where} needs a text in the field {field!r} and has {got}. Try --field NAME")
  try:
    value[field].encode()
  except UnicodeEncodeError as error:
    raise UserError(f"{where} holds {value[field][error.start]!r}, half of a pair, which is no Unicode text.") from None
  return value[field]


# As in `bpe.py`, text is cut where a space or newline follows another character. A list of Python's numbers takes ten times
# the memory of an array, so there are pieces for `tiktoken` too; `tokenizers` is quicker with short ones.
_PIECES = re.compile(r"(?s).{262144}.*?(?<=\S)(?=[ \n])|.+")
_AT_ONCE = 128  # short pieces
_SHORT_PIECES = re.compile(r"(?s).{4096}.*?(?<=\S)(?=[ \n])|.+")


@dataclasses.dataclass(frozen=True)
class DocumentEncoder:
  """Encodes lists of documents; may be used by several threads.

  A call of a BPE library for each document would take most of the time. So documents are encoded as one text, parted by the
  end-of-text token, which the libraries cut a text at; a document that holds the characters "<|endoftext|>" is encoded by
  itself, for there they are ordinary text.

  Attributes:
    tokenizer: without the BOS of documents in rows.
  """

  tokenizer: Tokenizer
  # `tokenizers` takes a hundred times the memory of its text, and uses all cores for one list of texts.
  _turn: threading.Lock = dataclasses.field(default_factory=threading.Lock, init=False, repr=False, compare=False)

  @property
  def eot_id(self) -> int | None:
    """Id that is put before each document; None where the tokenizer has none."""
    return getattr(self.tokenizer, "eot_id", None)

  def encode(self, documents: Sequence[str], *, inside: bool = False) -> np.ndarray:
    """Maps documents to ids, uint32 [ids]; before each stands the end-of-text token, where the tokenizer has one.

    Args:
      documents: Unicode texts; "<|endoftext|>" in them is ordinary text.
      inside: whether the first goes on with an earlier one, so that nothing is put before it.

    Raises:
      UserError: for characters that the tokenizer does not know, or if a package is missing that it needs.
    """
    if isinstance(self.tokenizer, ByteTokenizer):
      return np.frombuffer(to_utf8("".join(documents)), np.uint8).astype(np.uint32)
    if not isinstance(self.tokenizer, BpeTokenizer):
      return _to_array(self.tokenizer.encode("".join(documents)))
    parts = []
    for is_plain, run in _runs(documents):
      parts += [self._encode_joined(run)] if is_plain else [self._encode_alone(document) for document in run]
    ids = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint32), *parts])
    if self.eot_id is None:
      return ids[ids != self._marked.eot_id]
    return ids[1:] if inside and documents else ids

  def _encode_alone(self, document: str) -> np.ndarray:
    return _to_array([self._marked.eot_id, *self.tokenizer.encode(document)])

  def _encode_joined(self, documents: Sequence[str]) -> np.ndarray:
    text = "".join(f"{END_OF_TEXT}{document}" for document in documents)
    if self._fast is not None and _is_safe(text):
      pieces = (piece.group() for piece in _PIECES.finditer(text))
      return np.concatenate([_to_array(self._fast.encode(piece, allowed_special={END_OF_TEXT})) for piece in pieces])
    pieces, parts = _SHORT_PIECES.findall(text), []
    for n in range(0, len(pieces), _AT_ONCE):
      with self._turn:
        parts += [_to_array(piece.ids) for piece in self._slow.encode_batch_fast(pieces[n : n + _AT_ONCE])]
    return np.concatenate(parts)

  @functools.cached_property
  def _marked(self) -> BpeTokenizer:
    """The tokenizer with an end-of-text token, which is its own or parts documents until it is removed."""
    return dataclasses.replace(self.tokenizer, end_of_text=True)

  @functools.cached_property
  def _fast(self) -> Any:
    """A `tiktoken.Encoding` that knows the end-of-text token; None where the tokenizer cannot be encoded by it."""
    if self.tokenizer.tiktoken_encoding is None:
      return None
    import tiktoken

    ranks = {token: rank for rank, token in enumerate(self._marked.token_bytes[:-1])}
    special = {END_OF_TEXT: self._marked.eot_id}
    return tiktoken.Encoding("jgpt", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens=special)

  @functools.cached_property
  def _slow(self) -> Any:
    """A `tokenizers.Tokenizer` that knows the end-of-text token."""
    return bpe.import_tokenizers().Tokenizer.from_str(json.dumps(self._marked.to_json()))


def _runs(documents: Iterable[str]) -> list[tuple[bool, list[str]]]:
  """Neighbours that hold no "<|endoftext|>" together, the others together."""
  runs: list[tuple[bool, list[str]]] = []
  for document in documents:
    is_plain = END_OF_TEXT not in document
    if not runs or runs[-1][0] != is_plain:
      runs.append((is_plain, []))
    runs[-1][1].append(document)
  return runs


def _is_safe(text: str) -> bool:
  """As `bpe.is_safe`, and quick for text that cannot have the long runs of blanks which that looks for."""
  probes = text[::1000]  # ten of them are in 10,000 blanks
  if text.isascii() and not any(probes[n : n + 10].isspace() for n in range(len(probes) - 9)):
    return True
  return bpe.is_safe(text)


def _to_array(ids: Sequence[int]) -> np.ndarray:
  return np.asarray(ids, np.uint32)
