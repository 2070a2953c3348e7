"""A step that a compiler of TPUs refuses: it accepts the settings that the answer names."""

import subprocess
import sys

import pytest
from test_targets import needs_tpu

CHILD = """
from concurrent.futures import ThreadPoolExecutor
from jgpt.devices import topology

topology.set_target_environment()
import jax

from jgpt import program
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.devices import runtime
from jgpt.errors import UserError
from jgpt.sharding import make_mesh

jax.config.update("jax_enable_compilation_cache", False)
devices = topology.find_target_devices(topology.parse_target("tpu:v5e:1x1"))
changes = {"model.num_layers": 2, "data.batch_size": 96, "data.seq_len": 1024, "mesh.data": 1}
changes |= {"compute.attention": "plain", "compute.loss_chunks": 1, "compute.layers": "scan"}
experiment = resolve(change(load_experiment("gpt2_shakespeare"), changes), 50257)
corpus = program.shape_corpus(experiment, 50_000, make_mesh(experiment, devices))
memory = runtime.find_free_memory(devices[0], 1)
lowered = program.lower_programs(experiment, devices, 50_000, names=("steps",))["steps"]
with ThreadPoolExecutor(1) as pool:
  try:
    program.check_memory(pool.submit(lowered.compile), experiment, devices, corpus, memory)
  except UserError as error:
    print(error)
"""


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_tpu
def test_what_a_v5e_refuses_is_answered_with_settings_that_fit():
  done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  said = done.stdout.strip()
  assert "a step takes more memory than a device has, and 16.9 GB of TPU v5 lite are free" in said
  assert "RESOURCE_EXHAUSTED" in said and ". Try --set " in said and "which takes " in said
