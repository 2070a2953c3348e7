"""Pictures as files: what every picture of jgpt needs of matplotlib, the extra `plot`.

Figures are made without pyplot, which would choose a window system and keep every figure in memory.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from jgpt.errors import UserError

if TYPE_CHECKING:  # matplotlib is an extra, and takes half a second to import
  from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")


def can_draw() -> bool:
  """Returns whether matplotlib is installed."""
  return importlib.util.find_spec("matplotlib") is not None


def make_figure(width: float = 8.0, height: float = 4.5) -> Figure:
  """Makes an empty figure with `constrained` layout, of a size in inches.

  Raises:
    UserError: if matplotlib is not installed.
  """
  if not can_draw():
    raise UserError(
      "pictures need the package `matplotlib`. Try pip install matplotlib, or install jgpt with "
      "its extra plot"
    )
  log = logging.getLogger("matplotlib")
  level = log.level
  log.setLevel(logging.ERROR)  # the first import on a machine lists its fonts, and may say so
  try:
    from matplotlib.figure import Figure
  finally:
    log.setLevel(level)
  return Figure(figsize=(width, height), layout="constrained")


def check_suffix(path: Path) -> None:
  """Checks that a picture's name ends in .svg or .png.

  Raises:
    UserError: if it does not.
  """
  if path.suffix.lower() not in SUFFIXES:
    raise UserError(
      f"{path} must end in .svg or .png, which says what is written. Try --out "
      f"{path.with_suffix('.svg').name}"
    )


def render_figure(figure: Figure, suffix: str) -> bytes:
  """Returns a picture's file; equal figures give equal bytes with one version of matplotlib.

  In an SVG letters are text, in the reader's sans-serif font: small, selectable, and read aloud.

  Args:
    figure: to draw.
    suffix: of the file, one of `SUFFIXES`.
  """
  import matplotlib

  name = suffix.lower().removeprefix(".")
  no_date = {"svg": {"Date": None, "Creator": "jgpt"}, "png": {"Software": "jgpt"}}
  settings, file = {"svg.hashsalt": "jgpt", "svg.fonttype": "none"}, io.BytesIO()
  with matplotlib.rc_context(settings), warnings.catch_warnings():
    # Of letters that matplotlib's own font lacks; the reader's font may have them.
    warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
    figure.savefig(file, format=name, dpi=150, metadata=no_date[name], facecolor="white")
  return file.getvalue()
