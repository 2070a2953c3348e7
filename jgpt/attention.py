"""Attention: its definition, faster forms that equal it, and decoding with a cache.

`attention` is what the network calls; `compute.attention` chooses the form. Projections belong to
the block (`model.py`).

Dimensions are those of `jax.nn.dot_product_attention`: B batch, T query positions, S key positions,
N heads, H head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgpt.layers import dropout

NUM_BLOCKS = 4  # of queries, in `attend_in_blocks`


def attention(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  *,
  is_causal: bool = True,
  rate: float = 0.0,
  keys_B: jax.Array | None = None,
  implementation: str = "plain",
) -> jax.Array:
  """Computes softmax(q k^T / sqrt(H)) v.

  Args:
    q_BTNH: queries, floating point.
    k_BSNH: keys, same dtype.
    v_BSNH: values, same dtype.
    is_causal: whether a query sees only the keys at its own and earlier positions; then S = T.
    rate: of dropout on the softmax's probabilities.
    keys_B: of dropout, one for each sequence, consumed; None drops nothing.
    implementation: "blocks" computes causal attention by `attend_in_blocks` where T is a multiple
      of `NUM_BLOCKS`. Every other value is the definition.

  Returns:
    [B, T, N, H] in the dtype of `v_BSNH`.
  """
  T, S = q_BTNH.shape[1], k_BSNH.shape[1]
  if implementation == "blocks" and is_causal and T % NUM_BLOCKS == 0:
    return attend_in_blocks(q_BTNH, k_BSNH, v_BSNH, rate=rate, keys_B=keys_B)
  visible_TS = jnp.tril(jnp.ones((T, S), bool)) if is_causal else jnp.ones((T, S), bool)
  weights_BNTS = attention_weights(q_BTNH, k_BSNH, visible_TS).astype(v_BSNH.dtype)
  return jnp.einsum("BNTS,BSNH->BTNH", dropout(weights_BNTS, rate, keys_B), v_BSNH)


def attention_weights(q_BTNH: jax.Array, k_BSNH: jax.Array, visible_TS: jax.Array) -> jax.Array:
  """Computes softmax(q k^T / sqrt(H)), in float32, or in float64 for float64 inputs.

  Args:
    q_BTNH: queries, floating point.
    k_BSNH: keys, same dtype.
    visible_TS: bool; False removes a key from a query's softmax. Each query must see a key.

  Returns:
    Probabilities [B, N, T, S].

  Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1.
  """
  scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / q_BTNH.shape[-1] ** 0.5
  scores_BNTS = scores_BNTS.astype(jnp.promote_types(scores_BNTS.dtype, jnp.float32))
  return jax.nn.softmax(jnp.where(visible_TS[None, None], scores_BNTS, -jnp.inf))


def attend_in_blocks(
  q_BTNH: jax.Array,
  k_BTNH: jax.Array,
  v_BTNH: jax.Array,
  *,
  rate: float = 0.0,
  keys_B: jax.Array | None = None,
) -> jax.Array:
  """Computes causal attention a block of queries at a time, without the keys after the block.

  With four blocks 5/8 of the T * T scores are computed. The dropout mask is the definition's: it is
  drawn whole. Arguments and result are those of `attention`; T is a multiple of `NUM_BLOCKS`.
  """
  B, T, N, _ = q_BTNH.shape
  size = T // NUM_BLOCKS
  kept_BNTS = dropout(jnp.ones((B, N, T, T), v_BTNH.dtype), rate, keys_B)
  blocks = []
  for begin in range(0, T, size):
    end = begin + size
    visible_TS = jnp.tril(jnp.ones((size, end), bool), k=begin)
    weights_BNTS = attention_weights(q_BTNH[:, begin:end], k_BTNH[:, :end], visible_TS)
    weights_BNTS = weights_BNTS.astype(v_BTNH.dtype) * kept_BNTS[:, :, begin:end, :end]
    blocks.append(jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BTNH[:, :end]))
  return jnp.concatenate(blocks, axis=1)


# --- Decoding ---


class KVCache(NamedTuple):
  """Keys and values of the positions seen so far.

  Heads come before positions, so that what one query reads of a head is contiguous in memory.

  Attributes:
    k: keys, [B, N, S, H]; [L, B, N, S, H] where all layers are stacked.
    v: values, of the same shape.
  """

  k: jax.Array
  v: jax.Array


def attend_to_cache(
  q_BTNH: jax.Array,
  k_BTNH: jax.Array,
  v_BTNH: jax.Array,
  cache: KVCache,
  position: int | jax.Array,
  implementation: str = "plain",
) -> tuple[jax.Array, KVCache]:
  """Adds T positions to the cache and attends from them to themselves and the positions before.

  Args:
    q_BTNH: queries of the new positions.
    k_BTNH: their keys.
    v_BTNH: their values.
    cache: of S positions; entries at `position` + T and later are not read.
    position: int32 scalar, of the first new position; `position` + T <= S. The Python number 0
      means a prompt, which has nothing before it: its T positions attend to each other alone.
    implementation: of a prompt's attention, as in `attention`.

  Returns:
    [B, T, N, H], and the cache with the new positions.
  """
  new = KVCache(jnp.swapaxes(k_BTNH, 1, 2), jnp.swapaxes(v_BTNH, 1, 2))
  cache = jax.tree.map(
    lambda c, x: jax.lax.dynamic_update_slice_in_dim(c, x, position, axis=2), cache, new
  )
  if isinstance(position, int) and position == 0:
    return attention(q_BTNH, k_BTNH, v_BTNH, implementation=implementation), cache
  T, S = q_BTNH.shape[1], cache.k.shape[2]
  visible_TS = jnp.arange(S)[None] <= position + jnp.arange(T)[:, None]
  k_BSNH, v_BSNH = (jnp.swapaxes(c, 1, 2) for c in cache)
  weights_BNTS = attention_weights(q_BTNH, k_BSNH, visible_TS).astype(v_BSNH.dtype)
  return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH), cache
