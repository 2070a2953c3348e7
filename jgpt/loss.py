"""From the residual stream after the network's last norm to the logits and their cross-entropy.

Pure functions of arrays. The mean over a batch is in `step.py`, over a corpus in `evaluation.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from jgpt.config import ComputeConfig, ModelConfig
from jgpt.config.experiment import PLAIN
from jgpt.products import Tiles, einsum_bfloat16, find_precision, multiply_flat, multiply_tiles


@jax.named_scope("head")
def compute_logits(
  x_BTD: jax.Array,
  head_VD: jax.Array | Tiles,
  config: ModelConfig,
  compute: ComputeConfig = PLAIN,
) -> jax.Array:
  """Computes the logits of each position's next token.

  Args:
    x_BTD: floating point.
    head_VD: weights of the head; V is `config.padded_vocab_size`. In tiles for one position.
    config: of the network.
    compute: how to compute.

  Returns:
    [B, T, V], float32, or float64 for float64 weights; padding is -inf.
  """
  if isinstance(head_VD, Tiles):
    logits_BTV = multiply_tiles(x_BTD.ravel(), head_VD)[None, None]
  elif compute.dtype == "bfloat16" and compute.matmul == "flat":
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    logits_BTV = multiply_flat("MK,NK->MN", x_MD, head_VD).reshape(*x_BTD.shape[:2], -1)
  elif compute.dtype == "bfloat16":
    logits_BTV = einsum_bfloat16("BTD,VD->BTV", x_BTD, head_VD)
  else:
    precision = find_precision(compute)
    logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, head_VD, precision=precision)
  if config.padded_vocab_size == config.vocab_size:
    return logits_BTV
  real_V = jnp.arange(config.padded_vocab_size) < config.vocab_size
  return jnp.where(real_V[None, None], logits_BTV, -jnp.inf)


@jax.named_scope("loss")
def sum_nats(
  x_BTD: jax.Array,
  head_VD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  config: ModelConfig,
  compute: ComputeConfig = PLAIN,
) -> jax.Array:
  """Computes the sum of w * -log p(target) over the positions of a batch.

  Args:
    x_BTD: floating point.
    head_VD: weights of the head; V is `config.padded_vocab_size`.
    targets_BT: int32 ids.
    weights_BT: float32, of each target.
    config: of the network.
    compute: how to compute.

  Returns:
    Scalar, nats; float32, or float64 for float64 weights.
  """
  if compute.loss_chunks in (1, "auto"):
    logits_BTV = compute_logits(x_BTD, head_VD, config, compute)
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    return jnp.sum(nats_BT * weights_BT)
  x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
  return sum_in_chunks(config, compute, x_MD, head_VD, targets_BT.ravel(), weights_BT.ravel())


# --- In chunks ---


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_in_chunks(
  config: ModelConfig,
  compute: ComputeConfig,
  x_MD: jax.Array,
  head_VD: jax.Array,
  targets_M: jax.Array,
  weights_M: jax.Array,
) -> jax.Array:
  """Computes `sum_nats` of M tokens in `compute.loss_chunks` pieces, one after the other.

  The logits of one piece are in memory at a time. Where gradients are wanted, those of a piece are
  computed from its logits in the forward pass, so that nothing is computed twice.

  Args:
    config: of the network.
    compute: how to compute; `loss_chunks` is a number.
    x_MD: floating point.
    head_VD: weights of the head.
    targets_M: int32 ids.
    weights_M: of each target.

  Returns:
    Scalar, nats.
  """

  def add(total: jax.Array, chunk: tuple) -> tuple[jax.Array, None]:
    x_CD, targets_C, weights_C = chunk
    nats_C, _ = _compare(_compute_matrix(config, compute, x_CD, head_VD), targets_C)
    return total + jnp.sum(nats_C * weights_C), None

  chunks = _split(compute.loss_chunks, x_MD, targets_M, weights_M)
  return jax.lax.scan(add, jnp.zeros((), head_VD.dtype), chunks)[0]


def _forward(
  config: ModelConfig,
  compute: ComputeConfig,
  x_MD: jax.Array,
  head_VD: jax.Array,
  targets_M: jax.Array,
  weights_M: jax.Array,
) -> tuple[jax.Array, tuple]:
  """Computes the sum, and what it changes by x, head and weights."""
  # Of a copy in float32 the gradient is not rounded before it is scaled.
  x = x_MD.astype(jnp.promote_types(x_MD.dtype, jnp.float32))

  def add(carry: tuple, chunk: tuple) -> tuple[tuple, tuple]:
    total, grad_VD = carry
    x_CD, targets_C, weights_C = chunk
    logits_CV, pull_back = jax.vjp(partial(_compute_matrix, config, compute), x_CD, head_VD)
    nats_C, log_p_CV = _compare(logits_CV, targets_C)
    is_target_CV = jnp.arange(logits_CV.shape[1])[None] == targets_C[:, None]
    grad_CD, grad = pull_back((jnp.exp(log_p_CV) - is_target_CV) * weights_C[:, None])
    return (total + jnp.sum(nats_C * weights_C), grad_VD + grad), (grad_CD, nats_C)

  chunks = _split(compute.loss_chunks, x, targets_M, weights_M)
  start = jnp.zeros((), head_VD.dtype), jnp.zeros_like(head_VD)
  (total, grad_VD), (grads, nats) = jax.lax.scan(add, start, chunks)
  M, D = x.shape
  like = jnp.zeros((), x_MD.dtype)  # of which only the dtype is read
  return total, (grads.reshape(-1, D)[:M], grad_VD, nats.ravel()[:M], like)


def _backward(config: ModelConfig, compute: ComputeConfig, saved: tuple, g: jax.Array) -> tuple:
  grad_MD, grad_VD, nats_M, like = saved
  return (g * grad_MD).astype(like.dtype), g * grad_VD, None, g * nats_M


sum_in_chunks.defvjp(_forward, _backward)


def _split(num: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Divides dimension 0 into `num` pieces of one length, the last filled up with zeros."""
  size = -(-arrays[0].shape[0] // num)

  def split(x: jax.Array) -> jax.Array:
    padding = [(0, num * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(num, size, *x.shape[1:])

  return tuple(map(split, arrays))


def _compute_matrix(
  config: ModelConfig, compute: ComputeConfig, x_CD: jax.Array, head_VD: jax.Array
) -> jax.Array:
  return compute_logits(x_CD[None], head_VD, config, compute)[0]


def _compare(logits_CV: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes -log p of the targets, and log p of every token."""
  log_p_CV = jax.nn.log_softmax(logits_CV)
  return -jnp.take_along_axis(log_p_CV, targets_C[:, None], axis=1)[:, 0], log_p_CV
