"""python -m jgpt.doctor: what is here, what is wrong, and what to do about it.

Responsible for the command line, the order of the checks, printing and the exit status: 0 where nothing is wrong, 1 where
there is a problem, 2 for wrong arguments. The checks are functions of their own: `packages.py`, `machine.py`, `probe.py`,
`storage.py`, and `soundness.py` for run folders.
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

from jgpt.config import catalog
from jgpt.doctor.findings import Finding, format_finding, format_summary, note, ok, problem, safely
from jgpt.errors import UserError

REPRESENTATIVE = ("names", "shakespeare_char_cpu")  # without XLA's fusions, and with them
MIN_WIDTH, MAX_WIDTH = 60, 100


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  args = _parser().parse_args(argv)
  if args.run is not None:
    if args.all:
      raise UserError("--all checks the compiler, and --run a run folder: give one of them.")
    folder = Path(os.path.expanduser(args.run))
    if not folder.is_dir():
      raise UserError(f"--run={args.run}: there is no such folder. Runs are kept in runs/NAME, or where --workdir said.")
    findings = _examine_run(folder)
  else:
    findings = examine(catalog.list_experiments() if args.all else REPRESENTATIVE)
  return report(findings, as_json=args.json)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m jgpt.doctor",
    description="Say what is installed, what jax finds, where caches and data are, whether the compiler computes what is "
    "written, and what to do about each problem. No network is used, and nothing is changed but the cache of compiled "
    "programs. The whole of it belongs in a bug report.",
    epilog="Exit status: 0 where nothing is wrong (notes do not count), 1 where there is a problem, 2 for wrong arguments.",
  )
  parser.add_argument(
    "--run", metavar="DIR", help="check a run folder instead: every file and number, and whether it can go on"
  )
  parser.add_argument("--all", action="store_true", help="check the compiler with every experiment's network: minutes")
  parser.add_argument("--json", action="store_true", help="print JSON")
  return parser


def report(findings: Iterator[Finding], *, as_json: bool) -> int:
  """Prints findings, each as soon as it is there, and how many problems there are; returns the exit status."""
  width = max(MIN_WIDTH, min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns))
  found = []
  for finding in findings:
    found.append(finding)
    if not as_json:
      print(format_finding(finding, width), flush=True)
  status = int(any(finding.level == "problem" for finding in found))
  if as_json:
    print(json.dumps({"status": status, "findings": [dataclasses.asdict(finding) for finding in found]}, indent=2))
  else:
    print(f"\n{format_summary(found)}")
  return status


def examine(experiments: Sequence[str]) -> Iterator[Finding]:
  """Examines this machine; yields findings as they are made.

  Args:
    experiments: names of those whose networks the compiler is checked with.
  """
  from jgpt.doctor import machine, packages, probe, storage

  with contextlib.suppress(RuntimeError, OSError):  # where standard error is no file
    faulthandler.enable()  # a library that is broken may end the process: then there is at least a word of where
  requirements = packages.list_requirements()
  yield from safely("python", packages.check_python)
  yield from safely("packages", lambda: packages.check_packages(requirements))
  yield from safely("packages", lambda: packages.check_shadows(Path.cwd()))
  yield from safely("extras", lambda: packages.check_extras(requirements))
  yield from safely("machine", lambda: machine.check_machine(os.environ))
  yield from safely("cache", lambda: storage.check_caches(os.environ))
  yield from safely("downloads", lambda: storage.check_downloads(time.time()))
  yield from safely("data", lambda: storage.check_data(os.environ))
  yield from safely("run folders", lambda: storage.check_here(Path.cwd()))
  _say("asking jax for its devices ...")
  looked = probe.probe_devices(os.environ)
  yield from safely("devices", lambda: machine.check_devices(looked, machine.find_gpus(), os.environ))
  if looked.error:
    yield note("compiler", "not checked: jax does not compute here")
    return
  yield from safely("compiler", storage.check_record)
  for name in experiments:
    _say(f"comparing the compiled gradients of {name} with float64 ...")
    yield from safely("compiler", lambda name=name: check_compiled(name, looked.devices[0]["platform"]))


def check_compiled(name: str, platform: str) -> list[Finding]:
  """Whether the compiler computes what is written, tried on an experiment's network.

  Args:
    name: of the experiment.
    platform: of the first device.
  """
  if platform != "cpu":
    return [note("compiler", f"{name}: compared on CPUs only; the products of a {platform.upper()} have fewer digits")]
  from jgpt.config.settings import resolve
  from jgpt.data import sources
  from jgpt.devices import canary, runtime

  runtime.set_up()
  experiment = catalog.load_experiment(name)
  experiment = resolve(experiment, sources.expected_vocab_size(experiment.data), 100)
  check = canary.compare_compiled(experiment, platform)
  if check.passed:
    text = f"{name}: gradients agree with float64, the worst by {check.difference:.1e} in {check.leaf}"
    return [ok("compiler", f"{text} ({check.seconds:.1f} s)")]
  text, _, do = canary.describe_check(check).removeprefix("WARNING: ").partition(" Do not trust what was trained. ")
  return [problem("compiler", f"{name}: {text}", f"do not trust what was trained. {do}")]


def _examine_run(folder: Path) -> Iterator[Finding]:
  """Examines a run folder on the CPU: a GPU may be another run's, or be what is broken."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  from jgpt.devices import runtime
  from jgpt.doctor import machine, soundness

  runtime.set_up()
  machine.limit_memory()  # the folder may claim any size
  yield from soundness.examine_run(folder)


def _say(words: str) -> None:
  """What takes a while, to a person who is waiting."""
  if sys.stderr is not None and sys.stderr.isatty():
    print(words, file=sys.stderr, flush=True)
