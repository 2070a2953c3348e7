"""Reads and writes llm.c's weights, and writes the debug state that llm.c checks its step against.

Each file is a header of 256 int32, then arrays, all little-endian. Weights are float32 (version 3)
or bfloat16 (version 5), with matrices as (out, in) and the vocabulary padded with zeros to a
multiple of 128. The order of the tensors is in `gpt2.py`, llm.c's tokenizer in
`text/tokenizer_files.py`, and its token files in `data/token_files.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from jgpt.config import ModelConfig
from jgpt.errors import UserError
from jgpt.weights.gpt2 import GPT2_SETTINGS, Weights, check_is_gpt2, find_shapes, to_gpt2

WEIGHTS_MAGIC, STATE_MAGIC = 20240326, 20240327
STATE_VERSION = 2
HEADER_INTS = 256
VERSIONS = {"float32": 3, "bfloat16": 5}
_DTYPES = {3: np.dtype("<f4"), 5: np.dtype(ml_dtypes.bfloat16)}
_VOCAB_MULTIPLE = 128
# In the order of the header, where the padded vocabulary follows.
_SIZES = ("max_seq_len", "vocab_size", "num_layers", "num_heads", "d_model")


# --- Writing ---


def check_llmc_model(config: ModelConfig) -> None:
  """Checks that llm.c can hold a model, and raises `UserError` with the settings otherwise."""
  needs = GPT2_SETTINGS | {"activation": "gelu_tanh", "tied_head": True, "d_ff": 4 * config.d_model}
  check_is_gpt2(config, "llm.c", needs)


def write_weights(path: Path, params: dict, config: ModelConfig, dtype: str) -> None:
  """Writes a weights file.

  Args:
    path: replaced if it exists.
    params: as `init_params` returns them (blocks stacked).
    config: the model of the parameters.
    dtype: "float32", or "bfloat16", which rounds to nearest, ties to even.

  Raises:
    UserError: with the settings that llm.c's GPT-2 does not have.
  """
  check_llmc_model(config)
  padded = _padded_size(config.vocab_size)
  with open(path, "wb") as file:
    file.write(
      _header(WEIGHTS_MAGIC, VERSIONS[dtype], *(getattr(config, name) for name in _SIZES), padded)
    )
    _write_tensors(file, params, config, _DTYPES[VERSIONS[dtype]])


def write_state(
  path: Path,
  inputs_BT: np.ndarray,
  targets_BT: np.ndarray,
  logits_BTV: np.ndarray,
  loss: float,
  grads: dict,
  config: ModelConfig,
) -> None:
  """Writes a debug state: a batch, its logits and loss, and the gradient of every parameter.

  Args:
    path: replaced if it exists.
    inputs_BT: int32 token ids [B, T].
    targets_BT: int32 token ids [B, T].
    logits_BTV: float32 [B, T, V], without padding.
    loss: mean over all targets, nats per token.
    grads: shaped like the parameters, blocks stacked.
    config: the model of the parameters.

  Raises:
    UserError: with the settings that llm.c's GPT-2 does not have.
  """
  check_llmc_model(config)
  with open(path, "wb") as file:
    file.write(_header(STATE_MAGIC, STATE_VERSION, *inputs_BT.shape))
    file.write(np.ascontiguousarray(inputs_BT, "<i4"))
    file.write(np.ascontiguousarray(targets_BT, "<i4"))
    file.write(np.ascontiguousarray(logits_BTV, "<f4"))
    file.write(np.array([loss], "<f4"))
    _write_tensors(file, grads, config, np.dtype("<f4"))


def _header(*numbers: int) -> bytes:
  header = np.zeros(HEADER_INTS, "<i4")
  header[: len(numbers)] = numbers
  return header.tobytes()


def _padded_size(vocab_size: int) -> int:
  return math.ceil(vocab_size / _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


def _write_tensors(file: BinaryIO, params: dict, config: ModelConfig, dtype: np.dtype) -> None:
  """Writes all tensors in llm.c's order, which is that of `GPT2_NAMES`."""
  for name, array in to_gpt2(params, config).items():
    missing = _padded_size(config.vocab_size) - config.vocab_size if name == "tok_embed" else 0
    if missing:
      array = np.pad(array, [(0, missing), (0, 0)])
    # Matrices in blocks are transposed. Embeddings are [V, D] in both formats.
    if array.ndim == 3:
      array = array.transpose(0, 2, 1)
    for part in array if array.ndim == 3 else [array]:  # copies one layer at a time
      file.write(np.ascontiguousarray(part, dtype).view(np.uint8))


# --- Reading ---


def open_llmc(path: Path) -> Weights:
  """Opens a weights file and reads its header; the values are read later.

  Raises:
    UserError: if the file cannot be read, or its header or size is wrong.
  """
  header, num_bytes = _read_header(path)
  magic, version, *numbers = (int(i) for i in header[:8])
  if magic != WEIGHTS_MAGIC:
    raise UserError(
      f"{path} is not llm.c's weights: its magic number is {magic}, not {WEIGHTS_MAGIC}."
    )
  if version not in _DTYPES:
    raise UserError(f"{path} has version {version}; jgpt reads 3 (float32) and 5 (bfloat16).")
  sizes, padded = dict(zip(_SIZES, numbers, strict=False)), numbers[-1]
  d_ff = 4 * sizes["d_model"]
  if (
    min(numbers) < 1
    or sizes["d_model"] % sizes["num_heads"]
    or padded < sizes["vocab_size"]
    or d_ff >= 2**31
  ):
    raise UserError(f"{path} has sizes that no model has: {sizes}, padded_vocab_size={padded}.")
  sizes["d_ff"] = d_ff
  shapes = find_shapes(path, sizes)
  stored = {name: _stored_shape(name, shape, padded) for name, shape in shapes.items()}
  dtype = _DTYPES[version]
  need = 4 * HEADER_INTS + dtype.itemsize * sum(map(math.prod, stored.values()))
  if num_bytes != need:
    raise UserError(
      f"{path} has {num_bytes:,} bytes, and its header's sizes need {need:,}: it was cut or is "
      "damaged."
    )
  offsets, offset = {}, 4 * HEADER_INTS
  for name, shape in stored.items():
    offsets[name] = offset
    offset += dtype.itemsize * math.prod(shape)

  def read(name: str) -> np.ndarray:
    """Reads one parameter. Maps the file anew, so that no pages stay in memory."""
    array = np.memmap(path, dtype, "r", offsets[name], stored[name])
    if array.ndim == 3:
      array = array.transpose(0, 2, 1)
    return np.array(array[: shapes[name][0]], np.float32, order="C")

  model = sizes | GPT2_SETTINGS | {"activation": "gelu_tanh", "tied_head": True}
  return Weights(str(path), model, shapes, read)


def _stored_shape(name: str, shape: tuple[int, ...], padded: int) -> tuple[int, ...]:
  """Returns the shape of a tensor in the file: embeddings with padding, matrices as (out, in)."""
  rows = padded if name == "tok_embed" else shape[0]
  return (rows, shape[2], shape[1]) if len(shape) == 3 else (rows, *shape[1:])


def _read_header(path: Path) -> tuple[np.ndarray, int]:
  """Returns the header and the size of the file in bytes."""
  try:
    with open(path, "rb") as file:
      content = file.read(4 * HEADER_INTS)
      num_bytes = file.seek(0, 2)
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror or error}.") from None
  if len(content) < 4 * HEADER_INTS:
    raise UserError(
      f"{path} has {len(content)} bytes, fewer than the {4 * HEADER_INTS} of llm.c's header."
    )
  return np.frombuffer(content, "<i4"), num_bytes
