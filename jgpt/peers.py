"""What jgpt is measured against: the same model, batch and optimizer in PyTorch.

Responsible for a training step as a user of PyTorch would write it: fused AdamW, `scaled_dot_product_attention`, all cores.
Used by `bench.py` only, where torch is installed; no test compares values with it (`tests/reference/` has its own).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from jgpt.checks import UserError
from jgpt.config import Experiment, ModelConfig


class Block(nn.Module):
  """One pre-norm transformer block."""

  def __init__(self, config: ModelConfig):
    super().__init__()
    D, F, bias = config.d_model, config.d_ff, config.biases == "all"
    self.num_heads, self.approximate = config.num_heads, "tanh" if config.activation == "gelu_tanh" else "none"
    self.norm_attn, self.norm_mlp = (nn.LayerNorm(D, bias=config.norm == "layer") for _ in range(2))
    self.qkv, self.out = nn.Linear(D, 3 * D, bias=bias), nn.Linear(D, D, bias=bias)
    self.up, self.down = (nn.Linear(a, b, bias=config.biases != "none") for a, b in ((D, F), (F, D)))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps the residual stream [B, T, D] to the next."""
    B, T, D = x.shape
    q, k, v = (y.view(B, T, self.num_heads, -1).transpose(1, 2) for y in self.qkv(self.norm_attn(x)).split(D, dim=2))
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
    return x + self.down(functional.gelu(self.up(self.norm_mlp(x)), approximate=self.approximate))


class Model(nn.Module):
  """A GPT with learned positions and a tied head."""

  def __init__(self, config: ModelConfig):
    super().__init__()
    self.tok_embed = nn.Embedding(config.padded_vocab_size, config.d_model)
    self.pos_embed = nn.Embedding(config.max_seq_len, config.d_model)
    self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
    self.norm_final = nn.LayerNorm(config.d_model, bias=config.norm == "layer")
    for param in self.parameters():
      if param.ndim > 1:
        nn.init.normal_(param, std=config.init_std)

  def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Computes the mean cross-entropy."""
    x = self.tok_embed(tokens) + self.pos_embed.weight[: tokens.shape[1]]
    for block in self.blocks:
      x = block(x)
    logits = functional.linear(self.norm_final(x), self.tok_embed.weight)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_timer(experiment: Experiment, tokens, *, compiled: bool) -> Callable[[int], float]:
  """Makes a function that runs that many updates and returns the seconds one took.

  Args:
    experiment: resolved; of a model with LayerNorm, GELU, learned positions and a tied head, without dropout.
    tokens: int32 ids to draw windows from.
    compiled: whether the model goes through `torch.compile`.

  Raises:
    UserError: for another model.
  """
  model, data, optimizer = experiment.model, experiment.data, experiment.optimizer
  if (
    model.norm == "rms"
    or model.activation == "relu"
    or model.positions != "learned"
    or not model.tied_head
    or model.dropout
  ):
    raise UserError("the torch peer has LayerNorm, GELU, learned positions and a tied head, and no dropout.")
  torch.manual_seed(0)
  net = Model(model)
  run = torch.compile(net) if compiled else net
  groups = [
    {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": optimizer.weight_decay},
    {"params": [p for p in net.parameters() if p.ndim == 1], "weight_decay": 0.0},
  ]
  adamw = torch.optim.AdamW(groups, optimizer.peak_lr, (optimizer.b1, optimizer.b2), optimizer.eps, fused=True)
  stream = torch.tensor(tokens, dtype=torch.int64)
  T = data.seq_len

  def update() -> None:
    starts = torch.randint(len(stream) - T, (data.batch_size,))
    windows = stream[starts[:, None] + torch.arange(T + 1)]
    adamw.zero_grad(set_to_none=True)
    run(windows[:, :-1], windows[:, 1:]).backward()
    if optimizer.clip_norm is not None:
      nn.utils.clip_grad_norm_(net.parameters(), optimizer.clip_norm)
    adamw.step()

  def seconds_per_step(steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
      update()
    return (time.perf_counter() - began) / steps

  return seconds_per_step
