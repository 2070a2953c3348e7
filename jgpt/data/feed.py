"""The training tokens as the compiled step takes them: on the device, or from the disk, a block of steps at a time.

Responsible for keeping a corpus that fits on the devices, and for reading a larger one from its memory-mapped files in a
thread that stays one block ahead. Either way the batches are those of `batches.py`, the same bits for every step. Not
responsible for the files (`shards.py`) or for when steps are run (`train.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial

import jax
import numpy as np
from jax.sharding import Mesh

from jgpt import sharding
from jgpt.batches import Corpus, Cut, Stream, count_windows, epoch_order, window_starts
from jgpt.config import DataConfig
from jgpt.data.token_files import TokenFiles

FEED_BLOCK_BYTES = 16 << 20  # of windows on the devices; twice as many while the next block waits
MAX_BLOCK_STEPS = 1024


@dataclasses.dataclass(frozen=True)
class Feed:
  """The training part for any step.

  Attributes:
    corpus_at: returns what the updates from a step on are cut from, laid out over the devices.
    block_steps: what `corpus_at` returns holds the steps up to the next multiple of this; None holds all.
  """

  corpus_at: Callable[[int], Corpus]
  block_steps: int | None = None


def make_feed(corpus: Corpus, config: DataConfig, seed: int, mesh: Mesh) -> Feed:
  """Puts a corpus on the devices, or prepares to read it block by block where it stands in files.

  Args:
    corpus: as loaded.
    config: how batches are cut.
    seed: of random windows and of the order of epochs.
    mesh: the devices.
  """
  if isinstance(corpus, Stream) and isinstance(corpus.tokens, TokenFiles):
    block_steps = count_block_steps(config)
    return Feed(_BlockReader(corpus.tokens, config, seed, block_steps, mesh).corpus_at, block_steps)
  placed = jax.device_put(corpus, sharding.replicated(mesh))
  return Feed(lambda step: placed)


def count_block_steps(config: DataConfig) -> int:
  """Steps whose windows fit `BLOCK_BYTES`, at least one."""
  return max(1, min(MAX_BLOCK_STEPS, FEED_BLOCK_BYTES // (4 * config.batch_size * (config.seq_len + 1))))


def cut(tokens: TokenFiles, first_step: int, num_steps: int, config: DataConfig, seed: int) -> Cut:
  """Cuts the batches of steps from files.

  Args:
    tokens: the stream.
    first_step: of `num_steps` steps.
    num_steps: at least 1.
    config: how batches are cut.
    seed: of random windows and of the order of epochs.

  Returns:
    NumPy arrays.
  """
  steps = np.arange(first_step, first_step + num_steps)
  starts, counts = _find_starts(len(tokens), steps % config.num_batches if config.num_batches else steps, config, seed)
  windows = np.empty((*starts.shape, config.seq_len + 1), np.int32)
  for place in np.ndindex(starts.shape):
    windows[place] = tokens.read(int(starts[place]), int(starts[place]) + config.seq_len + 1)
  return Cut(windows, counts, np.int32(first_step))


def _find_starts(num_tokens: int, steps: np.ndarray, config: DataConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """`batches.window_starts` of several steps: int64 [steps, B], and bool [steps, B].

  More tokens than 32 bits count are counted with 64. An epoch's order is drawn once, not once for each of its steps.
  """
  is_large = num_tokens >= 2**31
  with _on_host(), jax.enable_x64(True) if is_large else contextlib.nullcontext():
    if config.batching != "epochs":
      starts, counts = _compile_starts(num_tokens, config, seed)(steps.astype(np.int64 if is_large else np.int32))
      return np.asarray(starts, np.int64), np.asarray(counts)
    num_windows = count_windows(num_tokens, config)
    num_steps = -(-num_windows // config.batch_size)
    rows = (steps % num_steps * config.batch_size)[:, None] + np.arange(config.batch_size)
    starts = [
      _draw_order(num_windows, int(step) // num_steps, seed)[np.minimum(rows_B, num_windows - 1)].astype(np.int64)
      for step, rows_B in zip(steps, rows, strict=True)
    ]
  return np.stack(starts) * config.seq_len, rows < num_windows


@lru_cache(maxsize=2)
def _compile_starts(num_tokens: int, config: DataConfig, seed: int) -> Callable:
  return jax.jit(jax.vmap(partial(window_starts, num_tokens, seed=seed, config=config)))


@lru_cache(maxsize=2)
def _draw_order(num_windows: int, epoch: int, seed: int) -> np.ndarray:
  return np.asarray(jax.jit(epoch_order, static_argnums=(0, 2))(num_windows, np.int32(epoch), seed))


def _on_host() -> contextlib.AbstractContextManager:
  """Computes on the CPU: an accelerator would do it after the steps that it is busy with."""
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
    return contextlib.nullcontext()


class _BlockReader:
  """Reads the next block while the steps of one are run."""

  def __init__(self, tokens: TokenFiles, config: DataConfig, seed: int, block_steps: int, mesh: Mesh):
    self._cut = partial(cut, tokens, num_steps=block_steps, config=config, seed=seed)
    self._block_steps, self._shardings = block_steps, sharding.cut_shardings(mesh)
    self._pool = ThreadPoolExecutor(1, thread_name_prefix="jgpt-feed")
    self._blocks: dict[int, Future] = {}

  def corpus_at(self, step: int) -> Cut:
    """The block that holds a step; waits for it where it is not there yet."""
    number = step // self._block_steps
    wanted = {n: self._blocks.get(n) or self._pool.submit(self._read, n) for n in (number, number + 1)}
    self._blocks = wanted  # blocks that are behind are let go
    return wanted[number].result()

  def _read(self, number: int) -> Cut:
    return jax.device_put(self._cut(first_step=number * self._block_steps), self._shardings)
