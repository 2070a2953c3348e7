"""The table of the model's parameters, from which initial values, shardings and decay are derived.

`param_table` declares each parameter once: its shape, logical axes, kind and initial distribution.
Arrays are made in `model.py`. Imports no jax, so that counting parameters takes no time.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from jgpt.config import ModelConfig
from jgpt.errors import UserError, near_matches


@dataclasses.dataclass(frozen=True)
class Param:
  """The declaration of one parameter.

  A dataclass and not a tuple, so that `jax.tree.map` takes it as a leaf.

  Attributes:
    shape: dimensions in memory; in "blocks", those of one layer.
    axes: one logical axis per dimension, which `sharding.py` maps to the mesh; None is never
      divided.
    kind: one of `jgpt.config.experiment.PARAM_KINDS`; decides whether it decays.
    std: standard deviation of the normal distribution of initial values; 0 for a constant.
    mean: mean of that distribution.
    padding: number of rows at the end of dimension 0 that are zero, never updated and not counted.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  kind: str
  std: float
  mean: float = 0.0
  padding: int = 0

  @property
  def size(self) -> int:
    """Returns the number of entries that are learned, padding excluded."""
    return (self.shape[0] - self.padding) * math.prod(self.shape[1:])


def param_table(config: ModelConfig) -> dict:
  """Maps each parameter's name to its `Param`; "blocks" maps the names of one layer.

  Raises:
    UserError: if `config.vocab_size` is not resolved.
  """
  V, D, F = config.padded_vocab_size, config.d_model, config.d_ff
  N, H, S = config.num_heads, config.head_dim, config.max_seq_len
  std, padding = config.init_std, V - config.vocab_size
  residual_std = std / math.sqrt(2 * config.num_layers) if config.scale_residual_init else std

  def gain() -> Param:
    return Param((D,), (None,), "gain", std=0.0, mean=1.0)

  def bias(*shape: int, axes: tuple[str | None, ...]) -> Param:
    return Param(shape, axes, "bias", std=0.0)

  learned, gains = config.positions == "learned", config.norm != "rms"
  norm_biases = config.norm == "layer"
  biases, mlp_biases = config.biases == "all", config.biases != "none"
  # A parameter that the config leaves out is False here, and is removed below.
  block = {
    "norm_attn_gain": gains and gain(),
    "norm_attn_bias": norm_biases and bias(D, axes=(None,)),
    "w_qkv": Param((D, 3, N, H), ("embed", None, "heads", None), "matrix", std),
    "b_qkv": biases and bias(3, N, H, axes=(None, "heads", None)),
    "w_out": Param((N, H, D), ("heads", None, "embed"), "matrix", residual_std),
    "b_out": biases and bias(D, axes=(None,)),
    "norm_mlp_gain": gains and gain(),
    "norm_mlp_bias": norm_biases and bias(D, axes=(None,)),
    "w_up": Param((D, F), ("embed", "mlp"), "matrix", std),
    "b_up": mlp_biases and bias(F, axes=("mlp",)),
    "w_down": Param((F, D), ("mlp", "embed"), "matrix", residual_std),
    "b_down": mlp_biases and bias(D, axes=(None,)),
  }
  table = {
    "tok_embed": Param((V, D), ("vocab", "embed"), "embedding", std, padding=padding),
    "pos_embed": learned and Param((S, D), (None, "embed"), "embedding", std),
    "blocks": {name: param for name, param in block.items() if param},
    "norm_final_gain": config.norm_final and gains and gain(),
    "norm_final_bias": config.norm_final and norm_biases and bias(D, axes=(None,)),
    "unembed": not config.tied_head
    and Param((V, D), ("vocab", "embed"), "head", std, padding=padding),
  }
  return {name: param for name, param in table.items() if param}


def count_params(config: ModelConfig, kinds: tuple[str, ...] | None = None) -> int:
  """Counts the entries that are learned, all layers, without padding.

  Args:
    config: `vocab_size` resolved.
    kinds: kinds of parameters to count; None counts all.
  """
  return sum(
    layers * param.size for _, param, layers in walk(config) if kinds is None or param.kind in kinds
  )


def walk(config: ModelConfig) -> Iterator[tuple[str, Param, int]]:
  """Iterates over the parameters.

  Yields:
    The name ("blocks/w_up" in blocks), the `Param`, and the number of layers that have it.
  """
  table = param_table(config)
  for name, param in table.items():
    if isinstance(param, Param):
      yield name, param, 1
    else:
      yield from ((f"{name}/{inner}", p, config.num_layers) for inner, p in param.items())


def param_at(path: tuple, config: ModelConfig) -> Param:
  """Looks up the `Param` of a leaf of the parameters; blocks may be stacked or a list.

  Args:
    path: of the leaf, as `jax.tree_util` gives it.
    config: `vocab_size` resolved.
  """
  entry = param_table(config)
  for key in path:
    if hasattr(key, "key"):  # other keys are numbers of layers
      entry = entry[key.key]
  return entry


# --- Single entries ---


@dataclasses.dataclass(frozen=True)
class Entry:
  """The place of one entry of a parameter.

  Attributes:
    name: of the parameter, as `walk` yields it.
    param: its declaration.
    index: one number per dimension; in blocks the layer comes first.
  """

  name: str
  param: Param
  index: tuple[int, ...]


def find_entry(text: str, config: ModelConfig) -> Entry:
  """Parses the place of one entry: "tok_embed[4,2]", or "blocks/w_up[0,3,5]" with the layer first.

  Args:
    text: the parameter's name, and indices from 0.
    config: `vocab_size` resolved.

  Raises:
    UserError: for an unknown parameter (with near matches), or indices outside its shape (with the
      shape).
  """
  params = {name: param for name, param, _ in walk(config)}
  name, _, inside = text.strip().partition("[")
  if name not in params:
    same = [n for n in params if n.rpartition("/")[2] == name.rpartition("/")[2]]
    meant = f" Did you mean {' or '.join(same)}?" if same else near_matches(name, params)
    raise UserError(f"there is no parameter {name!r}.{meant} There are: {', '.join(params)}.")
  param = params[name]
  layers = (config.num_layers,) if name.startswith("blocks/") else ()
  shape = (*layers, param.shape[0] - param.padding, *param.shape[1:])
  example = f"{name}[{','.join(str(min(i, size - 1)) for i, size in enumerate(shape))}]"
  need = (
    f"{name} has the shape {list(shape)}{', the layer first' if layers else ''}. Try '{example}'"
  )
  is_list = re.fullmatch(r"\s*-?[0-9]+\s*(,\s*-?[0-9]+\s*)*\]", inside)
  index = tuple(int(i) for i in inside.removesuffix("]").split(",")) if is_list else ()
  if len(index) != len(shape):
    raise UserError(f"{text!r} must name one number, with an index for each dimension: {need}")
  if not all(0 <= i < size for i, size in zip(index, shape, strict=True)):
    raise UserError(f"{text!r} is outside the parameter; indices count from 0, and {need}")
  return Entry(name, param, index)
