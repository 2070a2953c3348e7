"""From the residual stream after the network's last norm to the logits and their cross-entropy.

Pure functions of arrays. The mean over a batch is in `step.py`, over a corpus in `evaluation.py`.
"""

import jax
import jax.numpy as jnp
import optax

from jgpt.config import ComputeConfig, ModelConfig
from jgpt.config.experiment import PLAIN
from jgpt.products import einsum_bfloat16, find_precision


@jax.named_scope("head")
def compute_logits(
  x_BTD: jax.Array, head_VD: jax.Array, config: ModelConfig, compute: ComputeConfig = PLAIN
) -> jax.Array:
  """Computes the logits of each position's next token.

  Args:
    x_BTD: floating point.
    head_VD: weights of the head; V is `config.padded_vocab_size`.
    config: of the network.
    compute: how to compute.

  Returns:
    [B, T, V], float32, or float64 for float64 weights; padding is -inf.
  """
  if compute.dtype == "bfloat16":
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
  logits_BTV = compute_logits(x_BTD, head_VD, config, compute)
  nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
  return jnp.sum(nats_BT * weights_BT)
