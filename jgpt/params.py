"""What every parameter of the model is, declared once, and counted without arrays.

Responsible for `param_table`: the shape, logical axes, initial distribution and kind of each parameter. Values,
shardings, weight decay and counts are maps over the table. Not responsible for making arrays: this file imports no jax.
"""

from __future__ import annotations

import dataclasses
import math

from jgpt.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Param:
  """What one parameter is.

  A frozen dataclass and not a tuple: a tuple would itself be a pytree and `tree.map` would walk into it.

  Attributes:
    shape: its dimensions in memory; in `blocks`, those of one layer.
    axes: one logical axis per dimension (None: never divided); `sharding.py` maps them to the mesh.
    kind: one of `jgpt.config.PARAM_KINDS`; decides what decays.
    std: standard deviation of the normal distribution it is drawn from.
    mean: of that distribution.
    padding: rows at the end of dimension 0 that exist for compute only: zero, never updated, not counted.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  kind: str
  std: float
  mean: float = 0.0
  padding: int = 0

  @property
  def size(self) -> int:
    """Entries that are learned."""
    return (self.shape[0] - self.padding) * math.prod(self.shape[1:])


def param_table(config: ModelConfig) -> dict:
  """Maps each parameter's name to its `Param`; under "blocks" stands one layer, of which there are `num_layers`.

  Raises:
    UserError: if `config.vocab_size` is not resolved.
  """
  V, D, F = config.padded_vocab_size, config.d_model, config.d_ff
  N, H, S = config.num_heads, config.head_dim, config.max_seq_len
  std, padding = config.init_std, V - config.vocab_size
  return {
    "tok_embed": Param((V, D), ("vocab", "embed"), "embedding", std, padding=padding),
    "pos_embed": Param((S, D), (None, "embed"), "embedding", std),
    "blocks": {
      "w_qkv": Param((D, 3, N, H), ("embed", None, "heads", None), "matrix", std),
      "w_out": Param((N, H, D), ("heads", None, "embed"), "matrix", std),
      "w_up": Param((D, F), ("embed", "mlp"), "matrix", std),
      "w_down": Param((F, D), ("mlp", "embed"), "matrix", std),
    },
    "unembed": Param((V, D), ("vocab", "embed"), "head", std, padding=padding),
  }


def count_params(config: ModelConfig) -> int:
  """Counts the entries that are learned, all layers, without padding."""

  def count(table: dict) -> int:
    return sum(p.size if isinstance(p, Param) else count(p) for p in table.values())

  table = param_table(config)
  return count(table) + (config.num_layers - 1) * count(table["blocks"])
