"""Looks into a run: parameters, predictions and attention for a text, one number's first updates.

`python -m jgpt.inspect` prints them (`cli.py`). From Python call `measure_params`, in
`parameters.py`, with `compute_next_update`, in `gradients.py`; `predict`, in `predictions.py`;
`format_attention` and `draw_attention`, in `attention.py`; and `trace_updates`, in `updates.py`.
Importing this package imports nothing else.
"""

from __future__ import annotations

if __name__ == "inspect":
  raise ImportError(
    "Python looks for its own module `inspect` in the folder jgpt first. Start it in another folder"
  )


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  from jgpt.inspect import cli  # not above: importing the package must cost nothing

  return cli.main(argv)
