"""The parts of a block: norms, activations, positions and dropout.

Pure functions of arrays. Products by weights are in `products.py`, attention is in `attention.py`;
how the parts make a network is in `model.py`.

With `compute.dtype` "bfloat16" arrays between the parts are bfloat16 (`store`) and what happens
inside a part is float32.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jgpt.config import ComputeConfig, ModelConfig
from jgpt.config.experiment import DROPOUT_PLACES

NORM_EPS = 1e-5


def store(x: jax.Array, compute: ComputeConfig) -> jax.Array:
  """Converts an activation to the dtype in which activations lie in memory, `compute.dtype`."""
  return x.astype(jnp.bfloat16) if compute.dtype == "bfloat16" else x


def widen(x: jax.Array) -> jax.Array:
  """Returns an activation in the dtype of arithmetic: float32, or float64 for float64."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rms_norm(x_BTD: jax.Array) -> jax.Array:
  """Computes x / sqrt(mean(x^2) + 1e-5) over the last dimension, without a gain, in float32.

  Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
  """
  x_BTD = widen(x_BTD)
  return x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD**2, axis=-1, keepdims=True) + NORM_EPS)


def layer_norm(x_BTD: jax.Array, gain_D: jax.Array, bias_D: jax.Array | None) -> jax.Array:
  """Computes (x - mean) / sqrt(variance + 1e-5) * gain + bias over the last dimension.

  The result is float32, or float64 for float64.

  Args:
    x_BTD: floating point.
    gain_D: multiplies each entry.
    bias_D: added to each entry; None adds nothing.

  Source: Ba et al. 2016, "Layer Normalization", equation 4.
  """
  x_BTD = widen(x_BTD)
  centred_BTD = x_BTD - jnp.mean(x_BTD, axis=-1, keepdims=True)
  variance_BT1 = jnp.mean(centred_BTD**2, axis=-1, keepdims=True)
  y_BTD = centred_BTD * jax.lax.rsqrt(variance_BT1 + NORM_EPS) * gain_D[None, None]
  return y_BTD if bias_D is None else y_BTD + bias_D[None, None]


def norm(
  x_BTD: jax.Array, params: dict, name: str, config: ModelConfig, compute: ComputeConfig
) -> jax.Array:
  """Applies the norm called `name`: RMSNorm, or LayerNorm with the gain and bias in `params`.

  The result is in the dtype of activations.
  """

  def apply_norm(x_BTD: jax.Array, gain_D: jax.Array | None, bias_D: jax.Array | None) -> jax.Array:
    y_BTD = rms_norm(x_BTD) if config.norm == "rms" else layer_norm(x_BTD, gain_D, bias_D)
    return store(y_BTD, compute)

  gain_D, bias_D = params.get(f"{name}_gain"), params.get(f"{name}_bias")
  return recompute(apply_norm, compute)(x_BTD, gain_D, bias_D)


def activate(x_BTF: jax.Array, config: ModelConfig, compute: ComputeConfig) -> jax.Array:
  """Applies the MLP's activation function; the result is float32, or float64 for float64."""
  return recompute(lambda x_BTF: ACTIVATIONS[config.activation](widen(x_BTF)), compute)(x_BTF)


def recompute(function: Callable, compute: ComputeConfig) -> Callable:
  """Returns a function that is computed again in the backward pass, where `compute.remat` says so.

  Of an element-wise function then only the arguments are kept in memory: in bfloat16 they take a
  quarter of what its derivative keeps in float32.
  """
  return jax.checkpoint(function) if compute.remat == "elementwise" else function


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


def dropout_at(
  place: str, config: ModelConfig, keys_B: jax.Array | None
) -> tuple[float, jax.Array | None]:
  """Returns the dropout rate at a place and the keys of its masks; (0.0, None) drops nothing.

  Args:
    place: one of `DROPOUT_PLACES`.
    config: names the places at which entries are dropped.
    keys_B: of this layer and step, one for each sequence; None drops nothing, as in evaluation.
  """
  if keys_B is None or not config.dropout or place not in config.dropout_places:
    return 0.0, None
  return config.dropout, fold_in_rows(keys_B, DROPOUT_PLACES.index(place))


def fold_in_rows(keys_B: jax.Array, number: int | jax.Array) -> jax.Array:
  """Derives a key for each sequence from its own and a number."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
  """Sets entries to zero with probability `rate`, and scales the others by 1 / (1 - rate).

  A sequence's mask is a function of its key alone, so that it is the same however a batch is
  divided over devices and micro-batches.

  Args:
    x: floating point [B, ...].
    rate: 0 <= rate < 1.
    keys_B: one for each sequence, consumed; None returns x.

  Source: Srivastava et al. 2014, "Dropout", scaled in training instead of in evaluation.
  """
  if keys_B is None:
    return x
  draw = partial(jax.random.bernoulli, p=jnp.float32(1 - rate), shape=x.shape[1:])
  return jnp.where(jax.vmap(draw)(keys_B), x / (1 - rate), 0)
