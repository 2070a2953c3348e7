"""An independent reader and writer of llm.c's binary files: the oracle of the tests of jgpt's own.

Written from the description of the formats alone, with numpy and struct. It shares no code with
jgpt, imports nothing of it, and takes bfloat16 apart by its bits instead of asking ml_dtypes. Each
function here is therefore a second opinion: a file that jgpt writes must be read by this module, a
file that this module writes must be read by jgpt, and `forward` computes the network from a file's
tensors as they lie there, so that a test can show that nothing was transposed, reordered or dropped
on the way.

All four kinds of file are little-endian and begin with 256 int32 (1024 bytes); entries not named
below are zero.

- Weights: 20240326, version (3: float32, 5: bfloat16), max_seq_len, vocab_size, num_layers,
num_heads, d_model,
  padded_vocab_size; then the tensors of `tensor_shapes`, in its order, all in the version's dtype.
- Debug state: 20240327, 2, B, T; then inputs and targets (int32), logits (float32, over the
unpadded vocabulary),
  the loss (one float32), and the gradients of all tensors (float32, in the order and with the
  padding of the weights).
- Tokenizer: 20240328, 2, number of tokens, id of the end-of-text token; then per token a length
(one unsigned
  byte, not 0) and as many bytes.
- Tokens: 20240520, 1, count, then uint16; or 20240801, 7, count, then uint32.

Every reader is strict: whatever the format does not allow, a byte too many included, raises
ValueError.
"""

import math
import struct
from pathlib import Path

import numpy as np

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS

WEIGHTS_MAGIC = 20240326
STATE_MAGIC = 20240327
TOKENIZER_MAGIC = 20240328
TOKENS_UINT16_MAGIC = 20240520
TOKENS_UINT32_MAGIC = 20240801

FLOAT32_VERSION = 3
BFLOAT16_VERSION = 5
STATE_VERSION = 2
TOKENIZER_VERSION = 2

# Entries 2 to 7 of the header of the weights.
SIZES = ("max_seq_len", "vocab_size", "num_layers", "num_heads", "d_model", "padded_vocab_size")

LAYER_NORM_EPS = 1e-5


def tensor_shapes(header):
  """Maps the tensors' names to their shapes, in the order of the file; matrices are (out, in)."""
  maxT, Vp = header["max_seq_len"], header["padded_vocab_size"]
  L, C = header["num_layers"], header["d_model"]
  return {
    "wte": (Vp, C),
    "wpe": (maxT, C),
    "ln1w": (L, C),
    "ln1b": (L, C),
    "qkvw": (L, 3 * C, C),
    "qkvb": (L, 3 * C),
    "attprojw": (L, C, C),
    "attprojb": (L, C),
    "ln2w": (L, C),
    "ln2b": (L, C),
    "fcw": (L, 4 * C, C),
    "fcb": (L, 4 * C),
    "fcprojw": (L, C, 4 * C),
    "fcprojb": (L, C),
    "lnfw": (C,),
    "lnfb": (C,),
  }


# bfloat16, by its bits: the upper half of a float32 (sign, 8 bits of exponent, 7 of mantissa).


def round_to_bfloat16(values):
  """Rounds float32 to the nearest bfloat16, ties to the even one, and returns its bits as uint16.

  A float32 lies between two neighbouring bfloat16: its upper 16 bits, and those plus one (the next
  larger magnitude, across exponents too, and infinity after the largest finite one). The lower 16
  bits say how far it is from the
  first: below 0x8000 the first is nearer, above it the second; at 0x8000 it is in the middle, and
    the even one, with
  last bit 0, is taken. Infinities have zeros there and stay; a NaN stays a NaN of its sign (quiet,
  upper bits kept).
  """
  values = np.asarray(values)
  if values.dtype != np.float32:
    raise ValueError(f"round_to_bfloat16 takes float32, not {values.dtype}")
  bits = values.view(np.uint32) if values.ndim else values.reshape(1).view(np.uint32).reshape(())
  upper = (bits >> np.uint32(16)).astype(np.uint32)
  lower = bits & np.uint32(0xFFFF)
  is_odd = (upper & np.uint32(1)) == 1
  goes_up = (lower > 0x8000) | ((lower == 0x8000) & is_odd)
  is_nan = (bits & np.uint32(0x7FFFFFFF)) > 0x7F800000
  rounded = np.where(is_nan, upper | np.uint32(0x0040), upper + goes_up.astype(np.uint32))
  return rounded.astype(np.uint16)


def bfloat16_to_float32(bits):
  """Decodes the bits of bfloat16 (uint16), which is exact: they are float32's upper half."""
  bits = np.asarray(bits)
  if bits.dtype != np.uint16:
    raise ValueError(f"bfloat16_to_float32 takes bits as uint16, not {bits.dtype}")
  wide = np.atleast_1d(bits).astype(np.uint32) << np.uint32(16)
  return wide.view(np.float32).reshape(bits.shape)


# Headers.


def _read_file(path, kind):
  data = Path(path).read_bytes()
  if len(data) < HEADER_BYTES:
    raise ValueError(
      f"{path}: {kind}: {len(data)} bytes are fewer than the header's {HEADER_BYTES}"
    )
  return data, struct.unpack(f"<{HEADER_INTS}i", data[:HEADER_BYTES])


def _check_header(path, kind, ints, magic, versions, used):
  if ints[0] != magic:
    raise ValueError(f"{path}: {kind}: magic number {ints[0]}, expected {magic}")
  if ints[1] not in versions:
    raise ValueError(
      f"{path}: {kind}: version {ints[1]}, expected {' or '.join(map(str, versions))}"
    )
  for i in range(used, HEADER_INTS):
    if ints[i] != 0:
      raise ValueError(f"{path}: {kind}: header entry {i} is {ints[i]}, expected 0")


def _check_size(path, kind, data, expected):
  if len(data) != expected:
    raise ValueError(f"{path}: {kind}: {len(data)} bytes, expected exactly {expected}")


def _check_sizes(where, header):
  missing = [name for name in SIZES if name not in header]
  if missing:
    raise ValueError(f"{where}: the header lacks {', '.join(missing)}")
  for name in SIZES:
    if not 0 < header[name] < 2**31:
      raise ValueError(f"{where}: {name} is {header[name]}, expected a positive int32")
  if header["d_model"] % header["num_heads"]:
    raise ValueError(
      f"{where}: d_model {header['d_model']} is not a multiple of num_heads {header['num_heads']}"
    )
  if header["padded_vocab_size"] < header["vocab_size"]:
    padded, vocab = header["padded_vocab_size"], header["vocab_size"]
    raise ValueError(f"{where}: padded_vocab_size {padded} is less than vocab_size {vocab}")


def _take(data, offset, dtype, shape):
  """Returns a copy of the array at offset, in the machine's byte order, and the offset after it."""
  array = np.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=offset).reshape(shape)
  return array.astype(array.dtype.newbyteorder("=")), offset + array.nbytes


# Weights.


def read_weights(path):
  """Returns the header, a dict of `version` and SIZES, and the tensors as float32: {name:
  array}.
  """
  kind = "weights"
  data, ints = _read_file(path, kind)
  _check_header(
    path, kind, ints, WEIGHTS_MAGIC, (FLOAT32_VERSION, BFLOAT16_VERSION), used=2 + len(SIZES)
  )
  header = {"version": ints[1], **dict(zip(SIZES, ints[2:], strict=False))}
  _check_sizes(f"{path}: {kind}", header)
  shapes = tensor_shapes(header)
  is_bfloat16 = header["version"] == BFLOAT16_VERSION
  itemsize = 2 if is_bfloat16 else 4
  _check_size(path, kind, data, HEADER_BYTES + itemsize * sum(map(math.prod, shapes.values())))
  tensors, offset = {}, HEADER_BYTES
  for name, shape in shapes.items():
    array, offset = _take(data, offset, "<u2" if is_bfloat16 else "<f4", shape)
    tensors[name] = bfloat16_to_float32(array) if is_bfloat16 else array
  return header, tensors


def _check_tensors(where, tensors, shapes):
  if set(tensors) != set(shapes):
    missing, unknown = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    raise ValueError(f"{where}: tensors missing: {missing}, unknown: {unknown}")
  for name, shape in shapes.items():
    if np.shape(tensors[name]) != shape:
      raise ValueError(f"{where}: {name} has shape {np.shape(tensors[name])}, expected {shape}")


def write_weights(path, header, tensors, version):
  """Writes float32 tensors as version 3 (float32) or 5 (bfloat16).

  A version in the header is not looked at.
  """
  where = f"{path}: weights"
  if version not in (FLOAT32_VERSION, BFLOAT16_VERSION):
    raise ValueError(
      f"{where}: version {version}, expected {FLOAT32_VERSION} or {BFLOAT16_VERSION}"
    )
  _check_sizes(where, header)
  shapes = tensor_shapes(header)
  _check_tensors(where, tensors, shapes)
  for name in shapes:
    if np.asarray(tensors[name]).dtype != np.float32:
      raise ValueError(f"{where}: {name} is {np.asarray(tensors[name]).dtype}, expected float32")
  ints = [WEIGHTS_MAGIC, version, *(int(header[name]) for name in SIZES)]
  ints += [0] * (HEADER_INTS - len(ints))
  with open(path, "wb") as file:
    file.write(struct.pack(f"<{HEADER_INTS}i", *ints))
    for name in shapes:
      array = np.asarray(tensors[name])
      encoded = (
        round_to_bfloat16(array).astype("<u2")
        if version == BFLOAT16_VERSION
        else array.astype("<f4")
      )
      file.write(encoded.tobytes())


# The debug state.


def read_state(path, header_of_weights):
  """Returns a dict: inputs and targets (B, T), logits (B, T, vocab_size), loss (a float), grads
  ({name: array}).

  The sizes of the network are in the weights' file alone, so that file's header has to be given.
  """
  kind = "debug state"
  _check_sizes(f"{path}: {kind}: the weights", header_of_weights)
  data, ints = _read_file(path, kind)
  _check_header(path, kind, ints, STATE_MAGIC, (STATE_VERSION,), used=4)
  B, T = ints[2:4]
  V = header_of_weights["vocab_size"]
  if B <= 0 or T <= 0:
    raise ValueError(f"{path}: {kind}: B is {B} and T is {T}, expected positive ones")
  if header_of_weights["max_seq_len"] < T:
    raise ValueError(
      f"{path}: {kind}: T is {T}, more than the weights' max_seq_len "
      f"{header_of_weights['max_seq_len']}"
    )
  shapes = tensor_shapes(header_of_weights)
  num_values = 2 * B * T + B * T * V + 1 + sum(map(math.prod, shapes.values()))
  _check_size(path, kind, data, HEADER_BYTES + 4 * num_values)
  state, offset = {}, HEADER_BYTES
  for name in ("inputs", "targets"):
    state[name], offset = _take(data, offset, "<i4", (B, T))
    if state[name].min() < 0 or state[name].max() >= V:
      raise ValueError(f"{path}: {kind}: {name} outside the vocabulary of {V}")
  state["logits"], offset = _take(data, offset, "<f4", (B, T, V))
  loss, offset = _take(data, offset, "<f4", (1,))
  state["loss"] = float(loss[0])
  state["grads"] = {}
  for name, shape in shapes.items():
    state["grads"][name], offset = _take(data, offset, "<f4", shape)
  return state


# The tokenizer and tokens.


def read_tokenizer(path):
  """Returns the tokens' bytes, by id, and the id of the end-of-text token."""
  kind = "tokenizer"
  data, ints = _read_file(path, kind)
  _check_header(path, kind, ints, TOKENIZER_MAGIC, (TOKENIZER_VERSION,), used=4)
  num_tokens, eot = ints[2:4]
  if num_tokens <= 0:
    raise ValueError(f"{path}: {kind}: {num_tokens} tokens, expected a positive number")
  if not 0 <= eot < num_tokens:
    raise ValueError(f"{path}: {kind}: end-of-text id {eot} is none of {num_tokens} tokens")
  tokens, offset = [], HEADER_BYTES
  for i in range(num_tokens):
    if offset >= len(data):
      raise ValueError(f"{path}: {kind}: ends before token {i} of {num_tokens}")
    (length,) = struct.unpack_from("<B", data, offset)
    if length == 0:
      raise ValueError(f"{path}: {kind}: token {i} is empty")
    token = data[offset + 1 : offset + 1 + length]
    if len(token) != length:
      raise ValueError(f"{path}: {kind}: ends within token {i} of {num_tokens}")
    tokens.append(token)
    offset += 1 + length
  if offset != len(data):
    raise ValueError(f"{path}: {kind}: {len(data) - offset} bytes after the last token")
  return tokens, eot


def read_tokens(path):
  """Returns a token file's ids, as uint16 or uint32, whichever the file holds."""
  kind = "tokens"
  data, ints = _read_file(path, kind)
  formats = {TOKENS_UINT16_MAGIC: (1, "<u2"), TOKENS_UINT32_MAGIC: (7, "<u4")}
  if ints[0] not in formats:
    raise ValueError(
      f"{path}: {kind}: magic number {ints[0]}, expected {' or '.join(map(str, formats))}"
    )
  version, dtype = formats[ints[0]]
  _check_header(path, kind, ints, ints[0], (version,), used=3)
  count = ints[2]
  if count < 0:
    raise ValueError(f"{path}: {kind}: {count} tokens")
  _check_size(path, kind, data, HEADER_BYTES + count * np.dtype(dtype).itemsize)
  tokens, _ = _take(data, HEADER_BYTES, dtype, (count,))
  return tokens


# The network.


def _layer_norm(x_BTC, w_C, b_C):
  centred_BTC = x_BTC - x_BTC.mean(axis=-1, keepdims=True)
  variance_BT1 = np.square(centred_BTC).mean(axis=-1, keepdims=True)
  return centred_BTC / np.sqrt(variance_BT1 + LAYER_NORM_EPS) * w_C + b_C


def _gelu(x):
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _attention(qkv_BTC3, num_heads):
  """Causal attention of q, k, v, which lie one after the other in the last axis, each split into
  heads.
  """
  B, T, C3 = qkv_BTC3.shape
  C, H = C3 // 3, num_heads
  q_BHTD, k_BHTD, v_BHTD = (
    part.reshape(B, T, H, C // H).swapaxes(1, 2) for part in np.split(qkv_BTC3, 3, axis=-1)
  )
  scores_BHTT = q_BHTD @ k_BHTD.swapaxes(-1, -2) / math.sqrt(C // H)
  is_past_TT = np.arange(T)[None, :] <= np.arange(T)[:, None]
  scores_BHTT = np.where(is_past_TT, scores_BHTT, -np.inf)
  weights_BHTT = np.exp(scores_BHTT - scores_BHTT.max(axis=-1, keepdims=True))
  weights_BHTT /= weights_BHTT.sum(axis=-1, keepdims=True)
  return (weights_BHTT @ v_BHTD).swapaxes(1, 2).reshape(B, T, C)


def forward(tensors, header, tokens):
  """Returns GPT-2's logits in float64 for tokens (B, T) or (T,), over the unpadded vocabulary:
  (..., T, vocab_size).

  Pre-norm blocks, the head tied to wte; the rows of wte beyond vocab_size take no part.
  """
  _check_sizes("forward", header)
  _check_tensors("forward", tensors, tensor_shapes(header))
  tokens = np.asarray(tokens)
  V = header["vocab_size"]
  if tokens.ndim not in (1, 2) or tokens.dtype.kind not in "iu" or not tokens.size:
    raise ValueError(
      f"forward: tokens are {tokens.dtype} of shape {tokens.shape}, expected integers, (B, T) or "
      "(T,)"
    )
  if tokens.min() < 0 or tokens.max() >= V:
    raise ValueError(f"forward: tokens outside the vocabulary of {V}")
  T = tokens.shape[-1]
  if header["max_seq_len"] < T:
    raise ValueError(f"forward: {T} tokens are more than max_seq_len {header['max_seq_len']}")
  p = {name: np.asarray(array, dtype=np.float64) for name, array in tensors.items()}
  tokens_BT = np.atleast_2d(tokens)
  x_BTC = p["wte"][tokens_BT] + p["wpe"][:T]
  for i in range(header["num_layers"]):
    normed_BTC = _layer_norm(x_BTC, p["ln1w"][i], p["ln1b"][i])
    attended_BTC = _attention(normed_BTC @ p["qkvw"][i].T + p["qkvb"][i], header["num_heads"])
    x_BTC = x_BTC + attended_BTC @ p["attprojw"][i].T + p["attprojb"][i]
    normed_BTC = _layer_norm(x_BTC, p["ln2w"][i], p["ln2b"][i])
    hidden_BTF = _gelu(normed_BTC @ p["fcw"][i].T + p["fcb"][i])
    x_BTC = x_BTC + hidden_BTF @ p["fcprojw"][i].T + p["fcprojb"][i]
  logits_BTV = _layer_norm(x_BTC, p["lnfw"], p["lnfb"]) @ p["wte"][:V].T
  return logits_BTV if tokens.ndim == 2 else logits_BTV[0]
