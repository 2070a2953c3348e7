"""Runs `python -m jgpt.bench`: how fast this machine trains, samples and starts.

The command line, and the description of the machine. The cases are in `cases.py`. No test asserts
speed. Every figure is measured in this call, without the compilation cache, and each program is
warmed up before it is timed:

  rounds      The contenders of a case take turns, one round each. The first round warms up and is
              not counted. jgpt runs in this process on one device, and each peer in a process of
              its own, which waits while others compute. The table has the median round, the fastest
              and the slowest. "time/jgpt's" is the median ratio to jgpt in the same round, and its
              range: above 1 the peer takes longer.
  tokens/s    Targets that count; the padding of documents does not.
  GFLOP/s     Tokens/s times 6 P + 6 L D T operations: P parameters in matrix products (the head
              once), L layers of width D, T positions (of documents the context), of which attention
              computes half (causal). % own and % 2048 are its share of what float32 products reach
              on this machine: the products of the step itself (each x @ w and the two of its
              gradient, one at a time, as often as they occur, with padding), and one of 2048 x 2048
              x 2048. On accelerators there is also the share of the dense bfloat16 peak.
  compile     Seconds until the first step could begin: drawing the state, compiling the step,
              evaluation and sampling.
  memory      Of the compiled step, as the compiler reports it: arguments + outputs + temporaries -
              aliased bytes.
  parts       Forward pass, gradient and update are programs of their own with the compiler options
              of the step. Each is repeated in a compiled loop and timed in the same rounds.
              Backward is gradient - forward in each round.
  decoding    tokens/s <= batch * bandwidth / (parameter bytes + batch * cache bytes per position *
              context). Bandwidth is that of a float32 product of a 50304 x 768 matrix and a vector.
  startup     New processes, from before their start to their end, in at most 3 rounds. All rounds
              count, as for weights. The parts are described in `startup.py`.
  saving      Steps in calls of their own, and as many from before a save until the checkpoint is on
              disk. The difference is the cost of a save; its share is of 100 steps and one save.
  peers       torch: PyTorch with fused AdamW and scaled_dot_product_attention on all cores, eager
              and with torch.compile; beside bf16 under torch.autocast, on a CPU eager; for sampling
              GPT2LMHeadModel.generate of Transformers. scalar: names in plain Python, as in
              microgpt.py.
  --scaling   Virtual devices share the cores that one device has too, so no row is faster than the
              first: efficiency is its time divided by a row's in the same round, and shows what
              dividing a step costs. Every setup is a process, or two, of its own. What is sent is
              counted in the compiled step, by ring algorithms. Losses of the first 10 steps are
              compared.
  --aot       Nothing is run. Peak memory and collectives are what the compiler says, of a corpus of
              1,048,576 tokens. Estimated cycles are XLA:TPU's, loop bodies times their trips; they
              have neither kernels nor collectives, and may be wrong by half. Of a step, compute is
              the larger of the formula's operations and those of the compiled products, at the
              published dense peak; memory is what the program's operations read and write, at the
              published bandwidth; network is what each device sends, by ring algorithms, over the
              links to its group: of n bytes over k devices n (k - 1) / k for an all-gather, a
              reduce-scatter and an all-to-all, twice that for an all-reduce, n for a
              collective-permute. If all three overlap a step takes the largest, if nothing does
              their sum. No latency is in it, and no product reaches its peak: no step is faster.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jgpt import cli
from jgpt.bench.cases import CASES, Session
from jgpt.bench.results import Results, format_results, results_to_json
from jgpt.config import catalog
from jgpt.config.settings import change, parse_setting, resolve
from jgpt.data.sources import expected_vocab_size
from jgpt.devices import limits
from jgpt.errors import UserError, near_matches

if TYPE_CHECKING:  # jax is imported after the arguments are understood
  import jax

BENCH_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "torch", "transformers")


def main(argv: list[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  args = _parser().parse_args(argv)
  if args.aot:
    return _compile_ahead(args)
  if args.mesh:
    raise UserError("--mesh goes with --aot. Try --aot tpu:v5e:2x4 --mesh fsdp=8")
  if args.rounds < 1:
    raise UserError(f"--rounds={args.rounds} must be at least 1.")
  if args.scaling:
    return _measure_scaling(args)
  if args.experiment or args.set:
    raise UserError(
      "--experiment and --set go with --aot and --scaling; the cases have settings of their own."
    )
  chosen = list(dict.fromkeys(args.only or CASES))
  for name in chosen:
    if name not in CASES:
      raise UserError(
        f"there is no case {name!r}.{near_matches(name, CASES)} There are {', '.join(CASES)}."
      )
  load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
  from jgpt.bench import peers
  from jgpt.devices import runtime

  peers.check_peer_packages(args.peer)
  import jax

  if jax.config.jax_disable_jit:
    raise UserError("what is measured is compiled: unset JAX_DISABLE_JIT")
  if note := runtime.set_up():
    print(note, file=sys.stderr)
  jax.config.update("jax_enable_compilation_cache", False)  # else "compile" would time reading
  devices = runtime.devices(to_train=True)
  device = devices[0]
  session = Session(
    args.rounds,
    tuple(dict.fromkeys(args.peer)),
    devices,
    Results(
      peak=limits.find_peak(device.device_kind, "bfloat16"), accelerated=device.platform != "cpu"
    ),
  )
  failures: list[str] = []
  for name in chosen:
    print(f"measuring {name} ...", file=sys.stderr, flush=True)
    try:
      CASES[name](session)
    except UserError as error:  # a peer's process ended; what was measured before is printed
      failures.append(f"{name} was not measured to its end: {error}")
    gc.collect()
    jax.clear_caches()
  machine = describe_machine(load, devices)
  if args.json:
    print(
      json.dumps(
        {"machine": machine, "rounds": args.rounds} | results_to_json(session.results), indent=2
      )
    )
  else:
    print(f"{format_machine(machine)}\n\n{format_results(session.results)}")
  for failure in failures:
    print(failure, file=sys.stderr)
  return 1 if failures else 0


def _measure_scaling(args: argparse.Namespace) -> int:
  """Times an experiment's step on several virtual devices and processes, and prints the table."""
  from jgpt.bench import scaling

  if args.only or args.peer:
    raise UserError("--only and --peer are of the cases, and --scaling has its own.")
  name = args.experiment or scaling.EXPERIMENT
  changes = dict(map(parse_setting, args.set))
  rows = scaling.measure_scaling(name, changes, args.rounds)
  if args.json:
    print(json.dumps({"experiment": name, "rows": scaling.scaling_to_json(rows)}, indent=2))
  else:
    print(scaling.format_scaling(rows, name))
  return 0


def _compile_ahead(args: argparse.Namespace) -> int:
  """Compiles an experiment's programs for devices that are not there, and prints the report."""
  from jgpt.bench import aot, aot_report
  from jgpt.devices import topology

  aot.check_names(args.only or ())
  meshes = list(map(aot.parse_mesh, args.mesh))
  if meshes and args.only:
    raise UserError("--mesh compiles the training step alone; leave out --only.")
  if args.peer or args.scaling:
    raise UserError("--peer and --scaling measure, and nothing is run with --aot.")
  if not args.experiment:
    names = ", ".join(catalog.list_experiments())
    raise UserError(f"--aot needs an experiment: --experiment NAME, one of {names}")
  target = topology.parse_target(args.aot)
  base = catalog.load_experiment(args.experiment)
  experiment = change(base, dict(map(parse_setting, args.set)))
  epoch_steps = None if experiment.train.epochs is None else 1
  experiment = resolve(experiment, expected_vocab_size(experiment.data), epoch_steps)
  topology.set_target_environment()
  from jgpt.devices import runtime

  runtime.set_up()
  if meshes:
    reports = []
    for report in aot.compile_meshes(experiment, target, meshes):
      reports.append(report)
      print(f"compiled {len(reports)} of {len(meshes)} meshes", file=sys.stderr, flush=True)
  else:
    reports = [aot.compile_ahead(experiment, target, args.only or ())]
  if args.json:
    found = [aot_report.report_to_json(report) for report in reports]
    print(json.dumps(found if meshes else found[0], indent=2))
  else:
    print(
      aot_report.format_meshes(reports)
      if len(reports) > 1
      else aot_report.format_report(reports[0])
    )
  return 1 if any(program.reason for report in reports for program in report.programs) else 0


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog="python -m jgpt.bench",
    description="Measure how fast this machine trains, samples and starts, beside what it could "
    "reach.",
    epilog=f"How the figures are made:\n\n  rounds  {__doc__.partition('  rounds  ')[2]}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--only",
    action="append",
    metavar="CASE",
    help=f"one of {', '.join(CASES)}; with --aot a program; repeat for more (default: all)",
  )
  parser.add_argument(
    "--peer",
    action="append",
    default=[],
    choices=["torch", "scalar"],
    help="measure this too, in the same rounds, where it fits; repeat for both",
  )
  parser.add_argument(
    "--rounds",
    type=int,
    default=7,
    metavar="N",
    help="rounds, of which the median counts (default: 7)",
  )
  parser.add_argument(
    "--aot",
    metavar="DEVICES",
    help="measure nothing: compile an experiment's programs for devices that are not there, such "
    "as tpu:v5e:2x4 or gpu:h100:8, and report memory, collectives and estimates",
  )
  parser.add_argument(
    "--scaling",
    action="store_true",
    help="time an experiment's step on 1, 2, 4 and 8 virtual CPU devices and on two processes",
  )
  parser.add_argument(
    "--experiment",
    metavar="NAME",
    help="with --aot and --scaling: an experiment of jgpt.run (with --scaling by default "
    "shakespeare_bytes)",
  )
  parser.add_argument(
    "--set",
    action="append",
    default=[],
    metavar="SECTION.FIELD=VALUE",
    help="with --aot and --scaling: change a setting of the experiment; repeat for more",
  )
  parser.add_argument(
    "--mesh",
    action="append",
    default=[],
    metavar="AXIS=SIZE,...",
    help="with --aot: compile the training step on this mesh of all devices, such as "
    "data=2,fsdp=4; repeat to compare several in one table",
  )
  parser.add_argument("--json", action="store_true", help="print JSON with every round's seconds")
  return parser


# --- The machine ---


def describe_machine(load: float | None, devices: Sequence[jax.Device]) -> dict[str, Any]:
  """Describes the machine and the versions of packages, for JSON.

  Args:
    load: average of the last minute before anything was measured; None where it is unknown.
    devices: those there are.
  """
  versions = {"python": platform.python_version()}
  for name in BENCH_PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {
    "machine": platform.machine(),
    "system": platform.platform(),
    "cores": os.cpu_count(),
    "devices": [f"{d.platform} ({d.device_kind})" for d in devices],
    "load_before": load,
    "versions": versions,
  }


def format_machine(machine: dict[str, Any]) -> str:
  """Formats what `describe_machine` returned in two lines."""
  devices, load = machine["devices"], machine["load_before"]
  versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
  before = "" if load is None else f"; load before {load:.2f}"
  cores = f"{machine['machine']}, {machine['cores']} cores"
  return f"{cores}; {len(devices)} {devices[0]}{before}\n{versions}"
