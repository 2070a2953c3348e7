"""Every mesh gives what one device gives: losses, gradients, moments and parameters after updates.

One device computes the plain definition; a mesh computes as a run on it would. What XLA makes of
it, and what moves between devices, is in tests/test_collectives.py.
"""

import dataclasses
import functools
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence import QUICK, cast, must_differ
from switches import compare_leaves, in_brief, without_padding

from jgpt import sharding
from jgpt.batches import Documents, Stream
from jgpt.config import Experiment, MeshConfig
from jgpt.config.catalog import load_experiment
from jgpt.config.experiment import PLAIN
from jgpt.config.settings import change, resolve
from jgpt.devices.compute import resolve_compute
from jgpt.keys import INIT, derive_key
from jgpt.step import TrainState, init_state, train_steps
from jgpt.system.precision import enable_x64

NUM_STEPS = 3
# Of a leaf's largest entry: parameters after the updates in float64, and one update in float32, of
# which a longer comparison would be of Adam's noise.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
SMALL = {
  "model.num_layers": 2,
  "model.d_model": 16,
  "model.d_ff": 32,
  "model.num_heads": 4,
  "model.max_seq_len": 16,
  "data.seq_len": 16,
  "data.batch_size": 16,
  "train.steps": 10,
  "optimizer.warmup_steps": 0,
}
VOCABULARIES = {
  "names": 27,
  "microgpt": 27,
  "shakespeare_bytes": 256,
  "shakespeare_char": 65,
  "shakespeare_char_cpu": 64,
  "shakespeare_bpe": 100,
  "text": 64,
  "gpt2_shakespeare": 120,  # padded to 128
}
PLACES = ("embedding", "attention", "attention_out", "activation", "mlp_out")
DROPOUT = {"model.dropout": 0.2, "model.dropout_places": PLACES}
MICRO = {"train.micro_batch_size": 8}
SCAN = {"compute.layers": "scan"}
# Experiment, sizes of data, fsdp and tensor, settings of both, settings of the mesh alone, dtype.
# Each experiment meets every axis, and every shape of 8 devices is met.
QUICK_CASES = [("names", (4, 2, 1), DROPOUT, {}, "float32")]
CASES = [
  ("shakespeare_bytes", (2, 2, 2), MICRO, SCAN, "float64"),
  ("names", (1, 1, 8), {"model.num_heads": 8}, {"compute.attention": "blocks"}, "float64"),
  ("microgpt", (2, 2, 2), DROPOUT | MICRO, {}, "float64"),
  ("microgpt", (8, 1, 1), MICRO, {}, "float32"),
  ("shakespeare_bytes", (1, 8, 1), {}, {"compute.remat": "block"}, "float64"),
  ("shakespeare_char", (4, 1, 2), {}, {"compute.remat": "elementwise"}, "float32"),
  ("shakespeare_char_cpu", (2, 4, 1), DROPOUT, {"compute.loss_chunks": 3}, "float64"),
  ("shakespeare_bpe", (1, 2, 4), MICRO, {}, "float32"),
  ("text", (1, 4, 2), DROPOUT, SCAN, "float64"),
  ("gpt2_shakespeare", (2, 1, 4), MICRO, SCAN | {"compute.loss_chunks": 2}, "float64"),
  # Of fewer devices.
  ("shakespeare_bpe", (2, 1, 2), {}, {"compute.attention": "blocks"}, "float64"),
  ("microgpt", (1, 2, 2), DROPOUT, {"compute.tricks": False}, "float64"),
  ("text", (2, 1, 1), MICRO, {}, "float64"),
  ("gpt2_shakespeare", (1, 2, 1), DROPOUT, {}, "float32"),
  # What the axes do not divide is whole on each device.
  ("shakespeare_char", (1, 8, 1), {"model.d_model": 12}, SCAN, "float64"),
  ("shakespeare_char_cpu", (1, 1, 4), {"model.d_ff": 38, "model.num_heads": 2}, {}, "float32"),
]


def make_experiment(name: str, settings: dict) -> Experiment:
  """An experiment at small size, on one device and computed plainly."""
  experiment = resolve(change(load_experiment(name), SMALL | settings), VOCABULARIES[name], 10)
  return dataclasses.replace(experiment, mesh=MeshConfig(data=1), compute=PLAIN)


def make_corpus(experiment: Experiment) -> Documents | Stream:
  """Random ids: documents of unlike lengths, or a stream."""
  rng, length = np.random.default_rng(0), experiment.data.seq_len
  tokens = rng.integers(0, experiment.model.vocab_size, (100, length + 1)).astype(np.int32)
  if experiment.data.batching != "documents":
    return Stream(tokens.ravel())
  return Documents(tokens, rng.integers(1, length + 1, 100).astype(np.int32))


@functools.cache
def draw_state(experiment: Experiment) -> TrainState:
  """The state before the first update, as NumPy arrays in float32."""
  with enable_x64(False):
    init = jax.jit(partial(init_state, experiment=experiment), compiler_options=QUICK)
    return jax.device_get(init(derive_key(experiment.train.seed, INIT, 0)))


def train(
  experiment: Experiment, like: Experiment, dtype: str
) -> list[tuple[dict[str, Any], TrainState]]:
  """The metrics and states after one update and after `NUM_STEPS`, blocks stacked.

  Args:
    experiment: resolved, as it is computed.
    like: the same on one device, whose initial state is taken.
    dtype: of the numbers.
  """
  mesh = sharding.make_mesh(experiment, jax.devices())
  state = sharding.arrange_blocks(cast(draw_state(like), dtype), experiment.compute.layers)
  places = sharding.state_shardings(state, experiment.model, mesh)
  state = jax.device_put(state, places)
  corpus = jax.device_put(make_corpus(experiment), sharding.replicated(mesh))

  def run_steps(state: TrainState, num_steps: jax.Array) -> tuple[TrainState, dict]:
    return train_steps(state, corpus, num_steps, experiment, capacity=NUM_STEPS)

  found = []
  with jax.set_mesh(mesh):
    compiled = jax.jit(
      run_steps, out_shardings=(places, sharding.replicated(mesh)), compiler_options=QUICK
    )
    compiled = compiled.lower(state, jnp.int32(0)).compile()
    for num_steps in (1, NUM_STEPS):
      num = jax.device_put(np.int32(num_steps), sharding.replicated(mesh))
      after, metrics = jax.device_get(compiled(state, num))
      found.append((metrics, sharding.stack_blocks(after)))
  return found


@functools.cache
def train_plainly(experiment: Experiment, dtype: str) -> list[tuple[dict[str, Any], TrainState]]:
  return train(experiment, experiment, dtype)


def check_mesh(case: tuple) -> None:
  """Asserts that a mesh's updates are those of one device."""
  name, shape, settings, settings_of_mesh, dtype = case
  plain = make_experiment(name, settings)
  sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), shape, strict=True))
  divided = dataclasses.replace(plain, compute=load_experiment(name).compute)
  divided = change(divided, sizes | {"compute.dtype": "float32"} | settings_of_mesh)
  divided = resolve_compute(divided, jax.devices()[0])
  with enable_x64(dtype == "float64"):
    expected, found = train_plainly(plain, dtype), train(divided, plain, dtype)
  what, tolerance, config = f"one device, {dtype}", TOLERANCE[dtype], plain.model
  with in_brief():
    for i, ((metrics, state), (own_metrics, own)) in enumerate(zip(expected, found, strict=True)):
      if i and dtype == "float32":
        continue
      compare_leaves(what, metrics, own_metrics, tolerance)
      # After one update the first moments are the gradient, as clipped, times 1 - b1.
      moments = (state.opt_state["adam"], own.opt_state["adam"])
      for field in ("mu", "nu") if dtype == "float64" else ("mu",):
        trees = (without_padding(getattr(m, field), config) for m in moments)
        compare_leaves(f"{what}: {field}", *trees, tolerance)
      if dtype == "float64":
        trees = (without_padding(x.params, config) for x in (state, own))
        compare_leaves(f"{what}: parameters", *trees, tolerance)


def identify(case: tuple) -> str:
  name, shape, settings, settings_of_mesh, dtype = case
  return "-".join([name, "x".join(map(str, shape)), *settings, *settings_of_mesh, dtype])


@pytest.mark.parametrize("case", QUICK_CASES, ids=identify)
def test_a_mesh_gives_what_one_device_gives(case):
  check_mesh(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=identify)
def test_every_mesh_gives_what_one_device_gives(case):
  check_mesh(case)


def test_cases_cover_experiments_axes_and_shapes():
  """Each experiment is met on each axis, and each way to divide 8 devices by three axes is met."""
  cases = QUICK_CASES + CASES
  for name in VOCABULARIES:
    shapes = [shape for experiment, shape, *_ in cases if experiment == name]
    assert all(max(shape[axis] for shape in shapes) > 1 for axis in range(3)), name
  eight = {(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8}
  assert len(eight) == 10 and eight <= {shape for _, shape, *_ in cases}


# --- Devices ---


def test_gpus_of_several_hosts_are_laid_out_host_by_host():
  """To jax each host of GPUs is a slice, of which `jax.make_mesh` takes one."""
  gpus = [
    mock.Mock(platform="gpu", device_kind="NVIDIA H100", id=i, slice_index=i // 4) for i in range(8)
  ]
  arranged = sharding.arrange_devices((2, 2, 2), gpus[4:] + gpus[:4])
  assert [device.id for device in arranged.flat] == list(range(8)) and arranged.shape == (2, 2, 2)


# --- Planted errors ---


def test_over_axes_of_a_users_own_arrays_stay_divided():
  """Only "data" has a meaning here: what lies over "model" is the user's."""
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)
  spec = jax.sharding.PartitionSpec("data", None, "model")
  x = jax.device_put(np.ones((8, 4, 6), np.float32), jax.sharding.NamedSharding(mesh, spec))
  with jax.set_mesh(mesh):
    found = jax.jit(lambda x: sharding.constrain(x + 1, ("batch", None, None)))(x)
  assert found.sharding.shard_shape(found.shape) == (2, 4, 3)


def without_sum(function, whole, rows):
  """As `sum_over_data`, but each device keeps its own rows' sums."""
  mesh = jax.sharding.get_abstract_mesh()
  P = jax.sharding.PartitionSpec
  mapped = jax.shard_map(
    function, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
  )
  return mapped(whole, rows)


def gather_doubled(gather, *args):
  """As `gather`, but its gradient is twice what it should be."""
  return jax.tree.map(lambda w: 2 * w - jax.lax.stop_gradient(w), gather(*args))


PLANTED = {
  "no sum over data": ("step.sum_over_data", without_sum, ("text", (2, 1, 1), {}, {}, "float32")),
  "gradients counted twice": (
    "model.defer_gather",
    partial(gather_doubled, sharding.gather),
    ("text", (1, 2, 1), {}, {}, "float32"),
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error):
  place, wrong, case = PLANTED[error]
  with mock.patch(f"jgpt.{place}", wrong), must_differ() as rows:
    check_mesh(case)
  assert any(row.relative > 0.01 for row in rows)
