"""Devices that are not there: their names, and what the compilers are told."""

import os
import re
import sys

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
