"""Devices that are not there, by name, so that programs can be compiled for them.

The compilers for TPUs (libtpu) and for NVIDIA's GPUs (jax's CUDA plugin) need a description of the
devices and none of the devices: `program.lower_programs` takes what `find_target_devices` returns.
Nothing can be run on them. jax is imported in functions, since the environment has to be set
before.

    tpu:v5e:2x4    8 chips; of v4, v5p and v7x the third dimension is given too: tpu:v5p:2x2x1
    gpu:h100       one GPU
    gpu:h100:8     8 of them on one host; 16 are two hosts of 8
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jgpt.devices.limits import find_accelerator
from jgpt.errors import UserError, first_line, near_matches, show

if TYPE_CHECKING:  # jax is imported after the environment is set
  import jax

GPUS_PER_HOST = 8
POD_SIDE = 16  # of a pod of v5e or v6e
CUBE_SIDE = 4  # of chips of v4 and v5p, whose cubes are joined to tori
# libtpu looks for a TPU's metadata server and for a lock on the TPU unless it is told not to; any
# type of TPU will do. Another platform than the CPU would be searched for devices.
TPU_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or a second process aborts on the lock of the first
}


@dataclasses.dataclass(frozen=True)
class TpuKind:
  """A kind of TPU.

  Attributes:
    topology: what libtpu calls it.
    dims: of the torus in which its chips are.
    clock: GHz, as its peak implies; None where that is not known.
    chip_config: "megacore" has the two cores of a chip as one device; None is libtpu's default.
  """

  topology: str
  dims: int
  clock: float | None
  chip_config: str | None = None


@dataclasses.dataclass(frozen=True)
class GpuKind:
  """A kind of GPU, as XLA's compiler has to know it; memory and bandwidth are in `limits.py`.

  Attributes:
    kind: jax's `device_kind`.
    capability: compute capability, major and minor.
    cores: streaming multiprocessors.
    fpus: float32 units of each.
    threads: at most at a time, of each.
    shared: bytes of shared memory of each.
    shared_per_block: bytes of it that a block can ask for.
    l2: bytes of the second-level cache.
    clock: GHz.
  """

  kind: str
  capability: tuple[int, int]
  cores: int
  fpus: int
  threads: int
  shared: int
  shared_per_block: int
  l2: int
  clock: float


TPUS = {
  "v4": TpuKind("v4", 3, 1.05, "megacore"),
  "v5e": TpuKind("v5e", 2, 1.5),
  "v5p": TpuKind("v5", 3, 1.75, "megacore"),
  "v6e": TpuKind("v6e", 2, 1.75),
  "v7x": TpuKind("tpu7x", 3, None),  # a chip is two devices
}
# From NVIDIA's tables of compute capabilities and whitepapers; those of A100 and later agree with
# XLA's own descriptions (openxla/xla, xla/backends/gpu/target_config/specs).
GPUS = {
  "t4": GpuKind("Tesla T4", (7, 5), 40, 64, 1024, 65536, 65536, 4 << 20, 1.59),
  "l4": GpuKind("NVIDIA L4", (8, 9), 58, 128, 1536, 102400, 101376, 48 << 20, 2.04),
  "a100": GpuKind("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 167936, 166912, 40 << 20, 1.41),
  "h100": GpuKind("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 233472, 232448, 50 << 20, 1.98),
  "h200": GpuKind("NVIDIA H200", (9, 0), 132, 128, 2048, 233472, 232448, 50 << 20, 1.98),
  "b200": GpuKind("NVIDIA B200", (10, 0), 148, 128, 2048, 233472, 232448, 132644864, 1.965),
}
DEVICE_KINDS = {"tpu": TPUS, "gpu": GPUS}
COMPILERS = {"tpu": "libtpu", "gpu": "jax-cuda12-plugin"}
EXAMPLES = {"tpu": "tpu:v5e:2x4", "gpu": "gpu:h100:8"}


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices that are not there.

  Attributes:
    name: as it was given.
    platform: "tpu" or "gpu".
    kind: a key of `TPUS` or `GPUS`.
    shape: chips in each dimension of a TPU's torus; the number of GPUs.
  """

  name: str
  platform: str
  kind: str
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Network:
  """How the devices of a program are joined.

  Attributes:
    shape: chips in each dimension of a TPU's torus; () for GPUs.
    wraps: of each dimension, whether its last chip is joined to its first.
    coords: of each device in the order of the program's mesh; of a GPU its host.
    link: bytes/s of one link of a TPU in one direction, of a GPU all that it can send.
  """

  shape: tuple[int, ...]
  wraps: tuple[bool, ...]
  coords: tuple[tuple[int, ...], ...]
  link: float


def parse_target(name: str) -> Target:
  """Parses the name of devices that are not there.

  Args:
    name: "tpu:KIND:AxB", "tpu:KIND:AxBxC", "gpu:KIND" or "gpu:KIND:COUNT".

  Raises:
    UserError: with near matches, if there are no such devices.
  """
  platform, kind, rest = [*name.lower().split(":", 2), "", ""][:3]
  kinds = DEVICE_KINDS.get(platform)
  if kinds is None:
    meant = [
      f"{p}:{kind}" for p, known in DEVICE_KINDS.items() for kind in known if kind in name.lower()
    ]
    near = f" Did you mean {meant[0]}?" if meant else near_matches(platform, DEVICE_KINDS)
    raise UserError(
      f"{show(name)} names no devices.{near} They are tpu:KIND:SHAPE, KIND one of "
      f"{', '.join(TPUS)}, and gpu:KIND or gpu:KIND:COUNT, KIND one of {', '.join(GPUS)}; for "
      f"example {EXAMPLES['tpu']} or {EXAMPLES['gpu']}."
    )
  if kind not in kinds:
    near = near_matches(kind, kinds)
    raise UserError(
      f"{show(name)}: there is no {platform.upper()} {show(kind)}.{near} There are "
      f"{', '.join(kinds)}; for example {EXAMPLES[platform]}."
    )
  if platform == "gpu":
    if not re.fullmatch("[1-9][0-9]{0,3}|", rest):
      raise UserError(f"{show(name)}: {show(rest)} is no number of GPUs. Try gpu:{kind}:8")
    count = int(rest or 1)
    if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
      raise UserError(
        f"{show(name)}: more than {GPUS_PER_HOST} GPUs are hosts of {GPUS_PER_HOST}. Try "
        f"gpu:{kind}:{-(-count // GPUS_PER_HOST) * GPUS_PER_HOST}"
      )
    return Target(name, platform, kind, (count,))
  dims = TPUS[kind].dims
  if not re.fullmatch("x".join(["[1-9][0-9]{0,2}"] * dims), rest):
    shape = "x".join("221"[:dims])
    raise UserError(
      f"{show(name)}: {show(rest)} is no shape of {kind}, whose chips are in {dims} dimensions. "
      f"Try tpu:{kind}:{shape}"
    )
  return Target(name, platform, kind, tuple(map(int, rest.split("x"))))


def set_target_environment() -> None:
  """Sets the environment in which compilers for devices that are not there can be loaded.

  It has to be called before jax is imported. What concerns a TPU and is set already stays.
  """
  for name, value in TPU_ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  os.environ["JAX_PLATFORMS"] = "cpu"


def find_target_devices(target: Target) -> list[jax.Device]:
  """Returns devices to compile for; nothing can be run on them.

  Args:
    target: from `parse_target`. The environment has to be that of `set_target_environment`.

  Raises:
    UserError: if the compiler for them is not installed, or does not know the shape.
  """
  from jax.experimental import topologies

  if target.platform == "gpu":
    (count,) = target.shape
    hosts = -(-count // GPUS_PER_HOST)
    arguments = {
      "platform": "cuda",
      "target_config": describe_gpu(GPUS[target.kind]),
      "topology": f"1x{hosts}x{count // hosts}",  # slices, hosts of each, GPUs of each
    }
  else:
    kind, shape = TPUS[target.kind], "x".join(map(str, target.shape))
    arguments = {"platform": "tpu", "topology_name": f"{kind.topology}:{shape}"}
    if kind.chip_config is not None:
      arguments["chip_config_name"] = kind.chip_config
    if math.prod(target.shape) == 1:
      arguments["chips_per_host_bounds"] = (1, 1, 1)
  try:
    return list(topologies.get_topology_desc(**arguments).devices)
  except (RuntimeError, NotImplementedError) as error:
    if re.search("not installed|not implemented", str(error)):
      extra = f"aot-{target.platform}"
      raise UserError(
        f"{target.name} needs the compiler for {target.platform.upper()}s. Try pip install "
        f"'jgpt[{extra}]'"
      ) from error
    raise UserError(f"{target.name}: {first_line(error)}") from error


def find_network(target: Target, devices: Sequence[jax.Device]) -> Network | None:
  """Finds how devices are joined; None where what joins them is not known.

  Args:
    target: of the devices.
    devices: those of the program, in the order of its mesh.

  Source: a dimension of a v5e or v6e is a ring where it is the pod's 16; slices of v4 and v5p are
  tori from 4x4x4 on (docs.cloud.google.com/tpu/docs/v5p; "How to Scale Your Model", part 2).
  """
  known = find_accelerator(devices[0].device_kind)
  if known is None or known.interconnect is None:
    return None
  if target.platform == "gpu":
    hosts = tuple((device.id // GPUS_PER_HOST,) for device in devices)
    return Network((), (), hosts, known.interconnect)
  dims = TPUS[target.kind].dims
  shape = target.shape
  if dims == 2:
    wraps = tuple(size == POD_SIDE for size in shape)
  else:
    wraps = (all(size % CUBE_SIDE == 0 for size in shape),) * dims
  coords = tuple(tuple(device.coords[:dims]) for device in devices)
  return Network(shape, wraps, coords, known.interconnect / known.ports)


def find_clock(target: Target) -> float | None:
  """Finds the clock of a TPU in Hz, in which XLA counts its cycles; None where it is not known."""
  clock = TPUS[target.kind].clock if target.platform == "tpu" else None
  return None if clock is None else clock * 1e9


def find_compiler_versions(target: Target) -> dict[str, str]:
  """Finds the versions of jax and of the compiler for a target, by the names of their packages."""
  versions = {}
  for name in ("jax", "jaxlib", COMPILERS[target.platform]):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return versions


def describe_gpu(gpu: GpuKind) -> str:
  """Describes a GPU as XLA's compiler reads it: the text of a `GpuTargetConfigProto`."""
  known = find_accelerator(gpu.kind)
  numbers = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 48 << 10,
    "shared_memory_per_core": gpu.shared,
    "threads_per_core_limit": gpu.threads,
    "core_count": gpu.cores,
    "fpus_per_core": gpu.fpus,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "memory_bandwidth": round(known.bandwidth),
    "l2_cache_size": gpu.l2,
    "clock_rate_ghz": gpu.clock,
    "device_memory_size": known.memory,
    "shared_memory_per_block_optin": gpu.shared_per_block,
    "registers_per_core_limit": 2**16,
    "registers_per_block_limit": 2**16,
  }
  lines = [f"  {name}: {value}" for name, value in numbers.items()]
  major, minor = gpu.capability
  lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
  return "\n".join(
    [
      "gpu_device_info {",
      *lines,
      "}",
      'platform_name: "CUDA"',
      "dnn_version_info { major: 9 minor: 10 patch: 0 }",
      "runtime_version { major: 12 minor: 8 patch: 0 }",
      f'device_description_str: "{gpu.kind}"',
    ]
  )
