"""Compares compiled gradients with a float64 reference.

XLA's CPU backend replaces groups of operations by prebuilt kernels (YNNPACK fusions), and some
versions returned wrong values without an error (jax-ml/jax#39103, #39257, #40412). The loss and
every gradient are compiled as in a run, and compared with the same network computed in float64
without jit: at the run's widths and length, with at most two layers and 1,024 tokens, without
dropout. `run.py` calls this after training and prints the result.
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

from jgpt.batches import Batch
from jgpt.config import Experiment
from jgpt.config.experiment import NUM_GROUPS, PLAIN
from jgpt.devices.compute import (
  FUSIONS,
  SMALL_MODEL_PARAMS,
  choose_quick_options,
  choose_step_options,
  keep_known_options,
  resolve_compute,
)
from jgpt.keys import INIT, derive_key
from jgpt.model import init_params
from jgpt.params import count_params
from jgpt.sharding import arrange_blocks, stack_blocks, unstack_blocks
from jgpt.step import loss_and_grads
from jgpt.system import files
from jgpt.system.cache import cache_dir, make_private
from jgpt.system.precision import enable_x64

# In the batch that is compared: several copies of its float64 logits are in memory at once.
MAX_TOKENS = 1024
MAX_LAYERS = 2  # more layers add no new shapes
# By `compute.dtype`: of an entry, relative to its leaf's largest one, and the least cosine between
# the whole gradient and that of float64. A correct float32 gradient is within 1e-5;
# in bfloat16 the worst entries were within 1%, and the cosine 0.99997 and more.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}
COSINES = {"float32": 0.999999, "bfloat16": 0.999}


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The result of a comparison.

  Attributes:
    difference: the largest over all leaves, relative to the leaf's largest entry; infinite where a
      gradient is not finite.
    leaf: name of the leaf with this difference.
    sound: other ways of compiling that agree, of "plain" and "without fusions"; looked for only
      where the difference is too large.
    seconds: taken by the comparison.
    dtype: of `compute`, which decides what is tolerated.
    cosine: between the whole gradient and that of float64; 0 where an entry is not finite.
  """

  difference: float
  leaf: str
  sound: tuple[str, ...]
  seconds: float
  dtype: str = "float32"
  cosine: float = 1.0

  @property
  def passed(self) -> bool:
    """Returns whether gradients compiled as in a run agree with float64."""
    return self.difference <= TOLERANCES[self.dtype] and self.cosine >= COSINES[self.dtype]


def compare_compiled(experiment: Experiment, device: jax.Device) -> Comparison:
  """Compares compiled loss and gradients with those computed in float64 without jit.

  The network has the experiment's sizes and switches, at most two layers and no dropout. The batch
  has the experiment's length and at most a micro-batch or 1,024 tokens (or one sequence), drawn
  uniformly.

  Args:
    experiment: resolved.
    device: one of those that the run takes.
  """
  began = time.perf_counter()
  layers = min(MAX_LAYERS, experiment.model.num_layers)
  changes = {"num_layers": layers, "dropout": 0.0, "dropout_places": ()}
  as_run = dataclasses.replace(
    resolve_compute(experiment, device),
    model=dataclasses.replace(experiment.model, **changes),
    train=dataclasses.replace(experiment.train, micro_batch_size=None),
  )
  plain = dataclasses.replace(as_run, compute=PLAIN)
  draw = jax.jit(
    partial(init_params, config=as_run.model), compiler_options=choose_quick_options(as_run)
  )
  params = jax.device_get(draw(derive_key(experiment.train.seed, INIT, 0)))
  batch = draw_batch(dataclasses.replace(as_run, train=experiment.train))
  expected = compute_in_float64(params, batch, plain)

  wanted = {name: leaf for name, leaf in expected.items() if name != "loss"}

  def compare_with(experiment: Experiment, options: dict) -> Comparison:
    compiled = jax.jit(
      partial(loss_and_grads, step=0, experiment=experiment), compiler_options=options
    )
    arrange = jax.jit(partial(arrange_blocks, layers=experiment.compute.layers))
    loss, grads = compiled(arrange(jax.device_put(params)), batch)
    got = jax.device_get({"loss": loss, **stack_blocks(grads)})
    leaf, difference = find_worst(expected, got)
    del got["loss"]
    cosine, dtype = find_cosine(wanted, got), experiment.compute.dtype
    return Comparison(difference, leaf, (), time.perf_counter() - began, dtype, cosine)

  options = choose_step_options(resolve_compute(experiment, device))  # of all layers
  found = compare_with(as_run, options)
  if found.passed:
    return found
  others = {"plain": (plain, {})}
  if without_fusions := keep_known_options({FUSIONS: ""}):
    others["without fusions"] = as_run, options | without_fusions
  sound = tuple(way for way, made in others.items() if compare_with(*made).passed)
  return dataclasses.replace(found, sound=sound, seconds=time.perf_counter() - began)


def draw_batch(experiment: Experiment) -> Batch:
  """Draws a batch of uniform random tokens; documents have uniform random lengths.

  Args:
    experiment: resolved.
  """
  T = experiment.data.seq_len
  B = experiment.train.micro_batch_size or experiment.data.batch_size
  B = max(1, min(B, MAX_TOKENS // T))
  if experiment.compute.group_documents is True:
    B = max(NUM_GROUPS, B - B % NUM_GROUPS)
  rng = np.random.default_rng(experiment.train.seed)
  tokens = rng.integers(0, experiment.model.vocab_size, (B, T + 1)).astype(np.int32)
  lengths = rng.integers(1, T + 1, B) if experiment.data.batching == "documents" else np.full(B, T)
  weights = np.arange(T) < lengths[:, None]
  return jax.device_put(Batch(tokens[:, :-1], tokens[:, 1:], weights.astype(np.float32)))


def compute_in_float64(params: dict, batch: Batch, experiment: Experiment) -> dict:
  """Computes loss and gradients in float64 without jit.

  Args:
    params: as `init_params` returns them.
    batch: for the loss.
    experiment: resolved; `compute` decides how it is computed.

  Returns:
    The gradients as NumPy arrays with stacked blocks, and the loss under "loss".
  """
  with enable_x64(True), jax.transfer_guard("allow"):  # operations take Python's numbers
    exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), unstack_blocks(params))
    loss, grads = loss_and_grads(exact, batch, 0, experiment)
    return jax.tree.map(np.asarray, {"loss": loss, **stack_blocks(grads)})


def find_worst(expected: dict, got: dict) -> tuple[str, float]:
  """Finds the leaf with the largest difference.

  Args:
    expected: float64 arrays.
    got: arrays of the same structure.

  Returns:
    The leaf's name, and its largest difference relative to its largest expected entry; infinite
    where an entry is not finite.
  """
  differences = {}
  wanted, there = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (expected, got))
  for path, leaf in wanted.items():
    largest = np.max(np.abs(leaf))
    difference = np.max(np.abs(leaf - np.asarray(there[path], np.float64))) / (largest or 1.0)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    differences[name] = float(difference) if np.isfinite(difference) else float("inf")
  worst = max(differences, key=differences.__getitem__)
  return worst, differences[worst]


def find_cosine(expected: dict, got: dict) -> float:
  """Computes the cosine between two gradients, all leaves together; 0 where one is not finite.

  Args:
    expected: float64 arrays.
    got: arrays of the same structure.
  """
  pairs = [
    (wanted.ravel(), np.asarray(found, np.float64).ravel())
    for wanted, found in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True)
  ]
  product, *squares = (
    sum(np.dot(pair[a], pair[b]) for pair in pairs) for a, b in ((0, 1), (0, 0), (1, 1))
  )
  cosine = float(product / (np.sqrt(squares[0]) * np.sqrt(squares[1]) or 1.0))
  return cosine if np.isfinite(cosine) else 0.0


# --- Once for each machine ---


def compare_once(experiment: Experiment, device: jax.Device) -> Comparison | None:
  """Calls `compare_compiled` unless it has passed before with this compiler and processor.

  Small models are skipped, because their training step has no fusions, and so are other platforms;
  under JAX_DISABLE_JIT nothing is compiled.

  Args:
    experiment: resolved.
    device: one of those that the run takes.

  Returns:
    The comparison, or None where it was skipped.
  """
  if (
    jax.config.jax_disable_jit
    or device.platform != "cpu"
    or count_params(experiment.model) <= SMALL_MODEL_PARAMS
  ):
    return None
  path = cache_dir() / "canary.json"
  compute = experiment.compute
  key = f"{describe_compiler()}, tricks {compute.tricks}"
  chosen = {name: value for name, value in dataclasses.asdict(compute).items() if value != "auto"}
  key += "".join(f", {name} {chosen[name]}" for name in chosen.keys() - {"tricks"})
  sound = _read_sound(path)
  if key in sound:
    return None
  comparison = compare_compiled(experiment, device)
  if comparison.passed:
    write_sound(path, sound | {key: f"{comparison.difference:.1e} in {comparison.leaf}"})
  return comparison


def describe_comparison(comparison: Comparison) -> str:
  """Describes a comparison in one line; where it failed, with what to do."""
  differing = f"{comparison.difference:.1e} of the largest entry of {comparison.leaf}"
  is_rounded = comparison.dtype == "bfloat16"
  if comparison.passed:
    cosine = f" in bfloat16, cosine {comparison.cosine:.6f}" if is_rounded else ""
    return (
      f"checked once, the compiler: gradients{cosine} agree with float64, the worst by "
      f"{differing} ({comparison.seconds:.1f} s)"
    )
  plainly = " --set compute.dtype=float32" if is_rounded else ""
  remedies = {
    "plain": f"--set compute.tricks=false{plainly}",
    "without fusions": f'XLA_FLAGS="--{FUSIONS}=" before the command',
  }
  advice = (
    f"Try {remedies[comparison.sound[0]]}"
    if comparison.sound
    else "No way of compiling agrees: try another version of jaxlib"
  )
  return (
    f"WARNING: jaxlib {jaxlib.__version__} compiles this model wrongly on this machine: a gradient "
    f"differs from float64 by {differing}. Do not trust what was trained. {advice}"
  )


def describe_compiler() -> str:
  """Describes the compiler by its version and flags, and the processor by a digest.

  A comparison is valid for one such description.
  """
  cpuinfo = Path("/proc/cpuinfo")
  lines = (
    cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
  )
  processor = [
    next((line for line in lines if line.startswith(field)), "")
    for field in ("model name", "flags")
  ]
  described = repr((processor, host.machine(), host.processor()))
  digest = hashlib.sha256(described.encode()).hexdigest()[:8]
  flags = os.environ.get("XLA_FLAGS", "")
  return f"jaxlib {jaxlib.__version__}, processor {digest}, XLA_FLAGS={flags}"


def _read_sound(path: Path) -> dict[str, str]:
  """Reads what `write_sound` wrote; returns {} where the file is missing or not readable."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def write_sound(path: Path, sound: dict[str, str]) -> None:
  """Writes which compilers passed; where that fails, the next run compares again.

  Args:
    path: canary.json, replaced.
    sound: compilers as `describe_compiler` describes them, each with its worst difference.
  """
  try:
    make_private(path.parent)
    files.write_json(path, sound)
  except OSError:
    return
