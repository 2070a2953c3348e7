"""What moves between the devices of a mesh in a step: kinds, counts and bytes, in XLA's program.

On 8 virtual CPUs, whose compiler has no reduce-scatter: it sums over "fsdp" by an all-reduce, of
which a device keeps its part. For accelerators see tests/aot/test_targets_of_meshes.py.
"""

import math
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from collectives import add_bytes, count_step_bytes, find_collectives, list_arrays
from equivalence import QUICK
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jgpt import model, program, sharding
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.params import param_table

B, T, D, F, V, L = 16, 24, 32, 176, 80, 2  # not the 3 of queries, keys and values
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
  """Asserts what holds for every mesh."""
  capfd.readouterr()
  experiment, text = compile_step(shape, changes)
  assert LOGGED not in capfd.readouterr().err
  arrays = list_arrays(text)
  if shape[0] * shape[1] > 1:  # no device has the whole batch's stream, hidden layer or scores
    large = [a for a in arrays if a[0] == "f32" and a[1][:2] == (B, T)]
    assert all(math.prod(dims) < B * T * D for _, dims in large), large
  # No device has all layers' matrices or gradients, not for a moment.
  mesh = sharding.make_mesh(experiment, jax.devices())
  for name, param in param_table(experiment.model)["blocks"].items():
    if any(sharding.to_spec(param.axes, param.shape, mesh)):
      assert ("f32", (L, *param.shape)) not in arrays, name
  found = add_bytes(find_collectives(text))
  reduced = found.pop("all-reduce", 0) + found.pop("reduce-scatter", 0)
  found = found | ({"reduce": reduced} if reduced else {})
  expected = count_step_bytes(experiment, shape)
  assert found.keys() == expected.keys(), (found, expected)
  for kind, num in expected.items():  # and gains, scalars, ids
    assert num <= found[kind] <= 1.02 * num + 2000, (kind, found, expected)


SHAPES = [(1, 8, 1), (1, 1, 8), (4, 2, 1), (2, 1, 4), (1, 2, 4), (2, 4, 1)]


def test_what_moves_is_what_has_to_move(capfd):
  check_step((2, 2, 2), {}, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_what_moves_is_what_has_to_move_on_every_mesh(shape, capfd):
  check_step(shape, {}, capfd)


@pytest.mark.slow
def test_a_block_that_is_computed_again_gathers_no_more_than_others(capfd):
  check_step((1, 8, 1), {"compute.remat": "block"}, capfd)


def gather_once(params, config, compute):
  return sharding.gather(params, config, compute)


def unconstrained(x, axes):
  return x


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [gather_once, unconstrained])
def test_what_moves_needlessly_is_found(wrong, capfd):
  """Layers that keep whole parameters; a stream that lies as the compiler likes."""
  name = {gather_once: "defer_gather", unconstrained: "constrain"}[wrong]
  with mock.patch.object(model, name, wrong), pytest.raises(AssertionError):
    check_step((4, 2, 1), {"model.d_ff": 160}, capfd)  # a program that was not compiled before


def test_a_rematerialisation_is_heard(capfd):
  """XLA's partitioner writes to standard error what the tests above look for."""
  mesh = jax.make_mesh((2, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3)

  def move(x):
    x = jax.lax.with_sharding_constraint(jnp.sin(x), P(None, None, "fsdp"))
    return jax.lax.with_sharding_constraint(x, P(("data", "fsdp"), None, None))

  with jax.set_mesh(mesh):
    jax.jit(move).lower(jnp.zeros((8, 6, 10))).compile(compiler_options=QUICK)
  assert LOGGED in capfd.readouterr().err
