"""Finds the text of a recorded run again, by its digest, wherever it lies now.

The places are the one that is named, and those where the run's starts found it. What a place holds
is read in `data/`. Listing places imports no jax.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jgpt.config import DataConfig
from jgpt.config.settings import change, parse_setting
from jgpt.data.paths import is_there
from jgpt.data.sources import RecordedTextError
from jgpt.errors import UserError
from jgpt.runs.folder import RunFiles, current_folder, read_starts

if TYPE_CHECKING:
  from jgpt.data.corpus import Data

MAX_PLACES = 16  # where a text is looked for


def find_run_data(
  workdir: Path, recorded: RunFiles, config: DataConfig | None = None, ways: str = ""
) -> tuple[Data, DataConfig]:
  """Finds the text that a run was trained on, and loads it.

  Args:
    workdir: the run folder.
    recorded: its files.
    config: names the place to look; places of the same name that the run recorded come after it.
      None takes those where the run's starts found it, the newest first.
    ways: last words of the error: what else can be done than naming the text.

  Returns:
    The data; and the settings with the place where they were found.

  Raises:
    UserError: if no place has the text. It says which digest is missing, where it was recorded,
      what was found instead, and how the text is named.
  """
  from jgpt.data.corpus import find_data  # imported late: it imports jax

  sha256, seed = recorded.data["sha256"], recorded.experiment.train.seed
  failures: list[UserError] = []
  absent: list[str] = []
  for place in list_places(workdir, recorded, config):
    if place.path is not None and not is_there(place.path):
      absent.append(place.path)
      continue
    try:
      data = find_data(place, seed, sha256=sha256, tokenizer=recorded.tokenizer)
    except UserError as error:
      failures.append(error)
      continue
    if failures:
      text = dataclasses.replace(data.text, note=str(failures[0]))
      data = dataclasses.replace(data, text=text)
    return data, place
  raise UserError(_describe_failure(workdir, recorded, failures, absent, ways))


def find_place(workdir: Path, recorded: RunFiles) -> DataConfig:
  """Finds the first of the places that a run recorded where there is a text, of any digest.

  Args:
    workdir: the run folder.
    recorded: its files.

  Returns:
    The run's settings with that place; with the recorded one where no place has a text.
  """
  for place in list_places(workdir, recorded):
    if place.path is None or is_there(place.path):
      return place
  return recorded.experiment.data


def parse_place(words: Sequence[str], recorded: RunFiles) -> DataConfig | None:
  """Parses where a command is told to look for a run's text.

  Args:
    words: of `--set`: data.path=PATH or data.source=NAME.
    recorded: the run's files.

  Returns:
    The run's settings with that place; None without words.

  Raises:
    UserError: for any other setting.
  """
  changes = dict(parse_setting(word) for word in words)
  for name in changes:
    if name not in ("data.path", "data.source"):
      raise UserError(
        f"--set {name} has no meaning here: a run that is read keeps its settings. Only where its "
        "text lies can be named, with --set data.path=PATH"
      )
  return change(recorded.experiment, changes).data if changes else None


def list_places(
  workdir: Path, recorded: RunFiles, config: DataConfig | None = None
) -> list[DataConfig]:
  """Lists where the text of a run may lie, without looking there.

  A relative path is one below the current folder, and then one below the folder in which the run
  was started.

  Args:
    workdir: the run folder.
    recorded: its files.
    config: as for `find_run_data`.
  """
  ours = recorded.experiment.data
  starts = [_read_place(start, ours) for start in read_starts(workdir)]
  known = [*reversed(starts), (ours.path, ours.source, starts[0][2] if starts else None)]
  if config is not None:
    same = [place for place in known if config.path is not None and place[0] == config.path]
    known = [(config.path, config.source, None), *same]
  places, here = [], current_folder()
  for path, source, folder in known:
    places.append((path, source))
    if path is not None and folder not in (None, here) and _is_relative(path):
      places.append((_join(folder, path), source))
  distinct = list(dict.fromkeys(places))[:MAX_PLACES]
  return [
    dataclasses.replace(config or ours, path=path, source=source) for path, source in distinct
  ]


def _read_place(start: Any, ours: DataConfig) -> tuple[str | None, str, str | None]:
  """Reads data.path, data.source and the folder of a start; what it lacks is as recorded first."""
  start = start if isinstance(start, dict) else {}
  settings = start.get("settings") if isinstance(start.get("settings"), dict) else {}
  path, source = settings.get("data.path", ours.path), settings.get("data.source", ours.source)
  folder = start.get("folder")
  return (
    path if isinstance(path, str | None) else ours.path,
    source if isinstance(source, str) else ours.source,
    folder if isinstance(folder, str) else None,
  )


def _is_relative(path: str) -> bool:
  return not os.path.isabs(os.path.expanduser(path))


def _join(folder: str, path: str) -> str:
  """Joins a folder and a relative path, which may be a glob."""
  joined = os.path.join(folder, path)
  is_glob = glob.has_magic(path) and not os.path.exists(joined)
  return os.path.join(glob.escape(folder), path) if is_glob else joined


def _describe_failure(
  workdir: Path, recorded: RunFiles, failures: list[UserError], absent: list[str], ways: str
) -> str:
  """Describes which text is missing, what was found instead, and what can be done."""
  sha256 = recorded.data["sha256"][:12]
  where = recorded.data.get("location", "from a place that was not recorded")
  how = f"ame a copy of it with --set data.path=PATH{ways}"
  if failures and not isinstance(failures[0], RecordedTextError):
    what = str(failures[0]).rstrip(".")
    return f"{what}. The text of {workdir} is {where} (SHA-256 {sha256}): n{how}"
  advice = f"{failures[0].advice}. " if failures and failures[0].advice else ""
  reasons = [f"nothing is at {' or '.join(absent)}"] if absent else []
  for error in failures:
    text = error.found if isinstance(error, RecordedTextError) else None
    if text and text.location == where:
      return (
        f"{where} has changed since the run in {workdir} began: its SHA-256 was {sha256} and is "
        f"now {text.sha256[:12]}. {advice}Put the old text back, or n{how}"
      )
    reasons.append(
      f"{text.location} is another one (SHA-256 {text.sha256[:12]})"
      if text
      else str(error).split(". ")[0]
    )
  words = f"the text of {workdir}, {where} (SHA-256 {sha256}), was not found"
  return f"{words}: {'; '.join(reasons)}. {advice}N{how}"
