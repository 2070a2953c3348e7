"""Runs `python -m jgpt.inspect`: arguments, and the tables and maps that it prints.

What they show is computed in the files beside this one, and attention in `model.trace`. The package
is always imported as `jgpt.inspect`; the standard library has a module `inspect`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jgpt import cli
from jgpt.errors import UserError
from jgpt.params import Entry, find_entry
from jgpt.report import figures
from jgpt.report.tables import format_table
from jgpt.system.files import write_file

if TYPE_CHECKING:  # jax is imported after the arguments are understood
  from jgpt.inspect.gradients import NextUpdate
  from jgpt.inspect.parameters import ParamStats
  from jgpt.inspect.predictions import Prediction
  from jgpt.runs.folder import RunFiles
  from jgpt.runs.open import Run

MAX_MAPS = 12  # of attention that a terminal shows; of more, each layer's mean


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  args = _parser().parse_args(argv)
  _check_arguments(args)
  from jgpt.devices import runtime
  from jgpt.runs.folder import read_run_files
  from jgpt.runs.locate import locate_run
  from jgpt.runs.open import open_run

  if note := runtime.set_up():
    print(note, file=sys.stderr)
  args.run, args.step = locate_run(args.run, args.step)
  files = read_run_files(args.run)
  entry = None if args.trace is None else find_entry(args.trace, files.experiment.model)
  _check_layer(args.layer, files.experiment.model.num_layers)
  for text in (args.text, args.attention):
    if text is not None:
      files.tokenizer.encode(text)  # raises for unknown characters, before an array is read
  parts = []
  if args.text is not None or args.attention is not None or entry is None:
    run = open_run(args.run, args.step)
    if args.text is not None:
      parts.append(lambda: _print_predictions(run, args.text))
    if args.attention is not None:
      parts.append(lambda: _print_attention(args, run))
    if not parts and entry is None:
      parts.append(lambda: _print_params(args, files, run))
  if entry is not None:
    parts.append(lambda: _print_trace(args, files, entry))
  for i, print_part in enumerate(parts):
    print(end="\n" if i else "")
    print_part()
  return 0


def _check_arguments(args: argparse.Namespace) -> None:
  """Checks options that have no meaning together.

  Raises:
    UserError: saying which, and what they go with.
  """
  is_alone = args.text is None and args.attention is None and args.trace is None
  reads_step = is_alone or args.text is not None or args.attention is not None
  if args.step is not None and not reads_step:
    raise UserError(
      "--step goes with --text, --attention, or neither; --trace begins at the run's initial "
      "weights"
    )
  if args.trace is None and args.set and not is_alone:
    raise UserError(
      "--set goes with --trace or the table of parameters; --text and --attention read no text of "
      "the run"
    )
  if args.layer is not None and args.attention is None and not is_alone:
    raise UserError("--layer goes with --attention, or with the table of parameters")
  if args.trace_steps < 1:
    raise UserError(f"--trace-steps={args.trace_steps} must be at least 1")
  if args.out is None:
    return
  if args.attention is None:
    raise UserError("--out is a picture of attention: it goes with --attention")
  figures.check_suffix(args.out)
  if os.path.lexists(args.out):
    raise UserError(f"--out {args.out} is there already. Choose another name, or remove it")
  if not args.out.parent.is_dir():
    folder = args.out.parent
    raise UserError(f"--out {args.out} cannot be written: {folder} is no folder. Make it first")
  figures.make_figure()  # raises without matplotlib, before a model is read


def _check_layer(layer: int | str | None, num_layers: int) -> None:
  if isinstance(layer, int) and layer >= num_layers:
    have = f"layers 0 to {num_layers - 1}" if num_layers > 1 else "one layer, 0"
    raise UserError(f"--layer={layer}: the model has {have}. Try --layer {num_layers - 1}")


# --- Parameters ---


def _print_params(args: argparse.Namespace, files: RunFiles, run: Run) -> None:
  from jgpt.inspect.gradients import compute_next_update
  from jgpt.inspect.parameters import format_params, measure_layers, measure_params
  from jgpt.runs.text import find_run_data, parse_place

  found, reason = None, ""
  try:
    data, _ = find_run_data(args.run, files, parse_place(args.set, files))
    found = compute_next_update(run, data)
  except UserError as error:
    if args.set:
      raise
    reason = str(error)
  grads, updates = (None, None) if found is None else (found.grads, found.updates)
  measure = measure_params if args.layer is None else measure_layers
  rows = measure(run.params, grads, updates, run.experiment.model)
  if isinstance(args.layer, int):
    rows = [row for row in rows if row.name.endswith(f"[{args.layer}]")]
  print(f"run         {run.workdir} at step {run.step:,}\n")
  print(f"{format_params(rows)}\n")
  lines = describe_columns(run, found, rows) if found else [("gradient", f"not computed: {reason}")]
  for label, line in lines:
    print(f"{label:<12}{line}")


def describe_columns(
  run: Run, found: NextUpdate, rows: Sequence[ParamStats]
) -> list[tuple[str, str]]:
  """Describes the columns of gradient and update, as labelled lines with the run's numbers."""
  optimizer = run.experiment.optimizer
  last = "the run's last" if run.step else "its first"
  lines = [
    (
      "batch",
      f"of update {found.step + 1:,}, {last}; its loss is now {found.loss:.4f} nats per token",
    ),
    ("grad", "norm of the gradient of that loss, before clipping"),
    ("ratio", "log10(rms of the update / rms of the parameter), the update being what"),
    (
      "",
      f"{optimizer.name} would now add for that batch, at that update's rate of {found.rate:.3g}",
    ),
    ("healthy", "about -3: a parameter changes by a thousandth (Karpathy, makemore)"),
  ]
  if not found.rate:
    lines.append(("", "the rate is 0 here, so that nothing is updated"))
  elif found.rate < optimizer.peak_lr:
    more = math.log10(optimizer.peak_lr / found.rate)
    peak = f"the peak rate of {optimizer.peak_lr:g}"
    lines.append(("", f"{peak} would add {more:.1f} to each"))
  if any(row.log10_ratio is None for row in rows):
    lines.append(("n/a", "there is no ratio: all entries of the parameter are 0, or of its update"))
  return lines


# --- Attention ---


def _print_attention(args: argparse.Namespace, run: Run) -> None:
  import jax

  from jgpt.config.experiment import PLAIN
  from jgpt.inspect.attention import (
    describe_shades,
    draw_attention,
    format_attention,
    format_maps,
  )
  from jgpt.inspect.predictions import label_token, make_trace_tokens
  from jgpt.model import trace

  tokens_BT = make_trace_tokens(args.attention, run.tokenizer, run.experiment)
  labels = [label_token(token_id, run.tokenizer) for token_id in tokens_BT[0].tolist()]
  experiment = dataclasses.replace(run.experiment, compute=PLAIN)
  found = jax.jit(trace, static_argnums=2)(run.params, tokens_BT, experiment)
  weights_LNTS = jax.device_get(found.attention_LBNTS[:, 0])
  num_layers, num_heads = weights_LNTS.shape[:2]
  width = shutil.get_terminal_size().columns
  print(f"run         {run.workdir} at step {run.step:,}")
  print(f"text        {describe_read(args.attention, len(labels), run)}\n")
  if isinstance(args.layer, int):
    shown = weights_LNTS[args.layer : args.layer + 1]
    print(format_attention(shown, labels, width=width, first_layer=args.layer))
  elif args.layer == "all" or num_layers * num_heads <= MAX_MAPS:
    print(format_attention(weights_LNTS, labels, width=width))
  else:
    titles = [f"layer {layer}" for layer in range(num_layers)]
    maps = format_maps(weights_LNTS.mean(1), titles, labels, width=width)
    print(f"{describe_shades(len(labels))}\n\n{maps}\n")
    print(
      f"each map is the mean of a layer's {num_heads} heads; --layer N shows those of one layer,"
    )
    print("and --layer all those of every layer")
  if args.out is not None:
    picture = figures.render_figure(draw_attention(weights_LNTS, labels), args.out.suffix)
    write_file(args.out, picture)
    print(f"\nwrote {args.out}: {num_layers} × {num_heads} maps, a row for each layer")


def describe_read(text: str, num_tokens: int, run: Run) -> str:
  """Describes the tokens that `predictions.make_trace_tokens` makes of a text."""
  seq_len = run.experiment.data.seq_len
  if run.experiment.data.batching == "documents":
    num = len(text) + 1
    whole = f"{text!r} as in training: BOS and {len(text)} character{'s' * (len(text) != 1)}"
  else:
    num = len(run.tokenizer.encode(text))
    whole = f"{num:,} token{'s' * (num != 1)}"
  if num <= num_tokens:
    return whole
  return f"{whole}; cut after {num_tokens:,} tokens, the context in training ({seq_len:,})"


# --- Predictions ---


def _print_predictions(run: Run, text: str) -> None:
  from jgpt.inspect.predictions import make_text_batch, predict

  batch = make_text_batch(text, run.tokenizer, run.experiment)
  rows = predict(run.params, batch, run.tokenizer, run.experiment.model)
  print(f"run         {run.workdir} at step {run.step:,}")
  print(f"text        {describe_sequence(text, run)}\n")
  print(f"{format_predictions(rows)}\n")
  for label, line in describe_loss(rows, run):
    print(f"{label:<12}{line}")


def describe_sequence(text: str, run: Run) -> str:
  """Describes the sequence that `predictions.make_text_batch` makes of a text."""
  if run.experiment.data.batching == "documents":
    whole = f"{text!r} as in training: BOS, {len(text)} character{'s' * (len(text) != 1)}, BOS"
    seq_len = run.experiment.data.seq_len
    if len(text) < seq_len:
      return whole
    return f"{whole}; cut after {seq_len} predictions, the context in training"
  num_tokens, seq_len = len(run.tokenizer.encode(text)), run.experiment.data.seq_len
  if num_tokens <= seq_len + 1:
    return f"{num_tokens:,} tokens; each predicts the next, so the first has no row"
  return (
    f"the first {seq_len + 1:,} of {num_tokens:,} tokens, one window: training has {seq_len:,} "
    "positions; each predicts the next"
  )


def format_predictions(rows: Sequence[Prediction]) -> str:
  """Formats a table with a row for each position and the three best guesses."""
  names = ["best guess", "second", "third"][: len(rows[0].guesses)]
  header = ["position", "context", "target", "probability", "-log p", "1 in", *names]
  cells = [
    [
      str(row.position),
      row.context,
      row.target,
      _format_probability(row.probability),
      f"{row.nats:.4f}",
      format_count(row.one_in),
      *(f"{guess.token} {_format_probability(guess.probability)}" for guess in row.guesses),
    ]
    for row in rows
  ]
  sides = ["right", "left", "left", "right", "right", "right", *("left" for _ in names)]
  return format_table([header, *cells], sides)


def describe_loss(rows: Sequence[Prediction], run: Run) -> list[tuple[str, str]]:
  """Describes the mean of the column -log p, as labelled lines."""
  from jgpt.inspect.predictions import mean_loss
  from jgpt.report.console import format_perplexity, uniform_loss

  loss, model = mean_loss(rows), run.experiment.model
  same = "evaluation of these tokens alone reports the same loss"
  if run.experiment.data.batching == "documents":
    dropped = ", if dropout dropped nothing" if model.dropout else ""
    same = f"training on this document alone would report the same loss for these weights{dropped}"
  return [
    (
      "loss",
      f"{loss:.4f} nats per token: the mean of the column -log p over {len(rows):,} predictions",
    ),
    ("", same),
    (
      "perplexity",
      f"{format_perplexity(loss)}: on average as unsure as among so many tokens, all alike",
    ),
    (
      "baseline",
      f"uniform guessing: {uniform_loss(model.vocab_size):.4f} nats per token, 1 in "
      f"{model.vocab_size:,}",
    ),
  ]


def format_count(number: float) -> str:
  """Formats a number of the column "1 in" with two significant digits: 1.1, 20, 1,300, 2e+09."""
  if not math.isfinite(number) or number >= 1e6:
    return f"{number:.0e}" if math.isfinite(number) else "inf"
  rounded = float(f"{number:.2g}")
  return f"{rounded:.1f}" if rounded < 10 else f"{rounded:,.0f}"


def _format_probability(value: float) -> str:
  return f"{value:.3f}" if value >= 0.001 or value == 0 else f"{value:.1e}"


# --- Trace ---


def _print_trace(args: argparse.Namespace, files: RunFiles, entry: Entry) -> None:
  from jgpt.devices import runtime
  from jgpt.inspect.trace_table import describe_formulas, describe_row, format_updates
  from jgpt.inspect.updates import trace_updates
  from jgpt.runs.origin import Origin
  from jgpt.runs.text import find_run_data, parse_place
  from jgpt.weights.initial import find_initial

  experiment, workdir, num_steps = files.experiment, args.run, args.trace_steps
  data, _ = find_run_data(workdir, files, parse_place(args.set, files))
  initial = find_initial(files)
  rows = trace_updates(experiment, runtime.devices(), data, entry, num_steps, initial)
  continued = initial.location if isinstance(initial, Origin) else ""
  place = f"{entry.name}[{','.join(map(str, entry.index))}]"
  print(
    f"run         {workdir} from its initial weights: the first {num_steps} updates, made again"
  )
  row = describe_row(entry, files.tokenizer)
  print(f"number      {place}{row}; initially {rows[0].value_before:.6g}\n")
  print(f"{format_updates(entry, experiment.optimizer, rows)}\n")
  for label, line in describe_formulas(entry, experiment.optimizer, rows, continued):
    print(f"{label:<14}{line}")


# --- Arguments ---


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog="python -m jgpt.inspect",
    description="See into a run: without another option a table of its parameters, their gradients "
    "and updates; what it predicts for each token of a text; what each head attends to; or one "
    "number through its first updates.",
  )
  parser.add_argument(
    "--run",
    required=True,
    metavar="DIR",
    help="a run folder, as python -m jgpt.run leaves it, or one of its checkpoints/STEP",
  )
  parser.add_argument(
    "--text", metavar="TEXT", help="a text to predict, token by token; for names: one name"
  )
  parser.add_argument(
    "--attention",
    metavar="TEXT",
    help="a text to show attention on: a map for each layer and head, of what each token reads",
  )
  parser.add_argument(
    "--layer",
    type=_parse_layer,
    metavar="N",
    help=f"which layer's attention, counted from 0, or all (default: all, and over {MAX_MAPS} maps "
    "the mean of each layer's heads); in the table of parameters that layer alone, or with all a "
    "row for each layer",
  )
  parser.add_argument(
    "--out",
    type=lambda text: Path(os.path.expanduser(text)),
    metavar="PATH",
    help="a picture to write of all maps of attention, .svg or .png; needs the extra plot",
  )
  parser.add_argument(
    "--step",
    type=cli.parse_step,
    metavar="N",
    help="which checkpoint, or best: the saved one of the lowest held-out loss (default: newest)",
  )
  parser.add_argument(
    "--trace",
    metavar="PARAMETER[INDICES]",
    help="one number to follow from the run's first update on, for example 'tok_embed[4,2]', or "
    "'blocks/w_up[0,3,5]' where the first index is the layer",
  )
  cli.add_place_option(parser)
  parser.add_argument(
    "--trace-steps",
    type=int,
    default=10,
    metavar="N",
    help="updates to follow it through (default: 10)",
  )
  return parser


def _parse_layer(text: str) -> int | str:
  if text == "all":
    return text
  if not re.fullmatch("[0-9]+", text):
    raise argparse.ArgumentTypeError(f"{text!r} must be a layer's number from 0, or all")
  return int(text)
