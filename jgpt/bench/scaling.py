"""The same training step on more and more devices of one machine: `python -m jgpt.bench --scaling`.

The devices are virtual: they share the cores that one of them has, so that no step can become
faster. What is measured is the overhead of dividing a step: its smaller products, its collectives,
its processes. Each row is a process of its own, or two that jax joins over 127.0.0.1 (gloo), which
stay alive and take turns, as the peers of `rounds.py` do.

The process is `python -m jgpt.bench.scaling`. It speaks the protocol of `peers.py`: its first line
is

  {"experiment": name, "changes": {...}, "devices": of this process, "warm_up": steps,
    "place": null, or [coordinator, processes, number of this one]}
      -> {"losses": of the steps that warm up, "sent_bytes": by each device in a step}
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jgpt.bench.results import align, divide_rounds, format_size
from jgpt.bench.rounds import PeerUnavailableError, Worker, interleave
from jgpt.config import catalog
from jgpt.config.settings import change
from jgpt.errors import UserError

EXPERIMENT = "shakespeare_bytes"  # where none is named
WARM_UP = 10  # steps, whose losses are compared
ROUND_SECONDS = 1.0  # about, of each row
QUIET = {"sample.num": 1, "sample.max_tokens": 1}  # sampling compiles too


@dataclasses.dataclass(frozen=True)
class Setup:
  """A row: processes, the virtual devices of each, and the mesh over all of them."""

  processes: int
  devices: int
  mesh: dict[str, int]


def _list_setups() -> tuple[Setup, ...]:
  """Lists one device first, then as many as 8 by data and by fsdp, then two processes."""
  several = [Setup(1, n, {axis: n}) for n in (2, 4, 8) for axis in ("data", "fsdp")]
  return (Setup(1, 1, {}), *several, *(Setup(2, 1, {axis: 2}) for axis in ("data", "fsdp")))


SETUPS = _list_setups()


@dataclasses.dataclass(frozen=True)
class Scaled:
  """A row that was measured.

  Attributes:
    setup: what it ran on.
    seconds: of a step, in each round.
    ratios: seconds of one device in the same round divided by these.
    tokens: of a step.
    sent_bytes: by each device in a step, by ring algorithms.
    losses: of the first steps.
  """

  setup: Setup
  seconds: list[float]
  ratios: list[float]
  tokens: int
  sent_bytes: float
  losses: list[float]


def measure_scaling(
  name: str, changes: dict[str, Any], rounds: int, setups: Sequence[Setup] = SETUPS
) -> list[Scaled]:
  """Times an experiment's step on each of several setups, in turns.

  Args:
    name: of the experiment.
    changes: to its settings, but those of the mesh.
    rounds: that are counted.
    setups: the first one is what the others are compared with.

  Raises:
    UserError: if a mesh does not divide the batch, or a process ends.
  """
  base = catalog.load_experiment(name)
  meshes = [_mesh_settings(setup) for setup in setups]
  for mesh in meshes:
    experiment = change(base, changes | QUIET | mesh)
  contenders: list[Joined] = []
  try:
    for setup, mesh in zip(setups, meshes, strict=True):
      contenders.append(Joined(name, changes | QUIET | mesh, setup))
    # Of the smallest models two processes take a hundred times as long as one device.
    steps = [max(1, round(ROUND_SECONDS / contender(WARM_UP))) for contender in contenders]
    seconds = interleave(contenders, steps, rounds)
  except PeerUnavailableError as error:
    raise UserError(f"--scaling: {error}") from error
  finally:
    for contender in contenders:
      contender.close()
  return [
    Scaled(
      setup,
      found,
      divide_rounds(seconds[0], found),
      experiment.data.batch_size * experiment.data.seq_len,
      contender.about["sent_bytes"],
      contender.about["losses"],
    )
    for setup, found, contender in zip(setups, seconds, contenders, strict=True)
  ]


def _mesh_settings(setup: Setup) -> dict[str, int]:
  return {f"mesh.{axis}": setup.mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor")}


class Joined:
  """The processes of one setup; calling it times steps of all of them together.

  Attributes:
    about: what process 0 said when it was warmed up.
  """

  def __init__(self, name: str, changes: dict[str, Any], setup: Setup):
    """Starts the processes and waits until all are warmed up.

    Raises:
      UserError: if the settings and the devices do not fit together.
      PeerUnavailableError: if a process ends.
    """
    spec = {"experiment": name, "changes": changes, "devices": setup.devices, "warm_up": WARM_UP}
    address = f"127.0.0.1:{find_port()}"
    places = [
      [address, setup.processes, i] if setup.processes > 1 else None for i in range(setup.processes)
    ]
    self._pool = ThreadPoolExecutor(setup.processes)
    started = [
      self._pool.submit(Worker, spec | {"place": place}, "jgpt.bench.scaling") for place in places
    ]
    errors = [error for future in started if (error := future.exception())]
    self._workers = [future.result() for future in started if not future.exception()]
    if errors:
      self.close()
      raise errors[0]
    self.about = self._workers[0].about

  def __call__(self, steps: int) -> float:
    """Runs that many steps and returns the seconds of one in the slowest process."""
    return max(self._pool.map(lambda worker: worker(steps), self._workers))

  def close(self) -> None:
    """Ends the processes."""
    list(self._pool.map(lambda worker: worker.close(), self._workers))
    self._pool.shutdown()


def find_port() -> int:
  """Finds a free port of this machine."""
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


# --- Tables ---


def scaling_to_json(rows: Sequence[Scaled]) -> list[dict[str, Any]]:
  """Returns what was measured for `json`, in seconds and bytes."""
  return [
    dataclasses.asdict(row)
    | {
      "median_seconds": statistics.median(row.seconds),
      "median_ratio": statistics.median(row.ratios),
      "loss_difference": compare_losses(row, rows[0]),
    }
    for row in rows
  ]


def compare_losses(row: Scaled, first: Scaled) -> float:
  """Returns the largest relative difference between the losses of two rows."""
  return max(abs(a / b - 1) for a, b in zip(row.losses, first.losses, strict=True))


def format_scaling(rows: Sequence[Scaled], name: str) -> str:
  """Formats a table with a line for each setup, and what it can show."""
  table = [
    [
      *("processes", "devices of each", "mesh", "steps/s", "tokens/s"),
      *("efficiency", "sent by each", "losses differ by"),
    ]
  ]
  for row in rows:
    rate = 1 / statistics.median(row.seconds)
    low, high = min(row.ratios), max(row.ratios)
    table.append(
      [
        str(row.setup.processes),
        str(row.setup.devices),
        ",".join(f"{axis}={n}" for axis, n in row.setup.mesh.items()) or "one device",
        f"{rate:,.4g}",
        f"{rate * row.tokens:,.0f}",
        f"{statistics.median(row.ratios):.0%} ({low:.0%} to {high:.0%})",
        format_size(row.sent_bytes),
        f"{compare_losses(row, rows[0]):.1e}" if row is not rows[0] else "",
      ]
    )
  return "\n".join(
    [
      f"{name}: the same step of {rows[0].tokens:,} tokens on virtual devices of one machine, "
      f"which has {os.cpu_count()} cores",
      align(table),
      "efficiency: time of one device, which has all cores too, by this one, medians of rounds.",
      "Virtual devices share the cores: it shows what dividing a step costs, not how it scales. It "
      "is more than 100% where the parts of a step keep cores busy that the whole one leaves idle. "
      f"Losses are of {len(rows[0].losses)} steps.",
    ]
  )


# --- The process ---


def main() -> int:
  """Answers requests until standard input ends, and returns the exit status."""
  answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)  # libraries may print

  def answer(value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()

  spec = json.loads(sys.stdin.readline())
  try:
    run, about = make_run(spec)
  except UserError as error:
    answer({"user_error": str(error)})
    return 0
  answer(about)
  while line := sys.stdin.readline():
    steps = json.loads(line)["steps"]
    began = time.perf_counter()
    run(steps)
    answer({"seconds": (time.perf_counter() - began) / steps})
  return 0


def make_run(spec: dict[str, Any]) -> tuple[Callable[[int], Any], dict[str, Any]]:
  """Makes a function of a number of steps, which runs them, and takes the first steps.

  Args:
    spec: the first line of the protocol above.

  Returns:
    The function, and the answer.

  Raises:
    UserError: if the settings and the devices do not fit together.
  """
  import jax
  import numpy as np

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", spec["devices"])
  if spec["place"]:
    jax.distributed.initialize(*spec["place"])
  from jgpt import program, sharding
  from jgpt.bench import hlo, roofline
  from jgpt.plan import plan_run
  from jgpt.step import MAX_STEPS_PER_CALL

  plan = plan_run(change(catalog.load_experiment(spec["experiment"]), spec["changes"]))
  made = program.compile_program(plan.experiment, jax.devices(), plan.data)
  mesh = dict(sharding.find_mesh(made.state).shape)
  state, done = made.state, 0

  def run(steps: int) -> list[float]:
    nonlocal state, done
    losses: list[float] = []
    while steps:
      num = min(steps, MAX_STEPS_PER_CALL)
      state, metrics = jax.block_until_ready(made.advance(state, done, num))
      losses += np.asarray(metrics["train/loss"])[:num].tolist()
      steps, done = steps - num, done + num
    return losses

  module = hlo.parse_module(made.run_steps.as_text())
  exchanges = [
    roofline.describe_exchange(found, mesh, None) for found in hlo.find_collectives(module)
  ]
  sent = sum(exchange.sent_bytes * exchange.collective.trips for exchange in exchanges)
  return run, {"losses": run(spec["warm_up"]), "sent_bytes": sent}


if __name__ == "__main__":
  sys.exit(main())
