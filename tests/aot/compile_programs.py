"""Compiles an experiment's programs for devices that are not there, in a process of its own.

A failed check in XLA would end the process, and what the compiler logs goes to standard error.

    python compile_programs.py '{"target": "tpu:v5e:2x4", "experiment": "names", "changes": {...}}'

prints a JSON object: program -> what the tests look at.
"""

import json
import sys

from jgpt.devices import topology


def patch_cudnn() -> None:
  """Lets cuDNN's attention compile without cuDNN: jax asks the library and the GPU otherwise."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  cudnn.check_cudnn_version = lambda: 91000
  cudnn.check_compute_capability = lambda *args, **kwargs: True
  cudnn.get_compute_capability = lambda *args, **kwargs: 90


def check(experiment, devices) -> str:
  """What a run would say of its step before the first update, on devices with their memory."""
  from concurrent.futures import Future

  from jgpt.devices.limits import find_memory_limit
  from jgpt.errors import UserError
  from jgpt.program import check_memory, lower_programs, shape_corpus
  from jgpt.sharding import make_mesh

  num_tokens, steps = 50_000, Future()
  lowered = lower_programs(experiment, devices, num_tokens, names=("steps",))
  try:
    steps.set_result(lowered["steps"].compile())
  except Exception as error:  # a TPU's compiler refuses what does not fit
    steps.set_exception(error)
  corpus = shape_corpus(experiment, num_tokens, make_mesh(experiment, devices))
  try:
    check_memory(steps, experiment, devices, corpus, find_memory_limit(devices[0].device_kind))
  except UserError as error:
    return str(error)
  return ""


def main(spec: dict) -> dict:
  topology.set_target_environment()
  import jax

  from jgpt.bench import hlo
  from jgpt.config.catalog import load_experiment
  from jgpt.config.settings import change, resolve
  from jgpt.devices.compute import resolve_compute
  from jgpt.params import count_params
  from jgpt.program import lower_programs
  from jgpt.text.tokenizer import CharTokenizer

  jax.config.update("jax_enable_compilation_cache", False)
  devices = topology.find_target_devices(topology.parse_target(spec["target"]))
  if spec.get("cudnn"):
    patch_cudnn()
  changed = change(load_experiment(spec["experiment"]), spec["changes"])
  experiment = resolve(changed, spec["vocab_size"])
  tokenizer = CharTokenizer(" abc", bos=False) if spec["changes"].get("sample.prompt") else None
  if spec.get("check"):
    return {"said": check(experiment, devices)}
  programs = lower_programs(
    experiment, devices, 50_000, names=spec.get("names"), tokenizer=tokenizer
  )
  found = {}
  for name, lowered in programs.items():
    compiled = lowered.compile()
    module = hlo.parse_module(compiled.as_text())
    data = experiment.data
    arrays = hlo.find_arrays_of_batch(module, data.batch_size, data.seq_len)
    found[name] = {
      "peak": compiled.memory_analysis().peak_memory_in_bytes,
      "collectives": [
        {"kind": c.kind, "bytes": c.num_bytes, "trips": [loop.trips for loop in c.loops]}
        for c in hlo.find_collectives(module)
      ],
      "kernels": hlo.count_kernels(module),
      "cycles": hlo.estimate_cycles(module),
      "text": compiled.as_text() if spec.get("text") else None,
      "batch_arrays": [f"{shape.dtype}{shape.dims}" for shape in arrays],
    }
  return {
    "compute": resolve_compute(experiment, devices[0]).compute.__dict__,
    "params": count_params(experiment.model),
    "programs": found,
  }


if __name__ == "__main__":
  print(json.dumps(main(json.loads(sys.argv[1]))))
