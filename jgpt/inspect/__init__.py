"""Shows what a run predicts for a text, and traces one parameter through training.

`python -m jgpt.inspect`; importing this package imports nothing else.
"""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  from jgpt.inspect import cli  # only here: importing the package must cost nothing

  return cli.main(argv)
