"""A test oracle: a GPT with all its switches in NumPy, with backward passes derived by hand.

Written from the mathematics in float64, so that agreement with the project means something. It
holds:

* for every kind of layer, a forward that returns its output and what the backward needs, and a
backward that takes the
  gradient of the output to the gradients of the inputs and parameters;
* the network built of them: `forward` and `loss_and_gradients`, with dropout by given masks;
* clipping by the global norm, AdamW, Adam, SGD, learning-rate schedules, and `train`, which puts
  them together.

What it is not: there is no automatic differentiation, nothing random, no sampling, no cache of keys
and values, and no default for anything that changes a result. It shares no code with the project
and imports nothing but NumPy.

Parameters are a flat dict from GPT-2's names to arrays; `parameter_shapes` lists them. The matrices
of linear layers are (in, out) and applied as `y = x W + b`; wte, wpe and lm_head are [V or S, D].

Letters: B sequences, T positions, V vocabulary, S longest sequence, D model, F feed-forward, N
  heads, H = D / N. Two
letters of time in a row are queries, then keys: p_BNTT. A name `dx` is the gradient of the loss
with respect to `x`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

Array = np.ndarray
Arrays = dict[str, Array]

NORM_EPSILON = 1e-5

NORMS = ("rms", "layer", "layer_no_bias")
ACTIVATIONS = ("relu", "gelu_tanh", "gelu_erf")
POSITIONS = ("learned", "sinusoidal")
BIASES = ("none", "mlp", "all")


class Config(Protocol):
  """What is read of a configuration; any object with these attributes will do."""

  vocab_size: int
  max_seq_len: int
  num_layers: int
  num_heads: int
  d_model: int
  d_ff: int
  norm: str  # one of NORMS
  norm_embed: bool  # a norm after the embeddings; only with norm="rms"
  norm_final: bool  # a norm before the head
  activation: str  # one of ACTIVATIONS
  positions: str  # one of POSITIONS
  biases: str  # one of BIASES; of the linear layers, not of the norms
  tied_head: bool
  scale_embed: bool


# --- Parameters -------------------------------------------------------------------------------


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every parameter the configuration calls for, by name, in the network's
  order.

  Raises:
      ValueError: A switch has no such value, or two of them do not go together.
  """
  _check_config(config)
  V, S, D, F = config.vocab_size, config.max_seq_len, config.d_model, config.d_ff
  shapes: dict[str, tuple[int, ...]] = {}

  def add_norm(name: str) -> None:
    if config.norm != "rms":
      shapes[f"{name}.weight"] = (D,)
    if config.norm == "layer":
      shapes[f"{name}.bias"] = (D,)

  def add_linear(name: str, num_in: int, num_out: int, bias: bool) -> None:
    shapes[f"{name}.weight"] = (num_in, num_out)
    if bias:
      shapes[f"{name}.bias"] = (num_out,)

  shapes["wte"] = (V, D)
  if config.positions == "learned":
    shapes["wpe"] = (S, D)
  for i in range(config.num_layers):
    add_norm(f"h.{i}.ln_1")
    add_linear(f"h.{i}.attn.c_attn", D, 3 * D, bias=config.biases == "all")
    add_linear(f"h.{i}.attn.c_proj", D, D, bias=config.biases == "all")
    add_norm(f"h.{i}.ln_2")
    add_linear(f"h.{i}.mlp.c_fc", D, F, bias=config.biases != "none")
    add_linear(f"h.{i}.mlp.c_proj", F, D, bias=config.biases != "none")
  if config.norm_final:
    add_norm("ln_f")
  if not config.tied_head:
    shapes["lm_head.weight"] = (V, D)
  return shapes


def _check_config(config: Config) -> None:
  for switch, values in (
    ("norm", NORMS),
    ("activation", ACTIVATIONS),
    ("positions", POSITIONS),
    ("biases", BIASES),
  ):
    if getattr(config, switch) not in values:
      raise ValueError(f"{switch} must be one of {values}, not {getattr(config, switch)!r}")
  if config.norm_embed and config.norm != "rms":
    raise ValueError(f"norm_embed is only for norm='rms', not {config.norm!r}")
  if config.d_model % config.num_heads:
    raise ValueError(f"d_model {config.d_model} is not a multiple of num_heads {config.num_heads}")


# --- Layers -----------------------------------------------------------------------------------
#
# x_forward(...) -> (output, saved), x_backward(d_output, saved) -> gradients of the inputs and
# parameters, in the order of the forward's arguments. A bias or gain that is None has the gradient
# None.


def embedding_forward(table_VD: Array, indices: Array, scale: float = 1.0) -> tuple[Array, Any]:
  """Looks up rows of a table and multiplies them by a constant."""
  return scale * table_VD[indices], (table_VD.shape, indices, scale)


def embedding_backward(dy: Array, saved: Any) -> Array:
  """Returns the gradient of the table: a row collects from every place it was used in."""
  shape, indices, scale = saved
  dtable = np.zeros(shape)
  np.add.at(dtable, indices, scale * dy)
  return dtable


def linear_forward(x: Array, weight: Array, bias: Array | None) -> tuple[Array, Any]:
  """Computes x W + b over the last axis."""
  y = x @ weight
  return (y if bias is None else y + bias), (x, weight, bias is not None)


def linear_backward(dy: Array, saved: Any) -> tuple[Array, Array, Array | None]:
  """Returns the gradients of the input, the weight and the bias."""
  x, weight, has_bias = saved
  flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
  return dy @ weight.T, flat_x.T @ flat_dy, flat_dy.sum(0) if has_bias else None


def layer_norm_forward(x: Array, gain: Array, bias: Array | None) -> tuple[Array, Any]:
  """Shifts and scales the last axis to mean 0 and variance 1 (less epsilon), then applies a gain
  and maybe a bias.
  """
  centred = x - x.mean(-1, keepdims=True)
  inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + NORM_EPSILON)
  unit = centred * inverse
  y = unit * gain
  return (y if bias is None else y + bias), (unit, inverse, gain, bias is not None)


def layer_norm_backward(dy: Array, saved: Any) -> tuple[Array, Array, Array | None]:
  """Returns the gradients of the input, the gain and the bias.

  With u = c r, c = x - mean(x) and r = (mean(c^2) + eps)^(-1/2): dr = -r^3 mean(c dc), so du = r
  (dc - u mean(u dc)), and the transpose of centring is centring. mean(u) = 0, so the two
  projections do not interact.
  """
  unit, inverse, gain, has_bias = saved
  axes = tuple(range(dy.ndim - 1))
  dunit = dy * gain
  dx = inverse * (
    dunit - dunit.mean(-1, keepdims=True) - unit * (dunit * unit).mean(-1, keepdims=True)
  )
  return dx, (dy * unit).sum(axes), dy.sum(axes) if has_bias else None


def rms_norm_forward(x: Array) -> tuple[Array, Any]:
  """Divides the last axis by its root mean square (with epsilon under the root)."""
  inverse = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + NORM_EPSILON)
  return x * inverse, (x * inverse, inverse)


def rms_norm_backward(dy: Array, saved: Any) -> Array:
  """Returns the gradient of the input."""
  y, inverse = saved
  return inverse * (dy - y * (dy * y).mean(-1, keepdims=True))


def dropout_forward(x: Array, mask: Array | None) -> tuple[Array, Any]:
  """Multiplies by a given mask of 0 and 1 / (1 - p), or does nothing where it is None."""
  return (x, None) if mask is None else (x * np.broadcast_to(mask, x.shape), mask)


def dropout_backward(dy: Array, saved: Any) -> Array:
  """Returns the gradient of the input."""
  return dy if saved is None else dy * saved


def softmax(x: Array) -> Array:
  """Computes exp(x) / sum(exp(x)) over the last axis."""
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def attention_forward(qkv_BTC: Array, num_heads: int, mask_BNTT: Array | None) -> tuple[Array, Any]:
  """Attends over the positions up to each position's own.

  Args:
      qkv_BTC: Queries, keys and values side by side, C = 3 D, each of N heads side by side.
      num_heads: N.
      mask_BNTT: The dropout mask of the probabilities, or None.

  Returns:
      The heads' outputs side by side [B, T, D], and what the backward needs.
  """
  B, T, C = qkv_BTC.shape
  N, H = num_heads, C // 3 // num_heads
  q_BNTH, k_BNTH, v_BNTH = qkv_BTC.reshape(B, T, 3, N, H).transpose(2, 0, 3, 1, 4)
  scores_BNTT = q_BNTH @ k_BNTH.swapaxes(-1, -2) / math.sqrt(H)
  seen_TT = np.arange(T)[:, None] >= np.arange(T)[None, :]
  p_BNTT = softmax(np.where(seen_TT, scores_BNTT, -np.inf))
  kept_BNTT, saved_mask = dropout_forward(p_BNTT, mask_BNTT)
  y_BNTH = kept_BNTT @ v_BNTH
  return y_BNTH.swapaxes(1, 2).reshape(B, T, N * H), (
    q_BNTH,
    k_BNTH,
    v_BNTH,
    p_BNTT,
    kept_BNTT,
    saved_mask,
  )


def attention_backward(dy_BTD: Array, saved: Any) -> Array:
  """Returns the gradient of the queries, keys and values side by side."""
  q_BNTH, k_BNTH, v_BNTH, p_BNTT, kept_BNTT, saved_mask = saved
  B, N, T, H = q_BNTH.shape
  dy_BNTH = dy_BTD.reshape(B, T, N, H).swapaxes(1, 2)
  dv_BNTH = kept_BNTT.swapaxes(-1, -2) @ dy_BNTH
  dp_BNTT = dropout_backward(dy_BNTH @ v_BNTH.swapaxes(-1, -2), saved_mask)
  # Softmax: dp_i/ds_j = p_i ([i = j] - p_j). Where a key is not seen p = 0, and so is the gradient
  # of its score.
  dscores_BNTT = p_BNTT * (dp_BNTT - (dp_BNTT * p_BNTT).sum(-1, keepdims=True)) / math.sqrt(H)
  dq_BNTH = dscores_BNTT @ k_BNTH
  dk_BNTH = dscores_BNTT.swapaxes(-1, -2) @ q_BNTH
  return np.stack([dq_BNTH, dk_BNTH, dv_BNTH]).transpose(1, 3, 0, 2, 4).reshape(B, T, 3 * N * H)


def relu_forward(x: Array) -> tuple[Array, Any]:
  """Computes max(x, 0)."""
  return np.maximum(x, 0.0), x


def relu_backward(dy: Array, saved: Any) -> Array:
  """Returns the gradient of the input, taking 0 at the kink."""
  return dy * (saved > 0)


def gelu_tanh_forward(x: Array) -> tuple[Array, Any]:
  """Computes GELU by its tanh approximation."""
  t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
  return 0.5 * x * (1 + t), (x, t)


def gelu_tanh_backward(dy: Array, saved: Any) -> Array:
  """Returns the gradient of the input."""
  x, t = saved
  inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
  return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t**2) * inner)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu_erf_forward(x: Array) -> tuple[Array, Any]:
  """Computes GELU exactly: x times the standard normal distribution function at x."""
  cdf = 0.5 * (1 + _erf(x / math.sqrt(2)))
  return x * cdf, (x, cdf)


def gelu_erf_backward(dy: Array, saved: Any) -> Array:
  """Returns the gradient of the input."""
  x, cdf = saved
  return dy * (cdf + x * np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi))


def head_forward(x_BTD: Array, table_VD: Array) -> tuple[Array, Any]:
  """Computes logits as inner products with the rows of a table: wte where the head is tied, else
  lm_head.weight.
  """
  return x_BTD @ table_VD.T, (x_BTD, table_VD)


def head_backward(dlogits_BTV: Array, saved: Any) -> tuple[Array, Array]:
  """Returns the gradients of the input and the table.

  A tied table has this one and the embedding's: their sum.
  """
  x_BTD, table_VD = saved
  flat_dlogits, flat_x = (
    dlogits_BTV.reshape(-1, table_VD.shape[0]),
    x_BTD.reshape(-1, table_VD.shape[1]),
  )
  return dlogits_BTV @ table_VD, flat_dlogits.T @ flat_x


def cross_entropy_forward(
  logits_BTV: Array, targets_BT: Array, weights_BT: Array
) -> tuple[float, Any]:
  """Computes the weighted mean of -log softmax(logits)[target]."""
  shifted = logits_BTV - logits_BTV.max(-1, keepdims=True)
  log_total_BT = np.log(np.exp(shifted).sum(-1))
  at_target_BT = np.take_along_axis(shifted, targets_BT[..., None], -1)[..., 0]
  loss = float((weights_BT * (log_total_BT - at_target_BT)).sum() / weights_BT.sum())
  return loss, (logits_BTV, targets_BT, weights_BT)


def cross_entropy_backward(saved: Any) -> Array:
  """Returns the gradient of the logits: (p - y) w / sum(w), y being one-hot."""
  logits_BTV, targets_BT, weights_BT = saved
  one_hot_BTV = np.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
  return (softmax(logits_BTV) - one_hot_BTV) * weights_BT[..., None] / weights_BT.sum()


ACTIVATION_FORWARD = {
  "relu": relu_forward,
  "gelu_tanh": gelu_tanh_forward,
  "gelu_erf": gelu_erf_forward,
}
ACTIVATION_BACKWARD = {
  "relu": relu_backward,
  "gelu_tanh": gelu_tanh_backward,
  "gelu_erf": gelu_erf_backward,
}


def sinusoidal_positions(num_positions: int, d_model: int) -> Array:
  """Returns the fixed position vectors: PE[p, 2i] = sin(p / 10000^(2i/D)), PE[p, 2i+1] = cos of the
  same.
  """
  column_D = np.arange(d_model)
  pair_D = column_D // 2
  angle_TD = np.arange(num_positions)[:, None] / 10000.0 ** (2 * pair_D / d_model)
  return np.where(column_D % 2 == 0, np.sin(angle_TD), np.cos(angle_TD))


# --- The network ------------------------------------------------------------------------------


class _Network:
  """One forward pass, and the backward pass that goes through it in reverse.

  Each layer of the forward leaves what it saved under a name of its own; the backward takes it from
  there and adds to the gradients.
  """

  def __init__(
    self, params: Mapping[str, Array], config: Config, masks: Mapping[str, Array] | None
  ):
    shapes = parameter_shapes(config)
    if set(params) != set(shapes):
      raise ValueError(
        f"missing parameters {sorted(set(shapes) - set(params))}, extra "
        f"{sorted(set(params) - set(shapes))}"
      )
    self.params = _float64(params)
    for name, shape in shapes.items():
      if self.params[name].shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {self.params[name].shape}")
    places = {
      f"h.{i}.{at}"
      for i in range(config.num_layers)
      for at in ("attention", "attention_out", "activation", "mlp_out")
    }
    if unknown := sorted(set(masks or {}) - places - {"embed"}):
      raise ValueError(f"no dropout is named {unknown}")
    self.masks = _float64(masks or {})
    self.config = config
    self.saved: dict[str, Any] = {}
    self.gradients = {name: np.zeros(shape) for name, shape in shapes.items()}
    self.residual: list[Array] = []  # before the first block, and after each

  # Forward.

  def norm(self, name: str, x: Array) -> Array:
    if self.config.norm == "rms":
      y, self.saved[name] = rms_norm_forward(x)
    else:
      y, self.saved[name] = layer_norm_forward(
        x, self.params[f"{name}.weight"], self.params.get(f"{name}.bias")
      )
    return y

  def linear(self, name: str, x: Array) -> Array:
    y, self.saved[name] = linear_forward(
      x, self.params[f"{name}.weight"], self.params.get(f"{name}.bias")
    )
    return y

  def dropout(self, name: str, x: Array) -> Array:
    y, self.saved[f"dropout.{name}"] = dropout_forward(x, self.masks.get(name))
    return y

  def forward(self, tokens_BT: Array) -> Array:
    config = self.config
    T = tokens_BT.shape[1]
    scale = math.sqrt(config.d_model) if config.scale_embed else 1.0
    x, self.saved["wte"] = embedding_forward(self.params["wte"], tokens_BT, scale)
    if config.positions == "learned":
      positions_TD, self.saved["wpe"] = embedding_forward(self.params["wpe"], np.arange(T))
    else:
      positions_TD = sinusoidal_positions(T, config.d_model)
    x = self.dropout("embed", x + positions_TD)
    if config.norm_embed:
      x = self.norm("norm_embed", x)

    self.residual.append(x)
    for i in range(config.num_layers):
      a = self.linear(f"h.{i}.attn.c_attn", self.norm(f"h.{i}.ln_1", x))
      a, self.saved[f"h.{i}.attn"] = attention_forward(
        a, config.num_heads, self.masks.get(f"h.{i}.attention")
      )
      x = x + self.dropout(f"h.{i}.attention_out", self.linear(f"h.{i}.attn.c_proj", a))
      m = self.linear(f"h.{i}.mlp.c_fc", self.norm(f"h.{i}.ln_2", x))
      m, self.saved[f"h.{i}.mlp"] = ACTIVATION_FORWARD[config.activation](m)
      m = self.dropout(f"h.{i}.activation", m)
      x = x + self.dropout(f"h.{i}.mlp_out", self.linear(f"h.{i}.mlp.c_proj", m))
      self.residual.append(x)

    if config.norm_final:
      x = self.norm("ln_f", x)
    logits_BTV, self.saved["head"] = head_forward(
      x, self.params["wte" if config.tied_head else "lm_head.weight"]
    )
    return logits_BTV

  # Backward.

  def norm_backward(self, name: str, dy: Array) -> Array:
    if self.config.norm == "rms":
      return rms_norm_backward(dy, self.saved[name])
    dx, dgain, dbias = layer_norm_backward(dy, self.saved[name])
    self.gradients[f"{name}.weight"] += dgain
    if dbias is not None:
      self.gradients[f"{name}.bias"] += dbias
    return dx

  def linear_backward(self, name: str, dy: Array) -> Array:
    dx, dweight, dbias = linear_backward(dy, self.saved[name])
    self.gradients[f"{name}.weight"] += dweight
    if dbias is not None:
      self.gradients[f"{name}.bias"] += dbias
    return dx

  def dropout_backward(self, name: str, dy: Array) -> Array:
    return dropout_backward(dy, self.saved[f"dropout.{name}"])

  def backward(self, dlogits_BTV: Array) -> Arrays:
    config = self.config
    dx, dtable_VD = head_backward(dlogits_BTV, self.saved["head"])
    self.gradients["wte" if config.tied_head else "lm_head.weight"] += dtable_VD
    if config.norm_final:
      dx = self.norm_backward("ln_f", dx)

    for i in reversed(range(config.num_layers)):
      # A residual hands its gradient on to both of its terms.
      dm = self.linear_backward(f"h.{i}.mlp.c_proj", self.dropout_backward(f"h.{i}.mlp_out", dx))
      dm = self.dropout_backward(f"h.{i}.activation", dm)
      dm = ACTIVATION_BACKWARD[config.activation](dm, self.saved[f"h.{i}.mlp"])
      dx = dx + self.norm_backward(f"h.{i}.ln_2", self.linear_backward(f"h.{i}.mlp.c_fc", dm))
      da = self.linear_backward(
        f"h.{i}.attn.c_proj", self.dropout_backward(f"h.{i}.attention_out", dx)
      )
      da = attention_backward(da, self.saved[f"h.{i}.attn"])
      dx = dx + self.norm_backward(f"h.{i}.ln_1", self.linear_backward(f"h.{i}.attn.c_attn", da))

    if config.norm_embed:
      dx = self.norm_backward("norm_embed", dx)
    dx = self.dropout_backward("embed", dx)
    self.gradients["wte"] += embedding_backward(dx, self.saved["wte"])
    if config.positions == "learned":
      self.gradients["wpe"] += embedding_backward(dx.sum(0), self.saved["wpe"])
    return self.gradients


def forward(
  params: Mapping[str, Array],
  tokens_BT: Array,
  config: Config,
  masks: Mapping[str, Array] | None = None,
) -> Array:
  """Computes the logits.

  Args:
      params: Every parameter of `parameter_shapes(config)`.
      tokens_BT: Token ids, at most max_seq_len of them in a row.
      config: The sizes and switches.
      masks: Dropout masks, already holding 0 or 1 / (1 - p), by name: "embed", "h.{i}.attention",
        "h.{i}.attention_out", "h.{i}.activation", "h.{i}.mlp_out". An absent name means no dropout
        there.

  Returns:
      Logits [B, T, V], float64.
  """
  tokens_BT = _checked_ids(tokens_BT, config)
  return _Network(params, config, masks).forward(tokens_BT)


def trace(
  params: Mapping[str, Array], tokens_BT: Array, config: Config
) -> tuple[Array, Array, Array]:
  """Computes what leads to the logits, without dropout.

  Args:
      params: As in `forward`.
      tokens_BT: As in `forward`.
      config: As in `forward`.

  Returns:
      The residual stream before the first block and after each [L + 1, B, T, D]; each block's
      softmax(q k^T / sqrt(H)) over the keys up to the query's own [L, B, N, T, T]; the logits.
  """
  network = _Network(params, config, None)
  logits_BTV = network.forward(_checked_ids(tokens_BT, config))
  probabilities = [network.saved[f"h.{i}.attn"][3] for i in range(config.num_layers)]
  return np.stack(network.residual), np.stack(probabilities), logits_BTV


def loss_and_gradients(
  params: Mapping[str, Array],
  tokens_BT: Array,
  targets_BT: Array,
  weights_BT: Array,
  config: Config,
  masks: Mapping[str, Array] | None = None,
) -> tuple[float, Arrays]:
  """Computes the loss sum(w * -log softmax(logits)[target]) / sum(w), and its gradient for every
  parameter.

  Args:
      params: As in `forward`.
      tokens_BT: As in `forward`.
      targets_BT: The token ids to predict.
      weights_BT: The weight of each position in the loss; not all 0.
      config: As in `forward`.
      masks: As in `forward`.

  Returns:
      The loss, and the gradients by the parameters' names.
  """
  tokens_BT, targets_BT = _checked_ids(tokens_BT, config), _checked_ids(targets_BT, config)
  weights_BT = np.asarray(weights_BT, np.float64)
  if not tokens_BT.shape == targets_BT.shape == weights_BT.shape:
    raise ValueError(f"shapes differ: {tokens_BT.shape}, {targets_BT.shape}, {weights_BT.shape}")
  if weights_BT.sum() == 0:
    raise ValueError("the weights sum to 0")
  network = _Network(params, config, masks)
  loss, saved = cross_entropy_forward(network.forward(tokens_BT), targets_BT, weights_BT)
  return loss, network.backward(cross_entropy_backward(saved))


def _float64(arrays: Mapping[str, Array]) -> Arrays:
  return {name: np.asarray(x, np.float64) for name, x in arrays.items()}


def _checked_ids(ids_BT: Array, config: Config) -> Array:
  """Returns the ids as an array; NumPy would take a negative one from the end."""
  ids_BT = np.asarray(ids_BT)
  if ids_BT.ndim != 2 or ids_BT.shape[1] > config.max_seq_len:
    raise ValueError(
      f"tokens must be [B, T] with T at most {config.max_seq_len}, not {ids_BT.shape}"
    )
  if ids_BT.min() < 0 or ids_BT.max() >= config.vocab_size:
    raise ValueError(
      f"tokens must lie in [0, {config.vocab_size}), not {ids_BT.min()} to {ids_BT.max()}"
    )
  return ids_BT


# --- Optimizer --------------------------------------------------------------------------------


def global_norm(gradients: Mapping[str, Array]) -> float:
  """Returns the Euclidean norm of all gradients taken as one vector."""
  return math.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in gradients.values()))


def clip_by_global_norm(gradients: Mapping[str, Array], max_norm: float) -> Arrays:
  """Scales all gradients by max_norm / norm where their global norm is greater than max_norm, else
  leaves them.
  """
  norm = global_norm(gradients)
  scale = max_norm / norm if norm > max_norm else 1.0
  return {name: scale * g for name, g in _float64(gradients).items()}


def adamw_update(
  params: Mapping[str, Array],
  gradients: Mapping[str, Array],
  m: Mapping[str, Array],
  v: Mapping[str, Array],
  t: int,
  *,
  lr: float,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  decayed: Collection[str],
) -> tuple[Arrays, Arrays, Arrays]:
  """Takes one step of AdamW (Loshchilov and Hutter).

  As in PyTorch, the decay is multiplied by the rate.

  Args:
      params: The parameters, left as they are.
      gradients: Their gradients.
      m: The running means of the gradients, zeros before the first update.
      v: The running means of their squares, zeros before the first update.
      t: The number of this update, from 1.
      lr: The learning rate of this update.
      b1: How much of m is kept.
      b2: How much of v is kept.
      eps: Added to the root of v.
      weight_decay: p loses lr * weight_decay * p, p being its value before the update.
      decayed: The names of the parameters that decay.

  Returns:
      The new parameters, m and v.
  """
  if t < 1:
    raise ValueError(f"updates are counted from 1, not {t}")
  if unknown := sorted(set(decayed) - set(params)):
    raise ValueError(f"no parameters are named {unknown}")
  params, gradients, m, v = _float64(params), _float64(gradients), _float64(m), _float64(v)
  new_params, new_m, new_v = {}, {}, {}
  for name, p in params.items():
    g = gradients[name]
    new_m[name] = b1 * m[name] + (1 - b1) * g
    new_v[name] = b2 * v[name] + (1 - b2) * g**2
    m_hat = new_m[name] / (1 - b1**t)
    v_hat = new_v[name] / (1 - b2**t)
    decay = weight_decay if name in decayed else 0.0
    new_params[name] = p - lr * (m_hat / (np.sqrt(v_hat) + eps) + decay * p)
  return new_params, new_m, new_v


def adam_update(
  params: Mapping[str, Array],
  gradients: Mapping[str, Array],
  m: Mapping[str, Array],
  v: Mapping[str, Array],
  t: int,
  *,
  weight_decay: float,
  decayed: Collection[str],
  **settings: float,
) -> tuple[Arrays, Arrays, Arrays]:
  """Takes one step of Adam (Kingma and Ba) for the loss with weight_decay * p^2 / 2 added to it.

  The arguments are those of `adamw_update`; the decay here is part of the gradient.
  """
  gradients = _add_l2(params, gradients, weight_decay, decayed)
  return adamw_update(params, gradients, m, v, t, weight_decay=0.0, decayed=(), **settings)


def sgd_update(
  params: Mapping[str, Array],
  gradients: Mapping[str, Array],
  m: Mapping[str, Array],
  *,
  lr: float,
  momentum: float,
  weight_decay: float,
  decayed: Collection[str],
) -> tuple[Arrays, Arrays]:
  """Takes one step of SGD with momentum for the loss with weight_decay * p^2 / 2 added to it.

  Args:
      params: The parameters, left as they are.
      gradients: Their gradients.
      m: The running sums of the gradients, zeros before the first update.
      lr: The learning rate of this update.
      momentum: How much of m is kept; the gradient is added to it undiminished.
      weight_decay: As in `adam_update`.
      decayed: The names of the parameters that decay.

  Returns:
      The new parameters and m.
  """
  gradients, m = _add_l2(params, gradients, weight_decay, decayed), _float64(m)
  m = {name: momentum * m[name] + g for name, g in gradients.items()}
  return {name: p - lr * m[name] for name, p in _float64(params).items()}, m


def _add_l2(
  params: Mapping[str, Array],
  gradients: Mapping[str, Array],
  weight_decay: float,
  decayed: Collection[str],
) -> Arrays:
  if unknown := sorted(set(decayed) - set(params)):
    raise ValueError(f"no parameters are named {unknown}")
  gradients = _float64(gradients)
  decay = {name: weight_decay * p for name, p in _float64(params).items() if name in decayed}
  return {name: g + decay.get(name, 0.0) for name, g in gradients.items()}


# --- Schedules: the learning rate of a step, counted from 0 -------------------------------------


def constant_rate(step: int, peak: float) -> float:
  """Returns `peak` at every step."""
  del step
  return float(peak)


def linear_rate(step: int, peak: float, total: int) -> float:
  """Falls linearly from `peak` at step 0 to 0 at step `total`; not meant for later steps."""
  return peak * (1 - step / total)


def cosine_rate(
  step: int, *, peak: float, end: float, warmup: int, total: int, warmup_from_zero: bool
) -> float:
  """Warms up to `peak` at step `warmup`, falls along half a cosine to `end` at step `total`, and
  stays there.
  """
  if warmup > total:
    raise ValueError(f"warmup {warmup} does not fit into {total} steps")
  if step < warmup:
    return _warmup_rate(step, peak, warmup, warmup_from_zero)
  if step >= total:
    return float(end)
  return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def wsd_rate(
  step: int,
  *,
  peak: float,
  end: float,
  warmup: int,
  total: int,
  cooldown: int,
  warmup_from_zero: bool,
) -> float:
  """Warms up to `peak` at step `warmup`, stays, falls linearly from step `total - cooldown` to
  `end` at `total`.
  """
  if warmup + cooldown > total:
    raise ValueError(f"warmup {warmup} and cooldown {cooldown} do not fit into {total} steps")
  if step < warmup:
    return _warmup_rate(step, peak, warmup, warmup_from_zero)
  if step >= total:
    return float(end)
  if step < total - cooldown:
    return float(peak)
  return peak + (end - peak) * (step - (total - cooldown)) / cooldown


def _warmup_rate(step: int, peak: float, warmup: int, from_zero: bool) -> float:
  return peak * (step / warmup if from_zero else (step + 1) / (warmup + 1))


# --- Training ---------------------------------------------------------------------------------


def train(
  params: Mapping[str, Array],
  batches: Iterable[tuple[Array, Array, Array]],
  config: Config,
  *,
  rate: Callable[[int], float],
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float = 0.0,
  decayed: Collection[str] = (),
  clip_norm: float | None = None,
  optimizer: str = "adamw",
  momentum: float = 0.0,
) -> tuple[list[float], Arrays, Arrays, Arrays]:
  """Trains with AdamW, Adam or SGD, one update a batch, without dropout.

  A batch without any weight has no loss: its update is left out, and nothing but the rate advances.

  Args:
      params: The parameters to start from, left as they are.
      batches: Tokens, targets and weights of each step, [B, T] each.
      config: The sizes and switches.
      rate: The learning rate as a function of the step, from 0.
      b1: As in `adamw_update`.
      b2: As in `adamw_update`.
      eps: As in `adamw_update`.
      weight_decay: As in `adamw_update`.
      decayed: As in `adamw_update`.
      clip_norm: Gradients are clipped to this global norm before the update; None leaves them.
      optimizer: "adamw", "adam", or "sgd", which needs no b1, b2 and eps.
      momentum: Of "sgd", as in `sgd_update`.

  Returns:
      The loss of each step before its update, NaN where there is none, and the parameters, m and v
      after the last; v stays zero with "sgd".
  """
  params = {name: p.copy() for name, p in _float64(params).items()}
  m = {name: np.zeros_like(p) for name, p in params.items()}
  v = {name: np.zeros_like(p) for name, p in params.items()}
  losses, t = [], 0
  for step, (tokens_BT, targets_BT, weights_BT) in enumerate(batches):
    if not np.any(weights_BT):
      losses.append(math.nan)
      continue
    t += 1
    loss, gradients = loss_and_gradients(params, tokens_BT, targets_BT, weights_BT, config)
    losses.append(loss)
    if clip_norm is not None:
      gradients = clip_by_global_norm(gradients, clip_norm)
    settings = {"lr": rate(step), "weight_decay": weight_decay, "decayed": decayed}
    if optimizer == "sgd":
      params, m = sgd_update(params, gradients, m, momentum=momentum, **settings)
      continue
    update = {"adamw": adamw_update, "adam": adam_update}[optimizer]
    params, m, v = update(params, gradients, m, v, t, b1=b1, b2=b2, eps=eps, **settings)
  return losses, params, m, v
