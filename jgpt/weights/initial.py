"""The weights that a run begins from, wherever they are.

Responsible for what `train.init_from` names: GPT-2's released weights, a Hugging Face folder or its model.safetensors,
llm.c's .bin, another run; and for whether they and their tokenizer fit the run. Not responsible for the formats
(`hugging_face.py`, `llmc.py`, `checkpoint.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jgpt.config import DataConfig, Experiment, ModelConfig
from jgpt.config.experiment import GPT2_SIZES
from jgpt.data import sources
from jgpt.data.download import PinnedFile
from jgpt.data.paths import check_tokenizer_kind
from jgpt.data.sources import by_hand, own_file
from jgpt.errors import UserError, near_matches
from jgpt.params import param_table
from jgpt.runs import manifest
from jgpt.runs.folder import read_run_files
from jgpt.runs.open import load_run
from jgpt.system.cache import cache_dir
from jgpt.system.files import digest_file
from jgpt.text.bpe import make_gpt2_tokenizer
from jgpt.text.tokenizer import Tokenizer
from jgpt.weights import hugging_face, llmc
from jgpt.weights.gpt2 import FUNCTION, Weights, build_params, check_weights_settings, digest_params, flat_shapes, flatten

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
  _check_reachable(path)
  if path.parent.name == "checkpoints" and os.path.isfile(path.parent.parent / "experiment.json") and path.name.isdecimal():
    return _open_run_weights(path.parent.parent, int(path.name))
  if os.path.isfile(path / "experiment.json"):
    return _open_run_weights(path, None)
  if path.name == "model.safetensors" and os.path.isfile(path.parent / "config.json"):
    path = path.parent  # what is beside it says the number of heads and what ids mean
  if path.is_dir() or path.suffix == ".safetensors":
    return hugging_face.open_hugging_face(path)
  if path.suffix == ".bin" and path.is_file():
    hugging_face.check_no_pickle(path)  # pytorch_model.bin
    return llmc.open_llmc(path)
  kinds = "a Hugging Face folder or model.safetensors, llm.c's .bin, a run folder"
  if not path.exists():
    raise UserError(
      f"train.init_from={source!r} does not exist.{near_matches(source, RELEASED)} It may be {kinds}, or one of "
      f"{', '.join(RELEASED)}."
    )
  hugging_face.check_no_pickle(path)
  raise UserError(f"train.init_from={source!r} must be {kinds}.")


def _check_reachable(path: Path) -> None:
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
  check_weights_settings(weights, config)
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
  return check_same_weights(load_params(open_weights(experiment.train.init_from), experiment.model), sha256)


def check_same_weights(initial: InitialParams, sha256: str | None) -> InitialParams:
  """Returns what it is given; raises `UserError` where a run recorded another digest."""
  if sha256 not in (None, initial.sha256):
    raise UserError(
      f"the weights of {initial.location} have changed since this run began. Put the old ones back, or start over with "
      "--fresh"
    )
  return initial


def check_weights_tokenizer(weights: Weights, config: DataConfig) -> None:
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
  check_tokenizer_kind(tokenizer, config, f"the tokenizer that comes with {weights.location}")
  if config.batching == "documents" and tokenizer.stop_id is None:
    raise UserError(
      f"{weights.location} comes with a tokenizer without BOS, which data.batching=documents needs. "
      "Try --set data.batching=random"
    )


def check_weights_vocabulary(weights: Weights, tokenizer: Tokenizer) -> None:
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
  weights = hugging_face.open_hugging_face(find_released(name, report))
  sizes = next(sizes for sizes in GPT2_SIZES.values() if sizes["num_layers"] == weights.model["num_layers"])
  model = weights.model | sizes | {"activation": "gelu_tanh"}
  tokenizer = make_gpt2_tokenizer(*sources.find_gpt2_files())
  return dataclasses.replace(weights, location=f"{name} ({weights.location})", model=model, tokenizer=tokenizer)


def _open_run_weights(path: Path, step: int | None) -> Weights:
  """Another run's parameters without its optimizer, of a step or the newest."""
  files = read_run_files(path)
  config, step = files.experiment.model, manifest.find_step(path, step)

  @functools.cache
  def tensors() -> dict:
    return flatten(load_run(path, step).params, config)

  model = {name: getattr(config, name) for name in FUNCTION}
  return Weights(f"{path} at step {step}", model, flat_shapes(config), lambda name: tensors()[name], files.tokenizer)


def _pin(name: str, *, commit: str, sha256: str, num_bytes: int) -> PinnedFile:
  url = f"https://huggingface.co/openai-community/{name}/resolve/{commit}/model.safetensors"
  return PinnedFile(filename=f"gpt2/{name}.safetensors", url=url, sha256=sha256, num_bytes=num_bytes)


RELEASED: dict[str, PinnedFile] = {
  "gpt2": _pin(
    "gpt2",
    commit="607a30d783dfa663caf39e06633721c8d4cfcd7e",
    sha256="248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    num_bytes=548105171,
  ),
  "gpt2-medium": _pin(
    "gpt2-medium",
    commit="6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    sha256="fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    num_bytes=1519984962,
  ),
  "gpt2-large": _pin(
    "gpt2-large",
    commit="32b71b12589c2f8d625668d2335a01cac3249519",
    sha256="5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    num_bytes=3247159078,
  ),
  "gpt2-xl": _pin(
    "gpt2-xl",
    commit="15ea56dee5df4983c59b2538573817e1667135e2",
    sha256="0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    num_bytes=6431829964,
  ),
}


def find_released(name: str, report: Callable[[int, int], None] = lambda done, total: None) -> Path:
  """Finds released weights: in `$JGPT_DATA_DIR`, in the cache, or by a download into it.

  Whatever is found has the original's size and SHA-256; hashing takes seconds for each gigabyte.

  Args:
    name: a key of `RELEASED`.
    report: told the bytes that are there and the bytes in all, whenever a download's percentage has changed.

  Returns:
    The path of a safetensors file.

  Raises:
    UserError: if there is no such name, the file in `$JGPT_DATA_DIR` is another, or none is found; says which file to save
      where.
  """
  if name not in RELEASED:
    raise UserError(f"{name!r} is no released GPT-2.{near_matches(name, RELEASED)} There are: {', '.join(RELEASED)}.")
  file = RELEASED[name]
  if own := own_file(file):
    try:
      difference = _find_difference(own, file)
    except OSError as error:
      raise UserError(f"cannot read {own}: {error.strerror or error}.") from None
    if difference:
      raise UserError(f"{own} is not the released {name}: {difference}. {by_hand(file)}")
    return own
  cached = cache_dir() / file.filename
  with contextlib.suppress(OSError):  # a cache that is absent or closed is no error
    if not _find_difference(cached, file):  # else the file was damaged: a download replaces it
      return cached
  from jgpt.data.download import (
    DownloadError,
    download_file,  # only here: the network's modules take a while to import
  )

  try:
    return download_file(file, report)
  except DownloadError as error:
    raise UserError(f"{error}. {by_hand(file)}") from None


def _find_difference(path: Path, file: PinnedFile) -> str:
  """What tells a file on the disk from the original, or "". Raises OSError."""
  if (num_bytes := path.stat().st_size) != file.num_bytes:
    return f"it has {num_bytes:,} bytes, not {file.num_bytes:,}"
  digest = digest_file(path)
  return f"its SHA-256 is {digest[:12]}, not {file.sha256[:12]}" if digest != file.sha256 else ""


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
