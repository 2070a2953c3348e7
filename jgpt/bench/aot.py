"""Programs compiled for devices that are not there: `python -m jgpt.bench --aot tpu:v5e:2x4`.

Nothing is run, so nothing here is measured but the time of compiling: what a program needs is what
its compiler says, and how long it would take is an estimate. The devices are in
`devices/topology.py`. The compiler's text is read in `hlo.py`, its work is counted in `work.py`,
and what that takes at least in `roofline.py`; JSON and tables are in `aot_report.py`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jgpt.bench import hlo, roofline, work
from jgpt.bench.roofline import Exchange, StepBound
from jgpt.config import Experiment
from jgpt.config.settings import change
from jgpt.devices import limits, topology
from jgpt.errors import UserError, near_matches

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
    exchanges: its collective operations, on the run's mesh.
    kernels: calls of kernels that XLA did not write, by target.
    cycles: XLA's estimate, of TPUs; kernels and collectives have none. None for other devices.
    flops: of its matrix products; of "steps", in one step.
    traffic_bytes: that it reads from a device's memory and writes; of "steps", in one step.
  """

  name: str
  compile_seconds: float
  reason: str = ""
  peak_bytes: int | None = None
  moved_bytes: int | None = None
  exchanges: tuple[Exchange, ...] = ()
  kernels: dict[str, int] = dataclasses.field(default_factory=dict)
  cycles: int | None = None
  flops: int | None = None
  traffic_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class AheadReport:
  """All programs of a run, compiled for devices that are not there.

  Attributes:
    target: the devices.
    kind: jax's `device_kind`.
    mesh: sizes of its axes.
    memory: bytes that jax's programs have on a device; None where it is not known.
    experiment: resolved, `compute` too.
    notes: what of `compute` could not be chosen as asked, a line each.
    versions: of jax and of the compiler.
    programs: in the order in which they were compiled.
    step: of "steps"; None where it does not compile, or was not asked for.
  """

  target: topology.Target
  kind: str
  mesh: dict[str, int]
  memory: int | None
  experiment: Experiment
  notes: list[str]
  versions: dict[str, str]
  programs: list[AheadProgram]
  step: StepBound | None = None

  @property
  def num_devices(self) -> int:
    """Counts the devices that the run uses."""
    return math.prod(self.mesh.values())


def parse_mesh(text: str) -> dict[str, int]:
  """Parses a mesh, such as "data=2,fsdp=4", to settings; axes without a size have one device.

  Raises:
    UserError: if it names no axes and sizes.
  """
  from jgpt.sharding import AXES

  sizes = dict.fromkeys(AXES, 1)
  for item in text.split(","):
    name, _, size = item.strip().partition("=")
    if name not in AXES:
      near = near_matches(name, AXES)
      raise UserError(
        f"--mesh {text}: there is no axis {name!r}.{near} Axes are {', '.join(AXES)}; for example "
        "--mesh data=2,fsdp=4"
      )
    if not size.isascii() or not size.isdigit() or not int(size):
      raise UserError(f"--mesh {text}: {name}={size} is no number of devices. Try {name}=8")
    sizes[name] = int(size)
  return {f"mesh.{name}": size for name, size in sizes.items()}


def compile_meshes(
  experiment: Experiment, target: topology.Target, meshes: Sequence[dict[str, int]]
) -> Iterator[AheadReport]:
  """Compiles the training step of a run on each of several meshes of all devices.

  Args:
    experiment: resolved; `compute` may hold "auto".
    target: from `topology.parse_target`; its environment is set.
    meshes: from `parse_mesh`.

  Raises:
    UserError: before anything is compiled, if a mesh does not fit the devices or the batch.
  """
  from jgpt.sharding import make_mesh

  devices = topology.find_target_devices(target)
  for mesh in meshes:
    if math.prod(mesh.values()) != len(devices):
      raise UserError(
        f"{describe_mesh(mesh)} is a mesh of {math.prod(mesh.values())} devices, and "
        f"{target.name} has {len(devices)}. Try --mesh fsdp={len(devices)}"
      )
  changed = [change(experiment, mesh) for mesh in meshes]
  for one in changed:
    make_mesh(one, devices)
  for one in changed:
    yield compile_ahead(one, target, ("steps",))


def describe_mesh(mesh: dict[str, int]) -> str:
  """Formats a mesh as `parse_mesh` reads it, without axes of one device."""
  sizes = {name.removeprefix("mesh."): n for name, n in mesh.items() if n > 1}
  return ",".join(f"{name}={n}" for name, n in (sizes or {"data": 1}).items())


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
  network = topology.find_network(target, list(mesh.devices.flat))
  programs = [_compile(name, x, dict(mesh.shape), network) for name, x in lowered.items()]
  report = AheadReport(
    target,
    devices[0].device_kind,
    dict(mesh.shape),
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


def _compile(
  name: str,
  lowered: jax.stages.Lowered,
  mesh: dict[str, int],
  network: topology.Network | None,
) -> AheadProgram:
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
    exchanges=tuple(
      roofline.describe_exchange(found, mesh, network) for found in hlo.find_collectives(module)
    ),
    kernels=hlo.count_kernels(module),
    cycles=hlo.estimate_cycles(module),
    flops=work.count_flops(module),
    traffic_bytes=work.count_traffic(module),
  )


def bound_step(report: AheadReport, steps: AheadProgram) -> StepBound:
  """Computes what an update takes at least on one of the devices."""
  data, compute = report.experiment.data, report.experiment.compute
  device = limits.find_accelerator(report.kind)
  sequences = data.batch_size / report.num_devices
  tokens = data.batch_size * data.seq_len // report.num_devices
  flops = tokens * limits.count_train_flops(report.experiment.model, data.seq_len)
  peak = limits.find_peak(report.kind, compute.dtype, compute.precision)
  clock = topology.find_clock(report.target)
  return StepBound(
    flops=flops,
    program_flops=steps.flops,
    traffic_bytes=steps.traffic_bytes,
    sent_bytes=sum(x.sent_bytes * x.collective.trips for x in steps.exchanges),
    sequences=sequences,
    tokens=tokens,
    num_devices=report.num_devices,
    peak=peak,
    compute_seconds=max(flops, steps.flops) / peak if peak else None,
    memory_seconds=steps.traffic_bytes / device.bandwidth if device else None,
    network_seconds=add_seconds(steps.exchanges),
    tensor_seconds=add_seconds([x for x in steps.exchanges if "tensor" in x.axes]),
    estimated_seconds=steps.cycles / clock if steps.cycles and clock else None,
  )


def add_seconds(exchanges: Sequence[Exchange]) -> float | None:
  """Adds the times of exchanges; None where one is not known."""
  if any(exchange.seconds is None for exchange in exchanges):
    return None
  return sum(exchange.seconds * exchange.collective.trips for exchange in exchanges)
