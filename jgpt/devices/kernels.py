"""Which form of attention a device computes: fused kernels are tried by compiling them.

The kernels are in `fused_attention.py`; the other choices by platform are in `compute.py`.
"""

import functools

import jax

from jgpt.attention import NUM_BLOCKS, attention
from jgpt.config import Experiment
from jgpt.errors import first_line
from jgpt.fused_attention import KERNELS, find_obstacle
from jgpt.products import find_precision

# Positions from which "auto" tries a kernel. As compiled for a v5e, one layer's attention and its
# gradient (B 64, N 6, H 64, bfloat16) took 0.5 M cycles by splash at 128 positions and 0.4 M
# plainly; 1.5 and 1.6 M at 256; 3.5 and 8.4 M at 512 (N 12, B 32). Kernels' cycles are counts of
# instruction bundles; nothing of this is measured.
KERNEL_CONTEXT = 256
PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}


def choose_attention(experiment: Experiment, device: jax.Device) -> tuple[str, list[str]]:
  """Chooses the form of attention, and says why where that is not what was asked for.

  "auto" takes, in long contexts, splash on a TPU, cuDNN on a GPU in bfloat16, and else blocks. A
  kernel that cannot compute the experiment, whether by "auto" or by name, is replaced by blocks or
  the definition, with a line: its dropout, dtype or head size, its device, or that it does not
  compile for it.

  Args:
    experiment: resolved otherwise, `compute.dtype` included.
    device: one of those that compute, or of a topology that is not there.

  Returns:
    A value of `compute.attention` other than "auto", and lines for the start block.
  """
  compute, model = experiment.compute, experiment.model
  kernel = _find_kernel(experiment, device) if compute.attention == "auto" else compute.attention
  if kernel is not None and kernel not in KERNELS:
    return kernel, []
  is_long = compute.tricks and is_context_long(experiment, device.platform)
  fallback = "blocks" if is_long else "plain"
  if kernel is None:
    return fallback, []
  dtype, precision = compute.dtype, find_precision(compute)
  drops = bool(model.dropout) and "attention" in model.dropout_places
  if device.platform != PLATFORMS[kernel]:
    reason = f"it is for platform {PLATFORMS[kernel]}, not {device.platform}"
  else:
    reason = find_obstacle(kernel, model.head_dim, dtype, drops=drops, precision=precision)
    shape = 1, experiment.data.seq_len, model.num_heads, model.head_dim
    reason = reason or find_compile_error(kernel, shape, dtype, device)
  if reason is None:
    return kernel, []
  return fallback, [f"attention={fallback} in place of {kernel}: {reason}"]


def is_context_long(experiment: Experiment, platform: str) -> bool:
  """Returns whether attention is faster in blocks of queries, which compute 5/8 of the scores.

  On a CPU a step of `shakespeare_char` without dropout at batch 8 took 0.96 s instead of 1.07 at
  its 256 positions, and 1.37 s instead of 1.80 at 1,024 (batch 2); with dropout, whose mask is
  drawn whole, 1.14 instead of 1.20. At 64 positions nothing is gained. As compiled for a v5e, not
  measured, one layer's attention and its gradient took 2.0 M cycles in blocks and 1.6 M plainly at
  256 positions, 5.4 and 8.4 M at 512, and 4.2 and 7.8 M at 1,024 (2 blocks 5.4, 8 blocks 3.7 in
  twice the time to compile).
  """
  least = 256 if platform == "cpu" else 512
  return experiment.data.seq_len >= least and experiment.data.seq_len % NUM_BLOCKS == 0


def _find_kernel(experiment: Experiment, device: jax.Device) -> str | None:
  """Returns the kernel that "auto" tries; None where it tries none, as on CPUs."""
  compute = experiment.compute
  if not compute.tricks or experiment.data.seq_len < KERNEL_CONTEXT:
    return None
  if device.platform == "tpu":
    return "splash"
  return "cudnn" if device.platform == "gpu" and compute.dtype == "bfloat16" else None


@functools.cache
def find_compile_error(
  implementation: str, shape: tuple[int, int, int, int], dtype: str, device: jax.Device
) -> str | None:
  """Compiles attention and its gradient for a device; returns why that fails, None if it does not.

  It takes 2 to 8 s, once in a process, and less where the compilation cache has it.

  Args:
    implementation: as `compute.attention`.
    shape: of queries, keys and values. One sequence is enough: a kernel computes more of them one
      after the other.
    dtype: of queries, keys and values.
    device: to compile for; it need not be there.
  """
  attend = functools.partial(attention, implementation=implementation)

  def compute(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple:
    return jax.vjp(attend, q, k, v)[1](g)

  try:
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))
    jax.jit(compute).lower(x, x, x, x).compile()
  except Exception as error:  # of a compiler: each has types of its own
    return f"it does not compile: {first_line(error)[:200]}"
  return None
