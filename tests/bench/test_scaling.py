"""`bench --scaling`: its table, and real processes that train together."""

import pytest

from jgpt.bench import scaling
from jgpt.bench.scaling import Scaled, Setup


def scaled(setup, seconds, losses, sent=0.0):
  first = [0.01, 0.02, 0.03]
  ratios = [a / b for a, b in zip(first, seconds, strict=True)]
  return Scaled(setup, seconds, ratios, 1024, sent, losses)


def test_the_table_says_what_dividing_a_step_costs():
  rows = [
    scaled(Setup(1, 1, {}), [0.01, 0.02, 0.03], [4.0, 2.0]),
    scaled(Setup(2, 1, {"fsdp": 2}), [0.02, 0.04, 0.04], [4.0, 2.002], 3.5e6),
  ]
  lines = [" ".join(line.split()) for line in scaling.format_scaling(rows, "names").splitlines()]
  assert lines[0].startswith("names: the same step of 1,024 tokens on virtual devices")
  assert "1 1 one device 50 51,200 100% (100% to 100%) 0 kB" in lines
  assert "2 1 fsdp=2 25 25,600 50% (50% to 75%) 3.5 MB 1.0e-03" in lines
  found = scaling.scaling_to_json(rows)
  assert found[1]["median_seconds"] == 0.04 and found[1]["median_ratio"] == 0.5
  assert found[1]["loss_difference"] == pytest.approx(1e-3)


def test_each_setup_has_a_mesh_of_all_its_devices():
  for setup in scaling.SETUPS:
    size = 1
    for count in setup.mesh.values():
      size *= count
    assert size == setup.processes * setup.devices
  assert {setup.devices for setup in scaling.SETUPS} == {1, 2, 4, 8}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_processes_and_devices_compute_the_losses_of_one_device():
  """The sum of the gradients is sent in a step, by each of two devices once: 4,192 parameters."""
  setups = (Setup(1, 1, {}), Setup(1, 2, {"fsdp": 2}), Setup(2, 1, {"data": 2}))
  rows = scaling.measure_scaling("names", {"data.batch_size": 4}, 1, setups)
  one, fsdp, pair = rows
  assert one.sent_bytes == 0 and one.ratios == [1.0]
  assert 4 * 4192 <= pair.sent_bytes <= 1.02 * 4 * 4192
  assert fsdp.sent_bytes > 0
  assert max(scaling.compare_losses(row, one) for row in rows) < 1e-5
  assert len(set(one.losses)) == scaling.WARM_UP
