"""The initial weights of a run: finds what `train.init_from` names, and checks that it fits.

It may name GPT-2's released weights, a Hugging Face folder or its model.safetensors, llm.c's .bin,
or another run. The formats are in `hugging_face.py`, `llmc.py` and `runs/checkpoint.py`; random
initial values are drawn in `model.py`, except those of microgpt.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jgpt.config import DataConfig, ModelConfig
from jgpt.config.experiment import GPT2_SIZES
from jgpt.config.settings import format_value
from jgpt.data import sources
from jgpt.data.paths import check_tokenizer_kind
from jgpt.data.sources import describe_manual_download, find_user_file
from jgpt.errors import UserError, near_matches
from jgpt.params import param_table
from jgpt.runs import manifest
from jgpt.runs.folder import RunFiles, read_run_files
from jgpt.runs.locate import find_checkpoint
from jgpt.runs.open import open_run
from jgpt.runs.origin import Origin, open_origin
from jgpt.system.cache import PinnedFile, cache_dir
from jgpt.system.files import digest_file
from jgpt.text.bpe import make_gpt2_tokenizer
from jgpt.text.tokenizer import Tokenizer
from jgpt.weights import hugging_face, llmc
from jgpt.weights.gpt2 import (
  ARCHITECTURE,
  Weights,
  build_params,
  check_weights_settings,
  digest_params,
  flat_shapes,
  flatten,
)

LEFT_OPEN = ("num_heads", "activation")  # a model.safetensors without its folder says neither
GPT2_VOCAB_SIZES = (50257, 50304)  # without and with the rows that nanoGPT adds
# Values of nanoGPT's init_from that are no weights.
NANOGPT_WORDS = {
  "resume": "the same command again goes on with a run, and --resume insists on one",
  "scratch": "weights are drawn where none are named. Try --set train.init_from=none",
}


@dataclasses.dataclass(frozen=True)
class InitialParams:
  """Initial parameters that were read from weights.

  Attributes:
    params: as `init_params` returns them, float32 NumPy arrays.
    location: printable path or name of the weights.
    sha256: from `digest_params`.
    note: printable remark on what the weights leave open; or "".
  """

  params: dict
  location: str
  sha256: str
  note: str = ""


def open_weights(
  source: str, report: Callable[[int, int], None] = lambda done, total: None
) -> Weights:
  """Opens what `train.init_from` names. Reads headers and the tokenizer; values are read later.

  Args:
    source: a key of `RELEASED`, or a path.
    report: called with the bytes that are stored and the bytes in all during a download of released
      weights.

  Raises:
    UserError: if the path does not exist, has a format that jgpt does not read, or is damaged.
  """
  if source in RELEASED:
    return _open_released(source, report)
  if not source.strip():
    raise UserError(
      "train.init_from is empty: it must be a path, or one of " + ", ".join(RELEASED) + "."
    )
  path = Path(os.path.expanduser(source))  # unlike Path.expanduser, keeps an unknown ~user
  _check_reachable(path)
  if found := find_checkpoint(source):
    return _open_run_weights(*found)
  if path.name == "model.safetensors" and os.path.isfile(path.parent / "config.json"):
    path = path.parent  # for the number of heads and the tokenizer
  if path.is_dir() or path.suffix == ".safetensors":
    return hugging_face.open_hugging_face(path)
  if path.suffix == ".bin" and path.is_file():
    hugging_face.check_no_pickle(path)  # pytorch_model.bin
    return llmc.open_llmc(path)
  kinds = "a Hugging Face folder or model.safetensors, llm.c's .bin, a run folder"
  if not path.exists():
    if source in NANOGPT_WORDS:
      raise UserError(f"train.init_from={source!r} does not exist: {NANOGPT_WORDS[source]}")
    raise UserError(
      f"train.init_from={source!r} does not exist.{near_matches(source, RELEASED)} It may be "
      f"{kinds}, or one of {', '.join(RELEASED)}."
    )
  hugging_face.check_no_pickle(path)
  raise UserError(f"train.init_from={source!r} must be {kinds}.")


def is_same_source(a: str | None, b: str | None) -> bool:
  """Returns whether two values of `train.init_from` or `train.continue_from` are of one place."""
  if None in (a, b) or {a, b} & RELEASED.keys():
    return a == b
  try:
    return os.path.realpath(os.path.expanduser(a)) == os.path.realpath(os.path.expanduser(b))
  except (OSError, ValueError):  # a NUL in a path, or a loop of links
    return a == b


def _check_reachable(path: Path) -> None:
  """Checks that the system can say whether a path exists, and raises `UserError` otherwise.

  It cannot for a path that is too long, or in a folder without permission.
  """
  try:
    os.stat(path)
  except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
    return
  except OSError as error:
    raise UserError(
      f"train.init_from={str(path)[:200]!r} cannot be read: {error.strerror}."
    ) from None


def load_params(weights: Weights, config: ModelConfig) -> InitialParams:
  """Reads weights as the parameters of a model.

  Args:
    weights: from `open_weights`.
    config: `vocab_size` resolved.

  Raises:
    UserError: if the weights are those of another model, or damaged.
  """
  check_weights_settings(weights, config)
  params = build_params(weights, config)
  absent = [name for name in LEFT_OPEN if name not in weights.model]
  left_open = [f"model.{name} (here {format_value(getattr(config, name))})" for name in absent]
  left_open += [] if weights.tokenizer else ["the tokenizer"]
  note = f"they leave open: {', '.join(left_open)}" if left_open else ""
  return InitialParams(params, weights.location, digest_params(params), note)


def find_initial(files: RunFiles) -> InitialParams | Origin | None:
  """Finds again what a recorded run began from.

  Args:
    files: of the run folder.

  Returns:
    The parameters that `train.init_from` names, or the checkpoint that `train.continue_from`
    names; None for parameters that were drawn.

  Raises:
    UserError: as `open_weights`, `load_params` and `open_origin` do, or if a digest differs from
      the recorded one.
  """
  train = files.experiment.train
  if train.continue_from is not None:
    return open_origin(train.continue_from, files.origin)
  if train.init_from is None:
    return None
  initial = load_params(open_weights(train.init_from), files.experiment.model)
  return check_same_weights(initial, files.weights["sha256"] if files.weights else None)


def check_same_weights(initial: InitialParams, sha256: str | None) -> InitialParams:
  """Checks that parameters have the digest that a run recorded, and returns them.

  Raises `UserError` if the digest differs; None accepts any.
  """
  if sha256 not in (None, initial.sha256):
    raise UserError(
      f"the weights of {initial.location} have changed since this run began. Put the old ones "
      "back, choose another --workdir, or start over with --fresh"
    )
  return initial


def check_weights_tokenizer(weights: Weights | Origin, config: DataConfig) -> None:
  """Checks that weights, or an origin, come with the tokenizer of the settings.

  Raises `UserError` with the settings to change otherwise. With another tokenizer the ids would
  stand for other text.
  """
  tokenizer = weights.tokenizer
  if tokenizer is None and config.tokenizer in ("characters", "bpe"):
    fitting = "bytes" if weights.model["vocab_size"] == 256 else "gpt2"
    raise UserError(
      f"{weights.location} comes without a tokenizer, and data.tokenizer={config.tokenizer} would "
      "make one from the text: its ids would mean something else to these weights. Name the run or "
      f"the Hugging Face folder that they came from, or try --set data.tokenizer={fitting}"
    )
  if tokenizer is None:
    return
  check_tokenizer_kind(tokenizer, config, f"the tokenizer that comes with {weights.location}")
  if config.batching == "documents" and tokenizer.stop_id is None:
    raise UserError(
      f"{weights.location} comes with a tokenizer without BOS, which data.batching=documents "
      "needs. Try --set data.batching=random"
    )


def check_weights_vocabulary(weights: Weights, tokenizer: Tokenizer) -> None:
  """Checks that weights have an embedding for every id of a tokenizer.

  Weights with GPT-2's number of ids and no tokenizer need GPT-2's tokenizer. Raises `UserError`
  otherwise.
  """
  has = weights.model["vocab_size"]
  if (
    has in GPT2_VOCAB_SIZES
    and weights.tokenizer is None
    and tokenizer.vocab_size != GPT2_VOCAB_SIZES[0]
  ):
    raise UserError(
      f"{weights.location} has embeddings of {has:,} ids, as GPT-2 has, and the run's tokenizer "
      f"has {tokenizer.vocab_size:,}. Try --set data.tokenizer=gpt2"
    )
  if has < tokenizer.vocab_size:
    raise UserError(
      f"{weights.location} has embeddings of {has:,} ids, and the run's tokenizer has "
      f"{tokenizer.vocab_size:,}: they belong to another tokenizer, which data.tokenizer must name"
    )


def _open_released(name: str, report: Callable[[int, int], None]) -> Weights:
  weights = hugging_face.open_hugging_face(find_released(name, report))
  sizes = next(
    sizes for sizes in GPT2_SIZES.values() if sizes["num_layers"] == weights.model["num_layers"]
  )
  model = weights.model | sizes | {"activation": "gelu_tanh"}
  tokenizer = make_gpt2_tokenizer(*sources.find_gpt2_files())
  return dataclasses.replace(
    weights, location=f"{name} ({weights.location})", model=model, tokenizer=tokenizer
  )


def _open_run_weights(path: Path, step: int | None) -> Weights:
  """Opens the parameters of a run's checkpoint, without those of its optimizer.

  Args:
    path: the run folder.
    step: of the checkpoint; None takes the newest.
  """
  files = read_run_files(path)
  config, step = files.experiment.model, manifest.find_step(path, step)

  @functools.cache
  def tensors() -> dict:
    return flatten(jax.device_get(open_run(path, step).params), config)

  model = {name: getattr(config, name) for name in ARCHITECTURE}
  return Weights(
    f"{path} at step {step}",
    model,
    flat_shapes(config),
    lambda name: tensors()[name],
    files.tokenizer,
    files.experiment,
  )


def _pin(name: str, *, commit: str, sha256: str, num_bytes: int) -> PinnedFile:
  url = f"https://huggingface.co/openai-community/{name}/resolve/{commit}/model.safetensors"
  return PinnedFile(
    filename=f"gpt2/{name}.safetensors", url=url, sha256=sha256, num_bytes=num_bytes
  )


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
  """Finds released weights in `$JGPT_DATA_DIR` or in the cache, or downloads them into the cache.

  Checks the size and SHA-256 of the file, which takes seconds for each gigabyte.

  Args:
    name: a key of `RELEASED`.
    report: called with the bytes that are stored and the bytes in all, whenever the percentage of a
      download has changed.

  Returns:
    The path of a safetensors file.

  Raises:
    UserError: if the name is unknown, the file in `$JGPT_DATA_DIR` is not the original, or the
      download fails; with the file to save and its folder.
  """
  if name not in RELEASED:
    raise UserError(
      f"{name!r} is not a released GPT-2.{near_matches(name, RELEASED)} There are: "
      f"{', '.join(RELEASED)}."
    )
  file = RELEASED[name]
  if own := find_user_file(file):
    try:
      difference = _find_difference(own, file)
    except OSError as error:
      raise UserError(f"cannot read {own}: {error.strerror or error}.") from None
    if difference:
      raise UserError(
        f"{own} is not the released {name}: {difference}. {describe_manual_download(file)}"
      )
    return own
  cached = cache_dir() / file.filename
  with contextlib.suppress(OSError):  # a cache that cannot be read counts as empty
    if not _find_difference(cached, file):  # a download replaces a damaged file
      return cached
  # Imported late: the modules of the network take a while to import.
  from jgpt.data.download import DownloadError, download_file

  try:
    return download_file(file, report)
  except DownloadError as error:
    raise UserError(f"{error}. {describe_manual_download(file)}") from None


def _find_difference(path: Path, file: PinnedFile) -> str:
  """Returns how a file differs from the original in size or digest, or "". Raises OSError."""
  if (num_bytes := path.stat().st_size) != file.num_bytes:
    return f"it has {num_bytes:,} bytes, not {file.num_bytes:,}"
  digest = digest_file(path)
  return f"its SHA-256 is {digest[:12]}, not {file.sha256[:12]}" if digest != file.sha256 else ""


MICROGPT_NAMES = {"tok_embed", "pos_embed", "unembed", "w_qkv", "w_out", "w_up", "w_down"}


def draw_microgpt_params(seed: int, num_documents: int, config: ModelConfig) -> dict:
  """Draws the initial values of microgpt.py, with its generator and in its order.

  microgpt.py calls `random.seed(seed)`, shuffles the documents, and draws from `gauss(0, init_std)`
  wte, wpe, lm_head, and for each layer attn_wq, attn_wk, attn_wv, attn_wo, mlp_fc1, mlp_fc2. Each
  matrix is (out, in) and drawn row by row.

  Args:
    seed: of Python's generator; microgpt.py's is 42.
    num_documents: number of documents that are shuffled, which advances the generator.
    config: microgpt.py's architecture, in any size.

  Returns:
    A pytree shaped like `param_table(config)`, float32 (NumPy arrays), blocks stacked.

  Raises:
    UserError: if the model has other parameters than microgpt.py's.
  """
  table = param_table(config)
  names = (table.keys() - {"blocks"}) | table["blocks"].keys()
  if names != MICROGPT_NAMES or config.scale_residual_init:
    raise UserError(
      "train.init=microgpt draws microgpt's parameters, and this model has others: it needs "
      "model.norm=rms, model.biases=none, model.positions=learned, model.tied_head=false and "
      "model.scale_residual_init=false."
    )
  generator = random.Random(seed)
  generator.shuffle(list(range(num_documents)))
  D, F, N, H, V = config.d_model, config.d_ff, config.num_heads, config.head_dim, config.vocab_size

  def matrix(rows: int, columns: int) -> np.ndarray:
    return np.array(
      [[generator.gauss(0, config.init_std) for _ in range(columns)] for _ in range(rows)]
    )

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
    name: {k: v.astype(np.float32) for k, v in value.items()}
    if name == "blocks"
    else value.astype(np.float32)
    for name, value in params.items()
  }
