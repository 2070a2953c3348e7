"""The mesh, and how arrays lie over it and in memory.

Logical axes, those of `param_table` and of the batch, are mapped to mesh axes by `RULES`. Nothing
is moved here: functions return shardings, or constrain traced arrays.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jgpt.config import ComputeConfig, Experiment, ModelConfig
from jgpt.config.experiment import PLAIN
from jgpt.errors import UserError
from jgpt.params import param_at, param_table

AXES = ("data", "fsdp", "tensor")
# Logical axis -> mesh axes. What is not named here is replicated.
RULES = {
  "batch": ("data", "fsdp"),
  "rows": ("data",),  # of a batch whose width is divided over "fsdp"
  "embed": ("fsdp",),
  "heads": ("tensor",),
  "mlp": ("tensor",),
  "vocab": ("tensor",),
}


def make_mesh(experiment: Experiment, devices: Sequence[jax.Device]) -> Mesh:
  """Makes a mesh of devices with the axes "data", "fsdp" and "tensor".

  Args:
    experiment: `mesh` says how many devices each axis has.
    devices: all there are.

  Raises:
    UserError: if there are fewer devices than the mesh asks for, or they do not divide the batch.
  """
  shape = choose_shape(experiment, len(devices))
  num_devices, num_parts = math.prod(shape), shape[0] * shape[1]
  batch, micro = experiment.data.batch_size, experiment.train.micro_batch_size
  advice = f"mesh.data={count_usable_devices(experiment, len(devices))}"
  if max(shape[1:]) > 1:
    advice += " --set mesh.fsdp=1 --set mesh.tensor=1"
  sizes = ", ".join(f"mesh.{name}={n}" for name, n in zip(AXES, shape, strict=True) if n > 1)
  if num_devices > len(devices) or not num_devices:
    raise UserError(
      f"{sizes} asks for more than the {len(devices)} devices there are. Try --set {advice}"
    )
  if (micro or batch) % num_parts:
    name, size = ("train.micro_batch_size", micro) if micro else ("data.batch_size", batch)
    below, above = size // num_parts * num_parts, -(-size // num_parts) * num_parts
    nearest = f"{below} or {above}" if below else f"{above}"
    batches = ""
    if micro and batch % above:
      batches = f" --set data.batch_size={-(-batch // above) * above}"
    raise UserError(
      f"{name}={size} must be a multiple of the {num_parts} devices that it is divided over; "
      f"nearest: {nearest}. Try --set {advice}, or for a new run --set {name}={above}{batches}"
    )
  check_all_take_part(experiment, devices, num_devices)
  return Mesh(arrange_devices(shape, devices[:num_devices]), AXES, axis_types=(AxisType.Auto,) * 3)


def arrange_devices(shape: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
  """Arranges devices so that those next to each other on the last axes have the fastest links.

  `jax.make_mesh` takes no devices of several slices, which to it are also GPUs of several hosts,
  and on most TPUs no axis that is a part of a torus's.

  Args:
    shape: sizes of data, fsdp and tensor.
    devices: as many.

  Raises:
    UserError: if `mesh.data` cannot be divided over several slices of TPUs.
  """
  numbered = np.asarray(sorted(devices, key=lambda device: device.id))  # host by host
  if devices[0].platform != "tpu":
    return numbered.reshape(shape)
  slices = {getattr(device, "slice_index", 0) for device in devices}
  if len(slices) == 1:
    places = np.asarray([(*device.coords, device.core_on_chip) for device in devices])
    if np.prod(np.ptp(places, axis=0) + 1) > len(devices):  # 3 of 4 chips, which fill no box
      return numbered.reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  data, fsdp, tensor = shape
  if data % len(slices):
    raise UserError(
      f"the TPUs are in {len(slices)} slices, which only mesh.data may lie across, and mesh.data="
      f"{data} is no multiple of it. Try --set mesh.data={len(slices)} --set mesh.fsdp=-1 --set "
      "mesh.tensor=1"
    )
  within, across = (data // len(slices), fsdp, tensor), (len(slices), 1, 1)
  return mesh_utils.create_hybrid_device_mesh(
    within, across, devices, allow_split_physical_axes=True
  )


def check_all_take_part(
  experiment: Experiment, devices: Sequence[jax.Device], num_used: int
) -> None:
  """Checks that a mesh of the first devices has some of every process's.

  Raises:
    UserError: naming settings that take all devices.
  """
  num_devices = len(devices)
  used = {device.process_index for device in devices[:num_used]}
  num_idle = len({device.process_index for device in devices} - used)
  if not num_idle:
    return
  fits = count_usable_devices(experiment, num_devices) == num_devices
  batch = -(-experiment.data.batch_size // num_devices) * num_devices
  way = "" if fits else f" --set data.batch_size={batch}"
  raise UserError(
    f"a mesh of {num_used} of the {num_devices} devices leaves {num_idle} of the "
    f"{len(used) + num_idle} processes without any. Try --set mesh.data={num_devices} --set "
    f"mesh.fsdp=1 --set mesh.tensor=1{way}, or fewer processes"
  )


def choose_shape(experiment: Experiment, num_devices: int) -> tuple[int, int, int]:
  """Returns the sizes of the mesh's axes; that of -1 takes the devices that the others leave.

  Raises:
    UserError: if the others do not divide the number of devices.
  """
  shape = [getattr(experiment.mesh, name) for name in AXES]
  if -1 not in shape:
    return tuple(shape)
  others = -math.prod(shape)
  if num_devices % others:
    given = {a: n for a, n in zip(AXES, shape, strict=True) if n > 1}
    sizes, advice, left = " * ".join(f"mesh.{a}={n}" for a, n in given.items()), [], num_devices
    for axis, size in given.items():
      advice.append(f"--set mesh.{axis}={math.gcd(size, left)}")
      left //= math.gcd(size, left)
    raise UserError(
      f"{sizes} must divide the {num_devices} devices there are, since mesh."
      f"{AXES[shape.index(-1)]}=-1 takes the others. Try {' '.join(advice)}"
    )
  shape[shape.index(-1)] = num_devices // others
  return tuple(shape)


def count_usable_devices(experiment: Experiment, num_devices: int) -> int:
  """Counts the devices, of so many, that a run could use at most: they divide its batch."""
  # Micro-batches divide the batch, so that what divides them divides it.
  size = experiment.train.micro_batch_size or experiment.data.batch_size
  return max(n for n in range(1, num_devices + 1) if size % n == 0)


def count_batch_parts(mesh: Mesh | None) -> int:
  """Counts the parts that a mesh divides a batch into; without a mesh there is one."""
  return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in RULES["batch"])


def describe_shape(mesh: Mesh) -> str:
  """Describes a mesh as its settings: "mesh.data=4, mesh.tensor=2"."""
  sizes = {name: n for name, n in mesh.shape.items() if n > 1} or {"data": 1}
  return ", ".join(f"mesh.{name}={n}" for name, n in sizes.items())


def find_mesh(tree: Any) -> Mesh | None:
  """Returns the mesh that a pytree of arrays lies on; None where they lie on one device by itself.

  Args:
    tree: arrays of JAX or NumPy, or shapes with shardings.
  """
  place = getattr(jax.tree.leaves(tree)[0], "sharding", None)
  return place.mesh if isinstance(place, NamedSharding) else None


def use_mesh(tree: Any) -> contextlib.AbstractContextManager:
  """Sets the mesh that a pytree of arrays or shapes lies on, for `constrain`; maybe none at all."""
  mesh = find_mesh(tree)
  return leave_mesh() if mesh is None else jax.set_mesh(mesh)


@contextlib.contextmanager
def leave_mesh() -> Iterator[None]:
  """Hides the mesh that a caller may have set, for functions that choose their devices."""
  if jax.sharding.get_abstract_mesh().empty:
    yield
    return
  with jax.set_mesh(Mesh(np.empty((), object), ())):  # an empty one
    yield


def with_auto_axes(*outputs: str | None) -> Callable[[Callable], Callable]:
  """Makes a function compute the same under a mesh of explicit axes, which JAX makes by default.

  Explicit axes would need a sharding for every gather and product. Inside the function they are
  automatic: XLA chooses. Under any other mesh, and without one, the function is called as it is.

  Args:
    *outputs: for each result the argument that it is divided like, by name, where dimensions that
      the argument has not are whole; a result of None is whole on every device.
  """

  def decorate(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
      axes = jax.sharding.get_abstract_mesh().explicit_axes
      if not axes:
        return function(*args, **kwargs)
      given = inspect.signature(function).bind(*args, **kwargs).arguments
      specs = tuple(
        P() if name is None else jax.tree.map(_find_spec, given[name]) for name in outputs
      )
      leaves, structure = jax.tree.flatten((args, kwargs))
      places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]

      def compute(*arrays: jax.Array) -> Any:
        found = dict(zip(places, arrays, strict=True))
        args, kwargs = structure.unflatten(found.get(i, x) for i, x in enumerate(leaves))
        return function(*args, **kwargs)

      out_sharding = specs[0] if len(specs) == 1 else specs
      compute = jax.sharding.auto_axes(compute, axes=axes, out_sharding=out_sharding)
      return compute(*(leaves[i] for i in places))

    return call

  return decorate


def _find_spec(x: Any) -> P:
  """Returns how an array is divided over explicit axes; one of NumPy is whole."""
  return jax.typeof(x).sharding.spec if isinstance(x, jax.Array) else P()


def to_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
  """Maps logical axes to a partition spec.

  A dimension that its mesh axes do not divide is replicated.
  """
  spec = []
  for axis, size in zip(axes, shape, strict=True):
    # An axis of one device divides nothing, and named would only make specs differ.
    names = tuple(name for name in RULES.get(axis, ()) if mesh.shape.get(name, 1) > 1)
    divides = size % math.prod(mesh.shape[name] for name in names) == 0
    spec.append((names if len(names) > 1 else names[0]) if names and divides else None)
  return P(*spec)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of every array of a `Batch`: dimension 0 is divided."""
  return NamedSharding(mesh, P(RULES["batch"]))


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Constrains how a traced array lies over the mesh that is set.

  Without a mesh, and inside `shard_map`, it returns the array.

  Args:
    x: inside jit.
    axes: one logical axis per dimension; None is never divided.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size == 1 or not _has_auto_axes(mesh):
    return x
  spec = to_spec(axes, x.shape, mesh)
  if not set(mesh.axis_names) <= set(AXES):  # over a user's axes arrays lie as the user's do
    spec = P(*(P.UNCONSTRAINED if axis is None else axis for axis in spec))
  return jax.lax.with_sharding_constraint(x, spec)


@struct.dataclass
class Divided:
  """A weight that lies divided over "fsdp", and which a product gathers when it multiplies.

  Attributes:
    w: the weight.
    divided: how it lies, static.
    whole: how it lies once it is gathered, static.
    is_rounded: whether it moves in bfloat16, static.
  """

  w: jax.Array
  divided: P = struct.field(pytree_node=False)
  whole: P = struct.field(pytree_node=False)
  is_rounded: bool = struct.field(pytree_node=False)

  def gather(self) -> jax.Array:
    """Returns the weight without the division over "fsdp"; over "tensor" it stays divided."""
    sent = self.w
    if self.is_rounded and sent.dtype != jnp.bfloat16:
      # Rounded where it lies: half of the bytes move.
      sent = jax.lax.with_sharding_constraint(sent.astype(jnp.bfloat16), self.divided)
    return jax.lax.with_sharding_constraint(sent, self.whole).astype(self.w.dtype)


def defer_gather(params: dict, config: ModelConfig, compute: ComputeConfig = PLAIN) -> dict:
  """Returns parameters whose products gather them; without "fsdp" the same ones.

  Args:
    params: some of those that `param_table` names, of one block or outside of the blocks.
    config: of the network.
    compute: with `dtype` "bfloat16" weights, which products would round, are rounded before they
      move.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not _divides_params(mesh):
    return params
  table = param_table(config)
  table |= table["blocks"]

  def defer(name: str, x: jax.Array) -> Divided | jax.Array:
    spec = to_spec(table[name].axes, x.shape, mesh)
    whole = P(*(None if axis == "fsdp" else axis for axis in spec))
    return x if spec == whole else Divided(x, spec, whole, compute.dtype == "bfloat16")

  return {name: defer(name, x) for name, x in params.items()}


def gather(params: dict, config: ModelConfig, compute: ComputeConfig = PLAIN) -> dict:
  """Gathers parameters over "fsdp"; arguments are those of `defer_gather`.

  Their gradient lies as they do: a device gets the sum over all devices of its own part.
  """

  def gather_one(x: Divided | jax.Array) -> jax.Array:
    return multiply_divided(lambda w: w, x) if isinstance(x, Divided) else x

  deferred = defer_gather(params, config, compute)
  return {name: gather_one(x) for name, x in deferred.items()}


def multiply_divided(product: Callable[..., jax.Array], w: Divided, *xs: jax.Array) -> jax.Array:
  """Computes `product(*xs, weight)`, and keeps no whole weight for the backward pass.

  That gathers the weight again. The weight's gradient lies as the weight does.

  Args:
    product: linear in the weight, its last argument.
    w: the weight.
    *xs: other arguments.
  """

  @jax.custom_vjp
  def multiply(w: jax.Array, *xs: jax.Array) -> jax.Array:
    return product(*xs, place.replace(w=w).gather())

  def backward(saved: tuple, g: jax.Array) -> tuple:
    # Without the barrier both passes of a layer that is written out would share what is gathered.
    (w, *xs), g = jax.lax.optimization_barrier((saved, g))
    grads = jax.vjp(product, *xs, place.replace(w=w).gather())[1](g)
    # The transpose of the constraint is the same one: each device would get the whole gradient.
    return jax.lax.with_sharding_constraint(grads[-1], place.divided), *grads[:-1]

  place = w
  multiply.defvjp(lambda *arrays: (multiply(*arrays), arrays), backward)
  return multiply(w.w, *xs)


def _divides_params(mesh: jax.sharding.AbstractMesh) -> bool:
  return mesh.shape.get("fsdp", 1) > 1 and AxisType.Auto in mesh.axis_types


def call_divided(function: Callable, axes: tuple[str | None, ...], *arrays: jax.Array) -> jax.Array:
  """Calls a function on each device's part of arrays: a kernel, which XLA cannot divide.

  Args:
    function: of arrays of one shape; returns such an array.
    axes: one logical axis per dimension, over which the function does not sum.
    arrays: inside jit.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or AxisType.Auto not in mesh.axis_types:
    return function(*arrays)
  spec = to_spec(axes, arrays[0].shape, mesh)
  return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)


def _has_auto_axes(mesh: jax.sharding.AbstractMesh) -> bool:
  """Returns whether XLA may divide arrays over axes that have a meaning here.

  Over axes with names of a user's own arrays lie as the user's do.
  """
  return not set(AXES).isdisjoint(mesh.auto_axes)


def sum_over_data(function: Callable[[Any, Any], Any], whole: Any, rows: Any) -> Any:
  """Computes `function(whole, rows)`, which sums over rows, divided over the devices.

  On a mesh of "data" alone each device computes the sums of its own rows, and these are summed over
  the devices at the end, once. Without this XLA would sum gradients where they arise: a tied
  embedding's twice, and every one again in each micro-batch. On other meshes the function is
  called, and XLA divides it as the arrays are: gradients have to be divided at once, since no
  device has room for all of them.

  Args:
    function: returns a pytree of arrays, which sum over the rows.
    whole: a pytree of arrays, which every device has, or its part of them.
    rows: a pytree of arrays, of which each device gets its part of dimension 0; the number of
      parts divides it.
  """
  mesh = jax.sharding.get_abstract_mesh()
  is_divided = mesh.size > 1 and mesh.shape.get("data") == mesh.size
  # A mesh that a caller has set need not divide the batch.
  if not is_divided or any(x.shape[0] % mesh.size for x in jax.tree.leaves(rows)):
    return function(whole, rows)
  return jax.shard_map(
    lambda whole, rows: jax.lax.psum(function(whole, rows), "data"),
    in_specs=(P(), P("data")),
    out_specs=P(),
    axis_names=set(mesh.axis_names),
    check_vma=False,  # with it gradients of what every device has would be summed where they arise
  )(whole, rows)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, P())


def place(tree: Any, shardings: Any) -> Any:
  """Places arrays that every process has on devices, each device's part on it.

  `jax.device_put` does the same, but where there are several processes it compares their arrays,
  for which it sends all of them to all devices.

  Args:
    tree: of arrays of NumPy, or of JAX on a device of this process.
    shardings: a tree of them, or one for all; None is the default device.
  """

  def put(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      data = put(jax.random.key_data(x), sharding)
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  if all(s.is_fully_addressable for s in jax.tree.leaves(shardings)):
    return jax.device_put(tree, shardings)
  if isinstance(shardings, jax.sharding.Sharding):
    return jax.tree.map(lambda x: put(x, shardings), tree)
  return jax.tree.map(put, tree, shardings)


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
