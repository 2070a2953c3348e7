"""Floating-point operations and bytes of a step, and the rates and memory of known accelerators.

Pure arithmetic on sizes, without jax. What a device reaches is measured in `bench/timing.py`.
"""

from __future__ import annotations

import dataclasses

from jgpt.config import ModelConfig
from jgpt.params import count_params

FLOAT_BYTES = 4  # of a float32


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """The rates and the memory of a kind of device; one of jax's devices is half a TPU v7x.

  Attributes:
    kind: with what jax's `device_kind` begins.
    bf16: peak of dense products of bfloat16, FLOP/s; None where it has no units for them.
    tf32: the same of TF32; None where it has none.
    float32: the same of float32 by the ordinary units; None for TPUs, which have bfloat16's alone.
    memory: bytes that programs can have in all.
    bandwidth: of its memory, bytes/s.
    interconnect: bytes/s that it can send to others at a time, over all its links: of TPUs in a
      slice, of GPUs in a host. None where there is no such network, or it differs by machine.
    ports: of a TPU, one to each neighbour in a torus; None for GPUs, which are joined by a switch.
  """

  kind: str
  bf16: float | None
  tf32: float | None
  float32: float | None
  memory: int
  bandwidth: float
  interconnect: float | None = None
  ports: int | None = None


def _list_accelerators() -> tuple[Accelerator, ...]:
  """Lists what is known, from rows of TFLOP/s, GiB and GB/s; of two that match, the first counts.

  Sources: peaks and bandwidth are the makers' (NVIDIA's datasheets, without sparsity; Google
  Cloud's pages on each TPU). Memory: of TPUs what libtpu 0.0.42 names when it refuses a program
  ("exceeds available HBM"), of NVIDIA's what CUDA reports, rounded down, as in the descriptions in
  XLA's repository (xla/backends/gpu/target_config/specs), or PyTorch's errors (T4, L4, H200).
  Interconnects are published for both directions together, and half of that is here: NVLink's 600
  GB/s of an A100, 900 of an H100 and H200, 1,800 of a B200 on their boards of eight (PCIe cards are
  joined in pairs, if at all); 400 GB/s of a TPU v5e, 800 of a v6e, 1,200 of a v5p
  (docs.cloud.google.com/tpu/docs/v5e, v6e, v5p), and of a v4 2,400 Gbps each way (docs/v4).
  """
  rows = (
    # kind, bfloat16, TF32, float32, interconnect, ports, memory, bandwidth
    ("Tesla T4", None, None, 8.1, None, None, 14.7, 320),
    ("NVIDIA L4", 121, 60, 30.3, None, None, 22.1, 300),
    ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5, 300, None, 79.2, 2039),
    ("NVIDIA A100 80GB", 312, 156, 19.5, None, None, 79.2, 1935),
    ("NVIDIA A100-SXM4-40GB", 312, 156, 19.5, 300, None, 39.3, 1555),
    ("NVIDIA A100-PCIE-40GB", 312, 156, 19.5, None, None, 39.3, 1555),
    ("NVIDIA H100 80GB HBM3", 989, 494, 67, 450, None, 79.1, 3350),
    ("NVIDIA H100 PCIe", 756, 378, 51, None, None, 79.1, 2000),
    ("NVIDIA H200 NVL", 835, 417, 60, None, None, 139.0, 4800),
    ("NVIDIA H200", 989, 494, 67, 450, None, 139.0, 4800),
    ("NVIDIA B200", 2250, 1100, 80, 900, None, 178.3, 7700),
    ("TPU v4", 275, None, None, 300, 6, 30.75, 1200),
    ("TPU v5 lite", 197, None, None, 200, 4, 15.75, 819),
    ("TPU v5e", 197, None, None, 200, 4, 15.75, 819),
    ("TPU v5", 459, None, None, 600, 6, 95.74, 2765),  # v5p says "TPU v5" or "TPU v5p"
    ("TPU v6 lite", 918, None, None, 400, 4, 31.25, 1640),
    ("TPU v6e", 918, None, None, 400, 4, 31.25, 1640),
    # A chip is two of jax's devices, which share its links.
    ("TPU7x", 1153.5, None, None, None, None, 94.75, 3690),
  )
  return tuple(
    Accelerator(
      kind,
      *(None if tera is None else tera * 1e12 for tera in peaks),
      memory=int(gibi * 2**30),
      bandwidth=giga * 1e9,
      interconnect=network and network * 1e9,
      ports=ports,
    )
    for kind, *peaks, network, ports, gibi, giga in rows
  )


ACCELERATORS = _list_accelerators()
WITHOUT_ENTRY = (  # kinds that begin as another's and are none: a chip for inference; L40 and L40S
  "TPU v4 lite",
  "NVIDIA L40",
)
# Of a GPU's memory jax takes this much, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_SHARE = 0.75
# Products of bfloat16 in a TPU's product of float32, by precision (`jax.lax.Precision`).
TPU_PASSES = {"default": 1, "high": 3, "highest": 6}


@dataclasses.dataclass(frozen=True)
class Product:
  """A matrix product in a step's forward pass: [m, k] times [k, n].

  Attributes:
    name: qkv, out, up, down or head.
    m: rows of the activations, batch times positions.
    k: contracted size.
    n: columns of the result.
    count: times it occurs in a forward pass.
    transposed: whether the weights are [n, k] in memory, as the head's are.
  """

  name: str
  m: int
  k: int
  n: int
  count: int
  transposed: bool = False

  @property
  def flops(self) -> int:
    """Counts the operations of the product, 2 m k n; its gradient has two products of as many."""
    return 2 * self.m * self.k * self.n

  def operands(self) -> dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]]:
    """Returns the shapes in memory of the forward product and of the two in its gradient.

    Returns:
      "forward", "inputs" and "weights", each with the left shape, the right shape, and the
      contracted dimension of both.
    """
    x, g = (self.m, self.k), (self.m, self.n)
    w = (self.n, self.k) if self.transposed else (self.k, self.n)
    return {
      "forward": (x, w, (1, int(self.transposed))),
      "inputs": (g, w, (1, int(not self.transposed))),
      "weights": (g, x, (0, 0)) if self.transposed else (x, g, (0, 0)),
    }


def list_products(config: ModelConfig, batch_size: int, seq_len: int) -> list[Product]:
  """Lists the products of a forward pass that multiply by weights; attention's scores have none.

  Args:
    config: `vocab_size` resolved.
    batch_size: sequences.
    seq_len: positions of each.
  """
  m, D, F, L = batch_size * seq_len, config.d_model, config.d_ff, config.num_layers
  return [
    Product("qkv", m, D, 3 * D, L),
    Product("out", m, D, D, L),
    Product("up", m, D, F, L),
    Product("down", m, F, D, L),
    Product("head", m, D, config.padded_vocab_size, 1, transposed=True),
  ]


def count_matmul_params(config: ModelConfig) -> int:
  """Counts the parameters used in matrix products: all matrices, and the head, tied or not."""
  return count_params(config, ("matrix",)) + config.vocab_size * config.d_model


def count_train_flops(config: ModelConfig, seq_len: int) -> int:
  """Counts the floating-point operations of training on one token: 6 P + 6 L D T.

  P is `count_matmul_params`; each takes 2 operations in the forward pass and 4 in the gradient.
  Attention adds 6 L D T, half of what all pairs of positions take, since it is causal. Padding and
  recomputation do not count.

  Args:
    config: `vocab_size` resolved.
    seq_len: T, positions of a sequence.

  Source: Chowdhery et al. 2022, "PaLM", appendix B; there attention is not halved.
  """
  return 6 * count_matmul_params(config) + 6 * config.num_layers * config.d_model * seq_len


def find_accelerator(device_kind: str) -> Accelerator | None:
  """Finds what is known of a device; None for CPUs and unknown kinds.

  Args:
    device_kind: as jax names it.
  """
  if device_kind.startswith(WITHOUT_ENTRY):
    return None
  return next((a for a in ACCELERATORS if device_kind.startswith(a.kind)), None)


def find_peak(device_kind: str, dtype: str, precision: str = "default") -> float | None:
  """Finds the peak rate of dense products of a device, in FLOP/s.

  Args:
    device_kind: as jax names it.
    dtype: "bfloat16" or "float32", of the products' operands.
    precision: of float32 products: "default", "high" or "highest". Below the highest, NVIDIA's GPUs
      that have TF32 multiply in it; a TPU multiplies float32 as 1, 3 or 6 products of bfloat16.

  Returns:
    None where the device is not known, or has no units for the dtype.

  Source: JAX's documentation of `jax.lax.Precision`.
  """
  device = find_accelerator(device_kind)
  if device is None or dtype == "bfloat16":
    return device and device.bf16
  if device.float32 is None:
    return device.bf16 / TPU_PASSES[precision]
  return device.float32 if device.tf32 is None or precision == "highest" else device.tf32


def find_memory_limit(device_kind: str) -> int | None:
  """Finds how many bytes jax's programs have on a device that does not say; None if not known."""
  device = find_accelerator(device_kind)
  if device is None:
    return None
  return device.memory if device.float32 is None else int(GPU_SHARE * device.memory)


def count_cache_bytes(config: ModelConfig, entry_bytes: int = FLOAT_BYTES) -> int:
  """Counts the bytes of one position's keys and values in all layers."""
  return 2 * config.num_layers * config.d_model * entry_bytes


def compute_decoding_limit(
  config: ModelConfig,
  batch_size: int,
  context: float,
  bandwidth: float,
  entry_bytes: int = FLOAT_BYTES,
) -> float:
  """Computes the highest rate of decoding that memory bandwidth allows, in tokens/s.

  Each step reads all parameters once, and the cache of each text:

    batch * bandwidth / (parameter bytes + batch * cache bytes per position * context)

  Args:
    config: `vocab_size` resolved.
    batch_size: texts that are drawn together.
    context: positions in the cache, on average while a text is drawn.
    bandwidth: bytes per second.
    entry_bytes: of a parameter and of an entry of the cache: 2 in bfloat16.
  """
  cache_bytes = batch_size * count_cache_bytes(config, entry_bytes) * context
  return batch_size * bandwidth / (count_params(config) * entry_bytes + cache_bytes)
