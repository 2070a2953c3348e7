"""Programs compiled for devices that are not there: `python -m jgpt.bench --aot tpu:v5e:2x4`.

Nothing is run, so nothing here is measured but the time of compiling: what a program needs is what
its compiler says, and how long it would take is an estimate. The devices are in
`devices/topology.py`, and the compiler's text is read in `hlo.py`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jgpt.bench import hlo
from jgpt.bench.results import align, format_seconds, format_size
from jgpt.config import Experiment
from jgpt.devices import limits, topology
from jgpt.errors import UserError, near_matches
from jgpt.params import count_params

if TYPE_CHECKING:  # jax is imported after the environment is set
  import jax

NUM_TOKENS = 1 << 20  # of the training part, which every device holds; a tenth is held out
PROGRAMS = ("init", "steps", "save", "stack", "sampling", "evaluation")
MAX_REASON = 300  # characters of a compiler's message


@dataclasses.dataclass(frozen=True)
class AheadProgram:
  """A program as its compiler left it.

  Attributes:
    name: as `lower_programs` names it.
    compile_seconds: measured.
    reason: why it does not compile, in the compiler's words; "" if it does. Then what follows is
      not known.
    peak_bytes: of a device's memory while it runs, by the compiler.
    moved_bytes: of its arguments and results, each read or written at least once.
    collectives: its collective operations.
    kernels: calls of kernels that XLA did not write, by target.
    cycles: XLA's estimate, of TPUs; kernels and collectives have none. None for other devices.
  """

  name: str
  compile_seconds: float
  reason: str = ""
  peak_bytes: int | None = None
  moved_bytes: int | None = None
  collectives: tuple[hlo.Collective, ...] = ()
  kernels: dict[str, int] = dataclasses.field(default_factory=dict)
  cycles: int | None = None


@dataclasses.dataclass(frozen=True)
class StepBound:
  """What an update takes at least on a device, and by the compiler's estimate.

  Attributes:
    flops: by `limits.count_train_flops`.
    tokens: that the device computes.
    peak_seconds: `flops` at the device's peak; None where the peak is not known.
    bandwidth_seconds: the program's arguments and results at the bandwidth of its memory.
    estimated_seconds: estimated cycles at the clock; without kernels and collectives.
  """

  flops: float
  tokens: int
  peak_seconds: float | None
  bandwidth_seconds: float | None
  estimated_seconds: float | None

  @property
  def least_seconds(self) -> float | None:
    """Returns the larger of the two bounds; None where none is known."""
    return max(filter(None, (self.peak_seconds, self.bandwidth_seconds)), default=None)


@dataclasses.dataclass(frozen=True)
class AheadReport:
  """All programs of a run, compiled for devices that are not there.

  Attributes:
    target: the devices.
    kind: jax's `device_kind`.
    num_devices: that the run uses.
    memory: bytes that jax's programs have on a device; None where it is not known.
    experiment: resolved, `compute` too.
    notes: what of `compute` could not be chosen as asked, a line each.
    versions: of jax and of the compiler.
    programs: in the order in which they were compiled.
    step: of "steps"; None where it does not compile, or was not asked for.
  """

  target: topology.Target
  kind: str
  num_devices: int
  memory: int | None
  experiment: Experiment
  notes: list[str]
  versions: dict[str, str]
  programs: list[AheadProgram]
  step: StepBound | None = None


def compile_ahead(
  experiment: Experiment, target: topology.Target, names: Sequence[str] = ()
) -> AheadReport:
  """Compiles the programs of a run for devices that are not there.

  Args:
    experiment: resolved; `compute` may hold "auto".
    target: from `topology.parse_target`; its environment is set.
    names: of the programs that are wanted; none compiles all.

  Raises:
    UserError: if the compiler is not installed, or the devices do not fit the settings.
  """
  from jgpt.devices.compute import explain_compute, resolve_compute
  from jgpt.program import lower_programs
  from jgpt.sharding import make_mesh

  devices = topology.find_target_devices(target)
  mesh = make_mesh(experiment, devices)
  wanted = _expand_names(names, experiment.train.eval_batches) if names else None
  lowered = lower_programs(experiment, devices, NUM_TOKENS, names=wanted)
  notes = explain_compute(experiment, devices[0])
  experiment = resolve_compute(experiment, devices[0])
  programs = [_compile(name, x) for name, x in lowered.items()]
  report = AheadReport(
    target,
    devices[0].device_kind,
    mesh.size,
    limits.find_memory_limit(devices[0].device_kind),
    experiment,
    notes,
    topology.find_compiler_versions(target),
    programs,
  )
  (steps,) = [p for p in programs if p.name == "steps" and not p.reason] or (None,)
  return dataclasses.replace(report, step=steps and bound_step(report, steps))


def check_names(names: Sequence[str]) -> None:
  """Checks that there are programs of these names.

  Raises:
    UserError: naming those there are.
  """
  for name in names:
    if name not in PROGRAMS:
      raise UserError(
        f"there is no program {name!r}.{near_matches(name, PROGRAMS)} There are "
        f"{', '.join(PROGRAMS)}."
      )


def _expand_names(names: Sequence[str], eval_batches: int | None) -> set[str]:
  """Adds the evaluation of a sample to the whole one."""
  sample = [f"evaluation of {eval_batches} batches"] if "evaluation" in names else []
  return {*names, *sample}


def _compile(name: str, lowered: jax.stages.Lowered) -> AheadProgram:
  import jax

  from jgpt.devices.footprint import measure_program

  began = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    seconds = time.perf_counter() - began
    return AheadProgram(name, seconds, reason=" ".join(str(error).split())[:MAX_REASON])
  seconds = time.perf_counter() - began
  sizes, module = compiled.memory_analysis(), hlo.parse_module(compiled.as_text())
  return AheadProgram(
    name,
    seconds,
    peak_bytes=measure_program(compiled),
    moved_bytes=sizes.argument_size_in_bytes + sizes.output_size_in_bytes,
    collectives=tuple(hlo.find_collectives(module)),
    kernels=hlo.count_kernels(module),
    cycles=hlo.estimate_cycles(module),
  )


def bound_step(report: AheadReport, steps: AheadProgram) -> StepBound:
  """Computes what an update takes at least on one of the devices."""
  data, compute = report.experiment.data, report.experiment.compute
  device = limits.find_accelerator(report.kind)
  tokens = data.batch_size * data.seq_len // report.num_devices
  flops = tokens * limits.count_train_flops(report.experiment.model, data.seq_len)
  peak = limits.find_peak(report.kind, compute.dtype, compute.precision)
  clock = topology.find_clock(report.target)
  return StepBound(
    flops=flops,
    tokens=tokens,
    peak_seconds=flops / peak if peak else None,
    bandwidth_seconds=steps.moved_bytes / device.bandwidth if device else None,
    estimated_seconds=steps.cycles / clock if steps.cycles and clock else None,
  )


def report_to_json(report: AheadReport) -> dict[str, Any]:
  """Returns a report for `json`, in seconds and bytes; "estimates" says what was not measured."""
  return {
    "target": report.target.name,
    "device_kind": report.kind,
    "devices": report.num_devices,
    "memory_bytes": report.memory,
    "versions": report.versions,
    "compute": dataclasses.asdict(report.experiment.compute),
    "notes": report.notes,
    "programs": [
      dataclasses.asdict(program)
      | {
        "compiles": not program.reason,
        "fits": does_fit(report, program),
        "collectives": [
          dataclasses.asdict(found) | {"trips": found.trips} for found in program.collectives
        ],
      }
      for program in report.programs
    ],
    "step": report.step and dataclasses.asdict(report.step),
    "measured": ["compile_seconds"],
    "estimates": ["cycles", "estimated_seconds"],
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
  """Formats the collectives of each program, those of one kind and place in one line."""
  table = [["collectives of", "kind", "number", "bytes", "where"]]
  for program in report.programs:
    found: dict[tuple[str, str], list[int]] = {}
    for collective in program.collectives:
      where = describe_place(program, collective)
      found.setdefault((collective.kind, where), []).append(collective.num_bytes)
    for (kind, where), sizes in found.items():
      table.append([program.name, kind, str(len(sizes)), format_size(sum(sizes)), where])
  return align(table) if len(table) > 1 else ""


def describe_place(program: AheadProgram, collective: hlo.Collective) -> str:
  """Describes the loops around a collective; around a step is the loop over steps."""
  loops = collective.loops[1:] if program.name == "steps" else collective.loops
  inside = [f"in a loop of {loop.trips or 'unknown length'}" for loop in reversed(loops)]
  once = "once a step" if program.name == "steps" else "once"
  return f"{' '.join(inside)}: {collective.trips} times" if inside else once


def format_bound(report: AheadReport) -> str:
  """Formats what a step takes at least, and the compiler's estimate."""
  step = report.step
  if step is None:
    return ""
  times = {
    "at the device's peak": step.peak_seconds,
    "arguments and results at its bandwidth": step.bandwidth_seconds,
    "by estimated cycles": step.estimated_seconds,
  }
  table = [["of a step, on each device", "time", "tokens/s", ""]]
  for name, seconds in times.items():
    if seconds is None:
      table.append([name, "n/a", "", ""])
      continue
    kind = "estimate, not measured; kernels and collectives are not in it"
    table.append(
      [
        name,
        format_seconds(seconds),
        f"{step.tokens / seconds:,.0f}",
        kind if name.startswith("by") else "bound",
      ]
    )
  formula = f"FLOPs of a step on each device, by 6 P + 6 L D T a token: {step.flops:.4g}"
  return f"{align(table)}\n{formula}"
