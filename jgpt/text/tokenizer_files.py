"""The contents of tokenizer files of other programs: Hugging Face's, read and made, and llm.c's.

Contents are values: objects for `json`, text and bytes. Files are written in `weights/` and
`export.py`; tokenizers are defined in `tokenizer.py` and `bpe.py`. Pure; imports neither
`transformers` nor `tokenizers`.
"""

from __future__ import annotations

import struct
from typing import Any

from jgpt.errors import UserError
from jgpt.text.bpe import ALPHABET, END_OF_TEXT, BpeTokenizer
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, kind_of

BOS = "<|bos|>"  # name of the BOS of character tokenizers in other programs
UNKNOWN = "<|unknown|>"  # has no id, so that other programs raise an error for unknown characters

LLMC_MAGIC = 20240328
LLMC_VERSION = 2
LLMC_MAX_BYTES = 255
# llm.c rejects a token without bytes, and prints nothing for one that begins with NUL.
LLMC_NO_TEXT = b"\0"

_EVERY_CHARACTER = {
  "type": "Split",
  "pattern": {"Regex": r"[\s\S]"},
  "behavior": "Isolated",
  "invert": False,
}
# Fields of a BPE model that may change ids, and the values with which they do not.
_NEUTRAL = {
  "dropout": (None, 0),
  "continuing_subword_prefix": (None, ""),
  "end_of_word_suffix": (None, ""),
  "ignore_merges": (None, False),
}


# --- Hugging Face ---


def hugging_face_files(tokenizer: Tokenizer, max_seq_len: int) -> dict[str, Any]:
  """Makes the contents of the files from which Hugging Face's Transformers load a tokenizer.

  `transformers.AutoTokenizer.from_pretrained(folder)` reads them in a folder with a `config.json`
  whose `model_type` is gpt2. Its `encode(text, add_special_tokens=False)` returns the ids of jgpt's
  `encode`, and its `decode(ids)` the text of jgpt's `decode` (with BOS: `decode(ids,
  skip_special_tokens=True)`). Differences:

  - Transformers map the characters "<|endoftext|>", or `BOS`, in a text to that token, jgpt maps
    them to ordinary text. With `split_special_tokens=True` both do the latter.
  - With `add_special_tokens=True`, the default, Transformers put BOS before the text, as
    `encode_prompt` does, where a character tokenizer has BOS. For others they add nothing. They
    never add the BOS at the end of a document.
  - Unknown characters are an error in both; Transformers do not name them.

  Args:
    tokenizer: any tokenizer of jgpt.
    max_seq_len: positions of the model, in tokens; written as `model_max_length`.

  Returns:
    File name -> content: str for `merges.txt`, a value that `json` can write for the others. Always
    `tokenizer.json` and `tokenizer_config.json`; for byte-level BPE also `vocab.json` and
    `merges.txt`, which repeat the vocabulary and merges for programs that read only these.
  """
  special = _special_tokens(tokenizer)
  files = {
    "tokenizer.json": _tokenizer_json(tokenizer),
    "tokenizer_config.json": {
      # GPT-2's class would add an end-of-text token and an id for it to any tokenizer.
      "tokenizer_class": "GPT2Tokenizer"
      if kind_of(tokenizer) == "gpt2"
      else "PreTrainedTokenizerFast",
      "model_max_length": max_seq_len,
      "clean_up_tokenization_spaces": False,
      "add_prefix_space": False,
      # Otherwise `transformers` 4 also returns "token_type_ids", and GPT-2 adds their embeddings to
      # those of the tokens.
      "model_input_names": ["input_ids", "attention_mask"],
      **{role: name for name in special for role in ("bos_token", "eos_token")},
    },
  }
  if isinstance(tokenizer, BpeTokenizer):
    files["vocab.json"] = files["tokenizer.json"]["model"]["vocab"]
    files["merges.txt"] = "\n".join(
      ["#version: 0.2", *([tokenizer.merges] if tokenizer.merges else []), ""]
    )
  return files


def read_hugging_face_tokenizer(value: Any) -> Tokenizer:
  """Reads the content of a `tokenizer.json`: GPT-2's or one of `hugging_face_files`.

  Either may have been loaded and saved again by other programs. Fields that decide a text's ids
  must have the values that jgpt supports: the model with its vocabulary and merges (as "a b" or as
  pairs), the pre-tokenizer, no normalizer, and no added tokens except the end-of-text token or BOS.
  Other fields are ignored: tokens around a text (`post_processor`), its length (`truncation`,
  `padding`) and `decoder`. Nothing is executed, and the work is proportional to the size of
  `value`.

  Args:
    value: parsed JSON, which may be untrusted.

  Raises:
    UserError: naming the field that jgpt does not support.
  """
  model = value.get("model") if isinstance(value, dict) else None
  if not isinstance(model, dict):
    raise _make_error("model", model, "an object with a vocabulary")
  if not isinstance(model.get("vocab"), dict):
    raise _make_error("model.vocab", model.get("vocab"), "an object from token to id")
  if value.get("normalizer") is not None:
    raise _make_error("normalizer", value["normalizer"], "null: text is encoded as it stands")
  if model.get("type") == "WordLevel":
    return _read_chars(value, model)
  if model.get("type", "BPE") != "BPE":  # early releases of `tokenizers` wrote no type
    raise _make_error(
      "model.type", model["type"], "BPE, or WordLevel with a token for each character"
    )
  return _read_byte_level(value, model)


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
  """Maps the name of the token that stands for no text, if there is one, to its id."""
  if isinstance(tokenizer, CharTokenizer) and tokenizer.bos:
    return {BOS: tokenizer.bos_id}
  if isinstance(tokenizer, BpeTokenizer) and tokenizer.end_of_text:
    return {END_OF_TEXT: tokenizer.eot_id}
  return {}


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
  if isinstance(tokenizer, BpeTokenizer):
    return tokenizer.to_json()
  if isinstance(tokenizer, ByteTokenizer):
    made = BpeTokenizer("", end_of_text=False).to_json()
    return made | {"model": made["model"] | {"vocab": _byte_vocab()}}
  flags = {
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
    "added_tokens": [
      {"id": i, "content": name, **flags} for name, i in _special_tokens(tokenizer).items()
    ],
    "normalizer": None,
    "pre_tokenizer": _EVERY_CHARACTER,
    "post_processor": _make_bos_processor(tokenizer.bos_id) if tokenizer.bos else None,
    "decoder": {"type": "Fuse"},
    "model": {"type": "WordLevel", "vocab": _char_vocab(tokenizer), "unk_token": UNKNOWN},
  }


def _byte_vocab() -> dict[str, int]:
  by_id = BpeTokenizer("", end_of_text=False).token_bytes
  return {char: by_id[i][0] for i, char in enumerate(ALPHABET)}


def _char_vocab(tokenizer: CharTokenizer) -> dict[str, int]:
  return {char: i for i, char in enumerate(tokenizer.chars)} | _special_tokens(tokenizer)


def _make_bos_processor(bos_id: int) -> dict[str, Any]:
  """Makes a post-processor that puts BOS before a text, and before each text of a pair."""
  first, second = (
    [{"SpecialToken": {"id": BOS, "type_id": n}}, {"Sequence": {"id": name, "type_id": n}}]
    for n, name in enumerate("AB")
  )
  return {
    "type": "TemplateProcessing",
    "single": first,
    "pair": first + second,
    "special_tokens": {BOS: {"id": BOS, "ids": [bos_id], "tokens": [BOS]}},
  }


def _read_chars(value: dict[str, Any], model: dict[str, Any]) -> CharTokenizer:
  vocab = model["vocab"]
  chars = "".join(
    sorted(token for token in vocab if len(token) == 1 and not "\ud800" <= token <= "\udfff")
  )
  tokenizer = CharTokenizer(chars, BOS in vocab)
  if vocab != _char_vocab(tokenizer):
    raise _make_error(
      "model.vocab", vocab, f'characters in sorted order with ids from 0, then perhaps "{BOS}"'
    )
  if model.get("unk_token") != UNKNOWN:
    raise _make_error(
      "model.unk_token", model.get("unk_token"), f'"{UNKNOWN}": unknown characters are an error'
    )
  if value.get("pre_tokenizer") != _EVERY_CHARACTER:
    raise _make_error(
      "pre_tokenizer", value.get("pre_tokenizer"), "a Split that isolates every character"
    )
  _check_added_tokens(value, tokenizer)
  return tokenizer


def _read_byte_level(value: dict[str, Any], model: dict[str, Any]) -> ByteTokenizer | BpeTokenizer:
  for field, neutral in _NEUTRAL.items():
    if model.get(field) not in neutral:
      raise _make_error(f"model.{field}", model[field], "null: as in GPT-2")
  split = value.get("pre_tokenizer")
  if not isinstance(split, dict) or split.get("type") != "ByteLevel":
    raise _make_error("pre_tokenizer", split, "ByteLevel")
  if split.get("add_prefix_space") is not False:
    raise _make_error("pre_tokenizer.add_prefix_space", split.get("add_prefix_space"), "false")
  if split.get("use_regex", True) is not True:
    raise _make_error(
      "pre_tokenizer.use_regex", split["use_regex"], "true: words are those of GPT-2"
    )
  vocab, merges = model["vocab"], _read_merges(model.get("merges"))
  if not merges and vocab == _byte_vocab():
    tokenizer = ByteTokenizer()
  else:
    tokenizer = _make_bpe(merges, END_OF_TEXT in vocab or bool(value.get("added_tokens")))
    written = tokenizer.to_json()["model"]
    if written["merges"] != merges:
      raise _make_error(
        "model.merges", merges, "pairs of tokens without spaces or newlines in them"
      )
    if _special_tokens(tokenizer) | vocab != written["vocab"]:
      raise _make_error(
        "model.vocab",
        vocab,
        "ids of bytes in GPT-2's order, of merges in theirs, then of the end of text",
      )
  _check_added_tokens(value, tokenizer)
  return tokenizer


def _read_merges(merges: Any) -> list[list[str]]:
  pairs = (
    [m.split(" ") if isinstance(m, str) else m for m in merges]
    if isinstance(merges, list)
    else None
  )
  if pairs is None or any(
    not isinstance(p, list) or len(p) != 2 or {*map(type, p)} != {str} for p in pairs
  ):
    raise _make_error(
      "model.merges", merges, 'a list of pairs of tokens, as "a b" or as ["a", "b"]'
    )
  return pairs


def _make_bpe(merges: list[list[str]], end_of_text: bool) -> BpeTokenizer:
  try:
    return BpeTokenizer("\n".join(map(" ".join, merges)), end_of_text)
  except UserError as error:
    raise UserError(f"the tokenizer's model.merges: {error}") from None


def _check_added_tokens(value: dict[str, Any], tokenizer: Tokenizer) -> None:
  added, special = value.get("added_tokens") or [], _special_tokens(tokenizer)
  allowed = [(i, name) for name, i in special.items()]
  if not isinstance(added, list) or any(
    not isinstance(token, dict) or (token.get("id"), token.get("content")) not in allowed
    for token in added
  ):
    need = " or ".join(["no tokens", *(f'"{name}" with the id {i}' for name, i in special.items())])
    raise _make_error("added_tokens", added, need)


def _make_error(field: str, got: Any, need: str) -> UserError:
  match got:
    case dict():
      shown = (
        f"of type {got['type'][:40]!r}"
        if isinstance(got.get("type"), str)
        else f"an object of {len(got):,} entries"
      )
    case list():
      shown = f"a list of {len(got):,}"
    case str():
      shown = repr(got[:40])
    case None | bool():
      shown = "null" if got is None else str(got).lower()
    case _:
      shown = repr(got)[:40]
  return UserError(
    f"the tokenizer's {field} is {shown}, and jgpt needs {need}. Try GPT-2's tokenizer.json, or "
    "one that jgpt exported."
  )


# --- llm.c ---


def llmc_tokenizer_bytes(tokenizer: Tokenizer, vocab_size: int | None = None) -> bytes:
  """Makes the content of llm.c's tokenizer file, `gpt2_tokenizer.bin`.

  llm.c's programs print their samples with it. The format: 256 little-endian int32 [20240328, 2,
  number of ids, id that begins a text, 0, ...], then for each id one byte with the length of its
  token, 1 to 255, and the token's bytes. The end-of-text token and BOS are written by name, as in
  llm.c. Ids of the model beyond the tokenizer's are one NUL byte each, which llm.c prints as
  nothing; it rejects empty tokens.

  The id that begins a text is that of `encode_prompt("")`: BOS, the end-of-text token, or else a
  newline. For a character tokenizer without any of these it is 0; llm.c only starts samples with
  it.

  Args:
    tokenizer: any tokenizer of jgpt.
    vocab_size: ids of the model, `model.vocab_size`; None takes the tokenizer's.

  Raises:
    UserError: if a token has more than 255 bytes, or `vocab_size` is smaller than the tokenizer's.
  """
  num_ids = tokenizer.vocab_size if vocab_size is None else vocab_size
  if num_ids < tokenizer.vocab_size:
    raise UserError(
      f"model.vocab_size={num_ids} must be at least the tokenizer's {tokenizer.vocab_size}. "
      f"Try --set model.vocab_size={tokenizer.vocab_size}"
    )
  tokens, special = list(tokenizer.token_bytes), _special_tokens(tokenizer)
  first = tokens.index(b"\n") if b"\n" in tokens else 0
  for name, i in special.items():
    tokens[i], first = name.encode(), i
  for i, token in enumerate(tokens):
    if len(token) > LLMC_MAX_BYTES:
      raise UserError(
        f"token {i} has {len(token)} bytes, and llm.c's tokenizer file holds at most "
        f"{LLMC_MAX_BYTES}. Try a tokenizer without it: --set data.bpe_vocab_size={i}"
      )
  tokens += [LLMC_NO_TEXT] * (num_ids - len(tokens))
  header = struct.pack("<256i", LLMC_MAGIC, LLMC_VERSION, num_ids, first, *[0] * 252)
  return header + b"".join(bytes([len(token)]) + token for token in tokens)
