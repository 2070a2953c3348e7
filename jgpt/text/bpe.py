"""Byte-level byte-pair encoding: tokenizers trained on a text, and GPT-2's.

The JSON of such a tokenizer is a `tokenizer.json` of Hugging Face's `tokenizers` and
`transformers`. The package `tokenizers` trains and encodes, and `tiktoken` encodes faster, to the
same ids; both are imported when they are first needed. Other tokenizers are in `tokenizer.py`;
GPT-2's files are found in `data/sources.py`. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import types
import unicodedata
from collections.abc import Iterable
from typing import Any

from jgpt.errors import UserError, show

END_OF_TEXT = "<|endoftext|>"
# GPT-2's rule for cutting text into words, inside which tokens are merged; "ByteLevel" in
# `tokenizers`.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# GPT-2 writes each byte as one printable character: that of Latin-1 where it is printable, else one
# from U+0100 on.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [b for b in range(0x100) if b not in _VISIBLE]
_BYTES = {chr(b): b for b in _VISIBLE} | {chr(0x100 + n): b for n, b in enumerate(_HIDDEN)}
ALPHABET = "".join(sorted(_BYTES))  # ids 0 to 255

# Text may be cut before a space or newline that follows another character without changing ids: no
# word continues there. Pieces bound the memory, for `tokenizers` takes 140 bytes for each byte that
# it encodes in one call.
_PIECES = re.compile(r"(?s).{65536}.*?(?<=\S)(?=[ \n])|.+")
_LONG_BLANK = re.compile(r"(?<!\s)\s{10000}")


@dataclasses.dataclass(frozen=True)
class BpeTokenizer:
  """A byte-level BPE tokenizer.

  Ids 0 to 255 are bytes, in the order of `ALPHABET`; then each merge of two earlier tokens has an
  id; the last id may be GPT-2's end-of-text token.

  Attributes:
    merges: one line for each merge, in order of rank, as in GPT-2's `vocab.bpe`: the two tokens,
      their bytes written as characters of `ALPHABET`, separated by a space. Merge n makes id
      256 + n.
    end_of_text: whether the last id is "<|endoftext|>".
  """

  merges: str
  end_of_text: bool

  def __post_init__(self):
    tokens = {*ALPHABET}
    for number, line in enumerate(self._lines):
      left, _, right = line.partition(" ")
      if not {left, right} <= tokens or left + right in tokens or left + right == END_OF_TEXT:
        raise UserError(
          f"a BPE tokenizer's merge {number} ({line[:40]!r}) must join two earlier tokens into a "
          "new one."
        )
      tokens.add(left + right)

  @property
  def _lines(self) -> list[str]:
    return self.merges.split("\n") if self.merges else []

  @functools.cached_property
  def _tokens(self) -> list[str]:
    merged = [line.replace(" ", "") for line in self._lines]
    return [*ALPHABET, *merged, END_OF_TEXT] if self.end_of_text else [*ALPHABET, *merged]

  @functools.cached_property
  def _bytes(self) -> list[bytes]:
    return [bytes(_BYTES[c] for c in token) for token in self._tokens]

  @functools.cached_property
  def token_bytes(self) -> list[bytes]:
    """Returns the UTF-8 bytes of each id, which may be part of a character.

    The end-of-text token has no bytes.
    """
    return [*self._bytes[:-1], b""] if self.end_of_text else self._bytes

  @property
  def vocab_size(self) -> int:
    """Counts the ids, the end-of-text token's included."""
    return len(self._tokens)

  @property
  def eot_id(self) -> int | None:
    """Returns the id of the end-of-text token; None where the tokenizer has none."""
    return self.vocab_size - 1 if self.end_of_text else None

  @property
  def stop_id(self) -> None:
    """Returns None: no id ends a text."""
    return None

  def encode(self, text: str) -> list[int]:
    """Maps text to ids; "<|endoftext|>" in it is ordinary text.

    The ids are the same with `tiktoken` and without.

    Raises:
      UserError: if `text` holds a lone surrogate, or the package `tokenizers` is not installed.
    """
    to_utf8(text)
    ids = []
    for match in _PIECES.finditer(text):
      piece = match.group()
      if self.tiktoken_encoding is not None and is_safe_for_tiktoken(piece):
        ids += self.tiktoken_encoding.encode_ordinary(piece)
      else:
        ids += self._encoder.encode(piece).ids
    return ids

  @functools.cached_property
  def _encoder(self) -> Any:
    """Makes a `tokenizers.Tokenizer` without special tokens, so that no text becomes one."""
    return import_tokenizers().Tokenizer.from_str(json.dumps(self.to_json() | {"added_tokens": []}))

  @functools.cached_property
  def tiktoken_encoding(self) -> Any:
    """Makes a `tiktoken.Encoding` with the same ids.

    `tiktoken` stores tokens and no merges: it joins two neighbours wherever that makes a token. The
    ids are the same if the merges make every token from its own bytes, which training guarantees.

    Returns:
      None where `tiktoken` is not installed or would give other ids.
    """
    try:
      import tiktoken
    except ImportError:
      return None
    merged = self._tokens[: self.vocab_size - self.end_of_text]
    if any(len(self._encoder.model.tokenize(token)) > 1 for token in merged):
      return None
    ranks = {token: rank for rank, token in enumerate(self._bytes[: len(merged)])}
    return tiktoken.Encoding("jgpt", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={})

  def decode(self, ids: Iterable[int]) -> str:
    """Maps ids to text.

    Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary are skipped.
    """
    content = b"".join(self._bytes[i] for i in ids if 0 <= i < self.vocab_size)
    return content.decode(errors="replace")

  def encode_prompt(self, text: str) -> list[int]:
    """Maps a prompt to the ids that generation starts from.

    An empty prompt is the end-of-text token, or a newline where the tokenizer has none.
    """
    return [self.eot_id] if self.end_of_text and not text else self.encode(text or "\n")

  def describe(self) -> str:
    """Describes the tokenizer's size and kind, for printing."""
    return f"{self.vocab_size:,} ids: byte-level BPE" + (
      f", end of text {self.eot_id}" if self.end_of_text else ""
    )

  def to_json(self) -> dict[str, Any]:
    """Converts the tokenizer to the content of a `tokenizer.json`, a dict that `json` can write."""
    byte_level = {
      "type": "ByteLevel",
      "add_prefix_space": False,
      "trim_offsets": True,
      "use_regex": True,
    }
    special = {
      "single_word": False,
      "lstrip": False,
      "rstrip": False,
      "normalized": False,
      "special": True,
    }
    return {
      "version": "1.0",
      "truncation": None,
      "padding": None,
      "added_tokens": [{"id": self.eot_id, "content": END_OF_TEXT, **special}]
      if self.end_of_text
      else [],
      "normalizer": None,
      "pre_tokenizer": byte_level,
      "post_processor": None,
      "decoder": byte_level,
      "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(self._tokens)},
        "merges": [line.split(" ") for line in self._lines],
      },
    }

  @functools.cached_property
  def digest(self) -> str:
    """Computes the SHA-256 of the tokenizer's JSON, in hexadecimal."""
    return digest_json(self.to_json())


def bpe_from_json(value: dict[str, Any]) -> BpeTokenizer:
  """Makes a tokenizer from the value that `BpeTokenizer.to_json` returned.

  Only the merges are read. Everything else must be as jgpt writes it, because another normalizer or
  pre-tokenizer would give other ids.

  Args:
    value: parsed JSON, which may be untrusted.

  Raises:
    UserError: for any other value.
  """
  model = value.get("model")
  merges = model.get("merges") if isinstance(model, dict) else None
  if not isinstance(merges, list) or not all(map(_is_list_of_str, merges)):
    raise UserError(
      'a BPE tokenizer in JSON must have "model" with "merges", a list of pairs of tokens.'
    )
  tokenizer = BpeTokenizer(
    "\n".join(map(" ".join, merges)), end_of_text=bool(value.get("added_tokens"))
  )
  written = tokenizer.to_json()
  for name in [*written, *value]:
    if name not in value or name not in written or value[name] != written[name]:
      raise UserError(
        f"{show(name)} in the JSON of a BPE tokenizer must be as jgpt writes it: byte-level BPE by "
        "GPT-2's rules."
      )
  return tokenizer


def train_bpe_tokenizer(text: str, vocab_size: int) -> BpeTokenizer:
  """Trains a byte-level BPE: repeatedly merges the most frequent pair of neighbours inside words.

  Among equally frequent pairs the one with the smaller left id, then the smaller right id is
  merged, so that the result is determined by the text and the size.

  Args:
    text: the training text.
    vocab_size: ids in total, of which 256 are bytes.

  Raises:
    UserError: if the text has too few pairs for `vocab_size` or is not Unicode, or the package
      `tokenizers` is not installed.
  """
  to_utf8(text)
  if vocab_size < len(ALPHABET):
    raise UserError(
      f"data.bpe_vocab_size={vocab_size} must be at least {len(ALPHABET)}: each byte has an id."
    )
  tokenizers = import_tokenizers()
  byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trained = tokenizers.Tokenizer(tokenizers.models.BPE())
  trained.pre_tokenizer = byte_level
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    initial_alphabet=byte_level.alphabet(),
    special_tokens=[],
    show_progress=False,
  )
  trained.train_from_iterator((match.group() for match in _PIECES.finditer(text)), trainer)
  num_ids = trained.get_vocab_size()
  if num_ids != vocab_size:
    raise UserError(
      f"data.bpe_vocab_size={vocab_size} is more than this text can have: with every word merged "
      f"into one, there are {num_ids} ids. Try --set data.bpe_vocab_size={num_ids}"
    )
  merges = json.loads(trained.to_str())["model"]["merges"]
  return BpeTokenizer("\n".join(map(" ".join, merges)), end_of_text=False)


def make_gpt2_tokenizer(encoder_json: bytes, vocab_bpe: bytes) -> BpeTokenizer:
  """Makes GPT-2's tokenizer, of 50,257 ids, from the two files that OpenAI published.

  Args:
    encoder_json: content of `encoder.json`, token -> id.
    vocab_bpe: content of `vocab.bpe`: a line with its version, then one merge per line.

  Raises:
    UserError: if the files are damaged or do not belong together.
  """
  try:
    vocab, merges = json.loads(encoder_json), vocab_bpe.decode().rstrip("\n").partition("\n")[2]
  except (ValueError, RecursionError) as error:
    raise UserError(f"encoder.json or vocab.bpe is damaged: {error}.") from None
  tokenizer = BpeTokenizer(merges, end_of_text=True)
  if vocab != tokenizer.to_json()["model"]["vocab"]:
    raise UserError("encoder.json does not hold the ids that the merges of vocab.bpe make.")
  return tokenizer


def to_utf8(text: str) -> bytes:
  """Encodes text as UTF-8.

  Raises:
    UserError: if the text holds a lone surrogate, which UTF-8 cannot encode.
  """
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f"not Unicode text: character {error.start} is {text[error.start]!r}, half of a surrogate "
      "pair."
    ) from None


def digest_json(value: Any) -> str:
  """Computes the SHA-256 of a value's JSON with sorted keys, in hexadecimal."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _is_list_of_str(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(v, str) for v in value)


def is_safe_for_tiktoken(piece: str) -> bool:
  """Returns whether every version of `tiktoken` cuts a text into words as `tokenizers` does.

  Two kinds of text are not safe. Long runs of blanks overflow the stack of `tiktoken`'s regular
  expressions. Letters and digits newer than Unicode 3.2 may be missing in one of the two packages,
  each of which has its own table of Unicode.
  """
  unassigned_in_3_2 = [
    c for c in set(piece) if c > "\x7f" and unicodedata.ucd_3_2_0.category(c) == "Cn"
  ]
  return not _LONG_BLANK.search(piece) and not any(
    unicodedata.category(c)[0] in "LNC" for c in unassigned_in_3_2
  )


def import_tokenizers() -> types.ModuleType:
  """Imports the package `tokenizers`.

  Raises:
    UserError: if it is not installed.
  """
  try:
    import tokenizers
  except ImportError:
    raise UserError(
      "data.tokenizer=bpe and data.tokenizer=gpt2 need the package `tokenizers`. Try pip install "
      "tokenizers, or install jgpt with its extra bpe"
    ) from None
  return tokenizers
