"""One update, and many of them in one call.

Responsible for `TrainState`, the loss, `train_step`, the loop over it inside jit, and evaluation. Everything is a pure
function of arrays and static settings; where the arrays live is decided outside (`sharding.py`). Not responsible for
time, files or printing (`train.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jgpt.batches import Batch, Corpus, count_eval_batches, make_eval_batch_fn
from jgpt.config import Experiment, ModelConfig
from jgpt.step import loss_fn

if TYPE_CHECKING:  # jax is imported after the arguments are understood
  from jgpt.text.tokenizer import Tokenizer


def eval_step(params: dict, batch: Batch, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
  """Computes the sum of -log p(target) over a batch's weighted tokens, in nats, and the sum of weights."""
  return loss_fn(params, batch, config, total_weight=jnp.ones(())), jnp.sum(batch.weights_BT)


def evaluate(
  params: dict, corpus: Corpus, config: ModelConfig, batch_fn: Callable[[Corpus, jax.Array], Batch], num_batches: int
) -> tuple[jax.Array, jax.Array]:
  """Computes the mean loss over the tokens of batches 0 to `num_batches` - 1; drops nothing out.

  Args:
    params: as `init_params` returns them, or with unstacked blocks.
    corpus: what `batch_fn` cuts batches from.
    config: sizes and switches.
    batch_fn: the batch of a number, from `batches.make_eval_batch_fn`.
    num_batches: at least 1.

  Returns:
    Nats per token, and the number of tokens.
  """

  def add(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
    return jax.tree.map(jnp.add, carry, eval_step(params, batch_fn(corpus, number), config)), None

  (nats, weight), _ = jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), jnp.arange(num_batches))
  return nats / weight, weight


@partial(jax.jit, static_argnames=("experiment", "num_batches", "whole"))
def evaluate_compiled(
  params: dict, corpus: Corpus, *, experiment: Experiment, num_batches: int, whole: bool
) -> tuple[jax.Array, jax.Array]:
  """`step.evaluate` as one compiled program."""
  batch_fn = make_eval_batch_fn(experiment.data, experiment.train.seed, whole=whole)
  return evaluate(params, corpus, experiment.model, batch_fn, num_batches)


def begin_evaluation(
  params: dict, corpus: Corpus, experiment: Experiment, num_batches: int | None = None
) -> tuple[jax.Array, jax.Array]:
  """Computes the loss over a corpus and returns at once: the arrays are there when they are read.

  Args:
    params: as `init_params` returns them, or with unstacked blocks.
    corpus: at least one prediction.
    experiment: resolved.
    num_batches: how many batches; None, or more than there are, takes every prediction once.

  Returns:
    Nats per token, and the number of tokens.
  """
  return evaluate_compiled(params, corpus, **_eval_settings(experiment, corpus, num_batches))


def _eval_settings(experiment: Experiment, corpus: Corpus, num_batches: int | None) -> dict:
  there = count_eval_batches(corpus, experiment.data)
  whole = num_batches is None or (num_batches >= there and experiment.data.batching != "random")
  return {"experiment": experiment, "num_batches": there if whole else num_batches, "whole": whole}


def evaluate_heldout(params: dict, heldout: Corpus, experiment: Experiment) -> tuple[float | None, int]:
  """Computes the loss over the held-out part, nats per token, and over how many tokens; (None, 0) without any."""
  if not len(heldout.tokens):
    return None, 0
  loss, tokens = begin_evaluation(params, heldout, experiment)
  return float(loss), int(tokens)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """How well a model predicts a text.

  Attributes:
    loss_nats_per_token: mean of -log p(next token) over every prediction, nothing dropped out.
    num_tokens: predictions it is over.
    num_bytes: UTF-8 bytes that these predictions stand for; the end of a document counts as one, its line's end.
    num_documents: None for a stream.
  """

  loss_nats_per_token: float
  num_tokens: int
  num_bytes: int
  num_documents: int | None

  @property
  def perplexity(self) -> float:
    """exp(loss): the model is as unsure as an even choice among so many tokens."""
    return math.exp(self.loss_nats_per_token) if self.loss_nats_per_token < 700 else math.inf

  @property
  def bits_per_byte(self) -> float:
    """The loss of the whole text in bits, for each of its bytes: comparable between tokenizers."""
    return self.loss_nats_per_token * self.num_tokens / math.log(2) / self.num_bytes


def evaluate_text_corpus(params: dict, corpus: Corpus, tokenizer: Tokenizer, experiment: Experiment) -> Evaluation:
  """Evaluates a model on every prediction of a corpus, each once.

  Args:
    params: as `init_params` returns them, or with unstacked blocks.
    corpus: `Data.heldout` or `Data.train`; at least one prediction.
    tokenizer: of the run.
    experiment: resolved.
  """
  loss, _ = begin_evaluation(params, corpus, experiment)
  is_stream = experiment.data.batching != "documents"
  return Evaluation(
    loss_nats_per_token=float(loss),
    num_tokens=len(corpus.tokens) - 1 if is_stream else int(corpus.lengths.sum()),
    num_bytes=count_bytes(corpus, tokenizer),
    num_documents=None if is_stream else len(corpus.tokens),
  )


def count_bytes(corpus: Corpus, tokenizer: Tokenizer) -> int:
  """Counts the UTF-8 bytes that a corpus's predictions stand for.

  The first token of a stream is not predicted. The end of a document counts as one byte, its line's end; an end-of-text
  token stands for none.

  Args:
    corpus: NumPy arrays, as `load_data` returns them.
    tokenizer: of the run.
  """
  import numpy as np

  from jgpt.batches import Stream

  sizes = np.array([len(content) for content in tokenizer.token_bytes])
  if isinstance(corpus, Stream):
    return int(sizes[corpus.tokens[1:]].sum())
  sizes[tokenizer.bos_id] = 1
  targets = corpus.tokens[:, 1:]
  is_predicted = np.arange(targets.shape[1])[None] < corpus.lengths[:, None]
  return int(sizes[targets][is_predicted].sum())
