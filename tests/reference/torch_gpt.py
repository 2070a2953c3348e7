"""An oracle in PyTorch: the same network, gradients and training loop, written from the mathematics
and torch's own parts.

The network is an ordinary torch module; its derivatives are autograd's, its optimizer
torch.optim.AdamW. A second, foreign implementation is at hand where the switches are GPT-2's:
Hugging Face's GPT2LMHeadModel. Nothing of jgpt is used.

Parameters go in and out as a flat dict of NumPy arrays under GPT-2's names, the matrices of the
linear layers (in, out). nn.Linear holds them (out, in): they are transposed on the way. wte, wpe
and lm_head.weight, [rows, D], go as they are.

`config` is any object with the attributes vocab_size, max_seq_len, num_layers, num_heads, d_model,
d_ff, norm, norm_embed, norm_final, activation, positions, biases, tied_head, scale_embed. Tokens,
targets, weights and masks may be NumPy arrays or tensors.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

NORM_EPS = 1e-5
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
  "relu": F.relu,
  "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
  "gelu_erf": lambda x: F.gelu(x, approximate="none"),
}
TRANSPOSED = (
  "c_attn.weight",
  "c_proj.weight",
  "c_fc.weight",
)  # (in, out) in NumPy, (out, in) in nn.Linear

Masks = Mapping[str, Any]


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) over the last axis, without parameters."""

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + NORM_EPS)


class Attention(nn.Module):
  """Causal self-attention of several heads, the softmax written out so that its probabilities can
  be dropped out.
  """

  def __init__(self, config):
    super().__init__()
    bias = config.biases == "all"
    self.num_heads = config.num_heads
    self.c_attn = nn.Linear(config.d_model, 3 * config.d_model, bias=bias)
    self.c_proj = nn.Linear(config.d_model, config.d_model, bias=bias)

  def forward(self, x: torch.Tensor, masks: Masks | None, name: str) -> torch.Tensor:
    B, T, D = x.shape
    N, H = self.num_heads, D // self.num_heads
    q, k, v = (
      part.reshape(B, T, N, H).transpose(1, 2) for part in self.c_attn(x).split(D, dim=-1)
    )  # each B, N, T, H
    scores = q @ k.transpose(-1, -2) / math.sqrt(H)  # B, N, T (queries), T (keys)
    past = torch.ones(T, T, dtype=torch.bool).tril()  # row t: the keys s <= t
    probs = torch.softmax(scores.masked_fill(~past, -math.inf), dim=-1)
    probs = _dropout(probs, masks, f"{name}.attention")
    heads = probs @ v
    out = self.c_proj(heads.transpose(1, 2).reshape(B, T, D))  # the heads side by side
    return _dropout(out, masks, f"{name}.attention_out")


class MLP(nn.Module):
  """Two linear layers with an activation between them."""

  def __init__(self, config):
    super().__init__()
    bias = config.biases in ("mlp", "all")
    self.activation = ACTIVATIONS[config.activation]
    self.c_fc = nn.Linear(config.d_model, config.d_ff, bias=bias)
    self.c_proj = nn.Linear(config.d_ff, config.d_model, bias=bias)

  def forward(self, x: torch.Tensor, masks: Masks | None, name: str) -> torch.Tensor:
    m = _dropout(self.activation(self.c_fc(x)), masks, f"{name}.activation")
    return _dropout(self.c_proj(m), masks, f"{name}.mlp_out")


class Block(nn.Module):
  """A pre-norm layer: attention, then the MLP, each added to the residual stream."""

  def __init__(self, config):
    super().__init__()
    self.ln_1 = _make_norm(config)
    self.attn = Attention(config)
    self.ln_2 = _make_norm(config)
    self.mlp = MLP(config)

  def forward(self, x: torch.Tensor, masks: Masks | None, name: str) -> torch.Tensor:
    x = x + self.attn(self.ln_1(x), masks, name)
    return x + self.mlp(self.ln_2(x), masks, name)


class TorchGPT(nn.Module):
  """The whole network, from tokens to logits.

  `named_parameters()` has GPT-2's names, but for nn.Embedding's `wte.weight` and `wpe.weight`: see
  `named`.

  Raises:
    ValueError: for a switch that has no such value, heads that do not divide d_model, or norm_embed
      without norm "rms".
  """

  def __init__(self, config):
    super().__init__()
    _check(config)
    self.config = config
    self.wte = nn.Embedding(config.vocab_size, config.d_model)
    if config.positions == "learned":
      self.wpe = nn.Embedding(config.max_seq_len, config.d_model)
    if config.norm_embed:
      self.norm_embed = _make_norm(config)
    self.h = nn.ModuleList(Block(config) for _ in range(config.num_layers))
    if config.norm_final:
      self.ln_f = _make_norm(config)
    if not config.tied_head:
      self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

  def forward(self, tokens, masks: Masks | None = None) -> torch.Tensor:
    """The logits [B, T, V] of the next token at every position of `tokens` [B, T].

    Args:
      tokens: Integers, [B, T], T at most max_seq_len.
      masks: Dropout, by name ("embed", "h.{i}.attention", "h.{i}.attention_out",
        "h.{i}.activation", "h.{i}.mlp_out"): what the values there are multiplied by. No dropout
        where a name is absent.

    Raises:
      ValueError: for more positions than max_seq_len, or a mask whose name is none of these.
    """
    config = self.config
    tokens = _long(tokens)
    T = tokens.shape[1]
    if config.max_seq_len < T:
      raise ValueError(f"{T} positions, at most {config.max_seq_len}")
    if unknown := set(masks or ()) - _mask_names(config):
      raise ValueError(f"no dropout is called {sorted(unknown)}")
    x = self.wte(tokens)
    if config.scale_embed:
      x = x * math.sqrt(config.d_model)
    x = x + (
      self.wpe(torch.arange(T))
      if config.positions == "learned"
      else sinusoids(T, config.d_model).to(x.dtype)
    )
    x = _dropout(x, masks, "embed")
    if config.norm_embed:
      x = self.norm_embed(x)
    for i, block in enumerate(self.h):
      x = block(x, masks, f"h.{i}")
    if config.norm_final:
      x = self.ln_f(x)
    return F.linear(x, self.wte.weight) if config.tied_head else self.lm_head(x)


def sinusoids(length: int, d_model: int) -> torch.Tensor:
  """The fixed positions [length, d_model], float64: sin(p / 10000^(2i/D)) in column 2i, its cosine
  in column 2i + 1.
  """
  column = torch.arange(d_model)
  exponent = (column - column % 2).double() / d_model  # 2i / D, for both columns of a pair
  angle = torch.arange(length).double()[:, None] / 10000.0**exponent
  return torch.where(column % 2 == 0, angle.sin(), angle.cos())


def named(model: nn.Module) -> dict[str, nn.Parameter]:
  """A model's parameters (TorchGPT's or Hugging Face's) under the names wte, wpe, h.{i}.ln_1.weight
  and so on.
  """
  names = {"wte.weight": "wte", "wpe.weight": "wpe"}
  flat = {name.removeprefix("transformer."): param for name, param in model.named_parameters()}
  return {names.get(name, name): param for name, param in flat.items()}


def make_model(config, params: Mapping[str, np.ndarray], dtype: torch.dtype) -> TorchGPT:
  """A TorchGPT with these parameters, the linear layers' matrices given as (in, out).

  Raises:
    ValueError: for parameters whose names or shapes are not those that `config` calls for.
  """
  model = TorchGPT(config).to(dtype)
  _load(named(model), {name: _flip(name, value) for name, value in params.items()})
  return model


def parameters(model: TorchGPT) -> dict[str, np.ndarray]:
  """A copy of the parameters, float64, the linear layers' matrices as (in, out)."""
  return {name: _flip(name, _array(param)) for name, param in named(model).items()}


def gradients(model: TorchGPT) -> dict[str, np.ndarray]:
  """A copy of what backward() left in every parameter's grad, float64, named and laid out as
  `parameters`.
  """
  return {name: _flip(name, grad) for name, grad in _grads(model).items()}


def loss_fn(model: nn.Module, tokens, targets, weights, masks: Masks | None = None) -> torch.Tensor:
  """The weighted mean of the cross-entropy over all B, T positions.

  `model` may be Hugging Face's, without masks.
  """
  tokens, targets = _long(tokens), _long(targets)
  out = model(tokens) if masks is None else model(tokens, masks)
  logits = out if isinstance(out, torch.Tensor) else out.logits
  losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
  weights = _float(weights, losses.dtype).flatten()
  return (weights * losses).sum() / weights.sum()


def param_groups(
  model: nn.Module, weight_decay: float, decayed: Collection[str]
) -> list[dict[str, Any]]:
  """An optimizer's two groups: the parameters named in `decayed`, with `weight_decay`, and all the
  others, without.

  Raises:
    ValueError: for a name in `decayed` that the model does not have.
  """
  params, decayed = named(model), set(decayed)
  if unknown := decayed - params.keys():
    raise ValueError(f"no parameter is called {sorted(unknown)}")
  return [
    {
      "params": [param for name, param in params.items() if name in decayed],
      "weight_decay": weight_decay,
    },
    {
      "params": [param for name, param in params.items() if name not in decayed],
      "weight_decay": 0.0,
    },
  ]


def train(
  model: nn.Module,
  batches: Iterable[tuple],
  *,
  rate: Callable[[int], float],
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float = 0.0,
  decayed: Collection[str] = (),
  clip_norm: float | None = None,
  optimizer: str = "adamw",
  momentum: float = 0.0,
) -> list[float]:
  """Torch's ordinary training loop: one optimizer step a batch, on `model` in place.

  The step of a batch whose loss is not finite is left out; the schedule's is not.

  Args:
    model: The model to train.
    batches: Tuples (tokens, targets, weights) or (tokens, targets, weights, masks).
    rate: The learning rate of a step, counted from 0. LambdaLR asks for one step more than there
      are batches.
    b1: The decay of the mean of the gradients.
    b2: The decay of the mean of their squares.
    eps: Added to the root of the second mean.
    weight_decay: As torch's optimizer means it. AdamW: a step takes rate * weight_decay of a
      decayed parameter away.
    decayed: The names of the parameters that decay.
    clip_norm: The most that the norm of all gradients together may be; longer ones are scaled down
      to it (torch's way, with 1e-6 added to the norm that it divides by).
    optimizer: "adamw", "adam" or "sgd": torch.optim's AdamW, Adam, and SGD, which has no b1, b2 and
      eps.
    momentum: Of SGD.

  Returns:
    The loss of every batch, before its step.
  """
  groups = param_groups(model, weight_decay, decayed)
  # lr=1: LambdaLR multiplies it by the rate
  if optimizer == "sgd":
    tx = torch.optim.SGD(groups, lr=1.0, momentum=momentum)
  else:
    make = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optimizer]
    tx = make(groups, lr=1.0, betas=(b1, b2), eps=eps)
  schedule = torch.optim.lr_scheduler.LambdaLR(tx, lr_lambda=rate)
  losses = []
  for batch in batches:
    tx.zero_grad()
    loss = loss_fn(model, *batch)
    loss.backward()
    if clip_norm is not None:
      torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    if loss.isfinite():
      tx.step()
    schedule.step()
    losses.append(loss.item())
  return losses


def make_hf_model(config, params: Mapping[str, np.ndarray], dtype: torch.dtype) -> nn.Module:
  """Hugging Face's GPT2LMHeadModel with these parameters (its Conv1D is (in, out), as they are).

  No network is used.

  Raises:
    ValueError: if the switches are not GPT-2's, or for parameters whose names or shapes are not
      those of the model.
  """
  switches = {
    "norm": "layer",
    "norm_embed": False,
    "norm_final": True,
    "activation": "gelu_tanh",
    "positions": "learned",
    "biases": "all",
    "tied_head": True,
    "scale_embed": False,
  }
  _check(config)
  if wrong := {
    name: getattr(config, name)
    for name, value in switches.items()
    if getattr(config, name) != value
  }:
    raise ValueError(f"not GPT-2's: {wrong}")
  import transformers

  hf_config = transformers.GPT2Config(
    vocab_size=config.vocab_size,
    n_positions=config.max_seq_len,
    n_embd=config.d_model,
    n_layer=config.num_layers,
    n_head=config.num_heads,
    n_inner=config.d_ff,
    activation_function="gelu_new",
    layer_norm_epsilon=NORM_EPS,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
    tie_word_embeddings=True,
    use_cache=False,
    bos_token_id=None,
    eos_token_id=None,
    attn_implementation="eager",
  )
  model = transformers.GPT2LMHeadModel(hf_config).to(dtype)
  _load(named(model), params)
  return model


def hf_gradients(model: nn.Module) -> dict[str, np.ndarray]:
  """What backward() left in the parameters of Hugging Face's model, float64, named and laid out as
  `parameters`.
  """
  return _grads(model)


def gpt2_update(
  param: np.ndarray,
  grad: np.ndarray,
  m: np.ndarray,
  v: np.ndarray,
  t: int,
  *,
  lr: float,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """AdamW as llm.c writes it, element by element, without changing its arguments.

  Args:
    param: The parameter before the step.
    grad: Its gradient.
    m: The mean of the gradients before the step, zero at first.
    v: The mean of their squares before the step, zero at first.
    t: The step, counted from 1.
    lr: The learning rate.
    b1: The decay of m.
    b2: The decay of v.
    eps: Added to the root of the corrected v.
    weight_decay: The share of the parameter added to the direction that lr multiplies.

  Returns:
    The parameter, m and v after the step.
  """
  m = b1 * m + (1 - b1) * grad
  v = b2 * v + (1 - b2) * grad**2
  m_hat = m / (1 - b1**t)
  v_hat = v / (1 - b2**t)
  param = param - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * param)
  return param, m, v


def _check(config) -> None:
  """Refuses a config that describes no network."""
  choices = {
    "norm": ("rms", "layer", "layer_no_bias"),
    "activation": tuple(ACTIVATIONS),
    "positions": ("learned", "sinusoidal"),
    "biases": ("none", "mlp", "all"),
  }
  for name, values in choices.items():
    if getattr(config, name) not in values:
      raise ValueError(f"{name} is one of {values}, not {getattr(config, name)!r}")
  if config.d_model % config.num_heads:
    raise ValueError(f"{config.num_heads} heads do not divide d_model {config.d_model}")
  if config.norm_embed and config.norm != "rms":
    raise ValueError(f"norm_embed is for norm 'rms', not {config.norm!r}")


def _make_norm(config) -> nn.Module:
  if config.norm == "rms":
    return RMSNorm()
  return nn.LayerNorm(config.d_model, eps=NORM_EPS, bias=config.norm == "layer")


def _mask_names(config) -> set[str]:
  places = ("attention", "attention_out", "activation", "mlp_out")
  return {"embed"} | {f"h.{i}.{place}" for i in range(config.num_layers) for place in places}


def _dropout(x: torch.Tensor, masks: Masks | None, name: str) -> torch.Tensor:
  """`x` times the mask of that name; `x` where there is none.

  A mask may not make `x` larger by broadcasting.
  """
  if masks is None or name not in masks:
    return x
  return x * _float(masks[name], x.dtype).expand_as(x)


def _flip(name: str, array: np.ndarray) -> np.ndarray:
  return np.asarray(array).T if name.endswith(TRANSPOSED) else array


def _long(array) -> torch.Tensor:
  return (
    array.long() if isinstance(array, torch.Tensor) else torch.from_numpy(np.array(array, np.int64))
  )


def _float(array, dtype: torch.dtype) -> torch.Tensor:
  return (
    array.to(dtype)
    if isinstance(array, torch.Tensor)
    else torch.from_numpy(np.array(array, np.float64)).to(dtype)
  )


def _array(tensor: torch.Tensor) -> np.ndarray:
  return np.array(
    tensor.detach().double().numpy()
  )  # a copy: later steps change the tensor in place


def _load(targets: dict[str, nn.Parameter], params: Mapping[str, np.ndarray]) -> None:
  """Copies `params` into the parameters of the same names, which must be the same names and
  shapes.
  """
  if targets.keys() != params.keys():
    missing, extra = sorted(targets.keys() - params.keys()), sorted(params.keys() - targets.keys())
    raise ValueError(f"parameters missing: {missing}; not in the model: {extra}")
  with torch.no_grad():
    for name, target in targets.items():
      value = _float(params[name], target.dtype)
      if value.shape != target.shape:
        raise ValueError(
          f"{name} is {tuple(target.shape)} in the model, given {tuple(value.shape)}"
        )
      target.copy_(value)


def _grads(model: nn.Module) -> dict[str, np.ndarray]:
  """Every parameter's grad in the model's own layout, float64."""
  params = named(model)
  if without := [name for name, param in params.items() if param.grad is None]:
    raise ValueError(f"no backward() has reached {without}")
  return {name: _array(param.grad) for name, param in params.items()}
