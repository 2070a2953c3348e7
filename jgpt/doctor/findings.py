"""The findings that every check of `doctor` returns, and their lines of text.

The checks are in `packages.py`, `machine.py`, `storage.py`, `soundness.py` and `continuation.py`.
Imports the standard library only.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from jgpt.errors import UserError, first_line, printable

LEVEL_WIDTH, TOPIC_WIDTH = 9, 13
MAX_CHARS = 2000  # of one text, which may come from a file of any length


@dataclasses.dataclass(frozen=True)
class Finding:
  """A result of a check.

  Attributes:
    level: "ok"; "note" for what is worth knowing and stops nothing; "problem" for what should be
      repaired.
    topic: one or two words, such as "cache".
    text: what was found.
    do: what to do about it; "" where there is nothing to do.
  """

  level: Literal["ok", "note", "problem"]
  topic: str
  text: str
  do: str = ""


def ok(topic: str, text: str) -> Finding:
  """Makes a finding of the level "ok"."""
  return Finding("ok", topic, text)


def note(topic: str, text: str, do: str = "") -> Finding:
  """Makes a finding that is worth knowing and stops nothing."""
  return Finding("note", topic, text, do)


def problem(topic: str, text: str, do: str) -> Finding:
  """Makes a finding of what should be repaired, and how."""
  return Finding("problem", topic, text, do)


def from_error(topic: str, error: UserError, do: str = "see above") -> Finding:
  """Makes a problem of an error, whose second sentence says how to repair it.

  Args:
    topic: of the finding.
    error: from any check.
    do: used where the error has one sentence only.
  """
  what, _, how = str(error).partition(". ")
  return problem(topic, what.rstrip("."), how[:1].lower() + how[1:].rstrip(".") or do)


def run_check(topic: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
  """Yields the findings of a check; an error that it raises becomes a finding.

  Args:
    topic: of that finding.
    check: one of the functions `examine_*`.
  """
  try:
    yield from check()
  except UserError as error:
    yield from_error(topic, error)
  except ImportError as error:
    yield note(topic, f"not checked: {error}")
  except Exception as error:  # a broken library may raise anything, and other checks remain
    if isinstance(error, OSError) and error.filename is not None:
      yield problem(
        topic,
        f"{error.filename}: {error.strerror}",
        "mend that, its permissions for example, and look again",
      )
      return
    first = first_line(error)
    yield problem(
      topic,
      f"this check broke off: {type(error).__name__}: {first}",
      "report it, with all of these lines",
    )


def format_finding(finding: Finding, width: int) -> str:
  """Formats a finding as level, topic and text, with "do: ..." below.

  Args:
    finding: from any check.
    width: columns of a line; longer words are not broken.
  """
  indent = " " * (LEVEL_WIDTH + TOPIC_WIDTH)
  lines = _wrap(
    shorten_printable(finding.text),
    width,
    f"{finding.level:{LEVEL_WIDTH}}{finding.topic:{TOPIC_WIDTH - 1}} ",
    indent,
  )
  if finding.do:
    lines += _wrap(f"do: {shorten_printable(finding.do)}", width, indent, f"{indent}    ")
  return "\n".join(lines)


def format_summary(findings: Sequence[Finding]) -> str:
  """Formats the numbers of problems and notes: "1 problem found (cache), 2 notes"."""
  problems = [finding.topic for finding in findings if finding.level == "problem"]
  notes = sum(finding.level == "note" for finding in findings)
  topics = ", ".join(dict.fromkeys(problems))
  words = f"{len(problems)} problem{'s'[: len(problems) != 1]} found ({topics})"
  return (words if problems else "no problem found") + (
    f", {notes} note{'s'[: notes != 1]}" if notes else ""
  )


def format_bytes(count: float) -> str:
  """Formats a number of bytes as "512 bytes", "1.5 MB" or "24 GB" (1 kB is 1,000 bytes)."""
  for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
    if count >= size:
      return f"{count / size:.1f} {unit}" if count < 10 * size else f"{count / size:,.0f} {unit}"
  return f"{count:.0f} bytes"


def shorten_printable(text: str) -> str:
  """Cuts a text to `MAX_CHARS` and escapes control codes, since it may be from any file."""
  return printable(text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}...")


def _wrap(text: str, width: int, first: str, rest: str) -> list[str]:
  """Wraps a text between words only, so that paths and commands can be copied."""
  return textwrap.wrap(
    text,
    width,
    initial_indent=first,
    subsequent_indent=rest,
    break_long_words=False,
    break_on_hyphens=False,
  ) or [first.rstrip()]
