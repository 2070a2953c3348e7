"""Floating-point operations and bytes of a step, and the peak rates of known accelerators.

Pure arithmetic on sizes, without jax. What a device reaches is measured in `bench/timing.py`.
"""

from __future__ import annotations

import dataclasses

from jgpt.config import ModelConfig
from jgpt.params import count_params

FLOAT_BYTES = 4  # of a float32

# Dense bfloat16 peaks in TFLOP/s, by the beginning of a device's kind; the first match counts. H100
# and H200 are the SXM modules. The slower PCIe and NVL cards have no entry, so that no share is
# printed relative to a wrong peak.
BF16_PEAKS = (
  ("NVIDIA A100", 312.0),
  ("NVIDIA H100 80GB HBM3", 989.0),
  ("NVIDIA H200 NVL", None),
  ("NVIDIA H200", 989.0),
  ("TPU v4 lite", None),  # an inference chip; "TPU v4" would match it
  ("TPU v4", 275.0),
  ("TPU v5 lite", 197.0),
  ("TPU v5e", 197.0),
  ("TPU v5", 459.0),  # v5p says "TPU v5" or "TPU v5p"
  ("TPU v6 lite", 918.0),
  ("TPU v6e", 918.0),
)


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


def find_bf16_peak(device_kind: str) -> float | None:
  """Returns the dense bfloat16 peak of a device in FLOP/s, or None where its kind is not known.

  Args:
    device_kind: as jax names it.
  """
  for begins, tera in BF16_PEAKS:
    if device_kind.startswith(begins):
      return None if tera is None else tera * 1e12
  return None


def count_cache_bytes(config: ModelConfig) -> int:
  """Counts the bytes of one position's keys and values in all layers, float32."""
  return 2 * config.num_layers * config.d_model * FLOAT_BYTES


def compute_decoding_limit(
  config: ModelConfig, batch_size: int, context: float, bandwidth: float
) -> float:
  """Computes the highest rate of decoding that memory bandwidth allows, in tokens/s.

  Each step reads all parameters once, and the cache of each text, float32:

    batch * bandwidth / (parameter bytes + batch * cache bytes per position * context)

  Args:
    config: `vocab_size` resolved.
    batch_size: texts that are drawn together.
    context: positions in the cache, on average while a text is drawn.
    bandwidth: bytes per second.
  """
  per_step = count_params(config) * FLOAT_BYTES + batch_size * count_cache_bytes(config) * context
  return batch_size * bandwidth / per_step
