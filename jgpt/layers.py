"""The parts of a block: norms, activations, positions, products and dropout.

Pure functions of arrays. Attention is in `attention.py`; how the parts make a network is in
`model.py`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jgpt.config import ModelConfig
from jgpt.config.experiment import DROPOUT_PLACES

NORM_EPS = 1e-5


def rms_norm(x_BTD: jax.Array) -> jax.Array:
  """Computes x / sqrt(mean(x^2) + 1e-5) over the last dimension, without a gain.

  Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
  """
  return x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD**2, axis=-1, keepdims=True) + NORM_EPS)


def layer_norm(x_BTD: jax.Array, gain_D: jax.Array, bias_D: jax.Array | None) -> jax.Array:
  """Computes (x - mean) / sqrt(variance + 1e-5) * gain + bias over the last dimension.

  Args:
    x_BTD: floating point.
    gain_D: multiplies each entry.
    bias_D: added to each entry; None adds nothing.

  Source: Ba et al. 2016, "Layer Normalization", equation 4.
  """
  centred_BTD = x_BTD - jnp.mean(x_BTD, axis=-1, keepdims=True)
  variance_BT1 = jnp.mean(centred_BTD**2, axis=-1, keepdims=True)
  y_BTD = centred_BTD * jax.lax.rsqrt(variance_BT1 + NORM_EPS) * gain_D[None, None]
  return y_BTD if bias_D is None else y_BTD + bias_D[None, None]


def gelu_erf(x: jax.Array) -> jax.Array:
  """Computes x * Phi(x), where Phi is the standard normal distribution function.

  Written with erf, as in torch. `jax.nn.gelu` uses erfc, which is more accurate far to the left of
  zero and takes a third of a small model's gradient on a CPU.

  Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2.
  """
  return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS = {
  "relu": jax.nn.relu,
  "gelu_tanh": partial(jax.nn.gelu, approximate=True),
  "gelu_erf": gelu_erf,
}


def sinusoidal_positions(num_positions: int, d_model: int) -> np.ndarray:
  """Computes the fixed position embeddings: sin(p / 10000^(2i/D)) at 2i, the cosine at 2i + 1.

  Returns:
    float64 [num_positions, d_model].

  Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.5.
  """
  angles = np.arange(num_positions)[:, None] / 10_000 ** (np.arange(0, d_model, 2) / d_model)
  return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(num_positions, d_model)


def add_bias(x: jax.Array, bias: jax.Array | None) -> jax.Array:
  """Adds a bias to the dimensions of x after batch and position; None adds nothing."""
  return x if bias is None else x + bias[None, None]


def project(equation: str, x: jax.Array, w: jax.Array, matmul: str = "einsum") -> jax.Array:
  """Computes `einsum(equation, x, w)`, contracting x's dimensions after batch and position.

  Args:
    equation: contracts the last dimensions of x with the first of w, in their order.
    x: [B, T, ...].
    w: weights.
    matmul: "flat" computes one plain product of two matrices: on a CPU einsum's gradients take a
      tenth of a small model's step longer, and a single token's product copies the whole matrix
      first. Every other value is einsum, which keeps sharded dimensions apart.
  """
  if matmul != "flat":
    return jnp.einsum(equation, x, w)
  num = x.ndim - 2
  y = x.reshape(-1, math.prod(w.shape[:num])) @ w.reshape(-1, math.prod(w.shape[num:]))
  return y.reshape(*x.shape[:2], *w.shape[num:])


def dropout_at(
  place: str, config: ModelConfig, key: jax.Array | None
) -> tuple[float, jax.Array | None]:
  """Returns the dropout rate at a place and the key of its mask; (0.0, None) drops nothing.

  Args:
    place: one of `DROPOUT_PLACES`.
    config: names the places at which entries are dropped.
    key: of this layer and step; None drops nothing, as in evaluation.
  """
  if key is None or not config.dropout or place not in config.dropout_places:
    return 0.0, None
  return config.dropout, jax.random.fold_in(key, DROPOUT_PLACES.index(place))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Sets entries to zero with probability `rate`, and scales the others by 1 / (1 - rate).

  Args:
    x: floating point.
    rate: 0 <= rate < 1.
    key: consumed; None returns x.

  Source: Srivastava et al. 2014, "Dropout", scaled in training instead of in evaluation.
  """
  if key is None:
    return x
  kept = jax.random.bernoulli(key, jnp.float32(1 - rate), x.shape)
  return jnp.where(kept, x / (1 - rate), 0)
