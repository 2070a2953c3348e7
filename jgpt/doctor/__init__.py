"""The command `python -m jgpt.doctor`, which says what is wrong here and what to do about it."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  from jgpt.doctor import cli  # here, so that importing the package stays cheap

  return cli.main(argv)
