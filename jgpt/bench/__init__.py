"""Measures how fast this machine trains.

`python -m jgpt.bench`; importing this package imports nothing else.
"""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  from jgpt.bench import cli  # only here: importing the package must cost nothing

  return cli.main(argv)
