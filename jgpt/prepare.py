"""Runs `python -m jgpt.prepare`: makes token files from text or JSON lines of any size.

Prints progress and what was made; the work is in `data/preparation.py`. Imports no jax.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jgpt import cli
from jgpt.system.command import python_command

if TYPE_CHECKING:  # jax is imported after the arguments are understood
  from jgpt.data.preparation import Preparation

LINE_SECONDS = 10.0  # between two lines of progress, where there is no terminal
BAR_SECONDS = 0.1  # between two updates of the bar
# The experiment that is suggested for each kind of tokenizer.
EXPERIMENTS = {
  "gpt2": "gpt2_shakespeare",
  "bytes": "shakespeare_bytes",
  "bpe": "shakespeare_bpe",
  "characters": "shakespeare_char",
}


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  args = _parser().parse_args(argv)
  from jgpt.data import preparation

  wanted = preparation.Preparation(
    inputs=preparation.find_inputs(args.data),
    tokenizer=preparation.choose_tokenizer(args.tokenizer),
    out=Path(args.out).expanduser(),
    documents=args.documents,
    field=args.field,
    heldout_tokens=args.heldout_tokens,
    shard_tokens=args.shard_tokens,
  )
  before = preparation.read_preparation(wanted.out)
  began = time.perf_counter()
  with PreparationProgress(wanted.num_bytes) as progress:
    manifest = preparation.prepare(wanted, progress.update)
  if before is not None and before["finished"]:
    print(f"{wanted.out} is finished already: nothing was changed")
  for label, line in describe_preparation(wanted, manifest, time.perf_counter() - began):
    print(f"{label:<12}{line}")
  print(f"\nnext:\n  {format_next_command(wanted, count_tokens(manifest))}")
  return 0


def describe_preparation(
  wanted: Preparation, manifest: dict[str, Any], seconds: float
) -> list[tuple[str, str]]:
  """Describes the token files that were made, as labelled lines.

  Args:
    wanted: inputs, tokenizer and output.
    manifest: from `preparation.prepare`.
    seconds: that it took.
  """
  tokens = count_tokens(manifest)
  num_inputs, num_bytes = len(manifest["inputs"]), sum(file["bytes"] for file in manifest["inputs"])
  names = [file["name"] for file in manifest["files"]]
  return [
    ("input", f"{num_inputs:,} {'file' if num_inputs == 1 else 'files'}, {num_bytes:,} bytes"),
    ("vocabulary", wanted.tokenizer.describe()),
    ("tokens", f"{tokens['train']:,} for training, {tokens['val']:,} held out"),
    (
      "files",
      f"{wanted.out / names[0]}"
      + (f" ... {names[-1]} ({len(names):,} files)" if len(names) > 1 else ""),
    ),
    ("time", f"{seconds:.1f} s"),
  ]


def count_tokens(manifest: dict[str, Any]) -> dict[str, int]:
  """Counts the tokens that were made, held out ("val") and for training ("train")."""
  tokens = {"val": 0, "train": 0}
  for file in manifest["files"]:
    tokens[file["name"].rsplit("_", 2)[1]] += file["tokens"]
  return tokens


def format_next_command(wanted: Preparation, tokens: dict[str, int]) -> str:
  """Formats the command that trains on the token files.

  Args:
    wanted: tokenizer and output.
    tokens: from `count_tokens`; few of them get shorter sequences.
  """
  import shlex

  from jgpt.config.catalog import load_experiment
  from jgpt.text.tokenizer import kind_of

  kind = kind_of(wanted.tokenizer)
  size = f" --set data.bpe_vocab_size={wanted.tokenizer.vocab_size}" if kind == "bpe" else ""
  config = load_experiment(EXPERIMENTS[kind]).data
  rows = config.batch_size if config.batching == "sequential" else 1  # in a stretch of the stream
  longest = min((tokens["train"] - 1) // rows, (tokens["val"] or tokens["train"]) - 1)
  if 1 <= longest < config.seq_len:
    size += f" --set data.seq_len={longest}"
  path = shlex.quote(f"data.path={wanted.out}")
  return f"{python_command()} -m jgpt.run --experiment {EXPERIMENTS[kind]} --set {path}{size}"


class PreparationProgress:
  """Progress on standard error: a bar on a terminal, otherwise a line every ten seconds."""

  def __init__(self, num_bytes: int):
    self._num_bytes = num_bytes
    self._began = self._said = time.perf_counter()
    self._first: int | None = None
    self._bar = None
    if sys.stderr is not None and sys.stderr.isatty():
      from rich import console, progress

      columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
      )
      self._bar = progress.Progress(*columns, transient=True, console=console.Console(stderr=True))
      self._task = self._bar.add_task("tokens", total=num_bytes)

  def __enter__(self) -> PreparationProgress:
    return self

  def __exit__(self, *exception: object) -> None:
    if self._bar:
      self._bar.stop()

  def update(self, done: int, tokens: int) -> None:
    """Shows the progress, if it is time to.

    Args:
      done: bytes of input that are encoded. Those of the first call, which an earlier start
        encoded, do not count for the speed.
      tokens: written so far.
    """
    now = time.perf_counter()
    if self._first is None:
      self._first = done
    if now - self._said < (BAR_SECONDS if self._bar else LINE_SECONDS) and done < self._num_bytes:
      return
    self._said = now
    if self._bar:
      self._bar.start()
      self._bar.update(self._task, completed=done)
      return
    rate = max(done - self._first, 1) / max(now - self._began, 1e-9)
    left = f", {(self._num_bytes - done) / rate:,.0f} s left" if done < self._num_bytes else ""
    share = f"{100 * done / max(1, self._num_bytes):.0f}%"
    size = f"{done / 1e6:,.1f} of {self._num_bytes / 1e6:,.1f} MB ({share})"
    print(f"{size}, {tokens:,} tokens, {rate / 1e6:.1f} MB/s{left}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog="python -m jgpt.prepare",
    description="Make token files, in llm.c's format, from text or JSON lines of any size; the "
    "same command resumes one that was interrupted.",
  )
  parser.add_argument(
    "--data",
    required=True,
    metavar="PATH",
    help="a file, a folder (its *.txt and *.jsonl) or a glob; UTF-8 text, *.jsonl holds JSON lines",
  )
  parser.add_argument(
    "--tokenizer",
    required=True,
    metavar="NAME",
    help="gpt2, bytes, or the path of a tokenizer.json, jgpt's or Hugging Face's, or of a folder "
    "with one, such as a run folder",
  )
  parser.add_argument(
    "--out",
    required=True,
    metavar="DIR",
    help="folder to make; the files' names begin with its name",
  )
  parser.add_argument(
    "--documents",
    choices=("paragraphs", "lines", "files"),
    default="paragraphs",
    help="what a document of text is; the end-of-text token, where the tokenizer has one, is put "
    "before each (default: paragraphs, separated by blank lines)",
  )
  parser.add_argument(
    "--field", default="text", metavar="NAME", help="of the text in a line of JSON (default: text)"
  )
  parser.add_argument(
    "--heldout-tokens",
    type=int,
    default=32_768,
    metavar="N",
    help="the first, for validation (default: 32768; 0: none)",
  )
  parser.add_argument(
    "--shard-tokens",
    type=int,
    default=100_000_000,
    metavar="N",
    help="in a training file (default: 100000000)",
  )
  return parser


if __name__ == "__main__":
  sys.exit(cli.guard(main))
