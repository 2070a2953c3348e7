"""Text to token ids and back.

Responsible for what a tokenizer is: `encode`, `decode`, `prompt`, JSON in both directions and a digest. The kinds are
characters, bytes and byte-level BPE (in a file of its own, `bpe.py`). Not responsible for where text comes from
(`sources.py`) or how ids become batches (`data.py`). Imports no jax.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

from jgpt.errors import UserError
from jgpt.text.bpe import BpeTokenizer, bpe_from_json, digest_json, to_utf8


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
  """One id per character, then perhaps BOS as the last id (with it: microgpt's tokenizer).

  Attributes:
    chars: the distinct characters in sorted order; their positions are their ids.
    bos: whether there is a mark that begins and ends each document.
  """

  chars: str
  bos: bool

  def __post_init__(self):
    if list(self.chars) != sorted(set(self.chars)):
      raise UserError("a character tokenizer's characters must be distinct and sorted.")
    to_utf8(self.chars)  # two halves of a pair side by side would come back from JSON as one character

  @property
  def bos_id(self) -> int | None:
    """Id of the mark that begins and ends a document; None where there is none."""
    return len(self.chars) if self.bos else None

  @property
  def stop_id(self) -> int | None:
    """Id that ends a text: BOS; None where there is none."""
    return self.bos_id

  @property
  def vocab_size(self) -> int:
    """Ids there are, BOS included."""
    return len(self.chars) + self.bos

  @functools.cached_property
  def _ids(self) -> dict[str, int]:
    return {c: i for i, c in enumerate(self.chars)}

  @functools.cached_property
  def token_bytes(self) -> list[bytes]:
    """The UTF-8 bytes that each id stands for; none for BOS."""
    return [*(c.encode() for c in self.chars), b""][: self.vocab_size]

  def encode(self, text: str) -> list[int]:
    """Maps characters to ids, in [0, len(chars)); adds no BOS.

    Raises:
      UserError: naming the characters that are not in the vocabulary, and listing those that are.
    """
    try:
      return [self._ids[c] for c in text]
    except KeyError:
      unknown = sorted(set(text) - set(self.chars))
      raise UserError(
        f"not in the vocabulary: {' '.join(map(repr, unknown))}. The vocabulary is: {show_chars(self.chars)}"
      ) from None

  def decode(self, ids: Iterable[int]) -> str:
    """Maps ids to text. BOS, and ids that the model has beyond the tokenizer's, have no text and are left out."""
    return "".join(self.chars[i] for i in ids if 0 <= i < len(self.chars))

  def prompt(self, text: str) -> list[int]:
    """The ids that generation begins from: BOS and the text's; without BOS the text's, or a newline for an empty text.

    Raises:
      UserError: for characters that are not in the vocabulary, or if there is nothing to begin an empty text with.
    """
    if self.bos:
      return [self.bos_id, *self.encode(text)]
    if not text and "\n" not in self.chars:
      raise UserError(
        "an empty prompt begins with BOS or a newline, and this tokenizer has neither. Try --prompt TEXT, or "
        "--set sample.prompt=TEXT"
      )
    return self.encode(text or "\n")

  def document(self, text: str) -> list[int]:
    """BOS + characters + BOS: what one document is to the model. For a tokenizer with BOS."""
    return [self.bos_id, *self.encode(text), self.bos_id]

  def describe(self) -> str:
    """Size and characters, for a person."""
    return f"{self.vocab_size:,} ids: {show_chars(self.chars)}" + (f" and BOS ({self.bos_id})" if self.bos else "")

  def to_json(self) -> dict[str, Any]:
    """The tokenizer as a dict that `json` can write."""
    return {"type": "characters", "chars": self.chars, "bos": self.bos}

  @property
  def digest(self) -> str:
    """SHA-256 of the tokenizer's JSON, in hexadecimal."""
    return digest_json(self.to_json())


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """The 256 bytes of UTF-8: an id is a byte."""

  @property
  def vocab_size(self) -> int:
    """Ids there are."""
    return 256

  @property
  def stop_id(self) -> None:
    """None: no id ends a text."""
    return None

  @property
  def token_bytes(self) -> list[bytes]:
    """The byte that each id is."""
    return [bytes([i]) for i in range(256)]

  def encode(self, text: str) -> list[int]:
    """Maps text to its UTF-8 bytes; raises `UserError` where it holds half of a surrogate pair."""
    return list(to_utf8(text))

  def decode(self, ids: Iterable[int]) -> str:
    """Maps bytes to text. Those that are not UTF-8 become U+FFFD; ids of 256 and more have no text."""
    return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")

  def prompt(self, text: str) -> list[int]:
    """The ids that generation begins from: the text's, or a newline for an empty text."""
    return self.encode(text or "\n")

  def describe(self) -> str:
    """Size and kind, for a person."""
    return "256 ids: bytes"

  def to_json(self) -> dict[str, Any]:
    """The tokenizer as a dict that `json` can write."""
    return {"type": "bytes"}

  @property
  def digest(self) -> str:
    """SHA-256 of the tokenizer's JSON, in hexadecimal."""
    return digest_json(self.to_json())


Tokenizer = CharTokenizer | ByteTokenizer | BpeTokenizer


def train_char_tokenizer(texts: Iterable[str], *, bos: bool) -> CharTokenizer:
  """Makes the tokenizer whose characters are those of the texts."""
  return CharTokenizer("".join(sorted(set().union(*texts))), bos)


def tokenizer_from_json(value: Any) -> Tokenizer:
  """Reads what a tokenizer's `to_json` wrote. Nothing in `value` is executed.

  Raises:
    UserError: for anything else.
  """
  match value:
    case {"type": "characters", "chars": str(chars), "bos": bool(bos), **rest} if not rest:
      return CharTokenizer(chars, bos)
    case {"type": "bytes", **rest} if not rest:
      return ByteTokenizer()
    case {"model": _}:
      return bpe_from_json(value)
  raise UserError(
    'a tokenizer in JSON must be {"type": "characters", "chars": "...", "bos": true or false}, {"type": "bytes"}, or a '
    'byte-level BPE\'s {"model": ..., ...}.'
  )


def kind_of(tokenizer: Tokenizer) -> str:
  """The word for a tokenizer in `data.tokenizer`: "characters", "bytes", "bpe" or "gpt2"."""
  if isinstance(tokenizer, BpeTokenizer):
    return "gpt2" if tokenizer.end_of_text else "bpe"
  return {ByteTokenizer: "bytes", CharTokenizer: "characters"}[type(tokenizer)]


def show_chars(chars: str) -> str:
  """Sorted characters for a person to read: "a-z", "' ' ! , 0-9 A-Z".

  Runs of letters and digits are shortened, and of more than 20 entries those in the middle are left out.
  """
  runs: list[str] = []
  for c in chars:
    if runs and ord(c) == ord(runs[-1][-1]) + 1 and c.isalnum() and runs[-1][-1].isalnum():
      runs[-1] += c
    else:
      runs.append(c)
  shown = [
    f"{r[0]}-{r[-1]}" if len(r) > 2 else " ".join(c if c.isprintable() and c != " " else repr(c) for c in r) for r in runs
  ]
  return " ".join(shown if len(shown) <= 20 else [*shown[:18], "...", shown[-1]])
