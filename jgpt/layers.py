"""The network, written once: initial values, logits for training, and one token at a time with a cache.

Responsible for the forward pass as pure functions of parameters and tokens. Computes in the dtype of the parameters. Not
responsible for what the parameters are (`params.py`), how positions attend (`attention.py`) or the loss (`step.py`).

The layers' parameters, under "blocks", are stacked (a dict of arrays with the layers in front: `lax.scan` runs them) or a
list with a dict for each layer (then they are written out one after the other). Both are the same network.

Dimensions: B batch, T query positions, S key positions, N heads, H head size, D width, F feed-forward width, V vocabulary,
L layers.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jgpt.attention import Drop
from jgpt.config import ModelConfig
from jgpt.config.experiment import DROPOUT_PLACES

NORM_EPS = 1e-5


# --- The parts ---


def rms_norm(x_BTD: jax.Array) -> jax.Array:
  """Divides by the root mean square over the last dimension: x / sqrt(mean(x^2) + 1e-5), without a gain.

  Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
  """
  return x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD**2, axis=-1, keepdims=True) + NORM_EPS)


def layer_norm(x_BTD: jax.Array, gain_D: jax.Array, bias_D: jax.Array | None) -> jax.Array:
  """Computes (x - mean) / sqrt(variance + 1e-5) * gain + bias over the last dimension; no bias where it is None.

  Source: Ba et al. 2016, "Layer Normalization", equation 4.
  """
  centred_BTD = x_BTD - jnp.mean(x_BTD, axis=-1, keepdims=True)
  variance_BT1 = jnp.mean(centred_BTD**2, axis=-1, keepdims=True)
  y_BTD = centred_BTD * jax.lax.rsqrt(variance_BT1 + NORM_EPS) * gain_D[None, None]
  return y_BTD if bias_D is None else y_BTD + bias_D[None, None]


def gelu_erf(x: jax.Array) -> jax.Array:
  """Computes x * Phi(x), Phi being the normal distribution function.

  Written with erf, as torch does: `jax.nn.gelu` uses erfc, which keeps the digits of values near 0 far to the left, and
  takes a third of the gradient's time of a small model on a CPU.

  Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2.
  """
  return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS = {"relu": jax.nn.relu, "gelu_tanh": partial(jax.nn.gelu, approximate=True), "gelu_erf": gelu_erf}


def sinusoidal_positions(num_positions: int, d_model: int) -> np.ndarray:
  """Computes the fixed positions: sin(p / 10000^(2i/D)) at dimension 2i, the cosine at 2i + 1; float64 [positions, D].

  Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.5.
  """
  angles = np.arange(num_positions)[:, None] / 10_000 ** (np.arange(0, d_model, 2) / d_model)
  return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(num_positions, d_model)


def make_drop(config: ModelConfig, key: jax.Array | None) -> Drop:
  """Makes the function that drops out entries at the places that `config` names, and scales what is left by 1/(1-p).

  Args:
    config: `dropout` and `dropout_places`.
    key: each place uses its own, folded from this; None (evaluation) drops nothing.

  Source: Srivastava et al. 2014, "Dropout"; scaled in training, so that evaluation needs no change.
  """

  def drop(place: str, x: jax.Array) -> jax.Array:
    if key is None or not config.dropout or place not in config.dropout_places:
      return x
    place_key = jax.random.fold_in(key, DROPOUT_PLACES.index(place))
    kept = jax.random.bernoulli(place_key, 1 - config.dropout, x.shape)
    return jnp.where(kept, x / (1 - config.dropout), 0)

  return drop
