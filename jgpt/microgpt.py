"""microgpt.py's initial values.

Responsible for drawing them exactly as that program does, with Python's `random`. Pure: nothing is read or written.
"""

from __future__ import annotations

import random

import numpy as np

from jgpt.checks import UserError
from jgpt.config import ModelConfig
from jgpt.params import param_table

MICROGPT_NAMES = {"tok_embed", "pos_embed", "unembed", "w_qkv", "w_out", "w_up", "w_down"}


def draw_microgpt_params(seed: int, num_documents: int, config: ModelConfig) -> dict:
  """Draws the initial values of microgpt.py: `random.seed(seed)`, the documents shuffled, then `gauss(0, init_std)`.

  It draws wte, wpe, lm_head, then for each layer attn_wq, attn_wk, attn_wv, attn_wo, mlp_fc1, mlp_fc2, each row by row,
  a matrix being (out, in).

  Args:
    seed: microgpt.py's is 42.
    num_documents: how many it shuffles before, which moves the generator on.
    config: sizes and switches.

  Returns:
    A pytree shaped like `param_table(config)`, float32 (NumPy arrays), blocks stacked.

  Raises:
    UserError: if the model has other parameters than microgpt's.
  """
  table = param_table(config)
  names = (table.keys() - {"blocks"}) | table["blocks"].keys()
  if names != MICROGPT_NAMES or config.scale_residual_init:
    raise UserError(
      "train.init=microgpt draws microgpt's parameters, and this model has others: it needs model.norm=rms, "
      "model.biases=none, model.positions=learned, model.tied_head=false and model.scale_residual_init=false."
    )
  generator = random.Random(seed)
  generator.shuffle(list(range(num_documents)))
  D, F, N, H, V = config.d_model, config.d_ff, config.num_heads, config.head_dim, config.vocab_size

  def matrix(rows: int, columns: int) -> np.ndarray:
    return np.array([[generator.gauss(0, config.init_std) for _ in range(columns)] for _ in range(rows)])

  def padded(rows: np.ndarray) -> np.ndarray:
    return np.pad(rows, ((0, config.padded_vocab_size - V), (0, 0)))

  embeddings = padded(matrix(V, D)), matrix(config.max_seq_len, D), padded(matrix(V, D))
  layers = []
  for _ in range(config.num_layers):
    query, key, value, out = (matrix(D, D) for _ in range(4))
    up, down = matrix(F, D), matrix(D, F)
    qkv = np.stack([m.T.reshape(D, N, H) for m in (query, key, value)], axis=1)
    layers.append((qkv, out.T.reshape(N, H, D), up.T, down.T))
  params = dict(zip(("tok_embed", "pos_embed", "unembed"), embeddings, strict=True))
  stacked = (np.stack(arrays) for arrays in zip(*layers, strict=True))
  params["blocks"] = dict(zip(("w_qkv", "w_out", "w_up", "w_down"), stacked, strict=True))
  return {
    name: {k: v.astype(np.float32) for k, v in value.items()} if name == "blocks" else value.astype(np.float32)
    for name, value in params.items()
  }
