"""Products of activations by weights, in float32 or with bfloat16 operands.

Pure functions of arrays; `compute.dtype`, `compute.matmul` and `compute.precision` choose the form.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint

from jgpt.config import ComputeConfig
from jgpt.sharding import Divided, multiply_divided

TILE = 64  # columns, of which XLA:CPU computes as many at a time
MAX_TILES = 64  # in one product: with 786 XLA:CPU chooses another kind of product


@struct.dataclass
class Tiles:
  """Weights [K, N] in pieces of `TILE` columns, each of which lies in memory by itself.

  XLA:CPU multiplies one row by bfloat16 weights in two thirds of the time of float32's, if it need
  not arrange them first; it takes longer than float32's otherwise.

  Attributes:
    tiles: bfloat16 [N / TILE, K, TILE].
    shape: of the weights as they were, static.
  """

  tiles: jax.Array
  shape: tuple[int, ...] = struct.field(pytree_node=False)


def find_precision(compute: ComputeConfig) -> str | None:
  """Returns `compute.precision` as JAX's functions take it; None is JAX's default."""
  return None if compute.precision == "default" else compute.precision


def linear(equation: str, x: jax.Array, p: dict, name: str, compute: ComputeConfig) -> jax.Array:
  """Computes `project` by the weights "w_`name`", plus the bias "b_`name`" where there is one."""
  y, bias = project(equation, x, p[f"w_{name}"], compute), p.get(f"b_{name}")
  return y if bias is None else y + bias[None, None]


def project(
  equation: str, x: jax.Array, w: jax.Array | Tiles | Divided, compute: ComputeConfig
) -> jax.Array:
  """Computes `einsum(equation, x, w)`, contracting x's dimensions after batch and position.

  Args:
    equation: contracts the last dimensions of x with the first of w, in their order.
    x: [B, T, ...].
    w: weights; those in tiles have one row of x, divided ones are gathered.
    compute: with `dtype` "bfloat16" the operands are rounded to bfloat16, also those of the
      gradient's products, and the result and the gradients are float32. With `matmul` "flat" one
      plain product of two matrices is computed: on a CPU einsum's gradients take a tenth of a small
      model's step longer, and a single token's product copies the whole matrix first. Every other
      value is einsum, which keeps sharded dimensions apart.

  Returns:
    [B, T, ...], float32; without "bfloat16" in the operands' dtype.
  """
  if isinstance(w, Divided):
    return multiply_divided(lambda x, w: project(equation, x, w, compute), w, x)
  if isinstance(w, Tiles):
    num = x.ndim - 2
    return multiply_tiles(x.ravel(), w).reshape(*x.shape[:2], *w.shape[num:])
  if compute.matmul != "flat":
    if compute.dtype == "bfloat16":
      return einsum_bfloat16(equation, x, w)
    return jnp.einsum(equation, x, w, precision=find_precision(compute))
  num = x.ndim - 2
  x_MK = x.reshape(-1, math.prod(w.shape[:num]))
  w_KN = w.reshape(-1, math.prod(w.shape[num:]))
  if compute.dtype == "bfloat16":
    y_MN = multiply_flat("MK,KN->MN", x_MK, w_KN)
  else:
    y_MN = jnp.matmul(x_MK, w_KN, precision=find_precision(compute))
  return y_MN.reshape(*x.shape[:2], *w.shape[num:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_bfloat16(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
  """Computes `einsum(equation, x, w)` of operands rounded to bfloat16, summed in float32.

  The gradient's products round the cotangent to bfloat16 as well. Their results are float32, which
  JAX's own rule would round to bfloat16.

  Args:
    equation: without repeated or summed-out letters in one operand.
    x: floating point.
    w: floating point.

  Returns:
    float32.
  """
  x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
  product = partial(jnp.einsum, equation, preferred_element_type=jnp.float32)
  if jax.__version_info__ >= (0, 8):
    return product(x, w)
  # XLA:CPU of jaxlib 0.7.2 lacks some of these products; of float32 operands they are the same.
  return jax.lax.platform_dependent(
    x, w, cpu=lambda x, w: product(x.astype(jnp.float32), w.astype(jnp.float32)), default=product
  )


def _forward(equation: str, x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple]:
  return einsum_bfloat16(equation, x, w), (x, w)


def _backward(equation: str, saved: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, w = saved
  (letters_x, letters_w), result = equation.split("->")[0].split(","), equation.split("->")[1]
  grad_x = einsum_bfloat16(f"{result},{letters_w}->{letters_x}", g, w)
  grad_w = einsum_bfloat16(f"{letters_x},{result}->{letters_w}", x, g)
  return grad_x.astype(x.dtype), grad_w.astype(w.dtype)


einsum_bfloat16.defvjp(_forward, _backward)


# --- On CPUs ---


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply_flat(equation: str, x_MK: jax.Array, w: jax.Array) -> jax.Array:
  """Computes `einsum_bfloat16` of two matrices as XLA:CPU is quick at it.

  Weights are rounded once, for the forward and the backward pass. With AVX512_BF16 all three
  products take half of the time of float32's.

  Args:
    equation: "MK,KN->MN" or "MK,NK->MN".
    x_MK: floating point.
    w: floating point, [K, N] or [N, K] as the equation says.

  Returns:
    float32 [M, N].
  """
  return _forward_flat(equation, x_MK, w)[0]


def _forward_flat(equation: str, x_MK: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple]:
  rounded = x_MK.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
  like = jnp.zeros((), x_MK.dtype), jnp.zeros((), w.dtype)  # of which only the dtypes are read
  M, x = x_MK.shape[0], rounded[0]
  # XLA:CPU multiplies a single row by code of its own, which takes ten times as long.
  x = jnp.pad(x, ((0, 1), (0, 0))) if M == 1 else x
  y_MN = jnp.einsum(equation, x, rounded[1], preferred_element_type=jnp.float32)[:M]
  return y_MN, (*rounded, *like)


def _backward_flat(equation: str, saved: tuple, g_MN: jax.Array) -> tuple[jax.Array, jax.Array]:
  x_MK, w, like_x, like_w = saved
  letters_w, g_MN = equation[3:5], g_MN.astype(jnp.bfloat16)
  grad_x = jnp.einsum(f"MN,{letters_w}->MK", g_MN, w, preferred_element_type=jnp.float32)
  grad_w = contract_rows(x_MK, g_MN) if letters_w == "KN" else contract_rows(g_MN, x_MK)
  return grad_x.astype(like_x.dtype), grad_w.astype(like_w.dtype)


multiply_flat.defvjp(_forward_flat, _backward_flat)


def contract_rows(a_MK: jax.Array, b_MN: jax.Array) -> jax.Array:
  """Computes a^T b of two bfloat16 matrices with as many rows, summed in float32: [K, N].

  XLA:CPU multiplies in bfloat16 only what lies in memory row by row; what is transposed by its
  strides alone it multiplies in float32. So a is transposed in memory.
  """
  return jnp.matmul(transpose_in_memory(a_MK), b_MN, preferred_element_type=jnp.float32)


def transpose_in_memory(x: jax.Array, axes: tuple[int, ...] = (1, 0)) -> jax.Array:
  """Returns a transpose that lies row by row in memory."""
  return with_layout_constraint(x.transpose(axes), Layout(tuple(range(x.ndim))))


def tile_weights(w: jax.Array, num: int) -> Tiles | jax.Array:
  """Arranges weights in tiles; those whose columns `TILE` does not divide stay as they are.

  Args:
    w: bfloat16.
    num: of its dimensions, which a product sums over.
  """
  w_KN = w.reshape(math.prod(w.shape[:num]), -1)
  K, N = w_KN.shape
  if N % TILE:
    return w
  return Tiles(transpose_in_memory(w_KN.reshape(K, N // TILE, TILE), (1, 0, 2)), w.shape)


def tile_head(head_VD: jax.Array) -> Tiles | jax.Array:
  """Arranges the weights of a head, bfloat16, in tiles, as `tile_weights` does those of others."""
  V, D = head_VD.shape
  if V % TILE:
    return head_VD
  return Tiles(transpose_in_memory(head_VD.reshape(V // TILE, TILE, D), (0, 2, 1)), (D, V))


def multiply_tiles(x_K: jax.Array, w: Tiles) -> jax.Array:
  """Computes a vector times weights in tiles, summed in float32: [N]."""
  P, K, _ = w.tiles.shape
  # Two rows: of a single one XLA:CPU would make a product of another kind.
  rows_2K = jnp.pad(x_K.astype(jnp.bfloat16)[None], ((0, 1), (0, 0)))
  pieces = []
  for begin in range(0, P, MAX_TILES):
    tiles = w.tiles[begin : begin + MAX_TILES]
    rows_P2K = jnp.broadcast_to(rows_2K[None], (len(tiles), 2, K))
    y_P2Q = jnp.matmul(rows_P2K, tiles, preferred_element_type=jnp.float32)
    pieces.append(y_P2Q[:, 0].ravel())
  return jnp.concatenate(pieces)
