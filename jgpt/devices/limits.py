"""What a step must compute and what a device can: the figures that measured times are held against.

Responsible for counting floating-point operations and bytes by stated formulas, and for the peaks of known accelerators.
Pure arithmetic on sizes: nothing here runs on a device (`timing.py` measures), and this file imports no jax.
"""

from __future__ import annotations

import dataclasses

from jgpt.config import ModelConfig
from jgpt.params import count_params

FLOAT_BYTES = 4  # float32, in which everything here computes

# Dense bfloat16 peaks in TFLOP/s by how a device's kind begins; the first that fits counts. H100 and H200 are the SXM
# modules: their slower cards (PCIe, NVL) are not in the table, so that no share is printed against a wrong peak.
BF16_PEAKS = (
  ("NVIDIA A100", 312.0),
  ("NVIDIA H100 80GB HBM3", 989.0),
  ("NVIDIA H200 NVL", None),
  ("NVIDIA H200", 989.0),
  ("TPU v4 lite", None),  # an inference chip that is not in the table
  ("TPU v4", 275.0),
  ("TPU v5 lite", 197.0),
  ("TPU v5e", 197.0),
  ("TPU v5", 459.0),  # v5p says "TPU v5" or "TPU v5p"
  ("TPU v6 lite", 918.0),
  ("TPU v6e", 918.0),
)


@dataclasses.dataclass(frozen=True)
class Product:
  """One matrix product of a step's forward pass: [m, k] times [k, n].

  Attributes:
    name: qkv, out, up, down or head.
    m: rows of the activations, batch times positions.
    k: contracted size.
    n: columns of the result.
    count: how often a forward pass has it.
    transposed: whether the weights lie as [n, k] in memory, as the head's do.
  """

  name: str
  m: int
  k: int
  n: int
  count: int
  transposed: bool = False

  @property
  def flops(self) -> int:
    """Of the product, and of each of the two that its gradient has: 2 m k n."""
    return 2 * self.m * self.k * self.n

  def operands(self) -> dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]]:
    """The forward product and its gradient's two, as they lie in memory.

    Returns:
      forward, inputs and weights -> shape of the left side, shape of the right side, the contracted dimension of each.
    """
    x, g, w = (self.m, self.k), (self.m, self.n), (self.n, self.k) if self.transposed else (self.k, self.n)
    return {
      "forward": (x, w, (1, int(self.transposed))),
      "inputs": (g, w, (1, int(not self.transposed))),
      "weights": (g, x, (0, 0)) if self.transposed else (x, g, (0, 0)),
    }


def list_products(config: ModelConfig, batch_size: int, seq_len: int) -> list[Product]:
  """The products with weights of a forward pass; attention's own, which have none, are left out.

  Args:
    config: sizes; `vocab_size` resolved.
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
  """Counts the parameters that are multiplied with: matrices, and the head once, whether it is tied or not."""
  return count_params(config, ("matrix",)) + config.vocab_size * config.d_model


def count_train_flops(config: ModelConfig, seq_len: int) -> int:
  """Counts the floating-point operations that training on one token takes: 6 P + 6 L D T.

  P are the matmul parameters (`count_matmul_params`); a product and its gradient are 2 + 4 operations for each. Attention
  adds 6 L D T, half of the full square's, since a position sees only those before it. Work that is wasted or done twice
  does not count.

  Args:
    config: sizes; `vocab_size` resolved.
    seq_len: T, positions of a sequence.

  Source: Chowdhery et al. 2022, "PaLM", appendix B; there with the full square.
  """
  return 6 * count_matmul_params(config) + 6 * config.num_layers * config.d_model * seq_len


def find_bf16_peak(device_kind: str) -> float | None:
  """The dense bfloat16 peak of a device in FLOP/s, or None where its kind is not known.

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


def limit_decoding(config: ModelConfig, batch_size: int, context: float, bandwidth: float) -> float:
  """The most tokens per second that decoding can reach: each step reads every parameter, and each text its cache.

  tokens/s <= batch * bandwidth / (parameter bytes + batch * cache bytes per position * context), float32.

  Args:
    config: sizes; `vocab_size` resolved.
    batch_size: texts that are drawn together.
    context: positions in the cache, the mean while a text is drawn.
    bandwidth: bytes per second.
  """
  per_step = count_params(config) * FLOAT_BYTES + batch_size * count_cache_bytes(config) * context
  return batch_size * bandwidth / per_step
