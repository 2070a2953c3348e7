"""Text to token ids and back.

Responsible for what a tokenizer is: `encode`, `decode`, JSON in both directions and a digest. Not responsible for where
text comes from (`sources.py`) or how ids become batches (`data.py`). Imports no jax.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from jgpt.config import UserError


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
  """One id per character, then BOS as the last id (microgpt's tokenizer).

  Attributes:
    chars: the distinct characters in sorted order; their positions are their ids.
  """

  chars: str

  def __post_init__(self):
    if list(self.chars) != sorted(set(self.chars)):
      raise UserError("a character tokenizer's characters must be distinct and sorted.")

  @property
  def bos_id(self) -> int:
    """Id of the mark that begins and ends a document."""
    return len(self.chars)

  @property
  def vocab_size(self) -> int:
    """Ids there are, BOS included."""
    return len(self.chars) + 1

  @functools.cached_property
  def _ids(self) -> dict[str, int]:
    return {c: i for i, c in enumerate(self.chars)}

  def encode(self, text: str) -> list[int]:
    """Maps characters to ids, in [0, bos_id); adds no BOS.

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

  def document(self, text: str) -> list[int]:
    """BOS + characters + BOS: what one document is to the model."""
    return [self.bos_id, *self.encode(text), self.bos_id]

  def to_json(self) -> dict[str, Any]:
    """The tokenizer as a dict that `json` can write."""
    return {"type": "characters", "chars": self.chars}

  @property
  def digest(self) -> str:
    """SHA-256 of the tokenizer's JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def train_char_tokenizer(documents: Iterable[str]) -> CharTokenizer:
  """Makes the tokenizer whose characters are those of the documents."""
  return CharTokenizer("".join(sorted(set().union(*documents))))


def from_json(value: Any) -> CharTokenizer:
  """Reads what `to_json` wrote.

  Raises:
    UserError: for anything else.
  """
  if not isinstance(value, dict) or value.get("type") != "characters" or not isinstance(value.get("chars"), str):
    raise UserError('a tokenizer in JSON must be {"type": "characters", "chars": "..."}.')
  return CharTokenizer(value["chars"])


def show_chars(chars: str) -> str:
  """Sorted characters for a person to read, runs of letters and digits shortened: "a-z", "' ' ! , 0-9 A-Z"."""
  runs: list[str] = []
  for c in chars:
    if runs and ord(c) == ord(runs[-1][-1]) + 1 and c.isalnum() and runs[-1][-1].isalnum():
      runs[-1] += c
    else:
      runs.append(c)
  return " ".join(
    f"{r[0]}-{r[-1]}" if len(r) > 2 else " ".join(c if c.isprintable() and c != " " else repr(c) for c in r) for r in runs
  )
