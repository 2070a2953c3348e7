"""Converts jgpt's parameters to GPT-2's tensors and back: names, order and shapes.

Hugging Face stores a matrix as (in, out), which is a reshape of jgpt's: `w_qkv` [D, 3, N, H] is
`c_attn.weight` [D, 3D], and `w_out` [N, H, D] is `c_proj.weight` [D, D]. llm.c stores a matrix as
(out, in). Files are read and written in `hugging_face.py` and `llmc.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jgpt.config import Experiment, ModelConfig
from jgpt.config.experiment import GPT2_SIZES
from jgpt.config.settings import format_value
from jgpt.errors import UserError
from jgpt.params import Param, param_table, walk
from jgpt.text.tokenizer import Tokenizer

# jgpt's name and Hugging Face's, where {} is the layer, in llm.c's order. llm.c has no "unembed".
GPT2_NAMES = (
  ("tok_embed", "wte.weight"),
  ("pos_embed", "wpe.weight"),
  ("blocks/norm_attn_gain", "h.{}.ln_1.weight"),
  ("blocks/norm_attn_bias", "h.{}.ln_1.bias"),
  ("blocks/w_qkv", "h.{}.attn.c_attn.weight"),
  ("blocks/b_qkv", "h.{}.attn.c_attn.bias"),
  ("blocks/w_out", "h.{}.attn.c_proj.weight"),
  ("blocks/b_out", "h.{}.attn.c_proj.bias"),
  ("blocks/norm_mlp_gain", "h.{}.ln_2.weight"),
  ("blocks/norm_mlp_bias", "h.{}.ln_2.bias"),
  ("blocks/w_up", "h.{}.mlp.c_fc.weight"),
  ("blocks/b_up", "h.{}.mlp.c_fc.bias"),
  ("blocks/w_down", "h.{}.mlp.c_proj.weight"),
  ("blocks/b_down", "h.{}.mlp.c_proj.bias"),
  ("norm_final_gain", "ln_f.weight"),
  ("norm_final_bias", "ln_f.bias"),
  ("unembed", "lm_head.weight"),
)
# The settings of `ModelConfig` that decide which function a model computes. The others are about
# padding, dropout and initial values.
ARCHITECTURE = (
  "vocab_size",
  "max_seq_len",
  "num_layers",
  "num_heads",
  "d_model",
  "d_ff",
  "norm",
  "norm_embed",
  "norm_final",
  "activation",
  "positions",
  "biases",
  "tied_head",
  "scale_embed",
)
BIASES = ("none", "mlp", "all")  # each value includes the biases of those before
# Settings that every GPT-2 has, in the formats of Hugging Face and llm.c.
GPT2_SETTINGS = {
  "norm": "layer",
  "norm_embed": False,
  "norm_final": True,
  "positions": "learned",
  "scale_embed": False,
}


@dataclasses.dataclass(frozen=True)
class Weights:
  """A model's weights in a file or folder, which are read one parameter at a time.

  Attributes:
    location: printable path or name.
    model: the settings of `ModelConfig` that the weights decide, by name.
    shapes: jgpt's name, such as "blocks/w_up", -> shape in GPT-2: [L, ...] in blocks, and without
      padding.
    read: returns the parameter of a name: a new float32 array of that shape.
    tokenizer: the tokenizer that is stored with the weights; None if there is none.
    run: settings of the run that they are a checkpoint of; None for other weights.
  """

  location: str
  model: dict[str, Any]
  shapes: dict[str, tuple[int, ...]]
  read: Callable[[str], np.ndarray]
  tokenizer: Tokenizer | None = None
  run: Experiment | None = None


# --- To GPT-2 ---


def check_is_gpt2(config: ModelConfig, what: str, needs: dict[str, Any]) -> None:
  """Checks that a model can be written in a format of GPT-2.

  Raises `UserError` with each setting that differs and the value it needs otherwise.

  Args:
    config: the model to write.
    what: names the format in the error.
    needs: setting -> the value that the format needs.
  """
  others = [
    f"{n}={format_value(getattr(config, n))} (it has {format_value(v)})"
    for n, v in _find_unmet(config, needs)
  ]
  if others:
    raise UserError(
      f"{what} cannot hold this model: {', '.join(f'model.{other}' for other in others)}."
    )


def _find_unmet(config: ModelConfig, needs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
  for name, value in needs.items():
    got = getattr(config, name)
    # A norm without biases is written with biases of zero.
    if got != value and not (name == "norm" and got == "layer_no_bias"):
      yield name, value


def to_gpt2(params: dict, config: ModelConfig) -> dict[str, np.ndarray]:
  """Converts parameters to GPT-2's tensors by jgpt's names, in the order of `GPT2_NAMES`.

  Args:
    params: as `init_params` returns them (blocks stacked), or their gradients.
    config: the model of the parameters.

  Returns:
    float32 arrays of `gpt2_shapes`, with matrices as (in, out) and without rows of padding. Biases
    that the model lacks are zeros. The others are views if the parameters are NumPy arrays.
  """
  there = flatten(params, config)
  shapes = gpt2_shapes(config)
  return {
    name: there[name] if name in there else np.zeros(shape, np.float32)
    for name, shape in shapes.items()
  }


def flatten(params: dict, config: ModelConfig) -> dict[str, np.ndarray]:
  """Returns a model's parameters by name, in the shapes of `flat_shapes`, without padding."""
  tensors = {}
  for name, shape in flat_shapes(config).items():
    section, _, inner = name.rpartition("/")
    array = np.asarray((params[section] if section else params)[inner])
    tensors[name] = (array if section else array[: shape[0]]).reshape(shape)
  return tensors


def flat_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a model's parameters by name, with the heads concatenated.

  The shapes in blocks are [L, ...]. Rows of padding are not counted.
  """
  return {
    name: (num_layers, *_flat_shape(param))
    if "/" in name
    else (param.shape[0] - param.padding, *param.shape[1:])
    for name, param, num_layers in walk(config)
  }


def gpt2_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of GPT-2's tensors by jgpt's names, in the order of `GPT2_NAMES`.

  They are those of `flat_shapes`, with all biases.
  """
  shapes = flat_shapes(dataclasses.replace(config, norm="layer", biases="all"))
  return {name: shapes[name] for name, _ in GPT2_NAMES if name in shapes}


def make_gpt2_config(**sizes: Any) -> ModelConfig:
  """Makes the settings of the model that a file of GPT-2's weights describes.

  Args:
    **sizes: settings of `ModelConfig`; those that are missing are GPT-2's.
  """
  own = GPT2_SETTINGS | {
    "activation": "gelu_tanh",
    "tied_head": True,
    "num_heads": 1,
    "biases": "all",
  }
  return ModelConfig(**own | sizes, init_std=0.02, scale_residual_init=True)


def find_shapes(location: Path, sizes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
  """Returns the `gpt2_shapes` of the sizes in a file.

  Raises `UserError` that names the file if the sizes are invalid.

  Args:
    location: the file.
    sizes: as for `make_gpt2_config`.
  """
  try:
    return gpt2_shapes(make_gpt2_config(**sizes))
  except UserError as error:
    raise UserError(
      f"{location} has sizes that no model has: {str(error).partition(' Try ')[0]}"
    ) from None


def _flat_shape(param: Param) -> tuple[int, ...]:
  """Returns the shape of a parameter with its heads concatenated: that of a matrix or a bias."""
  if "heads" not in param.axes:
    return param.shape
  if "embed" not in param.axes:
    return (math.prod(param.shape),)
  width = param.axes.index("embed")
  before, after = math.prod(param.shape[:width]), math.prod(param.shape[width + 1 :])
  return (before, param.shape[width]) if width else (param.shape[width], after)


# --- From weights ---


def check_weights_settings(
  weights: Weights, config: ModelConfig, names: Sequence[str] | None = None
) -> None:
  """Checks that weights are those of a model with these settings.

  Raises `UserError` with each setting that differs, and how to set it, otherwise. A model may have
  fewer positions than the weights, whose first ones are taken. It may lack biases of the weights if
  they are zero, which `build_params` checks.

  Args:
    weights: from a file or folder.
    config: the model; `vocab_size` may be None, which means the tokenizer's.
    names: settings to compare; None compares all that the weights decide.
  """
  differing = {}
  for name, value in weights.model.items():
    got = getattr(config, name)
    fewer = name == "max_seq_len" and got < value
    if got in (value, None) or fewer or has_fewer_biases(name, got, value):
      continue
    if names is None or name in names:
      differing[name] = value, got
  if not differing:
    return
  said = ", ".join(
    f"model.{n}={format_value(a)} there and {format_value(b)} here"
    for n, (a, b) in differing.items()
  )
  changes = [f"model.{name}={format_value(value)}" for name, (value, _) in differing.items()]
  for size, sizes in GPT2_SIZES.items():
    # Weights may leave a size open: the number of heads is not in a model.safetensors.
    is_size = all(weights.model.get(name, value) == value for name, value in sizes.items())
    # Sizes that were given one by one would go before the name of all.
    is_named = names is None or sizes.keys() <= set(names)
    if is_size and is_named and differing.keys() & sizes.keys():
      others = [f"model.{n}={format_value(differing[n][0])}" for n in differing.keys() - sizes]
      changes = [f"model.size={size}", *others]
  tries = " ".join(f"--set {change}" for change in changes)
  raise UserError(f"{weights.location} holds another model: {said}. Try {tries}")


def has_fewer_biases(name: str, got: Any, value: Any) -> bool:
  """Returns whether a setting of a model gives it biases of the weights' setting, but not all."""
  if name == "norm":
    return (got, value) == ("layer_no_bias", "layer")
  return name == "biases" and BIASES.index(got) < BIASES.index(value)


def is_bias(name: str) -> bool:
  """Returns whether a parameter is a bias, of a layer or of a norm."""
  return "bias" in name or "/b_" in name


def build_params(weights: Weights, config: ModelConfig) -> dict:
  """Reads weights as a model's parameters.

  Args:
    weights: passed by `check_weights_settings` for this model.
    config: `vocab_size` resolved.

  Returns:
    A pytree shaped like `param_table(config)`, float32 (NumPy arrays), blocks stacked; rows of
    padding are zero.

  Raises:
    UserError: if a parameter is missing, has another shape, or has values that are not finite; or
      if the weights have a parameter that the model lacks, unless it is a bias of zeros.
  """
  wanted = {name: (param, num) for name, param, num in walk(config)}
  for name in weights.shapes.keys() - wanted.keys():
    if not is_bias(name):
      raise UserError(f"{weights.location} has {name}, which this model lacks.")
    if np.any(weights.read(name)):
      raise UserError(
        f"{weights.location} has {name}, a bias that is not zero, and this model has none. Try "
        + ("--set model.norm=layer" if "norm" in name else "--set model.biases=all")
      )
  tree: dict = {"blocks": {}}
  for name, (param, num) in wanted.items():
    array = _read_param(weights, name, param, num)
    section, _, inner = name.rpartition("/")
    (tree[section] if section else tree)[inner] = array
  return {name: tree[name] for name in param_table(config)}


def _read_param(weights: Weights, name: str, param: Param, num_layers: int) -> np.ndarray:
  """Reads one parameter in jgpt's shape, and checks its shape and values."""
  if name.startswith("blocks/"):
    full, need = (num_layers, *param.shape), (num_layers, *_flat_shape(param))
  else:
    full, need = param.shape, (param.shape[0] - param.padding, *param.shape[1:])
  there = weights.shapes.get(name, ())
  fewer = name == "pos_embed" and there[1:] == need[1:] and there[0] > need[0]
  if there != need and not fewer:
    raise UserError(
      f"{weights.location}: {name} must be {list(need)} for this model, and is "
      f"{list(there) or 'missing'}."
    )
  array = weights.read(name)[: need[0]]
  with np.errstate(invalid="ignore"):  # inf - inf is NaN, as it should be
    finite = np.isfinite(np.sum(array, dtype=np.float64))
  if not finite:
    where = np.unravel_index(np.argmin(np.isfinite(array)), array.shape)
    raise UserError(
      f"{weights.location}: {name}{[int(i) for i in where]} is {array[where]}: the weights are "
      "damaged."
    )
  if param.padding:
    array = np.pad(array, [(0, param.padding), (0, 0)])
  return array.reshape(full)


def digest_params(params: dict) -> str:
  """Computes the SHA-256, in hexadecimal, of the names, dtypes, shapes and values of parameters.

  Args:
    params: NumPy arrays, blocks stacked.
  """
  digest = hashlib.sha256()
  for name, value in sorted(params.items()):
    for inner, array in sorted(value.items()) if name == "blocks" else [("", value)]:
      digest.update(f"{name}/{inner}{array.dtype}{array.shape}".encode())
      digest.update(np.ascontiguousarray(array))
  return digest.hexdigest()
