"""The mesh, and how arrays lie over it and in memory.

Logical axes, those of `param_table` and of the batch, are mapped to mesh axes by `RULES`. Nothing
is moved here: functions return shardings, or constrain traced arrays.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jgpt.config import Experiment, ModelConfig
from jgpt.errors import UserError
from jgpt.params import param_at

# Logical axis -> mesh axis. What is not named here is replicated.
RULES = {"batch": "data"}


def make_mesh(experiment: Experiment, devices: Sequence[jax.Device]) -> Mesh:
  """Makes a mesh of devices with the axis "data".

  Args:
    experiment: `mesh.data` is the number of devices to use; None uses all.
    devices: all there are.

  Raises:
    UserError: if there are fewer devices than `mesh.data`, or they do not divide the batch.
  """
  num_data = experiment.mesh.data or len(devices)
  batch, micro = experiment.data.batch_size, experiment.train.micro_batch_size
  most = count_usable_devices(experiment, len(devices))
  if num_data > len(devices):
    raise UserError(
      f"mesh.data={num_data} asks for more than the {len(devices)} devices there are. Try --set "
      f"mesh.data={most}"
    )
  if (micro or batch) % num_data:
    name, size = ("train.micro_batch_size", micro) if micro else ("data.batch_size", batch)
    below, above = size // num_data * num_data, -(-size // num_data) * num_data
    nearest = f"{below} or {above}" if below else f"{above}"
    batches = ""
    if micro and batch % above:
      batches = f" --set data.batch_size={-(-batch // above) * above}"
    raise UserError(
      f"{name}={size} must be a multiple of the {num_data} devices; nearest: {nearest}. Try "
      f"--set mesh.data={most}, or for a new run --set {name}={above}{batches}"
    )
  return jax.make_mesh(
    (num_data,), ("data",), devices=devices[:num_data], axis_types=(AxisType.Auto,)
  )


def count_usable_devices(experiment: Experiment, num_devices: int) -> int:
  """Counts the devices, of so many, that a run could use at most: they divide its batch."""
  # Micro-batches divide the batch, so that what divides them divides it.
  size = experiment.train.micro_batch_size or experiment.data.batch_size
  return max(n for n in range(1, num_devices + 1) if size % n == 0)


def find_mesh(tree: Any) -> Mesh | None:
  """Returns the mesh that a pytree of arrays lies on; None where they lie on one device by itself.

  Args:
    tree: arrays of JAX or NumPy, or shapes with shardings.
  """
  place = getattr(jax.tree.leaves(tree)[0], "sharding", None)
  return place.mesh if isinstance(place, NamedSharding) else None


def use_mesh(tree: Any) -> contextlib.AbstractContextManager:
  """Sets the mesh that a pytree of arrays or shapes lies on, for `constrain`, if there is one."""
  mesh = find_mesh(tree)
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def to_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
  """Maps logical axes to a partition spec.

  A dimension that its mesh axis does not divide is replicated.
  """
  spec = []
  for axis, size in zip(axes, shape, strict=True):
    mesh_axis = RULES.get(axis)
    divides = mesh_axis in mesh.shape and size % mesh.shape[mesh_axis] == 0
    spec.append(mesh_axis if divides else None)
  return P(*spec)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of every array of a `Batch`: dimension 0 is divided."""
  return NamedSharding(mesh, P(RULES["batch"]))


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Constrains how a traced array lies over the mesh that is set; without a mesh returns it.

  Args:
    x: inside jit.
    axes: one logical axis per dimension; None is never divided.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, to_spec(axes, x.shape, mesh))


def sum_over_data(function: Callable[[Any, Any], Any], whole: Any, rows: Any) -> Any:
  """Computes `function(whole, rows)` on each device of its own rows, and sums over the devices.

  Without this XLA would sum gradients where they arise: a tied embedding's twice, and every one
  again in each micro-batch. Without a mesh of several devices the function is called.

  Args:
    function: returns a pytree of arrays, which sum over the rows.
    whole: a pytree of arrays, all of which every device gets.
    rows: a pytree of arrays, of which each device gets its part of dimension 0; the number of
      devices divides it.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function(whole, rows)
  axis = RULES["batch"]
  return jax.shard_map(
    lambda whole, rows: jax.lax.psum(function(whole, rows), axis),
    in_specs=(P(), P(axis)),
    out_specs=P(),
    check_vma=False,  # with it gradients of what every device has would be summed where they arise
  )(whole, rows)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, P())


def beside(tree: Any) -> jax.sharding.Sharding | None:
  """Returns the sharding of arrays that every device of a tree's arrays holds whole.

  Args:
    tree: of arrays or shapes; NumPy arrays are on no device: None.
  """
  found = getattr(jax.tree.leaves(tree)[0], "sharding", None)
  return replicated(found.mesh) if isinstance(found, NamedSharding) else found


def param_shardings(params: dict, config: ModelConfig, mesh: Mesh) -> dict:
  """Derives the shardings of parameters from `param_table`.

  Args:
    params: their shapes, blocks stacked or a list; stacked layers add a dimension in front that is
      not divided.
    config: of the network.
    mesh: from `make_mesh`.
  """

  def sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    param = param_at(path, config)
    spec = to_spec(param.axes, param.shape, mesh)
    return NamedSharding(mesh, P(None, *spec) if leaf.ndim > len(param.shape) else spec)

  return jax.tree_util.tree_map_with_path(sharding, params)


def state_shardings(state: Any, config: ModelConfig, mesh: Mesh) -> Any:
  """Derives the shardings of a state: subtrees shaped like the parameters are sharded as they are.

  Args:
    state: its shapes, from `jax.eval_shape`.
    config: of the network.
    mesh: from `make_mesh`.
  """
  shardings = param_shardings(state.params, config, mesh)
  structure = jax.tree.structure(shardings)

  def is_params(subtree) -> bool:
    return jax.tree.structure(subtree) == structure

  return jax.tree.map(
    lambda subtree: shardings if is_params(subtree) else replicated(mesh), state, is_leaf=is_params
  )


def arrange_blocks(tree: Any, layers: str) -> Any:
  """Arranges blocks as `compute.layers` says: a list for "unroll", else stacked."""
  return unstack_blocks(tree) if layers == "unroll" else stack_blocks(tree)


def stack_blocks(tree: Any) -> Any:
  """Stacks every list named "blocks" in a pytree: parameters, moments or a whole state.

  Blocks that are stacked already stay as they are.
  """

  def stack(params: Any) -> Any:
    if not _has_blocks(params) or isinstance(params["blocks"], dict):
      return params
    return params | {"blocks": jax.tree.map(lambda *layers: jnp.stack(layers), *params["blocks"])}

  return jax.tree.map(stack, tree, is_leaf=_has_blocks)


def unstack_blocks(tree: Any) -> Any:
  """Turns stacked "blocks" in a pytree into lists with a dict for each layer."""

  def unstack(params: Any) -> Any:
    if not _has_blocks(params) or not isinstance(params["blocks"], dict):
      return params
    num_layers = len(jax.tree.leaves(params["blocks"])[0])
    return params | {
      "blocks": [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(num_layers)]
    }

  return jax.tree.map(unstack, tree, is_leaf=_has_blocks)


def _has_blocks(tree: Any) -> bool:
  return isinstance(tree, dict) and "blocks" in tree
