"""What jgpt is measured against, in a process of its own: `python -m jgpt.bench.peers`, started by `rounds.Worker`.

Responsible for the process: it reads lines of JSON and answers each with one. The first says what to build; the answer
comes when that is warm. Each line after it asks for a number of steps, and is answered with the seconds of one.

  {"kind": "torch", "compiled": bool, "experiment": ..., "tokens": "a.npz", "platform": "cpu", "warm_up": steps}
  {"kind": "transformers", "experiment": ..., "batch_size": texts, "new_tokens": of each, "platform": ..., "warm_up": calls}
  {"kind": "scalar", "experiment": ..., "tokens": "a.npz", "warm_up": steps}
      -> {"versions": {"torch": "2.9.0"}}, {"user_error": "..."} or {"unavailable": "why"}
  {"steps": 10} -> {"seconds": 0.025}

The process imports no jax: its allocator, its threads and what it holds are the peer's alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jgpt.config import Experiment
from jgpt.config.settings import experiment_from_json
from jgpt.errors import UserError

# What each kind needs besides Python, and how to get it.
PEER_PACKAGES = {"torch": ("torch",), "transformers": ("torch", "transformers"), "scalar": ()}
ORACLE = Path(__file__).resolve().parents[2] / "tests" / "reference" / "scalar_gpt.py"


def main() -> int:
  """Answers requests until standard input ends; returns the exit status."""
  answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)  # what libraries print is no answer

  def answer(value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()

  spec = json.loads(sys.stdin.readline())
  try:
    run = build(spec)
    run(spec["warm_up"])
  except UserError as error:
    answer({"user_error": str(error)})
    return 0
  except Exception as error:  # whatever the peer's libraries do not find here: a compiler, memory
    answer({"unavailable": describe_error(error)})
    return 0
  answer({"versions": {name: importlib.metadata.version(name) for name in PEER_PACKAGES[spec["kind"]]}})
  while line := sys.stdin.readline():
    steps = json.loads(line)["steps"]
    began = time.perf_counter()
    run(steps)
    answer({"seconds": (time.perf_counter() - began) / steps})
  return 0


def check_peer_packages(names: Sequence[str], path: Path = ORACLE) -> None:
  """Notices before anything is measured that a peer is not there.

  Args:
    names: of `--peer`, torch or scalar.
    path: of the oracle.

  Raises:
    UserError: naming what to do.
  """
  if "torch" in names and importlib.util.find_spec("torch") is None:
    raise UserError("--peer torch needs torch: pip install torch")
  if "scalar" in names and not path.is_file():
    raise UserError(f"--peer scalar needs a checkout of jgpt, for the test oracle: there is no {path}")


def build(spec: dict[str, Any]) -> Callable[[int], None]:
  """Makes the function that runs that many steps of what a spec describes.

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

  return peer_torch.make_training(experiment, tokens, lengths, compiled=spec["compiled"], platform=spec["platform"])


def make_scalar(
  experiment: Experiment, tokens: np.ndarray, lengths: np.ndarray, path: Path = ORACLE
) -> Callable[[int], None]:
  """Makes a function that runs that many updates of microgpt in plain Python, on the test oracle.

  Args:
    experiment: names, resolved, at batch 1.
    tokens: documents' rows.
    lengths: predictions of each.
    path: of the oracle, which comes with a checkout only.
  """
  module_spec = importlib.util.spec_from_file_location("scalar_gpt", path)
  oracle = importlib.util.module_from_spec(module_spec)
  sys.modules["scalar_gpt"] = oracle  # its dataclasses look their module up
  module_spec.loader.exec_module(oracle)
  model, optimizer = experiment.model, experiment.optimizer
  config = oracle.ScalarGPTConfig(
    vocab_size=model.vocab_size,
    context=model.max_seq_len,
    d_model=model.d_model,
    num_heads=model.num_heads,
    num_layers=model.num_layers,
  )
  normal = random.Random(0).gauss
  shapes = oracle.parameter_shapes(config)
  params = {n: [[normal(0, model.init_std) for _ in range(c)] for _ in range(r)] for n, (r, c) in shapes.items()}
  zeros = {n: [[0.0] * c for _ in range(r)] for n, (r, c) in shapes.items()}
  documents = [row[: length + 1].tolist() for row, length in zip(tokens, lengths, strict=True)]
  state = {"params": params, "m": zeros, "v": zeros, "step": 0}
  rates = {"lr": optimizer.peak_lr, "b1": optimizer.b1, "b2": optimizer.b2, "eps": optimizer.eps}

  def update(steps: int) -> None:
    for _ in range(steps):
      step = state["step"]
      _, grads = oracle.loss_and_gradients(state["params"], documents[step % len(documents)], config)
      new = oracle.adam_update(state["params"], grads, state["m"], state["v"], step=step, **rates)
      state.update(zip(("params", "m", "v"), new, strict=True), step=step + 1)

  return update


def describe_error(error: Exception) -> str:
  """An error in one short line; of the lines that torch's compiler says, the one that names the cause."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
  causes = [line for line in lines if "Error" in line or "not found" in line or "No working" in line]
  return (causes or lines)[0][:120]


if __name__ == "__main__":
  sys.exit(main())
