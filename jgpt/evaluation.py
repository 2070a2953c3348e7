"""The loss over a corpus: batch by batch, as one compiled program, and as figures for a person.

Nothing is dropped out in evaluation. Batches are made in `batches.py`; what is printed is in
`evaluate.py` and `report/`.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgpt.batches import Batch, Corpus, Stream, count_eval_batches, eval_batch
from jgpt.config import Experiment
from jgpt.sharding import beside
from jgpt.step import loss_fn
from jgpt.text.tokenizer import Tokenizer


class EvalSums(NamedTuple):
  """Sums over the parts of an evaluation, each over a batch at most; `finish_evaluation` adds them.

  A sum in float32 over all of them would lose its last digits from 2^24 tokens on.

  Attributes:
    nats: float32 [parts], sums of -log p(target).
    tokens: int32 [parts], the numbers of targets.
  """

  nats: jax.Array
  tokens: jax.Array


def eval_step(params: dict, batch: Batch, experiment: Experiment) -> EvalSums:
  """Computes the sum of -log p(target) over a batch's targets, and their number, as scalars.

  Weights are 0 or 1.
  """
  nats = loss_fn(params, batch, experiment, total_weight=jnp.float32(1))
  return EvalSums(nats, jnp.sum(batch.weights_BT > 0, dtype=jnp.int32))


@partial(jax.jit, static_argnames=("experiment", "num_batches", "whole"))
def evaluate(
  params: dict, corpus: Corpus, experiment: Experiment, *, num_batches: int, whole: bool
) -> EvalSums:
  """Computes the sums of batches 0 to `num_batches` - 1.

  Args:
    params: as `init_params` returns them; blocks stacked or a list.
    corpus: on the device.
    experiment: resolved.
    num_batches: at least 1.
    whole: see `eval_batch`.
  """

  def compute(number: jax.Array) -> EvalSums:
    return eval_step(params, eval_batch(corpus, number, experiment, whole=whole), experiment)

  return jax.lax.map(compute, jnp.arange(num_batches, dtype=jnp.int32))


def begin_evaluation(
  params: dict, corpus: Corpus, experiment: Experiment, num_batches: int | None = None
) -> EvalSums:
  """Starts to compute the loss over a corpus; `finish_evaluation` of what is returned waits for it.

  Args:
    params: as `init_params` returns them; blocks stacked or a list.
    corpus: at least one prediction.
    experiment: resolved.
    num_batches: batches to take; None, or more than there are, takes every prediction once.
  """
  return evaluate(params, corpus, experiment, **_choose_batches(corpus, experiment, num_batches))


def finish_evaluation(sums: EvalSums) -> tuple[float, int]:
  """Waits for an evaluation, and computes the mean of -log p over its targets in float64.

  Args:
    sums: from `begin_evaluation`, of at least one target.

  Returns:
    Nats per token, and the number of tokens.
  """
  nats, tokens = (np.asarray(x) for x in jax.device_get(sums))
  num_tokens = int(tokens.sum(dtype=np.int64))
  return float(nats.sum(dtype=np.float64) / num_tokens), num_tokens


def begin_due_evaluation(
  params: dict, heldout: Corpus, step: int, experiment: Experiment
) -> EvalSums | None:
  """Starts the evaluation that `train.eval_every` asks for after a step; None where none is due."""
  train = experiment.train
  if not train.eval_every or step % train.eval_every or not len(heldout.tokens):
    return None
  return begin_evaluation(params, heldout, experiment, train.eval_batches)


def compile_evaluation(
  params: dict, corpus: Corpus, experiment: Experiment, num_batches: int | None = None
) -> None:
  """Compiles what `begin_evaluation` calls with such arguments, and runs nothing."""
  chosen = _choose_batches(corpus, experiment, num_batches)
  evaluate.lower(params, corpus, experiment, **chosen).compile()


def _choose_batches(corpus: Corpus, experiment: Experiment, num_batches: int | None) -> dict:
  """Returns the static arguments of `evaluate`."""
  num_available = count_eval_batches(corpus, experiment.data)
  is_random = experiment.data.batching == "random"
  whole = num_batches is None or (num_batches >= num_available and not is_random)
  return {"num_batches": num_available if whole else num_batches, "whole": whole}


def evaluate_heldout(
  params: dict, heldout: Corpus, experiment: Experiment
) -> tuple[float | None, int]:
  """Computes the loss over the whole held-out part.

  Returns:
    Nats per token and the number of tokens; (None, 0) where nothing is held out.
  """
  if not len(heldout.tokens):
    return None, 0
  return finish_evaluation(begin_evaluation(params, heldout, experiment))


# --- Figures for a person ---


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """How well a model predicts a text.

  Attributes:
    loss_nats_per_token: mean of -log p(next token) over every prediction, nothing dropped out.
    num_tokens: predictions it is over.
    num_bytes: UTF-8 bytes that these predictions stand for; the end of a document counts as one,
      its line's end.
    num_documents: None for a stream.
  """

  loss_nats_per_token: float
  num_tokens: int
  num_bytes: int
  num_documents: int | None

  @property
  def perplexity(self) -> float:
    """Computes exp(loss): the number of equally likely tokens with the same loss."""
    return math.exp(self.loss_nats_per_token) if self.loss_nats_per_token < 700 else math.inf

  @property
  def bits_per_byte(self) -> float:
    """Computes the loss in bits per byte of text, comparable between tokenizers."""
    return self.loss_nats_per_token * self.num_tokens / math.log(2) / self.num_bytes


def evaluate_loss(
  params: dict, corpus: Corpus, tokenizer: Tokenizer, experiment: Experiment
) -> Evaluation:
  """Evaluates a model on every prediction of a corpus, each once.

  Args:
    params: as `init_params` returns them; blocks stacked or a list.
    corpus: NumPy arrays, `Data.heldout` or `Data.train`; at least one prediction.
    tokenizer: of the run.
    experiment: resolved.

  Example:
    >>> run = jgpt.open_run("runs/names")
    >>> jgpt.evaluate_loss(run.params, run.data().heldout, run.tokenizer, run.experiment)
  """
  placed = jax.device_put(corpus, beside(params))
  loss, num_tokens = finish_evaluation(begin_evaluation(params, placed, experiment))
  is_stream = experiment.data.batching != "documents"
  return Evaluation(
    loss_nats_per_token=loss,
    num_tokens=num_tokens,
    num_bytes=count_bytes(corpus, tokenizer),
    num_documents=None if is_stream else len(corpus.tokens),
  )


def count_bytes(corpus: Corpus, tokenizer: Tokenizer) -> int:
  """Counts the UTF-8 bytes that a corpus's predictions stand for.

  The first token of a stream is not predicted. The end of a document counts as one byte, its line's
  end; an end-of-text token stands for none.

  Args:
    corpus: NumPy arrays, as `load_data` returns them.
    tokenizer: of the run.
  """
  sizes = np.array([len(content) for content in tokenizer.token_bytes])
  if isinstance(corpus, Stream):
    return int(sizes[corpus.tokens[1:]].sum())
  sizes[tokenizer.bos_id] = 1
  targets = corpus.tokens[:, 1:]
  is_predicted = np.arange(targets.shape[1])[None] < corpus.lengths[:, None]
  return int(sizes[targets][is_predicted].sum())
