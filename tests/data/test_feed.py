"""Training tokens from the disk, a block of steps at a time: the batches, losses and bits of those
on the device.
"""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgpt import sharding, train
from jgpt.batches import CutBatches, Stream, batch
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change
from jgpt.data import corpus as data
from jgpt.data import feed
from jgpt.data.token_files import TokenFiles, open_files, read_header, write_tokens
from jgpt.plan import plan_run

pytestmark = pytest.mark.usefixtures("quick")

NAMES = load_experiment("names")
BASE = dataclasses.replace(NAMES.data, heldout_fraction=0.0, tokenizer="bytes", batching="random")
BATCHINGS = ["random", "sequential", "epochs"]
EXPERIMENT = load_experiment("shakespeare_bytes")


def make_config(batching, *, seq_len=4, batch_size=3, **changes):
  return dataclasses.replace(
    BASE, batching=batching, seq_len=seq_len, batch_size=batch_size, **changes
  )


def write_files(folder, ids, num_files, name="train"):
  paths = []
  for number, part in enumerate(np.array_split(ids, num_files)):
    paths.append(folder / f"text_{name}_{number:06d}.bin")
    with write_tokens(paths[-1], 256) as writer:
      writer.append(part)
  return paths


@pytest.fixture
def ids():
  return np.random.default_rng(0).integers(0, 256, 103).astype(np.int32)


@pytest.fixture
def tokens(tmp_path, ids):
  """103 ids in five files, so that windows cross their borders."""
  return open_files([read_header(path) for path in write_files(tmp_path, ids, 5)])


def test_what_is_read_is_what_was_written(tokens, ids):
  assert len(tokens) == len(ids)
  for start in range(len(ids)):
    for stop in (start, start + 1, start + 30, len(ids)):
      np.testing.assert_array_equal(tokens.read(start, min(stop, len(ids))), ids[start:stop])
  part = tokens.part(17, 90)
  np.testing.assert_array_equal(part.read(0, 73), ids[17:90])
  np.testing.assert_array_equal(part.part(30, 31).read(0, 1), ids[47:48])
  assert len(tokens.part(5, 5)) == 0


@pytest.mark.parametrize("num_batches", [None, 5])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_batches_from_files_are_those_from_the_device(tokens, ids, batching, num_batches):
  """Every step, whatever block it is in.

  Over the end of several epochs, with their short last batch.
  """
  config = make_config(batching, num_batches=num_batches)
  experiment = dataclasses.replace(change(NAMES, {"train.seed": 7}), data=config)
  batch_at = jax.jit(batch, static_argnums=2)
  whole = Stream(jnp.asarray(ids))
  for first in (0, 8, 16, 1000):  # 8 steps each: one program
    cut = feed.cut(tokens, first, 8, config, seed=7)
    assert isinstance(cut, CutBatches)
    assert cut.windows.shape == (8, 3, 5) and cut.windows.dtype == np.int32
    for step in range(first, first + 8):
      both = (batch_at(corpus, np.int32(step), experiment) for corpus in (cut, whole))
      got, wanted = (jax.tree.map(np.asarray, made) for made in both)
      np.testing.assert_array_equal(got.weights_BT, wanted.weights_BT)
      is_row = wanted.weights_BT > 0
      np.testing.assert_array_equal(got.inputs_BT[is_row], wanted.inputs_BT[is_row])
      np.testing.assert_array_equal(got.targets_BT[is_row], wanted.targets_BT[is_row])


class Huge:
  """Five thousand million tokens: the id at a position is the position modulo 251."""

  num = 5_000_000_000

  def __len__(self):
    return self.num

  def read(self, start, stop):
    assert 0 <= start < stop <= self.num
    return (np.arange(start, stop) % 251).astype(np.int32)


@pytest.mark.slow
def test_more_tokens_than_32_bits_count():
  """Random windows come from everywhere, sequential ones go on past 2**31, and an epoch has no
  window twice.
  """
  config = make_config("random", seq_len=64, batch_size=500)
  starts, _ = feed.find_starts(Huge.num, np.arange(4), config, seed=0)
  assert len(np.unique(starts)) == 2000 and starts.min() >= 0 and starts.max() < Huge.num - 64
  quarters = np.bincount((starts.ravel() * 4 // Huge.num), minlength=4)
  assert quarters.min() > 400, quarters
  again, _ = feed.find_starts(Huge.num, np.arange(1, 3), config, seed=0)
  np.testing.assert_array_equal(again, starts[1:3])
  config = make_config("sequential", seq_len=1_000, batch_size=10)
  steps = np.array([0, 1, 300_000, 499_998, 499_999, 500_000])
  starts, _ = feed.find_starts(Huge.num, steps, config, seed=0)
  # 499,999 batches and the token after them fit.
  np.testing.assert_array_equal(starts[:, 0], [0, 10_000, 3_000_000_000, 4_999_980_000, 0, 10_000])
  assert (np.diff(starts, axis=1) == 1000).all()
  cut = feed.cut(Huge(), 300_000, 2, config, seed=0)
  assert (
    cut.windows[0, 0, 0] == 3_000_000_000 % 251 and cut.windows[1, 9, 1000] == (3_000_020_000) % 251
  )
  config = make_config("epochs", seq_len=1_000_000, batch_size=7)
  # 4,999 windows: 714 batches and 1 row
  starts, counts = feed.find_starts(Huge.num, np.arange(715), config, seed=0)
  assert counts.sum() == 4999 and sorted(starts[counts]) == [i * 1_000_000 for i in range(4999)]


def test_blocks_are_read_ahead_and_once(tokens, monkeypatch):
  """The next block is read while one is in use, in a thread; blocks that are behind are let go."""
  config = make_config("sequential")
  monkeypatch.setattr(feed, "FEED_BLOCK_BYTES", 4 * 3 * 5 * 6)  # six steps
  read, threads, ahead = [], set(), threading.Event()
  original = feed.cut

  def watched(*args, first_step, **kwargs):
    read.append(first_step)
    threads.add(threading.current_thread())
    if first_step == 6:
      ahead.set()
    return original(*args, first_step=first_step, **kwargs)

  monkeypatch.setattr(feed, "cut", watched)
  mesh = sharding.make_mesh(change(EXPERIMENT, {"data.batch_size": 3}), jax.devices()[:1])
  made = feed.make_feed(Stream(tokens), config, 7, mesh)
  assert made.block_steps == 6
  first = made.corpus_at(0)
  assert ahead.wait(30)
  assert made.corpus_at(5) is first and int(made.corpus_at(6).first_step) == 6
  assert int(made.corpus_at(13).first_step) == 12
  made.corpus_at(17)
  assert sorted(read)[:3] == [0, 6, 12] and len(read) == len(set(read)), read
  assert threading.current_thread() not in threads


def test_an_error_while_reading_reaches_the_loop(tokens):
  broken = TokenFiles(tokens.maps, tokens.ends + 40)  # more ids than there are
  mesh = sharding.make_mesh(change(EXPERIMENT, {"data.batch_size": 3}), jax.devices()[:1])
  with pytest.raises((IndexError, ValueError)):
    feed.make_feed(Stream(broken), make_config("sequential"), 7, mesh).corpus_at(0)


LONGER = [
  pytest.param(batching, 1, marks=pytest.mark.slow) for batching in ("random", "sequential")
]


@pytest.mark.slow
@pytest.mark.parametrize(("batching", "num_devices"), [*LONGER, ("epochs", 4)])
def test_a_run_from_the_disk_is_that_on_the_device(tmp_path, monkeypatch, batching, num_devices):
  """They are two programs, which may round differently.

  Interrupted within a block and resumed, the bits are the same.
  """
  ids = np.random.default_rng(1).integers(0, 256, 900)
  (tmp_path / "shards").mkdir()
  write_files(tmp_path / "shards", ids, 3)
  write_files(tmp_path / "shards", ids[:100], 1, "val")
  changes = {
    "data.path": str(tmp_path / "shards"),
    "data.batching": batching,
    "data.seq_len": 8,
    "data.batch_size": 4,
  }
  changes |= {
    "model.max_seq_len": 8,
    "model.num_layers": 1,
    "model.d_model": 8,
    "model.num_heads": 2,
    "model.d_ff": 16,
  }
  changes |= {
    "train.steps": 20,
    "train.epochs": None,
    "train.log_every": 4,
    "mesh.data": num_devices,
  }
  changes |= {"sample.max_tokens": 2, "train.eval_every": 10, "optimizer.decay_steps": 20}
  experiment = change(EXPERIMENT, changes)
  on_device = train.train_run(plan_run(experiment))
  monkeypatch.setattr(data, "RESIDENT_TOKENS", 100)
  monkeypatch.setattr(feed, "FEED_BLOCK_BYTES", 4 * 4 * 9 * 7)  # seven steps
  plan = plan_run(experiment)
  assert isinstance(plan.data.train.tokens, TokenFiles)
  from_disk = train.train_run(plan)
  train.train_run(plan_run(change(experiment, {"train.steps": 10}), workdir=tmp_path / "run"))
  resumed = train.train_run(plan_run(experiment, workdir=tmp_path / "run"))
  np.testing.assert_allclose(on_device.losses, from_disk.losses, rtol=2e-6)
  assert on_device.heldout_loss == pytest.approx(from_disk.heldout_loss, rel=2e-6)
  np.testing.assert_array_equal(resumed.losses, from_disk.losses)
  for a, b in zip(jax.tree.leaves(from_disk.params), jax.tree.leaves(resumed.params), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
