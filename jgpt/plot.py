"""Runs `python -m jgpt.plot`: draws runs over each other, as an SVG or a PNG.

Arguments and writing. From Python call `plot_runs`, in `report/run_figure.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from jgpt import cli
from jgpt.errors import UserError, printable
from jgpt.report.curves import X_AXES


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  args = _parser().parse_args(argv)
  from jgpt.report.figures import render_figure
  from jgpt.report.run_figure import PANELS, plot_runs
  from jgpt.system.files import write_file

  out = _choose_out(args.run, args.out)
  figure = plot_runs(args.run, args.x)
  write_file(out, render_figure(figure, out.suffix))
  print(printable(f"wrote {out}: {PANELS}"))
  return 0


def _choose_out(runs: list[str], given: str | None) -> Path:
  """Returns the file to write: as given, or else plot.svg in the folder of the one run.

  Raises:
    UserError: if it cannot be written, or one was given that is there already.
  """
  from jgpt.report.figures import check_suffix
  from jgpt.runs.folder import PLOT_FILE, check_no_link
  from jgpt.runs.locate import locate_run

  if given is not None:
    out = Path(os.path.expanduser(given))
    check_suffix(out)
    if os.path.lexists(out):
      raise UserError(f"--out {out} is there already. Choose another name, or remove it")
    if not out.parent.is_dir():
      raise UserError(f"--out {out} cannot be written: {out.parent} is no folder. Make it first")
    return out
  if len(runs) > 1:
    raise UserError("a picture of several runs needs a place. Try --out plot.svg")
  workdir, step = locate_run(runs[0])
  if step is not None:
    raise UserError(
      f"a picture up to step {step:,} needs a place; {workdir / PLOT_FILE} is of the whole run. "
      f"Try --out step_{step}.svg"
    )
  check_no_link(workdir / PLOT_FILE)
  return workdir / PLOT_FILE


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog="python -m jgpt.plot",
    description="Draw runs over each other: losses, gradient norm, learning rate, tokens per "
    "second. They may be going on.",
  )
  parser.add_argument(
    "--run",
    required=True,
    action="append",
    metavar="DIR",
    help="a run folder, as python -m jgpt.run leaves it, or one of its checkpoints/STEP; repeat "
    "for more",
  )
  parser.add_argument(
    "--x",
    choices=X_AXES,
    default="step",
    help="what the axis counts: updates, tokens seen (padding not counted), or seconds of training "
    "(default: step)",
  )
  parser.add_argument(
    "--out",
    metavar="PATH",
    help="a new file ending in .svg or .png (default: plot.svg in the folder of the one run, which "
    "is replaced)",
  )
  return parser


if __name__ == "__main__":
  sys.exit(cli.guard(main))
