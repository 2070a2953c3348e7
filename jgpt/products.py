"""Products of activations by weights, in float32 or with bfloat16 operands.

Pure functions of arrays; `compute.dtype`, `compute.matmul` and `compute.precision` choose the form.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from jgpt.config import ComputeConfig


def find_precision(compute: ComputeConfig) -> str | None:
  """Returns `compute.precision` as JAX's functions take it; None is JAX's default."""
  return None if compute.precision == "default" else compute.precision


def linear(equation: str, x: jax.Array, p: dict, name: str, compute: ComputeConfig) -> jax.Array:
  """Computes `project` by the weights "w_`name`", plus the bias "b_`name`" where there is one."""
  y, bias = project(equation, x, p[f"w_{name}"], compute), p.get(f"b_{name}")
  return y if bias is None else y + bias[None, None]


def project(equation: str, x: jax.Array, w: jax.Array, compute: ComputeConfig) -> jax.Array:
  """Computes `einsum(equation, x, w)`, contracting x's dimensions after batch and position.

  Args:
    equation: contracts the last dimensions of x with the first of w, in their order.
    x: [B, T, ...].
    w: weights.
    compute: with `dtype` "bfloat16" the operands are rounded to bfloat16, also those of the
      gradient's products, and the result and the gradients are float32. With `matmul` "flat" one
      plain product of two matrices is computed: on a CPU einsum's gradients take a tenth of a small
      model's step longer, and a single token's product copies the whole matrix first. Every other
      value is einsum, which keeps sharded dimensions apart.

  Returns:
    [B, T, ...], float32; without "bfloat16" in the operands' dtype.
  """
  if compute.matmul != "flat":
    if compute.dtype == "bfloat16":
      return einsum_bfloat16(equation, x, w)
    return jnp.einsum(equation, x, w, precision=find_precision(compute))
  num = x.ndim - 2
  x_MK = x.reshape(-1, math.prod(w.shape[:num]))
  w_KN = w.reshape(-1, math.prod(w.shape[num:]))
  if compute.dtype == "bfloat16":
    y_MN = einsum_bfloat16("MK,KN->MN", x_MK, w_KN)
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
  return jnp.einsum(equation, x, w, preferred_element_type=jnp.float32)


def _forward(equation: str, x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple]:
  return einsum_bfloat16(equation, x, w), (x, w)


def _backward(equation: str, saved: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, w = saved
  (letters_x, letters_w), result = equation.split("->")[0].split(","), equation.split("->")[1]
  grad_x = einsum_bfloat16(f"{result},{letters_w}->{letters_x}", g, w)
  grad_w = einsum_bfloat16(f"{letters_x},{result}->{letters_w}", x, g)
  return grad_x.astype(x.dtype), grad_w.astype(w.dtype)


einsum_bfloat16.defvjp(_forward, _backward)
