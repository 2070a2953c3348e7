"""Documents to ids, many at once.

Responsible for doing what `Tokenizer.encode` does with one text for a list of documents, with the end-of-text token before
each, and quickly in several threads. Not responsible for what ids are (`tokenizer.py`, `bpe.py`). Imports no jax.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jgpt import bpe
from jgpt.bpe import END_OF_TEXT, GPT2_SPLIT, BpeTokenizer, to_utf8
from jgpt.tokenizer import ByteTokenizer, Tokenizer

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
