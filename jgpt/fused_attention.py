"""Fused kernels of causal attention, which keep no scores: splash on TPUs, cuDNN's on GPUs.

`attention.py` calls them where `compute.attention` names one and `find_obstacle` finds none. On
which devices, and whether they compile there, is decided in `devices/compute.py`.

Dimensions are those of `attention.py`.
"""

import jax
import jax.numpy as jnp

# Queries and keys that splash multiplies at a time, the first that divides the positions. As
# compiled, not measured, one layer's attention and its gradient (B 8, T 1024, N 12, H 64, bfloat16)
# took 1.9 M instruction bundles on a v5e with 512, 2.0 M with 1024, 2.8 M with 256. One kernel for
# all three gradients, which this is, took 1.5 M instead of 1.9, and on a v6e 1.0 instead of 1.3.
SPLASH_BLOCKS = (512, 384, 256, 128)


def find_obstacle(
  implementation: str,
  head_dim: int,
  dtype: jnp.dtype,
  *,
  drops: bool = False,
  precision: str | None = None,
) -> str | None:
  """Returns why a kernel does not compute causal attention of this kind; None where it does.

  Args:
    implementation: "cudnn" or "splash".
    head_dim: H.
    dtype: of queries, keys and values.
    drops: whether dropout is applied to the probabilities.
    precision: of float32 products; None is JAX's default.
  """
  name, dtype = {"cudnn": "cuDNN", "splash": "splash"}[implementation], jnp.dtype(dtype)
  dtypes = ("bfloat16", "float16") if implementation == "cudnn" else ("bfloat16", "float32")
  if drops:
    return f"{name} has no dropout on attention that equals the definition's"
  if dtype.name not in dtypes:
    return f"{name} computes in {' or '.join(dtypes)}, not in {dtype.name}"
  if dtype == jnp.float32 and precision is not None:
    return f"{name} has float32 products of JAX's default precision only, not {precision}"
  if implementation == "cudnn" and (head_dim % 8 or head_dim > 256):
    return f"{name} takes head sizes that are multiples of 8 up to 256, not {head_dim}"
  return None


def attend_by_splash(
  q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, *, interpret: bool = False
) -> jax.Array:
  """Computes causal attention by JAX's splash attention for TPUs.

  The compiler cannot divide the kernel over devices: on several of them call it by
  `sharding.call_divided`. Positions are filled up to a multiple of 128 at the end, which no query
  before sees, and cut away.

  Args:
    q_BTNH: queries, bfloat16 or float32.
    k_BTNH: keys, same dtype.
    v_BTNH: values, same dtype.
    interpret: whether to compute the kernel's operations one by one, on any device, which takes
      long: for tests.

  Returns:
    [B, T, N, H] in the dtype of `v_BTNH`.
  """
  # Imported where it is used: it takes 0.2 s.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
  )

  _, T, N, H = q_BTNH.shape
  padded = -(-T // 128) * 128
  size = next(size for size in SPLASH_BLOCKS if padded % size == 0)
  # With the head size last, a TPU fills it up to 128 in memory. As compiled for a v5e and not
  # measured, what stands around the kernels of a layer of GPT-2 took 1.2 M cycles instead of 2.0
  # with the positions last, and 48 MB less were kept (B 8, T 1024, N 12, H 64, bfloat16).
  layouts = splash_attention_kernel.QKVLayout
  layout = layouts.SEQ_MINOR if H % 128 else layouts.HEAD_DIM_MINOR
  kernel = splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((padded, padded))] * N),
    block_sizes=splash_attention_kernel.BlockSizes(
      block_q=size,
      block_kv=size,
      block_kv_compute=size,
      block_q_dkv=size,
      block_kv_dkv=size,
      block_kv_dkv_compute=size,
      use_fused_bwd_kernel=True,
      q_layout=layout,
      k_layout=layout,
      v_layout=layout,
    ),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )

  def arrange(x_BTNH: jax.Array) -> jax.Array:
    x_BNTH = jnp.swapaxes(x_BTNH, 1, 2)
    return jnp.pad(x_BNTH, ((0, 0), (0, 0), (0, padded - T), (0, 0)))

  scale = jnp.asarray(H**-0.5, q_BTNH.dtype)  # which the kernel does not multiply by
  y_BNTH = jax.vmap(kernel)(arrange(q_BTNH * scale), arrange(k_BTNH), arrange(v_BTNH))
  return jnp.swapaxes(y_BNTH[:, :, :T], 1, 2)


def attend_by_cudnn(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array) -> jax.Array:
  """Computes causal attention by cuDNN, on NVIDIA's GPUs of compute capability 8.0 and newer.

  Args:
    q_BTNH: queries, bfloat16 or float16.
    k_BTNH: keys, same dtype.
    v_BTNH: values, same dtype.

  Returns:
    [B, T, N, H] in the dtype of `v_BTNH`.
  """
  return jax.nn.dot_product_attention(
    q_BTNH, k_BTNH, v_BTNH, is_causal=True, implementation="cudnn"
  )


KERNELS = {"cudnn": attend_by_cudnn, "splash": attend_by_splash}
