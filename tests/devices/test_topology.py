"""Devices that are not there: their names, and what the compilers are told."""

import os
import re
import sys
from types import SimpleNamespace

import pytest

from jgpt.devices import limits, topology
from jgpt.errors import UserError


@pytest.mark.parametrize(
  ("name", "platform", "kind", "shape"),
  [
    ("tpu:v5e:2x4", "tpu", "v5e", (2, 4)),
    ("TPU:v5p:2x2x1", "tpu", "v5p", (2, 2, 1)),
    ("gpu:h100", "gpu", "h100", (1,)),
    ("gpu:H100:16", "gpu", "h100", (16,)),
  ],
)
def test_a_name_says_platform_kind_and_shape(name, platform, kind, shape):
  assert topology.parse_target(name) == topology.Target(name, platform, kind, shape)


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("v5e", "Did you mean tpu:v5e"),
    ("h100:8", "Did you mean gpu:h100"),
    ("cpu:8", "tpu:v5e:2x4 or gpu:h100:8"),
    ("tpu:v5:2x2", "Did you mean v5p or v5e"),
    ("gpu:h10", "Did you mean h100"),
    ("tpu:v5e", "Try tpu:v5e:2x2"),
    ("tpu:v5e:2x2x1", "2 dimensions. Try tpu:v5e:2x2"),
    ("tpu:v4:2x2", "3 dimensions. Try tpu:v4:2x2x1"),
    ("gpu:h100:0", "Try gpu:h100:8"),
    ("gpu:h100:12", "Try gpu:h100:16"),
    ("", "names no devices"),
  ],
)
def test_another_name_is_an_error_that_names_a_near_one(name, words):
  with pytest.raises(UserError, match=re.escape(words)):
    topology.parse_target(name)


def test_every_kind_of_device_is_in_the_table_of_accelerators():
  """From there are memory and bandwidth; and no description lacks a number."""
  for kind in topology.GPUS.values():
    known = limits.find_accelerator(kind.kind)
    text = topology.describe_gpu(kind)
    assert f"device_memory_size: {known.memory}" in text and "None" not in text
    assert f'device_description_str: "{kind.kind}"' in text


@pytest.mark.parametrize(
  ("name", "kind", "shape", "wraps", "link"),
  [
    ("tpu:v5e:2x4", "TPU v5 lite", (2, 4), (False, False), 50e9),
    ("tpu:v6e:8x16", "TPU v6 lite", (8, 16), (False, True), 100e9),
    ("tpu:v5p:4x4x8", "TPU v5p", (4, 4, 8), (True, True, True), 100e9),
    ("tpu:v4:2x2x4", "TPU v4", (2, 2, 4), (False, False, False), 50e9),
    ("gpu:h100:16", "NVIDIA H100 80GB HBM3", (), (), 450e9),
  ],
)
def test_the_network_is_that_of_the_kind_and_its_shape(name, kind, shape, wraps, link):
  """A v5e or v6e has rings of 16, others whole cubes; published rates count both directions."""
  devices = [SimpleNamespace(device_kind=kind, id=9, coords=(1, 3, 0))]
  network = topology.find_network(topology.parse_target(name), devices)
  assert (network.shape, network.wraps, network.link) == (shape, wraps, link)
  assert network.coords == (((1, 3, 0)[: len(shape)]) if shape else (1,),)


@pytest.mark.parametrize("kind", ["TPU7x", "Tesla T4", "TPU v99"])
def test_where_the_network_is_not_known_there_is_none(kind):
  devices = [SimpleNamespace(device_kind=kind)]
  assert topology.find_network(topology.parse_target("gpu:t4"), devices) is None


@pytest.mark.parametrize(("name", "extra"), [("tpu:v5e:2x4", "aot-tpu"), ("gpu:t4", "aot-gpu")])
def test_without_the_compiler_the_extra_is_named(name, extra, monkeypatch):
  from jax.experimental import topologies

  said = {
    "tpu": RuntimeError("JAX TPU support not installed; cannot generate TPU topology."),
    "cuda": NotImplementedError("topology not implemented for cuda"),
  }

  def fail(platform, **arguments):
    raise said[platform]

  monkeypatch.setattr(topologies, "get_topology_desc", fail)
  with pytest.raises(UserError, match=re.escape(f"pip install 'jgpt[{extra}]'")):
    topology.find_target_devices(topology.parse_target(name))


def test_the_environment_is_set_before_jax_is_imported(monkeypatch):
  """What concerns a TPU and is set already stays."""
  for name in topology.TPU_ENVIRONMENT:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "there")
  topology.set_target_environment()
  assert os.environ["JAX_PLATFORMS"] == "cpu" and os.environ["TPU_SKIP_MDS_QUERY"] == "1"
  assert os.environ["TPU_WORKER_HOSTNAMES"] == "there"
  assert "jax" not in vars(topology) and "jax" in sys.modules
