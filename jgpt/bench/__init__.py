"""The command `python -m jgpt.bench`, which measures how fast this machine trains."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  from jgpt.bench import cli  # here, so that importing the package stays cheap

  return cli.main(argv)
