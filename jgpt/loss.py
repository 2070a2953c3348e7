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
from jgpt.sharding import constrain


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
  logits_BTV = constrain(logits_BTV, ("batch", None, "vocab"))
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
  return sum_in_chunks(config, compute, x_BTD, head_VD, targets_BT, weights_BT)


# --- In chunks ---


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_in_chunks(
  config: ModelConfig,
  compute: ComputeConfig,
  x_BTD: jax.Array,
  head_VD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
) -> jax.Array:
  """Computes `sum_nats` in `compute.loss_chunks` pieces, one after the other.

  The logits of one piece are in memory at a time. Where gradients are wanted, those of a piece are
  computed from its logits in the forward pass, so that nothing is computed twice. A piece has some
  positions of every sequence, at least one, so that it lies on all devices.

  Args:
    config: of the network.
    compute: how to compute; `loss_chunks` is a number.
    x_BTD: floating point.
    head_VD: weights of the head.
    targets_BT: int32 ids.
    weights_BT: of each target.

  Returns:
    Scalar, nats.
  """

  def add(total: jax.Array, chunk: tuple) -> tuple[jax.Array, None]:
    x_BCD, targets_BC, weights_BC = chunk
    nats_BC, _ = _compare(compute_logits(x_BCD, head_VD, config, compute), targets_BC)
    return total + jnp.sum(nats_BC * weights_BC), None

  chunks = _split(compute.loss_chunks, x_BTD, targets_BT, weights_BT)
  return jax.lax.scan(add, jnp.zeros((), head_VD.dtype), chunks)[0]


def _forward(
  config: ModelConfig,
  compute: ComputeConfig,
  x_BTD: jax.Array,
  head_VD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
) -> tuple[jax.Array, tuple]:
  """Computes the sum, and what it changes by x, head and weights."""
  # Of a copy in float32 the gradient is not rounded before it is scaled.
  x = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))

  def add(carry: tuple, chunk: tuple) -> tuple[tuple, tuple]:
    total, grad_VD = carry
    x_BCD, targets_BC, weights_BC = chunk
    compute_part = partial(compute_logits, config=config, compute=compute)
    logits_BCV, pull_back = jax.vjp(compute_part, x_BCD, head_VD)
    nats_BC, log_p_BCV = _compare(logits_BCV, targets_BC)
    is_target_BCV = jnp.arange(logits_BCV.shape[2])[None, None] == targets_BC[..., None]
    grad_BCD, grad = pull_back((jnp.exp(log_p_BCV) - is_target_BCV) * weights_BC[..., None])
    grad_VD = constrain(grad_VD + grad, ("vocab", "embed"))
    return (total + jnp.sum(nats_BC * weights_BC), grad_VD), (grad_BCD, nats_BC)

  chunks = _split(compute.loss_chunks, x, targets_BT, weights_BT)
  start = jnp.zeros((), head_VD.dtype), jnp.zeros_like(head_VD)
  (total, grad_VD), parts = jax.lax.scan(add, start, chunks)
  grad_BTD, nats_BT = (_join(part, x.shape[1]) for part in parts)
  like = jnp.zeros((), x_BTD.dtype)  # of which only the dtype is read
  return total, (grad_BTD, grad_VD, nats_BT, like)


def _backward(config: ModelConfig, compute: ComputeConfig, saved: tuple, g: jax.Array) -> tuple:
  grad_BTD, grad_VD, nats_BT, like = saved
  return (g * grad_BTD).astype(like.dtype), g * grad_VD, None, g * nats_BT


sum_in_chunks.defvjp(_forward, _backward)


def _split(num: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Divides positions into at most `num` pieces of one length, the last filled up with zeros."""
  T = arrays[0].shape[1]
  size = -(-T // num)
  num = -(-T // size)

  def split(x_BT: jax.Array) -> jax.Array:
    padding = [(0, 0), (0, num * size - T)] + [(0, 0)] * (x_BT.ndim - 2)
    x_BPC = jnp.pad(x_BT, padding).reshape(len(x_BT), num, size, *x_BT.shape[2:])
    return x_BPC.swapaxes(0, 1)

  return tuple(map(split, arrays))


def _join(x_PBC: jax.Array, T: int) -> jax.Array:
  """Joins pieces of positions."""
  x_BPC = x_PBC.swapaxes(0, 1)
  return x_BPC.reshape(len(x_BPC), -1, *x_PBC.shape[3:])[:, :T]


def _compare(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes -log p of the targets, and log p of every token."""
  log_p_BCV = jax.nn.log_softmax(logits_BCV)
  return -jnp.take_along_axis(log_p_BCV, targets_BC[..., None], axis=2)[..., 0], log_p_BCV
