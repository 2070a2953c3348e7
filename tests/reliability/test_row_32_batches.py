"""Row 32: the batches of several processes together are the batch of one, and each process reads
its own rows only.

The processes here are groups of devices, which need no process of their own: what a process reads
depends on its devices alone. Real ones are in `test_row_11_processes.py`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgpt import batches, sharding
from jgpt.batches import Stream
from jgpt.config import MeshConfig
from jgpt.config.catalog import load_experiment
from jgpt.data import feed
from jgpt.data.token_files import TokenFiles, open_files, read_header, write_tokens

BASE = load_experiment("shakespeare_bytes")
BATCHINGS = ("random", "sequential", "epochs")
NUM_TOKENS = 401  # each id is its position, so that a window says where it was cut


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Files whose every token is the number of its place in the text."""
  folder = tmp_path_factory.mktemp("tokens")
  paths = []
  for number, part in enumerate(np.array_split(np.arange(NUM_TOKENS), 3)):
    paths.append(folder / f"text_train_{number:06d}.bin")
    with write_tokens(paths[-1], NUM_TOKENS) as writer:
      writer.append(part)
  return open_files([read_header(path) for path in paths])


class Counted(TokenFiles):
  """Token files that count what is read of them."""

  def __init__(self, files):
    super().__init__(files.maps, files.ends)
    object.__setattr__(self, "positions", [])

  def read(self, start, stop):
    self.positions.append((start, stop))
    return super().read(start, stop)


def experiment_of(batching, shape, batch_size, seq_len, num_batches=None):
  data = dataclasses.replace(
    BASE.data,
    batching=batching,
    batch_size=batch_size,
    seq_len=seq_len,
    num_batches=num_batches,
  )
  mesh = MeshConfig(**dict(zip(sharding.AXES, shape, strict=True)))
  return dataclasses.replace(BASE, data=data, mesh=mesh)


SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 2, 1), (2, 1, 4), (1, 2, 2), (3, 1, 1)]


@settings(deadline=None, max_examples=50)
@given(
  shape=st.sampled_from(SHAPES),
  num_processes=st.integers(1, 4),
  owners=st.permutations(range(8)),
  sizes=st.sampled_from([(24, 5), (48, 1)]),
  batching=st.sampled_from(BATCHINGS),
  first_step=st.integers(0, 50),
)
def test_row_32_processes_that_read_files_read_the_batch_of_one(
  files, shape, num_processes, owners, sizes, batching, first_step
):
  """Whichever devices a process has; and none reads a token that no device of its own needs."""
  batch_size, seq_len = sizes
  experiment = experiment_of(batching, shape, batch_size, seq_len)
  mesh = sharding.make_mesh(experiment, jax.devices())
  processes = [
    [d for d, owner in zip(mesh.devices.flat, owners, strict=False) if owner % num_processes == n]
    for n in range(num_processes)
  ]
  whole = feed.cut(files, first_step, 4, experiment.data, 7)
  together = np.full_like(whole.windows, -1)
  for devices in filter(None, processes):
    counted = Counted(files)
    rows = feed.find_rows(mesh, batch_size, devices)
    num_parts = shape[0] * shape[1]
    most = min(len(devices), num_parts) * batch_size // num_parts
    assert len(set(rows)) == len(rows) <= most
    local = feed.cut(counted, first_step, 4, experiment.data, 7, rows=rows)
    np.testing.assert_array_equal(local.counts, whole.counts[:, rows])
    together[:, rows] = local.windows
    assert len(counted.positions) == 4 * len(rows)
    assert sum(stop - start for start, stop in counted.positions) == local.windows.size
  np.testing.assert_array_equal(together, whole.windows)
  rows = feed.find_rows(mesh, batch_size, list(mesh.devices.flat))
  placed = feed.place_rows(whole, rows, batch_size, mesh)
  for shard in placed.windows.addressable_shards:
    held = feed.find_rows(mesh, batch_size, [shard.device])
    np.testing.assert_array_equal(shard.data, whole.windows[:, held])


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 8])
def test_row_32_nothing_is_read_twice_within_an_epoch(files, num_processes, batch_size):
  """All processes' windows of an epoch together are each window of the text once; the next epoch
  has them in another order.
  """
  experiment = experiment_of("epochs", (4, 1, 1), batch_size, 7)
  mesh = sharding.make_mesh(experiment, jax.devices())
  num_windows = (NUM_TOKENS - 1) // 7
  num_steps = -(-num_windows // batch_size)
  orders = []
  for epoch in range(2):
    starts = []
    for devices in np.array_split(mesh.devices.flatten(), num_processes):
      rows = feed.find_rows(mesh, batch_size, list(devices))
      made = feed.cut(files, epoch * num_steps, num_steps, experiment.data, 7, rows=rows)
      starts += made.windows[made.counts][:, 0].tolist()
    assert sorted(starts) == [7 * n for n in range(num_windows)]
    orders.append(starts)
  assert orders[0] != orders[1]


@pytest.mark.parametrize(
  ("batching", "shape"), [("random", (8, 1, 1)), *((name, (2, 2, 2)) for name in BATCHINGS)]
)
def test_row_32_of_tokens_in_memory_each_device_cuts_its_rows(batching, shape):
  """Devices that hold the whole text compute what one device does, each for its own rows."""
  experiment = experiment_of(batching, shape, 8, 5)
  mesh = sharding.make_mesh(experiment, jax.devices())
  corpus = Stream(np.arange(NUM_TOKENS, dtype=np.int32))
  make = partial(batches.batch, experiment=experiment)
  wanted = jax.jit(make)(jax.tree.map(jnp.asarray, corpus), np.int32(11))
  placed = sharding.place(corpus, sharding.replicated(mesh))
  with jax.set_mesh(mesh):
    got = jax.jit(make, out_shardings=sharding.batch_sharding(mesh))(placed, np.int32(11))
  for x, y in zip(got, wanted, strict=True):
    for shard in x.addressable_shards:
      rows = feed.find_rows(mesh, 8, [shard.device])
      assert len(rows) == 8 // (shape[0] * shape[1])
      np.testing.assert_array_equal(shard.data, np.asarray(y)[rows])
