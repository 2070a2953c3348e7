"""From a run's metrics to what is drawn of them: smoothed losses, labels, few enough points.

Pure. The drawing is in `run_figure.py`, the reading of a run folder in `runs/history.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jgpt.config import Expected, Experiment
from jgpt.config.settings import drop_derived, format_value, is_circumstance, list_settings
from jgpt.report.verdict import LAST, final_loss, find_expected
from jgpt.runs.history import History
from jgpt.runs.rows import TIMED, Series

X_AXES = ("step", "tokens", "seconds")
WINDOW = 20  # the smoothing window is this fraction of a run's updates: 1 / WINDOW
MAX_LOSS = 1e9  # a larger loss counts as not finite: the sums of its neighbours would lose digits
MAX_COUNT = 1e18  # of tokens or seconds
MAX_NAMED = 3  # settings that a label names; runs that differ in more have their folder's name
MAX_NAMED_LETTERS = 48  # characters of such a label
NO_SERIES = Series(np.zeros(0, np.int64), np.zeros(0))


@dataclasses.dataclass(frozen=True)
class Curves:
  """What is drawn of a run; each series is over steps, which `locate` turns into other x values.

  Attributes:
    run: the history they are from.
    losses: training loss of each update, nats per token.
    smoothed: the same smoothed; see `smooth`.
    half_window: of the smoothing.
    training_loss: the run's training loss, as `final_loss` computes it of the losses that are
      drawn; None where there are none.
    num_last: updates of which that is the mean.
    heldout: losses on the held-out part, that of the run's end included.
    grad_norm: of each update, before clipping.
    rate: the learning rate of each update.
    tokens_per_second: in training, padding not counted; of each compiled call.
    skipped: steps of the updates that were skipped or whose loss is not finite.
    guessing: the loss of uniform guessing, ln(vocab_size).
    expected: the result that the experiment expects on this text; None where it expects none.
    clock: (steps, tokens, seconds) at the end of each compiled call, after a first entry of zeros:
      tokens trained on since the run first began, padding not counted; seconds that the updates
      took, without evaluations, saves and what was lost to an interruption.
  """

  run: History
  losses: Series
  smoothed: Series
  half_window: int
  training_loss: float | None
  num_last: int
  heldout: Series
  grad_norm: Series
  rate: Series
  tokens_per_second: Series
  skipped: np.ndarray
  guessing: float
  expected: Expected | None
  clock: tuple[np.ndarray, np.ndarray, np.ndarray]

  @property
  def last_step(self) -> int:
    """Returns the last step of any series; 0 without updates."""
    ends = [s.steps[-1] for s in (self.losses, self.heldout) if len(s.steps)]
    return int(max(ends, default=0))

  def locate(self, steps: np.ndarray, x: str) -> np.ndarray:
    """Computes the x values of steps, float64 [n].

    Between the ends of two compiled calls tokens and seconds are interpolated, as if each of the
    call's updates took the same.

    Args:
      steps: int64 [n].
      x: "step", "tokens" or "seconds", one of `X_AXES`.
    """
    if x == "step":
      return np.asarray(steps, np.float64)
    at, tokens, seconds = self.clock
    return np.interp(steps, at, tokens if x == "tokens" else seconds)


def collect_curves(run: History) -> Curves:
  """Computes what is drawn of a run.

  Args:
    run: from `read_history`. Of two rows of one step the later counts.
  """
  losses, grad_norm, rate, per_second = (
    _sort(run.metrics.get(name, NO_SERIES))
    for name in ("train/loss", "train/grad_norm", "train/lr", "perf/tokens_per_second")
  )
  evaluations = [run.metrics.get(f"{p}heldout/loss", NO_SERIES) for p in ("", "final/")]
  heldout = Series(*(np.concatenate(parts) for parts in zip(*evaluations, strict=True)))
  flags = run.metrics.get("train/skipped", NO_SERIES)
  skipped = [losses.steps[~is_drawable(losses.values)], flags.steps[flags.values != 0]]
  half_window = len(losses.steps) // (2 * WINDOW)
  drawable = losses.values[is_drawable(losses.values)]
  return Curves(
    run=run,
    losses=losses,
    smoothed=Series(losses.steps, smooth(losses.values, half_window)),
    half_window=half_window,
    training_loss=final_loss(drawable) if len(drawable) else None,
    num_last=min(LAST, len(drawable)),
    heldout=_sort(heldout),
    grad_norm=grad_norm,
    rate=rate,
    tokens_per_second=per_second._replace(
      values=np.where(_is_count(per_second.values), per_second.values, np.nan)
    ),
    skipped=np.unique(np.concatenate(skipped)),
    guessing=math.log(run.experiment.model.vocab_size),
    expected=find_expected(run.expected, run.label),
    clock=_read_clock(run),
  )


def _sort(series: Series) -> Series:
  """Sorts a series by step; of two values of one step the later stays."""
  steps, last = np.unique(series.steps[::-1], return_index=True)
  return Series(steps, series.values[::-1][last])


def _read_clock(run: History) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Reads `Curves.clock` from a run's rows of time; leaves out rows that cannot be true."""
  tokens, seconds = (_sort(run.metrics.get(name, NO_SERIES)) for name in ("tokens", TIMED))
  steps = np.intersect1d(tokens.steps, seconds.steps)
  spent = np.where(_is_count(seconds.values), seconds.values, 0.0).cumsum()
  spent = spent[np.searchsorted(seconds.steps, steps)]
  counts = tokens.values[np.searchsorted(tokens.steps, steps)]
  is_good = _is_count(counts) & (steps > 0)
  steps, counts, spent = steps[is_good], counts[is_good], spent[is_good]
  return tuple(
    np.concatenate([[0], values]) for values in (steps, np.maximum.accumulate(counts), spent)
  )


def _is_count(values: np.ndarray) -> np.ndarray:
  """Returns which values may be tokens or seconds of a run."""
  return (values >= 0) & (values < MAX_COUNT)


# --- Smoothing ---


def smooth(values: np.ndarray, half_window: int) -> np.ndarray:
  """Computes the mean of the values around each, over 2 half_window + 1 of them.

  The window is centred, so that the curve is not shifted. It is narrower at the start, by as much
  on both sides, so that it begins with the first value; at the end the values that would come later
  are missing from it. Values that are not finite, or above 1e9, are left out of the means, and have
  none of their own, so that the curve has a gap there.

  Args:
    values: float [n], one for each update.
    half_window: at least 0.

  Returns:
    float64 [n].
  """
  is_good = is_drawable(values)
  sums = np.concatenate([[0.0], np.cumsum(np.where(is_good, values, 0.0))])
  counts = np.concatenate([[0], np.cumsum(is_good)])
  at = np.arange(len(values))
  half = np.minimum(half_window, at)
  first, end = at - half, np.minimum(at + half + 1, len(values))
  number = counts[end] - counts[first]
  return np.where(is_good, (sums[end] - sums[first]) / np.maximum(number, 1), np.nan)


def is_drawable(values: np.ndarray) -> np.ndarray:
  """Returns which values are finite, and at most 1e9."""
  return np.isfinite(values) & (np.abs(values) < MAX_LOSS)


# --- Few enough points ---


def keep_extremes(x: np.ndarray, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Keeps at most `most` points of a curve, which looks the same: the extremes of each stretch.

  Args:
    x: float [n], ascending.
    y: float [n]; a stretch without finite values is one gap.
    most: at least 2.
  """
  if len(x) <= most:
    return x, y
  kept = []
  for part in np.array_split(np.arange(len(x)), most // 2):
    good = part[np.isfinite(y[part])]
    ends = [good[np.argmin(y[good])], good[np.argmax(y[good])]] if len(good) else part[:1]
    kept += sorted({*map(int, ends)})
  return x[kept], y[kept]


def keep_evenly(x: np.ndarray, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Keeps at most `most` points of a smooth curve, evenly, the first and the last among them."""
  if len(x) <= most:
    return x, y
  kept = np.unique(np.linspace(0, len(x) - 1, most).round().astype(int))
  return x[kept], y[kept]


# --- Labels ---


def spread(
  places: Sequence[float], heights: Sequence[float], low: float, high: float
) -> list[float]:
  """Places labels so that none covers another, each moved as little as possible.

  Least squares of the distances, in the order of the places: labels that touch move as one. Where
  there is no room for all between `low` and `high`, they begin at `low`.

  Args:
    places: where the middle of each label should be.
    heights: of each label.
    low: no label reaches below it.
    high: nor above it.

  Returns:
    The middle of each label.
  """
  order = np.argsort(places, kind="stable")
  sizes = np.asarray(heights, float)[order]
  offsets = np.cumsum(sizes) - sizes / 2  # of the middles, if the labels stood on each other
  groups: list[tuple[float, int]] = []  # the mean of place - offset, of labels that touch
  for wanted in np.asarray(places, float)[order] - offsets:
    groups.append((float(wanted), 1))
    while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
      (upper, many), (lower, few) = groups.pop(), groups.pop()
      groups.append(((upper * many + lower * few) / (many + few), many + few))
  starts = np.concatenate([np.full(number, mean) for mean, number in groups])
  starts = np.maximum(np.minimum(starts, high - sizes.sum()), low)
  moved = np.empty(len(order))
  moved[order] = starts + offsets
  return moved.tolist()


def name_differences(experiments: Sequence[Experiment], folders: Sequence[str]) -> list[str]:
  """Describes what differs between runs: "peak_lr 0.01", "batch_size 16, seed 3".

  Settings that change what is learned are named if any differ, and the number of updates; otherwise
  the other settings. A setting is named without its section where no other section has one of that
  name. Settings that follow from others are not named. The momentum of SGD is part of the
  optimizer's name where that differs: "optimizer sgd, momentum 0.9" beside "optimizer adamw".

  Args:
    experiments: resolved, one for each run.
    folders: names of the run folders: the labels of runs that differ in nothing or in more than
      three settings, and added to labels that would be the same.

  Returns:
    Labels, one for each run.
  """
  settings = [list_settings(drop_derived(experiment)) for experiment in experiments]
  differing = [
    name for name in settings[0] if len({str(found.get(name)) for found in settings}) > 1
  ]
  chosen = [n for n in differing if not is_circumstance(n) or n in ("train.steps", "train.epochs")]
  chosen = chosen or [name for name in differing if name.split(".")[0] != "sample"]
  named = {name: [name] for name in chosen}  # what stands for each
  if "optimizer.name" in named and named.pop("optimizer.momentum", None):
    named["optimizer.name"].append("optimizer.momentum")
  if not named or len(named) > MAX_NAMED:
    return list(folders)
  fields = collections.Counter(name.split(".")[1] for name in settings[0])
  labels = []
  for found in settings:
    words = [
      f"{_shorten(name, fields)} {format_value(found[name])}"
      for parts in named.values()
      for name in parts
      if name != "optimizer.momentum" or found["optimizer.name"] == "sgd"
    ]
    labels.append(", ".join(words))
  if max(map(len, labels)) > MAX_NAMED_LETTERS:
    return list(folders)
  counts = collections.Counter(labels)
  return [
    f"{label} ({folder})" if counts[label] > 1 else label
    for label, folder in zip(labels, folders, strict=True)
  ]


def _shorten(name: str, fields: collections.Counter) -> str:
  """Returns the field of `section.field`, or the section of `optimizer.name`."""
  section, field = name.split(".")
  if field == "name":
    return section
  return field if fields[field] == 1 else name
