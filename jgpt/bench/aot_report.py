"""What `bench --aot` prints: JSON, and tables of programs, collectives, bounds and meshes. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jgpt.bench import hlo
from jgpt.bench.aot import AheadProgram, AheadReport, add_seconds, describe_mesh
from jgpt.bench.results import align, format_seconds, format_share, format_size
from jgpt.bench.roofline import Exchange, StepBound
from jgpt.devices import limits
from jgpt.params import count_params


def report_to_json(report: AheadReport) -> dict[str, Any]:
  """Returns a report for `json`, in seconds and bytes; "estimates" says what was not measured."""
  return {
    "target": report.target.name,
    "device_kind": report.kind,
    "devices": report.num_devices,
    "mesh": report.mesh,
    "memory_bytes": report.memory,
    "versions": report.versions,
    "compute": dataclasses.asdict(report.experiment.compute),
    "notes": report.notes,
    "programs": [
      {name: value for name, value in dataclasses.asdict(program).items() if name != "exchanges"}
      | {
        "compiles": not program.reason,
        "fits": does_fit(report, program),
        "collectives": [_exchange_to_json(exchange) for exchange in program.exchanges],
      }
      for program in report.programs
    ],
    "step": report.step and _bound_to_json(report.step),
    "measured": ["compile_seconds"],
    "estimates": ["cycles", "estimated_seconds"],
  }


def _exchange_to_json(exchange: Exchange) -> dict[str, Any]:
  found = exchange.collective
  return {
    "kind": found.kind,
    "num_bytes": found.num_bytes,
    "trips": found.trips,
    "loops": [dataclasses.asdict(loop) for loop in found.loops],
    "axes": exchange.axes,
    "size": exchange.size,
    "sent_bytes": exchange.sent_bytes,
    "seconds": exchange.seconds,
  }


def _bound_to_json(step: StepBound) -> dict[str, Any]:
  balance = step.balance
  return dataclasses.asdict(step) | {
    "bound_by": step.bound_by,
    "least_seconds": step.least_seconds,
    "most_seconds": step.most_seconds,
    "balance_sequences": None if balance is None or math.isinf(balance) else balance,
  }


def does_fit(report: AheadReport, program: AheadProgram) -> bool | None:
  """Returns whether a program fits into a device's memory; None where that is not known."""
  if program.reason:
    return False if "RESOURCE_EXHAUSTED" in program.reason else None
  return None if report.memory is None else program.peak_bytes <= report.memory


# --- Tables ---


def format_report(report: AheadReport) -> str:
  """Formats a report: the devices, a table of programs, their collectives, and the bounds."""
  tables = [
    format_head(report),
    format_programs(report),
    format_collectives(report),
    format_bound(report),
  ]
  return "\n\n".join(table for table in tables if table)


def format_head(report: AheadReport) -> str:
  """Formats what was compiled for what, with which versions."""
  from jgpt.config.settings import format_value

  data, chosen = report.experiment.data, dataclasses.asdict(report.experiment.compute)
  micro = report.experiment.train.micro_batch_size
  memory = "memory not known" if report.memory is None else f"{format_size(report.memory)} each"
  batch = f"{data.batch_size} sequences of {data.seq_len:,} a step"
  if micro:
    batch += f", {micro} at a time"
  return "\n".join(
    [
      f"{report.target.name}: {report.num_devices} x {report.kind}, {memory} for jax's programs; "
      "compiled only, nothing was run",
      ", ".join(f"{name} {version}" for name, version in report.versions.items()),
      f"{count_params(report.experiment.model):,} parameters; {batch}, "
      f"{(micro or data.batch_size) / report.num_devices:g} on each device",
      "compute " + " ".join(f"{name}={format_value(value)}" for name, value in chosen.items()),
      *report.notes,
    ]
  )


def format_programs(report: AheadReport) -> str:
  """Formats the table of programs, and below it why some do not compile."""
  fits = {True: "fits", False: "does not fit", None: "n/a"}
  table = [["program", "compiles", "peak memory", "", "compile", "estimated cycles", "kernels"]]
  for program in report.programs:
    table.append(
      [
        program.name,
        "no" if program.reason else "yes",
        "" if program.peak_bytes is None else format_size(program.peak_bytes),
        fits[does_fit(report, program)],
        f"{program.compile_seconds:.1f} s",
        "" if program.cycles is None else f"{program.cycles / 1e6:,.1f} M",
        ", ".join(f"{count} {name}" for name, count in program.kernels.items()),
      ]
    )
  reasons = [f"{program.name}: {program.reason}" for program in report.programs if program.reason]
  return "\n".join([align(table), *reasons])


def format_collectives(report: AheadReport) -> str:
  """Formats the collectives of each program, those of one kind, axis and place in one line.

  Bytes are those of one time, sent bytes and the time of all times in a step.
  """
  table = [["collectives of", "kind", "along", "number", "bytes", "sent by each", "time", "where"]]
  for program in report.programs:
    found: dict[tuple[str, str, str], list[Exchange]] = {}
    for exchange in program.exchanges:
      where = describe_place(program, exchange.collective)
      key = exchange.collective.kind, "+".join(exchange.axes) or "none", where
      found.setdefault(key, []).append(exchange)
    for (kind, axes, where), some in found.items():
      seconds = add_seconds(some)
      table.append(
        [
          program.name,
          kind,
          axes,
          str(len(some)),
          format_size(sum(x.collective.num_bytes for x in some)),
          format_size(sum(x.sent_bytes * x.collective.trips for x in some)),
          "n/a" if seconds is None else format_seconds(seconds),
          where,
        ]
      )
  return align(table) if len(table) > 1 else ""


def describe_place(program: AheadProgram, collective: hlo.Collective) -> str:
  """Describes the loops around a collective; around a step is the loop over steps."""
  loops = collective.loops[1:] if program.name == "steps" else collective.loops
  inside = [f"in a loop of {loop.trips or 'unknown length'}" for loop in reversed(loops)]
  once = "once a step" if program.name == "steps" else "once"
  return f"{' '.join(inside)}: {collective.trips} times" if inside else once


def format_bound(report: AheadReport) -> str:
  """Formats what a step takes at least on each device, and the compiler's estimate."""
  step = report.step
  if step is None:
    return ""
  device = limits.find_accelerator(report.kind)
  peak = "unknown" if step.peak is None else f"{step.peak / 1e12:.4g} TFLOP/s"
  bandwidth = "unknown" if device is None else f"{format_size(device.bandwidth)}/s"
  rate = device and device.interconnect
  network = f"{format_size(rate)}/s" if rate else "unknown"
  flops = max(step.flops, step.program_flops)
  done = {
    "compute": f"{flops / 1e12:.4g} TFLOP at {peak}",
    "memory": f"{format_size(step.traffic_bytes)} read and written at {bandwidth}",
    "network": f"{format_size(step.sent_bytes)} sent, {network} over all its links",
  }
  table = [["of a step, on each device", "time", "tokens/s", "of the peak", ""]]
  for name, seconds in step.times.items():
    table.append([name, _format_time(seconds), "", "", done[name]])
  rows = {
    "all at once": (step.least_seconds, f"bound by {step.bound_by}"),
    "one after the other": (step.most_seconds, "nothing overlaps"),
  }
  for name, (seconds, words) in rows.items():
    cells = ["n/a", "", "", ""] if seconds is None else [*_format_rate(step, seconds), words]
    table.append([name, *cells])
  if step.estimated_seconds is not None:
    words = "estimate, not measured; kernels and collectives are not in it"
    table.append(["by estimated cycles", *_format_rate(step, step.estimated_seconds), words])
  return "\n".join(
    [
      align(table),
      f"FLOPs of a step on each device: {step.flops:.4g} by 6 P + 6 L D T a token, "
      f"{step.program_flops:.4g} in the compiled program's products, without kernels",
      f"network and compute take the same time at {_format_balance(step)} sequences on each device",
    ]
  )


def _format_rate(step: StepBound, seconds: float) -> list[str]:
  """Formats the time of a step, its tokens/s, and the share of the peak."""
  share = format_share(step.compute_mfu(seconds), "%") or "n/a"
  return [format_seconds(seconds), f"{step.count_rate(seconds):,.0f}", share]


def _format_time(seconds: float | None) -> str:
  return "n/a" if seconds is None else format_seconds(seconds)


def _format_balance(step: StepBound) -> str:
  if step.balance is None:
    return "n/a"
  return "no number of" if math.isinf(step.balance) else f"about {step.balance:.2g}"


def format_meshes(reports: Sequence[AheadReport]) -> str:
  """Formats a table of the step on several meshes, and below it why some do not compile."""
  table = [
    [
      *("mesh", "peak memory", "", "compute", "memory", "network", "bound by", "step"),
      *("tokens/s", "of the peak", "balance"),
    ]
  ]
  fits = {True: "fits", False: "does not fit", None: "n/a"}
  for report in reports:
    (program,), step = report.programs, report.step
    line = [
      describe_mesh(report.mesh),
      "" if program.peak_bytes is None else format_size(program.peak_bytes),
      fits[does_fit(report, program)],
    ]
    if step is not None:
      line += [*map(_format_time, step.times.values()), step.bound_by or "n/a"]
      times = (step.least_seconds, step.most_seconds)
      ranges = [["n/a"] * 3 if t is None else _format_rate(step, t) for t in times]
      line += [" to ".join(pair) for pair in zip(*ranges, strict=True)]
      line.append(_format_balance(step))
    table.append(line + [""] * (len(table[0]) - len(line)))
  note = (
    "step, tokens/s of all devices and share of the peak: from perfect overlap to none; balance: "
    "sequences on each device at which network and compute take the same time"
  )
  reasons = [
    f"{describe_mesh(report.mesh)}: {report.programs[0].reason}"
    for report in reports
    if report.programs[0].reason
  ]
  return "\n".join([format_head(reports[0]), "", align(table), note, *reasons])
