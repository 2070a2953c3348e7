"""python -m jgpt.sample: draw texts from a run folder.

Reads nothing but the folder: no experiment file, no data, no optimizer. Responsible for the command line only; the drawing
is in `generate.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from jgpt import command


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  args = _parser().parse_args(argv)
  from jgpt import checkpoint, generate, runtime
  from jgpt.keys import SAMPLE, derive_key

  if note := runtime.set_up():
    print(note, file=sys.stderr)
  run = checkpoint.load_run(args.run, args.step)
  names = ("prompt", "num", "temperature", "top_k", "top_p", "max_tokens")
  given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  sample = dataclasses.replace(run.experiment.sample, **given)
  train = run.experiment.train
  seed = train.seed if args.seed is None else dataclasses.replace(train, seed=args.seed).seed
  ids = run.tokenizer.prompt(sample.prompt)
  _, dropped = generate.fit_prompt(ids, run.experiment.model)
  if dropped:
    print(f"the prompt has {len(ids)} tokens; only its last {len(ids) - dropped} fit the context", file=sys.stderr)
  key = derive_key(seed, SAMPLE, run.step)
  for text in generate.generate_texts(run.params, run.tokenizer, key, run.experiment.model, sample):
    print(text)
  return 0


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
  sys.exit(command.guard(main))
