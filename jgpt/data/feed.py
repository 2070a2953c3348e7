"""The training tokens on the devices: all of them at once, or a block of steps at a time.

A corpus that fits on the devices is placed there once. A larger one is read from its memory-mapped
files by a thread that is one block ahead; of several processes each reads its rows of every batch.
Both give the same batches, those of `batches.py`, bit for bit. The files are in `token_files.py`,
and the training loop is in `train.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jgpt import sharding
from jgpt.batches import Corpus, CutBatches, Stream, count_windows, epoch_order, window_starts
from jgpt.config import DataConfig
from jgpt.data.token_files import TokenFiles
from jgpt.system.precision import enable_x64

# Windows of a block on the devices, which hold two blocks once the next one has been read.
FEED_BLOCK_BYTES = 16 << 20
MAX_BLOCK_STEPS = 1024


@dataclasses.dataclass(frozen=True)
class Feed:
  """Access to the training tokens at any step.

  Attributes:
    corpus_at: returns the corpus, on the devices, from which the batches of a step are cut.
    block_steps: the corpus of a step serves the steps up to the next multiple of this; None serves
      all steps.
  """

  corpus_at: Callable[[int], Corpus]
  block_steps: int | None = None


def make_feed(corpus: Corpus, config: DataConfig, seed: int, mesh: Mesh) -> Feed:
  """Places a corpus on the devices, or prepares to read it in blocks if it is in files.

  Args:
    corpus: the `train` of a `Data`.
    config: decides how batches are cut.
    seed: of random windows and of the order of epochs.
    mesh: the devices; each holds the whole corpus, or its rows of the batches of a block.
  """
  if isinstance(corpus, Stream) and isinstance(corpus.tokens, TokenFiles):
    block_steps = count_block_steps(config)
    return Feed(_BlockReader(corpus.tokens, config, seed, block_steps, mesh).corpus_at, block_steps)
  placed = sharding.place(corpus, sharding.replicated(mesh))
  return Feed(lambda step: placed)


def count_block_steps(config: DataConfig) -> int:
  """Returns how many steps' windows fit in `FEED_BLOCK_BYTES`, from 1 to `MAX_BLOCK_STEPS`."""
  bytes_per_step = 4 * config.batch_size * (config.seq_len + 1)
  return max(1, min(MAX_BLOCK_STEPS, FEED_BLOCK_BYTES // bytes_per_step))


def cut(
  tokens: TokenFiles,
  first_step: int,
  num_steps: int,
  config: DataConfig,
  seed: int,
  rows: np.ndarray | None = None,
) -> CutBatches:
  """Cuts the batches of consecutive steps from files, or some rows of each.

  Args:
    tokens: the stream.
    first_step: the step of the first batch.
    num_steps: at least 1.
    config: decides how batches are cut.
    seed: of random windows and of the order of epochs.
    rows: numbers of the rows that are read; None reads all.

  Returns:
    NumPy arrays.
  """
  steps = np.arange(first_step, first_step + num_steps)
  if config.num_batches:
    steps = steps % config.num_batches
  starts, counts = find_starts(len(tokens), steps, config, seed)
  if rows is not None:
    starts, counts = starts[:, rows], counts[:, rows]
  windows = np.empty((*starts.shape, config.seq_len + 1), np.int32)
  for place in np.ndindex(starts.shape):
    windows[place] = tokens.read(int(starts[place]), int(starts[place]) + config.seq_len + 1)
  return CutBatches(windows, counts, np.int32(first_step))


def find_starts(
  num_tokens: int, steps: np.ndarray, config: DataConfig, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Computes `batches.window_starts` for several steps: int64 [steps, B], and bool [steps, B].

  Positions are computed in 64 bits where 32 bits are too few. The order of an epoch is drawn once,
  instead of once for each of its steps.
  """
  is_large = num_tokens >= 2**31
  with _on_host(), enable_x64(True) if is_large else contextlib.nullcontext():
    if config.batching != "epochs":
      starts, counts = _compile_starts(num_tokens, config, seed)(
        jax.device_put(steps.astype(np.int64 if is_large else np.int32))
      )
      return jax.device_get(starts).astype(np.int64), jax.device_get(counts)
    num_windows = count_windows(num_tokens, config)
    num_steps = -(-num_windows // config.batch_size)
    rows = (steps % num_steps * config.batch_size)[:, None] + np.arange(config.batch_size)
    starts = [
      _draw_order(num_windows, int(step) // num_steps, seed)[
        np.minimum(rows_B, num_windows - 1)
      ].astype(np.int64)
      for step, rows_B in zip(steps, rows, strict=True)
    ]
  return np.stack(starts) * config.seq_len, rows < num_windows


@lru_cache(maxsize=2)
def _compile_starts(num_tokens: int, config: DataConfig, seed: int) -> Callable:
  return jax.jit(jax.vmap(partial(window_starts, num_tokens, seed=seed, config=config)))


@lru_cache(maxsize=2)
def _draw_order(num_windows: int, epoch: int, seed: int) -> np.ndarray:
  draw = jax.jit(epoch_order, static_argnums=(0, 2))
  return jax.device_get(draw(num_windows, jax.device_put(np.int32(epoch)), seed))


def _on_host() -> contextlib.AbstractContextManager:
  """Returns a context in which JAX computes on the CPU.

  An accelerator would first finish the training steps that are queued on it.
  """
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
    return contextlib.nullcontext()


def cut_shardings(mesh: Mesh) -> CutBatches:
  """Returns the shardings of a `CutBatches`: each device holds its rows of every batch."""
  rows = NamedSharding(mesh, P(None, *sharding.batch_sharding(mesh).spec))
  return CutBatches(windows=rows, counts=rows, first_step=sharding.replicated(mesh))


def find_rows(mesh: Mesh, batch_size: int, devices: Collection[jax.Device]) -> np.ndarray:
  """Finds the rows of a batch that devices of a mesh hold, ascending, each once."""
  parts = sharding.batch_sharding(mesh).devices_indices_map((batch_size,))
  held = {part[0].indices(batch_size) for device, part in parts.items() if device in devices}
  return np.unique(np.concatenate([np.arange(*part) for part in held]))


def place_rows(local: CutBatches, rows: np.ndarray, batch_size: int, mesh: Mesh) -> CutBatches:
  """Places rows of batches on the devices of this process, as its part of the whole batches.

  Args:
    local: NumPy arrays, of the rows that this process's devices hold.
    rows: the numbers of those, from `find_rows`.
    batch_size: of the whole batches.
    mesh: the devices, of all processes.
  """

  def put(x: np.ndarray, place: NamedSharding) -> jax.Array:
    shape = (len(x), batch_size, *x.shape[2:])

    def take(index: tuple[slice, ...]) -> np.ndarray:
      start, stop, _ = index[1].indices(batch_size)
      first = np.searchsorted(rows, start)
      return x[:, first : first + stop - start]

    return jax.make_array_from_callback(shape, place, take)

  places = cut_shardings(mesh)
  windows, counts = put(local.windows, places.windows), put(local.counts, places.counts)
  return CutBatches(windows, counts, sharding.place(local.first_step, places.first_step))


class _BlockReader:
  """Reads blocks of batches from files, the next one while the steps of the current one run.

  Each process reads the rows that its devices hold.
  """

  def __init__(
    self, tokens: TokenFiles, config: DataConfig, seed: int, block_steps: int, mesh: Mesh
  ):
    rows = find_rows(mesh, config.batch_size, mesh.local_devices)
    self._cut = partial(cut, tokens, num_steps=block_steps, config=config, seed=seed, rows=rows)
    self._place = partial(place_rows, rows=rows, batch_size=config.batch_size, mesh=mesh)
    self._block_steps = block_steps
    self._pool = ThreadPoolExecutor(1, thread_name_prefix="jgpt-feed")
    self._blocks: dict[int, Future] = {}

  def corpus_at(self, step: int) -> CutBatches:
    """Returns the block of a step, waits for it if necessary, and starts to read the next one."""
    number = step // self._block_steps
    wanted = {
      n: self._blocks.get(n) or self._pool.submit(self._read, n) for n in (number, number + 1)
    }
    self._blocks = wanted  # drops the blocks before, and with them their memory
    return wanted[number].result()

  def _read(self, number: int) -> CutBatches:
    return self._place(self._cut(first_step=number * self._block_steps))
