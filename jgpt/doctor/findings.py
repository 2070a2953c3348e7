"""What a check found: one line for a person, and what to do about it.

Responsible for the value that every check of `doctor` returns, and for its lines of text. Not responsible for what is
checked (`machine.py`, `probe.py`, `storage.py`, `soundness.py`). Imports nothing that has to be installed.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from jgpt.errors import UserError, first_line, printable

LEVEL_WIDTH, TOPIC_WIDTH = 9, 13
MAX_CHARS = 2000  # of one text: what stands in somebody's file may be long


@dataclasses.dataclass(frozen=True)
class Finding:
  """One thing that was looked at.

  Attributes:
    level: "ok"; "note" for what is worth knowing and stops nothing; "problem" for what should be mended.
    topic: what it is about, a word or two.
    text: what was found.
    do: what to do about it; "" where nothing is to be done.
  """

  level: Literal["ok", "note", "problem"]
  topic: str
  text: str
  do: str = ""


def ok(topic: str, text: str) -> Finding:
  """Nothing to be done."""
  return Finding("ok", topic, text)


def note(topic: str, text: str, do: str = "") -> Finding:
  """Worth knowing; stops nothing."""
  return Finding("note", topic, text, do)


def problem(topic: str, text: str, do: str) -> Finding:
  """Something that should be mended, and how."""
  return Finding("problem", topic, text, do)


def from_error(topic: str, error: UserError, do: str = "see above") -> Finding:
  """An error that says in its second sentence how to mend it, as a problem; `do` stands in where it does not."""
  what, _, how = str(error).partition(". ")
  return problem(topic, what.rstrip("."), how[:1].lower() + how[1:].rstrip(".") or do)


def safely(topic: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
  """What a check finds; where it breaks off itself, that is what it finds."""
  try:
    yield from check()
  except UserError as error:
    yield from_error(topic, error)
  except ImportError as error:
    yield note(topic, f"not checked: {error}")
  except Exception as error:  # what is out of order may raise anything, and the other checks still have something to say
    if isinstance(error, OSError) and error.filename is not None:
      yield problem(topic, f"{error.filename}: {error.strerror}", "mend that, its permissions for example, and look again")
      return
    first = first_line(error)
    yield problem(topic, f"this check broke off: {type(error).__name__}: {first}", "report it, with all of these lines")


def format_finding(finding: Finding, width: int) -> str:
  """A finding as lines of at most `width` columns, as far as words allow: level, topic, text; below it "do: ..."."""
  indent = " " * (LEVEL_WIDTH + TOPIC_WIDTH)
  lines = _wrap(
    shorten_printable(finding.text), width, f"{finding.level:{LEVEL_WIDTH}}{finding.topic:{TOPIC_WIDTH - 1}} ", indent
  )
  if finding.do:
    lines += _wrap(f"do: {shorten_printable(finding.do)}", width, indent, f"{indent}    ")
  return "\n".join(lines)


def format_summary(findings: Sequence[Finding]) -> str:
  """How many problems and notes there are, and where: "1 problem found (cache), 2 notes"."""
  problems = [finding.topic for finding in findings if finding.level == "problem"]
  notes = sum(finding.level == "note" for finding in findings)
  words = f"{len(problems)} problem{'s'[: len(problems) != 1]} found ({', '.join(dict.fromkeys(problems))})"
  return (words if problems else "no problem found") + (f", {notes} note{'s'[: notes != 1]}" if notes else "")


def format_bytes(count: float) -> str:
  """A number of bytes for a person: "512 bytes", "1.5 MB", "24 GB"; thousands, as disks are sold."""
  for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
    if count >= size:
      return f"{count / size:.1f} {unit}" if count < 10 * size else f"{count / size:,.0f} {unit}"
  return f"{count:.0f} bytes"


def shorten_printable(text: str) -> str:
  """One line of at most `MAX_CHARS` without control codes: somebody else may have chosen the words."""
  return printable(text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}...")


def _wrap(text: str, width: int, first: str, rest: str) -> list[str]:
  """Breaks between words only, so that paths and commands can be copied."""
  return textwrap.wrap(
    text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
  ) or [first.rstrip()]
