"""Errors that a user can correct, and how values are shown in their messages.

How a command ends after an error is in `cli.py`. Imports no jax.
"""

from __future__ import annotations

import difflib
import typing
from typing import Any


class UserError(ValueError):
  """An error that a user can correct; commands print it without a stack trace.

  The text says what is wrong, what was given, what is needed and how to correct it.

  Attributes:
    status: the exit status of a command that ends with it.
  """

  status = 2


class TrainingError(UserError):
  """Training that cannot continue; the steps up to then are saved."""

  status = 1


def show(value: Any) -> str:
  """Formats a value from a file or a command line for an error message.

  Returns:
    Printable text on one line, of at most 80 characters.
  """
  try:
    text = repr(value)
  except (RecursionError, ValueError):  # nested too deep; an int of more digits than Python prints
    return f"a {type(value).__name__} that cannot be shown"
  return text if len(text) <= 80 else f"{text[:77]}..."


def first_line(error: BaseException) -> str:
  """Returns the first line of an error's message, or its type where the message is empty."""
  return (str(error).splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
  """Replaces control characters by their escapes, so that untrusted text is safe to print."""
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def near_matches(word: str, known: typing.Iterable[str]) -> str:
  """Returns the end of an error message that names similar words.

  Args:
    word: as the user wrote it.
    known: the words that are allowed.

  Returns:
    " Did you mean a or b?", with at most three words; "" where none is similar.
  """
  matches = difflib.get_close_matches(word[:100], list(known), n=3, cutoff=0.5)
  return f" Did you mean {' or '.join(matches)}?" if matches else ""
