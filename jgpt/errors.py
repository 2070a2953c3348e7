"""What a setting may hold, and the error that says what is wrong with it.

Responsible for checking values against declared types and ranges, and for the words of such errors. Not responsible for
which settings there are or which go together (`config.py`). Imports no jax.
"""

from __future__ import annotations

import difflib
import typing
from typing import Any


class UserError(ValueError):
  """An error that a user can mend. Its text says what, got, need and how; commands print it without a stack trace.

  Attributes:
    status: the exit status of a command that ends with it.
  """

  status = 2


class TrainingError(UserError):
  """Training that cannot go on. What it had reached is saved."""

  status = 1


def show(value: Any) -> str:
  """A value out of somebody's file or command as an error names it: printable, on one line, at most 80 characters."""
  try:
    text = repr(value)
  except (RecursionError, ValueError):  # nested too deep; a whole number of more digits than Python prints
    return f"a {type(value).__name__} that cannot be shown"
  return text if len(text) <= 80 else f"{text[:77]}..."


def first_line(error: BaseException) -> str:
  """The first line of what an error says; its type where it says nothing."""
  return (str(error).splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
  """One line without control codes, however long: somebody else may have chosen the words."""
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def near_matches(word: str, known: typing.Iterable[str]) -> str:
  """Words the user may have meant, as the end of an error: " Did you mean a or b?", or "" where none is near."""
  matches = difflib.get_close_matches(word[:100], list(known), n=3, cutoff=0.5)
  return f" Did you mean {' or '.join(matches)}?" if matches else ""
