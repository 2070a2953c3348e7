"""The memory that a training step takes of a device: by formula, by its compiler, and less of it.

Pure arithmetic, apart from asking compiled programs for their sizes. What a device has is in
`runtime.py`; refusing what does not fit is in `program.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax

from jgpt.config import ComputeConfig, Experiment
from jgpt.config.experiment import NUM_GROUPS
from jgpt.config.settings import change
from jgpt.devices.limits import FLOAT_BYTES, count_matmul_params, find_accelerator
from jgpt.errors import UserError
from jgpt.params import count_params, walk
from jgpt.sharding import AXES, choose_shape, to_spec

REMATS = ("none", "elementwise", "block")  # values of `compute.remat`, most memory first
CHUNK_TOKENS = 1024  # of a piece of the loss that is advised
# An estimate, as a share of a step, for computing norms and activation functions again.
ELEMENTWISE_COST = 0.05
# Peak FLOP/s over bytes/s of memory of a device that is not known; TPUs and recent GPUs have 160 to
# 400, T4 25.
INTENSITY = 100.0
NETWORK = 8.0  # an estimate: memory's bytes/s over those between devices


@dataclasses.dataclass(frozen=True)
class Footprint:
  """Bytes that a training step takes of a device, by formula.

  P are the parameters that a device has: those that "fsdp" and "tensor" divide are its part. D, F,
  N and the vocabulary are the model's; "tensor" divides F, N and the vocabulary, and half of 8 D.

  Attributes:
    parameters: 4 P, float32.
    moments: 8 P, Adam's two; of sgd 4 P, its momentum, and without momentum none.
    gradients: 4 P, and as much again where the gradients of parts of a batch are added.
    activations: what the forward pass keeps for the backward pass: 8 D + 2 F numbers a token and
      layer, and with plain attention N T more; with `compute.remat=elementwise` 2 D + F less, with
      "block" D, and one layer's.
    logits: 8 bytes for each token of a pass, or of one of the loss's chunks, and id of the
      vocabulary: float32, and their gradients.
  """

  parameters: int
  moments: int
  gradients: int
  activations: int
  logits: int

  @property
  def total(self) -> int:
    """Adds them up."""
    return sum(dataclasses.astuple(self))


def estimate_footprint(experiment: Experiment, num_devices: int) -> Footprint:
  """Estimates the memory of a step on each device by formula.

  The compiler needs more for what it keeps at once and less for what it never writes: by less than
  a half mostly, but twice as much where masks of dropout are kept; `measure_program` measures it.

  Args:
    experiment: from `resolve_compute`.
    num_devices: all there are, of which the mesh has those that it asks for.
  """
  model, compute, T = experiment.model, experiment.compute, experiment.data.seq_len
  sizes = dict(zip(AXES, choose_shape(experiment, num_devices), strict=True))
  num_parts = sizes["data"] * sizes["fsdp"]
  tokens = _count_rows(experiment) // num_parts * T
  is_in_parts = tokens * num_parts < experiment.data.batch_size * T

  def divide(size: int) -> int:
    return size // sizes["tensor"] if size % sizes["tensor"] == 0 else size

  heads, hidden = divide(model.num_heads), divide(model.d_ff)
  numbers = 4 * model.d_model + 4 * heads * model.head_dim + 2 * hidden
  if compute.remat == "elementwise":
    numbers -= 2 * model.d_model + hidden
  if compute.attention in ("plain", "blocks"):
    numbers += heads * T * (5 if compute.attention == "blocks" else 8) // 8
  layers = model.num_layers * numbers
  if compute.remat == "block":
    layers = model.num_layers * model.d_model + numbers
  parameters = FLOAT_BYTES * count_device_params(experiment, sizes)
  pieces = compute.loss_chunks if isinstance(compute.loss_chunks, int) else 1
  return Footprint(
    parameters=parameters,
    moments=experiment.optimizer.num_moments * parameters,
    gradients=(2 if is_in_parts else 1) * parameters,
    activations=(2 if compute.dtype == "bfloat16" else FLOAT_BYTES) * tokens * layers,
    logits=2 * FLOAT_BYTES * -(-tokens // pieces) * divide(model.padded_vocab_size),
  )


def count_device_params(experiment: Experiment, sizes: dict[str, int]) -> int:
  """Counts the parameters, or the parts of them, that a device of a mesh has.

  Args:
    experiment: resolved.
    sizes: of the mesh's axes.
  """
  mesh, total = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes)), 0
  for _, param, layers in walk(experiment.model):
    spec = to_spec(param.axes, param.shape, mesh)
    total += param.size * layers // math.prod(sizes[axis] for axis in spec if axis)
  return total


def share_params(experiment: Experiment, num_devices: int) -> dict[str, Any]:
  """Returns the sizes of a mesh whose devices share the parameters that each has whole.

  Args:
    experiment: resolved.
    num_devices: all of the mesh.

  Returns:
    Changes as `settings.change` takes them; none where there is nothing to share.
  """
  data, fsdp, _ = choose_shape(experiment, num_devices)
  if data == 1 or experiment.model.d_model % (data * fsdp):
    return {}
  return {"mesh.data": 1, "mesh.fsdp": data * fsdp}


def scale_footprint(footprint: Footprint, known: Footprint, measured: int) -> float:
  """Estimates the bytes of a step from what its compiler said of another of the same model.

  Args:
    footprint: of the step.
    known: of the other.
    measured: bytes of the other.
  """
  state = known.parameters + known.moments
  return state + (footprint.total - state) * (measured - state) / (known.total - state)


def _count_rows(experiment: Experiment) -> int:
  """Counts the sequences of a forward and backward pass on all devices."""
  if experiment.compute.group_documents is True:
    return experiment.data.batch_size // NUM_GROUPS
  return experiment.train.micro_batch_size or experiment.data.batch_size


def measure_program(compiled: jax.stages.Compiled | Any) -> int | None:
  """Measures the bytes that a compiled program takes of a device while it runs, its arguments too.

  The compiler's peak, `peak_memory_in_bytes`; of a CPU, whose peak leaves out the temporaries, and
  where jax has none, arguments + outputs + temporaries - aliased outputs. XLA:CPU allocates just
  that: 0.76 GB by this sum were 0.78 GB of the process (`shakespeare_char` at batch 8). Elsewhere
  the sum is the most that it can be.

  Args:
    compiled: from `jax.jit(...).lower(...).compile()`.

  Returns:
    None where the backend does not say.
  """
  try:
    sizes = compiled.memory_analysis()
  except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
    return None
  if sizes is None:
    return None
  total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
  total -= sizes.alias_size_in_bytes
  peak = getattr(sizes, "peak_memory_in_bytes", 0)
  devices = {d for s in jax.tree.leaves(compiled.input_shardings) for d in s.device_set}
  return peak if peak and next(iter(devices)).platform != "cpu" else total


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a run has of its devices, and what its compiled step takes of each.

  Attributes:
    flops: peak rate of all devices together, FLOP/s; None where it is not known.
    memory: bytes of each device that the step could take; None where it is not known.
    step: bytes of each device that it takes by its compiler; None where it does not say.
  """

  flops: float | None = None
  memory: int | None = None
  step: int | None = None


def describe_bytes(count: int) -> str:
  """Describes a number of bytes in kB, MB or GB (1 kB is 1,000 bytes)."""
  for scale, unit in ((1e9, "GB"), (1e6, "MB")):
    if count >= scale:
      return f"{count / scale:.3g} {unit}"
  return f"{count / 1e3:.3g} kB"


def describe_footprint(footprint: Footprint) -> str:
  """Describes the parts of a footprint: "parameters 498 MB, moments 995 MB, ..."."""
  parts = dataclasses.asdict(footprint).items()
  return ", ".join(f"{name} {describe_bytes(count)}" for name, count in parts)


def list_remedies(
  experiment: Experiment, compute: ComputeConfig, num_devices: int, kind: str
) -> list[dict[str, Any]]:
  """Lists changes of circumstances that take less memory, by the time that they cost, least first.

  They are chunks of the loss, recomputing blocks, micro-batches of fewer sequences, parameters that
  devices share, and these together; nothing that would make another run.

  Args:
    experiment: `compute` may hold "auto".
    compute: the same, resolved.
    num_devices: of the mesh.
    kind: of the devices, as jax names it.

  Returns:
    Changes as `settings.change` takes them; the last of the list takes the least memory.
  """
  data, fsdp, _ = choose_shape(experiment, num_devices)
  rows = (experiment.train.micro_batch_size or experiment.data.batch_size) // (data * fsdp)
  sizes = [n for n in range(rows, 0, -1) if rows % n == 0]
  halved = [next(n for n in sizes if n <= rows >> i) for i in range(rows.bit_length())]
  shared = share_params(experiment, num_devices)
  found = []
  for size, mesh in itertools.product(dict.fromkeys(halved), [{}, shared] if shared else [{}]):
    pieces = size * experiment.data.seq_len // CHUNK_TOKENS
    chunks = max(2, 1 << max(pieces.bit_length() - 1, 0))  # a power of two
    for loss_chunks, remat in itertools.product((None, chunks), (None, "elementwise", "block")):
      changes = {
        **mesh,
        "train.micro_batch_size": size * data * fsdp if size < rows else None,
        "compute.loss_chunks": loss_chunks if chunks > compute.loss_chunks else None,
        "compute.remat": remat if remat in REMATS[REMATS.index(compute.remat) + 1 :] else None,
      }
      changes = {name: value for name, value in changes.items() if value is not None}
      try:
        change(experiment, changes)
      except UserError:  # as where a setting that was given has no micro-batches
        continue
      found += [changes] if changes and changes not in found else []
  costs = [_estimate_cost(experiment, changes, num_devices, kind) for changes in found]
  return [changes for _, _, changes in sorted(zip(costs, range(len(found)), found, strict=True))]


def _estimate_cost(
  experiment: Experiment, changes: dict[str, Any], num_devices: int, kind: str
) -> float:
  """Estimates the time that changes add to a step, as a share of it.

  Chunks compute the head's product once more, recomputing all others' of the forward pass; each
  part of a batch reads gradients and their sum and writes it, at 40% of the peak's pace; parameters
  that devices share are gathered once more than gradients are summed, in each part.
  """
  model, data = experiment.model, experiment.data
  head = model.vocab_size * model.d_model
  whole = 6 * count_matmul_params(model)
  cost = 0.0
  if "compute.loss_chunks" in changes:
    cost += 2 * head / whole
  if changes.get("compute.remat") == "elementwise":
    cost += ELEMENTWISE_COST
  elif "compute.remat" in changes:
    cost += 2 * (whole // 6 - head) / whole
  device = find_accelerator(kind)
  intensity = (device.bf16 or device.float32) / device.bandwidth if device else INTENSITY
  parts = data.batch_size // (changes.get("train.micro_batch_size") or data.batch_size)
  tokens = data.batch_size // num_devices * data.seq_len
  share = FLOAT_BYTES * count_params(model) * 0.4 * intensity / (whole * max(tokens, 1))
  if "mesh.fsdp" in changes:
    cost += parts * NETWORK * share
  return cost + (parts - 1) * 3 * share
