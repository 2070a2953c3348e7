"""Runs `python -m jgpt.evaluate`: computes the loss of a run over its whole held-out text.

Reads the run folder's parameters and settings, and the text that they were trained on, found by its
digest. From Python call `evaluate_loss`, in `evaluation.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jgpt import cli
from jgpt.errors import UserError, printable

if TYPE_CHECKING:  # jax is imported after the arguments are understood
  from jgpt.evaluation import Evaluation

PART_NAMES = {"heldout": "held-out part", "train": "training part"}


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  args = _parser().parse_args(argv)
  from jgpt.data.token_files import TokenFiles
  from jgpt.devices import runtime
  from jgpt.evaluation import evaluate_loss
  from jgpt.runs.folder import read_run_files
  from jgpt.runs.open import open_run
  from jgpt.runs.text import find_run_data, parse_place

  if note := runtime.set_up():
    print(note, file=sys.stderr)
  run = open_run(args.run, args.step)
  recorded = read_run_files(run.workdir)
  loaded, _ = find_run_data(run.workdir, recorded, parse_place(args.set, recorded))
  corpus = loaded.train if args.part == "train" else loaded.heldout
  if not len(corpus.tokens):
    raise UserError(
      f"{run.workdir} holds no text out: data.heldout_fraction="
      f"{run.experiment.data.heldout_fraction}. Train with a share of it held out, for example "
      "--set data.heldout_fraction=0.1, or evaluate on the training part with --part train"
    )
  if isinstance(corpus.tokens, TokenFiles):
    raise UserError(
      f"the training part of {run.workdir} has {len(corpus.tokens):,} tokens and stays on the "
      "disk. Evaluate the held-out part"
    )
  evaluation = evaluate_loss(run.params, corpus, run.tokenizer, run.experiment)
  if args.json:
    print(json.dumps(evaluation_to_json(evaluation, run.workdir, run.step, args.part)))
    return 0
  lines = [
    ("run", f"{run.workdir} at step {run.step:,}"),
    ("data", f"{loaded.text.location} ({loaded.text.kind}), {PART_NAMES[args.part]}"),
    *([("", loaded.text.note)] if loaded.text.note else []),
    *format_evaluation(evaluation, run.experiment.model.vocab_size),
  ]
  for label, line in lines:
    print(f"{label:<15}{printable(line)}")
  return 0


def evaluation_to_json(
  evaluation: Evaluation, workdir: Path, step: int, part: str
) -> dict[str, Any]:
  """Converts an evaluation to a dict that `json` can write.

  Args:
    evaluation: from `evaluate_loss`; numbers that are not finite become None.
    workdir: the run folder.
    step: of the checkpoint.
    part: a key of `PART_NAMES`.
  """
  numbers = {
    "loss_nats_per_token": evaluation.loss_nats_per_token,
    "perplexity": evaluation.perplexity,
    "bits_per_byte": evaluation.bits_per_byte,
  }
  finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
  counts = {
    "tokens": evaluation.num_tokens,
    "bytes": evaluation.num_bytes,
    "documents": evaluation.num_documents,
  }
  return {"run": str(workdir), "step": step, "part": part, **finite, **counts}


def format_evaluation(evaluation: Evaluation, vocab_size: int) -> list[tuple[str, str]]:
  """Formats an evaluation as labelled lines, beside the loss of uniform guessing.

  Args:
    evaluation: from `evaluate_loss`.
    vocab_size: of the model.
  """
  from jgpt.report.console import format_perplexity, uniform_loss

  documents = (
    "" if evaluation.num_documents is None else f"{evaluation.num_documents:,} documents, "
  )
  guessing = f"uniform guessing: {uniform_loss(vocab_size):.4f}"
  return [
    ("", f"{documents}{evaluation.num_tokens:,} tokens, {evaluation.num_bytes:,} bytes"),
    ("loss", f"{evaluation.loss_nats_per_token:.4f} nats per token ({guessing})"),
    (
      "perplexity",
      f"{format_perplexity(evaluation.loss_nats_per_token)} (uniform guessing: {vocab_size:,})",
    ),
    ("bits per byte", f"{evaluation.bits_per_byte:.4f}"),
  ]


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog="python -m jgpt.evaluate",
    description="Measure a run's loss over the whole of its held-out text.",
  )
  parser.add_argument(
    "--run",
    required=True,
    metavar="DIR",
    help="a run folder, as python -m jgpt.run leaves it, or one of its checkpoints/STEP",
  )
  parser.add_argument(
    "--step",
    type=cli.parse_step,
    metavar="N",
    help="which checkpoint, or best: the saved one of the lowest held-out loss (default: newest)",
  )
  parser.add_argument(
    "--part",
    choices=PART_NAMES,
    default="heldout",
    help="which part of the run's text; train is all that it could learn from",
  )
  cli.add_place_option(parser)
  parser.add_argument(
    "--json", action="store_true", help="print one JSON object; what is not finite is null"
  )
  return parser


if __name__ == "__main__":
  sys.exit(cli.guard(main))
