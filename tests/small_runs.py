"""Two small runs for the tests of commands that read a run folder: one on documents, one on a
stream of bytes.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
from equivalence import QUICK

from jgpt import program, train
from jgpt.config import Experiment
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change
from jgpt.data.corpus import Data
from jgpt.plan import plan_run

# Words of 2 to 6 letters: at a context of 5, those of 5 and 6 are cut.
WORDS = [f"{a}{b}{c}" for a in "abcd" for b in "xyzw" for c in ("", "é", "rst", "rstu")]
VERSE = "To be, or not to be – that is the question:\n\tWhether ’tis nobler in the mind\n" * 15


@dataclasses.dataclass(frozen=True)
class SmallRun:
  """A finished run.

  Attributes:
    workdir: its folder.
    experiment: resolved.
    data: loaded.
    result: what training returned.
  """

  workdir: Path
  experiment: Experiment
  data: Data
  result: train.Result


def drop_times(log: bytes) -> bytes:
  """A metrics.jsonl without its rows of time: what is left depends on no clock and no interruption.

  In those rows the names begin with "perf/", but for the step and the tokens seen.
  """
  lines = log.splitlines(keepends=True)
  return b"".join(line for line in lines if b'"perf/' not in line)


def read_untimed(workdir: Path) -> list[dict]:
  """The rows of a run's metrics.jsonl but those of time."""
  log = (workdir / "metrics.jsonl").read_bytes()
  return [json.loads(line) for line in drop_times(log).splitlines()]


@contextlib.contextmanager
def compiled_quickly() -> Iterator[None]:
  """Steps are compiled in a hurry, and sampling and evaluation only where they are called.

  On a CPU: other compilers know none of these options.
  """
  if jax.default_backend() != "cpu":
    yield
    return
  with (
    mock.patch.object(program, "list_ahead", lambda *args: {}),
    mock.patch.object(program, "choose_step_options", lambda experiment: QUICK),
  ):
    yield


def train_small(experiment: Experiment, workdir: Path) -> SmallRun:
  with compiled_quickly():
    plan = plan_run(experiment, workdir=workdir, name="small")
    return SmallRun(workdir, plan.experiment, plan.data, train.train_run(plan))


def train_words(folder: Path) -> SmallRun:
  """Names' model on words, some of which are cut at the context."""
  path = folder / "words.txt"
  path.write_text("".join(f"{word}\n" for word in WORDS), encoding="utf-8")
  changes = {
    "data.heldout_fraction": 0.2,
    "data.seq_len": 5,
    "train.steps": 60,
    "train.eval_every": None,
    "train.save_every": 30,
  }
  changes |= {"data.path": str(path), "sample.num": 1}
  return train_small(change(load_experiment("names"), changes), folder / "words")


def train_verse(folder: Path) -> SmallRun:
  """Random windows of bytes, with dropout, clipping that acts, decay, two layers and a warmup that
  begins at 0.
  """
  path = folder / "verse.txt"
  path.write_text(VERSE, encoding="utf-8")
  changes = {
    "data.path": str(path),
    "data.seq_len": 16,
    "data.batch_size": 4,
    "model.max_seq_len": 20,
    "model.num_layers": 2,
    "model.d_model": 16,
    "model.d_ff": 32,
    "optimizer.clip_norm": 0.5,
    "optimizer.warmup_steps": 5,
    "optimizer.peak_lr": 0.01,
    "train.steps": 20,
    "train.eval_every": None,
    "train.eval_batches": None,
    "mesh.data": 1,
    "sample.max_tokens": 5,
  }
  return train_small(change(load_experiment("shakespeare_bytes"), changes), folder / "verse")
