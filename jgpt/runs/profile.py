"""A profile of some updates of a run, by `jax.profiler`: which, where it is written, and when.

How to open one is in `notebooks/guide/commands.md`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from jgpt.errors import UserError, show

DEFAULT_UPDATES = 3  # that are profiled where no range is given
RANGE = re.compile(r"(?P<folder>.+?)(:(?P<first>\d+)-(?P<last>\d+))?", re.DOTALL)
NO_RANGE = re.compile(r":[-\d]*")  # what ends so was meant to have one


@dataclasses.dataclass(frozen=True)
class Profile:
  """Updates to profile; the calls that make them end where the range does.

  Attributes:
    folder: to write to.
    first: the first update, from 1; None takes the second of a start, since programs and devices
      are warm after the first.
    last: the last update; None takes `DEFAULT_UPDATES` in all.
  """

  folder: Path
  first: int | None = None
  last: int | None = None

  def next_border(self, step: int) -> int | None:
    """Returns the next step at which a call must end; None where there is none.

    Args:
      step: updates that are done.
    """
    return next((end for end in (self.first - 1, self.last) if step < end), None)

  def holds(self, step: int) -> bool:
    """Returns whether the update after `step` of them is profiled."""
    return self.first <= step + 1 <= self.last


def parse_profile(text: str) -> Profile:
  """Parses `DIR` or `DIR:first-last`, and makes the folder.

  Raises:
    UserError: if the range is none, or the folder cannot be written to.
  """
  found = RANGE.fullmatch(text)
  if found is None or NO_RANGE.fullmatch(found["folder"][found["folder"].rfind(":") :]):
    raise UserError(
      f"--profile {show(text)} must be DIR or DIR:first-last, numbers of updates. Try --profile "
      "profile:10-12"
    )
  folder = Path(found["folder"]).expanduser()
  first, last = (found[name] and int(found[name]) for name in ("first", "last"))
  if first is not None and not 1 <= first <= last:
    raise UserError(
      f"--profile {show(text)}: first must be at least 1, and last at least first. Try --profile "
      f"{folder}:{max(1, min(first, last))}-{max(1, first, last)}"
    )
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise UserError(
      f"--profile: {folder} cannot be written to: {error.strerror or error}. Name another folder"
    ) from error
  return Profile(folder, first, last)


def choose_updates(profile: Profile, start_step: int, steps: int) -> Profile:
  """Chooses the updates to profile where none are given, and checks those that are.

  Args:
    profile: from `parse_profile`.
    start_step: updates that were done before.
    steps: updates in all.

  Raises:
    UserError: if this start does not make them.
  """
  first = start_step + 2 if profile.first is None else profile.first
  last = min(first + DEFAULT_UPDATES - 1, steps) if profile.last is None else profile.last
  if not start_step < first <= last <= steps:
    there = f"updates {start_step + 1:,} to {steps:,}" if start_step < steps else "no updates"
    if profile.first is None:
      raise UserError(f"--profile needs two updates, and this start makes {there}")
    raise UserError(
      f"--profile {profile.folder}:{first}-{last} is not in this start, which makes {there}"
    )
  return dataclasses.replace(profile, first=first, last=last)


@contextlib.contextmanager
def record_call(profile: Profile | None, step: int, num_steps: int) -> Iterator[bool]:
  """Records a call in which updates are made, if it holds updates to profile.

  The first such call starts the trace and the last one ends it, when its context does.

  Args:
    profile: None records nothing.
    step: updates that are done before the call.
    num_steps: updates that the call makes.

  Yields:
    Whether the call is recorded; its results must be waited for in the context.
  """
  if profile is None or not profile.holds(step):
    yield False
    return
  if step + 1 == profile.first:
    jax.profiler.start_trace(profile.folder)
  with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
    yield True
  if step + num_steps >= profile.last:
    jax.profiler.stop_trace()


@contextlib.contextmanager
def end_profile(profile: Profile | None) -> Iterator[None]:
  """Ends the trace with the context where a stop or an error came before its last update."""
  try:
    yield
  finally:
    if profile is not None:
      with contextlib.suppress(RuntimeError):  # it has ended
        jax.profiler.stop_trace()
