"""The peers in PyTorch, written as a user of PyTorch would.

A training step with fused AdamW, `scaled_dot_product_attention` and every switch of jgpt's model
but sinusoidal positions, and sampling with Hugging Face's GPT-2. `peers.py` imports this where
torch is installed. Imports no jax.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from jgpt.config import Experiment, ModelConfig
from jgpt.errors import UserError

EPS = 1e-5


class RMSNorm(nn.Module):
  """An RMSNorm without a gain."""

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Computes x / sqrt(mean(x^2) + 1e-5) over the last dimension."""
    return functional.rms_norm(x, (x.shape[-1],), eps=EPS)


def make_norm(config: ModelConfig) -> nn.Module:
  """Makes the norm that `config.norm` names."""
  if config.norm == "rms":
    return RMSNorm()
  return nn.LayerNorm(config.d_model, eps=EPS, bias=config.norm == "layer")


def find_dropout_rate(place: str, config: ModelConfig) -> float:
  """Returns the dropout rate at a place, one of `DROPOUT_PLACES`."""
  return config.dropout if place in config.dropout_places else 0.0


TORCH_ACTIVATIONS = {
  "relu": functional.relu,
  "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
  "gelu_erf": functional.gelu,
}


class TorchBlock(nn.Module):
  """A transformer block, normalised before attention and before the MLP."""

  def __init__(self, config: ModelConfig):
    super().__init__()
    D, F, bias = config.d_model, config.d_ff, config.biases == "all"
    self.num_heads, self.activation = config.num_heads, TORCH_ACTIVATIONS[config.activation]
    self.norm_attn, self.norm_mlp = make_norm(config), make_norm(config)
    self.qkv, self.out = nn.Linear(D, 3 * D, bias=bias), nn.Linear(D, D, bias=bias)
    self.up, self.down = (
      nn.Linear(a, b, bias=config.biases != "none") for a, b in ((D, F), (F, D))
    )
    self.attention_dropout = find_dropout_rate("attention", config)
    places = ("attention_out", "activation", "mlp_out")
    self.drop_out, self.drop_up, self.drop_down = (
      nn.Dropout(find_dropout_rate(place, config)) for place in places
    )

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Computes the residual stream [B, T, D] after the block."""
    B, T, D = x.shape
    q, k, v = (
      y.view(B, T, self.num_heads, -1).transpose(1, 2)
      for y in self.qkv(self.norm_attn(x)).split(D, dim=2)
    )
    y = functional.scaled_dot_product_attention(
      q, k, v, dropout_p=self.attention_dropout, is_causal=True
    )
    x = x + self.drop_out(self.out(y.transpose(1, 2).reshape(B, T, D)))
    up = self.drop_up(self.activation(self.up(self.norm_mlp(x))))
    return x + self.drop_down(self.down(up))


class TorchModel(nn.Module):
  """A GPT with learned positions."""

  def __init__(self, config: ModelConfig):
    super().__init__()
    self.tok_embed = nn.Embedding(config.padded_vocab_size, config.d_model)
    self.pos_embed = nn.Embedding(config.max_seq_len, config.d_model)
    self.scale = math.sqrt(config.d_model) if config.scale_embed else 1.0
    self.drop = nn.Dropout(find_dropout_rate("embedding", config))
    self.norm_embed = RMSNorm() if config.norm_embed else nn.Identity()
    self.blocks = nn.ModuleList(TorchBlock(config) for _ in range(config.num_layers))
    self.norm_final = make_norm(config) if config.norm_final else nn.Identity()
    self.head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
    if config.tied_head:
      self.head.weight = self.tok_embed.weight
    for param in self.parameters():
      if param.ndim > 1:
        nn.init.normal_(param, std=config.init_std)

  def forward(
    self, tokens: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None
  ) -> torch.Tensor:
    """Computes the mean cross-entropy of the targets, weighted where weights are given."""
    x = self.tok_embed(tokens)
    if self.scale != 1.0:
      x = x * self.scale
    x = self.norm_embed(self.drop(x + self.pos_embed.weight[: tokens.shape[1]]))
    for block in self.blocks:
      x = block(x)
    logits, targets = self.head(self.norm_final(x)).flatten(0, 1), targets.flatten()
    if weights is None:
      return functional.cross_entropy(logits, targets)
    nats = functional.cross_entropy(logits, targets, reduction="none")
    return (nats * weights.flatten()).sum() / weights.sum()


def choose_device(platform: str) -> torch.device:
  """Returns the device of the kind that jgpt runs on, and sets one thread for each usable core.

  Args:
    platform: as jax names it.

  Raises:
    RuntimeError: if this torch has no such device.
  """
  torch.set_num_threads(
    len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  )
  if platform == "cpu":
    return torch.device("cpu")
  if platform not in ("gpu", "cuda", "rocm") or not torch.cuda.is_available():
    raise RuntimeError(f"this torch has no {platform}")
  torch.set_float32_matmul_precision("high")  # as jax computes float32 products on a GPU
  return torch.device("cuda")


def make_batches(
  experiment: Experiment, tokens: np.ndarray, lengths: np.ndarray | None, device: torch.device
) -> Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
  """Makes a function that returns the next batch: inputs, targets and weights.

  Args:
    experiment: resolved. Windows of a stream are random, whatever `data.batching` is.
    tokens: int32 ids, a stream or a document a row.
    lengths: predictions of each document; None for a stream, whose batches have no weights.
    device: of the batches.
  """
  B, T = experiment.data.batch_size, experiment.data.seq_len
  ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
  if lengths is None:
    offsets = torch.arange(T + 1, device=device)

    def next_windows() -> tuple[torch.Tensor, torch.Tensor, None]:
      starts = torch.randint(len(ids) - T, (B, 1), device=device)
      windows = ids[starts + offsets]
      return windows[:, :-1], windows[:, 1:], None

    return next_windows
  counts, positions, begins = (
    torch.from_numpy(lengths).to(device),
    torch.arange(T, device=device),
    [0],
  )

  def next_documents() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    begin = begins[0] if begins[0] + B <= len(ids) else 0
    begins[0] = begin + B
    rows = ids[begin : begin + B]
    return rows[:, :-1], rows[:, 1:], (positions < counts[begin : begin + B, None]).float()

  return next_documents


def make_training(
  experiment: Experiment,
  tokens: np.ndarray,
  lengths: np.ndarray | None,
  *,
  compiled: bool,
  platform: str,
  autocast: bool = False,
) -> Callable[[int], None]:
  """Makes a function of a number of steps, which applies updates and waits for them.

  The learning rate stays at its peak, since a schedule would only add time.

  Args:
    experiment: resolved.
    tokens: see `make_batches`.
    lengths: see `make_batches`.
    compiled: whether to call `torch.compile` on the model.
    platform: of jgpt's devices, as jax names it.
    autocast: whether the loss is computed under `torch.autocast` in bfloat16.

  Raises:
    UserError: for sinusoidal positions.
    RuntimeError: if this torch has no such device.
  """
  model, optimizer = experiment.model, experiment.optimizer
  if model.positions != "learned":
    raise UserError("--peer torch has learned positions only.")
  torch.manual_seed(0)
  device = choose_device(platform)
  net = TorchModel(model).to(device)
  run = torch.compile(net) if compiled else net
  params = list(net.parameters())
  decays = {True: optimizer.weight_decay, False: 0.0}
  groups = [
    {"params": [p for p in params if (p.ndim > 1) == big], "weight_decay": decays[big]}
    for big in (True, False)
  ]
  groups = [group for group in groups if group["params"]]
  adamw = torch.optim.AdamW(
    groups, optimizer.peak_lr, (optimizer.b1, optimizer.b2), optimizer.eps, fused=True
  )
  next_batch = make_batches(experiment, tokens, lengths, device)

  def update(steps: int) -> None:
    for _ in range(steps):
      with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        loss = run(*next_batch())
      loss.backward()
      if optimizer.clip_norm is not None:
        nn.utils.clip_grad_norm_(params, optimizer.clip_norm, foreach=True)
      adamw.step()
      adamw.zero_grad(set_to_none=True)
    if device.type == "cuda":
      torch.cuda.synchronize()

  return update


def make_sampling(
  model: ModelConfig, *, batch_size: int, new_tokens: int, platform: str
) -> Callable[[int], None]:
  """Makes a function of a number of calls, in which Transformers' GPT-2 draws texts.

  The weights are random; sampling uses the decoding cache at temperature 1.

  Args:
    model: GPT-2's network; `vocab_size` resolved.
    batch_size: texts a call, each after a prompt of one token.
    new_tokens: in each text; no token ends it earlier.
    platform: of jgpt's devices, as jax names it.
  """
  from transformers import GPT2Config, GPT2LMHeadModel
  from transformers.utils import logging

  logging.set_verbosity_error()
  torch.manual_seed(0)
  device = choose_device(platform)
  config = GPT2Config(
    vocab_size=model.vocab_size,
    n_positions=model.max_seq_len,
    n_embd=model.d_model,
    n_layer=model.num_layers,
    n_head=model.num_heads,
    n_inner=model.d_ff,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
  )
  net = GPT2LMHeadModel(config).to(device).eval()
  prompt = torch.full((batch_size, 1), model.vocab_size - 1, device=device)

  def draw(calls: int) -> None:
    for _ in range(calls):
      with torch.inference_mode():
        out = net.generate(
          prompt,
          attention_mask=torch.ones_like(prompt),
          do_sample=True,
          temperature=1.0,
          top_k=0,
          max_new_tokens=new_tokens,
          use_cache=True,
        )
      if out.shape != (batch_size, 1 + new_tokens):
        raise RuntimeError(
          f"drew {tuple(out.shape)} tokens instead of {(batch_size, 1 + new_tokens)}"
        )
    if device.type == "cuda":
      torch.cuda.synchronize()

  return draw
