"""Tokenizers of characters and of bytes, and what all tokenizers have in common.

A tokenizer has `encode`, `decode`, `encode_prompt`, `token_bytes`, JSON and a digest. Byte-level
BPE is in `bpe.py`; batches of ids are made in `batches.py`. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Iterable
from typing import Any

from jgpt.errors import UserError
from jgpt.text.bpe import BpeTokenizer, bpe_from_json, digest_json, to_utf8


def find_known_char(chars: str) -> str:
  """Finds the first character of a vocabulary that a command line shows well: a letter or digit."""
  return next(filter(str.isalnum, chars), next(filter(str.isprintable, chars), chars[:1]))


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
  """A tokenizer with one id per character, and optionally BOS as the last id.

  With BOS it is microgpt's tokenizer.

  Attributes:
    chars: the distinct characters in sorted order; their indices are their ids.
    bos: whether there is a BOS token, which begins and ends each document.
  """

  chars: str
  bos: bool

  def __post_init__(self):
    if list(self.chars) != sorted(set(self.chars)):
      raise UserError("a character tokenizer's characters must be distinct and sorted.")
    to_utf8(self.chars)  # JSON would turn two neighbouring surrogates into one character

  @property
  def bos_id(self) -> int | None:
    """Returns the id of BOS; None where the tokenizer has none."""
    return len(self.chars) if self.bos else None

  @property
  def stop_id(self) -> int | None:
    """Returns the id that ends a text, which is BOS; None where the tokenizer has none."""
    return self.bos_id

  @property
  def vocab_size(self) -> int:
    """Counts the ids, BOS included."""
    return len(self.chars) + self.bos

  @functools.cached_property
  def _ids(self) -> dict[str, int]:
    return {c: i for i, c in enumerate(self.chars)}

  @functools.cached_property
  def token_bytes(self) -> list[bytes]:
    """Returns the UTF-8 bytes of each id; BOS has no bytes."""
    return [*(c.encode() for c in self.chars), b""][: self.vocab_size]

  def encode(self, text: str) -> list[int]:
    """Maps text to ids in [0, len(chars)), without BOS.

    Raises:
      UserError: naming the characters that are not in the vocabulary, and listing those that are.
    """
    try:
      return [self._ids[c] for c in text]
    except KeyError:
      unknown = sorted(set(text) - set(self.chars))
      raise UserError(
        f"not in the vocabulary: {' '.join(map(repr, unknown))}. The vocabulary is: "
        f"{show_chars(self.chars)}"
      ) from None

  def decode(self, ids: Iterable[int]) -> str:
    """Maps ids to text; skips BOS and ids outside the vocabulary."""
    return "".join(self.chars[i] for i in ids if 0 <= i < len(self.chars))

  def encode_prompt(self, text: str) -> list[int]:
    """Maps a prompt to the ids that generation starts from: BOS and the text's.

    Without BOS, an empty prompt is a newline.

    Raises:
      UserError: for characters that are not in the vocabulary, or for an empty prompt where the
        tokenizer has neither BOS nor a newline.
    """
    if self.bos:
      return [self.bos_id, *self.encode(text)]
    if not text and "\n" not in self.chars:
      raise UserError(
        "an empty prompt begins with BOS or a newline, and this tokenizer has neither. Try "
        f"--prompt {shlex.quote(find_known_char(self.chars))}"
      )
    return self.encode(text or "\n")

  def encode_document(self, text: str) -> list[int]:
    """Maps a document to BOS + characters + BOS; the tokenizer must have BOS."""
    return [self.bos_id, *self.encode(text), self.bos_id]

  def describe(self) -> str:
    """Describes the tokenizer's size and characters, for printing."""
    return f"{self.vocab_size:,} ids: {show_chars(self.chars)}" + (
      f" and BOS ({self.bos_id})" if self.bos else ""
    )

  def to_json(self) -> dict[str, Any]:
    """Converts the tokenizer to a dict that `json` can write."""
    return {"type": "characters", "chars": self.chars, "bos": self.bos}

  @property
  def digest(self) -> str:
    """Computes the SHA-256 of the tokenizer's JSON, in hexadecimal."""
    return digest_json(self.to_json())


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """A tokenizer whose ids are the 256 bytes of UTF-8."""

  @property
  def vocab_size(self) -> int:
    """Counts the ids, which are 256."""
    return 256

  @property
  def stop_id(self) -> None:
    """Returns None: no id ends a text."""
    return None

  @property
  def token_bytes(self) -> list[bytes]:
    """Returns the byte of each id."""
    return [bytes([i]) for i in range(256)]

  def encode(self, text: str) -> list[int]:
    """Maps text to its UTF-8 bytes.

    Raises:
      UserError: if the text holds a lone surrogate.
    """
    return list(to_utf8(text))

  def decode(self, ids: Iterable[int]) -> str:
    """Maps bytes to text.

    Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary are skipped.
    """
    return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")

  def encode_prompt(self, text: str) -> list[int]:
    """Maps a prompt to the ids that generation starts from; an empty one is a newline."""
    return self.encode(text or "\n")

  def describe(self) -> str:
    """Describes the tokenizer's size and kind, for printing."""
    return "256 ids: bytes"

  def to_json(self) -> dict[str, Any]:
    """Converts the tokenizer to a dict that `json` can write."""
    return {"type": "bytes"}

  @property
  def digest(self) -> str:
    """Computes the SHA-256 of the tokenizer's JSON, in hexadecimal."""
    return digest_json(self.to_json())


Tokenizer = CharTokenizer | ByteTokenizer | BpeTokenizer


def train_char_tokenizer(texts: Iterable[str], *, bos: bool) -> CharTokenizer:
  """Makes a tokenizer of the characters that occur in the texts, with BOS if `bos` is true."""
  return CharTokenizer("".join(sorted(set().union(*texts))), bos)


def tokenizer_from_json(value: Any) -> Tokenizer:
  """Makes a tokenizer from the value that its `to_json` returned; executes nothing in it.

  Args:
    value: parsed JSON, which may be untrusted.

  Raises:
    UserError: for any other value.
  """
  match value:
    case {"type": "characters", "chars": str(chars), "bos": bool(bos), **rest} if not rest:
      return CharTokenizer(chars, bos)
    case {"type": "bytes", **rest} if not rest:
      return ByteTokenizer()
    case {"model": _}:
      return bpe_from_json(value)
  raise UserError(
    'a tokenizer in JSON must be {"type": "characters", "chars": "...", "bos": true or false}, '
    '{"type": "bytes"}, or a byte-level BPE\'s {"model": ..., ...}.'
  )


def kind_of(tokenizer: Tokenizer) -> str:
  """Returns a tokenizer's value of `data.tokenizer`: "characters", "bytes", "bpe" or "gpt2"."""
  if isinstance(tokenizer, BpeTokenizer):
    return "gpt2" if tokenizer.end_of_text else "bpe"
  return {ByteTokenizer: "bytes", CharTokenizer: "characters"}[type(tokenizer)]


def show_chars(chars: str) -> str:
  """Formats sorted characters for printing: "a-z", "' ' ! , 0-9 A-Z".

  Runs of letters and digits are written as ranges. Of more than 20 entries, those in the middle are
  left out.
  """
  runs: list[str] = []
  for c in chars:
    if runs and ord(c) == ord(runs[-1][-1]) + 1 and c.isalnum() and runs[-1][-1].isalnum():
      runs[-1] += c
    else:
      runs.append(c)
  shown = [
    f"{r[0]}-{r[-1]}"
    if len(r) > 2
    else " ".join(c if c.isprintable() and c != " " else repr(c) for c in r)
    for r in runs
  ]
  return " ".join(shown if len(shown) <= 20 else [*shown[:18], "...", shown[-1]])
