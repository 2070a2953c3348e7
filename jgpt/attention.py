"""Attention: its definition, faster forms that equal it, and decoding with a cache.

`attention` is what the network calls; `compute.attention` chooses the form. Fused kernels are in
`fused_attention.py`, projections belong to the block (`model.py`).

Queries, keys and values in bfloat16 are multiplied with sums in float32. The softmax is float32,
its probabilities are rounded to bfloat16 for the product with the values.

Dimensions are those of `jax.nn.dot_product_attention`: B batch, T query positions, S key positions,
N heads, H head size.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgpt.fused_attention import KERNELS, find_obstacle
from jgpt.layers import dropout, widen
from jgpt.sharding import call_divided

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
  precision: str | None = None,
) -> jax.Array:
  """Computes softmax(q k^T / sqrt(H)) v.

  Args:
    q_BTNH: queries, floating point.
    k_BSNH: keys, same dtype.
    v_BSNH: values, same dtype.
    is_causal: whether a query sees only the keys at its own and earlier positions; then S = T.
    rate: of dropout on the softmax's probabilities.
    keys_B: of dropout, one for each sequence, consumed; None drops nothing.
    implementation: of causal attention: "blocks" is `attend_in_blocks`; "splash" and "cudnn" are
      the kernels of `fused_attention.py`, and where `find_obstacle` names one, the definition.
      Every other value is the definition.
    precision: of float32 products, as `jax.lax.Precision` takes it; None is JAX's default.

  Returns:
    [B, T, N, H] in the dtype of `v_BSNH`.
  """
  T, S, H = q_BTNH.shape[1], k_BSNH.shape[1], q_BTNH.shape[-1]
  if implementation in KERNELS and is_causal:
    drops = keys_B is not None
    if find_obstacle(implementation, H, v_BSNH.dtype, drops=drops, precision=precision) is None:
      axes = ("batch", None, "heads", None)
      return call_divided(KERNELS[implementation], axes, q_BTNH, k_BSNH, v_BSNH)
  if implementation == "blocks" and is_causal:
    return attend_in_blocks(q_BTNH, k_BSNH, v_BSNH, rate=rate, keys_B=keys_B, precision=precision)
  visible_TS = jnp.tril(jnp.ones((T, S), bool)) if is_causal else jnp.ones((T, S), bool)
  if v_BSNH.dtype == jnp.bfloat16:
    kept_BNTS = _draw_kept((q_BTNH.shape[0], q_BTNH.shape[2], T, S), rate, keys_B)
    return attend_bfloat16(rate, q_BTNH, k_BSNH, v_BSNH, visible_TS, kept_BNTS)
  weights_BNTS = attention_weights(q_BTNH, k_BSNH, visible_TS, precision).astype(v_BSNH.dtype)
  weights_BNTS = dropout(weights_BNTS, rate, keys_B)
  return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH, precision=precision)


def attention_weights(
  q_BTNH: jax.Array, k_BSNH: jax.Array, visible_TS: jax.Array, precision: str | None = None
) -> jax.Array:
  """Computes softmax(q k^T / sqrt(H)), in float32, or in float64 for float64 inputs.

  Args:
    q_BTNH: queries, floating point.
    k_BSNH: keys, same dtype.
    visible_TS: bool; False removes a key from a query's softmax. Each query must see a key.
    precision: of float32 products; None is JAX's default.

  Returns:
    Probabilities [B, N, T, S].

  Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1.
  """
  scores_BNTS = _multiply("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, precision) / q_BTNH.shape[-1] ** 0.5
  return jax.nn.softmax(jnp.where(visible_TS[None, None], scores_BNTS, -jnp.inf))


def attend_in_blocks(
  q_BTNH: jax.Array,
  k_BTNH: jax.Array,
  v_BTNH: jax.Array,
  *,
  rate: float = 0.0,
  keys_B: jax.Array | None = None,
  precision: str | None = None,
) -> jax.Array:
  """Computes causal attention a block of queries at a time, without the keys after the block.

  With four blocks 5/8 of the T * T scores are computed. The dropout mask is the definition's: it is
  drawn whole. Arguments and result are those of `attention`.
  """
  B, T, N, _ = q_BTNH.shape
  is_rounded = v_BTNH.dtype == jnp.bfloat16
  if is_rounded:
    kept_BNTS = _draw_kept((B, N, T, T), rate, keys_B)
  else:
    kept_BNTS = dropout(jnp.ones((B, N, T, T), v_BTNH.dtype), rate, keys_B)
  blocks = []
  size = -(-T // NUM_BLOCKS)  # the last block may be shorter
  for begin in range(0, T, size):
    end = min(begin + size, T)
    visible_TS = jnp.tril(jnp.ones((end - begin, end), bool), k=begin)
    block = q_BTNH[:, begin:end], k_BTNH[:, :end]
    values = v_BTNH[:, :end]
    kept = None if kept_BNTS is None else kept_BNTS[:, :, begin:end, :end]
    if is_rounded:
      blocks.append(attend_bfloat16(rate, *block, values, visible_TS, kept))
      continue
    weights_BNTS = attention_weights(*block, visible_TS, precision).astype(v_BTNH.dtype) * kept
    blocks.append(jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, values, precision=precision))
  return jnp.concatenate(blocks, axis=1)


# --- bfloat16 ---


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_bfloat16(
  rate: float,
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  visible_TS: jax.Array,
  kept_BNTS: jax.Array | None,
) -> jax.Array:
  """Computes attention of bfloat16 arrays, and keeps one number per score for its derivative.

  JAX's own derivative keeps the probabilities in float32 and in bfloat16, and multiplies by float32
  cotangents. Here they are kept in bfloat16, and the operands of each product of the derivative are
  bfloat16 too, as in fused kernels. A layer's attention and its gradient took 42 ms instead of 68
  in blocks on a CPU (B 8, T 256, N 6, H 64).

  Args:
    rate: of dropout.
    q_BTNH: queries, bfloat16.
    k_BSNH: keys, bfloat16.
    v_BSNH: values, bfloat16.
    visible_TS: bool, as in `attention_weights`.
    kept_BNTS: bool, the probabilities that dropout keeps; None keeps all.

  Returns:
    [B, T, N, H], bfloat16.

  Source: Dao et al. 2022, "FlashAttention", appendix B.2.
  """
  return _forward(rate, q_BTNH, k_BSNH, v_BSNH, visible_TS, kept_BNTS)[0]


def _forward(
  rate: float,
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  visible_TS: jax.Array,
  kept_BNTS: jax.Array | None,
) -> tuple[jax.Array, tuple]:
  p_BNTS = attention_weights(q_BTNH, k_BSNH, visible_TS)
  weights_BNTS = _drop(p_BNTS, kept_BNTS, rate).astype(v_BSNH.dtype)
  y_BTNH = _sum_over_keys(weights_BNTS, v_BSNH).astype(v_BSNH.dtype)
  return y_BTNH, (q_BTNH, k_BSNH, v_BSNH, y_BTNH, p_BNTS.astype(v_BSNH.dtype), kept_BNTS)


def _backward(rate: float, saved: tuple, g_BTNH: jax.Array) -> tuple:
  q_BTNH, k_BSNH, v_BSNH, y_BTNH, p_BNTS, kept_BNTS = saved
  dtype = v_BSNH.dtype
  weights_BNTS = _drop(p_BNTS, kept_BNTS, rate).astype(dtype)
  grad_v = _multiply("BNTS,BTNH->BSNH", weights_BNTS, g_BTNH)
  grad_p_BNTS = _drop(_multiply("BTNH,BSNH->BNTS", g_BTNH, v_BSNH), kept_BNTS, rate)
  # sum over S of p * grad_p
  mean_BNT1 = jnp.einsum("BTNH,BTNH->BNT", widen(g_BTNH), widen(y_BTNH))[..., None]
  scale = q_BTNH.shape[-1] ** -0.5
  grad_scores_BNTS = (scale * widen(p_BNTS) * (grad_p_BNTS - mean_BNT1)).astype(dtype)
  grad_q = _sum_over_keys(grad_scores_BNTS, k_BSNH)
  grad_k = _multiply("BNTS,BTNH->BSNH", grad_scores_BNTS, q_BTNH)
  return grad_q.astype(dtype), grad_k.astype(dtype), grad_v.astype(dtype), None, None


attend_bfloat16.defvjp(_forward, _backward)


def _multiply(equation: str, x: jax.Array, y: jax.Array, precision: str | None = None) -> jax.Array:
  """Computes a product with sums and results in float32, or in float64 for float64."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=dtype)


def _sum_over_keys(x_BNTS: jax.Array, y_BSNH: jax.Array) -> jax.Array:
  """Computes the product over S of bfloat16 arrays: [B, T, N, H] in float32."""
  # einsum would exchange the operands, for which jaxlib 0.7.2 has no product on CPUs.
  return jnp.swapaxes(_multiply("BNTS,BSNH->BNTH", x_BNTS, y_BSNH), 1, 2)


def _draw_kept(shape: tuple, rate: float, keys_B: jax.Array | None) -> jax.Array | None:
  """Draws which probabilities dropout keeps; None keeps all."""
  return None if keys_B is None else dropout(jnp.ones(shape), rate, keys_B) > 0


def _drop(x_BNTS: jax.Array, kept_BNTS: jax.Array | None, rate: float) -> jax.Array:
  return x_BNTS if kept_BNTS is None else jnp.where(kept_BNTS, widen(x_BNTS) / (1 - rate), 0)


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
  precision: str | None = None,
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
    precision: of float32 products; None is JAX's default.

  Returns:
    [B, T, N, H], and the cache with the new positions.
  """
  new = KVCache(jnp.swapaxes(k_BTNH, 1, 2), jnp.swapaxes(v_BTNH, 1, 2))
  cache = jax.tree.map(
    lambda c, x: jax.lax.dynamic_update_slice_in_dim(c, x, position, axis=2), cache, new
  )
  if isinstance(position, int) and position == 0:
    y_BTNH = attention(q_BTNH, k_BTNH, v_BTNH, implementation=implementation, precision=precision)
    return y_BTNH, cache
  T, S = q_BTNH.shape[1], cache.k.shape[2]
  visible_TS = jnp.arange(S)[None] <= position + jnp.arange(T)[:, None]
  k_BSNH, v_BSNH = (jnp.swapaxes(c, 1, 2) for c in cache)
  weights_BNTS = attention_weights(q_BTNH, k_BSNH, visible_TS, precision).astype(v_BSNH.dtype)
  if v_BSNH.dtype == jnp.bfloat16:
    return _sum_over_keys(weights_BNTS, v_BSNH).astype(v_BSNH.dtype), cache
  return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH, precision=precision), cache
