"""Ways to attend.

Responsible for scaled dot-product attention and for the three ways in which a block uses it: in training, while a prompt
is read, and token by token with a cache. Each is a function `attend(memory, q, k, v, drop) -> (y, memory)` that a block
receives, so the network is written once. Not responsible for projections, which belong to the block (`model.py`).

Dimensions are those of `jax.nn.dot_product_attention`: B batch, T query positions, S key positions, N heads, H head size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (place, x) -> x with entries dropped out, or x itself: what `model.make_drop` returns.
Drop = Callable[[str, jax.Array], jax.Array]
# (memory, q_BTNH, k_BTNH, v_BTNH, drop) -> (y_BTNH, memory): what is attended to, and what is kept of it for later.
Attend = Callable[[Any, jax.Array, jax.Array, jax.Array, Drop], tuple[jax.Array, Any]]


def dot_product_attention(
  q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, visible_TS: jax.Array, drop: Drop
) -> jax.Array:
  """Computes softmax(q k^T / sqrt(H)) v; the definition that faster implementations are tested against.

  Args:
    q_BTNH: queries, floating point.
    k_BSNH: keys, same dtype.
    v_BSNH: values, same dtype.
    visible_TS: bool; False removes a key from a query's softmax. Each query must see at least one key.
    drop: applied to the softmax's probabilities, as "attention".

  Returns:
    [B, T, N, H] in the dtype of `v_BSNH`. The softmax is computed in float32, or in float64 for float64 inputs.

  Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1.
  """
  scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / q_BTNH.shape[-1] ** 0.5
  scores_BNTS = scores_BNTS.astype(jnp.promote_types(scores_BNTS.dtype, jnp.float32))
  weights_BNTS = jax.nn.softmax(jnp.where(visible_TS[None, None], scores_BNTS, -jnp.inf))
  return jnp.einsum("BNTS,BSNH->BTNH", drop("attention", weights_BNTS.astype(v_BSNH.dtype)), v_BSNH)


def attend_causally(
  memory: None, q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, drop: Drop
) -> tuple[jax.Array, None]:
  """Attends to this and earlier positions, and keeps nothing: training and evaluation."""
  T = q_BTNH.shape[1]
  return dot_product_attention(q_BTNH, k_BTNH, v_BTNH, jnp.tril(jnp.ones((T, T), bool)), drop), memory


def attend_in_blocks(
  memory: None, q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, drop: Drop, *, num_blocks: int = 4
) -> tuple[jax.Array, None]:
  """Attends like `attend_causally`, a block of queries at a time: what stands after the block is not computed.

  Of T * T scores 5/8 are left with four blocks. What is dropped out is the same.

  Args:
    memory: as in `attend_causally`.
    q_BTNH: queries.
    k_BTNH: keys.
    v_BTNH: values.
    drop: of "attention"; called once, for all blocks.
    num_blocks: divides T.
  """
  B, T, N, _ = q_BTNH.shape
  size = T // num_blocks
  kept_BNTS = drop("attention", jnp.ones((B, N, T, T), v_BTNH.dtype))
  blocks = []
  for begin in range(0, T, size):
    end = begin + size
    visible_TS = jnp.tril(jnp.ones((size, end), bool), k=begin)

    def drop_block(place: str, weights: jax.Array, rows=slice(begin, end), columns=slice(end)) -> jax.Array:
      return weights * kept_BNTS[:, :, rows, columns]

    blocks.append(dot_product_attention(q_BTNH[:, begin:end], k_BTNH[:, :end], v_BTNH[:, :end], visible_TS, drop_block))
  return jnp.concatenate(blocks, axis=1), memory
