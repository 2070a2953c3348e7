"""Runs `python -m jgpt.export`: writes a run's weights for Hugging Face's Transformers or llm.c.

Also the functions that write each format, as a whole or not at all. The formats themselves are in
`weights/hugging_face.py` and `weights/llmc.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jgpt import cli
from jgpt.errors import UserError

if TYPE_CHECKING:  # jax is imported after the arguments are understood
  import jax

  from jgpt.batches import Batch
  from jgpt.config import Experiment
  from jgpt.data.corpus import Data
  from jgpt.runs.folder import RunFiles
  from jgpt.runs.open import Run

EXPORT_FORMATS = {
  "hf": "a folder for Hugging Face's Transformers",
  "llmc": "llm.c's weights, and its tokenizer file beside them",
  "llmc-state": "llm.c's debug state: a batch, its logits and loss, every gradient",
}


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  args = _parser().parse_args(argv)
  out = Path(os.path.expanduser(args.out))
  _check_out(out, args.format)
  if args.format == "llmc-state" and args.dtype != "float32":
    raise UserError("--format llmc-state is float32 by its format. Leave --dtype out")
  if args.set and args.format != "llmc-state":
    raise UserError(f"--set goes with --format llmc-state: {args.format} reads no text")
  from jgpt.devices import runtime
  from jgpt.runs.folder import read_run_files
  from jgpt.runs.locate import locate_run
  from jgpt.runs.open import open_run
  from jgpt.weights import hugging_face, llmc

  if note := runtime.set_up():
    print(note, file=sys.stderr)
  args.run, args.step = locate_run(args.run, args.step)
  files = read_run_files(args.run)
  is_hf = args.format == "hf"
  check_model = hugging_face.check_hugging_face_model if is_hf else llmc.check_llmc_model
  check_model(files.experiment.model)  # before any array is read
  data = _find_stream(args, files) if args.format == "llmc-state" else None
  run = open_run(args.run, args.step)
  if is_hf:
    written = export_hugging_face(run, out, args.dtype)
    how = (
      f"open it with GPT2LMHeadModel.from_pretrained({str(out)!r}) and "
      f"AutoTokenizer.from_pretrained({str(out)!r})"
    )
  elif args.format == "llmc":
    written = export_llmc(run, out, args.dtype)
    is_float32 = args.dtype == "float32"
    program = (
      "train_gpt2.c, and train_gpt2cu built for FP32,"
      if is_float32
      else "train_gpt2cu, built for BF16,"
    )
    name = "gpt2_124M.bin" if is_float32 else "gpt2_124M_bf16.bin"
    how = f"{program} reads GPT-2 124M as {name}, and the tokenizer as gpt2_tokenizer.bin"
  else:
    written = export_llmc_state(run, data, out)
    how = "test_gpt2.c compares with gpt2_124M_debug_state.bin"
  print(f"{run.workdir} at step {run.step:,}, {args.dtype}:")
  for path in written:
    print(f"  {path}  {path.stat().st_size:,} bytes")
  print(how)
  return 0


# --- Formats ---


def export_hugging_face(run: Run, out: Path, dtype: str) -> list[Path]:
  """Writes a folder that Transformers opens.

  Args:
    run: from `open_run`.
    out: a folder that does not exist or is empty.
    dtype: of the weights, "float32" or "bfloat16".

  Returns:
    The files of the folder.

  Raises:
    UserError: naming the settings that the format cannot hold.
  """
  import jax

  from jgpt.weights import hugging_face

  params = jax.device_get(run.params)
  temporary = out.with_name(f".{out.name}.tmp")
  shutil.rmtree(temporary, ignore_errors=True)  # left by an export that was killed
  temporary.mkdir(parents=True)
  try:
    hugging_face.write_folder(temporary, params, run.experiment.model, run.tokenizer, dtype)
    if out.is_dir():
      out.rmdir()
    temporary.rename(out)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return sorted(out.iterdir())


def export_llmc(run: Run, out: Path, dtype: str) -> list[Path]:
  """Writes llm.c's weights, and its tokenizer file beside them.

  Args:
    run: from `open_run`.
    out: the file of weights, ending in .bin.
    dtype: of the weights, "float32" or "bfloat16".

  Returns:
    The two files; the tokenizer's is `tokenizer_path(out)`.

  Raises:
    UserError: naming the settings that the format cannot hold.
  """
  import jax

  from jgpt.text.tokenizer_files import llmc_tokenizer_bytes
  from jgpt.weights import llmc

  params = jax.device_get(run.params)
  config = run.experiment.model
  tokenizer_out = tokenizer_path(out)
  tokenizer = llmc_tokenizer_bytes(run.tokenizer, config.vocab_size)
  write_atomically(
    {
      out: lambda path: llmc.write_weights(path, params, config, dtype),
      tokenizer_out: lambda path: path.write_bytes(tokenizer),
    }
  )
  return [out, tokenizer_out]


def export_llmc_state(run: Run, data: Data, out: Path) -> list[Path]:
  """Writes llm.c's debug state for the next batch of the run: logits, loss and gradients.

  They are computed without tricks, dropout and micro-batches, in float32.

  Args:
    run: from `open_run`.
    data: the run's, a stream.
    out: the file, ending in .bin.

  Returns:
    The file.

  Raises:
    UserError: naming the settings that the format cannot hold.
  """
  import jax
  import numpy as np

  from jgpt.config.experiment import PLAIN
  from jgpt.config.settings import change
  from jgpt.devices import runtime
  from jgpt.model import apply
  from jgpt.step import loss_and_grads
  from jgpt.weights import llmc

  changes = {"model.dropout": 0.0, "train.micro_batch_size": None}
  experiment = dataclasses.replace(change(run.experiment, changes), compute=PLAIN)
  device = runtime.devices(is_local=True)[0]
  config, batch = experiment.model, make_next_batch(run.experiment, data, run.step, device)
  step = jax.device_put(np.int32(run.step))
  loss, grads = jax.jit(loss_and_grads, static_argnums=3)(run.params, batch, step, experiment)
  logits_BTV = jax.jit(
    lambda params, tokens: apply(params, tokens, config)[..., : config.vocab_size]
  )(run.params, batch.inputs_BT)
  batch, logits_BTV, loss, grads = jax.device_get((batch, logits_BTV, loss, grads))
  write_atomically(
    {
      out: lambda path: llmc.write_state(
        path, batch.inputs_BT, batch.targets_BT, logits_BTV, float(loss), grads, config
      )
    }
  )
  return [out]


def make_next_batch(experiment: Experiment, data: Data, step: int, device: jax.Device) -> Batch:
  """Makes the batch of the update after `step`, without rows of weight zero.

  The last batch of an epoch may have such rows.

  Args:
    experiment: resolved.
    data: the run's, a stream.
    step: updates applied before.
    device: to place it on.
  """
  import jax
  import numpy as np

  from jgpt import batches
  from jgpt.config import MeshConfig
  from jgpt.data.feed import make_feed
  from jgpt.sharding import make_mesh, replicated

  alone = dataclasses.replace(experiment, mesh=MeshConfig(data=1))
  mesh = make_mesh(alone, [device])
  feed = make_feed(data.train, experiment.data, experiment.train.seed, mesh)
  make_batch = jax.jit(batches.batch, static_argnums=2)
  count = jax.device_put(np.int32(step), replicated(mesh))
  batch = jax.device_get(make_batch(feed.corpus_at(step), count, experiment))
  rows = batch.weights_BT.all(axis=1)
  return jax.device_put(jax.tree.map(lambda x: x[rows], batch), replicated(mesh))


def _find_stream(args: argparse.Namespace, files: RunFiles) -> Data:
  """Finds the data of a run whose batches are not documents.

  Raises:
    UserError: if they are.
  """
  from jgpt.runs.text import find_run_data, parse_place

  if files.experiment.data.batching == "documents":
    raise UserError(
      "llm.c's debug state holds sequences of one length, and data.batching=documents has many."
    )
  return find_run_data(args.run, files, parse_place(args.set, files))[0]


# --- Files ---


def tokenizer_path(out: Path) -> Path:
  """Returns the file of the tokenizer for a file of llm.c's weights.

  For gpt2_124M.bin it is gpt2_124M_tokenizer.bin.
  """
  return out.with_name(f"{out.stem}_tokenizer.bin")


def _check_out(out: Path, name: str) -> None:
  """Checks that `--out` can be written, does not exist, and has the name that the format needs.

  Args:
    out: the path.
    name: of the format, a key of `EXPORT_FORMATS`.

  Raises:
    UserError: otherwise.
  """
  if out.name in ("", ".."):
    raise UserError(f"--out {out} must end in a name, for example {out / 'exported'}")
  try:
    os.lstat(out.with_name(f".{out.name}.tmp"))  # it is written under this name
  except FileNotFoundError:
    pass
  except OSError as error:
    raise UserError(
      f"--out {str(out)[:200]} cannot be written: {error.strerror}. Choose another --out"
    ) from None
  if name == "hf":
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
      raise UserError(f"--out {out} is there already. Choose another name, or remove it")
    return
  if out.suffix != ".bin":
    raise UserError(
      f"--out {out} must be a file ending in .bin for --format {name}. Try --out "
      f"{shlex.quote(str(out.with_suffix('.bin')))}"
    )
  for path in [out, tokenizer_path(out)] if name == "llmc" else [out]:
    if path.exists():
      raise UserError(f"{path} is there already. Choose another --out, or remove it")


def write_atomically(files: dict[Path, Callable[[Path], object]]) -> None:
  """Writes files under temporary names, and renames them once all are complete.

  Args:
    files: path -> a function that writes the file at the path that it is given.
  """
  temporary = {path: path.with_name(f".{path.name}.tmp") for path in files}
  try:
    for path, write in files.items():
      path.parent.mkdir(parents=True, exist_ok=True)
      write(temporary[path])
    for path in files:
      os.replace(temporary[path], path)
  finally:
    for path in temporary.values():
      path.unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog="python -m jgpt.export",
    description="Write a run's weights as Hugging Face's Transformers or llm.c read them.",
  )
  parser.add_argument(
    "--run",
    required=True,
    metavar="DIR",
    help="a run folder, as python -m jgpt.run leaves it, or one of its checkpoints/STEP",
  )
  parser.add_argument(
    "--format",
    required=True,
    choices=EXPORT_FORMATS,
    help="; ".join(f"{name}: {what}" for name, what in EXPORT_FORMATS.items()),
  )
  parser.add_argument(
    "--out", required=True, metavar="PATH", help="hf: a new folder; the others: a file, NAME.bin"
  )
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="float32",
    help="of the weights; bfloat16 rounds to nearest, ties to even (default: float32)",
  )
  parser.add_argument(
    "--step",
    type=cli.parse_step,
    metavar="N",
    help="which checkpoint, or best: the saved one of the lowest held-out loss (default: newest)",
  )
  cli.add_place_option(parser)
  return parser


if __name__ == "__main__":
  sys.exit(cli.guard(main))
