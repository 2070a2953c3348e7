"""The network, written once: initial values, logits for training, and one token at a time with a cache.

Responsible for the forward pass as pure functions of parameters and tokens. Computes in the dtype of the parameters. Not
responsible for what the parameters are (`params.py`), how positions attend (`attention.py`) or the loss (`step.py`).

The layers' parameters, under "blocks", are stacked (a dict of arrays with the layers in front: `lax.scan` runs them) or a
list with a dict for each layer (then they are written out one after the other). Both are the same network.

Dimensions: B batch, T query positions, S key positions, N heads, H head size, D width, F feed-forward width, V vocabulary,
L layers.
"""

import math
import zlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgpt.attention import Attend, Drop, KVCache, attend_and_keep, attend_causally, attend_to_cache
from jgpt.config import DROPOUT_PLACES, ModelConfig
from jgpt.params import Param, param_table

NORM_EPS = 1e-5

Cache = KVCache | list[KVCache]  # as the blocks are: layers stacked, or in a list


def init_params(key: jax.Array, config: ModelConfig) -> dict:
  """Draws every parameter from the normal distribution that `param_table` gives it.

  A parameter's key is folded from its name and its layer, so adding a parameter or a layer changes no other.

  Args:
    key: consumed.
    config: sizes; `vocab_size` resolved.

  Returns:
    A pytree shaped like `param_table(config)`, float32. Leaves under "blocks" have the layers stacked in front.
  """

  def draw(path: tuple, param: Param) -> jax.Array:
    name_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path, simple=True, separator="/").encode()))

    def one(key: jax.Array) -> jax.Array:
      learned = (param.shape[0] - param.padding, *param.shape[1:])  # drawn alone, so that padding changes no value
      value = param.mean + param.std * jax.random.normal(key, learned, jnp.float32)
      return jnp.pad(value, [(0, param.padding)] + [(0, 0)] * (value.ndim - 1))

    if path[0].key != "blocks":
      return one(name_key)
    return jax.vmap(lambda layer: one(jax.random.fold_in(name_key, layer)))(jnp.arange(config.num_layers))

  return jax.tree_util.tree_map_with_path(draw, param_table(config))


def stack_blocks(tree: Any) -> Any:
  """Turns every list named "blocks" in a pytree (parameters, moments, a whole state) into stacked arrays.

  A tree whose blocks are stacked already comes back as it is.
  """

  def stack(params: Any) -> Any:
    if not _has_blocks(params) or isinstance(params["blocks"], dict):
      return params
    return params | {"blocks": jax.tree.map(lambda *layers: jnp.stack(layers), *params["blocks"])}

  return jax.tree.map(stack, tree, is_leaf=_has_blocks)


def unstack_blocks(tree: Any) -> Any:
  """Turns every "blocks" of stacked arrays in a pytree into a list with a dict for each layer: undoes `stack_blocks`."""

  def unstack(params: Any) -> Any:
    if not _has_blocks(params) or not isinstance(params["blocks"], dict):
      return params
    num_layers = len(jax.tree.leaves(params["blocks"])[0])
    return params | {"blocks": [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(num_layers)]}

  return jax.tree.map(unstack, tree, is_leaf=_has_blocks)


def _has_blocks(tree: Any) -> bool:
  return isinstance(tree, dict) and "blocks" in tree


def apply(
  params: dict,
  tokens_BT: jax.Array,
  config: ModelConfig,
  key: jax.Array | None = None,
  attend: Attend = attend_causally,
) -> jax.Array:
  """Computes the logits of each position's next token.

  Args:
    params: as `init_params` returns them, or with unstacked blocks.
    tokens_BT: int32 ids [B, T], T <= `config.max_seq_len`, each below `config.vocab_size`.
    config: sizes and switches.
    key: of what is dropped out, consumed; None drops nothing: evaluation.
    attend: `attend_causally`, or what computes the same.

  Returns:
    Logits [B, T, V] in the parameters' dtype; V is `config.padded_vocab_size`, and padding is -inf.
  """
  x_BTD = _embed(params, tokens_BT, 0, config, key)
  x_BTD, _ = _blocks(params, x_BTD, attend, None, config, key)
  return _logits(params, x_BTD, config)


def prefill(params: dict, tokens_BT: jax.Array, length: int, config: ModelConfig) -> Cache:
  """Reads a prompt into a new cache; entries at T and after are zero.

  Args:
    params: as `init_params` returns them, or with unstacked blocks.
    tokens_BT: int32 ids [B, T], T <= `length`.
    length: S, positions that the cache has room for, at most `config.max_seq_len`.
    config: sizes and switches.
  """
  x_BTD = _embed(params, tokens_BT, 0, config)
  _, cache = _blocks(params, x_BTD, attend_and_keep, None, config)
  room = length - tokens_BT.shape[1]
  return jax.tree.map(lambda c: jnp.pad(c, [(0, 0)] * (c.ndim - 2) + [(0, room), (0, 0)]), cache)


def init_cache(params: dict, batch_size: int, length: int, config: ModelConfig) -> Cache:
  """Makes a cache of zeros in the parameters' dtype, with room for `length` positions."""
  one = KVCache(*(jnp.zeros((batch_size, config.num_heads, length, config.head_dim), params["tok_embed"].dtype),) * 2)
  caches = [one] * config.num_layers
  return jax.tree.map(lambda *layers: jnp.stack(layers), *caches) if isinstance(params["blocks"], dict) else caches


def decode_step(
  params: dict, tokens_B: jax.Array, cache: Cache, position: jax.Array, config: ModelConfig
) -> tuple[jax.Array, Cache]:
  """Computes the logits after one more token.

  Args:
    params: as `init_params` returns them, or with unstacked blocks.
    tokens_B: int32 ids [B], the tokens at `position`.
    cache: keys and values of the positions before.
    position: int32 scalar, 0 <= position < S.
    config: sizes and switches.

  Returns:
    Logits [B, V] as from `apply` at that position, and the cache with the position added.
  """
  x_BTD = _embed(params, tokens_B[:, None], position, config)
  x_BTD, cache = _blocks(params, x_BTD, attend_to_cache(position), cache, config)
  return _logits(params, x_BTD, config)[:, 0], cache


# --- The parts ---


def rms_norm(x_BTD: jax.Array) -> jax.Array:
  """Divides by the root mean square over the last dimension: x / sqrt(mean(x^2) + 1e-5), without a gain.

  Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
  """
  return x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD**2, axis=-1, keepdims=True) + NORM_EPS)


def layer_norm(x_BTD: jax.Array, gain_D: jax.Array, bias_D: jax.Array | None) -> jax.Array:
  """Computes (x - mean) / sqrt(variance + 1e-5) * gain + bias over the last dimension; no bias where it is None.

  Source: Ba et al. 2016, "Layer Normalization", equation 4.
  """
  centred_BTD = x_BTD - jnp.mean(x_BTD, axis=-1, keepdims=True)
  variance_BT1 = jnp.mean(centred_BTD**2, axis=-1, keepdims=True)
  y_BTD = centred_BTD * jax.lax.rsqrt(variance_BT1 + NORM_EPS) * gain_D[None, None]
  return y_BTD if bias_D is None else y_BTD + bias_D[None, None]


def gelu_erf(x: jax.Array) -> jax.Array:
  """Computes x * Phi(x), Phi being the normal distribution function.

  Written with erf, as torch does: `jax.nn.gelu` uses erfc, which keeps the digits of values near 0 far to the left, and
  takes a third of the gradient's time of a small model on a CPU.

  Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2.
  """
  return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS = {"relu": jax.nn.relu, "gelu_tanh": partial(jax.nn.gelu, approximate=True), "gelu_erf": gelu_erf}


def sinusoidal_positions(num_positions: int, d_model: int) -> np.ndarray:
  """Computes the fixed positions: sin(p / 10000^(2i/D)) at dimension 2i, the cosine at 2i + 1; float64 [positions, D].

  Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.5.
  """
  angles = np.arange(num_positions)[:, None] / 10_000 ** (np.arange(0, d_model, 2) / d_model)
  return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(num_positions, d_model)


def make_drop(config: ModelConfig, key: jax.Array | None) -> Drop:
  """Makes the function that drops out entries at the places that `config` names, and scales what is left by 1/(1-p).

  Args:
    config: `dropout` and `dropout_places`.
    key: each place uses its own, folded from this; None (evaluation) drops nothing.

  Source: Srivastava et al. 2014, "Dropout"; scaled in training, so that evaluation needs no change.
  """

  def drop(place: str, x: jax.Array) -> jax.Array:
    if key is None or not config.dropout or place not in config.dropout_places:
      return x
    place_key = jax.random.fold_in(key, DROPOUT_PLACES.index(place))
    kept = jax.random.bernoulli(place_key, 1 - config.dropout, x.shape)
    return jnp.where(kept, x / (1 - config.dropout), 0)

  return drop


def block(memory: Any, x_BTD: jax.Array, p: dict, attend: Attend, config: ModelConfig, drop: Drop) -> tuple[jax.Array, Any]:
  """One transformer block, normalised before attention and before the MLP.

  Args:
    memory: what `attend` reads, for this layer.
    x_BTD: the residual stream.
    p: this layer's parameters, the table's "blocks".
    attend: decides what is attended to and what is kept.
    config: switches.
    drop: drops out at the places "attention", "attention_out", "activation" and "mlp_out".

  Returns:
    The residual stream after the block, and what `attend` kept.
  """
  qkv_BTCNH = _project(_norm(x_BTD, p, "norm_attn", config), p["w_qkv"])  # C: query, key, value
  qkv_BTCNH = _add_bias(qkv_BTCNH, p.get("b_qkv"))
  y_BTNH, memory = attend(memory, *jnp.unstack(qkv_BTCNH, axis=2), drop)
  y_BTD = _add_bias(_project(y_BTNH, p["w_out"]), p.get("b_out"))
  x_BTD = x_BTD + drop("attention_out", y_BTD)
  up_BTF = _add_bias(_project(_norm(x_BTD, p, "norm_mlp", config), p["w_up"]), p.get("b_up"))
  up_BTF = drop("activation", ACTIVATIONS[config.activation](up_BTF))
  y_BTD = _add_bias(_project(up_BTF, p["w_down"]), p.get("b_down"))
  return x_BTD + drop("mlp_out", y_BTD), memory


def _norm(x_BTD: jax.Array, params: dict, name: str, config: ModelConfig) -> jax.Array:
  """The norm called `name`, of the kind that the model has."""
  if config.norm == "rms":
    return rms_norm(x_BTD)
  return layer_norm(x_BTD, params[f"{name}_gain"], params.get(f"{name}_bias"))


def _project(x: jax.Array, w: jax.Array) -> jax.Array:
  """Contracts all dimensions of x after batch and position with as many of w's first.

  As one plain product of two matrices: with more dimensions XLA's gradients on a CPU take a tenth of a small model's step
  longer, and a single token's product copies the whole matrix first.
  """
  num = x.ndim - 2
  y = x.reshape(-1, math.prod(w.shape[:num])) @ w.reshape(-1, math.prod(w.shape[num:]))
  return y.reshape(*x.shape[:2], *w.shape[num:])


def _add_bias(x: jax.Array, bias: jax.Array | None) -> jax.Array:
  """Adds a bias to the last dimensions of x; None adds nothing."""
  return x if bias is None else x + bias[None, None]


def _embed(
  params: dict, tokens_BT: jax.Array, position: int | jax.Array, config: ModelConfig, key: jax.Array | None = None
) -> jax.Array:
  """The residual stream before the first block; the first token stands at `position`."""
  x_BTD = params["tok_embed"][tokens_BT]
  if config.scale_embed:
    x_BTD = x_BTD * config.d_model**0.5
  if config.positions == "sinusoidal":
    table_SD = jnp.asarray(sinusoidal_positions(config.max_seq_len, config.d_model), x_BTD.dtype)
  else:
    table_SD = params["pos_embed"]
  # A slice, not a gather: its gradient needs no scatter, which takes a tenth of a step of `names`.
  positions_TD = jax.lax.dynamic_slice_in_dim(table_SD, position, tokens_BT.shape[1])
  x_BTD = make_drop(config, key)("embedding", x_BTD + positions_TD[None])
  return rms_norm(x_BTD) if config.norm_embed else x_BTD


def _blocks(
  params: dict, x_BTD: jax.Array, attend: Attend, memory: Any, config: ModelConfig, key: jax.Array | None = None
) -> tuple[jax.Array, Any]:
  """Runs the layers one after the other; what each keeps comes back as its blocks are, stacked or in a list."""
  blocks, L = params["blocks"], config.num_layers
  # A number that no place has: keys of layers are no place's key.
  keys_L = None if key is None else jax.random.split(jax.random.fold_in(key, len(DROPOUT_PLACES)), L)

  def layer(x_BTD: jax.Array, inputs: tuple) -> tuple[jax.Array, Any]:
    p, memory, key = inputs
    return block(memory, x_BTD, p, attend, config, make_drop(config, key))

  if isinstance(blocks, dict):
    return jax.lax.scan(layer, x_BTD, (blocks, memory, keys_L))
  nothing, kept = [None] * L, []
  for inputs in zip(blocks, memory or nothing, nothing if keys_L is None else keys_L, strict=True):
    x_BTD, new = layer(x_BTD, inputs)
    kept.append(new)
  return x_BTD, kept


def _logits(params: dict, x_BTD: jax.Array, config: ModelConfig) -> jax.Array:
  if config.norm_final:
    x_BTD = _norm(x_BTD, params, "norm_final", config)
  head_VD = params["tok_embed"] if config.tied_head else params["unembed"]
  logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, head_VD)
  if config.padded_vocab_size == config.vocab_size:
    return logits_BTV
  real_V = jnp.arange(config.padded_vocab_size) < config.vocab_size
  return jnp.where(real_V[None, None], logits_BTV, -jnp.inf)
