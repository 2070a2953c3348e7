"""The network, written once: initial values, logits for training, and one token at a time with a cache.

Responsible for the forward pass as pure functions of parameters and tokens. Computes in the dtype of the parameters. Not
responsible for what the parameters are (`params.py`), how positions attend (`attention.py`) or the loss (`step.py`).

Dimensions: B batch, T query positions, S key positions, N heads, H head size, D width, F feed-forward width, V vocabulary,
L layers.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jgpt.attention import Attend, KVCache, attend_and_keep, attend_causally, attend_to_cache
from jgpt.config import ModelConfig
from jgpt.params import Param, param_table

NORM_EPS = 1e-5


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
    return jnp.stack([one(jax.random.fold_in(name_key, layer)) for layer in range(config.num_layers)])

  return jax.tree_util.tree_map_with_path(draw, param_table(config))


def apply(params: dict, tokens_BT: jax.Array, config: ModelConfig) -> jax.Array:
  """Computes the logits of each position's next token.

  Args:
    params: as `init_params` returns them.
    tokens_BT: int32 ids [B, T], T <= `config.max_seq_len`, each below `config.vocab_size`.
    config: sizes.

  Returns:
    Logits [B, T, V] in the parameters' dtype; V is `config.padded_vocab_size`, and padding is -inf.
  """
  x_BTD = _embed(params, tokens_BT, jnp.arange(tokens_BT.shape[1]))
  x_BTD, _ = _blocks(params, x_BTD, attend_causally, None)
  return _logits(params, x_BTD, config)


def prefill(params: dict, tokens_BT: jax.Array, config: ModelConfig) -> KVCache:
  """Reads a prompt into a new cache; entries at T and after are zero.

  Args:
    params: as `init_params` returns them.
    tokens_BT: int32 ids [B, T], T <= `config.max_seq_len`.
    config: sizes.
  """
  x_BTD = _embed(params, tokens_BT, jnp.arange(tokens_BT.shape[1]))
  _, cache = _blocks(params, x_BTD, attend_and_keep, None)
  room = config.max_seq_len - tokens_BT.shape[1]
  return jax.tree.map(lambda c_LBTNH: jnp.pad(c_LBTNH, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))), cache)


def init_cache(batch_size: int, config: ModelConfig, dtype: jnp.dtype = jnp.float32) -> KVCache:
  """Makes a cache of zeros, [L, B, S, N, H] with S = `config.max_seq_len`."""
  shape = (config.num_layers, batch_size, config.max_seq_len, config.num_heads, config.head_dim)
  return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def decode_step(
  params: dict, tokens_B: jax.Array, cache: KVCache, position: jax.Array, config: ModelConfig
) -> tuple[jax.Array, KVCache]:
  """Computes the logits after one more token.

  Args:
    params: as `init_params` returns them.
    tokens_B: int32 ids [B], the tokens at `position`.
    cache: keys and values of the positions before.
    position: int32 scalar, 0 <= position < `config.max_seq_len`.
    config: sizes.

  Returns:
    Logits [B, V] as from `apply` at that position, and the cache with the position added.
  """
  x_BTD = _embed(params, tokens_B[:, None], jnp.asarray(position)[None])
  x_BTD, cache = _blocks(params, x_BTD, attend_to_cache(position), cache)
  return _logits(params, x_BTD, config)[:, 0], cache


# --- The parts ---


def rms_norm(x_BTD: jax.Array) -> jax.Array:
  """Divides by the root mean square over the last dimension: x / sqrt(mean(x^2) + 1e-5), without a gain.

  Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
  """
  return x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD**2, axis=-1, keepdims=True) + NORM_EPS)


def block(memory: Any, x_BTD: jax.Array, p: dict, attend: Attend) -> tuple[jax.Array, Any]:
  """One transformer block, normalised before attention and before the MLP.

  Args:
    memory: what `attend` reads, for this layer.
    x_BTD: the residual stream.
    p: this layer's parameters, the table's "blocks".
    attend: decides what is attended to and what is kept.

  Returns:
    The residual stream after the block, and what `attend` kept.
  """
  qkv_BTCNH = jnp.einsum("BTD,DCNH->BTCNH", rms_norm(x_BTD), p["w_qkv"])  # C: query, key, value; one product
  y_BTNH, memory = attend(memory, *jnp.unstack(qkv_BTCNH, axis=2))
  x_BTD = x_BTD + jnp.einsum("BTNH,NHD->BTD", y_BTNH, p["w_out"])
  up_BTF = jax.nn.relu(jnp.einsum("BTD,DF->BTF", rms_norm(x_BTD), p["w_up"]))
  return x_BTD + jnp.einsum("BTF,FD->BTD", up_BTF, p["w_down"]), memory


def _embed(params: dict, tokens_BT: jax.Array, positions_T: jax.Array) -> jax.Array:
  return rms_norm(params["tok_embed"][tokens_BT] + params["pos_embed"][positions_T][None])


def _blocks(params: dict, x_BTD: jax.Array, attend: Attend, memory: Any) -> tuple[jax.Array, Any]:
  """Runs the layers one after the other; what each keeps comes back stacked, as it went in."""

  def layer(x_BTD: jax.Array, p_and_memory: tuple) -> tuple[jax.Array, Any]:
    p, memory = p_and_memory
    return block(memory, x_BTD, p, attend)

  return jax.lax.scan(layer, x_BTD, (params["blocks"], memory))


def _logits(params: dict, x_BTD: jax.Array, config: ModelConfig) -> jax.Array:
  logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, params["unembed"])
  if config.padded_vocab_size == config.vocab_size:
    return logits_BTV
  real_V = jnp.arange(config.padded_vocab_size) < config.vocab_size
  return jnp.where(real_V[None, None], logits_BTV, -jnp.inf)
