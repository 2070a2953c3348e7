"""The weights that a run begins from, wherever they are.

Responsible for what `train.init_from` names: GPT-2's released weights, a Hugging Face folder or its model.safetensors,
llm.c's .bin, another run; and for whether they and their tokenizer fit the run. Not responsible for the formats
(`hugging_face.py`, `llmc.py`, `checkpoint.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path

from jgpt import checkpoint, hugging_face, llmc, manifest, run_folder, sources
from jgpt.bpe import make_gpt2_tokenizer
from jgpt.checks import UserError, near_matches
from jgpt.config import GPT2_SIZES, DataConfig, Experiment, ModelConfig
from jgpt.interop import (
  FUNCTION,
  Weights,
  build_params,
  digest_params,
  flat_shapes,
  flatten,
  refuse_other_settings,
)
from jgpt.paths import require_kind
from jgpt.released import RELEASED, find_released
from jgpt.tokenizer import Tokenizer

GPT2_IDS = (50257, 50304)  # and with the rows that nanoGPT adds


@dataclasses.dataclass(frozen=True)
class InitialParams:
  """Parameters that a run begins from.

  Attributes:
    params: as `init_params` returns them, float32 NumPy arrays.
    location: where they were found, for a person.
    sha256: of names, shapes and values.
    note: what does not come with them and is the experiment's, for a person; or "".
  """

  params: dict
  location: str
  sha256: str
  note: str = ""


def open_weights(source: str, report: Callable[[int, int], None] = lambda done, total: None) -> Weights:
  """Opens what `train.init_from` names; reads headers and a tokenizer, and the values later.

  Args:
    source: a name of `RELEASED`, or a path.
    report: told the bytes that are there and the bytes in all while released weights are downloaded.

  Raises:
    UserError: if there is nothing, it is nothing that jgpt reads, or it is damaged.
  """
  if source in RELEASED:
    return _open_released(source, report)
  if not source.strip():
    raise UserError("train.init_from is empty: it must be a path, or one of " + ", ".join(RELEASED) + ".")
  path = Path(os.path.expanduser(source))  # Path.expanduser raises where there is no such user
  _refuse_out_of_reach(path)
  if path.parent.name == "checkpoints" and os.path.isfile(path.parent.parent / "experiment.json") and path.name.isdecimal():
    return _open_run(path.parent.parent, int(path.name))
  if os.path.isfile(path / "experiment.json"):
    return _open_run(path, None)
  if path.name == "model.safetensors" and os.path.isfile(path.parent / "config.json"):
    path = path.parent  # what is beside it says the number of heads and what ids mean
  if path.is_dir() or path.suffix == ".safetensors":
    return hugging_face.open_weights(path)
  if path.suffix == ".bin" and path.is_file():
    hugging_face.refuse_pickle(path)  # pytorch_model.bin
    return llmc.open_weights(path)
  kinds = "a Hugging Face folder or model.safetensors, llm.c's .bin, a run folder"
  if not path.exists():
    raise UserError(
      f"train.init_from={source!r} does not exist.{near_matches(source, RELEASED)} It may be {kinds}, or one of "
      f"{', '.join(RELEASED)}."
    )
  hugging_face.refuse_pickle(path)
  raise UserError(f"train.init_from={source!r} must be {kinds}.")


def _refuse_out_of_reach(path: Path) -> None:
  """Raises `UserError` where the system does not say whether there is such a path: too long, or behind closed folders."""
  try:
    os.stat(path)
  except (FileNotFoundError, NotADirectoryError, ValueError):  # there is none; a NUL is in no name
    return
  except OSError as error:
    raise UserError(f"train.init_from={str(path)[:200]!r} cannot be read: {error.strerror}.") from None


def load_params(weights: Weights, config: ModelConfig) -> InitialParams:
  """Reads weights as the parameters of a model.

  Args:
    weights: from `open_weights`.
    config: sizes and switches; `vocab_size` resolved.

  Raises:
    UserError: if they are those of another model, or damaged.
  """
  refuse_other_settings(weights, config)
  params = build_params(weights, config)
  missing = ["no number of heads"] if "num_heads" not in weights.model else []
  missing += ["no tokenizer"] if weights.tokenizer is None else []
  note = f"{' and '.join(missing)} comes with them: the experiment's is taken" if missing else ""
  return InitialParams(params, weights.location, digest_params(params), note)


def find_initial(experiment: Experiment, sha256: str | None = None) -> InitialParams | None:
  """Finds the weights that a run began from; None where they were drawn.

  Args:
    experiment: resolved.
    sha256: digest that they must have, as recorded by the run; None takes any.

  Raises:
    UserError: as `open_weights` and `load_params` do, or if they have changed.
  """
  if experiment.train.init_from is None:
    return None
  return require_same(load_params(open_weights(experiment.train.init_from), experiment.model), sha256)


def require_same(initial: InitialParams, sha256: str | None) -> InitialParams:
  """Returns what it is given; raises `UserError` where a run recorded another digest."""
  if sha256 not in (None, initial.sha256):
    raise UserError(
      f"the weights of {initial.location} have changed since this run began. Put the old ones back, or start over with "
      "--fresh"
    )
  return initial


def refuse_other_tokenizer(weights: Weights, config: DataConfig) -> None:
  """Raises `UserError` where they come with another tokenizer than the settings ask for: ids would mean other text."""
  tokenizer = weights.tokenizer
  if tokenizer is None and config.tokenizer in ("characters", "bpe"):
    raise UserError(
      f"{weights.location} comes without a tokenizer, and data.tokenizer={config.tokenizer} would make one from the text: "
      "its ids would mean something else to these weights. Name the run or the Hugging Face folder that they came from, or "
      "try --set data.tokenizer=gpt2"
    )
  if tokenizer is None:
    return
  require_kind(tokenizer, config, f"the tokenizer that comes with {weights.location}")
  if config.batching == "documents" and tokenizer.stop_id is None:
    raise UserError(
      f"{weights.location} comes with a tokenizer without BOS, which data.batching=documents needs. "
      "Try --set data.batching=random"
    )


def refuse_other_vocabulary(weights: Weights, tokenizer: Tokenizer) -> None:
  """Raises `UserError` where weights have embeddings of fewer ids than a tokenizer has, or of GPT-2's."""
  has = weights.model["vocab_size"]
  if has in GPT2_IDS and weights.tokenizer is None and tokenizer.vocab_size != GPT2_IDS[0]:
    raise UserError(
      f"{weights.location} has embeddings of {has:,} ids, as GPT-2 has, and the run's tokenizer has "
      f"{tokenizer.vocab_size:,}. Try --set data.tokenizer=gpt2"
    )
  if has < tokenizer.vocab_size:
    raise UserError(
      f"{weights.location} has embeddings of {has:,} ids, and the run's tokenizer has {tokenizer.vocab_size:,}: they "
      "belong to another tokenizer, which data.tokenizer must name"
    )


def _open_released(name: str, report: Callable[[int, int], None]) -> Weights:
  weights = hugging_face.open_weights(find_released(name, report))
  sizes = next(sizes for sizes in GPT2_SIZES.values() if sizes["num_layers"] == weights.model["num_layers"])
  model = weights.model | sizes | {"activation": "gelu_tanh"}
  tokenizer = make_gpt2_tokenizer(*sources.find_gpt2_files())
  return dataclasses.replace(weights, location=f"{name} ({weights.location})", model=model, tokenizer=tokenizer)


def _open_run(path: Path, step: int | None) -> Weights:
  """Another run's parameters without its optimizer, of a step or the newest."""
  files = run_folder.read_run_files(path)
  config, step = files.experiment.model, manifest.find_step(path, step)

  @functools.cache
  def tensors() -> dict:
    return flatten(checkpoint.load_run(path, step).params, config)

  model = {name: getattr(config, name) for name in FUNCTION}
  return Weights(f"{path} at step {step}", model, flat_shapes(config), lambda name: tensors()[name], files.tokenizer)
