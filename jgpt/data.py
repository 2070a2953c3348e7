"""Batches as a function of the step.

Responsible for turning a text into documents, documents into token arrays, the held-out split, and `batch(corpus, step)`.
Not responsible for where the text comes from (`sources.py`). Nothing here has a state: a checkpoint holds no iterator.
"""

import dataclasses
import hashlib
import random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgpt.config import DataConfig, UserError
from jgpt.sources import Text
from jgpt.tokenizer import CharTokenizer, train_char_tokenizer


class Batch(NamedTuple):
  """What one update learns from.

  Attributes:
    inputs_BT: int32 token ids.
    targets_BT: int32 token ids, the next token at each position.
    weights_BT: float32, 1 where the target counts and 0 at padding.
  """

  inputs_BT: jax.Array
  targets_BT: jax.Array
  weights_BT: jax.Array


class Corpus(NamedTuple):
  """Tokenized documents, one a row.

  Attributes:
    tokens: int32 [documents, seq_len + 1], BOS + text + BOS, cut at the end or filled up with BOS.
    lengths: int32 [documents], predictions in each: min(seq_len, tokens - 1).
  """

  tokens: jax.Array
  lengths: jax.Array


@dataclasses.dataclass(frozen=True)
class Data:
  """A loaded text: what a run trains on, and what there is to say about it.

  Attributes:
    text: where it came from.
    tokenizer: made from all its documents.
    documents: the training documents in the order they are taken.
    train: their tokens (NumPy arrays).
    heldout: the held-out documents' tokens.
    num_documents: in all.
    num_chars: in all.
    longest: characters of the longest document.
    num_cut: documents that do not fit the training window.
  """

  text: Text
  tokenizer: CharTokenizer
  documents: list[str]
  train: Corpus
  heldout: Corpus
  num_documents: int
  num_chars: int
  longest: int
  num_cut: int


def batch(corpus: Corpus, step: jax.Array, config: DataConfig) -> Batch:
  """Cuts the batch of one step: the next `batch_size` documents in turn, starting over after the last.

  Args:
    corpus: on the device.
    step: int32 scalar, updates applied before this one.
    config: `batch_size` and `num_batches`.

  Returns:
    B = `batch_size`, T = `seq_len`.
  """
  num_documents, width = corpus.tokens.shape
  if config.num_batches:
    step = step % config.num_batches
  step = step % num_documents  # the order repeats after so many steps: no overflow below
  rows_B = (step * config.batch_size + jnp.arange(config.batch_size)) % num_documents
  tokens = corpus.tokens[rows_B]
  weights_BT = jnp.arange(width - 1)[None] < corpus.lengths[rows_B][:, None]
  return Batch(tokens[:, :-1], tokens[:, 1:], weights_BT.astype(jnp.float32))


def load_data(text: Text, config: DataConfig, seed: int) -> Data:
  """Turns a text, one document a line, into tokens.

  Lines are stripped, empty ones dropped; the rest are shuffled once by `random.Random(seed)`, then held-out documents are
  removed.

  Raises:
    UserError: if no document is left to train on, or there are too many for 32-bit arithmetic.
  """
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
  tokenizer = train_char_tokenizer(documents)
  return Data(
    text=text,
    tokenizer=tokenizer,
    documents=train,
    train=make_corpus(train, tokenizer, config.seq_len),
    heldout=make_corpus(heldout, tokenizer, config.seq_len),
    num_documents=len(documents),
    num_chars=sum(map(len, documents)),
    longest=max(map(len, documents)),
    num_cut=sum(len(d) + 1 > config.seq_len for d in documents),
  )


def in_heldout(document: str, fraction: float) -> bool:
  """Whether a document is held out: its SHA-256, read as a number in [0, 1), is below `fraction`; repeats stay together."""
  return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") < fraction * 2**64


def make_corpus(documents: list[str], tokenizer: CharTokenizer, seq_len: int) -> Corpus:
  """Tokenizes documents into rows of `seq_len` + 1 ids (NumPy arrays)."""
  width = seq_len + 1
  texts = [document[:seq_len] for document in documents]
  counts = np.fromiter(map(len, texts), np.int32, len(texts))
  tokens = np.full((len(documents), width), tokenizer.bos_id, np.int32)
  is_text = (np.arange(width) >= 1) & (np.arange(width) <= counts[:, None])  # after BOS; the closing BOS stands already
  tokens[is_text] = tokenizer.encode("".join(texts))
  return Corpus(tokens, np.minimum(np.fromiter(map(len, documents), np.int32, len(documents)) + 1, seq_len))
