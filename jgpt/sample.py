"""python -m jgpt.sample: draw texts from a run folder.

Reads nothing but the folder: no experiment file, no data, no optimizer. Responsible for the command line only; the drawing
is in `generate.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jgpt import cli
from jgpt.errors import UserError

if TYPE_CHECKING:  # jax is imported after the arguments are understood
  from jgpt.config import Experiment, SampleConfig
  from jgpt.text.tokenizer import Tokenizer


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  args = _parser().parse_args(argv)
  from jgpt import generate
  from jgpt.devices import runtime
  from jgpt.keys import SAMPLE, derive_key
  from jgpt.runs.folder import read_run_files
  from jgpt.runs.open import load_run

  if note := runtime.set_up():
    print(note, file=sys.stderr)
  try:
    files = read_run_files(Path(args.run))
  except UserError:
    files = None  # what is said about that depends on the checkpoints: each has a copy of these files
  if files is not None:
    _choose(args, files.experiment, files.tokenizer)  # what cannot be drawn is refused before an array is read
  run = load_run(args.run, args.step)
  sample, seed, ids = _choose(args, run.experiment, run.tokenizer)
  _, dropped = generate.fit_prompt(ids, run.experiment.model)
  if dropped:
    print(f"the prompt has {len(ids)} tokens; only its last {len(ids) - dropped} fit the context", file=sys.stderr)
  key = derive_key(seed, SAMPLE, run.step)
  for text in generate.generate_texts(run.params, run.tokenizer, key, run.experiment.model, sample):
    print(visible(text) if sys.stdout is not None and sys.stdout.isatty() else text)
  return 0


def visible(text: str) -> str:
  """A text for a terminal, which would obey control characters: they are escaped, but for line breaks and tabs."""
  return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: found[0].encode("unicode_escape").decode(), text)


def _choose(args: argparse.Namespace, experiment: Experiment, tokenizer: Tokenizer) -> tuple[SampleConfig, int, list[int]]:
  """What is drawn and from which seed, as the arguments or else the run say; and the ids of the prompt."""
  names = ("prompt", "num", "temperature", "top_k", "top_p", "max_tokens")
  given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  sample = dataclasses.replace(experiment.sample, **given)
  train = experiment.train if args.seed is None else dataclasses.replace(experiment.train, seed=args.seed)
  return sample, train.seed, tokenizer.prompt(sample.prompt)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="python -m jgpt.sample", description="Draw texts from a run folder.")
  parser.add_argument("--run", required=True, metavar="DIR", help="a run folder, as python -m jgpt.run leaves it")
  parser.add_argument("--prompt", metavar="TEXT", help="how each text begins")
  parser.add_argument("--num", type=int, metavar="N", help="texts")
  parser.add_argument(
    "--temperature", type=float, metavar="T", help="0 takes the most probable token, 1 draws as the model says"
  )
  parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K most probable tokens; 0 means all")
  parser.add_argument(
    "--top-p", type=float, metavar="P", help="draw among the tokens that hold this share of the probability"
  )
  parser.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same texts (default: the run's)")
  parser.add_argument("--max-tokens", type=int, metavar="N", help="new tokens at most (default: until the context is full)")
  parser.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the newest)")
  parser.epilog = "What is not given is as in the run's settings."
  return parser


if __name__ == "__main__":
  sys.exit(cli.guard(main))
