"""What an experiment is: frozen dataclasses, and which values go together.

Responsible for the `Experiment` dataclass and its sections, and for refusing values that do not go together. Not
responsible for changing settings by name or for JSON (`settings.py`), for the files that define experiments
(`catalog.py`), nor for anything that needs data or a device: this file imports no jax, so that listing experiments and
refusing a misspelt setting are instant.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jgpt.config.checks import FLOAT32_TINY, check_float32, check_range, check_types, nearest_divisors
from jgpt.errors import UserError

PARAM_KINDS = ("embedding", "matrix", "head", "gain", "bias")
MAX_SAMPLED_TOKENS = 10**8
DROPOUT_PLACES = ("embedding", "attention", "attention_out", "activation", "mlp_out")
# GPT-2's four sizes by their numbers of layers, as llm.c calls them; `model.size` sets these all.
GPT2_SIZES = {
  f"d{num_layers}": {"num_layers": num_layers, "num_heads": num_heads, "d_model": d_model, "d_ff": 4 * d_model}
  for num_layers, num_heads, d_model in ((12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600))
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The network.

  Attributes:
    vocab_size: ids the softmax sums over, at least the tokenizer's; None means the tokenizer's.
    vocab_multiple: the vocabulary's rows in memory are rounded up to a multiple of this. The rows added are zero, masked
      out of the softmax, never updated and not counted.
    max_seq_len: positions the model has, and the length of the decoding cache.
    num_layers: transformer blocks.
    num_heads: attention heads; must divide `d_model`.
    d_model: width of the residual stream.
    d_ff: width of the MLP's hidden layer.
    norm: "rms" (RMSNorm without a gain), "layer" (LayerNorm with gain and bias) or "layer_no_bias".
    norm_embed: whether the sum of embeddings is normalised before the first block; by "rms" only.
    norm_final: whether the residual stream is normalised before the head.
    activation: of the MLP: "relu", "gelu_tanh" (GPT-2's approximation) or "gelu_erf" (the exact GELU).
    positions: "learned", or "sinusoidal" (fixed; Vaswani et al. 2017, section 3.5).
    biases: "none", "mlp" (both of its layers) or "all" (attention's too). Those of norms are decided by `norm`.
    tied_head: whether the head is the token embedding; otherwise it has weights of its own.
    scale_embed: whether token embeddings are multiplied by sqrt(d_model) before positions are added.
    dropout: probability of dropping an entry in training; 0 drops none.
    dropout_places: what is dropped out: "embedding" (the sum with positions), "attention" (its probabilities),
      "attention_out" (its output projection), "activation" (after the MLP's), "mlp_out".
    init_std: standard deviation of every weight at initialisation. Gains begin at 1, biases at 0.
    scale_residual_init: whether the projections into the residual stream begin at init_std / sqrt(2 num_layers) (GPT-2).
  """

  vocab_size: int | None = None
  vocab_multiple: int = 1
  max_seq_len: int
  num_layers: int
  num_heads: int
  d_model: int
  d_ff: int
  norm: Literal["rms", "layer", "layer_no_bias"]
  norm_embed: bool
  norm_final: bool
  activation: Literal["relu", "gelu_tanh", "gelu_erf"]
  positions: Literal["learned", "sinusoidal"]
  biases: Literal["none", "mlp", "all"]
  tied_head: bool
  scale_embed: bool
  dropout: float = 0.0
  dropout_places: tuple[str, ...] = ()
  init_std: float
  scale_residual_init: bool

  def __post_init__(self):
    check_types(self, "model")
    check_range(self, "model", least=1, names="vocab_size vocab_multiple max_seq_len num_layers num_heads d_model d_ff")
    check_range(self, "model", least=0, names="init_std dropout")
    check_float32(self, "model", names="init_std")
    if self.d_model % self.num_heads:
      heads = nearest_divisors(self.d_model, self.num_heads)
      raise UserError(
        f"model.d_model={self.d_model} must be a multiple of model.num_heads={self.num_heads}; heads that divide it: "
        f"{heads}. Try --set model.num_heads={heads.split(' ')[0]}"
      )
    if self.norm_embed and self.norm != "rms":
      raise UserError(
        f"model.norm_embed=true goes with model.norm=rms only, not {self.norm}. Try --set model.norm_embed=false"
      )
    if self.positions == "sinusoidal" and self.d_model % 2:
      raise UserError(f"model.positions=sinusoidal needs an even model.d_model, not {self.d_model}: sines and cosines.")
    if self.dropout >= 1:
      raise UserError(f"model.dropout={self.dropout} must be below 1, for example 0.1.")
    for place in self.dropout_places:
      if place not in DROPOUT_PLACES:
        raise UserError(f"model.dropout_places holds {place!r}; the places are {', '.join(DROPOUT_PLACES)}.")
    if self.dropout and not self.dropout_places:
      raise UserError(
        f"model.dropout={self.dropout} has no effect without places; they are {', '.join(DROPOUT_PLACES)}. "
        "Try --set model.dropout_places=mlp_out"
      )

  @property
  def head_dim(self) -> int:
    """Size of one attention head."""
    return self.d_model // self.num_heads

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the embedding and the head in memory: `vocab_size` rounded up to a multiple of `vocab_multiple`."""
    if self.vocab_size is None:
      raise UserError("model.vocab_size is not resolved yet: it is the tokenizer's. Call settings.resolve first.")
    return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where text comes from, how it becomes ids, and how batches are cut from them.

  Attributes:
    source: name of a known text (see `jgpt.data.sources.SOURCES`).
    path: UTF-8 text of your own, or token files (*.bin of `prepare`, llm.c or nanoGPT): a file, a glob, or a folder, which
      holds *.txt or *.bin files and not both. Takes the place of `source`.
    tokenizer: "characters", "bytes", "bpe" (byte-level BPE trained on the training part) or "gpt2".
    bpe_vocab_size: ids of a "bpe" tokenizer, at least 256.
    mark_paragraphs: whether GPT-2's end-of-text token is put before each paragraph (what blank lines part), as llm.c does.
    batching: what a sequence is. "documents": a line each, between two BOS, shuffled once. Otherwise the text is one
      stream of tokens, and a sequence is a window of it: "random" windows; "sequential": in order, starting over at the
      end; "epochs": windows that do not overlap, in a new order each epoch.
    seq_len: positions in a training window; longer documents are cut. At most `model.max_seq_len`.
    batch_size: sequences per update, over all devices.
    heldout_fraction: share kept for validation: of distinct documents, chosen by their SHA-256; of a stream, the last
      characters. 0 keeps none.
    heldout_tokens: of a stream, or of token files that are held out by name, keep the first this many tokens instead
      (llm.c); None keeps `heldout_fraction` of a stream, and those files whole.
    num_batches: use only the first this many batches, again and again; None uses all. 1 is the overfit-one-batch check.
  """

  source: str
  path: str | None = None
  tokenizer: Literal["characters", "bytes", "bpe", "gpt2"]
  bpe_vocab_size: int | None = None
  mark_paragraphs: bool = False
  batching: Literal["documents", "random", "sequential", "epochs"]
  seq_len: int
  batch_size: int
  heldout_fraction: float
  heldout_tokens: int | None = None
  num_batches: int | None = None

  def __post_init__(self):
    check_types(self, "data")
    check_range(self, "data", least=1, names="seq_len batch_size num_batches heldout_tokens")
    check_range(self, "data", least=256, names="bpe_vocab_size")
    if not 0 <= self.heldout_fraction < 1:
      raise UserError(f"data.heldout_fraction={self.heldout_fraction} must be at least 0 and below 1, for example 0.05.")
    if self.heldout_fraction and self.heldout_tokens:
      raise UserError("data.heldout_fraction and data.heldout_tokens exclude each other. Try --set data.heldout_fraction=0")
    if self.batching == "documents" and (self.tokenizer != "characters" or self.heldout_tokens):
      raise UserError(
        f"data.batching=documents goes with data.tokenizer=characters, not {self.tokenizer}, and without "
        "data.heldout_tokens. Try --set data.batching=random"
      )
    if self.tokenizer == "bpe" and self.bpe_vocab_size is None:
      raise UserError("data.tokenizer=bpe needs the number of ids. Try --set data.bpe_vocab_size=2000")
    if self.mark_paragraphs and self.tokenizer != "gpt2":
      raise UserError(
        "data.mark_paragraphs=true goes with data.tokenizer=gpt2 only: others have no end-of-text token. "
        "Try --set data.mark_paragraphs=false"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW and its schedule.

  Attributes:
    peak_lr: the largest learning rate.
    schedule: after the warmup "linear" or "cosine" falls to `end_lr` at `decay_steps`; "constant" stays; "wsd" (warmup,
      stable, decay) stays, and falls linearly to `end_lr` over the last `cooldown_steps` before `decay_steps`.
    warmup_steps: updates until `peak_lr` is reached; 0 begins with it.
    warmup_from_zero: the rate of update `step` (from 0) while warming up: true gives peak_lr * step / warmup_steps, so
      that the first update changes nothing (optax); false gives peak_lr * (step + 1) / (warmup_steps + 1) (nanoGPT).
    end_lr: the rate from `decay_steps` on, unless "constant".
    decay_steps: updates until the rate is `end_lr`, warmup included; None means `train.steps`, resolved when the run
      first starts.
    cooldown_steps: of "wsd"; None means a fifth of `decay_steps`.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment (outside the root, as in torch and llm.c).
    weight_decay: decoupled decay, multiplied by the learning rate as in torch's AdamW.
    decay_kinds: kinds of parameters that decay (see `PARAM_KINDS`); the default is nanoGPT's, all but gains and biases.
    clip_norm: the gradient's global norm is scaled down to this; None does not clip.
    skip_spikes: an update whose loss is more than this many standard deviations above those before it is skipped (see
      `jgpt/optim.py`); None skips none.
  """

  peak_lr: float
  schedule: Literal["linear", "cosine", "constant", "wsd"]
  warmup_steps: int = 0
  warmup_from_zero: bool = True
  end_lr: float = 0.0
  decay_steps: int | None = None
  cooldown_steps: int | None = None
  b1: float
  b2: float
  eps: float
  weight_decay: float = 0.0
  decay_kinds: tuple[str, ...] = ("embedding", "matrix", "head")
  clip_norm: float | None = None
  skip_spikes: float | None = None

  def __post_init__(self):
    check_types(self, "optimizer")
    check_range(self, "optimizer", least=1, names="decay_steps cooldown_steps skip_spikes")
    check_range(self, "optimizer", least=0, names="peak_lr warmup_steps end_lr eps weight_decay clip_norm")
    check_float32(self, "optimizer", names="peak_lr end_lr eps weight_decay clip_norm skip_spikes")
    if self.eps < FLOAT32_TINY:  # 0 on a device
      raise UserError(f"optimizer.eps={self.eps:g} would divide 0 by 0 where a gradient is 0. Try --set optimizer.eps=1e-8")
    if self.clip_norm == 0:
      raise UserError("optimizer.clip_norm=0 would scale every gradient to nothing; none turns clipping off.")
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) <= 1 - 2**-24:  # what is nearer to 1 is 1 in float32
        raise UserError(f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1, for example 0.9.")
    for kind in self.decay_kinds:
      if kind not in PARAM_KINDS:
        raise UserError(f"optimizer.decay_kinds holds {kind!r}; the kinds of parameters are {', '.join(PARAM_KINDS)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How long, from which start, and how often something is said, measured or saved.

  Attributes:
    steps: updates in all; None means `epochs` passes over the training part.
    epochs: passes, where `data.batching` is "epochs"; `steps`, where given, goes before it.
    seed: of the initial weights, the order of the data, dropout and the samples.
    init: "normal" draws the initial weights with jax; "microgpt" as that program does, with Python's `random`.
    init_from: weights to begin from instead: a Hugging Face folder or its model.safetensors, llm.c's .bin, a run folder or
      one of its checkpoints/STEP, or "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" for those that OpenAI released. None
      draws them.
    micro_batch_size: sequences per forward and backward pass; None takes the batch at once. Gradients are accumulated
      inside the step, so the update is that of the whole batch (with dropout: but for what is dropped out).
    log_every: updates between two lines of progress.
    eval_every: updates between two evaluations on the held-out part, the first before any update; None evaluates at the
      end only, or where `epochs` is given before the first and after each.
    eval_batches: batches of an evaluation; None takes the whole held-out part, as the last evaluation always does.
    sample_every: updates between two samples; None samples at the end only, or where `epochs` is given after each.
    save_every: updates between two checkpoints; None saves by the clock, at the end and when interrupted only.
    save_every_seconds: time after which a checkpoint is saved too; None saves none by the clock.
    keep_latest: newest checkpoints that are kept.
    keep_best: checkpoints kept besides, those of the lowest held-out loss among the steps that were evaluated and saved.
    max_consecutive_skips: skipped updates in a row after which training stops with an error.
  """

  steps: int | None = None
  epochs: int | None = None
  seed: int = 0
  init: Literal["normal", "microgpt"] = "normal"
  init_from: str | None = None
  micro_batch_size: int | None = None
  log_every: int = 100
  eval_every: int | None = None
  eval_batches: int | None = None
  sample_every: int | None = None
  save_every: int | None = None
  save_every_seconds: float | None = 900.0
  keep_latest: int = 2
  keep_best: int = 1
  max_consecutive_skips: int = 10

  def __post_init__(self):
    check_types(self, "train")
    check_range(self, "train", least=1, names="epochs micro_batch_size log_every eval_every eval_batches sample_every")
    check_range(self, "train", least=1, names="save_every keep_latest max_consecutive_skips")
    check_range(self, "train", least=0, names="steps seed save_every_seconds keep_best")
    if self.steps is None and self.epochs is None:
      raise UserError("train.steps=none needs train.epochs: how long should it train? Try --set train.steps=1000")
    if self.init_from is not None and self.init != "normal":
      raise UserError(f"train.init_from and train.init={self.init} exclude each other. Try --set train.init=normal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """How text is drawn from the model.

  Attributes:
    prompt: how each text begins; "" begins with the tokenizer's own mark, or a newline where it has none.
    num: texts to draw.
    temperature: logits are divided by it; 0 takes the most probable token.
    top_k: draw among the k most probable tokens only; None or 0 means all.
    top_p: draw among the fewest most probable tokens that hold this share of the probability; 1 means all.
    max_tokens: new tokens at most; None stops where the context is full.
  """

  prompt: str = ""
  num: int = 20
  temperature: float
  top_k: int | None = None
  top_p: float = 1.0
  max_tokens: int | None = None

  def __post_init__(self):
    check_types(self, "sample")
    check_range(self, "sample", least=0, names="temperature top_k")
    check_range(self, "sample", least=1, names="num max_tokens")
    if self.num > 1_000_000:
      raise UserError(f"sample.num={self.num} must be at most 1,000,000: all are drawn at once.")
    if self.num * (self.max_tokens or 1) > MAX_SAMPLED_TOKENS:
      sizes, most = f"sample.num={self.num} times sample.max_tokens={self.max_tokens}", MAX_SAMPLED_TOKENS // self.num
      raise UserError(f"{sizes} must be at most {MAX_SAMPLED_TOKENS}. Try --set sample.max_tokens={most}")
    if self.temperature > 1e6:
      raise UserError(f"sample.temperature={self.temperature} must be at most 1e6.")
    if not 0 <= self.top_p <= 1:
      raise UserError(f"sample.top_p={self.top_p} must be from 0 to 1; 1 draws among all tokens.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How devices are used.

  Attributes:
    data: devices the batch is divided over; None means all there are. Must divide `data.batch_size`.
    scan_layers: whether the layers are one loop (quick to compile) or written out (quick on a CPU); None chooses.
    tricks: whether to do what makes this platform faster (`jgpt/devices/compute.py`); false is plain JAX, the same computation.
  """

  data: int | None = None
  scan_layers: bool | None = None
  tricks: bool = True

  def __post_init__(self):
    check_types(self, "mesh")
    check_range(self, "mesh", least=1, names="data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
  """A measured result to hold a run against.

  Attributes:
    data: the text it was measured on, as `jgpt.data.Data.label` names it.
    heldout: whether it is the loss over the held-out part, or the mean training loss of the last 50 updates.
    loss_nats_per_token: what runs with other seeds scatter around.
    band: how far from it they were.
  """

  data: str
  heldout: bool
  loss_nats_per_token: float
  band: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """Everything that decides a training run, as one hashable value."""

  model: ModelConfig
  data: DataConfig
  optimizer: OptimizerConfig
  train: TrainConfig
  sample: SampleConfig
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  expected: tuple[Expected, ...] = ()

  def __post_init__(self):
    if self.data.seq_len > self.model.max_seq_len:
      raise UserError(
        f"data.seq_len={self.data.seq_len} is longer than the model's model.max_seq_len={self.model.max_seq_len} "
        f"positions. Try --set data.seq_len={self.model.max_seq_len} or --set model.max_seq_len={self.data.seq_len}"
      )
    micro = self.train.micro_batch_size
    if micro and self.data.batch_size % micro:
      divisors = nearest_divisors(self.data.batch_size, micro)
      raise UserError(
        f"data.batch_size={self.data.batch_size} must be a multiple of train.micro_batch_size={micro}; what divides it: "
        f"{divisors}. Try --set train.micro_batch_size={divisors.split(' ')[0]}"
      )
    if self.mesh.data and (micro or self.data.batch_size) % self.mesh.data:
      what = f"train.micro_batch_size={micro}" if micro else f"data.batch_size={self.data.batch_size}"
      raise UserError(f"{what} must be a multiple of mesh.data={self.mesh.data}. Try --set mesh.data=1")
    if self.train.steps is None and self.data.batching != "epochs":
      raise UserError(f"train.epochs goes with data.batching=epochs, not {self.data.batching}. Try --set train.steps=1000")
