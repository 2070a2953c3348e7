"""Runs `python -m jgpt.sample`: draws texts from a run folder.

Reads nothing but the folder: no experiment file, no data, no optimizer. From Python call
`Run.sample`, in `runs/open.py`.
"""

from __future__ import annotations

import argparse
import re
import sys

from jgpt import cli
from jgpt.errors import UserError

SETTINGS = ("prompt", "num", "temperature", "top_k", "top_p", "max_tokens")  # of SampleConfig


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  args = _parser().parse_args(argv)
  from jgpt.devices import runtime
  from jgpt.generate import fit_prompt
  from jgpt.runs.folder import read_run_files
  from jgpt.runs.locate import locate_run
  from jgpt.runs.open import choose_sample, open_run

  if note := runtime.set_up():
    print(note, file=sys.stderr)
  workdir, step = locate_run(args.run, args.step)
  given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
  try:
    files = read_run_files(workdir)
  except UserError:
    files = None  # each checkpoint has a copy, from which `open_run` may still read
  if files is not None:  # errors in the settings are raised before an array is read
    config, _ = choose_sample(files.experiment, args.seed, given)
    files.tokenizer.encode_prompt(config.prompt)
  run = open_run(workdir, step)
  config, _ = choose_sample(run.experiment, args.seed, given)
  ids = run.tokenizer.encode_prompt(config.prompt)
  _, dropped = fit_prompt(ids, run.experiment.model)
  if dropped:
    print(
      f"the prompt has {len(ids)} tokens; only its last {len(ids) - dropped} fit the context",
      file=sys.stderr,
    )
  for text in run.sample(seed=args.seed, **given):
    print(escape_controls(text) if sys.stdout is not None and sys.stdout.isatty() else text)
  return 0


def escape_controls(text: str) -> str:
  """Escapes control characters except line breaks and tabs, because a terminal obeys them."""
  return re.sub(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: found[0].encode("unicode_escape").decode(), text
  )


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(prog="python -m jgpt.sample", description="Draw texts from a run folder.")
  parser.add_argument(
    "--run",
    required=True,
    metavar="DIR",
    help="a run folder, as python -m jgpt.run leaves it, or one of its checkpoints/STEP",
  )
  parser.add_argument("--prompt", metavar="TEXT", help="how each text begins")
  parser.add_argument("--num", type=int, metavar="N", help="texts")
  parser.add_argument(
    "--temperature",
    type=float,
    metavar="T",
    help="0 takes the most probable token, 1 draws as the model says",
  )
  parser.add_argument(
    "--top-k", type=int, metavar="K", help="draw among the K most probable tokens; 0 means all"
  )
  parser.add_argument(
    "--top-p",
    type=float,
    metavar="P",
    help="draw among the tokens that hold this share of the probability",
  )
  parser.add_argument(
    "--seed", type=int, metavar="N", help="the same seed draws the same texts (default: the run's)"
  )
  parser.add_argument(
    "--max-tokens",
    type=int,
    metavar="N",
    help="new tokens at most (default: until the context is full)",
  )
  parser.add_argument(
    "--step",
    type=cli.parse_step,
    metavar="N",
    help="which checkpoint, or best: the saved one of the lowest held-out loss (default: newest)",
  )
  parser.epilog = "What is not given is as in the run's settings."
  return parser


if __name__ == "__main__":
  sys.exit(cli.guard(main))
