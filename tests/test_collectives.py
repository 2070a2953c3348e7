"""What moves between the devices of a mesh in a step: kinds, counts and bytes, in XLA's program.

On 8 virtual CPUs, whose compiler has no reduce-scatter: it sums over "fsdp" by an all-reduce, of
which a device keeps its part. For accelerators see tests/aot/test_targets_of_meshes.py.
"""

import jax
import numpy as np
import pytest
from collectives import add_bytes, count_step_bytes, find_collectives, list_arrays
from equivalence import QUICK

from jgpt import program, sharding
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.params import param_table

B, T, D, F, V, L = 16, 24, 32, 176, 80, 3
SIZES = {
  "model.num_layers": L,
  "model.d_model": D,
  "model.d_ff": F,
  "model.num_heads": 8,
  "model.max_seq_len": T,
  "data.seq_len": T,
  "data.batch_size": B,
  "compute.layers": "scan",
  "compute.dtype": "float32",
}
LOGGED = "Involuntary full rematerialization"


def make_experiment(shape, changes):
  sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), shape, strict=True))
  return resolve(change(load_experiment("shakespeare_char"), SIZES | sizes | changes), V, 10)


def compile_step(shape, changes):
  """The text of the program that a run would compile, in a hurry."""
  experiment = make_experiment(shape, changes)
  lowered = program.lower_programs(experiment, jax.devices(), 4000, names=("steps",))["steps"]
  return experiment, lowered.compile(compiler_options=QUICK).as_text()


def check_step(shape, changes, capfd):
  """Asserts what holds for every mesh, and returns the collectives."""
  capfd.readouterr()
  experiment, text = compile_step(shape, changes)
  assert LOGGED not in capfd.readouterr().err
  arrays = list_arrays(text)
  num_parts = shape[0] * shape[1]
  if num_parts > 1:  # no device has the whole batch's stream, hidden layer or scores
    rows = B // (experiment.train.micro_batch_size or B)
    whole = B * T * D // rows
    large = [a for a in arrays if a[0] == "f32" and a[1][:2] in ((B, T), (B // rows, T))]
    assert all(np.prod(dims) < whole for _, dims in large), large
  # No device has all layers' matrices or gradients, not for a moment.
  for name, param in param_table(experiment.model)["blocks"].items():
    spec = sharding.to_spec(param.axes, param.shape, sharding.make_mesh(experiment, jax.devices()))
    if any(spec):
      assert ("f32", (L, *param.shape)) not in arrays, name
  found = find_collectives(text)
  assert_bytes(add_bytes(found), count_step_bytes(experiment, shape), micro_steps(experiment))
  return found


def micro_steps(experiment):
  return B // (experiment.train.micro_batch_size or B)


def assert_bytes(found, expected, num_parts=1, share=0.08):
  """Bytes by kind are as counted, and a few more: gains, scalars, ids."""
  reduced = found.pop("all-reduce", 0) + found.pop("reduce-scatter", 0)
  found = found | ({"reduce": reduced} if reduced else {})
  assert found.keys() == expected.keys(), (found, expected)
  for kind, num in expected.items():
    assert num <= found[kind] <= (1 + share) * num + 4000, (kind, found, expected)


SHAPES = [(1, 8, 1), (1, 1, 8), (4, 2, 1), (2, 1, 4), (1, 2, 4), (2, 4, 1)]


def test_what_moves_is_what_has_to_move(capfd):
  check_step((2, 2, 2), {}, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_what_moves_is_what_has_to_move_on_every_mesh(shape, capfd):
  check_step(shape, {}, capfd)
