"""GPT-2 as Hugging Face's Transformers keeps it: a folder with model.safetensors, config.json and tokenizer files.

Responsible for writing such a folder from a model, and for reading one, or its model.safetensors alone. Needs the package
`safetensors` and neither `transformers` nor `torch`. Not responsible for which parameter is which (`interop.py`) or for the
tokenizer's files (`tokenizer_files.py`).
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
from jgpt.weights.gpt2 import GPT2, GPT2_NAMES, Weights, check_is_gpt2, find_shapes, to_gpt2

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
READABLE = {"F64", "F32", "F16", "BF16"}
HF_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu_erf": "gelu", "relu": "relu"}
_READ_ACTIVATIONS = {name: ours for ours, name in HF_ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
_PREFIX = "transformer."  # that of a model with a head; the weights that OpenAI released come without
_MASKS = re.compile(r"h\.[0-9]+\.attn\.(masked_)?bias")  # causal masks, which older files hold beside the weights
_PART = re.compile(r"[\w-][\w.-]{0,200}\.safetensors", re.ASCII)  # a file's name, without a folder
_NO_PICKLE = "jgpt reads no pickles, which can run code. Transformers' model.save_pretrained(folder) writes safetensors"
_WEIGHTS_ONLY = "To read the weights only, copy model.safetensors into a folder of its own, and name that file"
# What a config.json must say, or not mention: other values are other networks.
_FIXED = {
  "layer_norm_epsilon": NORM_EPS,
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
  "add_cross_attention": False,
}


# --- Writing ---


def write_folder(folder: Path, params: dict, config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> None:
  """Writes a folder that `GPT2LMHeadModel.from_pretrained` and `AutoTokenizer.from_pretrained` open.

  Args:
    folder: exists, and is empty.
    params: as `init_params` returns them (blocks stacked).
    config: sizes and switches.
    tokenizer: of the run.
    dtype: "float32" or "bfloat16", rounded to nearest, ties to even.

  Raises:
    UserError: naming the settings that Transformers' GPT-2 has not, or if `safetensors` is not installed.
  """
  check_hugging_face_model(config)
  files = {
    "config.json": config_json(config, tokenizer, dtype),
    "generation_config.json": _special_ids(tokenizer),
    **hugging_face_files(tokenizer, config.max_seq_len),
  }
  for name, content in files.items():
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / name).write_text(text, encoding="utf-8", newline="\n")
  write_safetensors(folder / "model.safetensors", to_tensors(params, config), dtype)
  shutil.copymode(folder / "config.json", folder / "model.safetensors")  # `safetensors` lets nobody else read it


def check_hugging_face_model(config: ModelConfig) -> None:
  """Raises `UserError` naming the settings that Transformers' GPT-2 has not."""
  check_is_gpt2(config, "Hugging Face's GPT-2", GPT2)


def to_tensors(params: dict, config: ModelConfig) -> dict[str, np.ndarray]:
  """Names the tensors of a model as Transformers does; each layer's are its own. A tied head is not written."""
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
  """Writes tensors and reads them again to compare: `safetensors` writes the memory of an array whatever its strides.

  Raises:
    UserError: if `safetensors` is not installed.
    OSError: if what was read is not what was written.
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
  """The config.json of a model."""
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
  """The ids that begin and end a text, None where there is none: else Transformers takes GPT-2's 50256."""
  mark = getattr(tokenizer, "eot_id", None)
  if mark is None:
    mark = tokenizer.stop_id
  return {"bos_token_id": mark, "eos_token_id": mark}


# --- Reading ---


def open_hugging_face(path: Path) -> Weights:
  """Opens a folder, or a model.safetensors by itself. Reads headers, and a tensor only where a head stands beside `wte`.

  A file by itself says nothing about heads, activation and tokenizer: those are the experiment's.

  Raises:
    UserError: for what is damaged, is no GPT-2, or has tensors that a GPT-2 has not.
  """
  is_folder = path.is_dir()
  tensors = _read_headers(path, _list_parts(path) if is_folder else [path])
  sizes = _read_sizes(path, tensors)
  told = _read_config(path / "config.json") if is_folder else {}
  for name, value in sizes.items():
    if told.get(name, value) != value:
      raise UserError(f"{path / 'config.json'} says {name}={show(told[name])}, and the tensors have {value}.")
  tied = _is_tied(path, tensors, told)
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
        raise UserError(f"{path}: the tensor {there} must be {list(need)} by the model's other sizes, and is {got}.")
  if extra := sorted(tensors.keys() - known):
    raise UserError(f"{path} has tensors that a GPT-2 has not: {_shown(*extra[:5])}.")

  def read(name: str) -> np.ndarray:
    there = hugging_face[name]
    if "/" not in name:
      return _read_tensor(tensors[there])
    stacked = np.empty(shapes[name], np.float32)
    for i in range(len(stacked)):
      stacked[i] = _read_tensor(tensors[there.format(i)])
    return stacked

  tokenizer = read_folder_tokenizer(path) if is_folder else None
  return Weights(str(path), told | sizes | GPT2, shapes, read, tokenizer)


def read_folder_tokenizer(folder: Path) -> Tokenizer | None:
  """The tokenizer of a folder's tokenizer.json, or of GPT-2's two files; None where there is neither.

  Raises:
    UserError: for another kind of tokenizer.
  """
  path, older = folder / "tokenizer.json", (folder / "vocab.json", folder / "merges.txt")
  if not path.exists() and not path.is_symlink():  # a link to nothing is damage
    return _read_older_tokenizer(*older) if all(file.is_file() for file in older) else None
  try:
    return read_hugging_face_tokenizer(read_json(path))
  except UserError as error:
    where = "" if str(error).startswith(str(path)) else f"{path}: "
    raise UserError(f"{where}{error} {_WEIGHTS_ONLY}") from None


def _read_older_tokenizer(vocab: Path, merges: Path) -> Tokenizer:
  """The tokenizer of GPT-2's two files."""
  try:
    return make_gpt2_tokenizer(read_small(vocab), read_small(merges))
  except UserError as error:
    raise UserError(f"{vocab} and {merges.name}: {error} {_WEIGHTS_ONLY}") from None


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """Where a tensor stands: its file, its name there, its shape."""

  path: Path
  name: str
  shape: tuple[int, ...]


def _list_parts(folder: Path) -> list[Path]:
  """The files of a folder's weights: model.safetensors, or those that its index names."""
  if (folder / "model.safetensors").is_file():
    return [folder / "model.safetensors"]
  index = folder / "model.safetensors.index.json"
  if not index.is_file():
    there = _shown(*sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise UserError(f"{folder} has no model.safetensors; it has {there}. {_NO_PICKLE}")
  value = read_json(index)
  names = value.get("weight_map") if isinstance(value, dict) else None
  if not isinstance(names, dict) or not all(isinstance(n, str) and _PART.fullmatch(n) for n in names.values()):
    raise UserError(f'{index} must have a "weight_map" from tensors to the names of files beside it.')
  return [folder / name for name in sorted(set(names.values()))]


def _read_headers(path: Path, files: list[Path]) -> dict[str, _Tensor]:
  """The tensors of all files by their names without prefix, causal masks left out."""
  tensors: dict[str, _Tensor] = {}
  for file in files:
    for name, (dtype, shape) in _read_header(file).items():
      plain = name.removeprefix(_PREFIX)
      if _MASKS.fullmatch(plain):
        continue
      if dtype not in READABLE:
        raise UserError(f"{file}: the tensor {_shown(name)} is {dtype}; weights are {', '.join(sorted(READABLE))}.")
      if plain in tensors:
        raise UserError(f"{path} has the tensor {_shown(plain)} twice.")
      tensors[plain] = _Tensor(file, name, shape)
  return tensors


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
  """The dtype and shape of each tensor. What the header says is checked by `safetensors` against the file's size."""
  safetensors = _import_safetensors()

  def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
      twice = next(name for name in names if names.count(name) > 1)
      raise UserError(f"{path}: its header has {_shown(twice)} twice.")
    return dict(pairs)

  try:
    with safetensors.safe_open(path, framework="np"):
      pass
    with open(path, "rb") as file:
      (size,) = struct.unpack("<Q", file.read(8))
      header = json.loads(file.read(size), object_pairs_hook=refuse_twice)
  except (safetensors.SafetensorError, OSError, RecursionError, MemoryError) as error:
    raise UserError(_explain(path, error)) from None
  return {name: (v["dtype"], tuple(v["shape"])) for name, v in header.items() if name != "__metadata__"}


def _explain(path: Path, error: Exception) -> str:
  """Why a file is no safetensors file: what it is instead, or what the library says."""
  if not path.is_file():
    return f"{path} does not exist."
  check_no_pickle(path)
  said = "".join(c if c.isprintable() else "?" for c in str(error)[:200])  # it quotes the file
  return f"{path} is no safetensors file: {said}."


def check_no_pickle(path: Path) -> None:
  """Raises `UserError` where a file begins like a pickle, or like what holds one."""
  with open(path, "rb") as file:
    begin = file.read(8)
  kinds = {b"PK\x03\x04": "a zip archive, as torch.save writes", b"\x80": "a pickle", b"\x93NUMPY": "a NumPy array"}
  for magic, what in kinds.items():
    if begin.startswith(magic):
      raise UserError(f"{path} is {what}. {_NO_PICKLE}")


def _read_sizes(path: Path, tensors: dict[str, _Tensor]) -> dict[str, int]:
  """The model's sizes by the shapes of its tensors."""
  layers = {int(match[1]) for name in tensors if (match := re.match(r"h\.([0-9]{1,6})\.", name))}
  if layers != set(range(len(layers))) or not layers:
    there = _shown(*sorted(tensors)[:5]) or "none"
    raise UserError(f"{path} is no GPT-2: its tensors are not those of layers h.0, h.1, ... but {there}.")
  matrices = {}
  for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"):
    shape = tensors[name].shape if name in tensors else ()
    if len(shape) != 2 or 0 in shape:
      raise UserError(f"{path} is no GPT-2: the tensor {name} must be a matrix, and is {list(shape) or 'missing'}.")
    matrices[name] = shape
  return {
    "vocab_size": matrices["wte.weight"][0],
    "max_seq_len": matrices["wpe.weight"][0],
    "num_layers": len(layers),
    "d_model": matrices["wte.weight"][1],
    "d_ff": matrices["h.0.mlp.c_fc.weight"][1],
  }


def _is_tied(path: Path, tensors: dict[str, _Tensor], told: dict[str, Any]) -> bool:
  """Whether the head is the token embedding: config.json says so, or the tensors do."""
  head = tensors.get("lm_head.weight")
  if head is None:
    if not told.get("tied_head", True):
      raise UserError(f"{path} has no tensor lm_head.weight, and its config.json says tie_word_embeddings=false.")
    return True
  if not told.get("tied_head", True):
    return False
  wte = tensors["wte.weight"]
  same = head.shape == wte.shape and np.array_equal(_read_tensor(head), _read_tensor(wte))
  if told and not same:
    raise UserError(f"{path}: lm_head.weight is not wte.weight, and config.json does not say tie_word_embeddings=false.")
  return same


def _read_config(path: Path) -> dict[str, Any]:
  """What config.json says about the model, as settings of `ModelConfig`."""
  value = read_json(path)
  if not isinstance(value, dict) or value.get("model_type") != "gpt2":
    got = value.get("model_type") if isinstance(value, dict) else None
    raise UserError(f"{path} must have model_type gpt2, and has {_shown(got)}: jgpt reads GPT-2's weights.")
  for name, need in _FIXED.items():
    if value.get(name, need) != need:
      raise UserError(f"{path} has {name}={_shown(value[name])}; jgpt's GPT-2 has {need!r}.")
  sizes = {"vocab_size": "vocab_size", "max_seq_len": "n_positions", "num_layers": "n_layer", "num_heads": "n_head"}
  sizes |= {"d_model": "n_embd"}
  model = {}
  for ours, name in sizes.items():
    if type(value.get(name)) is not int or value[name] < 1:
      raise UserError(f"{path} must have {name}, a whole number, and has {_shown(value.get(name))}.")
    model[ours] = value[name]
  if model["d_model"] % model["num_heads"]:
    raise UserError(f"{path}: n_head={show(model['num_heads'])} does not divide n_embd={show(model['d_model'])}.")
  activation = value.get("activation_function", "gelu_new")
  if not isinstance(activation, str) or activation not in _READ_ACTIVATIONS:
    raise UserError(f"{path} has activation_function={_shown(activation)}; jgpt has {', '.join(_READ_ACTIVATIONS)}.")
  model["activation"] = _READ_ACTIVATIONS[activation]
  tied = value.get("tie_word_embeddings", True)
  if type(tied) is not bool:
    raise UserError(f"{path}: tie_word_embeddings={_shown(tied)} must be true or false.")
  return model | {"tied_head": tied}


def _read_tensor(tensor: _Tensor) -> np.ndarray:
  """A tensor as float32 in memory of its own. The file is closed again: the pages that were read do not stay."""
  safetensors = _import_safetensors()
  try:
    # What float32 does not have becomes infinity or NaN, which are refused with their place.
    with safetensors.safe_open(tensor.path, framework="np") as file, np.errstate(over="ignore", invalid="ignore"):
      return np.array(file.get_tensor(tensor.name), np.float32)
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(_explain(tensor.path, error)) from None


def _shown(*values: Any) -> str:
  """Values out of somebody's file for an error: each printable, on one line, and cut."""
  return ", ".join(map(show, values))


def _import_safetensors() -> types.ModuleType:
  try:
    import safetensors
  except ImportError:
    raise UserError(
      "Hugging Face's weights need the package `safetensors`. Try pip install safetensors, or install jgpt with its extra: "
      "pip install 'jgpt[hf]'"
    ) from None
  return safetensors
