"""Attention's probabilities as maps: shades for a terminal, a figure for a file or a notebook.

They come from `model.trace`. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jgpt.report.figures import make_figure

if TYPE_CHECKING:  # matplotlib is an extra, and takes half a second to import
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

SHADES = "·░▒▓█"
# Where each shade but the first begins: of a short text in probability, of one that is longer in
# even attention, 1/n to each of the n tokens that a row reads, which there is below 0.05.
FEW_TOKENS = 20
BOUNDS = (0.05, 0.2, 0.4, 0.7)
EVEN_BOUNDS = (0.5, 0.8, 1.25, 3.0)
BETWEEN = 3  # blanks between maps that stand side by side
MAX_LABEL = 8  # characters of a label, which columns write from top to bottom
ABSENT = "0.93"  # grey of what cannot be read, beside the almost white of probability 0


def format_attention(
  weights_LNTS: np.ndarray, labels: Sequence[str], *, width: int = 80, first_layer: int = 0
) -> str:
  """Formats a map of shades for each layer and head, side by side as the width allows.

  Args:
    weights_LNTS: probabilities [L, N, T, S] of one sequence, S = T, that T reads from S; those of
      S > T are not looked at.
    labels: of the T tokens, for rows and columns.
    width: characters of a line.
    first_layer: the number of the first of the L layers.

  Returns:
    Lines: how to read it, and then for each layer its heads.

  Example:
    >>> found = jax.device_get(model.trace(run.params, tokens_BT, run.experiment))
    >>> print(format_attention(found.attention_LBNTS[:, 0], ["BOS", *"emma"]))
  """
  parts = [describe_shades(len(labels))]
  for layer, weights_NTS in enumerate(np.asarray(weights_LNTS), first_layer):
    titles = [f"head {head}" for head in range(len(weights_NTS))]
    parts.append(f"layer {layer}\n{format_maps(weights_NTS, titles, labels, width=width)}")
  return "\n\n".join(parts)


def describe_shades(num_tokens: int) -> str:
  """Describes how to read a map of a text of so many tokens."""
  if num_tokens <= FEW_TOKENS:
    bounds, unit, most = BOUNDS, "A row sums to 1:  ", "to 1"
  else:
    unit = "Even attention gives each of a row's n cells 1/n. In multiples of that:\n"
    bounds, most = EVEN_BOUNDS, "more"
  words = [f"below {bounds[0]:g}", *(f"to {bound:g}" for bound in bounds[1:]), most]
  shades = "  ".join(f"{mark} {word}" for mark, word in zip(SHADES, words, strict=True))
  return (
    "each row is a token that reads, its columns what it reads from: itself and what came before.\n"
    f"{unit}{shades}"
  )


def format_maps(
  maps_MTS: np.ndarray, titles: Sequence[str], labels: Sequence[str], *, width: int = 80
) -> str:
  """Formats maps of one text side by side, in as many rows of maps as the width needs.

  A cell is two characters wide, which is about square, or one where that is too wide; of a text
  that is longer still the first tokens are shown, and a line says so. `describe_shades` says what a
  shade is.

  Args:
    maps_MTS: probabilities [M, T, S].
    titles: of each map.
    labels: of the T tokens.
    width: characters of a line.
  """
  maps_MTS, num_tokens = np.asarray(maps_MTS), len(labels)
  short = [cut_label(label) for label in labels]
  margin = max(map(len, short)) + 1
  values_MTS, bounds = maps_MTS, BOUNDS
  if num_tokens > FEW_TOKENS:
    values_MTS, bounds = maps_MTS * np.arange(1, num_tokens + 1)[:, None], EVEN_BOUNDS
  cell = 2 if margin + 2 * num_tokens <= width else 1
  shown = max(1, min(num_tokens, (width - margin) // cell))
  size = max(cell * shown, *map(len, titles))
  per_line = max(1, (width - margin + BETWEEN) // (size + BETWEEN))
  header = _write_downwards(short[:shown], cell)
  groups = []
  for begin in range(0, len(titles), per_line):
    heads = range(begin, min(begin + per_line, len(titles)))
    lines = [("", [titles[i] for i in heads]), *(("", [line for _ in heads]) for line in header)]
    lines += [
      (short[t], [_shade(values_MTS[i, t, : t + 1], bounds, cell) for i in heads])
      for t in range(shown)
    ]
    groups.append(
      "\n".join(
        f"{name:>{margin - 1}} {(' ' * BETWEEN).join(f'{line:{size}}' for line in parts)}".rstrip()
        for name, parts in lines
      )
    )
  if shown < num_tokens:
    groups.append(f"the first {shown} of {num_tokens} tokens, as many as {width} columns hold")
  return "\n\n".join(groups)


def cut_label(label: str) -> str:
  """Cuts a label that is longer than `MAX_LABEL` characters, and ends it with an ellipsis."""
  return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"


def _shade(values: np.ndarray, bounds: Sequence[float], cell: int) -> str:
  """Returns a row's shades; a dot stays narrow, so that it does not look like a shade."""
  marks = [SHADES[i] for i in np.searchsorted(bounds, values, side="right")]
  return "".join(f"{mark:<{cell}}" if mark == "·" else mark * cell for mark in marks)


def _write_downwards(labels: Sequence[str], cell: int) -> list[str]:
  """Returns the lines that write each label from top to bottom above its column."""
  height = max(map(len, labels))
  return [
    "".join(f"{label.rjust(height)[i]:<{cell}}" for label in labels).rstrip() for i in range(height)
  ]


def draw_attention(weights_LNTS: np.ndarray, labels: Sequence[str]) -> Figure:
  """Draws a map for each layer and head, with one scale of colours from 0 to 1.

  Rows of maps are layers, and columns are heads; the heads of a single layer are divided over
  several rows. What a token cannot read, because it comes later, is grey.

  Args:
    weights_LNTS: probabilities [L, N, T, S] of one sequence, S = T, that T reads from S; those of
      S > T are not looked at.
    labels: of the T tokens.

  Raises:
    UserError: if matplotlib is not installed.
  """
  num_layers, num_heads, num_tokens, _ = np.shape(weights_LNTS)
  columns = num_heads if num_layers > 1 else min(num_heads, 4)
  rows = num_layers * -(-num_heads // columns)
  # Inches of a map, large where maps are few, and of the space to its right and above its title. In
  # the axes' units a map is 1 wide: one axes for all, because 144 took matplotlib 20 seconds.
  side = min(5.0 if columns == 1 else 3.0, max(1.1, 13 / columns))
  size = 12 if side > 1.5 else 7
  step_x, step_y = 1 + 0.12 / side, 1 + 0.36 / side
  figure = make_figure(side * step_x * columns + 1.5, side * step_y * rows + 0.8)
  import matplotlib

  ax = figure.subplots()
  later_TS = np.triu(np.ones((num_tokens, num_tokens), bool), 1)
  colors = matplotlib.colormaps["Blues"].with_extremes(bad=ABSENT)
  image = None
  for i in range(num_layers * num_heads):
    layer, head = divmod(i, num_heads)
    x, y = i % columns * step_x, i // columns * step_y
    image = ax.imshow(
      np.ma.masked_array(weights_LNTS[layer][head], later_TS),
      extent=(x, x + 1, y + 1, y),
      vmin=0,
      vmax=1,
      cmap=colors,
      interpolation="nearest",
    )
    ax.text(
      x + 0.5, y - 0.03, f"layer {layer}, head {head}", ha="center", va="bottom", fontsize=size
    )
  _label_edges(ax, labels, (columns, step_x), (rows, step_y), side)
  height = min(1.0, 5 / (side * rows))
  figure.colorbar(image, ax=ax, label="attention probability", shrink=height, aspect=30, pad=0.01)
  return figure


def _label_edges(
  ax: Axes,
  labels: Sequence[str],
  across: tuple[int, float],
  down: tuple[int, float],
  side: float,
) -> None:
  """Writes the tokens left of the first maps and below the last, and what the axes are.

  Args:
    ax: in whose units a map is 1 wide.
    labels: of the tokens.
    across: how many maps stand side by side, and from one to the next how far it is.
    down: likewise of maps one below the other.
    side: inches of a map.
  """
  num_tokens = len(labels)
  # Labels of at least 5 points; where the tokens are too many for that, some have none.
  shown = range(0, num_tokens, math.ceil(num_tokens * 5 / (72 * side)))
  names = [cut_label(labels[t]).replace("$", r"\$") for t in shown]  # not mathematics
  space = 72 * side / len(shown)  # points between labels
  flat = space / (0.7 * max(map(len, names)))  # the largest letters that fit beside each other
  rotation = 0 if flat >= min(7.0, 0.9 * space) else 90
  font = min(12.0, 0.9 * space, 12.0 if rotation else flat)
  xs, ys = (
    [i * step + (t + 0.5) / num_tokens for i in range(num) for t in shown]
    for num, step in (across, down)
  )
  ax.set_xticks(xs, names * across[0], fontsize=font, rotation=rotation)
  ax.set_yticks(ys, names * down[0], fontsize=font)
  ax.tick_params(length=0)
  ax.spines[:].set_visible(False)
  ax.set_xlim(0, (across[0] - 1) * across[1] + 1)
  ax.set_ylim((down[0] - 1) * down[1] + 1, 0)
  ax.set_xlabel("token that is read (grey: comes later, cannot be read)", fontsize=12)
  ax.set_ylabel("token that reads", fontsize=12)
