"""The time of a step that a device's published rates allow: compute, memory and network.

Pure arithmetic on what `hlo.py` and `work.py` find in a compiled program. What is sent is that of
ring algorithms, the fewest bytes with which a collective can be done: of n bytes over k devices an
all-gather, a reduce-scatter and an all-to-all send n (k - 1) / k from each, an all-reduce twice
that, a collective-permute n.

A torus has one link to each neighbour, each as fast in both directions. A group of chips uses the
links between its own members: every other group needs those of its own at the same time. So the
member with the fewest of them takes longest. An all-to-all also has to pass the middle of the
group's longest side. GPUs send at the full rate of their switch inside a host; the network between
hosts is not known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jgpt.bench.hlo import Collective
from jgpt.devices.topology import Network


@dataclasses.dataclass(frozen=True)
class Exchange:
  """A collective on a mesh; bytes and seconds are those of one time, of which it takes `trips`.

  Attributes:
    collective: as compiled.
    axes: of the mesh, along which devices exchange.
    size: devices that exchange with one another.
    sent_bytes: by each device.
    seconds: that the network needs for it; None where the network is not known.
  """

  collective: Collective
  axes: tuple[str, ...]
  size: int
  sent_bytes: float
  seconds: float | None


def describe_exchange(
  collective: Collective, mesh: dict[str, int], network: Network | None
) -> Exchange:
  """Describes what a collective sends over a mesh, and how long it takes.

  Args:
    collective: from `hlo.find_collectives`.
    mesh: sizes of the axes, in their order.
    network: of the mesh's devices, in their order; None where it is not known.
  """
  groups = join_groups(collective, int(np.prod(list(mesh.values()))))
  size = max(map(len, groups))
  sent = count_sent(collective.kind, collective.num_bytes, size)
  seconds = None if network is None else time_exchange(collective, groups, network)
  return Exchange(collective, find_axes(groups, mesh), size, sent, seconds)


def join_groups(collective: Collective, num_devices: int) -> list[tuple[int, ...]]:
  """Returns a collective's groups; the pairs of a permutation are joined to chains and rings."""
  if not collective.groups:
    return [tuple(range(num_devices))]
  if collective.kind != "collective-permute":
    return list(collective.groups)
  group_of = {device: {device} for pair in collective.groups for device in pair}
  for source, target in collective.groups:
    if group_of[source] is not group_of[target]:
      joined = group_of[source] | group_of[target]
      group_of |= dict.fromkeys(joined, joined)
  return sorted({tuple(sorted(group)) for group in group_of.values()})


def find_axes(groups: Sequence[Sequence[int]], mesh: dict[str, int]) -> tuple[str, ...]:
  """Finds the axes of a mesh along which the members of its groups differ."""
  shape = tuple(mesh.values())
  places = [np.transpose(np.unravel_index(group, shape)) for group in groups]
  differ = np.any([np.any(place != place[0], axis=0) for place in places], axis=0)
  return tuple(name for name, varies in zip(mesh, differ, strict=True) if varies)


def count_sent(kind: str, num_bytes: int, size: int) -> float:
  """Counts the bytes that each of `size` devices sends.

  Args:
    kind: one of `hlo.COLLECTIVES`.
    num_bytes: n, that each contributes; of an all-gather, that each gets.
    size: k, devices that exchange with one another.
  """
  if size < 2:
    return 0.0
  if kind in ("collective-permute", "collective-broadcast"):
    return float(num_bytes)
  return (2 if kind == "all-reduce" else 1) * num_bytes * (size - 1) / size


def time_exchange(
  collective: Collective, groups: Sequence[Sequence[int]], network: Network
) -> float | None:
  """Computes the least time of a collective; None where its groups leave a host of GPUs."""
  times = []
  for group in groups:
    if len(group) < 2:
      continue
    sent = count_sent(collective.kind, collective.num_bytes, len(group))
    chips = [network.coords[device] for device in group]
    if not network.shape:
      if len(set(chips)) > 1:
        return None
      times.append(sent / network.link)
      continue
    times.append(sent / (count_links(chips, network) * network.link))
    if collective.kind == "all-to-all":
      times.append(collective.num_bytes / _count_passes(chips, network) / network.link)
  return max(times, default=0.0)


def count_links(chips: Sequence[tuple[int, ...]], network: Network) -> int:
  """Counts the links that the member of a group with the fewest has to others of the group.

  Where chips that are no neighbours exchange, they are assumed to have one link's rate.
  """
  inside = set(chips)

  def neighbours(chip: tuple[int, ...]) -> set[tuple[int, ...]]:
    found = set()
    for i, size in enumerate(network.shape):
      for place in (chip[i] - 1, chip[i] + 1):
        if 0 <= place < size or network.wraps[i]:
          found.add((*chip[:i], place % size, *chip[i + 1 :]))
    return found - {chip}

  return max(1, min(len(neighbours(chip) & inside) for chip in inside))


def _count_passes(chips: Sequence[tuple[int, ...]], network: Network) -> float:
  """Counts how often all links across the middle of a group hold what each of its chips sends.

  Of what k chips have, n bytes each, a quarter passes the middle in each direction, over k / side
  links, and as many again in a ring.
  """
  sides = [len(set(places)) for places in zip(*chips, strict=True)]
  side = max(sides)
  i = sides.index(side)
  return 4 / side * (2 if network.wraps[i] and side == network.shape[i] else 1)


@dataclasses.dataclass(frozen=True)
class StepBound:
  """What a step takes at least on each device, by rates that its maker publishes.

  Attributes:
    flops: by `limits.count_train_flops`.
    program_flops: of the compiled program's products, without kernels that XLA did not write.
    traffic_bytes: that it reads from memory and writes.
    sent_bytes: that it sends to other devices.
    sequences: that the device computes.
    tokens: that the device computes.
    num_devices: of the mesh.
    peak: FLOP/s; None where it is not known.
    compute_seconds: of the larger of both counts at the peak; None where that is not known.
    memory_seconds: at the memory's bandwidth; None where that is not known.
    network_seconds: of all collectives, one after the other; None where one is not known.
    tensor_seconds: of these, those along the mesh's axis "tensor": they send activations.
    estimated_seconds: XLA's estimated cycles at the clock, without kernels and collectives.
  """

  flops: float
  program_flops: float
  traffic_bytes: float
  sent_bytes: float
  sequences: float
  tokens: int
  num_devices: int
  peak: float | None
  compute_seconds: float | None
  memory_seconds: float | None
  network_seconds: float | None
  tensor_seconds: float | None
  estimated_seconds: float | None = None

  @property
  def times(self) -> dict[str, float | None]:
    """Returns the three times by name."""
    return {
      "compute": self.compute_seconds,
      "memory": self.memory_seconds,
      "network": self.network_seconds,
    }

  @property
  def least_seconds(self) -> float | None:
    """Returns the largest of the three: all overlap perfectly. None where one is not known."""
    return None if None in self.times.values() else max(self.times.values())

  @property
  def most_seconds(self) -> float | None:
    """Returns their sum: nothing overlaps. None where one is not known."""
    return None if None in self.times.values() else sum(self.times.values())

  @property
  def bound_by(self) -> str | None:
    """Returns the name of the largest of the three; None where one is not known."""
    return None if None in self.times.values() else max(self.times, key=self.times.get)

  def count_rate(self, seconds: float) -> float:
    """Computes the tokens/s of all devices together, for steps of so many seconds."""
    return self.tokens * self.num_devices / seconds

  def compute_mfu(self, seconds: float) -> float | None:
    """Computes the share of the peak that the formula's FLOPs are; None where it is not known."""
    return self.flops / seconds / self.peak if self.peak else None

  @property
  def balance(self) -> float | None:
    """Computes the sequences on each device at which network and compute take the same time.

    With fewer the network takes longer. Weights and gradients, along "data" and "fsdp", are sent
    once a step whatever its batch; activations, along "tensor", grow with it as the operations do.
    Where these alone take longer than the operations, more sequences do not help: infinity.
    """
    if self.compute_seconds is None or self.network_seconds is None:
      return None
    fixed = self.network_seconds - self.tensor_seconds
    left = self.compute_seconds - self.tensor_seconds
    return self.sequences * fixed / left if left > 0 else float("inf")
