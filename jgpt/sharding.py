"""Where arrays live.

Responsible for the mesh and for mapping logical axes (those of `param_table`, and the batch) to mesh axes. Pure: given the
devices, it decides placements and moves nothing. A new mesh axis is a new entry in `RULES`; the step does not change.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jgpt.batches import Cut
from jgpt.config import Experiment, ModelConfig
from jgpt.errors import UserError
from jgpt.params import param_at

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
  batch, micro = experiment.data.batch_size, experiment.train.micro_batch_size
  most = max(n for n in range(1, len(devices) + 1) if (micro or batch) % n == 0)  # micro-batches divide the batch
  if num_data > len(devices):
    raise UserError(
      f"mesh.data={num_data} asks for more than the {len(devices)} devices there are. Try --set mesh.data={most}"
    )
  if (micro or batch) % num_data:
    name, size = ("train.micro_batch_size", micro) if micro else ("data.batch_size", batch)
    below, above = size // num_data * num_data, -(-size // num_data) * num_data
    nearest = f"{below} or {above}" if below else f"{above}"
    batches = f" --set data.batch_size={-(-batch // above) * above}" if micro and batch % above else ""
    raise UserError(
      f"{name}={size} must be a multiple of the {num_data} devices; nearest: {nearest}. Try --set {name}={above}{batches} "
      f"or --set mesh.data={most}"
    )
  return jax.make_mesh((num_data,), ("data",), devices=devices[:num_data], axis_types=(AxisType.Auto,))


def to_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
  """Maps logical axes to a partition spec; a dimension that its mesh axis does not divide is replicated."""
  mesh_axes = (RULES.get(axis) if axis else None for axis in axes)
  return P(*(m if m and size % mesh.shape[m] == 0 else None for m, size in zip(mesh_axes, shape, strict=True)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of every array of a `Batch`: dimension 0 is divided."""
  return NamedSharding(mesh, P(RULES["batch"]))


def cut_shardings(mesh: Mesh) -> Cut:
  """The shardings of a `Cut`: each device holds its rows of every batch."""
  rows = NamedSharding(mesh, P(None, RULES["batch"]))
  return Cut(windows=rows, counts=rows, first_step=replicated(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, P())


def param_shardings(params: dict, config: ModelConfig, mesh: Mesh) -> dict:
  """Derives the shardings of parameters from `param_table`.

  Args:
    params: their shapes, blocks stacked or a list; stacked layers add a dimension in front that is not divided.
    config: sizes and switches.
    mesh: from `make_mesh`.
  """

  def sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    param = param_at(path, config)
    spec = to_spec(param.axes, param.shape, mesh)
    return NamedSharding(mesh, P(None, *spec) if leaf.ndim > len(param.shape) else spec)

  return jax.tree_util.tree_map_with_path(sharding, params)


def state_shardings(state: Any, config: ModelConfig, mesh: Mesh) -> Any:
  """Derives the shardings of a whole state: each subtree shaped like the parameters lies as they do.

  Args:
    state: its shapes, from `jax.eval_shape`.
    config: sizes and switches.
    mesh: from `make_mesh`.
  """
  shardings = param_shardings(state.params, config, mesh)
  structure = jax.tree.structure(shardings)

  def is_params(subtree) -> bool:
    return jax.tree.structure(subtree) == structure

  return jax.tree.map(lambda subtree: shardings if is_params(subtree) else replicated(mesh), state, is_leaf=is_params)


def stack_blocks(tree: Any) -> Any:
  """Turns every list named "blocks" in a pytree (parameters, moments, a whole state) into stacked arrays.

  A tree whose blocks are stacked already comes back as it is.
  """

  def stack(params: Any) -> Any:
    if not _has_blocks(params) or isinstance(params["blocks"], dict):
      return params
    return params | {"blocks": jax.tree.map(lambda *layers: jnp.stack(layers), *params["blocks"])}

  return jax.tree.map(stack, tree, is_leaf=_has_blocks)


def unstack_blocks(tree: Any) -> Any:
  """Turns every "blocks" of stacked arrays in a pytree into a list with a dict for each layer: undoes `stack_blocks`."""

  def unstack(params: Any) -> Any:
    if not _has_blocks(params) or not isinstance(params["blocks"], dict):
      return params
    num_layers = len(jax.tree.leaves(params["blocks"])[0])
    return params | {"blocks": [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(num_layers)]}

  return jax.tree.map(unstack, tree, is_leaf=_has_blocks)


def _has_blocks(tree: Any) -> bool:
  return isinstance(tree, dict) and "blocks" in tree
