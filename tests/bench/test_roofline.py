"""What collectives send, over which links, and what a step takes at least: by hand."""

import math

import pytest

from jgpt.bench import hlo, roofline
from jgpt.devices.topology import Network

GB = 10**9


def torus(*shape, wraps=None):
  """A torus of chips in row-major order, whose links have 50 GB/s."""
  coords = [()]
  for size in shape:
    coords = [(*chip, i) for chip in coords for i in range(size)]
  return Network(shape, wraps or (False,) * len(shape), tuple(coords), 50.0 * GB)


V5E_8 = torus(2, 4)
POD = torus(16, 16, wraps=(True, True))
HOSTS = Network((), (), tuple((i // 8,) for i in range(16)), 450.0 * GB)


def exchange(kind, num_bytes, mesh, network, groups=()):
  return roofline.describe_exchange(hlo.Collective(kind, num_bytes, (), groups), mesh, network)


@pytest.mark.parametrize(
  ("kind", "sent"),
  [
    ("all-gather", 7 / 8),
    ("reduce-scatter", 7 / 8),
    ("all-reduce", 14 / 8),
    ("all-to-all", 7 / 8),
    ("collective-permute", 1),
  ],
)
def test_what_each_device_sends_is_that_of_a_ring(kind, sent):
  assert roofline.count_sent(kind, GB, 8) == pytest.approx(sent * GB)
  assert roofline.count_sent(kind, GB, 1) == 0


def test_a_group_has_the_links_between_its_own_members():
  """In 2x4 a corner has two; in a row of four without a ring the ends have one; in a pod four."""
  mesh = {"data": 2, "fsdp": 4, "tensor": 1}
  whole = exchange("all-gather", 8 * GB, mesh, V5E_8)
  assert (whole.axes, whole.size) == (("data", "fsdp"), 8)
  assert whole.seconds == pytest.approx(7 / (2 * 50))
  row = exchange("all-gather", 8 * GB, mesh, V5E_8, ((0, 1, 2, 3), (4, 5, 6, 7)))
  assert row.axes == ("fsdp",) and row.seconds == pytest.approx(6 / 50)
  pairs = exchange("all-reduce", 8 * GB, mesh, V5E_8, tuple((i, i + 4) for i in range(4)))
  assert pairs.axes == ("data",) and pairs.seconds == pytest.approx(8 / 50)

  mesh = {"data": 16, "fsdp": 16, "tensor": 1}
  pod = exchange("all-gather", 256 * GB, mesh, POD)
  assert pod.seconds == pytest.approx(255 / (4 * 50))
  ring = exchange("all-gather", 16 * GB, mesh, POD, tuple((*range(i, i + 16),) for i in (0, 16)))
  assert ring.axes == ("fsdp",) and ring.seconds == pytest.approx(15 / (2 * 50))


def test_chips_that_are_no_neighbours_have_one_link():
  mesh = {"data": 2, "fsdp": 2, "tensor": 2}
  far = exchange("all-gather", 2 * GB, mesh, torus(8), ((0, 4), (1, 5), (2, 6), (3, 7)))
  assert far.axes == ("data",) and far.seconds == pytest.approx(1 / 50)


def test_an_all_to_all_passes_the_middle_of_the_longest_side():
  """8 chips of 1 GB: 2 GB pass the middle of 2x4 each way, over 2 links; of a ring of 16 twice."""
  mesh = {"data": 1, "fsdp": 8, "tensor": 1}
  assert exchange("all-to-all", GB, mesh, V5E_8).seconds == pytest.approx(2 / (2 * 50))
  mesh = {"data": 16, "fsdp": 16, "tensor": 1}
  ring = exchange("all-to-all", GB, mesh, POD, (tuple(range(16)),))
  assert ring.seconds == pytest.approx(4 / (2 * 50))


def test_a_permutation_along_a_ring_has_both_directions():
  """The other direction is taken at the same time by another one, or could be."""
  mesh = {"data": 1, "fsdp": 8, "tensor": 1}
  around = (0, 1, 2, 3, 7, 6, 5, 4)
  pairs = tuple(zip(around, around[1:] + around[:1], strict=True))
  found = exchange("collective-permute", GB, mesh, V5E_8, pairs)
  assert (found.axes, found.size, found.sent_bytes) == (("fsdp",), 8, GB)
  assert found.seconds == pytest.approx(1 / (2 * 50))
  staying = exchange("collective-permute", GB, mesh, V5E_8, ((0, 0), (1, 1)))
  assert (staying.axes, staying.sent_bytes, staying.seconds) == ((), 0, 0)


def test_the_network_between_hosts_is_not_known():
  mesh = {"data": 2, "fsdp": 8, "tensor": 1}
  inside = exchange("all-gather", 8 * GB, mesh, HOSTS, (tuple(range(8)), tuple(range(8, 16))))
  assert inside.seconds == pytest.approx(7 / 450)
  assert exchange("all-gather", 8 * GB, mesh, HOSTS).seconds is None
  assert exchange("all-gather", 8 * GB, mesh, None).seconds is None


def bound(**changes):
  values = {
    "flops": 100.0,
    "program_flops": 120.0,
    "traffic_bytes": 1.0,
    "sent_bytes": 1.0,
    "sequences": 4.0,
    "tokens": 400,
    "num_devices": 8,
    "peak": 100.0,
    "compute_seconds": 1.2,
    "memory_seconds": 0.5,
    "network_seconds": 0.9,
    "tensor_seconds": 0.0,
  }
  return roofline.StepBound(**(values | changes))


def test_a_step_takes_the_largest_or_the_sum():
  step = bound()
  assert (step.bound_by, step.least_seconds) == ("compute", 1.2)
  assert step.most_seconds == pytest.approx(2.6)
  assert step.count_rate(step.least_seconds) == pytest.approx(400 * 8 / 1.2)
  assert step.compute_mfu(1.2) == pytest.approx(100 / 120)
  unknown = bound(network_seconds=None)
  assert (
    unknown.least_seconds is unknown.most_seconds is unknown.bound_by is unknown.balance is None
  )


def test_network_and_compute_balance_at_a_number_of_sequences():
  """Along data and fsdp the time is the same for every batch; along tensor it grows with it."""
  assert bound().balance == pytest.approx(4 * 0.9 / 1.2)
  # b / 4 * 1.2 = 0.6 + b / 4 * 0.3
  assert bound(tensor_seconds=0.3).balance == pytest.approx(4 * 0.6 / 0.9)
  assert math.isinf(bound(network_seconds=1.5, tensor_seconds=1.3).balance)
