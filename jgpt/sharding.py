"""Where arrays live.

Responsible for the mesh and for mapping logical axes (those of `param_table`, and the batch) to mesh axes. Pure: given the
devices, it decides placements and moves nothing. A new mesh axis is a new entry in `RULES`; the step does not change.
"""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jgpt.config import Experiment, ModelConfig, UserError
from jgpt.params import Param, param_table

# Logical axis -> mesh axis. What is not named here is replicated.
RULES = {"batch": "data"}


def make_mesh(experiment: Experiment, devices: Sequence[jax.Device]) -> Mesh:
  """Lays devices out as a mesh with the axis "data".

  Args:
    experiment: `mesh.data` says how many to use; None means all.
    devices: those there are.

  Raises:
    UserError: if there are fewer devices than asked for, or they do not divide the batch.
  """
  num_data = experiment.mesh.data or len(devices)
  if num_data > len(devices):
    raise UserError(
      f"mesh.data={num_data} asks for more than the {len(devices)} devices there are. Try --set mesh.data={len(devices)}"
    )
  for name, size in (
    ("data.batch_size", experiment.data.batch_size),
    ("train.micro_batch_size", experiment.train.micro_batch_size),
  ):
    if size and size % num_data:
      below, above = size // num_data * num_data, -(-size // num_data) * num_data
      nearest = f"{below} or {above}" if below else f"{above}"
      raise UserError(
        f"{name}={size} must be a multiple of the {num_data} devices; nearest: {nearest}. Try --set {name}={above} "
        "or --set mesh.data=1"
      )
  return jax.make_mesh((num_data,), ("data",), devices=devices[:num_data], axis_types=(AxisType.Auto,))


def to_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
  """Maps logical axes to a partition spec; a dimension that its mesh axis does not divide is replicated."""
  mesh_axes = (RULES.get(axis) if axis else None for axis in axes)
  return P(*(m if m and size % mesh.shape[m] == 0 else None for m, size in zip(mesh_axes, shape, strict=True)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of every array of a `Batch`: dimension 0 is divided."""
  return NamedSharding(mesh, P(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, P())


def param_shardings(config: ModelConfig, mesh: Mesh) -> dict:
  """Maps `param_table` to a tree of shardings; stacked layers add a dimension in front that is not divided."""

  def sharding(path: tuple, param: Param) -> NamedSharding:
    spec = to_spec(param.axes, param.shape, mesh)
    return NamedSharding(mesh, P(None, *spec) if path[0].key == "blocks" else spec)

  return jax.tree_util.tree_map_with_path(sharding, param_table(config))


def state_shardings(state: jax.ShapeDtypeStruct, config: ModelConfig, mesh: Mesh):
  """Derives the shardings of a whole `TrainState`: each subtree shaped like the parameters lies as they do.

  Args:
    state: its shapes, from `jax.eval_shape`.
    config: sizes.
    mesh: from `make_mesh`.
  """
  shardings = param_shardings(config, mesh)
  structure = jax.tree.structure(shardings)

  def is_params(subtree) -> bool:
    return jax.tree.structure(subtree) == structure

  return jax.tree.map(lambda subtree: shardings if is_params(subtree) else replicated(mesh), state, is_leaf=is_params)
