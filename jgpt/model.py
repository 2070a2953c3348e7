"""The network, written once: initial values, and the logits of each position's next token.

Pure functions of parameters and tokens, computed in the parameters' dtype. What the parameters are
is in `params.py`, the parts of a block are in `layers.py` and `attention.py`, the loss in
`step.py`, decoding with a cache in `generate.py`.

Blocks are stacked (a dict of arrays with the layers in front, run by `lax.scan`) or a list with a
dict for each layer (then they are written out one after the other). Both are the same network.

Dimensions: B batch, T query positions, S key positions, N heads, H head size, D width, F
feed-forward width, V vocabulary, L layers, C one of query, key and value.
"""

import zlib

import jax
import jax.numpy as jnp

from jgpt.attention import KVCache, attend_to_cache, attention
from jgpt.config import ComputeConfig, ModelConfig
from jgpt.config.experiment import DROPOUT_PLACES, PLAIN
from jgpt.layers import (
  ACTIVATIONS,
  add_bias,
  dropout,
  dropout_at,
  layer_norm,
  project,
  rms_norm,
  sinusoidal_positions,
)
from jgpt.params import Param, param_table

Cache = KVCache | list[KVCache]  # as the blocks are: layers stacked, or in a list


def init_params(key: jax.Array, config: ModelConfig) -> dict:
  """Draws every parameter from the normal distribution that `param_table` gives it.

  A parameter's key is folded from its name and its layer, so that adding a parameter or a layer
  changes no other.

  Args:
    key: consumed.
    config: `vocab_size` resolved.

  Returns:
    A pytree shaped like `param_table(config)`, float32, with stacked blocks.
  """

  def draw(path: tuple, param: Param) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    name_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    learned = (param.shape[0] - param.padding, *param.shape[1:])  # padding changes no drawn value

    def draw_one(key: jax.Array) -> jax.Array:
      value = param.mean + param.std * jax.random.normal(key, learned, jnp.float32)
      return jnp.pad(value, [(0, param.padding)] + [(0, 0)] * (value.ndim - 1))

    if path[0].key != "blocks":
      return draw_one(name_key)
    layers = jnp.arange(config.num_layers)
    return jax.vmap(lambda layer: draw_one(jax.random.fold_in(name_key, layer)))(layers)

  return jax.tree_util.tree_map_with_path(draw, param_table(config))


def apply(
  params: dict,
  tokens_BT: jax.Array,
  config: ModelConfig,
  compute: ComputeConfig = PLAIN,
  key: jax.Array | None = None,
) -> jax.Array:
  """Computes the logits of each position's next token.

  Args:
    params: as `init_params` returns them; blocks stacked or a list.
    tokens_BT: int32 ids [B, T], T <= `config.max_seq_len`, each below `config.vocab_size`.
    config: of the network.
    compute: how to compute; what is left at "auto" is computed plainly.
    key: of dropout, consumed; None drops nothing, as in evaluation.

  Returns:
    Logits [B, T, V] in the parameters' dtype; V is `config.padded_vocab_size`, padding is -inf.
  """
  x_BTD = embed(params, tokens_BT, 0, config, key)
  x_BTD, _ = run_blocks(params, x_BTD, config, compute, key)
  return predict_logits(params, x_BTD, config)


def embed(
  params: dict,
  tokens_BT: jax.Array,
  position: int | jax.Array,
  config: ModelConfig,
  key: jax.Array | None = None,
) -> jax.Array:
  """Computes the residual stream [B, T, D] before the first block.

  `position` is the first token's.
  """
  x_BTD = params["tok_embed"][tokens_BT]
  if config.scale_embed:
    x_BTD = x_BTD * config.d_model**0.5
  if config.positions == "sinusoidal":
    table_SD = jnp.asarray(sinusoidal_positions(config.max_seq_len, config.d_model), x_BTD.dtype)
  else:
    table_SD = params["pos_embed"]
  # A slice and not a gather, whose gradient is a scatter: a tenth of a step of `names`.
  positions_TD = jax.lax.dynamic_slice_in_dim(table_SD, position, tokens_BT.shape[1])
  x_BTD = dropout(x_BTD + positions_TD[None], *dropout_at("embedding", config, key))
  return rms_norm(x_BTD) if config.norm_embed else x_BTD


def run_blocks(
  params: dict,
  x_BTD: jax.Array,
  config: ModelConfig,
  compute: ComputeConfig = PLAIN,
  key: jax.Array | None = None,
  cache: Cache | None = None,
  position: int | jax.Array = 0,
) -> tuple[jax.Array, Cache | None]:
  """Runs the blocks one after the other.

  Args:
    params: only "blocks" is read.
    x_BTD: the residual stream after `embed`.
    config: of the network.
    compute: how to compute.
    key: of dropout, consumed; None drops nothing.
    cache: keys and values before `position`, arranged as the blocks are; None attends causally.
    position: of the first of the T positions, where there is a cache.

  Returns:
    The residual stream after the last block, and the cache with the T positions.
  """
  blocks, L = params["blocks"], config.num_layers
  # Folded with a number that no dropout place has, so that no layer's key is a place's key.
  keys_L = (
    None if key is None else jax.random.split(jax.random.fold_in(key, len(DROPOUT_PLACES)), L)
  )

  def layer(x_BTD: jax.Array, inputs: tuple) -> tuple[jax.Array, KVCache | None]:
    p, key, cache = inputs
    return block(x_BTD, p, config, compute, key, cache, position)

  if isinstance(blocks, dict):
    return jax.lax.scan(layer, x_BTD, (blocks, keys_L, cache))
  caches = []
  for i, p in enumerate(blocks):
    inputs = p, None if keys_L is None else keys_L[i], None if cache is None else cache[i]
    x_BTD, new = layer(x_BTD, inputs)
    caches.append(new)
  return x_BTD, None if cache is None else caches


def block(
  x_BTD: jax.Array,
  p: dict,
  config: ModelConfig,
  compute: ComputeConfig = PLAIN,
  key: jax.Array | None = None,
  cache: KVCache | None = None,
  position: int | jax.Array = 0,
) -> tuple[jax.Array, KVCache | None]:
  """Computes one transformer block, normalised before attention and before the MLP.

  Args:
    x_BTD: the residual stream.
    p: the parameters of this layer.
    config: of the network.
    compute: how to compute.
    key: of dropout in this layer, consumed; None drops nothing.
    cache: this layer's keys and values before `position`; None attends causally.
    position: of the first of the T positions, where there is a cache.

  Returns:
    The residual stream after the block, and the cache with the T positions.
  """
  h_BTD = norm(x_BTD, p, "norm_attn", config)
  qkv_BTCNH = project("BTD,DCNH->BTCNH", h_BTD, p["w_qkv"], compute.matmul)
  q_BTNH, k_BTNH, v_BTNH = jnp.unstack(add_bias(qkv_BTCNH, p.get("b_qkv")), axis=2)
  if cache is None:
    rate, drop_key = dropout_at("attention", config, key)
    y_BTNH = attention(
      q_BTNH, k_BTNH, v_BTNH, rate=rate, key=drop_key, implementation=compute.attention
    )
  else:
    y_BTNH, cache = attend_to_cache(q_BTNH, k_BTNH, v_BTNH, cache, position, compute.attention)
  y_BTD = add_bias(project("BTNH,NHD->BTD", y_BTNH, p["w_out"], compute.matmul), p.get("b_out"))
  x_BTD = x_BTD + dropout(y_BTD, *dropout_at("attention_out", config, key))

  h_BTD = norm(x_BTD, p, "norm_mlp", config)
  h_BTF = add_bias(project("BTD,DF->BTF", h_BTD, p["w_up"], compute.matmul), p.get("b_up"))
  h_BTF = dropout(ACTIVATIONS[config.activation](h_BTF), *dropout_at("activation", config, key))
  y_BTD = add_bias(project("BTF,FD->BTD", h_BTF, p["w_down"], compute.matmul), p.get("b_down"))
  return x_BTD + dropout(y_BTD, *dropout_at("mlp_out", config, key)), cache


def norm(x_BTD: jax.Array, params: dict, name: str, config: ModelConfig) -> jax.Array:
  """Applies the norm called `name`: RMSNorm, or LayerNorm with the gain and bias in `params`."""
  if config.norm == "rms":
    return rms_norm(x_BTD)
  return layer_norm(x_BTD, params[f"{name}_gain"], params.get(f"{name}_bias"))


def predict_logits(params: dict, x_BTD: jax.Array, config: ModelConfig) -> jax.Array:
  """Computes the logits [B, T, V] from the residual stream after the last block."""
  if config.norm_final:
    x_BTD = norm(x_BTD, params, "norm_final", config)
  head_VD = params["tok_embed"] if config.tied_head else params["unembed"]
  logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, head_VD)
  if config.padded_vocab_size == config.vocab_size:
    return logits_BTV
  real_V = jnp.arange(config.padded_vocab_size) < config.vocab_size
  return jnp.where(real_V[None, None], logits_BTV, -jnp.inf)
