"""Reads and writes GPT-2 as Hugging Face's Transformers stores it.

That is a folder with model.safetensors, config.json and tokenizer files; a model.safetensors alone
can be read too. Needs the package `safetensors`, but neither `transformers` nor `torch`. The names
of the tensors are in `gpt2.py`, and the tokenizer files in `text/tokenizer_files.py`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import struct
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jgpt.config import ModelConfig
from jgpt.errors import UserError, show
from jgpt.layers import NORM_EPS
from jgpt.system.files import read_json, read_small
from jgpt.text.bpe import make_gpt2_tokenizer
from jgpt.text.tokenizer import Tokenizer
from jgpt.text.tokenizer_files import hugging_face_files, read_hugging_face_tokenizer
from jgpt.weights.gpt2 import (
  GPT2_NAMES,
  GPT2_SETTINGS,
  Weights,
  check_is_gpt2,
  find_shapes,
  to_gpt2,
)

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
READABLE = {"F64", "F32", "F16", "BF16"}
HF_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu_erf": "gelu", "relu": "relu"}
_READ_ACTIVATIONS = {name: ours for ours, name in HF_ACTIVATIONS.items()} | {
  "gelu_pytorch_tanh": "gelu_tanh"
}
# Of the names of GPT2LMHeadModel. The weights that OpenAI released have names without it.
_PREFIX = "transformer."
# Causal masks, which older files store beside the weights.
_MASKS = re.compile(r"h\.[0-9]+\.attn\.(masked_)?bias")
# The name of a file without a folder.
_PART_NAME = re.compile(r"[\w-][\w.-]{0,200}\.safetensors", re.ASCII)
_NO_PICKLE = (
  "jgpt reads no pickles, which can run code. Transformers' model.save_pretrained(folder) writes "
  "safetensors"
)
_WEIGHTS_ONLY = (
  "To read the weights only, copy model.safetensors into a folder of its own, and name that file"
)
# Entries of config.json that must have these values or be missing: others give another network.
_FIXED = {
  "layer_norm_epsilon": NORM_EPS,
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
  "add_cross_attention": False,
}


# --- Writing ---


def write_folder(
  folder: Path, params: dict, config: ModelConfig, tokenizer: Tokenizer, dtype: str
) -> None:
  """Writes a folder for `GPT2LMHeadModel.from_pretrained` and `AutoTokenizer.from_pretrained`.

  Args:
    folder: an existing, empty folder.
    params: as `init_params` returns them (blocks stacked).
    config: the model of the parameters.
    tokenizer: the tokenizer that the model was trained with.
    dtype: "float32", or "bfloat16", which rounds to nearest, ties to even.

  Raises:
    UserError: with the settings that Transformers' GPT-2 does not have; or if `safetensors` is not
      installed.
    OSError: if a file cannot be written.
  """
  check_hugging_face_model(config)
  files = {
    "config.json": config_json(config, tokenizer, dtype),
    "generation_config.json": _special_ids(tokenizer),
    **hugging_face_files(tokenizer, config.max_seq_len),
  }
  for name, content in files.items():
    text = (
      content
      if isinstance(content, str)
      else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    )
    (folder / name).write_text(text, encoding="utf-8", newline="\n")
  write_safetensors(folder / "model.safetensors", to_tensors(params, config), dtype)
  # `safetensors` makes a file that only its owner can read.
  shutil.copymode(folder / "config.json", folder / "model.safetensors")


def check_hugging_face_model(config: ModelConfig) -> None:
  """Checks that Transformers' GPT-2 can hold a model, and raises `UserError` otherwise."""
  check_is_gpt2(config, "Hugging Face's GPT-2", GPT2_SETTINGS)


def to_tensors(params: dict, config: ModelConfig) -> dict[str, np.ndarray]:
  """Converts parameters to tensors with Transformers' names, one for each layer.

  A tied head has no tensor of its own.
  """
  hugging_face = dict(GPT2_NAMES)
  tensors = {}
  for name, array in to_gpt2(params, config).items():
    there = hugging_face[name] if name == "unembed" else _PREFIX + hugging_face[name]
    if name.startswith("blocks/"):
      tensors |= {there.format(i): layer for i, layer in enumerate(array)}
    else:
      tensors[there] = array
  return tensors


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
  """Writes a safetensors file, then reads it and compares.

  The comparison is necessary because `safetensors` ignores the strides of an array.

  Args:
    path: replaced if it exists.
    tensors: floating point.
    dtype: a key of `DTYPES`.

  Raises:
    UserError: if `safetensors` is not installed.
    OSError: if the file cannot be written, or differs from the tensors.
  """
  safetensors = _import_safetensors()
  from safetensors.numpy import save_file

  written = {name: np.ascontiguousarray(array, DTYPES[dtype]) for name, array in tensors.items()}
  save_file(written, path, metadata={"format": "pt"})
  with safetensors.safe_open(path, framework="np") as file:
    for name, array in written.items():
      if not np.array_equal(_bits(file.get_tensor(name)), _bits(array)):
        raise OSError(f"{path}: {name} does not read back as it was written")


def _bits(array: np.ndarray) -> np.ndarray:
  return array.view(f"u{array.itemsize}")


def config_json(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
  """Returns the content of a model's config.json."""
  places = config.dropout_places

  def dropout(*needed: str) -> float:
    return config.dropout if set(needed) <= set(places) else 0.0

  return {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": config.vocab_size,
    "n_positions": config.max_seq_len,
    "n_embd": config.d_model,
    "n_layer": config.num_layers,
    "n_head": config.num_heads,
    "n_inner": config.d_ff,
    "activation_function": HF_ACTIVATIONS[config.activation],
    "layer_norm_epsilon": NORM_EPS,
    "initializer_range": config.init_std,
    "tie_word_embeddings": config.tied_head,
    "embd_pdrop": dropout("embedding"),
    "attn_pdrop": dropout("attention"),
    "resid_pdrop": dropout("attention_out", "mlp_out"),
    "torch_dtype": dtype,
    **_special_ids(tokenizer),
  }


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
  """Returns the ids that begin and end a text, as entries of config.json.

  An entry of None is written too: Transformers takes GPT-2's 50256 for a missing one.
  """
  mark = getattr(tokenizer, "eot_id", None)
  if mark is None:
    mark = tokenizer.stop_id
  return {"bos_token_id": mark, "eos_token_id": mark}


# --- Reading ---


def open_hugging_face(path: Path) -> Weights:
  """Opens a folder, or a model.safetensors alone, and reads headers; the values are read later.

  The number of heads, the activation and the tokenizer are not in a model.safetensors: without the
  folder, those of the experiment are used. The tensors lm_head.weight and wte.weight are compared
  if both are there.

  Raises:
    UserError: if a file is damaged, is not a GPT-2, or has tensors that GPT-2 does not have.
  """
  is_folder = path.is_dir()
  tensors = _read_headers(path, _list_parts(path) if is_folder else [path])
  sizes = _read_sizes(path, tensors)
  stated = _read_config(path / "config.json") if is_folder else {}
  for name, value in sizes.items():
    if stated.get(name, value) != value:
      raise UserError(
        f"{path / 'config.json'} says {name}={show(stated[name])}, and the tensors have {value}."
      )
  tied = _is_tied(path, tensors, stated)
  sizes["tied_head"] = tied
  shapes = find_shapes(path, sizes)
  hugging_face = dict(GPT2_NAMES)
  known = {"lm_head.weight"} if tied else set()
  for name, shape in shapes.items():
    layers = sizes["num_layers"] if "/" in name else 1
    need = shape[1:] if "/" in name else shape
    for there in (hugging_face[name].format(i) for i in range(layers)):
      known.add(there)
      if there not in tensors or tensors[there].shape != need:
        got = list(tensors[there].shape) if there in tensors else "missing"
        raise UserError(
          f"{path}: the tensor {there} must be {list(need)} by the model's other sizes, and is "
          f"{got}."
        )
  if extra := sorted(tensors.keys() - known):
    raise UserError(f"{path} has tensors that GPT-2 does not have: {_show_all(*extra[:5])}.")

  def read(name: str) -> np.ndarray:
    there = hugging_face[name]
    if "/" not in name:
      return _read_tensor(tensors[there])
    stacked = np.empty(shapes[name], np.float32)
    for i in range(len(stacked)):
      stacked[i] = _read_tensor(tensors[there.format(i)])
    return stacked

  tokenizer = read_folder_tokenizer(path) if is_folder else None
  return Weights(str(path), stated | sizes | GPT2_SETTINGS, shapes, read, tokenizer)


def read_folder_tokenizer(folder: Path) -> Tokenizer | None:
  """Reads the tokenizer of a folder, from tokenizer.json or from vocab.json and merges.txt.

  Returns:
    The tokenizer; None if the folder has none of these files.

  Raises:
    UserError: if the files are damaged or another kind of tokenizer.
  """
  path, older = folder / "tokenizer.json", (folder / "vocab.json", folder / "merges.txt")
  if not path.exists() and not path.is_symlink():  # a dangling link is an error below
    return _read_older_tokenizer(*older) if all(file.is_file() for file in older) else None
  try:
    return read_hugging_face_tokenizer(read_json(path))
  except UserError as error:
    where = "" if str(error).startswith(str(path)) else f"{path}: "
    raise UserError(f"{where}{error} {_WEIGHTS_ONLY}") from None


def _read_older_tokenizer(vocab: Path, merges: Path) -> Tokenizer:
  """Reads the tokenizer of GPT-2's vocab.json and merges.txt."""
  try:
    return make_gpt2_tokenizer(read_small(vocab), read_small(merges))
  except UserError as error:
    raise UserError(f"{vocab} and {merges.name}: {error} {_WEIGHTS_ONLY}") from None


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """A tensor in a file: the file, the tensor's name there, and its shape."""

  path: Path
  name: str
  shape: tuple[int, ...]


def _list_parts(folder: Path) -> list[Path]:
  """Lists the files of a folder's weights: model.safetensors, or those that its index names."""
  if (folder / "model.safetensors").is_file():
    return [folder / "model.safetensors"]
  index = folder / "model.safetensors.index.json"
  if not index.is_file():
    there = _show_all(*sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise UserError(f"{folder} has no model.safetensors; it has {there}. {_NO_PICKLE}")
  value = read_json(index)
  names = value.get("weight_map") if isinstance(value, dict) else None
  if not isinstance(names, dict) or not all(
    isinstance(n, str) and _PART_NAME.fullmatch(n) for n in names.values()
  ):
    raise UserError(
      f'{index} must have a "weight_map" from tensors to the names of files beside it.'
    )
  return [folder / name for name in sorted(set(names.values()))]


def _read_headers(path: Path, files: list[Path]) -> dict[str, _Tensor]:
  """Reads the headers of all files: their tensors by name without prefix, without causal masks."""
  tensors: dict[str, _Tensor] = {}
  for file in files:
    for name, (dtype, shape) in _read_header(file).items():
      plain = name.removeprefix(_PREFIX)
      if _MASKS.fullmatch(plain):
        continue
      if dtype not in READABLE:
        raise UserError(
          f"{file}: the tensor {_show_all(name)} is {dtype}; weights are "
          f"{', '.join(sorted(READABLE))}."
        )
      if plain in tensors:
        raise UserError(f"{path} has the tensor {_show_all(plain)} twice.")
      tensors[plain] = _Tensor(file, name, shape)
  return tensors


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
  """Reads the dtype and shape of each tensor of a file.

  `safetensors` opens the file first, which checks the header against the size of the file.
  """
  safetensors = _import_safetensors()

  def check_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
      twice = next(name for name in names if names.count(name) > 1)
      raise UserError(f"{path}: its header has {_show_all(twice)} twice.")
    return dict(pairs)

  try:
    with safetensors.safe_open(path, framework="np"):
      pass
    with open(path, "rb") as file:
      (size,) = struct.unpack("<Q", file.read(8))
      header = json.loads(file.read(size), object_pairs_hook=check_unique)
  except (safetensors.SafetensorError, OSError, RecursionError, MemoryError) as error:
    raise UserError(_describe_failure(path, error)) from None
  return {
    name: (v["dtype"], tuple(v["shape"])) for name, v in header.items() if name != "__metadata__"
  }


def _describe_failure(path: Path, error: Exception) -> str:
  """Returns an error text for a file that `safetensors` cannot read.

  Raises `UserError` if the file is a pickle or the like.
  """
  if not path.is_file():
    return f"{path} does not exist."
  check_no_pickle(path)
  said = "".join(c if c.isprintable() else "?" for c in str(error)[:200])  # it may quote the file
  return f"{path} is not a safetensors file: {said}."


def check_no_pickle(path: Path) -> None:
  """Checks that a file does not begin like a pickle or an archive of pickles.

  Raises `UserError` with the way to convert it otherwise.
  """
  with open(path, "rb") as file:
    begin = file.read(8)
  kinds = {
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x80": "a pickle",
    b"\x93NUMPY": "a NumPy array",
  }
  for magic, what in kinds.items():
    if begin.startswith(magic):
      raise UserError(f"{path} is {what}. {_NO_PICKLE}")


def _read_sizes(path: Path, tensors: dict[str, _Tensor]) -> dict[str, int]:
  """Derives the model's sizes from the shapes of its tensors."""
  layers = {int(match[1]) for name in tensors if (match := re.match(r"h\.([0-9]{1,6})\.", name))}
  if layers != set(range(len(layers))) or not layers:
    there = _show_all(*sorted(tensors)[:5]) or "none"
    raise UserError(
      f"{path} is not a GPT-2: its tensors are not those of layers h.0, h.1, ... but {there}."
    )
  matrices = {}
  for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"):
    shape = tensors[name].shape if name in tensors else ()
    if len(shape) != 2 or 0 in shape:
      raise UserError(
        f"{path} is not a GPT-2: the tensor {name} must be a matrix, and is "
        f"{list(shape) or 'missing'}."
      )
    matrices[name] = shape
  return {
    "vocab_size": matrices["wte.weight"][0],
    "max_seq_len": matrices["wpe.weight"][0],
    "num_layers": len(layers),
    "d_model": matrices["wte.weight"][1],
    "d_ff": matrices["h.0.mlp.c_fc.weight"][1],
  }


def _is_tied(path: Path, tensors: dict[str, _Tensor], stated: dict[str, Any]) -> bool:
  """Returns whether the head is the token embedding, by config.json or by the tensors' values."""
  head = tensors.get("lm_head.weight")
  if head is None:
    if not stated.get("tied_head", True):
      raise UserError(
        f"{path} has no tensor lm_head.weight, and its config.json says tie_word_embeddings=false."
      )
    return True
  if not stated.get("tied_head", True):
    return False
  wte = tensors["wte.weight"]
  same = head.shape == wte.shape and np.array_equal(_read_tensor(head), _read_tensor(wte))
  if stated and not same:
    raise UserError(
      f"{path}: lm_head.weight is not wte.weight, and config.json does not say "
      "tie_word_embeddings=false."
    )
  return same


def _read_config(path: Path) -> dict[str, Any]:
  """Reads the settings of `ModelConfig` from config.json."""
  value = read_json(path)
  if not isinstance(value, dict) or value.get("model_type") != "gpt2":
    got = value.get("model_type") if isinstance(value, dict) else None
    raise UserError(
      f"{path} must have model_type gpt2, and has {_show_all(got)}: jgpt reads GPT-2's weights."
    )
  for name, need in _FIXED.items():
    if value.get(name, need) != need:
      raise UserError(f"{path} has {name}={_show_all(value[name])}; jgpt's GPT-2 has {need!r}.")
  sizes = {
    "vocab_size": "vocab_size",
    "max_seq_len": "n_positions",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "d_model": "n_embd",
  }
  model = {}
  for ours, name in sizes.items():
    if type(value.get(name)) is not int or value[name] < 1:
      raise UserError(
        f"{path} must have {name}, a whole number, and has {_show_all(value.get(name))}."
      )
    model[ours] = value[name]
  if model["d_model"] % model["num_heads"]:
    raise UserError(
      f"{path}: n_head={show(model['num_heads'])} does not divide n_embd={show(model['d_model'])}."
    )
  activation = value.get("activation_function", "gelu_new")
  if not isinstance(activation, str) or activation not in _READ_ACTIVATIONS:
    raise UserError(
      f"{path} has activation_function={_show_all(activation)}; jgpt has "
      f"{', '.join(_READ_ACTIVATIONS)}."
    )
  model["activation"] = _READ_ACTIVATIONS[activation]
  tied = value.get("tie_word_embeddings", True)
  if type(tied) is not bool:
    raise UserError(f"{path}: tie_word_embeddings={_show_all(tied)} must be true or false.")
  return model | {"tied_head": tied}


def _read_tensor(tensor: _Tensor) -> np.ndarray:
  """Reads a tensor as a new float32 array.

  Opens and closes the file, so that no pages stay in memory.
  """
  safetensors = _import_safetensors()
  try:
    # A float64 beyond float32 becomes infinite; `build_params` reports it with its position.
    with (
      safetensors.safe_open(tensor.path, framework="np") as file,
      np.errstate(over="ignore", invalid="ignore"),
    ):
      return np.array(file.get_tensor(tensor.name), np.float32)
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(_describe_failure(tensor.path, error)) from None


def _show_all(*values: Any) -> str:
  """Formats values from an untrusted file for an error: printable, on one line, each shortened."""
  return ", ".join(map(show, values))


def _import_safetensors() -> types.ModuleType:
  try:
    import safetensors
  except ImportError:
    raise UserError(
      "Hugging Face's weights need the package `safetensors`. Try pip install safetensors, or "
      "install jgpt with its extra hf"
    ) from None
  return safetensors
