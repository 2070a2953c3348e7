"""The results of a benchmark: measured seconds, what is computed from them, and tables.

Pure, without jax. Measuring is in `timing.py`, `rounds.py` and `startup.py`, printing in `cli.py`.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

OURS = "jgpt"


@dataclasses.dataclass(frozen=True)
class Row:
  """A contender in a case: a row of the first table.

  Attributes:
    case: what was measured.
    contender: "jgpt", or a peer's name.
    seconds: of each round, per step, call or command; [] where it could not be measured.
    per: "step" or "call"; "" for a whole command or file.
    samples: documents or texts per step or call; None where there are none.
    tokens: per step or call, without padding.
    flops: floating-point operations per step, by `limits.count_train_flops`.
    compile_seconds: until the first step could begin.
    memory_bytes: of the compiled step, as the compiler reports it.
    ratios: seconds of each round divided by jgpt's in the same round; None for jgpt itself.
    reason: why there are no seconds.
  """

  case: str
  contender: str
  seconds: list[float]
  per: str = ""
  samples: float | None = None
  tokens: float | None = None
  flops: float | None = None
  compile_seconds: float | None = None
  memory_bytes: int | None = None
  ratios: list[float] | None = None
  reason: str = ""

  @property
  def median(self) -> float:
    """Returns the median of the rounds' seconds."""
    return statistics.median(self.seconds)

  def rate(self, amount: float | None) -> float | None:
    """Computes an amount per second at the median; None without an amount or a time."""
    return amount / self.median if amount is not None and self.seconds else None

  @property
  def name(self) -> str:
    """Returns case and contender as the table names them."""
    return self.case if self.contender == OURS else f"{self.case}: {self.contender}"


@dataclasses.dataclass(frozen=True)
class Parts:
  """Seconds of the parts of a step in each round, each part timed in a program of its own.

  Attributes:
    case: what was measured.
    forward: the loss alone.
    gradient: the loss and its gradient.
    update: the optimizer and its update of the parameters.
    step: median of the whole step, to compare the sum of the parts with.
  """

  case: str
  forward: list[float]
  gradient: list[float]
  update: list[float]
  step: float

  @property
  def backward(self) -> list[float]:
    """Computes gradient - forward in each round."""
    return [g - f for f, g in zip(self.forward, self.gradient, strict=True)]


@dataclasses.dataclass(frozen=True)
class Split:
  """Seconds of the parts of a whole command in each round; they add up to the whole."""

  case: str
  parts: dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Limit:
  """A rate that this machine can reach at most.

  Attributes:
    name: what is limited.
    rate: in `unit`.
    unit: "FLOP/s", "B/s" or "tokens/s".
    case: that it limits; "" for a rate of the machine.
    reached: share that the case reached, from 0 to 1; None where the first table has it.
  """

  name: str
  rate: float
  unit: str
  case: str = ""
  reached: float | None = None


@dataclasses.dataclass(frozen=True)
class Results:
  """The results of all cases.

  Attributes:
    rows: the first table.
    parts: of steps.
    splits: of whole commands.
    limits: of the machine.
    peak: dense bfloat16 peak of the device in FLOP/s; None on a CPU, or where it is not known.
    accelerated: whether the device is not a CPU; then the tables have the share of the peak.
  """

  rows: list[Row] = dataclasses.field(default_factory=list)
  parts: list[Parts] = dataclasses.field(default_factory=list)
  splits: list[Split] = dataclasses.field(default_factory=list)
  limits: list[Limit] = dataclasses.field(default_factory=list)
  peak: float | None = None
  accelerated: bool = False

  def find_limit(self, name: str, case: str = "") -> float | None:
    """Returns a limit's rate, or None where it was not measured."""
    return next((x.rate for x in self.limits if (x.name, x.case) == (name, case)), None)


OWN_SHAPES, SQUARE, BANDWIDTH = (
  "products at the case's own shapes",
  "float32 product 2048 x 2048 x 2048",
  "memory, read",
)


def divide_rounds(peer: Sequence[float], ours: Sequence[float]) -> list[float]:
  """Computes the ratio in each round, which a slower machine does not change."""
  return [a / b for a, b in zip(peer, ours, strict=True)]


def compute_shares(row: Row, results: Results) -> dict[str, float | None]:
  """Computes the share that a row reached of each rate, from 0 to 1; None where one is missing."""
  rate = row.rate(row.flops)
  limits = {
    "own_shapes": results.find_limit(OWN_SHAPES, row.case),
    "square": results.find_limit(SQUARE),
    "bf16_peak": results.peak,
  }
  return {
    name: rate / limit if rate is not None and limit else None for name, limit in limits.items()
  }


def results_to_json(results: Results) -> dict[str, Any]:
  """Returns all results for `json`, in seconds, FLOP/s and bytes; shares are from 0 to 1."""
  rows = [
    dataclasses.asdict(row)
    | {
      "median_seconds": row.median if row.seconds else None,
      "samples_per_second": row.rate(row.samples),
      "tokens_per_second": row.rate(row.tokens),
      "flops_per_second": row.rate(row.flops),
      "shares": compute_shares(row, results),
      "median_ratio": statistics.median(row.ratios) if row.ratios else None,
    }
    for row in results.rows
  ]
  return {
    "rows": rows,
    "parts": [dataclasses.asdict(parts) | {"backward": parts.backward} for parts in results.parts],
    "splits": [dataclasses.asdict(split) for split in results.splits],
    "limits": [dataclasses.asdict(limit) for limit in results.limits],
    "bf16_peak": results.peak,
  }


# --- Tables ---


def format_results(results: Results) -> str:
  """Formats all tables that have rows, one below the other."""
  tables = [
    format_rows(results),
    format_parts(results.parts),
    format_splits(results.splits),
    format_limits(results),
  ]
  return "\n\n".join(table for table in tables if table)


def format_rows(results: Results) -> str:
  """Formats the first table, with a line for each contender in each case.

  Below it are samples per second, and the reasons where there are no figures.
  """
  if not results.rows:
    return ""
  header = [
    "case",
    "median",
    "fastest to slowest",
    "us/sample",
    "tokens/s",
    "GFLOP/s",
    "% own",
    "% 2048",
  ]
  header += ["% bf16 peak"] * results.accelerated + ["compile", "memory", "time/jgpt's"]
  table = [header]
  for row in results.rows:
    if not row.seconds:
      table.append([row.name, "n/a", *[""] * (len(header) - 2)])
      continue
    rate, per_sample = row.rate(row.flops), row.rate(row.samples)
    share = compute_shares(row, results)
    line = [
      row.name,
      f"{format_seconds(row.median)}{f'/{row.per}' if row.per else ''}",
      format_spread(row.seconds),
      f"{1e6 / per_sample:.4g}" if per_sample else "",
      f"{row.rate(row.tokens):,.0f}" if row.tokens else "",
      f"{rate / 1e9:.4g}" if rate else "",
      format_share(share["own_shapes"]),
      format_share(share["square"]),
    ]
    if results.accelerated:
      line.append((format_share(share["bf16_peak"]) or "n/a") if rate else "")
    line += [
      f"{row.compile_seconds:.2f} s" if row.compile_seconds is not None else "",
      format_size(row.memory_bytes) if row.memory_bytes is not None else "",
      format_ratios(row.ratios),
    ]
    table.append(line)
  drawn = [row for row in results.rows if row.seconds and row.per == "call"]
  notes = [
    f"{row.name}: {row.rate(row.samples):,.{0 if row.rate(row.samples) >= 100 else 1}f} samples/s"
    for row in drawn
    if row.samples
  ]
  notes += [f"{row.name}: n/a ({row.reason})" for row in results.rows if row.reason]
  return "\n".join([align(table), *notes])


def format_parts(parts: Sequence[Parts]) -> str:
  """Formats the medians of a step's parts, their sum, and the median of the step."""
  if not parts:
    return ""
  table = [["of a step, medians", "forward", "backward", "update", "sum", "whole step"]]
  for p in parts:
    medians = [statistics.median(values) for values in (p.forward, p.backward, p.update)]
    total = sum(medians)
    table.append(
      [p.case, *map(format_seconds, medians), f"{format_seconds(total)} ({total / p.step:.0%})"]
    )
    table[-1].append(format_seconds(p.step))
  return align(table)


def format_splits(splits: Sequence[Split]) -> str:
  """Formats the medians of the parts of whole commands."""
  if not splits:
    return ""
  names = list(dict.fromkeys(name for split in splits for name in split.parts))
  table = [["of a command, medians in s", *names]]
  table += [
    [s.case, *(f"{statistics.median(s.parts[n]):.3f}" if n in s.parts else "" for n in names)]
    for s in splits
  ]
  return align(table)


def format_limits(results: Results) -> str:
  """Formats the limits of the machine."""
  table = [["limit", "of", "rate", "reached"]]
  for limit in results.limits:
    scale = 1 if limit.unit == "tokens/s" else 1e9
    rate = f"{limit.rate / scale:,.4g} {'' if scale == 1 else 'G'}{limit.unit}"
    table.append([limit.name, limit.case or "this machine", rate, format_share(limit.reached, "%")])
  if results.accelerated:
    peak = f"{results.peak / 1e12:,.4g} TFLOP/s" if results.peak else "n/a"
    table.append(["dense bfloat16 peak, by its maker", "this device", peak, ""])
  return align(table) if len(table) > 1 else ""


def align(table: Sequence[Sequence[str]]) -> str:
  """Pads the cells of a table so that its columns are aligned."""
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  return "\n".join(
    "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
    for line in table
  )


def format_seconds(seconds: float) -> str:
  """Formats seconds with four digits and a unit: us below 10 ms, ms below 10 s."""
  scale, unit = _choose_unit(seconds)
  return f"{seconds * scale:.4g} {unit}"


def _choose_unit(seconds: float) -> tuple[float, str]:
  return (1e6, "us") if abs(seconds) < 0.01 else (1e3, "ms") if abs(seconds) < 10 else (1, "s")


def format_spread(seconds: Sequence[float]) -> str:
  """Formats the fastest and the slowest round in the unit of the median."""
  scale, unit = _choose_unit(statistics.median(seconds))
  return f"{min(seconds) * scale:.4g} to {max(seconds) * scale:.4g} {unit}"


def format_share(share: float | None, unit: str = "") -> str:
  """Formats a share from 0 to 1 in percent; "" for None."""
  return "" if share is None else f"{share:.1%}".removesuffix("%") + unit


def format_size(count: int) -> str:
  """Formats a number of bytes in kB, MB or GB (1 kB is 1,000 bytes)."""
  for scale, unit in ((1e9, "GB"), (1e6, "MB")):
    if count >= scale:
      return f"{count / scale:.3g} {unit}"
  return f"{count / 1e3:.3g} kB"


def format_ratios(ratios: Sequence[float] | None) -> str:
  """Formats the median ratio and its range: "1.31 (1.25 to 1.40)"; three digits from 10 on."""
  if not ratios:
    return ""
  median, low, high = (
    f"{x:.2f}" if x < 10 else f"{x:.3g}"
    for x in (statistics.median(ratios), min(ratios), max(ratios))
  )
  return f"{median} ({low} to {high})"
