"""python -m jgpt.bench: how fast this machine trains, in one table.

Responsible for measuring: medians and spreads of interleaved rounds, in one process for what is compiled and in fresh ones
for what is started. Speed is never asserted in a test. Cases are functions that return rows; `--only` picks them by name.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jgpt import command, config, settings
from jgpt.config import UserError, near_matches

BATCH_SIZES = (1, 16, 64)
TIMED_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Row:
  """One measured thing.

  Attributes:
    case: what was measured.
    unit: of `seconds` as printed: "us/step" or "s".
    seconds: of each round, per step or per command.
    per_sample_us: median microseconds per document, for steps.
    tokens_per_second: median, valid tokens only, for steps.
    compile_seconds: tracing and compiling, for steps.
  """

  case: str
  unit: str
  seconds: list[float]
  per_sample_us: float | None = None
  tokens_per_second: float | None = None
  compile_seconds: float | None = None


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  args = _parser().parse_args(argv)
  chosen = args.only or list(CASES)
  for name in chosen:
    if name not in CASES:
      raise UserError(f"there is no case {name!r}.{near_matches(name, CASES)} There are {', '.join(CASES)}.")
  if args.rounds < 1:
    raise UserError(f"--rounds={args.rounds} must be at least 1.")
  rows = [row for name in dict.fromkeys(chosen) for row in CASES[name](args.rounds)]
  if args.json:
    print(json.dumps({"machine": describe_machine(), "rows": [dataclasses.asdict(row) for row in rows]}, indent=2))
  else:
    print(describe_machine())
    print(format_rows(rows))
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="python -m jgpt.bench", description="Measure how fast this machine trains.")
  parser.add_argument(
    "--only", action="append", metavar="CASE", help=f"one of {', '.join(CASES)}; repeat for more (default: all)"
  )
  parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds, of which the median counts (default: 7)")
  parser.add_argument("--json", action="store_true", help="print JSON with every round's seconds")
  return parser


def bench_names(rounds: int) -> list[Row]:
  """Times the names model: its step at three batch sizes, and the whole command."""
  return [*time_steps("names", rounds), *time_commands("names", min(rounds, 3))]


def time_steps(name: str, rounds: int) -> list[Row]:
  """Times an experiment's step inside the compiled loop, the batch sizes in turn in every round."""
  import jax
  import jax.numpy as jnp

  from jgpt import train

  jax.config.update("jax_enable_compilation_cache", False)  # so that "compile" means compiling
  programs, rows = {}, {}
  for batch_size in BATCH_SIZES:
    experiment = settings.change(config.load_experiment(name), {"data.batch_size": batch_size})
    plan = train.plan(experiment)
    began = time.perf_counter()
    state, run_steps, corpus = train.compile_steps(plan)
    compile_seconds = time.perf_counter() - began
    tokens = float(plan.data.train.lengths.mean()) * batch_size
    programs[batch_size] = state, run_steps, corpus, tokens
    rows[batch_size] = Row(f"{name}, batch {batch_size}", "us/step", [], compile_seconds=compile_seconds)
  for round_number in range(rounds + 1):
    for batch_size, (state, run_steps, corpus, _) in programs.items():
      begin_state = jax.block_until_ready(jax.tree.map(jnp.copy, state))  # the call below consumes it
      began = time.perf_counter()
      jax.block_until_ready(run_steps(corpus, begin_state, jnp.int32(TIMED_STEPS)))
      if round_number:  # the first round warms up
        rows[batch_size].seconds.append((time.perf_counter() - began) / TIMED_STEPS)
  return [_with_rates(rows[b], b, tokens) for b, (_, _, _, tokens) in programs.items()]


def _with_rates(row: Row, batch_size: int, tokens: float) -> Row:
  median = statistics.median(row.seconds)
  return dataclasses.replace(row, per_sample_us=1e6 * median / batch_size, tokens_per_second=tokens / median)


def time_commands(name: str, rounds: int) -> list[Row]:
  """Times whole commands in fresh processes: --help, and a run with an empty and with a filled compilation cache."""
  from jgpt.sources import find_text, get_source

  experiment = config.load_experiment(name)
  text, filename = find_text(experiment.data).text, get_source(experiment.data.source).filename
  helps, colds, warms = [], [], []
  with tempfile.TemporaryDirectory() as folder:
    data = Path(folder) / "data"
    data.mkdir()
    (data / filename).write_text(text, encoding="utf-8", newline="\n")
    for i in range(rounds):
      cache = Path(folder) / f"cache{i}"
      env = {"JGPT_DATA_DIR": str(data), "JGPT_CACHE_DIR": str(cache)}
      helps.append(_time_command(["--help"], env))
      colds.append(_time_command(["--experiment", name, "--workdir", f"{folder}/cold{i}"], env))
      warms.append(_time_command(["--experiment", name, "--workdir", f"{folder}/warm{i}"], env))
  return [
    Row("run --help", "s", helps),
    Row(f"run --experiment {name}, nothing compiled yet", "s", colds),
    Row(f"run --experiment {name}, compilations cached", "s", warms),
  ]


def _time_command(args: list[str], env: dict[str, str]) -> float:
  root = str(Path(__file__).resolve().parent.parent)
  path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
  began = time.perf_counter()
  command_line = [sys.executable, "-m", "jgpt.run", *args]
  done = subprocess.run(
    command_line, env=os.environ | env | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise RuntimeError(f"{' '.join(command_line)} failed: {done.stderr}")
  return time.perf_counter() - began


CASES: dict[str, Callable[[int], list[Row]]] = {"names": bench_names}


def describe_machine() -> str:
  """The machine and the versions that figures belong to."""
  import jax

  devices = jax.devices()
  cores = os.cpu_count()
  return (
    f"{platform.machine()}, {cores} cores; {len(devices)} {devices[0].platform} ({devices[0].device_kind}); "
    f"Python {platform.python_version()}, jax {jax.__version__}"
  )


def format_rows(rows: list[Row]) -> str:
  """The table: median, fastest and slowest round, and what follows from the median."""
  table = [("case", "median", "fastest to slowest", "us/sample", "tokens/s", "compile")]
  for row in rows:
    scale = 1e6 if row.unit == "us/step" else 1
    median, low, high = (scale * f(row.seconds) for f in (statistics.median, min, max))
    table.append(
      (
        row.case,
        f"{median:.4g} {row.unit}",
        f"{low:.4g} to {high:.4g}",
        f"{row.per_sample_us:.4g}" if row.per_sample_us is not None else "",
        f"{row.tokens_per_second:,.0f}" if row.tokens_per_second is not None else "",
        f"{row.compile_seconds:.2f} s" if row.compile_seconds is not None else "",
      )
    )
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table)


if __name__ == "__main__":
  sys.exit(command.guard(main))
