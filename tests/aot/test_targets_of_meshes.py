"""A step over meshes of TPUs that are not there: what moves between the chips.

Nothing is run. On 8 virtual CPUs the same is tested in tests/test_collectives.py.
"""

import math
import subprocess
import sys

import pytest
from collectives import add_bytes, count_step_bytes, find_collectives, list_arrays
from test_targets import compile_for, needs_tpu

from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.params import param_table

pytestmark = [pytest.mark.aot, pytest.mark.timeout(600)]
VOCAB_SIZE, LENGTH = 1000, 256
SMALL = {
  "model.num_layers": 1,
  "model.d_model": 1024,
  "model.d_ff": 2304,
  "model.num_heads": 16,
  "model.max_seq_len": LENGTH,
  "data.seq_len": LENGTH,
  "data.batch_size": 64,
  "compute.dtype": "bfloat16",
  "compute.attention": "plain",
  "compute.layers": "unroll",  # the trips of a TPU's loops stand in no attribute
}
TARGETS = {
  "eight v5e": ("tpu:v5e:2x4", (2, 4, 1), {}),
  "256 v5e": ("tpu:v5e:16x16", (32, 8, 1), {"data.batch_size": 512}),
  "eight v6e": ("tpu:v6e:2x4", (2, 2, 2), {}),
  "four v5p, heads in a kernel": ("tpu:v5p:2x2x1", (1, 2, 2), {"compute.attention": "splash"}),
}


@needs_tpu
@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=[pytest.mark.slow] * n.startswith("eight")) for n in TARGETS]
)
def test_what_moves_is_what_has_to_move_on_tpus(name):
  """Weights move in bfloat16, and each device gets the sum of its part of every gradient alone."""
  target, shape, changes = TARGETS[name]
  sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), shape, strict=True))
  changes = SMALL | sizes | changes
  found = compile_for(target, changes, names=["steps"], text=True, vocab_size=VOCAB_SIZE)
  experiment = resolve(change(load_experiment("gpt2_shakespeare"), changes), VOCAB_SIZE)
  steps = found["programs"]["steps"]
  collectives, moved = find_collectives(steps["text"]), {}
  for kind, num in add_bytes(collectives).items():
    kind = "reduce" if kind in ("all-reduce", "reduce-scatter") else kind
    moved[kind] = moved.get(kind, 0) + num
  expected = count_step_bytes(experiment, shape, weight_size=2)
  assert moved.keys() == expected.keys()
  assert moved["all-gather"] == pytest.approx(expected["all-gather"], rel=0.02)
  # Activations may move in bfloat16; the two gradients of a tied embedding may be added before.
  assert expected["all-to-all"] / 2 <= moved["all-to-all"] <= expected["all-to-all"]
  assert 0.5 * expected["reduce"] <= moved["reduce"] <= 1.05 * expected["reduce"]
  scattered = {x for c in collectives if c.kind == "reduce-scatter" for x in c.shapes}
  table = param_table(experiment.model)
  matrices = [p for p in table["blocks"].values() if p.kind == "matrix"] + [table["tok_embed"]]
  sizes = {math.prod(p.shape) // shape[2] for p in matrices}
  assert {math.prod(dims) for _, dims in scattered} == sizes
  summed = {x for c in collectives if c.kind == "all-reduce" for x in c.shapes}
  assert summed.isdisjoint(scattered)
  # No device has the whole batch's stream, hidden layer or scores.
  B, D = experiment.data.batch_size, experiment.model.d_model
  large = [a for a in list_arrays(steps["text"]) if a[1][:2] == (B, LENGTH)]
  assert all(math.prod(dims) < B * LENGTH * D for _, dims in large), large
  assert bool(steps["kernels"]) == (changes["compute.attention"] == "splash")


ARRANGE = """
from jgpt.devices import topology
topology.set_target_environment()
from jax.experimental.topologies import get_topology_desc
from jgpt.errors import UserError
from jgpt.sharding import arrange_devices
for name, slices, num in (("v6e:16x16", 1, 256), ("v5p:4x4x4", 1, 64), ("v5e:2x4", 2, 16)):
  devices = get_topology_desc(platform="tpu", topology_name=name, num_slices=slices).devices
  sizes = [2**i for i in range(num.bit_length())]
  for shape in ((d, f, num // d // f) for d in sizes for f in sizes if num % (d * f) == 0):
    try:
      found = arrange_devices(shape, devices)
    except UserError as error:
      assert shape[0] % slices and "2 slices" in str(error), (name, shape)
      continue
    assert shape[0] % slices == 0 and found.shape == shape, (name, shape)
    assert len(set(found.flat)) == num
    for i, part in enumerate(found.reshape(slices, -1) if slices > 1 else ()):
      assert {device.slice_index for device in part} == {i}, (name, shape)
for name, num in (("v6e:4x4", 16), ("v5p:2x2x2", 8)):
  devices = get_topology_desc(platform="tpu", topology_name=name).devices
  for used in range(1, num + 1):
    found = arrange_devices((1, used, 1), devices[:used])
    assert found.shape == (1, used, 1) and set(found.flat) == set(devices[:used])
"""


@needs_tpu
def test_tpus_make_meshes_of_any_shape():
  """Also where an axis is a part of a torus's, over two slices, which only data lies across, and of
  some of the devices.
  """
  done = subprocess.run(
    [sys.executable, "-c", ARRANGE], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-3000:]
