"""Reports what is installed, what is wrong, and what to do about it.

`python -m jgpt.doctor`; importing this package imports nothing else.
"""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  from jgpt.doctor import cli  # only here: importing the package must cost nothing

  return cli.main(argv)
