"""Byte-level byte-pair encoding: a tokenizer trained here, or GPT-2's.

Responsible for what such a tokenizer is: its merges, `encode`, `decode` and JSON in both directions, which is a
`tokenizer.json` of Hugging Face's `tokenizers` and `transformers`. The packages `tokenizers` (which trains and encodes)
and `tiktoken` (which encodes faster, to the same ids) are imported when they are first needed. Not responsible for other
kinds of tokenizers (`tokenizer.py`) or for finding GPT-2's files (`sources.py`). Imports no jax.
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
# GPT-2's rule for cutting text into words, inside which bytes are merged; `tokenizers` has it built in as "ByteLevel".
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# GPT-2 writes each byte as one visible character: that of Latin-1 where it has one, else one from U+0100 on.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [b for b in range(0x100) if b not in _VISIBLE]
_BYTES = {chr(b): b for b in _VISIBLE} | {chr(0x100 + n): b for n, b in enumerate(_HIDDEN)}
ALPHABET = "".join(sorted(_BYTES))  # ids 0 to 255

# A word never goes on after a space or newline that follows another character, so text may be cut there without changing
# ids. Pieces keep memory small: `tokenizers` takes 140 bytes for each byte that it encodes at once.
_PIECES = re.compile(r"(?s).{65536}.*?(?<=\S)(?=[ \n])|.+")
_LONG_BLANK = re.compile(r"(?<!\s)\s{10000}")


@dataclasses.dataclass(frozen=True)
class BpeTokenizer:
  """Ids of bytes, then one id for each merge of two earlier tokens, then perhaps GPT-2's end-of-text token.

  Attributes:
    merges: a line each, in order of rank and as in GPT-2's `vocab.bpe`: the two tokens, their bytes written as characters
      of `ALPHABET`, with a space between. Merge n makes id 256 + n.
    end_of_text: whether the last id is "<|endoftext|>".
  """

  merges: str
  end_of_text: bool

  def __post_init__(self):
    tokens = {*ALPHABET}
    for number, line in enumerate(self._lines):
      left, _, right = line.partition(" ")
      if not {left, right} <= tokens or left + right in tokens or left + right == END_OF_TEXT:
        raise UserError(f"a BPE tokenizer's merge {number} ({line[:40]!r}) must join two earlier tokens into a new one.")
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
    """The UTF-8 bytes that each id stands for, perhaps part of a character; none for the end-of-text token."""
    return [*self._bytes[:-1], b""] if self.end_of_text else self._bytes

  @property
  def vocab_size(self) -> int:
    """Ids there are, the end-of-text token's included."""
    return len(self._tokens)

  @property
  def eot_id(self) -> int | None:
    """Id of GPT-2's end-of-text token; None where the tokenizer has none."""
    return self.vocab_size - 1 if self.end_of_text else None

  @property
  def stop_id(self) -> None:
    """None: no id ends a text."""
    return None

  def encode(self, text: str) -> list[int]:
    """Maps text to ids; "<|endoftext|>" in it is ordinary text. The ids are the same with `tiktoken` and without.

    Raises:
      UserError: if `text` holds half of a surrogate pair, or the package `tokenizers` is not installed.
    """
    to_utf8(text)
    ids = []
    for match in _PIECES.finditer(text):
      piece = match.group()
      is_fast = self.tiktoken_encoding is not None and is_safe(piece)
      ids += self.tiktoken_encoding.encode_ordinary(piece) if is_fast else self._encoder.encode(piece).ids
    return ids

  @functools.cached_property
  def _encoder(self) -> Any:
    """A `tokenizers.Tokenizer` that knows no special token, so that text never becomes one."""
    return import_tokenizers().Tokenizer.from_str(json.dumps(self.to_json() | {"added_tokens": []}))

  @functools.cached_property
  def tiktoken_encoding(self) -> Any:
    """A `tiktoken.Encoding` with the same ids; None where it is not installed or would give other ids.

    `tiktoken` knows tokens, not merges: it joins two neighbours wherever that makes a token. This is the same if the
    merges make every token out of its own bytes, as they do when they come from training.
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
    """Maps ids to text. Bytes that are not UTF-8 become U+FFFD; ids beyond the tokenizer's have no text."""
    return b"".join(self._bytes[i] for i in ids if 0 <= i < self.vocab_size).decode(errors="replace")

  def prompt(self, text: str) -> list[int]:
    """The ids that generation begins from: the text's, and for an empty text the end-of-text token's or a newline's."""
    return [self.eot_id] if self.end_of_text and not text else self.encode(text or "\n")

  def describe(self) -> str:
    """Size and kind, for a person."""
    return f"{self.vocab_size:,} ids: byte-level BPE" + (f", end of text {self.eot_id}" if self.end_of_text else "")

  def to_json(self) -> dict[str, Any]:
    """The tokenizer as a dict that `json` can write: a `tokenizer.json` for `tokenizers` and `transformers`."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
      "version": "1.0",
      "truncation": None,
      "padding": None,
      "added_tokens": [{"id": self.eot_id, "content": END_OF_TEXT, **special}] if self.end_of_text else [],
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
    """SHA-256 of the tokenizer's JSON, in hexadecimal."""
    return digest_json(self.to_json())


def bpe_from_json(value: dict[str, Any]) -> BpeTokenizer:
  """Reads what `BpeTokenizer.to_json` wrote.

  Only the merges are taken from `value`. The rest follows from them, and must be what jgpt writes: another normalizer or
  pre-tokenizer would mean other ids.

  Raises:
    UserError: for anything else.
  """
  model = value.get("model")
  merges = model.get("merges") if isinstance(model, dict) else None
  if not isinstance(merges, list) or not all(map(_is_list_of_str, merges)):
    raise UserError('a BPE tokenizer in JSON must have "model" with "merges", a list of pairs of tokens.')
  tokenizer = BpeTokenizer("\n".join(map(" ".join, merges)), end_of_text=bool(value.get("added_tokens")))
  written = tokenizer.to_json()
  for name in [*written, *value]:
    if name not in value or name not in written or value[name] != written[name]:
      raise UserError(
        f"{show(name)} in the JSON of a BPE tokenizer must be as jgpt writes it: byte-level BPE by GPT-2's rules."
      )
  return tokenizer


def train_bpe_tokenizer(text: str, vocab_size: int) -> BpeTokenizer:
  """Makes the byte-level BPE of a text: the most frequent pair of neighbours inside words is merged, again and again.

  Of equally frequent pairs the one with the smaller ids is taken (first the left id, then the right one), so that a text
  and a size have one result.

  Args:
    text: what to learn the merges from.
    vocab_size: ids to have in the end, 256 of them for bytes.

  Raises:
    UserError: if the text has too few pairs for so many ids, is not Unicode, or `tokenizers` is not installed.
  """
  to_utf8(text)
  if vocab_size < len(ALPHABET):
    raise UserError(f"data.bpe_vocab_size={vocab_size} must be at least {len(ALPHABET)}: each byte has an id.")
  tokenizers = import_tokenizers()
  byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trained = tokenizers.Tokenizer(tokenizers.models.BPE())
  trained.pre_tokenizer = byte_level
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size, initial_alphabet=byte_level.alphabet(), special_tokens=[], show_progress=False
  )
  trained.train_from_iterator((match.group() for match in _PIECES.finditer(text)), trainer)
  num_ids = trained.get_vocab_size()
  if num_ids != vocab_size:
    raise UserError(
      f"data.bpe_vocab_size={vocab_size} is more than this text can have: with every word merged into one, there are "
      f"{num_ids} ids. Try --set data.bpe_vocab_size={num_ids}"
    )
  merges = json.loads(trained.to_str())["model"]["merges"]
  return BpeTokenizer("\n".join(map(" ".join, merges)), end_of_text=False)


def make_gpt2_tokenizer(encoder_json: bytes, vocab_bpe: bytes) -> BpeTokenizer:
  """Makes GPT-2's tokenizer, 50,257 ids, from the two files that OpenAI published.

  Args:
    encoder_json: content of `encoder.json`, token -> id.
    vocab_bpe: content of `vocab.bpe`: a line with its version, then a merge a line.

  Raises:
    UserError: if they are not such files, or do not belong together.
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
  """Encodes text as UTF-8; raises `UserError` where it holds half of a surrogate pair, which no UTF-8 text can."""
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f"not Unicode text: character {error.start} is {text[error.start]!r}, half of a pair.") from None


def digest_json(value: Any) -> str:
  """SHA-256 of a value written as JSON with sorted keys, in hexadecimal."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _is_list_of_str(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(v, str) for v in value)


def is_safe(piece: str) -> bool:
  """Whether `tiktoken` is sure to cut a piece into words as `tokenizers` does, whichever versions are installed.

  Long runs of blanks overflow the stack of its regular expressions. And each package has its own table of Unicode, whose
  versions disagree about letters and digits that only the newer one knows: those younger than Unicode 3.2 are not safe.
  """
  unassigned_in_3_2 = [c for c in set(piece) if c > "\x7f" and unicodedata.ucd_3_2_0.category(c) == "Cn"]
  return not _LONG_BLANK.search(piece) and not any(unicodedata.category(c)[0] in "LNC" for c in unassigned_in_3_2)


def import_tokenizers() -> types.ModuleType:
  """Imports the package `tokenizers`; raises `UserError` where it is not installed."""
  try:
    import tokenizers
  except ImportError:
    raise UserError(
      "data.tokenizer=bpe and data.tokenizer=gpt2 need the package `tokenizers`. Try pip install tokenizers, or install "
      "jgpt with its extra: pip install 'jgpt[bpe]'"
    ) from None
  return tokenizers
