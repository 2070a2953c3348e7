"""Reads metrics.jsonl: its lines, its rows, and each metric over a run's updates.

What the rows are is described in `log.py`, which writes them. Imports no jax.
"""

from __future__ import annotations

import array
import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jgpt.runs.folder import open_file

MAX_LINE = 1 << 16  # bytes of a line of metrics.jsonl; a longer line is not a row
MAX_NUMBER = 1e39  # of a finite number in a row; larger than any float32
TIMED = "perf/seconds"  # in rows of time, and in no others


class Line(NamedTuple):
  """A line of metrics.jsonl.

  Attributes:
    end: offset in bytes of the next line.
    row: numbers by name, with `step`; "final" is True in the row of an end. None where the line is
      not a row.
    is_whole: whether it ends with a line break; the last line of a killed process may not.
  """

  end: int
  row: dict[str, float] | None
  is_whole: bool


def read_lines(path: Path) -> Iterator[Line]:
  """Yields the lines of metrics.jsonl; an absent file has none.

  Lines may hold anything and be of any length; memory stays small.

  Raises:
    UserError: if it is not a plain file.
  """
  if not os.path.lexists(path):
    return
  end = 0
  with open_file(path) as file:
    while line := file.readline(MAX_LINE):
      end, row = end + len(line), _parse_row(line)
      # The rest of a line that is too long.
      while len(line) == MAX_LINE and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE)
        end, row = end + len(line), None
      yield Line(end, row, line.endswith(b"\n"))


def _parse_row(line: bytes) -> dict[str, float] | None:
  """Parses a JSON object of numbers that fit float32, with an integer `step`; None for others.

  NaN and infinity fit. "final" may only be true.
  """
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  is_row = isinstance(row, dict) and type(row.get("step")) is int and row["step"] >= 0
  return row if is_row and all(itertools.starmap(_is_entry, row.items())) else None


def _is_entry(name: str, value: object) -> bool:
  if name == "final":
    return value is True
  return type(value) in (int, float) and not MAX_NUMBER < abs(value) < math.inf


def read_jsonl(path: Path) -> list[dict]:
  """Reads the rows of metrics.jsonl; skips lines that are not rows; an absent file is empty.

  Raises:
    UserError: if it is not a plain file.
  """
  return [line.row for line in read_lines(path) if line.row is not None]


def read_losses(path: Path, step: int) -> tuple[np.ndarray, list[tuple[int, float]]]:
  """Reads the losses of metrics.jsonl up to a step, in little memory.

  Returns:
    Training losses, float32 [updates], and (step, held-out loss) of each evaluation but that of the
    end.
  """
  losses, heldout_losses = array.array("f"), []
  for line in read_lines(path):
    row = line.row if line.row is not None and line.row["step"] <= step else {}
    if "train/loss" in row:
      losses.append(row["train/loss"])
    if "heldout/loss" in row and "final" not in row:
      heldout_losses.append((row["step"], row["heldout/loss"]))
  return np.array(losses, np.float32), heldout_losses


class Series(NamedTuple):
  """One metric of a run over its updates: `plt.plot(*series)` draws it.

  Attributes:
    steps: int64 [n], the update that each value belongs to; the first update is step 1.
    values: float64 [n].
  """

  steps: np.ndarray
  values: np.ndarray


def read_series(path: Path, step: int | None = None) -> dict[str, Series]:
  """Reads every metric of metrics.jsonl, by name, in little memory.

  Those of the run's end are called "final/heldout/loss" and so on: they are over the whole held-out
  part, where evaluations before may be over a sample.

  Args:
    path: the file; an absent one has no metrics.
    step: rows of later updates are left out; None reads all.

  Raises:
    UserError: if it is not a plain file.
  """
  found: dict[str, tuple[array.array, array.array]] = {}
  for line in read_lines(path):
    row = line.row
    if row is None or (step is not None and row["step"] > step) or row["step"] >= 2**63:
      continue
    prefix = "final/" if "final" in row else ""
    for name, value in row.items():
      if name not in ("step", "final"):
        steps, values = found.setdefault(prefix + name, (array.array("q"), array.array("d")))
        steps.append(row["step"])
        values.append(value)
  return {
    name: Series(np.array(steps, np.int64), np.array(values, np.float64))
    for name, (steps, values) in sorted(found.items())
  }
