"""From a text or token files to what a run reads: documents or a stream, their tokenizer, and the held-out part.

Responsible for loading: what is done once, on the host. Not responsible for where the text comes from (`sources.py`), for
the bytes of token files (`shards.py`) or for cutting batches (`batches.py`).
"""

import dataclasses
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jgpt import paths, shards, sources
from jgpt.batches import Corpus, Documents, Stream, count_epoch_steps
from jgpt.bpe import BpeTokenizer, make_gpt2_tokenizer, train_bpe_tokenizer
from jgpt.checks import UserError
from jgpt.config import DataConfig
from jgpt.sources import Text
from jgpt.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, train_char_tokenizer

RESIDENT_TOKENS = 1 << 26  # 256 MB on a device; more are read from their files, a block of steps at a time


@dataclasses.dataclass(frozen=True)
class Data:
  """A loaded text, or loaded token files: what a run trains on, and what there is to say about it.

  Attributes:
    text: where it came from; of token files the kind is "token files", and there are no characters.
    label: its source by name, "(bundled)" added for the list that comes with jgpt; None for a path of the user's.
    tokenizer: of the run.
    train: the training part's tokens (NumPy arrays).
    heldout: the held-out part's.
    documents: the training documents in the order they are taken; [] for a stream.
    summary: lines for a person: sizes of the text and its parts.
  """

  text: Text
  label: str | None
  tokenizer: Tokenizer
  train: Corpus
  heldout: Corpus
  documents: list[str]
  summary: list[str]


def find_data(config: DataConfig, seed: int, *, sha256: str | None = None, tokenizer: Tokenizer | None = None) -> Data:
  """Finds the text or the token files that `config` names and loads them.

  Args:
    config: where and how.
    seed: of the documents' order.
    sha256: digest that the data must have, as recorded by a run; None takes the first text found.
    tokenizer: the run's, where it has one already.

  Raises:
    UserError: as `sources.find_text` and `load_data` do, or `load_token_files`.
  """
  if files := paths.find_token_files(config.path):
    data = load_token_files(files, config, tokenizer)
    advice = "Put the old files back, or start over with --fresh"
    sources.require_same(data.text, sha256, f"the content of {config.path}", advice)
    return data
  return load_data(sources.find_text(config, sha256=sha256), config, seed, tokenizer)


def load_data(text: Text, config: DataConfig, seed: int, tokenizer: Tokenizer | None = None) -> Data:
  """Turns a text into tokens.

  Args:
    text: from `sources.find_text`.
    config: how.
    seed: of the documents' order.
    tokenizer: the run's, where it has one already; None makes the one that `config` asks for.

  Raises:
    UserError: if there is too little text for a window, or too much for 32-bit arithmetic.
  """
  label = None if config.path is not None else config.source + (" (bundled)" if text.kind == "bundled" else "")
  load = _load_documents if config.batching == "documents" else _load_stream
  return load(text, label, config, seed, tokenizer)


# --- Documents ---


def _load_documents(text: Text, label: str | None, config: DataConfig, seed: int, tokenizer: Tokenizer | None) -> Data:
  """Lines, stripped and not empty, are shuffled once by `random.Random(seed)`; then held-out documents are removed."""
  documents = text.documents()
  if not documents:
    raise UserError(f"{text.location} holds no text: it needs one document a line.")
  if len(documents) * config.batch_size >= 2**31:
    raise UserError(f"{len(documents):,} documents times data.batch_size={config.batch_size} must stay below 2**31.")
  random.Random(seed).shuffle(documents)
  is_heldout = {d: in_heldout(d, config.heldout_fraction) for d in set(documents)}
  train = [d for d in documents if not is_heldout[d]]
  heldout = [d for d in documents if is_heldout[d]]
  if not train:
    raise UserError(
      f"all {len(documents)} documents of {text.location} are held out by data.heldout_fraction={config.heldout_fraction}, "
      "and none is left to train on. Try --set data.heldout_fraction=0"
    )
  tokenizer = tokenizer or train_char_tokenizer(documents, bos=True)
  longest, num_cut = max(map(len, documents)), sum(len(d) + 1 > config.seq_len for d in documents)
  num_chars = sum(map(len, documents))
  return Data(
    text=text,
    label=label,
    tokenizer=tokenizer,
    train=make_documents(train, tokenizer, config.seq_len),
    heldout=make_documents(heldout, tokenizer, config.seq_len),
    documents=train,
    summary=[
      f"{len(documents):,} documents, {num_chars:,} characters, longest {longest}, "
      f"{num_cut:,} cut at the context of {config.seq_len}",
      f"{len(train):,} for training, {len(heldout):,} held out",
    ],
  )


def in_heldout(document: str, fraction: float) -> bool:
  """Whether a document is held out: its SHA-256, read as a number in [0, 1), is below `fraction`; repeats stay together."""
  return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") < fraction * 2**64


def make_documents(documents: list[str], tokenizer: CharTokenizer, seq_len: int) -> Documents:
  """Tokenizes documents into rows of `seq_len` + 1 ids (NumPy arrays)."""
  width = seq_len + 1
  texts = [document[:seq_len] for document in documents]
  counts = np.fromiter(map(len, texts), np.int32, len(texts))
  tokens = np.full((len(documents), width), tokenizer.bos_id, np.int32)
  is_text = (np.arange(width) >= 1) & (np.arange(width) <= counts[:, None])  # after BOS; the closing BOS stands already
  tokens[is_text] = tokenizer.encode("".join(texts))
  return Documents(tokens, np.minimum(np.fromiter(map(len, documents), np.int32, len(documents)) + 1, seq_len))


# --- Streams ---


def _load_stream(text: Text, label: str | None, config: DataConfig, seed: int, tokenizer: Tokenizer | None) -> Data:
  """The held-out part is the last share of characters, or the first `heldout_tokens` tokens."""
  num_train = int((1 - config.heldout_fraction) * len(text.text))
  train_text, heldout_text = text.text[:num_train], text.text[num_train:]
  tokenizer = tokenizer or make_tokenizer(config, text.text, train_text)
  train, heldout = (_encode(part, tokenizer, config) for part in (train_text, heldout_text))
  if config.heldout_tokens is not None:
    heldout, train = train[: config.heldout_tokens], train[config.heldout_tokens :]
  _check_lengths(len(train), len(heldout), text.location, config)
  streams = Stream(train), Stream(heldout)
  summary = [f"{len(text.text):,} characters", _describe_parts(*streams, config)]
  return Data(text, label, tokenizer, *streams, documents=[], summary=summary)


def make_tokenizer(config: DataConfig, text: str, train_text: str) -> Tokenizer:
  """Makes the tokenizer of a stream: characters are those of the whole text, merges are learned from its training part."""
  if config.tokenizer == "characters":
    return train_char_tokenizer([text], bos=False)
  if config.tokenizer == "bytes":
    return ByteTokenizer()
  if config.tokenizer == "bpe":
    return train_bpe_tokenizer(train_text, config.bpe_vocab_size)
  return make_gpt2_tokenizer(*sources.find_gpt2_files())


def _encode(text: str, tokenizer: Tokenizer, config: DataConfig) -> np.ndarray:
  if not config.mark_paragraphs:
    return np.asarray(tokenizer.encode(text), np.int32)
  return np.asarray(encode_paragraphs(text, tokenizer), np.int32)


def encode_paragraphs(text: str, tokenizer: BpeTokenizer) -> list[int]:
  """Encodes each paragraph by itself, the end-of-text token before it and the blank line after it (llm.c's convention)."""
  if not text:
    return []
  *paragraphs, last = text.split("\n\n")
  return [i for p in [*(f"{p}\n\n" for p in paragraphs), last] for i in (tokenizer.eot_id, *tokenizer.encode(p))]


def _check_lengths(num_train: int, num_heldout: int, location: str, config: DataConfig) -> None:
  """Raises `UserError` unless a stream's parts are long enough for a batch, and what lies on a device can be counted."""
  need = config.seq_len + 1 if config.batching != "sequential" else config.seq_len * config.batch_size + 1
  _check_length(num_train, need, "training", location, config)
  if num_heldout:
    _check_length(num_heldout, config.seq_len + 1, "held-out", location, config)
  if num_heldout >= 2**31 - config.seq_len * config.batch_size:
    raise UserError(
      f"{num_heldout:,} tokens held out from {location} are more than 32-bit positions can count. Hold out fewer: an "
      "evaluation reads them all"
    )


def _check_length(count: int, need: int, part: str, location: str, config: DataConfig) -> None:
  if count < need:
    raise UserError(
      f"the {part} part of {location} has {count:,} tokens, and a batch needs {need:,}. Try a longer text, or "
      f"--set data.seq_len={max(1, min(config.seq_len, count // 2))}"
      + (" and --set data.batch_size=1" if config.batching == "sequential" else "")
      + (" or --set data.heldout_fraction=0" if part == "held-out" else "")
    )


def _describe_parts(train: Stream, heldout: Stream, config: DataConfig) -> str:
  """The line of the summary that counts tokens."""
  epoch = count_epoch_steps(train, config)
  counts = f"{len(train.tokens):,} tokens for training, {len(heldout.tokens):,} held out"
  return counts + (f"; {epoch:,} steps an epoch" if epoch else "")


# --- Token files ---


def load_token_files(files: Sequence[Path], config: DataConfig, tokenizer: Tokenizer | None = None) -> Data:
  """Loads token files as one stream; every id is checked against the vocabulary.

  Files whose names say so are the held-out part. Where there are none, it is the stream's first `heldout_tokens` tokens, or
  the last `heldout_fraction` of it.

  Args:
    files: in order.
    config: how. `mark_paragraphs` has no effect: the ids are taken as they are.
    tokenizer: the run's, where it has one already; None takes the one beside the files, or that `config` asks for.

  Raises:
    UserError: if a file is damaged, holds ids that the tokenizer does not have, or there are too few or too many ids.
  """
  location = f"{config.path} ({len(files)} {'file' if len(files) == 1 else 'files'})"
  if config.batching == "documents":
    raise UserError(
      f"data.batching=documents needs text, one document a line, and {location} holds tokens in one stream. Try --set "
      "data.batching=random with a data.tokenizer and an experiment for streams"
    )
  found = paths.find_tokenizer(files, config)
  if tokenizer and found and tokenizer.digest != found.digest:
    raise UserError(
      f"the token files of {location} were made with another tokenizer than the run's, which came with its folder or its "
      f"weights. Make them again: python -m jgpt.prepare --tokenizer with the path of that {paths.TOKENIZER_FILE}"
    )
  tokenizer = tokenizer or found or make_tokenizer(config, "", "")
  is_heldout = [paths.is_heldout(file) for file in files]
  if all(is_heldout):
    raise UserError(f"{location} holds nothing to train on: {files[0].name} is held out by its name. Name other files too.")
  headers = [shards.read_header(file) for file in files]
  parts = [[h for h, is_out in zip(headers, is_heldout, strict=True) if is_out == wanted] for wanted in (False, True)]
  sha256 = shards.check_files(*parts, tokenizer.vocab_size)
  train, heldout = map(shards.open_files, parts)
  bounds, heldout_bounds = (0, len(train)), (0, len(heldout))
  line = f"{len(parts[0])} token {'file' if len(parts[0]) == 1 else 'files'} for training"
  if len(heldout):
    unused = [f"data.{name}" for name in ("heldout_tokens", "heldout_fraction") if getattr(config, name)]
    line += f", {len(parts[1])} held out" + (f" in the place of {unused[0]}" if unused else "")
  else:
    heldout = train
    bounds, heldout_bounds = _split(len(train), config)
  _check_lengths(bounds[1] - bounds[0], heldout_bounds[1] - heldout_bounds[0], location, config)
  is_large = bounds[1] - bounds[0] > RESIDENT_TOKENS
  streams = (
    Stream(train.part(*bounds) if is_large else train.read(*bounds)),  # a large one is read while it is trained on
    Stream(heldout.read(*heldout_bounds)),
  )
  summary = [line, _describe_parts(*streams, config)]
  return Data(Text("", "token files", location, sha256), None, tokenizer, *streams, documents=[], summary=summary)


def _split(num_tokens: int, config: DataConfig) -> tuple[tuple[int, int], tuple[int, int]]:
  """Where the training part and the held-out part of a stream begin and end."""
  if config.heldout_tokens is not None:
    first = min(config.heldout_tokens, num_tokens)
    return (first, num_tokens), (0, first)
  num_train = int((1 - config.heldout_fraction) * num_tokens)
  return (0, num_train), (num_train, num_tokens)
