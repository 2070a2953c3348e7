"""Every program of a run, compiled for TPUs and GPUs that are not there: what fits, what is summed.

Nothing is run. Each case compiles in a process of its own (`compile_programs.py`). The extras
aot-tpu and aot-gpu bring the compilers: `pip install 'jgpt[aot-tpu,aot-gpu]'`, then
`pytest -m aot`. On 8 virtual CPU devices the same sums are tested in tests/test_program.py.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jgpt.config.settings import parse_setting
from jgpt.devices import limits, topology

pytestmark = [pytest.mark.aot, pytest.mark.timeout(600)]
VOCAB_SIZE = 50257
TWO_LAYERS = {
  "model.num_layers": 2,
  "data.seq_len": 256,
  "data.batch_size": 40,
  "train.eval_batches": 1,
}
DOCUMENTS = {  # of unlike lengths, whose targets weigh 0 past their end
  "model.num_layers": 2,
  "model.dropout": 0.1,
  "model.dropout_places": ["embedding", "attention", "mlp_out"],
  "data.batch_size": 80,
  "train.micro_batch_size": 40,
  "mesh.data": -1,
}
needs_tpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jgpt[aot-tpu]'"
)
needs_gpu = pytest.mark.skipif(
  importlib.util.find_spec("jax_plugins") is None
  or importlib.util.find_spec("jax_plugins.xla_cuda12") is None,
  reason="needs jax's CUDA plugin: pip install 'jgpt[aot-gpu]'",
)


@functools.cache
def _compile(spec: str) -> tuple[dict, str]:
  # The first of these lines is of the partitioner; they go to standard error only if asked for.
  logs = {"TPU_STDERR_LOG_LEVEL": "0", "TPU_MIN_LOG_LEVEL": "0"}
  done = subprocess.run(
    [sys.executable, str(Path(__file__).with_name("compile_programs.py")), spec],
    env=os.environ | logs,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1]), done.stderr


def compile_for(target, changes, experiment="gpt2_shakespeare", **others):
  """What the compiler made of an experiment's programs, each case once in a session."""
  vocab_size = 27 if experiment == "names" else VOCAB_SIZE
  spec = {"target": target, "experiment": experiment, "changes": changes, "vocab_size": vocab_size}
  found, logged = _compile(json.dumps(spec | others))
  assert "Involuntary full rematerialization" not in logged
  return found


def assert_summed_once(found, program="steps"):
  """Each parameter's gradient is summed once, outside the loops over layers and micro-batches."""
  collectives = found["programs"][program]["collectives"]
  expected = 4 * found["params"]
  assert {c["kind"] for c in collectives} == {"all-reduce"}
  assert expected <= sum(c["bytes"] for c in collectives) <= 1.02 * expected
  for c in collectives:  # around it is the loop over steps alone, whose length is an argument
    assert c["trips"] == [None], c


def assert_divided(found):
  """No device has an array of the whole batch, but for its ids and weights."""
  for name, program in found["programs"].items():
    if name == "steps" or name.startswith("evaluation"):
      assert program["batch_arrays"] == [], name


def find_memory(target):
  kind = topology.parse_target(target).kind
  name = {"v5e": "TPU v5e", "v6e": "TPU v6e"}.get(kind) or topology.GPUS[kind].kind
  return limits.find_memory_limit(name)


ALL = {"init", "steps", "save", "sampling", "evaluation", "evaluation of 1 batches"}


@needs_tpu
def test_every_program_compiles_for_eight_tpus():
  found = compile_for("tpu:v5e:2x4", TWO_LAYERS)
  assert found["programs"].keys() - {"stack"} == ALL
  assert found["compute"]["dtype"] == "bfloat16"
  # The kernel that was asked for: in each of two layers, and in the gradient.
  assert found["compute"]["attention"] == "splash"
  assert found["programs"]["steps"]["kernels"]["tpu_custom_call"] >= 4
  assert_summed_once(found)
  assert_divided(found)
  # Parameters, moments and gradients of 4 bytes are 0.87 GB; 5 sequences a chip add their logits.
  assert found["programs"]["steps"]["peak"] < 1.6e9
  assert all(p["peak"] < find_memory("tpu:v5e:2x4") for p in found["programs"].values())


@needs_tpu
def test_micro_batches_are_summed_once_on_tpus():
  changes = TWO_LAYERS | {"compute.attention": "blocks", "train.micro_batch_size": 40}
  found = compile_for("tpu:v5e:2x4", changes | {"data.batch_size": 80}, names=["steps"])
  assert_summed_once(found)
  assert_divided(found)
  assert found["compute"]["attention"] == "blocks" and not found["programs"]["steps"]["kernels"]


@needs_tpu
def test_documents_with_dropout_are_summed_once_on_tpus():
  found = compile_for("tpu:v5e:2x4", DOCUMENTS, "names", names=["steps", "evaluation"])
  assert_summed_once(found)
  assert_divided(found)


@needs_tpu
def test_a_step_compiles_for_v6e():
  found = compile_for("tpu:v6e:2x2", TWO_LAYERS, names=["steps"])
  assert_summed_once(found)
  assert_divided(found)
  assert found["programs"]["steps"]["peak"] < 2.4e9  # 10 sequences a chip
  assert found["compute"]["attention"] == "splash"


@needs_tpu
@pytest.mark.parametrize("target", ["tpu:v5e:2x4", "tpu:v5e:1x1"])
def test_text_after_a_prompt_is_sampled_on_tpus(target):
  """Also past the context; on several chips each runs the kernel on its part."""
  changes = TWO_LAYERS | {"data.seq_len": 300, "sample.prompt": "a cab " * 50, "sample.num": 2}
  changes |= {"sample.max_tokens": 2000, "compute.attention": "splash"}
  found = compile_for(target, changes, names=["sampling"])
  assert found["programs"]["sampling"]["kernels"]


@needs_gpu
@pytest.mark.parametrize("target", ["gpu:t4", "gpu:h100:8"])
def test_every_program_compiles_for_gpus(target):
  found = compile_for(target, TWO_LAYERS)
  assert found["programs"].keys() - {"stack"} == ALL
  assert found["compute"]["dtype"] == ("float32" if target == "gpu:t4" else "bfloat16")
  assert found["compute"]["attention"] == "plain"
  assert all(p["peak"] < find_memory(target) for p in found["programs"].values())
  if target.endswith(":8"):
    assert_summed_once(found)
    assert_divided(found)
    assert found["programs"]["steps"]["peak"] < 1.6e9


@needs_gpu
def test_attention_on_an_h100_is_the_kernel_that_was_asked_for():
  """With cuDNN; without it, as above, another form takes its place."""
  changes = TWO_LAYERS | {"data.batch_size": 80, "train.micro_batch_size": 40}
  found = compile_for("gpu:h100:8", changes, names=["steps"], cudnn=True)
  assert found["compute"]["attention"] == "cudnn"
  kernels = found["programs"]["steps"]["kernels"]
  assert any("fmha" in name for name in kernels), kernels
  assert_summed_once(found)


def bench(*args):
  """Runs `bench --aot` in a process of its own."""
  command = [sys.executable, "-m", "jgpt.bench", *args]
  return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_gpu
def test_bench_reports_programs_for_gpus_that_are_not_there():
  done = bench("--aot", "gpu:h100:2", "--experiment", "names", "--set", "data.batch_size=16")
  assert done.returncode == 0, done.stderr[-2000:]
  lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
  assert lines[0].startswith("gpu:h100:2: 1 x NVIDIA H100 80GB HBM3, ")  # mesh.data=1
  assert any(line.startswith("jax ") and "jax-cuda12-plugin" in line for line in lines)
  (steps,) = [line for line in lines if line.startswith("steps yes")]
  assert " MB fits " in steps


@needs_tpu
def test_bench_says_what_does_not_fit_in_the_compilers_words():
  sizes = {"model.num_layers": 2, "data.seq_len": 1024, "data.batch_size": 256}
  settings = [word for item in sizes.items() for word in ("--set", "{}={}".format(*item))]
  args = ["--aot", "tpu:v5e:1x1", "--experiment", "gpt2_shakespeare", "--only", "steps", "--json"]
  done = bench(*args, *settings)
  assert done.returncode == 1, done.stderr[-2000:]
  (steps,) = json.loads(done.stdout)["programs"]
  assert "RESOURCE_EXHAUSTED" in steps["reason"]
  assert steps["fits"] is False and steps["compiles"] is False and steps["peak_bytes"] is None


@needs_tpu
def test_bench_compares_meshes_of_tpus():
  """Each chip sends the gradients once on data, and on fsdp what is gathered too."""
  settings = ["--set", "data.batch_size=64", "--mesh", "data=8", "--mesh", "data=2,fsdp=4"]
  done = bench("--aot", "tpu:v5e:2x4", "--experiment", "names", "--json", *settings)
  assert done.returncode == 0, done.stderr[-2000:]
  data, fsdp = json.loads(done.stdout)
  assert data["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1} and fsdp["mesh"]["fsdp"] == 4
  gradients = 2 * 4 * 4192 * 7 / 8
  assert gradients <= data["step"]["sent_bytes"] <= 1.02 * gradients
  # Of a product of a handful of numbers the compiler may make a sum.
  assert 0.2 < data["step"]["program_flops"] / data["step"]["flops"] < 5
  for found in (data, fsdp):
    step, (program,) = found["step"], found["programs"]
    assert 0 < step["network_seconds"] < step["most_seconds"] < 0.01
    assert {axis for c in program["collectives"] for axis in c["axes"]} <= {"data", "fsdp"}
    assert all(c["seconds"] is not None for c in program["collectives"])


@needs_gpu
def test_a_step_that_does_not_fit_is_refused_with_settings_that_do():
  """On a T4, whose compiler refuses nothing: 64 sequences have 13 GB of logits alone."""
  changes = TWO_LAYERS | {"data.seq_len": 1024, "data.batch_size": 64}
  said = compile_for("gpu:t4", changes, check=True)["said"]
  assert "a step takes" in said and "of Tesla T4 are free" in said
  settings = re.findall(r"--set ([\w.]+)=(\S+?),?(?= |$)", said.partition("Try ")[2])
  assert settings, said
  fitting = changes | {name: parse_setting(f"{name}={value}")[1] for name, value in settings}
  assert compile_for("gpu:t4", fitting, check=True)["said"] == ""


GPT2 = {"data.seq_len": 1024}


@pytest.mark.slow
@needs_tpu
def test_gpt2_fits_on_a_v5e_with_16_sequences():
  found = compile_for("tpu:v5e:1x1", GPT2 | {"data.batch_size": 16}, names=["steps"])
  assert found["programs"]["steps"]["peak"] < find_memory("tpu:v5e:1x1")


@pytest.mark.slow
@needs_gpu
def test_gpt2_fits_on_a_t4_in_micro_batches_of_8():
  changes = GPT2 | {"data.batch_size": 16, "train.micro_batch_size": 8}
  changes |= {"compute.remat": "block", "compute.loss_chunks": 8}
  found = compile_for("gpu:t4", changes, names=["steps"])
  assert found["programs"]["steps"]["peak"] < find_memory("gpu:t4")


@pytest.mark.slow
@needs_gpu
def test_gpt2_takes_9_gb_on_an_h100():
  found = compile_for("gpu:h100", GPT2 | {"data.batch_size": 8}, names=["steps"], cudnn=True)
  assert found["compute"]["attention"] == "cudnn"
  assert found["programs"]["steps"]["peak"] < 9e9
