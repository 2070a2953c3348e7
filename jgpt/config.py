"""What an experiment is: frozen dataclasses, their validation, and the files that define one.

Responsible for the `Experiment` dataclass and its sections, for refusing values that do not go together, and for finding
experiment files. Not responsible for changing settings by name or for JSON (`settings.py`), nor for anything that needs
data or a device: this file imports no jax, so that listing experiments and refusing a misspelt setting are instant.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import sys
import traceback
import types
import typing
from pathlib import Path
from typing import Any


class UserError(ValueError):
  """An error that a user can mend. Its text says what, got, need and how; commands print it without a stack trace."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Sizes of the network.

  Attributes:
    vocab_size: ids the softmax sums over, at least the tokenizer's; None means the tokenizer's.
    vocab_multiple: the vocabulary's rows in memory are rounded up to a multiple of this. The rows added are zero, masked
      out of the softmax, never updated and not counted.
    max_seq_len: positions the model has, and the length of the decoding cache.
    num_layers: transformer blocks.
    num_heads: attention heads; must divide `d_model`.
    d_model: width of the residual stream.
    d_ff: width of the MLP's hidden layer.
    init_std: standard deviation of every weight at initialisation.
  """

  vocab_size: int | None = None
  vocab_multiple: int = 1
  max_seq_len: int
  num_layers: int
  num_heads: int
  d_model: int
  d_ff: int
  init_std: float

  def __post_init__(self):
    _check_types(self, "model")
    _check_range(self, "model", least=1, names="vocab_size vocab_multiple max_seq_len num_layers num_heads d_model d_ff")
    _check_range(self, "model", least=0, names="init_std")
    if self.d_model % self.num_heads:
      heads = _nearest_divisors(self.d_model, self.num_heads)
      raise UserError(
        f"model.d_model={self.d_model} must be a multiple of model.num_heads={self.num_heads}; heads that divide it: "
        f"{heads}. Try --set model.num_heads={heads.split(' ')[0]}"
      )

  @property
  def head_dim(self) -> int:
    """Size of one attention head."""
    return self.d_model // self.num_heads

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the embedding and the head in memory: `vocab_size` rounded up to a multiple of `vocab_multiple`."""
    if self.vocab_size is None:
      raise UserError("model.vocab_size is not resolved yet: it is the tokenizer's. Call config.resolve first.")
    return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where documents come from and how batches are cut from them.

  Attributes:
    source: name of a known text (see `jgpt.sources.SOURCES`).
    path: a text file of your own, UTF-8, one document a line; takes the place of `source`.
    seq_len: positions in a training window; longer documents are cut. At most `model.max_seq_len`.
    batch_size: documents per update, over all devices.
    heldout_fraction: share of distinct documents, chosen by their SHA-256, that is kept for validation; 0 keeps none.
    num_batches: use only the first this many batches, again and again; None uses all. 1 is the overfit-one-batch check.
  """

  source: str
  path: str | None = None
  seq_len: int
  batch_size: int
  heldout_fraction: float
  num_batches: int | None = None

  def __post_init__(self):
    _check_types(self, "data")
    _check_range(self, "data", least=1, names="seq_len batch_size num_batches")
    if not 0 <= self.heldout_fraction < 1:
      raise UserError(f"data.heldout_fraction={self.heldout_fraction} must be at least 0 and below 1, for example 0.05.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW and its schedule: the rate falls linearly from `peak_lr` at step 0 to 0 at `decay_steps`.

  Attributes:
    peak_lr: learning rate of the first update.
    decay_steps: updates until the rate is 0; None means `train.steps`, resolved when the run first starts.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment (outside the root, as in torch and llm.c).
    weight_decay: decoupled decay, multiplied by the learning rate as in torch's AdamW.
    decay_kinds: kinds of parameters that decay (see `PARAM_KINDS`); the default is nanoGPT's, all but gains and biases.
    clip_norm: the gradient's global norm is scaled down to this; None does not clip.
  """

  peak_lr: float
  decay_steps: int | None = None
  b1: float
  b2: float
  eps: float
  weight_decay: float = 0.0
  decay_kinds: tuple[str, ...] = ("embedding", "matrix", "head")
  clip_norm: float | None = None

  def __post_init__(self):
    _check_types(self, "optimizer")
    _check_range(self, "optimizer", least=1, names="decay_steps")
    _check_range(self, "optimizer", least=0, names="peak_lr eps weight_decay clip_norm")
    if self.eps == 0:
      raise UserError("optimizer.eps=0 would divide 0 by 0 where a gradient is 0; for example 1e-8.")
    if self.clip_norm == 0:
      raise UserError("optimizer.clip_norm=0 would scale every gradient to nothing; none turns clipping off.")
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise UserError(f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1, for example 0.9.")
    for kind in self.decay_kinds:
      if kind not in PARAM_KINDS:
        raise UserError(f"optimizer.decay_kinds holds {kind!r}; the kinds of parameters are {', '.join(PARAM_KINDS)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How long, from which seed, and how often something is said or saved.

  Attributes:
    steps: updates in all.
    seed: of the initial weights, the order of the documents and the samples.
    micro_batch_size: documents per forward and backward pass; None takes the batch at once. Gradients are accumulated
      inside the step, so the update is that of the whole batch.
    log_every: updates between two lines of progress.
    save_every: updates between two checkpoints; None saves at the end (and when interrupted).
  """

  steps: int
  seed: int = 0
  micro_batch_size: int | None = None
  log_every: int = 100
  save_every: int | None = None

  def __post_init__(self):
    _check_types(self, "train")
    _check_range(self, "train", least=1, names="micro_batch_size log_every save_every")
    _check_range(self, "train", least=0, names="steps seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """How text is drawn from the model.

  Attributes:
    num: texts to draw.
    temperature: logits are divided by it; 0 takes the most probable token.
    top_k: draw among the k most probable tokens only; None or 0 means all.
    top_p: draw among the fewest most probable tokens that hold this share of the probability; 1 means all.
    max_tokens: new tokens at most; None stops where the context is full.
  """

  num: int = 20
  temperature: float
  top_k: int | None = None
  top_p: float = 1.0
  max_tokens: int | None = None

  def __post_init__(self):
    _check_types(self, "sample")
    _check_range(self, "sample", least=0, names="temperature top_k")
    _check_range(self, "sample", least=1, names="num max_tokens")
    if self.num > 1_000_000:
      raise UserError(f"sample.num={self.num} must be at most 1,000,000: all are drawn at once.")
    if self.temperature > 1e6:
      raise UserError(f"sample.temperature={self.temperature} must be at most 1e6.")
    if not 0 <= self.top_p <= 1:
      raise UserError(f"sample.top_p={self.top_p} must be from 0 to 1; 1 draws among all tokens.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How devices are used.

  Attributes:
    data: devices the batch is divided over; None means all there are. Must divide `data.batch_size`.
  """

  data: int | None = None

  def __post_init__(self):
    _check_types(self, "mesh")
    _check_range(self, "mesh", least=1, names="data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
  """A measured result to hold a run against.

  Attributes:
    data: the text it was measured on.
    loss_nats_per_token: mean training loss over the last 50 updates.
    band: runs with other seeds stayed within this of it.
  """

  data: str
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
      divisors = _nearest_divisors(self.data.batch_size, micro)
      raise UserError(
        f"data.batch_size={self.data.batch_size} must be a multiple of train.micro_batch_size={micro}; what divides it: "
        f"{divisors}. Try --set train.micro_batch_size={divisors.split(' ')[0]}"
      )
    if self.mesh.data and (micro or self.data.batch_size) % self.mesh.data:
      what = f"train.micro_batch_size={micro}" if micro else f"data.batch_size={self.data.batch_size}"
      raise UserError(f"{what} must be a multiple of mesh.data={self.mesh.data}. Try --set mesh.data=1")


PARAM_KINDS = ("embedding", "matrix", "head", "gain", "bias")


def resolve(experiment: Experiment, vocab_size: int) -> Experiment:
  """Fills in what was left open: `model.vocab_size` from the tokenizer, `optimizer.decay_steps` from `train.steps`.

  Args:
    experiment: settings, perhaps with None in those places.
    vocab_size: ids of the tokenizer.

  Raises:
    UserError: if `model.vocab_size` was given and is smaller than the tokenizer's.
  """
  given = experiment.model.vocab_size
  if given is not None and given < vocab_size:
    raise UserError(
      f"model.vocab_size={given} is smaller than the tokenizer's {vocab_size} ids. Try --set model.vocab_size=none, "
      "which takes the tokenizer's"
    )
  model = dataclasses.replace(experiment.model, vocab_size=given or vocab_size)
  decay_steps = experiment.optimizer.decay_steps or max(1, experiment.train.steps)
  optimizer = dataclasses.replace(experiment.optimizer, decay_steps=decay_steps)
  return dataclasses.replace(experiment, model=model, optimizer=optimizer)


# --- Checks ---


def _check_types(config: Any, section: str) -> None:
  """Raises unless each field holds a value of its declared type, whole numbers below 2**31; 1 becomes 1.0 for a float."""
  for name, hint in typing.get_type_hints(type(config)).items():
    value = getattr(config, name)
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and type(value) is int and abs(value) <= sys.float_info.max:
      value = float(value)
      object.__setattr__(config, name, value)
    if tuple[str, ...] in allowed and isinstance(value, list | tuple) and all(type(v) is str for v in value):
      object.__setattr__(config, name, tuple(value))
    elif type(value) not in allowed:
      raise UserError(f"{section}.{name}={value!r} must be {describe_type(hint)}.")
    elif type(value) is float and not math.isfinite(value):
      raise UserError(f"{section}.{name}={value!r} must be a finite number.")
    elif type(value) is int and value >= 2**31:
      raise UserError(f"{section}.{name}={value} must be below 2**31.")


def _check_range(config: Any, section: str, *, least: int, names: str) -> None:
  for name in names.split():
    value = getattr(config, name)
    if value is not None and value < least:
      raise UserError(f"{section}.{name}={value} must be at least {least}.")


def describe_type(hint: Any) -> str:
  """A setting's declared type for a person: "a whole number or none"."""
  words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
  words[tuple[str, ...]] = "words separated by commas"
  return " or ".join(words[t] for t in (typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)))


def _nearest_divisors(n: int, wanted: int) -> str:
  """The divisors of `n` next to `wanted`, nearest first, as text: "4 or 8"."""
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  divisors = sorted({*small, *(n // d for d in small)}, key=lambda d: (abs(d - wanted), d))
  return " or ".join(str(d) for d in divisors[:2])


def near_matches(word: str, known: typing.Iterable[str]) -> str:
  """Words the user may have meant, as the end of an error: " Did you mean a or b?", or "" where none is near."""
  matches = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
  return f" Did you mean {' or '.join(matches)}?" if matches else ""


# --- Experiment files ---


def experiments_dir() -> Path:
  """The folder of experiment files: inside the package in a wheel, beside it in a clone or an editable install."""
  package = Path(__file__).resolve().parent
  inside = package / "experiments"
  return inside if inside.is_dir() else package.parent / "experiments"


def list_experiments() -> list[str]:
  """Names of the experiments that come with jgpt, sorted."""
  return sorted(p.stem for p in experiments_dir().glob("*.py") if not p.stem.startswith("_"))


def load_experiment(name: str) -> Experiment:
  """Loads the constant `EXPERIMENT` of an experiment file.

  Args:
    name: an experiment of jgpt's, or the path of a file ending in ".py", which is executed.

  Raises:
    UserError: if there is no such experiment, or the file holds none.
  """
  return load_experiment_file(name)[0]


def load_experiment_file(name: str) -> tuple[Experiment, str]:
  """Like `load_experiment`, and returns the file's docstring as well."""
  path = Path(name) if name.endswith(".py") else experiments_dir() / f"{name}.py"
  if not name.endswith(".py") and name not in list_experiments():
    raise UserError(
      f"there is no experiment {name!r}.{near_matches(name, list_experiments())} They are: "
      f"{', '.join(list_experiments())}; or give the path of a file ending in .py."
    )
  if not path.is_file():
    raise UserError(f"the experiment file {path} does not exist.")
  spec = importlib.util.spec_from_file_location(f"jgpt_experiment_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except UserError:
    raise
  except Exception as error:  # whatever the file does wrong is the user's to mend, at this line
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path.resolve()]
    line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else 1
    raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
  experiment = getattr(module, "EXPERIMENT", None)
  if not isinstance(experiment, Experiment):
    raise UserError(f"{path} must define EXPERIMENT, a jgpt.config.Experiment.")
  return experiment, module.__doc__ or ""
