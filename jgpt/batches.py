"""Batches as functions of the step.

Responsible for what a batch is, for the forms of a tokenized text (documents, a stream, batches that were cut from a stream
too large for the device), and for cutting the batch of any step from them, inside jit. Nothing here has a state: a
checkpoint holds no iterator. Not responsible for how a text becomes tokens (`data.py`) or for reading them from the disk
(`feed.py`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgpt.config import DataConfig, ModelConfig
from jgpt.keys import DATA, EVAL, derive_key

EVAL_DOCUMENTS = 256  # a batch in evaluation: documents are short


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


class Documents(NamedTuple):
  """Tokenized documents, one a row.

  Attributes:
    tokens: int32 [documents, seq_len + 1], BOS + text + BOS, cut at the end or filled up with BOS.
    lengths: int32 [documents], predictions in each: min(seq_len, tokens - 1).
  """

  tokens: jax.Array
  lengths: jax.Array


class Stream(NamedTuple):
  """A tokenized text in one piece.

  Attributes:
    tokens: int32 [tokens]; or `shards.TokenFiles`, of which `feed.py` cuts batches, where it is too large for a device.
  """

  tokens: jax.Array


class Cut(NamedTuple):
  """The batches of steps that follow each other, cut on the host from a stream that stays on the disk.

  Attributes:
    windows: int32 [steps, B, seq_len + 1].
    counts: bool [steps, B], whether a row counts: an epoch's last batch may be short.
    first_step: int32 scalar, the step of the first.
  """

  windows: jax.Array
  counts: jax.Array
  first_step: jax.Array


Corpus = Documents | Stream | Cut


def make_batch_fn(config: DataConfig, seed: int) -> Callable[[Corpus, jax.Array], Batch]:
  """Makes the function (corpus, step) -> batch of training; B = `batch_size`, T = `seq_len`.

  Args:
    config: `batching` chooses the function; `num_batches` makes the step start over.
    seed: of random windows and of the order of epochs.
  """

  def batch(corpus: Corpus, step: jax.Array) -> Batch:
    if isinstance(corpus, Cut):
      return _cut_batch(corpus, step)
    if config.num_batches:
      step = step % config.num_batches
    if isinstance(corpus, Documents):
      return next_documents(corpus, step, config)
    starts_B, counts_B = window_starts(corpus.tokens.shape[0], step, seed, config)
    return _windows(corpus, starts_B, config.seq_len, counts_B)

  return batch


def window_starts(num_tokens: int, step: jax.Array, seed: int, config: DataConfig) -> tuple[jax.Array, jax.Array]:
  """Decides where the windows of a step begin in a stream.

  Args:
    num_tokens: of the stream.
    step: integer scalar, updates applied before this one.
    seed: of random windows and of the order of epochs.
    config: `batching`, `batch_size` and `seq_len`.

  Returns:
    Positions [B], and bool [B], whether a row counts.
  """
  if config.batching == "epochs":
    return permuted_starts(num_tokens, step, seed, config)
  every_B = jnp.ones(config.batch_size, bool)
  if config.batching == "sequential":
    return sequential_starts(num_tokens, step, config), every_B
  return random_starts(num_tokens, derive_key(seed, DATA, step), config), every_B


def make_eval_batch_fn(config: DataConfig, seed: int, *, whole: bool) -> Callable[[Corpus, jax.Array], Batch]:
  """Makes the function (corpus, number) -> batch of evaluation; the same batches at every evaluation of a run.

  Args:
    config: as for training.
    seed: of random windows.
    whole: whether the batches, in order, are to hold every prediction once; otherwise "random" data is sampled.
  """

  def batch(corpus: Corpus, number: jax.Array) -> Batch:
    if isinstance(corpus, Documents):
      return documents_in_order(corpus, number, EVAL_DOCUMENTS)
    if whole or config.batching != "random":
      return windows_in_order(corpus, number, config)
    return _windows(corpus, random_starts(corpus.tokens.shape[0], derive_key(seed, EVAL, number), config), config.seq_len)

  return batch


def count_eval_batches(corpus: Corpus, config: DataConfig) -> int:
  """How many batches of `make_eval_batch_fn` hold every prediction of a corpus once; 0 for an empty one."""
  if isinstance(corpus, Documents):
    return -(-len(corpus.tokens) // EVAL_DOCUMENTS)
  num_windows = -(-max(0, len(corpus.tokens) - 1) // config.seq_len)
  return -(-num_windows // config.batch_size)


def count_epoch_steps(corpus: Corpus, config: DataConfig) -> int | None:
  """Batches in an epoch of windows that do not overlap, the short last one included; None for other data."""
  if config.batching != "epochs":
    return None
  return -(-count_windows(len(corpus.tokens), config) // config.batch_size)


def count_windows(num_tokens: int, config: DataConfig) -> int:
  """Windows of `seq_len` that do not overlap, each with its targets."""
  return (num_tokens - 1) // config.seq_len


def next_documents(corpus: Documents, step: jax.Array, config: DataConfig) -> Batch:
  """Cuts the next `batch_size` documents in turn, starting over after the last.

  Args:
    corpus: on the device.
    step: int32 scalar, updates applied before this one.
    config: `batch_size`.
  """
  num_documents = corpus.tokens.shape[0]
  step = step % num_documents  # the order repeats after so many steps: no overflow below
  rows_B = (step * config.batch_size + jnp.arange(config.batch_size)) % num_documents
  return _rows(corpus.tokens[rows_B], corpus.lengths[rows_B])


def documents_in_order(corpus: Documents, number: jax.Array, batch_size: int) -> Batch:
  """Cuts the documents from `number` * `batch_size` on; rows past the last weigh nothing."""
  rows_B = number * batch_size + jnp.arange(batch_size)
  lengths_B = jnp.where(rows_B < corpus.tokens.shape[0], corpus.lengths.at[rows_B].get(mode="clip"), 0)
  return _rows(corpus.tokens.at[rows_B].get(mode="clip"), lengths_B)


def random_starts(num_tokens: int, key: jax.Array, config: DataConfig) -> jax.Array:
  """Draws where windows begin, evenly from all places there are (nanoGPT's get_batch)."""
  return jax.random.randint(key, (config.batch_size,), 0, num_tokens - config.seq_len)


def sequential_starts(num_tokens: int, step: jax.Array, config: DataConfig) -> jax.Array:
  """Takes the next batch_size * seq_len tokens, starting over where no whole batch is left (llm.c's loader)."""
  stride = config.batch_size * config.seq_len
  position = step % ((num_tokens - 1) // stride) * stride
  return position + jnp.arange(config.batch_size) * config.seq_len


def permuted_starts(num_tokens: int, step: jax.Array, seed: int, config: DataConfig) -> tuple[jax.Array, jax.Array]:
  """Takes windows that do not overlap, each once an epoch, in an order drawn anew for each epoch.

  The last batch of an epoch is short: its missing rows do not count. What is left after the last whole window is unused.
  """
  num_windows = count_windows(num_tokens, config)
  num_steps = -(-num_windows // config.batch_size)
  order = epoch_order(num_windows, step // num_steps, seed)
  rows_B = step % num_steps * config.batch_size + jnp.arange(config.batch_size)
  return order.at[rows_B].get(mode="clip") * config.seq_len, rows_B < num_windows


def epoch_order(num_windows: int, epoch: jax.Array, seed: int) -> jax.Array:
  """Draws the order of an epoch's windows, [num_windows]."""
  return jax.random.permutation(derive_key(seed, DATA, epoch), num_windows)


def windows_in_order(corpus: Stream, number: jax.Array, config: DataConfig) -> Batch:
  """Cuts the windows from `number` * `batch_size` on: each prediction of the text once; what is past it weighs nothing."""
  rows_B = number * config.batch_size + jnp.arange(config.batch_size)
  return _windows(corpus, rows_B * config.seq_len, config.seq_len)


def _windows(corpus: Stream, starts_B: jax.Array, seq_len: int, counts_B: jax.Array | None = None) -> Batch:
  """The windows of seq_len + 1 tokens at `starts_B`; targets past the end weigh nothing, nor do rows that do not count."""
  positions = starts_B[:, None] + jnp.arange(seq_len + 1)[None]
  tokens = corpus.tokens.at[positions].get(mode="clip")
  weights_BT = positions[:, 1:] < corpus.tokens.shape[0]
  if counts_B is not None:
    weights_BT &= counts_B[:, None]
  return Batch(tokens[:, :-1], tokens[:, 1:], weights_BT.astype(jnp.float32))


def _cut_batch(corpus: Cut, step: jax.Array) -> Batch:
  """The batch of a step that was cut before."""
  windows, counts_B = (jax.lax.dynamic_index_in_dim(x, step - corpus.first_step, keepdims=False) for x in corpus[:2])
  weights_BT = jnp.broadcast_to(counts_B[:, None], windows[:, 1:].shape)
  return Batch(windows[:, :-1], windows[:, 1:], weights_BT.astype(jnp.float32))


def _rows(tokens: jax.Array, lengths_B: jax.Array) -> Batch:
  """The batch of documents' rows."""
  weights_BT = jnp.arange(tokens.shape[1] - 1)[None] < lengths_B[:, None]
  return Batch(tokens[:, :-1], tokens[:, 1:], weights_BT.astype(jnp.float32))


NUM_GROUPS = 4  # of documents in a batch, where padding is skipped


def skip_padding(fn: Callable) -> Callable:
  """Turns `loss_fn`, or its value and gradient, into one that leaves out the second half of short documents.

  The rows are sorted by length and taken in groups; a group that needs no position of the second half gets none.

  Args:
    fn: (params, batch, config, key, total_weight) -> a sum over the batch's rows.

  Returns:
    A function of params, a batch of B rows (a multiple of `NUM_GROUPS`) of T positions (an even number), config, and a key
    that is None: nothing is dropped out. A number of micro-batches is taken and ignored: the groups are what they would be.
  """

  def in_groups(
    params: dict, batch: Batch, config: ModelConfig, key: jax.Array | None = None, micro_batch_size: int | None = None
  ) -> Any:
    B, T = batch.inputs_BT.shape
    order_B = jnp.argsort(jnp.sum(batch.weights_BT, axis=1))
    groups = jax.tree.map(lambda x: x[order_B].reshape(NUM_GROUPS, B // NUM_GROUPS, T), batch)
    total_weight = jnp.sum(batch.weights_BT)

    def first(width: int, group: Batch) -> Any:
      return fn(params, jax.tree.map(lambda x: x[:, :width], group), config, key, total_weight)

    def add(total: Any, group: Batch) -> tuple[Any, None]:
      needs_all = jnp.any(group.weights_BT[:, T // 2 :] > 0)
      return jax.tree.map(jnp.add, total, jax.lax.cond(needs_all, partial(first, T), partial(first, T // 2), group)), None

    shapes = jax.eval_shape(partial(first, T), jax.tree.map(lambda x: x[0], groups))
    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), groups)[0]

  return in_groups
