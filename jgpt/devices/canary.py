"""Whether the compiler computes what is written.

XLA's CPU backend replaces groups of operations by ready-made ones (YNNPACK fusions), and has had versions that returned
wrong values without an error (jax-ml/jax#39103, #39257, #40412). Responsible for comparing loss and every gradient, made
and compiled as a run's are, with the same network run operation by operation in float64: at the run's widths and length,
with at most two layers and 1,024 tokens, without dropout. Never called before a run's first step. Not responsible for who
is told (`run.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform as host
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from jgpt.batches import NUM_GROUPS, Batch
from jgpt.config import Experiment, ModelConfig
from jgpt.devices.compute import FUSIONS, PLAIN, SMALL_MODEL_PARAMS, Tricks, choose_tricks, has_padding
from jgpt.keys import INIT, derive_key
from jgpt.model import init_params
from jgpt.params import count_params
from jgpt.sharding import stack_blocks, unstack_blocks
from jgpt.step import loss_and_grads
from jgpt.system import files
from jgpt.system.cache import cache_dir, make_private

MAX_TOKENS = 1024  # of the batch that is compared; the logits in float64 are kept several times over
MAX_LAYERS = 2  # every shape is in two of them
TOLERANCE = 1e-4  # of a leaf's largest entry; a sound float32 gradient is within 1e-5


@dataclasses.dataclass(frozen=True)
class Check:
  """What a comparison came to.

  Attributes:
    difference: the largest over all leaves, relative to the leaf's largest entry; infinite for what is not a number.
    leaf: where.
    sound: where the difference is too large, other ways of compiling that agree: "plain", "without fusions".
    seconds: that it took.
  """

  difference: float
  leaf: str
  sound: tuple[str, ...]
  seconds: float

  @property
  def passed(self) -> bool:
    """Whether the way that a run is compiled agrees."""
    return self.difference <= TOLERANCE


def compare_compiled(experiment: Experiment, platform: str) -> Check:
  """Compares loss and gradients, compiled, with the network run operation by operation in float64.

  The network has the experiment's sizes and switches, at most two layers and no dropout; the batch has the experiment's
  length and at most 1,024 tokens (or one sequence), drawn evenly.

  Args:
    experiment: resolved.
    platform: of the devices: "cpu", "gpu", "tpu".
  """
  began = time.perf_counter()
  layers = min(MAX_LAYERS, experiment.model.num_layers)
  model = dataclasses.replace(experiment.model, num_layers=layers, dropout=0.0, dropout_places=())
  draw = jax.jit(partial(init_params, config=model), compiler_options=choose_tricks(experiment, platform).init_options)
  params = jax.tree.map(np.asarray, draw(derive_key(experiment.train.seed, INIT, 0)))
  batch = _draw_batch(experiment, model)
  expected = _run_in_float64(params, batch, model)

  def find_worst(tricks: Tricks) -> tuple[str, float]:
    compiled = jax.jit(partial(tricks.grads_fn, config=model), compiler_options=tricks.step_options)
    loss, grads = compiled(tricks.layout(params), batch)
    return _find_worst(expected, {"loss": loss, **stack_blocks(grads)})

  as_run = choose_tricks(experiment, platform)
  leaf, difference = find_worst(as_run)
  without = dataclasses.replace(as_run, step_options=as_run.step_options | {FUSIONS: ""})
  others = {} if difference <= TOLERANCE else {"plain": PLAIN, "without fusions": without}
  sound = tuple(way for way, tricks in others.items() if find_worst(tricks)[1] <= TOLERANCE)
  return Check(difference, leaf, sound, time.perf_counter() - began)


def _draw_batch(experiment: Experiment, model: ModelConfig) -> Batch:
  """Random tokens; documents have random lengths."""
  T = experiment.data.seq_len
  B = max(1, min(experiment.data.batch_size, MAX_TOKENS // T))
  if has_padding(experiment):
    B = max(NUM_GROUPS, B - B % NUM_GROUPS)
  rng = np.random.default_rng(experiment.train.seed)
  tokens = rng.integers(0, model.vocab_size, (B, T + 1)).astype(np.int32)
  lengths = rng.integers(1, T + 1, B) if experiment.data.batching == "documents" else np.full(B, T)
  weights = np.arange(T) < lengths[:, None]
  return Batch(*(jnp.asarray(x) for x in (tokens[:, :-1], tokens[:, 1:], weights.astype(np.float32))))


def _run_in_float64(params: dict, batch: Batch, model: ModelConfig) -> dict:
  """Loss and gradients without `jax.jit`, as float64 NumPy arrays, blocks stacked."""
  with jax.enable_x64(True):
    exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), unstack_blocks(params))
    loss, grads = loss_and_grads(exact, batch, model)
    return jax.tree.map(np.asarray, {"loss": loss, **stack_blocks(grads)})


def _find_worst(expected: dict, got: dict) -> tuple[str, float]:
  """The leaf that differs most, and by how much of its largest entry; one that is not a number differs without bound."""
  differences = {}
  wanted, there = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (expected, got))
  for path, leaf in wanted.items():
    largest = np.max(np.abs(leaf))
    difference = np.max(np.abs(leaf - np.asarray(there[path], np.float64))) / (largest or 1.0)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    differences[name] = float(difference) if np.isfinite(difference) else float("inf")
  worst = max(differences, key=differences.__getitem__)
  return worst, differences[worst]


# --- Once for each machine ---


def check_once(experiment: Experiment, platform: str) -> Check | None:
  """Checks the first program with XLA's fusions that this jaxlib compiles on this processor; None where that was done.

  Small models, whose training step has no fusions, and other platforms are not checked. What failed is checked again.

  Args:
    experiment: resolved.
    platform: of the devices.
  """
  if platform != "cpu" or count_params(experiment.model) <= SMALL_MODEL_PARAMS:
    return None
  path, key = cache_dir() / "canary.json", f"{_describe_compiler()}, tricks {experiment.mesh.tricks}"
  sound = _read(path)
  if key in sound:
    return None
  check = compare_compiled(experiment, platform)
  if check.passed:
    _write(path, sound | {key: f"{check.difference:.1e} in {check.leaf}"})
  return check


def describe_check(check: Check) -> str:
  """What a check found, in a line; where it failed, what to do."""
  differing = f"{check.difference:.1e} of the largest entry of {check.leaf}"
  if check.passed:
    return f"checked once, the compiler: gradients agree with float64, the worst by {differing} ({check.seconds:.1f} s)"
  mend = {"plain": "--set mesh.tricks=false", "without fusions": f'XLA_FLAGS="--{FUSIONS}=" before the command'}
  advice = f"Try {mend[check.sound[0]]}" if check.sound else "No way of compiling agrees: try another version of jaxlib"
  return (
    f"WARNING: jaxlib {jaxlib.__version__} compiles this model wrongly on this machine: a gradient differs from float64 by "
    f"{differing}. Do not trust what was trained. {advice}"
  )


def _describe_compiler() -> str:
  """What a result holds for: the compiler's version and flags, and the processor that it compiles for."""
  cpuinfo = Path("/proc/cpuinfo")
  lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
  processor = [next((line for line in lines if line.startswith(field)), "") for field in ("model name", "flags")]
  digest = hashlib.sha256(repr((processor, host.machine(), host.processor())).encode()).hexdigest()[:8]
  return f"jaxlib {jaxlib.__version__}, processor {digest}, XLA_FLAGS={os.environ.get('XLA_FLAGS', '')}"


def _read(path: Path) -> dict[str, str]:
  """What was found sound; nothing where the file is not there or is none of ours."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def _write(path: Path, sound: dict[str, str]) -> None:
  """Replaces the file; where it cannot be written the check is made again next time."""
  try:
    make_private(path.parent)
    files.write_json(path, sound)
  except OSError:
    return
