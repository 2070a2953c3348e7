"""python -m jgpt.evaluate: the loss of a run over the whole of its held-out text.

Reads the run folder's parameters and settings, and the text that they were trained on, found by its digest. Responsible for
the command line and for the figures that follow from the loss; the loss is computed as at the end of training
(`program.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jgpt import command
from jgpt.checks import UserError, printable

if TYPE_CHECKING:  # jax is imported after the arguments are understood
  from jgpt.batches import Corpus
  from jgpt.config import Experiment
  from jgpt.tokenizer import Tokenizer

PARTS = {"heldout": "held-out part", "train": "training part"}


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


def evaluate_corpus(params: dict, corpus: Corpus, tokenizer: Tokenizer, experiment: Experiment) -> Evaluation:
  """Evaluates a model on every prediction of a corpus, each once.

  Args:
    params: as `init_params` returns them, or with unstacked blocks.
    corpus: `Data.heldout` or `Data.train`; at least one prediction.
    tokenizer: of the run.
    experiment: resolved.
  """
  from jgpt.program import begin_evaluation

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


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  args = _parser().parse_args(argv)
  from jgpt import checkpoint, run_folder, runtime
  from jgpt.data import find_data
  from jgpt.shards import TokenFiles

  if note := runtime.set_up():
    print(note, file=sys.stderr)
  run = checkpoint.load_run(args.run, args.step)
  settings = run.experiment.data
  sha256 = run_folder.read_run_files(run.workdir).data["sha256"]
  data = find_data(settings, run.experiment.train.seed, sha256=sha256, tokenizer=run.tokenizer)
  corpus = data.train if args.part == "train" else data.heldout
  if not len(corpus.tokens):
    raise UserError(
      f"{args.run} holds no text out: data.heldout_fraction={settings.heldout_fraction}. Train with a share of it held "
      "out, for example --set data.heldout_fraction=0.1, or evaluate on the training part with --part train"
    )
  if isinstance(corpus.tokens, TokenFiles):
    raise UserError(
      f"the training part of {args.run} has {len(corpus.tokens):,} tokens and stays on the disk. Evaluate the held-out part"
    )
  evaluation = evaluate_corpus(run.params, corpus, run.tokenizer, run.experiment)
  if args.json:
    print(json.dumps(to_json(evaluation, run.workdir, run.step, args.part)))
    return 0
  lines = [
    ("run", f"{run.workdir} at step {run.step:,}"),
    ("data", f"{data.text.location} ({data.text.kind}), {PARTS[args.part]}"),
    *describe(evaluation, run.experiment.model.vocab_size),
  ]
  for label, line in lines:
    print(f"{label:<15}{printable(line)}")
  return 0


def to_json(evaluation: Evaluation, workdir: Path, step: int, part: str) -> dict[str, Any]:
  """The evaluation as a dict that `json` can write; a number that is not finite becomes None."""
  numbers = {
    "loss_nats_per_token": evaluation.loss_nats_per_token,
    "perplexity": evaluation.perplexity,
    "bits_per_byte": evaluation.bits_per_byte,
  }
  finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
  counts = {"tokens": evaluation.num_tokens, "bytes": evaluation.num_bytes, "documents": evaluation.num_documents}
  return {"run": str(workdir), "step": step, "part": part, **finite, **counts}


def describe(evaluation: Evaluation, vocab_size: int) -> list[tuple[str, str]]:
  """The evaluation as labelled lines; `vocab_size` gives the loss of guessing uniformly, to hold it against."""
  from jgpt import metrics

  documents = "" if evaluation.num_documents is None else f"{evaluation.num_documents:,} documents, "
  guessing = f"uniform guessing: {metrics.uniform_loss(vocab_size):.4f}"
  return [
    ("", f"{documents}{evaluation.num_tokens:,} tokens, {evaluation.num_bytes:,} bytes"),
    ("loss", f"{evaluation.loss_nats_per_token:.4f} nats per token ({guessing})"),
    ("perplexity", f"{metrics.format_perplexity(evaluation.loss_nats_per_token)} (uniform guessing: {vocab_size:,})"),
    ("bits per byte", f"{evaluation.bits_per_byte:.4f}"),
  ]


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m jgpt.evaluate", description="Measure a run's loss over the whole of its held-out text."
  )
  parser.add_argument("--run", required=True, metavar="DIR", help="a run folder, as python -m jgpt.run leaves it")
  parser.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the newest)")
  parser.add_argument(
    "--part", choices=PARTS, default="heldout", help="which part of the run's text; train is all that it could learn from"
  )
  parser.add_argument("--json", action="store_true", help="print one JSON object; what is not finite is null")
  return parser


if __name__ == "__main__":
  sys.exit(command.guard(main))
