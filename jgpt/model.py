"""The network, written once: initial values, and the logits of each position's next token.

Pure functions of parameters and tokens. What the parameters are is in `params.py`, the parts of a
block are in `layers.py`, `products.py` and `attention.py`, logits and loss in
`loss.py`, decoding with a cache in `generate.py`.

Blocks are stacked (a dict of arrays with the layers in front, run by `lax.scan`) or a list with a
dict for each layer (then they are written out one after the other). Both are the same network.

Dimensions: B batch, T query positions, S key positions, N heads, H head size, D width, F
feed-forward width, V vocabulary, L layers, C one of query, key and value.
"""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgpt.attention import KVCache, attend_to_cache, attention, attention_weights
from jgpt.config import ComputeConfig, Experiment, ModelConfig
from jgpt.config.experiment import DROPOUT_PLACES, PLAIN
from jgpt.layers import (
  activate,
  dropout,
  dropout_at,
  fold_in_rows,
  norm,
  rms_norm,
  sinusoidal_positions,
  store,
  widen,
)
from jgpt.loss import compute_logits
from jgpt.params import Param, param_table
from jgpt.products import find_precision, linear
from jgpt.sharding import constrain, defer_gather, gather, with_auto_axes

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


@with_auto_axes("tokens_BT")
def apply(
  params: dict,
  tokens_BT: jax.Array,
  config: ModelConfig,
  compute: ComputeConfig = PLAIN,
  keys_B: jax.Array | None = None,
) -> jax.Array:
  """Computes the logits of each position's next token.

  Args:
    params: as `init_params` returns them; blocks stacked or a list.
    tokens_BT: int32 ids [B, T], T <= `config.max_seq_len`, each below `config.vocab_size`.
    config: of the network.
    compute: how to compute; what is left at "auto" is computed plainly.
    keys_B: of dropout, one for each sequence, consumed; None drops nothing, as in evaluation.

  Returns:
    Logits [B, T, V], float32, or float64 for float64 parameters; V is `config.padded_vocab_size`,
    padding is -inf.
  """
  x_BTD = run_network(params, tokens_BT, config, compute, keys_B)
  return compute_logits(x_BTD, find_head(params, config, compute), config, compute)


class Trace(NamedTuple):
  """What the network computes on the way to its logits.

  Attributes:
    residual_LBTD: the residual stream before the first block and after each: [L + 1, B, T, D], in
      the dtype of `compute.dtype`.
    attention_LBNTS: the softmax's probabilities [L, B, N, T, S], S = T, float32 (float64 for
      float64 parameters): what query position T reads from key position S, 0 where S > T.
    logits_BTV: as `apply` returns them.
  """

  residual_LBTD: jax.Array
  attention_LBNTS: jax.Array
  logits_BTV: jax.Array


@with_auto_axes(None)
def trace(params: dict, tokens_BT: jax.Array, experiment: Experiment) -> Trace:
  """Computes the logits of each position's next token and what led to them, without dropout.

  The blocks are those of `apply`, run one after the other; attention's probabilities are computed
  by its definition from each block's queries and keys, whatever form `compute.attention` names.

  Args:
    params: as `init_params` returns them; blocks stacked or a list.
    tokens_BT: int32 ids [B, T], T <= `max_seq_len`, each below `vocab_size`.
    experiment: `model` and `compute` are read; a static argument under jit.

  Example:
    >>> run = jgpt.open_run("runs/names")
    >>> tokens = jnp.asarray([run.tokenizer.encode_document("emma")[:-1]])
    >>> found = model.trace(run.params, tokens, run.experiment)
    >>> found.attention_LBNTS[0, 0, 3]  # of head 3 in the first layer
  """
  config, compute = experiment.model, experiment.compute
  x_BTD = embed(params, tokens_BT, 0, config, compute)
  blocks, T = params["blocks"], tokens_BT.shape[1]
  if isinstance(blocks, dict):
    blocks = [jax.tree.map(lambda w, i=i: w[i], blocks) for i in range(config.num_layers)]
  residual, weights = [x_BTD], []
  for p in blocks:
    q_BTNH, k_BTNH, _ = project_qkv(x_BTD, p, config, compute)
    visible_TS = jnp.tril(jnp.ones((T, T), bool))
    weights.append(attention_weights(q_BTNH, k_BTNH, visible_TS, find_precision(compute)))
    x_BTD, _ = block(x_BTD, p, config, compute)
    residual.append(x_BTD)
  logits_BTV = predict_logits(params, x_BTD, config, compute)
  return Trace(jnp.stack(residual), jnp.stack(weights), logits_BTV)


def predict_logits(
  params: dict, x_BTD: jax.Array, config: ModelConfig, compute: ComputeConfig = PLAIN
) -> jax.Array:
  """Computes the logits [B, T, V] from the residual stream after the last block."""
  x_BTD = finish_blocks(params, x_BTD, config, compute)
  return compute_logits(x_BTD, find_head(params, config, compute), config, compute)


def run_network(
  params: dict,
  tokens_BT: jax.Array,
  config: ModelConfig,
  compute: ComputeConfig = PLAIN,
  keys_B: jax.Array | None = None,
) -> jax.Array:
  """Computes what the head multiplies: the residual stream [B, T, D] after the last norm.

  Arguments are those of `apply`.
  """
  x_BTD = embed(params, tokens_BT, 0, config, compute, keys_B)
  x_BTD, _ = run_blocks(params, x_BTD, config, compute, keys_B)
  return finish_blocks(params, x_BTD, config, compute)


@jax.named_scope("embed")
def embed(
  params: dict,
  tokens_BT: jax.Array,
  position: int | jax.Array,
  config: ModelConfig,
  compute: ComputeConfig = PLAIN,
  keys_B: jax.Array | None = None,
) -> jax.Array:
  """Computes the residual stream [B, T, D] before the first block.

  `position` is the first token's.
  """
  # The width is divided as the tables' is: what moves between devices is the sum, not the tables.
  divided = ("rows", None, "embed")
  table_VD = constrain(params["tok_embed"], ("vocab", "embed"))
  x_BTD = table_VD[constrain(tokens_BT, divided[:2])]
  x_BTD = widen(constrain(x_BTD, divided))
  if config.scale_embed:
    x_BTD = x_BTD * config.d_model**0.5
  if config.positions == "sinusoidal":
    table_SD = jnp.asarray(sinusoidal_positions(config.max_seq_len, config.d_model), x_BTD.dtype)
  else:
    table_SD = params["pos_embed"]
  # A slice and not a gather, whose gradient is a scatter: a tenth of a step of `names`.
  positions_TD = jax.lax.dynamic_slice_in_dim(table_SD, position, tokens_BT.shape[1])
  x_BTD = constrain(x_BTD + positions_TD[None], divided)
  x_BTD = constrain(x_BTD, ("batch", None, None))
  x_BTD = dropout(x_BTD, *dropout_at("embedding", config, keys_B))
  return store(rms_norm(x_BTD) if config.norm_embed else x_BTD, compute)


def run_blocks(
  params: dict,
  x_BTD: jax.Array,
  config: ModelConfig,
  compute: ComputeConfig = PLAIN,
  keys_B: jax.Array | None = None,
  cache: Cache | None = None,
  position: int | jax.Array = 0,
) -> tuple[jax.Array, Cache | None]:
  """Runs the blocks one after the other.

  Args:
    params: only "blocks" is read.
    x_BTD: the residual stream after `embed`.
    config: of the network.
    compute: how to compute.
    keys_B: of dropout, one for each sequence, consumed; None drops nothing.
    cache: keys and values before `position`, arranged as the blocks are; None attends causally.
    position: of the first of the T positions, where there is a cache.

  Returns:
    The residual stream after the last block, and the cache with the T positions.
  """
  blocks = params["blocks"]

  def layer(x_BTD: jax.Array, inputs: tuple) -> tuple[jax.Array, KVCache | None]:
    p, number, cache = inputs
    if cache is None:  # a block that is computed again gathers again; otherwise its products do
      p = (gather if compute.remat == "block" else defer_gather)(p, config, compute)
    # Folded with numbers that no dropout place has, so that no layer's key is a place's key.
    keys = None if keys_B is None else fold_in_rows(keys_B, len(DROPOUT_PLACES) + number)
    x_BTD, cache = block(x_BTD, p, config, compute, keys, cache, position)
    return constrain(x_BTD, ("batch", None, None)), cache

  if compute.remat == "block" and cache is None:
    # Under a scan nothing can be merged with what is computed again.
    layer = jax.checkpoint(layer, prevent_cse=isinstance(blocks, list))
  if isinstance(blocks, dict):
    return jax.lax.scan(layer, x_BTD, (blocks, jnp.arange(config.num_layers), cache))
  caches = []
  for i, p in enumerate(blocks):
    with jax.named_scope(f"layer_{i}"):
      x_BTD, new = layer(x_BTD, (p, i, None if cache is None else cache[i]))
    caches.append(new)
  return x_BTD, None if cache is None else caches


def block(
  x_BTD: jax.Array,
  p: dict,
  config: ModelConfig,
  compute: ComputeConfig = PLAIN,
  keys_B: jax.Array | None = None,
  cache: KVCache | None = None,
  position: int | jax.Array = 0,
) -> tuple[jax.Array, KVCache | None]:
  """Computes one transformer block, normalised before attention and before the MLP.

  Args:
    x_BTD: the residual stream.
    p: the parameters of this layer.
    config: of the network.
    compute: how to compute.
    keys_B: of dropout in this layer, one for each sequence, consumed; None drops nothing.
    cache: this layer's keys and values before `position`; None attends causally.
    position: of the first of the T positions, where there is a cache.

  Returns:
    The residual stream after the block, and the cache with the T positions.
  """
  with jax.named_scope("attention"):
    q_BTNH, k_BTNH, v_BTNH = project_qkv(x_BTD, p, config, compute)
    form = {"implementation": compute.attention, "precision": find_precision(compute)}
    if cache is None:
      rate, drop_keys_B = dropout_at("attention", config, keys_B)
      y_BTNH = attention(q_BTNH, k_BTNH, v_BTNH, rate=rate, keys_B=drop_keys_B, **form)
    else:
      y_BTNH, cache = attend_to_cache(q_BTNH, k_BTNH, v_BTNH, cache, position, **form)
    y_BTD = linear("BTNH,NHD->BTD", y_BTNH, p, "out", compute)
    x_BTD = store(x_BTD + dropout(y_BTD, *dropout_at("attention_out", config, keys_B)), compute)

  with jax.named_scope("mlp"):
    h_BTD = norm(x_BTD, p, "norm_mlp", config, compute)
    h_BTF = store(linear("BTD,DF->BTF", h_BTD, p, "up", compute), compute)
    h_BTF = activate(h_BTF, config, compute)
    h_BTF = store(dropout(h_BTF, *dropout_at("activation", config, keys_B)), compute)
    y_BTD = linear("BTF,FD->BTD", h_BTF, p, "down", compute)
    return store(x_BTD + dropout(y_BTD, *dropout_at("mlp_out", config, keys_B)), compute), cache


def project_qkv(
  x_BTD: jax.Array, p: dict, config: ModelConfig, compute: ComputeConfig = PLAIN
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes a block's queries, keys and values, [B, T, N, H] each, from the residual stream."""
  h_BTD = norm(x_BTD, p, "norm_attn", config, compute)
  qkv_BTCNH = store(linear("BTD,DCNH->BTCNH", h_BTD, p, "qkv", compute), compute)
  return jnp.unstack(qkv_BTCNH, axis=2)


def finish_blocks(
  params: dict, x_BTD: jax.Array, config: ModelConfig, compute: ComputeConfig = PLAIN
) -> jax.Array:
  """Applies the norm after the last block, where the network has one."""
  if not config.norm_final:
    return x_BTD
  return norm(x_BTD, params, "norm_final", config, compute)


def find_head(params: dict, config: ModelConfig, compute: ComputeConfig = PLAIN) -> jax.Array:
  """Returns the weights of the head [V, D]: the token embedding's where they are tied."""
  name = "tok_embed" if config.tied_head else "unembed"
  return gather({name: params[name]}, config, compute)[name]
