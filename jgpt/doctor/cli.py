"""python -m jgpt.doctor: says what is installed, what is wrong, and what to do about it.

The command line, the order of the checks, printing and the exit status: 0 where nothing is wrong, 1
where there is a problem, 2 for wrong arguments. The checks are the functions `examine_*` of
`packages.py`, `machine.py` and `storage.py`, and of `soundness.py` for run folders.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from jgpt import cli
from jgpt.config import catalog
from jgpt.doctor.findings import (
  Finding,
  format_finding,
  format_summary,
  note,
  ok,
  problem,
  run_check,
)
from jgpt.errors import UserError

CHECKED_EXPERIMENTS = ("names", "shakespeare_char_cpu")  # without XLA's fusions, and with them
MIN_WIDTH, MAX_WIDTH = 60, 100


def main(argv: list[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  args = _parser().parse_args(argv)
  if args.run is not None:
    if args.all:
      raise UserError("--all checks the compiler, and --run a run folder: give one of them.")
    from jgpt.runs.locate import find_checkpoint

    found = find_checkpoint(args.run)  # of a checkpoint's path the whole run is examined
    folder = found[0] if found else Path(os.path.expanduser(args.run))
    if not folder.is_dir():
      raise UserError(
        f"--run={args.run}: there is no such folder. Runs are kept in runs/NAME, or where "
        "--workdir said."
      )
    findings = _examine_run(folder)
  else:
    findings = examine(catalog.list_experiments() if args.all else CHECKED_EXPERIMENTS)
  return report(findings, as_json=args.json)


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog="python -m jgpt.doctor",
    description="Say what is installed, what jax finds, where caches and data are, whether the "
    "compiler computes what is written, and what to do about each problem. No network is used, "
    "and nothing is changed but the cache of compiled programs. The whole of it belongs in a bug "
    "report.",
    epilog="Exit status: 0 where nothing is wrong (notes do not count), 1 where there is a "
    "problem, 2 for wrong arguments.",
  )
  parser.add_argument(
    "--run",
    metavar="DIR",
    help="check a run folder instead: every file and number, and whether it can go on",
  )
  parser.add_argument(
    "--all", action="store_true", help="check the compiler with every experiment's network: minutes"
  )
  parser.add_argument("--json", action="store_true", help="print JSON")
  return parser


def report(findings: Iterator[Finding], *, as_json: bool) -> int:
  """Prints findings as they are made, and a summary; returns the exit status."""
  width = max(MIN_WIDTH, min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns))
  found = []
  for finding in findings:
    found.append(finding)
    if not as_json:
      print(format_finding(finding, width), flush=True)
  status = int(any(finding.level == "problem" for finding in found))
  if as_json:
    print(
      json.dumps(
        {"status": status, "findings": [dataclasses.asdict(finding) for finding in found]}, indent=2
      )
    )
  else:
    print(f"\n{format_summary(found)}")
  return status


def examine(experiments: Sequence[str]) -> Iterator[Finding]:
  """Examines this machine, and yields findings as they are made.

  Args:
    experiments: names; the compiler is checked with the networks of these.
  """
  from jgpt.doctor import machine, packages, probe, storage

  with contextlib.suppress(RuntimeError, OSError):  # standard error may not be a file
    faulthandler.enable()  # prints where a broken library ends the process
  requirements = packages.list_requirements()
  yield from run_check("python", packages.examine_python)
  yield from run_check("packages", lambda: packages.examine_packages(requirements))
  yield from run_check("packages", lambda: packages.examine_shadows(Path.cwd()))
  yield from run_check("extras", lambda: packages.examine_extras(requirements))
  yield from run_check("machine", lambda: machine.examine_machine(os.environ))
  yield from run_check("cache", lambda: storage.examine_caches(os.environ))
  yield from run_check("downloads", lambda: storage.examine_downloads(time.time()))
  yield from run_check("data", lambda: storage.examine_data(os.environ))
  yield from run_check("run folders", lambda: storage.examine_runs_folder(Path.cwd()))
  _say("asking jax for its devices ...")
  probed = probe.probe_devices(os.environ)
  yield from run_check(
    "devices", lambda: machine.examine_devices(probed, machine.find_gpus(), os.environ)
  )
  if probed.error:
    yield note("compiler", "not checked: jax does not compute here")
    return
  yield from run_check("compiler", storage.examine_compiler_record)
  for name in experiments:
    _say(f"comparing the compiled gradients of {name} with float64 ...")
    yield from run_check(
      "compiler", lambda name=name: examine_compiler(name, probed.devices[0]["platform"])
    )


def examine_compiler(name: str, platform: str) -> list[Finding]:
  """Compares compiled gradients of an experiment's network with float64.

  Args:
    name: of the experiment.
    platform: of the first device.
  """
  if platform != "cpu":
    return [
      note(
        "compiler",
        f"{name}: compared on CPUs only; the products of a {platform.upper()} have fewer digits",
      )
    ]
  import jax

  from jgpt.config.settings import resolve
  from jgpt.data import sources
  from jgpt.devices import canary, runtime

  if jax.config.jax_disable_jit:
    return [note("compiler", f"{name}: not compared: JAX_DISABLE_JIT compiles nothing")]
  runtime.set_up()
  experiment = catalog.load_experiment(name)
  experiment = resolve(experiment, sources.expected_vocab_size(experiment.data), 100)
  comparison = canary.compare_compiled(experiment, runtime.devices()[0])
  if comparison.passed:
    worst = f"the worst by {comparison.difference:.1e} in {comparison.leaf}"
    text = f"{name}: gradients agree with float64, {worst} ({comparison.seconds:.1f} s)"
    return [ok("compiler", text)]
  words = canary.describe_comparison(comparison).removeprefix("WARNING: ")
  text, _, do = words.partition(" Do not trust what was trained. ")
  return [problem("compiler", f"{name}: {text}", f"do not trust what was trained. {do}")]


def _examine_run(folder: Path) -> Iterator[Finding]:
  """Examines a run folder on the CPU, since a GPU may be in use or broken."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  from jgpt.devices import runtime
  from jgpt.doctor import machine, soundness

  runtime.set_up()
  machine.limit_memory()  # a file in the folder may declare any size
  yield from soundness.examine_run(folder)


def _say(words: str) -> None:
  """Prints a line about a slow step, where standard error is a terminal."""
  if sys.stderr is not None and sys.stderr.isatty():
    print(words, file=sys.stderr, flush=True)
