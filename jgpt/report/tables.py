"""Tables of cells, for a terminal and for a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence

HTML_STYLE = "font-family: monospace; padding: 1px 10px; white-space: pre"


def format_table(rows: Sequence[Sequence[str]], sides: Sequence[str], gap: int = 2) -> str:
  """Formats cells in columns.

  Args:
    rows: of cells.
    sides: of each column, "left" or "right".
    gap: blanks between columns.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  signs = [">" if side == "right" else "<" for side in sides]
  lines = [
    [f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=True)]
    for row in rows
  ]
  return "\n".join((" " * gap).join(line).rstrip() for line in lines)


def format_html_table(
  rows: Sequence[Sequence[str]], sides: Sequence[str], caption: str = ""
) -> str:
  """Formats cells as an HTML table whose first row is its header; cells are escaped.

  A notebook shows it with `IPython.display.HTML`.

  Args:
    rows: of cells.
    sides: of each column, "left" or "right".
    caption: shown above the table.
  """

  def format_row(tag: str, row: Sequence[str]) -> str:
    cells = [
      f'<{tag} style="text-align: {side}; {HTML_STYLE}">{html.escape(cell)}</{tag}>'
      for cell, side in zip(row, sides, strict=True)
    ]
    return f"<tr>{''.join(cells)}</tr>"

  header, *body = rows
  title = f'<caption style="text-align: left">{html.escape(caption)}</caption>' if caption else ""
  head = f"<thead>{format_row('th', header)}</thead>"
  lines = "".join(format_row("td", row) for row in body)
  return f"<table>{title}{head}<tbody>{lines}</tbody></table>"
