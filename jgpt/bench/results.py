"""What a benchmark found, and its tables.

Responsible for what follows from measured seconds (rates, shares, ratios) and for showing it. Pure: nothing here takes a
time or prints, and this file imports no jax.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

OURS = "jgpt"


@dataclasses.dataclass(frozen=True)
class Row:
  """One contender in one case.

  Attributes:
    case: what was measured.
    contender: "jgpt", or a peer's name.
    seconds: of each round, per step, call or command; [] where it could not be measured.
    per: "step" or "call"; "" for a whole command or file.
    samples: documents or texts in one; None where there are none.
    tokens: tokens in one that count: padding does not.
    flops: floating-point operations of one, by `limits.count_train_flops`.
    compile_seconds: until the first step could begin.
    memory_bytes: the most that the compiled step holds.
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
    """Of the rounds' seconds."""
    return statistics.median(self.seconds)

  def rate(self, amount: float | None) -> float | None:
    """An amount per second, at the median; None without an amount or a time."""
    return amount / self.median if amount is not None and self.seconds else None

  @property
  def name(self) -> str:
    """Case and contender, for a table."""
    return self.case if self.contender == OURS else f"{self.case}: {self.contender}"


@dataclasses.dataclass(frozen=True)
class Parts:
  """A step's parts, each timed in a program of its own: seconds per step of each round.

  Attributes:
    case: what was measured.
    forward: the loss alone.
    gradient: the loss and its gradient.
    update: the optimizer, and adding what it says to the parameters.
    step: the median of the whole step, to hold the sum of the parts against.
  """

  case: str
  forward: list[float]
  gradient: list[float]
  update: list[float]
  step: float

  @property
  def backward(self) -> list[float]:
    """Gradient minus forward, of each round."""
    return [g - f for f, g in zip(self.forward, self.gradient, strict=True)]


@dataclasses.dataclass(frozen=True)
class Split:
  """Where the time of a whole command went: seconds of each round for each part, in order; they add up to the whole."""

  case: str
  parts: dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Limit:
  """What the machine can do, measured.

  Attributes:
    name: of what.
    rate: FLOP/s, bytes/s or tokens/s.
    unit: "FLOP/s", "B/s" or "tokens/s".
    case: the case that it limits; "" for the machine's own.
    reached: what that case reached, as a share; None where the table of cases says it.
  """

  name: str
  rate: float
  unit: str
  case: str = ""
  reached: float | None = None


@dataclasses.dataclass(frozen=True)
class Results:
  """Everything that cases found.

  Attributes:
    rows: of the first table.
    parts: of the second.
    splits: of whole commands.
    limits: of the machine.
    peak: the device's dense bfloat16 peak in FLOP/s; None where it is not known, or on a CPU.
    accelerated: whether the device is no CPU, so that a share of the peak is asked for.
  """

  rows: list[Row] = dataclasses.field(default_factory=list)
  parts: list[Parts] = dataclasses.field(default_factory=list)
  splits: list[Split] = dataclasses.field(default_factory=list)
  limits: list[Limit] = dataclasses.field(default_factory=list)
  peak: float | None = None
  accelerated: bool = False

  def limit(self, name: str, case: str = "") -> float | None:
    """A measured rate, or None where it was not measured."""
    return next((x.rate for x in self.limits if (x.name, x.case) == (name, case)), None)


OWN_SHAPES, SQUARE, BANDWIDTH = "products at the case's own shapes", "float32 product 2048 x 2048 x 2048", "memory, read"


def divide_rounds(peer: Sequence[float], ours: Sequence[float]) -> list[float]:
  """The ratio of each round: a machine that slows down slows both, and leaves it."""
  return [a / b for a, b in zip(peer, ours, strict=True)]


def shares(row: Row, results: Results) -> dict[str, float | None]:
  """What a row reached of each rate, from 0 to 1: own shapes, square, bf16 peak."""
  rate = row.rate(row.flops)
  against = {
    "own_shapes": results.limit(OWN_SHAPES, row.case),
    "square": results.limit(SQUARE),
    "bf16_peak": results.peak,
  }
  return {name: rate / limit if rate is not None and limit else None for name, limit in against.items()}


def results_to_json(results: Results) -> dict[str, Any]:
  """All that was measured and what follows from it, for `json`: seconds, FLOP/s, bytes, shares from 0 to 1."""
  rows = [
    dataclasses.asdict(row)
    | {
      "median_seconds": row.median if row.seconds else None,
      "samples_per_second": row.rate(row.samples),
      "tokens_per_second": row.rate(row.tokens),
      "flops_per_second": row.rate(row.flops),
      "shares": shares(row, results),
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
  """The tables, one below the other; those without lines are left out."""
  tables = [format_rows(results), format_parts(results.parts), format_splits(results.splits), format_limits(results)]
  return "\n\n".join(table for table in tables if table)


def format_rows(results: Results) -> str:
  """The first table: a line for each contender in each case; below it samples per second, and why some have no figures."""
  if not results.rows:
    return ""
  header = ["case", "median", "fastest to slowest", "us/sample", "tokens/s", "GFLOP/s", "% own", "% 2048"]
  header += ["% bf16 peak"] * results.accelerated + ["compile", "memory", "time/jgpt's"]
  table = [header]
  for row in results.rows:
    if not row.seconds:
      table.append([row.name, "n/a", *[""] * (len(header) - 2)])
      continue
    rate, per_sample, share = row.rate(row.flops), row.rate(row.samples), shares(row, results)
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
  """The second table: a step's parts, and what they add up to beside the step."""
  if not parts:
    return ""
  table = [["of a step, medians", "forward", "backward", "update", "sum", "whole step"]]
  for p in parts:
    medians = [statistics.median(values) for values in (p.forward, p.backward, p.update)]
    total = sum(medians)
    table.append([p.case, *map(format_seconds, medians), f"{format_seconds(total)} ({total / p.step:.0%})"])
    table[-1].append(format_seconds(p.step))
  return align(table)


def format_splits(splits: Sequence[Split]) -> str:
  """Where whole commands spend their time."""
  if not splits:
    return ""
  names = list(dict.fromkeys(name for split in splits for name in split.parts))
  table = [["of a command, medians in s", *names]]
  table += [[s.case, *(f"{statistics.median(s.parts[n]):.3f}" if n in s.parts else "" for n in names)] for s in splits]
  return align(table)


def format_limits(results: Results) -> str:
  """What the machine can do."""
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
  """Lines of cells, the columns below each other."""
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table)


def format_seconds(seconds: float) -> str:
  """Four digits with a unit: us below 10 ms, ms below 10 s."""
  scale, unit = _unit(seconds)
  return f"{seconds * scale:.4g} {unit}"


def _unit(seconds: float) -> tuple[float, str]:
  return (1e6, "us") if abs(seconds) < 0.01 else (1e3, "ms") if abs(seconds) < 10 else (1, "s")


def format_spread(seconds: Sequence[float]) -> str:
  """Fastest to slowest, in the unit of the median."""
  scale, unit = _unit(statistics.median(seconds))
  return f"{min(seconds) * scale:.4g} to {max(seconds) * scale:.4g} {unit}"


def format_share(share: float | None, unit: str = "") -> str:
  """A share in percent, or "" for None."""
  return "" if share is None else f"{share:.1%}".removesuffix("%") + unit


def format_size(count: int) -> str:
  """Bytes in kB, MB or GB, by thousands."""
  for scale, unit in ((1e9, "GB"), (1e6, "MB")):
    if count >= scale:
      return f"{count / scale:.3g} {unit}"
  return f"{count / 1e3:.3g} kB"


def format_ratios(ratios: Sequence[float] | None) -> str:
  """The median ratio and its spread: "1.31 (1.25 to 1.40)"; three digits from 10 on."""
  if not ratios:
    return ""
  median, low, high = (f"{x:.2f}" if x < 10 else f"{x:.3g}" for x in (statistics.median(ratios), min(ratios), max(ratios)))
  return f"{median} ({low} to {high})"
