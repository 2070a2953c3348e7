"""Batches as pure functions of the step, inside jit.

The batch of a step is cut from tokenized documents or from a stream of tokens; there is no
iterator, and so none in a checkpoint. Tokens are made in `data/corpus.py` and read from disk in
`data/feed.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgpt.config import DataConfig, Experiment
from jgpt.config.experiment import NUM_GROUPS, Hyper
from jgpt.keys import DATA, EVAL, derive_key
from jgpt.sharding import constrain

EVAL_DOCUMENTS = 256  # in a batch of evaluation
# Documents that are short and few at once would take longer one by one: an evaluation of `names`
# was the quickest with activations of this many numbers, 128 kB.
MIN_ACTIVATION = 1 << 15


class Batch(NamedTuple):
  """The inputs and targets of one update.

  Attributes:
    inputs_BT: int32 token ids.
    targets_BT: int32 token ids, the next token at each position.
    weights_BT: float32, 1 where the target counts in the loss and 0 at padding.
  """

  inputs_BT: jax.Array
  targets_BT: jax.Array
  weights_BT: jax.Array


class Documents(NamedTuple):
  """Tokenized documents, one per row.

  Attributes:
    tokens: int32 [documents, seq_len + 1], BOS + text + BOS, truncated or padded with BOS.
    lengths: int32 [documents], the number of predictions in each, at most seq_len.
  """

  tokens: jax.Array
  lengths: jax.Array


class Stream(NamedTuple):
  """A tokenized text in one piece.

  Attributes:
    tokens: int32 [tokens]; or `data.token_files.TokenFiles`, from which `data/feed.py` cuts
      batches.
  """

  tokens: jax.Array


class CutBatches(NamedTuple):
  """The batches of consecutive steps, cut on the host from a stream on disk.

  Attributes:
    windows: int32 [steps, B, seq_len + 1].
    counts: bool [steps, B], false for the rows that an epoch's short last batch lacks.
    first_step: int32 scalar, the step of the first batch.
  """

  windows: jax.Array
  counts: jax.Array
  first_step: jax.Array


class Seen(NamedTuple):
  """What a run was trained on, repetitions counted.

  Attributes:
    sequences: documents, or windows of a stream.
    tokens: predictions, as many as there are weights of 1 in the batches.
  """

  sequences: int
  tokens: int


Corpus = Documents | Stream | CutBatches


def batch(
  corpus: Corpus, step: jax.Array, experiment: Experiment, hyper: Hyper | None = None
) -> Batch:
  """Makes the training batch of a step: B = `data.batch_size` sequences of T = `data.seq_len`.

  Args:
    corpus: on the device.
    step: int32 scalar, updates applied before this one.
    experiment: `data` and `train.seed` are read; with `data.num_batches` the batches repeat.
    hyper: `seed` replaces `train.seed`; None takes the experiment's. Batches that were cut from
      files before (`CutBatches`) are those of `train.seed` always.
  """
  config = experiment.data
  seed = experiment.train.seed if hyper is None else hyper.seed
  if isinstance(corpus, CutBatches):
    made = _take_batch(corpus, step)
  else:
    step = step % config.num_batches if config.num_batches else step
    if isinstance(corpus, Documents):
      made = next_documents(corpus, step, config)
    else:
      starts_B, counts_B = window_starts(corpus.tokens.shape[0], step, seed, config)
      made = _windows(corpus, starts_B, config.seq_len, counts_B)
  return jax.tree.map(lambda x: constrain(x, ("batch", None)), made)


def window_starts(
  num_tokens: int, step: jax.Array, seed: int, config: DataConfig
) -> tuple[jax.Array, jax.Array]:
  """Computes where the windows of a step begin in a stream.

  Args:
    num_tokens: length of the stream.
    step: integer scalar, updates applied before this one.
    seed: of random windows and of the order of epochs.
    config: `batching`, `batch_size` and `seq_len` are read.

  Returns:
    Positions [B], and bool [B], false for the rows that a short batch lacks.
  """
  if config.batching == "epochs":
    return permuted_starts(num_tokens, step, seed, config)
  every_B = jnp.ones(config.batch_size, bool)
  if config.batching == "sequential":
    return sequential_starts(num_tokens, step, config), every_B
  return random_starts(num_tokens, derive_key(seed, DATA, step), config), every_B


def eval_batch(corpus: Corpus, number: jax.Array, experiment: Experiment, *, whole: bool) -> Batch:
  """Makes a batch for evaluation, the same in every evaluation of a run.

  Args:
    corpus: on the device.
    number: int32 scalar, index of the batch.
    experiment: `data` and `train.seed` are read.
    whole: true takes the batches in order, so that together they hold every prediction once; false
      draws random windows where `data.batching` is "random".
  """
  config = experiment.data
  if isinstance(corpus, Documents):
    return documents_in_order(corpus, number, EVAL_DOCUMENTS)
  if whole or config.batching != "random":
    return windows_in_order(corpus, number, config)
  key = derive_key(experiment.train.seed, EVAL, number)
  return _windows(corpus, random_starts(corpus.tokens.shape[0], key, config), config.seq_len)


def count_eval_batches(corpus: Corpus, config: DataConfig) -> int:
  """Counts the batches of `eval_batch` that hold every prediction of a corpus once."""
  if isinstance(corpus, Documents):
    return -(-len(corpus.tokens) // EVAL_DOCUMENTS)
  num_windows = -(-max(0, len(corpus.tokens) - 1) // config.seq_len)
  return -(-num_windows // config.batch_size)


def count_epoch_steps(corpus: Corpus, config: DataConfig) -> int | None:
  """Counts the batches of an epoch, the short last one included.

  Returns:
    None where `data.batching` is not "epochs".
  """
  if config.batching != "epochs":
    return None
  return -(-count_windows(len(corpus.tokens), config) // config.batch_size)


def count_windows(num_tokens: int, config: DataConfig) -> int:
  """Counts the windows of `seq_len` tokens, with their targets, that do not overlap."""
  return (num_tokens - 1) // config.seq_len


def make_seen_counter(corpus: Corpus, config: DataConfig) -> Callable[[int], Seen]:
  """Returns a function that counts what the first `step` batches hold, exactly and on the host.

  Args:
    corpus: the `train` of a `Data`: documents as NumPy arrays, or a stream, of which only the
      length is read.
    config: decides how batches are cut.
  """
  B = config.batch_size
  if isinstance(corpus, Documents):
    sums = np.concatenate([[0], np.cumsum(corpus.lengths, dtype=np.int64)])

    def count_taken(step: int) -> Seen:
      rounds, rest = divmod(step * B, len(corpus.lengths))
      return Seen(step * B, rounds * int(sums[-1]) + int(sums[rest]))

  else:
    num_windows = count_windows(len(corpus.tokens), config)
    epoch_steps = count_epoch_steps(corpus, config)

    def count_taken(step: int) -> Seen:
      sequences = step * B
      if epoch_steps is not None:
        epochs, rest = divmod(step, epoch_steps)
        sequences = epochs * num_windows + min(rest * B, num_windows)
      return Seen(sequences, sequences * config.seq_len)

  def count_seen(step: int) -> Seen:
    rounds, rest = divmod(step, config.num_batches) if config.num_batches else (0, step)
    taken, repeated = count_taken(rest), count_taken(config.num_batches or 0)
    return Seen(*(a + rounds * b for a, b in zip(taken, repeated, strict=True)))

  return count_seen


def count_eval_rows(experiment: Experiment, num_devices: int) -> int:
  """Counts the sequences that an evaluation computes at once: on each device those of training.

  So a run that fits into memory for training also does for evaluation, which needs no gradients.
  More documents are taken where that is no more than `MIN_ACTIVATION` numbers.

  Args:
    experiment: resolved. `mesh` says how many parts training divided a batch into; where it does
      not, these are `num_devices`.
    num_devices: that the evaluation is divided over, those that hold the same rows counted once.

  Returns:
    A multiple of `num_devices`.
  """
  data, model = experiment.data, experiment.model
  rows = experiment.train.micro_batch_size or data.batch_size
  if experiment.compute.group_documents is True:
    rows = data.batch_size // NUM_GROUPS
  rows = max(1, rows // (experiment.mesh.num_batch_parts or num_devices))
  if data.batching == "documents":
    widths = model.padded_vocab_size, model.d_ff, 3 * model.d_model, model.num_heads * data.seq_len
    rows = max(rows, MIN_ACTIVATION // (data.seq_len * max(widths)))
    rows = min(rows, -(-EVAL_DOCUMENTS // num_devices))
  return rows * num_devices


def next_documents(corpus: Documents, step: jax.Array, config: DataConfig) -> Batch:
  """Takes the next `batch_size` documents in order, starting over after the last.

  Args:
    corpus: on the device.
    step: int32 scalar, updates applied before this one.
    config: `batch_size` is read.
  """
  num_documents = corpus.tokens.shape[0]
  # The order repeats after `num_documents` steps, and the product below must not overflow.
  step = step % num_documents
  rows_B = (step * config.batch_size + jnp.arange(config.batch_size)) % num_documents
  return _documents_batch(corpus.tokens[rows_B], corpus.lengths[rows_B])


def documents_in_order(corpus: Documents, number: jax.Array, batch_size: int) -> Batch:
  """Takes the documents from `number` * `batch_size` on; rows after the last have weight 0."""
  rows_B = number * batch_size + jnp.arange(batch_size)
  lengths_B = jnp.where(
    rows_B < corpus.tokens.shape[0], corpus.lengths.at[rows_B].get(mode="clip"), 0
  )
  return _documents_batch(corpus.tokens.at[rows_B].get(mode="clip"), lengths_B)


def random_starts(num_tokens: int, key: jax.Array, config: DataConfig) -> jax.Array:
  """Draws where windows begin, uniformly from all positions: int32, or int64 where that is needed.

  Source: nanoGPT, train.py, `get_batch`.
  """
  dtype = jnp.int32 if num_tokens < 2**31 else jnp.int64
  return jax.random.randint(key, (config.batch_size,), 0, num_tokens - config.seq_len, dtype)


def sequential_starts(num_tokens: int, step: jax.Array, config: DataConfig) -> jax.Array:
  """Computes where the next batch_size * seq_len tokens begin, starting over at the end.

  Tokens after the last whole batch are not used.

  Source: llm.c, llmc/dataloader.h.
  """
  stride = config.batch_size * config.seq_len
  position = step % ((num_tokens - 1) // stride) * stride
  return position + jnp.arange(config.batch_size) * config.seq_len


def permuted_starts(
  num_tokens: int, step: jax.Array, seed: int, config: DataConfig
) -> tuple[jax.Array, jax.Array]:
  """Computes where windows begin that do not overlap, each once an epoch, in a new order each time.

  The last batch of an epoch may be short. Tokens after the last whole window are not used.

  Returns:
    Positions [B], and bool [B], false for the rows that a short batch lacks.
  """
  num_windows = count_windows(num_tokens, config)
  num_steps = -(-num_windows // config.batch_size)
  order = epoch_order(num_windows, step // num_steps, seed)
  rows_B = step % num_steps * config.batch_size + jnp.arange(config.batch_size)
  return order.at[rows_B].get(mode="clip") * config.seq_len, rows_B < num_windows


def epoch_order(num_windows: int, epoch: jax.Array, seed: int) -> jax.Array:
  """Draws the order of an epoch's windows: a permutation, int32 [num_windows]."""
  windows = jnp.arange(num_windows, dtype=jnp.int32)
  return jax.random.permutation(derive_key(seed, DATA, epoch), windows)


def windows_in_order(corpus: Stream, number: jax.Array, config: DataConfig) -> Batch:
  """Takes the windows from `number` * `batch_size` on, which do not overlap.

  Targets after the end of the text have weight 0.
  """
  rows_B = number * config.batch_size + jnp.arange(config.batch_size)
  return _windows(corpus, rows_B * config.seq_len, config.seq_len)


def _windows(
  corpus: Stream, starts_B: jax.Array, seq_len: int, counts_B: jax.Array | None = None
) -> Batch:
  """Cuts the windows of seq_len + 1 tokens that begin at `starts_B`.

  Targets after the end have weight 0, and so have rows where `counts_B` is false.
  """
  positions = starts_B[:, None] + jnp.arange(seq_len + 1)[None]
  tokens = corpus.tokens.at[positions].get(mode="clip")
  weights_BT = positions[:, 1:] < corpus.tokens.shape[0]
  if counts_B is not None:
    weights_BT &= counts_B[:, None]
  return Batch(tokens[:, :-1], tokens[:, 1:], weights_BT.astype(jnp.float32))


def _take_batch(corpus: CutBatches, step: jax.Array) -> Batch:
  """Takes the batch of a step from batches that were cut on the host."""
  windows, counts_B = (
    jax.lax.dynamic_index_in_dim(x, step - corpus.first_step, keepdims=False) for x in corpus[:2]
  )
  weights_BT = jnp.broadcast_to(counts_B[:, None], windows[:, 1:].shape)
  return Batch(windows[:, :-1], windows[:, 1:], weights_BT.astype(jnp.float32))


def _documents_batch(tokens: jax.Array, lengths_B: jax.Array) -> Batch:
  """Makes a batch of rows of documents; targets after a row's length have weight 0."""
  weights_BT = jnp.arange(tokens.shape[1] - 1)[None] < lengths_B[:, None]
  return Batch(tokens[:, :-1], tokens[:, 1:], weights_BT.astype(jnp.float32))


# --- Parts of a batch ---


def split(rows: Any, num_parts: int) -> Any:
  """Splits arrays [B, ...] into parts, [num_parts, B / num_parts, ...].

  Each takes every `num_parts`-th row, so that it lies on all devices that the rows are divided
  over.
  """

  def take(x: jax.Array) -> jax.Array:
    return x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(take, rows)


def split_padded(batch: Batch, num_rows: int) -> Batch:
  """Splits a batch of any size like `split`; rows that it lacks have weight 0."""
  num_missing = -batch.inputs_BT.shape[0] % num_rows
  padded = jax.tree.map(lambda x: jnp.pad(x, ((0, num_missing), (0, 0))), batch)
  num_parts = padded.inputs_BT.shape[0] // num_rows
  return split(jax.tree.map(lambda x: constrain(x, ("batch", None)), padded), num_parts)


def group_by_length(batch: Batch) -> Batch:
  """Sorts a batch of documents by length into groups, [NUM_GROUPS, B / NUM_GROUPS, T]."""
  B, T = batch.inputs_BT.shape
  order_B = jnp.argsort(jnp.sum(batch.weights_BT, axis=1))
  return jax.tree.map(lambda x: x[order_B].reshape(NUM_GROUPS, B // NUM_GROUPS, T), batch)


def needs_all_positions(batch: Batch) -> jax.Array:
  """Returns whether a target in the second half of the positions has a weight, as a bool scalar."""
  return jnp.any(batch.weights_BT[:, batch.weights_BT.shape[1] // 2 :] > 0)
