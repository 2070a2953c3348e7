"""The process in which a peer runs: `python -m jgpt.bench.peers`, started by `rounds.Worker`.

It reads lines of JSON and answers each with one. The first says what to build, and is answered when
that is built and warmed up. Each line after it asks for a number of steps, and is answered with the
seconds of one.

  {"kind": "torch", "compiled": bool, "autocast": bool, "experiment": ..., "tokens": "a.npz",
    "platform": "cpu", "warm_up": steps}
  {"kind": "transformers", "experiment": ..., "batch_size": texts, "new_tokens": of each,
    "platform": "cpu", "warm_up": calls}
  {"kind": "scalar", "experiment": ..., "tokens": "a.npz", "warm_up": steps}
      -> {"versions": {"torch": "2.9.0"}}, {"user_error": "..."} or {"unavailable": "why"}
  {"steps": 10} -> {"seconds": 0.025}

The process does not import jax, so that memory and threads are the peer's alone. The models are in
`peer_torch.py` and `peer_scalar.py`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jgpt.bench import peer_scalar
from jgpt.config import Experiment
from jgpt.config.settings import experiment_from_json
from jgpt.errors import UserError

# Packages that each kind of peer needs.
PEER_PACKAGES = {"torch": ("torch",), "transformers": ("torch", "transformers"), "scalar": ()}


def main() -> int:
  """Answers requests until standard input ends, and returns the exit status."""
  answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)  # libraries may print

  def answer(value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()

  spec = json.loads(sys.stdin.readline())
  try:
    run = make_peer(spec)
    run(spec["warm_up"])
  except UserError as error:
    answer({"user_error": str(error)})
    return 0
  except Exception as error:  # libraries may lack a compiler, memory, a device
    answer({"unavailable": describe_error(error)})
    return 0
  answer(
    {"versions": {name: importlib.metadata.version(name) for name in PEER_PACKAGES[spec["kind"]]}}
  )
  while line := sys.stdin.readline():
    steps = json.loads(line)["steps"]
    began = time.perf_counter()
    run(steps)
    answer({"seconds": (time.perf_counter() - began) / steps})
  return 0


def check_peer_packages(names: Sequence[str]) -> None:
  """Checks that what `--peer` needs is installed.

  Args:
    names: values of `--peer`, "torch" or "scalar".

  Raises:
    UserError: with the command that installs it.
  """
  if "torch" in names and importlib.util.find_spec("torch") is None:
    raise UserError("--peer torch needs torch: pip install torch")


def make_peer(spec: dict[str, Any]) -> Callable[[int], None]:
  """Makes a function of a number of steps, which runs them.

  Args:
    spec: the first line of the protocol above.

  Raises:
    UserError: if the peer has no such model.
    RuntimeError: if a package is missing.
  """
  for name in PEER_PACKAGES[spec["kind"]]:
    if importlib.util.find_spec(name) is None:
      raise RuntimeError(f"it needs {name}: pip install {name}")
  experiment = experiment_from_json(spec["experiment"])
  if spec["kind"] == "transformers":
    from jgpt.bench import peer_torch

    sizes = {name: spec[name] for name in ("batch_size", "new_tokens", "platform")}
    return peer_torch.make_sampling(experiment.model, **sizes)
  with np.load(spec["tokens"]) as file:
    tokens, lengths = file["tokens"], file.get("lengths")
  if spec["kind"] == "scalar":
    return make_scalar(experiment, tokens, lengths)
  from jgpt.bench import peer_torch

  return peer_torch.make_training(
    experiment,
    tokens,
    lengths,
    compiled=spec["compiled"],
    autocast=spec["autocast"],
    platform=spec["platform"],
  )


def make_scalar(
  experiment: Experiment, tokens: np.ndarray, lengths: np.ndarray
) -> Callable[[int], None]:
  """Makes a function of a number of steps, which runs updates of names in plain Python.

  Args:
    experiment: `names`, resolved. Each update takes one document, whatever the batch size.
    tokens: int32 ids, a document a row.
    lengths: int32 predictions of each document.
  """
  documents = [row[: length + 1].tolist() for row, length in zip(tokens, lengths, strict=True)]
  state = peer_scalar.begin_scalar(peer_scalar.draw_matrices(0, experiment.model))

  def update(steps: int) -> None:
    nonlocal state
    for _ in range(steps):
      document = documents[state.step % len(documents)]
      state, _ = peer_scalar.update_scalar(state, document, experiment)

  return update


def describe_error(error: Exception) -> str:
  """Returns the line of an error that names the cause, cut to 120 characters."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
    type(error).__name__
  ]
  causes = [
    line for line in lines if "Error" in line or "not found" in line or "No working" in line
  ]
  return (causes or lines)[0][:120]


if __name__ == "__main__":
  sys.exit(main())
