"""The table of one number's first updates, and the formulas of its columns.

The rows come from `updates.py`; `cli.py` prints them.
"""

from __future__ import annotations

from collections.abc import Sequence

from jgpt.config import OptimizerConfig
from jgpt.inspect.predictions import show_token
from jgpt.inspect.updates import Update
from jgpt.params import Entry
from jgpt.report.tables import format_table
from jgpt.text.tokenizer import Tokenizer


def describe_row(entry: Entry, tokenizer: Tokenizer) -> str:
  """Describes the token of an entry of the embeddings or the head: ", in the row of 'e'".

  "" for other parameters.
  """
  if entry.param.axes[0] != "vocab":
    return ""
  return f", in the row of {show_token(entry.index[0], tokenizer)}"


def format_updates(entry: Entry, optimizer: OptimizerConfig, rows: Sequence[Update]) -> str:
  """Formats a table with a row for each update, and columns for what the optimizer computes.

  Adam's t has a column where it is not the step, and decay where the number decays, before the
  moments that it is in. Of a skipped update "skipped" stands for a number.
  """
  names = [*_list_columns(entry, optimizer), "rate", "update"]
  header, cells = ["step", "loss", *names, "value"], [_format_cells(row, names) for row in rows]
  if _has_t(rows):
    header.insert(1, "t")
    for row, line in zip(rows, cells, strict=True):
      line.insert(1, str(row.t))
  return format_table([header, *cells], ["right"] * len(header))


def _list_columns(entry: Entry, optimizer: OptimizerConfig) -> list[str]:
  """Lists the attributes of `Update` that an optimizer computes an update from."""
  decay = ["decay"] if _is_decayed(entry, optimizer) else []
  if optimizer.name == "adamw":
    return ["gradient", "m", "v", "m_hat", "v_hat", *decay]
  if optimizer.name == "adam":
    return ["gradient", *decay, "m", "v", "m_hat", "v_hat"]
  if optimizer.momentum:
    return ["gradient", *decay, "m"]
  return ["gradient", *decay]


def _format_cells(row: Update, names: Sequence[str]) -> list[str]:
  numbers = [f"{getattr(row, name):.4g}" for name in names]
  if row.is_skipped:
    numbers[names.index("update")] = "skipped"
  return [str(row.step), f"{row.loss:.4f}", *numbers, f"{row.value:.6g}"]


def describe_formulas(
  entry: Entry, optimizer: OptimizerConfig, rows: Sequence[Update], continued: str = ""
) -> list[tuple[str, str]]:
  """Describes how each column is computed, as labelled lines with the run's numbers.

  Args:
    entry: of the parameters.
    optimizer: of the run.
    rows: of the table.
    continued: the run and the step that this run continues, `Origin.location`; "" where it
      continues none.
  """
  decays = _is_decayed(entry, optimizer)
  decay = f"{optimizer.weight_decay:g} × value before" if decays else "none on this number"
  is_l2 = decays and optimizer.name != "adamw"
  g = "(gradient + decay)" if is_l2 else "gradient"
  if optimizer.name == "sgd":
    reader, moments = "SGD", _describe_momentum(optimizer, g, continued)
    update = "m" if optimizer.momentum else g
  else:
    reader, moments = "Adam", _describe_moments(optimizer, g, rows)
    update = f"m_hat / (√v_hat + {optimizer.eps:g})"
    if decays and not is_l2:
      update = f"({update} + decay)"
  clipped = ""
  if optimizer.clip_norm is not None:
    clipped = f", all of them clipped to a norm of {optimizer.clip_norm:g}"
  lines = [
    ("loss", "of the batch, before the update"),
    (
      "gradient",
      f"of that loss, as {reader} sees it{clipped}; 0 where the batch does not use the number",
    ),
  ]
  if _has_t(rows):
    lines.insert(0, ("t", "updates that Adam has applied; a skipped one changes no moment"))
  if is_l2:
    lines += [("decay", f"{decay}, added to the gradient: L2"), *moments]
  else:
    lines += [*moments, ("decay", decay)]
  return [*lines, ("update", f"-rate × {update}"), ("value", "the value before + update")]


def _describe_momentum(optimizer: OptimizerConfig, g: str, continued: str) -> list[tuple[str, str]]:
  """Describes the moment of sgd, of gradients that are written g."""
  if not optimizer.momentum:
    return []
  begin = f"it begins as {continued} left it" if continued else "it begins at 0"
  return [("m", f"m = {optimizer.momentum:g} m + {g}; {begin}")]


def _describe_moments(
  optimizer: OptimizerConfig, g: str, rows: Sequence[Update]
) -> list[tuple[str, str]]:
  """Describes the moments of the two Adams, of gradients that are written g."""
  b1, b2, t = optimizer.b1, optimizer.b2, "t" if _has_t(rows) else "step"
  # Of a run that continues another, t and the moments are that one's at first.
  num = rows[0].t - (not rows[0].is_skipped)
  begin = f"both begin as the moments of {num:,} updates" if num else "both begin at 0"
  return [
    ("m, v", f"m = {b1:g} m + {1 - b1:g} {g}; v = {b2:g} v + {1 - b2:g} {g}^2; {begin}"),
    (
      "m_hat, v_hat",
      f"m / (1 - {b1:g}^{t}), v / (1 - {b2:g}^{t}): corrected for a beginning at 0",
    ),
  ]


def _has_t(rows: Sequence[Update]) -> bool:
  """Returns whether Adam's count is not the step somewhere; of sgd it is."""
  return any(row.t != row.step for row in rows)


def _is_decayed(entry: Entry, optimizer: OptimizerConfig) -> bool:
  return bool(optimizer.weight_decay) and entry.param.kind in optimizer.decay_kinds
