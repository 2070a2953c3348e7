"""Looks into a run: its predictions for a text, and one parameter's first updates.

`python -m jgpt.inspect` prints both (`cli.py`). From Python call `predict`, in `predictions.py`,
and `trace_updates`, in `updates.py`. Importing this package imports nothing else.
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
