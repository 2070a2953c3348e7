"""From a text to tokens: documents or a stream, their tokenizer, and the held-out part.

Responsible for loading: what is done once, on the host. Not responsible for where the text comes from (`sources.py`) or
for cutting batches (`batches.py`).
"""

import dataclasses
import hashlib
import random

import numpy as np

from jgpt import sources
from jgpt.batches import Corpus, Documents, Stream, count_epoch_steps
from jgpt.bpe import BpeTokenizer, make_gpt2_tokenizer, train_bpe_tokenizer
from jgpt.checks import UserError
from jgpt.config import DataConfig
from jgpt.sources import Text
from jgpt.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, train_char_tokenizer


@dataclasses.dataclass(frozen=True)
class Data:
  """A loaded text: what a run trains on, and what there is to say about it.

  Attributes:
    text: where it came from.
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
  """Finds the text that `config` names and loads it.

  Args:
    config: where and how.
    seed: of the documents' order.
    sha256: digest that the text must have, as recorded by a run; None takes the first text found.
    tokenizer: the run's, where it has one already.

  Raises:
    UserError: as `sources.find_text` and `load_data` do.
  """
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
  need = config.seq_len + 1 if config.batching != "sequential" else config.seq_len * config.batch_size + 1
  _check_length(train, need, "training", text, config)
  if len(heldout):
    _check_length(heldout, config.seq_len + 1, "held-out", text, config)
  if len(train) >= 2**31 - config.seq_len * config.batch_size:
    raise UserError(f"{len(train):,} tokens are more than 32-bit positions can count.")
  train_corpus = Stream(train)
  epoch = count_epoch_steps(train_corpus, config)
  return Data(
    text=text,
    label=label,
    tokenizer=tokenizer,
    train=train_corpus,
    heldout=Stream(heldout),
    documents=[],
    summary=[
      f"{len(text.text):,} characters",
      f"{len(train):,} tokens for training, {len(heldout):,} held out" + (f"; {epoch:,} steps an epoch" if epoch else ""),
    ],
  )


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


def _check_length(tokens: np.ndarray, need: int, part: str, text: Text, config: DataConfig) -> None:
  if len(tokens) < need:
    raise UserError(
      f"the {part} part of {text.location} has {len(tokens):,} tokens, and a batch needs {need:,}. Try a longer text, or "
      f"--set data.seq_len={max(1, min(config.seq_len, len(tokens) // 2))}"
      + (" and --set data.batch_size=1" if config.batching == "sequential" else "")
      + (" or --set data.heldout_fraction=0" if part == "held-out" else "")
    )
