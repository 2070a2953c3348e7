"""`Experiment` and its sections: frozen dataclasses that check which values go together.

Changing settings by name and JSON are in `settings.py`, loading experiment files in `catalog.py`.
Imports no jax, so that listing experiments and reporting a wrong setting take no time.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

from jgpt.config.checks import FLOAT32_MAX, FLOAT32_TINY, check_fields, nearest_divisors, ranged
from jgpt.errors import UserError

PARAM_KINDS = ("embedding", "matrix", "head", "gain", "bias")
MAX_SAMPLED_TOKENS = 10**8
NUM_GROUPS = 4  # of documents in a batch, where `compute.group_documents` is true
DROPOUT_PLACES = ("embedding", "attention", "attention_out", "activation", "mlp_out")
# GPT-2's four sizes under llm.c's names, by number of layers; `model.size` sets all of these.
GPT2_SIZES = {
  f"d{num_layers}": {
    "num_layers": num_layers,
    "num_heads": num_heads,
    "d_model": d_model,
    "d_ff": 4 * d_model,
  }
  for num_layers, num_heads, d_model in (
    (12, 12, 768),
    (24, 16, 1024),
    (36, 20, 1280),
    (48, 25, 1600),
  )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The network.

  Attributes:
    vocab_size: ids that the softmax sums over, at least the tokenizer's; None takes the
      tokenizer's.
    vocab_multiple: the vocabulary's rows in memory are rounded up to a multiple of this. Added rows
      are zero, masked out of the softmax, never updated, and not counted as parameters.
    max_seq_len: positions of the model, and the length of the decoding cache.
    num_layers: transformer blocks.
    num_heads: attention heads; must divide `d_model`.
    d_model: width of the residual stream.
    d_ff: width of the MLP's hidden layer.
    norm: "rms" (RMSNorm without a gain), "layer" (LayerNorm with gain and bias) or "layer_no_bias".
    norm_embed: whether the sum of embeddings is normalised before the first block; needs "rms".
    norm_final: whether the residual stream is normalised before the head.
    activation: of the MLP: "relu", "gelu_tanh" (GPT-2's approximation) or "gelu_erf" (the exact
      GELU).
    positions: "learned", or "sinusoidal" (fixed; Vaswani et al. 2017, section 3.5).
    biases: "none", "mlp" (both of its layers) or "all" (attention's too). `norm` decides about
      those of norms.
    tied_head: whether the head shares the token embedding's weights.
    scale_embed: whether token embeddings are multiplied by sqrt(d_model) before positions are
      added.
    dropout: probability of dropping an entry in training; 0 drops none.
    dropout_places: where entries are dropped: "embedding" (the sum with positions), "attention"
      (its probabilities), "attention_out" (its output projection), "activation" (the MLP's hidden
      layer), "mlp_out" (the MLP's output).
    init_std: standard deviation of every weight at initialisation. Gains begin at 1, biases at 0.
    scale_residual_init: whether the projections into the residual stream begin at init_std / sqrt(2
      num_layers) (GPT-2).
  """

  vocab_size: int | None = ranged(None, least=1)
  vocab_multiple: int = ranged(1, least=1)
  max_seq_len: int = ranged(least=1)
  num_layers: int = ranged(least=1)
  num_heads: int = ranged(least=1)
  d_model: int = ranged(least=1)
  d_ff: int = ranged(least=1)
  norm: Literal["rms", "layer", "layer_no_bias"]
  norm_embed: bool
  norm_final: bool
  activation: Literal["relu", "gelu_tanh", "gelu_erf"]
  positions: Literal["learned", "sinusoidal"]
  biases: Literal["none", "mlp", "all"]
  tied_head: bool
  scale_embed: bool
  dropout: float = ranged(0.0, least=0)
  dropout_places: tuple[str, ...] = ()
  init_std: float = ranged(least=0, most=FLOAT32_MAX)
  scale_residual_init: bool

  def __post_init__(self):
    check_fields(self, "model")
    if self.d_model % self.num_heads:
      heads = nearest_divisors(self.d_model, self.num_heads)
      raise UserError(
        f"model.d_model={self.d_model} must be a multiple of model.num_heads={self.num_heads}; "
        f"heads that divide it: {heads}. Try --set model.num_heads={heads.split(' ')[0]}"
      )
    if self.norm_embed and self.norm != "rms":
      raise UserError(
        f"model.norm_embed=true goes with model.norm=rms only, not {self.norm}. Try --set "
        "model.norm_embed=false"
      )
    if self.positions == "sinusoidal" and self.d_model % 2:
      raise UserError(
        f"model.positions=sinusoidal needs an even model.d_model, not {self.d_model}: sines and "
        "cosines."
      )
    if self.dropout >= 1:
      raise UserError(f"model.dropout={self.dropout} must be below 1, for example 0.1.")
    for place in self.dropout_places:
      if place not in DROPOUT_PLACES:
        raise UserError(
          f"model.dropout_places holds {place!r}; the places are {', '.join(DROPOUT_PLACES)}."
        )
    if self.dropout and not self.dropout_places:
      raise UserError(
        f"model.dropout={self.dropout} has no effect without places; they are "
        f"{', '.join(DROPOUT_PLACES)}. Try --set model.dropout_places=mlp_out"
      )

  @property
  def head_dim(self) -> int:
    """Returns the size of one attention head."""
    return self.d_model // self.num_heads

  @property
  def padded_vocab_size(self) -> int:
    """Returns `vocab_size` rounded up to a multiple of `vocab_multiple`.

    This is the number of rows that the embedding and the head have in memory.
    """
    if self.vocab_size is None:
      raise UserError(
        "model.vocab_size is not resolved yet: it is the tokenizer's. Call settings.resolve first."
      )
    return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """The text, the tokenizer, and how batches are made.

  Attributes:
    source: name of a known text (see `jgpt.data.sources.SOURCES`).
    path: replaces `source` by a user's UTF-8 text, or by token files (*.bin of `prepare`, llm.c or
      nanoGPT): a file, a glob, or a folder of either *.txt or *.bin files.
    tokenizer: "characters", "bytes", "bpe" (byte-level BPE, trained on the training part alone) or
      "gpt2".
    bpe_vocab_size: ids of a "bpe" tokenizer, at least 256.
    mark_paragraphs: whether GPT-2's end-of-text token is put before each paragraph (text between
      blank lines), as in llm.c.
    batching: what a sequence is. "documents": one line between two BOS; lines are shuffled once.
      Otherwise the text is one stream of tokens, and a sequence is a window of it: "random"
      windows; "sequential": in order, starting over at the end; "epochs": windows that do not
      overlap, in a new order each epoch.
    seq_len: positions in a training window; longer documents are truncated. At most
      `model.max_seq_len`.
    batch_size: sequences per update, over all devices.
    heldout_fraction: share kept for validation: of distinct documents, chosen by their SHA-256; of
      a stream, the last characters. 0 keeps none.
    heldout_tokens: number of tokens kept for validation instead, the first of a stream or of token
      files that are held out by name (as in llm.c). None keeps `heldout_fraction` of a stream, and
      all of those files.
    num_batches: number of batches that are used, again and again; None uses all. 1 is the check
      that a model can overfit one batch.
  """

  source: str
  path: str | None = None
  tokenizer: Literal["characters", "bytes", "bpe", "gpt2"]
  bpe_vocab_size: int | None = ranged(None, least=256)
  mark_paragraphs: bool = False
  batching: Literal["documents", "random", "sequential", "epochs"]
  seq_len: int = ranged(least=1)
  batch_size: int = ranged(least=1)
  heldout_fraction: float
  heldout_tokens: int | None = ranged(None, least=1)
  num_batches: int | None = ranged(None, least=1)

  def __post_init__(self):
    check_fields(self, "data")
    if not 0 <= self.heldout_fraction < 1:
      raise UserError(
        f"data.heldout_fraction={self.heldout_fraction} must be at least 0 and below 1, for "
        "example 0.05."
      )
    if self.heldout_fraction and self.heldout_tokens:
      raise UserError(
        "data.heldout_fraction and data.heldout_tokens exclude each other. Try --set "
        "data.heldout_fraction=0"
      )
    if self.batching == "documents" and (self.tokenizer != "characters" or self.heldout_tokens):
      raise UserError(
        f"data.batching=documents goes with data.tokenizer=characters, not {self.tokenizer}, and "
        "without data.heldout_tokens. Try --set data.batching=random"
      )
    if self.tokenizer == "bpe" and self.bpe_vocab_size is None:
      raise UserError(
        "data.tokenizer=bpe needs the number of ids. Try --set data.bpe_vocab_size=2000"
      )
    if self.mark_paragraphs and self.tokenizer != "gpt2":
      raise UserError(
        "data.mark_paragraphs=true goes with data.tokenizer=gpt2 only: others have no end-of-text "
        "token. Try --set data.mark_paragraphs=false"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """The optimizer and its schedule.

  With g the clipped gradient of a parameter p, d its `weight_decay` (0 outside `decay_kinds`) and
  lr the rate:

    adamw  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
           p = p - lr (m_hat / (sqrt(v_hat) + eps) + d p), with m_hat = m / (1 - b1^t) and v_hat =
           v / (1 - b2^t) at update t
    adam   the same with g + d p for g, and without d p in the last line
    sgd    m = momentum m + g + d p;  p = p - lr m

  They are torch's AdamW, Adam, and SGD without dampening or Nesterov's step.

  Attributes:
    name: "adamw", "adam" or "sgd".
    momentum: of sgd, from 0 to below 1; the Adams have b1.
    peak_lr: the largest learning rate.
    schedule: of the rate after the warmup. "linear" and "cosine" fall to `end_lr` at `decay_steps`;
      "constant" stays at `peak_lr`; "wsd" (warmup, stable, decay) stays, then falls linearly to
      `end_lr` over the last `cooldown_steps` before `decay_steps`.
    warmup_steps: updates until `peak_lr` is reached; 0 starts with `peak_lr`.
    warmup_from_zero: the rate of update `step` (from 0) in the warmup: true takes peak_lr * step /
      warmup_steps, so that the first update changes nothing (optax); false takes peak_lr *
      (step + 1) / (warmup_steps + 1) (nanoGPT).
    end_lr: the rate from `decay_steps` on, unless "constant".
    decay_steps: updates until the rate is `end_lr`, warmup included; None takes `train.steps` of
      the run's first start.
    cooldown_steps: of "wsd"; None takes a fifth of `decay_steps`.
    b1: decay of the first moment. sgd does not read b1, b2 and eps, which every experiment has.
    b2: decay of the second moment.
    eps: added to the root of the second moment (outside the root, as in torch and llm.c).
    weight_decay: of adamw decoupled, and multiplied by the learning rate as in torch; of adam and
      sgd L2, a part of the gradient.
    decay_kinds: kinds of parameters that decay (see `PARAM_KINDS`); the default is nanoGPT's, all
      but gains and biases.
    clip_norm: largest global norm of the gradient, which is scaled down to it; None does not clip.
    skip_spikes: skips an update whose loss is more than this many standard deviations above the
      mean of earlier losses (see `jgpt/optim/spikes.py`); None skips no such update.
  """

  name: Literal["adamw", "adam", "sgd"] = "adamw"
  momentum: float = ranged(0.0, least=0)
  peak_lr: float = ranged(least=0, most=FLOAT32_MAX)
  schedule: Literal["linear", "cosine", "constant", "wsd"]
  warmup_steps: int = ranged(0, least=0)
  warmup_from_zero: bool = True
  end_lr: float = ranged(0.0, least=0, most=FLOAT32_MAX)
  decay_steps: int | None = ranged(None, least=1)
  cooldown_steps: int | None = ranged(None, least=1)
  b1: float
  b2: float
  eps: float = ranged(least=0, most=FLOAT32_MAX)
  weight_decay: float = ranged(0.0, least=0, most=FLOAT32_MAX)
  decay_kinds: tuple[str, ...] = ("embedding", "matrix", "head")
  clip_norm: float | None = ranged(None, least=0, most=FLOAT32_MAX)
  skip_spikes: float | None = ranged(None, least=1, most=FLOAT32_MAX)

  def __post_init__(self):
    check_fields(self, "optimizer")
    if self.eps < FLOAT32_TINY:
      raise UserError(
        f"optimizer.eps={self.eps:g} would divide 0 by 0 where a gradient is 0. Try --set "
        "optimizer.eps=1e-8"
      )
    if self.clip_norm == 0:
      raise UserError(
        "optimizer.clip_norm=0 would scale every gradient to nothing; none turns clipping off."
      )
    for name in ("b1", "b2", "momentum"):
      if not 0 <= getattr(self, name) <= 1 - 2**-24:
        raise UserError(
          f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1, at most "
          f"0.99999994: numbers nearer to 1 are 1 in float32. Try --set optimizer.{name}=0.9"
        )
    if self.momentum and self.name != "sgd":
      raise UserError(
        f"optimizer.momentum={self.momentum:g} is sgd's, and optimizer.name is {self.name}, whose "
        f"first moment decays by optimizer.b1={self.b1:g}. Try --set optimizer.name=sgd, or --set "
        "optimizer.momentum=0"
      )
    for kind in self.decay_kinds:
      if kind not in PARAM_KINDS:
        raise UserError(
          f"optimizer.decay_kinds holds {kind!r}; the kinds of parameters are "
          f"{', '.join(PARAM_KINDS)}."
        )

  @property
  def num_moments(self) -> int:
    """Counts the arrays that the optimizer keeps of each parameter."""
    return 2 if self.name != "sgd" else 1 if self.momentum else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """The length and start of training, and how often to log, evaluate, sample and save.

  Attributes:
    steps: updates in total; None trains for `epochs` passes over the training part.
    epochs: passes, where `data.batching` is "epochs"; `steps` takes precedence.
    seed: of the initial weights, the order of the data, dropout and the samples.
    init: "normal" draws the initial weights with jax; "microgpt" draws those of that program, with
      Python's `random`.
    init_from: loads the initial weights instead: a Hugging Face folder or its model.safetensors,
      llm.c's .bin, a run folder or one of its checkpoints/STEP, or "gpt2", "gpt2-medium",
      "gpt2-large", "gpt2-xl" for those that OpenAI released. None draws them.
    continue_from: begins with the parameters, moments and their count of another run instead: its
      folder or one of its checkpoints/STEP. Step, schedule and order of the data begin anew.
    micro_batch_size: sequences per forward and backward pass; None takes the whole batch.
      Gradients are accumulated inside the step, so the update is that of the whole batch, except
      that dropout drops other entries. Evaluation takes as many sequences at once.
    log_every: updates between two lines of progress.
    eval_every: updates between two evaluations on the held-out part, the first before any update;
      the last update is followed by one too. "auto" takes a fifth of `steps`, or with `epochs` an
      epoch, and less often or on fewer batches where evaluating would take more than 2% of the time
      (`evaluation.schedule_evaluations`). None evaluates at the end only; with `epochs`, before the
      first update and after each epoch.
    eval_batches: batches of an evaluation; None takes the whole held-out part, as the last
      evaluation always does, or what `eval_every`="auto" chooses.
    sample_every: updates between two samples. None samples at the end only; with `epochs`, after
      each epoch.
    save_every: updates between two checkpoints. None saves only by the clock, at the end and when
      interrupted.
    save_every_seconds: time after which a checkpoint is saved as well; None does not save by the
      clock.
    max_seconds: time after which a start stops making updates, counted from the beginning of
      `train_run`, so with compiling; it then saves and evaluates as at the end, and the same
      command goes on for as long again. At least one update is made. None sets no limit.
    keep_latest: number of newest checkpoints to keep.
    keep_best: number of other checkpoints to keep, those with the lowest held-out loss. Where
      memory allows, a copy of the best state so far is held and saved together with the next
      checkpoint that is due; otherwise a new best is saved at once, at most after every fifth
      evaluation. Losses over different batches are not compared: of each kind the best are kept.
    max_consecutive_skips: skipped updates in a row after which training stops with an error.
  """

  steps: int | None = ranged(None, least=0)
  epochs: int | None = ranged(None, least=1)
  seed: int = ranged(0, least=0)
  init: Literal["normal", "microgpt"] = "normal"
  init_from: str | None = None
  continue_from: str | None = None
  micro_batch_size: int | None = ranged(None, least=1)
  log_every: int = ranged(100, least=1)
  eval_every: int | Literal["auto"] | None = ranged("auto", least=1)
  eval_batches: int | None = ranged(None, least=1)
  sample_every: int | None = ranged(None, least=1)
  save_every: int | None = ranged(None, least=1)
  save_every_seconds: float | None = ranged(900.0, least=0)
  max_seconds: float | None = ranged(None, least=0)
  keep_latest: int = ranged(2, least=1)
  keep_best: int = ranged(1, least=0)
  max_consecutive_skips: int = ranged(10, least=1)

  def __post_init__(self):
    check_fields(self, "train")
    if self.steps is None and self.epochs is None:
      raise UserError(
        "train.steps=none needs train.epochs: how long should it train? Try --set train.steps=1000"
      )
    if self.init_from is not None and self.continue_from is not None:
      raise UserError(
        "train.init_from, which takes parameters alone, and train.continue_from, which takes "
        "moments too, exclude each other. Try --set train.init_from=none"
      )
    for name in ("init_from", "continue_from"):
      if getattr(self, name) is not None and self.init != "normal":
        raise UserError(
          f"train.{name} and train.init={self.init} exclude each other. Try --set train.init=normal"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """Sampling text from the model.

  Attributes:
    prompt: start of each text; "" starts with the tokenizer's BOS or end-of-text token, or with a
      newline where it has neither.
    num: texts to draw.
    temperature: divides the logits; 0 takes the most probable token.
    top_k: draws among the k most probable tokens only; None or 0 draws among all.
    top_p: draws among the smallest set of most probable tokens whose probabilities sum to this; 1
      draws among all.
    max_tokens: largest number of new tokens; None stops where the context is full.
  """

  prompt: str = ""
  num: int = ranged(20, least=1)
  temperature: float = ranged(least=0)
  top_k: int | None = ranged(None, least=0)
  top_p: float = 1.0
  max_tokens: int | None = ranged(None, least=1)

  def __post_init__(self):
    check_fields(self, "sample")
    if self.num > 1_000_000:
      raise UserError(f"sample.num={self.num} must be at most 1,000,000: all are drawn at once.")
    if self.num * (self.max_tokens or 1) > MAX_SAMPLED_TOKENS:
      sizes = f"sample.num={self.num} times sample.max_tokens={self.max_tokens}"
      most = MAX_SAMPLED_TOKENS // self.num
      raise UserError(
        f"{sizes} must be at most {MAX_SAMPLED_TOKENS}. Try --set sample.max_tokens={most}"
      )
    if self.temperature > 1e6:
      raise UserError(f"sample.temperature={self.temperature} must be at most 1e6.")
    if not 0 <= self.top_p <= 1:
      raise UserError(f"sample.top_p={self.top_p} must be from 0 to 1; 1 draws among all tokens.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """The devices to use, in a mesh of data x fsdp x tensor.

  At most one of the three sizes is -1, which takes the devices that the others leave. A batch is
  divided over data x fsdp, whose product must divide `data.batch_size`, or `train.micro_batch_size`
  where it is set.

  Attributes:
    data: devices, or groups of them, that hold the same parameters.
    fsdp: devices that each parameter and its moments are divided over; each device has a part of
      the batch, and gets a layer's parameters when it computes the layer.
    tensor: devices that heads, the MLP's hidden units and the vocabulary are divided over; they
      compute the same part of the batch together.
    timeout_seconds: how long a process of a run on several hosts waits for another one.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  timeout_seconds: float = ranged(600.0, least=1)

  def __post_init__(self):
    check_fields(self, "mesh")
    sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
    for name, size in sizes.items():
      if size < 1 and size != -1:
        raise UserError(
          f"mesh.{name}={size} must be at least 1, or -1 for the devices left over. Try --set "
          f"mesh.{name}=1"
        )
    if (open_ended := [f"mesh.{name}=-1" for name, size in sizes.items() if size == -1])[1:]:
      last = open_ended[-1].partition("=")[0]
      raise UserError(f"only one of {', '.join(open_ended)} can be -1. Try --set {last}=1")

  @property
  def num_devices(self) -> int | None:
    """Returns how many devices the mesh has; None where that depends on how many there are."""
    size = self.data * self.fsdp * self.tensor
    return None if size < 0 else size

  @property
  def num_batch_parts(self) -> int | None:
    """Returns how many parts a batch is divided into; None where that is not known yet."""
    size = self.data * self.fsdp
    return None if size < 0 else size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
  """How to compute; every choice equals the plain definition up to rounding.

  `devices/compute.py` resolves "auto" once, from the platform and the shapes; other values are
  kept. Code that reads an unresolved "auto" computes the plain definition.

  Attributes:
    tricks: what "auto" resolves to: true takes what was measured to be faster, false the plain
      definition of every field.
    dtype: of activations and of the operands of products, which are summed in float32. Parameters,
      moments, gradients, the statistics of norms, softmax and loss are float32 always. "auto" is
      bfloat16 on TPUs, on GPUs that multiply it and, for models of 500,000 parameters and more, on
      processors that do, else float32. What it resolves to at a run's first start is a part of the
      run's identity, unlike every other field here.
    precision: of float32 products: "default" is JAX's for the device, "high" and "highest" take
      more passes (`jax.lax.Precision`).
    attention: "plain" is the definition; "blocks" skips the keys after each block of queries;
      "splash" (TPU) and "cudnn" (GPU, bfloat16) are fused kernels, without dropout. A kernel that
      the device or the model does not have is replaced, with a line that says why.
    matmul: "einsum" is the definition of the projections; "flat" computes each as one product of
      two matrices.
    layers: "scan" loops over stacked layers, which is quick to compile; "unroll" writes the layers
      out, which is quick to run on a CPU.
    remat: what the backward pass computes again instead of reading it from memory: "none";
      "elementwise", norms and activation functions; or "block", whole blocks, of which the residual
      stream alone is kept.
    loss_chunks: pieces of a batch's tokens, one after the other, in which the logits and the loss
      are computed; 1 holds the logits of all tokens at once.
    group_documents: whether the documents of a batch are grouped by length, so that groups of
      short ones are computed at half of the positions; false is the definition.
    select: how a skipped update is undone: "plain" selects between the old and the new moments of
      all parameters at once; "ordered" of one parameter after the other, which keeps XLA:CPU in one
      thread.
    compiler_options: "none" compiles with XLA's defaults, "auto" with the options in
      `devices/compute.py`.
  """

  tricks: bool = True
  dtype: Literal["auto", "float32", "bfloat16"] = "auto"
  precision: Literal["default", "high", "highest"] = "default"
  attention: Literal["auto", "plain", "blocks", "cudnn", "splash"] = "auto"
  matmul: Literal["auto", "einsum", "flat"] = "auto"
  layers: Literal["auto", "scan", "unroll"] = "auto"
  remat: Literal["auto", "none", "elementwise", "block"] = "auto"
  loss_chunks: int | Literal["auto"] = ranged("auto", least=1)
  group_documents: bool | Literal["auto"] = "auto"
  select: Literal["auto", "plain", "ordered"] = "auto"
  compiler_options: Literal["auto", "none"] = "auto"

  def __post_init__(self):
    check_fields(self, "compute")


# The plain definition in every field.
PLAIN = ComputeConfig(
  tricks=False,
  dtype="float32",
  attention="plain",
  matmul="einsum",
  layers="scan",
  remat="none",
  loss_chunks=1,
  group_documents=False,
  select="plain",
  compiler_options="none",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
  """A measured result, with which a finished run is compared.

  Attributes:
    data: the text it was measured on, as `jgpt.data.corpus.Data.label` names it.
    heldout: true for the loss over the held-out part, false for the mean training loss of the last
      50 updates.
    loss_nats_per_token: centre of the losses of runs with different seeds.
    band: largest distance from the centre, in nats per token.
  """

  data: str
  heldout: bool
  loss_nats_per_token: float
  band: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """All settings of a training run, as one hashable value.

  Attributes:
    model: the network.
    data: the text, the tokenizer and the batches.
    optimizer: the optimizer and its schedule.
    train: the length of training, and how often to log, evaluate, sample and save.
    sample: sampling.
    mesh: the devices.
    compute: forms of computation, equal up to rounding.
    expected: measured results; not a setting.
    given: names of the settings that were changed by name (`settings.change`). Weights to begin
      from do not replace these. Not a setting, and not compared.
  """

  model: ModelConfig
  data: DataConfig
  optimizer: OptimizerConfig
  train: TrainConfig
  sample: SampleConfig
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
  expected: tuple[Expected, ...] = ()
  given: tuple[str, ...] = dataclasses.field(default=(), compare=False)

  def __post_init__(self):
    if self.data.seq_len > self.model.max_seq_len:
      raise UserError(
        f"data.seq_len={self.data.seq_len} is longer than the model's "
        f"model.max_seq_len={self.model.max_seq_len} positions. Try --set "
        f"data.seq_len={self.model.max_seq_len} or --set model.max_seq_len={self.data.seq_len}"
      )
    micro = self.train.micro_batch_size
    if micro and self.data.batch_size % micro:
      divisors = nearest_divisors(self.data.batch_size, micro)
      raise UserError(
        f"data.batch_size={self.data.batch_size} must be a multiple of "
        f"train.micro_batch_size={micro}; what divides it: {divisors}. Try --set "
        f"train.micro_batch_size={divisors.split(' ')[0]}"
      )
    # Where a size is -1 the other one must divide the batch too.
    num_parts = abs(self.mesh.data * self.mesh.fsdp)
    if (micro or self.data.batch_size) % num_parts:
      what = (
        f"train.micro_batch_size={micro}" if micro else f"data.batch_size={self.data.batch_size}"
      )
      sizes = "mesh.data" if self.mesh.fsdp == 1 else "mesh.data * mesh.fsdp"
      if self.mesh.data == -1:
        sizes = "mesh.fsdp"
      advice = "mesh.data=1" if self.mesh.fsdp == 1 else "mesh.fsdp=1"
      raise UserError(f"{what} must be a multiple of {sizes}={num_parts}. Try --set {advice}")
    if self.compute.group_documents is True and not may_group_documents(self):
      raise UserError(
        "compute.group_documents=true needs data.batching=documents, a data.batch_size that is a "
        f"multiple of {NUM_GROUPS}, an even data.seq_len, no dropout, no train.micro_batch_size "
        "and one device (mesh.data=1). Try --set compute.group_documents=auto"
      )
    if self.train.steps is None and self.data.batching != "epochs":
      raise UserError(
        f"train.epochs goes with data.batching=epochs, not {self.data.batching}. Try --set "
        "train.steps=1000"
      )


def may_group_documents(experiment: Experiment) -> bool:
  """Returns whether `compute.group_documents` would leave an experiment's results unchanged."""
  data, train = experiment.data, experiment.train
  return (
    data.batching == "documents"
    and data.batch_size % NUM_GROUPS == 0
    and data.seq_len % 2 == 0
    and train.micro_batch_size is None
    and not experiment.model.dropout  # a mask depends on where a document stands
    and experiment.mesh.num_devices == 1  # sorted, a divided batch would move between devices
  )


class Hyper(NamedTuple):
  """Numbers of an experiment that may be arrays, so that the members of a sweep are one program.

  Attributes:
    peak_lr: see `OptimizerConfig`; float32 scalar.
    weight_decay: see `OptimizerConfig`; float32 scalar.
    b1: see `OptimizerConfig`; float32 scalar.
    b2: see `OptimizerConfig`; float32 scalar.
    seed: of the data's order and of dropout; int32 scalar.
  """

  peak_lr: Any
  weight_decay: Any
  b1: Any
  b2: Any
  seed: Any

  @classmethod
  def of(cls, experiment: Experiment) -> Hyper:
    """Returns the experiment's own numbers."""
    o = experiment.optimizer
    return cls(o.peak_lr, o.weight_decay, o.b1, o.b2, experiment.train.seed)
