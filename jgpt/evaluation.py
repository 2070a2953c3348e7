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

from jgpt.batches import (
  EVAL_DOCUMENTS,
  Batch,
  Corpus,
  Documents,
  Stream,
  count_eval_batches,
  count_eval_rows,
  eval_batch,
  split_padded,
)
from jgpt.config import Experiment
from jgpt.params import count_params
from jgpt.sharding import (
  beside,
  count_batch_parts,
  find_mesh,
  place,
  sum_over_data,
  use_mesh,
  with_auto_axes,
)
from jgpt.step import loss_fn
from jgpt.text.tokenizer import Tokenizer


class EvalSums(NamedTuple):
  """The sums of an evaluation over each part that it computed at once, a batch at most.

  `finish_evaluation` adds them: a sum of all in float32 would lose digits from 2^24 tokens on.

  Attributes:
    nats: float32 [batches, parts of a batch], sums of -log p(target).
    tokens: int32, of the same shape, the numbers of targets.
  """

  nats: jax.Array
  tokens: jax.Array


EVALUATIONS = 5  # of train.eval_every="auto", besides the one before any update
# They take at most this share of the time of training, whose steps take three times a forward pass;
# or, if that is more, this many operations in all, which is 0.1 s on two slow cores.
EVALUATION_SHARE = 0.02
FREE_FLOPS = 1.5e9


class HeldoutLoss(NamedTuple):
  """A loss on the held-out part; those over different targets are not compared.

  Attributes:
    loss: nats per token.
    num_tokens: targets that it is over.
    num_batches: of a sample of the held-out part; None for all of it.
  """

  loss: float
  num_tokens: int
  num_batches: int | None

  @property
  def targets(self) -> tuple[int, int | None]:
    """Returns what says which targets the loss is over, within one run."""
    return self.num_tokens, self.num_batches

  def bits_per_byte(self, num_bytes: int) -> float:
    """Computes the loss in bits per byte of the text that the targets stand for."""
    return self.loss * self.num_tokens / math.log(2) / num_bytes


@with_auto_axes(None)
def eval_step(params: dict, batch: Batch, experiment: Experiment) -> EvalSums:
  """Computes the sum of -log p(target) over a batch's targets, and their number, as scalars.

  Weights are 0 or 1.
  """

  def compute(params: dict, batch: Batch) -> EvalSums:
    nats = loss_fn(params, batch, experiment, total_weight=jnp.float32(1))
    return EvalSums(nats, jnp.sum(batch.weights_BT > 0, dtype=jnp.int32))

  return sum_over_data(compute, params, batch)


@partial(jax.jit, static_argnames=("experiment", "num_batches", "whole", "num_rows"))
@with_auto_axes(None)
def evaluate(
  params: dict,
  corpus: Corpus,
  experiment: Experiment,
  *,
  num_batches: int,
  whole: bool,
  num_rows: int,
) -> EvalSums:
  """Computes the sums of batches 0 to `num_batches` - 1, one part after the other.

  Args:
    params: as `init_params` returns them; blocks stacked or a list.
    corpus: on the device.
    experiment: resolved.
    num_batches: at least 1.
    whole: see `eval_batch`.
    num_rows: sequences in a part, a multiple of the devices that the parameters lie on.
  """

  def compute(number: jax.Array) -> EvalSums:
    parts = split_padded(eval_batch(corpus, number, experiment, whole=whole), num_rows)
    return jax.lax.map(lambda part: eval_step(params, part, experiment), parts)

  return jax.lax.map(compute, jnp.arange(num_batches, dtype=jnp.int32))


def begin_evaluation(
  params: dict, corpus: Corpus, experiment: Experiment, num_batches: int | None = None
) -> EvalSums:
  """Starts to compute the loss over a corpus; `finish_evaluation` of what is returned waits for it.

  Every batch is divided over devices and into parts as training's are, see `count_eval_rows`.

  Args:
    params: as `init_params` returns them; blocks stacked or a list. The devices that they lie on
      divide each part.
    corpus: at least one prediction.
    experiment: resolved.
    num_batches: batches to take; None, or more than there are, takes every prediction once.
  """
  with use_mesh(params):
    chosen = _choose_batches(corpus, experiment, num_batches)
    rows = _count_rows(params, experiment)
    return evaluate(params, corpus, experiment, **chosen, num_rows=rows)


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
  """Starts the evaluation that `train.eval_every` asks for after a step; None where none is due.

  One is due after the last step too, so that the end can be compared with what came before.
  """
  train = experiment.train
  is_due = train.eval_every and (step % train.eval_every == 0 or step == train.steps)
  if not is_due or not len(heldout.tokens):
    return None
  return begin_evaluation(params, heldout, experiment, train.eval_batches)


def lower_evaluation(
  params: dict, corpus: Corpus, experiment: Experiment, num_batches: int | None = None
) -> jax.stages.Lowered:
  """Traces what `begin_evaluation` calls with such arguments, which may be shapes."""
  with use_mesh(params):
    chosen = _choose_batches(corpus, experiment, num_batches)
    rows = _count_rows(params, experiment)
    return evaluate.lower(params, corpus, experiment, **chosen, num_rows=rows)


def schedule_evaluations(
  experiment: Experiment, heldout: Corpus, epoch_steps: int | None = None
) -> Experiment:
  """Returns an experiment with `train.eval_every`="auto" replaced by a number or None.

  `train.eval_batches` is lowered with it, unless it was given: as many batches as the time allows.

  Args:
    experiment: resolved otherwise.
    heldout: the held-out part.
    epoch_steps: updates in an epoch, where the run is counted in epochs.
  """
  data, train = experiment.data, experiment.train
  if train.eval_every != "auto":
    return experiment
  every, num_batches = None, train.eval_batches
  num_available = count_eval_batches(heldout, data)
  if num_available and train.steps:
    every = epoch_steps or math.ceil(train.steps / EVALUATIONS)
    batch_size = EVAL_DOCUMENTS if isinstance(heldout, Documents) else data.batch_size
    allowed = EVALUATION_SHARE * 3 * train.steps * data.batch_size / batch_size
    flops = 2 * count_params(experiment.model) * batch_size * data.seq_len
    allowed = max(allowed, FREE_FLOPS / flops)  # batches in all
    evaluations = 1 + math.ceil(train.steps / every)
    if num_batches is None:
      num_batches = max(1, min(num_available, int(allowed / evaluations)))
      if evaluations * num_batches > allowed:
        every = math.ceil(train.steps / max(1, int(allowed) - 1)) if allowed >= 2 else None
      num_batches = None if num_batches == num_available else num_batches
  train = dataclasses.replace(train, eval_every=every, eval_batches=num_batches)
  return dataclasses.replace(experiment, train=train)


def count_sample_batches(corpus: Corpus, experiment: Experiment) -> int | None:
  """Returns how many batches of a corpus `train.eval_batches` takes; None for all of the corpus."""
  chosen = _choose_batches(corpus, experiment, experiment.train.eval_batches)
  return None if chosen["whole"] else chosen["num_batches"]


def _count_rows(params: dict, experiment: Experiment) -> int:
  """Counts the sequences that the devices of the parameters compute at once."""
  return count_eval_rows(experiment, count_batch_parts(find_mesh(params)))


def _choose_batches(corpus: Corpus, experiment: Experiment, num_batches: int | None) -> dict:
  """Returns which batches `evaluate` takes, as its arguments."""
  num_available = count_eval_batches(corpus, experiment.data)
  is_random = experiment.data.batching == "random"
  whole = num_batches is None or (num_batches >= num_available and not is_random)
  return {"num_batches": num_available if whole else num_batches, "whole": whole}


def evaluate_heldout(params: dict, heldout: Corpus, experiment: Experiment) -> HeldoutLoss | None:
  """Computes the loss over the whole held-out part; None where nothing is held out."""
  if not len(heldout.tokens):
    return None
  return HeldoutLoss(*finish_evaluation(begin_evaluation(params, heldout, experiment)), None)


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
  placed = place(corpus, beside(params))
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
