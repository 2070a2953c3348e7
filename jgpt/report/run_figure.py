"""The picture of runs: losses above; gradient norm, learning rate and tokens per second below.

What is drawn is computed in `curves.py`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jgpt.config import Expected
from jgpt.errors import UserError, printable, show
from jgpt.report.curves import (
  X_AXES,
  Curves,
  collect_curves,
  is_drawable,
  keep_evenly,
  keep_extremes,
  name_differences,
  smooth,
  spread,
)
from jgpt.report.figures import make_figure
from jgpt.runs.history import History, read_history
from jgpt.runs.rows import Series

if TYPE_CHECKING:  # matplotlib is an extra, and takes half a second to import
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

WIDTH, HEIGHT = 8.0, 5.2  # inches
LEFT, TOP, BOTTOM = 0.55, 0.66, 0.28  # inches around the panels
LOW_HEIGHT, UNDER, BESIDE = 1.05, 0.72, 0.6  # inches of the panels below, and between panels
LETTER, LINE = 0.07, 0.155  # inches, of an average letter and of a line of a label
PANELS = "losses, gradient norm, learning rate and tokens per second"  # what a picture shows
LEADER = 0.18  # inches from the panel of losses to the labels
LABEL_WIDTH = 28  # letters of a line of a label
# Okabe and Ito's colours, which colour-blind readers tell apart.
TRAINING, HELDOUT, EXPECTED, SKIPPED = "#0072B2", "#D55E00", "#007A5A", "#882255"
GUESSING = "#666666"
RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, GREY, PALE = "#222222", "#666666", "#E4E4E4"
MOST_POINTS = 12_000  # of all curves of a picture; an SVG has 20 to 30 bytes a point
MOST_DOTS, FEW_DOTS = 100, 30  # of the held-out losses of a run; more than few are small
OVER_GUESSING = 2.5  # times the loss of uniform guessing: higher losses are outside the picture
UNEVEN = 20  # gradient norms that differ by more than this factor have a logarithmic axis
X_WORDS = {
  "step": "step",
  "tokens": "tokens seen in training, padding not counted",
  "seconds": "seconds of training",
}


@dataclasses.dataclass(frozen=True)
class _Mark:
  """A label at the right of the losses, at the height of what it names."""

  y: float
  text: str
  color: str
  x: float | None = None  # where its curve ends; None for what reaches over the whole panel


def plot_runs(runs: str | Path | Sequence[str | Path], x: str = "step") -> Figure:
  """Draws the losses, gradient norms, learning rates and speeds of runs over each other.

  Args:
    runs: run folders, or their checkpoints/STEP: then up to that step. A single one may stand
      alone.
    x: "step", "tokens" (seen, padding not counted) or "seconds" (of training).

  Returns:
    A figure, which a notebook shows; `savefig` writes it.

  Raises:
    UserError: if matplotlib is not installed, or one of the runs cannot be read or has no metrics.

  Example:
    >>> figure = jgpt.plot_runs(["runs/names"])
    >>> len(figure.axes)
  """
  runs = [runs] if isinstance(runs, str | Path) else runs
  return draw_runs([read_history(run) for run in runs], x)


def draw_runs(runs: Sequence[History], x: str = "step") -> Figure:
  """Draws runs as `plot_runs` does.

  Args:
    runs: from `read_history`.
    x: one of `X_AXES`.

  Raises:
    UserError: as `plot_runs`.
  """
  if x not in X_AXES:
    raise UserError(f"x={show(x)} must be one of {', '.join(X_AXES)}")
  if not runs:
    raise UserError("there is no run to draw: name at least one run folder")
  figure = make_figure(WIDTH, HEIGHT)
  figure.set_layout_engine("none")
  curves = [collect_curves(run) for run in runs]
  for found in curves:
    _check_drawable(found, x)
  colors = _choose_colors(len(runs))
  marks = _list_marks(curves, colors, x)
  letters = max(len(line) for mark in marks for line in mark.text.split("\n"))
  losses, *below = _place_axes(figure, LEADER + LETTER * letters + 0.07)
  _draw_losses(losses, curves, colors, marks, x)
  _draw_norms(below[0], curves, colors, x)
  _draw_series(below[1], "learning rate", [c.rate for c in curves], curves, colors, x)
  speeds = [c.tokens_per_second for c in curves]
  _draw_series(below[2], "tokens per second", speeds, curves, colors, x)
  _write_title(figure, losses, curves)
  return figure


def _check_drawable(found: Curves, x: str) -> None:
  """Checks that a run has something to draw over x.

  Raises:
    UserError: otherwise.
  """
  workdir = found.run.workdir
  if not len(found.losses.steps) and not len(found.heldout.steps):
    raise UserError(
      f"{workdir} has no metrics, so there is nothing to draw. They are written from the first "
      f"update on: {workdir / 'metrics.jsonl'}"
    )
  if x != "step" and len(found.losses.steps) and len(found.clock[0]) < 2:
    raise UserError(
      f"{workdir / 'metrics.jsonl'} has no rows that count {x}: an older jgpt wrote it. Try --x "
      "step"
    )


# --- Losses ---


def _draw_losses(
  ax: Axes, curves: Sequence[Curves], colors: Sequence[str], marks: Sequence[_Mark], x: str
) -> None:
  low, high = _find_limits(curves)
  is_alone = len(curves) == 1
  for i, (found, color) in enumerate(zip(curves, colors, strict=True)):
    if is_alone:
      _draw_raw(ax, found, found.losses, "loss", x)
    at, values = keep_evenly(
      found.locate(found.losses.steps, x), found.smoothed.values, _count_points(curves)
    )
    line = {"color": color, "lw": 1.6, "zorder": 3, "gid": f"training-{i}"}
    ax.plot(at, values, **line, **_dot_if_alone(values))
    if is_alone and found.num_last > 1:
      steps = found.losses.steps[is_drawable(found.losses.values)][-found.num_last :]
      at = found.locate(steps[[0, -1]], x)
      ax.plot(at, [found.training_loss] * 2, color=color, lw=1.0, zorder=3, gid=f"last-{i}")
    at, values = keep_evenly(found.locate(found.heldout.steps, x), found.heldout.values, MOST_DOTS)
    dots = {"ms": 5, "mew": 0.8} if len(at) <= FEW_DOTS else {"ms": 3, "mew": 0.3}
    dots |= {"color": HELDOUT if is_alone else color, "mec": "white", "gid": f"heldout-{i}"}
    ax.plot(at, values, "o", **dots, zorder=4, clip_on=False)
    if len(found.skipped):
      at, _ = keep_evenly(found.locate(found.skipped, x), found.skipped, _count_points(curves))
      ticks = {"color": SKIPPED if is_alone else color, "ms": 9, "mew": 1.0}
      ticks |= {"gid": f"skipped-{i}", "transform": ax.get_xaxis_transform()}
      ax.plot(at, np.zeros(len(at)), "|", **ticks, zorder=5)
  for i, expected in enumerate(_list_expected(curves)):
    centre, band = expected.loss_nats_per_token, expected.band
    shade = _mix(EXPECTED if is_alone else GREY, 0.22)
    area = ax.axhspan(centre - band, centre + band, color=shade, lw=0, zorder=0.5)
    area.set_gid(f"expected-{i}")
  for i, guessing in enumerate(sorted({c.guessing for c in curves})):
    dashes = {"color": GUESSING, "lw": 1.0, "ls": (0, (4, 3)), "gid": f"guessing-{i}"}
    ax.axhline(guessing, **dashes, zorder=2)
  ax.set_ylim(low, high)
  _style(ax, curves, x, ticks=6)
  ax.set_xlabel(X_WORDS[x], color=GREY, fontsize=8.5, labelpad=2)
  _write_marks(ax, marks, low, high)


def _draw_raw(ax: Axes, found: Curves, series: Series, name: str, x: str) -> None:
  """Draws the values behind a smoothed curve; none where it is not smoothed."""
  if found.half_window:
    values = np.where(is_drawable(series.values), series.values, np.nan)
    at, values = keep_extremes(found.locate(series.steps, x), values, _count_points([found]))
    ax.plot(at, values, color=_mix(TRAINING), lw=0.5, gid=f"each-{name}")


def _list_expected(curves: Sequence[Curves]) -> list[Expected]:
  """Lists the results that runs expect, each once."""
  found = {c.expected for c in curves if c.expected}
  return sorted(found, key=lambda expected: expected.loss_nats_per_token)


def _find_limits(curves: Sequence[Curves]) -> tuple[float, float]:
  """Finds the range of losses that is drawn: all but single high and low losses."""
  ceiling = OVER_GUESSING * max(c.guessing for c in curves)
  values = [c.guessing for c in curves]
  for found in curves:
    raw = found.losses.values[np.abs(found.losses.values) < ceiling]  # NaN is not
    values += [*np.quantile(raw, [0.01, 0.99])] if len(raw) and len(curves) == 1 else []
    last = np.array([found.training_loss] if len(curves) == 1 and found.num_last else [])
    for drawn in (found.smoothed.values, found.heldout.values, last):
      inside = drawn[np.abs(drawn) < ceiling]
      values += [inside.min(), inside.max()] if len(inside) else []
    if found.expected:
      band = found.expected.band
      values += [found.expected.loss_nats_per_token + sign * band for sign in (-1, 1)]
  margin = 0.04 * max(max(values) - min(values), 0.1)
  return min(values) - margin, max(values) + margin


def _list_marks(curves: Sequence[Curves], colors: Sequence[str], x: str) -> list[_Mark]:
  """Lists the labels at the right of the losses."""
  marks = []
  if len(curves) == 1:
    (found,) = curves
    if end := _find_end(found, found.smoothed, x):
      loss = found.training_loss
      marks.append(_Mark(loss, f"training {_format_loss(loss)}", TRAINING, end[0]))
    if end := _find_end(found, found.heldout, x):
      marks.append(_Mark(end[1], f"held out {_format_loss(end[1])}", HELDOUT, end[0]))
    if len(found.skipped):
      marks.append(_Mark(-math.inf, f"{len(found.skipped):,} skipped", SKIPPED))
  else:
    folders = [_name_folder(c.run) for c in curves]
    labels = name_differences([c.run.experiment for c in curves], folders)
    for found, label, color in zip(curves, labels, colors, strict=True):
      last = _find_end(found, found.heldout, x)
      if end := _find_end(found, found.smoothed, x) or last:
        loss = last[1] if last else found.training_loss
        marks.append(_Mark(end[1], _wrap(f"{label}: {_format_loss(loss)}"), color, end[0]))
  for expected in _list_expected(curves):
    centre = expected.loss_nats_per_token
    color = EXPECTED if len(curves) == 1 else GREY
    marks.append(_Mark(centre, f"expected {centre:.2f} ± {expected.band:.2f}", color))
  for guessing in sorted({c.guessing for c in curves}):
    marks.append(_Mark(guessing, f"guessing {guessing:.2f}", GUESSING))
  return marks


def _find_end(found: Curves, series: Series, x: str) -> tuple[float, float] | None:
  """Finds the last finite value of a series, and its x; None where none is finite."""
  finite = np.flatnonzero(np.isfinite(series.values))
  if not len(finite):
    return None
  return float(found.locate(series.steps[finite[-1:]], x)[0]), float(series.values[finite[-1]])


def _write_marks(ax: Axes, marks: Sequence[_Mark], low: float, high: float) -> None:
  """Writes the labels at the right of the losses, moved apart, each with a line to its curve."""
  inches = ax.get_position().height * HEIGHT
  places = [min(1.0, max(0.0, (mark.y - low) / (high - low))) * inches for mark in marks]
  heights = [LINE * (1 + mark.text.count("\n")) for mark in marks]
  for mark, place, middle in zip(
    marks, places, spread(places, heights, -0.1, inches + 0.1), strict=True
  ):
    # A line from further left would cross the panel.
    is_near = mark.x is None or mark.x > 0.9 * ax.get_xlim()[1]
    line = {"arrowstyle": "-", "color": _mix(mark.color, 0.6), "lw": 0.6, "relpos": (0, 0.5)}
    ax.annotate(
      mark.text,
      xy=(1.0 if mark.x is None else mark.x, place / inches),
      xycoords=("axes fraction" if mark.x is None else "data", "axes fraction"),
      xytext=(1 + LEADER / (ax.get_position().width * WIDTH), middle / inches),
      textcoords="axes fraction",
      color=mark.color,
      fontsize=8.5,
      va="center",
      linespacing=1.05,
      parse_math=False,
      annotation_clip=False,
      arrowprops={**line, "shrinkA": 1.5, "shrinkB": 3 * (mark.x is not None)} if is_near else None,
    )


# --- The panels below ---


def _draw_norms(ax: Axes, curves: Sequence[Curves], colors: Sequence[str], x: str) -> None:
  """Draws gradient norms smoothed as losses are, over a logarithmic axis where they differ much."""
  norms = [c.grad_norm for c in curves]
  smoothed = [
    Series(norm.steps, smooth(norm.values, found.half_window))
    for norm, found in zip(norms, curves, strict=True)
  ]
  _draw_series(ax, "gradient norm", smoothed, curves, colors, x)
  if len(curves) == 1:
    _draw_raw(ax, curves[0], norms[0], "norm", x)
  positive = np.concatenate([n.values[is_drawable(n.values) & (n.values > 0)] for n in norms])
  if not len(positive):
    return
  low, high = np.quantile(positive, [0.01, 0.99])
  if high > UNEVEN * low:
    ax.set_yscale("log")
    ax.set_ylim(low / 2, 2 * high)
  else:
    ax.set_ylim(0, 1.2 * high)


def _draw_series(
  ax: Axes,
  title: str,
  series: Sequence[Series],
  curves: Sequence[Curves],
  colors: Sequence[str],
  x: str,
) -> None:
  """Draws one series of each run in a panel of its own, over an axis that begins at 0."""
  top = 0.0
  for i, ((steps, values), found, color) in enumerate(zip(series, curves, colors, strict=True)):
    at, values = keep_extremes(found.locate(steps, x), values, _count_points(curves))
    line = {"color": color, "lw": 1.2, "zorder": 3, "gid": f"{title.replace(' ', '-')}-{i}"}
    ax.plot(at, values, **line, **_dot_if_alone(values))
    top = max([top, *values[np.isfinite(values)]])
  ax.set_ylim(0, 1.1 * top or 1)
  ax.set_title(title, loc="left", fontsize=8.5, color=INK, pad=4)
  _style(ax, curves, x, ticks=4)
  if not top:
    ax.set_yticks([])
    ax.text(0.5, 0.5, "none", transform=ax.transAxes, ha="center", color=GREY, fontsize=8.5)


# --- All panels ---


def _place_axes(figure: Figure, right: float) -> list[Axes]:
  """Places the panel of losses, with so many inches at its right, and three panels below."""
  low_top = BOTTOM + LOW_HEIGHT
  losses = (LEFT, low_top + UNDER, WIDTH - LEFT - right, HEIGHT - TOP - low_top - UNDER)
  width = (WIDTH - LEFT - 0.2 - 2 * BESIDE) / 3
  below = [(LEFT + i * (width + BESIDE), BOTTOM, width, LOW_HEIGHT) for i in range(3)]
  scale = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT])
  return [figure.add_axes(tuple(np.array(box) / scale)) for box in (losses, *below)]


def _style(ax: Axes, curves: Sequence[Curves], x: str, ticks: int) -> None:
  """Sets what panels have in common: x from 0 to the longest run's end, thin lines, few ticks."""
  from matplotlib.ticker import FuncFormatter, MaxNLocator

  end = max(float(found.locate(np.array([found.last_step]), x)[0]) for found in curves)
  ax.set_xlim(0, 1.01 * end or 1)
  for axis, is_count in ((ax.xaxis, x != "seconds"), (ax.yaxis, False)):
    steps = [1, 2, 5, 10] if is_count else [1, 2, 2.5, 5, 10]
    axis.set_major_locator(MaxNLocator(ticks, steps=steps, min_n_ticks=2, integer=is_count))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
  ax.spines[["top", "right", "left"]].set_visible(False)
  ax.spines["bottom"].set_color(GREY)
  ax.tick_params(colors=GREY, labelsize=8, length=2.5)
  ax.tick_params(axis="y", length=0, pad=2)
  ax.grid(axis="y", color=PALE, lw=0.6)
  ax.set_axisbelow(True)


def _write_title(figure: Figure, losses: Axes, curves: Sequence[Curves]) -> None:
  """Writes what the runs are, and what the lines and dots of the losses are."""
  names = {c.run.name for c in curves} - {""}
  name = names.pop() if len(names) == 1 else ""
  if len(curves) == 1:
    folder = _name_folder(curves[0].run)
    name = shorten_name(folder if folder.startswith(name) else f"{name} ({folder})")
    done, steps = curves[0].last_step, curves[0].run.experiment.train.steps or 0
    length = f"{done:,} updates" if done >= steps else f"step {done:,} of {steps:,}"
    title = f"{name}: {length}"
  else:
    title = f"{shorten_name(name)}: {len(curves)} runs" if name else f"{len(curves)} runs"
  words = [_describe_line(curves)]
  if curves[0].half_window and len(curves) == 1:
    words.append("pale: each update")
  if any(len(c.heldout.steps) for c in curves):
    words.append(f"dots: held out{', the last as a number' * (len(curves) > 1)}")
  if len(curves) > 1 and any(len(c.skipped) for c in curves):
    words.append("ticks: skipped updates")
  where = {"x": LEFT / WIDTH - 0.035, "color": INK, "parse_math": False}
  figure.text(y=1 - 0.24 / HEIGHT, s=title, fontsize=11, weight="bold", **where)
  text = figure.text(y=1 - 0.5 / HEIGHT, s="loss, nats per token", fontsize=8.5, **where)
  losses.annotate(
    "; ".join(words),
    xy=(1, 0),
    xycoords=text,
    xytext=(9, 0),  # blanks at the start of an SVG's text would be lost
    textcoords="offset points",
    fontsize=8.5,
    color=GREY,
    va="bottom",
    annotation_clip=False,
  )


def _describe_line(curves: Sequence[Curves]) -> str:
  """Describes of how many updates the lines of training losses are means, and their numbers."""
  trained = [found for found in curves if found.training_loss is not None]
  windows = [2 * found.half_window + 1 for found in trained]
  is_smoothed = max(windows, default=1) > 1
  line = (
    f"line: training, mean of {_format_range(windows)} updates" if is_smoothed else "line: training"
  )
  numbers = [c.num_last for c in trained if len(curves) == 1 or not len(c.heldout.steps)]
  if max(numbers, default=1) == 1:
    return line
  which = "thin" if len(curves) == 1 else "number"
  return f"{line} ({which}: {'' if is_smoothed else 'mean of the '}last {_format_range(numbers)})"


def _format_range(counts: Sequence[int]) -> str:
  """Formats counts, of which there is one at least: "5", "3 to 11"."""
  low, high = min(counts), max(counts)
  return f"{low:,} to {high:,}" if low < high else f"{low:,}"


def _count_points(curves: Sequence[Curves]) -> int:
  """Counts the points that each curve of a picture may have."""
  return max(60, min(1000, MOST_POINTS // (5 * len(curves))))


def _choose_colors(number: int) -> list[str]:
  """Chooses a colour for each run; more than seven have shades from dark to light."""
  if number <= len(RUN_COLORS):
    return list(RUN_COLORS[:number])
  from matplotlib import colormaps
  from matplotlib.colors import to_hex

  return [to_hex(colormaps["viridis"](0.9 * i / number)) for i in range(number)]


def _name_folder(run: History) -> str:
  """Returns the name of a run's folder, printable."""
  return printable(Path(os.path.abspath(run.workdir)).name)


def _mix(color: str, share: float = 0.35) -> str:
  """Returns a colour mixed with white."""
  parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
  return "#" + "".join(f"{round(255 - share * (255 - part)):02X}" for part in parts)


def _dot_if_alone(values: np.ndarray) -> dict[str, Any]:
  """Returns how a curve of a single point is drawn: a line would not be seen."""
  return {"marker": "o", "ms": 4, "clip_on": False} if np.isfinite(values).sum() == 1 else {}


def _format_loss(loss: float) -> str:
  return f"{loss:.2f}" if abs(loss) < 1000 else f"{loss:.1e}"


def format_tick(value: float) -> str:
  """Formats a number of an axis: "0.0003", "1,500", "20k", "1.5M"."""
  for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
    if abs(value) >= size:
      return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
  return f"{value:,g}"


def shorten_name(name: str) -> str:
  """Cuts a name to 60 characters."""
  return name if len(name) <= 60 else f"{name[:59]}…"


def _wrap(text: str) -> str:
  """Divides a label into lines, at most three of them, after commas and spaces where there are."""
  pieces = re.findall(r"[^, ]*[, ]*", text)
  lines = [""]
  for piece in pieces:
    if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > LABEL_WIDTH:
      lines.append("")
    lines[-1] += piece
  lines = [part for line in lines for part in textwrap.wrap(line, LABEL_WIDTH)]
  return "\n".join([*lines[:2], f"…{lines[-1][1:]}"] if len(lines) > 3 else lines)
