"""python -m jgpt.bench: how fast this machine trains, and reads and writes weights, in one table.

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
from typing import TYPE_CHECKING

from jgpt import catalog, command, settings
from jgpt.checks import UserError, near_matches

if TYPE_CHECKING:  # jax is imported after the arguments are understood
  from jgpt.train import Plan

BATCH_SIZES = (1, 16, 64)


@dataclasses.dataclass(frozen=True)
class Row:
  """One measured thing.

  Attributes:
    case: what was measured.
    unit: of `seconds` as printed: "s", or "us/step" (from 10,000 us on "ms/step").
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
  rows = [row for name in dict.fromkeys(chosen) for row in CASES[name](args.rounds, args.peer)]
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
  parser.add_argument(
    "--peer", action="append", default=[], choices=["torch"], help="measure this too, in the same rounds; where it fits"
  )
  parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds, of which the median counts (default: 7)")
  parser.add_argument("--json", action="store_true", help="print JSON with every round's seconds")
  return parser


def bench_names(rounds: int, peers: list[str]) -> list[Row]:
  """Times the names model: its step at three batch sizes, and the whole command."""
  return [*time_steps("names", BATCH_SIZES, 1000, rounds, []), *time_commands("names", min(rounds, 3))]


def bench_shakespeare_char_cpu(rounds: int, peers: list[str]) -> list[Row]:
  """Times the step of nanoGPT's CPU preset."""
  return time_steps("shakespeare_char_cpu", (12,), 50, rounds, peers)


def time_steps(name: str, batch_sizes: tuple[int, ...], steps: int, rounds: int, peers: list[str]) -> list[Row]:
  """Times an experiment's step inside the compiled loop; batch sizes and peers take turns in every round.

  Args:
    name: of the experiment.
    batch_sizes: sequences per step.
    steps: updates that a round times together.
    rounds: after one that warms up.
    peers: "torch", or none.
  """
  import jax

  from jgpt import train

  jax.config.update("jax_enable_compilation_cache", False)  # so that "compile" means compiling
  timers, rows = [], []
  for batch_size in batch_sizes:
    experiment = settings.change(catalog.load_experiment(name), {"data.batch_size": batch_size})
    plan = train.plan(experiment)
    per_document = float(plan.data.train.lengths.mean()) if plan.data.documents else plan.experiment.data.seq_len
    timer, compile_seconds = _make_timer(plan)
    made = [("", timer, compile_seconds)]
    if "torch" in peers:
      made += _make_torch_timers(plan)
    for label, timer, compile_seconds in made:
      timers.append(timer)
      row = Row(f"{name}, batch {batch_size}{label}", "us/step", [], compile_seconds=compile_seconds)
      rows.append((row, batch_size, per_document * batch_size))
  for round_number in range(rounds + 1):
    for timer, (row, _, _) in zip(timers, rows, strict=True):
      seconds = timer(steps)
      if round_number:  # the first round warms up
        row.seconds.append(seconds)
  return [_with_rates(row, batch_size, tokens) for row, batch_size, tokens in rows]


def _make_timer(plan: Plan) -> tuple[Callable[[int], float], float]:
  """A function that runs that many updates and returns the seconds one took, and the seconds compiling took."""
  import jax
  import jax.numpy as jnp

  from jgpt import program

  began = time.perf_counter()
  made = program.compile_program(plan.experiment, plan.data)
  compile_seconds = time.perf_counter() - began
  begin_state = made.state

  def seconds_per_step(steps: int) -> float:
    state = jax.block_until_ready(jax.tree.map(jnp.copy, begin_state))  # the call below consumes it
    began = time.perf_counter()
    jax.block_until_ready(made.run_steps(made.feed.corpus_at(0), state, jnp.int32(steps)))
    return (time.perf_counter() - began) / steps

  return seconds_per_step, compile_seconds


def _make_torch_timers(plan: Plan) -> list[tuple[str, Callable[[int], float], float | None]]:
  try:
    from jgpt import peers
  except ImportError:
    raise UserError("--peer torch needs torch: pip install torch") from None
  return [
    (f", {label}", peers.make_timer(plan.experiment, plan.data.train.tokens, compiled=compiled), None)
    for label, compiled in (("torch", False), ("torch.compile", True))
  ]


def _with_rates(row: Row, batch_size: int, tokens: float) -> Row:
  median = statistics.median(row.seconds)
  return dataclasses.replace(row, per_sample_us=1e6 * median / batch_size, tokens_per_second=tokens / median)


def time_commands(name: str, rounds: int) -> list[Row]:
  """Times whole commands in fresh processes: --help, and a run with an empty and with a filled compilation cache."""
  from jgpt.sources import find_text, get_source

  experiment = catalog.load_experiment(name)
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


def bench_weights(rounds: int, peers: list[str]) -> list[Row]:
  """Times reading and writing GPT-2 124M, random weights, in Hugging Face's format and in llm.c's; needs 1 GB of disk."""
  import jax
  import numpy as np

  from jgpt import hugging_face, llmc, weights
  from jgpt.config import resolve
  from jgpt.model import init_params

  config = resolve(catalog.load_experiment("gpt2_shakespeare"), 50257).model
  params = jax.tree.map(np.asarray, jax.jit(init_params, static_argnums=1)(jax.random.key(0), config))
  writers = {
    "model.safetensors": lambda path: hugging_face.write_safetensors(
      path, hugging_face.to_tensors(params, config), "float32"
    ),
    "gpt2_124M.bin": lambda path: llmc.write_weights(path, params, config, "float32"),
  }
  rows = {(verb, name): Row(f"{verb} GPT-2 124M, {name}", "s", []) for name in writers for verb in ("write", "read")}
  with tempfile.TemporaryDirectory() as folder:
    for _ in range(rounds):
      for name, write in writers.items():
        path = Path(folder) / name
        began = time.perf_counter()
        write(path)
        written = time.perf_counter()
        weights.load_params(weights.open_weights(str(path)), config)
        rows["write", name].seconds.append(written - began)
        rows["read", name].seconds.append(time.perf_counter() - written)
  return list(rows.values())


CASES: dict[str, Callable[[int, list[str]], list[Row]]] = {
  "names": bench_names,
  "shakespeare_char_cpu": bench_shakespeare_char_cpu,
  "weights": bench_weights,
}


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
    scale, unit = 1, row.unit
    if unit == "us/step":
      scale, unit = (1e6, unit) if statistics.median(row.seconds) < 0.01 else (1e3, "ms/step")
    median, low, high = (scale * f(row.seconds) for f in (statistics.median, min, max))
    table.append(
      (
        row.case,
        f"{median:.4g} {unit}",
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
