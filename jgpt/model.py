"""The network, written once: initial values, logits for training, and one token at a time with a cache.

Responsible for the forward pass as pure functions of parameters and tokens. Computes in the dtype of the parameters. Not
responsible for what the parameters are (`params.py`), how positions attend (`attention.py`) or the loss (`step.py`).

The layers' parameters, under "blocks", are stacked (a dict of arrays with the layers in front: `lax.scan` runs them) or a
list with a dict for each layer (then they are written out one after the other). Both are the same network.

Dimensions: B batch, T query positions, S key positions, N heads, H head size, D width, F feed-forward width, V vocabulary,
L layers.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jgpt.attention import Attend, Drop, attend_causally
from jgpt.config import ModelConfig
from jgpt.config.experiment import DROPOUT_PLACES
from jgpt.layers import ACTIVATIONS, layer_norm, make_drop, rms_norm, sinusoidal_positions
from jgpt.params import Param, param_table


def init_params(key: jax.Array, config: ModelConfig) -> dict:
  """Draws every parameter from the normal distribution that `param_table` gives it.

  A parameter's key is folded from its name and its layer, so adding a parameter or a layer changes no other.

  Args:
    key: consumed.
    config: sizes; `vocab_size` resolved.

  Returns:
    A pytree shaped like `param_table(config)`, float32. Leaves under "blocks" have the layers stacked in front.
  """

  def draw(path: tuple, param: Param) -> jax.Array:
    name_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path, simple=True, separator="/").encode()))

    def one(key: jax.Array) -> jax.Array:
      learned = (param.shape[0] - param.padding, *param.shape[1:])  # drawn alone, so that padding changes no value
      value = param.mean + param.std * jax.random.normal(key, learned, jnp.float32)
      return jnp.pad(value, [(0, param.padding)] + [(0, 0)] * (value.ndim - 1))

    if path[0].key != "blocks":
      return one(name_key)
    return jax.vmap(lambda layer: one(jax.random.fold_in(name_key, layer)))(jnp.arange(config.num_layers))

  return jax.tree_util.tree_map_with_path(draw, param_table(config))


def apply(
  params: dict,
  tokens_BT: jax.Array,
  config: ModelConfig,
  key: jax.Array | None = None,
  attend: Attend = attend_causally,
) -> jax.Array:
  """Computes the logits of each position's next token.

  Args:
    params: as `init_params` returns them, or with unstacked blocks.
    tokens_BT: int32 ids [B, T], T <= `config.max_seq_len`, each below `config.vocab_size`.
    config: sizes and switches.
    key: of what is dropped out, consumed; None drops nothing: evaluation.
    attend: `attend_causally`, or what computes the same.

  Returns:
    Logits [B, T, V] in the parameters' dtype; V is `config.padded_vocab_size`, and padding is -inf.
  """
  x_BTD = _embed(params, tokens_BT, 0, config, key)
  x_BTD, _ = _blocks(params, x_BTD, attend, None, config, key)
  return _logits(params, x_BTD, config)


def block(memory: Any, x_BTD: jax.Array, p: dict, attend: Attend, config: ModelConfig, drop: Drop) -> tuple[jax.Array, Any]:
  """One transformer block, normalised before attention and before the MLP.

  Args:
    memory: what `attend` reads, for this layer.
    x_BTD: the residual stream.
    p: this layer's parameters, the table's "blocks".
    attend: decides what is attended to and what is kept.
    config: switches.
    drop: drops out at the places "attention", "attention_out", "activation" and "mlp_out".

  Returns:
    The residual stream after the block, and what `attend` kept.
  """
  qkv_BTCNH = _project(_norm(x_BTD, p, "norm_attn", config), p["w_qkv"])  # C: query, key, value
  qkv_BTCNH = _add_bias(qkv_BTCNH, p.get("b_qkv"))
  y_BTNH, memory = attend(memory, *jnp.unstack(qkv_BTCNH, axis=2), drop)
  y_BTD = _add_bias(_project(y_BTNH, p["w_out"]), p.get("b_out"))
  x_BTD = x_BTD + drop("attention_out", y_BTD)
  up_BTF = _add_bias(_project(_norm(x_BTD, p, "norm_mlp", config), p["w_up"]), p.get("b_up"))
  up_BTF = drop("activation", ACTIVATIONS[config.activation](up_BTF))
  y_BTD = _add_bias(_project(up_BTF, p["w_down"]), p.get("b_down"))
  return x_BTD + drop("mlp_out", y_BTD), memory


def _norm(x_BTD: jax.Array, params: dict, name: str, config: ModelConfig) -> jax.Array:
  """The norm called `name`, of the kind that the model has."""
  if config.norm == "rms":
    return rms_norm(x_BTD)
  return layer_norm(x_BTD, params[f"{name}_gain"], params.get(f"{name}_bias"))


def _project(x: jax.Array, w: jax.Array) -> jax.Array:
  """Contracts all dimensions of x after batch and position with as many of w's first.

  As one plain product of two matrices: with more dimensions XLA's gradients on a CPU take a tenth of a small model's step
  longer, and a single token's product copies the whole matrix first.
  """
  num = x.ndim - 2
  y = x.reshape(-1, math.prod(w.shape[:num])) @ w.reshape(-1, math.prod(w.shape[num:]))
  return y.reshape(*x.shape[:2], *w.shape[num:])


def _add_bias(x: jax.Array, bias: jax.Array | None) -> jax.Array:
  """Adds a bias to the last dimensions of x; None adds nothing."""
  return x if bias is None else x + bias[None, None]


def _embed(
  params: dict, tokens_BT: jax.Array, position: int | jax.Array, config: ModelConfig, key: jax.Array | None = None
) -> jax.Array:
  """The residual stream before the first block; the first token stands at `position`."""
  x_BTD = params["tok_embed"][tokens_BT]
  if config.scale_embed:
    x_BTD = x_BTD * config.d_model**0.5
  if config.positions == "sinusoidal":
    table_SD = jnp.asarray(sinusoidal_positions(config.max_seq_len, config.d_model), x_BTD.dtype)
  else:
    table_SD = params["pos_embed"]
  # A slice, not a gather: its gradient needs no scatter, which takes a tenth of a step of `names`.
  positions_TD = jax.lax.dynamic_slice_in_dim(table_SD, position, tokens_BT.shape[1])
  x_BTD = make_drop(config, key)("embedding", x_BTD + positions_TD[None])
  return rms_norm(x_BTD) if config.norm_embed else x_BTD


def _blocks(
  params: dict, x_BTD: jax.Array, attend: Attend, memory: Any, config: ModelConfig, key: jax.Array | None = None
) -> tuple[jax.Array, Any]:
  """Runs the layers one after the other; what each keeps comes back as its blocks are, stacked or in a list."""
  blocks, L = params["blocks"], config.num_layers
  # A number that no place has: keys of layers are no place's key.
  keys_L = None if key is None else jax.random.split(jax.random.fold_in(key, len(DROPOUT_PLACES)), L)

  def layer(x_BTD: jax.Array, inputs: tuple) -> tuple[jax.Array, Any]:
    p, memory, key = inputs
    return block(memory, x_BTD, p, attend, config, make_drop(config, key))

  if isinstance(blocks, dict):
    return jax.lax.scan(layer, x_BTD, (blocks, memory, keys_L))
  nothing, kept = [None] * L, []
  for inputs in zip(blocks, memory or nothing, nothing if keys_L is None else keys_L, strict=True):
    x_BTD, new = layer(x_BTD, inputs)
    kept.append(new)
  return x_BTD, kept


def _logits(params: dict, x_BTD: jax.Array, config: ModelConfig) -> jax.Array:
  if config.norm_final:
    x_BTD = _norm(x_BTD, params, "norm_final", config)
  head_VD = params["tok_embed"] if config.tied_head else params["unembed"]
  logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, head_VD)
  if config.padded_vocab_size == config.vocab_size:
    return logits_BTV
  real_V = jnp.arange(config.padded_vocab_size) < config.vocab_size
  return jnp.where(real_V[None, None], logits_BTV, -jnp.inf)
